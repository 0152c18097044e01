"""Compare two results of one benchmark: the ratio of each row's time or size in B to the same row in A.

    python -m benchmarks.compare A.json B.json

To judge a change against a git ref, run the benchmark in both on one machine, one after the other:

    git worktree add ../before REF
    (cd ../before && python -m benchmarks.encode --out before.json)
    python -m benchmarks.encode --out after.json
    python -m benchmarks.compare ../before/before.json after.json

A ratio of times is marked "slower" or "faster" if the spreads (20th to 80th percentile) do not overlap; unmarked
differences are within the machine's noise. Differences in machine and versions are listed first.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.record import is_measured, read

COMPARED = (
    "_ms",
    "_bytes",
    "_parameters",
    "_macs",
    "error",
)  # measures with a meaningful ratio; rates would repeat the times


class Change(NamedTuple):
    """Hold one measure of one row."""

    row: str
    measure: str
    before: float
    after: float
    mark: str

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else math.nan


def identity(row: dict[str, Any]) -> str:
    """Return the entries that identify a row."""
    chosen = {key: value for key, value in row.items() if not is_measured(key, value) and not key.endswith("timed_by")}
    return ", ".join(str(value) if isinstance(value, str) else f"{key} {value}" for key, value in chosen.items())


def _mark(before: Any, after: Any) -> str:
    if not isinstance(before, dict):
        return ""
    if after["p20"] > before["p80"]:
        return "slower"
    return "faster" if after["p80"] < before["p20"] else ""


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """List every measure of the rows that both results have."""
    known = {identity(row): row for row in before["rows"]}
    found = []
    for row in after["rows"]:
        other = known.get(name := identity(row), {})
        for measure in row.keys() & other.keys():
            if is_measured(measure, row[measure]) and measure.endswith(COMPARED):
                one, two = (v["median"] if isinstance(v, dict) else v for v in (other[measure], row[measure]))
                found.append(Change(name, measure, one, two, _mark(other[measure], row[measure])))
    return sorted(found, key=lambda change: change.measure)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """List the differences between the two processes: machine, threads, versions, seed."""

    def flat(result: dict[str, Any]) -> dict[str, Any]:
        environment = {**result["environment"]}
        return {**environment.pop("versions", {}), **environment, "seed": result.get("seed")}

    one, two = flat(before), flat(after)
    return [f"{key}: {one.get(key)} | {two.get(key)}" for key in one | two if one.get(key) != two.get(key)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m benchmarks.compare"
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    args = parser.parse_args(arguments)
    before, after = read(args.before), read(args.after)
    if (one := before.get("benchmark")) != (two := after.get("benchmark")):
        raise SystemExit(f"results must be of one benchmark, got {json.dumps(one)} and {json.dumps(two)}")
    for difference in differences(before, after):
        print(difference)
    found = changes(before, after)
    if not found:
        raise SystemExit("the two results have no row in common")
    for measure in dict.fromkeys(change.measure for change in found):
        same = [change for change in found if change.measure == measure]
        print(f"\n{measure}, B / A")
        for change in same:
            print(f"{change.ratio:>8.3f} {change.before:>14.4g} {change.after:>14.4g}  {change.mark:<7} {change.row}")
        ratios = [change.ratio for change in same if change.ratio > 0]
        if ratios:
            print(f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):>8.3f}  geometric mean of {len(ratios)}")
    if lost := len(before["rows"]) + len(after["rows"]) - 2 * len({change.row for change in found}):
        print(f"\n{lost} rows are in one of the two alone, or have nothing to compare")


if __name__ == "__main__":
    main()
