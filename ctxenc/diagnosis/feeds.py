"""Inputs that known networks feed the operator, measured, and checked if no model is named."""

from typing import NamedTuple


class Feed(NamedTuple):
    """Describe the input of the operator in one layer of a network."""

    source: str
    channels: int  # D, the C' of a block
    spatial: tuple[int, int]
    num_codes: int
    batch: int  # images at a time on a GPU


# EncNet, the CIFAR network, and swapped networks with the reduction of their own SE blocks, at timm's input size (224, nfnet_f0
# 192): tests/test_benchmarks.py compares these figures with the networks.
FEEDS = [
    Feed("EncNet-R50 at 480", 512, (60, 60), 32, 16),
    Feed("EncNet-R50 at 769", 512, (97, 97), 32, 4),
    Feed("seresnet50, stage 1", 16, (56, 56), 16, 256),
    Feed("seresnet50, stage 2", 32, (28, 28), 16, 256),
    Feed("seresnet50, stage 3", 64, (14, 14), 16, 256),
    Feed("seresnet50, stage 4", 128, (7, 7), 16, 256),
    Feed("efficientnet_b0, stage 1", 8, (112, 112), 16, 256),
    Feed("efficientnet_b0, stage 4", 20, (14, 14), 16, 256),
    Feed("efficientnet_b0, stage 6", 48, (7, 7), 16, 256),
    Feed("nfnet_f0, stage 2", 256, (24, 24), 16, 256),
    Feed("nfnet_f0, stage 3", 768, (12, 12), 16, 256),
    Feed("encnet_cifar_16k64d, stage 3", 64, (8, 8), 16, 128),
]
