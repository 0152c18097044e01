"""The encode operator against what one would write instead, on a GPU (or a CPU), in one run that stops when its time is over.

    python -m benchmarks.encode [--device cuda] [--dtype bf16] [--seconds 300] [--out benchmarks/results/encode_<device>.json]

Rows: ctxenc's two paths; the matmul form shifted by the mean codeword, which is as safe under offsets as ours, with autograd;
torch.compile of it, for half precision under autocast too; and the expanded form (B x N x K x D, as mmsegmentation computes it)
where it fits. Each is checked against fp64 first, and no time is reported of a ctxenc row that is wrong.

On a GPU a time is that of CUDA graph replays over copies of x that together exceed the L2 cache four times, the rows in random
order in every round. "Floor" is the part of the time that its least bytes take at the copy bandwidth measured in the same run:
x once in forward; x twice and one write of its gradient in forward + backward. The most important tables come first.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ctxenc
from benchmarks.environment import describe
from benchmarks.forms import (
    LAYOUTS,
    TOLERANCE,
    Encode,
    Shape,
    error,
    exact,
    expanded,
    forward,
    gradients,
    inputs,
    shifted_matmul,
)
from benchmarks.timing import (
    Timer,
    copies_beyond_cache,
    copy_bandwidth,
    cpu_timer,
    cuda_timer,
    first_line,
    interleaved,
    spread,
)

# (B, N, D, K)
GROUPS: dict[str, list[Shape]] = {
    "EncNet": [(16, 3600, 512, 32), (4, 9409, 512, 32)],
    "block": [
        (256, 3136, 16, 16),  # in place of SE in a ResNet, C' = C / 16
        (256, 784, 32, 16),
        (256, 196, 64, 16),
        (256, 49, 128, 16),
        (64, 784, 128, 16),  # C' = C / 4
        (64, 196, 256, 16),
        (128, 64, 64, 32),  # CIFAR
    ],
    "sweep": [  # one size at a time about the middle; without torch.compile, which takes most of the time of the others
        *((16, N, 512, 32) for N in (196, 784, 3136, 12544)),
        *((16, 3136, 512, K) for K in (16, 64)),
        *((16, 3136, D, 32) for D in (64, 128, 256, 1024)),
    ],
}
QUICK: dict[str, list[Shape]] = {"sweep": [(2, 49, 16, 4), (3, 30, 8, 5)]}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}  # in order of importance
EXPANDED_PART = 0.1  # of what is free, for one tensor of B x N x K x D: autograd takes five or six of them
PASSES = {"forward": 1, "forward_backward": 3}  # times that the bytes of x must move

Row = dict[str, Any]


class Table(NamedTuple):
    """What one table of rows is about."""

    group: str
    shape: Shape
    layout: str
    dtype: torch.dtype


def tables(groups: dict[str, list[Shape]], dtypes: Sequence[torch.dtype]) -> list[Table]:
    """All tables, the most important first."""
    importance = {"EncNet": 0, "sweep": 1.2, "block": 1.5}  # a sweep takes little time
    order = list(DTYPES.values())
    every = [
        Table(group, shape, layout, dtype)
        for group, shapes in groups.items()
        for dtype in dtypes
        for shape in shapes
        for layout in LAYOUTS
    ]
    return sorted(every, key=lambda table: importance[table.group] + order.index(table.dtype))


def under_autocast(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """The shifted matmul form as a network in mixed precision runs it; without the cache of casts, which no CUDA graph can hold."""
    with torch.autocast(x.device.type, x.dtype, cache_enabled=False):
        return shifted_matmul(x, codewords, smoothing)


def forms_of(table: Table, device: str) -> dict[str, Encode]:
    """The rows of a table."""
    B, N, D, K = table.shape
    forms: dict[str, Encode] = {"ctxenc, torch": partial(ctxenc.encode, backend="torch")}
    if device == "cuda":  # Triton's interpreter has no speed
        forms["ctxenc, triton"] = partial(ctxenc.encode, backend="triton")
    forms["shifted matmul"] = shifted_matmul
    if table.group != "sweep":
        forms["torch.compile(shifted matmul)"] = torch.compile(shifted_matmul)
        if table.dtype != torch.float32:
            forms["torch.compile(shifted matmul), autocast"] = torch.compile(under_autocast)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 2**34
    nbytes = 4 * B * N * K * D
    if nbytes < EXPANDED_PART * free:
        forms["expanded"] = expanded
    return forms


def check(table: Table, forms: dict[str, Encode], tensors: tuple[Tensor, ...], grad: Tensor) -> list[Row]:
    """A row for each form: its error, or why there is none."""
    wanted = exact(shifted_matmul, tensors, grad)  # in fp64, where the expanded form would not fit
    rows = []
    for name, form in forms.items():
        row: Row = table._asdict() | {"dtype": str(table.dtype).removeprefix("torch."), "form": name}
        ours = name.startswith("ctxenc")
        try:
            row["error"] = error(form, tensors, grad, wanted)
        except Exception as failure:  # a compiler's own error is of any type, and the other rows are worth having
            if "CUDA error" in str(failure):  # after which this process can use the GPU no more
                raise RuntimeError(f"{name} at {table}") from failure
            row["failed"] = first_line(failure)
            if ours and "cannot run" not in row["failed"]:
                row["refused"] = row["failed"]
        else:
            if ours and not row["error"] <= TOLERANCE[table.dtype]:
                row["refused"] = f"error {row['error']:.1e} is over {TOLERANCE[table.dtype]:.0e}"
        rows.append(row)
    return rows


def peak_above(call: Callable[[], Any]) -> int:
    """Bytes that a call takes on the GPU at its peak, its results included, above what is there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def timer_of(row: Row, direction: str, form: Encode, sets: list[tuple[Tensor, ...]], grad: Tensor) -> Timer | None:
    """The timer of a row in one direction; None where it fails, which the row then tells."""
    if direction == "forward":
        calls = [partial(forward, form, tensors) for tensors in sets]
    else:
        calls = [partial(gradients, form, tensors, grad) for tensors in sets]
    if not grad.is_cuda:
        return cpu_timer(calls[0], 1 if form is expanded else 5)
    try:
        calls[0]()  # compiles, which takes memory of its own
        row[f"{direction}_peak_bytes"] = peak_above(calls[0])
        timer, row[f"{direction}_timed_by"] = cuda_timer(calls)
    except Exception as failure:  # out of memory most of all
        row["failed"] = first_line(failure)
        return None
    return timer


def add_times(
    rows: list[Row],
    forms: dict[str, Encode],
    sets: list[tuple[Tensor, ...]],
    grad: Tensor,
    rounds: int,
    bandwidth: float | None,
) -> None:
    """Times of all rows that are right, in both directions, and how they compare."""
    for direction, passes in PASSES.items():
        timers = {}
        for row in rows:
            if "failed" in row or "refused" in row:
                continue
            if timer := timer_of(row, direction, forms[row["form"]], sets, grad):
                timers[row["form"]] = timer
        times = {name: spread(values) for name, values in interleaved(timers, rounds, slow="expanded", every=5).items()}
        base = times.get("ctxenc, triton") or times.get("ctxenc, torch")
        for row in rows:
            if row["form"] not in times:
                continue
            row[f"{direction}_ms"] = times[row["form"]]
            median = times[row["form"]]["median"]
            if base:
                row[f"{direction}_ratio"] = median / base["median"]
            if bandwidth:
                row[f"{direction}_floor"] = passes * sets[0][0].nbytes / bandwidth * 1e3 / median


def measure(table: Table, seed: int, device: str, rounds: int, bandwidth: float | None) -> list[Row]:
    """One table: every row at one shape, layout and dtype."""
    torch._dynamo.reset()
    torch.manual_seed(seed)
    B, _, D, K = table.shape
    tensors = inputs(table.shape, table.layout, table.dtype, device)
    grad = torch.randn(B, K, D, device=device)
    forms = forms_of(table, device)
    rows = check(table, forms, tensors, grad)
    x, *parameters = tensors
    copies = [x.detach().clone().requires_grad_() for _ in range(copies_beyond_cache(x) - 1)]
    add_times(rows, forms, [(each, *parameters) for each in (x, *copies)], grad, rounds, bandwidth)
    return rows


def line(row: Row) -> str:
    """A row for reading."""
    head = f"{', '.join(map(str, row['shape'])):<20} {row['layout'][9:]:<6} {row['dtype']:<9} {row['form']:<40}"
    parts = [f"{row['error']:>8.0e}" if "error" in row else f"{'':>8}"]
    for direction in PASSES:
        if f"{direction}_ms" in row:
            times, ratio = row[f"{direction}_ms"], row.get(f"{direction}_ratio", float("nan"))
            floor = f"{100 * row[f'{direction}_floor']:>4.0f}%" if f"{direction}_floor" in row else ""
            parts.append(f"{times['median']:>9.4f} [{times['p20']:.4f}, {times['p80']:.4f}] {ratio:>6.2f} {floor}")
            if f"{direction}_peak_bytes" in row:
                parts.append(f"{row[f'{direction}_peak_bytes'] / 2**20:>8.1f} MB")
    parts += [f"{key}: {row[key]}" for key in ("refused", "failed") if key in row][:1]
    parts += [row[f"{d}_timed_by"] for d in PASSES if row.get(f"{d}_timed_by", "graph") != "graph"]
    return head + " ".join(parts)


def default_path(environment: dict[str, Any]) -> Path:
    """Named after the device; not encode_cpu.json, which is another program's."""
    name = re.sub(r"[^a-z0-9]+", "_", (environment["gpu"] or environment["processor"]).lower()).strip("_")
    return Path(__file__).parent / "results" / f"encode_{name}.json"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=list(DTYPES), help="of x")
    parser.add_argument("--seconds", type=float, default=300, help="no table is begun that may end later")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two small shapes and three rounds, to see that it runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is False")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.monotonic()
    args = parse(arguments)
    environment = describe()
    if args.device == "cpu":
        environment["gpu"] = None  # not what was measured
    bandwidth = copy_bandwidth(args.device) if args.device == "cuda" else None
    out = args.out or default_path(environment)
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment, "seed": args.seed, "copy_bytes_per_second": bandwidth, "rows": []}
    todo = tables(QUICK if args.quick else GROUPS, [DTYPES[name] for name in args.dtype])
    print(f"{environment['gpu'] or environment['processor']}, torch {environment['versions']['torch']}", end="")
    print(f", copies at {bandwidth / 1e12:.2f} TB/s" if bandwidth else "")
    print("B, N, D, K; layout; dtype of x; form; error; then forward and forward + backward: median ms [20 %, 80 %],")
    print("times ctxenc's own, part of the floor, memory above the inputs", flush=True)
    done, longest = 0, 0.0
    for table in todo:
        began = time.monotonic()
        if done and began + longest > start + args.seconds:
            break
        rows = measure(table, args.seed, args.device, 3 if args.quick else args.rounds, bandwidth)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        result["rows"] += rows
        out.write_text(json.dumps(result, indent=1) + "\n")
        print("\n".join(map(line, rows)), flush=True)
        done, longest = done + 1, max(longest, time.monotonic() - began)
    print(f"{done} of {len(todo)} tables in {time.monotonic() - start:.0f} s; written: {out}")
    if refused := [line(row) for row in result["rows"] if "refused" in row]:
        raise SystemExit("no speed is reported for a wrong result:\n" + "\n".join(refused))


if __name__ == "__main__":
    main()
