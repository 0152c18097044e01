"""The PyTorch path of the operator: matrix products, and a backward of its own.

With c a codeword, x' = x - c and d' = d - c, the squared residual is |x'|^2 - 2 x'.d' + |d'|^2. Without the shift by c
it cancels where x and d share an offset: 6e-3 off at offset 1000 in fp32, D = 256, where the residual form keeps 6e-8. Nothing
depends on which c is taken, so no gradient flows through it. It is the codeword nearest to their mean: the mean itself is drawn
away from all the others by one that has run off, 2e-2 off where that one is 1e4 away. Where the codewords lie about the origin,
c is 0 and x is read where it lies.

One autograd.Function returns the encoding, the weights and |x'|^2, each of them differentiable, and saves the last two and c.
Since its backward is made of differentiable operations on saved inputs and outputs, derivatives of every order follow from it.
Nothing larger than x or B x K x N is made; between forward and backward x, one B x K x N map and one B x N map live.
"""

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

PART = 2**21  # elements of x that are worked on at a time on a CPU: 4 MB a core
REMEMBERED = 256  # codebooks that inference keeps prepared
LARGEST = 2**14  # elements of one that is kept: 32 MB in all in fp32, half as much again where they are shifted


class Codebook(NamedTuple):
    """What is made of the codewords and the smoothing before any pixel is looked at."""

    center: Tensor | None  # c, (D,), None for 0
    d: Tensor  # codewords less c, (K, D), in the compute dtype
    s: Tensor  # smoothing, (K, 1), or (1, 1) where one is shared
    sd: Tensor  # s d, (K, D)
    bias: Tensor  # s |d|^2, (K, 1)


_kept: dict[tuple[int, int, torch.dtype, bool], tuple[Tensor, Tensor, Codebook]] = {}  # with the values it was made of


def compute_dtype(x: Tensor, codewords: Tensor, smoothing: Tensor) -> torch.dtype:
    """The dtype of all arithmetic and of the result: fp32, or fp64 if any argument is."""
    dtype = torch.promote_types(x.dtype, codewords.dtype)
    return torch.promote_types(torch.promote_types(dtype, smoothing.dtype), torch.float32)


def central(codewords: Tensor) -> Tensor:
    """The codeword (D,) that is nearest to the mean of all (K, D)."""
    nearest = (codewords - codewords.mean(0)).square().sum(1).argmin()
    return codewords.index_select(0, nearest.reshape(1)).squeeze(0)


def _codebook(x: Tensor, codewords: Tensor, smoothing: Tensor, dtype: torch.dtype) -> Codebook:
    """Prepared codewords and smoothing, shifted where they must be.

    By nothing where the codewords lie about the origin, as they do at the start and mostly later, and x need not be copied to
    become dense: |x|^2 - 2 x.d + |d|^2 then loses no more than a digit.
    """
    d = codewords.to(dtype)
    fixed = d.detach()
    center = _far_center(fixed) if not _in_graph() and _may_look(fixed) and _is_dense(x) else central(fixed)
    d = d if center is None else d - center
    s = smoothing.to(dtype).reshape(-1, 1)
    sd = s * d
    return Codebook(center, d, s, sd, (sd * d).sum(1, keepdim=True))


def _is_dense(x: Tensor) -> bool:
    """Whether x (B, D, N) is read where it lies, in one layout or the other."""
    return x.is_contiguous() or x.transpose(1, 2).is_contiguous()


@torch.jit.unused
def _kept_codebook(x: Tensor, codewords: Tensor, smoothing: Tensor, dtype: torch.dtype) -> Codebook:
    """The same, kept for as long as the values stay what they were, as they do in inference: two calls to see it for sixteen.

    At 16, 196, 256, K = 16, where forward takes 0.9 ms among other work, 0.1 less.
    """
    # A tangent would be kept too, and inside a transform of torch.func what is made is wrapped.
    transformed = forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    plain = not transformed and _may_look(codewords) and _is_visible(smoothing)
    if not plain or codewords.numel() > LARGEST:
        return _codebook(x, codewords, smoothing, dtype)
    key = codewords.data_ptr(), smoothing.data_ptr(), dtype, _is_dense(x)
    found = _kept.get(key)
    if found is not None and _same(found[0], codewords) and _same(found[1], smoothing):
        return found[2]
    codewords, smoothing = codewords.detach().clone(), smoothing.detach().clone()
    book = _codebook(x, codewords, smoothing, dtype)
    if found is None and len(_kept) >= REMEMBERED:
        _kept.clear()
    _kept[key] = codewords, smoothing, book
    return book


def _same(kept: Tensor, values: Tensor) -> bool:
    """Whether values are what was kept of this address, where another tensor may lie by now."""
    return kept.dtype == values.dtype and torch.equal(kept, values)


@torch.jit.unused
def _is_visible(tensor: Tensor) -> bool:
    """Whether a tensor's values can be seen and it costs no synchronisation: on a CPU, not under vmap."""
    return (
        tensor.is_cpu
        and type(tensor) in (Tensor, Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


@torch.jit.unused
def _may_look(tensor: Tensor) -> bool:
    """Whether they may be, too: no mode that traces is in force."""
    return (
        _is_visible(tensor)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._ops._len_torch_dispatch_stack_pre_dispatch() == 0
    )


@torch.jit.unused
def _far_center(codewords: Tensor) -> Tensor | None:
    """The central codeword, or None where all but a quarter of the others are at least half as far from it as the origin is."""
    distance = torch.linalg.vector_norm(codewords - codewords.mean(0), dim=1)
    center = codewords[int(distance.argmin())] if codewords.numel() else codewords.mean(0)
    distances = sorted(torch.linalg.vector_norm(codewords - center, dim=1).tolist())
    near = (
        float(torch.linalg.vector_norm(center)) <= 2 * distances[max(min(1, len(distances) - 1), len(distances) // 4)]
    )
    return None if near else center


def _shift(x: Tensor, center: Tensor | None, dtype: torch.dtype) -> Tensor:
    """X' (B, D, N) in the compute dtype, dense in the layout of x."""
    return x.to(dtype) if center is None else x - center[:, None]


def _in_graph() -> bool:
    """Whether a graph is made, not a result: it takes the plain form, which it fuses itself, and no choice by size."""
    return torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling()


def _is_free(x: Tensor, d: Tensor) -> bool:
    """Whether what is made of both may be written over and chosen by size.

    Not where a graph is made, nor under a mode (one that counts flops does not know baddbmm_), vmap or DTensor.
    """
    if torch.jit.is_scripting():
        return False
    if _in_graph() or torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    batched = torch._C._functorch.is_batchedtensor
    return type(x) is Tensor and type(d) is Tensor and not (batched(x) or batched(d))


def _square_sum(x: Tensor, free: bool) -> Tensor:
    """|x'|^2 of every pixel, (B, 1, N)."""
    if free and x.stride(1) == 1:
        # Channels last, one pass: 0.7 ms against 1.6 at B, N, D = 2, 3600, 512 on two cores.
        return torch.linalg.vector_norm(x, dim=1, keepdim=True).square()
    if free and x.numel() > 2**20:
        return _sliced_square_sum(x)
    return x.square().sum(1, keepdim=True)


@torch.jit.unused
def _sliced_square_sum(x: Tensor) -> Tensor:
    """The same by slices of channels whose sum, 2 MB, stays in the cache: 0.5 ms against 1.0 at B, N, D = 2, 3600, 512.

    A second temporary of x's size costs more than its arithmetic: the C library gives its pages back after every call.
    """
    first, *others = x.split(max(32, 2**19 // max(1, x.shape[0] * x.shape[2])), dim=1)
    squares = first.square()
    for part in others:
        squares[:, : part.shape[1]].addcmul_(part, part)
    return squares.sum(1, keepdim=True)


def _logits(x: Tensor, book: Codebook, square_sum: Tensor | None, free: bool) -> Tensor:
    """-s |x' - d|^2 of every pixel and codeword, (B, K, N); without |x|^2 where one smoothing factor is shared: it cancels."""
    d = book.sd.expand(x.shape[0], -1, -1)
    if free and square_sum is not None and not _convolves(x):
        return torch.addcmul(book.bias, book.s, square_sum).baddbmm_(d, x, beta=-1, alpha=2)
    if free and _convolves(x):
        logits = F.conv2d(x.unsqueeze(2), 2 * book.sd[:, :, None, None]).squeeze(2).contiguous() - book.bias
    else:
        logits = torch.baddbmm(book.bias, d, x, beta=-1, alpha=2)
    if square_sum is None:
        return logits
    if free:
        return logits.addcmul_(book.s, square_sum, value=-1)
    # After the product: a saved graph that runs under autocast rounds what goes into it.
    return torch.addcmul(logits, book.s, square_sum, value=-1)


def _convolves(x: Tensor) -> bool:
    """Whether a 1x1 convolution, which takes oneDNN's product on a CPU, is quicker than bmm.

    Channels last on two cores: 1.3 ms against 1.8 at B, N, D, K = 2, 3600, 512, 32, 0.7 against 0.9 at 32, 784, 128, 16, and 0.22
    against 0.19 at 16, 196, 256, 16. Channels first it is no quicker.
    """
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() >= 2**20 and x.stride(1) == 1


def _weights(x: Tensor, book: Codebook, square_sum: Tensor | None, free: bool) -> Tensor:
    """Assignment weights (B, K, N) of shifted x."""
    return torch.softmax(_logits(x, book, square_sum, free), dim=1)


def _aggregate(weights: Tensor, x: Tensor, d: Tensor, free: bool) -> Tensor:
    """Sum over i of weights_ik (x_i - d_k), (B, K, D)."""
    shares = weights.sum(2, keepdim=True) * d
    if free:
        return shares.baddbmm_(weights, x.transpose(1, 2), beta=-1)
    return torch.bmm(weights, x.transpose(1, 2)) - shares


def _parts(x: Tensor, copied: bool) -> tuple[Tensor, ...]:
    """Runs of pixels of x, where it is copied, small enough that the shifted or widened copy stays in the cache.

    Shifted forward at 32, 784, 128, K = 16 takes 2.7 ms in parts against 3.3 at once, at 2, 3600, 512, K = 32 4.1 against 5 to 10
    (the system takes memory of x's size back after every call). Under 128 pixels the products lose more than that, and where
    nothing is copied x is taken whole: 4.4 ms against 4.8 at 2, 3600, 512.
    """
    if not copied or _in_graph() or x.device.type != "cpu" or x.numel() <= PART:
        return (x,)
    return x.chunk(max(1, min(-(-x.numel() // PART), x.shape[2] // 128)), dim=2)


def _forward(x: Tensor, book: Codebook, learned: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Encoding (B, K, D), weights (B, K, N) and |x'|^2 (B, 1, N), the last only where each codeword has a smoothing factor."""
    x = _shift(x, book.center, book.d.dtype)
    free = _is_free(x, book.sd)
    square_sum = _square_sum(x, free) if learned else None
    weights = _weights(x, book, square_sum, free)
    return _aggregate(weights, x, book.d, free), weights, square_sum


def _concatenated(parts: tuple[Tensor, ...]) -> Tensor:
    """Along the pixels; cat would copy even one."""
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


class _Encode(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codewords: Tensor, smoothing: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = compute_dtype(x, codewords, smoothing)
        book = _codebook(x, codewords, smoothing, dtype)
        parts = [
            _forward(part, book, smoothing.dim() > 0) for part in _parts(x, book.center is not None or x.dtype != dtype)
        ]
        encodings, all_weights, square_sums = zip(*parts, strict=True)
        encoding, weights = sum(encodings[1:], encodings[0]), _concatenated(all_weights)
        square_sum = _concatenated(square_sums) if smoothing.dim() else encoding.new_empty(0)
        if smoothing.dim() and torch._C._functorch.is_batchedtensor(weights):
            # Batched as they are, or its gradient is counted once a sample.
            square_sum = square_sum + 0 * weights[:, :1]
        return (
            encoding,
            weights,
            square_sum,
            # Of one shape whatever it is: activation checkpointing compares those of both runs.
            codewords.new_zeros(codewords.shape[1], dtype=dtype) if book.center is None else book.center,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output[1:])
        ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
        saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
        x = saved[0]
        channels_last = x.stride(1) == 1  # out here, for torch.compile loses track of the region over it
        # backward() may be called in an autocast region, and torch.compile takes it to be in that of forward.
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return _backward(*saved, *grads, x_wanted=ctx.needs_input_grad[0], channels_last=channels_last)


# apply() asks for it at every call, which takes 40 us where it is not kept.
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
    shift = None if _is_nothing(center) else center
    x, d = _shift(x, shift, weights.dtype), codewords.to(weights.dtype)
    d = d if shift is None else d - shift
    s = smoothing.to(d.dtype).reshape(-1, 1)
    if grad is None:  # a derivative of a derivative that took only the weights or |x'|^2
        grad = d.new_zeros(x.shape[0], *d.shape)

    # p_ik = dL/dw_ik, q_ik = dL/d(logit_ik)
    p = torch.baddbmm(-(grad * d).sum(2, keepdim=True), grad, x)
    if grad_weights is not None:
        p = p + grad_weights
    q = torch._softmax_backward_data(p, weights, 1, weights.dtype)

    moment = torch.bmm(q, x.transpose(1, 2))
    residual = moment - q.sum(2, keepdim=True) * d
    dd = (2 * s * residual - weights.sum(2, keepdim=True) * grad).sum(0)
    ds = (d * (moment + residual)).sum((0, 2))  # with |r|^2 = |x'|^2 - 2 x'.d' + |d'|^2
    if smoothing.dim():
        ds = ds - (q * square_sum).sum((0, 2))
    else:  # the q_ik of a pixel sum to zero, and so what |x'|^2 adds
        ds = ds.sum()
    dd, ds = dd.to(dtypes[1]), ds.to(dtypes[2])
    if not x_wanted:
        return None, dd, ds

    # dx_i = sum_k w_ik g_k + 2 sum_k s_k q_ik d'_k - 2 (sum_k s_k q_ik) x'_i
    rows = torch.cat([grad, (2 * s * d).expand_as(grad)], dim=1)
    columns = torch.cat([weights, q], dim=1)
    if channels_last:  # the gradient in x's own layout
        dx = torch.bmm(columns.transpose(1, 2), rows).transpose(1, 2)
    else:
        dx = torch.bmm(rows.transpose(1, 2), columns)
    if smoothing.dim():
        pull = torch.matmul(-2 * s.t(), q)
        if grad_square_sum is not None:
            pull = pull + 2 * grad_square_sum
        # A new tensor of x's size can cost as much as the product, 4.5 ms against 0.6.
        if _is_free(x, pull):
            dx.addcmul_(x, pull)
        else:
            dx.add_(x * pull)
    return dx.to(dtypes[0]), dd, ds


def _is_nothing(center: Tensor) -> bool:
    """Whether forward shifted nothing; where that cannot be seen, 0 is subtracted."""
    return not _in_graph() and _may_look(center) and not bool(center.any())


def encode_plainly(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """The same without a backward of its own: for inference, and for TorchScript, which knows no autograd.Function."""
    dtype = compute_dtype(x, codewords, smoothing)
    if torch.jit.is_scripting():
        return _forward(x, _codebook(x, codewords, smoothing, dtype), smoothing.dim() > 0)[0]
    book = (_codebook if _in_graph() else _kept_codebook)(x, codewords, smoothing, dtype)
    encodings = [
        _forward(part, book, smoothing.dim() > 0)[0] for part in _parts(x, book.center is not None or x.dtype != dtype)
    ]
    return sum(encodings[1:], encodings[0])


def encode(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """Encoding of x (B, D, N) on codewords (K, D) with smoothing (K,) or (): (B, K, D), at least fp32.

    Any device that PyTorch serves, any float dtype, any strides. Autocast must be off.
    """
    if not torch.is_grad_enabled():
        return encode_plainly(x, codewords, smoothing)
    return _Encode.apply(x, codewords, smoothing)[0]


def forward_with_weight_sum(x: Tensor, codewords: Tensor, smoothing: Tensor) -> tuple[Tensor, Tensor]:
    """Encoding (B, K, D) of x (B, D, N) and the sum of each codeword's weights (B, K), without a graph: for the fused path."""
    with torch.no_grad():
        encoding, weights, _, _ = _Encode.forward(x, codewords, smoothing)
        return encoding, weights.sum(2)


def gradients(
    grad: Tensor, x: Tensor, codewords: Tensor, smoothing: Tensor, x_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the encoding in x (empty where not wanted), codewords and smoothing, for the fused path.

    Weights are computed again, as that path saves none. The first is dense, channels last where x is, else first.
    """
    with torch.no_grad():
        _, weights, square_sum, center = _Encode.forward(x, codewords, smoothing)
        dx, dcodewords, dsmoothing = _backward(
            *(x, codewords, smoothing, weights, square_sum, center, grad.to(weights.dtype), None, None, None),
            x_wanted=x_wanted,
            channels_last=x.stride(1) == 1,
        )
        return x.new_empty(0) if dx is None else dx, dcodewords, dsmoothing


def assign(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """Assignment weights (B, K, N) of x (B, D, N), at least fp32; differentiable through plain autograd. Autocast must be off."""
    book = _codebook(x, codewords, smoothing, compute_dtype(x, codewords, smoothing))
    x = _shift(x, book.center, book.d.dtype)
    return _weights(x, book, _square_sum(x, False) if smoothing.dim() else None, False)
