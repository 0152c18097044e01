"""Define the fused gate: y = x * sigmoid(logits), or EncNet's y = relu(x + x * sigmoid(logits)), forward and backward in Triton.

Forward reads x and writes y, once each. Backward reads x and dy and writes dx, once each, and sums dy * x over the pixels. If
several programs share the pixels of a channel, a last launch adds their sums in a fixed order. There are no atomics, so every run
gives the same bits. The cut depends on sizes alone, so every GPU adds in the same order. Arithmetic is fp32.

An image is one run of C * N elements, read in chunks of 16 bytes. Channels first, a channel's row of N pixels may begin and end
inside a chunk, as with 7 x 7 or 14 x 14 pixels in half precision. A row reads every chunk that it touches, and writes the
chunks that begin in it.

The first form is Squeeze-and-Excitation (arXiv 1709.01507), the second EncNet (arXiv 1803.08904), section 3.1.
"""

import math
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctxenc.kernels.backends import is_watched
from ctxenc.kernels.fused import proof
from ctxenc.kernels.fused.encode import DEVICES, differentiate, differentiate_again, needs_torch_ops
from ctxenc.kernels.fused.launch import allocate_like
from ctxenc.kernels.fused.steps import assume_multiple, store_rounded
from ctxenc.kernels.fused.tiles import ceil_div, is_channels_last
from ctxenc.kernels.verdicts import Arguments, Constants, Operator, describe_placement

# One binary for all sizes: the explicit constexpr VECTOR gives the alignment of x and dy.
SIZES = ["p_x", "p_logits", "p_dy", "B", "C", "N", "tiles_c", "tiles_n", "splits", "steps", "stride_b", "dy_stride_b"]

WALK, PROGRAMS = 256, 512  # backward splits an image into programs of at least 256 pixels, until there are 512 programs


@triton.jit
def _locate_program(tiles_c, tiles_n, LAST: tl.constexpr):
    """Return image (int64), channel tile and pixel tile of this program: neighbours are adjacent in memory."""
    pid = tl.program_id(0)
    if LAST:
        return (pid // tiles_c // tiles_n).to(tl.int64), pid % tiles_c, pid // tiles_c % tiles_n
    else:
        return (pid // tiles_n // tiles_c).to(tl.int64), pid // tiles_n % tiles_c, pid % tiles_n


@triton.jit
def _locate(p_x, offset, VECTOR: tl.constexpr):
    """Return the address of an element, shown to the compiler as a multiple of VECTOR; arguments cannot show it."""
    return tl.multiple_of(p_x + offset, VECTOR * p_x.dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def _sigmoid(p_logits, mask):
    """Return the sigmoid of logits and its derivative, without overflow or cancellation."""
    logits = tl.load(p_logits, mask=mask, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(logits))
    return tl.where(logits >= 0, 1.0, e) / (1 + e), e / ((1 + e) * (1 + e))


@triton.jit
def _address_tile(c, o_n, C, N, LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Address channels c (BLOCK_C,) and pixels o_n (BLOCK_N,) of an image.

    Returns offsets, and masks: to read, to write, of the channel's own row, and of everything before the next row.
    """
    m_c = (c < C)[:, None]
    if LAST:
        mask = m_c & (o_n < N)[None, :]
        return o_n.to(tl.int64)[None, :] * C + c[:, None], mask, mask, mask, mask
    else:
        row, o_n = c.to(tl.int64) * N, o_n[None, :]
        before = (row % VECTOR).to(tl.int32)[:, None]  # elements of the first chunk in the previous row
        end = before + N
        read = m_c & (o_n < assume_multiple(end + VECTOR - 1, VECTOR))
        written = read & (o_n >= assume_multiple(before + VECTOR - 1, VECTOR))
        return assume_multiple(row, VECTOR)[:, None] + o_n, read, written, (o_n >= before) & (o_n < end), o_n < end


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def gate_fwd_kernel(
    p_x,  # (B, C, N), or (B, N, C) if LAST; an image is one run
    p_logits,  # (B, C)
    p_y,  # as x, dense
    C, N, tiles_c, tiles_n, stride_b,
    RESIDUAL: tl.constexpr,  # EncNet's form
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,  # divides addresses, and C if LAST, else C * N (in elements)
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if LAST:
        C = assume_multiple(C, VECTOR)
    b, tile_c, tile_n = _locate_program(tiles_c, tiles_n, LAST)
    c, o_n = tile_c * BLOCK_C + tl.arange(0, BLOCK_C), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o, _, written, _, own = _address_tile(c, o_n, C, N, LAST, VECTOR)
    gate, _ = _sigmoid(p_logits + b * C + c, c < C)
    gate = gate[:, None]
    if not LAST and VECTOR > 1:
        next_gate, _ = _sigmoid(p_logits + b * C + c + 1, c + 1 < C)
        gate = tl.where(own, gate, next_gate[:, None])
    x = tl.load(_locate(p_x, b * stride_b, VECTOR) + o, mask=written, other=0.0).to(tl.float32)
    y = x * gate
    if RESIDUAL:
        y += x
        y = tl.where(y < 0, 0.0, y)  # lets NaN through
    store_rounded(_locate(p_y, b * C * N, VECTOR) + o, y, written)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def gate_bwd_kernel(
    p_x,  # (B, C, N), or (B, N, C) if LAST; an image is one run
    p_logits,  # (B, C)
    p_dy,  # as x
    p_dx,  # as x, dense
    p_dlogits,  # (B, splits, C)
    C, N, tiles_c,
    splits,  # programs per image
    steps,  # tiles per program
    stride_b, dy_stride_b, RESIDUAL: tl.constexpr,
    DX: tl.constexpr,  # compute the gradient in x
    LAST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if LAST:
        C = assume_multiple(C, VECTOR)
    b, tile_c, split = _locate_program(tiles_c, splits, LAST)
    c, first = tile_c * BLOCK_C + tl.arange(0, BLOCK_C), split * steps
    p_x, p_dy = _locate(p_x, b * stride_b, VECTOR), _locate(p_dy, b * dy_stride_b, VECTOR)
    p_dx, p_logits = _locate(p_dx, b * C * N, VECTOR), p_logits + b * C + c
    own_gate, slope = _sigmoid(p_logits, c < C)
    next_gate, _ = _sigmoid(p_logits + 1, c + 1 < C)
    sums = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for step in range(first, first + steps):
        o, read, written, in_row, own = _address_tile(c, step * BLOCK_N + tl.arange(0, BLOCK_N), C, N, LAST, VECTOR)
        x = tl.load(p_x + o, mask=read, other=0.0).to(tl.float32)
        dy = tl.load(p_dy + o, mask=read, other=0.0).to(tl.float32)
        gate = own_gate[:, None]
        if not LAST and VECTOR > 1:
            gate = tl.where(own, gate, next_gate[:, None])
        if RESIDUAL:
            dy = tl.where(x + x * gate <= 0, 0.0, dy)  # as torch's relu does, for NaN too
        sums += tl.where(in_row, dy * x, 0.0)
        if DX:
            dx = dy * gate
            if RESIDUAL:
                dx += dy
            store_rounded(p_dx + o, dx, written)
    store_rounded(p_dlogits + (b * splits + split) * C + c, tl.sum(sums, 1) * slope, c < C)


@triton.jit(do_not_specialize=SIZES)
def add_splits_kernel(p_sums, p_total, B, C, splits, BLOCK: tl.constexpr):
    """Add fp32 sums (B, splits, C) over the splits: (B, C)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p_sums, total = p_sums + (i // C).to(tl.int64) * splits * C + i % C, tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        total += tl.load(p_sums + split * C, mask=i < B * C, other=0.0)
    store_rounded(p_total + i, total, i < B * C)


def _copy_to_runs(x: Tensor, last: bool) -> Tensor:
    """Return x (B, C, N) in the requested layout, copied unless each image is one run."""
    _, C, N = x.shape
    if last:
        return x if x.stride()[1:] == (1, C) else x.transpose(1, 2).contiguous().transpose(1, 2)
    return x if x.stride()[1:] == (N, 1) else x.contiguous()


def _allocate_rows(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _choose_tile(itemsize: int, last: bool, vector: int, backward: bool) -> tuple[int, int]:
    """Return the channels and pixels of a tile. Not timed.

    A row of 64 elements is one or two cache lines, and 7 x 7 or 14 x 14 pixels fill three quarters of theirs. With 4 warps a thread
    has four 16-byte loads in flight, in backward two of x and two of dy. Unaligned half precision gets the tiles of fp32: with its
    own, a thread takes 154 registers. A tile chosen by B, C and N would compile anew for each of them.
    """
    rows = (64 if backward else 128) // (itemsize if vector > 1 else 4)
    return (64, rows) if last else (rows, 64)


def _plan_launch(x: Tensor, *others: Tensor, last: bool) -> tuple[int, int, dict[str, Any]]:
    """Return the number of channel and pixel tiles, and the constants of a launch on x, in backward also on dy."""
    (_, C, N), itemsize = x.shape, x.element_size()
    vector = 16 // itemsize
    is_aligned = all(y.data_ptr() % 16 == 0 and (len(y) == 1 or y.stride(0) % vector == 0) for y in (x, *others))
    if not is_aligned or (C if last else C * N) % vector or (vector > N and not last):
        vector = 1
    block_c, block_n = _choose_tile(itemsize, last, vector, bool(others))
    constants = {"LAST": last, "VECTOR": vector, "BLOCK_C": block_c, "BLOCK_N": block_n}
    constants |= {"num_warps": 4, "enable_fp_fusion": True}  # Triton 3.10 would flip it
    # The longest row, with the rest of its first and last chunk.
    pixels = N if last else ceil_div(N + vector - math.gcd(N, vector), vector) * vector
    return ceil_div(C, block_c), ceil_div(pixels, block_n), constants


def _cut(programs: int, tiles_n: int, block_n: int) -> tuple[int, int]:
    """Cut backward: programs that share the pixels of an image, and tiles of each."""
    splits = max(1, min(ceil_div(tiles_n * block_n, WALK), PROGRAMS // programs))
    steps = ceil_div(tiles_n, splits)
    return ceil_div(tiles_n, steps), steps


# Bytes: reads x and the logits, writes y; see benchmarks/bytes.py.
def _forward(x: Tensor, logits: Tensor, residual: bool) -> Tensor:
    B, C, N = x.shape
    y, last = allocate_like(x), is_channels_last(x)
    if x.numel() == 0:
        return y
    with torch.cuda.device_of(x):
        x = _copy_to_runs(x, last)
        tiles_c, tiles_n, constants = _plan_launch(x, last=last)
        sizes = C, N, tiles_c, tiles_n, x.stride(0)
        gate_fwd_kernel[(B * tiles_c * tiles_n,)](x, logits.contiguous(), y, *sizes, RESIDUAL=residual, **constants)
    return y


# Bytes: reads x, dy and the logits, writes dx and the sums, and adds the sums up if there are several; see
# benchmarks/bytes.py.
def _backward(dy: Tensor, x: Tensor, logits: Tensor, residual: bool, x_wanted: bool) -> tuple[Tensor, Tensor]:
    B, C, N = x.shape
    dx, dlogits, last = allocate_like(x, x_wanted), _allocate_rows(logits), is_channels_last(x)
    if x.numel() == 0:
        return dx, dlogits.zero_()
    with torch.cuda.device_of(x):
        x, dy = _copy_to_runs(x, last), _copy_to_runs(dy, last)
        tiles_c, tiles_n, constants = _plan_launch(x, dy, last=last)
        splits, steps = _cut(B * tiles_c, tiles_n, constants["BLOCK_N"])
        sums = dlogits if splits == 1 else x.new_empty((B, splits, C), dtype=torch.float32)
        sizes = C, N, tiles_c, splits, steps, x.stride(0), dy.stride(0)
        forms = {"RESIDUAL": residual, "DX": x_wanted}
        gate_bwd_kernel[(B * tiles_c * splits,)](x, logits.contiguous(), dy, dx, sums, *sizes, **forms, **constants)
        if splits > 1:
            add_splits_kernel[(ceil_div(B * C, 256),)](sums, dlogits, B, C, splits, BLOCK=256, enable_fp_fusion=True)
    return dx, dlogits


# The PyTorch path, in the layout of the kernels' results


def plain_forward(x: Tensor, logits: Tensor, residual: bool) -> Tensor:
    gated = x * logits.sigmoid().to(x.dtype).unsqueeze(2)
    y = (x + gated).relu() if residual else gated
    result = allocate_like(x)
    return y if y.stride() == result.stride() else result.copy_(y)


def plain_backward(dy: Tensor, x: Tensor, logits: Tensor, residual: bool, x_wanted: bool) -> tuple[Tensor, Tensor]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).unsqueeze(2)
    gate = wide.sigmoid().to(x.dtype)
    if residual:
        dy = torch.where(x + x * gate <= 0, 0, dy)
    slope = wide.sigmoid() * (-wide).sigmoid()
    dlogits = (dy * x).sum(2, dtype=wide.dtype) * slope.squeeze(2)
    dx = allocate_like(x, x_wanted)
    if x_wanted:
        dx.copy_(torch.addcmul(dy, dy, gate) if residual else dy * gate)
    return dx, dlogits.to(logits.dtype)


# Proof of the kernels


FLAGS = ("residual", "x_wanted")


def _describe(*arguments: Any) -> Constants | None:
    """Return everything that a kernel is compiled for, from the arguments of a forward or of a backward."""
    *runs, logits = (each for each in arguments if isinstance(each, Tensor))
    x = runs[-1]
    if not x.numel():
        return None
    last = is_channels_last(x)
    dtypes = {"x": proof.name_dtype(x.dtype), "logits": proof.name_dtype(logits.dtype)}
    flags = dict(zip(FLAGS, arguments[len(runs) + 1 :], strict=False))
    return dtypes | flags | _plan_launch(*(_copy_to_runs(each, last) for each in reversed(runs)), last=last)[2]


def _make_problems(constants: Constants, device: torch.device) -> list[Arguments]:
    """Make three images of some channel tiles and WALK-pixel runs, and smaller images, which one program handles.

    Logits range from -9 to 9; x has zeros, at the kink of relu.
    """
    problems = [
        _make_problem(constants, device, N) for N in (2 * WALK + int(constants["BLOCK_N"]), int(constants["BLOCK_N"]))
    ]
    return [problem for problem in problems if problem is not None]


def _make_problem(constants: Constants, device: torch.device, N: int) -> Arguments | None:
    draw, flags = proof.seed_draws(device), [constants[name] for name in FLAGS if name in constants]
    dtypes = [getattr(torch, str(constants[name])) for name in ("x", "logits")]
    for ragged in (9, 10, 12, 16):
        C = 2 * int(constants["BLOCK_C"]) + ragged
        logits = (3 * torch.randn(3, C, **draw)).to(dtypes[1])
        for x in proof.place_tensors(3, C, range(N + 1, N + 17), bool(constants["LAST"]), dtypes[0], device):
            dy = [torch.empty_like(x)] if "x_wanted" in constants else []
            if _describe(*dy, x, logits, *flags) == constants:
                proof.fill(x, lambda shape: torch.randn(shape, **draw) * (torch.rand(shape, **draw) < 0.9))
                return (*(each.copy_(torch.randn(x.shape, **draw)) for each in dy), x, logits, *flags)
    return None


def _measure_excess(got: Tensor, wanted: Tensor, terms: Tensor) -> float:
    """Return error over tolerance: 2 eps of the result's dtype, 16 of fp32 of its sum of absolute terms, and a subnormal step."""
    limits = torch.finfo(got.dtype)
    tolerance = limits.eps * (2 * wanted.abs() + limits.smallest_normal) + 16 * torch.finfo(torch.float32).eps * terms
    return proof.find_largest((got.double() - wanted).abs() / tolerance)


def _measure_forward_excess(
    arguments: Arguments, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]
) -> dict[str, float]:
    return {"y": _measure_excess(results[0], exact[0], 2 * arguments[0].double().abs())}


def _measure_backward_excess(
    arguments: Arguments, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]
) -> dict[str, float]:
    dy, x, logits = (tensor.double() for tensor in arguments[:3])
    slope = logits.sigmoid() * (-logits).sigmoid()
    over = {"dlogits": _measure_excess(results[1], exact[1], (dy * x).abs().sum(2) * slope)}
    return over | ({"dx": _measure_excess(results[0], exact[0], 2 * dy.abs())} if arguments[-1] else {})


FORWARD = Operator(
    "gate",
    _forward,
    plain_forward,
    _describe,
    _make_problems,
    _measure_forward_excess,
    lambda x, logits, *flags: (*describe_placement(x), logits.dtype, *flags),
)
BACKWARD = Operator(
    "gate_backward",
    _backward,
    plain_backward,
    _describe,
    _make_problems,
    _measure_backward_excess,
    lambda dy, x, logits, *flags: (*describe_placement(dy), *describe_placement(x), logits.dtype, *flags),
)


# The registered operators


@torch.library.custom_op("ctxenc::gate", mutates_args=(), device_types=DEVICES)
def _gate_op(x: Tensor, logits: Tensor, residual: bool, strict: bool = False) -> Tensor:
    return FORWARD(strict, x, logits, residual)


@_gate_op.register_fake
def _(x: Tensor, logits: Tensor, residual: bool, strict: bool = False) -> Tensor:
    return allocate_like(x)


@torch.library.custom_op("ctxenc::gate_backward", mutates_args=(), device_types=DEVICES)
def _gate_backward_op(
    dy: Tensor, x: Tensor, logits: Tensor, residual: bool, x_wanted: bool, strict: bool = False
) -> tuple[Tensor, Tensor]:
    return BACKWARD(strict, dy, x, logits, residual, x_wanted)


@_gate_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, logits: Tensor, residual: bool, x_wanted: bool, strict: bool = False
) -> tuple[Tensor, Tensor]:
    return allocate_like(x, x_wanted), _allocate_rows(logits)


def _gate_plainly(x: Tensor, logits: Tensor, residual: bool, *_: bool) -> Tensor:
    """Gate by the PyTorch path, under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return plain_forward(x, logits, residual)


differentiate_again(_gate_backward_op, _gate_plainly, count=2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.flags = inputs[2:]


def _compute_gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, logits = ctx.saved_tensors
    residual, strict = ctx.flags
    if needs_torch_ops(dy):
        return *differentiate(partial(_gate_plainly, residual=residual), (x, logits), dy), None, None
    x_wanted = ctx.needs_input_grad[0]
    arguments = dy, x, logits, residual, x_wanted
    dx, dlogits = _gate_backward_op(*arguments, strict) if is_watched() else BACKWARD(strict, *arguments)
    return dx if x_wanted else None, dlogits, None, None


_gate_op.register_autograd(_compute_gradients, setup_context=_save)


class _Gate(torch.autograd.Function):
    """Run the kernels without the dispatcher, for eager mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor, residual: bool, strict: bool) -> Tensor:
        _save(ctx, (x, logits, residual, strict), x)
        return FORWARD(strict, x, logits, residual)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _compute_gradients(ctx, dy)


def gate(x: Tensor, logits: Tensor, residual: bool = False, strict: bool = False) -> Tensor:
    """Return x * sigmoid(logits), or relu(x + x * sigmoid(logits)), for x (B, C, N) and logits (B, C): (B, C, N), dense, like x.

    Takes fp32, fp16 and bf16 on a GPU, with any strides: x is read in place if each image is dense, else copied.
    strict: raise RuntimeError if no kernel has proved itself, instead of taking the PyTorch path.
    """
    if is_watched():
        return _gate_op(x, logits, residual, strict)
    if (x.requires_grad or logits.requires_grad) and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return _Gate.apply(x, logits, residual, strict)
    return FORWARD(strict, x, logits, residual)
