"""Define EncNet's Context Encoding Module, and insert it into other segmentation networks."""

from typing import Any

import torch
from torch import Tensor, nn

from ctxenc.context import ContextEncoding, Layer
from ctxenc.encoding import check_sizes


class EncodingModule(nn.Module):
    """Gate the channels of a segmentation map by its encoding, and predict the presence of classes from the same encoding.

    Context Encoding for Semantic Segmentation (arXiv 1803.08904), section 3.1 and figure 2. The map becomes
    relu(x + x * sigmoid(linear(e))), with e the mean over the codewords of relu(norm(encode(conv1x1(x)))). In a custom FCN:

        x, presence = module(x)
        logits = classifier(x)

    Args:
        channels: C of the map.
        num_codes: K, number of codewords.
        num_classes: classes of the presence branch (the paper's SE-loss, section 3.2); None for no branch.
        smoothing: "learned", "sampled" or a positive number; see ctxenc.Encoding.
        aggregation: "mean", or "sum" as in the authors' code; see ctxenc.ContextEncoding.
        start: initial codebook, "paper" or "spread"; see ctxenc.ContextEncoding.
        act_layer: activation after the projection, ReLU by default.
        norm_layer: norm after the projection, BatchNorm2d by default.
        gate_layer: "sigmoid" or another of ContextEncoding's.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (B, C, H, W) -> the same, and logits of presence (B, num_classes) or None.

    Raises:
        ValueError: a size is not positive, or smoothing or gate_layer is unknown; in a training forward, also if the
            batch is one sample of one pixel.
        TypeError: a size is not an integer, or another argument has the wrong type.
    """

    def __init__(
        self,
        channels: int,
        num_codes: int = 32,
        num_classes: int | None = None,
        *,
        smoothing: str | float = "learned",
        aggregation: str = "mean",
        start: str = "paper",
        act_layer: Layer | None = None,
        norm_layer: Layer | None = None,
        gate_layer: str | Layer | nn.Module = "sigmoid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("EncodingModule", channels=channels, num_codes=num_codes)
        if num_classes is not None:
            check_sizes("EncodingModule", num_classes=num_classes)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.context = ContextEncoding(
            channels,
            num_codes,
            rd_channels=channels,
            smoothing=smoothing,
            aggregation=aggregation,
            start=start,
            act_layer=act_layer,
            norm_layer=norm_layer,
            gate_layer=gate_layer,
            residual=True,
            **dd,
        )
        self.presence = None if num_classes is None else nn.Linear(channels, num_classes, **dd)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.context.features(x)
        presence = None if self.presence is None else self.presence(features.to(x.dtype))
        return self.context.gated(x, features), presence


def add_context_encoding(
    model: nn.Module,
    *,
    num_codes: int = 32,
    rd_channels: int | None = None,
    smoothing: str | float = "learned",
    aggregation: str = "mean",
    start: str = "paper",
) -> nn.Module:
    """Put the Context Encoding Module, without its presence branch, into the head of a segmentation network, in place.

    It goes before the classifier of torchvision's FCN and DeepLabV3 and of segmentation_models_pytorch's FPN, as in
    EncNet, and before the decoder of segmentation_models_pytorch's U-Net, on the deepest map. All names in the state
    dict stay, and new ones are added: load weights before this call, or after it with strict=False.

    Args:
        model: the network.
        num_codes: K, number of codewords.
        rd_channels: C', channels of the projection that is encoded; by default as many as the map, at most 512.
        smoothing: "learned", "sampled" or a positive number; see ctxenc.Encoding.
        aggregation: "mean" or "sum"; see ctxenc.ContextEncoding.
        start: initial codebook, "paper" or "spread"; see ctxenc.ContextEncoding.

    Returns:
        The model.

    Raises:
        TypeError: model is not a module.
        ValueError: model is not one of these networks, or already has the module; or as for ContextEncoding.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"add_context_encoding: model must be a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(module, ContextEncoding) and module.residual for module in model.modules()):
        raise ValueError(
            f"add_context_encoding: model must not have a Context Encoding Module yet, got {type(model).__name__} with one"
        )
    owner, name, channels = _find_place(model)
    before, like = getattr(owner, name), next(model.parameters())
    context = ContextEncoding(
        channels,
        num_codes,
        rd_channels=min(channels, 512) if rd_channels is None else rd_channels,
        smoothing=smoothing,
        aggregation=aggregation,
        start=start,
        residual=True,
        device=like.device,
        dtype=like.dtype,
    )
    context.train(model.training)
    if isinstance(before, nn.Sequential):
        before.append(context)
    else:
        setattr(owner, name, nn.Sequential(before, context))
    return model


def _find_place(model: Any) -> tuple[nn.Module, str, int]:
    """Return the module before the insertion point: its owner, its name there, and its channels."""
    family = f"{type(model).__module__.split('.')[0]}.{type(model).__name__}"
    if family in ("torchvision.FCN", "torchvision.DeepLabV3"):
        head = model.classifier
        activation = max(i for i, layer in enumerate(head) if isinstance(layer, nn.ReLU))
        return head, str(activation), head[-1].in_channels
    if family == "segmentation_models_pytorch.FPN":
        return model.decoder, "merge", model.segmentation_head[0].in_channels
    if family == "segmentation_models_pytorch.Unet":
        return model.decoder, "center", model.encoder.out_channels[-1]
    raise ValueError(
        "add_context_encoding: model must be torchvision's FCN or DeepLabV3, or segmentation_models_pytorch's Unet or FPN,"
        f" got {family}; EncodingModule goes into a network of your own"
    )
