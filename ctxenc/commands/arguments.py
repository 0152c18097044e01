"""Arguments shared by several commands."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from ctxenc.training.console import positive_int, smoothing

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
    group.add_argument("--device-modules", metavar="MODULE", help="Python module to import, which registers the model")


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


def add_options(parser: argparse.ArgumentParser, usual: Any, own: dict[str, dict[str, Any]]) -> None:
    """Add an option for each setting with a help text.

    Args:
        parser: Takes the options, in a group of their own.
        usual: The settings with their defaults, a dataclass.
        own: Defaults that differ from `usual`, by name of the data set.
    """
    from ctxenc.training.settings import (
        TrainingSettings,
        option_name,
    )  # import here: it needs timm, and most commands do not

    group = parser.add_argument_group("training")
    shared = {each.name for each in fields(TrainingSettings)}
    for each in sorted(
        fields(usual), key=lambda own: own.name in shared
    ):  # list the subject of training before its method
        if not each.metadata:
            continue
        keywords = dict(each.metadata)
        if not keywords["help"].endswith(")") and "action" not in keywords:
            keywords["help"] += f" (default: {_default(each.name, usual, own)})"
        group.add_argument(option_name(each.name), **keywords)


def _default(name: str, usual: Any, own: dict[str, dict[str, Any]]) -> str:
    value = getattr(usual, name)
    texts = ["none" if value in (None, {}) else str(value)]
    for data, defaults in own.items():
        other = defaults.get(name, value)
        if other != value and not isinstance(other, dict):
            texts.append(f"{other} for {data}")
    return "; ".join(texts)
