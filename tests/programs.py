"""The layer, the block and a swapped network, as what PyTorch transforms are tried on."""

import pytest
import torch
from torch import nn

import ctxenc
from ctxenc import ContextEncoding, Encoding


def swapped_network() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return ctxenc.patch_se_blocks(timm.create_model("test_efficientnet", num_classes=5), num_codes=4)


MODULES = {
    "encoding": lambda: Encoding(8, 4),
    "shared": lambda: Encoding(8, 4, smoothing=0.7),
    "mean": lambda: ContextEncoding(8, 4),
    "concat": lambda: ContextEncoding(8, 4, pool="concat", smoothing=0.7),
    "network": swapped_network,
}
BLOCKS = tuple(MODULES)[:-1]
each_module = pytest.mark.parametrize("name", MODULES)
each_block = pytest.mark.parametrize("name", BLOCKS)


def module_and_input(name: str, batch: int = 2, size: int = 6) -> tuple[nn.Module, torch.Tensor]:
    module = MODULES[name]()
    if name == "network":
        return module, torch.randn(batch, 3, 8 * size, 8 * size)
    return module, torch.randn(batch, 8, size, size + 1)


def gradients(module, inputs: torch.Tensor, call=None) -> dict[str, torch.Tensor]:
    """Of the input and of the parameters."""
    leaf = inputs.clone().requires_grad_()
    module.zero_grad()
    (module if call is None else call)(leaf).square().mean().backward()
    return {"input": leaf.grad} | {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def assert_close(got, wanted) -> None:
    """As two orders of the same sums are."""
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
