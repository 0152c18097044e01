"""ctxenc doctor: check whether the fused kernels work on this machine, and how much they gain."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ctxenc.diagnosis.feeds import FEEDS
from ctxenc.runs.errors import UserError
from ctxenc.training.console import positive_int, text_table

DTYPES = ("bf16", "fp16", "fp32")
LAYOUTS = ("channels_first", "channels_last")


def shape(text: str) -> tuple[int, ...]:
    """Parse B,D,H,W,K for argparse."""
    try:
        sizes = tuple(map(int, text.split(",")))
    except ValueError:
        sizes = ()
    if len(sizes) != 5 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be B,D,H,W,K, five positive integers, got {text!r}")
    return sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = (
        "example: ctxenc doctor --model seresnet50 --out report.json. Exit code:"
        " 0 if every kernel serves, or there is no GPU; 1 if a kernel failed its check, or none runs on the GPU;"
        " 2 for a wrong argument. It looks at the first GPU: choose another by CUDA_VISIBLE_DEVICES."
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="NAME", help="the kernels of a timm model with ContextEncoding in place of SE")
    what.add_argument(
        "--shapes", nargs="+", type=shape, metavar="B,D,H,W,K", help="default: those of twelve layers of known networks"
    )
    parser.add_argument("--num-codes", type=positive_int, default=16, metavar="K", help="of the model (default: 16)")
    parser.add_argument("--batch-size", type=positive_int, default=8, metavar="N", help="of the model (default: 8)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="half: under autocast (default: all)"
    )
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS, help="(default: both)")
    parser.add_argument(
        "--interpret", action="store_true", help="check the kernels in Triton's interpreter, on the CPU"
    )
    jobs = min(8, os.cpu_count() or 1)
    parser.add_argument(
        "--jobs", type=positive_int, default=jobs, metavar="N", help=f"kernels at a time (default: {jobs})"
    )
    parser.add_argument("--seconds", type=positive_int, default=300, metavar="N", help="for a kernel (default: 300)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all of it as JSON, to attach to a report")


def run(args: argparse.Namespace) -> None:
    """Print the findings as they come, write them, and exit with 1 if a kernel does not work."""
    from ctxenc.diagnosis.examination import examine

    if args.out:
        args.out.touch()  # fail now, not after minutes of work
    shapes = args.shapes or [(feed.batch, feed.channels, *feed.spatial, feed.num_codes) for feed in FEEDS]
    request = {"model": args.model, "shapes": shapes, "num_codes": args.num_codes, "batch": args.batch_size}
    request |= {"dtypes": args.dtypes, "layouts": args.layouts}
    found: dict[str, Any] = {
        "request": request,
        "interpreted": args.interpret,
        "verdicts": [],
        "times": [],
        "problems": [],
    }
    for name, result in examine(request, args.interpret, args.jobs, args.seconds):
        if name == "mistake":
            raise UserError(result["mistake"])
        if name == "verdict":
            found["verdicts"].append(result)
            if not result["serves"]:
                print(f"FAILED {kind_text(result['kind'])}: {result['reason']}", flush=True)
        elif name == "times":
            found["times"].append(result)
        elif name == "problem":
            found["problems"].append(result["problem"])
            print(f"problem: {result['problem']}", flush=True)
        else:
            found[name] = result
            print(environment_text(result) if name == "environment" else needs_text(result, args.interpret), flush=True)
    print(verdicts_text(found["verdicts"]), times_text(found["times"]), sep="\n", end="")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written: {args.out}")
    failed = [verdict for verdict in found["verdicts"] if not verdict["serves"]]
    needs = found.get("needs", {"device": "unknown", "why_no_kernels": None})
    if failed or found["problems"] or (needs["why_no_kernels"] and needs["device"] != "meta"):
        raise SystemExit(1)


def kind_text(kind: list[Any]) -> str:
    """Return a kind of kernel on one line."""
    operator, constants, _ = kind
    return f"{operator} ({', '.join(f'{name} {value}' for name, value in constants.items())})"


def environment_text(found: dict[str, Any]) -> str:
    """Return versions, GPUs, the choice of auto, and caches that cannot be written."""
    versions = [f"{name} {version or 'missing'}" for name, version in found["versions"].items()]
    platform = {"CUDA": found["cuda"], "ROCm": found["rocm"], "driver": found["driver"], "Python": found["python"]}
    lines = [", ".join([*versions, *(f"{name} {version}" for name, version in platform.items() if version)])]
    for index, gpu in enumerate(found["gpus"]):
        lines.append(
            f"GPU {index}: {gpu['name']}, {gpu['capability']}, {gpu['multiprocessors']} multiprocessors,"
            f" {gpu['memory_bytes'] / 2**30:.0f} GiB"
        )
    if not found["gpus"]:
        lines.append("no GPU that PyTorch can use")
    lines.append(f'backend="auto" takes {found["auto"]["backend"]}: {found["auto"]["reason"]}')
    lines += [
        f"{name} cannot be kept: {cache['problem']}" for name, cache in found["caches"].items() if cache["problem"]
    ]
    return "\n".join(lines)


def needs_text(needs: dict[str, Any], interpret: bool) -> str:
    """Return the plan of the examination."""
    kinds, calls = len(needs["kinds"]), len(needs["calls"])
    if needs["device"] == "meta":
        return (
            f"encode calls of {calls} kinds: the PyTorch path serves all; --interpret checks the kernels without a GPU"
        )
    if needs["why_no_kernels"]:
        return f"the PyTorch path serves every call: {needs['why_no_kernels']}"
    where = "in Triton's interpreter" if interpret else "on this GPU"
    return f"encode calls of {calls} kinds: {kinds} kernels are tried {where}"


def verdicts_text(verdicts: list[dict[str, Any]]) -> str:
    """Return a table with a row for each operator and dtype."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for verdict in verdicts:
        operator, constants, _ = verdict["kind"]
        groups.setdefault((operator, str(constants.get("x", ""))), []).append(verdict)
    rows = []
    for (operator, dtype), group in groups.items():
        worst = max((value for verdict in group for value in (verdict["excess"] or {}).values()), default=float("nan"))
        serve, seconds = sum(verdict["serves"] for verdict in group), max(verdict["seconds"] for verdict in group)
        rows.append((operator, dtype, f"{serve} of {len(group)}", f"{worst:.2f}", f"{seconds:.1f}"))
    header = ("kernel", "dtype", "serve", "worst error / tolerance", "longest, s")
    return text_table(header, rows, right=header[2:]) + "\n" if rows else ""


def times_text(times: list[dict[str, Any]]) -> str:
    """Return a table with a row for each call: kernel and PyTorch path side by side."""

    def pair(row: dict[str, Any], entry: str) -> list[str]:
        kernel, plain = (row[backend].get(entry) for backend in ("triton", "torch"))
        shown = [f"{value:.3f}" if value else "-" for value in (kernel, plain)]
        return [*shown, f"{plain / kernel:.2f}" if kernel and plain else "-"]

    rows = []
    for row in times:
        call = row["call"]
        sizes = "x".join(map(str, call["shape"])) + f", {call['num_codes']}"
        rows.append((sizes, call["dtype"], call["layout"][9:], *pair(row, "forward_ms"), *pair(row, "both_ms")))
    direction = ("kernel, ms", "PyTorch", "ratio")
    header = ("x, codewords", "dtype", "channels", *direction, *(f"{name} f+b" for name in direction))
    return text_table(header, rows, right=header[3:]) + "\n" if rows else ""
