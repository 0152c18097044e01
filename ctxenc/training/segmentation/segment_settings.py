"""The settings of a segmentation training: the recipe of EncNet (arXiv 1803.08904), section 4, and its rules."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field
from pydantic.dataclasses import dataclass

from ctxenc.runs.config import STRICT, Aggregation, CodebookStart, Count, Positive, Side, Smoothing
from ctxenc.runs.errors import UserError
from ctxenc.training.settings import AtLeast0, Natural, Schedule, Text, TrainingSettings, UpTo1, option, option_name

SCENES = "scenes"
RUNS = Path("runs") / "segment"  # parent folder of its runs
MEASURED_ON = ("data", "data_dir", "base_size")  # segment evaluate may choose these
IMAGE_SETTINGS = ("base_size", "crop_size", "scale_min", "scale_max", "rotate", "flip", "val_fraction")
Scale = Annotated[float, Field(gt=0, le=16)]
SEVERAL = {"pair": ("fcn_se", "encnet"), "all": ("fcn", "fcn_se", "encnet_no_se_loss", "encnet")}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SegmentSettings(TrainingSettings):
    """Hold every setting of a segmentation training."""

    data: Text = option(
        SCENES,
        "scenes (embedded), voc, voc_aug, cityscapes, ade20k, or a folder with images/ and masks/",
        metavar="DATA",
    )
    data_dir: Text = option("data", "where voc, voc_aug, cityscapes or ade20k lies", metavar="DIR")

    backbone: Text = option("resnet50", "a timm model that can be dilated", metavar="NAME")
    pretrained_backbone: bool = option(False, "start from timm's pretrained weights of the backbone")
    channels: Count = option(512, "channels of the head")
    num_codes: Count = option(32, "codewords", metavar="K")
    smoothing: Smoothing = option("learned", "learned, sampled or a number", metavar="S")
    aggregation: Aggregation = option("mean", "of residuals over the pixels; sum is the authors'")
    codebook_start: CodebookStart = option("paper", "spread begins where the features are")
    output_stride: Literal[8, 16, 32] = option(8, "of the map that is encoded")
    stages: Count | None = option(None, "maps of the backbone to keep, from the image on (default: all)")
    aux: bool = option(True, "an FCN head on the stage before the last")
    aux_weight: AtLeast0 = option(0.2, "weight of the loss of that head")
    se_loss: bool = option(True, "predict from the encoding which classes are present")
    se_weight: AtLeast0 = option(0.2, "weight of the loss of that prediction")
    lateral: bool = option(False, "fuse the maps of the two stages before the last")

    epochs: Count = option(50, "passes over the training set")
    batch_size: Count = option(16, "images a step and process")
    opt: Text = option("momentum", "a timm optimiser; its sgd is Nesterov's", metavar="NAME")
    momentum: Annotated[float, Field(ge=0, lt=1)] = option(0.9, "momentum of the optimiser")
    lr: Positive = option(1e-3, "peak learning rate of the backbone")
    head_lr_mult: Positive = option(10.0, "learning rate of all but the backbone, as a multiple of --lr")
    weight_decay: AtLeast0 = option(1e-4, "weight decay")
    sched: Schedule = option("poly", "learning rate schedule, stepped each update")
    poly_power: Positive = option(0.9, "exponent of the poly schedule")
    warmup_epochs: Natural = option(0, "epochs of linear warm-up")

    base_size: Side = option(520, "longer side of an image before random scaling, and in validation")
    crop_size: Count = option(480, "side of the random crop")
    scale_min: Scale = option(0.5, "smallest random scale")
    scale_max: Scale = option(2.0, "largest random scale")
    rotate: Annotated[float, Field(ge=0, le=180)] = option(10.0, "largest random rotation, in degrees")
    flip: UpTo1 = option(0.5, "probability of a horizontal flip")

    arms: Literal["encnet", "pair", "all"] = option(
        "encnet",
        "EncNet alone, a pair of an FCN with SE and EncNet, or all networks of the ablation",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_min > self.scale_max:
            raise UserError(f"--scale-min must be at most --scale-max {self.scale_max}, got {self.scale_min}")

    @classmethod
    def resolve(cls, chosen: dict[str, Any]) -> Self:
        """Return the settings of a new run: the defaults (of the data set, if it has its own), then `chosen`.

        Raises:
            UserError: A value breaks its rule.
        """
        data = chosen.get("data", SCENES)
        if data == SCENES and (idle := [name for name in IMAGE_SETTINGS if name in chosen]):
            raise UserError(
                f"{option_name(idle[0])} has no part in --data {SCENES}, whose images are drawn in one size"
            )
        return cls(**(OWN_DEFAULTS.get(data, {}) | chosen))

    @property
    def arm_names(self) -> tuple[str, ...]:
        """Return the networks to train, the baseline first."""
        return SEVERAL.get(self.arms, (self.arms,))


# Defaults of each data set. The scenes: small enough for two CPU cores. ADE20K: section 4 of the paper. Cityscapes, absent from
# the paper, follows PyTorch-Encoding: at a longer side of 520, poles and riders would be a pixel wide.
OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    SCENES: {
        "arms": "pair",
        "backbone": "test_resnet",
        "stages": 2,  # with more stages the FCN would see as far as the cue
        "channels": 64,
        "num_codes": 16,
        "aux": False,
        "base_size": 96,
        "crop_size": 96,
        "epochs": 16,
        "opt": "adamw",
        "lr": 3e-3,
        "head_lr_mult": 1.0,
        "weight_decay": 0.01,
        "sched": "cosine",
        "warmup_epochs": 1,
        "channels_last": True,
    },
    "ade20k": {"epochs": 120, "lr": 0.01},
    "cityscapes": {"base_size": 2048, "crop_size": 720},
}
