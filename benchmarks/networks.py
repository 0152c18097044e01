"""Define the networks of benchmarks.swap, and the changes that make their variants."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.layers import SEModule, get_attn
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import segmentation

import ctxenc
from ctxenc.encoding import reduce_channels
from ctxenc.integrations import EncNet, EncNetLoss
from ctxenc.runs.segment_config import NoContext
from ctxenc.swap.patching import find_context_blocks
from ctxenc.swap.se_classes import find_empty_slots, find_se_blocks

CLASSIFIERS = (
    "seresnet50",
    "legacy_seresnet50",
    "seresnext50_32x4d",
    "regnety_032",
    "efficientnet_b0",
    "mobilenetv3_large_100",
    "nfnet_f0",
    "resnet50",  # its slots are empty
)
ENCNET = "EncNet-R50"
NETWORKS = (CLASSIFIERS[0], ENCNET, *CLASSIFIERS[1:])  # most important first

SWAPS: dict[str, dict[str, Any]] = {
    "own, mean": {},
    "own, concat": {"pool": "concat"},
    "own, mean, 14": {"max_size": 14},
    "own, mean, 7": {"max_size": 7},
    "1/16, mean": {"rd_ratio": 1 / 16},
    "1/16, concat": {"rd_ratio": 1 / 16, "pool": "concat"},
    "1/4, mean": {"rd_ratio": 1 / 4},
    "1/4, concat": {"rd_ratio": 1 / 4, "pool": "concat"},
}
# Other attention layers of timm, by their names there, in place of a seresnet50's SE blocks and with their reduction.
OTHERS = {"ECA": "eca", "GlobalContext": "gc", "CBAM": "cbam"}
# The most informative variants, for settings in which all would take too long.
MAIN = (
    "shipped",
    "no SE",
    *OTHERS,
    "SE",
    "own, mean",
    "own, mean, 14",
    "own, mean, 7",
    "1/4, mean",
    "FCN-R50",
    "EncNet-R50",
    "torchvision DeepLabV3-R50",
)

Change = Callable[[nn.Module], nn.Module]


def build(network: str) -> nn.Module:
    """Build the original network, with random weights.

    EncNet has no auxiliary head here, like the torchvision networks in the same table.
    """
    return EncNet("resnet50", aux=False) if network == ENCNET else timm.create_model(network)


def changes(model: nn.Module) -> dict[str, Change]:
    """Return the changes that make the variants of a network from build(), by name; the first variant is the baseline.

    C' = C / 16 is left out if the SE blocks have it themselves.
    """
    if isinstance(model, EncNet):
        return {
            "FCN-R50": _without_context,
            "EncNet-R50": _without_presence,
            "EncNet-R50, SE-loss": _as_it_is,
            "torchvision FCN-R50": partial(_torchvision, segmentation.fcn_resnet50),
            "torchvision DeepLabV3-R50": partial(_torchvision, segmentation.deeplabv3_resnet50),
        }
    blocks = find_se_blocks(model)
    if not blocks:
        names = [name for name in SWAPS if not name.startswith("own")]
        other = {"SE": _with_se}
    else:
        usual = all(block.rd_channels == reduce_channels(block.channels, 1 / 16, rd_divisor=8) for block in blocks)
        names = [name for name in SWAPS if not (usual and name.startswith("1/16"))]
        other = {"no SE": _without_se}
        if model.default_cfg.get("architecture") == CLASSIFIERS[0]:
            other |= {name: partial(_with_attention, kind) for name, kind in OTHERS.items()}
    swaps = {name: partial(ctxenc.patch_se_blocks, fill_empty=not blocks, **SWAPS[name]) for name in names}
    return {"shipped": _as_it_is, **other, **swaps}


def variant(model: nn.Module, change: Change) -> nn.Module:
    """Return a changed copy; unchanged parts have the same weights in all variants."""
    return change(copy.deepcopy(model))


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def _without_se(model: nn.Module) -> nn.Module:
    for block in find_se_blocks(model):
        model.set_submodule(block.name, nn.Identity())
    return model


def _with_attention(kind: str, model: nn.Module) -> nn.Module:
    for block in find_se_blocks(model):
        model.set_submodule(block.name, get_attn(kind)(block.channels, rd_channels=block.rd_channels))
    return model


def _with_se(model: nn.Module) -> nn.Module:
    for slot, _ in list(find_empty_slots(model)):
        path, _, attribute = slot.name.rpartition(".")
        setattr(model.get_submodule(path), attribute, SEModule(slot.channels))
    return model


def _without_presence(model: nn.Module) -> nn.Module:
    model.encoding.presence = None  # type: ignore[union-attr]
    return model


def _without_context(model: nn.Module) -> nn.Module:
    model.encoding = NoContext()  # an FCN with a head of the same width
    return model


def _torchvision(make: Callable[..., nn.Module], _: nn.Module) -> nn.Module:
    return make(weights=None, weights_backbone=None, num_classes=21)


def reduction(model: nn.Module) -> str:
    """Return C' of the channel-gating blocks, as parts of C: "C/16", "C/4 to C/24", or "" without such blocks."""
    gated = [(block.channels, block.rd_channels) for block in find_se_blocks(model)]
    gated += [(block.replaced.channels, block.rd_channels) for block in find_context_blocks(model)]
    parts = sorted({round(channels / rd_channels) for channels, rd_channels in gated if rd_channels})
    return " to ".join(f"C/{part}" for part in dict.fromkeys([*parts[:1], *parts[-1:]]))


def image_size(network: str) -> int:
    """Return pixels per side: timm's own, at most 224; 480 for EncNet, as in its paper."""
    if network == ENCNET:
        return 480
    with torch.device("meta"):
        model = timm.create_model(network)
    return min(224, resolve_model_data_config(model)["input_size"][-1])


def batch_of(network: str, batch: int, size: int) -> tuple[Tensor, Tensor]:
    """Make random images and their targets."""
    shape = (batch, size, size) if network == ENCNET else (batch,)
    return torch.randn(batch, 3, size, size), torch.randint(21 if network == ENCNET else 1000, shape)


def loss_of(network: str) -> Callable[[Any, Tensor], Tensor]:
    """Return the training loss of outputs and targets."""
    return EncNetLoss() if network == ENCNET else F.cross_entropy


def macs(model: nn.Module, size: int) -> int:
    """Count multiply-adds of convolutions and matrix products in the inference of one image, on the meta device without running."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    with torch.no_grad(), ctxenc.use_backend("torch"), FlopCounterMode(display=False) as counter:
        functional_call(model.eval(), meta, torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2


def fuses(model: nn.Module) -> bool:
    """Return whether a network has blocks that fused() makes faster in inference."""
    return any(isinstance(module, ctxenc.ContextEncoding) and hasattr(module, "fuse") for module in model.modules())


def fused(model: nn.Module) -> nn.Module:
    """Return a copy for inference, its ContextEncoding blocks fused like timm's own models."""
    return reparameterize_model(model.eval())
