"""Measure everything on one device in one command: correctness, the layer, whole networks, and plots.

    python -m benchmarks.all [--device cuda] [--out FOLDER] [--seconds 520] [--keep-going]

Runs `ctxenc doctor` on a GPU, the tests of the kernels (on a GPU tests/gpu, else tests/test_operator.py), then benchmarks.encode,
benchmarks.swap and benchmarks.plot, each in its own process, and puts their JSON and PNGs into one folder. After a failed test
nothing is timed, unless --keep-going is given; the benchmarks then still check every row. Tests that run out of time do not stop
the rest. The whole takes under nine minutes on a GPU, an hour on two cores of a CPU.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.encode import default_path
from benchmarks.record import RESULTS

ROOT = Path(__file__).parent.parent
TIME_IS_OVER = 124
SHARES = {
    "doctor": 0.1,
    "tests": 0.3,
    "encode": 0.3,
    "swap": 0.25,
}  # of the seconds; the rest is for start-up and plots
TESTS = {
    # A new driver's or compiler's warnings are not the kernels' faults.
    "cuda": ["tests/gpu", "--ignore", "tests/gpu/training", "-m", "gpu", "-n", "8", "-W", "default"],
    "cpu": ["tests/test_operator.py"],
}


def run(name: str, command: Sequence[str], seconds: float | None) -> int:
    """Run one step and stream its output. A step out of time is killed and counts as failed."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    began = time.monotonic()
    try:
        status = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        status = TIME_IS_OVER
    print(
        f"== {name}: {'done' if status == 0 else f'failed, status {status}'}, {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return status


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m benchmarks.all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="for the whole (default: 520 on a GPU, no limit on a CPU)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, to see that it runs")
    parser.add_argument("--keep-going", action="store_true", help="run the benchmarks though a test failed")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is False")
    seconds = args.seconds or (520.0 if args.device == "cuda" else None)
    parts = {name: seconds * share if seconds else None for name, share in SHARES.items()}
    out = args.out.resolve()
    failed, results = [], []
    if args.device == "cuda" and run(
        "doctor", ["ctxenc", "doctor", "--out", str(out / "doctor.json")], parts["doctor"]
    ):
        failed.append("doctor")
    if status := run("tests", ["pytest", "-q", *TESTS[args.device]], parts["tests"]):
        if status != TIME_IS_OVER and not args.keep_going:
            raise SystemExit("no speed is reported for a wrong result: the tests failed")
        failed.append("tests")
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    for name in ("encode", "swap"):
        results.append(str(out / default_path({"gpu": gpu}, name).name))
        command = [f"benchmarks.{name}", "--device", args.device, "--out", results[-1]]
        if limit := parts[name]:  # the benchmark's own limit is lower, so that it can finish a started table
            command += ["--seconds", f"{0.8 * limit:.0f}"]
        if run(name, command + (["--quick"] if args.quick else []), parts[name]):
            failed.append(name)
    made = [path for path in results if Path(path).exists()]
    if made and run("plot", ["benchmarks.plot", *made, "--out", str(out)], None):
        failed.append("plot")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
