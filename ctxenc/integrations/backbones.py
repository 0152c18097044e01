"""timm networks as the dilated backbones of segmentation."""

from difflib import get_close_matches
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs, split_model_name_tag

OUTPUT_STRIDES = (8, 16, 32)


def check_backbone(owner: str, name: str) -> None:
    """Accept the names of timm's models, with or without a tag; those with a source ("hf_hub:...") would download.

    Raises:
        TypeError: name is no string.
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


def dilated_backbone(
    owner: str,
    name: str,
    *,
    maps: int,
    output_stride: int,
    stages: int | None = None,
    pretrained: bool = False,
    **kwargs: Any,
) -> Any:
    """A timm network that gives its deepest maps, the last of them at the given stride.

    Args:
        owner: what asks, for the texts of errors.
        name: a timm model.
        maps: how many maps, counted from the deepest.
        output_stride: 8, 16 or 32; strides beyond it become dilations.
        stages: how many of its maps there are at all, counted from the image; all by default.
        pretrained: load timm's weights.
        **kwargs: further arguments of timm.create_model.

    Returns:
        A module with feature_info, from (B, C, H, W) to a list of maps, the deepest last.

    Raises:
        TypeError: name is no string.
        ValueError: there is no such network, or timm cannot give it that stride or so many maps.
    """
    check_backbone(owner, name)
    if type(output_stride) is not int or output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"{owner}: output_stride must be one of 8, 16, 32, got {output_stride!r}")
    if stages is not None and (type(stages) is not int or stages < maps):
        raise ValueError(
            f"{owner}: stages must be an integer of at least {maps}, the maps that are used, got {stages!r}"
        )
    wanted = f"one that timm can give output_stride={output_stride} and {maps} maps, as ResNets, RegNets and ConvNeXts"
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
    ) as error:  # each family in its own way
        reason = f"{type(error).__name__} {error}".strip()
        raise ValueError(f"{owner}: backbone must be {wanted}, got {name!r} ({reason})") from error
    reduction = backbone.feature_info.reduction()
    if reduction[-1] > output_stride or (stages is None and reduction[-1] < output_stride):
        raise ValueError(f"{owner}: backbone must be {wanted}, got {name!r} with strides {reduction}")
    return backbone
