"""ctxenc segment train: EncNet on a data set from disk, or, beside its ablations, on the embedded scenes."""

import argparse
from pathlib import Path

import torch

from ctxenc.training import runner
from ctxenc.training.console import UserError, counted, listed, one_line
from ctxenc.training.segmentation import settings as options
from ctxenc.training.segmentation.data import Datasets, build_datasets, verify
from ctxenc.training.segmentation.networks import SegmentConfig, arm_configs, build_network
from ctxenc.training.segmentation.pairs import Pairs
from ctxenc.training.segmentation.report import write_report
from ctxenc.training.segmentation.settings import SegmentSettings
from ctxenc.training.segmentation.trainer import SegmentTrainer, make_optimizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.epilog = (
        "examples: ctxenc segment train | ctxenc segment train --data voc_aug --data-dir PATH --pretrained-backbone | "
        "accelerate launch -m ctxenc segment train --data ade20k --data-dir PATH"
    )
    runner.add_arguments(parser, TRAINING)


def run(args: argparse.Namespace) -> None:
    """Trains every arm with every seed, then writes and prints the report."""
    runner.run(args, TRAINING)


def tried_configs(settings: SegmentSettings, datasets: Datasets, fresh: bool) -> dict[str, SegmentConfig]:
    """The configuration of each arm. What training needs of it is made and run once, so that what is wrong shows here.

    Raises:
        UserError: A network cannot be built, or does not take a crop; or the optimiser cannot be made.
    """
    configs = arm_configs(settings, datasets.classes)
    for config in configs.values():
        network = build_network(config, settings.pretrained_backbone and fresh)
        make_optimizer(network, settings)
        try:
            with torch.no_grad():
                crop = torch.zeros(1, 3, settings.crop_size, settings.crop_size)
                network.train(settings.batch_size == 1)(crop)
        except Exception as error:  # any layer may refuse, each in its way
            raise UserError(
                f"--backbone {settings.backbone} cannot run on crops of {settings.crop_size}: {one_line(error)}"
            ) from error
    return configs


def describe(settings: SegmentSettings, datasets: Datasets) -> str:
    """What is trained on, in a line."""
    train, val = len(datasets.train), len(datasets.val)
    classes = listed(datasets.classes)
    if isinstance(datasets.train, Pairs) and (found := datasets.train.presence):
        ignored = f", {found.ignored:.1%} of pixels ignored" if found.ignored else ""
        classes = f"{counted(datasets.classes, found.counts)} of {found.read:,} training masks{ignored}"
    text = f"{settings.data}: {len(datasets.classes)} classes ({classes}), {train:,} training images, {val:,} validation images"
    return text + (f"; left unused: {listed(datasets.unused)}" if datasets.unused else "")


TRAINING = runner.Training(
    name="segment train",
    runs=Path("runs") / "segment",
    config=SegmentConfig,
    options=options,
    build_datasets=build_datasets,
    verify=verify,
    describe=describe,
    configs=tried_configs,
    trainer=SegmentTrainer,
    write_report=write_report,
)
