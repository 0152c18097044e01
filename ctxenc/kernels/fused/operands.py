"""What the kernels of the Triton path multiply: rounding to the precision of a product, and operands prepared once a launch."""

import os

import triton
import triton.language as tl

from ctxenc.kernels.fused.tiles import block_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)
OFFSET = tl.constexpr(16)  # a channel's base is 0 up to this many times the spread of its codewords
NEAR = tl.constexpr(8)  # codewords are near the origin up to this many times the distance of half of them to c


@triton.jit
def drop_bits(value, BITS: tl.constexpr):
    """fp32 rounded to the nearest with so many bits of fraction less."""
    bits = (value.to(tl.int32, bitcast=True) + (1 << (BITS - 1))) & -(1 << BITS)
    return tl.where(value == value, bits.to(tl.float32, bitcast=True), value)  # the sum carries some NaN over to -0


@triton.jit
def rounded(value, DOT: tl.constexpr):
    """fp32 values as an operand of a product."""
    if DOT == "bf16":
        if _INTERPRETED:  # which multiplies bf16 wrongly, and cuts where it should round
            return drop_bits(value, 16)
        else:
            return value.to(tl.bfloat16)
    elif DOT == "fp16":  # as tf32
        return drop_bits(value, 13)
    else:
        return value


@triton.jit
def dot(a, b, acc, DOT: tl.constexpr):
    """Returns acc + a @ b of rounded operands."""
    if DOT == "bf16":
        return tl.dot(a, b, acc)
    elif DOT == "fp16":
        return tl.dot(a, b, acc, input_precision="tf32")
    else:
        return tl.dot(a, b, acc, input_precision=DOT)


@triton.jit
def load_operand(p_values, o_d, o_k, PADDED_D: tl.constexpr):
    """Prepared codewords or gradients (BLOCK_D, BLOCK_K); they are padded with zeros, so that no mask is needed."""
    value = tl.load(p_values + o_k[None, :] * PADDED_D + o_d[:, None])
    if _INTERPRETED:
        value = value.to(tl.float32)
    return value


@triton.jit
def _load_shifted(
    p_codewords, nearest, start, D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Some channels of d' (BLOCK_K, BLOCK_D), zero beyond K and D, and of c (BLOCK_D,)."""
    o_k, o_d = tl.arange(0, BLOCK_K), start + tl.arange(0, BLOCK_D)
    mask = (o_k < K)[:, None] & (o_d < D)[None, :]
    d = tl.load(p_codewords + o_k[:, None] * D + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    c = tl.load(p_codewords + nearest * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    return tl.where(mask, d - c[None, :], 0.0), c


SCANNED = 4096  # values that a program prepares at a time, 32 a thread: 512 channels of 32 codewords in four steps


def scan(D: int, block_k: int) -> int:
    """Channels that the kernels below take at a time where they go over all of them: each step waits for the one before."""
    return max(16, min(block_of(D), SCANNED // block_k))


@triton.jit
def prepare_codewords_kernel(
    p_codewords,  # (K, D)
    p_operands,  # (2, BLOCK_K, padded D): d' rounded, and what is left of it
    p_centers,  # (2, padded D), fp32: c and the base
    p_bias,  # (blocks of D, BLOCK_K), fp32: |d'|^2 + 2 (c - base).d~, by blocks of channels
    p_near,  # (), int32, where RESIDENT: whether the codewords are near the origin
    D: tl.constexpr,
    K: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCAN: tl.constexpr,
    DOT: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Prepares the codewords, each program a block of channels.

    Those near the origin with c = 0 for the resident form of forward, which cannot shift x.
    """
    block = tl.program_id(0)
    o_k = tl.arange(0, BLOCK_K)
    distance = tl.zeros((BLOCK_K,), tl.float32)  # of every codeword to the mean of all, squared
    for start in range(0, D, SCAN):
        o_d = start + tl.arange(0, SCAN)
        mask = (o_k < K)[:, None] & (o_d < D)[None, :]
        d = tl.load(p_codewords + o_k[:, None] * D + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        away = d - tl.sum(d, 0)[None, :] / K
        distance += tl.sum(away * away, 1)
    nearest = tl.minimum(tl.argmin(tl.where(o_k < K, distance, float("inf")), 0), K - 1)  # NaN would lead beyond

    near = False
    if RESIDENT:
        distance, norm = tl.zeros((BLOCK_K,), tl.float32), 0.0  # |d'|^2, |c|^2
        for start in range(0, D, SCAN):
            d, c = _load_shifted(p_codewords, nearest, start, D, K, SCAN, BLOCK_K)
            distance += tl.sum(d * d, 1)
            norm += tl.sum(c * c, 0)
        near = 2 * tl.sum(tl.where((o_k < K) & (norm <= distance * (NEAR * NEAR)), 1, 0), 0) >= K
        tl.store(p_near, near.to(tl.int32))

    o_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (o_k < K)[:, None] & (o_d < D)[None, :]
    d, c = _load_shifted(p_codewords, nearest, block * BLOCK_D, D, K, BLOCK_D, BLOCK_K)
    if RESIDENT:
        d, c = tl.where(near & mask, d + c[None, :], d), tl.where(near, 0.0, c)
    base = c
    if DOT == "bf16" or DOT == "fp16":
        base = tl.where(tl.abs(c) > tl.max(tl.abs(d), 0) * OFFSET, rounded(c, DOT).to(tl.float32), 0.0)
    high = rounded(d, DOT)
    low = rounded(d - high.to(tl.float32), DOT)
    bias = tl.sum(d * d + 2 * (c - base)[None, :] * (high.to(tl.float32) + low.to(tl.float32)), 1)
    o_kd = o_k[:, None] * PADDED_D + o_d[None, :]
    tl.store(p_operands + o_kd, high)
    tl.store(p_operands + BLOCK_K * PADDED_D + o_kd, low)
    tl.store(p_centers + o_d, c)
    tl.store(p_centers + PADDED_D + o_d, base)
    tl.store(p_bias + block * BLOCK_K + o_k, bias)


@triton.jit(do_not_specialize=["stride_b", "stride_k", "stride_d"])
def prepare_grad_kernel(
    p_grad,  # (B, K, D), any strides
    p_codewords,  # (K, D)
    p_centers,  # (2, padded D)
    p_operands,  # (B, BLOCK_K, padded D): grad rounded
    p_product,  # (B, BLOCK_K), fp32: (d - base) . grad rounded
    stride_b,
    stride_k,
    stride_d,
    D: tl.constexpr,
    K: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    product = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, PADDED_D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < PADDED_D
        mask = (o_k < K)[:, None] & (o_d < D)[None, :]
        o_grad = (o_k.to(tl.int64) * stride_k)[:, None] + (o_d.to(tl.int64) * stride_d)[None, :]
        grad = rounded(
            tl.load(p_grad + b * stride_b + o_grad, mask=mask, other=0.0), DOT
        )  # fp32, as encode's result is
        d = tl.load(p_codewords + o_k[:, None] * D + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        base = tl.load(p_centers + PADDED_D + o_d, mask=m_d, other=0.0)
        product += tl.sum((d - base[None, :]) * grad.to(tl.float32), 1)
        tl.store(p_operands + (b * BLOCK_K + o_k[:, None]) * PADDED_D + o_d[None, :], grad, mask=m_d[None, :])
    tl.store(p_product + b * BLOCK_K + o_k, product)
