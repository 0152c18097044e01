"""What the kernels do with a tile of pixels: the walk over its channels, the softmax, the sums.

A program goes over the channels of a tile twice, in blocks: once for the assignment, once for the sums, which finds them in the L2
cache. What it sums up stays in registers where all channels fit one block, else in its own part of memory, which stays in L2 too.
"""

import triton
import triton.language as tl

from ctxenc.kernels.fused.operands import dot, load_operand, rounded


@triton.jit
def multiple(size, VECTOR: tl.constexpr):
    """The size, which is a multiple of VECTOR, in a form that the compiler sees it in; tl.multiple_of does nothing to arguments."""
    return size // VECTOR * VECTOR


@triton.jit
def image(p_x, b, stride_b, VECTOR: tl.constexpr):
    """The address of image b, a multiple of VECTOR elements."""
    return tl.multiple_of(p_x + b * stride_b, VECTOR * p_x.dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def offsets(o_n, o_d, stride_n, stride_d, CHANNELS_LAST: tl.constexpr):
    """Offsets (BLOCK_N, BLOCK_D) inside an image: one stride is 1, the other may need 64 bits."""
    if CHANNELS_LAST:
        return (o_n.to(tl.int64) * stride_n)[:, None] + o_d[None, :]
    else:
        return o_n[:, None] + (o_d.to(tl.int64) * stride_d)[None, :]


@triton.jit
def load_x(p_image, o_n, o_d, N, stride_n, stride_d, D: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Features (BLOCK_N, BLOCK_D) in fp32, zero beyond N and D."""
    o_x = offsets(o_n, o_d, stride_n, stride_d, CHANNELS_LAST)
    return tl.load(p_image + o_x, mask=(o_n < N)[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def add_channels(
    x, cross, squares, p_operands, p_centers, o_d, o_k, PADDED_D: tl.constexpr, SHARED: tl.constexpr, DOT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What some channels of a tile, in fp32, add to -x . d' and to |x'|^2; and they themselves as products take them.

    Products are subtracted from their sums. Triton lets one that adds to them itself run on into the next block of channels, where
    Triton 3.6 overwrites its left operand, in registers, while wgmma may still read it.
    """
    if not SHARED:
        shifted = x - tl.load(p_centers + o_d)[None, :]
        squares += tl.sum(shifted * shifted, 1)
    x = rounded(x - tl.load(p_centers + PADDED_D + o_d)[None, :], DOT)
    product = dot(x, load_operand(p_operands, o_d, o_k, PADDED_D), tl.zeros_like(cross), DOT)
    if DOT == "bf16" or DOT == "fp16":
        product = dot(x, load_operand(p_operands + BLOCK_K * PADDED_D, o_d, o_k, PADDED_D), product, DOT)
    return x, cross - product, squares


@triton.jit
def walk_channels(
    p_image, p_operands, p_image_grad, p_centers, bias, o_n, o_k, N, stride_n, stride_d,
    D: tl.constexpr, PADDED_D: tl.constexpr, SHARED: tl.constexpr, CHANNELS_LAST: tl.constexpr, GRAD: tl.constexpr,
    DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """For a tile: -|x - d|^2, without |x'|^2 where that cancels, and for backward x . grad; both (BLOCK_N, BLOCK_K)."""
    cross = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    p = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for block in tl.range(0, PADDED_D // BLOCK_D, num_stages=STAGES):
        o_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        x = load_x(p_image, o_n, o_d, N, stride_n, stride_d, D, CHANNELS_LAST)
        x, cross, squares = add_channels(
            x, cross, squares, p_operands, p_centers, o_d, o_k, PADDED_D, SHARED, DOT, BLOCK_K
        )
        if GRAD:
            p -= dot(x, load_operand(p_image_grad, o_d, o_k, PADDED_D), tl.zeros_like(p), DOT)
    nearness = -2 * cross - bias[None, :]
    if not SHARED:
        nearness -= squares[:, None]
    return nearness, -p


@triton.jit
def softmax(nearness, s, m_n, m_k):
    """Weights (BLOCK_N, BLOCK_K): over the codewords, of s * nearness; zero beyond N and K."""
    logits = tl.where(m_k[None, :], s[None, :] * nearness, float("-inf"))
    exp = tl.exp(logits - tl.max(logits, 1)[:, None])
    return tl.where(m_n[:, None], exp / tl.sum(exp, 1)[:, None], 0.0)


@triton.jit
def load_bias(p_bias, o_k, BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The sum over the blocks of channels, (BLOCK_K,)."""
    bias = tl.load(p_bias + o_k)
    for block in range(1, BLOCKS):
        bias += tl.load(p_bias + block * BLOCK_K + o_k)
    return bias


@triton.jit
def add_product(p_sums, o_d, o_k, x, weights, tiles_before, D: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr):
    """Adds x^T @ weights to some channels of a program's own sum (K, D); the first tile finds nothing there."""
    mask = (o_d < D)[:, None] & (o_k < K)[None, :]
    p_block = p_sums + o_k[None, :] * D + o_d[:, None]
    begun = (o_k * 0 + tiles_before > 0)[None, :]
    sums = tl.load(p_block, mask=mask & begun, other=0.0, volatile=True)  # never ahead of the store of the tile before
    tl.store(p_block, dot(tl.trans(x), weights, sums, DOT), mask=mask)


@triton.jit
def subtract_codewords(
    p_sums, sums, weight_sum, factor, p_codewords, p_base, first, last,
    D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns sums of weights times x into factor times those of residuals, for the blocks of channels from first to last.

    The sums are those given where all channels fit one block, else what the program has in memory.
    """
    o_k = tl.arange(0, BLOCK_K)
    tl.debug_barrier()  # the threads that read a sum need not be those that wrote it
    for block in range(first, last):
        o_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        o_sums, mask = o_k[None, :] * D + o_d[:, None], (o_d < D)[:, None] & (o_k < K)[None, :]
        if not ONE_BLOCK:
            sums = tl.load(p_sums + o_sums, mask=mask, other=0.0)
        d = tl.load(p_codewords + o_sums, mask=mask, other=0.0).to(tl.float32) - tl.load(p_base + o_d)[:, None]
        tl.store(p_sums + o_sums, factor[None, :] * (sums - weight_sum[None, :] * d), mask=mask)
