"""Run the examination of `ctxenc doctor`: child processes look at the machine, try each kernel and time it. Imports no torch."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

Event = tuple[str, dict[str, Any]]

CHILD = [sys.executable, "-m", "ctxenc.diagnosis.tasks"]
MARK = "ctxenc doctor: "
LOOK_SECONDS = 300.0  # to build a network and run it on the PyTorch path, and to time some calls


class Outcome(NamedTuple):
    """Hold the result of a finished child process."""

    results: list[dict[str, Any]]
    problem: str | None  # None: it ended by itself, without an error


class Children:
    """Run child processes; end every one with the with block.

    Args:
        interpret: Run kernels in Triton's interpreter.
    """

    def __init__(self, interpret: bool) -> None:
        self.environment = os.environ | {"CTXENC_VERIFY": ""} | ({"TRITON_INTERPRET": "1"} if interpret else {})
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._over = False

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the running children; start no other."""
        with self._lock:
            self._over = True
            for child in self._running:
                _kill(child)

    def run(self, task: str, request: dict[str, Any], seconds: float) -> Outcome:
        """Run a task of tasks.py to its end, or for so many seconds."""
        command = [*CHILD, task, json.dumps(request)]
        with self._lock:
            if self._over:
                return Outcome([], "interrupted")
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=self.environment,
                start_new_session=True,  # so that a compiler started by the child ends with it
            )
            self._running.add(child)
        problem = None
        try:
            output, errors = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _kill(child)
            output, errors = child.communicate()
            problem = f"no result within {seconds:g} s"
        finally:
            with self._lock:
                self._running.discard(child)
        lines = [line.removeprefix(MARK) for line in output.splitlines() if line.startswith(MARK)]
        return Outcome(list(map(json.loads, lines)), problem or _explain_failure(child.returncode, errors))


def _kill(child: "subprocess.Popen[str]") -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (OSError, AttributeError):  # it has ended, or the system has no process groups
        child.kill()


def _explain_failure(code: int, errors: str) -> str | None:
    """Return why a process failed that ended by itself; None for success."""
    if code == 0:
        return None
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    lines = [line for line in errors.splitlines() if line.strip()]
    return f"its process failed: {lines[-1].strip()[:300]}" if lines else f"its process ended with code {code}"


def examine(request: dict[str, Any], interpret: bool, jobs: int, seconds: float) -> Iterator[Event]:
    """Look at the machine, try every needed kernel, and time the working ones on a GPU.

    Args:
        request: The request to tasks.look: "model" or None, its "num_codes" and "batch"; else "shapes" [(B, D, H, W, K)];
            "dtypes" and "layouts".
        interpret: Run kernels in Triton's interpreter, on the CPU.
        jobs: Number of kernels to try at a time.
        seconds: Time limit for a kernel.

    Yields:
        Findings by name: "mistake" of the user, with nothing after it; "environment"; "needs" (device, kinds, calls); "verdict"
            of each kind; "times" of each call; "problem" for a failed process.
    """
    with Children(interpret) as children:
        outcome = children.run("look", request | {"interpret": interpret}, LOOK_SECONDS)
        needs: dict[str, Any] = {"kinds": [], "calls": []}
        for result in outcome.results:
            name = next(name for name in ("mistake", "environment", "needs") if name in result)
            needs = result[name] if name == "needs" else needs
            yield name, result[name] if isinstance(result[name], dict) else result
        if outcome.problem:
            yield "problem", {"problem": f"the kernels that are needed could not be found: {outcome.problem}"}

        def prove(kind: str) -> dict[str, Any]:
            started_at = time.monotonic()
            outcome = children.run("prove", {"kind": kind, "device": needs["device"]}, seconds)
            none = {
                "serves": False,
                "reason": outcome.problem or "its process gave no verdict",
                "excess": {},
                "kept": False,
            }
            verdict = outcome.results[0] if outcome.results and not outcome.problem else none
            return {"kind": json.loads(kind), **verdict, "seconds": round(time.monotonic() - started_at, 1)}

        with ThreadPoolExecutor(jobs) as pool:
            try:
                for verdict in pool.map(prove, needs["kinds"]):
                    yield "verdict", verdict
            except BaseException:
                children.end()
                raise
        if needs["kinds"] and not interpret:
            timing = children.run("times", {"calls": needs["calls"], "device": needs["device"]}, LOOK_SECONDS)
            for result in timing.results:
                yield "times", result
            if timing.problem:
                yield "problem", {"problem": f"not every call was timed: {timing.problem}"}
