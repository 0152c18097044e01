"""ctxenc segment: semantic segmentation with EncNet."""

import argparse
import importlib
from pathlib import Path

from ctxenc.commands.arguments import (
    RUN_OF_SEGMENT,
    add_device_arguments,
    add_image_arguments,
    add_naming_arguments,
    add_option,
    add_options,
    add_run_arguments,
    add_training_arguments,
)
from ctxenc.training.console import positive_int
from ctxenc.training.segmentation.segment_settings import MEASURED_ON, OWN_DEFAULTS, RUNS, SegmentSettings

OUT = Path("runs") / "predict"


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = (
        "examples: ctxenc segment train | ctxenc segment train --data voc_aug --data-dir PATH --pretrained-backbone | "
        "accelerate launch -m ctxenc segment train --data ade20k --data-dir PATH"
    )
    add_training_arguments(parser, RUNS)
    add_options(parser.add_argument_group("training"), SegmentSettings, OWN_DEFAULTS)


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = "example: ctxenc segment evaluate runs/segment/001 --checkpoint last --flip --crop 480"
    add_run_arguments(parser, RUN_OF_SEGMENT)
    for name in MEASURED_ON:
        add_option(parser, SegmentSettings, name, "the run's")
    add_view_arguments(parser)


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = "example: ctxenc segment predict runs/segment/001 street.jpg --flip --scales 0.75 1 1.25"
    add_run_arguments(parser, RUN_OF_SEGMENT)
    add_image_arguments(parser)
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"where to write (default: {OUT})")
    add_naming_arguments(parser)
    parser.add_argument(
        "--base-size", type=positive_int, metavar="N", help="longer side at scale 1 (default: the image's own size)"
    )
    add_view_arguments(parser)


def add_view_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for averaged views of an image and for the device."""
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], metavar="S", help="scales to average (default: 1)"
    )
    parser.add_argument("--flip", action="store_true", help="average with the mirrored image")
    parser.add_argument("--crop", type=positive_int, metavar="N", help="side of sliding crops (default: whole image)")
    parser.add_argument("--stride", type=float, default=2 / 3, metavar="R", help="of crops, as a share (default: 2/3)")
    add_device_arguments(parser, batch_size=4, of="crops")


# Text, arguments and module of each sub-command.
COMMANDS = {
    "train": (
        "train EncNet; with no arguments, on embedded scenes, beside what it is compared with",
        add_train_arguments,
        "segment_training",
    ),
    "evaluate": ("measure pixel accuracy and mean IoU of a run", add_evaluate_arguments, "segment_evaluation"),
    "predict": (
        "segment images: a picture with a legend, and a mask of class numbers",
        add_predict_arguments,
        "segment_prediction",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands with their arguments."""
    parser.epilog = "examples: ctxenc segment train --help | ctxenc segment predict RUN IMAGE..."
    commands = parser.add_subparsers(dest="segment_command", metavar="COMMAND", required=True)
    for name, (summary, add, _) in COMMANDS.items():
        add(commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."))


def run(args: argparse.Namespace) -> None:
    """Run the chosen one."""
    importlib.import_module(f"ctxenc.training.segmentation.{COMMANDS[args.segment_command][2]}").run(args)
