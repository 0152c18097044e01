"""Implement the operator in PyTorch: matrix products, and a custom backward.

With x' = x - c and d' = d - c the squared residual is |x'|^2 - 2 x'.d' + |d'|^2. For codewords near a pixel its error is about
4 u |x'|^2, u the unit round-off, so c must lie near the pixels (see `find_center`). The result does not depend on c, so no
gradient flows through it.

One autograd.Function returns the encoding, the weights and |x'|^2, each differentiable, and saves the last two and c. Its backward
consists of differentiable operations on saved inputs and outputs, so it supports higher-order gradients. No tensor is larger than x
or B x K x N; between forward and backward, x, one B x K x N map and one B x N map stay in memory.

Weights, and gradients of logits, below SMALLEST count as 0. In saturated assignments up to a sixth of the weights are subnormal,
and an Intel processor takes up to 20 times as long for each product with such a number.

A saved or compiled graph holds plain products and sums, in one order of operations for all sizes and values. Eager code works in
place if allowed, and in parts that fit a CPU's cache.
"""

import inspect
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

SMALLEST = 1e-30
PART = 2**18  # elements of x per part on a CPU: 1 MB, which stays in a core's cache


def compute_dtype(x: Tensor, codewords: Tensor, smoothing: Tensor) -> torch.dtype:
    """Return the dtype of all arithmetic and of the result: fp32, or fp64 if any argument is fp64."""
    dtype = torch.promote_types(x.dtype, codewords.dtype)
    return torch.promote_types(torch.promote_types(dtype, smoothing.dtype), torch.float32)


class Codebook(NamedTuple):
    """Hold codewords and smoothing in the form that all pixels use, in the compute dtype."""

    center: Tensor | None  # c, (D,), None for 0
    d: Tensor  # codewords minus c, (K, D)
    s: Tensor  # smoothing, (K, 1), or (1, 1) if shared
    sd: Tensor  # 2 s d, (K, D)
    bias: Tensor  # s |d|^2, (K, 1)


def _is_in_graph() -> bool:
    """Return whether a compiler or an exporter records the operations."""
    return torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling()


@torch.jit.unused
def _can_work_in_place(tensor: Tensor) -> bool:
    """Return whether operations on a tensor may work in place and depend on sizes: nothing records them, no transform wraps it."""
    if _is_in_graph() or torch.is_grad_enabled() or type(tensor) is not Tensor:
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:  # wrapped by vmap or another transform
        return False
    return True


@torch.jit.unused
def _read_maximum(tensor: Tensor) -> float | None:
    """Return the largest value of a plain CPU tensor, else None: a graph and vmap have no values, and a GPU would have to wait."""
    if _is_in_graph() or type(tensor) is not Tensor or not tensor.is_cpu:
        return None
    try:
        return tensor.max().item()
    except RuntimeError:
        return None


def find_center(codewords: Tensor) -> Tensor | None:
    """Find the point c (D,) by which features and codewords are shifted: a codeword in a crowd, or the origin.

    Two codewords are near each other if their distance is less than half of the larger of their norms. A codeword is in a crowd
    if at least half of all codewords, itself included, are near it. c is the codeword in a crowd with the smallest norm. Without
    a crowd a shift would gain no digit. A single outlier neither makes a crowd nor breaks it up.

    Returns:
        None for the origin, if the values can be read: a shift of x takes 40 to 100 % of forward on a CPU.
    """
    few = codewords[:64]  # all pairs of 1024 would take longer than a small map
    square = few.square().sum(1)
    # |d_j - d_k|^2 < max(|d_j|^2, |d_k|^2) / 4, or slightly more if these differ
    crowd = (few @ few.t() > 0.875 * torch.maximum(square, square[:, None])).to(few.dtype).mean(1)
    if not torch.jit.is_scripting():
        largest = _read_maximum(crowd)
        if largest is not None and largest < 0.5:
            return None
    norms = square.masked_fill(crowd < 0.5, math.inf)
    nearest = norms.argmin(0, keepdim=True)
    return few.index_select(0, nearest).squeeze(0) * (norms.index_select(0, nearest) < math.inf)


def _prepare_codebook(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Codebook:
    dtype = compute_dtype(x, codewords, smoothing)
    d = codewords.to(dtype)
    c = find_center(d.detach())
    d = d if c is None else d - c
    s = smoothing.to(dtype).reshape(-1, 1)
    sd = 2 * s * d
    return Codebook(c, d, s, sd, (sd * d).sum(1, keepdim=True) / 2)


def _shift(x: Tensor, center: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x' (B, D, N) in the compute dtype."""
    return x.to(dtype) if center is None else x - center[:, None]


@torch.jit.unused
def _sum_squares_in_cache(x: Tensor) -> Tensor:
    """Compute `_sum_squares` without a temporary of x's size."""
    if x.stride(1) == 1:  # channels last takes one pass: saves a quarter to a half of forward
        return torch.linalg.vector_norm(x, dim=1, keepdim=True).square()
    if not x.is_cpu or x.numel() <= PART:
        return x.square().sum(1, keepdim=True)
    # By channels, so that the squares stay in the cache: 15 % of forward less at B, N, D, K = 2, 3600, 512, 32
    parts = x.split(max(1, PART // (x.shape[0] * x.shape[2])), dim=1)
    return sum((part.square().sum(1, keepdim=True) for part in parts[1:]), parts[0].square().sum(1, keepdim=True))


def _sum_squares(x: Tensor) -> Tensor:
    """Return |x'|^2 of every pixel, (B, 1, N)."""
    if not torch.jit.is_scripting() and _can_work_in_place(x):
        return _sum_squares_in_cache(x)
    return x.square().sum(1, keepdim=True)


@torch.jit.unused
def _compute_weights_in_place(x: Tensor, book: Codebook, square_sum: Tensor | None) -> Tensor:
    """Compute `_compute_weights` over the memory of the logits: saves up to half of forward if D is as small as K."""
    if x.stride(1) == 1 and x.shape[1] >= 256:  # channels last takes one product for all images: 10 % of forward less
        logits = torch.matmul(x.transpose(1, 2), book.sd.t()).transpose(1, 2).contiguous()
    else:
        logits = torch.bmm(book.sd.expand(x.shape[0], -1, -1), x)
    logits.sub_(book.bias)
    if square_sum is not None:
        logits.addcmul_(book.s, square_sum, value=-1)
    return F.threshold(torch.softmax(logits, dim=1), SMALLEST, 0.0, inplace=True)


def _compute_weights(x: Tensor, book: Codebook, square_sum: Tensor | None) -> Tensor:
    """Return weights (B, K, N) of shifted x: softmax over k of -s |x' - d'|^2, without |x'|^2 if one factor is shared."""
    if not torch.jit.is_scripting() and _can_work_in_place(x) and _can_work_in_place(book.sd):
        return _compute_weights_in_place(x, book, square_sum)
    logits = torch.matmul(book.sd, x) - book.bias
    if square_sum is not None:  # after the product: a saved graph under autocast rounds the product's inputs
        logits = logits - book.s * square_sum
    # Clamp logits, not weights, because the softmax's derivative uses its result. TorchScript takes no constant:
    # log(1e-30).
    small = logits < logits.amax(1, keepdim=True) - 69.0776
    return torch.softmax(logits.masked_fill(small, -math.inf), dim=1)


def _forward(x: Tensor, book: Codebook, learned: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return encoding (B, K, D), weights (B, K, N) and |x'|^2 (B, 1, N), the last only with one smoothing factor per codeword."""
    x = _shift(x, book.center, book.d.dtype)
    square_sum = _sum_squares(x) if learned else None
    weights = _compute_weights(x, book, square_sum)
    encoding, sums = torch.bmm(weights, x.transpose(1, 2)), weights.sum(2, keepdim=True)
    if not torch.jit.is_scripting() and _can_work_in_place(encoding):
        return encoding.addcmul_(sums, book.d, value=-1), weights, square_sum
    return encoding - sums * book.d, weights, square_sum


class _Encode(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codewords: Tensor, smoothing: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        book = _prepare_codebook(x, codewords, smoothing)
        encoding, weights, square_sum = _forward(x, book, smoothing.dim() > 0)
        if square_sum is None:
            square_sum = encoding.new_empty(0)
        elif not _can_work_in_place(
            weights
        ):  # vmap must batch it like the weights, or its gradient counts once per sample
            square_sum = square_sum + 0 * weights[:, :1]
        # Keep one shape in all cases: activation checkpointing compares the shapes of both runs.
        c = book.d.new_zeros(book.d.shape[1]) if book.center is None else book.center
        return encoding, weights, square_sum, c

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output[1:])
        ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
        saved = ctx.saved_tensors  # read once: activation checkpointing forbids a second read
        x = saved[0]
        channels_last = x.stride(1) == 1  # read here, because torch.compile loses track of the autocast region over it
        # backward() may run in another autocast region, while torch.compile assumes that of forward.
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return _backward(*saved, *grads, x_wanted=ctx.needs_input_grad[0], channels_last=channels_last)


# apply() looks it up at every call, which takes 40 us uncached.
_Encode.forward.__signature__ = inspect.signature(_Encode.forward)  # type: ignore[attr-defined]


def _backward(
    x: Tensor,
    codewords: Tensor,
    smoothing: Tensor,
    weights: Tensor,
    square_sum: Tensor,
    center: Tensor,
    grad: Tensor | None,
    grad_weights: Tensor | None,
    grad_square_sum: Tensor | None,
    _: None,
    *,
    x_wanted: bool,
    channels_last: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    dtypes = x.dtype, codewords.dtype, smoothing.dtype
    shift = None if _read_maximum(center.abs()) == 0 else center
    x, d = _shift(x, shift, weights.dtype), codewords.to(weights.dtype)
    d = d if shift is None else d - shift
    s = smoothing.to(d.dtype).reshape(-1, 1)
    if grad is None:  # a higher derivative took only the weights or |x'|^2
        grad = d.new_zeros(x.shape[0], *d.shape)

    # p_ik = dL/dw_ik, q_ik = dL/d(logit_ik)
    p = torch.bmm(grad, x).sub_((grad * d).sum(2, keepdim=True))
    if grad_weights is not None:
        p = p + grad_weights
    mean = (weights * p).sum(1, keepdim=True)
    q = F.hardshrink(p.sub_(mean).mul_(weights) if _can_work_in_place(p) else weights * (p - mean), SMALLEST)

    moment = torch.bmm(q, x.transpose(1, 2))
    residual = moment - q.sum(2, keepdim=True) * d
    dd = (2 * s * residual - weights.sum(2, keepdim=True) * grad).sum(0)
    ds = (d * (moment + residual)).sum((0, 2))  # with |r|^2 = |x'|^2 - 2 x'.d' + |d'|^2
    if smoothing.dim():
        ds = ds - (q * square_sum).sum((0, 2))
    else:  # the q_ik of a pixel sum to zero, so |x'|^2 adds nothing
        ds = ds.sum()
    dd, ds = dd.to(dtypes[1]), ds.to(dtypes[2])
    if not x_wanted:
        return None, dd, ds

    # dx_i = sum_k w_ik g_k + 2 sum_k s_k q_ik d'_k - 2 (sum_k s_k q_ik) x'_i
    rows = torch.cat([grad, (2 * s * d).expand_as(grad)], dim=1)
    columns = torch.cat([weights, q], dim=1)
    if channels_last:  # the gradient in the layout of x
        dx = torch.bmm(columns.transpose(1, 2), rows).transpose(1, 2)
    else:
        dx = torch.bmm(rows.transpose(1, 2), columns)
    if smoothing.dim():
        pull = torch.matmul(-2 * s.t(), q)
        if grad_square_sum is not None:
            pull = pull + 2 * grad_square_sum
        # Allocating a tensor of x's size can cost as much as the product.
        if _can_work_in_place(dx):
            dx.addcmul_(x, pull)
        else:
            dx = dx + x * pull
    return dx.to(dtypes[0]), dd, ds


def _split_batch(x: Tensor) -> tuple[Tensor, ...]:
    """Split the batch into runs of images whose weights fit the cache: 10 % of forward less at B, N, D, K = 64, 784, 32, 16."""
    if _is_in_graph() or x.device.type != "cpu" or x.numel() <= 4 * PART:
        return (x,)
    return x.split(max(1, PART // (x.shape[1] * x.shape[2])))


def encode_plainly(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """Encode without the custom backward: for inference, saved graphs and forward-mode derivatives."""
    book = _prepare_codebook(x, codewords, smoothing)
    if torch.jit.is_scripting():
        return _forward(x, book, smoothing.dim() > 0)[0]
    encodings = [_forward(part, book, smoothing.dim() > 0)[0] for part in _split_batch(x)]
    return torch.cat(encodings) if len(encodings) > 1 else encodings[0]


def encode(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """Encode x (B, D, N) with codewords (K, D) and smoothing (K,) or (): (B, K, D), fp32 or fp64.

    Runs on any PyTorch device, with any float dtype and strides. Autocast must be off.
    """
    needs_graph = torch.is_grad_enabled() and (torch.compiler.is_compiling() or not torch.is_inference_mode_enabled())
    if not needs_graph or forward_ad._current_level >= 0:
        return encode_plainly(x, codewords, smoothing)
    return _Encode.apply(x, codewords, smoothing)[0]


def encode_with_weight_sum(
    x: Tensor, codewords: Tensor, smoothing: Tensor, mean: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the encoding (B, K, D) of x (B, D, N) and each codeword's weight sum (B, K), or both over N: for the fused path."""
    with torch.no_grad():
        encoding, weights, _, _ = _Encode.forward(x, codewords, smoothing)
        count = x.shape[2] if mean else 1
        return encoding / count, weights.sum(2) / count


def compute_gradients(
    grad: Tensor, x: Tensor, codewords: Tensor, smoothing: Tensor, x_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in x (empty if not wanted), codewords and smoothing, for the fused path.

    Recomputes the weights, because the fused path does not save them. The gradient in x is dense, channels last if x is, else
    channels first.
    """
    with torch.no_grad():
        _, weights, square_sum, c = _Encode.forward(x, codewords, smoothing)
        dx, dcodewords, dsmoothing = _backward(
            *(x, codewords, smoothing, weights, square_sum, c, grad.to(weights.dtype), None, None, None),
            x_wanted=x_wanted,
            channels_last=x.stride(1) == 1,
        )
        return x.new_empty(0) if dx is None else dx, dcodewords, dsmoothing


def assign(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """Return assignment weights (B, K, N) of x (B, D, N), fp32 or fp64, with plain autograd derivatives. Autocast must be off."""
    book = _prepare_codebook(x, codewords, smoothing)
    x = _shift(x, book.center, book.d.dtype)
    return _compute_weights(x, book, _sum_squares(x) if smoothing.dim() else None)
