"""Turn images into coloured masks, overlays and legends."""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from ctxenc.integrations.inference import predict
from ctxenc.runs.config import atomic
from ctxenc.runs.errors import UserError, one_line
from ctxenc.runs.folders import autocast
from ctxenc.runs.segment_config import SegmentConfig
from ctxenc.runs.trained import load_run
from ctxenc.training.console import say
from ctxenc.training.images import open_image
from ctxenc.training.nonfinite import check_outputs
from ctxenc.training.prediction import find_images
from ctxenc.training.segmentation.mask_pictures import colour_mask, legend, overlay, voc_palette

PICTURES = ("mask", "overlay", "legend")
LARGEST_SCALE = 16


def check_views(args: argparse.Namespace) -> None:
    """Raise UserError if --scales or --stride is out of range."""
    if not all(0 < scale <= LARGEST_SCALE for scale in args.scales):
        raise UserError(f"--scales must be above 0 and at most {LARGEST_SCALE}, got {args.scales}")
    if not 0 < args.stride <= 1:
        raise UserError(f"--stride must be above 0 and at most 1, got {args.stride}")


def run(args: argparse.Namespace) -> None:
    """Write STEM.mask.png, STEM.overlay.png and STEM.legend.png for each image."""
    check_views(args)
    paths = find_images(args.images)
    if len({path.stem for path in paths}) < len(paths):
        raise UserError("images must differ in their names without suffix, under which the masks are written")
    loaded = load_run(args.run_folder, args.checkpoint, args.device, SegmentConfig)
    config, classes = loaded.config, named(loaded.config.classes, args.classes)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error.strerror}") from error
    palette = voc_palette(len(classes))
    background = classes.index("background") if "background" in classes else None
    for path in tqdm(paths, "segmenting", unit="image", delay=1.0, leave=False, disable=None):
        photograph = open_image(path)
        image = F.normalize(F.to_dtype(F.pil_to_tensor(photograph), torch.float32, scale=True), config.mean, config.std)
        found = probabilities(loaded.model, image, args)
        check_outputs(loaded.model, found, str(path))
        mask = found.argmax(0).cpu()
        pictures = {
            "mask": colour_mask(mask, palette),
            "overlay": overlay(photograph, mask, palette, background=background),
            "legend": legend(mask, classes, palette),
        }
        for name in PICTURES:
            with atomic(args.out / f"{path.stem}.{name}.png") as temporary:
                pictures[name].save(temporary)
    say(loaded)
    say(f"{len(paths)} image{'s' if len(paths) > 1 else ''}: {args.out}/*.{{{','.join(PICTURES)}}}.png")


def probabilities(network: nn.Module, image: Tensor, args: argparse.Namespace) -> Tensor:
    """Return class probabilities at each pixel, (classes, H, W), averaged over the views of `args`.

    Raises:
        UserError: An option does not fit, or the image is too small for the network.
    """
    options = {name: getattr(args, name) for name in ("scales", "base_size", "flip", "crop", "stride", "batch_size")}
    try:
        with autocast(next(network.parameters()).device, args.amp):
            return predict(network, image, **options)[0]
    except (ValueError, RuntimeError) as error:
        raise UserError(one_line(error)) from error


def named(classes: list[str], names: Path | None) -> list[str]:
    """Return the class names from a file, or `classes` without a file.

    Raises:
        UserError: The file cannot be read, or does not have a name for each class.
    """
    if names is None:
        return classes
    try:
        found = names.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {names}: {one_line(error)}") from error
    if len(found) != len(classes):
        raise UserError(f"{names} must name {len(classes)} classes, one a line, got {len(found)}")
    return found
