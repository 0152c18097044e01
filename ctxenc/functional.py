"""Validate the arguments of encode() and assign(), choose the backend, and offer the fused gate, pool and projection."""

from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ctxenc.kernels import backends, torch_encode
from ctxenc.kernels.backends import BackendInfo, use_backend

__all__ = ["BackendInfo", "assign", "backend_info", "encode", "use_backend"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AGGREGATIONS = ("sum", "mean")


def _check(name: str, x: Any, codewords: Any, smoothing: Any) -> Tensor:
    """Check types, dtypes, devices and shapes. Reads no values: that would synchronise a GPU and break graphs.

    Returns:
        Smoothing as a tensor. A number becomes a tensor () in fp32 or wider, so that half precision does not round it.
    """
    is_number = not isinstance(smoothing, (Tensor, bool)) and isinstance(smoothing, Real)
    tensors: list[tuple[str, Any]] = [("x", x), ("codewords", codewords)]
    for argument, tensor in tensors if is_number else [*tensors, ("smoothing", smoothing)]:
        if not isinstance(tensor, Tensor):
            rule = "a number or a tensor" if argument == "smoothing" else "a tensor"
            raise TypeError(f"{name}: {argument} must be {rule}, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: {argument} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor is not x and tensor.device != x.device:
            raise ValueError(f"{name}: {argument} must be on the device of x, {x.device}, got {tensor.device}")
    if not torch.jit.is_tracing():  # tracing turns sizes into tensors, and comparing them warns
        _check_shapes(name, x, codewords, smoothing if isinstance(smoothing, Tensor) else None)
    if not isinstance(smoothing, Tensor):
        dtype = torch.promote_types(codewords.dtype, torch.float32)
        return torch.full((), float(smoothing), dtype=dtype, device=codewords.device)
    return smoothing


def _check_shapes(name: str, x: Tensor, codewords: Tensor, smoothing: Tensor | None) -> None:
    if x.dim() < 3:
        raise ValueError(
            f"{name}: x must have shape (B, D, *spatial) with one spatial dimension or more, got {tuple(x.shape)}"
        )
    if codewords.dim() != 2 or codewords.shape[0] < 1 or codewords.shape[1] != x.shape[1]:
        raise ValueError(
            f"{name}: codewords must have shape (K, {x.shape[1]}) to match x {tuple(x.shape)}, got {tuple(codewords.shape)}"
        )
    if smoothing is None or smoothing.dim() == 0:
        return
    if smoothing.dim() != 1 or smoothing.shape[0] != codewords.shape[0]:
        raise ValueError(
            f"{name}: smoothing must have shape ({codewords.shape[0]},), one factor a codeword, or (), one for all,"
            f" got {tuple(smoothing.shape)}"
        )


def _disable_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Disable autocast, but only if it is enabled: strict torch.export cannot save such a region."""
    device = "cpu" if x.is_meta else x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def encode(
    x: Tensor, codewords: Tensor, smoothing: Tensor | float, *, aggregation: str = "sum", backend: str = "auto"
) -> Tensor:
    """Encode features as sums of residuals to a codebook, with soft assignment of every pixel.

    With r_ik = x_i - d_k and w_ik = softmax over k of -s_k |r_ik|^2, the encoding is e_k = sum over pixels i of w_ik r_ik.
    Deep TEN (arXiv 1612.02844), section 3; EncNet (arXiv 1803.08904), section 3.1.

    Supports higher-order gradients in x, codewords and smoothing. Sums, squares and the softmax are computed in fp32
    (fp64 if any argument is fp64), under autocast too. No B x N x K x D tensor is formed.

    Args:
        x: features (B, D, *spatial), one spatial dimension or more, any strides, fp16, bf16, fp32 or fp64. N, the number
            of pixels, is the product of the spatial dimensions.
        codewords: the codebook (K, D).
        smoothing: s (K,), one factor per codeword; or a number or a tensor (), one shared factor, which is faster. A
            larger factor makes the assignment harder. The sign is not checked: factors are positive by convention,
            learned ones may become negative, and the formula stays the same. Other code bases store scale = -s.
        aggregation: "sum" over the pixels, as in the papers, or "mean", e_k / N.
        backend: "auto" takes the fused kernels on a GPU if they can run and have proved themselves there (see
            backend_info), else PyTorch. "torch" always takes PyTorch. "triton" takes the kernels and never falls back.

    Returns:
        Encoding (B, K, D), fp32 or fp64.

    Raises:
        TypeError: an argument is not a tensor of these dtypes.
        ValueError: shapes or devices do not match, or the aggregation or backend is unknown.
        RuntimeError: backend "triton" cannot run on this input or machine.
    """
    backends.check_backend(backend, "encode: backend")
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"encode: aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    mean = aggregation == "mean"
    smoothing = _check("encode", x, codewords, smoothing)
    is_fused, strict = backends.choose("encode", backend, backends.why_not_encode, x, codewords, smoothing)
    if is_fused:
        from ctxenc.kernels.fused import encode as fused_encode

        return fused_encode.encode(x, codewords, smoothing, strict, mean)
    x = x.flatten(2)
    with _disable_autocast(x):
        # A saved graph cannot hold an autograd.Function.
        compute = torch_encode.encode_plainly if backends.is_saving_graph() else torch_encode.encode
        encoding = compute(x, codewords, smoothing)
        return encoding / x.shape[2] if mean else encoding


def backend_info(
    x: Tensor | None = None, codewords: Tensor | None = None, smoothing: Tensor | float | None = None
) -> BackendInfo:
    """Return the backend that "auto" selects now, and the reason.

    Args:
        x: features as for encode(), to ask about one call; None asks about the current GPU.
        codewords: the codebook (K, D), with x.
        smoothing: as for encode(); by default one factor per codeword.

    Returns:
        Named tuple (backend, reason). Computes nothing and tries no kernel.

    Raises:
        TypeError: an argument is not a tensor of encode()'s dtypes.
        ValueError: shapes or devices do not match.
    """
    if x is None and codewords is None:
        return backends.describe_choice()
    if smoothing is None and isinstance(codewords, Tensor) and codewords.dim() == 2:
        smoothing = codewords.new_empty(codewords.shape[0])
    smoothing = _check("backend_info", x, codewords, smoothing)
    return backends.describe_choice(x, codewords, smoothing)  # type: ignore[arg-type]


def can_fuse_gate(x: Tensor, logits: Tensor) -> bool:
    """Return whether run_fused_gate replaces the plain gate.

    False under torch.compile, which fuses the plain gate with the neighbouring layers; a custom operator would cost one more pass.
    False in float64, even with backend "triton". Then encode() may still run fused, on an fp32 projection of an fp64 map.

    Raises:
        RuntimeError: the backend is set to "triton" and the kernels cannot run, as in encode().
    """
    if torch.float64 in (x.dtype, logits.dtype) or torch.compiler.is_compiling():
        return False
    return backends.choose("gate", "auto", backends.why_not, x, logits)[0]


@torch.jit.unused
def run_fused_gate(x: Tensor, logits: Tensor, residual: bool) -> Tensor:
    """Return x * sigmoid(logits), or relu(x + x * sigmoid(logits)), for x (B, C, *spatial) and logits (B, C), laid out like x."""
    from ctxenc.kernels.fused import gate

    return gate.gate(x.flatten(2), logits, residual, backends.get_preferred() == "triton").unflatten(2, x.shape[2:])


def can_fuse_pool(encoding: Tensor, norm: nn.Module) -> bool:
    """Return whether run_fused_pool replaces norm, ReLU and mean: it needs a plain fp32 BatchNorm.

    Everything else takes the plain expression. torch.compile fuses that itself, and a dispatch mode would not see the kernels.
    """
    if backends.is_watched() or not backends.can_serve(encoding):
        return False
    if type(norm) is not nn.BatchNorm2d or not norm.track_running_stats:
        return False
    if encoding.dim() != 3 or encoding.shape[1] > backends.MAX_CODES or not encoding.numel():
        return False
    tensors: tuple[Any, ...] = (encoding, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    are_plain = all(type(tensor) in backends.PLAIN and tensor.dtype == torch.float32 for tensor in tensors)
    if not are_plain or type(norm.num_batches_tracked) is not Tensor:
        return False
    together = all(tensor.device == encoding.device for tensor in (*tensors, norm.num_batches_tracked))
    # The kernel is verified on aligned tensors, as operators return them.
    return together and all(tensor.is_contiguous() for tensor in tensors) and encoding.data_ptr() % 16 == 0


@torch.jit.unused
def run_fused_pool(encoding: Tensor, norm: Any, dtype: torch.dtype) -> Tensor:
    """Return the mean over codewords of relu(norm(encoding)), for an encoding (B, K, C): (B, C) in the given dtype."""
    from ctxenc.kernels.fused.pool import pool

    return pool(encoding, norm, dtype, backends.get_preferred() == "triton")


def can_fuse_projection(x: Tensor, weight: Tensor, shift: Tensor, codewords: Tensor, smoothing: Tensor) -> bool:
    """Return whether run_fused_projection replaces a convolution, a ReLU and encode().

    It does if the kernels can run, gradients are disabled, and the sizes fit the kernel. Otherwise the separate steps run; they
    support more, and raise the errors.
    """
    parameters, device = (weight, shift, codewords, smoothing), x.device.type
    if torch.is_grad_enabled() or not backends.can_serve(x, *parameters):
        return False
    if x.dim() != 4 or 0 in x.shape or any(tensor.device != x.device for tensor in parameters):
        return False
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if x.dtype != dtype or shift.dtype != weight.dtype:
        return False
    if (x.shape[1], codewords.shape[1]) != (weight.shape[1], weight.shape[0]):
        return False
    from ctxenc.kernels.fused.project import can_project

    return can_project(dtype, codewords.shape[1], codewords.shape[0])


@torch.jit.unused
def run_fused_projection(
    x: Tensor, weight: Tensor, shift: Tensor, codewords: Tensor, smoothing: Tensor, aggregation: str = "sum"
) -> Tensor:
    """Return the encoding (B, K, C'), fp32, of relu(conv2d(x, weight, shift)) without storing it; weight is (C', C, 1, 1)."""
    from ctxenc.kernels.fused.project import project_encode

    choices = backends.get_preferred() == "triton", aggregation == "mean"
    return project_encode(x.flatten(2), weight.flatten(1).to(x.dtype), shift, codewords, smoothing, *choices)


def assign(x: Tensor, codewords: Tensor, smoothing: Tensor | float) -> Tensor:
    """Return the weights of every pixel's soft assignment to the codewords, for inspection.

    Args:
        x: features (B, D, *spatial), as for encode().
        codewords: the codebook (K, D).
        smoothing: s (K,), or one shared number or tensor ().

    Returns:
        Weights (B, K, *spatial), fp32 or fp64; they sum to one over K.

    Raises:
        TypeError: an argument is not a tensor of these dtypes.
        ValueError: shapes or devices do not match.
    """
    smoothing = _check("assign", x, codewords, smoothing)
    with _disable_autocast(x):
        weights = torch_encode.assign(x.flatten(2), codewords, smoothing)
    return weights.unflatten(2, x.shape[2:])
