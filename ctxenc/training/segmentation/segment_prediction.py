"""Segment images: draw the classes over each beside their legend, and write the mask."""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from ctxenc.integrations.inference import predict
from ctxenc.runs.config import atomic
from ctxenc.runs.errors import UserError, one_line
from ctxenc.runs.folders import autocast
from ctxenc.runs.segment_config import SegmentConfig
from ctxenc.runs.trained import LoadedRun
from ctxenc.training.console import say
from ctxenc.training.images import open_image
from ctxenc.training.nonfinite import check_outputs
from ctxenc.training.prediction import find_images, load
from ctxenc.training.segmentation.mask_pictures import index_mask, overlay_with_legend, voc_palette

LARGEST_SCALE = 16


def check_views(args: argparse.Namespace) -> None:
    """Raise UserError if --scales or --stride is out of range."""
    if not all(0 < scale <= LARGEST_SCALE for scale in args.scales):
        raise UserError(f"--scales must be above 0 and at most {LARGEST_SCALE}, got {args.scales}")
    if not 0 < args.stride <= 1:
        raise UserError(f"--stride must be above 0 and at most 1, got {args.stride}")


def run(args: argparse.Namespace) -> None:
    """Write STEM.overlay.png, with a legend, and STEM.mask.png for each image."""
    check_views(args)
    paths = find_images(args.images)
    if len({path.stem for path in paths}) < len(paths):
        raise UserError("images must differ in their names without suffix, under which the masks are written")
    loaded = load(args, SegmentConfig)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error.strerror}") from error
    written = 0
    for path in tqdm(paths, "segmenting", unit="image", delay=1.0, leave=False, disable=None):
        try:
            photograph = open_image(path)
        except UserError as error:
            if not args.skip_broken:
                raise
            say(f"ctxenc: skipped {error}", sys.stderr)
            continue
        written += 1
        for name, picture in draw(loaded, photograph, path, args).items():
            with atomic(args.out / f"{path.stem}.{name}.png") as temporary:
                picture.save(temporary)
    if not written:
        raise UserError(
            f"none of the {len(paths)} images can be read" if len(paths) > 1 else f"{paths[0]} cannot be read"
        )
    say(loaded)
    say(f"{written} image{'s' if written > 1 else ''}: {args.out}/*.{{overlay,mask}}.png")


def draw(loaded: LoadedRun, photograph: Image.Image, path: Path, args: argparse.Namespace) -> dict[str, Image.Image]:
    """Return the pictures of an image: the classes over it beside their legend, and the mask of class numbers."""
    config = loaded.config
    palette = voc_palette(len(config.classes))
    image = F.normalize(F.to_dtype(F.pil_to_tensor(photograph), torch.float32, scale=True), config.mean, config.std)
    found = probabilities(loaded.model, image, args)
    check_outputs(loaded.model, found, str(path))
    mask = found.argmax(0).cpu()
    return {
        "overlay": overlay_with_legend(photograph, mask, config.classes, palette),
        "mask": index_mask(mask, palette),
    }


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
