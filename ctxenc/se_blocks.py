"""Finding Squeeze-and-Excitation blocks, and the empty slots where one could be.

Classes are recognised by their qualified names, so that neither timm nor torchvision is imported here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class SEBlock:
    """A block that gates channels, as found in a model.

    Attributes:
        name: qualified name in the model.
        class_name: qualified class name; for an empty slot, that of its owner.
        channels: C of the map that it gates.
        rd_channels: channels between its two layers; None where it has no reduction (EffectiveSE, an empty slot).
        gate: class name of the gate function.
        layout: "NCHW" or "NHWC".
    """

    name: str
    class_name: str
    channels: int
    rd_channels: int | None
    gate: str
    layout: str = "NCHW"


@dataclass(frozen=True)
class Kind:
    """How to read an SE class: its first layer, its gate, whether the first layer reduces, and the layout of the map."""

    first: str
    gate: str
    reduces: bool = True
    layout: str = "NCHW"


_KINDS = {
    "timm.layers.squeeze_excite.SEModule": Kind("fc1", "gate"),
    "timm.layers.squeeze_excite.EffectiveSEModule": Kind("fc", "gate", reduces=False),
    "timm.layers.squeeze_excite.SqueezeExciteCl": Kind("fc1", "gate", layout="NHWC"),
    "timm.models._efficientnet_blocks.SqueezeExcite": Kind("conv_reduce", "gate"),
    "timm.models.senet.SEModule": Kind("fc1", "sigmoid"),
    "timm.models.hgnet.EseModule": Kind("conv", "sigmoid", reduces=False),
    "torchvision.ops.misc.SqueezeExcitation": Kind("fc1", "scale_activation"),
}

# Owners whose slot for a channel attention is None in plain networks, with the convolution whose output it would gate.
_EMPTY_SLOTS = {
    "timm.models.resnet.BasicBlock": ("se", "conv2"),
    "timm.models.resnet.Bottleneck": ("se", "conv3"),
}

# Channel attentions that are no SE, for the text of the error when a model has nothing to patch.
_OTHER_ATTENTION = (
    "EcaModule",
    "CecaModule",
    "GlobalContext",
    "SplitAttn",
    "SelectiveKernel",
    "CbamModule",
    "LightCbamModule",
    "ContextEncoding",
)


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _kind_by_class(module: nn.Module) -> Kind | None:
    return next((_KINDS[name] for name in map(_qualified, type(module).__mro__) if name in _KINDS), None)


def _sizes(module: nn.Module, kind: Kind) -> tuple[int, int] | None:
    """Channels into and out of the first layer, be it fused or wrapped in an adapter; None where it is quantized."""
    for layer in getattr(module, kind.first).modules():
        if isinstance(layer, nn.Conv2d):
            return layer.in_channels, layer.out_channels
        if isinstance(layer, nn.Linear):
            return layer.in_features, layer.out_features
    return None


def kind_of(module: nn.Module) -> Kind | None:
    """How to read a module that is an SE block with float weights; None for any other."""
    kind = _kind_by_class(module)
    return kind if kind and _sizes(module, kind) else None


def named_blocks(model: nn.Module) -> Iterator[tuple[SEBlock, nn.Module]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.jit.ScriptModule):
            continue
        kind = _kind_by_class(module)
        if kind and (sizes := _sizes(module, kind)):
            channels, rd_channels = sizes
            block = SEBlock(
                name=name,
                class_name=_qualified(type(module)),
                channels=channels,
                rd_channels=rd_channels if kind.reduces else None,
                gate=type(getattr(module, kind.gate)).__name__,
                layout=kind.layout,
            )
            yield block, module


def empty_slots(model: nn.Module) -> Iterator[tuple[SEBlock, nn.Module]]:
    """Empty slots, each with the convolution whose output would be gated."""
    for name, module in model.named_modules(remove_duplicate=False):
        class_name = _qualified(type(module))
        if class_name in _EMPTY_SLOTS:
            slot, conv_name = _EMPTY_SLOTS[class_name]
            if getattr(module, slot, module) is None:
                conv = getattr(module, conv_name)
                name = f"{name}.{slot}" if name else slot
                yield SEBlock(name, class_name, conv.out_channels, None, "Sigmoid"), conv


def find_se_blocks(model: nn.Module) -> list[SEBlock]:
    """The Squeeze-and-Excitation blocks of a model, in the order of its modules.

    Knows SEModule, EffectiveSEModule, SqueezeExciteCl and the SE classes of EfficientNet, SENet and HGNet in timm, and
    torchvision's SqueezeExcitation, with their subclasses. ECA, GlobalContext, SplitAttn and SelectiveKernel are not SE.

    Args:
        model: any module.

    Returns:
        A record a block; an empty list where there are none.
    """
    check_model("find_se_blocks", model)
    return [block for block, _ in named_blocks(model)]


def check_model(name: str, model: object) -> None:
    """Accept modules.

    Raises:
        TypeError: model is something else.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")


def what_it_has(model: nn.Module, filtered: bool) -> str:
    """What stands in the way of a model that has no SE blocks to patch."""
    name = type(model).__name__
    if filtered:
        return f"{name}, all of whose blocks filter_fn refused"
    modules = list(model.modules())
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        return f"{name}: nothing can be found in what is scripted or traced; patch before that"
    if any(isinstance(module, torch.fx.GraphModule) for module in modules):
        return f"{name}: a torch.fx graph keeps no SE blocks as modules; patch before tracing"
    names = [type(module).__name__ for module in modules]
    has = [f"{names.count(other)} {other}" for other in _OTHER_ATTENTION if other in names]
    if quantized := sum(_kind_by_class(module) is not None for module in modules):
        has.append(f"{quantized} quantized SE blocks; patch before that")
    if empty := len(list(empty_slots(model))):
        has.append(f"{empty} empty slots, which fill_empty=True fills")
    return f"{name} with {', '.join(has) or 'no channel attention at all'}"
