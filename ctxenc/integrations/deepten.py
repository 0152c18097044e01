"""Define Deep TEN: a backbone, and an encoding of its map in place of the mean. Made for textures and materials, without layout.

Deep TEN: Texture Encoding Network (arXiv 1612.02844), section 3; its ResNet-50 reduces to 128 channels and has 32 codewords.
"""

import re
from itertools import chain
from typing import Any, Final

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.func import functional_call

from ctxenc.encoding import STARTS, Encoding, check_choice, check_sizes, check_smoothing, spread_codebook
from ctxenc.integrations.backbones import check_backbone
from ctxenc.integrations.hub import Saved
from ctxenc.weight_decay import encoding_parameters

POOLS = ("encoding", "")
LOADING = ("checkpoint_path", "cache_dir")  # a foreign configuration must not choose a file to be read


class DeepTEN(
    nn.Module,
    Saved,
    library_name="ctxenc",
    license="apache-2.0",
    tags=["image-classification", "texture"],
    paper_url="https://arxiv.org/abs/1612.02844",
):
    """Classify images by a timm backbone, a projection to a few channels, the encoding of the map, and a linear layer.

    x -> backbone -> conv1x1 BN ReLU -> Encoding -> flatten -> L2 norm -> linear. `save_pretrained(folder)` writes the weights and
    the arguments, `DeepTEN.from_pretrained(folder)` builds the network from them alone.

    Args:
        backbone: name of a timm model with a map as output, and optionally the tag of its weights.
        num_classes: of the classifier; 0 for no classifier. The default is MINC-2500's.
        in_chans: channels of the image.
        pretrained_backbone: let timm load (and at first download) the backbone's weights.
        num_codes: K, number of codewords.
        rd_channels: channels of the projection that is encoded.
        smoothing: "learned", "sampled" or a positive number; see Encoding.
        start: initial codebook, "paper" or "spread"; see ContextEncoding.
        global_pool: "encoding"; "" for the projected map itself, with num_classes=0.
        drop_rate: dropout before the classifier.
        **backbone_args: arguments of timm.create_model, for example drop_path_rate or output_stride.

    Shape:
        (B, in_chans, H, W) -> (B, num_classes)

    Raises:
        ValueError: timm has no such backbone, cannot build it like this, or it gives no map (B, C, H, W); or an
            argument has an invalid value.
        TypeError: an argument has the wrong type.
    """

    channels_last: Final[bool]

    def __init__(
        self,
        backbone: str = "resnet50",
        num_classes: int = 23,
        *,
        in_chans: int = 3,
        pretrained_backbone: bool = False,
        num_codes: int = 32,
        rd_channels: int = 128,
        smoothing: str | float = "learned",
        start: str = "paper",
        global_pool: str = "encoding",
        drop_rate: float = 0.0,
        **backbone_args: Any,
    ) -> None:
        super().__init__()
        check_sizes("DeepTEN", in_chans=in_chans, num_codes=num_codes, rd_channels=rd_channels)
        check_smoothing(smoothing, "DeepTEN")
        check_choice("DeepTEN", STARTS, start=start)
        _check_pool(global_pool, num_classes)
        if not isinstance(drop_rate, (int, float)) or not 0 <= drop_rate <= 1:
            raise ValueError(f"DeepTEN: drop_rate must be a number from 0 to 1, got {drop_rate!r}")
        self.config = {
            "backbone": backbone,
            "num_classes": num_classes,
            "in_chans": in_chans,
            "num_codes": num_codes,
            "rd_channels": rd_channels,
            "smoothing": smoothing,
            "start": start,
            "global_pool": global_pool,
            "drop_rate": drop_rate,
            **backbone_args,
        }
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        self.num_features = rd_channels
        self.head_hidden_size = num_codes * rd_channels
        self.backbone = _build(backbone, pretrained_backbone, in_chans, backbone_args)
        self.channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
        self.conv = nn.Conv2d(
            _find_channels(self.backbone, backbone, in_chans, backbone_args), rd_channels, 1, bias=False
        )
        self.norm = nn.BatchNorm2d(rd_channels)
        self.act = nn.ReLU(inplace=True)
        self.encoding = Encoding(rd_channels, num_codes, smoothing)
        if start == "spread":
            spread_codebook("DeepTEN", self.encoding, self.norm, self.act)
        self.fc = nn.Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()
        self.feature_info = [
            {**info, "module": f"backbone.{info['module']}"} for info in getattr(self.backbone, "feature_info", [])
        ]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm's optimizers should not decay."""
        of_backbone: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return encoding_parameters(self) | {f"backbone.{name}" for name in of_backbone}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns for timm's parameter groups, from the backbone."""
        if not hasattr(self.backbone, "group_matcher"):
            return {"backbone": r"^backbone\."}
        groups = self.backbone.group_matcher(coarse=coarse)
        return {
            name: [(_prefix_pattern(pattern), order) for pattern, order in spec]
            if isinstance(spec, (list, tuple))
            else spec and _prefix_pattern(spec)
            for name, spec in groups.items()
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in backward, to save memory."""
        self.backbone.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; num_classes 0 removes it, global_pool None keeps the pooling.

        Raises:
            ValueError: global_pool is neither "encoding" nor "", or "" with a classifier.
        """
        pool = self.global_pool if global_pool is None else global_pool
        _check_pool(pool, num_classes)
        self.global_pool = pool
        self.num_classes = num_classes
        self.config |= {"num_classes": num_classes, "global_pool": pool}
        fc = nn.Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()
        self.fc = fc.to(self.conv.weight).train(self.training)

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the backbone's maps, if timm supports this for it, and the result of forward_features.

        Args:
            x: images (B, in_chans, H, W).
            indices: indices of the maps, the number of last maps, or None for all.
            norm: norm the maps, if the backbone has norms for them.
            stop_early: stop after the last of these maps; the first result is then the backbone's.
            output_fmt: "NCHW", or another format of the backbone.
            intermediates_only: return only the list of maps.
        """
        result = self.backbone.forward_intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only)
        if intermediates_only or stop_early:
            return result
        x, maps = result
        return self._project(self.backbone.forward_head(x)), maps

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove everything that the backbone's maps of these indices do not need; return their numbers."""
        chosen = self.backbone.prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.reset_classifier(0, "")
            del self.conv, self.norm, self.encoding
        return chosen

    def _project(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x = x.permute(0, 3, 1, 2)
        return self.act(self.norm(self.conv(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the projected map, (B, rd_channels, H', W'), from images."""
        return self._project(self.backbone(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits, or the classifier's input (the normalised encoding), from the map: (B, num_codes * rd_channels)."""
        if self.global_pool == "encoding":
            x = F.normalize(self.encoding(x).flatten(1), dim=1).to(x.dtype)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _check_pool(global_pool: str, num_classes: int) -> None:
    if num_classes != 0:
        check_sizes("DeepTEN", num_classes=num_classes)
    if global_pool not in POOLS:
        raise ValueError(f'DeepTEN: global_pool must be "encoding" or "", got {global_pool!r}')
    if not global_pool and num_classes > 0:
        raise ValueError(f'DeepTEN: num_classes must be 0 where global_pool is "", got {num_classes}')


def _prefix_pattern(pattern: str) -> str:
    """Turn a pattern for the backbone's parameter names into one for the whole network."""
    return r"^backbone\.(?:" + re.sub(r"(^|\||\((?:\?:)?)\^", r"\1", pattern) + ")"


def _build(name: str, pretrained: bool, in_chans: int, arguments: dict[str, Any]) -> Any:
    check_backbone("DeepTEN", name)
    if refused := sorted(each for each in arguments if each in LOADING or each.startswith("pretrained")):
        raise ValueError(f"DeepTEN: backbone_args must not name what is loaded or from where, got {refused[0]}")
    try:
        return timm.create_model(
            name, pretrained=pretrained, num_classes=0, global_pool="", in_chans=in_chans, **arguments
        )
    except (TypeError, AssertionError) as error:
        raise ValueError(
            f"DeepTEN: backbone must take these arguments, got {name!r} with {arguments}: {error}"
        ) from error


def _find_channels(network: nn.Module, name: str, in_chans: int, arguments: dict[str, Any]) -> int:
    """Return the channels of the backbone's map. It runs on the meta device, which computes nothing."""
    size = to_2tuple(arguments.get("img_size", resolve_model_data_config(network)["input_size"][1:]))
    tensors = chain(network.named_parameters(), network.named_buffers())
    state = {key: tensor.to("meta") for key, tensor in tensors}
    training = network.training
    with torch.no_grad():
        out = functional_call(network.eval(), state, torch.empty(1, in_chans, *size, device="meta"))
    network.train(training)
    if not isinstance(out, Tensor) or out.dim() != 4:
        got = f"{tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ValueError(f"DeepTEN: backbone must give a map (B, C, H, W), got {got} from {name!r}")
    return out.shape[3 if getattr(network, "output_fmt", "NCHW") == "NHWC" else 1]
