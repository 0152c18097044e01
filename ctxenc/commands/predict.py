"""ctxenc predict RUN IMAGE...: print the likeliest classes of images."""

import argparse

from ctxenc.commands.arguments import add_device_arguments, add_run_arguments
from ctxenc.training.console import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = "example: ctxenc predict runs/001 holiday/ 'scans/*.png' --top-k 3 --csv > classes.csv"
    add_run_arguments(parser)
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="image file, folder (searched with its subfolders) or glob"
    )
    parser.add_argument("--top-k", type=positive_int, default=5, metavar="K", help="classes an image (default: 5)")
    parser.add_argument("--skip-broken", action="store_true", help="name broken images on stderr and go on")
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--json", action="store_true", help="print JSON in place of the table")
    layout.add_argument("--csv", action="store_true", help="print CSV in place of the table")
    add_device_arguments(parser, batch_size=32)


def run(args: argparse.Namespace) -> None:
    """Run the command; import its modules here, so that --help is fast."""
    from ctxenc.training import prediction

    prediction.run(args)
