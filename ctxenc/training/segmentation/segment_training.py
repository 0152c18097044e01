"""Train EncNet on a data set from disk, or, beside its ablations, on the embedded scenes."""

import argparse

import torch

from ctxenc.runs.errors import UserError, one_line
from ctxenc.runs.segment_config import SegmentConfig, build_network
from ctxenc.training import runner
from ctxenc.training.console import list_counts, list_names
from ctxenc.training.segmentation.arms import arm_configs
from ctxenc.training.segmentation.datasets import Datasets, build_datasets, verify
from ctxenc.training.segmentation.pairs import Pairs
from ctxenc.training.segmentation.segment_report import write_report
from ctxenc.training.segmentation.segment_settings import RUNS, SegmentSettings
from ctxenc.training.segmentation.segment_trainer import SegmentTrainer, make_optimizer


def run(args: argparse.Namespace) -> None:
    """Train every arm with every seed, then write and print the report."""
    runner.run(args, TRAINING)


def tried_configs(settings: SegmentSettings, datasets: Datasets, fresh: bool) -> dict[str, SegmentConfig]:
    """Return the configuration of each arm. Build and run each network once, so that errors show up before training.

    Raises:
        UserError: A network cannot be built, or rejects a crop; or the optimiser cannot be made.
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
    """Describe the training data in one line."""
    train, val = len(datasets.train), len(datasets.val)
    classes = list_names(datasets.classes)
    if isinstance(datasets.train, Pairs) and (found := datasets.train.presence):
        ignored = f", {found.ignored:.1%} of pixels ignored" if found.ignored else ""
        classes = f"{list_counts(datasets.classes, found.counts)} of {found.read:,} training masks{ignored}"
    text = f"{settings.data}: {len(datasets.classes)} classes ({classes}), {train:,} training images, {val:,} validation images"
    return text + (f"; left unused: {list_names(datasets.unused)}" if datasets.unused else "")


TRAINING = runner.Training(
    name="segment train",
    runs=RUNS,
    config=SegmentConfig,
    options=SegmentSettings,
    build_datasets=build_datasets,
    verify=verify,
    describe=describe,
    configs=tried_configs,
    trainer=SegmentTrainer,
    write_report=write_report,
)
