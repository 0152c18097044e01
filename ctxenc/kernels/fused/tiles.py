"""Tile choices of the Triton kernels: a frozen table by a small heuristic, so that nothing is tuned at the first call."""

from typing import NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """How a launch cuts its work."""

    block_n: int  # pixels of a tile
    block_d: int  # channels of a block, at least 16
    warps: int
    stages: int  # blocks of x in flight; tiles where they are resident
    resident: bool = False  # all channels of a tile in shared memory


def ceil_div(size: int, part: int) -> int:
    """Parts that cover a size. Triton's cdiv is made for kernels: of what a call took on the host it was a fifth."""
    return -(-size // part)


def block_of(size: int) -> int:
    """Channels or codewords of a block that holds so many: a power of two, 16 at least, as tensor cores want it."""
    return max(16, 1 << (size - 1).bit_length())


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of x (B, D, N) are what lies together."""
    return x.shape[1] > 1 and x.stride(1) == 1


def vector(x: Tensor, channels_last: bool) -> int:
    """Elements of 16 bytes where every row of x begins at a multiple of 16 bytes, else 1."""
    elements = 16 // x.element_size()
    row = [x.stride(2)] if channels_last else [x.stride(1), x.shape[2]]
    return elements if all(size % elements == 0 for size in (x.stride(0), *row)) and x.data_ptr() % 16 == 0 else 1


def padded_channels(D: int, tiles: Tiles) -> int:
    """D filled up to whole blocks; to a power of two where a tile holds all channels."""
    blocks = ceil_div(D, tiles.block_d)
    return tiles.block_d * (1 << (blocks - 1).bit_length() if tiles.resident else blocks)


class Target(NamedTuple):
    """What the choice depends on beside x and K."""

    capability: int  # 90 for 9.0; 0 where it is no NVIDIA GPU
    multiprocessors: int


def target_of(x: Tensor) -> Target:
    """The GPU that x is on; in the interpreter a small one that copies no tiles on its own."""
    if not x.is_cuda:
        return Target(0, 4)
    properties = torch.cuda.get_device_properties(x.device)
    return Target(
        0 if torch.version.hip else properties.major * 10 + properties.minor, properties.multi_processor_count
    )


def _tiles(x: Tensor, K: int, target: Target, backward: bool) -> Tiles:
    """The largest tiles of some tried that the compiler fits into a target's registers without a spill; not timed.

    benchmarks.kernel_report tries them. Three terms of tf32 take more registers, so fp32 gets smaller tiles, as do loads of single
    elements, each with an address of its own. Beyond 64 codewords it is shared memory that limits.
    """
    fp32, fp16, wide = x.element_size() == 4, x.dtype == torch.float16, K > 32
    D, major = x.shape[1], target.capability // 10  # 0 for AMD
    aligned = vector(x, is_channels_last(x)) > 1
    if K > 64:
        tiles = Tiles(16, 16, 8 if fp32 else 4, 1)
    elif backward and fp32:
        if major == 0 or (major == 9 and not wide) or (major == 12 and K <= 16):
            tiles = Tiles(64, 16, 4, 1)
        else:
            stages = 2 if major == 10 and D <= 16 else 1
            tiles = Tiles(16, 16, 8, stages) if wide else Tiles(16 if D <= 16 < K else 32, 16, 4, 1)
    elif backward:
        block_d = 16 if fp16 else 32
        if major == 0:
            tiles = Tiles(64, block_d if wide else 32, 4, 1)
        elif wide:
            narrow = {
                8: Tiles(32, block_d, 4, 2),
                9: Tiles(64, block_d, 8, 2 if fp16 else 1),
                10: Tiles(32, 16, 4, 1),
                12: Tiles(32, 32, 4, 2 if aligned else 1),  # what is not is not loaded ahead of time anyway
            }
            tiles = narrow.get(major, Tiles(64, block_d, 8, 2))
        else:
            small = D > 16 and (major == 10 or (major == 8 and fp16))
            tiles = Tiles(64 if small else 128, 32, 8, 2)
    elif fp32:
        tiles = Tiles(32, 16, 4, 2) if major == 12 and not wide else Tiles(32, 32, 4, 2)
    elif major == 0 or (x.dtype == torch.bfloat16 and aligned):
        tiles = Tiles(32 if major == 12 and wide else 64, 64, 4, 2)
    else:
        small = major == 12 and D > 16 and (fp16 or K > 16)
        tiles = Tiles(32 if wide or small else 64, 32, 4, 2)
    return tiles._replace(block_d=min(tiles.block_d, block_of(D)))


def may_be_resident(x: Tensor, backward: bool = False) -> bool:
    """Whether the forms that hold whole tiles in shared memory take an x laid out like this one, and for backward give a dx so."""
    if backward and is_channels_last(x) and x.shape[1] % 8:
        return False
    rows = is_channels_last(x) or x.stride(2) == 1 or x.shape[2] == 1
    return (
        x.dtype == torch.bfloat16
        and rows
        and vector(x, is_channels_last(x)) > 1
        and all(stride > 0 or size == 1 for size, stride in zip(x.shape, x.stride(), strict=True))
    )


def _resident_tiles(D: int, K: int, backward: bool = False) -> Tiles | None:
    """Two tiles of 64 pixels and codewords in two terms fit into the 227 kB of sm_90, and the sums (K, D) into half its registers.

    With 64 pixels a warpgroup of 4 warps has one row of products each, and x @ x^T for the norms stays small. Backward holds the
    gradient beside the codewords, and has room for half as much.
    """
    channels, block_k = block_of(D), block_of(K)
    if block_k > (32 if backward else 64) or channels > min(512, 2**17 // block_k**2 if backward else 2**14 // block_k):
        return None
    return Tiles(64, min(16, channels), 4, 2, resident=True)


def _programs_per_multiprocessor(D: int, K: int) -> int:
    """Of the resident form, by shared memory; more than four gain nothing."""
    shared = 2 * (1 << (D - 1).bit_length()) * (2 * 64 + 2 * K) + 5000
    return max(1, min(4, 227 * 1024 // shared))


def partial_rows(x: Tensor, K: int) -> int:
    """Partial sums in fp32 of K codewords and the channels of x that stay under a tenth of the bytes of x."""
    return x.shape[0] * x.shape[2] * x.element_size() // (40 * K)


def forward_tiles(x: Tensor, K: int, target: Target | None = None) -> tuple[Tiles, int, int]:
    """Tiles of forward; the programs that share the pixels of an image; and those that share its channels."""
    B, D, N = x.shape
    target = target or target_of(x)
    tiles = _resident_tiles(D, K)
    if tiles and target.capability // 10 == 9 and may_be_resident(x):  # whatever B and N, which are compiled for once
        # Two rounds: an uneven last one costs less.
        fill = 2 * _programs_per_multiprocessor(D, K) * target.multiprocessors
        return tiles, max(1, min(ceil_div(N, tiles.block_n), fill // B, partial_rows(x, K) // B)), 1
    tiles = _tiles(x, K, target, backward=False)
    fill = 2 * target.multiprocessors
    splits = max(1, min(ceil_div(N, tiles.block_n), ceil_div(fill, B), partial_rows(x, K) // B))
    return tiles, splits, _groups(fill, B * splits, D, tiles)


def backward_tiles(x: Tensor, K: int, target: Target | None = None) -> tuple[Tiles, int, int]:
    """Tiles of backward; the programs that share the pixels of all images; and those that share their channels."""
    B, D, N = x.shape
    target = target or target_of(x)
    tiles = _resident_tiles(D, K, backward=True)
    if not (tiles and target.capability // 10 == 9 and may_be_resident(x, backward=True)):
        tiles = _tiles(x, K, target, backward=True)
    fill = 2 * target.multiprocessors
    programs = max(1, min(B * ceil_div(N, tiles.block_n), fill, partial_rows(x, K)))
    return tiles, programs, 1 if tiles.resident else _groups(fill, programs, D, tiles)


def may_project(dtype: torch.dtype, D: int, K: int) -> bool:
    """Whether one kernel is to project to D channels and encode on K codewords: where features and sums fit into registers.

    In half precision alone: an fp32 convolution has a setting of its own for tf32, and three terms of it take more registers.
    """
    fits = D <= 128 and min(64, 4096 >> (D - 1).bit_length()) >= K
    return fits and dtype in (torch.float16, torch.bfloat16)


def project_tiles(x: Tensor, K: int, D: int, target: Target | None = None) -> tuple[Tiles, int, int]:
    """Tiles of that kernel, whose block holds all D channels; how many of x it takes at a time; programs of an image."""
    B, C, N = x.shape
    target = target or target_of(x)
    block_d, fp32 = block_of(D), x.element_size() == 4
    tiles = Tiles(32 if fp32 else 64, block_d, 8 if block_d > 32 else 4, 2)
    fill = 8 // tiles.warps * target.multiprocessors
    splits = max(1, min(ceil_div(N, tiles.block_n), ceil_div(fill, B), partial_rows(x, K) * C // D // B))
    wide_blocks = not fp32 and block_d <= 64 and vector(x, is_channels_last(x)) > 1
    return tiles, 64 if wide_blocks else 32, splits


def _groups(fill: int, programs: int, D: int, tiles: Tiles) -> int:
    return max(1, min(ceil_div(D, tiles.block_d), fill // programs))
