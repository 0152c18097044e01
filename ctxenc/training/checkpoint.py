"""What a training writes as it goes: the state to go on from, and the files that others read.

ARM/state/epoch-0003/   accelerate's state, ema.safetensors, progress.json, predictions.csv: renamed into place whole
ARM/                    last.safetensors, best.safetensors, metrics.csv, predictions.csv: made from that state

The files in ARM follow from the newest state alone, so an interruption between the two is mended by publishing again.
"""

import csv
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_IMODE
from typing import Any

from accelerate import Accelerator
from torch import nn

from ctxenc.training.console import UserError, one_line
from ctxenc.training.runs import SCORE, atomic, load_weights, save_weights

Row = dict[str, Any]
COLUMNS = ("epoch", "lr", "train_loss", "val_loss", SCORE, "top1", "images_per_s")


@dataclass
class Progress:
    """The finished epochs of one arm: a row of metrics each, and the last one's predictions.

    A prediction is (name, target, prediction). ``score`` is the column by which the best epoch is chosen.
    """

    rows: list[Row] = field(default_factory=list)
    predictions: list[tuple[str, int, int]] = field(default_factory=list)
    score: str = SCORE

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return len(self.rows)

    @property
    def last_is_best(self) -> bool:
        """Whether no earlier epoch scored as high as the last."""
        scores = [row[self.score] for row in self.rows]
        return bool(scores) and scores.index(max(scores)) == len(scores) - 1


def newest_state(arm: Path) -> Path | None:
    """The state folder with the most epochs, or None."""
    states = sorted((arm / "state").glob("epoch-*"))
    return states[-1] if states else None


def save_state(accelerator: Accelerator, arm: Path, progress: Progress, ema: nn.Module | None) -> None:
    """Writes the whole state under a temporary name, renames it, and removes the one before. Called on all processes.

    Raises:
        UserError: It cannot be written; the state before is then still there.
    """
    target = arm / "state" / f"epoch-{progress.epoch:05d}"
    temporary = target.with_name(f".{target.name}")
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if ema is not None:
                save_weights(temporary / "ema.safetensors", ema)
            write_predictions(temporary / "predictions.csv", progress.predictions)
            (temporary / "progress.json").write_text(json.dumps({"rows": progress.rows}), encoding="utf-8")
            mode = S_IMODE((temporary / "progress.json").stat().st_mode)
            for path in temporary.iterdir():
                with suppress(PermissionError):  # a file system without modes
                    path.chmod(mode)  # safetensors makes its files for the owner alone
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, target)
            for old in target.parent.iterdir():
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or one_line(error)}") from error
    accelerator.wait_for_everyone()


def load_state(accelerator: Accelerator, state: Path, ema: nn.Module | None, score: str = SCORE) -> Progress:
    """Puts model, optimiser, scaler and generators back as ``state`` has them; see Progress for ``score``.

    Raises:
        UserError: The state is damaged or of another model.
    """
    try:
        for path in state.iterdir():
            path.open("rb").close()  # for the system's reason: safetensors calls missing whatever it cannot open
        accelerator.load_state(str(state))
        rows = json.loads((state / "progress.json").read_text(encoding="utf-8"))["rows"]
        predictions = read_predictions(state / "predictions.csv")
    except Exception as error:  # safetensors, torch and json each raise their own
        raise UserError(f"cannot resume from {state}: {one_line(error)}") from error
    if ema is not None:
        load_weights(ema, state / "ema.safetensors")
    return Progress(rows, predictions, score)


def publish(arm: Path, progress: Progress, network: nn.Module) -> None:
    """Writes the weights of ``network``, the metrics and the predictions where the other commands look for them."""
    if not progress.epoch:
        return
    save_weights(arm / "last.safetensors", network)
    if progress.last_is_best:
        save_weights(arm / "best.safetensors", network)
    if progress.predictions:
        write_predictions(arm / "predictions.csv", progress.predictions)
    write_rows(arm / "metrics.csv", list(progress.rows[0]), progress.rows)


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Writes a CSV file with a header, whole or not at all."""
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[Row]:
    """Reads the numbers of a metrics.csv."""
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {name: int(text) if name == "epoch" else float(text) for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def write_predictions(path: Path, predictions: Sequence[tuple[str, int, int]]) -> None:
    """Writes name, target and prediction of each validation sample."""
    columns = ("name", "target", "prediction")
    write_rows(path, columns, [dict(zip(columns, each, strict=True)) for each in predictions])


def read_predictions(path: Path) -> list[tuple[str, int, int]]:
    """Reads a file of write_predictions."""
    with open(path, newline="", encoding="utf-8") as file:
        return [(row["name"], int(row["target"]), int(row["prediction"])) for row in csv.DictReader(file)]
