"""ctxenc look RUN IMAGE...: draw how the blocks of a network encode images."""

import argparse
from pathlib import Path

from ctxenc.commands.arguments import add_image_arguments, add_run_arguments, add_timm_arguments
from ctxenc.training.console import positive_int

OUT = Path("runs") / "look"
IMAGE_SIZE = 512  # that of ctxenc.viz, which needs torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = "example: ctxenc look runs/001 holiday/ --blocks 2 --image-size 384"
    add_run_arguments(
        parser,
        "run of finetune or segment train, checkpoint of an EncNet, or timm model (or torchvision:NAME) to patch, without"
        " trained weights",
    )
    add_image_arguments(
        parser,
        "embedded test scenes for a network that was trained on such, else four of the embedded photographs",
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"where to write (default: {OUT})")
    parser.add_argument(
        "--blocks",
        nargs="+",
        default=["3"],
        metavar="B",
        help="all, names, or a number of blocks spread from the first to the last (default: 3)",
    )
    parser.add_argument(
        "--codewords",
        type=int,
        nargs="+",
        metavar="K",
        help="which to follow (default: the three that own most pixels)",
    )
    parser.add_argument(
        "--count",
        type=positive_int,
        default=4,
        metavar="N",
        help="images, spread over those that are named (default: 4)",
    )
    parser.add_argument(
        "--image-size",
        type=positive_int,
        metavar="N",
        help="images whose longer side is larger are shrunk to it (default: the size of the network's training)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: auto)")
    add_timm_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command; import its modules here, so that --help is fast."""
    from ctxenc.training import looking

    looking.run(args)
