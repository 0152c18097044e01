"""Store results in JSON files with their environment; a process with a wrong operator stores nothing."""

import json
from pathlib import Path
from typing import Any

from benchmarks.environment import describe

RESULTS = Path(__file__).parent / "results"


class Record:
    """Hold the rows of one benchmark in one process, and write them to a file after every table, so that no measurement is lost.

    A row is a flat dict. Strings, booleans, integers and lists identify it (network, shape, layout, ...). Floats, spreads
    {"median", "p20", "p80"}, and keys that end in "_bytes", "_parameters" or "_macs" are measurements.

    Args:
        benchmark: its name.
        path: of the file.
        correctness: the largest error of the operator in this process, from benchmarks.forms.check_operator.
        seed: of the inputs.
        device: "cpu" or "cuda".
        facts: other facts that hold for all rows.
    """

    def __init__(self, benchmark: str, path: Path, correctness: float, seed: int, device: str, **facts: Any) -> None:
        environment = describe()
        if device == "cpu":
            environment["gpu"] = None  # it was not measured
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
    """Read a result written by a Record.

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
    """Return whether a row's entry is a measurement, not a setting."""
    return isinstance(value, float | dict) or key.endswith(("_bytes", "_parameters", "_macs"))
