"""Project and encode in one kernel, for inference.

The projection is z = relu(x @ weight^T + shift), a 1x1 convolution with its norm folded in. The kernel encodes z without storing it
in memory. EncNet (arXiv 1803.08904), section 3.1; Deep TEN (arXiv 1612.02844), section 3.

A program projects a tile of pixels in blocks of channels, rounds z to the dtype of x as a stored z would be, and encodes it in
registers, as forward.py does with x. Memory serves x once; L2 serves the weight once a tile.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ctxenc.kernels import torch_encode
from ctxenc.kernels.fused import proof
from ctxenc.kernels.fused.encode import DEVICES
from ctxenc.kernels.fused.forward import launch_and_add
from ctxenc.kernels.fused.launch import make_key, make_plan, make_readable, pack
from ctxenc.kernels.fused.steps import (
    _INTERPRETED,
    arrange,
    assume_aligned,
    dot,
    drop_bits,
    find_center,
    find_nearness,
    load_smoothing,
    load_x,
    locate_image,
    prepare_codewords,
    round_operand,
    softmax,
)
from ctxenc.kernels.fused.tiles import choose_block
from ctxenc.kernels.verdicts import Arguments, Constants, Operator

SIZES = [
    "p_x",
    "p_weight_sum",
    "N",
    "tiles",
    "share",
    "splits",
    "stride_b",
    "stride_n",
    "stride_c",
    "row_e",
    "row_w",
    "count",
]


@triton.jit
def project(
    p_image, p_weight, p_shift, o_n, o_d, N, stride_n, stride_c, C: tl.constexpr, D: tl.constexpr,
    LAYOUT: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Return features z (BLOCK_N, BLOCK_D) of a tile: values of the dtype of x, in fp32; zero beyond D."""
    z = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first_c in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        o_c = first_c + tl.arange(0, BLOCK_C)
        x = load_x(p_image, o_n, first_c, N, stride_n, stride_c, C, LAYOUT, VECTOR, BLOCK_C)
        x = arrange(x, o_n, N, LAYOUT, BLOCK_N, BLOCK_C)
        mask = (o_c < C)[:, None] & (o_d < D)[None, :]
        weight = tl.load(p_weight + o_d[None, :] * C + o_c[:, None], mask=mask, other=0.0)
        if _INTERPRETED:  # it multiplies bf16 wrongly
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        z = tl.dot(x, weight, z)
    z += tl.load(p_shift + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    # Let NaN through, but not 0 * inf from channels beyond D.
    z = tl.where((z < 0) | (o_d >= D)[None, :], 0.0, z)
    dtype = p_image.dtype.element_ty
    if _INTERPRETED and dtype == tl.bfloat16:  # it truncates
        return drop_bits(z, 16)
    else:
        return z.to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SIZES)
def project_encode_kernel(
    p_x,  # (B, C, N)
    p_weight,  # (D, C), in the dtype of x
    p_shift,  # (D,)
    p_codewords,  # (K, D)
    p_smoothing,  # (K,) or ()
    p_encoding,  # (B, splits, K, D), fp32
    p_weight_sum,  # (B, splits, K), fp32
    N,
    tiles,  # tiles of BLOCK_N pixels per image
    share,  # tiles per program
    splits,  # programs per image
    stride_b, stride_n, stride_c,
    row_e,  # strides from one split to the next
    row_w,
    count,  # divisor of both results: N for means, else 1
    C: tl.constexpr, D: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, LAYOUT: tl.constexpr, VECTOR: tl.constexpr,
    DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    N, stride_n, stride_c = assume_aligned(N, stride_n, stride_c, LAYOUT, VECTOR)
    row = tl.program_id(0).to(tl.int64)
    p_image = locate_image(p_x, row // splits, stride_b, VECTOR)
    first = (row % splits).to(tl.int32) * share
    o_d, o_k = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    m_k = o_k < K
    s = load_smoothing(p_smoothing, o_k, K, SHARED)
    center = find_center(p_codewords, D, K, BLOCK_D, BLOCK_K)
    d, high, low, scale, bias, c, base, x_scale = prepare_codewords(p_codewords, center, o_d, o_k, D, K, DOT)
    weight_sum = tl.zeros((BLOCK_K,), tl.float32)
    sums = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    for tile in tl.range(first, tl.minimum(first + share, tiles), num_stages=1, disable_licm=True):
        o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        z = project(
            p_image, p_weight, p_shift, o_n, o_d, N, stride_n, stride_c, C, D, LAYOUT, VECTOR, BLOCK_N, BLOCK_C, BLOCK_D,
            STAGES,
        )  # fmt: skip
        operand = round_operand((z - base[None, :]) * x_scale, DOT)
        nearness = find_nearness(z, operand, high, low, scale / x_scale, bias, c, SHARED, DOT)
        weights = round_operand(softmax(nearness, s, o_n < N, m_k), DOT)
        weight_sum += tl.sum(weights.to(tl.float32), 0)
        sums -= dot(tl.trans(operand), weights, DOT)
    weight_sum *= 1.0 / count
    residuals = sums * (-1.0 / count) / x_scale - weight_sum[None, :] * d
    p_row = p_encoding + row * row_e
    tl.store(p_row + o_k[None, :] * D + o_d[:, None], residuals, mask=(o_d < D)[:, None] & m_k[None, :])
    tl.store(p_weight_sum + row * row_w + o_k, weight_sum, mask=m_k)


def can_project(dtype: torch.dtype, D: int, K: int) -> bool:
    """Return whether one kernel can project to D channels and encode with K codewords: a program must hold all channels.

    It takes half precision only: fp32 convolutions have their own tf32 setting, and three terms of tf32 take more registers.
    """
    return dtype in (torch.float16, torch.bfloat16) and D <= 64 and choose_block(D) * choose_block(K) <= 2048


def project_forward(
    x: Tensor, weight: Tensor, shift: Tensor, codewords: Tensor, smoothing: Tensor, mean: bool = False
) -> Tensor:
    """Encode relu(weight @ x + shift), for x (B, C, N) and weight (D, C) of one dtype: (B, K, D), fp32, or divided by N."""
    B, C, _ = x.shape
    if x.numel() == 0:
        return x.new_zeros((B, *codewords.shape), dtype=torch.float32)
    x, weight, shift = make_readable(x), pack(weight), pack(shift)
    codewords, smoothing = pack(codewords), pack(smoothing)
    key = make_key("project", x, codewords, smoothing)
    plan = make_plan(key, x.device)
    options = {**plan.options, "C": C, "BLOCK_C": min(64, choose_block(C))}

    return launch_and_add(project_encode_kernel, key, plan, (x, weight, shift, codewords, smoothing), options, mean)[0]


def project_plainly(
    x: Tensor, weight: Tensor, shift: Tensor, codewords: Tensor, smoothing: Tensor, mean: bool = False
) -> Tensor:
    """Compute the same by the PyTorch path."""
    z = F.conv2d(x.unsqueeze(3), weight[:, :, None, None], shift.to(x.dtype)).relu()
    encoding = torch_encode.encode(z.flatten(2), codewords, smoothing)
    return (encoding / x.shape[2] if mean else encoding).contiguous()


def _describe(
    x: Tensor, weight: Tensor, shift: Tensor, codewords: Tensor, smoothing: Tensor, mean: bool = False
) -> Constants | None:
    if not x.numel():
        return None
    names = {"C": x.shape[1], "shift": proof.name_dtype(shift.dtype)}
    return names | proof.describe("project", x, codewords, smoothing)


def _make_problems(constants: Constants, device: torch.device) -> list[Arguments]:
    """Make many images, encoded as means, and one image whose sums several programs add up.

    Values are small integers, so the projected features are exact. They range from 0 to beyond 40, as channels differ.
    """
    C, D, K = (int(constants[name]) for name in "CDK")
    dtypes = {name: getattr(torch, str(constants[name])) for name in ("x", "shift", "codewords", "smoothing")}
    draw = proof.seed_draws(device)
    share = min(1.0, 256 / C)  # share of nonzero x: bf16 could not hold longer sums
    deviation = (C * share) ** 0.5 / 2
    shift = torch.tensor([-5, 20, 40], device=device).repeat(-(-D // 3))[:D]
    codewords = deviation * torch.randn(K, D, **draw) + shift
    # Near each other: otherwise fp16 could not represent the weights of an omitted codeword.
    smoothing = (0.75 + 0.5 * torch.rand(() if constants["shared"] else (K,), **draw)) / (2 * D**0.5 * deviation**2)
    weight = torch.randint(-1, 2, (D, C), **draw)
    parameters = {"x": weight, "shift": shift, "codewords": codewords, "smoothing": smoothing}
    rest = [tensor.to(dtypes[name]) for name, tensor in parameters.items()]
    problems: list[Arguments] = []
    for one_image in (False, True):
        for x in proof.make_candidates(constants, C, device, one_image):
            if _describe(x, *rest) == constants:
                proof.fill(x, lambda shape: torch.randint(-1, 2, shape, **draw) * (torch.rand(shape, **draw) < share))
                problems.append((x, *rest, not one_image))
                break
    return problems


def _measure_excess(arguments: Arguments, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    x, weight, shift, *codebook, mean = arguments
    count = x.shape[2] if mean else 1
    results, exact = (tuple(count * each for each in each_set) for each_set in (results, exact))
    z = (torch.matmul(weight.double(), x.double()) + shift.double()[:, None]).relu()
    return proof.measure_excess(("encoding",), results, exact, exact[0], z.to(x.dtype), *codebook)


def _key_call(
    x: Tensor, weight: Tensor, shift: Tensor, codewords: Tensor, smoothing: Tensor, mean: bool = False
) -> tuple[Any, ...]:
    return *proof.key_call(x, codewords, smoothing), shift.dtype


PROJECT = Operator(
    "project_encode", project_forward, project_plainly, _describe, _make_problems, _measure_excess, _key_call
)


@torch.library.custom_op("ctxenc::project_encode", mutates_args=(), device_types=DEVICES)
def project_encode(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    codewords: Tensor,
    smoothing: Tensor,
    strict: bool = False,
    mean: bool = False,
) -> Tensor:
    """Encode relu(weight @ x + shift) with codewords (K, D), without derivatives: (B, K, D), fp32, or its mean over N
    pixels.

    x (B, C, N) and weight (D, C) are of one dtype, fp16, bf16 or fp32. may_project checks the sizes.

    Raises:
        ValueError: sizes do not match; the kernels would not notice.
        RuntimeError: strict, and the kernel has not proved itself.
    """
    D, C = weight.shape
    if x.shape[1] != C or shift.shape != (D,) or codewords.shape[1] != D:
        sizes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, weight, shift, codewords))
        raise ValueError(
            f"project_encode: must get x (B, C, N), weight (D, C), shift (D,), codewords (K, D), got {sizes}"
        )
    return PROJECT(strict, x, weight, shift, codewords, smoothing, mean)


@project_encode.register_fake
def _(x: Tensor, weight: Tensor, shift: Tensor, codewords: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty((x.shape[0], *codewords.shape), dtype=torch.float32)


@register_flop_formula(torch.ops.ctxenc.project_encode)
def _count_flops(
    x: Sequence[int], weight: Sequence[int], shift: Any, codewords: Sequence[int], *_: Any, **__: Any
) -> int:
    """Count the flops of the projection and the two products of the encoding, from shapes."""
    (B, C, N), (K, D) = x, codewords
    return 2 * B * N * D * (C + 2 * K)
