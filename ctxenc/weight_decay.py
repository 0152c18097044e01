"""Parameters without weight decay: groups for torch's optimizers, and names for timm's."""

import math
from collections.abc import Collection
from fnmatch import fnmatch
from numbers import Real
from typing import Any

from torch import nn

from ctxenc.encoding import Encoding


def encoding_parameters(model: nn.Module) -> set[str]:
    """Name the codewords and the learned smoothing in a network, for its `no_weight_decay`: timm asks only the whole network."""
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, Encoding)
        for parameter, _ in module.named_parameters()
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters into two groups for an optimizer of torch, without and with weight decay.

    Biases, parameters of one dimension (norms, smoothing) and codewords do not decay. Nor do the parameters that
    `no_weight_decay()` of the model or of a module in it names. timm's optimizers ask the model alone.
    Call it after patching, and before FSDP1, whose shards have one dimension each; DDP, FSDP2 and torch.compile may come first:

        optimizer = torch.optim.AdamW(ctxenc.parameter_groups(model, 0.05), lr=1e-3)

    Args:
        model: any module.
        weight_decay: of the second group, at least 0.

    Returns:
        Two groups with the keys "params" and "weight_decay". Each parameter that requires a gradient is in one group, once.

    Raises:
        TypeError: model is no module, or weight_decay is no number.
        ValueError: weight_decay is negative or not finite, or FSDP1 wraps a part of the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"parameter_groups: model must be a torch.nn.Module, got {type(model).__name__}")
    rule = "parameter_groups: weight_decay must be a finite number of at least 0"
    if not isinstance(weight_decay, Real) or isinstance(weight_decay, bool):
        raise TypeError(f"{rule}, got {weight_decay!r}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"{rule}, got {weight_decay}")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(
            "parameter_groups: model must hold no FullyShardedDataParallel, whose shards look like biases, got one: "
            "make the groups before wrapping, with use_orig_params=True"
        )
    named = {
        id(parameter)
        for module in model.modules()
        if (names := _no_weight_decay(module))
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if any(fnmatch(name, pattern) for pattern in names)
    }
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": 0.0},
        {"params": [], "weight_decay": float(weight_decay)},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name.rpartition(".")[2] != "bias" and id(parameter) not in named
            groups[decays]["params"].append(parameter)
    return groups


def _no_weight_decay(module: nn.Module) -> Collection[str]:
    """Ask a module for names or patterns of parameters, as timm asks a model."""
    ask = getattr(module, "no_weight_decay", None)
    return ask() if callable(ask) else ()
