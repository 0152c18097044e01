"""ctxenc finetune: train a timm model with its SE blocks swapped, beside the SE network or alone."""

import argparse

from ctxenc.commands.arguments import add_options, add_training_arguments
from ctxenc.training.settings import EMBEDDED, RUNS, Settings, SwapSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = (
        "examples: ctxenc finetune | ctxenc finetune --model seresnet50 --pretrained --data PATH | "
        "accelerate launch -m ctxenc finetune --data PATH"
    )
    add_training_arguments(parser, RUNS)
    add_options(parser.add_argument_group("training"), Settings, {"the photographs": EMBEDDED}, SwapSettings)
    add_options(parser.add_argument_group("swap"), SwapSettings)


def run(args: argparse.Namespace) -> None:
    """Run the command; import its modules here, so that --help is fast."""
    from ctxenc.training import finetuning

    finetuning.run(args)
