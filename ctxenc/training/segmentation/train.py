"""ctxenc segment train: EncNet on a data set from disk, or, beside its ablations, on the embedded scenes."""

import argparse
import sys
import time
from pathlib import Path

import torch

from ctxenc.training.config import read_config
from ctxenc.training.console import UserError, one_line
from ctxenc.training.finetune import agree, difference, folder_to_resume, new_folder, write_configs
from ctxenc.training.loop import make_accelerator
from ctxenc.training.segmentation import settings as options
from ctxenc.training.segmentation.data import Datasets, build_datasets, verify
from ctxenc.training.segmentation.networks import SegmentConfig, arm_configs, build_network
from ctxenc.training.segmentation.report import write_report
from ctxenc.training.segmentation.settings import SegmentSettings
from ctxenc.training.segmentation.trainer import SegmentTrainer, make_optimizer

RUNS = Path("runs") / "segment"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.epilog = (
        "examples: ctxenc segment train | ctxenc segment train --data voc_aug --data-dir PATH --pretrained-backbone | "
        "accelerate launch -m ctxenc segment train --data ade20k --data-dir PATH"
    )
    group = parser.add_argument_group("run folder")
    group.add_argument("--out", type=Path, metavar="DIR", help=f"run folder to make (default: {RUNS}/001, ...)")
    group.add_argument(
        "--resume",
        metavar="RUN",
        help=f"go on with a run, with its own settings; auto takes --out, or the newest in {RUNS}, and starts a new run "
        "where there is none",
    )
    options.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Trains every arm with every seed, then writes and prints the report."""
    started = time.perf_counter()
    chosen = options.given(args)
    folder = folder_to_resume(args.resume, args.out, RUNS)
    stored: SegmentConfig | None = None if folder is None else read_config(folder, SegmentConfig)
    settings = options.resolve(chosen) if stored is None else options.resumed(stored.settings, chosen)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    accelerator = make_accelerator(settings)
    datasets = build_datasets(settings)
    if stored is not None and stored.classes != datasets.classes:
        raise UserError(f"--resume: {difference(stored.classes, datasets.classes)}")
    verify(datasets, accelerator.is_local_main_process)
    configs = arm_configs(settings, datasets.classes)
    with accelerator.local_main_process_first():
        try_out(configs, settings, pretrained=settings.pretrained_backbone and stored is None)
    if folder is None:
        folder = agree(accelerator, lambda: new_folder(args.out, RUNS))
    if accelerator.is_main_process:
        write_configs(folder, configs, settings.seed_list)
        print(f"{describe(settings, datasets)}; run folder {folder}", flush=True)
    accelerator.wait_for_everyone()
    try:
        train(folder, configs, settings, datasets)
    except KeyboardInterrupt:
        if accelerator.is_main_process:
            print(f"\nto go on: ctxenc segment train --resume {folder}", file=sys.stderr)
        raise
    if accelerator.is_main_process:
        table = write_report(folder, configs, settings, time.perf_counter() - started)
        print(f"\n{table}\n\n{folder / 'report.md'}")
    accelerator.end_training()


def train(folder: Path, configs: dict[str, SegmentConfig], settings: SegmentSettings, datasets: Datasets) -> None:
    """Trains each arm with each seed into a folder of its own, or goes on with it."""
    for seed in settings.seed_list:
        for arm, config in configs.items():
            SegmentTrainer(config, settings, datasets, folder / f"{arm}-{seed}", seed).fit(f"{arm}, seed {seed}")


def try_out(configs: dict[str, SegmentConfig], settings: SegmentSettings, pretrained: bool) -> None:
    """Makes what training needs of each arm and runs it once, so that what is wrong shows before a folder is made.

    Raises:
        UserError: A network cannot be built, or does not take a crop; or the optimiser cannot be made.
    """
    for config in configs.values():
        network = build_network(config, pretrained)
        make_optimizer(network, settings)
        try:
            with torch.no_grad():
                crop = torch.zeros(1, 3, settings.crop_size, settings.crop_size)
                network.train(settings.batch_size == 1)(crop)
        except Exception as error:  # any layer may refuse, each in its way
            raise UserError(
                f"--backbone {settings.backbone} cannot run on crops of {settings.crop_size}: {one_line(error)}"
            ) from error


def describe(settings: SegmentSettings, datasets: Datasets) -> str:
    """What is trained on, in a line."""
    train, val = len(datasets.train), len(datasets.val)
    return f"{settings.data}: {len(datasets.classes)} classes, {train:,} training images, {val:,} validation images"
