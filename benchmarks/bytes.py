"""Count the bytes and products of a call of the Triton kernels from its launches. Nothing runs.

This file knows each kernel's use of its arguments; tests/interpreted/test_bytes.py counts the same in Triton's interpreter.
Repeated reads of codewords and gradients are counted apart: at most 8 KB for a block of channels, they are found in L1.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from benchmarks.compiled import Launch
from ctxenc.kernels.fused.tiles import ceil_div

UNROLLED = 4  # loop rounds that NVIDIA's assembler loads at a time, if the loop only adds


class Work(NamedTuple):
    """Describe the work of all programs of a launch together."""

    reads: dict[str, int]  # bytes from L2, by argument
    writes: dict[str, int]
    memory_waits: int  # dependent loads of a program from memory
    l2_waits: int  # dependent loads of a program from L2
    tiles: int  # units of work that could each have a program
    share: int = 1  # most tiles per program
    flops: int = 0  # on the tensor cores, including rows and columns of zeros
    again: dict[str, int] = {}  # noqa: RUF012 - bytes that L1 gives them


class _Launch:
    """Hold the arguments of a launch, and its kernels' shared counts."""

    def __init__(self, launch: Launch) -> None:
        self.programs, self.a = launch.programs, launch.arguments
        self.K, self.D = self.a.get("K", 0), self.a.get("D", 0)
        self.blocks = ceil_div(self.D, self.a["BLOCK_D"]) if "BLOCK_D" in self.a else 1
        dot = self.a.get("DOT")
        self.codewords, self.other = (3, 3) if dot == "tf32x3" else (2, 1) if dot in ("bf16", "fp16") else (1, 1)

    def read(self, **times: int) -> dict[str, int]:
        """Count the bytes of arguments read so many times, of x once, and of the parameters once for each program."""
        in_run = self.a.get("LAYOUT") == "run"  # each tile of an image reads all of it
        times = {
            "p_x": self.a["tiles"] if in_run else 1,
            "p_codewords": self.programs,
            "p_smoothing": self.programs,
        } | times
        return {name: many * self.a[name].nbytes for name, many in times.items()}

    def prepared(self, rows: int) -> int:
        """Count the bytes of the codewords that all blocks' programs read again after finding the center."""
        return 4 * rows * (self.K + 1) * self.D

    def product(self) -> int:
        """Count the flops of one product of a tile, one block of channels and all codewords."""
        return 2 * self.a["BLOCK_N"] * self.a["BLOCK_D"] * self.a["BLOCK_K"]


def _assign(of: _Launch) -> Work:
    a, grad = of.a, of.a["GRAD"]
    return Work(
        reads=of.read(p_codewords=2 * of.programs, p_grad=a["tiles"] * grad),
        writes={name: a[name].nbytes for name in ("p_weights", "p_q", "p_dsmoothing") if grad or name == "p_weights"},
        memory_waits=ceil_div(of.blocks, max(1, a["STAGES"] - 1)),
        l2_waits=of.blocks,
        tiles=of.programs,
        flops=of.programs * of.blocks * (of.codewords + of.other * grad) * of.product(),
        again={"p_codewords": 4 * of.programs * of.D},
    )


def _forward(of: _Launch) -> Work:
    a, rows = of.a, of.programs // of.blocks
    tiles = of.programs // a["splits"] * a["tiles"]
    return Work(
        reads=of.read(p_map=of.blocks * a["WIDE"]),
        writes={"p_encoding": 4 * rows * of.K * of.D, "p_weight_sum": 4 * rows * of.K},
        memory_waits=a["share"],
        l2_waits=of.blocks + 1,
        tiles=tiles,
        share=a["share"],
        flops=tiles * (of.other + of.codewords * (not a["WIDE"])) * of.product(),
        again={"p_codewords": of.prepared(rows)},
    )


def _backward(of: _Launch) -> Work:
    a, wide = of.a, of.a["WIDE"]
    rows, all_tiles, codebook = of.programs // of.blocks, a["B"] * a["tiles"], 4 * of.K * of.D
    # A program reads an image's gradient once for each of its tiles, from L2 the first time.
    images = rows + a["B"] - ceil_div(all_tiles, math.lcm(a["share"], a["tiles"]))
    products = of.other + 2 * of.other * a["DX"] + (of.codewords + of.other) * (not wide)
    return Work(
        reads=of.read(p_map=of.blocks * wide, p_q=of.blocks * wide) | {"p_grad": images * codebook},
        writes={"p_dx": a["p_dx"].nbytes, "p_rows": 4 * rows * of.K * (of.D + (not wide))},
        memory_waits=a["share"],
        l2_waits=of.blocks + 1,
        tiles=all_tiles * of.blocks,
        share=a["share"],
        flops=all_tiles * of.blocks * products * of.product(),
        again={
            "p_codewords": of.prepared(rows) + (rows + all_tiles * (not wide)) * codebook,
            "p_grad": (all_tiles - images) * codebook,
        },
    )


def _project(of: _Launch) -> Work:
    a = of.a
    tiles, steps = of.programs // a["splits"] * a["tiles"], ceil_div(a["C"], a["BLOCK_C"])
    projection = steps * 2 * a["BLOCK_N"] * a["BLOCK_C"] * a["BLOCK_D"]
    return Work(
        reads=of.read(p_weight=tiles, p_shift=tiles),
        writes={"p_encoding": 4 * of.programs * of.K * of.D, "p_weight_sum": 4 * of.programs * of.K},
        memory_waits=a["share"] * ceil_div(steps, max(1, a["STAGES"] - 1)),
        l2_waits=2,
        tiles=tiles,
        share=a["share"],
        again={"p_codewords": of.prepared(of.programs)},
        flops=tiles * (projection + (of.other + of.codewords) * of.product()),
    )


def _finish_forward(of: _Launch) -> Work:
    a = of.a
    writes = {name: a[name].nbytes for name in ("p_encoding", "p_weight_sum")}
    return Work({"p_rows": a["p_rows"].nbytes}, writes, 0, ceil_div(a["rows"], UNROLLED), of.programs)


def _finish_backward(of: _Launch) -> Work:
    a = of.a
    reads = {"p_rows": 4 * a["rows"] * of.K * of.D, "p_smoothing_rows": 4 * a["smoothing_rows"] * of.K}
    reads |= {"p_grad": a["p_grad"].nbytes, "p_weight_sum": of.D * a["p_weight_sum"].nbytes}
    writes = {name: a[name].nbytes for name in ("p_dcodewords", "p_dsmoothing")}
    waits = ceil_div(ceil_div(a["rows"], a["ROWS"]) + ceil_div(a["B"], a["ROWS"]), UNROLLED)
    return Work(reads, writes, 0, waits, of.programs)


def _gate_forward(of: _Launch) -> Work:
    a = of.a
    reads = {"p_x": a["p_x"].nbytes, "p_logits": a["tiles_n"] * a["p_logits"].nbytes}
    return Work(reads, {"p_y": a["p_y"].nbytes}, 1, 1, of.programs)


def _gate_backward(of: _Launch) -> Work:
    a = of.a
    reads = {"p_x": a["p_x"].nbytes, "p_dy": a["p_dy"].nbytes, "p_logits": a["splits"] * a["p_logits"].nbytes}
    writes = {name: a[name].nbytes for name in ("p_dx", "p_dlogits")}
    return Work(reads, writes, a["steps"], 1, of.programs * a["steps"], a["steps"])


def _add_splits(of: _Launch) -> Work:
    a = of.a
    return Work({"p_sums": a["p_sums"].nbytes}, {"p_total": a["p_total"].nbytes}, 0, a["splits"], of.programs)


WORK: dict[str, Callable[[_Launch], Work]] = {
    "assign_kernel": _assign,
    "encode_fwd_kernel": _forward,
    "encode_bwd_kernel": _backward,
    "project_encode_kernel": _project,
    "finish_fwd_kernel": _finish_forward,
    "finish_bwd_kernel": _finish_backward,
    "gate_fwd_kernel": _gate_forward,
    "gate_bwd_kernel": _gate_backward,
    "add_splits_kernel": _add_splits,
}


def work_of(launch: Launch) -> Work:
    """Count the work of a launch."""
    return WORK[launch.kernel.fn.__name__](_Launch(launch))


def by_storage(launch: Launch, moved: dict[str, int]) -> dict[int, int]:
    """Add up bytes by the storage of the arguments: partial sums of two kinds share one."""
    found: dict[int, int] = {}
    for name, nbytes in moved.items():
        if nbytes:
            storage = launch.arguments[name].untyped_storage()._cdata
            found[storage] = found.get(storage, 0) + nbytes
    return found


class Traffic(NamedTuple):
    """Hold the bytes that a launch moves."""

    memory: int
    l2: int  # between the multiprocessors and L2, including everything from memory


def traffic(launches: Sequence[Launch], l2_bytes: float) -> list[Traffic]:
    """Count the bytes that the launches of a call move.

    Args:
        launches: All of a call, in their order.
        l2_bytes: Size of the GPU's L2 cache. Data of an earlier launch is found there if it fills at most half of it,
            and partial results of this size never reach memory.
    """
    each = [tuple(by_storage(launch, moved) for moved in work_of(launch)[:2]) for launch in launches]
    partial = {storage for read, _ in each for storage in read} & {
        storage for _, written in each for storage in written
    }
    touched: set[int] = set()
    counts = []
    for launch, (read, written) in zip(launches, each, strict=True):
        room = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in _tensors(launch)}
        size = {storage: min(nbytes, room[storage]) for storage, nbytes in (read | written).items()}
        found = {storage for storage in touched if size.get(storage, 0) <= l2_bytes / 2}
        kept = {storage for storage in partial if size.get(storage, 0) <= l2_bytes / 2}
        memory = sum(size[storage] for storage in read.keys() - found) + sum(
            size[storage] for storage in written.keys() - kept
        )
        counts.append(Traffic(memory, sum(read.values()) + sum(written.values())))
        touched |= {*read, *written}
    return counts


def _tensors(launch: Launch) -> list[Tensor]:
    return [argument for argument in launch.arguments.values() if isinstance(argument, Tensor)]
