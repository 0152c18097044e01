"""How much of a codebook is in use, and what the gates let through."""

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

FEW_BITS = 0.1  # an assignment that tells less counts as telling nothing: at the papers' start codebooks have 0.00 to 0.19 bits
DEAD = 0.01  # a codeword is dead whose share is below this part of 1 / K, the share of each where all are used alike


@dataclass(frozen=True)
class Usage:
    """The use of a codebook over the pixels of some images, each of which counts alike.

    Attributes:
        shares: (K,) fp64, the mean weight of each codeword; they sum to one.
        entropy: of the shares, in bits: log2(K) where all codewords are used alike, 0 where one is used alone.
        pixel_entropy: the mean over the pixels of the entropy of a pixel's own weights, in bits: 0 where each has one owner.
        dead: the codewords whose share is below 1 % of 1 / K.
    """

    shares: Tensor
    entropy: float
    pixel_entropy: float
    dead: list[int]

    @property
    def bits(self) -> float:
        """The bits that tell pixels apart: entropy minus pixel_entropy, 0 where all pixels are assigned alike, at most log2(K)."""
        return max(self.entropy - self.pixel_entropy, 0.0)  # in this order a NaN stays one


def codebook_usage(model: nn.Module, images: Sequence[Picture], block: Chosen | None = None, **reading: Any) -> Usage:
    """How much of a block's codebook some images use. Images go through one by one, so that there may be many.

    Args:
        model: as for look.
        images: likewise.
        block: a name, an index or a module; the last block by default.
        **reading: mean, std and image_size, as for look.

    Returns:
        A Usage.

    Raises:
        ValueError: as look.
        TypeError: likewise.
        OSError: an image file cannot be read.
    """
    chosen = choose_blocks("codebook_usage", model, [-1 if block is None else block])
    (name,) = chosen
    return usage_of(
        each.weights[name] for each in observe("codebook_usage", model, images, chosen, **_reading(reading))
    )


def gates(model: nn.Module, images: Sequence[Picture], block: Chosen | None = None, **reading: Any) -> Tensor:
    """What a block multiplies each channel by, for each image.

    Args:
        model: as for look.
        images: likewise.
        block: a name, an index or a module; the last block by default.
        **reading: mean, std and image_size, as for look.

    Returns:
        (images, C), fp32 on the CPU.

    Raises:
        ValueError: as look, or the block is an Encoding alone, which has no gates.
        TypeError: as look.
        OSError: an image file cannot be read.
    """
    chosen = choose_blocks("gates", model, [-1 if block is None else block])
    ((name, module),) = chosen.items()
    if not isinstance(module, ContextEncoding):
        raise ValueError(f"gates: block must be a ContextEncoding, which has gates, got {type(module).__name__}")
    return torch.stack([each.gates[name] for each in observe("gates", model, images, chosen, **_reading(reading))])


def _reading(given: dict[str, Any]) -> dict[str, Any]:
    return {"mean": None, "std": None, "image_size": IMAGE_SIZE} | given


@dataclass(frozen=True)
class UsageSum:
    """What a Usage is computed from, which adds up over images and processes.

    Attributes:
        weights: (K,) fp64 on the CPU, the sum over the pixels.
        bits: the sum over the pixels of the entropy of a pixel's weights.
        pixels: their number.
    """

    weights: Tensor
    bits: float
    pixels: int

    @classmethod
    def of(cls, weights: Tensor) -> "UsageSum":
        """The sums over the pixels of weights (B, K, *spatial)."""
        flat = weights.flatten(2)
        if flat.device.type != "mps":  # which has no fp64
            flat = flat.double()
        return cls(flat.sum((0, 2)).cpu().double(), _bits(flat, dim=1).sum().item(), flat.shape[0] * flat.shape[2])

    def __add__(self, other: "UsageSum") -> "UsageSum":
        return UsageSum(self.weights + other.weights, self.bits + other.bits, self.pixels + other.pixels)

    def usage(self) -> Usage:
        """The use of the codebook."""
        shares = self.weights / self.pixels
        dead = (shares < DEAD / len(shares)).nonzero().flatten().tolist()
        return Usage(shares, _bits(shares, dim=0).item(), self.bits / self.pixels, dead)


def usage_of(weights: Iterable[Tensor]) -> Usage:
    """The use of the codebook that weights (K, h, w) of one image or more were taken with."""
    return reduce(add, (UsageSum.of(each[None]) for each in weights)).usage()


def bits_told(weights: Tensor, shares: Tensor) -> Tensor:
    """The bits that each pixel's assignment tells, (h, w) fp64: how far weights (K, h, w) diverge from the shares (K,).

    It is the Kullback-Leibler divergence of a pixel's weights from the shares. Its mean over the pixels is Usage.bits.
    """
    weights = weights.double()
    cross = torch.special.xlogy(weights, shares.double()[:, None, None]).sum(0) / math.log(2)
    return (-cross - _bits(weights, dim=0)).clamp_min(0)


def _bits(weights: Tensor, dim: int) -> Tensor:
    """The entropy over a dimension."""
    return torch.special.entr(weights).sum(dim) / math.log(2)
