"""The bytes that a launch of the Triton kernels moves, counted from the tiles that it would be given. Nothing is run.

What a count leaves out is told in its fields: whether a second walk over a tile finds it in the L2 cache depends on how many tiles
are in use at a time (in_flight) and on the GPU; and the resident form of forward is counted with codewords near the origin, as it
walks where they are not.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ctxenc.kernels.fused.tiles import (
    Target,
    Tiles,
    backward_tiles,
    block_of,
    ceil_div,
    forward_tiles,
    padded_channels,
    project_tiles,
)

PROGRAMS_AT_A_TIME = 2  # on a multiprocessor: what the choice of tiles fills it with in the walking form


class Bytes(NamedTuple):
    """What a call in one direction takes from or gives to memory, in bytes, and what it takes from the L2 cache besides."""

    x: int  # read from memory, once
    dx: int  # written
    partial_written: int  # sums that are not results yet; 0 where the kernel writes the result itself
    partial_read: int
    operands: int  # parameters and incoming gradient, and what is prepared of them, written and read
    results: int  # the encoding, or the gradients of the parameters
    l2_x: int  # x again: further walks over the channels of a tile
    l2_sums: int  # a program's own sums, read and written at every tile, where they are not in registers
    passes: int  # times that x is loaded, from memory or from L2
    in_flight: int  # of x and of sums in use at a time: what L2 must hold for l2_x and l2_sums to come from there

    @property
    def memory(self) -> int:
        """All that memory moves."""
        return self.x + self.dx + self.partial_written + self.partial_read + self.operands + self.results

    @property
    def l2(self) -> int:
        """All that is to come from the L2 cache."""
        return self.l2_x + self.l2_sums


class EncodeBytes(NamedTuple):
    """Both directions."""

    forward: Bytes
    backward: Bytes


def encode_bytes(
    B: int,
    D: int,
    N: int,
    K: int,
    itemsize: int,
    target: Target,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> EncodeBytes:
    """Counts the bytes of forward and of backward for a dense x (B, D, N), with tiles chosen as for a real call.

    Args:
        B: Images.
        D: Channels.
        N: Pixels of an image.
        K: Codewords, in fp32.
        itemsize: Bytes of an element of x: 4 for fp32, 2 for bf16.
        target: The GPU.
        dtype: Of x where its size does not tell, which is fp16.
        channels_last: How x lies.

    Returns:
        The counts of forward and of backward, the latter with the gradient in x.
    """
    dtype = dtype or (torch.float32 if itemsize == 4 else torch.bfloat16)
    if dtype.itemsize != itemsize:
        raise ValueError(f"encode_bytes: dtype must have {itemsize} bytes, as itemsize says, got {dtype}")
    x = torch.empty((B, N, D) if channels_last else (B, D, N), dtype=dtype, device="meta")
    x = x.transpose(1, 2) if channels_last else x
    return EncodeBytes(_forward_bytes(x, K, target), _backward_bytes(x, K, target))


class ProjectBytes(NamedTuple):
    """Projection and encoding in one kernel, and in steps."""

    memory: int  # all that memory moves
    l2: int  # the weight, once for every tile of pixels
    in_steps: int  # what memory moves for a convolution, a ReLU in place and encode


def project_bytes(
    B: int,
    C: int,
    N: int,
    D: int,
    K: int,
    target: Target,
    *,
    dtype: torch.dtype = torch.bfloat16,
    channels_last: bool = False,
) -> ProjectBytes:
    """Counts the bytes of the projection of a dense x (B, C, N) to D channels and its encoding.

    Args:
        B: Images.
        C: Channels of x.
        N: Pixels of an image.
        D: Channels that the encoding is taken of.
        K: Codewords, in fp32.
        target: The GPU.
        dtype: Of x and of the weight.
        channels_last: How x lies.

    Returns:
        The counts.
    """
    x = torch.empty((B, N, C) if channels_last else (B, C, N), dtype=dtype, device="meta")
    x = x.transpose(1, 2) if channels_last else x
    tiles, _, splits = project_tiles(x, K, D, target)
    per_image = ceil_div(N, tiles.block_n)
    splits = _launched(per_image, splits)
    z = x[:, :1].expand(B, D, N)
    _, prepared = _prepared(z, K, tiles)
    weight, results = D * (C + 1) * dtype.itemsize, 4 * B * K * D
    partial = splits * results if splits > 1 else 0
    encoding = encode_bytes(B, D, N, K, dtype.itemsize, target, dtype=dtype, channels_last=channels_last).forward
    written = B * N * D * dtype.itemsize
    return ProjectBytes(
        memory=x.nbytes + weight + 4 * K * (D + 1) + 2 * prepared + 2 * partial + results,
        l2=B * per_image * D * C * dtype.itemsize,
        in_steps=x.nbytes + weight + 3 * written + encoding.memory,
    )


def _launched(items: int, programs: int) -> int:
    """Programs that get a share of the items, as the launchers cut them."""
    return ceil_div(items, ceil_div(items, programs))


def _prepared(x: Tensor, K: int, tiles: Tiles) -> tuple[int, int]:
    """Bytes of an operand (K, D) as it is prepared, and of all that is prepared of the codewords."""
    itemsize = 2 if x.dtype == torch.bfloat16 else 4
    block_k, padded = block_of(K), padded_channels(x.shape[1], tiles)
    operand = block_k * padded * itemsize
    return operand, 2 * operand + 4 * (2 * padded + block_k * (padded // tiles.block_d))


def _walks(x: Tensor, K: int, target: Target, tiles: Tiles, programs: int, groups: int) -> dict[str, int]:
    """What a launch does with x: programs in all share the pixels, and groups of each their channels."""
    B, D, N = x.shape
    item = tiles.block_n * D * x.element_size()
    if tiles.resident:  # what is in flight is in shared memory
        return {"x": x.nbytes, "l2_x": 0, "l2_sums": 0, "passes": 1, "in_flight": 0}
    # Every group walks over all channels for the weights; for the sums it walks over its own, which makes one walk of all groups.
    passes = groups + 1
    sums = 0 if padded_channels(D, tiles) == tiles.block_d else 4 * K * D  # those of one block stay in registers
    at_a_time = min(programs, ceil_div(PROGRAMS_AT_A_TIME * target.multiprocessors, groups))
    return {
        "x": x.nbytes,
        "l2_x": (passes - 1) * x.nbytes,
        "l2_sums": B * ceil_div(N, tiles.block_n) * 2 * sums,
        "passes": passes,
        "in_flight": at_a_time * (item + sums),
    }


def _forward_bytes(x: Tensor, K: int, target: Target) -> Bytes:
    B, D, N = x.shape
    tiles, splits, groups = forward_tiles(x, K, target)
    splits = _launched(ceil_div(N, tiles.block_n), splits)
    _, prepared = _prepared(x, K, tiles)
    results = 4 * B * K * (D + 1)
    partial = splits * results if splits > 1 else 0
    return Bytes(
        dx=0,
        partial_written=partial,
        partial_read=partial,
        operands=4 * K * (D + 1) + 2 * prepared,
        results=results,
        **_walks(x, K, target, tiles, B * splits, groups),
    )


def _backward_bytes(x: Tensor, K: int, target: Target) -> Bytes:
    B, D, N = x.shape
    tiles, programs, groups = backward_tiles(x, K, target)
    programs = _launched(B * ceil_div(N, tiles.block_n), programs)
    operand, prepared = _prepared(x, K, tiles)
    # The incoming gradient is read to be prepared, and once more to be multiplied by the sums of the weights, whose product is
    # written and read.
    grad = 4 * B * K * D
    partial = 4 * programs * K * (D + 1)
    return Bytes(
        dx=x.nbytes,
        partial_written=partial,
        partial_read=partial,
        operands=4 * K * (D + 1) + 2 * prepared + 2 * B * operand + 4 * grad,
        results=4 * K * (D + 1),
        **_walks(x, K, target, tiles, programs, groups),
    )


def gate_bytes(B: int, C: int, N: int, itemsize: int) -> tuple[int, int]:
    """Counts the bytes that the gate moves, channels first, with logits of the same itemsize.

    Args:
        B: Images.
        C: Channels.
        N: Pixels of an image.
        itemsize: Bytes of an element of x.

    Returns:
        Bytes of forward (x, y, logits) and of backward (x, dy, dx, logits, dlogits, and sums where programs share the pixels).
    """
    from ctxenc.kernels.fused import gate  # not at the top: Triton need not be there

    x = torch.empty((B, C, N), dtype=torch.float32 if itemsize == 4 else torch.bfloat16, device="meta")
    tiles_c, tiles_n, constants = gate._plan(x, x, last=False)
    splits, _ = gate._cut(B * tiles_c, tiles_n, constants["BLOCK_N"])
    logits, partial = B * C * itemsize, 4 * B * C * splits if splits > 1 else 0
    return 2 * x.nbytes + logits, 3 * x.nbytes + 2 * logits + 2 * partial
