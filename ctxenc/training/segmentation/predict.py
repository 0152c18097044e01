"""ctxenc segment predict: images into coloured masks, overlays and legends."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from ctxenc.integrations.checkpoints import load_encnet_checkpoint
from ctxenc.integrations.encnet import EncNet
from ctxenc.integrations.inference import predict
from ctxenc.training.config import atomic, read_config
from ctxenc.training.console import UserError, one_line, positive_int, printable
from ctxenc.training.images import open_image
from ctxenc.training.predict import find_images
from ctxenc.training.runs import autocast, load_weights, pick_device, resolve
from ctxenc.training.segmentation.networks import IMAGENET, SegmentConfig, build_network
from ctxenc.training.segmentation.pictures import colour_mask, legend, overlay, voc_palette
from ctxenc.training.segmentation.trainer import SCORE

PICTURES = ("mask", "overlay", "legend")
LARGEST_SCALE = 16


@dataclass(frozen=True)
class Loaded:
    """A network with what its images and classes are."""

    network: nn.Module
    classes: list[str]
    mean: list[float]
    std: list[float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.epilog = (
        "example: ctxenc segment predict --checkpoint runs/segment/001 street.jpg --flip --scales 0.75 1 1.25"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="C",
        help="run of segment train, folder of save_pretrained, or checkpoint of ours, PyTorch-Encoding or mmsegmentation",
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image file, folder or glob")
    parser.add_argument(
        "--out", type=Path, default=Path("masks"), metavar="DIR", help="where to write (default: masks)"
    )
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line")
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], metavar="S", help="scales to average (default: 1)"
    )
    parser.add_argument(
        "--base-size", type=positive_int, metavar="N", help="longer side at scale 1 (default: the image's own size)"
    )
    parser.add_argument("--flip", action="store_true", help="average with the mirrored image")
    parser.add_argument("--crop", type=positive_int, metavar="N", help="side of sliding crops (default: whole image)")
    parser.add_argument("--stride", type=float, default=2 / 3, metavar="R", help="of crops, as a share (default: 2/3)")
    parser.add_argument("--batch-size", type=positive_int, default=4, metavar="N", help="crops a step (default: 4)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: auto)")
    parser.add_argument("--amp", choices=("bf16", "fp16"), help="mixed precision (default: none)")


def run(args: argparse.Namespace) -> None:
    """Writes STEM.mask.png, STEM.overlay.png and STEM.legend.png for each image."""
    if not all(0 < scale <= LARGEST_SCALE for scale in args.scales):
        raise UserError(f"--scales must be above 0 and at most {LARGEST_SCALE}, got {args.scales}")
    if not 0 < args.stride <= 1:
        raise UserError(f"--stride must be above 0 and at most 1, got {args.stride}")
    device = pick_device(args.device)
    paths = find_images(args.images)
    if len({path.stem for path in paths}) < len(paths):
        raise UserError("images must differ in their names without suffix, under which the masks are written")
    loaded = load(args.checkpoint, args.classes)
    loaded.network.to(device)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error.strerror}") from error
    palette = voc_palette(len(loaded.classes))
    background = loaded.classes.index("background") if "background" in loaded.classes else None
    for path in tqdm(paths, "segmenting", unit="image", delay=1.0, leave=False, disable=None):
        photograph = open_image(path)
        image = F.normalize(F.to_dtype(F.pil_to_tensor(photograph), torch.float32, scale=True), loaded.mean, loaded.std)
        mask = segmented(loaded.network, image, args, device)
        pictures = {
            "mask": colour_mask(mask, palette),
            "overlay": overlay(photograph, mask, palette, background=background),
            "legend": legend(mask, loaded.classes, palette),
        }
        for name in PICTURES:
            with atomic(args.out / f"{path.stem}.{name}.png") as temporary:
                pictures[name].save(temporary)
    print(f"{len(paths)} image{'s' if len(paths) > 1 else ''}: {printable(args.out)}/*.{{{','.join(PICTURES)}}}.png")


def segmented(network: nn.Module, image: Tensor, args: argparse.Namespace, device: torch.device) -> Tensor:
    """The likeliest class of each pixel, (H, W) on the CPU.

    Raises:
        UserError: An option does not fit, or the image is too small for the network.
    """
    options = {name: getattr(args, name) for name in ("scales", "base_size", "flip", "crop", "stride", "batch_size")}
    try:
        with autocast(device, args.amp):
            return predict(network, image, **options)[0].argmax(0).cpu()
    except (ValueError, RuntimeError) as error:
        raise UserError(one_line(error)) from error


def load(checkpoint: Path, names: Path | None = None) -> Loaded:
    """The network of a checkpoint, in eval mode on the CPU; classes without a name are numbers.

    Raises:
        UserError: It is no checkpoint, or the file of names does not have one for each class.
    """
    if (checkpoint / "model.safetensors").is_file() and (checkpoint / "config.json").is_file():
        network, config = from_pretrained(checkpoint), None
    elif checkpoint.is_dir():
        arm = resolve(checkpoint, preferred="encnet-", score=SCORE)
        config = read_config(arm, SegmentConfig)
        network = build_network(config)
        load_weights(network, arm / "best.safetensors")
    else:
        try:
            network, config = load_encnet_checkpoint(checkpoint), None
        except ValueError as error:
            raise UserError(str(error)) from error
    if config is not None:
        classes, mean, std = config.classes, config.mean, config.std
    else:
        cfg = get_pretrained_cfg(network.config["backbone"])
        colours = {"mean": cfg.mean, "std": cfg.std} if cfg else IMAGENET
        classes = [str(number) for number in range(network.num_classes)]
        mean, std = list(colours["mean"]), list(colours["std"])
    if names is not None:
        try:
            classes = names.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {names}: {one_line(error)}") from error
        if len(classes) != network.num_classes:
            raise UserError(f"{names} must name {network.num_classes} classes, one a line, got {len(classes)}")
    return Loaded(network.eval(), classes, mean, std)


def from_pretrained(folder: Path) -> EncNet:
    """The network of a folder of save_pretrained.

    Raises:
        UserError: Its files are broken or do not fit each other.
    """
    try:
        return EncNet.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # huggingface_hub, safetensors and torch each raise their own
        raise UserError(f"cannot load {folder}: {one_line(error)}") from error
