"""The fused pool: BatchNorm over the codewords, ReLU and the mean over the codewords, forward and backward as Triton kernels.

An encoding (B, K, C) becomes features (B, C). A codeword has B * C values. In training a first launch takes the moments of parts of
them, a second combines these in a fixed order and does the rest, running statistics included; evaluation takes one launch. Backward
takes two: sums of parts, and the gradients. No atomics: the same bits come out of every run, and the cut depends on sizes alone.
Arithmetic is fp32. There is no registered operator: functional.fuses_pool leaves all graphs to the plain expression.

EncNet (arXiv 1803.08904), section 3.1.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from ctxenc.kernels.fused.gate import store_rounded

PARTS = 32  # programs at most that share the values of a codeword: all later ones read what each has left
BLOCK = 1024  # values that one of them takes at a time
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # Triton 3.10 turns that default over

# One binary for all batches, wherever the tensors begin.
SIZES = ["values", "share", "parts"]
PARAMETERS = ["p_weight", "p_bias", "p_running_mean", "p_running_var", "p_tracked", "p_dfeatures"]


@triton.jit
def _offsets(i, K: tl.constexpr, C: tl.constexpr):
    """Offsets in (B, K, C) of values i = b * C + c of the first codeword."""
    return (i // C).to(tl.int64) * (K * C) + i % C


@triton.jit
def _load_parts(p_parts, o_k, parts, K: tl.constexpr, PARTS: tl.constexpr):
    """Both numbers of all parts of (K, parts, 2): two times (BLOCK_K, PARTS)."""
    o_p = tl.arange(0, PARTS)
    mask = (o_k < K)[:, None] & (o_p < parts)[None, :]
    pointers = p_parts + (o_k[:, None] * parts + o_p[None, :]) * 2
    return tl.load(pointers, mask=mask, other=0.0), tl.load(pointers + 1, mask=mask, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def pool_moments_kernel(
    p_encoding,  # (B, K, C), fp32
    p_moments,  # (K, parts, 2), fp32: the mean of a part, and the sum of squares about it
    values,  # of a codeword, B * C
    share,  # of them for a program, a multiple of BLOCK
    parts,  # programs of a codeword
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first, last = part * share, tl.minimum(part * share + share, values)
    total, squares = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(p_encoding + k * C + _offsets(i, K, C), mask=i < last, other=0.0)
    mean = tl.sum(total, 0) / (last - first)
    for start in range(first, last, BLOCK):  # mostly one step, whose values are still in L1
        i = start + tl.arange(0, BLOCK)
        away = tl.load(p_encoding + k * C + _offsets(i, K, C), mask=i < last, other=0.0) - mean
        squares += tl.where(i < last, away * away, 0.0)
    p_own = p_moments + tl.program_id(0) * 2
    tl.store(p_own, mean)
    tl.store(p_own + 1, tl.sum(squares, 0))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def pool_fwd_kernel(
    p_encoding,  # (B, K, C), fp32
    p_moments,  # (K, parts, 2), fp32
    p_weight,  # (K,), fp32, as the next three
    p_bias,
    p_running_mean,
    p_running_var,
    p_tracked,  # (), int64: batches seen
    p_statistics,  # (2, K), fp32: the mean and 1 / deviation that are taken, for backward
    p_features,  # (B, C)
    values,
    share,
    parts,
    K: tl.constexpr,
    C: tl.constexpr,
    TRAINING: tl.constexpr,
    MOMENTUM: tl.constexpr,  # None for the mean of all batches
    EPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    pid, o_k = tl.program_id(0), tl.arange(0, BLOCK_K)
    m_k = o_k < K
    if TRAINING:
        means, squares = _load_parts(p_moments, o_k, parts, K, PARTS)
        sizes = tl.minimum(tl.maximum(values - tl.arange(0, PARTS) * share, 0), share).to(tl.float32)[None, :]
        mean = tl.sum(means * sizes, 1) / values
        away = means - mean[:, None]
        squares = tl.sum(squares + sizes * away * away, 1)
        variance = squares / values
        if pid == 0:
            tracked = tl.load(p_tracked) + 1
            running_mean = tl.load(p_running_mean + o_k, mask=m_k)
            running_var = tl.load(p_running_var + o_k, mask=m_k)
            if MOMENTUM is None:
                factor = 1.0 / tracked.to(tl.float32)
            else:
                factor = MOMENTUM + 0.0
            tl.debug_barrier()  # all threads load, some store
            tl.store(p_tracked, tracked)
            tl.store(p_running_mean + o_k, (1 - factor) * running_mean + factor * mean, mask=m_k)
            tl.store(p_running_var + o_k, (1 - factor) * running_var + factor * (squares / (values - 1)), mask=m_k)
    else:
        mean = tl.load(p_running_mean + o_k, mask=m_k, other=0.0)
        variance = tl.load(p_running_var + o_k, mask=m_k, other=0.0)
    scale = tl.rsqrt(variance + EPS)
    if pid == 0:
        tl.store(p_statistics + o_k, mean, mask=m_k)
        tl.store(p_statistics + K + o_k, scale, mask=m_k)
    weight, bias = tl.load(p_weight + o_k, mask=m_k, other=0.0), tl.load(p_bias + o_k, mask=m_k, other=0.0)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    mask = m_k[:, None] & (i < values)[None, :]
    encoding = tl.load(p_encoding + o_k[:, None] * C + _offsets(i, K, C)[None, :], mask=mask, other=0.0)
    z = (encoding - mean[:, None]) * scale[:, None] * weight[:, None] + bias[:, None]
    y = tl.where((z < 0) | (o_k >= K)[:, None], 0.0, z)  # lets NaN through
    store_rounded(p_features + i, tl.sum(y, 0) * (1 / K), i < values)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def pool_sums_kernel(
    p_encoding,  # (B, K, C), fp32
    p_statistics,  # (2, K), fp32
    p_weight,
    p_bias,
    p_dfeatures,  # (B, C)
    p_sums,  # (K, parts, 2), fp32: of the gradient behind the norm, and of it times what is normalised
    values,
    share,
    parts,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first, last = part * share, tl.minimum(part * share + share, values)
    mean, scale = tl.load(p_statistics + k), tl.load(p_statistics + K + k)
    weight, bias = tl.load(p_weight + k), tl.load(p_bias + k)
    dz_sum, product = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        i = start + tl.arange(0, BLOCK)
        encoding = tl.load(p_encoding + k * C + _offsets(i, K, C), mask=i < last, other=0.0)
        dz = tl.load(p_dfeatures + i, mask=i < last, other=0.0).to(tl.float32) * (1 / K)
        normed = (encoding - mean) * scale
        dz = tl.where(normed * weight + bias <= 0, 0.0, dz)  # as torch's relu has it, NaN too
        dz_sum += dz
        product += dz * normed
    p_own = p_sums + tl.program_id(0) * 2
    tl.store(p_own, tl.sum(dz_sum, 0))
    tl.store(p_own + 1, tl.sum(product, 0))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def pool_bwd_kernel(
    p_encoding,  # (B, K, C), fp32
    p_statistics,  # (2, K), fp32
    p_weight,
    p_bias,
    p_dfeatures,  # (B, C)
    p_sums,  # (K, parts, 2), fp32
    p_dencoding,  # (B, K, C), fp32
    p_dparameters,  # (2, K), fp32: the gradients of weight and bias
    values,
    parts,
    K: tl.constexpr,
    C: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    pid, o_k = tl.program_id(0), tl.arange(0, BLOCK_K)
    m_k = o_k < K
    dbias, dweight = _load_parts(p_sums, o_k, parts, K, PARTS)
    dbias, dweight = tl.sum(dbias, 1), tl.sum(dweight, 1)
    if pid == 0:
        tl.store(p_dparameters + o_k, dweight, mask=m_k)
        tl.store(p_dparameters + K + o_k, dbias, mask=m_k)
    mean = tl.load(p_statistics + o_k, mask=m_k, other=0.0)[:, None]
    scale = tl.load(p_statistics + K + o_k, mask=m_k, other=0.0)[:, None]
    weight = tl.load(p_weight + o_k, mask=m_k, other=0.0)[:, None]
    bias = tl.load(p_bias + o_k, mask=m_k, other=0.0)[:, None]
    i = pid * BLOCK + tl.arange(0, BLOCK)
    mask = m_k[:, None] & (i < values)[None, :]
    offsets = o_k[:, None] * C + _offsets(i, K, C)[None, :]
    normed = (tl.load(p_encoding + offsets, mask=mask, other=0.0) - mean) * scale
    dz = tl.load(p_dfeatures + i, mask=i < values, other=0.0).to(tl.float32)[None, :] * (1 / K)
    dz = tl.where(normed * weight + bias <= 0, 0.0, dz)
    if TRAINING:
        dz -= (dbias[:, None] + normed * dweight[:, None]) / values
    tl.store(p_dencoding + offsets, dz * scale * weight, mask=mask)


def _cut(values: int) -> tuple[int, int]:
    """Values of a codeword that a program takes, and how many programs that makes."""
    share = -(-values // (BLOCK * PARTS)) * BLOCK
    return share, -(-values // share)


def _tile(K: int) -> dict[str, int]:
    """Of all codewords and some values: programs enough for small batches, and at most 32 values a thread. Not timed."""
    block_k = 1 << (K - 1).bit_length()
    return {"BLOCK_K": block_k, "BLOCK": max(16, min(64, 2048 // block_k)), "PARTS": PARTS, **OPTIONS}


def _forward(encoding: Tensor, norm: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features, and the statistics that they were normalised with; in training the norm's running statistics change."""
    B, K, C = encoding.shape
    share, parts = _cut(B * C)
    features, statistics = encoding.new_empty((B, C), dtype=dtype), encoding.new_empty((2, K))
    moments = encoding.new_empty((K, parts, 2)) if norm.training else statistics
    running = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    constants = {"K": K, "C": C, "TRAINING": norm.training, "MOMENTUM": norm.momentum, "EPS": norm.eps, **_tile(K)}
    with torch.cuda.device_of(encoding):
        if norm.training:
            pool_moments_kernel[(K * parts,)](
                encoding, moments, B * C, share, parts, K=K, C=C, BLOCK=BLOCK, num_warps=4
            )
            torch.autograd.graph.increment_version([tensor for tensor in running if tensor is not None])
        pool_fwd_kernel[(-(-B * C // constants["BLOCK"]),)](
            encoding, moments, norm.weight, norm.bias, *running, statistics, features, B * C, share, parts, **constants
        )
    return features, statistics


def _backward(
    dfeatures: Tensor, encoding: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, K, C = encoding.shape
    share, parts = _cut(B * C)
    inputs = encoding, statistics, weight, bias, dfeatures.contiguous()
    sums, dencoding, dparameters = (
        encoding.new_empty((K, parts, 2)),
        torch.empty_like(encoding),
        torch.empty_like(statistics),
    )
    constants = {"K": K, "C": C, "TRAINING": training, **_tile(K)}
    with torch.cuda.device_of(encoding):
        pool_sums_kernel[(K * parts,)](*inputs, sums, B * C, share, parts, K=K, C=C, BLOCK=BLOCK, **OPTIONS)
        pool_bwd_kernel[(-(-B * C // constants["BLOCK"]),)](
            *inputs, sums, dencoding, dparameters, B * C, parts, **constants
        )
    return dencoding, dparameters[0], dparameters[1]


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, encoding: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, dtype: torch.dtype
    ) -> Tensor:
        features, statistics = _forward(encoding, norm, dtype)
        ctx.save_for_backward(encoding, weight, bias, statistics)
        ctx.training, ctx.eps = norm.training, norm.eps
        return features

    @staticmethod
    def backward(ctx: Any, dfeatures: Tensor) -> tuple[Tensor | None, ...]:
        encoding, weight, bias, statistics = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *_backward(dfeatures, encoding, weight, bias, statistics, ctx.training), None, None
        # The gradient is to be differentiated itself: that of the plain expression.
        if ctx.training:
            z = F.batch_norm(encoding, None, None, weight, bias, True, 0.0, ctx.eps)
        else:
            mean, scale = statistics.unsqueeze(2)
            z = (encoding - mean) * scale * weight[:, None] + bias[:, None]
        features = z.relu().mean(1).to(dfeatures.dtype)
        wanted = [tensor for tensor in (encoding, weight, bias) if tensor.requires_grad]
        grads = iter(torch.autograd.grad(features, wanted, dfeatures, create_graph=True))
        return *(next(grads) if tensor.requires_grad else None for tensor in (encoding, weight, bias)), None, None


def pool(encoding: Tensor, norm: nn.BatchNorm2d, dtype: torch.dtype) -> Tensor:
    """Mean over the codewords of relu(norm(encoding)), of an encoding (B, K, C): (B, C) in the given dtype.

    The encoding and all of the norm are fp32, contiguous and on a GPU. In training the norm's running statistics change, and B * C
    must be more than 1.
    """
    return _Pool.apply(encoding, norm.weight, norm.bias, norm, dtype)


def example_problem(
    K: int, C: int, training: bool, device: torch.device | str, images: int | None = None
) -> tuple[Tensor, nn.BatchNorm2d, Tensor]:
    """An encoding, a norm and a gradient of the features, for a check on the device that the kernels are to serve.

    As many images as make programs take more than one step, and the last a ragged one. No value is near the kink of relu, where a
    rounding decides on a gradient.
    """
    generator = torch.Generator().manual_seed(0)
    B = images or BLOCK * PARTS // C + 7
    encoding, weight = (torch.randn(shape, generator=generator) for shape in ((B, K, C), (K, 1)))
    encoding, weight = encoding + 0.5 * encoding.sign(), weight + 0.5 * weight.sign()
    norm = nn.BatchNorm2d(K).train(training)
    norm.weight.data, norm.bias.data = weight[:, 0], 0.1 * weight[:, 0]
    norm.running_mean = weight[:, 0].clone()
    dfeatures = torch.randn((B, C), generator=generator).mul(8).round() / 8  # which half precision holds
    return (encoding + weight).to(device), norm.to(device), dfeatures.to(device)


def example_results(encoding: Tensor, norm: nn.BatchNorm2d, dfeatures: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Features, gradients of encoding, weight and bias, running mean and variance: from the kernels, in fp64 from torch.

    They may differ by 8 eps of fp32 of the largest value of each; features in half precision by half an eps of their own besides.
    """
    leaf, norm = encoding.detach().clone().requires_grad_(), copy.deepcopy(norm)
    if dtype == torch.float64:
        leaf, norm = leaf.detach().double().requires_grad_(), norm.double()
        features = norm(leaf.unsqueeze(3)).squeeze(3).relu().mean(1)
    else:
        features = pool(leaf, norm, dtype)
    grads = torch.autograd.grad(features, (leaf, norm.weight, norm.bias), dfeatures.to(dtype))
    return [features.detach(), *grads, norm.running_mean, norm.running_var]
