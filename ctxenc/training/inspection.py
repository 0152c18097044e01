"""List the SE blocks of a model, and the effect of a swap on parameters, MACs and time."""

import argparse
import inspect
import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import timm
import torch
import torchvision
from accelerate import init_empty_weights
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ctxenc.kernels.backends import use_backend
from ctxenc.runs.errors import UserError, one_line
from ctxenc.runs.folders import check_model_name, pick_device, unknown_model
from ctxenc.swap.patching import find_context_blocks, find_se_blocks, patch_se_blocks
from ctxenc.training.console import swap_settings, text_table

TORCHVISION = "torchvision:"
TORCHVISION_SIZE = 224
BATCH = 4
ROUNDS, SECONDS = 15, 8.0  # of timing: the median of fewer rounds for a large network
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
    """Hold the result of inspect: image_size is (height, width); parameters, MACs and milliseconds an image are the network's."""

    model: str
    image_size: tuple[int, int]
    swap: dict[str, Any]
    blocks: list[Block]
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    ms_before: float | None = None
    ms_after: float | None = None
    timing: str = ""


def run(args: argparse.Namespace) -> None:
    """Print the table or the JSON."""
    swap = swap_settings(args)
    found = inspect_model(args.model, args.image_size, swap)
    if args.time:
        found = replace(found, **measure_times(args.model, args.image_size, swap, args.device))
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
    shape = choose_shape(model, image_size)
    total = count_parameters(model)
    found = {record.name: record for record in find_se_blocks(model)}
    image = torch.zeros(1, *shape, device=device)
    macs = count_macs(model, image)
    before = {each: count_parameters(model.get_submodule(each)) for each in found}
    try:
        patch_se_blocks(model, **swap)
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: {one_line(error)}") from error
    blocks = {record.name: model.get_submodule(record.name) for record in find_context_blocks(model)}
    maps = measure_maps(model, blocks, image)
    rows = [
        Block(
            name=each,
            class_name=found[each].class_name if each in found else None,
            channels=maps[each][0],
            map=maps[each][1:],
            rd_channels=found[each].rd_channels if each in found else None,
            parameters_before=before.get(each, 0),
            parameters_after=count_parameters(block),
        )
        for each, block in blocks.items()
    ]
    return Inspection(name, shape[1:], swap, rows, total, count_parameters(model), macs, count_macs(model, image))


def count_macs(model: nn.Module, image: Tensor) -> int:
    """Return the multiply-adds of convolutions and matrix products for an image (1, C, H, W)."""
    with torch.no_grad(), use_backend("torch"), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


def measure_times(name: str, image_size: int | None, swap: dict[str, Any], device: str = "auto") -> dict[str, Any]:
    """Return the milliseconds an image of inference before and after the swap: medians, measured in turns, channels last.

    Raises:
        UserError: The device cannot be used, or the networks cannot run there.
    """
    where = pick_device(device)
    try:
        models = [create(name, image_size, "cpu") for _ in range(2)]
        patch_se_blocks(models[1], **swap)
        shape = choose_shape(models[0], image_size)
        models = [model.to(where).to(memory_format=torch.channels_last) for model in models]
        images = torch.randn(BATCH, *shape).to(where, memory_format=torch.channels_last)
        times: list[tuple[float, float]] = []
        while (len(times) <= ROUNDS and sum(map(sum, times)) < SECONDS) or len(times) < 2:
            times.append((time_forward(models[0], images), time_forward(models[1], images)))
    except Exception as error:  # timm's builders raise a dozen kinds, and there may be too little memory
        raise UserError(f"cannot time {name}: {one_line(error)}; --no-time leaves it out") from error
    before, after = (1000 * median(each) / BATCH for each in zip(*times[1:], strict=True))  # the first warms up
    threads = f", {torch.get_num_threads()} thread(s)" if where.type == "cpu" else ""
    timing = f"{where}{threads}, batch of {BATCH}, channels last, fp32, median of {len(times) - 1}"
    return {"ms_before": before, "ms_after": after, "timing": timing}


@torch.inference_mode()
def time_forward(model: nn.Module, images: Tensor) -> float:
    """Return the seconds of one forward."""
    synchronize = torch.accelerator.synchronize if images.device.type != "cpu" else lambda: None
    synchronize()
    start = time.perf_counter()
    model(images)
    synchronize()
    return time.perf_counter() - start


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


def choose_shape(model: nn.Module, image_size: int | None) -> tuple[int, int, int]:
    """Return the (channels, height, width) of one image."""
    if not hasattr(model, "pretrained_cfg"):
        return 3, image_size or TORCHVISION_SIZE, image_size or TORCHVISION_SIZE
    channels, height, width = resolve_model_data_config(model)["input_size"]
    return channels, image_size or height, image_size or width


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def measure_maps(model: nn.Module, blocks: dict[str, nn.Module], image: Tensor) -> dict[str, tuple[int, int, int]]:
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
    """Return the table: a row for each block with its parameters, then rows for the network."""
    before, after = (
        sum(getattr(block, f"parameters_{when}") for block in found.blocks) for when in ("before", "after")
    )
    rows: list[tuple[str, ...]] = [
        (
            block.name,
            block.class_name or "(empty slot)",
            str(block.channels),
            "x".join(map(str, block.map)),
            str(block.rd_channels or "-"),
            *compare(block.parameters_before, block.parameters_after),
        )
        for block in found.blocks
    ]
    totals = [
        (f"all {len(rows)} blocks", *compare(before, after)),
        ("network", *compare(found.parameters_before, found.parameters_after)),
        ("MACs an image, M", *compare(found.macs_before / 1e6, found.macs_after / 1e6, ".1f")),
    ]
    if found.ms_before is not None and found.ms_after is not None:
        totals.append(("ms an image", *compare(found.ms_before, found.ms_after, ".1f")))
    rows += [(name, "", "", "", "", *cells) for name, *cells in totals]
    header = ("parameters of", "class", "channels", "map", "reduced", "before", "after", "change")
    size = "x".join(map(str, found.image_size))
    times = f"; time: {found.timing}" if found.timing else ""
    return f"{found.model} at {size}{times}\n{text_table(header, rows, right=header[2:])}"


def compare(before: float, after: float, form: str = "") -> tuple[str, str, str]:
    """Return two numbers and their change as cells."""
    change = f"{100 * (after / before - 1):+.2f} %" if before else "-"
    return f"{before:,{form}}", f"{after:,{form}}", change
