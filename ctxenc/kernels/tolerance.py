"""How far off a kernel may be where it proves itself.

The tolerance of tests/tolerance.py is a bound for any input; here the inputs are known, and the bound can be close. Each row of a
result may be off by some units of round-off of the sum of the row's absolute terms: over its channels, in the Euclidean norm, for the
encoding of a codeword, sum_i w_ik |r_ik|. With B x N pixels the roundings of a sum average out; those of one pixel do not.
"""

import torch
from torch import Tensor

AXES = {"encoding": 2, "dx": 1, "dcodewords": 1}  # of the channels
# Units of the products' dtype, by whether they are half precision, for dx and for sums over pixels. Right kernels take up to
# a quarter of each in the interpreter; one without the low-order operand of the codewords exceeds them.
UNITS = {True: (4.0, 0.5), False: (64.0, 64.0)}


def absolute_terms(x: Tensor, codewords: Tensor, smoothing: Tensor, grad: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The sums of the absolute terms of each row, for fp64 x (B, D, N), grad (B, K, D) and assignment weights (B, K, N)."""
    center = codewords.mean(0)
    x, d, s = x - center[:, None], codewords - center, smoothing.abs().reshape(-1, 1)
    squares = x.square().sum(1, keepdim=True) + d.square().sum(1)[:, None]
    distance = (squares - 2 * torch.matmul(d, x)).clamp(min=0).sqrt()  # |r_ik|
    p = (torch.bmm(grad, x) - (grad * d).sum(2, keepdim=True)).abs()
    q = weights * (p + (weights * p).sum(1, keepdim=True))
    moved = weights * grad.norm(dim=2, keepdim=True) + 2 * s * q * distance
    dsmoothing = (q * distance.square()).sum((0, 2))
    return {
        "encoding": (weights * distance).sum(2),
        "weight_sum": weights.sum(2),
        "dx": moved.sum(1),
        "dcodewords": moved.sum((0, 2)),
        "dsmoothing": dsmoothing if smoothing.dim() else dsmoothing.sum(),
    }


def excess(
    results: dict[str, Tensor], exact: dict[str, Tensor], terms: dict[str, Tensor], products: torch.dtype
) -> dict[str, float]:
    """Error over tolerance of each result that is not empty: right where none is above 1. NaN counts as infinite."""
    unit, half = torch.finfo(products).eps / 2, products != torch.float32
    over = {}
    for name, result in results.items():
        if not result.numel():
            continue
        of_pixels, of_sums = UNITS[half]
        error, size = result.double() - exact[name], exact[name]
        if name in AXES:
            error, size = error.norm(dim=AXES[name]), size.norm(dim=AXES[name])
        tolerance = (of_pixels if name == "dx" else of_sums) * unit * terms[name]
        tolerance += torch.finfo(result.dtype).eps * size.abs() + torch.finfo(torch.float32).tiny
        over[name] = float((error.abs() / tolerance).nan_to_num(float("inf")).max())
    return over
