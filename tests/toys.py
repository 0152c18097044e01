"""Small networks to patch, and a look at all that a failed swap must leave alone."""

from typing import Any

import torch
from timm.layers import SEModule
from torch import nn

X = torch.randn(2, 3, 32, 32)


class Toy(nn.Module):
    """A network of one gated convolution, and what else it is given."""

    def __init__(self, se: nn.Module | None = None, **modules: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 1)
        self.se = SEModule(32, rd_channels=8) if se is None else se
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.se(self.conv(x))


def snapshot(model: nn.Module) -> Any:
    """What a swap that fails must not change: every module, its own attributes, and every value."""
    modules = list(model.named_modules(remove_duplicate=False))
    attributes = {
        (name, key): value
        for name, module in modules
        for key, value in vars(module).items()
        if not isinstance(value, dict)  # of parameters, buffers and hooks
    }
    return modules, attributes, {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model: nn.Module, before: Any) -> None:
    modules, attributes, values = snapshot(model)
    assert modules == before[0]
    assert attributes.keys() == before[1].keys()
    for key, value in attributes.items():
        assert value is before[1][key] or value == before[1][key], key
    assert values.keys() == before[2].keys()
    assert all(torch.equal(values[key], before[2][key]) for key in values)


class Stubborn(nn.Module):
    """Holds an SE block and gives it up for nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.se = SEModule(32)
        self.closed = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "se" and getattr(self, "closed", False):
            raise RuntimeError("no")
        super().__setattr__(name, value)
