"""The files of a training: checkpoints to resume from, and the files for other commands.

ARM/checkpoints/epoch-00003-step-0000120/   model, ema, best (safetensors), optimizer.pt, processes.pt, progress.json, manifest.json
ARM/                                        last, best (safetensors), metrics.csv, timings.csv, codebooks.csv, predictions.csv

A checkpoint is named by its finished epochs and the steps after them. The files in ARM follow from the newest checkpoint.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ctxenc.integrations.state_dicts import read_pickle
from ctxenc.runs.config import atomic
from ctxenc.runs.errors import UserError, one_line, printable
from ctxenc.runs.folders import SCORE, save_weights
from ctxenc.swap.states import rng_state, set_rng_state
from ctxenc.training import codebooks
from ctxenc.training.console import say
from ctxenc.training.durable import damage, keep_newest, write_folder
from ctxenc.training.processes import agree

Row = dict[str, Any]
Prediction = tuple[Any, ...]  # a sample's name, its prediction, and its index, which stays if the data moves
COLUMNS = ("epoch", "lr", "train_loss", "val_loss", SCORE, "top1")
PREDICTIONS = ("name", "target", "prediction", "loss", "index")
SPEED = "images_per_s"
FOLDER = "checkpoints"


@dataclass
class Progress:
    """Hold the progress of an arm.

    Args:
        rows: The metrics of each finished epoch.
        timings: Values of each finished epoch that depend on the clock.
        codebooks: The health of each codebook after each finished epoch.
        predictions: Predictions of the last finished epoch.
        confusion: Pixel counts of the last finished epoch by true and predicted class; classifications have no such table.
        score: The column of the metrics that chooses the best epoch.
        step: Number of finished steps in the current epoch.
        skipped: Total number of steps skipped because their loss or gradient was not finite.
        finite: Number of the other steps of the current epoch.
        lr: The learning rate of the last finite step.
        images: Images seen in the current epoch, by this process.
        seconds: Time for these images.
    """

    rows: list[Row] = field(default_factory=list)
    timings: list[Row] = field(default_factory=list)
    codebooks: list[Row] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    score: str = SCORE
    step: int = 0
    skipped: int = 0
    finite: int = 0
    lr: float = 0.0
    images: int = 0
    seconds: float = 0.0

    @property
    def epoch(self) -> int:
        """Return the number of finished epochs."""
        return len(self.rows)

    @property
    def last_is_best(self) -> bool:
        """Return whether no earlier epoch scored as high as the last."""
        scores = [row[self.score] for row in self.rows]
        return bool(scores) and scores.index(max(scores)) == len(scores) - 1

    def finish_epoch(self, measures: Mapping[str, float], codebooks: Iterable[Row], loss: float, speed: float) -> None:
        """Append the rows of the current epoch, and begin the next."""
        epoch = {"epoch": self.epoch + 1}
        self.codebooks += [{**epoch, **row} for row in codebooks]
        self.rows.append({**epoch, "lr": self.lr, "train_loss": loss, **measures})
        self.timings.append({**epoch, SPEED: speed, "seconds": self.seconds})
        self.step = self.finite = self.images = 0
        self.seconds = 0.0


@dataclass(frozen=True)
class State:
    """Hold the training state of one arm on this process.

    Args:
        networks: "model", and with a moving average "ema".
        optimizer: As Accelerate prepared it.
        loss: Sum of the losses of the current epoch, a tensor of no dimension.
    """

    networks: dict[str, nn.Module]
    optimizer: Any
    loss: Tensor


def newest_state(accelerator: Accelerator, arm: Path) -> Path | None:
    """Find the newest intact checkpoint of `arm`, or None if it has no checkpoint; report newer damaged ones.

    Raises:
        UserError: There are checkpoints, but each is damaged.
    """

    def find() -> Path | None:
        problems: list[str] = []
        for state in sorted((arm / FOLDER).glob("epoch-*"), reverse=True):
            if not (problem := damage(state)):
                for each in problems:
                    say(f"damaged checkpoint {each}; going on from {state.name}")
                return state
            problems.append(f"{state}: {problem}")
        if problems:
            raise UserError(
                f"no checkpoint to go on from is intact: {'; '.join(problems)}; remove {arm / FOLDER} to begin {arm.name} anew"
            )
        return None

    return agree(accelerator, find)


def save_state(accelerator: Accelerator, arm: Path, progress: Progress, state: State, keep: int) -> Path:
    """Write a checkpoint, whole or not at all, and remove all but the last `keep`. Call it on all processes.

    Returns:
        Its folder.

    Raises:
        UserError: It cannot be written; the earlier ones are then still there.
    """
    target = arm / FOLDER / f"epoch-{progress.epoch:05d}-step-{progress.step:07d}"
    own = {"rng": rng_state(accelerator.device), "loss": state.loss.cpu()}
    processes = gather_object([own])

    def write() -> None:
        try:
            # It may exist already, perhaps with older ones: a kill may have come before their removal.
            if not target.exists() or damage(target):
                write_folder(target, _files(accelerator, arm, progress, state, processes))
            keep_newest(target.parent, target.name, keep, "*epoch-*-step-*")
        except OSError as error:
            before = sorted((arm / FOLDER).glob("epoch-*"))
            hint = f"; {before[-1].name} is intact, and --resume goes on from it" if before else ""
            raise UserError(f"cannot write {target}: {error.strerror or one_line(error)}{hint}") from error

    agree(accelerator, write)
    return target


def _files(
    accelerator: Accelerator, arm: Path, progress: Progress, state: State, processes: list[Row]
) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a checkpoint, built one at a time because each may be large."""
    for name, network in state.networks.items():
        tensors = network.state_dict().items()  # copy: safetensors rejects tensors that share memory or have gaps
        copies = {key: each.detach().cpu().clone(memory_format=torch.contiguous_format) for key, each in tensors}
        yield f"{name}.safetensors", safetensors.torch.save(copies)
    scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    yield "optimizer.pt", _saved({"optimizer": state.optimizer.state_dict(), "scaler": scaler})
    yield "processes.pt", _saved(processes)
    if progress.rows and (arm / "best.safetensors").is_file():
        yield "best.safetensors", (arm / "best.safetensors").read_bytes()
    yield "progress.json", json.dumps(asdict(progress)).encode()


def _saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def check_progress(
    progress: Progress, score: str, epochs: int, steps: int, predicted: Sequence[str], val_samples: int, classes: int
) -> None:
    """Raise ValueError if this training could not have reached this progress: values of a file may have any type.

    Args:
        progress: From a file.
        score: The column that chooses the best epoch.
        epochs: Number of epochs in all.
        steps: Number of steps of an epoch.
        predicted: The columns of the predictions.
        val_samples: Number of validation samples.
        classes: Number of classes.
    """
    if any(len(each) != len(predicted) for each in progress.predictions):
        raise ValueError(f"its predictions must have {', '.join(predicted)}: they are of another version")
    if not all(0 <= each[-1] < val_samples for each in progress.predictions):
        raise ValueError(f"it was evaluated on more than the {val_samples} validation images that are there")
    rows, timings, confusion = progress.rows, progress.timings, progress.confusion
    numbered = [predicted.index(name) for name in ("target", "prediction") if name in predicted]
    rules = {
        "step and finite": all(_is_count(each, steps + 1) for each in (progress.step, progress.finite)),
        "skipped and images": all(_is_count(each, 2**63) for each in (progress.skipped, progress.images)),
        "lr and seconds": all(
            type(each) in (int, float) and math.isfinite(each) for each in (progress.lr, progress.seconds)
        ),
        "score": progress.score == score,
        "rows": _is_table(rows, epochs) and all(type(row.get(score)) is float for row in rows),
        "timings": _is_table(timings, epochs)
        and [row.keys() for row in timings] == [{"epoch", SPEED, "seconds"}] * len(rows),
        "codebooks": _is_table(progress.codebooks)
        and all(row.keys() == set(codebooks.COLUMNS) for row in progress.codebooks),
        "predictions": all(_is_count(each[place], classes) for each in progress.predictions for place in numbered),
        "confusion": len(confusion) in (0, classes)
        and all(len(row) == classes and all(_is_count(each, 2**63) for each in row) for row in confusion),
    }
    if broken := [name for name, holds in rules.items() if not holds]:
        raise ValueError(f"{broken[0]} cannot be those of {epochs} epochs of {steps} steps with {classes} classes")


def _is_table(rows: Any, epochs: int | None = None) -> bool:
    """Return whether rows have the same columns, of numbers and texts; with `epochs` at most as many, numbered from 1."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows):
        return False
    typed = all(type(each) in (int, float, str) for row in rows for each in row.values())
    numbers = [row.get("epoch") for row in rows]
    return typed and (epochs is None or (len(rows) <= epochs and numbers == [*range(1, len(rows) + 1)]))


def _is_count(value: Any, below: int) -> bool:
    return type(value) is int and 0 <= value < below


def load_state(accelerator: Accelerator, folder: Path, state: State, limits: tuple[Any, ...]) -> Progress:
    """Restore networks, optimiser, scaler, generators and the sum of losses from the checkpoint `folder`.

    `limits` are the arguments of `check_progress` for this training.

    Raises:
        UserError: The checkpoint is of another model, number of processes, version or data, or cannot be read.
    """
    try:
        for name, network in state.networks.items():
            network.load_state_dict(safetensors.torch.load_file(folder / f"{name}.safetensors"))
        saved = read_pickle(folder / "optimizer.pt")
        state.optimizer.load_state_dict(saved["optimizer"])
        if accelerator.scaler is not None and saved["scaler"] is not None:
            accelerator.scaler.load_state_dict(saved["scaler"])
        processes = read_pickle(folder / "processes.pt")
        table = json.loads((folder / "progress.json").read_bytes())
        progress = Progress(**table | {"predictions": [tuple(each) for each in table["predictions"]]})
        if len(processes) != accelerator.num_processes:
            raise ValueError(f"it is of {len(processes)} processes, got {accelerator.num_processes}")
        check_progress(progress, *limits)
        own = processes[accelerator.process_index]
        state.loss.copy_(own["loss"])
        set_rng_state(own["rng"], accelerator.device)
    except Exception as error:  # safetensors, torch and json each raise their own
        raise UserError(f"cannot resume from {folder}: {one_line(error)}") from error
    return progress


def publish(arm: Path, progress: Progress, network: nn.Module, predicted: Sequence[str] = PREDICTIONS) -> None:
    """Write the weights of `network`, the metrics and the predictions for the other commands.

    `predicted` names the columns of the predictions.
    """
    if not progress.epoch:
        return
    save_weights(arm / "last.safetensors", network)
    if progress.last_is_best:
        save_weights(arm / "best.safetensors", network)
    _publish_rows(arm, progress, predicted)


def publish_again(
    arm: Path, progress: Progress, network: nn.Module, folder: Path | None, predicted: Sequence[str] = PREDICTIONS
) -> None:
    """Restore the published files to their state at the checkpoint `folder`, before training resumes from it."""
    if not progress.epoch:
        for name in ("metrics.csv", "timings.csv", codebooks.FILE):
            (arm / name).unlink(missing_ok=True)
        return
    if not progress.step:
        save_weights(arm / "last.safetensors", network)
    if folder is not None and (folder / "best.safetensors").is_file():
        with atomic(arm / "best.safetensors") as path:
            path.write_bytes((folder / "best.safetensors").read_bytes())
    _publish_rows(arm, progress, predicted)


def _publish_rows(arm: Path, progress: Progress, predicted: Sequence[str]) -> None:
    if progress.predictions:
        table = [dict(zip(predicted, each, strict=True)) for each in progress.predictions]
        write_rows(arm / "predictions.csv", predicted, table)
    if progress.codebooks:
        write_rows(arm / codebooks.FILE, codebooks.COLUMNS, progress.codebooks)
    write_rows(arm / "metrics.csv", list(progress.rows[0]), progress.rows)
    if progress.timings:
        write_rows(arm / "timings.csv", list(progress.timings[0]), progress.timings)


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Write a CSV file with a header, whole or not at all; make its texts printable."""
    rows = [{name: printable(each) if isinstance(each, str) else each for name, each in row.items()} for row in rows]
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[Row]:
    """Read the numbers of a metrics.csv."""
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {name: int(text) if name == "epoch" else float(text) for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def read_results(arm: Path) -> list[Row]:
    """Read the metrics of each epoch of an arm, with its speed."""
    pairs = zip(read_rows(arm / "metrics.csv"), read_rows(arm / "timings.csv"), strict=True)
    return [{**row, SPEED: timing[SPEED]} for row, timing in pairs]


def read_predictions(path: Path) -> list[Prediction]:
    """Read the predictions.csv of a classification: name, target, prediction, loss and index of each validation sample."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kinds = (str, int, int, float, int)
    return [tuple(kind(row[name]) for kind, name in zip(kinds, PREDICTIONS, strict=True)) for row in rows]
