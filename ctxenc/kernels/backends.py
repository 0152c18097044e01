"""Which backend serves a call: what "auto" means, and why the fused kernels cannot run.

"auto" takes the fused operators on a GPU wherever they can do what the PyTorch path can. In them a kernel serves once it has proved
itself there: verdicts.py.
"""

import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

BACKENDS = ("auto", "torch", "triton")
MAX_CHANNELS, MAX_CODES = 4096, 256  # of the fused kernels
PLAIN = (Tensor, Parameter)  # a subclass may give an operator another meaning, as DTensor does
GPUS: tuple[str, ...] = ("cuda",)  # device types, ROCm's among them; tests in the interpreter add "cpu"


class BackendInfo(NamedTuple):
    """The backend that serves, and why."""

    backend: str
    reason: str


def checked(backend: str, source: str) -> str:
    """The backend's name.

    Raises:
        ValueError: it is unknown.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


DEFAULT = checked(os.environ.get("CTXENC_BACKEND") or "auto", "the environment variable CTXENC_BACKEND")


class _Mirror(threading.local):
    """The preference for torch.compile, which guards on attributes; before torch 2.13 it cannot read context variables."""

    def __init__(self) -> None:
        self.backend = DEFAULT


_preferred: ContextVar[str] = ContextVar("ctxenc_backend", default=DEFAULT)
_mirror = _Mirror()


def preferred() -> str:
    """What "auto" means at present."""
    return _mirror.backend if torch.compiler.is_compiling() else _preferred.get()


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Set what backend="auto" means inside the with block, in this thread.

    Args:
        backend: "torch", "triton", or "auto" for the choice by device and dtype.

    Raises:
        ValueError: backend is none of these.
    """
    token = _preferred.set(checked(backend, "use_backend: backend"))
    before, _mirror.backend = _mirror.backend, backend
    try:
        yield
    finally:
        _mirror.backend = before
        _preferred.reset(token)


def makes_saved_graph() -> bool:
    """Whether torch.jit.trace or torch.export runs. In torch 2.8 to 2.11 is_exporting() is true under torch.compile too."""
    return torch.jit.is_tracing() or torch.compiler._is_exporting_flag


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD is active, which see only PyTorch's own operations."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def is_watched() -> bool:
    """Whether something sees the operators that run: a compiler or a dispatch mode."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._len_torch_dispatch_stack() + torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0


@cache
def _why_no_gpu(index: int) -> str | None:
    """The reason why no kernel can run on a GPU (-1: the interpreter's CPU), None where they can. Warns of what can be mended."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if index >= 0 and not torch.version.hip and torch.cuda.get_device_capability(index) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    try:
        import triton

        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 5):
            return "it needs Triton 3.5 or higher, which comes with torch 2.9"
        if index >= 0:
            triton.runtime.driver.active.get_current_target()  # needs a C compiler once
        from ctxenc.kernels.fused import encode  # noqa: F401
    except Exception as error:
        reason = f"Triton does not work here: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        warnings.warn(f"ctxenc: the PyTorch path serves, for {reason}", RuntimeWarning, stacklevel=3)
        return reason
    return None


def _why_not_here(index: int) -> str | None:
    """What depends on no tensor, and cannot be traced: the transforms that are active, and the GPU."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside torch.func transforms only the PyTorch path runs"
    return _why_no_gpu(index)


# torch.compile is to call it, not to trace it. torch.compiler.assume_constant_result does the same, but imports the compiler first.
_why_not_here._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(x: Tensor, *others: Tensor) -> str | None:
    """The reason why the fused kernels cannot serve these tensors, None where they can."""
    on_gpu = x.is_cuda
    if not on_gpu and x.device.type not in GPUS and not (x.is_cpu and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"x is on {x.device}, and Triton needs a GPU (or TRITON_INTERPRET=1 in the environment)"
    if makes_saved_graph():
        return "a graph for export takes the PyTorch path"
    if forward_ad._current_level >= 0:
        return "forward-mode AD has only the PyTorch path"
    for tensor in (x, *others):
        if type(tensor) not in PLAIN:
            return f"a {type(tensor).__name__} takes the PyTorch path"
        if tensor.dtype == torch.float64:
            return "float64 has only the PyTorch path"
    return _why_not_here(x.device.index if on_gpu else -1)


def why_not_encode(x: Tensor, codewords: Tensor, smoothing: Tensor) -> str | None:
    """The same for an encode, whose sizes have limits."""
    if reason := why_not(x, codewords, smoothing):
        return reason
    if codewords.shape[1] > MAX_CHANNELS or codewords.shape[0] > MAX_CODES:
        return f"it takes {MAX_CHANNELS} channels and {MAX_CODES} codewords at most, got codewords {tuple(codewords.shape)}"
    return None


def may_serve(x: Tensor, *others: Tensor) -> bool:
    """Whether the fused kernels are wanted for these tensors and can serve them. Raises nothing, even if asked for by name."""
    wanted = preferred()
    if wanted == "torch" or (wanted == "auto" and x.device.type not in GPUS):
        return False
    return why_not(x, *others) is None


def choose(name: str, backend: str, why: Callable[..., str | None], x: Tensor, *others: Tensor) -> tuple[bool, bool]:
    """Whether the fused kernels serve a call, and whether they were asked for by name.

    Args:
        name: of the caller, for the error.
        backend: as it was given.
        why: gives the reason why the kernels cannot serve x and the others, or None.
        x: the features.
        others: the other tensors.

    Raises:
        RuntimeError: the kernels were asked for by name and cannot run.
    """
    if backend == "auto":
        backend = preferred()
    if backend == "torch" or (backend == "auto" and x.device.type not in GPUS):
        return False, False
    reason = why(x, *others)
    if reason and backend == "triton":
        raise RuntimeError(f'{name}: backend="triton" cannot run: {reason}')
    return reason is None, backend == "triton"


def info(*tensors: Tensor) -> BackendInfo:
    """The backend that serves encode() under "auto" at present, and why: on x, codewords and smoothing, or on the current GPU."""
    backend = preferred()
    if backend != "auto":
        return BackendInfo(backend, "set by use_backend() or CTXENC_BACKEND")
    if not tensors:
        if not torch.cuda.is_available():
            return BackendInfo("torch", "there is no GPU that PyTorch can use, and Triton needs one")
        reason = _why_no_gpu(torch.cuda.current_device())
        return BackendInfo(
            "torch" if reason else "triton", reason or "on a GPU, each kernel once it has proved itself there"
        )
    x, codewords, smoothing = tensors
    if reason := why_not_encode(x, codewords, smoothing):
        return BackendInfo("torch", reason)
    from ctxenc.kernels.fused import encode

    return BackendInfo(*encode.expected(x, codewords, smoothing))
