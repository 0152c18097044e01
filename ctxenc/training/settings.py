"""The settings of a fine-tuning: names, defaults, rules and command line. pydantic holds the rules."""

import argparse
import os
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from ctxenc.runs.config import (
    STRICT,
    Aggregation,
    CodebookStart,
    Codes,
    Count,
    ModelKwargs,
    Pool,
    Positive,
    Side,
    Smoothing,
    parse_json,
)
from ctxenc.runs.errors import UserError, explain, near_names, one_line
from ctxenc.training.console import swap_settings

ARMS = {"both": ("se", "context"), "se": ("se",), "context": ("context",)}
PHOTOGRAPHS = "photographs"
RUNS = Path("runs")  # parent folder of its runs
MAX_SEED = 2**32 - 1  # numpy's limit
# Settings that --resume may change.
MOVABLE = (
    *("data", "data_dir", "download", "device", "workers", "threads"),
    *("checkpoint_every", "keep", "skip_nonfinite", "on_bad_image", "tensorboard"),
)


def check_text(text: str) -> str:
    """Raise ValueError unless the system accepts a text as a name: JSON may hold others."""
    try:
        if b"\0" not in os.fsencode(text):
            return text
    except UnicodeEncodeError:
        pass
    raise ValueError("must be text without NUL and lone surrogates")


Text = Annotated[str, AfterValidator(check_text)]
Natural = Annotated[int, Field(ge=0, le=2**63 - 1)]
AtLeast0 = Annotated[float, Field(ge=0, le=1e9)]
UpTo1 = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Workers = Annotated[int, Field(ge=0, le=256)]  # each is a process of some 300 MB
Threads = Annotated[int, Field(ge=1, le=1024)]  # systems still create so many; if one cannot, OpenMP ends the process
Schedule = Literal["cosine", "tanh", "poly", "step", "none"]


def option(default: Any, text: str, **keywords: Any) -> Any:
    """Declare a setting with its help text and its argparse arguments."""
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"help": text, **keywords})


def convert(text: str, kind: Any) -> Any:
    """Convert the text of an argument to a setting's type for argparse."""
    try:
        if kind is ModelKwargs:
            return TypeAdapter(kind, config=STRICT).validate_python(parse_json(text))
        return TypeAdapter(kind, config=STRICT).validate_strings(text)
    except ValidationError as error:
        raise argparse.ArgumentTypeError(explain(error)[1]) from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object: {one_line(error)}") from error


def option_name(name: str) -> str:
    """Return the command line's spelling of a setting."""
    return "--" + name.replace("_", "-")


def check_optimizer(name: str) -> None:
    """Raise UserError, with near names, unless timm has an optimiser called `name`."""
    import torch  # import both here: with them --help takes 4 s
    from timm.optim import list_optimizers

    known = [str(each) for each in list_optimizers()]
    if name in known:
        return
    if name.lower() in {each.lower() for each in dir(torch.optim)} - set(known):
        raise UserError(f"--opt must be an optimiser of timm, got {name!r}, which only torch.optim has")
    raise UserError(f"unknown --opt {name!r}; {near_names(name, known)}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainingSettings:
    """Hold the settings of all trainings. A subclass adds its own, and may have other defaults.

    Raises:
        UserError: A value breaks its rule; the text names the option, the rule and the value.
    """

    val_fraction: Fraction = option(0.2, "share of the images held out where a folder has no val")
    workers: Workers = option(0, "processes that load images, no more than an epoch has batches")
    on_bad_image: Literal["fail", "skip"] = option(
        "fail",
        "what to do where an image cannot be read: fail, or skip it: another takes its place, in validation it does not count",
    )

    epochs: Count = option(30, "passes over the training set")
    batch_size: Count = option(64, "images a step and process")
    opt: Text = option("adamw", "a timm optimiser", metavar="NAME")
    lr: Positive = option(1e-3, "peak learning rate")
    weight_decay: AtLeast0 = option(0.05, "weight decay")
    sched: Schedule = option("cosine", "learning rate schedule, stepped each update")
    warmup_epochs: Natural = option(1, "epochs of linear warm-up")
    clip_grad: Positive | None = option(None, "largest norm of the gradient (default: no limit)")

    seed: Natural = option(0, "first seed of the weights and of all that is drawn")
    seeds: Count = option(1, "number of seeds, each trained")
    checkpoint_every: Count | None = option(
        None, "steps between checkpoints in an epoch (default: one after each epoch)", metavar="N"
    )
    keep: Count = option(3, "checkpoints to keep", metavar="N")
    skip_nonfinite: Natural = option(0, "steps to leave out whose loss or gradient is NaN or infinite", metavar="N")
    threads: Threads | None = option(None, "CPU threads of each process (default: PyTorch's)")
    tensorboard: bool = option(False, "log to ARM/tensorboard: pip install 'ctxenc[tensorboard]'")
    device: Text = option("auto", "cpu, cuda, cuda:1, mps, ...", metavar="DEVICE")
    amp: Literal["bf16", "fp16"] | None = option(
        None, "mixed precision (default: none, or what accelerate launch names)"
    )
    sync_bn: bool | None = option(
        None, "batch norms over the images of all processes, on GPUs (default: segment train yes, finetune no)"
    )
    channels_last: bool = option(False, "channels-last memory format")
    compile: bool = option(False, "torch.compile the network")

    @model_validator(mode="wrap")
    @classmethod
    def _tell(cls, values: Any, check: Any) -> Any:
        try:
            return check(values)
        except ValidationError as error:
            place, rule = explain(error)
            raise UserError(f"{option_name(place.split('.')[0])} {rule}") from error

    def __post_init__(self) -> None:
        if self.seed_list[-1] > MAX_SEED:
            raise UserError(
                f"--seed must be at most {MAX_SEED + 1 - self.seeds} with --seeds {self.seeds}, got {self.seed}"
            )
        check_optimizer(self.opt)
        if self.warmup_epochs > self.epochs:
            raise UserError(f"--warmup-epochs must be at most --epochs {self.epochs}, got {self.warmup_epochs}")

    @property
    def seed_list(self) -> range:
        """Return the seeds of each arm."""
        return range(self.seed, self.seed + self.seeds)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values by name."""
        return asdict(self)

    @classmethod
    def read(cls, args: argparse.Namespace) -> dict[str, Any]:
        """Return the settings that the command line names."""
        names = {each.name for each in fields(cls)}
        return {key: value for key, value in vars(args).items() if key in names and value is not None}

    @classmethod
    def resume(cls, stored: dict[str, Any], chosen: dict[str, Any]) -> Self:
        """Return the settings of a resumed run: the stored ones; only place and speed of the run may change.

        Args:
            stored: The settings in the run's configuration.
            chosen: The settings named on the command line.

        Raises:
            UserError: `chosen` changes a setting that shapes the result, or `stored` is of another version.
        """
        stored = {"aggregation": "sum"} | stored  # runs older than this option used the sum
        for name, value in chosen.items():
            if name not in MOVABLE and value != stored.get(name):
                raise UserError(f"--resume: {option_name(name)} was {stored.get(name)} in this run, got {value}")
        if unknown := sorted(stored.keys() - {each.name for each in fields(cls)}):
            raise UserError(f"--resume: the run's settings hold {unknown[0]!r}, which this version does not know")
        return cls(**(stored | chosen))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SwapSettings:
    """Hold the settings of ctxenc.patch_se_blocks."""

    num_codes: Codes = option(16, "codewords a block", metavar="K")
    smoothing: Smoothing = option("learned", "learned, sampled or a number", metavar="S")
    rd_ratio: Positive | None = option(None, "channel reduction (default: that of each SE block)", metavar="R")
    pool: Pool = option("mean", "over codewords")
    aggregation: Aggregation = option(
        "mean", "of residuals over the pixels; sum is the papers', and depends on the image's size"
    )
    max_size: Count | None = option(
        None,
        "average-pool larger maps to N x N before they are projected, which is cheaper (default: all pixels)",
        metavar="N",
    )
    codebook_start: CodebookStart = option(
        "paper", "of blocks that are not calibrated: spread begins with codewords where the features are"
    )
    fill_empty: bool = option(False, "put blocks into the empty slots of a plain ResNet")

    @property
    def swap(self) -> dict[str, Any]:
        """Return the keyword arguments of ctxenc.patch_se_blocks."""
        return swap_settings(self)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Settings(SwapSettings, TrainingSettings):
    """Hold every setting of a fine-tuning."""

    data: Text = option(
        PHOTOGRAPHS,
        "photographs (embedded), cifar10, cifar100, fashion_mnist, imagenet, or an image folder",
        metavar="DATA",
    )
    data_dir: Text = option("data", "where cifar10, cifar100, fashion_mnist or imagenet lies", metavar="DIR")
    download: bool = option(False, "download cifar10, cifar100 or fashion_mnist into --data-dir")
    val_fraction: Fraction = option(0.2, "share of each class held out where a folder has no val/")
    image_size: Side | None = option(None, "side in pixels (default: the model's own)")

    model: Text = option("seresnet50", "a timm model", metavar="NAME")
    model_kwargs: ModelKwargs = option(dict, "further arguments of timm.create_model, a JSON object")
    pretrained: bool = option(False, "start from timm's pretrained weights")
    initial_checkpoint: Text | None = option(
        None,
        "start from the weights of a network with SE blocks: a run of finetune, a file of safetensors, or a checkpoint of timm's"
        " train.py; a classifier of another number of classes begins anew (default: none)",
        metavar="PATH",
    )
    init: Literal["calibrated", "neutral", "random"] | None = option(
        None,
        "how blocks in the place of SE blocks begin: calibrated to what these say of 256 training images, neutral (their mean"
        " gate) or random (default: calibrated with --pretrained or --initial-checkpoint, else random)",
    )
    arms: Literal["both", "se", "context"] = option(
        "context", "what to train: the SE network, the swapped one, or both"
    )

    label_smoothing: UpTo1 = option(0.0, "share of the target spread over all classes")
    model_ema: bool = option(False, "keep a moving average of the weights, and evaluate and save that")
    ema_decay: UpTo1 = option(0.999, "decay of that average")

    crop_scale: Annotated[float, Field(gt=0, le=1)] = option(0.35, "smallest area of the random resized crop")
    crop_padding: Annotated[int, Field(ge=0, le=512)] | None = option(
        None, "pixels to pad an image by and crop it again, in place of that crop, as for CIFAR (default: none)"
    )
    color_jitter: AtLeast0 = option(0.4, "strength of the colour jitter")
    auto_augment: Text | None = option(None, "a timm policy, such as rand-m9-mstd0.5", metavar="POLICY")
    random_erase: UpTo1 = option(0.0, "probability of erasing a rectangle")
    mixup: AtLeast0 = option(0.0, "alpha of mixup")
    cutmix: AtLeast0 = option(0.0, "alpha of CutMix")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise UserError(f"--batch-size must be even with --mixup or --cutmix, got {self.batch_size}")
        if self.pretrained and self.initial_checkpoint:
            raise UserError(f"--pretrained and --initial-checkpoint {self.initial_checkpoint}: take one of them")
        if self.pretrained and self.model_kwargs == EMBEDDED["model_kwargs"]:
            raise UserError(
                "--pretrained: timm has no weights of the small network that is trained by default; give a --model"
            )

    @classmethod
    def resolve(cls, chosen: dict[str, Any]) -> Self:
        """Return the settings of a new run: the defaults (the photographs have their own), then `chosen`.

        Raises:
            UserError: A value breaks its rule.
        """
        defaults = dict(EMBEDDED) if chosen.get("data", PHOTOGRAPHS) == PHOTOGRAPHS else {}
        if "model" in chosen:
            defaults.pop("model_kwargs", None)
        return cls(**(defaults | chosen))

    @property
    def arm_names(self) -> tuple[str, ...]:
        """Return the arms in the order of training."""
        return ARMS[self.arms]

    @property
    def start(self) -> str:
        """Return how swapped blocks start."""
        return self.init or ("calibrated" if self.pretrained or self.initial_checkpoint else "random")


# The run without arguments: small enough for two CPU cores, both arms side by side.
EMBEDDED: dict[str, Any] = {
    "model": "resnet10t",
    "model_kwargs": {"block_args": {"attn_layer": "se"}, "channels": [24, 48, 96, 192], "stem_width": 8},
    "image_size": 64,
    "channels_last": True,  # 1.4 times as many images per second as channels-first, on one core
    "threads": 1,  # a second thread gains little at this size, and loses all if another process wants its core
    "arms": "both",
    "seeds": 3,
    "epochs": 12,
    "batch_size": 32,
    "lr": 3e-3,
}
