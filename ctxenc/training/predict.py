"""ctxenc predict RUN IMAGE...: the likeliest classes of images."""

import argparse
import csv
import glob
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ctxenc.training.console import (
    UserError,
    add_device_arguments,
    add_run_arguments,
    positive_int,
    printable,
    say,
    text_table,
)
from ctxenc.training.data import eval_transform
from ctxenc.training.files import LEFT_BEHIND, images_below
from ctxenc.training.images import open_image
from ctxenc.training.nonfinite import check_outputs
from ctxenc.training.runs import RunConfig, autocast
from ctxenc.training.trained import LoadedRun, load_run


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image with their probabilities, best first."""

    image: str
    classes: list[str]
    probabilities: list[float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = "example: ctxenc predict runs/001 holiday/ 'scans/*.png' --top-k 3 --csv > classes.csv"
    add_run_arguments(parser)
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="image file, folder (searched with its subfolders) or glob"
    )
    parser.add_argument("--top-k", type=positive_int, default=5, metavar="K", help="classes an image (default: 5)")
    parser.add_argument("--skip-broken", action="store_true", help="name broken images on stderr and go on")
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--json", action="store_true", help="print JSON in place of the table")
    layout.add_argument("--csv", action="store_true", help="print CSV in place of the table")
    add_device_arguments(parser, batch_size=32)


def run(args: argparse.Namespace) -> None:
    """Print what the model makes of the images, once all of them are done."""
    paths = find_images(args.images)
    loaded = load_run(args.run_folder, args.checkpoint, args.device, RunConfig)
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


def _as_json(prediction: Prediction) -> dict[str, object]:
    ranked = zip(prediction.classes, prediction.probabilities, strict=True)
    return {"image": prediction.image, "classes": [{"class": name, "probability": value} for name, value in ranked]}


def find_images(arguments: Sequence[str]) -> list[Path]:
    """The image files that the arguments name: files as they are, folders with their subfolders, globs.

    Raises:
        UserError: An argument names nothing, or a folder without images.
    """
    paths: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        found = [path] if path.exists() else sorted(map(Path, glob.glob(argument, recursive=True)))
        if not found:
            raise UserError(f"no such image, folder or glob: {argument}")
        for each in found:
            met = set(each.parts) - set(path.parts)  # by a glob; one of a shell gives names, too
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
        top_k: Classes an image, at most all of them.
        batch_size: Images a step.
        amp: "bf16", "fp16" or None.
        skip_broken: Name broken images on stderr and leave them out.

    Raises:
        UserError: A broken image, nothing but broken ones, or outputs that are not finite.
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
        raise UserError(f"all {len(paths)} images are broken")
    return predictions


def _batches(
    loaded: LoadedRun, paths: Sequence[Path], batch_size: int, broken: list[UserError] | None
) -> Iterator[tuple[list[str], Tensor]]:
    """Names and transformed images, batch by batch; broken images go into the list, or are raised where it is None."""
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
