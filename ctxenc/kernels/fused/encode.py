"""Define the fused encode: its PyTorch fallback, the registered operators, their derivatives, and the public function.

Eager mode calls the kernels from a plain autograd.Function. Graph capture and dispatch modes use the registered operator. If a
backward will be differentiated again, it takes the PyTorch path on the saved inputs.

Deep TEN (arXiv 1612.02844), section 3.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ctxenc.kernels import torch_encode, verdicts
from ctxenc.kernels.backends import is_transformed, is_watched
from ctxenc.kernels.fused import proof
from ctxenc.kernels.fused.backward import encode_backward
from ctxenc.kernels.fused.forward import encode_forward
from ctxenc.kernels.fused.launch import allocate_like
from ctxenc.kernels.fused.steps import INTERPRETED
from ctxenc.kernels.verdicts import Operator

DEVICES = ("cuda", "cpu") if INTERPRETED else "cuda"


def plain_backward(
    grad: Tensor,
    x: Tensor,
    codewords: Tensor,
    smoothing: Tensor,
    weight_sum: Tensor,
    x_wanted: bool,
    mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in x (empty if not wanted), codewords and smoothing by the PyTorch path, laid out like the kernel's."""
    grad = grad / x.shape[2] if mean else grad
    dx, dcodewords, dsmoothing = torch_encode.compute_gradients(grad, x, codewords, smoothing, x_wanted)
    empty = allocate_like(x, x_wanted)
    return dx if dx.stride() == empty.stride() else empty.copy_(dx), dcodewords, dsmoothing


def _encode_plainly(x: Tensor, codewords: Tensor, smoothing: Tensor, mean: bool) -> Tensor:
    """Encode by the PyTorch path, under autocast too."""
    x = x.flatten(2)
    with torch.autocast(x.device.type, enabled=False):
        encoding = torch_encode.encode(x, codewords, smoothing)
    return encoding / x.shape[2] if mean else encoding


def needs_torch_ops(grad: Tensor) -> bool:
    """Return whether backward must use PyTorch's own operations: for a second derivative, vmap or tangents."""
    if torch.compiler.is_dynamo_compiling():  # compiled autograd, where Dynamo misreads the checks below
        return False
    return torch.is_grad_enabled() or is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)


def differentiate(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    """Return a function's gradients in the inputs that require one; they can be differentiated again, in grad too."""
    with torch.enable_grad():
        # Differentiate in views: if an input was computed from another, its gradient must not flow through this
        # function.
        views = [tensor.view_as(tensor) for tensor in inputs]
        wanted = [view for view in views if view.requires_grad]
        gradients = iter(torch.autograd.grad(function(*views), wanted, grad, create_graph=torch.is_grad_enabled()))
    return [next(gradients) if view.requires_grad else None for view in views]


def differentiate_again(operator: Any, function: Callable[..., Tensor], count: int) -> None:
    """Register derivatives for an operator that computes a function's gradients: compiled autograd asks for them.

    Both derivatives consist of PyTorch's own operations. The operator takes the incoming gradient and then the function's
    arguments. The first `count` of these are tensors, and the operator returns a gradient for each.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: count + 1])
        ctx.others = inputs[count + 1 :]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            saved = ctx.saved_tensors
            grad, *inputs = (
                each.view_as(each) if each.requires_grad else each.detach().requires_grad_() for each in saved
            )
            first = torch.autograd.grad(function(*inputs, *ctx.others), inputs, grad, create_graph=True)
            pairs = [
                (own, outer) for own, outer in zip(first, grads, strict=True) if outer is not None and outer.numel()
            ]
            owns, outers = zip(*pairs, strict=True) if pairs else ((), ())
            second = torch.autograd.grad(owns, (grad, *inputs), outers, create_graph=again, allow_unused=True)
        return *second, *(None for _ in ctx.others)

    operator.register_autograd(backward, setup_context=save)


FORWARD = Operator(
    "encode",
    encode_forward,
    torch_encode.encode_with_weight_sum,
    proof.describe_forward,
    proof.make_forward_problems,
    proof.measure_forward_excess,
    proof.key_call,
)
BACKWARD = Operator(
    "encode_backward",
    encode_backward,
    plain_backward,
    proof.describe_backward,
    proof.make_backward_problems,
    proof.measure_backward_excess,
    lambda grad, x, codewords, smoothing, weight_sum, x_wanted, mean=False: (
        *proof.key_call(x, codewords, smoothing),
        x_wanted,
    ),
)


def predict_backend(x: Tensor, codewords: Tensor, smoothing: Tensor) -> tuple[str, str]:
    """Return the backend that would serve an encode on these tensors, and why. Runs nothing."""
    grad = x.new_empty(x.shape[0], *codewords.shape)
    x = x.flatten(2)
    kinds = FORWARD.kind(x, codewords, smoothing), BACKWARD.kind(grad, x, codewords, smoothing, grad[:, :, 0], True)
    verdict_pair = [verdicts.find_verdict(kind) if kind else None for kind in kinds]
    reasons = [verdict.reason if verdict else "not tried yet: the first call does" for verdict in verdict_pair]
    backend = "torch" if verdict_pair[0] and not verdict_pair[0].serves else "triton"
    return backend, f"forward {reasons[0]}; backward {reasons[1]}"


# The registered operators


@torch.library.custom_op("ctxenc::encode", mutates_args=(), device_types=DEVICES)
def _encode_op(
    x: Tensor, codewords: Tensor, smoothing: Tensor, strict: bool = False, mean: bool = False
) -> tuple[Tensor, Tensor]:
    return FORWARD(strict, x, codewords, smoothing, mean)


@_encode_op.register_fake
def _(x: Tensor, codewords: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    B, K, D = x.shape[0], *codewords.shape
    return x.new_empty((B, K, D), dtype=torch.float32), x.new_empty((B, K), dtype=torch.float32)


@register_flop_formula(torch.ops.ctxenc.encode)
def _count_forward_flops(x: Sequence[int], codewords: Sequence[int], *_: Any, **__: Any) -> int:
    """Count the flops of the two products, from shapes."""
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
    mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return BACKWARD(strict, grad, x, codewords, smoothing, weight_sum, x_wanted, mean)


@_encode_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    codewords: Tensor,
    smoothing: Tensor,
    weight_sum: Tensor,
    x_wanted: bool,
    strict: bool = False,
    mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return allocate_like(x, x_wanted), codewords.new_empty(codewords.shape), smoothing.new_empty(smoothing.shape)


@register_flop_formula(torch.ops.ctxenc.encode_backward)
def _count_backward_flops(
    grad: Any,
    x: Sequence[int],
    codewords: Sequence[int],
    smoothing: Any,
    weight_sum: Any,
    x_wanted: bool,
    *_: Any,
    **__: Any,
) -> int:
    """Count the flops of the logits (recomputed), the gradients of weights and codewords, and two products for dx."""
    return (5 if x_wanted else 3) * 2 * math.prod(x) * codewords[0]


differentiate_again(
    _encode_backward_op,
    lambda x, codewords, smoothing, weight_sum, x_wanted, strict, mean: _encode_plainly(x, codewords, smoothing, mean),
    count=3,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # weight_sum has no gradient, and zeros in its place would cost a launch
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.strict, ctx.mean = inputs[3:]


def _compute_gradients(ctx: Any, grad: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    *inputs, weight_sum = ctx.saved_tensors
    if needs_torch_ops(grad):
        return *differentiate(partial(_encode_plainly, mean=ctx.mean), inputs, grad), None, None
    x, *codebook = inputs
    x_wanted = ctx.needs_input_grad[0]
    arguments, choices = (grad, x.flatten(2), *codebook, weight_sum, x_wanted), (ctx.strict, ctx.mean)
    if is_watched():
        dx, *others = _encode_backward_op(*arguments, *choices)
    else:
        dx, *others = BACKWARD(ctx.strict, *arguments, ctx.mean)
    return dx.view(x.shape) if x_wanted else None, *others, None, None


_encode_op.register_autograd(_compute_gradients, setup_context=_save)


class _Encode(torch.autograd.Function):
    """Run the kernels without the dispatcher. x is (B, D, *spatial), so that autograd sees no view of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codewords: Tensor, smoothing: Tensor, strict: bool, mean: bool) -> Tensor:
        encoding, weight_sum = FORWARD(strict, x.flatten(2), codewords, smoothing, mean)
        ctx.save_for_backward(x, codewords, smoothing, weight_sum)
        ctx.strict, ctx.mean = strict, mean
        return encoding

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _compute_gradients(ctx, grad)


def encode(x: Tensor, codewords: Tensor, smoothing: Tensor, strict: bool = False, mean: bool = False) -> Tensor:
    """Encode x (B, D, *spatial) with codewords (K, D) and smoothing (K,) or (): (B, K, D), fp32; or its mean over the pixels.

    Takes fp32, fp16 and bf16 on a GPU, with any strides: x is read in place if one stride is 1, else copied. D up to 4096, K up to
    256. strict: raise RuntimeError if no kernel has proved itself, instead of taking the PyTorch path.
    """
    if is_watched():
        return _encode_op(x.flatten(2), codewords, smoothing, strict, mean)[0]
    needs_grad = x.requires_grad or codewords.requires_grad or smoothing.requires_grad
    if needs_grad and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return _Encode.apply(x, codewords, smoothing, strict, mean)
    return FORWARD(strict, x.flatten(2), codewords, smoothing, mean)[0]
