"""Draw how the blocks of a network encode images."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import resolve_model_data_config
from torch import nn

from ctxenc.runs.errors import UserError, near_names, one_line, printable
from ctxenc.runs.folders import pick_device
from ctxenc.runs.segment_config import SegmentConfig
from ctxenc.swap.patching import patch_se_blocks
from ctxenc.training import photographs
from ctxenc.training.console import say, text_table
from ctxenc.training.images import open_image
from ctxenc.training.inspection import check_name, choose_shape, create
from ctxenc.training.nonfinite import check_weights
from ctxenc.training.pictures import spread, write
from ctxenc.training.prediction import find_images, load
from ctxenc.training.segmentation import scenes
from ctxenc.viz import Look, encoding_blocks, look, overview, presence_chart
from ctxenc.viz.observing import Picture
from ctxenc.viz.usage import measure_usage

SHOWN = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "brick.png",
)  # number of embedded photographs to use if no image is named


@dataclass(frozen=True)
class Subject:
    """Hold a network to draw; classes are the names of its SE branch's classes, or None."""

    network: nn.Module
    mean: Sequence[float]
    std: Sequence[float]
    size: int  # longer side of its training images
    remark: str  # a description of the network
    classes: list[str] | None = None


def run(args: argparse.Namespace) -> None:
    """Write BLOCK.png for each chosen block, and presence.png for a network with an SE branch; print how each codebook is used."""
    device = pick_device(args.device)
    paths = find_images(args.images) if args.images else []
    subject = load_subject(args)
    check_weights(subject.network)
    found = encoding_blocks(subject.network)
    blocks = choose(list(found), args.blocks, args.run_folder)
    size = args.image_size or subject.size
    if size != subject.size and any(each.aggregation == "sum" for each in found.values()):
        say(f'ctxenc: warning: aggregation "sum" was trained at {subject.size}: at {size} the gates differ', sys.stderr)
    names, images = choose_pictures(paths, subject.classes, args.count)
    try:
        seen = look(
            subject.network.to(device),
            images,
            blocks,
            mean=subject.mean,
            std=subject.std,
            image_size=size,
        )
    except Exception as error:  # any layer may refuse an image, each in its own way
        raise UserError(f"{args.run_folder} cannot run on these images: {one_line(error)}") from error
    try:
        figures = {block: overview(seen, block, names, args.codewords) for block in blocks}
    except ValueError as error:
        raise UserError(f"--codewords: {one_line(error)}") from error
    if seen.presence is not None:
        figures["presence"] = presence_chart(seen, subject.classes, names)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error.strerror}") from error
    for name, figure in figures.items():
        write(args.out / f"{name}.png", figure, pil_kwargs={"optimize": True})
    say(subject.remark)
    print(report(seen))
    say(f"{len(names)} image{'s' if len(names) > 1 else ''}: {args.out}/{{{','.join(figures)}}}.png")


def load_subject(args: argparse.Namespace) -> Subject:
    """Load the network of a run, a checkpoint or a model name.

    Raises:
        UserError: The argument is not one of these, cannot be loaded, or has nothing to patch.
    """
    path = args.run_folder
    if path.exists() or args.model:
        loaded = load(args)
        size = max(loaded.input_size[1:])
        if isinstance(loaded.config, SegmentConfig):
            return Subject(
                loaded.model, loaded.config.mean, loaded.config.std, size, str(loaded), loaded.config.classes
            )
        config, network = loaded.config.data_config, cast(Any, loaded.model)
        network.pretrained_cfg["input_size"] = config["input_size"]  # look gives this size to a network of fixed size
        return Subject(network, config["mean"], config["std"], size, str(loaded))
    name = str(path)
    if "/" in name or path.suffix in (".safetensors", ".pth", ".pt", ".tar"):
        raise UserError(f"no run or checkpoint at {path}")
    check_name(name)
    torch.manual_seed(0)
    try:
        network = patch_se_blocks(create(name, None, "cpu"))
    except Exception as error:  # timm's builders raise a dozen kinds
        raise UserError(f"{name}: {one_line(error)}") from error
    config = resolve_model_data_config(network)
    remark = f"{name} was patched and has no trained weights: these maps are those of a random start"
    return Subject(network, config["mean"], config["std"], max(choose_shape(network, None)[1:]), remark)


def choose(names: Sequence[str], given: Sequence[str], model: object) -> list[str]:
    """Return the blocks named by --blocks.

    Raises:
        UserError: The network has no block, or no block of this name.
    """
    if not names:
        raise UserError(f"{model} has no ContextEncoding or Encoding block to look into")
    if list(given) == ["all"]:
        return list(names)
    if len(given) == 1 and given[0].isdecimal() and int(given[0]) > 0:
        return spread(names, int(given[0]))
    for name in given:
        if name not in names:
            raise UserError(f"--blocks: {model} has no block {name!r}; {near_names(name, names)}")
    return list(dict.fromkeys(given))


def choose_pictures(paths: Sequence[Path], classes: list[str] | None, count: int) -> tuple[list[str], list[Picture]]:
    """Return names and images of the paths, or of the embedded photographs if there is no path.

    Raises:
        UserError: An image is broken, or scikit-image is missing.
    """
    if paths:
        chosen = spread(paths, count)
        return [printable(path.stem) for path in chosen], [open_image(path) for path in chosen]
    if classes == scenes.CLASSES:
        test = scenes.Scenes(train=False, length=scenes.TEST_SCENES)
        first = range(min(count, len(test)))
        return [scenes.scene_type(index) for index in first], [test[index][0] for index in first]
    shown = SHOWN[:count]
    return [Path(name).stem for name in shown], [photographs.read_photograph(name) for name in shown]


def report(seen: Look) -> str:
    """Return a table of how each block uses its codebook."""
    rows = []
    for name, observation in seen.blocks.items():
        usage = measure_usage(observation.weights)
        codes, height, width = observation.weights[0].shape
        cells = (
            f"{height}x{width}",
            str(codes),
            f"{usage.entropy:.2f}",
            f"{usage.pixel_entropy:.2f}",
            f"{usage.bits:.2f}",
            str(len(usage.dead)),
        )
        rows.append((name, *cells))
    header = ("block", "first map", "codewords", "entropy, bits", "of a pixel", "tells apart", "dead")
    return text_table(header, rows, right=header[1:])
