"""Assign colours to codewords, distinguishable with and without a colour vision deficiency."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctxenc.viz.usage import FEW_BITS, measure_information, measure_usage

# Okabe and Ito's palette (jfly.uni-koeln.de/color) without black, and three more colours, far from these and from OTHERS in CIELAB
# for normal vision and for simulated deuteranopia and protanopia.
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


def find_owners(weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return each pixel's owner in these images, -1 for no owner, and the bits of its assignment, each (h, w).

    Compare each weight of a pixel with that codeword's mean weight over all pixels of the images. The owner has the largest excess.
    The largest weight would not do: if all pixels had the same assignment, one codeword would own them all. A pixel with less
    than 0.1 bits of information has no owner.

    Args:
        weights: (K, h, w) for each image.
    """
    shares = measure_usage(weights).shares
    information = [measure_information(each, shares) for each in weights]
    best = [(each.double() - shares[:, None, None]).argmax(0) for each in weights]
    return [
        (code.where(each_information >= FEW_BITS, -1), each_information)
        for code, each_information in zip(best, information, strict=True)
    ]


def measure_ownership(weights: Sequence[Tensor]) -> Tensor:
    """Return each codeword's share of owned pixels in these images, (K,) fp64; the rest has no owner."""
    codes = torch.cat([code.flatten() for code, _ in find_owners(weights)])
    return torch.bincount(codes[codes >= 0], minlength=len(weights[0])).double() / len(codes)


def choose_colours(weights: Sequence[Tensor]) -> dict[int, str]:
    """Return the colours of the codewords with the most pixels in these images, most first; all others get no colour.

    Ties, for example at no pixels, are ordered by mean weight.
    """
    order: list[int] = measure_usage(weights).shares.argsort(descending=True, stable=True).tolist()
    shares = measure_ownership(weights).tolist()
    return dict(zip(sorted(order, key=lambda code: -shares[code]), PALETTE, strict=False))
