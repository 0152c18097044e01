"""Launchers of the fused encode kernels.

With c the codeword nearest to the mean of all, x' = x - c and d' = d - c, as in torch_encode.py. Programs walk over tiles of pixels
and keep the weights in registers; forward.py, backward.py and walk.py hold the kernels, tiles.py the
choice of tiles and the bytes of a launch. The sums of all programs are added in a fixed order: the same bits come out of every run.

The tensor cores get x minus a base near c. In fp32 the base is c, and a product has three terms of tf32. Half precision goes in
as it is, with base 0, which makes products with d' in two terms nearly exact; only where the offset of a channel is many times
the spread of its codewords is the base c, rounded. fp16 is widened to tf32, which holds it exactly: gradients under loss scaling
leave the range of fp16.

Deep TEN (arXiv 1612.02844), section 3.
"""

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ctxenc.kernels.fused.backward import encode_bwd_kernel
from ctxenc.kernels.fused.forward import encode_fwd_kernel
from ctxenc.kernels.fused.operands import prepare_codewords_kernel, prepare_grad_kernel, scan
from ctxenc.kernels.fused.tiles import (
    Tiles,
    backward_tiles,
    block_of,
    ceil_div,
    forward_tiles,
    is_channels_last,
    padded_channels,
    vector,
)


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


class Launch:
    """What launches share: their constants, and the prepared codewords. x has D channels, or others that are projected to D."""

    def __init__(self, x: Tensor, codewords: Tensor, smoothing: Tensor, tiles: Tiles):
        self.B, _, self.N = x.shape
        self.K, self.D = codewords.shape
        self.channels_last = is_channels_last(x)
        if not self.channels_last and x.stride(2) != 1 and self.N > 1:
            x = x.contiguous()  # no unit stride
        self.x, self.codewords, self.smoothing = x, codewords.contiguous(), smoothing.contiguous()
        self.tiles, self.tiles_per_image = tiles, ceil_div(self.N, tiles.block_n)
        self.block_k = block_of(self.K)
        self.padded = padded_channels(self.D, tiles)
        self.blocks = self.padded // tiles.block_d
        self.shape = {
            "D": self.D,
            "K": self.K,
            "PADDED_D": self.padded,
            "DOT": _precision(x.dtype),
            "BLOCK_D": tiles.block_d,
            "BLOCK_K": self.block_k,
        }
        self.operands, self.centers, self.bias, self.near = self._prepare()

    def _prepare(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.bfloat16 if self.x.dtype == torch.bfloat16 else torch.float32
        operands = self.x.new_empty((2, self.block_k, self.padded), dtype=dtype)
        centers = self.x.new_empty((2, self.padded), dtype=torch.float32)
        bias = self.x.new_empty((self.blocks, self.block_k), dtype=torch.float32)
        near = self.x.new_empty((), dtype=torch.int32)
        prepare_codewords_kernel[(self.blocks,)](
            self.codewords,
            operands,
            centers,
            bias,
            near,
            RESIDENT=self.tiles.resident,
            SCAN=scan(self.D, self.block_k),
            **self.shape,
            **FUSED,
        )
        return operands, centers, bias, near

    def prepare_grad(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        operands = self.operands.new_empty((self.B, self.block_k, self.padded))
        product = self.bias.new_empty((self.B, self.block_k))
        prepare_grad_kernel[(self.B,)](
            grad,
            self.codewords,
            self.centers,
            operands,
            product,
            *grad.stride(),
            **(self.shape | {"BLOCK_D": scan(self.padded, self.block_k)}),
            **FUSED,
        )
        return operands, product

    def sizes(self, *cut: int) -> tuple[int, ...]:
        stride_b, stride_d, stride_n = self.x.stride()
        return self.N, self.tiles_per_image, *cut, stride_b, stride_n, stride_d

    def descriptor(self, x: Tensor, channels: int) -> TensorDescriptor | None:
        """Of x or its gradient, for tiles of so many channels, where they are to be resident."""
        if not self.tiles.resident or x.numel() == 0:
            return None
        block = [1, channels, self.tiles.block_n]
        if self.channels_last:
            x, block = x.transpose(1, 2), [1, self.tiles.block_n, channels]
        return TensorDescriptor(x, list(x.shape), list(x.stride()), block)

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
            **_registers(self.tiles),
            **FUSED,
        }


CHUNK = 64  # channels of x that resident backward takes at a time
FUSED = {"enable_fp_fusion": True}  # Triton 3.10 turns its default over


def _registers(tiles: Tiles) -> dict[str, int]:
    """All that a thread can have, but in the resident form: elsewhere two programs at most run on a multiprocessor.

    Unasked, NVIDIA's assembler spills some to make room for programs that are not there.
    """
    return {} if tiles.resident or torch.version.hip else {"maxnreg": 255}


Cut = tuple[Tiles, int, int]  # tiles, programs that share the pixels, groups that share the channels


def encode_forward(x: Tensor, codewords: Tensor, smoothing: Tensor, cut: Cut | None = None) -> tuple[Tensor, Tensor]:
    B, D, _ = x.shape
    K = codewords.shape[0]
    if x.numel() == 0:
        return x.new_zeros((B, K, D), dtype=torch.float32), x.new_zeros((B, K), dtype=torch.float32)
    # Memory moves x once, 4 B K (D + 1) bytes a split (twice where there are several), and the operands; L2 gives x groups times
    # more, and a program's sums twice a tile, unless tiles are resident: bytes.py.
    tiles, splits, groups = cut or forward_tiles(x, K)
    with torch.cuda.device_of(x):
        launch = Launch(x, codewords, smoothing, tiles)
        share = ceil_div(launch.tiles_per_image, splits)
        splits = ceil_div(launch.tiles_per_image, share)  # none without a tile
        encoding = x.new_empty((B, splits, K, D), dtype=torch.float32)
        weight_sum = x.new_empty((B, splits, K), dtype=torch.float32)
        encode_fwd_kernel[(groups * splits * B,)](
            launch.x,
            launch.descriptor(launch.x, launch.padded),
            launch.codewords,
            launch.smoothing,
            launch.operands,
            launch.centers,
            launch.bias,
            launch.near,
            encoding,
            weight_sum,
            *launch.sizes(share, splits, groups),
            RESIDENT=tiles.resident,
            **launch.options(),
        )
    if splits == 1:
        return encoding.squeeze(1), weight_sum.squeeze(1)
    return encoding.sum(1), weight_sum.sum(1)


def encode_backward(
    grad: Tensor,
    x: Tensor,
    codewords: Tensor,
    smoothing: Tensor,
    weight_sum: Tensor,
    x_wanted: bool,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, D, _ = x.shape
    K = codewords.shape[0]
    dx = empty_dx(x, x_wanted)
    if x.numel() == 0:
        return dx, codewords.new_zeros(codewords.shape), smoothing.new_zeros(smoothing.shape)
    # Memory moves x and dx once, 4 K (D + 1) bytes a program twice, and the operands, those of grad for every image; L2 as above.
    tiles, programs, groups = cut or backward_tiles(x, K)
    with torch.cuda.device_of(x):
        launch = Launch(x, codewords, smoothing, tiles)
        grad_operands, product = launch.prepare_grad(grad)
        share = ceil_div(B * launch.tiles_per_image, programs)
        programs = ceil_div(B * launch.tiles_per_image, share)
        dcodewords = x.new_empty((programs, K, D), dtype=torch.float32)
        dsmoothing = x.new_empty((programs, K), dtype=torch.float32)
        chunk = min(CHUNK, launch.padded)
        encode_bwd_kernel[(groups * programs,)](
            launch.x,
            launch.descriptor(launch.x, chunk),
            launch.descriptor(dx, chunk),
            launch.codewords,
            launch.smoothing,
            launch.operands,
            launch.centers,
            launch.bias,
            launch.near,
            grad_operands,
            product,
            dx,
            dcodewords,
            dsmoothing,
            *launch.sizes(share, groups),
            B,
            DX=x_wanted,
            CHUNK=chunk,
            RESIDENT=tiles.resident,
            **launch.options(),
        )
    total = dcodewords.sum(0) - (weight_sum.unsqueeze(2) * grad).sum(0)
    ds = dsmoothing.sum(0) if smoothing.dim() else dsmoothing.sum()
    return dx, total.to(codewords.dtype), ds.to(smoothing.dtype)


def empty_dx(x: Tensor, wanted: bool) -> Tensor:
    """Room for the gradient in x, dense, in the layout of x; none where it is not wanted."""
    if not wanted:
        return x.new_empty(0)
    B, D, N = x.shape
    return x.new_empty((B, N, D)).transpose(1, 2) if is_channels_last(x) else x.new_empty((B, D, N))
