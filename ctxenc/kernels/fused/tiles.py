"""How a launch cuts its work: tiles from a small table, programs from the room that the compiled kernel leaves on the GPU.

Nothing is tuned at the first call, and nothing depends on B and N but the number of programs: a new image size compiles nothing.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

LONGEST_RUN = 64  # pixels of an image whose channels are read as one run
WAVES = 4  # rounds of programs that a cut may take; an uneven last one then costs little


class Tiles(NamedTuple):
    """How a program cuts what it reads."""

    block_n: int  # pixels of a tile
    block_d: int  # channels of a block, at least 16
    warps: int
    stages: int  # tiles or blocks in flight


class GPU(NamedTuple):
    """What the cut depends on beside the arguments of a call."""

    capability: int  # 90 for 9.0; 0 where it is no NVIDIA GPU
    multiprocessors: int
    registers: int = 65536  # of a multiprocessor, 4 bytes each
    shared: int = 100 * 1024  # memory of a multiprocessor, bytes
    threads: int = 1536


@cache
def gpu_of(device: torch.device) -> GPU:
    """Describe the GPU; for a CPU, where the interpreter runs, a small one."""
    if device.type != "cuda":
        return GPU(0, 4)
    properties: Any = torch.cuda.get_device_properties(device)
    return GPU(
        0 if torch.version.hip else properties.major * 10 + properties.minor,
        properties.multi_processor_count,
        properties.regs_per_multiprocessor,
        properties.shared_memory_per_multiprocessor,
        properties.max_threads_per_multi_processor,
    )


def ceil_div(size: int, part: int) -> int:
    """Count the parts that cover a size. Triton's cdiv is made for kernels: it took a fifth of a call's time on the host."""
    return -(-size // part)


def block_of(size: int) -> int:
    """Smallest block that holds so many channels or codewords: a power of two, 16 at least, as tensor cores want it."""
    return max(16, 1 << (size - 1).bit_length())


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of x (B, D, N) lie side by side."""
    return x.shape[1] > 1 and x.stride(1) == 1


def vector(x: Tensor, channels_last: bool) -> int:
    """Elements of 16 bytes, else of 8, at a multiple of which the address and every row of x (B, D, N) begin; else 1."""
    row = x.stride(2) if channels_last else x.stride(1)
    sizes = (x.stride(0), row, x.shape[1 if channels_last else 2])
    for width in (16, 8):
        elements = width // x.element_size()
        if x.data_ptr() % width == 0 and all(size % elements == 0 for size in sizes):
            return elements
    return 1


def is_run(x: Tensor) -> bool:
    """Whether x (B, D, N) in half precision has few pixels, and rows that begin anywhere in images that can be read by 16 bytes.

    As 7 x 7 pixels, channels first: an image is one run of D * N elements.
    """
    _, D, N = x.shape
    if x.element_size() != 2 or N > LONGEST_RUN or N % 4 == 0 or x.stride(1) != N or x.stride(2) != 1:
        return False
    return D * N % 8 == x.stride(0) % 8 == x.data_ptr() % 16 == 0


def choose_tiles(direction: str, dtype: torch.dtype, D: int, K: int, capability: int) -> Tiles:
    """Choose tiles that compile without spilling registers, or with a few bytes of it. Not timed.

    A program holds codewords, gradients and sums of one block of channels: 64 x 32 values of them in half precision. Three terms
    of tf32 take twice the registers. mma.sync, all that there is below Hopper, holds operands in registers that wgmma leaves in
    shared memory.
    """
    fp32, backward, block_k = dtype == torch.float32, direction.startswith("backward"), block_of(K)
    block_d = max(16, min(block_of(D), 64, (1024 if fp32 else 2048) // block_k))
    hopper = capability // 10 in (9, 10)
    if capability == 0 and backward and block_k > 16:  # AMD spills 94 bytes with 64
        block_d = min(block_d, 32)
    block_n = 32 if fp32 or (backward and not hopper) else 64
    if block_k > 64 or (backward and block_k > 32 and (fp32 or not hopper)):  # the weights of a tile fill the registers
        block_n = 16
    warps = 8 if block_k > 32 or (backward and block_d > 16) else 4
    return Tiles(block_n, block_d, warps, 3)


def programs_per_multiprocessor(gpu: GPU, registers: int, shared: int, warps: int) -> int:
    """Programs of a compiled kernel that fit on a multiprocessor at a time.

    Registers are handed out in units of 8 a thread; 1 KB of shared memory a program is CUDA's.
    """
    by_registers = gpu.registers // (max(8, ceil_div(registers, 8) * 8) * 32 * warps)
    return max(1, min(by_registers, gpu.shared // (shared + 1024), gpu.threads // (32 * warps)))


@cache
def split_images(B: int, tiles: int, slots: int, partial: int) -> tuple[int, int]:
    """Programs that share the tiles of one image, and the tiles of each.

    The cut with the least time: rounds of programs on a GPU with so many slots, times the tiles of a program and what its
    partial sum costs, where there is more than one. `partial` is in hundredths of the time of a tile.
    """

    def time(share: int) -> tuple[int, int]:
        splits = ceil_div(tiles, share)
        return ceil_div(B * splits, slots) * (100 * share + (partial if splits > 1 else 0)), splits

    one_round = min(
        tiles, ceil_div(tiles * B, slots)
    )  # a larger share only takes longer, but where it is all of an image
    share = min((*range(max(1, one_round // WAVES), one_round + 1), tiles), key=time)
    return ceil_div(tiles, share), share


def partial_cost(K: int, block_n: int, itemsize: int) -> int:
    """Time to write and read a partial sum (K, D) in fp32, in hundredths of the time to read a tile of x (block_n, D)."""
    return 800 * K // (block_n * itemsize)


def share_tiles(tiles: int, slots: int, partial: int) -> tuple[int, int]:
    """Programs that share the tiles of all images, and the tiles of each; as for one image."""
    return split_images(1, tiles, slots, partial)
