"""Projection and encoding as one kernel, for inference: z = relu(x @ weight^T + shift), a 1x1 convolution with its norm folded, and
the encoding of z, which is never in memory. Sections 3.1 of EncNet (arXiv 1803.08904) and 3 of Deep TEN (arXiv 1612.02844).

A program projects a tile of pixels in blocks of channels, rounds z to the dtype of x as if it had been stored, and encodes it where
it lies, in registers. Memory gives x once; L2 gives the weight once a tile. What comes after the projection is walk.py's.
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
from ctxenc.kernels.fused.launch import Launch
from ctxenc.kernels.fused.operands import _INTERPRETED, dot, drop_bits, rounded
from ctxenc.kernels.fused.tiles import Tiles, ceil_div, project_tiles
from ctxenc.kernels.fused.walk import add_channels, image, load_bias, multiple, offsets, softmax, subtract_codewords
from ctxenc.kernels.verdicts import Arguments, Constants, Operator

SIZES = ["p_x", "N", "tiles", "share", "splits", "stride_b", "stride_n", "stride_c"]


@triton.jit
def _project(
    p_image, p_weight, p_shift, o_n, o_d, N, stride_n, stride_c, C: tl.constexpr, D: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Features z (BLOCK_N, BLOCK_D) of a tile: values of the dtype of x, in fp32; zero beyond D."""
    z = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        o_c = start + tl.arange(0, BLOCK_C)
        o_x = offsets(o_n, o_c, stride_n, stride_c, CHANNELS_LAST)
        x = tl.load(p_image + o_x, mask=(o_n < N)[:, None] & (o_c < C)[None, :], other=0.0)
        o_weight = o_d[None, :] * C + o_c[:, None]
        weight = tl.load(p_weight + o_weight, mask=(o_c < C)[:, None] & (o_d < D)[None, :], other=0.0)
        if _INTERPRETED:  # which multiplies bf16 wrongly
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        z = dot(x, weight, z, DOT)
    z += tl.load(p_shift + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    # Lets NaN through, but no 0 * inf of channels that are not there.
    z = tl.where((z < 0) | (o_d >= D)[None, :], 0.0, z)
    dtype = p_image.dtype.element_ty
    if _INTERPRETED and dtype == tl.bfloat16:  # which it cuts where it should round
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
    p_operands,  # as prepared
    p_centers,
    p_bias,
    p_encoding,  # (B, splits, K, D), fp32
    N,
    tiles,  # of BLOCK_N pixels in an image
    share,  # of them for one program
    splits,  # programs that share the pixels of an image
    stride_b,
    stride_n,
    stride_c,
    C: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    PADDED_D: tl.constexpr,  # one block
    SHARED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    if CHANNELS_LAST:
        stride_n = multiple(stride_n, VECTOR)
    else:
        stride_c, N = multiple(stride_c, VECTOR), multiple(N, VECTOR)
    pid = tl.program_id(0).to(tl.int64)
    p_image = image(p_x, pid // splits, stride_b, VECTOR)
    first = (pid % splits).to(tl.int32) * share
    last = tl.minimum(first + share, tiles)
    o_d, o_k = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    m_k, one = o_k < K, tl.full((BLOCK_K,), 1.0, tl.float32)
    s = tl.load(p_smoothing + (o_k * 0 if SHARED else o_k), mask=m_k, other=0.0).to(tl.float32)
    bias = load_bias(p_bias, o_k, 1, BLOCK_K)
    weight_sum = tl.zeros((BLOCK_K,), tl.float32)
    sums = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    for tile in tl.range(first, last, num_stages=1, disable_licm=True):
        o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        z = _project(
            p_image, p_weight, p_shift, o_n, o_d, N, stride_n, stride_c, C, D, CHANNELS_LAST, DOT, BLOCK_N, BLOCK_C,
            BLOCK_D, STAGES,
        )  # fmt: skip
        cross = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        squares = tl.zeros((BLOCK_N,), tl.float32)
        z, cross, squares = add_channels(
            z, cross, squares, p_operands, p_centers, o_d, o_k, PADDED_D, SHARED, DOT, BLOCK_K
        )
        nearness = -2 * cross - bias[None, :]
        if not SHARED:
            nearness -= squares[:, None]
        weights = rounded(softmax(nearness, s, o_n < N, m_k), DOT)
        weight_sum += tl.sum(weights.to(tl.float32), 0)
        sums = dot(tl.trans(z), weights, sums, DOT)
    p_sums = p_encoding + pid * K * D
    subtract_codewords(
        p_sums, sums, weight_sum, one, p_codewords, p_centers + PADDED_D, 0, 1, D, K, BLOCK_D, BLOCK_K, True
    )


def _project_encode(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    codewords: Tensor,
    smoothing: Tensor,
    cut: tuple[Tiles, int, int] | None = None,
) -> Tensor:
    B, C, N = x.shape
    K, D = codewords.shape
    if B == 0 or N == 0:
        return x.new_zeros((B, K, D), dtype=torch.float32)
    # Memory moves x once, 4 B K D bytes a split (twice where there are several), the weight and the operands; L2 gives the weight
    # once a tile: bytes.py.
    tiles, block_c, splits = cut or project_tiles(x, K, D)
    with torch.cuda.device_of(x):
        launch = Launch(x, codewords, smoothing, tiles)
        share = ceil_div(launch.tiles_per_image, splits)
        splits = ceil_div(launch.tiles_per_image, share)
        encoding = x.new_empty((B, splits, K, D), dtype=torch.float32)
        project_encode_kernel[(splits * B,)](
            launch.x,
            weight.contiguous(),
            shift.contiguous(),
            launch.codewords,
            launch.smoothing,
            launch.operands,
            launch.centers,
            launch.bias,
            encoding,
            *launch.sizes(share, splits),
            C=C,
            BLOCK_C=block_c,
            **launch.options(),
        )
    return encoding.squeeze(1) if splits == 1 else encoding.sum(1)


def plain(x: Tensor, weight: Tensor, shift: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """The same by the PyTorch path."""
    z = F.conv2d(x.unsqueeze(3), weight[:, :, None, None], shift.to(x.dtype)).relu()
    return torch_encode.encode(z.flatten(2), codewords, smoothing).contiguous()


def _constants(x: Tensor, weight: Tensor, shift: Tensor, codewords: Tensor, smoothing: Tensor) -> Constants | None:
    if not x.numel():
        return None
    tiles, block_c, _ = project_tiles(x, *codewords.shape)
    names = {"C": x.shape[1], "shift": proof.dtype_name(shift), "block_c": block_c}
    return {**names, **proof.describe(x, codewords, smoothing, tiles)}


def _problem(constants: Constants, device: torch.device) -> Arguments | None:
    """Small integers, of which the projected features are exact; they reach from 0 to beyond 40, as channels differ."""
    C, D, K = (int(constants[name]) for name in "CDK")
    dtypes = {name: getattr(torch, str(constants[name])) for name in ("x", "shift", "codewords", "smoothing")}
    draw = proof.drawing(device)
    kept = min(1.0, 256 / C)  # share of x that is not 0: bf16 could not hold longer sums
    spread = (C * kept) ** 0.5 / 2
    shift = torch.tensor([0, 20, 40], device=device).repeat(-(-D // 3))[:D]
    codewords = spread * torch.randn(K, D, **draw) + shift
    smoothing = torch.rand(() if constants["shared"] else (K,), **draw) / (D**0.5 * spread**2)
    weight = torch.randint(-1, 2, (D, C), **draw)
    given = {"x": weight, "shift": shift, "codewords": codewords, "smoothing": smoothing}
    rest = [tensor.to(dtypes[name]) for name, tensor in given.items()]
    for x in proof.candidates(constants, C, device):
        if _constants(x, *rest) == constants:
            proof.fill(x, lambda shape: torch.randint(-1, 2, shape, **draw) * (torch.rand(shape, **draw) < kept))
            return x, *rest
    return None


def _excess(arguments: Arguments, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    x, weight, shift, *codebook = arguments
    z = (torch.matmul(weight.double(), x.double()) + shift.double()[:, None]).relu()
    return proof.excess(("encoding",), results, exact, exact[0], z.to(x.dtype), *codebook)


def _key(x: Tensor, weight: Tensor, shift: Tensor, codewords: Tensor, smoothing: Tensor) -> tuple[Any, ...]:
    return *proof.key(x, codewords, smoothing), shift.dtype


PROJECT = Operator("project_encode", _project_encode, plain, _constants, _problem, _excess, _key)


@torch.library.custom_op("ctxenc::project_encode", mutates_args=(), device_types=DEVICES)
def project_encode(
    x: Tensor, weight: Tensor, shift: Tensor, codewords: Tensor, smoothing: Tensor, strict: bool = False
) -> Tensor:
    """Encoding (B, K, D), fp32, of relu(weight @ x + shift) on codewords (K, D), without derivatives.

    x (B, C, N) and weight (D, C) are of one dtype, fp16, bf16 or fp32. The sizes that fit are those of tiles.may_project.

    Raises:
        ValueError: sizes do not fit each other, which no kernel would notice.
        RuntimeError: strict, and the kernel has not proved itself.
    """
    D, C = weight.shape
    if x.shape[1] != C or shift.shape != (D,) or codewords.shape[1] != D:
        sizes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, weight, shift, codewords))
        raise ValueError(
            f"project_encode: must get x (B, C, N), weight (D, C), shift (D,), codewords (K, D), got {sizes}"
        )
    return PROJECT(strict, x, weight, shift, codewords, smoothing)


@project_encode.register_fake
def _(x: Tensor, weight: Tensor, shift: Tensor, codewords: Tensor, smoothing: Tensor, strict: bool = False) -> Tensor:
    return x.new_empty((x.shape[0], *codewords.shape), dtype=torch.float32)


@register_flop_formula(torch.ops.ctxenc.project_encode)
def _flops(x: Sequence[int], weight: Sequence[int], shift: Any, codewords: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the projection and the two products of the encoding, given shapes."""
    (B, C, N), (K, D) = x, codewords
    return 2 * B * N * D * (C + 2 * K)
