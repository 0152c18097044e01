"""ctxenc inspect MODEL: list the SE blocks of a model, and the effect of a swap on parameters, MACs and time."""

import argparse

from ctxenc.commands.arguments import add_swap_arguments
from ctxenc.training.console import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = "example: ctxenc inspect seresnet50 --num-codes 32"
    parser.add_argument("model", metavar="MODEL", help="a timm model, or torchvision:NAME")
    parser.add_argument(
        "--image-size", type=positive_int, metavar="N", help="side of the image in pixels (default: the model's own)"
    )
    add_swap_arguments(parser)
    parser.add_argument("--no-time", dest="time", action="store_false", help="do not run the networks to time them")
    parser.add_argument("--device", default="auto", help="to time on: cpu, cuda, cuda:1, mps, ... (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")


def run(args: argparse.Namespace) -> None:
    """Run the command; import its modules here, so that --help is fast."""
    from ctxenc.training import inspection

    inspection.run(args)
