"""Prepare every launch: the constants of a compile key, the GPU's free room, and x in a readable layout."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctxenc.kernels.fused.steps import INTERPRETED
from ctxenc.kernels.fused.tiles import (
    Tiles,
    ceil_div,
    choose_block,
    choose_tiles,
    count_programs,
    describe_gpu,
    find_vector,
    is_channels_last,
    is_run,
)

FUSED = {"enable_fp_fusion": True}  # Triton 3.10 flips its default


class Key(NamedTuple):
    """Hold everything that a kernel is compiled for, except the versions and the GPU."""

    direction: str  # "forward", "backward", "backward without dx" or "project"
    dtypes: tuple[torch.dtype, ...]  # dtypes of x, codewords, smoothing
    D: int
    K: int
    shared: bool  # one smoothing factor for all codewords
    layout: str  # "last", "first" or "run"
    vector: int
    dot: str  # precision of the products


class Plan(NamedTuple):
    """Describe the launch of a key's kernels."""

    tiles: Tiles
    wide: bool  # more channels than one program holds
    blocks: int  # number of channel blocks
    options: dict[str, Any]


def choose_precision(dtype: torch.dtype) -> str:
    """Return the precision of products: "bf16", "fp16", or fp32's input_precision by torch's own setting."""
    if dtype == torch.bfloat16:
        return "bf16"
    if dtype == torch.float16:
        return "fp16"
    if torch.version.hip:  # AMD has fp32 matrix instructions, and no tf32
        return "ieee"
    matmul = torch.backends.cuda.matmul  # torch has two settings; reading the old one raises once the new one was used
    setting = getattr(matmul, "fp32_precision", None) or ("tf32" if matmul.allow_tf32 else "ieee")
    return "tf32" if setting == "tf32" else "tf32x3"


def make_readable(x: Tensor) -> Tensor:
    """Copy x (B, D, N) if neither its channels nor its pixels are contiguous."""
    if x.stride(2) == 1 or x.shape[2] == 1 or is_channels_last(x):
        return x
    return x.contiguous()


def allocate_like(x: Tensor, wanted: bool = True) -> Tensor:
    """Allocate a dense tensor like x (B, C, N), in its layout: a result or a gradient. Not wanted: an empty tensor."""
    if not wanted:
        return x.new_empty(0)
    B, C, N = x.shape
    return x.new_empty((B, N, C)).transpose(1, 2) if is_channels_last(x) else x.new_empty((B, C, N))


def pack(tensor: Tensor) -> Tensor:
    """Copy a small tensor that is not contiguous or not aligned to 16 bytes: Triton would compile a variant for it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def make_key(direction: str, x: Tensor, codewords: Tensor, smoothing: Tensor) -> Key:
    """Return the compile key of a call on a readable x."""
    layout = "last" if is_channels_last(x) else "run" if is_run(x) else "first"
    elements = 16 // x.element_size() if layout == "run" else find_vector(x, layout == "last")
    dtypes = (x.dtype, codewords.dtype, smoothing.dtype)
    K, D = codewords.shape
    return Key(direction, dtypes, D, K, smoothing.dim() == 0, layout, elements, choose_precision(x.dtype))


@cache
def make_plan(key: Key, device: torch.device) -> Plan:
    """Choose the tiles and constants of a compile key."""
    tiles = choose_tiles(key.direction, key.dtypes[0], key.D, key.K, describe_gpu(device).capability)
    options = {
        "D": key.D,
        "K": key.K,
        "SHARED": key.shared,
        "LAYOUT": key.layout,
        "VECTOR": key.vector,
        "DOT": key.dot,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": tiles.block_d,
        "BLOCK_K": choose_block(key.K),
        "STAGES": tiles.stages,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        **FUSED,
    }
    return Plan(tiles, tiles.block_d < key.D, ceil_div(key.D, tiles.block_d), options)


_slots: dict[Any, int] = {}


def count_slots(kernel: Any, key: Key, arguments: tuple[Any, ...], options: dict[str, Any]) -> int:
    """Count the programs of a kernel that the GPU runs at a time, from its compiled registers and shared memory."""
    device = arguments[0].device
    name = kernel, key, options.get("C"), device  # only the projection passes C
    slots = _slots.get(name)
    if slots is None:
        gpu, programs = describe_gpu(device), 2
        if not INTERPRETED and not torch.version.hip:  # AMD counts registers differently
            compiled = kernel.warmup(*arguments, grid=(1,), **options)
            compiled.run  # noqa: B018 - loads the binary, which tells its registers
            programs = count_programs(gpu, compiled.n_regs, compiled.metadata.shared, options["num_warps"])
        slots = _slots[name] = gpu.multiprocessors * programs
    return slots
