"""Define the operator's forward kernels and their launcher.

If a program holds all channels (64 of them at 32 codewords), one kernel does everything: it assigns the pixels of a tile and adds
up their residuals while the next tile is copied. Wider maps take two kernels: one assigns (wide.py), this one adds up.

Deep TEN (arXiv 1612.02844), section 3.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctxenc.kernels.fused.launch import FUSED, Key, Plan, count_slots, make_key, make_plan, make_readable, pack
from ctxenc.kernels.fused.steps import (
    arrange,
    assume_aligned,
    dot,
    find_center,
    find_nearness,
    load_smoothing,
    load_tile,
    prepare_codewords,
    round_operand,
    softmax,
)
from ctxenc.kernels.fused.tiles import ceil_div, estimate_partial_cost, split_images
from ctxenc.kernels.fused.wide import assign_wide, load_map

SIZES = [
    "p_x",
    "p_weight_sum",
    "N",
    "tiles",
    "share",
    "splits",
    "stride_b",
    "stride_n",
    "stride_d",
    "row_e",
    "row_w",
    "count",
]
BLOCK = 256  # elements per program of the finishing kernel


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def encode_fwd_kernel(
    p_x,  # (B, D, N)
    p_codewords,  # (K, D)
    p_smoothing,  # (K,) or ()
    p_map,  # (B, tiles, BLOCK_N, BLOCK_K): weights, if WIDE
    p_encoding,  # (B, splits, K, D), fp32
    p_weight_sum,  # (B, splits, K), fp32: sums of the weights over pixels
    N,
    tiles,  # tiles of BLOCK_N pixels per image
    share,  # tiles per program
    splits,  # programs per image
    stride_b, stride_n, stride_d,
    row_e,  # strides from one split to the next
    row_w,
    count,  # divisor of both results: N for means, else 1
    D: tl.constexpr, K: tl.constexpr,
    SHARED: tl.constexpr,  # one smoothing factor for all codewords: |x'|^2 cancels
    LAYOUT: tl.constexpr,  # "last" or "first": channels or pixels are contiguous; "run": a whole image is, channels first
    VECTOR: tl.constexpr,  # divides the address, the strides and N (in a run, D * N), in elements
    WIDE: tl.constexpr,  # a program takes one block of channels, and reads the weights from p_map
    DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    N, stride_n, stride_d = assume_aligned(N, stride_n, stride_d, LAYOUT, VECTOR)
    block, row = tl.program_id(0) % BLOCKS, (tl.program_id(0) // BLOCKS).to(tl.int64)
    first = row // splits * tiles + row % splits * share
    last = tl.minimum(first + share, row // splits * tiles + tiles)
    o_k, o_d = tl.arange(0, BLOCK_K), block * BLOCK_D + tl.arange(0, BLOCK_D)
    m_k = o_k < K
    s = load_smoothing(p_smoothing, o_k, K, SHARED)
    center = find_center(p_codewords, D, K, BLOCK_D, BLOCK_K)
    d, high, low, scale, bias, c, base, x_scale = prepare_codewords(p_codewords, center, o_d, o_k, D, K, DOT)
    sums = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    weight_sum = tl.zeros((BLOCK_K,), tl.float32)
    first_d = block * BLOCK_D
    loaded = load_tile(
        p_x, first, last, tiles, first_d, N, stride_b, stride_n, stride_d, D, LAYOUT, VECTOR, BLOCK_N, BLOCK_D
    )
    for tile in tl.range(first, last, num_stages=1, disable_licm=True):
        # Load before the products of this tile, so that the copy overlaps them.
        ahead = load_tile(
            p_x, tile + 1, last, tiles, first_d, N, stride_b, stride_n, stride_d, D, LAYOUT, VECTOR, BLOCK_N, BLOCK_D
        )
        o_n = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        x = arrange(loaded, o_n, N, LAYOUT, BLOCK_N, BLOCK_D).to(tl.float32)
        operand = round_operand((x - base[None, :]) * x_scale, DOT)
        if WIDE:
            weights = load_map(p_map, tile, BLOCK_N, BLOCK_K)
        else:
            nearness = find_nearness(x, operand, high, low, scale / x_scale, bias, c, SHARED, DOT)
            weights = round_operand(softmax(nearness, s, o_n < N, m_k), DOT)
        weight_sum += tl.sum(weights.to(tl.float32), 0)
        sums -= dot(tl.trans(operand), weights, DOT)
        loaded = ahead
    weight_sum *= 1.0 / count
    residuals = sums * (-1.0 / count) / x_scale - weight_sum[None, :] * d
    p_row = p_encoding + row * row_e
    tl.store(p_row + o_k[None, :] * D + o_d[:, None], residuals, mask=(o_d < D)[:, None] & m_k[None, :])
    tl.store(p_weight_sum + row * row_w + o_k, weight_sum, mask=m_k & (block == 0))


@triton.jit(do_not_specialize=["rows"])
def finish_fwd_kernel(
    p_rows,  # (B, rows, K D + K), fp32
    p_encoding,  # (B, K, D), fp32
    p_weight_sum,  # (B, K), fp32
    rows, KD: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the sums of all splits of an image in order."""
    BLOCKS: tl.constexpr = (KD + K + BLOCK - 1) // BLOCK
    b = (tl.program_id(0) // BLOCKS).to(tl.int64)
    o = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(rows):
        total += tl.load(p_rows + (b * rows + row) * (KD + K) + o, mask=o < KD + K, other=0.0)
    tl.store(p_encoding + b * KD + o, total, mask=o < KD)
    tl.store(p_weight_sum + b * K + o - KD, total, mask=(o >= KD) & (o < KD + K))


def launch_and_add(
    kernel: Any, key: Key, plan: Plan, inputs: tuple[Tensor, ...], options: dict[str, Any], mean: bool
) -> tuple[Tensor, Tensor]:
    """Launch a forward kernel with several programs per image, and add their sums or, for a mean, their shares.

    Returns:
        The encoding (B, K, D) and the sums of the weights over pixels (B, K), both fp32.
    """
    x = inputs[0]
    (B, _, N), (K, D) = x.shape, (key.K, key.D)
    tiles, row, count = ceil_div(N, plan.tiles.block_n), K * (D + 1), N if mean else 1
    stride_b, stride_d, stride_n = x.stride()
    encoding, weight_sum = x.new_empty((B, K, D), dtype=torch.float32), x.new_empty((B, K), dtype=torch.float32)
    with torch.cuda.device_of(x):
        one = (*inputs, encoding, weight_sum, N, tiles, tiles, 1, stride_b, stride_n, stride_d, K * D, K, count)
        slots = max(1, count_slots(kernel, key, one, options) // plan.blocks)
        splits, share = split_images(B, tiles, slots, estimate_partial_cost(K, plan.tiles.block_n, x.element_size()))
        if splits == 1:
            kernel[(plan.blocks * B,)](*one, **options)
            return encoding, weight_sum
        rows = x.new_empty(B * splits * row, dtype=torch.float32)
        several = (*inputs, rows, rows[K * D :], N, tiles, share, splits, stride_b, stride_n, stride_d, row, row, count)
        kernel[(plan.blocks * B * splits,)](*several, **options)
        finish_fwd_kernel[(B * ceil_div(row, BLOCK),)](rows, encoding, weight_sum, splits, K * D, K, BLOCK, **FUSED)
    return encoding, weight_sum


def encode_forward(x: Tensor, codewords: Tensor, smoothing: Tensor, mean: bool = False) -> tuple[Tensor, Tensor]:
    """Encode x (B, D, N): the encoding (B, K, D) and the sums of the weights over pixels (B, K), both fp32; or their means.

    Memory traffic: x once (twice if D is wide) and 4 K (D + 1) bytes an image; with several splits, as many bytes a split, twice.
    """
    if x.numel() == 0:
        (B, _, _), (K, D) = x.shape, codewords.shape
        return x.new_zeros((B, K, D), dtype=torch.float32), x.new_zeros((B, K), dtype=torch.float32)
    x, codewords, smoothing = make_readable(x), pack(codewords), pack(smoothing)
    key = make_key("forward", x, codewords, smoothing)
    plan = make_plan(key, x.device)
    with torch.cuda.device_of(x):
        weights = assign_wide(x, codewords, smoothing, plan)[0] if plan.wide else codewords
    options = {"WIDE": plan.wide, **plan.options}
    return launch_and_add(encode_fwd_kernel, key, plan, (x, codewords, smoothing, weights), options, mean)
