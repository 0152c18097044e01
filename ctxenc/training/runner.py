"""Run a training command: a run folder with an arm for each network and seed, new or resumed."""

import argparse
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from signal import SIGTERM
from typing import Any

import torch
from filelock import FileLock, Timeout

from ctxenc.runs.config import TEMPORARY, check_folder, read_config, write_config
from ctxenc.runs.errors import UserError, one_line
from ctxenc.training import checkpoint, pictures, signals, tensorboard
from ctxenc.training.bad_images import SKIP
from ctxenc.training.console import say
from ctxenc.training.processes import agree, is_reporter, make_accelerator, same
from ctxenc.training.settings import option_name
from ctxenc.training.tensorboard import check_tensorboard

FOLDERS = (checkpoint.FOLDER, pictures.FOLDER, tensorboard.FOLDER)  # of an arm
# The command line must repeat these: they read or fetch foreign weights, and `download` fetches a data set.
ASKED = ("pretrained", "initial_checkpoint", "pretrained_backbone")
LOCK = ".lock"
PATIENCE = 10.0  # seconds: the workers of a killed training keep its lock until they notice, every 5 s
UNFINISHED_CHECKPOINT = r"\.epoch-\d+-step-\d+\.[0-9a-f]{16}\.tmp"
UNFINISHED = re.compile(rf"\.lock|{TEMPORARY}")  # leftovers of a kill before the first configuration


@dataclass(frozen=True)
class Training:
    """Describe a training command.

    Args:
        name: Name of the command.
        runs: Parent folder of its runs.
        config: The dataclass of an arm's configuration.
        options: The class of its settings: read, resolve, resume.
        build_datasets: Builds the datasets of some settings.
        verify: Reads files that may be broken; its arguments: show the progress, skip broken ones.
        describe: Describes the training data in one line.
        configs: Returns the configuration of each arm, tried out; with pretrained weights if the run is fresh.
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


def run(args: argparse.Namespace, training: Training) -> None:
    """Train every arm with every seed, then write and print the report.

    Raises:
        UserError: A user error, on one process alone; the others exit with its code.
        SystemExit: SIGTERM came: 143.
        KeyboardInterrupt: Ctrl-C.
    """
    try:
        with signals.stop_on_signals(), ExitStack() as held:
            _train(args, training, held)
    except UserError as error:
        if not is_reporter():
            raise SystemExit(2) from error
        raise
    except signals.Stopped as stop:
        if stop.signal == SIGTERM:
            raise SystemExit(128 + SIGTERM) from stop
        raise


def _train(args: argparse.Namespace, training: Training, held: ExitStack) -> None:
    started = time.perf_counter()
    options = training.options
    chosen = options.read(args)
    folder = folder_to_resume(args.resume, args.out, training.runs)
    stored: Any = None if folder is None else read_config(folder, training.config)
    if folder is None:
        settings = options.resolve(chosen)
    else:
        settings = consented(options.resume(stored.settings, chosen), chosen, folder)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.tensorboard:
        check_tensorboard()
    accelerator = make_accelerator(settings)
    if not same(accelerator, str(folder)):  # otherwise they would wait for each other
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
    folder = agree(accelerator, lambda: take_folder(folder, args.out, training.runs, held))
    agree(accelerator, lambda: write_config(folder, configs[list(configs)[-1]]))  # from here on --resume accepts it
    if accelerator.is_main_process:
        say(f"{training.describe(settings, datasets)}; run folder {folder}")
    try:
        for seed in settings.seed_list:
            for arm, config in configs.items():
                own = folder / f"{arm}-{seed}"
                agree(accelerator, partial(prepare_arm, own, config))
                training.trainer(config, settings, datasets, own, seed).fit(f"{arm}, seed {seed}")
    except KeyboardInterrupt:
        if accelerator.is_main_process:
            print(file=sys.stderr)
            say(f"to go on: ctxenc {training.name} --resume {folder}{asked_again(settings)}", sys.stderr)
        raise
    if accelerator.is_main_process:
        table = training.write_report(folder, configs, settings, time.perf_counter() - started)
        print(f"\n{table}\n")
        say(folder / "report.html")
    accelerator.end_training()


MANY_SEEDS = 100  # limit for a stored configuration; more need the command line


def folder_to_resume(resume: str | None, out: Path | None, runs: Path) -> Path | None:
    """Return the folder of the run to resume, or None for a new run.

    Raises:
        UserError: There is no run to resume, or --out is another folder.
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


def consented(settings: Any, chosen: Mapping[str, Any], folder: Path) -> Any:
    """Return the settings of a resumed run, possibly a stranger's; drop requests that the command line must repeat.

    The configuration may come from a stranger. Without the command line it may read its data, train its network and write its own
    folder, no more.

    Raises:
        UserError: An arm has not begun, and starts from weights that the command line does not name; or there are more seeds
            than MANY_SEEDS, and the command line does not ask for them.
    """
    if settings.seeds > MANY_SEEDS and "seeds" not in chosen:
        raise UserError(f"--resume: the run has {settings.seeds} seeds: add --seeds {settings.seeds} to train them")
    arms = (folder / f"{arm}-{seed}" for seed in settings.seed_list for arm in settings.arm_names)
    fresh = next((arm.name for arm in arms if not any((arm / checkpoint.FOLDER).glob("epoch-*"))), None)
    named = [name for name in ASKED if getattr(settings, name, None) and name not in chosen]
    if fresh and named:
        raise UserError(f"--resume: {fresh} has not begun, and its start loads weights: add{asked_again(settings)}")
    if getattr(settings, "download", False) and "download" not in chosen:
        return replace(settings, download=False)
    return settings


def asked_again(settings: Any) -> str:
    """Return the options to repeat for a resumed run, each after a space."""
    values = {option_name(name): getattr(settings, name, None) for name in ASKED}
    return "".join(
        f" {name}" if value is True else f" {name} {shlex.quote(value)}" for name, value in values.items() if value
    )


def _age(run: Path) -> float:
    config = run / "config.json"
    return config.stat().st_mtime if config.is_file() else 0.0


def take_folder(run: Path | None, out: Path | None, runs: Path, held: ExitStack) -> Path:
    """Lock the folder of `run`, or create and lock a new one, until `held` is closed.

    Raises:
        UserError: Another training holds it; or the folder of a new run is not empty, or cannot be created.
    """
    folder = run or new_folder(out, runs)
    held.enter_context(locked(folder))
    sweep(folder)
    if run is None:
        check_empty(folder)  # another training may have held it until now
    return folder


def new_folder(out: Path | None, runs: Path) -> Path:
    """Create the folder of a new run: `out`, or the next free number in `runs`; another training may take one first.

    Raises:
        UserError: It is not empty, or cannot be created.
    """
    try:
        if out is not None:
            check_empty(out)
            out.mkdir(parents=True, exist_ok=True)
            return out
        runs.mkdir(parents=True, exist_ok=True)
        number = max((int(each.name) for each in runs.glob("*") if each.name.isdecimal()), default=0)
        while True:
            number += 1
            folder = runs / f"{number:03d}"
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise UserError(f"--out {out or runs} cannot be written: {error.strerror or one_line(error)}") from error


def check_empty(out: Path) -> None:
    """Raise UserError if the folder `out` holds a run or anything else."""
    if (out / "config.json").exists():
        raise UserError(f"--out {out} already holds a run: --resume {out} goes on with it")
    if out.is_dir() and not all(UNFINISHED.fullmatch(each.name) for each in out.iterdir()):
        raise UserError(f"--out {out} is not empty")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder in the body. The lock ends with the process, even if it is killed.

    Raises:
        UserError: Another training holds it.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout as error:
        raise UserError(f"{folder} is in use by another training") from error
    except (OSError, NotImplementedError) as error:  # a file system without locks
        say(f"{folder} cannot be locked ({one_line(error)}): start no second training in it", sys.stderr)
    try:
        yield
    finally:
        lock.release()


def prepare_arm(arm: Path, config: Any) -> None:
    """Create the folder of an arm, with its configuration, and remove files that a kill left half written in it.

    Raises:
        UserError: It leads out of the run, or cannot be written.
    """
    for each in (arm, *(arm / name for name in FOLDERS)):
        check_folder(each)
    try:
        arm.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{arm} cannot be written: {error.strerror}") from error
    sweep(arm, arm / pictures.FOLDER, arm / checkpoint.FOLDER)
    write_config(arm, config)


def sweep(*folders: Path) -> None:
    """Remove the temporary files and folders of a killed training: its weights would fill the disk in time."""
    for each in (each for folder in folders for each in folder.glob(".*.tmp*")):
        if re.fullmatch(TEMPORARY, each.name):
            each.unlink(missing_ok=True)
        elif re.fullmatch(UNFINISHED_CHECKPOINT, each.name):
            shutil.rmtree(each, ignore_errors=True)


def difference(stored: Iterable[str], found: Iterable[str]) -> str:
    """Describe how the classes of the data differ from the classes of the run."""
    stored, found = list(stored), list(found)
    for text, names in (("lacks", set(stored) - set(found)), ("has in addition", set(found) - set(stored))):
        if names:
            return f"the data {text} class {sorted(names)[0]!r} ({len(found)} classes, the run has {len(stored)})"
    return "the classes of the data come in another order than the run's"
