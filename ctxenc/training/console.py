"""What the commands share at the terminal: the one-line error, tables and common arguments."""

import argparse
import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

# C0, C1, line and paragraph separators, marks that turn the direction of text, and bytes of a name that are no text
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """A mistake that the user can mend: the command prints it as one line and ends with exit code 2."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The text of an error of another library, on one line of at most limit characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def printable(text: object) -> str:
    r"""Return the text on one line, with escapes for what could steer a terminal or cannot be encoded: `\x1b`, `\n`, `\udcff`."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def listed(names: Sequence[str], limit: int = 20) -> str:
    """Return the first `limit` names and the number of the others, on one line."""
    more = [f"{len(names) - limit:,} more"] if len(names) > limit else []
    return ", ".join([*map(printable, names[:limit]), *more])


def counted(names: Sequence[str], counts: Sequence[int], limit: int = 40) -> str:
    """Return each name with its count, on one line; of more than `limit`, those that have fewest."""
    order = sorted(range(len(names)), key=counts.__getitem__)[:limit] if len(names) > limit else range(len(names))
    text = listed([f"{names[index]} {counts[index]:,}" for index in order], limit)
    return text if len(names) <= limit else f"fewest: {text}, ..."


def say(text: object, file: TextIO | None = None) -> None:
    """Print a line that may hold names of others."""
    print(printable(text), file=file, flush=True)


def near_names(name: str, known: Sequence[str]) -> str:
    """A hint for a name that is not among the known ones: the nearest, or how many there are."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"near names: {', '.join(near)}" if near else f"{len(known)} others are known"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """A table in plain text, columns two spaces apart; those whose header is in right are flushed right."""
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
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


RUN_OF_SEGMENT = (
    "run folder of segment train, or an EncNet: folder of save_pretrained,"
    " or checkpoint of ours, PyTorch-Encoding or mmsegmentation"
)


def add_run_arguments(parser: argparse.ArgumentParser, run: str = "run folder of finetune") -> None:
    """Add the run folder and the checkpoint, for a command that uses a trained model."""
    parser.add_argument(
        "run_folder",
        metavar="RUN",
        type=Path,
        help=f"{run}; of several seeds the first is taken: name an arm's folder for another",
    )
    parser.add_argument(
        "--checkpoint",
        choices=("best", "last"),
        default="best",
        help="weights of the best or of the last epoch (default: best)",
    )


def add_device_arguments(parser: argparse.ArgumentParser, batch_size: int, of: str = "images") -> None:
    """Add the device, the batch size and mixed precision."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: auto)")
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=batch_size,
        metavar="N",
        help=f"{of} a step (default: {batch_size})",
    )
    parser.add_argument("--amp", choices=("bf16", "fp16"), help="mixed precision (default: none)")


def smoothing(text: str) -> str | float:
    """An argparse type: "learned", "sampled" or a positive number."""
    if text in ("learned", "sampled"):
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be learned, sampled or a positive number, got {text!r}")
    return value


SWAP_KEYS = ("num_codes", "smoothing", "rd_ratio", "pool", "aggregation", "max_size", "start", "fill_empty")
OPTIONS = {"start": "codebook_start"}  # whose own names would say less on a command line


def add_swap_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the settings of the swap, those of ctxenc.patch_se_blocks."""
    group = parser.add_argument_group("swap")
    group.add_argument(
        "--num-codes", type=positive_int, default=16, metavar="K", help="codewords a block (default: 16)"
    )
    group.add_argument(
        "--smoothing",
        type=smoothing,
        default="learned",
        metavar="S",
        help="learned, sampled or a number (default: learned)",
    )
    group.add_argument("--rd-ratio", type=float, metavar="R", help="channel reduction (default: that of each SE block)")
    group.add_argument("--pool", choices=("mean", "concat"), default="mean", help="over codewords (default: mean)")
    group.add_argument(
        "--aggregation",
        choices=("mean", "sum"),
        default="mean",
        help="of residuals over the pixels; sum is the papers', and depends on the image's size (default: mean)",
    )
    group.add_argument(
        "--max-size",
        type=positive_int,
        metavar="N",
        help="average-pool larger maps to N x N before they are projected, which is cheaper (default: all pixels)",
    )
    group.add_argument(
        "--codebook-start",
        choices=("paper", "spread"),
        default="paper",
        help="of blocks that are not calibrated: spread begins with codewords where the features are (default: paper)",
    )
    group.add_argument("--fill-empty", action="store_true", help="put blocks into the empty slots of a plain ResNet")


def swap_settings(given: Any) -> dict[str, Any]:
    """The keyword arguments of ctxenc.patch_se_blocks in what add_swap_arguments has read, or in settings."""
    return {key: getattr(given, OPTIONS.get(key, key)) for key in SWAP_KEYS}
