"""ctxenc evaluate RUN: measure a run's model on its validation data, or on another image folder."""

import argparse

from ctxenc.commands.arguments import add_device_arguments, add_run_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = "example: ctxenc evaluate runs/001 --checkpoint last --data photos/val"
    add_run_arguments(parser)
    parser.add_argument("--data", metavar="DIR", help="image folder of the run's classes (default: its own data)")
    parser.add_argument("--skip-broken", action="store_true", help="name broken images on stderr and go on")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load images (default: 0)")
    add_device_arguments(parser, batch_size=64)


def run(args: argparse.Namespace) -> None:
    """Run the command; import its modules here, so that --help is fast."""
    from ctxenc.training import evaluation

    evaluation.run(args)
