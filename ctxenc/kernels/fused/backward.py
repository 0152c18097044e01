"""Backward of the operator as one kernel, in the two forms of forward: x is read, the weights are taken again, dx is written.

In the resident form no element of x or of a codeword passes through a register either. dx, which wants the residuals, is a sum of
products: dx = weights @ grad + 2 s q @ d - diag(2 s q 1) @ x, the last with the diagonal in two terms.
"""

import triton
import triton.language as tl

from ctxenc.kernels.fused.operands import _INTERPRETED, dot, drop_bits, load_operand, rounded
from ctxenc.kernels.fused.resident import load_tile, resident_nearness, store_tile
from ctxenc.kernels.fused.walk import (
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


@triton.jit
def _pull(nearness, p, s, m_n, m_k, DOT: tl.constexpr):
    """From -|x - d|^2 and x . grad: weights, q = dL/d(logits) and 2 s q, rounded.

    Also q's part in the gradient in s, and the sum over the codewords of 2 s q.
    """
    weights = softmax(nearness, s, m_n, m_k)
    q = weights * (p - tl.sum(weights * p, 1)[:, None])
    sq = 2 * q * s[None, :]
    return rounded(weights, DOT), rounded(q, DOT), rounded(sq, DOT), tl.sum(q * nearness, 0), tl.sum(sq, 1)


@triton.jit
def _resident(
    d_x, d_dx, p_smoothing, p_operands, p_bias, p_grad, p_product, p_sums, first, last, tiles, N,
    D: tl.constexpr, K: tl.constexpr, PADDED_D: tl.constexpr, SHARED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    DX: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes dx, and to memory the sums of q times x; returns those of q and of its part in the gradient in s, (BLOCK_K,)."""
    CHUNKS: tl.constexpr = PADDED_D // CHUNK
    o_n, o_k, o_c = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, CHUNK)
    m_k = o_k < K
    diagonal = o_n[:, None] == o_n[None, :]
    bias = load_bias(p_bias, o_k, PADDED_D // BLOCK_D, BLOCK_K)
    high, low, sums = (), (), ()
    for c in tl.static_range(CHUNKS):
        high = high + (load_operand(p_operands, c * CHUNK + o_c, o_k, PADDED_D),)
        low = low + (load_operand(p_operands + BLOCK_K * PADDED_D, c * CHUNK + o_c, o_k, PADDED_D),)
        sums = sums + (tl.zeros((CHUNK, BLOCK_K), tl.float32),)
    q_sum, dsmoothing = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES, disable_licm=True):
        b, start = tile // tiles, tile % tiles * BLOCK_N
        x, grad = (), ()
        for c in tl.static_range(CHUNKS):
            x = x + (load_tile(d_x, b, start, c * CHUNK, CHUNK, CHANNELS_LAST, BLOCK_N),)
            p_image_grad = p_grad + b.to(tl.int64) * BLOCK_K * PADDED_D
            grad = grad + (load_operand(p_image_grad, c * CHUNK + o_c, o_k, PADDED_D),)
        nearness = resident_nearness(x, high, low, bias, SHARED, DOT, BLOCK_N, BLOCK_K, CHUNKS)
        p = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for c in tl.static_range(CHUNKS):
            p = dot(x[c], grad[c], p, DOT)
        p -= tl.load(p_product + b * BLOCK_K + o_k)[None, :]
        s = tl.load(p_smoothing + (o_k * 0 if SHARED else o_k), mask=m_k, other=0.0).to(tl.float32)
        weights, q, sq, ds, _ = _pull(nearness, p, s, start + o_n < N, m_k, DOT)
        dsmoothing += ds
        q_sum += tl.sum(q.to(tl.float32), 0)
        pull = tl.where(diagonal, -tl.sum(sq.to(tl.float32), 1)[:, None], 0.0)
        pull_high = rounded(pull, DOT)
        pull_low = rounded(pull - pull_high.to(tl.float32), DOT)
        added = ()
        for c in tl.static_range(CHUNKS):
            if DX:
                dx = dot(weights, tl.trans(grad[c]), tl.zeros((BLOCK_N, CHUNK), tl.float32), DOT)
                dx = dot(sq, tl.trans(high[c]), dx, DOT)
                dx = dot(pull_high, x[c], dx, DOT)
                if not SHARED:  # where its q add up to 0, and the diagonal holds roundings alone
                    dx = dot(pull_low, x[c], dx, DOT)
                store_tile(d_dx, b, start, c * CHUNK, dx, CHUNK, CHANNELS_LAST, BLOCK_N)
            added = added + (dot(tl.trans(x[c]), q, sums[c], DOT),)
        sums = added
    for c in tl.static_range(CHUNKS):
        o_d = c * CHUNK + o_c
        mask = (o_d < D)[:, None] & m_k[None, :]
        tl.store(p_sums + o_k[None, :] * D + o_d[:, None], sums[c], mask=mask)
    return q_sum, dsmoothing


@triton.jit
def _walking(
    p_x, p_dx, p_smoothing, p_operands, p_centers, p_bias, p_grad, p_product, p_sums, first, last, first_block, last_block,
    tiles, N, stride_b, stride_n, stride_d,
    D: tl.constexpr, K: tl.constexpr, PADDED_D: tl.constexpr, SHARED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr, DX: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As _resident, for some blocks of channels; where there is one block its sums are returned too, first."""
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    s = tl.load(p_smoothing + (o_k * 0 if SHARED else o_k), mask=m_k, other=0.0).to(tl.float32)
    bias = load_bias(p_bias, o_k, PADDED_D // BLOCK_D, BLOCK_K)
    q_sum, dsmoothing = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    sums = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    for tile in tl.range(first, last, disable_licm=True):
        if PADDED_D != BLOCK_D:
            tl.debug_barrier()  # the threads that add to a sum need not be those that wrote it for the tile before
        b = (tile // tiles).to(tl.int64)
        p_image = image(p_x, b, stride_b, VECTOR)
        p_image_grad = p_grad + b * BLOCK_K * PADDED_D
        o_n = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        nearness, p = walk_channels(
            p_image, p_operands, p_image_grad, p_centers, bias, o_n, o_k, N, stride_n, stride_d, D, PADDED_D, SHARED,
            CHANNELS_LAST, True, DOT, BLOCK_N, BLOCK_D, BLOCK_K, STAGES,
        )  # fmt: skip
        p -= tl.load(p_product + b * BLOCK_K + o_k)[None, :]
        weights, q, sq, ds, pull = _pull(nearness, p, s, m_n, m_k, DOT)
        dsmoothing += ds
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
            if PADDED_D == BLOCK_D:
                sums = dot(tl.trans(x), q, sums, DOT)
            else:
                add_product(p_sums, o_d, o_k, x, q, tile - first, D, K, DOT)
    return sums, q_sum, dsmoothing


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def encode_bwd_kernel(
    p_x,  # (B, D, N)
    d_x,  # its descriptor and that of dx, for tiles of CHUNK channels; None in the walking form
    d_dx,
    p_codewords,  # (K, D)
    p_smoothing,  # (K,) or ()
    p_operands,  # as prepared
    p_centers,
    p_bias,
    p_near,
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
    RESIDENT: tl.constexpr,
    CHUNK: tl.constexpr,
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
    pid, group = tl.program_id(0), 0
    first_block, last_block = 0, BLOCKS
    if not RESIDENT:  # the constants spare it registers
        group, pid = pid % groups, pid // groups
        first_block, last_block = group * BLOCKS // groups, (group + 1) * BLOCKS // groups
    program = pid.to(tl.int64)
    p_sums = p_dcodewords + program * K * D
    first = pid * share
    last = tl.minimum(first + share, B * tiles)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    near = False
    if RESIDENT:
        near = tl.load(p_near) > 0
    sums = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    q_sum, dsmoothing = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    if near:
        if RESIDENT:
            q_sum, dsmoothing = _resident(
                d_x, d_dx, p_smoothing, p_operands, p_bias, p_grad, p_product, p_sums, first, last, tiles, N, D, K, PADDED_D,
                SHARED, CHANNELS_LAST, DX, DOT, BLOCK_N, BLOCK_D, BLOCK_K, CHUNK, STAGES,
            )  # fmt: skip
            if BLOCKS == 1:
                o_d = tl.arange(0, BLOCK_D)
                mask = (o_d < D)[:, None] & m_k[None, :]
                tl.debug_barrier()
                sums = tl.load(p_sums + o_k[None, :] * D + o_d[:, None], mask=mask, other=0.0)
    else:
        sums, q_sum, dsmoothing = _walking(
            p_x, p_dx, p_smoothing, p_operands, p_centers, p_bias, p_grad, p_product, p_sums, first, last, first_block,
            last_block, tiles, N, stride_b, stride_n, stride_d, D, K, PADDED_D, SHARED, CHANNELS_LAST, VECTOR, DX, DOT, BLOCK_N,
            BLOCK_D, BLOCK_K, STAGES,
        )  # fmt: skip
    s = tl.load(p_smoothing + (o_k * 0 if SHARED else o_k), mask=m_k, other=0.0).to(tl.float32)
    p_base = p_centers + PADDED_D
    subtract_codewords(
        p_sums, sums, q_sum, 2 * s, p_codewords, p_base, first_block, last_block, D, K, BLOCK_D, BLOCK_K, BLOCKS == 1
    )
    if group == 0:
        tl.store(p_dsmoothing + program * K + o_k, dsmoothing, mask=m_k)
