"""ctxenc segment: semantic segmentation with EncNet."""

import argparse

from ctxenc.training.segmentation import evaluate, predict, train

COMMANDS = {
    "train": ("train EncNet; with no arguments, on embedded scenes, beside what it is compared with", train),
    "evaluate": ("measure pixel accuracy and mean IoU of a run", evaluate),
    "predict": ("segment images into coloured masks", predict),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sub-commands with their arguments."""
    parser.epilog = "examples: ctxenc segment train --help | ctxenc segment predict RUN IMAGE..."
    commands = parser.add_subparsers(dest="segment_command", metavar="COMMAND", required=True)
    for name, (summary, module) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."))


def run(args: argparse.Namespace) -> None:
    """Runs the chosen one."""
    COMMANDS[args.segment_command][1].run(args)
