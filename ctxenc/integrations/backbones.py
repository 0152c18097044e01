"""Turn timm networks into dilated backbones for segmentation."""

from difflib import get_close_matches
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs, split_model_name_tag

OUTPUT_STRIDES = (8, 16, 32)


def check_backbone(owner: str, name: str) -> None:
    """Check that timm knows a model's name, with or without a tag; a name with a source ("hf_hub:...") would download.

    Raises:
        TypeError: name is not a string.
        ValueError: timm knows no such model.
    """
    if not isinstance(name, str):
        raise TypeError(f"{owner}: backbone must be the name of a timm model, got {name!r}")
    architecture, tag = split_model_name_tag(name)
    if tag and timm.is_model(architecture) and name not in get_arch_pretrained_cfgs(architecture):
        raise ValueError(f"{owner}: backbone must have one of timm's tags for {architecture} or none, got {name!r}")
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"{owner}: backbone must be the name of a timm model, got {name!r}{hint}")


def build_dilated_backbone(
    owner: str,
    name: str,
    *,
    maps: int,
    output_stride: int,
    stages: int | None = None,
    pretrained: bool = False,
    **kwargs: Any,
) -> Any:
    """Build a timm network that returns its deepest maps, the last one at the given stride.

    Args:
        owner: name of the caller, for error texts.
        name: a timm model.
        maps: number of maps, counted from the deepest.
        output_stride: 8, 16 or 32; strides beyond it become dilations.
        stages: number of maps to keep, counted from the image; all by default.
        pretrained: load timm's weights.
        **kwargs: further arguments of timm.create_model.

    Returns:
        A module with feature_info, from (B, C, H, W) to a list of maps, the deepest last.

    Raises:
        TypeError: name is not a string.
        ValueError: there is no such network, or timm does not support this stride or number of maps for it.
    """
    check_backbone(owner, name)
    if type(output_stride) is not int or output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"{owner}: output_stride must be one of 8, 16, 32, got {output_stride!r}")
    if stages is not None and (type(stages) is not int or stages < maps):
        raise ValueError(
            f"{owner}: stages must be an integer of at least {maps}, the maps that are used, got {stages!r}"
        )
    rule = f"one that timm can give output_stride={output_stride} and {maps} maps, as ResNets, RegNets and ConvNeXts"
    try:
        backbone: Any = timm.create_model(
            name,
            pretrained=pretrained,
            features_only=True,
            output_stride=output_stride,
            out_indices=tuple(range(-maps, 0) if stages is None else range(stages - maps, stages)),
            **kwargs,
        )
    except (
        TypeError,
        AssertionError,
        NotImplementedError,
        IndexError,
        AttributeError,
    ) as error:  # each family raises its own type
        reason = f"{type(error).__name__} {error}".strip()
        raise ValueError(f"{owner}: backbone must be {rule}, got {name!r} ({reason})") from error
    reduction = backbone.feature_info.reduction()
    if reduction[-1] > output_stride or (stages is None and reduction[-1] < output_stride):
        raise ValueError(f"{owner}: backbone must be {rule}, got {name!r} with strides {reduction}")
    return backbone
