"""Colours of codewords, told apart with and without a colour vision deficiency, and which codeword gets which."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Okabe and Ito's (jfly.uni-koeln.de/color) without black, then the three that lie farthest from these and from OTHERS in CIELAB, for
# normal vision and for simulated deuteranopia and protanopia.
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


def ranked(weights: Sequence[Tensor]) -> tuple[list[int], Tensor]:
    """The codewords by the pixels that they own in these images, most first; every pixel counts alike.

    Args:
        weights: for each image (K, h, w). A pixel's owner is the codeword of its largest weight.

    Returns:
        The codewords that own a pixel, and the share of the pixels that each of the K owns.
    """
    counts = sum((torch.bincount(each.argmax(0).flatten(), minlength=len(each)) for each in weights), torch.zeros((), dtype=torch.int64))
    shares = counts.double() / counts.sum()
    order: list[int] = shares.argsort(descending=True, stable=True).tolist()
    return [code for code in order if shares[code] > 0], shares


def colours_of(weights: Sequence[Tensor]) -> tuple[dict[int, str], dict[int, float]]:
    """The colour of each codeword that has one, most used first, and the share of the pixels that it owns.

    Where fewer colours than codewords that own pixels are there, the last ones go without: they are "others".
    """
    order, shares = ranked(weights)
    colours = dict(zip(order, PALETTE, strict=False))
    return colours, {code: float(shares[code]) for code in order}
