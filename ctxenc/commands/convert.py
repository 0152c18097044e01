"""ctxenc convert: convert an EncNet checkpoint of PyTorch-Encoding or mmsegmentation into ours."""

import argparse
from pathlib import Path

from ctxenc.runs.config import atomic
from ctxenc.runs.errors import UserError
from ctxenc.training.console import say

OLD = (
    "note: PyTorch-Encoding computed the softmax over pixels from November 2017 to September 2018, and a file does not tell when it"
    " was trained; such a network gives other outputs here: measure it first"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = "example: ctxenc convert encnet_resnet50_pcontext.pth.tar encnet.safetensors"
    parser.add_argument("source", type=Path, metavar="IN", help="checkpoint of PyTorch-Encoding or mmsegmentation")
    parser.add_argument(
        "out", type=Path, metavar="OUT.safetensors", help="file to write, with the network's arguments in it"
    )


def run(args: argparse.Namespace) -> None:
    """Read the checkpoint, convert it, write it, and print a summary."""
    from ctxenc.integrations.checkpoints import load_encnet_checkpoint, save_encnet_checkpoint

    if args.out.suffix != ".safetensors":
        raise UserError(f"OUT must end in .safetensors, got {args.out}")
    if args.out.exists() and args.source.exists() and args.out.samefile(args.source):
        raise UserError(f"OUT must be another file than IN, got {args.out}")
    try:
        network = load_encnet_checkpoint(args.source)
    except ValueError as error:
        raise UserError(str(error)) from error
    with atomic(args.out) as path:
        save_encnet_checkpoint(network, path)
    config = network.config
    found = [f"{config['num_classes']} classes", f"{config['num_codes']} codewords"]
    found += [name for name in ("aux", "se_loss", "lateral", "align_corners") if config[name]]
    say(f"{args.out}: EncNet on {config['backbone']}, {', '.join(found)}")
    if config["align_corners"]:  # PyTorch-Encoding alone
        print(OLD)
