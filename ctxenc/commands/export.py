"""ctxenc export RUN: write a run's model as an ONNX file or a torch.export program, verified before it takes its name."""

import argparse
from pathlib import Path

from ctxenc.commands.arguments import RUN_OF_SEGMENT, add_run_arguments
from ctxenc.training.console import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = "example: ctxenc export runs/001 --onnx model.onnx --torch-export model.pt2"
    add_run_arguments(parser, f"run folder of finetune, {RUN_OF_SEGMENT}")
    parser.add_argument(
        "--image-size",
        type=positive_int,
        metavar="N",
        help="side of the image (default: the run's, or the crop of its training)",
    )
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="write an ONNX model")
    parser.add_argument("--torch-export", type=Path, metavar="FILE", help="write a torch.export program (.pt2)")


def run(args: argparse.Namespace) -> None:
    """Run the command; import its modules here, so that --help is fast."""
    from ctxenc.training import exporting

    exporting.run(args)
