"""The fused gate: y = x * sigmoid(logits), or EncNet's y = relu(x + x * sigmoid(logits)), forward and backward as Triton kernels.

Forward reads x and writes y, once each. Backward reads x and dy and writes dx, once each, and sums dy * x over the pixels on its
way; where programs share the pixels of a channel, a last launch adds their sums in a fixed order. No atomics: the same bits come
out of every run. The cut depends on sizes alone, so that another GPU adds in the same order. Arithmetic is fp32.

An image is one run of C * N elements. Channels first, a row of N pixels is read by the chunks of 16 bytes that touch it, for 7 x 7
or 14 x 14 pixels of half precision are no multiple of them. A chunk is written with the row that it begins in.

The first form is that of Squeeze-and-Excitation (arXiv 1709.01507), the second that of EncNet (arXiv 1803.08904), section 3.1.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctxenc.kernels.backends import is_watched
from ctxenc.kernels.fused import proof
from ctxenc.kernels.fused.encode import DEVICES, differentiable, takes_formula
from ctxenc.kernels.fused.steps import multiple, store_rounded
from ctxenc.kernels.fused.tiles import ceil_div, is_channels_last
from ctxenc.kernels.verdicts import Arguments, Constants, Operator, place

# One binary for all sizes: how x and dy are aligned is in the explicit constexpr VECTOR.
SIZES = ["p_x", "p_logits", "p_dy", "B", "C", "N", "tiles_c", "tiles_n", "splits", "steps", "stride_b", "dy_stride_b"]

WALK, PROGRAMS = 256, 512  # programs of backward share an image from 256 pixels each on, until there are 512 of them


@triton.jit
def _place(tiles_c, tiles_n, LAST: tl.constexpr):
    """Image, int64, tile of channels and tile of pixels of this program: neighbours lie side by side in memory."""
    pid = tl.program_id(0)
    if LAST:
        return (pid // tiles_c // tiles_n).to(tl.int64), pid % tiles_c, pid // tiles_c % tiles_n
    else:
        return (pid // tiles_n // tiles_c).to(tl.int64), pid // tiles_n % tiles_c, pid % tiles_n


@triton.jit
def _at(p_x, offset, VECTOR: tl.constexpr):
    """Address of an element. It is a multiple of VECTOR elements, and the compiler sees that, as it does not on arguments."""
    return tl.multiple_of(p_x + offset, VECTOR * p_x.dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def _sigmoid(p_logits, mask):
    """Sigmoid of some logits and its derivative, neither of which overflows or cancels."""
    logits = tl.load(p_logits, mask=mask, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(logits))
    return tl.where(logits >= 0, 1.0, e) / (1 + e), e / ((1 + e) * (1 + e))


@triton.jit
def _tile(c, o_n, C, N, LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Channels c (BLOCK_C,) and pixels o_n (BLOCK_N,) of an image.

    Returns offsets, and masks: to read, to write, of the channel's own row, and of all before the next row.
    """
    m_c = (c < C)[:, None]
    if LAST:
        mask = m_c & (o_n < N)[None, :]
        return o_n.to(tl.int64)[None, :] * C + c[:, None], mask, mask, mask, mask
    else:
        row, o_n = c.to(tl.int64) * N, o_n[None, :]
        before = (row % VECTOR).to(tl.int32)[:, None]  # elements of the first chunk that are of the row before
        end = before + N
        read = m_c & (o_n < multiple(end + VECTOR - 1, VECTOR))
        written = read & (o_n >= multiple(before + VECTOR - 1, VECTOR))
        return multiple(row, VECTOR)[:, None] + o_n, read, written, (o_n >= before) & (o_n < end), o_n < end


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def gate_fwd_kernel(
    p_x,  # (B, C, N), or (B, N, C) where LAST; an image is one run
    p_logits,  # (B, C)
    p_y,  # as x, dense
    C, N, tiles_c, tiles_n, stride_b,
    RESIDUAL: tl.constexpr,  # EncNet's form
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that addresses are multiples of, and C where LAST, C * N elsewhere
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if LAST:
        C = multiple(C, VECTOR)
    b, tile_c, tile_n = _place(tiles_c, tiles_n, LAST)
    c, o_n = tile_c * BLOCK_C + tl.arange(0, BLOCK_C), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o, _, written, _, own = _tile(c, o_n, C, N, LAST, VECTOR)
    gate, _ = _sigmoid(p_logits + b * C + c, c < C)
    gate = gate[:, None]
    if not LAST and VECTOR > 1:
        next_gate, _ = _sigmoid(p_logits + b * C + c + 1, c + 1 < C)
        gate = tl.where(own, gate, next_gate[:, None])
    x = tl.load(_at(p_x, b * stride_b, VECTOR) + o, mask=written, other=0.0).to(tl.float32)
    y = x * gate
    if RESIDUAL:
        y += x
        y = tl.where(y < 0, 0.0, y)  # lets NaN through
    store_rounded(_at(p_y, b * C * N, VECTOR) + o, y, written)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def gate_bwd_kernel(
    p_x,  # (B, C, N), or (B, N, C) where LAST; an image is one run
    p_logits,  # (B, C)
    p_dy,  # as x
    p_dx,  # as x, dense
    p_dlogits,  # (B, splits, C)
    C, N, tiles_c,
    splits,  # programs that share the pixels of an image
    steps,  # tiles of each
    stride_b, dy_stride_b,
    RESIDUAL: tl.constexpr,
    DX: tl.constexpr,  # whether the gradient in x is wanted
    LAST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if LAST:
        C = multiple(C, VECTOR)
    b, tile_c, split = _place(tiles_c, splits, LAST)
    c, first = tile_c * BLOCK_C + tl.arange(0, BLOCK_C), split * steps
    p_x, p_dy = _at(p_x, b * stride_b, VECTOR), _at(p_dy, b * dy_stride_b, VECTOR)
    p_dx, p_logits = _at(p_dx, b * C * N, VECTOR), p_logits + b * C + c
    own_gate, slope = _sigmoid(p_logits, c < C)
    next_gate, _ = _sigmoid(p_logits + 1, c + 1 < C)
    sums = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for step in range(first, first + steps):
        o, read, written, in_row, own = _tile(c, step * BLOCK_N + tl.arange(0, BLOCK_N), C, N, LAST, VECTOR)
        x = tl.load(p_x + o, mask=read, other=0.0).to(tl.float32)
        dy = tl.load(p_dy + o, mask=read, other=0.0).to(tl.float32)
        gate = own_gate[:, None]
        if not LAST and VECTOR > 1:
            gate = tl.where(own, gate, next_gate[:, None])
        if RESIDUAL:
            dy = tl.where(x + x * gate <= 0, 0.0, dy)  # as torch's relu has it, NaN too
        sums += tl.where(in_row, dy * x, 0.0)
        if DX:
            dx = dy * gate
            if RESIDUAL:
                dx += dy
            store_rounded(p_dx + o, dx, written)
    store_rounded(p_dlogits + (b * splits + split) * C + c, tl.sum(sums, 1) * slope, c < C)


@triton.jit(do_not_specialize=SIZES)
def add_splits_kernel(p_sums, p_total, B, C, splits, BLOCK: tl.constexpr):
    """Add fp32 sums (B, splits, C) up over the splits: (B, C)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p_sums, total = p_sums + (i // C).to(tl.int64) * splits * C + i % C, tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        total += tl.load(p_sums + split * C, mask=i < B * C, other=0.0)
    store_rounded(p_total + i, total, i < B * C)


def _as_runs(x: Tensor, last: bool) -> Tensor:
    """X (B, C, N) in the layout that is asked for, copied unless each image is one run."""
    _, C, N = x.shape
    if last:
        return x if x.stride()[1:] == (1, C) else x.transpose(1, 2).contiguous().transpose(1, 2)
    return x if x.stride()[1:] == (N, 1) else x.contiguous()


def _empty_as(x: Tensor) -> Tensor:
    """Room for x (B, C, N), dense, in its layout."""
    B, C, N = x.shape
    return x.new_empty((B, N, C)).transpose(1, 2) if is_channels_last(x) else x.new_empty((B, C, N))


def _empty_rows(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _tiles(itemsize: int, last: bool, vector: int, backward: bool) -> tuple[int, int]:
    """Channels and pixels of a tile. Not timed.

    A row of 64 elements is one or two cache lines, and 7 x 7 or 14 x 14 pixels fill three quarters of theirs. With 4 warps a thread
    has four loads of 16 bytes in flight, in backward two of x and two of dy. Unaligned half precision gets the tiles of fp32: with
    its own, a thread takes 154 registers. B, C and N would each be compiled for.
    """
    rows = (64 if backward else 128) // (itemsize if vector > 1 else 4)
    return (64, rows) if last else (rows, 64)


def _plan(x: Tensor, *others: Tensor, last: bool) -> tuple[int, int, dict[str, Any]]:
    """Tiles along the channels and along the pixels, and the constants of a launch on x, in backward also dy."""
    (_, C, N), itemsize = x.shape, x.element_size()
    vector = 16 // itemsize
    aligned = all(y.data_ptr() % 16 == 0 and (len(y) == 1 or y.stride(0) % vector == 0) for y in (x, *others))
    if not aligned or (C if last else C * N) % vector or (vector > N and not last):
        vector = 1
    block_c, block_n = _tiles(itemsize, last, vector, bool(others))
    constants = {"LAST": last, "VECTOR": vector, "BLOCK_C": block_c, "BLOCK_N": block_n}
    constants |= {"num_warps": 4, "enable_fp_fusion": True}  # which Triton 3.10 would turn over
    # The longest row with what is before and behind it in its chunks.
    pixels = N if last else ceil_div(N + vector - math.gcd(N, vector), vector) * vector
    return ceil_div(C, block_c), ceil_div(pixels, block_n), constants


def _cut(programs: int, tiles_n: int, block_n: int) -> tuple[int, int]:
    """Of backward: programs that share the pixels of an image, and tiles of each."""
    splits = max(1, min(ceil_div(tiles_n * block_n, WALK), PROGRAMS // programs))
    steps = ceil_div(tiles_n, splits)
    return ceil_div(tiles_n, steps), steps


# Bytes: x and the logits read, y written; see benchmarks/bytes.py.
def _forward(x: Tensor, logits: Tensor, residual: bool) -> Tensor:
    B, C, N = x.shape
    y, last = _empty_as(x), is_channels_last(x)
    if x.numel() == 0:
        return y
    with torch.cuda.device_of(x):
        x = _as_runs(x, last)
        tiles_c, tiles_n, constants = _plan(x, last=last)
        sizes = C, N, tiles_c, tiles_n, x.stride(0)
        gate_fwd_kernel[(B * tiles_c * tiles_n,)](x, logits.contiguous(), y, *sizes, RESIDUAL=residual, **constants)
    return y


# Bytes: x, dy and the logits read, dx and the sums written, which are added up where there are several; see benchmarks/bytes.py.
def _backward(dy: Tensor, x: Tensor, logits: Tensor, residual: bool, x_wanted: bool) -> tuple[Tensor, Tensor]:
    B, C, N = x.shape
    dx, dlogits, last = _empty_as(x) if x_wanted else x.new_empty(0), _empty_rows(logits), is_channels_last(x)
    if x.numel() == 0:
        return dx, dlogits.zero_()
    with torch.cuda.device_of(x):
        x, dy = _as_runs(x, last), _as_runs(dy, last)
        tiles_c, tiles_n, constants = _plan(x, dy, last=last)
        splits, steps = _cut(B * tiles_c, tiles_n, constants["BLOCK_N"])
        sums = dlogits if splits == 1 else x.new_empty((B, splits, C), dtype=torch.float32)
        sizes = C, N, tiles_c, splits, steps, x.stride(0), dy.stride(0)
        forms = {"RESIDUAL": residual, "DX": x_wanted}
        gate_bwd_kernel[(B * tiles_c * splits,)](x, logits.contiguous(), dy, dx, sums, *sizes, **forms, **constants)
        if splits > 1:
            add_splits_kernel[(ceil_div(B * C, 256),)](sums, dlogits, B, C, splits, BLOCK=256, enable_fp_fusion=True)
    return dx, dlogits


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


def _constants(x: Tensor, logits: Tensor, *flags: bool, dy: Tensor | None = None) -> Constants | None:
    """Everything that a kernel is compiled for; the flags are residual and, for backward, x_wanted."""
    if not x.numel():
        return None
    last = is_channels_last(x)
    named = {"x": proof.name_of(x.dtype), "logits": proof.name_of(logits.dtype), "residual": flags[0]}
    if dy is not None:
        named["x_wanted"] = flags[1]
    runs = [_as_runs(tensor, last) for tensor in ((x,) if dy is None else (x, dy))]
    return named | _plan(*runs, last=last)[2]


def _backward_constants(dy: Tensor, x: Tensor, logits: Tensor, *flags: bool) -> Constants | None:
    return _constants(x, logits, *flags, dy=dy)


def _problems(constants: Constants, device: torch.device) -> list[Arguments]:
    """Three images of some tiles of channels and runs of WALK pixels, and of fewer, which no programs share.

    Logits from -9 to 9; zeros, where relu has its kink.
    """
    found = [_problem(constants, device, N) for N in (2 * WALK + int(constants["BLOCK_N"]), int(constants["BLOCK_N"]))]
    return [problem for problem in found if problem is not None]


def _problem(constants: Constants, device: torch.device, N: int) -> Arguments | None:
    draw, backward = proof.drawing(device), "x_wanted" in constants
    flags = [constants[name] for name in ("residual", "x_wanted") if name in constants]
    dtypes = [getattr(torch, str(constants[name])) for name in ("x", "logits")]
    for ragged in (9, 10, 12, 16):
        C = 2 * int(constants["BLOCK_C"]) + ragged
        logits = (3 * torch.randn(3, C, **draw)).to(dtypes[1])
        for x in proof.placed(3, C, range(N + 1, N + 17), bool(constants["LAST"]), dtypes[0], device):
            dy = torch.empty_like(x) if backward else None
            if _constants(x, logits, *flags, dy=dy) != constants:
                continue
            proof.fill(x, lambda shape: torch.randn(shape, **draw) * (torch.rand(shape, **draw) < 0.9))
            return (x, logits, *flags) if dy is None else (dy.copy_(torch.randn(x.shape, **draw)), x, logits, *flags)
    return None


def _over(got: Tensor, wanted: Tensor, terms: Tensor) -> float:
    """Error over tolerance: 2 eps of the result's dtype, 16 of fp32 of the sum of its absolute terms, and a subnormal step."""
    own = torch.finfo(got.dtype)
    tolerance = own.eps * (2 * wanted.abs() + own.smallest_normal) + 16 * torch.finfo(torch.float32).eps * terms
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


FORWARD = Operator("gate", _forward, plain_forward, _constants, _problems, _excess, _key)
BACKWARD = Operator(
    "gate_backward", _backward, plain_backward, _backward_constants, _problems, _backward_excess, _backward_key
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


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, logits = ctx.saved_tensors
    residual, strict = ctx.flags
    if takes_formula(dy):

        def plainly(x: Tensor, logits: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                return plain_forward(x, logits, residual)

        return *differentiable(plainly, (x, logits), dy), None, None
    x_wanted = ctx.needs_input_grad[0]
    arguments = dy, x, logits, residual, x_wanted
    dx, dlogits = _gate_backward_op(*arguments, strict) if is_watched() else BACKWARD(strict, *arguments)
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
        return _gradients(ctx, dy)


def gate(x: Tensor, logits: Tensor, residual: bool = False, strict: bool = False) -> Tensor:
    """X * sigmoid(logits), or relu(x + x * sigmoid(logits)), of x (B, C, N) and logits (B, C): (B, C, N), dense, in x's layout.

    fp32, fp16 and bf16 on a GPU, any strides: x is read where it lies if each image is dense, copied otherwise.
    strict: raise RuntimeError where no kernel has proved itself, instead of taking the PyTorch path.
    """
    if is_watched():
        return _gate_op(x, logits, residual, strict)
    if (x.requires_grad or logits.requires_grad) and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return _Gate.apply(x, logits, residual, strict)
    return FORWARD(strict, x, logits, residual)
