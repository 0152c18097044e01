"""Terminal output and argument types that the commands share."""

import argparse
from collections.abc import Sequence
from typing import Any, TextIO

from ctxenc.runs.errors import printable


def list_names(names: Sequence[str], limit: int = 20) -> str:
    """Return the first `limit` names and the number of the others, on one line."""
    more = [f"{len(names) - limit:,} more"] if len(names) > limit else []
    return ", ".join([*map(printable, names[:limit]), *more])


def list_counts(names: Sequence[str], counts: Sequence[int], limit: int = 40) -> str:
    """Return each name with its count, on one line; beyond `limit` names, only the lowest counts."""
    order = sorted(range(len(names)), key=counts.__getitem__)[:limit] if len(names) > limit else range(len(names))
    text = list_names([f"{names[index]} {counts[index]:,}" for index in order], limit)
    return text if len(names) <= limit else f"fewest: {text}, ..."


def say(text: object, file: TextIO | None = None) -> None:
    """Print a line that may hold foreign names."""
    print(printable(text), file=file, flush=True)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Format a plain-text table, columns two spaces apart; flush the columns in `right` to the right."""
    header, rows, right = (
        list(map(printable, header)),
        [list(map(printable, row)) for row in rows],
        list(map(printable, right)),
    )
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]

    def line(cells: Sequence[str]) -> str:
        placed = (
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(header, cells, widths, strict=True)
        )
        return "  ".join(placed).rstrip()

    return "\n".join(line(cells) for cells in (header, rule, *rows))


def positive_int(text: str) -> int:
    """Parse an integer of at least 1 for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


OPTIONS = {"start": "codebook_start"}  # clearer names on a command line


def swap_settings(values: Any) -> dict[str, Any]:
    """Return the keyword arguments of ctxenc.patch_se_blocks from parsed arguments or from settings."""
    from ctxenc.runs.config import SwapConfig  # import here: it needs pydantic, and doctor does not

    return {key: getattr(values, OPTIONS.get(key, key)) for key in SwapConfig.__annotations__}
