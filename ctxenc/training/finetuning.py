"""Train a timm model with its SE blocks swapped, beside the SE network or alone."""

import argparse
import json
from typing import Any

import numpy as np
import torch
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from ctxenc.runs.config import RunConfig
from ctxenc.runs.errors import UserError, one_line
from ctxenc.runs.folders import build_model, check_model_name, installed_versions
from ctxenc.training import runner
from ctxenc.training.console import list_counts, list_names
from ctxenc.training.data import Datasets, build_datasets, train_transform, verify
from ctxenc.training.loop import make_optimizer
from ctxenc.training.report import write_report
from ctxenc.training.settings import PHOTOGRAPHS, RUNS, Settings
from ctxenc.training.trainer import Trainer


def run(args: argparse.Namespace) -> None:
    """Train every arm with every seed, then write and print the report."""
    runner.run(args, TRAINING)


def arm_configs(settings: Settings, datasets: Datasets, fresh: bool) -> dict[str, RunConfig]:
    """Return the configuration of each arm. Build and run each model once, so that errors show up before training.

    Raises:
        UserError: The model is unknown, rejects its arguments or the images, or has nothing to swap; a `fresh` run asks for
            weights that do not exist; or the optimiser or the transform cannot be made.
    """
    check_model_name(settings.model)
    known = get_pretrained_cfg(settings.model)
    wanted: dict[str, Any] = {"img_size": settings.image_size}
    if settings.data == PHOTOGRAPHS:
        wanted["crop_pct"] = 1.0  # a tile is already cropped
    configs = {}
    for arm in settings.arm_names:
        configs[arm] = RunConfig(
            model=settings.model,
            model_kwargs=settings.model_kwargs,
            classes=datasets.classes,
            swap=settings.swap if arm == "context" else None,
            data_config=resolve_data_config(wanted, known.to_dict() if known else None),
            settings=settings.as_dict(),
            versions=installed_versions(),
        )
        train_transform(settings, configs[arm].data_config)
        network = build_model(
            configs[arm], settings.pretrained and fresh, settings.initial_checkpoint if fresh else None
        )
        make_optimizer(network, settings)
        # In training, a norm over one image refuses a map of one pixel.
        check_forward(network.train(settings.batch_size == 1), configs[arm])
    return configs


def check_forward(network: nn.Module, config: RunConfig) -> None:
    """Run `network` on a blank image.

    Raises:
        UserError: It fails, or does not return one logit per class.
    """
    size = config.data_config["input_size"]
    name = f"--model {config.model} --model-kwargs '{json.dumps(config.model_kwargs)}'"
    images = f"images of {' x '.join(map(str, size))}"
    try:
        with torch.no_grad():
            logits = network(torch.zeros(1, *size))
    except Exception as error:  # any layer may refuse, each in its own way
        raise UserError(f"{name} cannot run on {images}: {type(error).__name__}: {one_line(error)}") from error
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if found != (1, len(config.classes)):
        raise UserError(f"{name} must give {len(config.classes)} logits an image, got {found} for {images}")


def describe(settings: Settings, datasets: Datasets) -> str:
    """Describe the training data in one line."""
    kind = ("crops an epoch", "test tiles") if settings.data == PHOTOGRAPHS else ("images", "validation images")
    train, val = len(datasets.train.targets), len(datasets.val.targets)
    counts = np.bincount(datasets.train.targets, minlength=len(datasets.classes)).tolist()
    left = f"; left unused: {list_names(datasets.unused)}" if datasets.unused else ""
    return (
        f"{settings.data}: {len(datasets.classes)} classes, {train:,} training {kind[0]} ({list_counts(datasets.classes, counts)}),"
        f" {val:,} {kind[1]}{left}"
    )


TRAINING = runner.Training(
    name="finetune",
    runs=RUNS,
    config=RunConfig,
    options=Settings,
    build_datasets=build_datasets,
    verify=verify,
    describe=describe,
    configs=arm_configs,
    trainer=Trainer,
    write_report=write_report,
)
