"""User errors, and text that is safe to print."""

import difflib
import re
from collections.abc import Sequence

# C0, C1, line and paragraph separators, marks that change text direction, and undecodable bytes of a file name
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """Report a mistake that the user can fix: the command prints it on one line and exits with code 2."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return another library's error text on one line of at most limit characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def printable(text: object) -> str:
    r"""Return the text on one line; escape characters that steer a terminal or cannot be encoded: `\x1b`, `\n`, `\udcff`."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def near_names(name: str, known: Sequence[str]) -> str:
    """Return a hint for an unknown name: the nearest known names, or their number."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"near names: {', '.join(near)}" if near else f"{len(known)} others are known"
