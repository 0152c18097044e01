"""Handle maps with more channels than a program holds: one kernel assigns the pixels and stores the weights for the next.

The maps take K / D of the bytes of x. A weight is rounded to the operand precision of the next products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctxenc.kernels.fused.launch import Plan
from ctxenc.kernels.fused.steps import (
    _INTERPRETED,
    arrange,
    assume_aligned,
    differentiate_softmax,
    dot,
    find_center,
    find_nearness,
    find_scale,
    load_rows,
    load_smoothing,
    load_x,
    locate_image,
    prepare_codewords,
    round_operand,
    softmax,
)
from ctxenc.kernels.fused.tiles import ceil_div, choose_block

SIZES = ["p_x", "N", "tiles", "stride_b", "stride_n", "stride_d", "count"]


@triton.jit
def map_pointers(p_map, tile, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return pointers to a tile (BLOCK_N, BLOCK_K), int64, of a map padded to whole tiles."""
    return p_map + tile * BLOCK_N * BLOCK_K + tl.arange(0, BLOCK_N)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def load_map(p_map, tile, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load a tile of a map, as an operand."""
    value = tl.load(map_pointers(p_map, tile, BLOCK_N, BLOCK_K))
    if _INTERPRETED and value.dtype == tl.bfloat16:
        return value.to(tl.float32)
    else:
        return value


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def assign_kernel(
    p_x,  # (B, D, N)
    p_codewords,  # (K, D)
    p_smoothing,  # (K,) or ()
    p_grad,  # (B, K, D); unused in forward
    p_weights,  # (B, tiles, BLOCK_N, BLOCK_K), rounded
    p_q,  # the same, fp32: gradients in the logits; unused in forward
    p_dsmoothing,  # (B, tiles, K), fp32; unused in forward
    N, tiles, stride_b, stride_n, stride_d,
    count,  # divisor of grad
    D: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, LAYOUT: tl.constexpr, VECTOR: tl.constexpr, GRAD: tl.constexpr,
    DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    N, stride_n, stride_d = assume_aligned(N, stride_n, stride_d, LAYOUT, VECTOR)
    pid = tl.program_id(0).to(tl.int64)
    b, tile = pid // tiles, (pid % tiles).to(tl.int32)
    p_image = locate_image(p_x, b, stride_b, VECTOR)
    o_n, o_k = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    center = find_center(p_codewords, D, K, BLOCK_D, BLOCK_K)
    nearness = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    p = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first_d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        o_d = first_d + tl.arange(0, BLOCK_D)
        x = load_x(p_image, o_n, first_d, N, stride_n, stride_d, D, LAYOUT, VECTOR, BLOCK_D)
        x = arrange(x, o_n, N, LAYOUT, BLOCK_N, BLOCK_D).to(tl.float32)
        d, high, low, scale, bias, c, base, x_scale = prepare_codewords(p_codewords, center, o_d, o_k, D, K, DOT)
        operand = round_operand((x - base[None, :]) * x_scale, DOT)
        nearness += find_nearness(x, operand, high, low, scale / x_scale, bias, c, SHARED, DOT)
        if GRAD:
            grad = load_rows(p_grad + b * K * D, o_d, o_k, D, K) * (1.0 / count)
            grad_scale = find_scale(grad, DOT)
            grad = round_operand(grad / grad_scale, DOT)
            p -= tl.sum(d * grad.to(tl.float32), 0)[None, :] * grad_scale
            p -= dot(operand, grad, DOT) * (-grad_scale / x_scale)
    s = load_smoothing(p_smoothing, o_k, K, SHARED)
    weights = softmax(nearness, s, o_n < N, o_k < K)
    tl.store(map_pointers(p_weights, pid, BLOCK_N, BLOCK_K), round_operand(weights, DOT).to(p_weights.dtype.element_ty))
    if GRAD:
        q = differentiate_softmax(weights, p)
        tl.store(map_pointers(p_q, pid, BLOCK_N, BLOCK_K), q)
        tl.store(p_dsmoothing + pid * K + o_k, tl.sum(q * nearness, 0), mask=o_k < K)


def assign_wide(
    x: Tensor, codewords: Tensor, smoothing: Tensor, plan: Plan, grad: Tensor | None = None, count: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Assign the pixels of x (B, D, N). Given a gradient (over `count`), also compute q and each tile's gradient in the smoothing.

    Memory traffic: x once and the maps, 2 to 4 bytes a weight and 4 a q; L2 serves codewords and gradient once a tile.
    """
    B, _, N = x.shape
    K, block_n = codewords.shape[0], plan.tiles.block_n
    tiles = ceil_div(N, block_n)
    weights = x.new_empty((B, tiles, block_n, choose_block(K)))
    q = x.new_empty(weights.shape if grad is not None else 0, dtype=torch.float32)
    dsmoothing = x.new_empty((B, tiles, K) if grad is not None else 0, dtype=torch.float32)
    stride_b, stride_d, stride_n = x.stride()
    assign_kernel[(B * tiles,)](
        x,
        codewords,
        smoothing,
        q if grad is None else grad,
        weights,
        q,
        dsmoothing,
        N,
        tiles,
        stride_b,
        stride_n,
        stride_d,
        count,
        GRAD=grad is not None,
        **plan.options,
    )
    return weights, q, dsmoothing
