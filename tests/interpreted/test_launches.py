"""How many operators a block launches in training under autocast, against Squeeze-and-Excitation.

On maps of a few pixels an operator costs what its launch costs. Counted are operators of torch that compute, below autograd, and
launches of kernels, which do not run here. A form that takes fewer makes a test fail, too: then lower its numbers.
"""

from collections.abc import Callable

import pytest
import torch
from timm.layers import SEModule
from torch import Tensor, nn

import ctxenc
from benchmarks.block_bytes import MAPS, Launches, in_times_of_x, launches
from ctxenc import functional

NUMBERS = [  # block, backend, images, channels, side, forward, backward
    (SEModule, "auto", 64, 256, 14, 10, 13),
    (ctxenc.ContextEncoding, "triton", 64, 256, 56, 12, 15),
    (ctxenc.ContextEncoding, "triton", 64, 256, 14, 12, 15),
    (ctxenc.ContextEncoding, "triton", 64, 2048, 7, 13, 16),
    (ctxenc.ContextEncoding, "triton", 8, 256, 56, 12, 16),  # programs of the gate share the pixels
]


@pytest.mark.parametrize(("block", "backend", "B", "C", "side", "forward", "backward"), NUMBERS)
def test_operators_in_training(
    block: Callable[[int], nn.Module], backend: str, B: int, C: int, side: int, forward: int, backward: int
):
    x = torch.zeros(B, C, side, side, dtype=torch.bfloat16)
    before, behind = (each.names for each in launches(block(C), x, backend))
    assert (len(before), len(behind)) == (forward, backward), f"{before}\n{behind}"


@pytest.mark.parametrize(("channels", "side"), MAPS)
def test_training_moves_fewer_bytes_than_se(channels: int, side: int):
    blocks = [SEModule, ctxenc.ContextEncoding, lambda channels: ctxenc.ContextEncoding(channels, max_size=14)]
    se, whole, coarse = (in_times_of_x(make, 8, channels, side) for make in blocks)
    assert max(whole[0], coarse[0]) < se[0]
    assert whole[1] < 1.06 * se[1]  # in inference; the parameters weigh a third where eight maps are 7 x 7


def test_what_is_counted():
    """Views and new tensors are not, copies are, inside of an operator of ours too."""
    with Launches() as counted:
        x = torch.empty(2, 3, 4).transpose(0, 1)
        x.flatten(1)
        x.bfloat16().to(torch.float32).add_(1).transpose(0, 1).view(2, 12).detach()
    assert counted.names == ["clone", "_to_copy", "_to_copy", "add_"]
    x = torch.zeros(2, 8, 4, 200, dtype=torch.bfloat16)
    forward, backward = launches(Gate(), x, "triton")
    assert (forward.names, backward.names) == (["gate_fwd_kernel"], ["gate_bwd_kernel", "add_splits_kernel"])
    assert forward.bytes == [2 * x.nbytes + 2 * 16]  # x, the logits and y


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2, 8, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return functional.run_fused_gate(x, self.logits, False)
