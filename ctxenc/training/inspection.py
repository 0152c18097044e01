"""List the SE blocks of a model and the effect of a swap."""

import argparse
import inspect
import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
import torchvision
from accelerate import init_empty_weights
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ctxenc.runs.errors import UserError, one_line
from ctxenc.runs.folders import check_model_name, unknown_model
from ctxenc.swap.patching import find_context_blocks, find_se_blocks, patch_se_blocks
from ctxenc.training.console import swap_settings, text_table

TORCHVISION = "torchvision:"
TORCHVISION_SIZE = 224
HUB = ("hf-hub:", "hf_hub:", "local-dir:")


@dataclass(frozen=True)
class Block:
    """Describe one SE block before and after the swap: map is (height, width); class_name is None for an empty slot."""

    name: str
    class_name: str | None
    channels: int
    map: tuple[int, int]
    rd_channels: int | None
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class Inspection:
    """Hold the result of inspect: image_size is (height, width), parameters count the whole network."""

    model: str
    image_size: tuple[int, int]
    swap: dict[str, Any]
    blocks: list[Block]
    parameters_before: int
    parameters_after: int


def run(args: argparse.Namespace) -> None:
    """Print the table or the JSON."""
    found = inspect_model(args.model, args.image_size, swap_settings(args))
    print(json.dumps(asdict(found), indent=2) if args.json else report(found))


def inspect_model(name: str, image_size: int | None = None, swap: dict[str, Any] | None = None) -> Inspection:
    """Examine the SE blocks of a model, on the meta device if the model allows it; load no weights.

    Args:
        name: A timm model name, or torchvision:NAME.
        image_size: Side of the square image in pixels; the model's own size if None.
        swap: Keyword arguments of ctxenc.patch_se_blocks.

    Raises:
        UserError: The model is unknown, cannot be built or run at this size, or has no SE blocks.
    """
    check_name(name)
    try:
        return _inspect(name, image_size, swap or {}, "meta")
    except UserError:
        raise
    except Exception:  # a few models compute with values, and meta tensors have no values
        try:
            return _inspect(name, image_size, swap or {}, "cpu")
        except UserError:
            raise
        except Exception as error:
            size = f" at image size {image_size}" if image_size else ""
            raise UserError(f"cannot build and run {name}{size}: {one_line(error)}") from error


def _inspect(name: str, image_size: int | None, swap: dict[str, Any], device: str) -> Inspection:
    model = create(name, image_size, device)
    shape = input_shape(model, image_size)
    total = parameters(model)
    found = {record.name: record for record in find_se_blocks(model)}
    before = {each: parameters(model.get_submodule(each)) for each in found}
    try:
        patch_se_blocks(model, **swap)
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: {one_line(error)}") from error
    blocks = {record.name: model.get_submodule(record.name) for record in find_context_blocks(model)}
    maps = map_sizes(model, blocks, torch.zeros(1, *shape, device=device))
    rows = [
        Block(
            name=each,
            class_name=found[each].class_name if each in found else None,
            channels=maps[each][0],
            map=maps[each][1:],
            rd_channels=found[each].rd_channels if each in found else None,
            parameters_before=before.get(each, 0),
            parameters_after=parameters(block),
        )
        for each, block in blocks.items()
    ]
    return Inspection(name, shape[1:], swap, rows, total, parameters(model))


def check_name(name: str) -> None:
    """Raise UserError, with near names, unless timm or torchvision knows the model."""
    if name.startswith(TORCHVISION):
        known = [TORCHVISION + each for each in torchvision.models.list_models()]
        if name not in known:
            raise unknown_model(name, known)
    elif not name.startswith(HUB):
        check_model_name(name)


def create(name: str, image_size: int | None, device: str) -> nn.Module:
    """Build the model in eval mode without pretrained weights; on the meta device its weights need no memory."""
    # Not torch.device("meta"): torchvision's RegNets compute their widths with tensors.
    with init_empty_weights() if device == "meta" else nullcontext():
        if name.startswith(TORCHVISION):
            builder = torchvision.models.get_model_builder(name.removeprefix(TORCHVISION))
            names = inspect.signature(builder).parameters
            model: Any = builder(**{key: None for key in ("weights", "weights_backbone") if key in names})
        else:
            model = timm.create_model(name, pretrained=False)
            if image_size and model.pretrained_cfg.get("fixed_input_size"):
                model = timm.create_model(name, pretrained=False, img_size=image_size)
    return model.to(device).eval()


def input_shape(model: nn.Module, image_size: int | None) -> tuple[int, int, int]:
    """Return the (channels, height, width) of one image."""
    if not hasattr(model, "pretrained_cfg"):
        return 3, image_size or TORCHVISION_SIZE, image_size or TORCHVISION_SIZE
    channels, height, width = resolve_model_data_config(model)["input_size"]
    return channels, image_size or height, image_size or width


def parameters(module: nn.Module) -> int:
    """Return the number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def map_sizes(model: nn.Module, blocks: dict[str, nn.Module], image: Tensor) -> dict[str, tuple[int, int, int]]:
    """Run the model once and return the (channels, height, width) of each block's input."""
    sizes: dict[str, tuple[int, int, int]] = {}

    def hook(name: str, channels_last: bool) -> Any:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            shape = inputs[0].shape
            sizes[name] = (shape[3], shape[1], shape[2]) if channels_last else (shape[1], shape[2], shape[3])

        return keep

    handles = [
        block.register_forward_pre_hook(hook(name, getattr(block, "channels_last", False)))
        for name, block in blocks.items()
    ]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def report(found: Inspection) -> str:
    """Return the table with its totals."""
    rows = [
        (
            block.name,
            block.class_name or "(empty slot)",
            str(block.channels),
            "x".join(map(str, block.map)),
            str(block.rd_channels or "-"),
            f"{block.parameters_before:,}",
            f"{block.parameters_after:,}",
        )
        for block in found.blocks
    ]
    before = sum(block.parameters_before for block in found.blocks)
    after = sum(block.parameters_after for block in found.blocks)
    rows.append((f"all {len(rows)} blocks", "", "", "", "", f"{before:,}", f"{after:,}"))
    rows.append(("network", "", "", "", "", f"{found.parameters_before:,}", f"{found.parameters_after:,}"))
    header = ("block", "class", "channels", "map", "reduced", "parameters", "swapped")
    size = "x".join(map(str, found.image_size))
    table = text_table(header, rows, right=header[2:])
    change = 100 * (found.parameters_after / found.parameters_before - 1)
    return f"{found.model} at {size}\n{table}\nthe swap changes the network's parameters by {change:+.2f} %"
