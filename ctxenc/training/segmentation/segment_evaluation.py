"""Measure the pixel accuracy and the mean IoU of a network on its validation data, or on others."""

import argparse
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ctxenc.runs.errors import UserError
from ctxenc.runs.folders import autocast
from ctxenc.runs.segment_config import SegmentConfig
from ctxenc.runs.trained import LoadedRun, load_run
from ctxenc.training.bad_images import SKIP, Intact
from ctxenc.training.console import say, text_table
from ctxenc.training.nonfinite import check_outputs
from ctxenc.training.runner import difference
from ctxenc.training.segmentation.datasets import build_datasets, build_samples
from ctxenc.training.segmentation.segment_metrics import count_pixels, measure_segmentation
from ctxenc.training.segmentation.segment_prediction import check_views, probabilities
from ctxenc.training.segmentation.segment_settings import MEASURED_ON, SegmentSettings
from ctxenc.training.segmentation.segment_trainer import pixel_logits


def run(args: argparse.Namespace) -> None:
    """Print the measures of all pixels, and the IoU of each class."""
    check_views(args)
    loaded = load_run(args.run_folder, args.checkpoint, args.device, SegmentConfig)
    settings = data_settings(loaded, args)
    datasets = build_datasets(settings)
    classes = list(datasets.classes)
    if loaded.config.settings and classes != loaded.config.classes:
        raise UserError(f"{settings.data}: {difference(loaded.config.classes, classes)}")
    if len(classes) != len(loaded.config.classes):
        raise UserError(f"{loaded} has {len(loaded.config.classes)} classes, the data {len(classes)}")
    _, samples = build_samples(datasets, settings, loaded.config.mean, loaded.config.std, settings.seed)
    if settings.on_bad_image == SKIP:
        samples = Intact(samples, None, train=False)
    matrix = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    for index in tqdm(range(len(samples)), "evaluating", unit="image", delay=1.0, leave=False, disable=None):
        image, mask = samples[index]
        found = scores(loaded, image, mask.shape, args)
        check_outputs(loaded.model, found, samples.name(index))
        matrix += count_pixels(found.argmax(1).cpu(), mask[None], len(classes))
    measures = measure_segmentation(matrix, classes)
    titles = {name: name.replace("_", " ") for name in ("pixel_accuracy", "mean_iou", "mean_dice")}
    titles |= {f"iou/{name}": f"IoU of {name}" for name in classes}
    rows = [(title, f"{100 * measures[name]:.2f} %") for name, title in titles.items()]
    say(f"{loaded}, on {len(samples)} validation images of {settings.data}")
    print(text_table(("measure", "value"), rows, right=("value",)))


def data_settings(loaded: LoadedRun, args: argparse.Namespace) -> SegmentSettings:
    """Return the settings of a run, overridden by the command line; without a run, the defaults.

    Raises:
        UserError: No data is named, or a setting breaks its rule.
    """
    names = {each.name for each in fields(SegmentSettings)}
    stored = {name: value for name, value in loaded.config.settings.items() if name in names}
    chosen = {name: value for name in MEASURED_ON if (value := getattr(args, name)) is not None}
    if "data" not in stored | chosen:
        raise UserError(f"{loaded} is no run: name --data to evaluate it on")
    return SegmentSettings(**(stored | chosen))


@torch.inference_mode()
def scores(loaded: LoadedRun, image: Tensor, size: torch.Size, args: argparse.Namespace) -> Tensor:
    """Return class scores at each pixel of a mask of this size, (1, classes, H, W); without other views, as in training."""
    if args.scales == [1.0] and not args.flip and args.crop is None:
        device = next(loaded.model.parameters()).device
        with autocast(device, args.amp):
            return pixel_logits(loaded.model, image[None].to(device), size)
    found = probabilities(loaded.model, image, args)
    return F.interpolate(found[None], size, mode="bilinear", align_corners=False)
