"""Colours of codewords, told apart with and without a colour vision deficiency, and which codeword gets which."""

from collections.abc import Sequence

import torch
from torch import Tensor

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


def owned(weights: Sequence[Tensor]) -> Tensor:
    """The share of the pixels of these images that each codeword owns, (K,) fp64, of weights (K, h, w) for each image.

    A pixel's owner is the codeword of its largest weight; every pixel counts alike.
    """
    counts = sum((torch.bincount(each.argmax(0).flatten(), minlength=len(each)) for each in weights), torch.tensor(0))
    return counts.double() / counts.sum()


def colours_of(weights: Sequence[Tensor]) -> dict[int, str]:
    """The colours of the codewords that own most pixels of these images, most first; all others have none.

    Codewords that own as many, none for example, go by their mean weight.
    """
    total = torch.cat([each.flatten(1) for each in weights], 1).double().mean(1)
    order: list[int] = total.argsort(descending=True, stable=True).tolist()
    shares = owned(weights).tolist()
    return dict(zip(sorted(order, key=lambda code: -shares[code]), PALETTE, strict=False))
