"""Estimate how well the operator's launches fill a GPU, and their bottlenecks: kernels are compiled, and nothing runs.

    python -m benchmarks.occupancy [--targets sm_90 ...] [--batch 1 16 64 256] [--dtype bf16] [--layout channels_first]
                                   [--check] [--quick] [--out FILE]

A row is a call of forward or of backward, at the shape of a known network. Columns:

- kernels: launches of the call;
- programs of the kernel that reads x, the number that fits on a multiprocessor (from its compiled registers and shared memory), and
  their waves;
- at work: the part of the GPU with a tile to work on, averaged over the time of the busiest multiprocessor;
- memory, L2: bytes relative to x, from benchmarks.bytes;
- us: the sum of the kernels' times. A kernel's time is the greatest of four: bytes by memory bandwidth; bytes by L2 bandwidth;
  products by the rate of the tensor cores; and latency, a program's dependent loads times the waves. L2 and tensor cores count only
  for multiprocessors at work. The sum omits gaps between kernels, instructions outside the tensor cores and bank conflicts: use it
  to compare launches, not as a speed;
- floor: the part of this time in which memory could move the call's inputs and results once;
- bound: the bottleneck of the longest kernel.

--check ends with an error if an aim fails. The first aim: each kernel that reads x starts work on 90 % of the multiprocessors at
once. It does not count if x has too few tiles, or if fewer multiprocessors finish as soon. The second aim: L2 moves at most twice
the call's inputs and results in forward, and 1.5 times in backward. On large maps this is twice and three times x. It counts up to
128 channels, if x has four tiles for each program that fits on the GPU. With fewer tiles a program's codewords and partial sums
weigh as much as its tiles.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.bytes import Traffic, Work, traffic, work_of
from benchmarks.compiled import DTYPES, Launch, launches, resources
from benchmarks.environment import describe
from benchmarks.gpus import GPUS, Gpu
from benchmarks.shapes import NETWORKS, Feed
from ctxenc.kernels.fused.tiles import ceil_div, programs_per_multiprocessor

DIRECTIONS = ("forward", "backward")
AIM_BUSY, AIM_L2 = 0.9, {"forward": 2.0, "backward": 1.5}
NARROW = 128  # channels up to which the aim for L2 holds


class Kernel(NamedTuple):
    """Hold the estimate of one launch."""

    name: str
    reads_x: bool
    programs: int
    programs_at_a_time: int  # per multiprocessor
    waves: float
    is_full: bool  # it reads x, and has four tiles for each program that fits on the GPU
    at_work: float
    best_at_work: float  # if each tile had its own program
    busy: float  # part of the multiprocessors with a program in the first wave
    could_be_busy: float  # if each tile had its own program
    memory_seconds: float
    l2_seconds: float
    product_seconds: float
    latency_seconds: float

    @property
    def seconds(self) -> float:
        """Return the greatest of its times."""
        return max(self[-4:])

    @property
    def bound(self) -> str:
        """Return the bottleneck."""
        return ("memory", "L2", "tensor", "latency")[self[-4:].index(self.seconds)]


def estimate(launch: Launch, work: Work, moved: Traffic, gpu: Gpu) -> Kernel:
    """Estimate a launch on a GPU with known figures."""
    figures, multiprocessors = gpu.figures, gpu.target.multiprocessors
    assert figures
    a, programs, reads_x = launch.arguments, launch.programs, "p_x" in work.reads
    if reads_x:
        taken = resources(launch, gpu)
        room = programs_per_multiprocessor(gpu.target, taken.registers, taken.shared, taken.warps)
    else:  # a finishing kernel has little traffic
        room = gpu.target.threads // (32 * launch.options.get("num_warps", 4))
    on_busiest = ceil_div(programs, multiprocessors) * work.share
    at_work = work.tiles / (multiprocessors * on_busiest)
    rate = figures.half_rate if a.get("DOT") in ("bf16", "fp16") else figures.tf32_rate
    waits = work.memory_waits * figures.latency + work.l2_waits * figures.l2_latency
    return Kernel(
        name=launch.kernel.fn.__name__,
        reads_x=reads_x,
        programs=programs,
        programs_at_a_time=room,
        waves=programs / (multiprocessors * room),
        is_full=reads_x and work.tiles >= 4 * multiprocessors * room,
        at_work=at_work,
        best_at_work=work.tiles / (multiprocessors * ceil_div(work.tiles, multiprocessors)),
        busy=min(1.0, programs / multiprocessors),
        could_be_busy=min(1.0, work.tiles / multiprocessors),
        memory_seconds=moved.memory / figures.bandwidth,
        l2_seconds=moved.l2 / figures.l2_bandwidth / at_work,
        product_seconds=work.flops / rate / at_work,
        latency_seconds=ceil_div(programs, multiprocessors * room) * waits,
    )


class Row(NamedTuple):
    """Hold the estimate of a call."""

    target: str
    source: str
    shape: tuple[int, int, int, int]  # B, D, N, K
    dtype: str
    channels_last: bool
    direction: str
    memory: float  # bytes relative to x
    l2: float
    least_l2: float  # the call's inputs and results, relative to x
    seconds: float
    floor_seconds: float
    kernels: list[Kernel]

    @property
    def main(self) -> Kernel:
        """Return the kernel that reads x and leaves most of the GPU idle."""
        return min((kernel for kernel in self.kernels if kernel.reads_x), key=lambda kernel: kernel.at_work)

    @property
    def bound(self) -> str:
        """Return the bottleneck of the longest kernel."""
        return max(self.kernels, key=lambda kernel: kernel.seconds).bound

    def faults(self) -> list[str]:
        """Return the failed aims."""
        found = [
            f"{kernel.name} gives {kernel.busy:.0%} of the multiprocessors a tile where {kernel.could_be_busy:.0%} could have one"
            for kernel in self.kernels
            if kernel.reads_x
            and kernel.busy < AIM_BUSY <= kernel.could_be_busy
            and kernel.at_work < kernel.best_at_work
        ]
        most = AIM_L2[self.direction] * self.least_l2
        if self.shape[1] <= NARROW and any(kernel.is_full for kernel in self.kernels) and self.l2 > most:
            found.append(f"L2 moves {self.l2:.2f} times x, the aim is {most:.2f}")
        return found


def dense(B: int, D: int, N: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Return an x (B, D, N) without memory."""
    if channels_last:
        return torch.empty((B, N, D), dtype=dtype, device="meta").transpose(1, 2)
    return torch.empty((B, D, N), dtype=dtype, device="meta")


def row(target: str, feed: Feed, B: int, direction: str, dtype: str, channels_last: bool) -> Row:
    """Estimate a call."""
    gpu, D, N, K = GPUS[target], feed.channels, feed.spatial[0] * feed.spatial[1], feed.num_codes
    x = dense(B, D, N, DTYPES[dtype], channels_last)
    made = launches(direction, x, K, gpu)
    moved = traffic(made, gpu.figures.l2_bytes)
    kernels = [estimate(launch, work_of(launch), each, gpu) for launch, each in zip(made, moved, strict=True)]
    parameters, encoding = 4 * K * (D + 1), 4 * B * K * (D + 1)  # the weight sums count with the encoding
    least = x.nbytes + parameters + encoding
    if direction == "backward":
        least += x.nbytes + parameters
    return Row(
        *(target, feed.source, (B, D, N, K), dtype, channels_last, direction),
        memory=sum(each.memory for each in moved) / x.nbytes,
        l2=sum(each.l2 for each in moved) / x.nbytes,
        least_l2=least / x.nbytes,
        seconds=sum(kernel.seconds for kernel in kernels),
        floor_seconds=least / gpu.figures.bandwidth,
        kernels=kernels,
    )


def rows(target: str, feed: Feed, batches: Sequence[int], dtype: str, channels_last: bool) -> list[Row]:
    """Return all rows of a shape on a GPU; they share their kernels."""
    return [row(target, feed, B, direction, dtype, channels_last) for direction in DIRECTIONS for B in batches]


HEADER = (
    f"{'B, D, N, K':<18} {'':<8} {'kernels':>7} {'programs':>8} {'a mp':>4} {'waves':>6} {'at work':>7} {'memory':>6} {'L2':>6}"
    f" {'us':>8} {'floor':>6}  bound"
)


def line(row: Row) -> str:
    """Format a row of the table."""
    main = row.main
    return (
        f"{', '.join(map(str, row.shape)):<18} {row.direction:<8} {len(row.kernels):>7} {main.programs:>8}"
        f" {main.programs_at_a_time:>4} {main.waves:>6.2f} {100 * main.at_work:>5.0f} % {row.memory:>6.2f} {row.l2:>6.2f}"
        f" {row.seconds * 1e6:>8.1f} {100 * row.floor_seconds / row.seconds:>4.0f} %  {row.bound}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [name for name, gpu in GPUS.items() if gpu.figures]
    parser.add_argument("--targets", nargs="+", choices=known, default=known, metavar="sm_XX")
    parser.add_argument("--batch", nargs="+", type=int, metavar="B", help="images (default: 1 16 64 256)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of x (default: bf16)")
    parser.add_argument("--layout", choices=["channels_first", "channels_last"], default="channels_first")
    parser.add_argument("--quick", action="store_true", help="an H200, two shapes, 1 and 64 images")
    parser.add_argument("--check", action="store_true", help="fail where the aims do not hold")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default: 2)")
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args(arguments)
    feeds, targets = (NETWORKS[2:4], ["sm_90"]) if args.quick else (NETWORKS, args.targets)
    batches = args.batch or ([1, 64] if args.quick else [1, 16, 64, 256])
    found: list[Row] = []
    for target in targets:
        figures = GPUS[target].figures
        print(f"\n{target}, as an {figures.board}; nothing was run\n{HEADER}", flush=True)
        task = partial(rows, target, batches=batches, dtype=args.dtype, channels_last=args.layout == "channels_last")
        for each in _mapped(task, feeds, args.jobs):
            found += each
            print("\n".join(map(line, each)), flush=True)
    if args.out:
        values = [
            each._asdict() | {"bound": each.bound, "kernels": [k._asdict() for k in each.kernels]} for each in found
        ]
        args.out.write_text(json.dumps({"environment": describe(), "rows": values}, indent=1) + "\n")
    faults = [f"{each.target}: {line(each)}: {fault}" for each in found for fault in each.faults()]
    if args.check and faults:
        sys.exit("\n".join(["", *faults, f"{len(faults)} aims do not hold in {len(found)} rows"]))


def _mapped(task: Any, feeds: Sequence[Feed], jobs: int) -> Iterator[list[Row]]:
    if jobs == 1:  # so that a test can replace module attributes
        yield from map(task, feeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(task, feeds)


if __name__ == "__main__":
    main()
