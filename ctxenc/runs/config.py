"""The configuration of a run: its fields, their rules (pydantic's) and its file.

A configuration is data only: it names a timm architecture and holds numbers and texts. It cannot start a download, load a file
or run code.
"""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, GetPydanticSchema, Strict, ValidationError, with_config
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from ctxenc.runs.errors import UserError, explain, one_line, shorten

FORMAT = 1
USES = {  # per kind of run
    "finetune": "finetune: use ctxenc evaluate, predict, look, export or finetune --resume",
    "segment": "segment train: use ctxenc segment evaluate, segment predict, look, export or segment train --resume",
}
LONGEST_SIDE = 8192  # pixels of an image: 800 MB in fp32
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)  # an int is a float too; True is no number
Count = Annotated[int, Field(ge=1, le=2**63 - 1)]  # torch's limit
Side = Annotated[int, Field(ge=1, le=LONGEST_SIDE)]
Codes = Annotated[int, Field(ge=1, le=1_000_000)]
Positive = Annotated[float, Field(gt=0, le=1e9)]  # products of two still fit fp32
Smoothing = Literal["learned", "sampled"] | Positive
Pool = Literal["mean", "concat"]
Aggregation = Literal["mean", "sum"]
CodebookStart = Literal["paper", "spread"]
Mean = Annotated[float, Field(ge=-1e6, le=1e6)]
Std = Annotated[float, Field(ge=1e-6, le=1e6)]  # fp32 has no 1e-320


@with_config(STRICT)
class SwapConfig(TypedDict, total=False):
    """Hold keyword arguments of ctxenc.patch_se_blocks."""

    num_codes: Codes
    smoothing: Smoothing
    rd_ratio: Positive | None
    pool: Pool
    aggregation: Aggregation
    max_size: Count | None
    start: CodebookStart
    fill_empty: bool


@with_config(STRICT)
class DataConfig(TypedDict):
    """Hold the result of timm.data.resolve_data_config; input_size is (C, H, W)."""

    input_size: Annotated[tuple[Side, Side, Side], Strict(False)]  # JSON has lists
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
    mean: Annotated[tuple[Mean, ...], Strict(False)]
    std: Annotated[tuple[Std, ...], Strict(False)]
    crop_pct: Annotated[float, Field(ge=0.5, le=2)]
    crop_mode: Literal["center", "squash", "border"]


def check_data_config(config: dict[str, Any]) -> dict[str, Any]:
    """Raise ValueError unless the fields fit each other."""
    channels, *sides = config["input_size"]
    if not len(config["mean"]) == len(config["std"]) == channels:
        raise ValueError("must have a mean and a std for each channel of input_size")
    if config["crop_pct"] > min(sides):  # timm resizes the image to its side / crop_pct
        raise ValueError("must have a crop_pct up to the sides of input_size")
    return config


def check_as(kind: Any) -> GetPydanticSchema:
    """Check a dict as a TypedDict; for readers it stays a dict."""
    return GetPydanticSchema(lambda _, handler: handler.generate_schema(kind))


def check_model_kwargs(table: dict[str, Any]) -> dict[str, Any]:
    """Raise ValueError if a keyword argument of timm.create_model loads something, or belongs to the classes."""
    if any(key in ("num_classes", "checkpoint_path", "cache_dir") or key.startswith("pretrained") for key in table):
        raise ValueError(
            "must be keyword arguments of timm.create_model without num_classes, checkpoint_path, cache_dir or pretrained*"
        )
    return table


ModelKwargs = Annotated[dict[str, Any], AfterValidator(check_model_kwargs)]


@dataclass(frozen=True, config=STRICT)
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

    model: Annotated[str, Field(min_length=1)]
    model_kwargs: ModelKwargs
    classes: Annotated[list[str], Field(min_length=1)]
    swap: Annotated[dict[str, Any], check_as(SwapConfig)] | None
    data_config: Annotated[dict[str, Any], check_as(DataConfig), AfterValidator(check_data_config)]
    settings: dict[str, Any]
    versions: dict[str, str]
    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)] = FORMAT


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
                f"the key {shorten(next(name for name in names if names.count(name) > 1))} stands there twice"
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
        raise UserError(f"{path} must hold a table, got {shorten(table)}")
    if table.get("format") != FORMAT:
        raise UserError(f"{path}: format must be {FORMAT}, got {shorten(table.get('format'))}: made by another ctxenc")
    found = "segment" if "kind" in table else "finetune"
    kind = next((each for each in kinds or (RunConfig,) if getattr(each, "kind", "finetune") == found), None)
    if kind is None:
        raise UserError(f"{run} is a run of {USES[found]}")
    try:
        return kind(**table)
    except ValidationError as error:
        raise UserError(f"{path}: {' '.join(explain(error))}") from error
