"""The fused encode: the PyTorch path that serves where no kernel may, the registered operators, derivatives, the public function.

In eager mode a plain autograd.Function calls the kernels; where a graph is made, or a mode watches, the registered operator does.
A backward that is itself to be differentiated takes the PyTorch path on the saved inputs.

Deep TEN (arXiv 1612.02844), section 3.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ctxenc.kernels import tolerance, torch_encode, verdicts
from ctxenc.kernels.backends import is_transformed
from ctxenc.kernels.fused.launch import _precision, empty_dx, encode_backward, encode_forward
from ctxenc.kernels.fused.operands import INTERPRETED
from ctxenc.kernels.fused.tiles import Tiles, backward_tiles, forward_tiles, is_channels_last, target_of, vector
from ctxenc.kernels.verdicts import Arguments, Constants, Operator

DEVICES = ("cuda", "cpu") if INTERPRETED else "cuda"
PRODUCTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float16}  # tf32 has fp16's unit
LARGEST = 2**23  # elements of x in a problem, of a few tiles at least: an fp64 copy takes 64 MB


def plain_forward(x: Tensor, codewords: Tensor, smoothing: Tensor) -> tuple[Tensor, Tensor]:
    """Encoding (B, K, D) and the sums of the weights (B, K) by the PyTorch path, at least fp32."""
    weights = torch_encode.assign(x, codewords, smoothing)
    center = torch_encode.central(codewords.to(weights.dtype))
    weight_sum = weights.sum(2)
    sums = torch.bmm(weights, (x - center[:, None]).transpose(1, 2))
    return sums - weight_sum.unsqueeze(2) * (codewords - center), weight_sum


def plain_backward(
    grad: Tensor, x: Tensor, codewords: Tensor, smoothing: Tensor, weight_sum: Tensor, x_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in x (empty if not wanted), codewords and smoothing by the PyTorch path, which takes the weights once more."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (x, codewords, smoothing)]
        encoding = torch_encode.encode(leaves[0] if x_wanted else x.detach(), *leaves[1:])
        *dx, dcodewords, dsmoothing = torch.autograd.grad(encoding, leaves if x_wanted else leaves[1:], grad)
    empty = empty_dx(x, x_wanted)
    if not x_wanted:
        return empty, dcodewords, dsmoothing
    return dx[0] if dx[0].stride() == empty.stride() else empty.copy_(dx[0]), dcodewords, dsmoothing


def _plainly(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """The encoding by the PyTorch path, under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return torch_encode.encode(x.flatten(2), codewords, smoothing)


def differentiable(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    """Gradients of a function in those inputs that require one; they can be differentiated again, in grad too."""
    with torch.enable_grad():
        # Views, for an input may have been computed from another, and that is not this function's to differentiate.
        views = [tensor.view_as(tensor) for tensor in inputs]
        wanted = [view for view in views if view.requires_grad]
        gradients = iter(torch.autograd.grad(function(*views), wanted, grad, create_graph=torch.is_grad_enabled()))
    return [next(gradients) if view.requires_grad else None for view in views]


# How the kernels prove themselves


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def describe(x: Tensor, codewords: Tensor, smoothing: Tensor, tiles: Tiles) -> Constants:
    """Everything that a kernel is compiled for which reads x (B, channels, N)."""
    if x.stride(2) != 1 and not is_channels_last(x):
        x = x.contiguous()  # as the launch does
    K, D = codewords.shape
    last = is_channels_last(x)
    dtypes = {
        name: dtype_name(tensor) for name, tensor in (("x", x), ("codewords", codewords), ("smoothing", smoothing))
    }
    sizes = {"D": D, "K": K, "shared": smoothing.dim() == 0, "channels_last": last, "vector": vector(x, last)}
    return {**dtypes, **sizes, "products": _precision(x.dtype), **tiles._asdict()}


def _forward_constants(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Constants | None:
    return describe(x, codewords, smoothing, forward_tiles(x, codewords.shape[0])[0]) if x.numel() else None


def _backward_constants(
    grad: Tensor, x: Tensor, codewords: Tensor, smoothing: Tensor, weight_sum: Tensor, x_wanted: bool
) -> Constants | None:
    if not x.numel():
        return None
    return {**describe(x, codewords, smoothing, backward_tiles(x, codewords.shape[0])[0]), "x_wanted": x_wanted}


def placed(B: int, C: int, N: int, channels_last: bool, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Empty tensors (B, C, N or up to 16 more) of one layout, of every alignment; with images of their own, then of one repeated."""
    room = torch.empty(B * C * (N + 16) + 8, dtype=dtype, device=device)
    for images in (B, 1):
        for start in (0, 1, 2, 4):
            for pixels in range(N + 1, N + 17):
                x = room[start : start + images * C * pixels]
                x = x.view(images, pixels, C).transpose(1, 2) if channels_last else x.view(images, C, pixels)
                yield x.expand(B, C, pixels)


def candidates(constants: Constants, channels: int, device: torch.device) -> Iterator[Tensor]:
    """Empty features for a problem, of more than seven tiles an image, and more in all than there can be programs, within LARGEST."""
    tiles, block_n = 7, int(constants["block_n"])
    multiprocessors = target_of(torch.empty(0, device=device)).multiprocessors
    images = max(3, min(multiprocessors, LARGEST // (tiles * block_n * channels)))
    dtype = getattr(torch, str(constants["x"]))
    return placed(images, channels, tiles * block_n, bool(constants["channels_last"]), dtype, device)


def fill(x: Tensor, values: Callable[[torch.Size], Tensor]) -> None:
    """Write values of a shape to x, whose images may be one repeated."""
    own = x[:1] if x.stride(0) == 0 else x
    own.copy_(values(own.shape))


def _problem(constants: Constants, device: torch.device, of: Callable[..., Constants | None]) -> Arguments | None:
    """Pixels and codewords on a line, in every other channel, with others strewn between; every channel lies off the origin.

    There what a product loses of each channel adds up. The codewords' distances are such that rounding them to the dtype of the
    products cuts nearly half a unit; they lie about codeword 0, which is their centre. Offsets are 12 times the largest distance,
    where half precision is multiplied without a shift, and in one channel of eight far more.
    """
    D, K, products = int(constants["D"]), int(constants["K"]), PRODUCTS.get(str(constants["products"]), torch.float32)
    dtypes = [getattr(torch, str(constants[name])) for name in ("codewords", "smoothing")]
    draw: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    size, line = 2.0 ** -round(math.log2(D) / 2), torch.arange(D, device=device) % 2 == 0
    sign = torch.randint(0, 2, (D,), **draw) * 2.0 - 1
    far = 1000.0 if products == torch.float32 else 100.0
    offset = sign * torch.where(torch.arange(D, device=device) % 8 == 7, far, 12.0)
    mantissa, exponent = torch.frexp(torch.linspace(1, 0.1, -(-K // 2), device=device))
    step = torch.finfo(products).eps / 2
    cut = torch.ldexp((mantissa / step).floor() * step + 0.45 * step, exponent)[:, None]
    strewn = torch.rand(len(cut), D, **draw)
    distance = torch.where(line, cut * sign, strewn)
    codewords = torch.stack([distance, -distance], 1).flatten(0, 1)
    codewords = torch.cat([torch.zeros_like(codewords[:1]), codewords])[:K]
    smoothing = (6 * (torch.rand(() if constants["shared"] else (K,), **draw) + 0.5)).to(dtypes[1])
    given = ((codewords + offset) * size).to(dtypes[0]), smoothing

    def features(shape: torch.Size) -> Tensor:
        B, _, N = shape
        places = torch.where(
            line[:, None], (2 * torch.rand(B, 1, N, **draw) - 1) * sign[:, None], 2 * torch.rand(shape, **draw) - 1
        )
        return (places + offset[:, None]) * size

    for x in candidates(constants, D, device):
        if of(x, *given) == constants:
            fill(x, features)
            return x, *given
    return None


def _forward_problem(constants: Constants, device: torch.device) -> Arguments | None:
    return _problem(constants, device, _forward_constants)


def _backward_problem(constants: Constants, device: torch.device) -> Arguments | None:
    wanted, nothing = bool(constants["x_wanted"]), torch.empty(0)
    problem = _problem(constants, device, lambda *tensors: _backward_constants(nothing, *tensors, nothing, wanted))
    if problem is None:
        return None
    x, codewords, smoothing = (tensor.double() for tensor in problem)
    weight_sum = torch_encode.assign(x, codewords, smoothing).sum(2).float()
    draw: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(1), "device": device}
    line = codewords[-1] - codewords[0]
    line = torch.where(torch.arange(len(line), device=device) % 2 == 0, line.sign(), 0).float()
    grad = torch.randn(*weight_sum.shape, 1, **draw) * line + 0.3 * torch.randn(*weight_sum.shape, len(line), **draw)
    return grad, *problem, weight_sum, wanted


def _forward_excess(arguments: Arguments, results: tuple[Tensor, ...]) -> dict[str, float]:
    exact = plain_forward(*(tensor.double() for tensor in arguments))
    return excess(("encoding", "weight_sum"), results, exact, exact[0], *arguments)


def _backward_excess(arguments: Arguments, results: tuple[Tensor, ...]) -> dict[str, float]:
    *tensors, x_wanted = arguments
    grad, x, codewords, smoothing, weight_sum = (tensor.double() for tensor in tensors)
    exact = plain_backward(grad, x, codewords, smoothing, weight_sum, x_wanted)
    return excess(("dx", "dcodewords", "dsmoothing"), results, exact, *tensors[:4])


def excess(
    names: Sequence[str], results: tuple[Tensor, ...], exact: tuple[Tensor, ...], grad: Tensor, *inputs: Tensor
) -> dict[str, float]:
    """Error over tolerance of the named results for x, codewords and smoothing."""
    products = PRODUCTS.get(_precision(inputs[0].dtype), torch.float32)
    x, codewords, smoothing = (tensor.double() for tensor in inputs)
    weights = torch_encode.assign(x, codewords, smoothing)
    terms = tolerance.absolute_terms(x, codewords, smoothing, grad.double(), weights)
    got, wanted = (dict(zip(names, each, strict=True)) for each in (results, exact))
    return tolerance.excess(got, wanted, terms, products)


FORWARD = Operator("encode", encode_forward, plain_forward, _forward_constants, _forward_problem, _forward_excess)
BACKWARD = Operator(
    "encode_backward", encode_backward, plain_backward, _backward_constants, _backward_problem, _backward_excess
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


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    *inputs, weight_sum = ctx.saved_tensors
    if torch.is_grad_enabled():
        return *differentiable(_plainly, inputs, grad), None
    x_wanted = ctx.needs_input_grad[0]
    dx, *others = _encode_backward_op(grad, *inputs, weight_sum, x_wanted, ctx.strict)
    return dx if x_wanted else None, *others, None


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
        *inputs, weight_sum = ctx.saved_tensors
        if torch.is_grad_enabled() or is_transformed():  # to be differentiated again, or vectorised
            return *differentiable(_plainly, inputs, grad), None
        x, codewords, smoothing = inputs
        x_wanted = ctx.needs_input_grad[0]
        dx, dcodewords, dsmoothing = BACKWARD(
            ctx.strict, grad, x.flatten(2), codewords, smoothing, weight_sum, x_wanted
        )
        return dx.view(x.shape) if x_wanted else None, dcodewords, dsmoothing, None


def encode(x: Tensor, codewords: Tensor, smoothing: Tensor, strict: bool = False) -> Tensor:
    """Encoding of x (B, D, *spatial) on codewords (K, D) with smoothing (K,) or (): (B, K, D), fp32.

    fp32, fp16 and bf16 on a GPU, any strides: read where it lies if one stride is 1, copied otherwise. D up to 4096, K up to 256.
    strict: raise RuntimeError where no kernel has proved itself, instead of taking the PyTorch path.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return _encode_op(x.flatten(2), codewords, smoothing, strict)[0]
    wanted = x.requires_grad or codewords.requires_grad or smoothing.requires_grad
    if wanted and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return _Encode.apply(x, codewords, smoothing, strict)
    return FORWARD(strict, x.flatten(2), codewords, smoothing)[0]
