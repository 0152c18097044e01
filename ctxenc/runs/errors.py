"""User errors, and text that is safe to print."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

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


def shorten(value: object, limit: int = 120) -> str:
    """Return the value as text for an error message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


# The errors of pydantic that state no rule.
STATES = {"missing": "is missing", "unexpected_keyword_argument": "is unknown", "extra_forbidden": "is unknown"}
STATES |= {"int_parsing_size": "is too large"}


def explain(error: Any) -> tuple[str, str]:
    """Return the place of the first wrong value in a pydantic.ValidationError, and its rule: `must be greater than 0, got -1`."""
    found = error.errors(include_url=False)
    # For a value of several types pydantic gives an error each, and adds the type's name to the place: "constrained-float".
    loc = found[0]["loc"]
    place = [part for part in loc if isinstance(part, int) or part.isidentifier()]
    if STATES.get(found[0]["type"]) == "is unknown" and place[-1:] != [loc[-1]]:
        place.append(loc[-1])  # a key of the file, which may hold any characters
    same = [each for each in found if list(each["loc"][: len(place)]) == place]
    rules = [re.sub(r"^(Value error, must|\w+ should) ", "", each["msg"].split(", unable")[0]) for each in same]
    rule = STATES.get(found[0]["type"], f"must {' or '.join(rules)}, got {shorten(found[0]['input'])}")
    return ".".join(map(str, place)), rule
