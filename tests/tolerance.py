"""What an encode may be off by: the one place where the tolerance of the operator is fixed.

A result is compared with the residual form in fp64 on the same rounded inputs. With c the mean codeword, R = max |x - c| and
u = the unit round-off of the arithmetic (fp32 for half inputs), it may be off by

    2 err(residual form in the dtype of the arithmetic)  +  (8 + N / 16) u A  +  2 min(1, 4 u |s| R^2) A

where A is the value's sum taken over absolute values, which is what rounding scales with: max_k sum_i w_ik R for the encoding. The
N / 16 is for sums taken one by one, as small products are: of N equal values each rounds the same way, 9 u off at N = 130. The
last term is what an error of the logits, s |x - c|^2 u, does to the weights. A gradient in half precision may also be off by half
a unit of its own dtype. Where the products are declared half precision, their unit times the value and times A is added; of A
4 / sqrt(N) in sums over N pixels, whose roundings are independent.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import ctxenc
from ctxenc.kernels import reference

Encode = Callable[[Tensor, Tensor, Tensor], Tensor]
Results = dict[str, Tensor]


def results(encode: Encode, x: Tensor, codewords: Tensor, smoothing: Tensor, grad: Tensor) -> Results:
    """The encoding and its gradients in x, codewords and smoothing, for an incoming gradient grad."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, codewords, smoothing)]
    encoding = encode(*leaves)
    gradients = torch.autograd.grad(encoding, leaves, grad.to(encoding.dtype))
    return dict(zip(("encoding", "dx", "dcodewords", "dsmoothing"), (encoding.detach(), *gradients), strict=True))


def flat_reference(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """The specification on x (B, D, *spatial)."""
    return reference.encode(x.flatten(2), codewords, smoothing)


def matmul_form(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """The PyTorch path, which in fp64 stands for the specification where B x N x K x D would not fit."""
    return ctxenc.encode(x, codewords, smoothing, backend="torch")


def scales(
    x: Tensor, codewords: Tensor, smoothing: Tensor, grad: Tensor, assign: Encode = reference.assign
) -> dict[str, Tensor]:
    """A of each result, and s R^2 under "logits"; arguments in fp64."""
    x = x.flatten(2)
    s = smoothing.abs().reshape(-1, 1).expand(codewords.shape[0], 1)
    center = codewords.mean(0)
    d = (codewords - center).norm(dim=1)  # (K,)
    radius = torch.cat([(x - center[:, None]).norm(dim=1).flatten(), d]).max()
    weights = assign(x, codewords, smoothing)  # (B, K, N)
    g = grad.norm(dim=2, keepdim=True)  # (B, K, 1)
    p = 2 * radius * g  # bounds |r.g|, computed as x'.g - d'.g
    q = weights * (p + (weights * p).sum(1, keepdim=True))

    def largest(tensor: Tensor) -> Tensor:
        return tensor.max() if tensor.numel() else x.new_zeros(())

    moved = 2 * s * q * 2 * radius
    over_codes = (moved + weights * g).sum((0, 2))
    dsmoothing = (q * 4 * radius**2).sum((0, 2))
    return {
        "encoding": largest(weights.sum(2)) * 2 * radius,
        "dx": largest((weights * g + moved).sum(1)),
        "dcodewords": largest(over_codes),
        "dsmoothing": dsmoothing.sum() if smoothing.dim() == 0 else largest(dsmoothing),
        "logits": largest(s) * radius**2,
    }


def largest_excess(
    encode: Encode,
    x: Tensor,
    codewords: Tensor,
    smoothing: Tensor,
    grad: Tensor,
    products: torch.dtype = torch.float32,
    large: bool = False,
) -> dict[str, float]:
    """Error over tolerance of each result: right where none is above 1. NaN, a wrong shape or dtype counts as infinite.

    With products in half precision, weights and gradients are rounded before they are multiplied: one unit of it each.
    Large problems, where the residual form does not fit, are compared with matmul_form in fp64, and the error of the residual form
    in the dtype of the arithmetic is not granted: at thousands of pixels N / 16 is far more.
    """
    arithmetic = torch.promote_types(torch.promote_types(x.dtype, codewords.dtype), torch.float32)
    unit = torch.finfo(arithmetic).eps / 2
    exact_inputs = [tensor.double() for tensor in (x, codewords, smoothing, grad)]
    if large:
        exact = residual = results(matmul_form, *exact_inputs)
        scale = scales(*exact_inputs, assign=ctxenc.assign)
    else:
        exact = results(flat_reference, *exact_inputs)
        residual = results(flat_reference, *(tensor.to(arithmetic) for tensor in (x, codewords, smoothing, grad)))
        scale = scales(*exact_inputs)
    got = results(encode, x, codewords, smoothing, grad)
    dtypes = {"encoding": arithmetic, "dx": x.dtype, "dcodewords": codewords.dtype, "dsmoothing": smoothing.dtype}
    pixels = x.flatten(2).shape[2]
    excess = {}
    for name, wanted in exact.items():
        if got[name].shape != wanted.shape or got[name].dtype != dtypes[name]:
            excess[name] = float("inf")
            continue
        if wanted.numel() == 0:
            excess[name] = 0.0
            continue
        own_unit = torch.finfo(dtypes[name]).eps / 2
        tolerance = 2 * (residual[name].double() - wanted).abs().max()
        tolerance += ((8 + pixels / 16) * unit + 2 * min(1.0, 4 * unit * float(scale["logits"]))) * scale[name]
        if own_unit > unit:
            tolerance += own_unit * wanted.abs().max() + torch.finfo(dtypes[name]).tiny
        product_unit = torch.finfo(products).eps / 2
        if product_unit > unit:
            # Alike weights are rounded alike, others as chance has it: over N pixels that goes with the root of N.
            averaged = 1.0 if name == "dx" else min(1.0, 4 / max(1, pixels) ** 0.5)
            tolerance += product_unit * (wanted.abs().max() + averaged * scale[name])
        fits = (
            wanted.abs() + tolerance < torch.finfo(dtypes[name]).max
        )  # a gradient in half precision may leave its range
        if not got[name][fits].isfinite().all():
            excess[name] = float("inf")
            continue
        error = torch.where(fits, got[name].double() - wanted, 0).abs().max()
        excess[name] = 0.0 if error == 0 else float(error / tolerance)
    return excess
