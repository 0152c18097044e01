"""Compare the encode operator with its alternatives, on a CPU or a GPU, in one run.

    python -m benchmarks.encode [--device cuda] [--dtype bf16] [--groups facts] [--seconds 300]

Rows: ctxenc's available paths; the matmul form shifted by the mean codeword, as safe under offsets as ours, with autograd;
torch.compile of it, for half precision under autocast too; the expanded form (B x N x K x D, as in mmsegmentation and
PyTorch-Encoding's CPU path), and torch.compile of it for a few shapes; mmsegmentation's own Encoding if its wheel is installed.
Shapes: benchmarks/shapes.py; on a CPU three of them with saturated assignments too, whose weights an Intel processor may multiply
20 times as slowly. Nothing is measured if the operator is wrong in this process. Otherwise each row is checked against fp64 at its
own shape; a wrong row of ours gets no time, nor does a peer in fp32 that is far off.

Every call takes another copy of x, and the copies together exceed the last-level cache four times. The rows of a table are timed
in random order in every round: single calls on a CPU, replays of a CUDA graph on a GPU. Columns, in both directions:

- milliseconds;
- "_ratio": the time relative to ctxenc's;
- "_floor": the roofline as a part of the time. The roofline is the greater of two times: the bytes of x (once in forward; twice,
  and its gradient, in forward + backward) at the copy bandwidth, and the products (2, 6) at the rate of a large square product.
  Both rates are measured in the same run;
- "_products": the time of the row "products alone" as a part of the time; it runs torch.bmm of the same sizes;
- "_peak_bytes": memory above the inputs.

"error" is relative to the largest value. Rows are written after every table, the most important first.
"""

import argparse
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.encode_rows import COMPILED, WORK, Row, Run, Table, measure
from benchmarks.environment import describe
from benchmarks.forms import LAYOUTS, check_operator
from benchmarks.record import RESULTS, Record
from benchmarks.shapes import Problem, problems
from benchmarks.timing import cache_bytes, copy_bandwidth, matmul_rate

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}  # most important first
GROUPS = ["facts", "saturated", "networks", "sweep"]  # of benchmarks.shapes
ROUNDS = {"cpu": 100, "cuda": 25}
PEERS = {  # columns of the table
    COMPILED: "torch.compile of the shifted matmul form",
    "expanded": "expanded form",
    "mmsegmentation": "mmsegmentation's Encoding",
}


def tables(todo: Sequence[Problem], dtypes: Sequence[torch.dtype], device: str) -> list[Table]:
    """Return all tables, the most important first; a sweep on a CPU in one layout."""
    order = list(DTYPES.values())

    def importance(table: Table) -> float:
        of_group = {"facts": 0.1, "saturated": 0.2, "sweep": 1.2, "networks": 1.5}[table.group]
        first = 0.0 if table.source.startswith("EncNet") and table.group != "saturated" else of_group
        return first + order.index(table.dtype)  # a sweep is quick on a GPU

    every = [
        Table(*problem, layout, dtype)
        for dtype in dtypes
        for problem in todo
        for layout in (LAYOUTS[:1] if device == "cpu" and problem.group == "sweep" else LAYOUTS)
    ]
    return sorted(every, key=importance)


def line(row: Row) -> str:
    """Format a row."""
    head = f"{', '.join(map(str, row['shape'])):<20} {row['layout'][9:]:<6} {row['dtype']:<9} {row['form']:<40}"
    parts = [f"{row['error']:>8.0e}" if "error" in row else f"{'':>8}"]
    for direction in WORK:
        if f"{direction}_ms" in row:
            times, ratio = row[f"{direction}_ms"], row.get(f"{direction}_ratio", float("nan"))
            shares = [row.get(f"{direction}_{share}", float("nan")) for share in ("floor", "products")]
            parts.append(f"{times['median']:>9.4f} [{times['p20']:.4f}, {times['p80']:.4f}] {ratio:>6.2f}")
            parts += [f"{100 * share:>4.0f}%" for share in shares]
            parts.append(f"{row[f'{direction}_peak_bytes'] / 2**20:>8.1f} MB")
    parts += [f"{key}: {row[key]}" for key in ("refused", "failed") if key in row][:1]
    parts += [row[f"{d}_timed_by"] for d in WORK if row.get(f"{d}_timed_by", "graph") != "graph"]
    return head + " ".join(parts)


def _pair(row: Row | None, entry: str, text: Callable[[Any], str]) -> str:
    return " / ".join(text(row[f"{direction}_{entry}"]) for direction in WORK) if row else ""


def _short(number: float) -> str:
    return f"{number:.2f}" if number < 9.995 else f"{number:.0f}"


def markdown(result: dict[str, Any]) -> str:
    """Return a CPU result's table: ratios, as times on a shared machine mean little."""
    rows = [row for row in result["rows"] if row["group"] != "sweep" and "forward_backward_ratio" in row]
    at = {(row["source"], row["layout"], row["form"]): row for row in rows}
    peers = {form: title for form, title in PEERS.items() if any(row["form"] == form for row in rows)}
    header = ["map of", "B, D, H x W, K", "ctxenc, ms", "of the roofline, %", *peers.values(), "memory, MB"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        if row["form"] != "ctxenc, torch" or row["layout"] != LAYOUTS[0]:
            continue
        B, _, D, K = row["shape"]
        others = {form: at.get((row["source"], row["layout"], form)) for form in PEERS}
        peaks = [each["forward_backward_peak_bytes"] / 1e6 for each in (row, others["expanded"]) if each]
        lines.append(
            [
                row["source"],
                f"{B}, {D}, {row['spatial'][0]} x {row['spatial'][1]}, {K}",
                _pair(row, "ms", lambda times: _short(times["median"])),
                _pair(row, "floor", lambda part: f"{100 * part:.0f}"),
                *(_pair(others[form], "ratio", _short) for form in peers),
                " / ".join(map(_short, peaks)),
            ]
        )
    text = [f"| {' | '.join(cells)} |" for cells in lines]
    last = [row for row in rows if (row["layout"], row["form"]) == (LAYOUTS[1], COMPILED)]
    if last:
        ratios = [sorted(row[f"{direction}_ratio"] for row in last) for direction in WORK]
        shown = " / ".join(
            f"{values[0]:.2f} to {values[-1]:.2f}, median {statistics.median(values):.2f}" for values in ratios
        )
        text += ["", f"Channels last, at the same shapes, {PEERS[COMPILED]}: {shown}."]
    environment = result["environment"]
    threads = f"{environment['threads']} thread{'s' if environment['threads'] > 1 else ''}"
    versions = f"torch {environment['versions']['torch']}, fp32; commit {environment['commit']}"
    text += ["", f"{environment['processor']}, {threads}, {versions}."]
    return "\n".join(text)


def default_path(environment: dict[str, Any], benchmark: str = "encode") -> Path:
    """Return the file name, after the GPU, or "cpu"."""
    name = re.sub(r"[^a-z0-9]+", "_", (environment["gpu"] or "cpu").lower()).strip("_")
    return RESULTS / f"{benchmark}_{name}.json"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", help="of x (default: all on a GPU, fp32 on a CPU)")
    parser.add_argument("--groups", choices=GROUPS, nargs="+", default=GROUPS, help="of shapes")
    parser.add_argument("--seconds", type=float, help="no table is begun that may end later (default: 300 on a GPU)")
    parser.add_argument("--rounds", type=int, help="calls of a row that are timed (default: 25 on a GPU, 100 on a CPU)")
    parser.add_argument("--threads", type=int, help="of a CPU (default: PyTorch's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small shapes and three rounds, to see that it runs")
    parser.add_argument("--out", type=Path, help="a JSON file (default: benchmarks/results/encode_<device>.json)")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is False")
    if args.seconds is None:
        args.seconds = 300 if args.device == "cuda" else math.inf
    args.dtype = args.dtype or (list(DTYPES) if args.device == "cuda" else ["fp32"])
    args.rounds = args.rounds or (3 if args.quick else ROUNDS[args.device])
    return args


def prepare(args: argparse.Namespace) -> tuple[Run, Record]:
    """Measure the machine's rates, and open the file for the rows.

    Raises:
        SystemExit: the operator is wrong in this process.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    correctness = check_operator(args.device)
    rates = {DTYPES[name]: matmul_rate(args.device, DTYPES[name]) for name in args.dtype}
    run = Run(args.device, args.seed, args.rounds, copy_bandwidth(args.device), rates)
    environment = describe()
    if args.device == "cpu":
        environment["gpu"] = None
    facts = {"copy_bytes_per_second": run.bandwidth, "cache_bytes": cache_bytes(args.device)}
    facts["matmul_flops_per_second"] = {str(dtype).removeprefix("torch."): rate for dtype, rate in rates.items()}
    out = args.out or (Path("runs/encode_quick.json") if args.quick else default_path(environment))
    print(f"{environment['gpu'] or environment['processor']}, torch {environment['versions']['torch']}", end="")
    print(f", copies at {run.bandwidth / 1e9:.1f} GB/s, products at", end=" ")
    print(", ".join(f"{rate / 1e12:.3g} TFLOP/s ({name})" for name, rate in facts["matmul_flops_per_second"].items()))
    print("B, N, D, K; layout; dtype of x; form; error; then forward and forward + backward: median ms [20 %, 80 %],")
    print("times ctxenc's own, part that the roofline and the products alone take, memory above the inputs", flush=True)
    return run, Record("encode", out, correctness, args.seed, args.device, **facts)


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.monotonic()
    args = parse(arguments)
    run, record = prepare(args)
    chosen = [problem for problem in problems(args.device, args.quick) if problem.group in args.groups]
    todo = tables(chosen, [DTYPES[name] for name in args.dtype], args.device)
    done, longest = 0, 0.0
    for table in todo:
        began = time.monotonic()
        if done and began + longest > start + args.seconds:
            break
        rows = measure(table, run)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        record.add(*rows)
        print("\n".join(map(line, rows)), flush=True)
        done, longest = done + 1, max(longest, time.monotonic() - began)
    print(f"{done} of {len(todo)} tables in {time.monotonic() - start:.0f} s; written: {record.path}")
    if refused := [line(row) for row in record.rows if "refused" in row]:
        raise SystemExit("no speed is reported for a wrong result:\n" + "\n".join(refused))


if __name__ == "__main__":
    main()
