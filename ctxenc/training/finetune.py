"""ctxenc finetune: train a timm model with its SE blocks swapped, beside the SE network or alone."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from ctxenc.training import runner
from ctxenc.training import settings as options
from ctxenc.training.console import UserError, counted, listed, one_line
from ctxenc.training.data import Datasets, build_datasets, train_transform, verify
from ctxenc.training.loop import make_optimizer
from ctxenc.training.report import write_report
from ctxenc.training.runs import RunConfig, build_model, check_model_name, installed_versions
from ctxenc.training.settings import PHOTOGRAPHS, Settings
from ctxenc.training.trainer import Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.epilog = (
        "examples: ctxenc finetune | ctxenc finetune --model seresnet50 --pretrained --data PATH | "
        "accelerate launch -m ctxenc finetune --data PATH"
    )
    runner.add_arguments(parser, TRAINING)


def run(args: argparse.Namespace) -> None:
    """Trains every arm with every seed, then writes and prints the report."""
    runner.run(args, TRAINING)


def arm_configs(settings: Settings, datasets: Datasets, fresh: bool) -> dict[str, RunConfig]:
    """The configuration of each arm. What training needs of it is made and run once, so that what is wrong shows here.

    Raises:
        UserError: The model is unknown, does not take its arguments or the images, has no weights to start from
            where the run is ``fresh`` and asks for them, or has nothing to swap; or the optimiser or the transform cannot be made.
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
        # A norm over one image refuses a map of one pixel, in training alone.
        check_forward(network.train(settings.batch_size == 1), configs[arm])
    return configs


def check_forward(network: nn.Module, config: RunConfig) -> None:
    """Runs ``network`` on a blank image.

    Raises:
        UserError: It fails, or gives something else than one logit a class.
    """
    size = config.data_config["input_size"]
    name = f"--model {config.model} --model-kwargs '{json.dumps(config.model_kwargs)}'"
    images = f"images of {' x '.join(map(str, size))}"
    try:
        with torch.no_grad():
            logits = network(torch.zeros(1, *size))
    except Exception as error:  # any layer may refuse, each in its way
        raise UserError(f"{name} cannot run on {images}: {type(error).__name__}: {one_line(error)}") from error
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if found != (1, len(config.classes)):
        raise UserError(f"{name} must give {len(config.classes)} logits an image, got {found} for {images}")


def describe(settings: Settings, datasets: Datasets) -> str:
    """What is trained on, in a line."""
    kind = ("crops an epoch", "test tiles") if settings.data == PHOTOGRAPHS else ("images", "validation images")
    train, val = len(datasets.train.targets), len(datasets.val.targets)
    counts = np.bincount(datasets.train.targets, minlength=len(datasets.classes)).tolist()
    left = f"; left unused: {listed(datasets.unused)}" if datasets.unused else ""
    return (
        f"{settings.data}: {len(datasets.classes)} classes, {train:,} training {kind[0]} ({counted(datasets.classes, counts)}),"
        f" {val:,} {kind[1]}{left}"
    )


TRAINING = runner.Training(
    name="finetune",
    runs=Path("runs"),
    config=RunConfig,
    options=options,
    build_datasets=build_datasets,
    verify=verify,
    describe=describe,
    configs=arm_configs,
    trainer=Trainer,
    write_report=write_report,
)
