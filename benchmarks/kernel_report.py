"""What the compiler makes of the Triton kernels, for GPUs that need not be there.

    python -m benchmarks.kernel_report [--targets sm_90 ...] [--codes 16 ...] [--quick] [--report-spills] [--out PATH]

Every launch is made as for tensors of the given dtype, layout, alignment, K and D, so that tiles are chosen as they are at run
time, but compiled instead of run. Columns: registers and bytes of stack a thread, shared memory, matrix instructions, loads and
copies from global memory and how many of them take 16 bytes, instructions in all. It ends with an error if a kernel spills a
register, takes more shared memory than the target has, multiplies without matrix instructions, or loads nothing by 16 bytes where x
is aligned. With --report-spills a spill is told, not an error: tiles are chosen for one version of Triton, others spill a little.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.compiled import DTYPES, compiled, disassemble, main_launch, read_amdgcn
from benchmarks.environment import describe
from benchmarks.gpus import GPUS
from ctxenc.kernels.fused.tiles import may_project


class Case(NamedTuple):
    """What a launch depends on."""

    chip: str
    direction: str  # of encode; "project" for the projection of 16 D channels and its encoding in one kernel
    dtype: str
    channels_last: bool
    aligned: bool
    D: int
    K: int

    def x(self) -> Tensor:
        """An input without memory whose rows begin at multiples of 16 bytes, or do not."""
        B, N, C = 64, 4096 if self.aligned else 4095, 16 * self.D if self.direction == "project" else self.D
        if not self.channels_last:
            return torch.empty((B, C, N), dtype=DTYPES[self.dtype], device="meta")
        pitch = C if self.aligned else C + 1
        return torch.empty((B, N, pitch), dtype=DTYPES[self.dtype], device="meta").transpose(1, 2)[:, :C]


def cases(chips: list[str], codes: list[int], quick: bool) -> list[Case]:
    """All that is reported; the quick ones leave out what differs least."""
    sizes = (64, 512) if quick else (16, 32, 64, 100, 128, 256, 512, 1024, 2048)
    alignments = (True,) if quick else (True, False)
    every = product(chips, ("forward", "backward", "project"), DTYPES, (False, True), alignments, sizes, codes)
    found = [Case(*values) for values in every]
    return [case for case in found if case.direction != "project" or may_project(DTYPES[case.dtype], case.D, case.K)]


def report(case: Case) -> dict[str, Any]:
    """One row."""
    gpu = GPUS[case.chip]
    launch = main_launch(case.direction, case.x(), case.K, gpu)
    kernel = compiled(launch, gpu)
    found = disassemble(kernel.asm["cubin"]) if gpu.backend == "cuda" else read_amdgcn(kernel.asm["amdgcn"])
    tiles = {name: launch.arguments[name] for name in ("BLOCK_N", "BLOCK_D", "STAGES")}
    tiles |= {"warps": launch.options["num_warps"], "vector": launch.arguments["VECTOR"]}
    return case._asdict() | tiles | {"shared": kernel.metadata.shared} | found


def faults(row: dict[str, Any], spills_allowed: bool = False) -> str | None:
    """Why a row may not be shipped."""
    limit = GPUS[row["chip"]].shared
    found = {
        f"spills {row['stack']} bytes": row["stack"] > 0 and not spills_allowed,
        f"takes {row['shared']} bytes of shared memory of {limit}": row["shared"] > limit,
        "has no matrix instruction": row["matrix"] == 0,
        "loads nothing by 16 bytes": row["vector"] > 1 and row["loads_16_bytes"] + row["tile_copies"] == 0,
    }
    return ", ".join(fault for fault, there in found.items() if there) or None


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    layout = ("last" if row["channels_last"] else "first") + ("" if row["aligned"] else ", unaligned")
    tiles = f"{row['BLOCK_N']} x {row['BLOCK_D']}, {row['warps']} warps"
    loads = f"{row['loads_16_bytes']}/{row['loads']}" + (f" + {row['tile_copies']} tiles" if row["tile_copies"] else "")
    return (
        f"{row['chip']:<7} {row['direction']:<9} {row['dtype']:<5} {layout:<17} {row['D']:>5} {row['K']:>3}  {tiles:<19}"
        f" {row['registers']:>4} {row['stack']:>5} {row['shared']:>7} {row['matrix']:>6} {loads:>15} {row['instructions']:>6}"
    )


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each target: how many kernels, and the most that one of them takes."""
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
    """JSON: the names of the columns, then a line for each row."""
    columns = json.dumps(list(rows[0]))
    values = ",\n".join(json.dumps(list(row.values())) for row in rows)
    head = f'"environment": {json.dumps(describe())},\n"columns": {columns}'
    path.write_text(f'{{{head},\n"rows": [\n{values}\n]}}\n')


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--codes", nargs="+", type=int, default=[16, 32, 64], help="K")
    parser.add_argument("--quick", action="store_true", help="D 64 and 512, aligned")
    parser.add_argument(
        "--report-spills", action="store_true", help="no error for a spill: for other versions of Triton"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernel_report.json")
    args = parser.parse_args(arguments)
    print(
        f"{'target':<7} {'kernel':<9} {'dtype':<5} {'channels':<17} {'D':>5} {'K':>3}  {'tile':<19} {'regs':>4} {'stack':>5}"
        f" {'shared':>7} {'matrix':>6} {'16-byte loads':>15} {'instr.':>6}"
    )
    rows, wrong = [], []
    with ProcessPoolExecutor(args.jobs) as pool:
        for row in pool.map(report, cases(args.targets, args.codes, args.quick)):
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
