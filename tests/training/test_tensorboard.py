"""What --tensorboard logs: the same numbers as the files, each at its update, without those that an interruption took back."""

import csv
import os
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctxenc.runs.errors import UserError
from ctxenc.training import trainer
from ctxenc.training.processes import make_accelerator
from ctxenc.training.settings import Settings
from ctxenc.training.tensorboard import log_curves
from tests.training.small_runs import metrics

STEPS = 3  # an epoch: six images, two a step


def logged(arm):
    """Step and value of each scalar, by tag."""
    events = EventAccumulator(str(arm / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_it_holds_what_the_files_hold(finetune, tmp_path):
    assert finetune("--out", tmp_path / "run", "--epochs", 2, "--num-codes", 4, "--tensorboard")[0] == 0
    arm = tmp_path / "run" / "context-0"
    found, rows = logged(arm), metrics(arm)
    for name in ("train_loss", "val_loss", "balanced_accuracy"):
        assert found[f"epoch/{name}"] == [(STEPS * row["epoch"], pytest.approx(row[name])) for row in rows]
    steps = [value for _, value in found["step/loss"]]
    assert [step for step, _ in found["step/loss"]] == list(range(1, 2 * STEPS + 1))
    assert sum(steps[:STEPS]) / STEPS == pytest.approx(rows[0]["train_loss"])
    assert found["step/lr"][-1][1] == pytest.approx(rows[-1]["lr"])
    with open(arm / "codebooks.csv", newline="") as file:
        for row in csv.DictReader(file):
            for name in ("entropy", "bits"):
                values = dict(found[f"codewords {name}/{row['block']}"])
                assert values[STEPS * int(row["epoch"])] == pytest.approx(float(row[name]), rel=1e-5)


def test_steps_that_are_done_again_are_logged_once(finetune, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.Trainer, "evaluate", lambda self: 1 / 0)  # after the first epoch, before its checkpoint
    arguments = ("--out", tmp_path / "run", "--epochs", 1, "--checkpoint-every", 2, "--tensorboard")
    with pytest.raises(ZeroDivisionError):
        finetune(*arguments)
    monkeypatch.undo()
    assert finetune("--resume", tmp_path / "run")[0] == 0
    assert [step for step, _ in logged(tmp_path / "run" / "context-0")["step/loss"]] == [1, 2, 3]


def test_without_the_package(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert "pip install 'ctxenc[tensorboard]'" in refused("--out", tmp_path / "run", "--tensorboard")
    assert not (tmp_path / "run").exists()


def test_without_the_option_nothing_is_logged(finetune, tmp_path):
    assert finetune("--out", tmp_path / "run", "--epochs", 1)[0] == 0
    assert not list((tmp_path / "run").rglob("tensorboard"))


def test_a_folder_whose_name_is_no_text(tmp_path):
    accelerator = make_accelerator(Settings(device="cpu", tensorboard=True), arm=tmp_path / os.fsdecode(b"run \xff"))
    with (
        pytest.raises(UserError, match="--tensorboard must have a run folder whose name is text"),
        log_curves(accelerator, 0),
    ):
        pass
