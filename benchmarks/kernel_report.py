"""What the compiler makes of the Triton kernels, for GPUs that need not be there.

    python -m benchmarks.kernel_report [--targets sm_90 ...] [--codes 16 ...] [--quick] [--out PATH]

Every launch is made as for tensors of the given dtype, layout, alignment, K and D, so that tiles are chosen as they are at run
time, but compiled instead of run. Columns: registers and bytes of stack a thread, shared memory, matrix instructions, loads and
copies from global memory and how many of them take 16 bytes, instructions in all. It ends with an error if a kernel spills a
register, takes more shared memory than the target has, multiplies without matrix instructions, or loads nothing by 16 bytes where x
is aligned.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.environment import describe
from ctxenc.kernels.fused import launch
from ctxenc.kernels.fused import project as triton_project
from ctxenc.kernels.fused import tiles as triton_tiles
from ctxenc.kernels.fused.tiles import Target, may_project

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Chip(NamedTuple):
    """A target of the compiler, and what the choice of tiles and the limits depend on."""

    backend: str
    arch: int | str
    threads: int  # in a warp
    target: Target
    shared: int  # bytes that a program may take


CHIPS = {
    "sm_80": Chip("cuda", 80, 32, Target(80, 108), 163 * 1024),  # A100
    "sm_90": Chip("cuda", 90, 32, Target(90, 132), 227 * 1024),  # H100, H200
    "sm_100": Chip("cuda", 100, 32, Target(100, 148), 227 * 1024),  # B200
    "sm_120": Chip("cuda", 120, 32, Target(120, 170), 99 * 1024),  # RTX 5090
    "gfx942": Chip("hip", "gfx942", 64, Target(0, 304), 64 * 1024),  # MI300X
}


class Case(NamedTuple):
    """What a launch depends on."""

    chip: str
    direction: str  # of encode; "project" for the projection of 16 D channels and its encoding in one kernel
    dtype: str
    channels_last: bool
    aligned: bool
    D: int
    K: int


class Launch(NamedTuple):
    """A kernel and what it was called with."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]


def cases(chips: list[str], codes: list[int], quick: bool) -> list[Case]:
    """All that is reported; the quick ones leave out what differs least."""
    sizes = (64, 512) if quick else (16, 32, 64, 100, 128, 256, 512, 1024, 2048)
    alignments = (True,) if quick else (True, False)
    dtypes = ("bf16", "fp16", "fp32")
    every = product(chips, ("forward", "backward", "project"), dtypes, (False, True), alignments, sizes, codes)
    found = [Case(*values) for values in every]
    return [case for case in found if case.direction != "project" or may_project(_dtype(case.dtype), case.D, case.K)]


def _dtype(name: str) -> torch.dtype:
    return next(dtype for dtype, its_name in DTYPES.items() if its_name == name)


def launches(case: Case) -> list[Launch]:
    """The last kernel of a call, the one that reads x, on tensors without memory."""
    chip = CHIPS[case.chip]
    dtype = _dtype(case.dtype)
    B, N = 64, 4096 if case.aligned else 4095
    C = 16 * case.D if case.direction == "project" else case.D
    channels = C if case.aligned or not case.channels_last else C + 1
    x = torch.empty((B, N, channels) if case.channels_last else (B, channels, N), dtype=dtype, device="meta")
    x = x.transpose(1, 2)[:, :C] if case.channels_last else x
    codewords = torch.empty(case.K, case.D, device="meta")
    smoothing = torch.empty(case.K, device="meta")
    made: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | {
            k: v for k, v in kwargs.items() if k in kernel.arg_names
        }
        made.append(Launch(kernel, named, {k: v for k, v in kwargs.items() if k not in kernel.arg_names}))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(triton_tiles, "target_of", return_value=chip.target),
        mock.patch.object(torch.version, "hip", "any" if chip.backend == "hip" else None),
    ):
        if case.direction == "forward":
            launch.encode_forward(x, codewords, smoothing)
        elif case.direction == "project":
            weight = torch.empty(case.D, C, dtype=dtype, device="meta")
            triton_project._project_encode(x, weight, weight[:, 0], codewords, smoothing)
        else:
            grad = torch.empty(B, case.K, case.D, device="meta")
            launch.encode_backward(grad, x, codewords, smoothing, grad[..., 0], True)
    return made[-1:]


def source(launch: Launch) -> ASTSource:
    """The kernel specialised as Triton's own launcher would."""
    signature, constants, attributes = {}, {}, {}
    for parameter in launch.kernel.params:
        value, name = launch.arguments[parameter.name], parameter.name
        if parameter.is_constexpr or value is None:
            signature[name], constants[(parameter.num,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{DTYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, Tensor):
            signature[name] = "*" + DTYPES[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def disassemble(cubin: bytes) -> dict[str, int]:
    """Resources and instructions of a binary for NVIDIA."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    operations = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass))

    def count(pattern: str) -> int:
        return sum(n for name, n in operations.items() if re.match(pattern, name))

    return {
        "registers": registers,
        "stack": stack,
        "matrix": count(r"[A-Z]*(HGMMA|HMMA|UTC\w*MMA|QGMMA)"),
        "tile_copies": count("UTMALDG"),
        "loads": count(r"LDG\.|LDGSTS\."),
        "loads_16_bytes": count(r"(LDG|LDGSTS)\..*128"),
        "instructions": sum(operations.values()),
    }


def read_amdgcn(text: str) -> dict[str, int]:
    """Resources and instructions of a binary for AMD, from its assembly and the metadata in it."""

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # type: ignore[union-attr]

    lines = [line.split()[0] for line in text.splitlines() if re.match(r"\s+[vsdgb]\w*_\w+", line)]
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size") + field("vgpr_spill_count"),
        "matrix": sum(line.startswith("v_mfma") for line in lines),
        "tile_copies": 0,
        "loads": sum(line.startswith(("global_load", "buffer_load")) for line in lines),
        "loads_16_bytes": sum(line.endswith("load_dwordx4") for line in lines),
        "instructions": len(lines),
    }


def report(case: Case) -> dict[str, Any]:
    """One row."""
    chip = CHIPS[case.chip]
    (launch,) = launches(case)
    compiled = triton.compile(
        source(launch), target=GPUTarget(chip.backend, chip.arch, chip.threads), options=launch.options
    )
    found = disassemble(compiled.asm["cubin"]) if chip.backend == "cuda" else read_amdgcn(compiled.asm["amdgcn"])
    tiles = {name: launch.arguments[name] for name in ("BLOCK_N", "BLOCK_D", "STAGES")}
    tiles |= {"warps": launch.options["num_warps"], "resident": bool(launch.arguments.get("RESIDENT", False))}
    tiles["vector"] = launch.arguments["VECTOR"]
    return case._asdict() | tiles | {"shared": compiled.metadata.shared} | found


def faults(row: dict[str, Any]) -> str | None:
    """Why a row may not be shipped."""
    limit = CHIPS[row["chip"]].shared
    found = {
        f"spills {row['stack']} bytes": row["stack"] > 0,
        f"takes {row['shared']} bytes of shared memory of {limit}": row["shared"] > limit,
        "has no matrix instruction": row["matrix"] == 0,
        "loads nothing by 16 bytes": row["vector"] > 1 and row["loads_16_bytes"] + row["tile_copies"] == 0,
    }
    return ", ".join(fault for fault, there in found.items() if there) or None


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    layout = ("last" if row["channels_last"] else "first") + ("" if row["aligned"] else ", unaligned")
    tiles = f"{row['BLOCK_N']} x {row['D'] if row['resident'] else row['BLOCK_D']}, {row['warps']} warps"
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
        wrong = sum(faults(row) is not None for row in of_chip)
        lines.append(
            f"{chip}: {len(of_chip)} kernels, at most {most['registers']} registers, {most['stack']} bytes spilled,"
            f" {most['shared']} bytes of {CHIPS[chip].shared} shared; {wrong} not fit to ship"
        )
    return lines


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """JSON: the names of the columns, then a line for each row."""
    columns = json.dumps(list(rows[0]))
    values = ",\n".join(json.dumps(list(row.values())) for row in rows)
    head = f'"environment": {json.dumps(describe())},\n"columns": {columns}'
    path.write_text(f'{{{head},\n"rows": [\n{values}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--codes", nargs="+", type=int, default=[16, 32, 64], help="K")
    parser.add_argument("--quick", action="store_true", help="D 64 and 512, aligned")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernel_report.json")
    args = parser.parse_args()
    print(
        f"{'target':<7} {'kernel':<9} {'dtype':<5} {'channels':<17} {'D':>5} {'K':>3}  {'tile':<19} {'regs':>4} {'stack':>5}"
        f" {'shared':>7} {'matrix':>6} {'16-byte loads':>15} {'instr.':>6}"
    )
    rows, wrong = [], []
    with ProcessPoolExecutor(args.jobs) as pool:
        for row in pool.map(report, cases(args.targets, args.codes, args.quick)):
            rows.append(row)
            print(line(row), flush=True)
            if fault := faults(row):
                wrong.append(f"{line(row)}: {fault}")
    write(rows, args.out)
    print("\n".join([*summary(rows), f"written: {args.out}"]))
    if wrong:
        sys.exit("\n".join(["", *wrong, f"{len(wrong)} of {len(rows)} kernels are not fit to ship"]))


if __name__ == "__main__":
    main()
