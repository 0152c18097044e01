"""The configuration of a run: its fields, its rules and its file.

A configuration is data only: it names a timm architecture and holds numbers and texts. It cannot start a download, load a file
or run code.
"""

import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ctxenc.runs.errors import UserError, one_line

FORMAT = 1
USES = {  # per kind of run
    "finetune": "finetune: use ctxenc evaluate, predict, look, export or finetune --resume",
    "segment": "segment train: use ctxenc segment evaluate, segment predict, look, export or segment train --resume",
}
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # timm's
CROP_MODES = ("center", "squash", "border")
LONGEST_SIDE = 8192  # pixels of an image: 800 MB in fp32
LARGEST = 1e6  # limit for the numbers of a swap, and for mean and std and their inverses: fp32 has no 1e-320
SWAP_KEYS = ("num_codes", "smoothing", "rd_ratio", "pool", "aggregation", "max_size", "start", "fill_empty")
DATA_KEYS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


@dataclass(frozen=True)
class RunConfig:
    """Hold the model and evaluation transform of one arm.

    Args:
        model: Name of a timm architecture, with or without a pretrained tag.
        model_kwargs: Further keyword arguments of timm.create_model (JSON values). num_classes follows from classes; arguments
            that load something (pretrained*, checkpoint_path, cache_dir) are refused.
        classes: Class names in the order of the logits.
        swap: Keyword arguments of ctxenc.patch_se_blocks, or None for the original timm network.
        data_config: Result of timm.data.resolve_data_config: input_size (C, H, W), interpolation, mean, std, crop_pct,
            crop_mode.
        settings: Every setting of the command line, resolved (JSON values).
        versions: Versions of Python and the libraries that made the run.
        format: Version of this layout.

    Raises:
        ValueError: A field does not match its description here.
    """

    model: str
    model_kwargs: dict[str, Any]
    classes: list[str]
    swap: dict[str, Any] | None
    data_config: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name, (rule, holds) in _RULES.items():
            value = getattr(self, name)
            if not holds(value):
                raise ValueError(f"config: {name} must be {rule}, got {shortened(value)}")
        for key in ("input_size", "mean", "std"):  # timm gives tuples
            self.data_config[key] = tuple(self.data_config[key])


def shortened(value: object, limit: int = 120) -> str:
    """Return the value as text for an error message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _is_mapping(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_model_kwargs(value: Any) -> bool:
    refused = ("num_classes", "checkpoint_path", "cache_dir")
    return _is_mapping(value) and not any(key in refused or key.startswith("pretrained") for key in value)


def are_colours(mean: Sequence[Any], std: Sequence[Any]) -> bool:
    """Return whether this mean and std per channel can normalise images."""
    numbers = all(_is_number(each) and abs(each) <= LARGEST for each in (*mean, *std))
    return numbers and all(each >= 1 / LARGEST for each in std)


def _is_swap(value: Any) -> bool:
    if not _is_mapping(value):
        return value is None
    numbers = [each for each in value.values() if isinstance(each, int | float)]
    return set(value) <= set(SWAP_KEYS) and all(abs(each) <= LARGEST for each in numbers)


def _is_data_config(value: Any) -> bool:
    if not _is_mapping(value) or set(value) != set(DATA_KEYS):
        return False
    size, mean, std = value["input_size"], value["mean"], value["std"]
    if not all(isinstance(each, list | tuple) for each in (size, mean, std)):
        return False
    return (
        len(size) == 3
        and all(type(each) is int and 0 < each <= LONGEST_SIDE for each in size)
        and len(mean) == len(std) == size[0]
        and are_colours(mean, std)
        and _is_number(value["crop_pct"])
        and 0.5 <= value["crop_pct"] <= min(2, *size[1:])  # timm resizes the image to its side / crop_pct
        and value["interpolation"] in INTERPOLATIONS
        and value["crop_mode"] in CROP_MODES
    )


MODEL_KWARGS_RULE: tuple[str, Callable[[Any], bool]] = (
    "keyword arguments of timm.create_model without num_classes, checkpoint_path, cache_dir or pretrained*",
    _is_model_kwargs,
)
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "format": (f"the integer {FORMAT}", lambda value: type(value) is int and value == FORMAT),
    "model": ("the name of a timm architecture", lambda value: isinstance(value, str) and bool(value)),
    "model_kwargs": MODEL_KWARGS_RULE,
    "classes": (
        "a non-empty list of class names",
        lambda value: isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value),
    ),
    "swap": (f"null or keyword arguments among {', '.join(SWAP_KEYS)}", _is_swap),
    "data_config": (
        f"input_size (C, H, W) up to {LONGEST_SIDE}, mean and std of C numbers up to {LARGEST:g} and std from {1 / LARGEST:g},"
        f" crop_pct from 0.5 to 2, interpolation ({', '.join(INTERPOLATIONS)}) and crop_mode"
        f" ({', '.join(CROP_MODES)})",
        _is_data_config,
    ),
    "settings": ("a table of settings", _is_mapping),
    "versions": (
        "a table of version texts",
        lambda value: _is_mapping(value) and all(isinstance(each, str) for each in value.values()),
    ),
}


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text.

    Raises:
        ValueError: The text is not JSON, repeats a key, holds NaN or infinity, or is nested too deeply.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(
                f"the key {shortened(next(name for name in names if names.count(name) > 1))} stands there twice"
            )
        return table

    try:
        value = json.loads(text, object_pairs_hook=once)
        json.dumps(value, allow_nan=False)  # Python reads NaN and 1e999, but a configuration may not hold them
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def check_folder(path: Path) -> None:
    """Raise UserError if the path exists but is not a real folder: a link could lead out of the run."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"{path} must be a folder, got {'a link' if path.is_symlink() else 'a file'}")


TEMPORARY = r"\.[0-9a-f]{16}\.tmp(\.\w+)?"  # temporary files of `atomic`, left behind by a kill


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside path; rename the file to path on a clean exit, remove it otherwise.

    Raises:
        UserError: The folder of path cannot take a file. Raised before the body runs if this can be known.
    """
    try:
        if path.is_dir():  # check this first: "." has no name for a temporary file to replace
            raise IsADirectoryError(None, "Is a directory")
        temporary = path.with_name(f".{secrets.token_hex(8)}.tmp{path.suffix}")
        os.close(
            os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        )  # do not follow a link or overwrite a file
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or one_line(error)}") from error
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename and str(error.filename) != str(temporary):
            raise  # the body met the error in another file
        raise UserError(f"cannot write {path}: {error.strerror or one_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_config(run: Path, config: Any) -> None:
    """Write config, a dataclass, to run/config.json; the folder must exist.

    Raises:
        UserError: The file cannot be written.
        ValueError, TypeError: A setting is not a JSON value.
    """
    text = json.dumps(asdict(config), indent=2, allow_nan=False) + "\n"
    with atomic(run / "config.json") as path:
        path.write_text(text, encoding="utf-8")


def read_config(run: Path, *kinds: Any) -> Any:
    """Read and validate run/config.json.

    Args:
        run: The folder of a run or of an arm.
        *kinds: The accepted dataclasses (default: RunConfig).

    Raises:
        UserError: The file is missing, is not JSON, has another format or kind of run, or a field holds a wrong value.
    """
    path = run / "config.json"
    try:
        table = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path} must hold a table, got {shortened(table)}")
    if table.get("format") != FORMAT:
        raise UserError(
            f"{path}: format must be {FORMAT}, got {shortened(table.get('format'))}: made by another ctxenc"
        )
    found = "segment" if "kind" in table else "finetune"
    kind = next((each for each in kinds or (RunConfig,) if getattr(each, "kind", "finetune") == found), None)
    if kind is None:
        raise UserError(f"{run} is a run of {USES[found]}")
    names = {field.name for field in fields(kind)}
    if wrong := sorted(names ^ table.keys()):
        state = "is missing" if wrong[0] in names else "is unknown"
        raise UserError(f"{path}: field {wrong[0]} {state}")
    try:
        return kind(**table)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
