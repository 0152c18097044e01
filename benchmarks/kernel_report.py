"""Report the compiled Triton kernels, for GPUs that need not be present.

    python -m benchmarks.kernel_report [--targets sm_90 ...] [--codes 16 ...] [--quick] [--report-spills] [--out PATH]

Every kernel of a call is launched for tensors of the given dtype, layout, alignment, K and D, so that tiles are chosen as at run
time, but it is compiled and not run. Columns: registers and bytes of stack a thread, shared memory, matrix instructions, loads from
global memory and how many of them take 16 and 8 bytes, instructions in all. It ends with an error if a kernel does not compile,
spills more than a few bytes, takes more shared memory than the target has, multiplies without matrix instructions, or has no load
as wide as the alignment of x's rows. --report-spills reports a spill without an error: use it for versions of Triton for which the
tiles were not chosen.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.compiled import DTYPES, FOUND, Launch, compiled, disassemble, launches, read_amdgcn
from benchmarks.environment import describe
from benchmarks.gpus import GPUS, Gpu
from ctxenc.kernels.fused.project import can_project

FEW = 64  # bytes of stack a thread, 16 registers of 255: versions of Triton differ by this much
IMAGES, PIXELS = 3, 4096  # several programs share an image, so that a kernel adds up their sums


class Case(NamedTuple):
    """Describe the inputs of a launch."""

    chip: str
    direction: str  # for benchmarks.compiled.launches
    dtype: str
    channels_last: bool
    align: int  # alignment of the rows of x in bytes: 16, 8, or 1 for an odd number of elements
    D: int
    K: int

    def x(self) -> Tensor:
        """Return an input without memory."""
        dtype, C = DTYPES[self.dtype], 16 * self.D if self.direction == "project" else self.D
        beyond = {16: 0, 8: 8 // dtype.itemsize, 1: 1}[self.align]
        if not self.channels_last:
            return torch.empty((IMAGES, C, PIXELS + beyond), dtype=dtype, device="meta")
        return torch.empty((IMAGES, PIXELS, C + beyond), dtype=dtype, device="meta").transpose(1, 2)[:, :C]


def cases(chips: list[str], codes: list[int], quick: bool) -> list[Case]:
    """Return all cases; the quick ones leave out the smallest differences."""
    sizes = (64, 512) if quick else (16, 32, 64, 100, 128, 256, 512, 1024, 2048)
    directions = ("forward", "backward", "project", "gate", "pool")
    every = product(chips, directions, DTYPES, (False, True), (16, 8) if quick else (16, 8, 1), sizes, codes)
    return [case for case in map(Case._make, every) if _is_there(case, codes[0], quick)]


def _is_there(case: Case, first: int, quick: bool) -> bool:
    if case.direction == "project" and not can_project(DTYPES[case.dtype], case.D, case.K):
        return False
    if case.direction == "gate" and (first != case.K or (quick and case.D == 64)):  # the gate has no codewords
        return False
    if case.direction == "pool" and (case.channels_last or case.align < 16):  # the pool sees only encodings
        return False
    # The alignment of half-precision 14 x 14 maps.
    return not quick or case.align == 16 or (first == case.K and case.dtype != "fp32" and not case.channels_last)


# These depend on D, K or C alone: reported with bf16, channels first, aligned.
SHARED = ("finish_fwd_kernel", "finish_bwd_kernel", "add_splits_kernel", "pool_moments_kernel")


def report(case: Case) -> list[dict[str, Any]]:
    """Return a row for each kernel of a call."""
    gpu = GPUS[case.chip]
    first = case.dtype == "bf16" and not case.channels_last and case.align == 16
    made = launches(case.direction, case.x(), case.K, gpu)
    return [_row(case, launch, gpu) for launch in made if first or launch.kernel.fn.__name__ not in SHARED]


def _row(case: Case, launch: Launch, gpu: Gpu) -> dict[str, Any]:
    a = launch.arguments
    row = {"kernel": launch.kernel.fn.__name__} | case._asdict()
    row |= {name: a.get(name, 0) for name in ("BLOCK_N", "BLOCK_D", "STAGES")} | {"dot": a.get("DOT")}
    row |= {
        "warps": launch.options.get("num_warps", 4),
        "vector_bytes": a.get("VECTOR", 1) * DTYPES[case.dtype].itemsize,
    }
    try:
        kernel = compiled(launch, gpu)
    except Exception as error:  # from Triton, LLVM or ptxas
        return (
            row
            | dict.fromkeys(("shared", *FOUND), 0)
            | {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"}
        )
    found = disassemble(kernel.asm["cubin"]) if gpu.backend == "cuda" else read_amdgcn(kernel.asm["amdgcn"])
    return row | {"shared": kernel.metadata.shared} | found | {"error": None}


def faults(row: dict[str, Any], spills_allowed: bool = False) -> str | None:
    """Return the reasons why a row must not ship."""
    if row["error"]:
        return f"does not compile: {row['error']}"
    limit, width = GPUS[row["chip"]].shared, row["vector_bytes"]
    wide_loads = row["loads_16_bytes"] + (row["loads_8_bytes"] if width == 8 else 0)
    found = {
        f"spills {row['stack']} bytes": row["stack"] > FEW and not spills_allowed,
        f"takes {row['shared']} bytes of shared memory of {limit}": row["shared"] > limit,
        "has no matrix instruction": row["dot"] is not None and row["matrix"] == 0,
        f"loads nothing by {width} bytes": width >= 8 and wide_loads == 0,
    }
    return ", ".join(fault for fault, there in found.items() if there) or None


def line(row: dict[str, Any]) -> str:
    """Format a row of the table."""
    layout = f"{'last' if row['channels_last'] else 'first'}, {row['align']}"
    tiles = f"{row['BLOCK_N']} x {row['BLOCK_D']}, {row['warps']} warps" if row["BLOCK_N"] else ""
    loads = f"{row['loads']} {row['loads_16_bytes']} {row['loads_8_bytes']}"
    return (
        f"{row['chip']:<7} {row['kernel']:<21} {row['direction']:<8} {row['dtype']:<5} {layout:<9} {row['D']:>5} {row['K']:>3} "
        f" {tiles:<17} {row['registers']:>4} {row['stack']:>5} {row['shared']:>7} {row['matrix']:>6} {loads:>10}"
        f" {row['instructions']:>6}"
    )


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each target: the number of kernels, and the largest resources of any."""
    lines = []
    for chip in dict.fromkeys(row["chip"] for row in rows):
        of_chip = [row for row in rows if row["chip"] == chip]
        most = {name: max(row[name] for row in of_chip) for name in ("registers", "stack", "shared")}
        spilling = sum(row["stack"] > 0 for row in of_chip)
        lines.append(
            f"{chip}: {len(of_chip)} kernels, at most {most['registers']} registers, {most['shared']} bytes of"
            f" {GPUS[chip].shared} shared; {spilling} spill, at most {most['stack']} bytes"
        )
    return lines


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Write JSON: the names of the columns, then a line for each row."""
    columns = json.dumps(list(rows[0]))
    values = ",\n".join(json.dumps(list(row.values())) for row in rows)
    head = f'"environment": {json.dumps(describe())},\n"columns": {columns}'
    path.write_text(f'{{{head},\n"rows": [\n{values}\n]}}\n')


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--codes", nargs="+", type=int, default=[16, 32, 64], help="K")
    parser.add_argument("--quick", action="store_true", help="D 64 and 512, aligned to 16 and 8 bytes")
    parser.add_argument(
        "--report-spills", action="store_true", help="no error for a spill: for other versions of Triton"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernel_report.json")
    args = parser.parse_args(arguments)
    print(
        f"{'target':<7} {'kernel':<21} {'of':<8} {'dtype':<5} {'channels':<9} {'D':>5} {'K':>3}  {'tile':<17} {'regs':>4}"
        f" {'stack':>5} {'shared':>7} {'matrix':>6} {'loads 16 8':>10} {'instr.':>6}"
    )
    rows, wrong = [], []
    with ProcessPoolExecutor(args.jobs) as pool:
        for row in chain.from_iterable(pool.map(report, cases(args.targets, args.codes, args.quick))):
            rows.append(row)
            print(line(row), flush=True)
            if fault := faults(row, args.report_spills):
                wrong.append(f"{line(row)}: {fault}")
    write(rows, args.out)
    print("\n".join([*summary(rows), f"written: {args.out}"]))
    if wrong:
        sys.exit("\n".join(["", *wrong, f"{len(wrong)} of {len(rows)} kernels are not fit to ship"]))


if __name__ == "__main__":
    main()
