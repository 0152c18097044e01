"""ctxenc predict RUN IMAGE...: print the likeliest classes of images."""

import argparse

from ctxenc.commands.arguments import (
    add_device_arguments,
    add_image_arguments,
    add_naming_arguments,
    add_run_arguments,
    add_timm_arguments,
)
from ctxenc.training.console import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = "example: ctxenc predict runs/001 holiday/ 'scans/*.png' --top-k 3 --csv > classes.csv"
    add_run_arguments(parser)
    add_image_arguments(parser)
    parser.add_argument("--top-k", type=positive_int, default=5, metavar="K", help="classes an image (default: 5)")
    add_naming_arguments(parser)
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--json", action="store_true", help="print JSON in place of the table")
    layout.add_argument("--csv", action="store_true", help="print CSV in place of the table")
    add_device_arguments(parser, batch_size=32)
    add_timm_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command; import its modules here, so that --help is fast."""
    from ctxenc.training import prediction

    prediction.run(args)
