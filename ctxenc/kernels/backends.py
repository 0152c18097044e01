"""Choose the backend of a call: the meaning of "auto", and the reasons why the fused kernels cannot run.

"auto" takes the fused operators on a GPU for every call that they support. Inside them, a kernel serves after it has proved itself
on that GPU: see verdicts.py.
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
MAX_CHANNELS, MAX_CODES = 4096, 256  # limits of the fused kernels
PLAIN = (Tensor, Parameter)  # a subclass, such as DTensor, may redefine an operator
GPUS: tuple[str, ...] = ("cuda",)  # device types ("cuda" includes ROCm); tests in the interpreter add "cpu"


class BackendInfo(NamedTuple):
    """Hold the backend that serves, and the reason."""

    backend: str
    reason: str


def check_backend(backend: str, source: str) -> str:
    """Return the backend's name if it is known.

    Raises:
        ValueError: it is unknown.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


DEFAULT = check_backend(os.environ.get("CTXENC_BACKEND") or "auto", "the environment variable CTXENC_BACKEND")


class _Mirror(threading.local):
    """Mirror the preference in an attribute that torch.compile can guard on: before torch 2.13 it cannot read context variables."""

    def __init__(self) -> None:
        self.backend = DEFAULT


_preferred: ContextVar[str] = ContextVar("ctxenc_backend", default=DEFAULT)
_mirror = _Mirror()


def get_preferred() -> str:
    """Return the present meaning of "auto"."""
    return _mirror.backend if torch.compiler.is_compiling() else _preferred.get()


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Set the meaning of backend="auto" inside the with block, in this thread.

    Args:
        backend: "torch", "triton", or "auto" for the choice by device and dtype.

    Raises:
        ValueError: backend is unknown.
    """
    token = _preferred.set(check_backend(backend, "use_backend: backend"))
    before, _mirror.backend = _mirror.backend, backend
    try:
        yield
    finally:
        _mirror.backend = before
        _preferred.reset(token)


def is_saving_graph() -> bool:
    """Return whether torch.jit.trace or torch.export runs. is_exporting() of torch 2.8 to 2.11 is true under torch.compile too."""
    return torch.jit.is_tracing() or torch.compiler._is_exporting_flag


def is_transformed() -> bool:
    """Return whether a torch.func transform or forward-mode AD is active; they support only PyTorch's own operations."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def is_watched() -> bool:
    """Return whether a compiler or a dispatch mode records the operators that run."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._len_torch_dispatch_stack() + torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0


@cache
def _why_no_gpu(index: int) -> str | None:
    """Return why no kernel can run on a GPU (-1: the interpreter's CPU), or None. Warns of a fixable reason."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if index >= 0 and not torch.version.hip and torch.cuda.get_device_capability(index) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    try:
        import triton

        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 5):
            return "it needs Triton 3.5 or higher, which comes with torch 2.9"
        if index >= 0:
            triton.runtime.driver.active.get_current_target()  # needs a C compiler on the first call
        from ctxenc.kernels.fused import encode  # noqa: F401
    except Exception as error:
        reason = f"Triton does not work here: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        warnings.warn(f"ctxenc: the PyTorch path serves, for {reason}", RuntimeWarning, stacklevel=3)
        return reason
    return None


def _why_not_here(index: int) -> str | None:
    """Return the reason that depends on no tensor and cannot be traced: an active transform, or the GPU."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside torch.func transforms only the PyTorch path runs"
    return _why_no_gpu(index)


# torch.compile must call it, not trace it. torch.compiler.assume_constant_result does the same, but imports the
# compiler first.
_why_not_here._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(x: Tensor, *others: Tensor) -> str | None:
    """Return why the fused kernels cannot serve these tensors, or None."""
    on_gpu = x.is_cuda
    if not on_gpu and x.device.type not in GPUS and not (x.is_cpu and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"x is on {x.device}, and Triton needs a GPU (or TRITON_INTERPRET=1 in the environment)"
    if is_saving_graph():
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
    """Return the same for encode(), which limits the sizes."""
    if reason := why_not(x, codewords, smoothing):
        return reason
    if codewords.shape[1] > MAX_CHANNELS or codewords.shape[0] > MAX_CODES:
        return f"it takes {MAX_CHANNELS} channels and {MAX_CODES} codewords at most, got codewords {tuple(codewords.shape)}"
    return None


def _selects_kernels(backend: str, x: Tensor) -> bool:
    return backend == "triton" or (backend == "auto" and x.device.type in GPUS)


def can_serve(x: Tensor, *others: Tensor) -> bool:
    """Return whether the fused kernels are enabled for these tensors and can serve them. Never raises, even for "triton"."""
    return _selects_kernels(get_preferred(), x) and why_not(x, *others) is None


def choose(name: str, backend: str, why: Callable[..., str | None], x: Tensor, *others: Tensor) -> tuple[bool, bool]:
    """Return whether the fused kernels serve a call, and whether backend "triton" requested them.

    Args:
        name: name of the caller, for the error.
        backend: the caller's `backend` argument.
        why: returns the reason why the kernels cannot serve x and the others, or None.
        x: the features.
        others: the other tensors.

    Raises:
        RuntimeError: "triton" was requested and the kernels cannot run.
    """
    if backend == "auto":
        backend = get_preferred()
    if not _selects_kernels(backend, x):
        return False, False
    reason = why(x, *others)
    if reason and backend == "triton":
        raise RuntimeError(f'{name}: backend="triton" cannot run: {reason}')
    return reason is None, backend == "triton"


def describe_choice(*tensors: Tensor) -> BackendInfo:
    """Return the backend that "auto" selects for encode(), and why: for x, codewords and smoothing, or for the current GPU."""
    backend = get_preferred()
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

    return BackendInfo(*encode.predict_backend(x, codewords, smoothing))
