"""The fused encode as a registered operator: schema, fakes, flop counts, derivatives and the public function.

Deep TEN (arXiv 1612.02844), section 3.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ctxenc.kernels.fused.backward import empty_dx, encode_backward
from ctxenc.kernels.fused.forward import encode_forward
from ctxenc.kernels.fused.steps import INTERPRETED

DEVICES = ("cuda", "cpu") if INTERPRETED else "cuda"


@torch.library.custom_op("ctxenc::encode", mutates_args=(), device_types=DEVICES)
def _encode_op(x: Tensor, codewords: Tensor, smoothing: Tensor) -> tuple[Tensor, Tensor]:
    return encode_forward(x, codewords, smoothing)


@_encode_op.register_fake
def _(x: Tensor, codewords: Tensor, smoothing: Tensor) -> tuple[Tensor, Tensor]:
    B, K, D = x.shape[0], *codewords.shape
    return x.new_empty((B, K, D), dtype=torch.float32), x.new_empty((B, K), dtype=torch.float32)


@register_flop_formula(torch.ops.ctxenc.encode)
def _forward_flops(x: Sequence[int], codewords: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the two products, given shapes."""
    return 2 * 2 * math.prod(x) * codewords[0]


@torch.library.custom_op("ctxenc::encode_backward", mutates_args=(), device_types=DEVICES)
def _encode_backward_op(
    grad: Tensor, x: Tensor, codewords: Tensor, smoothing: Tensor, weight_sum: Tensor, x_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return encode_backward(grad, x, codewords, smoothing, weight_sum, x_wanted)


@_encode_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, codewords: Tensor, smoothing: Tensor, weight_sum: Tensor, x_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_dx(x, x_wanted), codewords.new_empty(codewords.shape), smoothing.new_empty(smoothing.shape)


@register_flop_formula(torch.ops.ctxenc.encode_backward)
def _backward_flops(
    grad: Any, x: Sequence[int], codewords: Sequence[int], smoothing: Any, weight_sum: Any, x_wanted: bool, **_: Any
) -> int:
    """Of the logits once more, the gradient of the weights, that of the codewords, and two for that in x."""
    return (5 if x_wanted else 3) * 2 * math.prod(x) * codewords[0]


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # weight_sum has none, and zeros in its place would be a launch
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if grad is None:
        return None, None, None
    x_wanted = ctx.needs_input_grad[0]
    dx, dcodewords, dsmoothing = _encode_backward_op(grad, *ctx.saved_tensors, x_wanted)
    return dx if x_wanted else None, dcodewords, dsmoothing


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        'encode: the Triton path has no second derivatives; take backend="torch" or ctxenc.use_backend("torch")'
    )


_encode_op.register_autograd(_gradients, setup_context=_save)
_encode_backward_op.register_autograd(_no_second_derivative)


def encode(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """Encoding of x (B, D, N) on codewords (K, D) with smoothing (K,) or (): (B, K, D), fp32.

    fp32, fp16 and bf16 on a GPU, any strides: read where it lies if one stride is 1, copied otherwise. D up to 4096, K up to 256.
    """
    return _encode_op(x, codewords, smoothing)[0]
