"""What the training commands share: a run folder with an arm for each network and seed, begun or gone on with."""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from typing import Any

import torch

from ctxenc.training import signals
from ctxenc.training.bad_images import SKIP
from ctxenc.training.config import read_config, write_config
from ctxenc.training.console import UserError, one_line, printable
from ctxenc.training.processes import agree, make_accelerator, same, speaks
from ctxenc.training.tensorboard import check_tensorboard

UNFINISHED = re.compile(r"\.config\.\d+\.json")  # what a kill in the writing of the first configuration leaves


@dataclass(frozen=True)
class Training:
    """A training command.

    Args:
        name: As it is typed.
        runs: Where its runs lie.
        config: The dataclass of an arm's configuration.
        options: The module of its settings: add_arguments, given, resolve, resumed.
        build_datasets: The datasets of some settings.
        verify: Reads what can be broken in them; shows its progress, and passes over what is, where it is told to.
        describe: What is trained on, in a line.
        configs: The configuration of each arm, tried out; with pretrained weights where the run is fresh.
        trainer: Trains an arm with a seed; see Loop.
        write_report: Writes the report of a finished run; returns the table to print.
    """

    name: str
    runs: Path
    config: type
    options: Any
    build_datasets: Callable[[Any], Any]
    verify: Callable[[Any, bool, bool], None]
    describe: Callable[[Any, Any], str]
    configs: Callable[[Any, Any, bool], dict[str, Any]]
    trainer: Callable[..., Any]
    write_report: Callable[[Path, dict[str, Any], Any, float], str]


def add_arguments(parser: argparse.ArgumentParser, training: Training) -> None:
    """Adds the arguments of a training command."""
    group = parser.add_argument_group("run folder")
    group.add_argument(
        "--out", type=Path, metavar="DIR", help=f"run folder to make (default: {training.runs}/001, ...)"
    )
    group.add_argument(
        "--resume",
        metavar="RUN",
        help=f"go on with a run, with its own settings; auto takes --out, or the newest in {training.runs}, and starts a new "
        "run where there is none",
    )
    training.options.add_arguments(parser)


def run(args: argparse.Namespace, training: Training) -> None:
    """Trains every arm with every seed, then writes and prints the report.

    Raises:
        UserError: A mistake; on one process alone, the others exit with its code.
        SystemExit: SIGTERM came: 143.
        KeyboardInterrupt: Ctrl-C.
    """
    try:
        with signals.raised():
            _run(args, training)
    except UserError as error:
        if not speaks():
            raise SystemExit(2) from error
        raise
    except signals.Stopped as stop:
        if stop.signal == SIGTERM:
            raise SystemExit(128 + SIGTERM) from stop
        raise


def _run(args: argparse.Namespace, training: Training) -> None:
    started = time.perf_counter()
    options = training.options
    chosen = options.given(args)
    folder = folder_to_resume(args.resume, args.out, training.runs)
    stored: Any = None if folder is None else read_config(folder, training.config)
    if folder is not None:
        check_format(folder, stored)
    settings = options.resolve(chosen) if stored is None else options.resumed(stored.settings, chosen)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.tensorboard:
        check_tensorboard()
    accelerator = make_accelerator(settings)
    if not same(accelerator, str(folder)):  # else they would wait for each other
        raise UserError(
            f"--resume {args.resume}: not every process finds the same run, which must lie where all machines see it: {folder} here"
        )
    with accelerator.local_main_process_first():
        datasets = training.build_datasets(settings)
    if stored is not None and stored.classes != datasets.classes:
        raise UserError(f"--resume: {difference(stored.classes, datasets.classes)}")
    training.verify(datasets, accelerator.is_local_main_process, settings.on_bad_image == SKIP)
    with accelerator.local_main_process_first():
        configs = training.configs(settings, datasets, stored is None)
    if folder is None:
        folder = agree(accelerator, lambda: new_folder(args.out, training.runs))
    if accelerator.is_main_process:
        write_configs(folder, configs, settings.seed_list)
        print(printable(f"{training.describe(settings, datasets)}; run folder {folder}"), flush=True)
    accelerator.wait_for_everyone()
    try:
        for seed in settings.seed_list:
            for arm, config in configs.items():
                trainer = training.trainer(config, settings, datasets, folder / f"{arm}-{seed}", seed)
                trainer.fit(f"{arm}, seed {seed}")
    except KeyboardInterrupt:
        if accelerator.is_main_process:
            print(f"\nto go on: ctxenc {training.name} --resume {printable(folder)}", file=sys.stderr)
        raise
    if accelerator.is_main_process:
        table = training.write_report(folder, configs, settings, time.perf_counter() - started)
        print(f"\n{table}\n\n{printable(folder / 'report.html')}")
    accelerator.end_training()


def folder_to_resume(resume: str | None, out: Path | None, runs: Path) -> Path | None:
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


def check_format(folder: Path, config: Any) -> None:
    """Raises UserError if the run in ``folder`` was begun by a ctxenc whose states this one cannot go on from."""
    if any(folder.glob("*/state/epoch-*")):
        version = config.versions.get("ctxenc", "of an unknown version")
        raise UserError(
            f"--resume: {folder} was begun by ctxenc {version} before there were checkpoints/: finish it with that, or begin anew"
        )


def new_folder(out: Path | None, runs: Path) -> Path:
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


def difference(stored: Iterable[str], found: Iterable[str]) -> str:
    """What the classes of the data differ in from those of the run, in words."""
    stored, found = list(stored), list(found)
    for text, names in (("lacks", set(stored) - set(found)), ("has in addition", set(found) - set(stored))):
        if names:
            return f"the data {text} class {sorted(names)[0]!r} ({len(found)} classes, the run has {len(stored)})"
    return "the classes of the data come in another order than the run's"
