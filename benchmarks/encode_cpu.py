"""The PyTorch path of the encode operator against what one would write instead, on the CPU, in one run.

    python -m benchmarks.encode_cpu [--repeats 200] [--out benchmarks/results/encode_cpu.json]

Rows: ctxenc; the expanded form (B x N x K x D, as mmsegmentation computes it, and PyTorch-Encoding on a CPU); torch.compile of the
shifted matmul form with autograd, which is as safe under offsets as ours. Each is checked against fp64 before it is timed, and the
calls are interleaved one by one in random order, so that a change of the machine's load and what the call before left in the
caches meet all rows alike. Columns: median milliseconds of forward and of forward + backward, and how many times longer a row
takes than ctxenc.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

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
from benchmarks.timing import Call, cpu_timer, interleaved

# (B, N, D, K): EncNet at a 480 crop, one image per core; two SE-sized blocks.
SHAPES = [(2, 3600, 512, 32), (16, 196, 256, 16), (32, 784, 128, 16)]


def measure(shape: Shape, layout: str, repeats: int) -> list[dict[str, Any]]:
    """One table: every row at one shape and layout."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    tensors = inputs(shape, layout)
    grad = torch.randn(shape[0], shape[3], shape[2])
    forms: dict[str, Encode] = {
        "ctxenc": ctxenc.encode,
        "torch.compile(shifted matmul)": torch.compile(shifted_matmul),
        "expanded": expanded,
    }
    wanted = exact(expanded, tensors, grad)
    errors = {name: error(form, tensors, grad, wanted) for name, form in forms.items()}
    if wrong := {name: value for name, value in errors.items() if not value <= TOLERANCE[torch.float32]}:
        raise SystemExit(f"no speed is reported for a wrong result: {wrong} at {shape}, {layout}")

    def median(calls: dict[str, Call]) -> dict[str, float]:
        timers = {name: cpu_timer(call, 1 if name == "expanded" else 5) for name, call in calls.items()}
        return {name: statistics.median(times) for name, times in interleaved(timers, repeats, slow="expanded").items()}

    fwd = median({name: partial(forward, form, tensors) for name, form in forms.items()})
    both = median({name: partial(gradients, form, tensors, grad) for name, form in forms.items()})
    return [
        {
            "shape": shape,
            "layout": layout,
            "form": name,
            "forward_ms": fwd[name],
            "forward_backward_ms": both[name],
            "forward_ratio": fwd[name] / fwd["ctxenc"],
            "forward_backward_ratio": both[name] / both["ctxenc"],
            "error": errors[name],
        }
        for name in forms
    ]


def markdown(result: dict[str, Any]) -> str:
    """The table of a result, as the README shows it: ratios, since times on a shared machine mean little."""
    environment, lines = result["environment"], []
    for row in result["rows"]:
        if row["form"] != "ctxenc":
            continue
        peers = [r for r in result["rows"] if (r["shape"], r["layout"]) == (row["shape"], row["layout"]) and r != row]
        shape = ", ".join(map(str, row["shape"]))
        times = f"{row['forward_ms']:.2f} / {row['forward_backward_ms']:.1f}"
        ratios = [f"{peer['forward_ratio']:.2f} / {peer['forward_backward_ratio']:.2f}" for peer in peers]
        ratios[-1] = f"{peers[-1]['forward_ratio']:.0f} / {peers[-1]['forward_backward_ratio']:.0f}"
        lines.append(f"| {shape} | {row['layout'].replace('_', ' ')} | {times} | {ratios[0]} | {ratios[1]} |")
    versions = environment["versions"]
    return "\n".join(
        [
            "| B, N, D, K | layout | ctxenc, ms | torch.compile of the shifted matmul form | expanded form |",
            "| --- | --- | --- | --- | --- |",
            *lines,
            "",
            f"{environment['processor']}, {environment['threads']} threads, torch {versions['torch']}, fp32;"
            f" commit {environment['commit']}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "encode_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    print(
        f"{'B, N, D, K':<20} {'layout':<15} {'form':<30} {'fwd ms':>8} {'ratio':>7} {'fwd+bwd':>8} {'ratio':>7} {'error':>8}"
    )
    for shape in SHAPES:
        for layout in LAYOUTS:
            for row in measure(shape, layout, args.repeats):
                rows.append(row)
                print(
                    f"{str(shape)[1:-1]:<20} {layout:<15} {row['form']:<30} {row['forward_ms']:>8.2f} {row['forward_ratio']:>7.2f}"
                    f" {row['forward_backward_ms']:>8.2f} {row['forward_backward_ratio']:>7.2f} {row['error']:>8.0e}",
                    flush=True,
                )
    args.out.write_text(json.dumps({"environment": describe(), "rows": rows}, indent=1) + "\n")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
