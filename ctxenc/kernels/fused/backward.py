"""Define the operator's backward kernels and their launcher.

The kernel recomputes the weights, reads x as forward does, and writes the gradient in x in the same pass. With g =
dL/de, r = x - d and p = r . g, the gradient in a logit is q = w (p - sum_k w p), and

    dL/dx = sum_k w g + 2 s q (d' - x')    dL/dd = 2 s sum_i q r - (sum_i w) g    dL/ds = -sum_i q |r|^2
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctxenc.kernels.fused.launch import FUSED, allocate_like, count_slots, make_key, make_plan, make_readable, pack
from ctxenc.kernels.fused.steps import (
    arrange,
    assume_aligned,
    compute_offsets,
    differentiate_softmax,
    dot,
    find_center,
    find_nearness,
    find_scale,
    load_rows,
    load_smoothing,
    load_tile,
    prepare_codewords,
    round_operand,
    softmax,
    store_rounded,
)
from ctxenc.kernels.fused.tiles import ceil_div, choose_block, estimate_partial_cost, split_images
from ctxenc.kernels.fused.wide import assign_wide, load_map, map_pointers

SIZES = ["p_x", "N", "tiles", "B", "share", "stride_b", "stride_n", "stride_d", "count"]
BLOCK, ROWS = 64, 16  # elements per program of the finishing kernel, and rows that it reads at a time


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def encode_bwd_kernel(
    p_x,  # (B, D, N)
    p_codewords,  # (K, D)
    p_smoothing,  # (K,) or ()
    p_grad,  # (B, K, D)
    p_map,  # (B, tiles, BLOCK_N, BLOCK_K): weights, if WIDE
    p_q,  # the same: gradients in the logits
    p_dx,  # (B, D, N), dense, in the layout of x
    p_rows,  # (programs, K D + K), fp32: gradients in the codewords without the term in grad, and in the smoothing
    N,
    tiles,  # tiles of BLOCK_N pixels per image
    B,
    share,  # tiles per program, over all images
    stride_b, stride_n, stride_d,
    count,  # divisor of the encoding, and so of grad
    D: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, LAYOUT: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
    DX: tl.constexpr,  # compute the gradient in x
    DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    N, stride_n, stride_d = assume_aligned(N, stride_n, stride_d, LAYOUT, VECTOR)
    block, row = tl.program_id(0) % BLOCKS, (tl.program_id(0) // BLOCKS).to(tl.int64)
    o_k, o_d = tl.arange(0, BLOCK_K), block * BLOCK_D + tl.arange(0, BLOCK_D)
    m_k, m_d = o_k < K, o_d < D
    s = load_smoothing(p_smoothing, o_k, K, SHARED)
    center = find_center(p_codewords, D, K, BLOCK_D, BLOCK_K)
    d, high, low, scale, bias, c, base, x_scale = prepare_codewords(p_codewords, center, o_d, o_k, D, K, DOT)
    sums = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    q_sum, dsmoothing = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    first, last = row * share, tl.minimum(row * share + share, B * tiles)
    first_d = block * BLOCK_D
    loaded = load_tile(
        p_x, first, last, tiles, first_d, N, stride_b, stride_n, stride_d, D, LAYOUT, VECTOR, BLOCK_N, BLOCK_D
    )
    for tile in tl.range(first, last, num_stages=1, disable_licm=True):
        ahead = load_tile(
            p_x, tile + 1, last, tiles, first_d, N, stride_b, stride_n, stride_d, D, LAYOUT, VECTOR, BLOCK_N, BLOCK_D
        )
        b = (tile // tiles).to(tl.int64)
        o_n = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        grad = load_rows(p_grad + b * K * D, o_d, o_k, D, K) * (1.0 / count)
        x = arrange(loaded, o_n, N, LAYOUT, BLOCK_N, BLOCK_D).to(tl.float32)
        operand = round_operand((x - base[None, :]) * x_scale, DOT)
        grad_scale = find_scale(grad, DOT)
        grad = round_operand(grad / grad_scale, DOT)
        if WIDE:
            weights = load_map(p_map, tile, BLOCK_N, BLOCK_K)
            q = tl.load(map_pointers(p_q, tile, BLOCK_N, BLOCK_K))
        else:
            nearness = find_nearness(x, operand, high, low, scale / x_scale, bias, c, SHARED, DOT)
            p = dot(operand, grad, DOT) * (grad_scale / x_scale)
            less_base = load_rows(p_codewords, o_d, o_k, D, K) - base[:, None]
            p -= tl.sum(less_base * grad.to(tl.float32), 0)[None, :] * grad_scale
            weights = softmax(nearness, s, m_n, m_k)
            q = differentiate_softmax(weights, p)
            weights = round_operand(weights, DOT)
            dsmoothing += tl.sum(q * nearness, 0)
        q_scale = find_scale(q, DOT)
        q_operand = round_operand(q / q_scale, DOT)
        q_sum += tl.sum(q_operand.to(tl.float32), 0) * q_scale
        sums -= dot(tl.trans(operand), q_operand, DOT) * q_scale
        if DX:
            sq = 2 * q * s[None, :]
            sq_scale = find_scale(sq, DOT)
            sq_operand = round_operand(sq / sq_scale, DOT)
            dx = dot(weights, tl.trans(grad), DOT) * grad_scale
            dx += dot(sq_operand, tl.trans(high), DOT) * (sq_scale * scale)
            if not SHARED:  # if shared, its terms add up to 0
                dx -= tl.sum(sq, 1)[:, None] * (x - c[None, :])
            p_out = p_dx + b * D * N + compute_offsets(o_n, o_d, D, N, LAYOUT == "last")
            store_rounded(p_out, dx, m_n[:, None] & m_d[None, :])
        loaded = ahead
    d = load_rows(p_codewords, o_d, o_k, D, K) - base[:, None]
    residuals = 2 * s[None, :] * (-sums / x_scale - q_sum[None, :] * d)
    p_row = p_rows + row * (K * D + K)
    tl.store(p_row + o_k[None, :] * D + o_d[:, None], residuals, mask=m_d[:, None] & m_k[None, :])
    if not WIDE:
        tl.store(p_row + K * D + o_k, dsmoothing, mask=m_k)


@triton.jit(do_not_specialize=["rows", "B", "smoothing_rows", "smoothing_row"])
def finish_bwd_kernel(
    p_rows,  # (rows, K D + K), fp32
    p_smoothing_rows,  # (smoothing rows, at least K)
    p_weight_sum,  # (B, K)
    p_grad,  # (B, K, D)
    p_dcodewords,  # (K, D)
    p_dsmoothing,  # (K,) or ()
    rows, smoothing_rows,
    smoothing_row,  # stride
    B, D: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Add up the rows of all programs in a fixed order, less the weight sums times grad; the last program does the smoothing."""
    o_row = tl.arange(0, ROWS)
    if tl.program_id(0) * BLOCK < K * D:
        o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        m = (o < K * D)[None, :]
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, rows, ROWS):
            row = (first + o_row).to(tl.int64)[:, None]
            total += tl.load(p_rows + row * (K * D + K) + o[None, :], mask=m & (row < rows), other=0.0)
        for first in range(0, B, ROWS):
            b = (first + o_row).to(tl.int64)[:, None]
            weight_sum = tl.load(p_weight_sum + b * K + (o // D)[None, :], mask=m & (b < B), other=0.0)
            grad = tl.load(p_grad + b * K * D + o[None, :], mask=m & (b < B), other=0.0)
            total -= weight_sum * grad
        store_rounded(p_dcodewords + o, tl.sum(total, 0), o < K * D)
    else:
        o_k = tl.arange(0, BLOCK_K)
        smoothing = tl.zeros((ROWS, BLOCK_K), tl.float32)
        for first in range(0, smoothing_rows, ROWS):
            row = (first + o_row).to(tl.int64)[:, None]
            m = (o_k < K)[None, :] & (row < smoothing_rows)
            smoothing += tl.load(p_smoothing_rows + row * smoothing_row + o_k[None, :], mask=m, other=0.0)
        dsmoothing = tl.sum(smoothing, 0)
        if SHARED:
            store_rounded(p_dsmoothing + o_k, tl.sum(dsmoothing, 0) + o_k * 0.0, o_k < 1)
        else:
            store_rounded(p_dsmoothing + o_k, dsmoothing, o_k < K)


def encode_backward(
    grad: Tensor,
    x: Tensor,
    codewords: Tensor,
    smoothing: Tensor,
    weight_sum: Tensor,
    x_wanted: bool,
    mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in x (or an empty tensor), codewords and smoothing, from grad (B, K, D), fp32, of the encoding or mean.

    Memory traffic: x and dx once (x twice if D is wide), and 4 K (D + 1) bytes a program twice; L2 serves grad once a tile.
    """
    B, D, N = x.shape
    K = codewords.shape[0]
    dx = allocate_like(x, x_wanted)
    dcodewords, dsmoothing = codewords.new_empty((K, D)), smoothing.new_empty(smoothing.shape)
    if x.numel() == 0:
        return dx, dcodewords.zero_(), dsmoothing.zero_()
    x, grad, codewords, smoothing = make_readable(x), pack(grad), pack(codewords), pack(smoothing)
    key = make_key("backward" if x_wanted else "backward without dx", x, codewords, smoothing)
    plan = make_plan(key, x.device)
    tiles, row, count = ceil_div(N, plan.tiles.block_n), K * (D + 1), N if mean else 1
    stride_b, stride_d, stride_n = x.stride()
    with torch.cuda.device_of(x):
        weights = q = grad
        if plan.wide:
            weights, q, smoothing_rows = assign_wide(x, codewords, smoothing, plan, grad, count)
        options = {"WIDE": plan.wide, "DX": x_wanted, **plan.options}

        def list_arguments(rows: Tensor, share: int) -> tuple:
            return (
                *(x, codewords, smoothing, grad, weights, q, dx, rows),
                *(N, tiles, B, share, stride_b, stride_n, stride_d, count),
            )

        slots = count_slots(encode_bwd_kernel, key, list_arguments(grad, 1), options) // plan.blocks
        cost = estimate_partial_cost(K, plan.tiles.block_n, x.element_size())
        programs, share = split_images(1, B * tiles, max(1, slots), cost)  # a sum over the tiles of all images
        rows = x.new_empty((programs, row), dtype=torch.float32)
        encode_bwd_kernel[(plan.blocks * programs,)](*list_arguments(rows, share), **options)
        if not plan.wide:
            smoothing_rows = rows[:, K * D :]
        finish_bwd_kernel[(ceil_div(K * D, BLOCK) + 1,)](
            *(rows, smoothing_rows, weight_sum, grad, dcodewords, dsmoothing),
            *(programs, B * tiles if plan.wide else programs, K if plan.wide else row, B),
            *(D, K, smoothing.dim() == 0, BLOCK, choose_block(K), ROWS),
            **FUSED,
        )
    return dx, dcodewords, dsmoothing
