"""ctxenc finetune: train a timm model with its SE blocks swapped, beside the SE network or alone."""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from ctxenc.training import settings as options
from ctxenc.training.console import UserError, one_line
from ctxenc.training.data import Datasets, build_datasets, train_transform, verify
from ctxenc.training.loop import Trainer, make_accelerator, make_optimizer
from ctxenc.training.report import write_report
from ctxenc.training.runs import RunConfig, build_model, check_model_name, installed_versions, read_config, write_config
from ctxenc.training.settings import PHOTOGRAPHS, Settings

RUNS = Path("runs")
UNFINISHED = re.compile(r"\.config\.\d+\.json")  # what a kill in the writing of the first configuration leaves


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.epilog = (
        "examples: ctxenc finetune | ctxenc finetune --model seresnet50 --pretrained --data PATH | "
        "accelerate launch -m ctxenc finetune --data PATH"
    )
    group = parser.add_argument_group("run folder")
    group.add_argument("--out", type=Path, metavar="DIR", help="run folder to make (default: runs/001, runs/002, ...)")
    group.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with a run, with its own settings; auto takes --out, or the newest in runs/, and starts a new run "
        "where there is none",
    )
    options.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Trains every arm with every seed, then writes and prints the report."""
    started = time.perf_counter()
    chosen = options.given(args)
    folder = folder_to_resume(args.resume, args.out)
    stored = None if folder is None else read_config(folder)
    settings = options.resolve(chosen) if stored is None else options.resumed(stored.settings, chosen)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    accelerator = make_accelerator(settings)
    with accelerator.local_main_process_first():
        datasets = build_datasets(settings)
    if stored is not None and stored.classes != datasets.classes:
        raise UserError(f"--resume: {difference(stored.classes, datasets.classes)}")
    verify(datasets, accelerator.is_local_main_process)
    with accelerator.local_main_process_first():
        configs = arm_configs(settings, datasets, settings.pretrained and stored is None)
    if folder is None:
        folder = agree(accelerator, lambda: new_folder(args.out))
    if accelerator.is_main_process:
        write_configs(folder, configs, settings.seed_list)
        print(f"{describe(settings, datasets)}; run folder {folder}", flush=True)
    accelerator.wait_for_everyone()
    try:
        for seed in settings.seed_list:
            for arm, config in configs.items():
                Trainer(config, settings, datasets, folder / f"{arm}-{seed}", seed).fit(f"{arm}, seed {seed}")
    except KeyboardInterrupt:
        if accelerator.is_main_process:
            print(f"\nto go on: ctxenc finetune --resume {folder}", file=sys.stderr)
        raise
    if accelerator.is_main_process:
        table = write_report(folder, configs, settings, time.perf_counter() - started)
        print(f"\n{table}\n\n{folder / 'report.md'}")
    accelerator.end_training()


def folder_to_resume(resume: str | None, out: Path | None, runs: Path = RUNS) -> Path | None:
    """The folder of the run to go on with, or None for a new run.

    Raises:
        UserError: There is no run to go on with, or --out is another folder.
    """
    if resume is None:
        return None
    if resume == "auto":
        found = [out] if out else sorted(runs.glob("*"), key=_age)
        return next((each for each in reversed(found) if (each / "config.json").is_file()), None)
    folder = Path(resume)
    if out is not None and out != folder:
        raise UserError(f"--resume {folder} goes on in that folder: leave --out {out} away")
    if not (folder / "config.json").is_file():
        raise UserError(f"--resume: no run at {folder}")
    if (folder.parent / "config.json").is_file():
        raise UserError(f"--resume: {folder} is one arm of a run: resume {folder.parent}")
    return folder


def _age(run: Path) -> float:
    config = run / "config.json"
    return config.stat().st_mtime if config.is_file() else 0.0


def agree(accelerator: Accelerator, choose: Any) -> Path:
    """What ``choose()`` gives on the main process, on every process."""
    chosen = [choose() if accelerator.is_main_process else None]
    return broadcast_object_list(chosen)[0]


def new_folder(out: Path | None, runs: Path = RUNS) -> Path:
    """Makes the folder of a new run.

    Raises:
        UserError: It holds something already, or cannot be made.
    """
    if out is None:
        numbers = [int(each.name) for each in runs.glob("*") if each.name.isdecimal()]
        out = runs / f"{max(numbers, default=0) + 1:03d}"
    try:
        if (out / "config.json").exists():
            raise UserError(f"--out {out} already holds a run: --resume {out} goes on with it")
        if out.is_dir() and not all(UNFINISHED.fullmatch(each.name) for each in out.iterdir()):
            raise UserError(f"--out {out} is not empty")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or one_line(error)}") from error
    return out


def arm_configs(settings: Settings, datasets: Datasets, pretrained: bool) -> dict[str, RunConfig]:
    """The configuration of each arm. What training needs of it is made and run once, so that what is wrong shows here.

    Raises:
        UserError: The model is unknown, does not take its arguments or the images, has no weights to be had where it
            is to be ``pretrained``, or has nothing to swap; or the optimiser or the transform cannot be made.
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
        network = build_model(configs[arm], pretrained)
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


def write_configs(folder: Path, configs: Mapping[str, Any], seeds: Iterable[int]) -> None:
    """Writes the configuration of the run, and of each arm and seed into a folder of its own.

    That of the run comes first: whatever cuts this off later leaves a run that --resume takes, and that mends the rest.
    """
    write_config(folder, configs[list(configs)[-1]])
    for arm, config in configs.items():
        for seed in seeds:
            own = folder / f"{arm}-{seed}"
            try:
                own.mkdir(exist_ok=True)
            except OSError as error:
                raise UserError(f"--out {folder} cannot be written: {error.strerror}") from error
            write_config(own, config)


def describe(settings: Settings, datasets: Datasets) -> str:
    """What is trained on, in a line."""
    kind = ("crops an epoch", "test tiles") if settings.data == PHOTOGRAPHS else ("images", "validation images")
    train, val = len(datasets.train.targets), len(datasets.val.targets)
    return f"{settings.data}: {len(datasets.classes)} classes, {train:,} training {kind[0]}, {val:,} {kind[1]}"


def difference(stored: Iterable[str], found: Iterable[str]) -> str:
    """What the classes of the data differ in from those of the run, in words."""
    stored, found = list(stored), list(found)
    for text, names in (("lacks", set(stored) - set(found)), ("has in addition", set(found) - set(stored))):
        if names:
            return f"the data {text} class {sorted(names)[0]!r} ({len(found)} classes, the run has {len(stored)})"
    return "the classes of the data come in another order than the run's"
