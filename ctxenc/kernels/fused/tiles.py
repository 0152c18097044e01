"""Choose how a launch cuts its work: tiles from a small table, programs from the free room of the compiled kernel on the GPU.

Nothing is tuned at the first call. Only the number of programs depends on B and N: a new image size compiles nothing.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

LONGEST_RUN = 64  # most pixels of an image read as one run
WAVES = 4  # most rounds of programs in a cut; a ragged last round then costs little


class Tiles(NamedTuple):
    """Describe a program's tiles."""

    block_n: int  # pixels of a tile
    block_d: int  # channels of a block, at least 16
    warps: int
    stages: int  # tiles or blocks in flight


class GPU(NamedTuple):
    """Hold the properties of the GPU on which the cut depends."""

    capability: int  # 90 for 9.0; 0 for other GPUs than NVIDIA's
    multiprocessors: int
    registers: int = 65536  # per multiprocessor, 4 bytes each
    shared: int = 100 * 1024  # bytes of shared memory per multiprocessor
    threads: int = 1536


@cache
def describe_gpu(device: torch.device) -> GPU:
    """Describe the GPU; for a CPU (the interpreter), describe a small GPU."""
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


def choose_block(size: int) -> int:
    """Return the smallest block for this many channels or codewords: a power of two, at least 16, as tensor cores need."""
    return max(16, 1 << (size - 1).bit_length())


def is_channels_last(x: Tensor) -> bool:
    """Return whether the channels of x (B, D, N) are contiguous."""
    return x.shape[1] > 1 and x.stride(1) == 1


def find_vector(x: Tensor, channels_last: bool) -> int:
    """Return the alignment, in elements, of the address and every row of x (B, D, N): 16 bytes, else 8, else 1 element."""
    row = x.stride(2) if channels_last else x.stride(1)
    sizes = (x.stride(0), row, x.shape[1 if channels_last else 2])
    for width in (16, 8):
        elements = width // x.element_size()
        if x.data_ptr() % width == 0 and all(size % elements == 0 for size in sizes):
            return elements
    return 1


def is_run(x: Tensor) -> bool:
    """Return whether x (B, D, N) is half precision with few pixels and unaligned rows, in images that 16-byte reads can cover.

    Example: 7 x 7 pixels, channels first. An image is one run of D * N elements.
    """
    _, D, N = x.shape
    if x.element_size() != 2 or N > LONGEST_RUN or N % 4 == 0 or x.stride(1) != N or x.stride(2) != 1:
        return False
    return D * N % 8 == x.stride(0) % 8 == x.data_ptr() % 16 == 0


def choose_tiles(direction: str, dtype: torch.dtype, D: int, K: int, capability: int) -> Tiles:
    """Choose tiles that compile without spilling registers, or with a spill of a few bytes. Not timed.

    A program holds codewords, gradients and sums of one block of channels: 64 x 32 values of each in half precision. Three terms of
    tf32 take twice the registers. Below Hopper there is only mma.sync, which keeps operands in registers; wgmma leaves them in
    shared memory.
    """
    fp32, backward, block_k = dtype == torch.float32, direction.startswith("backward"), choose_block(K)
    block_d = max(16, min(choose_block(D), 64, (1024 if fp32 else 2048) // block_k))
    hopper = capability // 10 in (9, 10)
    if capability == 0 and backward and block_k > 16:  # AMD spills 94 bytes with block_d = 64
        block_d = min(block_d, 32)
    block_n = 32 if fp32 or (backward and not hopper) else 64
    if block_k > 64 or (backward and block_k > 32 and (fp32 or not hopper)):  # the weights of a tile fill the registers
        block_n = 16
    warps = 8 if block_k > 32 or (backward and block_d > 16) else 4
    return Tiles(block_n, block_d, warps, 3)


def count_programs(gpu: GPU, registers: int, shared: int, warps: int) -> int:
    """Return how many programs of a compiled kernel fit on a multiprocessor at a time.

    CUDA allocates registers in units of 8 a thread and reserves 1 KB of shared memory per program.
    """
    by_registers = gpu.registers // (max(8, ceil_div(registers, 8) * 8) * 32 * warps)
    return max(1, min(by_registers, gpu.shared // (shared + 1024), gpu.threads // (32 * warps)))


@cache
def split_images(B: int, tiles: int, slots: int, partial: int) -> tuple[int, int]:
    """Return the number of programs that share the tiles of one image, and the tiles of each.

    Choose the fastest cut. A GPU runs `slots` programs at a time, so a cut takes rounds. A round takes the time of a program's
    tiles and, if programs share an image, of its partial sum. `partial` is the time of a partial sum, in hundredths of a tile's.
    """

    def estimate_time(share: int) -> tuple[int, int]:
        splits = ceil_div(tiles, share)
        return ceil_div(B * splits, slots) * (100 * share + (partial if splits > 1 else 0)), splits

    one_round = min(
        tiles, ceil_div(tiles * B, slots)
    )  # a larger share only takes longer, unless it covers a whole image
    share = min((*range(max(1, one_round // WAVES), one_round + 1), tiles), key=estimate_time)
    return ceil_div(tiles, share), share


def estimate_partial_cost(K: int, block_n: int, itemsize: int) -> int:
    """Return the time to write and read a partial sum (K, D) in fp32, in hundredths of the time to read a tile (block_n, D)."""
    return 800 * K // (block_n * itemsize)
