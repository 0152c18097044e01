"""The fused gate: y = x * sigmoid(logits), or EncNet's y = relu(x + x * sigmoid(logits)), forward and backward as Triton kernels.

Forward reads x and writes y, once each. Backward reads x and dy and writes dx, once each, and sums dy * x over the pixels on its
way: a program sums WALK pixels of some channels, and the sums of all programs are added in a fixed order. No atomics: the same bits
come out of every run. The cut depends on sizes alone, so that another GPU adds in the same order. Arithmetic is fp32.

The first form is that of Squeeze-and-Excitation (arXiv 1709.01507), the second that of EncNet (arXiv 1803.08904), section 3.1.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctxenc.kernels.fused import proof
from ctxenc.kernels.fused.encode import DEVICES, differentiable, is_watched, takes_formula
from ctxenc.kernels.fused.operands import _INTERPRETED, drop_bits
from ctxenc.kernels.fused.tiles import ceil_div
from ctxenc.kernels.fused.walk import multiple
from ctxenc.kernels.verdicts import Arguments, Constants, Operator, place

# One binary for all sizes: how x and dy are aligned is in the explicit constexprs VECTOR and DY_VECTOR.
SIZES = ["p_x", "p_logits", "p_dy", "C", "N", "tiles_c", "tiles_n", "splits"]
SIZES += [f"{of}stride_{dim}" for of in ("", "dy_") for dim in "bcn"]

WALK = 256  # pixels that one program of backward sums up: its partial sums are 1 / (64 * itemsize) of x, at most 0.8 %


@triton.jit
def _place(tiles_c, tiles_n, UNIT: tl.constexpr):
    """Image, tile of channels and tile of pixels of this program, int64: neighbours lie side by side in memory."""
    pid = tl.program_id(0).to(tl.int64)
    if UNIT == "c":
        return pid // tiles_c // tiles_n, pid % tiles_c, pid // tiles_c % tiles_n
    else:
        return pid // tiles_n // tiles_c, pid // tiles_n % tiles_c, pid % tiles_n


@triton.jit
def _pointers(p_image, c, n, o_c, o_n, stride_c, stride_n, UNIT: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to the tile that starts at channel c and pixel n, int64. UNIT: whose stride is 1, "c", "n" or "" for neither."""
    if UNIT == "c":
        stride_n = multiple(stride_n, VECTOR)
        p_tile, offsets = p_image + n * stride_n + c, (o_n.to(tl.int64) * stride_n)[None, :] + o_c[:, None]
    elif UNIT == "n":
        stride_c = multiple(stride_c, VECTOR)
        p_tile, offsets = p_image + c * stride_c + n, (o_c.to(tl.int64) * stride_c)[:, None] + o_n[None, :]
    else:
        p_tile = p_image + c * stride_c + n * stride_n
        offsets = (o_c.to(tl.int64) * stride_c)[:, None] + (o_n.to(tl.int64) * stride_n)[None, :]
    return tl.multiple_of(p_tile, VECTOR * p_image.dtype.element_ty.primitive_bitwidth // 8) + offsets


@triton.jit
def _sigmoid(p_logits, mask):
    """Sigmoid of some logits and its derivative, neither of which overflows or cancels."""
    logits = tl.load(p_logits, mask=mask, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(logits))
    return tl.where(logits >= 0, 1.0, e) / (1 + e), e / ((1 + e) * (1 + e))


@triton.jit
def _store(pointers, value, mask):
    """The fp32 value, rounded to what the pointers point to."""
    dtype = pointers.dtype.element_ty
    if _INTERPRETED and dtype == tl.bfloat16:  # which the interpreter cuts
        value = drop_bits(value, 16)
    tl.store(pointers, value.to(dtype), mask=mask)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def gate_fwd_kernel(
    p_x,  # (B, C, N)
    p_logits,  # (B, C)
    p_y,  # (B, C, N), dense, in the layout of x
    C,
    N,
    tiles_c,
    tiles_n,
    stride_b,
    stride_c,
    stride_n,
    RESIDUAL: tl.constexpr,  # EncNet's form
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that address, strides and length of a row are multiples of
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if UNIT == "c":
        C = multiple(C, VECTOR)
    else:
        N = multiple(N, VECTOR)
    b, tile_c, tile_n = _place(tiles_c, tiles_n, UNIT)
    c, n, o_c, o_n = tile_c * BLOCK_C, tile_n * BLOCK_N, tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    m_c = o_c < C - c
    mask = m_c[:, None] & (o_n < N - n)[None, :]
    gate, _ = _sigmoid(p_logits + b * C + c + o_c, m_c)
    p_image = p_x + b * multiple(stride_b, VECTOR)
    x = tl.load(_pointers(p_image, c, n, o_c, o_n, stride_c, stride_n, UNIT, VECTOR), mask=mask, other=0.0)
    x = x.to(tl.float32)
    y = x * gate[:, None]
    if RESIDUAL:
        y += x
        y = tl.where(y < 0, 0.0, y)  # lets NaN through
    _store(_pointers(p_y + b * C * N, c, n, o_c, o_n, N, C, UNIT, VECTOR), y, mask)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def gate_bwd_kernel(
    p_x,  # (B, C, N)
    p_logits,  # (B, C)
    p_dy,  # (B, C, N)
    p_dx,  # (B, C, N), dense, in the layout of x
    p_dlogits,  # (B, splits, C), fp32
    C,
    N,
    tiles_c,
    splits,  # programs that share the pixels of an image
    stride_b,
    stride_c,
    stride_n,
    dy_stride_b,
    dy_stride_c,
    dy_stride_n,
    RESIDUAL: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    DY_UNIT: tl.constexpr,
    DY_VECTOR: tl.constexpr,
    DX: tl.constexpr,  # whether the gradient in x is wanted
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WALK: tl.constexpr,
):
    C = multiple(C, VECTOR if UNIT == "c" else (DY_VECTOR if DY_UNIT == "c" else 1))
    N = multiple(N, VECTOR if UNIT == "n" else (DY_VECTOR if DY_UNIT == "n" else 1))
    b, tile_c, split = _place(tiles_c, splits, UNIT)
    c, first, o_c, o_n = tile_c * BLOCK_C, split * WALK, tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    m_c = o_c < C - c
    gate, slope = _sigmoid(p_logits + b * C + c + o_c, m_c)
    p_image, p_grad = p_x + b * multiple(stride_b, VECTOR), p_dy + b * multiple(dy_stride_b, DY_VECTOR)
    products = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for n in range(first, tl.minimum(first + WALK, N), BLOCK_N):
        mask = m_c[:, None] & (o_n < N - n)[None, :]
        p_tile = _pointers(p_image, c, n, o_c, o_n, stride_c, stride_n, UNIT, VECTOR)
        x = tl.load(p_tile, mask=mask, other=0.0).to(tl.float32)
        p_tile = _pointers(p_grad, c, n, o_c, o_n, dy_stride_c, dy_stride_n, DY_UNIT, DY_VECTOR)
        dy = tl.load(p_tile, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL:
            dy = tl.where(x + x * gate[:, None] <= 0, 0.0, dy)  # as torch's relu has it, NaN too
        products += dy * x
        if DX:
            dx = dy * gate[:, None]
            if RESIDUAL:
                dx += dy
            _store(_pointers(p_dx + b * C * N, c, n, o_c, o_n, N, C, UNIT, VECTOR), dx, mask)
    p_sums = p_dlogits + (b * splits + split) * C + c + o_c
    tl.store(p_sums, tl.sum(products, 1) * slope, mask=m_c)


def _unit(x: Tensor) -> str:
    """The dimension of x (B, C, N) along which its elements lie side by side: "c", "n", or "" for none."""
    if x.shape[1] > 1 and x.stride(1) == 1:
        return "c"
    return "n" if x.shape[2] == 1 or x.stride(2) == 1 else ""


def _vector(x: Tensor, unit: str) -> int:
    """Elements of 16 bytes where every row of x begins and ends at a multiple of 16 bytes, else 1."""
    if not unit:
        return 1
    elements, row = 16 // x.element_size(), "bcn".index(unit)
    strides = [x.stride(dim) for dim in range(3) if dim != row and x.shape[dim] > 1]
    return elements if all(size % elements == 0 for size in (x.shape[row], *strides)) and x.data_ptr() % 16 == 0 else 1


def _tiles(itemsize: int, unit: str, vector: int, backward: bool) -> tuple[int, int]:
    """Channels and pixels of a tile. Not timed.

    A row of 64 elements is one or two cache lines, and 7 x 7 or 14 x 14 pixels fill three quarters of theirs. With 4 warps a thread
    has four loads of 16 bytes in flight, in backward two of x and two of dy. A dy that lies across x is read by 64 bytes. Unaligned
    half precision gets the tiles of fp32: with its own, backward takes all 255 registers. B, C and N would each be compiled for.
    """
    rows = (64 if backward else 128) // (itemsize if vector > 1 else 4)
    return (64, rows) if unit == "c" else (rows, 64)


def _empty_as(x: Tensor) -> Tensor:
    """Room for x (B, C, N), dense, in its layout."""
    B, C, N = x.shape
    return x.new_empty((B, N, C)).transpose(1, 2) if _unit(x) == "c" else x.new_empty((B, C, N))


def _empty_rows(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def gate_bytes(B: int, C: int, N: int, itemsize: int) -> tuple[int, int]:
    """Bytes that forward and backward move, with logits of the same itemsize and x read where it lies.

    Args:
        B: images.
        C: channels.
        N: pixels of an image.
        itemsize: bytes of an element of x.

    Returns:
        Bytes of forward (x, y, logits) and of backward (x, dy, dx, logits, the partial sums written and read, dlogits).
    """
    x, logits, partial = B * C * N * itemsize, B * C * itemsize, B * ceil_div(N, WALK) * C * 4
    return 2 * x + logits, 3 * x + 2 * logits + 2 * partial


def _launch(x: Tensor, backward: bool) -> tuple[Tensor, int, dict[str, Any]]:
    """X, copied where no stride is 1; programs along the channels; and the constants of a launch."""
    unit = _unit(x)
    if not unit:
        x, unit = x.contiguous(), "n"
    vector = _vector(x, unit)
    block_c, block_n = _tiles(x.element_size(), unit, vector, backward)
    constants = {"UNIT": unit, "VECTOR": vector, "BLOCK_C": block_c, "BLOCK_N": block_n}
    constants |= {"num_warps": 4, "enable_fp_fusion": True}  # which Triton 3.10 would turn over
    return x, ceil_div(x.shape[1], block_c), constants


# Bytes: x and the logits read, y written; see gate_bytes.
def _forward(x: Tensor, logits: Tensor, residual: bool) -> Tensor:
    B, C, N = x.shape
    y = _empty_as(x)
    if x.numel() == 0:
        return y
    with torch.cuda.device_of(x):
        x, tiles_c, constants = _launch(x, backward=False)
        tiles_n = ceil_div(N, constants["BLOCK_N"])
        gate_fwd_kernel[(B * tiles_c * tiles_n,)](
            x, logits.contiguous(), y, C, N, tiles_c, tiles_n, *x.stride(), RESIDUAL=residual, **constants
        )
    return y


# Bytes: x, dy and the logits read, dx and B * ceil(N / WALK) * C fp32 sums written, which torch then adds; see gate_bytes.
def _backward(dy: Tensor, x: Tensor, logits: Tensor, residual: bool, x_wanted: bool) -> tuple[Tensor, Tensor]:
    B, C, N = x.shape
    dx = _empty_as(x) if x_wanted else x.new_empty(0)
    if x.numel() == 0:
        return dx, _empty_rows(logits).zero_()
    splits, unit = ceil_div(N, WALK), _unit(dy)
    with torch.cuda.device_of(x):
        x, tiles_c, constants = _launch(x, backward=True)
        constants |= {"DY_UNIT": unit, "DY_VECTOR": _vector(dy, unit), "RESIDUAL": residual, "DX": x_wanted}
        sums = x.new_empty((B, splits, C), dtype=torch.float32)
        strides = (*x.stride(), *dy.stride())
        gate_bwd_kernel[(B * tiles_c * splits,)](
            x, logits.contiguous(), dy, dx, sums, C, N, tiles_c, splits, *strides, WALK=WALK, **constants
        )
    return dx, (sums.squeeze(1) if splits == 1 else sums.sum(1)).to(logits.dtype)


# The PyTorch path, laid out as the kernels' results are


def plain_forward(x: Tensor, logits: Tensor, residual: bool) -> Tensor:
    gated = x * logits.sigmoid().to(x.dtype).unsqueeze(2)
    y = (x + gated).relu() if residual else gated
    wanted = _empty_as(x)
    return y if y.stride() == wanted.stride() else wanted.copy_(y)


def plain_backward(dy: Tensor, x: Tensor, logits: Tensor, residual: bool, x_wanted: bool) -> tuple[Tensor, Tensor]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).unsqueeze(2)
    gate = wide.sigmoid().to(x.dtype)
    if residual:
        dy = torch.where(x + x * gate <= 0, 0, dy)
    slope = wide.sigmoid() * (-wide).sigmoid()
    dlogits = (dy * x).sum(2, dtype=wide.dtype) * slope.squeeze(2)
    dx = _empty_as(x) if x_wanted else x.new_empty(0)
    if x_wanted:
        dx.copy_(torch.addcmul(dy, dy, gate) if residual else dy * gate)
    return dx, dlogits.to(logits.dtype)


# How the kernels prove themselves


def _constants(x: Tensor, logits: Tensor, residual: bool, backward: bool = False) -> Constants | None:
    """Everything that forward is compiled for, and all of backward but for dy."""
    if not x.numel():
        return None
    named = {"x": proof.dtype_name(x), "logits": proof.dtype_name(logits), "residual": residual}
    return named | _launch(x, backward)[2]


def _dy_constants(dy: Tensor) -> Constants:
    return {"dy_unit": _unit(dy), "dy_vector": _vector(dy, _unit(dy))}


def _backward_constants(dy: Tensor, x: Tensor, logits: Tensor, residual: bool, x_wanted: bool) -> Constants | None:
    constants = _constants(x, logits, residual, backward=True)
    return constants and constants | _dy_constants(dy) | {"x_wanted": x_wanted}


def _incoming(x: Tensor, constants: Constants) -> Tensor | None:
    """Room for a gradient of y."""
    (B, C, N), unit = x.shape, constants["dy_unit"]
    if not unit:
        return x.new_empty(B, C, N, 2)[..., 0]
    room = proof.placed(B, C, range(N, N + 1), unit == "c", x.dtype, x.device)
    return next((dy for dy in room if _dy_constants(dy).items() <= constants.items()), None)


def _problem(constants: Constants, device: torch.device) -> Arguments | None:
    """Three images of some tiles of channels and runs of WALK pixels; logits from -9 to 9; zeros, where relu has its kink."""
    draw, N, backward = proof.drawing(device), 2 * WALK + int(constants["BLOCK_N"]), "x_wanted" in constants
    dtypes, residual = [getattr(torch, str(constants[name])) for name in ("x", "logits")], bool(constants["residual"])
    for ragged in (9, 10, 12, 16):
        C = 2 * int(constants["BLOCK_C"]) + ragged
        logits = (3 * torch.randn(3, C, **draw)).to(dtypes[1])
        for x in proof.placed(3, C, range(N + 1, N + 17), constants["UNIT"] == "c", dtypes[0], device):
            if not (_constants(x, logits, residual, backward) or {}).items() <= constants.items():
                continue
            if backward and (dy := _incoming(x, constants)) is None:
                continue
            proof.fill(x, lambda shape: torch.randn(shape, **draw) * (torch.rand(shape, **draw) < 0.9))
            if not backward:
                return x, logits, residual
            proof.fill(dy, lambda shape: torch.randn(shape, **draw))
            return dy, x, logits, residual, bool(constants["x_wanted"])
    return None


def _over(got: Tensor, wanted: Tensor, terms: Tensor) -> float:
    """Error over tolerance: 2 units of the result's own dtype, and 16 of fp32 of the sum of its absolute terms."""
    fp32 = torch.finfo(torch.float32)
    tolerance = 2 * torch.finfo(got.dtype).eps * wanted.abs() + 16 * fp32.eps * terms + fp32.tiny
    return float(((got.double() - wanted).abs() / tolerance).nan_to_num(float("inf")).max())


def _excess(arguments: Arguments, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    return {"y": _over(results[0], exact[0], 2 * arguments[0].double().abs())}


def _backward_excess(arguments: Arguments, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    dy, x, logits = (tensor.double() for tensor in arguments[:3])
    slope = logits.sigmoid() * (-logits).sigmoid()
    over = {"dlogits": _over(results[1], exact[1], (dy * x).abs().sum(2) * slope)}
    return over | ({"dx": _over(results[0], exact[0], 2 * dy.abs())} if arguments[-1] else {})


def _key(x: Tensor, logits: Tensor, *flags: bool) -> tuple[Any, ...]:
    return *place(x), logits.dtype, *flags


def _backward_key(dy: Tensor, x: Tensor, logits: Tensor, *flags: bool) -> tuple[Any, ...]:
    return *place(dy), *place(x), logits.dtype, *flags


FORWARD = Operator("gate", _forward, plain_forward, _constants, _problem, _excess, _key)
BACKWARD = Operator(
    "gate_backward", _backward, plain_backward, _backward_constants, _problem, _backward_excess, _backward_key
)


# The registered operators


@torch.library.custom_op("ctxenc::gate", mutates_args=(), device_types=DEVICES)
def _gate_op(x: Tensor, logits: Tensor, residual: bool, strict: bool = False) -> Tensor:
    return FORWARD(strict, x, logits, residual)


@_gate_op.register_fake
def _(x: Tensor, logits: Tensor, residual: bool, strict: bool = False) -> Tensor:
    return _empty_as(x)


@torch.library.custom_op("ctxenc::gate_backward", mutates_args=(), device_types=DEVICES)
def _gate_backward_op(
    dy: Tensor, x: Tensor, logits: Tensor, residual: bool, x_wanted: bool, strict: bool = False
) -> tuple[Tensor, Tensor]:
    return BACKWARD(strict, dy, x, logits, residual, x_wanted)


@_gate_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, logits: Tensor, residual: bool, x_wanted: bool, strict: bool = False
) -> tuple[Tensor, Tensor]:
    return _empty_as(x) if x_wanted else x.new_empty(0), _empty_rows(logits)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.flags = inputs[2:]


def _gradients(
    ctx: Any, dy: Tensor, backward: Callable[..., tuple[Tensor, Tensor]] = _gate_backward_op
) -> tuple[Any, ...]:
    x, logits = ctx.saved_tensors
    residual, strict = ctx.flags
    if takes_formula(dy):

        def plainly(x: Tensor, logits: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                return plain_forward(x, logits, residual)

        return *differentiable(plainly, (x, logits), dy), None, None
    x_wanted = ctx.needs_input_grad[0]
    dx, dlogits = backward(dy, x, logits, residual, x_wanted, strict)
    return dx if x_wanted else None, dlogits, None, None


_gate_op.register_autograd(_gradients, setup_context=_save)


class _Gate(torch.autograd.Function):
    """The same without the dispatcher, for eager mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor, residual: bool, strict: bool) -> Tensor:
        _save(ctx, (x, logits, residual, strict), x)
        return FORWARD(strict, x, logits, residual)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _gradients(ctx, dy, lambda *arguments: BACKWARD(arguments[-1], *arguments[:-1]))


def gate(x: Tensor, logits: Tensor, residual: bool = False, strict: bool = False) -> Tensor:
    """X * sigmoid(logits), or relu(x + x * sigmoid(logits)), of x (B, C, N) and logits (B, C): (B, C, N), dense, in x's layout.

    fp32, fp16 and bf16 on a GPU, any strides: x is read where it lies if the stride of C or N is 1, copied otherwise.
    strict: raise RuntimeError where no kernel has proved itself, instead of taking the PyTorch path.
    """
    if is_watched():
        return _gate_op(x, logits, residual, strict)
    if (x.requires_grad or logits.requires_grad) and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return _Gate.apply(x, logits, residual, strict)
    return FORWARD(strict, x, logits, residual)
