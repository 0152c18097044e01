"""The settings of a segmentation training: the recipe of EncNet (arXiv 1803.08904), section 4, and its rules."""

import argparse
from argparse import BooleanOptionalAction
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ctxenc.encoding import AGGREGATIONS, STARTS
from ctxenc.runs.config import LONGEST_SIDE
from ctxenc.runs.errors import UserError
from ctxenc.training.console import positive_int, smoothing
from ctxenc.training.settings import (
    AT_LEAST_0,
    POSITIVE,
    SCHEDULES,
    UP_TO_1,
    Rules,
    TrainingSettings,
    flag,
    option,
    option_name,
    resumed_as,
)
from ctxenc.training.settings import given as given_of

SCENES = "scenes"
RUNS = Path("runs") / "segment"  # parent folder of its runs
MEASURED_ON = ("data", "data_dir", "base_size")  # segment evaluate may choose these
ARMS = ("encnet", "pair", "all")
IMAGE_SETTINGS = ("base_size", "crop_size", "scale_min", "scale_max", "rotate", "flip", "val_fraction")
SEVERAL = {"pair": ("fcn_se", "encnet"), "all": ("fcn", "fcn_se", "encnet_no_se_loss", "encnet")}


@dataclass(frozen=True, kw_only=True)
class SegmentSettings(TrainingSettings):
    """Hold every setting of a segmentation training.

    Raises:
        UserError: A value breaks its rule; the text names the option, the rule and the value.
    """

    rules: ClassVar[Rules] = {
        "aux_weight": AT_LEAST_0,
        "se_weight": AT_LEAST_0,
        "base_size": (f"in [1, {LONGEST_SIDE}]", lambda value: 1 <= value <= LONGEST_SIDE),
        "momentum": ("at least 0 and below 1", lambda value: 0 <= value < 1),
        "head_lr_mult": POSITIVE,
        "poly_power": POSITIVE,
        "scale_min": ("above 0 and at most 16", lambda value: 0 < value <= 16),
        "scale_max": ("above 0 and at most 16", lambda value: 0 < value <= 16),
        "arms": (" or ".join(ARMS), lambda value: value in ARMS),
        "rotate": ("in [0, 180]", lambda value: 0 <= value <= 180),
        "flip": UP_TO_1,
    }

    data: str = option(
        SCENES,
        "scenes (embedded), voc, voc_aug, cityscapes, ade20k, or a folder with images/ and masks/",
        metavar="DATA",
    )
    data_dir: str = option("data", "where voc, voc_aug, cityscapes or ade20k lies", metavar="DIR")

    backbone: str = option("resnet50", "a timm model that can be dilated", metavar="NAME")
    pretrained_backbone: bool = flag("start from timm's pretrained weights of the backbone")
    channels: int = option(512, "channels of the head", type=positive_int)
    num_codes: int = option(32, "codewords", type=positive_int, metavar="K")
    smoothing: str | float = option("learned", "learned, sampled or a number", type=smoothing, metavar="S")
    aggregation: str = option("mean", "of residuals over the pixels; sum is the authors'", choices=AGGREGATIONS)
    codebook_start: str = option("paper", "spread begins where the features are", choices=STARTS)
    output_stride: int = option(8, "of the map that is encoded", type=int, choices=(8, 16, 32))
    stages: int | None = option(
        None, "maps of the backbone to keep, from the image on (default: all)", type=positive_int
    )
    aux: bool = option(True, "an FCN head on the stage before the last", action=BooleanOptionalAction)
    aux_weight: float = option(0.2, "weight of the loss of that head", type=float)
    se_loss: bool = option(True, "predict from the encoding which classes are present", action=BooleanOptionalAction)
    se_weight: float = option(0.2, "weight of the loss of that prediction", type=float)
    lateral: bool = flag("fuse the maps of the two stages before the last")

    epochs: int = option(50, "passes over the training set", type=positive_int)
    batch_size: int = option(16, "images a step and process", type=positive_int)
    opt: str = option("momentum", "a timm optimiser; its sgd is Nesterov's", metavar="NAME")
    momentum: float = option(0.9, "momentum of the optimiser", type=float)
    lr: float = option(1e-3, "peak learning rate of the backbone", type=float)
    head_lr_mult: float = option(10.0, "learning rate of all but the backbone, as a multiple of --lr", type=float)
    weight_decay: float = option(1e-4, "weight decay", type=float)
    sched: str = option("poly", "learning rate schedule, stepped each update", choices=SCHEDULES)
    poly_power: float = option(0.9, "exponent of the poly schedule", type=float)
    warmup_epochs: int = option(0, "epochs of linear warm-up", type=int)

    base_size: int = option(520, "longer side of an image before random scaling, and in validation", type=positive_int)
    crop_size: int = option(480, "side of the random crop", type=positive_int)
    scale_min: float = option(0.5, "smallest random scale", type=float)
    scale_max: float = option(2.0, "largest random scale", type=float)
    rotate: float = option(10.0, "largest random rotation, in degrees", type=float)
    flip: float = option(0.5, "probability of a horizontal flip", type=float)

    arms: str = option(
        "encnet",
        "EncNet alone, a pair of an FCN with SE and EncNet, or all networks of the ablation",
        choices=ARMS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_min > self.scale_max:
            raise UserError(f"--scale-min must be at most --scale-max {self.scale_max}, got {self.scale_min}")

    @property
    def arm_names(self) -> tuple[str, ...]:
        """The networks to train, the baseline first."""
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


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings named on the command line."""
    return given_of(args, SegmentSettings)


def resolve(chosen: dict[str, Any]) -> SegmentSettings:
    """Return the settings of a new run: the defaults (of the data set, if it has its own), then `chosen`.

    Raises:
        UserError: A value breaks its rule.
    """
    data = chosen.get("data", SCENES)
    if data == SCENES and (idle := [name for name in IMAGE_SETTINGS if name in chosen]):
        raise UserError(f"{option_name(idle[0])} has no part in --data {SCENES}, whose images are drawn in one size")
    return SegmentSettings(**(OWN_DEFAULTS.get(data, {}) | chosen))


def resumed(stored: dict[str, Any], chosen: dict[str, Any]) -> SegmentSettings:
    """Return the settings of a resumed run: the stored ones; only place and speed of the run may change.

    Args:
        stored: The settings in the run's configuration.
        chosen: The settings named on the command line.

    Raises:
        UserError: `chosen` changes a setting that shapes the result, or `stored` is of another version.
    """
    return resumed_as(SegmentSettings, stored, chosen)
