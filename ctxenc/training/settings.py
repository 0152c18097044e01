"""The settings of a fine-tuning: names, defaults, rules and command line."""

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import torch
from timm.optim import list_optimizers

from ctxenc.runs.config import LONGEST_SIDE, MODEL_KWARGS_RULE, parse_json, shortened
from ctxenc.runs.errors import UserError, near_names, one_line
from ctxenc.swap.calibration import STARTS
from ctxenc.training import bad_images
from ctxenc.training.console import positive_int, swap_settings

ARMS = {"both": ("se", "context"), "se": ("se",), "context": ("context",)}
SCHEDULES = ("cosine", "tanh", "poly", "step", "none")
PHOTOGRAPHS = "photographs"
RUNS = Path("runs")  # parent folder of its runs
MAX_SEED = 2**32 - 1  # numpy's limit
# Settings that --resume may change.
MOVABLE = (
    *("data", "data_dir", "download", "device", "workers", "threads"),
    *("checkpoint_every", "keep", "skip_nonfinite", "on_bad_image", "tensorboard"),
)
MAX_INTEGER = 2**63 - 1  # torch's limit
MAX_WORKERS = 256  # each is a process of some 300 MB
MAX_THREADS = 1024  # systems still create so many; if one cannot, OpenMP ends the process
LARGEST = 1e9  # limit for numbers: products of two still fit fp32
Rules = dict[str, tuple[str, Callable[[Any], bool]]]
Kind = TypeVar("Kind")


def option(default: Any, text: str, **keywords: Any) -> Any:
    """Declare a setting with its help text and its argparse arguments."""
    return field(default=default, metadata={"help": text, **keywords})


def flag(text: str) -> Any:
    """Declare a setting that is off unless named."""
    return option(False, text, action=argparse.BooleanOptionalAction)


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object for argparse."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def check_values(settings: Any, rules: Rules) -> None:
    """Raise UserError for the first of `settings` that argparse would have refused: values of a file may be anything.

    A setting with a rule in `rules` is checked for its type alone; the rule checks the rest.
    """
    kinds = get_type_hints(type(settings))
    for each in fields(settings):
        value, kind, choices = getattr(settings, each.name), kinds[each.name], each.metadata.get("choices")
        problem = None
        if type(value) is int and abs(value) > MAX_INTEGER:
            problem = f"in [{-MAX_INTEGER}, {MAX_INTEGER}]"
        elif not _is_of(value, kind):
            problem = f"of type {getattr(kind, '__name__', kind)}"
        elif isinstance(value, float) and LARGEST < abs(value) < math.inf:
            problem = f"in [-{LARGEST:g}, {LARGEST:g}]"
        elif isinstance(value, str) and not _is_text(value):
            problem = "text without NUL and lone surrogates"
        elif value is None or each.name in rules:
            continue
        elif choices and value not in choices:
            problem = f"one of {', '.join(map(str, choices))}"
        elif each.metadata.get("type") is positive_int and value < 1:
            problem = "at least 1"
        if problem:
            raise UserError(f"{option_name(each.name)} must be {problem}, got {shortened(value)}")


def _is_of(value: Any, kind: Any) -> bool:
    """Return whether a JSON value has a setting's type. An integer is a float too; True is not a number."""
    if isinstance(kind, UnionType):
        return any(_is_of(value, each) for each in get_args(kind))
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, (int, float) if kind is float else get_origin(kind) or kind)


def _is_text(value: str) -> bool:
    """Return whether the system accepts a text as a name: JSON may hold others."""
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def check_rules(settings: object, rules: Rules) -> None:
    """Raise UserError for the first of `settings` that breaks its rule; None breaks no rule."""
    check_values(settings, rules)
    for name, (rule, holds) in rules.items():
        value = getattr(settings, name)
        if value is not None and not holds(value):
            raise UserError(f"{option_name(name)} must be {rule}, got {value}")


def check_optimizer(name: str) -> None:
    """Raise UserError, with near names, unless timm has an optimiser called `name`."""
    known = [str(each) for each in list_optimizers()]
    if name in known:
        return
    if name.lower() in {each.lower() for each in dir(torch.optim)} - set(known):
        raise UserError(f"--opt must be an optimiser of timm, got {name!r}, which only torch.optim has")
    raise UserError(f"unknown --opt {name!r}; {near_names(name, known)}")


def _number(low: float, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: low <= value <= high and math.isfinite(value)


POSITIVE: tuple[str, Callable[[Any], bool]] = ("a positive number", lambda value: 0 < value < math.inf)
AT_LEAST_0 = ("at least 0", _number(0))
AT_LEAST_1 = ("at least 1", _number(1))
UP_TO_1 = ("in [0, 1]", _number(0, 1))
FRACTION: tuple[str, Callable[[Any], bool]] = ("above 0 and below 1", lambda value: 0 < value < 1)
_SHARED_RULES: Rules = {
    "val_fraction": FRACTION,
    "workers": (f"in [0, {MAX_WORKERS}]", _number(0, MAX_WORKERS)),
    "batch_size": AT_LEAST_1,
    "lr": POSITIVE,
    "weight_decay": AT_LEAST_0,
    "sched": (", ".join(SCHEDULES), lambda value: value in SCHEDULES),
    "warmup_epochs": AT_LEAST_0,
    "clip_grad": POSITIVE,
    "seed": AT_LEAST_0,
    "keep": AT_LEAST_1,
    "checkpoint_every": AT_LEAST_1,
    "skip_nonfinite": AT_LEAST_0,
    "threads": (f"in [1, {MAX_THREADS}]", _number(1, MAX_THREADS)),
}


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Hold the settings of all trainings. A subclass adds its own, with their rules, and may have other defaults.

    Raises:
        UserError: A value breaks its rule; the text names the option, the rule and the value.
    """

    rules: ClassVar[Rules] = {}

    val_fraction: float = option(0.2, "share of the images held out where a folder has no val", type=float)
    workers: int = option(0, "processes that load images, no more than an epoch has batches", type=int)
    on_bad_image: str = option(
        bad_images.FAIL,
        "what to do where an image cannot be read: fail, or skip it: another takes its place, in validation it does not count",
        choices=bad_images.CHOICES,
    )

    epochs: int = option(30, "passes over the training set", type=positive_int)
    batch_size: int = option(64, "images a step and process", type=positive_int)
    opt: str = option("adamw", "a timm optimiser", metavar="NAME")
    lr: float = option(1e-3, "peak learning rate", type=float)
    weight_decay: float = option(0.05, "weight decay", type=float)
    sched: str = option("cosine", "learning rate schedule, stepped each update", choices=SCHEDULES)
    warmup_epochs: int = option(1, "epochs of linear warm-up", type=int)
    clip_grad: float | None = option(None, "largest norm of the gradient (default: no limit)", type=float)

    seed: int = option(0, "first seed of the weights and of all that is drawn", type=int)
    seeds: int = option(1, "number of seeds, each trained", type=positive_int)
    checkpoint_every: int | None = option(
        None, "steps between checkpoints in an epoch (default: one after each epoch)", type=positive_int, metavar="N"
    )
    keep: int = option(3, "checkpoints to keep", type=positive_int, metavar="N")
    skip_nonfinite: int = option(
        0, "steps to leave out whose loss or gradient is NaN or infinite", type=int, metavar="N"
    )
    threads: int | None = option(None, "CPU threads of each process (default: PyTorch's)", type=positive_int)
    tensorboard: bool = flag("log to ARM/tensorboard: pip install 'ctxenc[tensorboard]'")
    device: str = option("auto", "cpu, cuda, cuda:1, mps, ...", metavar="DEVICE")
    amp: str | None = option(
        None, "mixed precision (default: none, or what accelerate launch names)", choices=("bf16", "fp16")
    )
    sync_bn: bool | None = option(
        None,
        "batch norms over the images of all processes, on GPUs (default: segment train yes, finetune no)",
        action=argparse.BooleanOptionalAction,
    )
    channels_last: bool = flag("channels-last memory format")
    compile: bool = flag("torch.compile the network")

    def __post_init__(self) -> None:
        check_rules(self, _SHARED_RULES | self.rules)
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


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingSettings):
    """Hold every setting of a fine-tuning. The help texts of the swap's settings are shared by all commands, in the console
    module.

    Raises:
        UserError: A value breaks its rule; the text names the option, the rule and the value.
    """

    rules: ClassVar[Rules] = {
        "model_kwargs": MODEL_KWARGS_RULE,
        "image_size": (f"in [1, {LONGEST_SIDE}]", _number(1, LONGEST_SIDE)),
        "num_codes": ("in [1, 1000000]", _number(1, 1_000_000)),
        "label_smoothing": UP_TO_1,
        "ema_decay": UP_TO_1,
        "crop_scale": ("above 0 and at most 1", lambda value: 0 < value <= 1),
        "crop_padding": ("in [0, 512]", _number(0, 512)),
        "color_jitter": AT_LEAST_0,
        "random_erase": UP_TO_1,
        "mixup": AT_LEAST_0,
        "cutmix": AT_LEAST_0,
        "init": (", ".join(STARTS), lambda value: value in STARTS),
    }

    data: str = option(
        PHOTOGRAPHS,
        "photographs (embedded), cifar10, cifar100, fashion_mnist, imagenet, or an image folder",
        metavar="DATA",
    )
    data_dir: str = option("data", "where cifar10, cifar100, fashion_mnist or imagenet lies", metavar="DIR")
    download: bool = flag("download cifar10, cifar100 or fashion_mnist into --data-dir")
    val_fraction: float = option(0.2, "share of each class held out where a folder has no val/", type=float)
    image_size: int | None = option(None, "side in pixels (default: the model's own)", type=positive_int)

    model: str = option("seresnet50", "a timm model", metavar="NAME")
    model_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further arguments of timm.create_model, a JSON object", "type": json_object},
    )
    pretrained: bool = flag("start from timm's pretrained weights")
    initial_checkpoint: str | None = option(
        None,
        "start from the weights of a network with SE blocks: a run of finetune, a file of safetensors, or a checkpoint of timm's"
        " train.py; a classifier of another number of classes begins anew (default: none)",
        metavar="PATH",
    )
    init: str | None = option(
        None,
        "how blocks in the place of SE blocks begin: calibrated to what these say of 256 training images, neutral (their mean"
        " gate) or random (default: calibrated with --pretrained or --initial-checkpoint, else random)",
        choices=STARTS,
    )
    arms: str = option("context", "what to train: the SE network, the swapped one, or both", choices=tuple(ARMS))
    num_codes: int = 16
    smoothing: str | float = "learned"
    rd_ratio: float | None = None
    pool: str = "mean"
    aggregation: str = "mean"
    max_size: int | None = None
    codebook_start: str = "paper"
    fill_empty: bool = False

    label_smoothing: float = option(0.0, "share of the target spread over all classes", type=float)
    model_ema: bool = flag("keep a moving average of the weights, and evaluate and save that")
    ema_decay: float = option(0.999, "decay of that average", type=float)

    crop_scale: float = option(0.35, "smallest area of the random resized crop", type=float)
    crop_padding: int | None = option(
        None,
        "pixels to pad an image by and crop it again, in place of that crop, as for CIFAR (default: none)",
        type=int,
    )
    color_jitter: float = option(0.4, "strength of the colour jitter", type=float)
    auto_augment: str | None = option(None, "a timm policy, such as rand-m9-mstd0.5", metavar="POLICY")
    random_erase: float = option(0.0, "probability of erasing a rectangle", type=float)
    mixup: float = option(0.0, "alpha of mixup", type=float)
    cutmix: float = option(0.0, "alpha of CutMix", type=float)

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

    @property
    def arm_names(self) -> tuple[str, ...]:
        """Return the arms in the order of training."""
        return ARMS[self.arms]

    @property
    def start(self) -> str:
        """Return how swapped blocks start."""
        return self.init or ("calibrated" if self.pretrained or self.initial_checkpoint else "random")

    @property
    def swap(self) -> dict[str, Any]:
        """Return the keyword arguments of ctxenc.patch_se_blocks."""
        return swap_settings(self)


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


def option_name(name: str) -> str:
    """Return the command line's spelling of a setting."""
    return "--" + name.replace("_", "-")


def given(args: argparse.Namespace, kind: type = Settings) -> dict[str, Any]:
    """Return the settings of the dataclass `kind` that the command line names."""
    names = {each.name for each in fields(kind)}
    return {key: value for key, value in vars(args).items() if key in names and value is not None}


def resolve(chosen: dict[str, Any]) -> Settings:
    """Return the settings of a new run: the defaults (the photographs have their own), then `chosen`.

    Raises:
        UserError: A value breaks its rule.
    """
    defaults = dict(EMBEDDED) if chosen.get("data", PHOTOGRAPHS) == PHOTOGRAPHS else {}
    if "model" in chosen:
        defaults.pop("model_kwargs", None)
    return Settings(**(defaults | chosen))


def resumed(stored: dict[str, Any], chosen: dict[str, Any]) -> Settings:
    """Return the settings of a resumed run: the stored ones; only place and speed of the run may change.

    Args:
        stored: The settings in the run's configuration.
        chosen: The settings named on the command line.

    Raises:
        UserError: `chosen` changes a setting that shapes the result, or `stored` is of another version.
    """
    return resumed_as(Settings, stored, chosen)


def resumed_as(kind: Callable[..., Kind], stored: dict[str, Any], chosen: dict[str, Any]) -> Kind:
    """Do the work of `resumed` for the settings of any command, given their dataclass `kind`."""
    stored = {"aggregation": "sum"} | stored  # runs older than this option used the sum
    for name, value in chosen.items():
        if name not in MOVABLE and value != stored.get(name):
            raise UserError(f"--resume: {option_name(name)} was {stored.get(name)} in this run, got {value}")
    try:
        return kind(**(stored | chosen))
    except TypeError as error:
        raise UserError(f"--resume: the run's settings are not those of this version: {error}") from error
