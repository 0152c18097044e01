"""Measure the use of a codebook, and the gates."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from ctxenc.context import ContextEncoding
from ctxenc.viz.observing import IMAGE_SIZE, Chosen, Picture, choose_blocks, observe

FEW_BITS = 0.1  # assignments below this count as uninformative: codebooks of the papers' start have 0.00 to 0.19 bits
DEAD = 0.01  # a codeword with a share below this part of 1 / K, the share under uniform use, is dead


@dataclass(frozen=True)
class Usage:
    """Describe the use of a codebook over the pixels of some images, each with equal weight.

    Attributes:
        shares: (K,) fp64, the mean weight of each codeword; they sum to one.
        entropy: of the shares, in bits: log2(K) under uniform use, 0 if a single codeword is used.
        pixel_entropy: the mean over the pixels of the entropy of a pixel's own weights, in bits: 0 if each has one owner.
        dead: the codewords with a share below 1 % of 1 / K.
    """

    shares: Tensor
    entropy: float
    pixel_entropy: float
    dead: list[int]

    @property
    def bits(self) -> float:
        """Bits that tell pixels apart: entropy minus pixel_entropy, 0 if all pixels have the same assignment, at most log2(K)."""
        return max(self.entropy - self.pixel_entropy, 0.0)  # this order keeps a NaN


def codebook_usage(model: nn.Module, images: Sequence[Picture], block: Chosen | None = None, **reading: Any) -> Usage:
    """Measure how much of a block's codebook some images use. Images run one by one, so there may be many.

    Args:
        model: as for look.
        images: as for look.
        block: a name, an index or a module; the last block by default.
        **reading: mean, std and image_size, as for look.

    Returns:
        A Usage.

    Raises:
        ValueError: as for look.
        TypeError: as for look.
        OSError: an image file cannot be read.
    """
    chosen = choose_blocks("codebook_usage", model, [-1 if block is None else block])
    (name,) = chosen
    return measure_usage(
        each.weights[name] for each in observe("codebook_usage", model, images, chosen, **_complete_settings(reading))
    )


def gates(model: nn.Module, images: Sequence[Picture], block: Chosen | None = None, **reading: Any) -> Tensor:
    """Return a block's gate for each channel and image.

    Args:
        model: as for look.
        images: as for look.
        block: a name, an index or a module; the last block by default.
        **reading: mean, std and image_size, as for look.

    Returns:
        (images, C), fp32 on the CPU.

    Raises:
        ValueError: as for look, or the block is an Encoding alone, which has no gates.
        TypeError: as for look.
        OSError: an image file cannot be read.
    """
    chosen = choose_blocks("gates", model, [-1 if block is None else block])
    ((name, module),) = chosen.items()
    if not isinstance(module, ContextEncoding):
        raise ValueError(f"gates: block must be a ContextEncoding, which has gates, got {type(module).__name__}")
    return torch.stack(
        [each.gates[name] for each in observe("gates", model, images, chosen, **_complete_settings(reading))]
    )


def _complete_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {"mean": None, "std": None, "image_size": IMAGE_SIZE} | settings


@dataclass(frozen=True)
class UsageSum:
    """Hold the sums behind a Usage, which add up over images and processes.

    Attributes:
        weights: (K,) fp64 on the CPU, the sum over the pixels.
        pixel_entropy: the sum over the pixels of the entropy of a pixel's weights, in bits.
        pixels: their number.
    """

    weights: Tensor
    pixel_entropy: float
    pixels: int

    @classmethod
    def of(cls, weights: Tensor) -> "UsageSum":
        """Sum over the pixels of weights (B, K, *spatial)."""
        flat = weights.flatten(2)
        if flat.device.type != "mps":  # mps has no fp64
            flat = flat.double()
        return cls(
            flat.sum((0, 2)).cpu().double(), _measure_entropy(flat, dim=1).sum().item(), flat.shape[0] * flat.shape[2]
        )

    def __add__(self, other: "UsageSum") -> "UsageSum":
        entropy = self.pixel_entropy + other.pixel_entropy
        return UsageSum(self.weights + other.weights, entropy, self.pixels + other.pixels)

    def usage(self) -> Usage:
        """Return the use of the codebook."""
        shares = self.weights / self.pixels
        dead = (shares < DEAD / len(shares)).nonzero().flatten().tolist()
        return Usage(shares, _measure_entropy(shares, dim=0).item(), self.pixel_entropy / self.pixels, dead)


def measure_usage(weights: Iterable[Tensor]) -> Usage:
    """Return the use of the codebook from weights (K, h, w) of one image or more."""
    return reduce(add, (UsageSum.of(each[None]) for each in weights)).usage()


def measure_information(weights: Tensor, shares: Tensor) -> Tensor:
    """Return the information of each pixel's assignment in bits, (h, w) fp64, from weights (K, h, w) and shares (K,).

    It is the Kullback-Leibler divergence of a pixel's weights from the shares. Its mean over the pixels is Usage.bits.
    """
    weights = weights.double()
    cross = torch.special.xlogy(weights, shares.double()[:, None, None]).sum(0) / math.log(2)
    return (-cross - _measure_entropy(weights, dim=0)).clamp_min(0)


def _measure_entropy(weights: Tensor, dim: int) -> Tensor:
    """Return the entropy over a dimension, in bits."""
    return torch.special.entr(weights).sum(dim) / math.log(2)
