"""Find Squeeze-and-Excitation blocks, and the empty slots for them.

Recognise classes by their qualified names, so that no other library is imported here.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class SEBlock:
    """Describe a block that gates channels, as found in a model.

    Attributes:
        name: qualified name in the model.
        class_name: qualified class name; for an empty slot, its owner's.
        channels: C of the map that it gates.
        rd_channels: channels between its two layers; None without a reduction (EffectiveSE, an empty slot).
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
class SEClass:
    """Name the parts of a class of SE blocks; see register_se_class."""

    first: str = ""
    gate: str = ""
    reduces: bool = True
    layout: str = "NCHW"
    registered: bool = False  # by a user, whose names may be wrong


_SE_CLASSES = {
    "timm.layers.squeeze_excite.SEModule": SEClass("fc1", "gate"),
    "timm.layers.squeeze_excite.EffectiveSEModule": SEClass("fc", "gate", reduces=False),
    "timm.layers.squeeze_excite.SqueezeExciteCl": SEClass("fc1", "gate", layout="NHWC"),
    "timm.models._efficientnet_blocks.SqueezeExcite": SEClass("conv_reduce", "gate"),
    "timm.models.senet.SEModule": SEClass("fc1", "sigmoid"),
    "timm.models.hgnet.EseModule": SEClass("conv", "sigmoid", reduces=False),
    "torchvision.ops.misc.SqueezeExcitation": SEClass("fc1", "scale_activation"),
    "segmentation_models_pytorch.encoders._senet.SEModule": SEClass("fc1", "sigmoid"),
    "segmentation_models_pytorch.encoders.mobileone.SEBlock": SEClass("reduce"),
}
LIBRARIES = "timm, torchvision and segmentation_models_pytorch"

# Owners with a slot for channel attention, None in plain networks, and the convolution before that slot.
_EMPTY_SLOTS = {
    "timm.models.resnet.BasicBlock": ("se", "conv2"),
    "timm.models.resnet.Bottleneck": ("se", "conv3"),
}

# Channel attentions other than SE, for the error text if a model has nothing to patch.
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


# Matches names of SE classes, and of layers in blocks with built-in squeezing.
_CLASS_LIKE_SE = re.compile("(?<![A-Z])SE(?![a-z])|Squeeze|Excit|ChannelAttention")
_LAYER_LIKE_SE = re.compile("_?se_")


def register_se_class(
    cls: type[nn.Module], *, first: str = "", gate: str = "", reduces: bool = True, layout: str = "NCHW"
) -> None:
    """Register a class of SE blocks and its subclasses for find_se_blocks, patch_se_blocks and calibrate.

    Args:
        cls: modules that take a map and return it times one gate per channel, and nothing else.
        first: name of the first layer in it, such as "fc.0"; by default its first convolution or linear layer.
        gate: name of the module of its gate function, such as "fc.3"; by default a sigmoid of its last layer's output.
        reduces: whether the first layer reduces the channels.
        layout: layout of the map, "NCHW" or "NHWC".

    Raises:
        TypeError: cls is not a class of modules, a name is not text, or reduces is not True or False.
        ValueError: cls belongs to torch or ctxenc, or layout is unknown.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_se_class: cls must be a subclass of torch.nn.Module, got {cls!r}")
    if cls.__module__.partition(".")[0] in ("torch", "ctxenc"):
        raise ValueError(f"register_se_class: cls must be a class of SE blocks, got {_qualify(cls)}")
    for name, value in (("first", first), ("gate", gate)):
        if not isinstance(value, str):
            raise TypeError(f"register_se_class: {name} must be the name of a module, got {value!r}")
    if not isinstance(reduces, bool):
        raise TypeError(f"register_se_class: reduces must be True or False, got {reduces!r}")
    if layout not in ("NCHW", "NHWC"):
        raise ValueError(f"register_se_class: layout must be NCHW or NHWC, got {layout!r}")
    _SE_CLASSES[_qualify(cls)] = SEClass(first, gate, reduces, layout, registered=True)


def _qualify(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _find_class(module: nn.Module) -> SEClass | None:
    return next((_SE_CLASSES[name] for name in map(_qualify, type(module).__mro__) if name in _SE_CLASSES), None)


def _get_part(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"register_se_class: {type(module).__name__} must have a module {name}, got none") from error


def _list_layers(module: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def _read(module: nn.Module) -> tuple[SEClass, nn.Conv2d | nn.Linear] | None:
    """Return how to read an SE block with float weights, and its first layer; None for any other module.

    The first layer may be fused, or wrapped in an adapter.
    """
    cls = _find_class(module)
    if cls is None:
        return None
    if cls.registered:
        _check_parts(module, cls)
    first = _list_layers(_get_part(module, cls.first))
    return (cls, first[0]) if first else None


def _check_parts(module: nn.Module, cls: SEClass) -> None:
    """Raise an error if the names given to register_se_class do not name a first layer and a gate function."""
    name, layers = type(module).__name__, _list_layers(module)
    if not layers:
        return  # quantized
    first = _list_layers(_get_part(module, cls.first))
    channels = max(_get_sizes(layer)[1] for layer in layers)
    if not first or _get_sizes(first[0])[0] != channels:
        found = "no such layer" if not first else f"one of {_get_sizes(first[0])[0]}"
        raise ValueError(
            f"register_se_class: first must name a convolution or linear layer of the {channels} channels of {name},"
            f" got {cls.first!r}, {found}"
        )
    if cls.gate and _list_layers(_get_part(module, cls.gate)):
        raise ValueError(f"register_se_class: gate must name an activation of {name}, got {cls.gate!r} with layers")


def _get_sizes(layer: nn.Conv2d | nn.Linear) -> tuple[int, int]:
    """Return the input and output channels of a layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def find_first_layer(module: nn.Module) -> nn.Conv2d | nn.Linear | None:
    """Return the first layer of an SE block; None for any other module."""
    found = _read(module)
    return found[1] if found else None


def find_gate(module: nn.Module) -> nn.Module | None:
    """Return the gate function of an SE block; None if it calls a sigmoid directly, and for any other module."""
    found = _read(module)
    return _get_part(module, found[0].gate) if found and found[0].gate else None


def find_logits(module: nn.Module) -> tuple[nn.Module, bool]:
    """Return the module that sees an SE block's logits, and True if they are its input (a gate), False if its output (a layer)."""
    gate = find_gate(module)
    return (_list_layers(module)[-1], False) if gate is None else (gate, True)


def iterate_blocks(model: nn.Module) -> Iterator[tuple[SEBlock, nn.Module]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if found := _read(module):
            cls, first = found
            channels, rd_channels = _get_sizes(first)
            block = SEBlock(
                name=name,
                class_name=_qualify(type(module)),
                channels=channels,
                rd_channels=rd_channels if cls.reduces else None,
                gate=type(_get_part(module, cls.gate)).__name__ if cls.gate else "Sigmoid",
                layout=cls.layout,
            )
            yield block, module


def find_empty_slots(model: nn.Module) -> Iterator[tuple[SEBlock, nn.Module]]:
    """Yield the empty slots, each with the convolution before it."""
    for name, module in model.named_modules(remove_duplicate=False):
        class_name = _qualify(type(module))
        if class_name in _EMPTY_SLOTS:
            slot, conv_name = _EMPTY_SLOTS[class_name]
            if getattr(module, slot, module) is None:
                conv = getattr(module, conv_name)
                name = f"{name}.{slot}" if name else slot
                yield SEBlock(name, class_name, conv.out_channels, None, "Sigmoid"), conv


def find_se_blocks(model: nn.Module) -> list[SEBlock]:
    """Find the Squeeze-and-Excitation blocks of a model, in the order of its modules.

    Known classes: SEModule, EffectiveSEModule, SqueezeExciteCl and the SE classes of EfficientNet, SENet and HGNet in timm;
    torchvision's SqueezeExcitation; the SE classes of SENet and MobileOne in segmentation_models_pytorch; the classes of
    register_se_class; and subclasses of these. ECA, GlobalContext, SplitAttn and SelectiveKernel are not SE.

    Args:
        model: any module.

    Returns:
        One record per block; an empty list if the model has no SE block.
    """
    check_model("find_se_blocks", model)
    return [block for block, _ in iterate_blocks(model)]


def check_model(name: str, model: object) -> None:
    """Raise an error unless model is a module.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")


def describe_contents(model: nn.Module, filtered: bool) -> str:
    """Explain why a model has no SE blocks to patch."""
    name = type(model).__name__
    if filtered:
        return f"{name}: filter_fn refused all of its blocks"
    modules = list(model.modules())
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        return f"{name}: a scripted or traced model shows no SE blocks; patch it before"
    if any(isinstance(module, torch.fx.GraphModule) for module in modules):
        return f"{name}: a torch.fx graph keeps no SE blocks as modules; patch before tracing"
    names = [type(module).__name__ for module in modules]
    has = [f"{names.count(other)} {other}" for other in _OTHER_ATTENTION if other in names]
    if quantized := sum(_find_class(module) is not None for module in modules):
        has.append(f"{quantized} quantized SE blocks; patch before that")
    if empty := len(list(find_empty_slots(model))):
        has.append(f"{empty} empty slots, which fill_empty=True fills")
    alike, inline = _count_lookalikes(modules)
    if alike:
        has.append(f"{alike}, which may be SE: ctxenc.register_se_class makes a class known")
    if inline:
        has.append(f"{inline}, whose own forward squeezes: only a module of its own can be replaced")
    return f"{name} with {', '.join(has) or 'no channel attention'}; looked for the SE classes of {LIBRARIES}"


def _count_lookalikes(modules: list[nn.Module]) -> tuple[str, str]:
    """Count the classes with names like SE, and the classes with such layers."""
    classes, owners = Counter[str](), Counter[str]()
    for module in modules:
        if _is_named_like_se(module) and not any(map(_is_named_like_se, list(module.modules())[1:])):
            classes[type(module).__name__] += 1
        elif any(
            _LAYER_LIKE_SE.match(name) and _list_layers(child) == [child] for name, child in module.named_children()
        ):
            owners[type(module).__name__] += 1
    alike, inline = (", ".join(f"{count} {name}" for name, count in each.items()) for each in (classes, owners))
    return alike, inline


def _is_named_like_se(module: nn.Module) -> bool:
    cls = type(module)
    foreign = cls.__module__.partition(".")[0] != "torch" and not _find_class(module)
    return foreign and bool(_CLASS_LIKE_SE.search(cls.__name__))
