"""Tile choices of the Triton kernels: a frozen table by a small heuristic, so that nothing is tuned at the first call."""

from typing import NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """How a launch cuts its work."""

    block_n: int  # pixels of a tile
    block_d: int  # channels of a block, at least 16
    warps: int
    stages: int  # blocks of x in flight


def _tiles(D: int, K: int, itemsize: int, backward: bool) -> Tiles:
    """Tiles that the compiler fits into 255 registers a thread without a spill, on sm_80 and sm_90 at D = 512, K = 32; not timed.

    Three terms of tf32 take more registers, so fp32 gets smaller ones; its backward spills 8 bytes on sm_80, channels first.
    """
    if itemsize == 4:
        block_n, block_d, warps, stages = (64, 16, 4, 1) if backward else (32, 32, 4, 2)
    else:
        block_n, block_d, warps, stages = (128, 32, 8, 2) if backward else (64, 64, 4, 2)
    block_k = max(16, 1 << (K - 1).bit_length())
    channels = max(16, 1 << (D - 1).bit_length())
    return Tiles(max(16, block_n * 32 // max(32, block_k)), min(block_d, channels), warps, stages)


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def partial_rows(x: Tensor, K: int) -> int:
    """Partial sums (K, D) in fp32 that stay under a tenth of the bytes of x."""
    return x.shape[0] * x.shape[2] * x.element_size() // (40 * K)


def forward_tiles(x: Tensor, K: int) -> tuple[Tiles, int, int]:
    """Tiles of forward; the programs that share the pixels of an image; and those that share its channels."""
    B, D, N = x.shape
    tiles = _tiles(D, K, x.element_size(), backward=False)
    fill = 2 * _multiprocessors(x)
    splits = max(1, min(-(-N // tiles.block_n), -(-fill // B), partial_rows(x, K) // B))
    return tiles, splits, _groups(fill, B * splits, D, tiles)


def backward_tiles(x: Tensor, K: int) -> tuple[Tiles, int, int]:
    """Tiles of backward; the programs that share the pixels of all images; and those that share their channels."""
    B, D, N = x.shape
    tiles = _tiles(D, K, x.element_size(), backward=True)
    fill = 2 * _multiprocessors(x)
    programs = max(1, min(B * -(-N // tiles.block_n), fill, partial_rows(x, K)))
    return tiles, programs, _groups(fill, programs, D, tiles)


def _groups(fill: int, programs: int, D: int, tiles: Tiles) -> int:
    return max(1, min(-(-D // tiles.block_d), fill // programs))
