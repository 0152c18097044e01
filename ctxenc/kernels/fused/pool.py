"""Define the fused pool: BatchNorm over the codewords, ReLU and the mean over the codewords, forward and backward in Triton.

An encoding (B, K, C) becomes features (B, C). A codeword has B * C values. In training, a first launch computes the moments of
parts of them; a second combines these in a fixed order and does the rest, running statistics included. Evaluation takes one launch.
Backward takes two: sums of parts, and the gradients. Without atomics, and with a cut by sizes alone, every run gives the same bits.
Arithmetic is fp32. There is no registered operator: functional.can_fuse_pool leaves all graphs to the plain expression. The kernels
prove themselves like the others (verdicts.py).

EncNet (arXiv 1803.08904), section 3.1.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ctxenc.kernels.fused import proof
from ctxenc.kernels.fused.encode import differentiate, needs_torch_ops
from ctxenc.kernels.fused.steps import store_rounded
from ctxenc.kernels.fused.tiles import ceil_div
from ctxenc.kernels.verdicts import Arguments, Constants, Operator

PARTS = 32  # most programs per codeword; each later program reads all their sums
BLOCK = 1024  # values per step of a program
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # Triton 3.10 flips that default

OFFSET = 30.0  # of the codewords in a proof: a variance by the mean square would lose digits

# One binary for all batches and alignments.
SIZES = ["values", "share", "parts"]
PARAMETERS = ["p_weight", "p_bias", "p_running_mean", "p_running_var", "p_tracked", "p_dfeatures"]


@triton.jit
def _compute_offsets(i, K: tl.constexpr, C: tl.constexpr):
    """Return offsets in (B, K, C) of values i = b * C + c of the first codeword."""
    return (i // C).to(tl.int64) * (K * C) + i % C


@triton.jit
def _load_parts(p_parts, o_k, parts, K: tl.constexpr, PARTS: tl.constexpr):
    """Load both numbers of all parts of (K, parts, 2): two times (BLOCK_K, PARTS)."""
    o_p = tl.arange(0, PARTS)
    mask = (o_k < K)[:, None] & (o_p < parts)[None, :]
    pointers = p_parts + (o_k[:, None] * parts + o_p[None, :]) * 2
    return tl.load(pointers, mask=mask, other=0.0), tl.load(pointers + 1, mask=mask, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def pool_moments_kernel(
    p_encoding,  # (B, K, C), fp32
    p_moments,  # (K, parts, 2), fp32: the mean of a part, and the sum of squares about it
    values,  # values per codeword, B * C
    share,  # values per program, a multiple of BLOCK
    parts,  # programs per codeword
    K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first, last = part * share, tl.minimum(part * share + share, values)
    total, squares = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for begin in range(first, last, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        total += tl.load(p_encoding + k * C + _compute_offsets(i, K, C), mask=i < last, other=0.0)
    mean = tl.sum(total, 0) / (last - first)
    for begin in range(first, last, BLOCK):  # usually one step; its values are still in L1
        i = begin + tl.arange(0, BLOCK)
        away = tl.load(p_encoding + k * C + _compute_offsets(i, K, C), mask=i < last, other=0.0) - mean
        squares += tl.where(i < last, away * away, 0.0)
    p_part = p_moments + tl.program_id(0) * 2
    tl.store(p_part, mean)
    tl.store(p_part + 1, tl.sum(squares, 0))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def pool_fwd_kernel(
    p_encoding,  # (B, K, C), fp32
    p_moments,  # (K, parts, 2), fp32
    p_weight,  # (K,), fp32, as the next three
    p_bias, p_running_mean, p_running_var,
    p_tracked,  # (), int64: batches seen
    p_statistics,  # (2, K), fp32: the applied mean and 1 / deviation, for backward
    p_features,  # (B, C)
    values, share, parts, K: tl.constexpr, C: tl.constexpr, TRAINING: tl.constexpr,
    MOMENTUM: tl.constexpr,  # None for the mean of all batches
    EPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
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
    encoding = tl.load(p_encoding + o_k[:, None] * C + _compute_offsets(i, K, C)[None, :], mask=mask, other=0.0)
    z = (encoding - mean[:, None]) * scale[:, None] * weight[:, None] + bias[:, None]
    y = tl.where((z < 0) | (o_k >= K)[:, None], 0.0, z)  # lets NaN through
    store_rounded(p_features + i, tl.sum(y, 0) * (1 / K), i < values)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def pool_sums_kernel(
    p_encoding,  # (B, K, C), fp32
    p_statistics,  # (2, K), fp32
    p_weight, p_bias,
    p_dfeatures,  # (B, C)
    p_sums,  # (K, parts, 2), fp32: sums of the gradient after the norm, and of it times the normalised values
    values, share, parts, K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first, last = part * share, tl.minimum(part * share + share, values)
    mean, scale = tl.load(p_statistics + k), tl.load(p_statistics + K + k)
    weight, bias = tl.load(p_weight + k), tl.load(p_bias + k)
    dz_sum, product = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for begin in range(first, last, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        encoding = tl.load(p_encoding + k * C + _compute_offsets(i, K, C), mask=i < last, other=0.0)
        dz = tl.load(p_dfeatures + i, mask=i < last, other=0.0).to(tl.float32) * (1 / K)
        normed = (encoding - mean) * scale
        dz = tl.where(normed * weight + bias <= 0, 0.0, dz)  # as torch's relu does, for NaN too
        dz_sum += dz
        product += dz * normed
    p_part = p_sums + tl.program_id(0) * 2
    tl.store(p_part, tl.sum(dz_sum, 0))
    tl.store(p_part + 1, tl.sum(product, 0))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def pool_bwd_kernel(
    p_encoding,  # (B, K, C), fp32
    p_statistics,  # (2, K), fp32
    p_weight, p_bias,
    p_dfeatures,  # (B, C)
    p_sums,  # (K, parts, 2), fp32
    p_dencoding,  # (B, K, C), fp32
    p_dparameters,  # (2, K), fp32: the gradients of weight and bias
    values, parts, K: tl.constexpr, C: tl.constexpr, TRAINING: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
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
    offsets = o_k[:, None] * C + _compute_offsets(i, K, C)[None, :]
    normed = (tl.load(p_encoding + offsets, mask=mask, other=0.0) - mean) * scale
    dz = tl.load(p_dfeatures + i, mask=i < values, other=0.0).to(tl.float32)[None, :] * (1 / K)
    dz = tl.where(normed * weight + bias <= 0, 0.0, dz)
    if TRAINING:
        dz -= (dbias[:, None] + normed * dweight[:, None]) / values
    tl.store(p_dencoding + offsets, dz * scale * weight, mask=mask)


def _cut(values: int) -> tuple[int, int]:
    """Return the values of a codeword per program, and the number of programs."""
    share = ceil_div(values, BLOCK * PARTS) * BLOCK
    return share, ceil_div(values, share)


def _choose_tile(K: int) -> dict[str, int]:
    """Choose a tile of all codewords and some values: enough programs for small batches, at most 32 values a thread. Not timed."""
    block_k = 1 << (K - 1).bit_length()
    return {"BLOCK_K": block_k, "BLOCK": max(16, min(64, 2048 // block_k)), "PARTS": PARTS}


def _forward(
    encoding: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, tracked: Tensor,
    training: bool, momentum: float | None, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return features and the statistics used to normalise them; in training, update the running statistics."""
    B, K, C = encoding.shape
    share, parts = _cut(B * C)
    features, statistics = encoding.new_empty((B, C), dtype=dtype), encoding.new_empty((2, K))
    moments = encoding.new_empty((K, parts, 2)) if training else statistics
    running = (running_mean, running_var, tracked)
    constants = {"K": K, "C": C, "TRAINING": training, "MOMENTUM": momentum, "EPS": eps, **_choose_tile(K), **OPTIONS}
    with torch.cuda.device_of(encoding):
        if training:
            pool_moments_kernel[(K * parts,)](encoding, moments, B * C, share, parts, K=K, C=C, BLOCK=BLOCK, **OPTIONS)
            torch.autograd.graph.increment_version(running)
        pool_fwd_kernel[(ceil_div(B * C, constants["BLOCK"]),)](
            encoding, moments, weight, bias, *running, statistics, features, B * C, share, parts, **constants
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
    constants = {"K": K, "C": C, "TRAINING": training, **_choose_tile(K), **OPTIONS}
    with torch.cuda.device_of(encoding):
        pool_sums_kernel[(K * parts,)](*inputs, sums, B * C, share, parts, K=K, C=C, BLOCK=BLOCK, **OPTIONS)
        pool_bwd_kernel[(ceil_div(B * C, constants["BLOCK"]),)](
            *inputs, sums, dencoding, dparameters, B * C, parts, **constants
        )
    return dencoding, dparameters[0], dparameters[1]


# The PyTorch path


def _compute_statistics(encoding: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, 1 / deviation and variance of each codeword."""
    variance, mean = torch.var_mean(encoding, (0, 2), correction=0)
    return mean, (variance + eps).rsqrt(), variance


def _pool(encoding: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return ((encoding - mean[:, None]) * (scale * weight)[:, None] + bias[:, None]).relu().mean(1)


def plain_forward(
    encoding: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, tracked: Tensor,
    training: bool, momentum: float | None, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    mean, scale = running_mean, (running_var + eps).rsqrt()
    if training:
        mean, scale, variance = _compute_statistics(encoding, eps)
        tracked += 1
        factor, values = 1 / tracked if momentum is None else momentum, encoding[:, 0].numel()
        running_mean.mul_(1 - factor).add_(factor * mean)
        running_var.mul_(1 - factor).add_(factor * variance * (values / (values - 1)))
    features = _pool(encoding, weight, bias, mean, scale)
    return features.to(dtype if encoding.dtype == torch.float32 else encoding.dtype), torch.stack([mean, scale])


def plain_backward(
    dfeatures: Tensor, encoding: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean, scale = statistics.unsqueeze(2)
    normed = (encoding - mean) * scale
    dz = dfeatures.to(encoding.dtype).unsqueeze(1) / len(weight)
    dz = torch.where(normed * weight[:, None] + bias[:, None] <= 0, 0, dz)
    dbias, dweight = dz.sum((0, 2)), (dz * normed).sum((0, 2))
    if training:
        dz = dz - (dbias[:, None] + normed * dweight[:, None]) / encoding[:, 0].numel()
    return dz * scale * weight[:, None], dweight, dbias


# Proof of the kernels


def _describe_forward(
    encoding: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, tracked: Any, *flags: Any
) -> Constants:
    training, momentum, eps, dtype = flags
    _, K, C = encoding.shape
    constants = {
        "K": K,
        "C": C,
        "features": proof.name_dtype(dtype),
        "training": training,
        "momentum": momentum,
        "eps": eps,
    }
    return constants | _choose_tile(K)


def _describe_backward(
    dfeatures: Tensor, encoding: Tensor, weight: Any, bias: Any, _: Any, training: bool
) -> Constants:
    _, K, C = encoding.shape
    return {"K": K, "C": C, "features": proof.name_dtype(dfeatures.dtype), "training": training, **_choose_tile(K)}


def _make_forward_problems(constants: Constants, device: torch.device) -> list[Arguments]:
    """Make enough images for two steps a program, or one step in the interpreter. The last step is ragged.

    Each codeword lies some deviations off 0. No value is near the kink of relu, where rounding would decide on a gradient.
    """
    draw, K, C = proof.seed_draws(device), int(constants["K"]), int(constants["C"])
    B = BLOCK * (PARTS if device.type == "cuda" else 2) // C + 7
    encoding, weight = torch.randn(B, K, C, **draw), torch.randn(K, **draw)
    encoding, weight = encoding + 0.5 * encoding.sign(), weight + 0.5 * weight.sign()
    running = weight.clone(), torch.ones_like(weight), torch.full((), 6, device=device)
    flags = constants["training"], constants["momentum"], constants["eps"], getattr(torch, str(constants["features"]))
    shift = OFFSET * weight.sign() if constants["training"] else weight
    return [(encoding + shift[:, None], weight, 0.1 * weight, *running, *flags)]


def _make_backward_problems(constants: Constants, device: torch.device) -> list[Arguments]:
    """Make the same problems with positive gradients, so that no sum of them cancels."""
    ((encoding, weight, bias, *_),) = _make_forward_problems({**constants, "momentum": 0.1, "eps": 1e-5}, device)
    dfeatures = torch.rand(len(encoding), encoding.shape[2], **proof.seed_draws(device, 1)) + 0.5
    dtype, statistics = getattr(torch, str(constants["features"])), torch.stack(_compute_statistics(encoding, 1e-5)[:2])
    return [(dfeatures.to(dtype), encoding, weight, bias, statistics, constants["training"])]


def _measure_excess(got: Tensor, wanted: Tensor) -> float:
    """Return error over tolerance: 16 eps of fp32 of the largest value and 1 eps of the result's dtype (rounding takes half)."""
    tolerance = 16 * torch.finfo(torch.float32).eps * wanted.abs().max() + torch.finfo(got.dtype).eps * wanted.abs()
    return proof.find_largest((got.double() - wanted).abs() / tolerance)


def _measure_forward_excess(_: Arguments, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    names = ("features", "statistics", "running_mean", "running_var")
    over = {name: _measure_excess(got, wanted) for name, got, wanted in zip(names, results, exact, strict=False)}
    return over | {"num_batches_tracked": 0.0 if results[4] == exact[4] else float("inf")}


def _measure_backward_excess(_: Arguments, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    names = ("dencoding", "dweight", "dbias")
    return {name: _measure_excess(*pair) for name, *pair in zip(names, results, exact, strict=True)}


FORWARD = Operator(
    "pool",
    _forward,
    plain_forward,
    _describe_forward,
    _make_forward_problems,
    _measure_forward_excess,
    lambda encoding, *rest: (encoding.shape[1:], encoding.get_device(), *rest[5:]),
    changes=(3, 4, 5),
)
BACKWARD = Operator(
    "pool_backward",
    _backward,
    plain_backward,
    _describe_backward,
    _make_backward_problems,
    _measure_backward_excess,
    lambda dfeatures, encoding, *rest: (dfeatures.dtype, encoding.shape[1:], encoding.get_device(), rest[3]),
)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, encoding: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, dtype: torch.dtype, strict: bool
    ) -> Tensor:
        running = norm.running_mean, norm.running_var, norm.num_batches_tracked
        flags = norm.training, None if norm.momentum is None else float(norm.momentum), float(norm.eps), dtype
        features, statistics = FORWARD(strict, encoding, weight, bias, *running, *flags)
        ctx.save_for_backward(encoding, weight, bias, statistics)
        ctx.training, ctx.eps, ctx.strict = norm.training, norm.eps, strict
        return features

    @staticmethod
    def backward(ctx: Any, dfeatures: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, statistics = ctx.saved_tensors
        if torch.compiler.is_compiling():  # compiled autograd may differentiate the statistics too
            if ctx.training:
                statistics = torch.stack(_compute_statistics(inputs[0], ctx.eps)[:2])
            return *plain_backward(dfeatures, *inputs, statistics, ctx.training), None, None, None
        if not needs_torch_ops(dfeatures):
            return *BACKWARD(ctx.strict, dfeatures, *inputs, statistics, ctx.training), None, None, None

        def pool_plainly(encoding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            mean, scale = _compute_statistics(encoding, ctx.eps)[:2] if ctx.training else statistics
            return _pool(encoding, weight, bias, mean, scale).to(dfeatures.dtype)

        return *differentiate(pool_plainly, inputs, dfeatures), None, None, None


def pool(encoding: Tensor, norm: nn.BatchNorm2d, dtype: torch.dtype, strict: bool = False) -> Tensor:
    """Return the mean over the codewords of relu(norm(encoding)), for an encoding (B, K, C): (B, C) in the given dtype.

    The encoding and all of the norm are fp32, contiguous and on a GPU. Training updates the norm's running statistics and needs
    B * C above 1. strict: raise RuntimeError if no kernel has proved itself, instead of taking the PyTorch path.
    """
    return _Pool.apply(encoding, norm.weight, norm.bias, norm, dtype, strict)
