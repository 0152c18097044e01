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

from ctxenc.kernels.fused.operands import _INTERPRETED, INTERPRETED, drop_bits
from ctxenc.kernels.fused.tiles import ceil_div, is_channels_last
from ctxenc.kernels.fused.walk import multiple

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
    """Address of an element, a multiple of VECTOR elements in a form that the compiler sees; multiple_of is lost on arguments."""
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

    Returns offsets, what to read, what to write, and which elements lie in the channel's row, in the next row otherwise or before.
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


@triton.jit
def store_rounded(pointers, value, mask):
    """Store the fp32 value, rounded to the dtype of the pointers."""
    dtype = pointers.dtype.element_ty
    if _INTERPRETED and dtype == tl.bfloat16:  # which the interpreter cuts
        value = drop_bits(value, 16)
    tl.store(pointers, value.to(dtype), mask=mask)


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


_DEVICES = ("cuda", "cpu") if INTERPRETED else "cuda"


@torch.library.custom_op("ctxenc::gate", mutates_args=(), device_types=_DEVICES)
def _gate_op(x: Tensor, logits: Tensor, residual: bool) -> Tensor:
    return _forward(x, logits, residual)


@_gate_op.register_fake
def _(x: Tensor, logits: Tensor, residual: bool) -> Tensor:
    return _empty_as(x)


@torch.library.custom_op("ctxenc::gate_backward", mutates_args=(), device_types=_DEVICES)
def _gate_backward_op(dy: Tensor, x: Tensor, logits: Tensor, residual: bool, x_wanted: bool) -> tuple[Tensor, Tensor]:
    return _backward(dy, x, logits, residual, x_wanted)


@_gate_backward_op.register_fake
def _(dy: Tensor, x: Tensor, logits: Tensor, residual: bool, x_wanted: bool) -> tuple[Tensor, Tensor]:
    return _empty_as(x) if x_wanted else x.new_empty(0), _empty_rows(logits)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.residual = inputs[2]


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None]:
    x_wanted = ctx.needs_input_grad[0]
    dx, dlogits = _gate_backward_op(dy, *ctx.saved_tensors, ctx.residual, x_wanted)
    return dx if x_wanted else None, dlogits, None


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError('gate: the Triton path has no second derivatives; take ctxenc.use_backend("torch")')


_gate_op.register_autograd(_gradients, setup_context=_save)
_gate_backward_op.register_autograd(_no_second_derivative)


def gate(x: Tensor, logits: Tensor, residual: bool = False) -> Tensor:
    """X * sigmoid(logits), or relu(x + x * sigmoid(logits)), of x (B, C, N) and logits (B, C): (B, C, N), dense, in x's layout.

    fp32, fp16 and bf16 on a GPU, any strides: x is read where it lies if each image is dense, copied otherwise.
    """
    return _gate_op(x, logits, residual)
