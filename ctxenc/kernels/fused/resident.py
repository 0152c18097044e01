"""What the resident forms of forward and backward share: tiles of x that lie in shared memory, copied there as they are by TMA."""

import triton
import triton.language as tl

from ctxenc.kernels.fused.operands import _INTERPRETED, dot, drop_bits


@triton.jit
def load_tile(d_x, b, start, channel, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_N: tl.constexpr):
    """Some channels of a tile (BLOCK_N, CHANNELS), zero beyond N and D."""
    if CHANNELS_LAST:
        x = d_x.load([b, start, channel]).reshape(BLOCK_N, CHANNELS)
    else:
        x = tl.trans(d_x.load([b, channel, start]).reshape(CHANNELS, BLOCK_N))
    if _INTERPRETED:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_tile(d_x, b, start, channel, x, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_N: tl.constexpr):
    """Writes fp32 values (BLOCK_N, CHANNELS) in bf16, where N and D allow."""
    if _INTERPRETED:  # which cuts where it should round
        x = drop_bits(x, 16)
    x = x.to(tl.bfloat16)
    if CHANNELS_LAST:
        d_x.store([b, start, channel], x.reshape(1, BLOCK_N, CHANNELS))
    else:
        d_x.store([b, channel, start], tl.trans(x).reshape(1, CHANNELS, BLOCK_N))


@triton.jit
def resident_nearness(
    x,
    high,
    low,
    bias,
    SHARED: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """-|x - d|^2, without |x|^2 where that cancels, (BLOCK_N, BLOCK_K); x and the codewords' two terms come in parts."""
    cross = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for part in tl.static_range(PARTS):
        cross = dot(x[part], high[part], cross, DOT)
    for part in tl.static_range(PARTS):
        cross = dot(x[part], low[part], cross, DOT)
    nearness = 2 * cross - bias[None, :]
    if not SHARED:
        o_n = tl.arange(0, BLOCK_N)
        products = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
        for part in tl.static_range(PARTS):
            products = dot(x[part], tl.trans(x[part]), products, DOT)
        nearness -= tl.sum(tl.where(o_n[:, None] == o_n[None, :], products, 0.0), 1)[:, None]
    return nearness
