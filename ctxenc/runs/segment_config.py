"""The configuration of a segmentation run; build EncNet or one of its baselines from it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ctxenc.integrations.encnet import EncNet
from ctxenc.runs.config import FORMAT, are_colours
from ctxenc.runs.errors import UserError, one_line

CONTEXTS = ("encoding", "pool", "none")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class SegmentConfig:
    """Hold the network of one arm and the preparation of its images.

    Args:
        network: Keyword arguments of EncNet.
        context: The gate of its head: "encoding", "pool" (the global mean, as in SE) or "none".
        classes: Class names in the order of the logits.
        mean: Mean of each colour channel, in [0, 1].
        std: Standard deviation of each colour channel, likewise.
        settings: Every setting of the command line, resolved (JSON values).
        versions: Versions of Python and the libraries that made the run.
        kind: "segment".
        format: Version of this layout.

    Raises:
        ValueError: A field does not match its description here.
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
    """Gate EncNet's head by the mean of the map, as in SE, instead of its encoding; change nothing else."""

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
    """Do nothing: turn EncNet into an FCN."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


def build_network(config: SegmentConfig, pretrained: bool = False) -> EncNet:
    """Build the network of `config` without training; `pretrained` loads its backbone's weights (may download).

    Raises:
        UserError: The network cannot be built, or its weights are unavailable.
    """
    try:
        # Runs older than this option used the sum.
        network = EncNet(**({"aggregation": "sum"} | config.network), pretrained_backbone=pretrained)
    except Exception as error:  # timm's builders and the hub raise a dozen kinds
        raise UserError(f"cannot build the network: {one_line(error)}") from error
    if config.context != "encoding":
        channels = config.network["channels"]
        network.encoding = PooledContext(channels) if config.context == "pool" else NoContext()  # type: ignore[assignment]
    return network
