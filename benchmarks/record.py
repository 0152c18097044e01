"""Results as files: JSON with what makes them worth keeping, and nothing of a process in which the operator is wrong."""

import json
from pathlib import Path
from typing import Any

from benchmarks.environment import describe

RESULTS = Path(__file__).parent / "results"


class Record:
    """The rows of one benchmark in one process, written to a file after every table, so that what was measured is never lost.

    A row is a flat dict. What identifies it are its strings, booleans, integers and lists (network, shape, layout, ...); what was
    measured are floats, spreads {"median", "p20", "p80"}, and whatever ends in "_bytes", "_parameters" or "_macs".

    Args:
        benchmark: its name.
        path: of the file.
        correctness: the largest error of the operator in this process, from benchmarks.forms.check_operator.
        seed: of the inputs.
        device: "cpu" or "cuda".
        facts: what else holds for all rows.
    """

    def __init__(self, benchmark: str, path: Path, correctness: float, seed: int, device: str, **facts: Any) -> None:
        environment = describe()
        if device == "cpu":
            environment["gpu"] = None  # not what was measured
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.head = {"benchmark": benchmark, "environment": environment, "seed": seed, "device": device}
        self.head |= {"operator_error": correctness} | facts
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, *rows: dict[str, Any]) -> None:
        """Append rows and write the file."""
        self.rows += rows
        self.path.write_text(json.dumps(self.head | {"rows": self.rows}, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A result that a Record wrote.

    Raises:
        SystemExit: the file is not one.
    """
    try:
        result = json.loads(path.read_text())
        if not isinstance(result["rows"], list):
            raise TypeError("rows")
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise SystemExit(f"{path}: no result of a benchmark: {type(failure).__name__}: {failure}") from None
    return result


def is_measured(key: str, value: Any) -> bool:
    """Whether a row's entry was measured, not chosen."""
    return isinstance(value, float | dict) or key.endswith(("_bytes", "_parameters", "_macs"))
