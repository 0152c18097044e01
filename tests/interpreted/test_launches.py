"""How many operators a block launches in training under autocast, against Squeeze-and-Excitation.

On maps of a few pixels an operator costs what its launch costs. Counted are operators of torch that compute, below autograd, and
launches of kernels, which do not run here. A form that takes fewer makes a test fail, too: then lower its numbers.
"""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from timm.layers import SEModule
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

import ctxenc
from ctxenc import functional
from ctxenc.kernels import backends

WITHOUT_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view")


class Launches(TorchDispatchMode):
    """Names of the operators and kernels that are launched, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        with self:
            if func.namespace == "ctxenc":  # what is inside counts
                return OPDEFS[name]._backend_fns["cpu"](*args, **kwargs)
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        view = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        if not view and name.removeprefix("aten::") not in WITHOUT_LAUNCH:
            self.names.append(name.removeprefix("aten::"))
        return func(*args, **kwargs)


def launches(block: nn.Module, x: Tensor, backend: str) -> tuple[list[str], list[str]]:
    """What forward and backward launch."""
    counted = Launches()

    def launch(kernel: InterpretedFunction, *args, **kwargs) -> None:
        counted.names.append(kernel.fn.__name__)

    x = x.requires_grad_()
    with mock.patch.object(InterpretedFunction, "run", launch), mock.patch.object(backends, "is_watched", bool):
        with ctxenc.use_backend(backend), torch.autocast("cpu", torch.bfloat16), counted:
            y = block(x)
        forward, counted.names = counted.names, []
        dy = torch.ones_like(y)
        with counted:
            torch.autograd.grad(y, (x, *block.parameters()), dy)
    return forward, counted.names


NUMBERS = [  # block, backend, images, channels, side, forward, backward
    (SEModule, "auto", 64, 256, 14, 10, 13),
    (ctxenc.ContextEncoding, "triton", 64, 256, 56, 13, 16),
    (ctxenc.ContextEncoding, "triton", 64, 256, 14, 13, 16),  # one each way divides by the number of pixels
    (ctxenc.ContextEncoding, "triton", 64, 2048, 7, 14, 17),
    (ctxenc.ContextEncoding, "triton", 8, 256, 56, 13, 17),  # programs of the gate share the pixels
]


@pytest.mark.parametrize(("block", "backend", "B", "C", "side", "forward", "backward"), NUMBERS)
def test_operators_in_training(
    block: Callable[[int], nn.Module], backend: str, B: int, C: int, side: int, forward: int, backward: int
):
    x = torch.zeros(B, C, side, side, dtype=torch.bfloat16)
    before, behind = launches(block(C).train(), x, backend)
    assert (len(before), len(behind)) == (forward, backward), f"{before}\n{behind}"


def test_what_is_counted():
    """Views and new tensors are not, copies are, inside of an operator of ours too."""
    with Launches() as counted:
        x = torch.empty(2, 3, 4).transpose(0, 1)
        x.flatten(1)
        x.bfloat16().to(torch.float32).add_(1).transpose(0, 1).view(2, 12).detach()
    assert counted.names == ["clone", "_to_copy", "_to_copy", "add_"]
    gate = launches(Gate(), torch.zeros(2, 8, 4, 200, dtype=torch.bfloat16), "triton")
    assert gate == (["gate_fwd_kernel"], ["gate_bwd_kernel", "add_splits_kernel"])


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2, 8, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return functional.fused_gate(x, self.logits, False)
