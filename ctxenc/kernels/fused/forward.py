"""Forward of the operator as one kernel, in two forms.

The resident form, for bf16 on a GPU that copies tiles on its own (TMA, compute capability 9): all channels of a tile lie in
shared memory, x is read once, and no element of it passes through a register. The squared norms of the pixels are the diagonal of
x @ x^T. Two tiles take turns, one copied while the other is multiplied.

The walking form, for all else: see walk.py.
"""

import triton
import triton.language as tl

from ctxenc.kernels.fused.operands import dot, load_operand, rounded
from ctxenc.kernels.fused.resident import load_tile, resident_nearness
from ctxenc.kernels.fused.walk import (
    add_product,
    image,
    load_bias,
    load_x,
    multiple,
    softmax,
    subtract_codewords,
    walk_channels,
)

# One binary for all sizes: how x is aligned is the explicit constexpr VECTOR.
SIZES = ["p_x", "N", "tiles", "share", "splits", "groups", "stride_b", "stride_n", "stride_d"]


@triton.jit
def _resident(
    d_x, p_smoothing, p_operands, p_bias, b, first, last, N,
    K: tl.constexpr, PADDED_D: tl.constexpr, SHARED: tl.constexpr, CHANNELS_LAST: tl.constexpr, DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over the tiles from first to last of weights times x (padded D, BLOCK_K), and of the weights (BLOCK_K,)."""
    o_d, o_k = tl.arange(0, PADDED_D), tl.arange(0, BLOCK_K)
    m_k = o_k < K
    high = load_operand(p_operands, o_d, o_k, PADDED_D)
    low = load_operand(p_operands + BLOCK_K * PADDED_D, o_d, o_k, PADDED_D)
    bias = load_bias(p_bias, o_k, PADDED_D // BLOCK_D, BLOCK_K)
    weight_sum = tl.zeros((BLOCK_K,), tl.float32)
    sums = tl.zeros((PADDED_D, BLOCK_K), tl.float32)
    # What is hoisted out of the loop would be spilled: 64 addresses of operands in shared memory among it.
    for tile in tl.range(first, last, num_stages=STAGES, disable_licm=True):
        x = load_tile(d_x, b, tile * BLOCK_N, 0, PADDED_D, CHANNELS_LAST, BLOCK_N)
        nearness = resident_nearness((x,), (high,), (low,), bias, SHARED, DOT, BLOCK_N, BLOCK_K, 1)
        s = tl.load(p_smoothing + (o_k * 0 if SHARED else o_k), mask=m_k, other=0.0).to(tl.float32)
        m_n = tile * BLOCK_N + tl.arange(0, BLOCK_N) < N
        weights = rounded(softmax(nearness, s, m_n, m_k), DOT)
        weight_sum += tl.sum(weights.to(tl.float32), 0)
        sums = dot(tl.trans(x), weights, sums, DOT)
    return sums, weight_sum


@triton.jit
def _walking(
    p_image, p_smoothing, p_operands, p_centers, p_bias, p_sums, first, last, first_block, last_block, N, stride_n, stride_d,
    D: tl.constexpr, K: tl.constexpr, PADDED_D: tl.constexpr, SHARED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As _resident, for some blocks of channels; where there are several the sums are in memory."""
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    s = tl.load(p_smoothing + (o_k * 0 if SHARED else o_k), mask=m_k, other=0.0).to(tl.float32)
    bias = load_bias(p_bias, o_k, PADDED_D // BLOCK_D, BLOCK_K)
    weight_sum = tl.zeros((BLOCK_K,), tl.float32)
    sums = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    for tile in tl.range(first, last, disable_licm=True):
        if PADDED_D != BLOCK_D:
            tl.debug_barrier()  # the threads that add to a sum need not be those that wrote it for the tile before
        o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        nearness, _ = walk_channels(  # no gradient
            p_image, p_operands, p_operands, p_centers, bias, o_n, o_k, N, stride_n, stride_d, D, PADDED_D, SHARED,
            CHANNELS_LAST, False, DOT, BLOCK_N, BLOCK_D, BLOCK_K, STAGES,
        )  # fmt: skip
        weights = rounded(softmax(nearness, s, o_n < N, m_k), DOT)
        weight_sum += tl.sum(weights.to(tl.float32), 0)
        for block in tl.range(first_block, last_block, num_stages=STAGES):
            o_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
            x = load_x(p_image, o_n, o_d, N, stride_n, stride_d, D, CHANNELS_LAST)
            x = rounded(x - tl.load(p_centers + PADDED_D + o_d)[None, :], DOT)
            if PADDED_D == BLOCK_D:
                sums = dot(tl.trans(x), weights, sums, DOT)
            else:
                add_product(p_sums, o_d, o_k, x, weights, tile - first, D, K, DOT)
    return sums, weight_sum


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def encode_fwd_kernel(
    p_x,  # (B, D, N)
    d_x,  # its descriptor, for tiles of all channels; None in the walking form
    p_codewords,  # (K, D)
    p_smoothing,  # (K,) or ()
    p_operands,  # as prepared
    p_centers,
    p_bias,
    p_near,
    p_encoding,  # (B, splits, K, D), fp32
    p_weight_sum,  # (B, splits, K), fp32: sum of the weights over pixels
    N,
    tiles,  # of BLOCK_N pixels in an image
    share,  # of them for one program
    splits,  # programs that share the pixels of an image
    groups,  # programs that share the sums over the same pixels, each for some channels
    stride_b,
    stride_n,
    stride_d,
    D: tl.constexpr,
    K: tl.constexpr,
    PADDED_D: tl.constexpr,
    SHARED: tl.constexpr,  # one smoothing factor for all codewords: |x'|^2 cancels
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that the address, the strides and, channels first, N are multiples of
    RESIDENT: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCKS: tl.constexpr = PADDED_D // BLOCK_D
    if CHANNELS_LAST:
        stride_n = multiple(stride_n, VECTOR)
    else:
        stride_d, N = multiple(stride_d, VECTOR), multiple(N, VECTOR)
    pid = tl.program_id(0)
    group = 0
    first_block, last_block = 0, BLOCKS
    if not RESIDENT:  # the constants spare it registers
        group, pid = pid % groups, pid // groups
        first_block, last_block = group * BLOCKS // groups, (group + 1) * BLOCKS // groups
    split, b, row = pid % splits, pid // splits, pid.to(tl.int64)
    p_sums = p_encoding + row * K * D
    first = split * share
    last = tl.minimum(first + share, tiles)
    o_k, one = tl.arange(0, BLOCK_K), tl.full((BLOCK_K,), 1.0, tl.float32)
    near = False
    if RESIDENT:
        near = tl.load(p_near) > 0
    sums, weight_sum = tl.zeros((BLOCK_D, BLOCK_K), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    if near:
        if RESIDENT:
            all_sums, weight_sum = _resident(
                d_x, p_smoothing, p_operands, p_bias, b, first, last, N, K, PADDED_D, SHARED, CHANNELS_LAST, DOT, BLOCK_N,
                BLOCK_D, BLOCK_K, STAGES,
            )  # fmt: skip
            if BLOCKS == 1:
                sums = all_sums
            else:
                o_d = tl.arange(0, PADDED_D)
                mask = (o_d < D)[:, None] & (o_k < K)[None, :]
                tl.store(p_sums + o_k[None, :] * D + o_d[:, None], all_sums, mask=mask)
    else:
        sums, weight_sum = _walking(
            image(p_x, b.to(tl.int64), stride_b, VECTOR), p_smoothing, p_operands, p_centers, p_bias, p_sums, first, last,
            first_block, last_block, N, stride_n, stride_d, D, K, PADDED_D, SHARED, CHANNELS_LAST, DOT, BLOCK_N, BLOCK_D,
            BLOCK_K, STAGES,
        )  # fmt: skip
    p_base = p_centers + PADDED_D
    subtract_codewords(
        p_sums, sums, weight_sum, one, p_codewords, p_base, first_block, last_block, D, K, BLOCK_D, BLOCK_K, BLOCKS == 1
    )
    if group == 0:
        tl.store(p_weight_sum + row * K + o_k, weight_sum, mask=o_k < K)
