"""Write the tables of README.md and docs/ from the committed results.

    python -m benchmarks.pages

A table stands between two marks with the name of its file in benchmarks/results/, `<!-- swap_cpu -->` and `<!-- /swap_cpu -->`.
After a colon the first mark may list the beginnings of the rows to show, separated by semicolons; all others are left out.
"""

import json
import re
from pathlib import Path

from benchmarks import context_scenes, encode, swap, swap_accuracy, warm_start
from benchmarks.record import RESULTS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Keyed by the beginnings of file names; the longer of two beginnings first.
WRITERS = {
    "encode": encode,
    "swap_accuracy": swap_accuracy,
    "swap": swap,
    "warm_start": warm_start,
    "context_scenes": context_scenes,
}
MARKED = re.compile(r"<!-- (?P<name>\w+)(?:: (?P<rows>[^>]*))? -->\n(?P<table>.*?)\n<!-- /(?P=name) -->", flags=re.S)


def table(name: str, rows: list[str] | None = None) -> str:
    """Return a result's table, whole or only the rows with one of these beginnings.

    Raises:
        ValueError: no row has this beginning.
    """
    writer = next(module for start, module in WRITERS.items() if name.startswith(start))
    lines = writer.markdown(json.loads((RESULTS / f"{name}.json").read_text())).split("\n")
    if rows is None:
        return "\n".join(lines)
    head, body = lines[:2], lines[2:]
    for row in rows:
        if not any(line.startswith(f"| {row}") for line in body):
            raise ValueError(f"{name}: no row begins with {row!r}")
    starts = tuple(f"| {row}" for row in rows)
    return "\n".join([*head, *(line for line in body if line.startswith(starts) or not line.startswith("|"))])


def filled(text: str) -> str:
    """Fill a page's tables from the committed results."""

    def fill(found: re.Match[str]) -> str:
        rows = found["rows"].split("; ") if found["rows"] else None
        mark = found[0].split("\n", 1)[0]
        return f"{mark}\n{table(found['name'], rows)}\n<!-- /{found['name']} -->"

    return MARKED.sub(fill, text)


def main() -> None:
    for page in PAGES:
        text = page.read_text()
        if (new := filled(text)) != text:
            page.write_text(new)
            print(f"written: {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
