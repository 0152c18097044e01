"""Arguments shared by several commands."""

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, fields
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ctxenc.training.console import positive_int
from ctxenc.training.settings import SwapSettings, Text, TrainingSettings, convert, option_name

RUN_OF_SEGMENT = (
    "run folder of segment train, or an EncNet: folder of save_pretrained,"
    " or checkpoint of ours, PyTorch-Encoding or mmsegmentation"
)


def add_run_arguments(parser: argparse.ArgumentParser, run: str = "run folder of finetune") -> None:
    """Add the run folder and the checkpoint, for commands with a trained model."""
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


def add_image_arguments(parser: argparse.ArgumentParser, default: str = "") -> None:
    """Add the images; with a `default`, none need be named."""
    text = "image file, folder (searched with its subfolders) or glob"
    text += f" (default: {default})" if default else ""
    parser.add_argument("images", metavar="IMAGE", nargs="*" if default else "+", help=text)


def add_naming_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the names of the classes, and what to do about a broken image."""
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line")
    parser.add_argument("--skip-broken", action="store_true", help="name broken images on stderr and go on")


def add_timm_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that make RUN a checkpoint of timm's train.py, under its names."""
    group = parser.add_argument_group("checkpoint of timm's train.py in place of a run")
    group.add_argument(
        "--model", metavar="NAME", help="its model; averaged weights (EMA) are taken if the file has them"
    )
    group.add_argument(
        "--device-modules", metavar="MODULE", nargs="+", help="Python modules to import, which register the model"
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


def add_swap_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the settings of ctxenc.patch_se_blocks."""
    add_options(parser.add_argument_group("swap"), SwapSettings)
    parser.set_defaults(**asdict(SwapSettings()))


def add_training_arguments(parser: argparse.ArgumentParser, runs: Path) -> None:
    """Add the run folder of a training, new or resumed."""
    group = parser.add_argument_group("run folder")
    group.add_argument("--out", type=Path, metavar="DIR", help=f"run folder to make (default: {runs}/001, ...)")
    group.add_argument(
        "--resume",
        metavar="RUN",
        help=f"go on with a run, with its own settings; auto takes --out, or the newest in {runs}, and starts a new "
        "run where there is none",
    )


def add_options(parser: Any, kind: Any, own: Mapping[str, dict[str, Any]] | None = None, omit: Any = None) -> None:
    """Add an option for each setting of a dataclass.

    Args:
        parser: A parser, or a group of its options.
        kind: The dataclass.
        own: Defaults that differ from `kind`'s, by name of the data set.
        omit: A dataclass whose settings to leave out.
    """
    method, left = ({each.name for each in fields(one)} if one else set() for one in (TrainingSettings, omit))
    for each in sorted(fields(kind), key=lambda each: each.name in method):  # the subject of a training comes first
        if each.name not in left:
            add_option(parser, kind, each.name, describe_default(each, own or {}))


def add_option(parser: Any, kind: Any, name: str, default: str) -> None:
    """Add the option of one setting of a dataclass; its value is None if the command line does not name it."""
    keywords: dict[str, Any] = dict(kind.__dataclass_fields__[name].metadata)
    hint = get_type_hints(kind, include_extras=True)[name]
    first, *others = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
    if first is bool:
        keywords["action"] = argparse.BooleanOptionalAction
    elif get_origin(first) is Literal and others in ([], [NoneType]):
        keywords |= {"choices": get_args(first), "type": type(get_args(first)[0])}
    elif first is not Text:
        keywords["type"] = partial(convert, kind=hint)
    if not keywords["help"].endswith(")") and first is not bool:
        keywords["help"] += f" (default: {default})"
    parser.add_argument(option_name(name), **keywords)


def describe_default(setting: Field[Any], own: Mapping[str, dict[str, Any]]) -> str:
    """Return the default of a setting, and those of the data sets that have another."""
    value = None if setting.default is MISSING else setting.default
    texts = ["none" if value is None else str(value)]
    for data, defaults in own.items():
        other = defaults.get(setting.name, value)
        if other != value and not isinstance(other, dict):
            texts.append(f"{other} for {data}")
    return "; ".join(texts)
