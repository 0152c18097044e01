"""The fused encode: the PyTorch path that serves where no kernel may, the registered operators, derivatives, the public function.

In eager mode a plain autograd.Function calls the kernels; where a graph is made, or a mode watches, the registered operator does.
A backward that is itself to be differentiated takes the PyTorch path on the saved inputs.

Deep TEN (arXiv 1612.02844), section 3.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ctxenc.kernels import torch_encode, verdicts
from ctxenc.kernels.backends import is_transformed, is_watched
from ctxenc.kernels.fused import proof
from ctxenc.kernels.fused.backward import empty_dx, encode_backward
from ctxenc.kernels.fused.forward import encode_forward
from ctxenc.kernels.fused.steps import INTERPRETED
from ctxenc.kernels.verdicts import Operator

DEVICES = ("cuda", "cpu") if INTERPRETED else "cuda"


def plain_backward(
    grad: Tensor, x: Tensor, codewords: Tensor, smoothing: Tensor, weight_sum: Tensor, x_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in x (empty if not wanted), codewords and smoothing by the PyTorch path, laid out as the kernel's."""
    dx, dcodewords, dsmoothing = torch_encode.gradients(grad, x, codewords, smoothing, x_wanted)
    empty = empty_dx(x, x_wanted)
    return dx if dx.stride() == empty.stride() else empty.copy_(dx), dcodewords, dsmoothing


def _plainly(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """The encoding by the PyTorch path, under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return torch_encode.encode(x.flatten(2), codewords, smoothing)


def takes_formula(grad: Tensor) -> bool:
    """Whether a backward must be made of PyTorch's own operations: it is differentiated again, vectorised or given tangents."""
    if torch.compiler.is_dynamo_compiling():  # compiled autograd, in which Dynamo reads the rest wrongly
        return False
    return torch.is_grad_enabled() or is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)


def differentiable(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    """Gradients of a function in those inputs that require one; they can be differentiated again, in grad too."""
    with torch.enable_grad():
        # Views, for an input may have been computed from another, and that is not this function's to differentiate.
        views = [tensor.view_as(tensor) for tensor in inputs]
        wanted = [view for view in views if view.requires_grad]
        gradients = iter(torch.autograd.grad(function(*views), wanted, grad, create_graph=torch.is_grad_enabled()))
    return [next(gradients) if view.requires_grad else None for view in views]


FORWARD = Operator(
    "encode",
    encode_forward,
    torch_encode.forward_with_weight_sum,
    proof.forward_constants,
    proof.forward_problems,
    proof.forward_excess,
    proof.key,
)
BACKWARD = Operator(
    "encode_backward",
    encode_backward,
    plain_backward,
    proof.backward_constants,
    proof.backward_problems,
    proof.backward_excess,
    lambda grad, x, codewords, smoothing, weight_sum, x_wanted: (*proof.key(x, codewords, smoothing), x_wanted),
)


def expected(x: Tensor, codewords: Tensor, smoothing: Tensor) -> tuple[str, str]:
    """The backend that is to serve an encode on these, and why. Nothing runs."""
    grad = x.new_empty(x.shape[0], *codewords.shape)
    x = x.flatten(2)
    kinds = FORWARD.kind(x, codewords, smoothing), BACKWARD.kind(grad, x, codewords, smoothing, grad[:, :, 0], True)
    found = [verdicts.known(kind) if kind else None for kind in kinds]
    words = [verdict.reason if verdict else "not tried yet: the first call does" for verdict in found]
    backend = "torch" if found[0] and not found[0].serves else "triton"
    return backend, f"forward {words[0]}; backward {words[1]}"


# The registered operators


@torch.library.custom_op("ctxenc::encode", mutates_args=(), device_types=DEVICES)
def _encode_op(x: Tensor, codewords: Tensor, smoothing: Tensor, strict: bool = False) -> tuple[Tensor, Tensor]:
    return FORWARD(strict, x, codewords, smoothing)


@_encode_op.register_fake
def _(x: Tensor, codewords: Tensor, smoothing: Tensor, strict: bool = False) -> tuple[Tensor, Tensor]:
    B, K, D = x.shape[0], *codewords.shape
    return x.new_empty((B, K, D), dtype=torch.float32), x.new_empty((B, K), dtype=torch.float32)


@register_flop_formula(torch.ops.ctxenc.encode)
def _forward_flops(x: Sequence[int], codewords: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the two products, given shapes."""
    return 2 * 2 * math.prod(x) * codewords[0]


@torch.library.custom_op("ctxenc::encode_backward", mutates_args=(), device_types=DEVICES)
def _encode_backward_op(
    grad: Tensor,
    x: Tensor,
    codewords: Tensor,
    smoothing: Tensor,
    weight_sum: Tensor,
    x_wanted: bool,
    strict: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return BACKWARD(strict, grad, x, codewords, smoothing, weight_sum, x_wanted)


@_encode_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    codewords: Tensor,
    smoothing: Tensor,
    weight_sum: Tensor,
    x_wanted: bool,
    strict: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_dx(x, x_wanted), codewords.new_empty(codewords.shape), smoothing.new_empty(smoothing.shape)


@register_flop_formula(torch.ops.ctxenc.encode_backward)
def _backward_flops(
    grad: Any,
    x: Sequence[int],
    codewords: Sequence[int],
    smoothing: Any,
    weight_sum: Any,
    x_wanted: bool,
    *_: Any,
    **__: Any,
) -> int:
    """Of the logits once more, the gradient of the weights, that of the codewords, and two for that in x."""
    return (5 if x_wanted else 3) * 2 * math.prod(x) * codewords[0]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # weight_sum has none, and zeros in its place would be a launch
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.strict = inputs[3]


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    *inputs, weight_sum = ctx.saved_tensors
    if takes_formula(grad):
        return *differentiable(_plainly, inputs, grad), None
    x, *codebook = inputs
    x_wanted = ctx.needs_input_grad[0]
    arguments = grad, x.flatten(2), *codebook, weight_sum, x_wanted
    dx, *others = _encode_backward_op(*arguments, ctx.strict) if is_watched() else BACKWARD(ctx.strict, *arguments)
    return dx.view(x.shape) if x_wanted else None, *others, None


_encode_op.register_autograd(_gradients, setup_context=_save)


class _Encode(torch.autograd.Function):
    """The same without the dispatcher. x is (B, D, *spatial), so that no view of it takes part in autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codewords: Tensor, smoothing: Tensor, strict: bool) -> Tensor:
        encoding, weight_sum = FORWARD(strict, x.flatten(2), codewords, smoothing)
        ctx.save_for_backward(x, codewords, smoothing, weight_sum)
        ctx.strict = strict
        return encoding

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad)


def encode(x: Tensor, codewords: Tensor, smoothing: Tensor, strict: bool = False) -> Tensor:
    """Encoding of x (B, D, *spatial) on codewords (K, D) with smoothing (K,) or (): (B, K, D), fp32.

    fp32, fp16 and bf16 on a GPU, any strides: read where it lies if one stride is 1, copied otherwise. D up to 4096, K up to 256.
    strict: raise RuntimeError where no kernel has proved itself, instead of taking the PyTorch path.
    """
    if is_watched():
        return _encode_op(x.flatten(2), codewords, smoothing, strict)[0]
    wanted = x.requires_grad or codewords.requires_grad or smoothing.requires_grad
    if wanted and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return _Encode.apply(x, codewords, smoothing, strict)
    return FORWARD(strict, x.flatten(2), codewords, smoothing)[0]
