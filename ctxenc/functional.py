"""encode() and assign(): validation, and the choice of backend, for the block's gate too."""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ctxenc.kernels import torch_encode

BACKENDS = ("auto", "torch", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class BackendInfo(NamedTuple):
    """What backend="auto" takes, and why."""

    backend: str
    reason: str


def _checked_backend(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


# What "auto" means: set by CTXENC_BACKEND for the process, by use_backend() for a while.
_preferred: str = _checked_backend(
    os.environ.get("CTXENC_BACKEND") or "auto", "the environment variable CTXENC_BACKEND"
)


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Set what backend="auto" means inside the with block, in the whole process.

    Args:
        backend: "torch", "triton", or "auto" for the choice by device and dtype.

    Raises:
        ValueError: backend is none of these.
    """
    global _preferred
    before, _preferred = _preferred, _checked_backend(backend, "use_backend: backend")
    try:
        yield
    finally:
        _preferred = before


UNPROVEN = "the Triton kernels have run in the interpreter and through the compiler, not on a GPU: they are taken by name alone"
MAX_CHANNELS, MAX_CODES = 4096, 256  # of the Triton path


@cache
def _triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.import_module("triton").__version__.split(".")[:2])


def _makes_saved_graph() -> bool:
    """Whether torch.jit.trace or torch.export runs. In torch 2.8 to 2.11 is_exporting() is true under torch.compile too."""
    return torch.jit.is_tracing() or torch.compiler._is_exporting_flag


def _why_no_kernels(x: Tensor) -> str | None:
    """The reason why no Triton kernel can run here, None where they can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not x.is_cuda and not (interpreted and x.device.type == "cpu"):
        return f"x is on {x.device}, and Triton needs a GPU (or TRITON_INTERPRET=1 in the environment)"
    if _makes_saved_graph():
        return "a graph for export takes the PyTorch path"
    if not torch.compiler.is_compiling():  # which can look at none of these
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "inside torch.func transforms only the PyTorch path runs"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if _triton_version() < (3, 5):
            return "it needs Triton 3.5 or higher, which comes with torch 2.9"
    if x.is_cuda and not torch.version.hip and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    return None


def _why_not_triton(x: Tensor, codewords: Tensor, smoothing: Tensor) -> str | None:
    """The reason why the Triton path cannot run on these arguments, None where it can."""
    if reason := _why_no_kernels(x):
        return reason
    if torch.float64 in (x.dtype, codewords.dtype, smoothing.dtype):
        return "float64 has only the PyTorch path"
    if codewords.shape[1] > MAX_CHANNELS or codewords.shape[0] > MAX_CODES:
        return f"it takes {MAX_CHANNELS} channels and {MAX_CODES} codewords at most, got codewords {tuple(codewords.shape)}"
    return None


def backend_info() -> BackendInfo:
    """What backend="auto" takes at present, and why.

    Returns:
        A named tuple (backend, reason).
    """
    if _preferred != "auto":
        return BackendInfo(_preferred, "set by use_backend() or CTXENC_BACKEND")
    return BackendInfo("torch", UNPROVEN)


def _wants_triton(backend: str, name: str) -> bool:
    """Whether the Triton path was asked for, by the argument or by what auto means at present.

    Raises:
        ValueError: backend is unknown.
    """
    chosen = _checked_backend(backend, f"{name}: backend")
    return (_preferred if chosen == "auto" else chosen) == "triton"


def _check(name: str, x: Tensor, codewords: Tensor, smoothing: Tensor | float) -> Tensor:
    """Shapes, dtypes and devices. Reads no values: that would synchronise a GPU and break graphs.

    Returns:
        Smoothing as a tensor: a number becomes one of shape (), in fp32 at least, so that no half precision loses it.
    """
    number = not isinstance(smoothing, (Tensor, bool)) and isinstance(smoothing, Real)
    tensors: list[tuple[str, Any]] = [("x", x), ("codewords", codewords)]
    for argument, tensor in tensors if number else [*tensors, ("smoothing", smoothing)]:
        if not isinstance(tensor, Tensor):
            rule = "a number or a tensor" if argument == "smoothing" else "a tensor"
            raise TypeError(f"{name}: {argument} must be {rule}, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: {argument} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor is not x and tensor.device != x.device:
            raise ValueError(f"{name}: {argument} must be on the device of x, {x.device}, got {tensor.device}")
    if not torch.jit.is_tracing():  # where sizes are tensors, and comparing them warns
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


def _no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A region without autocast; none where there is none, for strict torch.export cannot save one."""
    device = "cpu" if x.is_meta else x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def encode(x: Tensor, codewords: Tensor, smoothing: Tensor | float, *, backend: str = "auto") -> Tensor:
    """Encode features as sums of residuals to a codebook, each pixel softly assigned to the codewords.

    With r_ik = x_i - d_k and w_ik = softmax over k of -s_k |r_ik|^2, the encoding is e_k = sum over pixels i of w_ik r_ik.
    Deep TEN (arXiv 1612.02844), section 3; EncNet (arXiv 1803.08904), section 3.1.

    Differentiable in x, codewords and smoothing, to any order on the PyTorch path, once on the Triton path. Sums, squares and the
    softmax are taken in fp32 (fp64 if any argument is fp64), under autocast too. B x N x K x D is never formed.

    Args:
        x: features (B, D, *spatial), one spatial dimension or more, any strides, fp16, bf16, fp32 or fp64. N, the number
            of pixels, is the product of the spatial dimensions.
        codewords: the codebook (K, D).
        smoothing: s (K,), one positive factor a codeword; or a number or a tensor (), one factor shared by all, which is quicker.
            Larger is harder. The sign is not checked; other code bases store scale = -s.
        backend: "auto" for the fastest that can run (see backend_info), "torch", or "triton", which never falls back.

    Returns:
        Encoding (B, K, D), fp32 or fp64.

    Raises:
        TypeError: an argument is no tensor of these dtypes.
        ValueError: shapes or devices do not fit each other, or the backend is unknown.
        RuntimeError: the backend cannot run here.
    """
    triton = _wants_triton(backend, "encode")
    smoothing = _check("encode", x, codewords, smoothing)
    if triton:
        if reason := _why_not_triton(x, codewords, smoothing):
            raise RuntimeError(f'encode: backend="triton" cannot run: {reason}')
        from ctxenc.kernels.fused import encode as triton_encode

        return triton_encode.encode(x.flatten(2), codewords, smoothing)
    with _no_autocast(x):
        if _makes_saved_graph():  # which cannot hold an autograd.Function
            return torch_encode.encode_plainly(x.flatten(2), codewords, smoothing)
        return torch_encode.encode(x.flatten(2), codewords, smoothing)


def fuses_gate(x: Tensor, logits: Tensor) -> bool:
    """Whether fused_gate takes the place of the plain gate: where Triton is in force by name, as no kernel is proven yet.

    float64 takes the plain expression: encode() refuses it, but what is encoded of such a map may be fp32. So does what
    torch.compile compiles, which fuses it with the layers around, where an operator of ours would be one more pass.

    Raises:
        RuntimeError: Triton is in force and cannot run here, as for encode().
    """
    if not _wants_triton("auto", "gate") or torch.float64 in (x.dtype, logits.dtype):
        return False
    if torch.compiler.is_compiling():
        return False
    if reason := _why_no_kernels(x):
        raise RuntimeError(f'gate: backend="triton" cannot run: {reason}')
    return True


@torch.jit.unused
def fused_gate(x: Tensor, logits: Tensor, residual: bool) -> Tensor:
    """X * sigmoid(logits), or relu(x + x * sigmoid(logits)), of x (B, C, *spatial) and logits (B, C), laid out as x is."""
    from ctxenc.kernels.fused import gate as triton_gate

    return triton_gate.gate(x.flatten(2), logits, residual).unflatten(2, x.shape[2:])


def _is_watched() -> bool:
    """Whether a dispatch mode traces, fakes or counts what runs, and would not see a kernel that no operator stands for."""
    return torch._C._len_torch_dispatch_stack() > 0


def fuses_pool(encoding: Tensor, norm: nn.Module) -> bool:
    """Whether fused_pool takes the place of norm, ReLU and mean: where Triton is in force, and the norm is BatchNorm in plain fp32.

    All else is left to the plain expression, as is what torch.compile compiles, for it fuses that.
    """
    if not _wants_triton("auto", "pool") or torch.compiler.is_compiling() or _why_no_kernels(encoding):
        return False
    if _is_watched() or type(norm) is not nn.BatchNorm2d or not norm.track_running_stats:
        return False
    if encoding.dim() != 3 or encoding.shape[1] > MAX_CODES or not encoding.numel():
        return False
    tensors: tuple[Any, ...] = (encoding, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    plain = all(type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 for tensor in tensors)
    if not plain or type(norm.num_batches_tracked) is not Tensor:
        return False
    together = all(tensor.device == encoding.device for tensor in (*tensors, norm.num_batches_tracked))
    return together and all(tensor.is_contiguous() for tensor in tensors)


@torch.jit.unused
def fused_pool(encoding: Tensor, norm: Any, dtype: torch.dtype) -> Tensor:
    """Mean over the codewords of relu(norm(encoding)), of an encoding (B, K, C): (B, C) in the given dtype."""
    from ctxenc.kernels.fused.pool import pool

    return pool(encoding, norm, dtype)


def fuses_projection(x: Tensor, weight: Tensor, shift: Tensor, codewords: Tensor, smoothing: Tensor) -> bool:
    """Whether fused_projection takes the place of a convolution, a ReLU and encode().

    It does where Triton is in force by name, no gradient is wanted, and the sizes fit that kernel. What the steps would refuse is
    left to them.
    """
    if not _wants_triton("auto", "projection") or torch.is_grad_enabled() or _why_no_kernels(x):
        return False
    parameters, device = (weight, shift, codewords, smoothing), x.device.type
    if x.dim() != 4 or 0 in x.shape or any(tensor.device != x.device for tensor in parameters):
        return False
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    dtypes = [tensor.dtype for tensor in parameters]
    if x.dtype != dtype or shift.dtype != weight.dtype or torch.float64 in dtypes:
        return False
    if (x.shape[1], codewords.shape[1]) != (weight.shape[1], weight.shape[0]):
        return False
    from ctxenc.kernels.fused.project import may_project

    return may_project(dtype, codewords.shape[1], codewords.shape[0])


@torch.jit.unused
def fused_projection(x: Tensor, weight: Tensor, shift: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """Encoding (B, K, C'), fp32, of relu(conv2d(x, weight, shift)), which is never in memory; weight is (C', C, 1, 1)."""
    from ctxenc.kernels.fused.project import project_encode

    return project_encode(x.flatten(2), weight.flatten(1).to(x.dtype), shift, codewords, smoothing)


def assign(x: Tensor, codewords: Tensor, smoothing: Tensor | float) -> Tensor:
    """Weights with which every pixel is assigned to the codewords, for looking at.

    Args:
        x: features (B, D, *spatial), as for encode().
        codewords: the codebook (K, D).
        smoothing: s (K,), or one number or tensor () for all.

    Returns:
        Weights (B, K, *spatial), fp32 or fp64; they sum to one over K.

    Raises:
        TypeError: an argument is no tensor of these dtypes.
        ValueError: shapes or devices do not fit each other.
    """
    smoothing = _check("assign", x, codewords, smoothing)
    with _no_autocast(x):
        weights = torch_encode.assign(x.flatten(2), codewords, smoothing)
    return weights.unflatten(2, x.shape[2:])
