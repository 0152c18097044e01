"""What is trained: EncNet, and the networks that it is compared with, each described by a configuration that rebuilds it."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from ctxenc.integrations.encnet import EncNet
from ctxenc.training.config import FORMAT, are_colours
from ctxenc.training.console import UserError, one_line
from ctxenc.training.runs import check_model_name, installed_versions
from ctxenc.training.segmentation.settings import SCENES, SegmentSettings

# EncNet and what the ablation of the paper compares it with, with the names under which they are reported.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "fcn": ("FCN", {"context": "none", "se_loss": False}),
    "fcn_se": ("FCN + global pooling (SE)", {"context": "pool", "se_loss": False}),
    "encnet_no_se_loss": ("EncNet without SE-loss", {"context": "encoding", "se_loss": False}),
    "encnet": ("EncNet", {"context": "encoding"}),
}
CONTEXTS = ("encoding", "pool", "none")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class SegmentConfig:
    """Everything that rebuilds the network of one arm and prepares images for it.

    Args:
        network: Keyword arguments of EncNet.
        context: What gates its head: "encoding", "pool" (the global mean, as SE) or "none".
        classes: Class names in the order of the logits.
        mean: Of the colour channels, in [0, 1].
        std: Likewise.
        settings: Every setting of the command line, resolved (JSON values).
        versions: Versions of Python and the libraries that made the run.
        kind: "segment".
        format: Version of this layout.

    Raises:
        ValueError: A field holds something else than described here.
    """

    network: dict[str, Any]
    context: str
    classes: list[str]
    mean: list[float]
    std: list[float]
    settings: dict[str, Any]
    versions: dict[str, str]
    kind: str = "segment"
    format: int = FORMAT

    def __post_init__(self) -> None:
        network = self.network if isinstance(self.network, dict) else {}
        classes = self.classes if isinstance(self.classes, list) else []
        colours = [each for each in (self.mean, self.std) if isinstance(each, list) and len(each) == 3]
        rules = {
            "network": {"channels", "num_classes"} <= network.keys() and "pretrained_backbone" not in network,
            "context": self.context in CONTEXTS,
            "classes": all(isinstance(each, str) for each in classes)
            and 0 < len(classes) == network.get("num_classes"),
            "mean and std": len(colours) == 2 and are_colours(*colours),
            "settings": isinstance(self.settings, dict),
            "versions": isinstance(self.versions, dict),
            "kind": self.kind == "segment",
        }
        for name, holds in rules.items():
            if not holds:
                raise ValueError(f"config: {name} must be that of a segmentation run, got another")


class PooledContext(nn.Module):
    """What EncNet's module becomes where the mean of the map takes the place of its encoding, as in SE; no more differs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        self.fc = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        gate = self.fc(self.project(x).mean((2, 3))).sigmoid()[:, :, None, None]
        return torch.relu(x + x * gate), None


class NoContext(nn.Module):
    """What it becomes in an FCN: nothing."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


def arm_configs(settings: SegmentSettings, classes: list[str]) -> dict[str, SegmentConfig]:
    """The configuration of each arm that ``settings`` ask for.

    Raises:
        UserError: There is no such backbone.
    """
    check_model_name(settings.backbone)
    shared: dict[str, Any] = {
        "backbone": settings.backbone,
        "num_classes": len(classes),
        "num_codes": settings.num_codes,
        "aux": settings.aux and settings.aux_weight > 0,  # DDP takes no parameters that learn nothing
        "smoothing": settings.smoothing,
        "aggregation": settings.aggregation,
        "start": settings.codebook_start,
        "lateral": settings.lateral,
        "output_stride": settings.output_stride,
        "stages": settings.stages,
        "channels": settings.channels,
    }
    colours: dict[str, Any] = IMAGENET
    if settings.data == SCENES:
        from ctxenc.training.segmentation.scenes import MEAN, STD

        colours = {"mean": MEAN, "std": STD}
    elif cfg := get_pretrained_cfg(settings.backbone):
        colours = {"mean": cfg.mean, "std": cfg.std}
    configs = {}
    for arm in settings.arm_names:
        own = {"se_loss": settings.se_loss and settings.se_weight > 0} | ARMS[arm][1]
        configs[arm] = SegmentConfig(
            network=shared | {"se_loss": own["se_loss"]},
            context=own["context"],
            classes=classes,
            mean=list(colours["mean"]),
            std=list(colours["std"]),
            settings=settings.as_dict(),
            versions=installed_versions(),
        )
    return configs


def build_network(config: SegmentConfig, pretrained: bool = False) -> EncNet:
    """The network of ``config``, untrained but for its backbone if ``pretrained`` (may download).

    Raises:
        UserError: It cannot be built, or there are no weights to be had.
    """
    try:
        # Runs older than this option took the sum.
        network = EncNet(**({"aggregation": "sum"} | config.network), pretrained_backbone=pretrained)
    except Exception as error:  # timm's builders and the hub raise a dozen kinds
        raise UserError(f"cannot build the network: {one_line(error)}") from error
    if config.context != "encoding":
        channels = config.network["channels"]
        network.encoding = PooledContext(channels) if config.context == "pool" else NoContext()  # type: ignore[assignment]
    return network
