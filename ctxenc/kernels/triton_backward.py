"""Backward of the operator as one kernel: x is read, the weights are taken again, and dx is written."""

import triton
import triton.language as tl

from ctxenc.kernels.triton_operands import _INTERPRETED, dot, drop_bits, load_operand, rounded
from ctxenc.kernels.triton_walk import (
    add_product,
    image,
    load_bias,
    load_x,
    multiple,
    offsets,
    softmax,
    subtract_codewords,
    walk_channels,
)

SIZES = ["p_x", "N", "tiles", "share", "groups", "stride_b", "stride_n", "stride_d", "B"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def encode_bwd_kernel(
    p_x,  # (B, D, N)
    p_codewords,  # (K, D)
    p_smoothing,  # (K,) or ()
    p_operands,  # as prepared
    p_centers,
    p_bias,
    p_grad,  # (B, BLOCK_K, padded D), rounded
    p_product,  # (B, BLOCK_K)
    p_dx,  # (B, D, N), dense, in the layout of x
    p_dcodewords,  # (programs, K, D), fp32: all but the term in grad
    p_dsmoothing,  # (programs, K), fp32
    N,
    tiles,
    share,  # of the tiles of all images for one program
    groups,
    stride_b,
    stride_n,
    stride_d,
    B,
    D: tl.constexpr,
    K: tl.constexpr,
    PADDED_D: tl.constexpr,
    SHARED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    DX: tl.constexpr,  # whether the gradient in x is wanted
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
    group, program = pid % groups, (pid // groups).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    s = tl.load(p_smoothing + (o_k * 0 if SHARED else o_k), mask=m_k, other=0.0).to(tl.float32)
    bias = load_bias(p_bias, o_k, BLOCKS, BLOCK_K)

    first_block, last_block = group * BLOCKS // groups, (group + 1) * BLOCKS // groups
    q_sum = tl.zeros((BLOCK_K,), tl.float32)
    dsmoothing = tl.zeros((BLOCK_K,), tl.float32)
    sums = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    p_sums = p_dcodewords + program * K * D
    first = (pid // groups) * share
    last = tl.minimum(first + share, B * tiles)
    for tile in range(first, last):
        b = (tile // tiles).to(tl.int64)
        p_image = image(p_x, b, stride_b, VECTOR)
        p_image_grad = p_grad + b * BLOCK_K * PADDED_D
        o_n = (tile % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        nearness, p = walk_channels(
            p_image,
            p_operands,
            p_image_grad,
            p_centers,
            bias,
            o_n,
            o_k,
            N,
            stride_n,
            stride_d,
            D,
            PADDED_D,
            SHARED,
            CHANNELS_LAST,
            True,
            DOT,
            BLOCK_N,
            BLOCK_D,
            BLOCK_K,
            STAGES,
        )
        weights = softmax(nearness, s, m_n, m_k)
        p -= tl.load(p_product + b * BLOCK_K + o_k)[None, :]
        q = weights * (p - tl.sum(weights * p, 1)[:, None])  # dL/d(logits)
        dsmoothing += tl.sum(q * nearness, 0)
        pull = 2 * tl.sum(q * s[None, :], 1)  # 0 where s is shared
        sq = rounded(2 * q * s[None, :], DOT)
        q, weights = rounded(q, DOT), rounded(weights, DOT)
        q_sum += tl.sum(q.to(tl.float32), 0)
        for block in tl.range(first_block, last_block, num_stages=STAGES):
            o_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
            x = load_x(p_image, o_n, o_d, N, stride_n, stride_d, D, CHANNELS_LAST)
            if DX:
                dx = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
                dx = dot(weights, tl.trans(load_operand(p_image_grad, o_d, o_k, PADDED_D)), dx, DOT)
                dx = dot(sq, tl.trans(load_operand(p_operands, o_d, o_k, PADDED_D)), dx, DOT)
                if not SHARED:
                    dx -= pull[:, None] * (x - tl.load(p_centers + o_d)[None, :])
                if _INTERPRETED and p_dx.dtype.element_ty == tl.bfloat16:
                    dx = drop_bits(dx, 16)
                p_out = p_dx + b * D * N + offsets(o_n, o_d, D, N, CHANNELS_LAST)
                tl.store(p_out, dx.to(p_dx.dtype.element_ty), mask=m_n[:, None] & (o_d < D)[None, :])
            x = rounded(x - tl.load(p_centers + PADDED_D + o_d)[None, :], DOT)
            if BLOCKS == 1:
                sums = dot(tl.trans(x), q, sums, DOT)
            else:
                add_product(p_sums, o_d, o_k, x, q, tile - first, D, K, DOT)

    p_base = p_centers + PADDED_D
    subtract_codewords(
        p_sums, sums, q_sum, 2 * s, p_codewords, p_base, first_block, last_block, D, K, BLOCK_D, BLOCK_K, BLOCKS == 1
    )
    if group == 0:
        tl.store(p_dsmoothing + program * K + o_k, dsmoothing, mask=m_k)
