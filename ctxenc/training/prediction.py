"""Predict the likeliest classes of images."""

import argparse
import csv
import glob
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ctxenc.runs.config import RunConfig
from ctxenc.runs.errors import UserError, one_line, printable
from ctxenc.runs.folders import autocast
from ctxenc.runs.trained import LoadedRun, load_run, load_timm_checkpoint
from ctxenc.training.console import say, text_table
from ctxenc.training.data import eval_transform
from ctxenc.training.files import LEFT_BEHIND, images_below
from ctxenc.training.images import open_image
from ctxenc.training.nonfinite import check_outputs


@dataclass(frozen=True)
class Prediction:
    """Hold the likeliest classes of one image with their probabilities, best first."""

    image: str
    classes: list[str]
    probabilities: list[float]


def run(args: argparse.Namespace) -> None:
    """Print the predictions, once all images are done."""
    paths = find_images(args.images)
    loaded = load(args, RunConfig)
    predictions = predict(loaded, paths, args.top_k, args.batch_size, args.amp, args.skip_broken)
    say(loaded, sys.stderr)
    if args.json:
        print(json.dumps([_as_json(each) for each in predictions], indent=2))
        return
    rows = [
        (printable(each.image), str(rank), printable(name), f"{probability:.4f}")
        for each in predictions
        for rank, (name, probability) in enumerate(zip(each.classes, each.probabilities, strict=True), 1)
    ]
    header = ("image", "rank", "class", "probability")
    if args.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows([header, *rows])
    else:
        shown = [(row[0] if row[1] == "1" else "", *row[1:]) for row in rows]
        print(text_table(header, shown, right=("rank", "probability")))


def load(args: argparse.Namespace, kind: Any = None) -> LoadedRun:
    """Load the run or checkpoint of the command line, with the class names of --classes.

    Args:
        args: Parsed arguments; a command may lack --classes or the options for a checkpoint of timm.
        kind: RunConfig or SegmentConfig to accept only this kind of run.

    Raises:
        UserError: See load_run and load_timm_checkpoint; or --classes does not name each class.
    """
    modules = getattr(args, "device_modules", None) or ()
    if getattr(args, "model", None) is None:
        if modules:
            raise UserError("--device-modules needs --model: it registers the model of a checkpoint of timm's train.py")
        loaded = load_run(args.run_folder, args.checkpoint, args.device, kind)
    elif args.checkpoint != "best":
        raise UserError(f"--checkpoint {args.checkpoint} is for runs; with --model, RUN is the checkpoint itself")
    else:
        loaded = load_timm_checkpoint(args.run_folder, args.model, modules, args.device)
    if getattr(args, "classes", None) is None:
        return loaded
    classes = read_names(args.classes, len(loaded.config.classes))
    return replace(loaded, config=replace(loaded.config, classes=classes))


def read_names(path: Path, count: int) -> list[str]:
    """Read `count` class names from a file, one a line.

    Raises:
        UserError: The file cannot be read, or does not have a name for each class.
    """
    try:
        names = path.read_text(encoding="utf-8-sig").rstrip().splitlines()  # editors add marks and empty lines
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    if len(names) != count or not all(map(str.strip, names)):
        blank = sum(not name.strip() for name in names)
        empty = f", {blank} of them empty" if blank else ""
        raise UserError(f"{path} must name {count} classes, one a line, got {len(names)}{empty}")
    return names


def _as_json(prediction: Prediction) -> dict[str, object]:
    ranked = zip(prediction.classes, prediction.probabilities, strict=True)
    return {"image": prediction.image, "classes": [{"class": name, "probability": value} for name, value in ranked]}


def find_images(arguments: Sequence[str]) -> list[Path]:
    """Find the image files of the arguments: files as they are, folders with their subfolders, globs.

    Raises:
        UserError: An argument matches nothing, or names a folder without images.
    """
    paths: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        found = [path] if path.exists() else sorted(map(Path, glob.glob(argument, recursive=True)))
        if not found:
            raise UserError(f"no such image, folder or glob: {argument}")
        for each in found:
            met = set(each.parts) - set(
                path.parts
            )  # parts that the glob matched; the shell may have expanded a glob to names
            if not LEFT_BEHIND.isdisjoint(part.lower() for part in (*met, each.name)):
                continue
            if not each.is_dir():
                paths.append(each)
                continue
            inside = images_below(each)
            if not inside and len(found) == 1:
                raise UserError(f"no images in the folder {each}")
            paths.extend(inside)
    if not paths:
        raise UserError(f"no images in {', '.join(arguments)}")
    return list(dict.fromkeys(paths))


def predict(
    loaded: LoadedRun, paths: Sequence[Path], top_k: int, batch_size: int, amp: str | None, skip_broken: bool = False
) -> list[Prediction]:
    """Classify image files with the evaluation transform of the run.

    Args:
        loaded: A run's model with its configuration.
        paths: Image files.
        top_k: Classes per image, at most all of them.
        batch_size: Images per step.
        amp: "bf16", "fp16" or None.
        skip_broken: Name broken images on stderr and leave them out.

    Raises:
        UserError: An image is broken, every image is broken, or outputs are not finite.
    """
    config = loaded.config
    device = next(loaded.model.parameters()).device
    predictions: list[Prediction] = []
    broken: list[UserError] | None = [] if skip_broken else None
    for names, images in _batches(loaded, paths, batch_size, broken):
        with torch.inference_mode(), autocast(device, amp):
            logits = loaded.model(images.to(device))
        check_outputs(loaded.model, logits, ", ".join(names[:3]))
        best = logits.float().softmax(-1).topk(min(top_k, len(config.classes)))
        for name, values, indices in zip(names, best.values.tolist(), best.indices.tolist(), strict=True):
            predictions.append(Prediction(name, [config.classes[index] for index in indices], values))
    for error in broken or ():
        say(f"ctxenc: skipped {error}", sys.stderr)
    if not predictions:
        raise UserError(
            f"none of the {len(paths)} images can be read" if len(paths) > 1 else f"{paths[0]} cannot be read"
        )
    return predictions


def _batches(
    loaded: LoadedRun, paths: Sequence[Path], batch_size: int, broken: list[UserError] | None
) -> Iterator[tuple[list[str], Tensor]]:
    """Yield names and transformed images by batch; append broken images to the list, or raise the error if it is None."""
    transform = eval_transform(loaded.config.data_config)
    names: list[str] = []
    images: list[Tensor] = []
    with tqdm(paths, desc="predicting", unit="image", delay=1.0, leave=False, disable=None) as bar:
        for path in bar:
            try:
                images.append(transform(open_image(path)))
                names.append(str(path))
            except UserError as error:
                if broken is None:
                    raise
                broken.append(error)
            if len(images) == batch_size:
                yield names, torch.stack(images)
                names, images = [], []
    if images:
        yield names, torch.stack(images)
