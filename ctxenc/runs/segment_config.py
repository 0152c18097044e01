"""The configuration of a segmentation run; build EncNet or one of its baselines from it."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ctxenc.integrations.encnet import EncNet
from ctxenc.runs.config import FORMAT, STRICT, Mean, Std
from ctxenc.runs.errors import UserError, one_line

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True, config=STRICT)
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
    context: Literal["encoding", "pool", "none"]
    classes: Annotated[list[str], Field(min_length=1)]
    mean: Annotated[list[Mean], Field(min_length=3, max_length=3)]
    std: Annotated[list[Std], Field(min_length=3, max_length=3)]
    settings: dict[str, Any]
    versions: dict[str, str]
    kind: Literal["segment"] = "segment"
    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)] = FORMAT

    @field_validator("network")
    @classmethod
    def check_network(cls, network: dict[str, Any]) -> dict[str, Any]:
        """Raise ValueError if the network has no size, or loads weights."""
        if not {"channels", "num_classes"} <= network.keys() or "pretrained_backbone" in network:
            raise ValueError("must have channels and num_classes, and no pretrained_backbone")
        return network

    @field_validator("classes")
    @classmethod
    def check_classes(cls, classes: list[str], info: Any) -> list[str]:
        """Raise ValueError unless the network has as many classes."""
        if len(classes) != info.data.get("network", {}).get("num_classes", len(classes)):
            raise ValueError("must be num_classes names")
        return classes


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
