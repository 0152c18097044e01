"""What the tests of the block share."""

import pytest
import torch
from torch import nn

from ctxenc import ContextEncoding

POOLS = ("mean", "concat")
KINDS = ("learned", 0.7, "sampled")
each_pool = pytest.mark.parametrize("pool", POOLS)


def stirred(block: ContextEncoding) -> ContextEncoding:
    """A block whose norms have weights and statistics, so that leaving one of them out is seen."""
    generator = torch.Generator().manual_seed(0)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 2)
    return block


def norms_of(block: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in block.named_buffers()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def group_norm(channels: int, **kwargs) -> nn.Module:
    return nn.GroupNorm(1, channels, **kwargs)
