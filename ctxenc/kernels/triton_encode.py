"""The fused path of the operator: forward and backward as Triton kernels that keep the weights in registers.

With c the codeword nearest to the mean of all, x' = x - c and d' = d - c, as in torch_encode.py. A program walks tiles of
BLOCK_N pixels and goes over the channels of a tile twice: once for the assignment, once for the sums, which finds them in a
cache. What it sums up stays in registers where all channels fit one block, else in its own part of memory, small enough for
the L2 cache. The sums of all programs are added in a fixed order. No N x K is written; the same bits come out of every run.

The tensor cores get x minus a base near c. In fp32 the base is c, and a product has three terms of tf32. Half precision goes in
as it is, with base 0, which makes products with d' in two terms nearly exact; only where the offset of a channel is many times
the spread of its codewords is the base c, rounded. fp16 is widened to tf32, which holds it exactly: gradients under loss scaling
leave the range of fp16.

Deep TEN (arXiv 1612.02844), section 3.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctxenc.kernels.triton_operands import (
    _INTERPRETED,
    INTERPRETED,
    dot,
    drop_bits,
    load_operand,
    prepare_codewords_kernel,
    prepare_grad_kernel,
    rounded,
)
from ctxenc.kernels.triton_tiles import Tiles, backward_tiles, forward_tiles

# One binary for all sizes: how x is aligned is the explicit constexpr VECTOR.
SIZES = ["p_x", "N", "tiles", "splits", "programs", "groups", "stride_b", "stride_n", "stride_d"]


@triton.jit
def _load_x(p_image, o_n, o_d, N, stride_n, stride_d, D: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Features (BLOCK_N, BLOCK_D) in fp32, zero beyond N and D."""
    offsets = _offsets(o_n, o_d, stride_n, stride_d, CHANNELS_LAST)
    return tl.load(p_image + offsets, mask=(o_n < N)[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _multiple(size, VECTOR: tl.constexpr):
    """The size, which is a multiple of VECTOR, in a form that the compiler sees it in; tl.multiple_of does nothing to arguments."""
    return size // VECTOR * VECTOR


@triton.jit
def _offsets(o_n, o_d, stride_n, stride_d, CHANNELS_LAST: tl.constexpr):
    """Offsets (BLOCK_N, BLOCK_D) inside an image: one stride is 1, the other may need 64 bits."""
    if CHANNELS_LAST:
        return (o_n.to(tl.int64) * stride_n)[:, None] + o_d[None, :]
    else:
        return o_n[:, None] + (o_d.to(tl.int64) * stride_d)[None, :]


@triton.jit
def _walk_channels(
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
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    SHARED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GRAD: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """For a tile: -|x - d|^2, without |x'|^2 where that cancels, and for backward x . grad; both (BLOCK_N, BLOCK_K)."""
    cross = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    p = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for block in tl.range(0, PADDED_D // BLOCK_D, num_stages=STAGES):
        o_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        x = _load_x(p_image, o_n, o_d, N, stride_n, stride_d, D, CHANNELS_LAST)
        if not SHARED:
            shifted = x - tl.load(p_centers + o_d)[None, :]
            squares += tl.sum(shifted * shifted, 1)
        x = rounded(x - tl.load(p_centers + PADDED_D + o_d)[None, :], DOT)
        cross = dot(x, load_operand(p_operands, o_d, o_k, PADDED_D), cross, DOT)
        if DOT == "bf16" or DOT == "fp16":
            cross = dot(x, load_operand(p_operands + BLOCK_K * PADDED_D, o_d, o_k, PADDED_D), cross, DOT)
        if GRAD:
            p = dot(x, load_operand(p_image_grad, o_d, o_k, PADDED_D), p, DOT)
    nearness = 2 * cross - bias[None, :]
    if not SHARED:
        nearness -= squares[:, None]
    return nearness, p


@triton.jit
def _add_product(p_sums, o_d, o_k, x, weights, D: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr):
    """Adds x^T @ weights to some channels of a program's own sum (K, D), which stays in the L2 cache."""
    mask = (o_d < D)[:, None] & (o_k < K)[None, :]
    p_block = p_sums + o_k[None, :] * D + o_d[:, None]
    sums = tl.load(p_block, mask=mask, other=0.0, volatile=True)  # never ahead of the store of the tile before
    tl.store(p_block, dot(tl.trans(x), weights, sums, DOT), mask=mask)


@triton.jit
def _weights(nearness, s, m_n, m_k):
    """Softmax over the codewords of s * nearness, zero beyond N and K."""
    logits = tl.where(m_k[None, :], s[None, :] * nearness, float("-inf"))
    exp = tl.exp(logits - tl.max(logits, 1)[:, None])
    return tl.where(m_n[:, None], exp / tl.sum(exp, 1)[:, None], 0.0)


@triton.jit
def _load_bias(p_bias, o_k, BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The sum over the blocks of channels, (BLOCK_K,)."""
    bias = tl.load(p_bias + o_k)
    for block in range(1, BLOCKS):
        bias += tl.load(p_bias + block * BLOCK_K + o_k)
    return bias


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def encode_fwd_kernel(
    p_x,  # (B, D, N)
    p_codewords,  # (K, D)
    p_smoothing,  # (K,) or ()
    p_operands,  # as prepared
    p_centers,
    p_bias,
    p_encoding,  # (B, splits, K, D), fp32
    p_weight_sum,  # (B, splits, K), fp32: sum of the weights over pixels
    N,
    tiles,  # of BLOCK_N pixels in an image
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
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCKS: tl.constexpr = PADDED_D // BLOCK_D
    if CHANNELS_LAST:
        stride_n = _multiple(stride_n, VECTOR)
    else:
        stride_d, N = _multiple(stride_d, VECTOR), _multiple(N, VECTOR)
    pid = tl.program_id(0)
    group, split, b = pid % groups, (pid // groups % splits).to(tl.int64), (pid // groups // splits).to(tl.int64)
    p_image = tl.multiple_of(p_x + b * stride_b, VECTOR * p_x.dtype.element_ty.primitive_bitwidth // 8)
    o_k, o_block = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    m_k = o_k < K
    s = tl.load(p_smoothing + (o_k * 0 if SHARED else o_k), mask=m_k, other=0.0).to(tl.float32)
    bias = _load_bias(p_bias, o_k, BLOCKS, BLOCK_K)

    weight_sum = tl.zeros((BLOCK_K,), tl.float32)
    sums = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    row = b * splits + split
    p_sums = p_encoding + row * K * D
    first, last = (split * tiles // splits).to(tl.int32), ((split + 1) * tiles // splits).to(tl.int32)
    for tile in range(first, last):
        o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        nearness, _ = _walk_channels(
            p_image,
            p_operands,
            p_operands,  # no gradient
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
            False,
            DOT,
            BLOCK_N,
            BLOCK_D,
            BLOCK_K,
            STAGES,
        )
        weights = rounded(_weights(nearness, s, o_n < N, m_k), DOT)
        weight_sum += tl.sum(weights.to(tl.float32), 0)
        for block in tl.range(group * BLOCKS // groups, (group + 1) * BLOCKS // groups, num_stages=STAGES):
            o_d = block * BLOCK_D + o_block
            x = _load_x(p_image, o_n, o_d, N, stride_n, stride_d, D, CHANNELS_LAST)
            x = rounded(x - tl.load(p_centers + PADDED_D + o_d)[None, :], DOT)
            if BLOCKS == 1:
                sums = dot(tl.trans(x), weights, sums, DOT)
            else:
                _add_product(p_sums, o_d, o_k, x, weights, D, K, DOT)

    for block in range(group * BLOCKS // groups, (group + 1) * BLOCKS // groups):
        o_d = block * BLOCK_D + o_block
        o_sums, mask = o_k[None, :] * D + o_d[:, None], (o_d < D)[:, None] & m_k[None, :]
        if BLOCKS > 1:
            sums = tl.load(p_sums + o_sums, mask=mask, other=0.0)
        d = tl.load(p_codewords + o_sums, mask=mask, other=0.0).to(tl.float32)
        d -= tl.load(p_centers + PADDED_D + o_d)[:, None]
        tl.store(p_sums + o_sums, sums - weight_sum[None, :] * d, mask=mask)
    if group == 0:
        tl.store(p_weight_sum + row * K + o_k, weight_sum, mask=m_k)


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
    programs,  # they share the tiles of all images
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
        stride_n = _multiple(stride_n, VECTOR)
    else:
        stride_d, N = _multiple(stride_d, VECTOR), _multiple(N, VECTOR)
    pid = tl.program_id(0)
    group, program = pid % groups, (pid // groups).to(tl.int64)
    o_k, o_block = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    m_k = o_k < K
    s = tl.load(p_smoothing + (o_k * 0 if SHARED else o_k), mask=m_k, other=0.0).to(tl.float32)
    bias = _load_bias(p_bias, o_k, BLOCKS, BLOCK_K)

    q_sum = tl.zeros((BLOCK_K,), tl.float32)
    dsmoothing = tl.zeros((BLOCK_K,), tl.float32)
    sums = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    p_sums = p_dcodewords + program * K * D
    total = B.to(tl.int64) * tiles
    first, last = program * total // programs, (program + 1) * total // programs
    for tile in range(first, last):
        b = tile // tiles
        p_image = tl.multiple_of(p_x + b * stride_b, VECTOR * p_x.dtype.element_ty.primitive_bitwidth // 8)
        p_image_grad = p_grad + b * BLOCK_K * PADDED_D
        o_n = (tile % tiles).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        nearness, p = _walk_channels(
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
        weights = _weights(nearness, s, m_n, m_k)
        p -= tl.load(p_product + b * BLOCK_K + o_k)[None, :]
        q = weights * (p - tl.sum(weights * p, 1)[:, None])  # dL/d(logits)
        dsmoothing += tl.sum(q * nearness, 0)
        pull = 2 * tl.sum(q * s[None, :], 1)  # 0 where s is shared
        sq = rounded(2 * q * s[None, :], DOT)
        q, weights = rounded(q, DOT), rounded(weights, DOT)
        q_sum += tl.sum(q.to(tl.float32), 0)
        for block in tl.range(group * BLOCKS // groups, (group + 1) * BLOCKS // groups, num_stages=STAGES):
            o_d = block * BLOCK_D + o_block
            x = _load_x(p_image, o_n, o_d, N, stride_n, stride_d, D, CHANNELS_LAST)
            if DX:
                dx = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
                dx = dot(weights, tl.trans(load_operand(p_image_grad, o_d, o_k, PADDED_D)), dx, DOT)
                dx = dot(sq, tl.trans(load_operand(p_operands, o_d, o_k, PADDED_D)), dx, DOT)
                if not SHARED:
                    dx -= pull[:, None] * (x - tl.load(p_centers + o_d)[None, :])
                if _INTERPRETED and p_dx.dtype.element_ty == tl.bfloat16:
                    dx = drop_bits(dx, 16)
                p_out = p_dx + b * D * N + _offsets(o_n, o_d, D, N, CHANNELS_LAST)
                tl.store(p_out, dx.to(p_dx.dtype.element_ty), mask=m_n[:, None] & (o_d < D)[None, :])
            x = rounded(x - tl.load(p_centers + PADDED_D + o_d)[None, :], DOT)
            if BLOCKS == 1:
                sums = dot(tl.trans(x), q, sums, DOT)
            else:
                _add_product(p_sums, o_d, o_k, x, q, D, K, DOT)

    for block in range(group * BLOCKS // groups, (group + 1) * BLOCKS // groups):
        o_d = block * BLOCK_D + o_block
        o_sums, mask = o_k[None, :] * D + o_d[:, None], (o_d < D)[:, None] & m_k[None, :]
        if BLOCKS > 1:
            sums = tl.load(p_sums + o_sums, mask=mask, other=0.0)
        d = tl.load(p_codewords + o_sums, mask=mask, other=0.0).to(tl.float32)
        d -= tl.load(p_centers + PADDED_D + o_d)[:, None]
        tl.store(p_sums + o_sums, 2 * s[None, :] * (sums - q_sum[None, :] * d), mask=mask)
    if group == 0:
        tl.store(p_dsmoothing + program * K + o_k, dsmoothing, mask=m_k)


def _precision(dtype: torch.dtype) -> str:
    """How products are taken: "bf16", "fp16" (as tf32), or fp32's input_precision, as torch's own setting wants it."""
    if dtype == torch.bfloat16:
        return "bf16"
    if torch.version.hip:  # has fp32 matrix instructions, and no tf32
        return "ieee"
    if dtype == torch.float16:
        return "fp16"
    matmul = torch.backends.cuda.matmul  # of the two settings, the old one raises where the new one was used
    setting = getattr(matmul, "fp32_precision", None) or ("tf32" if matmul.allow_tf32 else "ieee")
    return "tf32" if setting == "tf32" else "tf32x3"


class _Launch:
    """What forward and backward share: the constants of a launch, and the prepared codewords."""

    def __init__(self, x: Tensor, codewords: Tensor, smoothing: Tensor, tiles: Tiles):
        self.B, self.D, self.N = x.shape
        self.K = codewords.shape[0]
        self.channels_last = is_channels_last(x)
        if not self.channels_last and x.stride(2) != 1 and self.N > 1:
            x = x.contiguous()  # no unit stride
        self.x, self.codewords, self.smoothing = x, codewords.contiguous(), smoothing.contiguous()
        self.tiles, self.tiles_per_image = tiles, triton.cdiv(self.N, tiles.block_n)
        self.block_k = max(16, triton.next_power_of_2(self.K))
        self.blocks = triton.cdiv(self.D, tiles.block_d)
        self.padded = self.blocks * tiles.block_d
        self.shape = {
            "D": self.D,
            "K": self.K,
            "PADDED_D": self.padded,
            "DOT": _precision(x.dtype),
            "BLOCK_D": tiles.block_d,
            "BLOCK_K": self.block_k,
        }
        self.operands, self.centers, self.bias = self._prepare()

    def _prepare(self) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.bfloat16 if self.x.dtype == torch.bfloat16 else torch.float32
        operands = self.x.new_empty((2, self.block_k, self.padded), dtype=dtype)
        centers = self.x.new_empty((2, self.padded), dtype=torch.float32)
        bias = self.x.new_empty((self.blocks, self.block_k), dtype=torch.float32)
        prepare_codewords_kernel[(self.blocks,)](self.codewords, operands, centers, bias, **self.shape, **FUSED)
        return operands, centers, bias

    def prepare_grad(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        operands = self.operands.new_empty((self.B, self.block_k, self.padded))
        product = self.bias.new_empty((self.B, self.block_k))
        prepare_grad_kernel[(self.B,)](
            grad, self.codewords, self.centers, operands, product, *grad.stride(), **self.shape, **FUSED
        )
        return operands, product

    def sizes(self, programs: int, groups: int) -> tuple[int, ...]:
        stride_b, stride_d, stride_n = self.x.stride()
        return self.N, self.tiles_per_image, programs, groups, stride_b, stride_n, stride_d

    def sums(self, *shape: int) -> Tensor:
        """Room for the sums of every program: they start from 0 where they are kept there between tiles."""
        return (torch.zeros if self.blocks > 1 else torch.empty)(shape, dtype=torch.float32, device=self.x.device)

    def options(self) -> dict[str, Any]:
        return {
            **self.shape,
            "SHARED": self.smoothing.dim() == 0,
            "CHANNELS_LAST": self.channels_last,
            "VECTOR": vector(self.x, self.channels_last),
            "BLOCK_N": self.tiles.block_n,
            "STAGES": self.tiles.stages,
            "num_warps": self.tiles.warps,
            "num_stages": self.tiles.stages,
            **FUSED,
        }


FUSED = {"enable_fp_fusion": True}  # Triton 3.10 turns its default over


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of x (B, D, N) are what lies together."""
    return x.shape[1] > 1 and x.stride(1) == 1


def vector(x: Tensor, channels_last: bool) -> int:
    """Elements of 16 bytes where every row of x begins at a multiple of 16 bytes, else 1."""
    elements = 16 // x.element_size()
    row = [x.stride(2)] if channels_last else [x.stride(1), x.shape[2]]
    return elements if all(size % elements == 0 for size in (x.stride(0), *row)) and x.data_ptr() % 16 == 0 else 1


def _forward(x: Tensor, codewords: Tensor, smoothing: Tensor) -> tuple[Tensor, Tensor]:
    B, D, _ = x.shape
    K = codewords.shape[0]
    if x.numel() == 0:
        return x.new_zeros((B, K, D), dtype=torch.float32), x.new_zeros((B, K), dtype=torch.float32)
    tiles, splits, groups = forward_tiles(x, K)
    with torch.cuda.device_of(x):
        launch = _Launch(x, codewords, smoothing, tiles)
        encoding = launch.sums(B, splits, K, D)
        weight_sum = x.new_empty((B, splits, K), dtype=torch.float32)
        encode_fwd_kernel[(groups * splits * B,)](
            launch.x,
            launch.codewords,
            launch.smoothing,
            launch.operands,
            launch.centers,
            launch.bias,
            encoding,
            weight_sum,
            *launch.sizes(splits, groups),
            **launch.options(),
        )
    if splits == 1:
        return encoding.squeeze(1), weight_sum.squeeze(1)
    return encoding.sum(1), weight_sum.sum(1)


def _backward(
    grad: Tensor, x: Tensor, codewords: Tensor, smoothing: Tensor, weight_sum: Tensor, x_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, D, _ = x.shape
    K = codewords.shape[0]
    dx = _empty_dx(x, x_wanted)
    if x.numel() == 0:
        return dx, torch.zeros_like(codewords), torch.zeros_like(smoothing)
    tiles, programs, groups = backward_tiles(x, K)
    with torch.cuda.device_of(x):
        launch = _Launch(x, codewords, smoothing, tiles)
        grad_operands, product = launch.prepare_grad(grad)
        dcodewords = launch.sums(programs, K, D)
        dsmoothing = x.new_empty((programs, K), dtype=torch.float32)
        encode_bwd_kernel[(groups * programs,)](
            launch.x,
            launch.codewords,
            launch.smoothing,
            launch.operands,
            launch.centers,
            launch.bias,
            grad_operands,
            product,
            dx,
            dcodewords,
            dsmoothing,
            *launch.sizes(programs, groups),
            B,
            DX=x_wanted,
            **launch.options(),
        )
    total = dcodewords.sum(0) - (weight_sum.unsqueeze(2) * grad).sum(0)
    ds = dsmoothing.sum(0) if smoothing.dim() else dsmoothing.sum()
    return dx, total.to(codewords.dtype), ds.to(smoothing.dtype)


def _empty_dx(x: Tensor, wanted: bool) -> Tensor:
    """Room for the gradient in x, dense, in the layout of x; none where it is not wanted."""
    if not wanted:
        return x.new_empty(0)
    B, D, N = x.shape
    return x.new_empty((B, N, D)).transpose(1, 2) if is_channels_last(x) else x.new_empty((B, D, N))


_DEVICES = ("cuda", "cpu") if INTERPRETED else "cuda"


@torch.library.custom_op("ctxenc::encode", mutates_args=(), device_types=_DEVICES)
def _encode_op(x: Tensor, codewords: Tensor, smoothing: Tensor) -> tuple[Tensor, Tensor]:
    return _forward(x, codewords, smoothing)


@_encode_op.register_fake
def _(x: Tensor, codewords: Tensor, smoothing: Tensor) -> tuple[Tensor, Tensor]:
    B, K, D = x.shape[0], *codewords.shape
    return x.new_empty((B, K, D), dtype=torch.float32), x.new_empty((B, K), dtype=torch.float32)


@torch.library.custom_op("ctxenc::encode_backward", mutates_args=(), device_types=_DEVICES)
def _encode_backward_op(
    grad: Tensor, x: Tensor, codewords: Tensor, smoothing: Tensor, weight_sum: Tensor, x_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(grad, x, codewords, smoothing, weight_sum, x_wanted)


@_encode_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, codewords: Tensor, smoothing: Tensor, weight_sum: Tensor, x_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_dx(x, x_wanted), torch.empty_like(codewords), torch.empty_like(smoothing)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
    x_wanted = ctx.needs_input_grad[0]
    dx, dcodewords, dsmoothing = _encode_backward_op(grad, *ctx.saved_tensors, x_wanted)
    return dx if x_wanted else None, dcodewords, dsmoothing


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        'encode: the Triton path has no second derivatives; take backend="torch" or ctxenc.use_backend("torch")'
    )


_encode_op.register_autograd(_gradients, setup_context=_save)
_encode_backward_op.register_autograd(_no_second_derivative)


def encode(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """Encoding of x (B, D, N) on codewords (K, D) with smoothing (K,) or (): (B, K, D), fp32.

    fp32, fp16 and bf16 on a GPU, any strides: read where it lies if one stride is 1, copied otherwise. D up to 4096, K up to 256.
    """
    return _encode_op(x, codewords, smoothing)[0]
