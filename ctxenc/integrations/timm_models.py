"""Register the networks of ctxenc with timm; import this module, then call `timm.create_model("ctxenc_resnet50")`.

timm's own scripts take them with `--device-modules ctxenc.integrations.timm_models`. There are no pretrained weights.

- `ctxenc_NAME`, with NAME one of timm's ResNets or ResNeXts, with or without SE: the network after
  `patch_se_blocks(model, fill_empty=True)`. So ctxenc_resnet50 and ctxenc_seresnet50 are the same network, like other such pairs.
- `encnet_cifar_16k64d` and `encnet_cifar_32k128d`, and the paper's baselines, `seresnet_cifar_64d`, `seresnet_cifar_128d`,
  `resnet_cifar_64d` and `resnet_cifar_128d`; see ctxenc.integrations.cifar.
- `deepten_resnet18`, `deepten_resnet50` and `deepten_resnet101`; see ctxenc.integrations.deepten.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from ctxenc.context import ContextEncoding
from ctxenc.integrations.cifar import cifar_encnet, cifar_resnet, cifar_senet
from ctxenc.integrations.deepten import DeepTEN
from ctxenc.weight_decay import encoding_parameters


class ContextResNet(ResNet):
    """Exempt codewords and smoothing from weight decay in timm's ResNet."""

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm's optimizers should not decay."""
        return encoding_parameters(self)


# timm's names, without the "se" of SE networks
_RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": {"block": BasicBlock, "layers": (2, 2, 2, 2)},
    "resnet34": {"block": BasicBlock, "layers": (3, 4, 6, 3)},
    "resnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3)},
    "resnet101": {"block": Bottleneck, "layers": (3, 4, 23, 3)},
    "resnet152": {"block": Bottleneck, "layers": (3, 8, 36, 3)},
    "resnext50_32x4d": {"block": Bottleneck, "layers": (3, 4, 6, 3), "cardinality": 32, "base_width": 4},
    "resnext101_32x4d": {"block": Bottleneck, "layers": (3, 4, 23, 3), "cardinality": 32, "base_width": 4},
    "resnext101_32x8d": {"block": Bottleneck, "layers": (3, 4, 23, 3), "cardinality": 32, "base_width": 8},
}

_CIFAR: dict[str, tuple[Callable[..., nn.Module], dict[str, int]]] = {
    "encnet_cifar_16k64d": (cifar_encnet, {"widen": 4, "num_codes": 16}),
    "encnet_cifar_32k128d": (cifar_encnet, {"widen": 8, "num_codes": 32}),
    "seresnet_cifar_64d": (cifar_senet, {"widen": 4}),
    "seresnet_cifar_128d": (cifar_senet, {"widen": 8}),
    "resnet_cifar_64d": (cifar_resnet, {"widen": 4}),
    "resnet_cifar_128d": (cifar_resnet, {"widen": 8}),
}

_BACKBONES = ("resnet18", "resnet50", "resnet101")

_IMAGENET_CFG: dict[str, Any] = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "first_conv": "conv1",
    "classifier": "fc",
    "license": "apache-2.0",
}
_CIFAR_CFG = _IMAGENET_CFG | {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
}
_DEEPTEN_CFG = _IMAGENET_CFG | {"num_classes": 23, "first_conv": "backbone.conv1"}  # MINC-2500's classes

__all__ = ["ContextResNet"]  # timm adds the name of each network

_CFGS: dict[str, Any] = {
    **{f"ctxenc_{se}{name}": _IMAGENET_CFG for name in _RESNETS for se in ("", "se")},
    **dict.fromkeys(_CIFAR, _CIFAR_CFG),
    **{f"deepten_{backbone}": _DEEPTEN_CFG for backbone in _BACKBONES},
}
default_cfgs = generate_default_cfgs(_CFGS)  # timm looks it up by this name


def _register(name: str, build: Callable[..., nn.Module], features: dict[str, Any], **arguments: Any) -> None:
    """Make the function that timm calls for a name. timm finds the name's default_cfg by the function's module."""

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:  # the file includes the backbone's weights
            kwargs.pop("pretrained_backbone", None)
        # timm changes this dict for features_only
        return build_model_with_cfg(build, name, pretrained, feature_cfg=dict(features), **(arguments | kwargs))

    entry.__name__ = entry.__qualname__ = name
    globals()[name] = register_model(entry)


for _name, _arguments in _RESNETS.items():
    for _se in ("", "se"):
        _register(f"ctxenc_{_se}{_name}", ContextResNet, {}, **_arguments, block_args={"attn_layer": ContextEncoding})
for _name, (_build, _arguments) in _CIFAR.items():
    _register(_name, _build, {"out_indices": (0, 1, 2, 3)}, **_arguments)
for _name in _BACKBONES:
    _register(f"deepten_{_name}", DeepTEN, {"feature_cls": "getter"}, backbone=_name)
