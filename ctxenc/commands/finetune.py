"""ctxenc finetune: train a timm model with its SE blocks swapped, beside the SE network or alone."""

import argparse
from dataclasses import asdict

from ctxenc.commands.arguments import add_options, add_swap_arguments, add_training_arguments
from ctxenc.training.settings import EMBEDDED, RUNS, Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = (
        "examples: ctxenc finetune | ctxenc finetune --model seresnet50 --pretrained --data PATH | "
        "accelerate launch -m ctxenc finetune --data PATH"
    )
    add_training_arguments(parser, RUNS)
    add_options(parser, Settings(), {"the photographs": EMBEDDED})
    add_swap_arguments(parser)
    parser.set_defaults(**dict.fromkeys(asdict(Settings())))  # None: not given


def run(args: argparse.Namespace) -> None:
    """Run the command; import its modules here, so that --help is fast."""
    from ctxenc.training import finetuning

    finetuning.run(args)
