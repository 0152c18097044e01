"""Colours of codewords, told apart with and without a colour vision deficiency, and which codeword gets which."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctxenc.viz.usage import FEW_BITS, bits_told, usage_of

# Okabe and Ito's (jfly.uni-koeln.de/color) without black, then three that lie far from these and from OTHERS in CIELAB, for normal
# vision and for simulated deuteranopia and protanopia.
PALETTE = (
    "#E69F00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#0000FF",
    "#800000",
    "#DFFFAF",
)
OTHERS = "#555555"


def owners(weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The owner of each pixel of these images, -1 for none, and the bits that its assignment tells, each (h, w).

    A pixel's owner is the codeword whose weight lies most above its mean over all pixels of the images, which count alike. The
    largest weight would make one codeword the owner of everything wherever pixels are assigned alike. A pixel whose assignment
    tells less than 0.1 bits has no owner.

    Args:
        weights: (K, h, w) for each image.
    """
    shares = usage_of(weights).shares
    told = [bits_told(each, shares) for each in weights]
    best = [(each.double() - shares[:, None, None]).argmax(0) for each in weights]
    return [(code.where(bits >= FEW_BITS, -1), bits) for code, bits in zip(best, told, strict=True)]


def owned(weights: Sequence[Tensor]) -> Tensor:
    """The share of the pixels of these images that each codeword owns, (K,) fp64; the rest has no owner."""
    codes = torch.cat([code.flatten() for code, _ in owners(weights)])
    return torch.bincount(codes[codes >= 0], minlength=len(weights[0])).double() / len(codes)


def colours_of(weights: Sequence[Tensor]) -> dict[int, str]:
    """The colours of the codewords that own most pixels of these images, most first; all others have none.

    Codewords that own as many, none for example, go by their mean weight.
    """
    order: list[int] = usage_of(weights).shares.argsort(descending=True, stable=True).tolist()
    shares = owned(weights).tolist()
    return dict(zip(sorted(order, key=lambda code: -shares[code]), PALETTE, strict=False))
