"""Define EncNet: Context Encoding for Semantic Segmentation (arXiv 1803.08904)."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ctxenc.encoding import AGGREGATIONS, STARTS, check_choice, check_sizes, check_smoothing
from ctxenc.integrations.backbones import build_dilated_backbone
from ctxenc.integrations.encoding_module import EncodingModule
from ctxenc.integrations.hub import Saved
from ctxenc.weight_decay import encoding_parameters

Norm = Callable[..., nn.Module]


def group_norm(channels: int, **kwargs: Any) -> nn.GroupNorm:
    """Build a GroupNorm of 32 groups, or of the largest number that divides 32 and the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels, **kwargs)


NORMS: dict[str, Norm] = {"batchnorm2d": nn.BatchNorm2d, "groupnorm": group_norm, "layernorm2d": LayerNorm2d}


def _find_norm(norm_layer: str | Norm) -> Norm:
    if isinstance(norm_layer, str):
        if norm_layer not in NORMS:
            raise ValueError(f"EncNet: norm_layer must be one of {', '.join(NORMS)} or a class, got {norm_layer!r}")
        return NORMS[norm_layer]
    if not callable(norm_layer):
        raise TypeError(f"EncNet: norm_layer must be a name or a class, got {norm_layer!r}")
    return norm_layer


def _build_conv(channels: int, out_channels: int, size: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, size, padding=size // 2, bias=False),
        norm(out_channels),
        nn.ReLU(inplace=True),
    )


def _build_classifier(channels: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))


class EncNet(
    nn.Module, Saved, library_name="ctxenc", paper_url="https://arxiv.org/abs/1803.08904", tags=["image-segmentation"]
):
    """Segment images with Context Encoding (arXiv 1803.08904, figure 2) on any timm backbone.

    Head: conv3x3 -> (lateral: fused with the maps of the two stages before) -> EncodingModule -> dropout -> 1x1 classifier, and
    logits upsampled to the image.

    Args:
        backbone: a timm model that timm can dilate: ResNets, SE-ResNets, ResNeSt, RegNet, ConvNeXt, EfficientNet, MobileNetV3,
            NFNet, RexNet.
        num_classes: classes of a pixel; foreground and background are two.
        pretrained_backbone: load timm's ImageNet weights.
        num_codes: K, number of codewords.
        aux: an FCN head on the stage before the last ("aux"), for training.
        se_loss: a linear layer on the encoding that predicts the presence of classes ("se"), for training.
        lateral: fuse the maps of the two stages before the last.
        smoothing: "learned", "sampled" or a positive number; see ctxenc.Encoding.
        aggregation: "mean", or "sum" as in the authors' code; see ctxenc.ContextEncoding.
        start: initial codebook, "paper" or "spread"; see ctxenc.ContextEncoding.
        norm_layer: norms of the head: "batchnorm2d", "groupnorm", "layernorm2d" or a class; save_pretrained cannot save
            a network with a custom class.
        align_corners: for upsampling logits: True in PyTorch-Encoding, False in mmsegmentation.
        output_stride: stride of the encoded map: 8, 16 or 32.
        stages: number of backbone maps to keep, counted from the image (a ResNet has a stem and four stages); all by
            default. Fewer give a smaller receptive field, and a smaller stride if the backbone ends before the output
            stride.
        channels: of the head; 512 in the paper.
        in_chans: channels of the image.

    Shape:
        (B, in_chans, H, W) of any size -> a dict, as torchvision's segmentation models give: "out" (B, num_classes, H,
        W), and on request "aux" (the same) and "se" (B, num_classes), all of them logits.

    Raises:
        ValueError: a size is not positive, there is no such backbone, or timm cannot dilate it.
        TypeError: a size is not an integer, or another argument has the wrong type.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        num_classes: int = 21,
        *,
        pretrained_backbone: bool = False,
        num_codes: int = 32,
        aux: bool = True,
        se_loss: bool = True,
        lateral: bool = False,
        smoothing: str | float = "learned",
        aggregation: str = "mean",
        start: str = "paper",
        norm_layer: str | Norm = "batchnorm2d",
        align_corners: bool = False,
        output_stride: int = 8,
        stages: int | None = None,
        channels: int = 512,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        check_sizes("EncNet", num_classes=num_classes, num_codes=num_codes, channels=channels, in_chans=in_chans)
        check_smoothing(smoothing, "EncNet")
        check_choice("EncNet", AGGREGATIONS, aggregation=aggregation)
        check_choice("EncNet", STARTS, start=start)
        for argument, value in (
            ("aux", aux),
            ("se_loss", se_loss),
            ("lateral", lateral),
            ("align_corners", align_corners),
        ):
            if not isinstance(value, bool):
                raise TypeError(f"EncNet: {argument} must be True or False, got {value!r}")
        norm = _find_norm(norm_layer)
        self.config = {
            "backbone": backbone,
            "num_classes": num_classes,
            "num_codes": num_codes,
            "aux": aux,
            "se_loss": se_loss,
            "lateral": lateral,
            "smoothing": smoothing,
            "aggregation": aggregation,
            "start": start,
            "norm_layer": next((name for name, each in NORMS.items() if each is norm), norm_layer),
            "align_corners": align_corners,
            "output_stride": output_stride,
            "stages": stages,
            "channels": channels,
            "in_chans": in_chans,
        }
        self.num_classes = num_classes
        self.align_corners = align_corners
        self.backbone = build_dilated_backbone(
            "EncNet",
            backbone,
            maps=3 if lateral else 2 if aux else 1,
            output_stride=output_stride,
            stages=stages,
            pretrained=pretrained_backbone,
            in_chans=in_chans,
        )
        widths = self.backbone.feature_info.channels()
        self.reduce = _build_conv(widths[-1], channels, 3, norm)
        self.laterals = nn.ModuleList(_build_conv(width, channels, 1, norm) for width in widths[-3:-1] if lateral)
        self.fusion = _build_conv(3 * channels, channels, 3, norm) if lateral else None
        self.encoding = EncodingModule(
            channels,
            num_codes,
            num_classes if se_loss else None,
            smoothing=smoothing,
            aggregation=aggregation,
            start=start,
            norm_layer=norm,
        )
        self.classifier = _build_classifier(channels, num_classes)
        self.aux: nn.Module | None = None
        if aux:
            inner = max(1, widths[-2] // 4)
            self.aux = nn.Sequential(_build_conv(widths[-2], inner, 3, norm), _build_classifier(inner, num_classes))

    def _resized(self, x: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(x, size, mode="bilinear", align_corners=self.align_corners)

    def head(self, maps: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Compute logits of the pixels, at the maps' stride, and of presence, from the backbone's maps, the deepest last."""
        x = self.reduce(maps[-1])
        if self.fusion is not None:
            laterals = [conv(each) for conv, each in zip(self.laterals, maps[-3:-1], strict=True)]
            x = self.fusion(torch.cat([x, *(self._resized(each, x.shape[2:]) for each in laterals)], 1))
        x, presence = self.encoding(x)
        return self.classifier(x), presence

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(x)
        logits, presence = self.head(maps)
        outputs = {"out": self._resized(logits, x.shape[2:])}
        if self.aux is not None:
            outputs["aux"] = self._resized(self.aux(maps[-2]), x.shape[2:])
        if presence is not None:
            outputs["se"] = presence
        return outputs

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm's optimizers should not decay: codewords and smoothing."""
        return encoding_parameters(self)
