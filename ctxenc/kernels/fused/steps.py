"""Define the steps of the encode kernels on a tile of pixels: load, multiply, assign.

With c a codeword, the center, and d' = d - c, x' = x - c, the squared residual is |x'|^2 - 2 x'.d' + |d'|^2, as in torch_encode.py.
The tensor cores get x minus a base. In fp32 the base is c, and a product has three terms of tf32. In half precision a channel's
base is usually 0: x goes in unchanged, with d' in two terms, so a product is nearly exact. If c is more than 16 times the largest
|d'| of the channel, the base is c, rounded. fp16 operands are scaled by a power of two, because gradients under loss scaling and
the low-order term of d' would leave the range of fp16.
"""

import os

import triton
import triton.language as tl

from ctxenc.kernels.fused.tiles import LONGEST_RUN as _LONGEST_RUN

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)
LONGEST_RUN = tl.constexpr(_LONGEST_RUN)
OFFSET = tl.constexpr(16)  # a channel's base is 0 while |c| is at most this many times the largest |d'|


@triton.jit
def drop_bits(value, BITS: tl.constexpr):
    """Round fp32 to the nearest value with BITS fewer fraction bits."""
    pattern = (value.to(tl.int32, bitcast=True) + (1 << (BITS - 1))) & -(1 << BITS)
    return tl.where(
        value == value, pattern.to(tl.float32, bitcast=True), value
    )  # the sum would carry some NaN over to -0


@triton.jit
def round_operand(value, DOT: tl.constexpr):
    """Round fp32 values to an operand of a product."""
    if DOT == "bf16":
        if _INTERPRETED:  # it multiplies bf16 wrongly, and truncates
            return drop_bits(value, 16)
        else:
            return value.to(tl.bfloat16)
    elif DOT == "fp16":
        return value.to(tl.float16)
    else:
        return value


@triton.jit
def store_rounded(pointers, value, mask):
    """Store fp32 values in the dtype of the pointers."""
    if _INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        value = drop_bits(value, 16)
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, DOT: tl.constexpr):
    """Multiply two rounded operands: fp32.

    Callers subtract the result from their sum. Triton would fold an addition into the product and let it run into the next tile;
    Triton 3.6 then overwrites its left operand while wgmma may still read it.
    """
    acc = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
    if DOT == "bf16" or DOT == "fp16":
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a, b, acc, input_precision=DOT)


@triton.jit
def find_scale(value, DOT: tl.constexpr):
    """Return the power of two that scales a matrix into [-2, 2] for products in fp16, else 1."""
    scale = 1.0
    if DOT == "fp16":
        largest = tl.maximum(tl.max(tl.max(tl.abs(value), 1), 0), 1e-30)
        scale = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def assume_multiple(size, VECTOR: tl.constexpr):
    """Show the compiler that a size is a multiple of VECTOR; tl.multiple_of has no effect on arguments."""
    return size // VECTOR * VECTOR


@triton.jit
def locate_image(p_x, b, stride_b, VECTOR: tl.constexpr):
    """Return the address of image b (int64), a multiple of VECTOR elements."""
    return tl.multiple_of(p_x + b * stride_b, VECTOR * p_x.dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def compute_offsets(o_n, o_d, stride_n, stride_d, CHANNELS_LAST: tl.constexpr):
    """Return offsets (BLOCK_N, BLOCK_D) inside an image: one stride is 1, the other may need 64 bits."""
    if CHANNELS_LAST:
        return (o_n.to(tl.int64) * stride_n)[:, None] + o_d[None, :]
    else:
        return o_n[:, None] + (o_d.to(tl.int64) * stride_d)[None, :]


@triton.jit
def assume_aligned(N, stride_n, stride_d, LAYOUT: tl.constexpr, VECTOR: tl.constexpr):
    """Show the compiler which of N and the strides are multiples of VECTOR."""
    if LAYOUT == "last":
        stride_n = assume_multiple(stride_n, VECTOR)
    if LAYOUT == "first":
        N, stride_d = assume_multiple(N, VECTOR), assume_multiple(stride_d, VECTOR)
    return N, stride_n, stride_d


@triton.jit
def load_x(
    p_image, o_n, first_d, N, stride_n, stride_d,
    D: tl.constexpr, LAYOUT: tl.constexpr, VECTOR: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Load features, zero beyond N and D, for arrange(): (BLOCK_N, BLOCK_D) of channels from `start` on, or all pixels of a run."""
    if LAYOUT == "run":
        o = tl.arange(0, BLOCK_D * LONGEST_RUN)
        limit = assume_multiple(tl.minimum(BLOCK_D, D - first_d) * N, VECTOR)
        return tl.load(p_image + assume_multiple(first_d * N, VECTOR) + o, mask=o < limit, other=0.0)
    else:
        o_d = first_d + tl.arange(0, BLOCK_D)
        o_x = compute_offsets(o_n, o_d, stride_n, stride_d, LAYOUT == "last")
        return tl.load(p_image + o_x, mask=(o_n < N)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def arrange(x, o_n, N, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Arrange the result of load_x as features (BLOCK_N, BLOCK_D); a run is sorted into rows in shared memory."""
    if LAYOUT == "run":
        o = tl.arange(0, BLOCK_D)[None, :] * N + tl.minimum(o_n, N - 1)[:, None]
        x = tl.reshape(tl.gather(x, tl.reshape(o, (BLOCK_N * BLOCK_D,)), 0), (BLOCK_N, BLOCK_D))
        return tl.where((o_n < N)[:, None], x, 0.0)
    else:
        return x


@triton.jit
def load_tile(
    p_x, tile, last, tiles, first_d, N, stride_b, stride_n, stride_d,
    D: tl.constexpr, LAYOUT: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Load a tile by its number over all images; zeros from `last` on, so that a program can prefetch one tile."""
    p_image = locate_image(p_x, (tile // tiles).to(tl.int64), stride_b, VECTOR)
    o_n = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    return load_x(p_image, o_n, first_d, tl.where(tile < last, N, 0), stride_n, stride_d, D, LAYOUT, VECTOR, BLOCK_D)


@triton.jit
def load_rows(p_rows, o_d, o_k, D: tl.constexpr, K: tl.constexpr):
    """Load codewords or their gradients (K, D), transposed (BLOCK_D, BLOCK_K), in fp32, zero beyond D and K."""
    mask = (o_d < D)[:, None] & (o_k < K)[None, :]
    return tl.load(p_rows + o_k[None, :] * D + o_d[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def find_center(p_codewords, D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the index of the center: the codeword nearest to the mean of all.

    The mean itself would follow a single outlier. On a tie between two codewords, it is the one nearer to the origin.
    """
    o_k = tl.arange(0, BLOCK_K)
    distance = tl.zeros((BLOCK_K,), tl.float32)
    for first_d in tl.range(0, D, BLOCK_D, num_stages=1):
        o_d = first_d + tl.arange(0, BLOCK_D)
        d = load_rows(p_codewords, o_d, o_k, D, K)
        if K > 2:
            d -= (tl.sum(d, 1) / K)[:, None]
        distance += tl.sum(d * d, 0)
    return tl.minimum(tl.argmin(tl.where(o_k < K, distance, float("inf")), 0), K - 1)  # NaN would lead beyond K


@triton.jit
def prepare_codewords(p_codewords, center, o_d, o_k, D: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr):
    """Prepare some channels of the codebook for products with x.

    Returns:
        d less the base (BLOCK_D, BLOCK_K); d' scaled and rounded, and its rounding error, (BLOCK_D, BLOCK_K) each;
        their scale; the bias |d'|^2 + 2 (c - base).d' of the squared residuals (BLOCK_K,); c and the base (BLOCK_D,);
        and the scale of x, (), exact: 1, or 1/2 if fp16 less a base could overflow.
    """
    mask = (o_d < D)[:, None] & (o_k < K)[None, :]
    d = load_rows(p_codewords, o_d, o_k, D, K)
    c = tl.load(p_codewords + center * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    d = tl.where(mask, d - c[:, None], 0.0)
    base, x_scale = c, 1.0
    if DOT == "bf16" or DOT == "fp16":
        base = tl.where(tl.abs(c) > tl.max(tl.abs(d), 1) * OFFSET, round_operand(c, DOT).to(tl.float32), 0.0)
    if DOT == "fp16":
        x_scale = tl.where(tl.max(tl.abs(base), 0) > 0, 0.5, 1.0)
    scale = find_scale(d, DOT)
    high = round_operand(d / scale, DOT)
    low = round_operand(d / scale - high.to(tl.float32), DOT)
    operands = (high.to(tl.float32) + low.to(tl.float32)) * scale
    bias = tl.sum(d * d + 2 * (c - base)[:, None] * operands, 0)
    return d + tl.where(mask, (c - base)[:, None], 0.0), high, low, scale, bias, c, base, x_scale


@triton.jit
def find_nearness(x, operand, high, low, scale, bias, c, SHARED: tl.constexpr, DOT: tl.constexpr):
    """Add up -|x - d|^2 over some channels of x (BLOCK_N, BLOCK_D): (BLOCK_N, BLOCK_K).

    SHARED: without |x'|^2, which cancels in the softmax if all codewords share one smoothing factor.
    """
    cross = -dot(operand, high, DOT)
    if DOT == "bf16" or DOT == "fp16":
        cross -= dot(operand, low, DOT)
    nearness = cross * (-2 * scale) - bias[None, :]
    if not SHARED:
        shifted = x - c[None, :]
        nearness -= tl.sum(shifted * shifted, 1)[:, None]
    return nearness


@triton.jit
def load_smoothing(p_smoothing, o_k, K: tl.constexpr, SHARED: tl.constexpr):
    """Load the smoothing (BLOCK_K,) in fp32; SHARED: one factor for all codewords."""
    return tl.load(p_smoothing + (o_k * 0 if SHARED else o_k), mask=o_k < K, other=0.0).to(tl.float32)


@triton.jit
def softmax(nearness, s, m_n, m_k):
    """Return weights (BLOCK_N, BLOCK_K): softmax over the codewords of s * nearness; zero beyond N and K."""
    logits = tl.where(m_k[None, :], s[None, :] * nearness, float("-inf"))
    exp = tl.exp(logits - tl.max(logits, 1)[:, None])
    return tl.where(m_n[:, None], exp / tl.sum(exp, 1)[:, None], 0.0)


@triton.jit
def differentiate_softmax(weights, p):
    """Return the gradient q (BLOCK_N, BLOCK_K) in the logits, from p = residuals . grad."""
    return weights * (p - tl.sum(weights * p, 1)[:, None])
