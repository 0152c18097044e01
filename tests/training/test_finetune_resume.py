"""What going on after a stop gives: the run that was never stopped."""

import os
import shutil

import pytest

from ctxenc.__main__ import main
from ctxenc.runs import trained
from ctxenc.runs.config import read_config
from ctxenc.training import loop
from tests.training.small_runs import RANDOM, SMALL, assert_same_run, checkpoints


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory, image_folder):
    """Three epochs of both arms with everything that draws numbers switched on."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["finetune", "--data", str(image_folder), *SMALL, "--out", str(folder), *RANDOM]) == 0
    return folder


class TestResume:
    def stop_at(self, monkeypatch, arm, epoch, after_publish=False):
        """An end in the training of an arm's epoch, or between its published files and their checkpoint."""
        real = loop.Loop._train_epoch

        def train_epoch(trainer, bar):
            if trainer.arm.name == arm and trainer.progress.epoch == epoch:
                if not after_publish:
                    raise KeyboardInterrupt
                monkeypatch.setattr(loop, "save_state", interrupt)
            return real(trainer, bar)

        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(loop.Loop, "_train_epoch", train_epoch)

    @pytest.mark.parametrize(
        ("arm", "epoch", "after_publish"),
        [("se-0", 1, False), ("context-0", 0, False), ("context-0", 2, False), ("context-0", 1, True)],
    )
    def test_is_exact(self, finetune, never_stopped, tmp_path, monkeypatch, arm, epoch, after_publish):
        stopped = tmp_path / "stopped"
        with monkeypatch.context() as patch:
            self.stop_at(patch, arm, epoch, after_publish)
            code, _, err = finetune("--out", stopped, *RANDOM)
        assert code == 130
        assert f"ctxenc finetune --resume {stopped}" in err
        assert not (stopped / "report.md").exists()
        assert finetune("--resume", stopped, "--workers", 1)[0] == 0
        assert_same_run(never_stopped, stopped, ["se-0", "context-0"])

    def test_a_checkpoint_half_written_is_not_taken(self, finetune, done, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            self.stop_at(patch, "context-0", 1)
            assert finetune("--out", tmp_path / "run", "--epochs", 2)[0] == 130
        states = tmp_path / "run" / "context-0" / "checkpoints"
        shutil.copytree(states / "epoch-00001-step-0000000", states / ".epoch-00002-step-0000000.tmp")
        (states / ".epoch-00002-step-0000000.tmp" / "optimizer.pt").unlink()
        assert finetune("--resume", tmp_path / "run")[0] == 0
        assert_same_run(done, tmp_path / "run", ["context-0"])
        assert checkpoints(states.parent) == ["epoch-00001-step-0000000", "epoch-00002-step-0000000"]

    def test_auto(self, finetune, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert finetune("--resume", "auto", "--epochs", 1)[0] == 0  # nothing there: a new run
        assert finetune("--epochs", 1, "--seed", 3)[0] == 0
        os.utime(tmp_path / "runs" / "001" / "config.json", (0, 0))
        (tmp_path / "runs" / "002" / "report.md").unlink()
        code, out, _ = finetune("--resume", "auto")
        assert (code, "runs/002/report.html" in out) == (0, True)
        code, out, _ = finetune("--resume", "auto", "--out", "runs/001")
        assert (code, "runs/001/report.html" in out) == (0, True)

    @pytest.mark.parametrize("written", [0, 1, 2])
    def test_auto_after_a_kill_between_the_configurations(self, finetune, tmp_path, monkeypatch, written):
        """A kill runs no handler: the last file stays under its temporary name."""
        done, real = [], os.replace

        def replace(source, target):
            if len(done) == written:
                shutil.copy(source, source.with_name(f".{'0a' * 8}.tmp.json"))
                raise KeyboardInterrupt
            done.append(real(source, target))

        arguments = ("--resume", "auto", "--out", tmp_path / "run", "--epochs", 1, "--arms", "both")
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            assert finetune(*arguments)[0] == 130
        code, _, err = finetune(*arguments)
        assert code == 0, err
        for arm in ("se-0", "context-0"):
            assert trained.load_run(tmp_path / "run" / arm)

    def test_only_where_it_runs_may_change(self, refused, finetune, tmp_path, image_folder):
        assert finetune("--out", tmp_path / "run", "--epochs", 1)[0] == 0
        line = refused("--resume", tmp_path / "run", "--lr", "0.5")
        assert "--lr was 0.001 in this run, got 0.5" in line
        moved = shutil.copytree(image_folder, tmp_path / "moved")
        assert finetune("--resume", tmp_path / "run", data=moved)[0] == 0
        assert read_config(tmp_path / "run" / "context-0").settings["data"] == str(moved)

    def test_data_that_has_moved(self, finetune, tmp_path, image_folder, monkeypatch):
        """Between two arms, and when nothing is left but the report."""
        run, moved = tmp_path / "run", tmp_path / "moved"
        with monkeypatch.context() as patch:
            self.stop_at(patch, "context-0", 1)
            assert finetune("--out", run, "--arms", "both", "--epochs", 2)[0] == 130
        shutil.copytree(image_folder, moved)
        for data in (moved, image_folder):
            code, out, err = finetune("--resume", run, "--data", data)
            assert code == 0, err
            assert "on 10 validation images" in out

    def test_data_that_has_become_less(self, refused, finetune, tmp_path, image_folder):
        data = shutil.copytree(image_folder, tmp_path / "data")
        assert finetune("--out", tmp_path / "run", "--epochs", 1, data=data)[0] == 0
        (data / "val" / "cat" / "0.png").unlink()
        line = refused("--resume", tmp_path / "run", data=data)
        assert "it was evaluated on more than the 9 validation images that are there" in line

    def test_other_classes(self, refused, finetune, tmp_path, image_folder):
        assert finetune("--out", tmp_path / "run", "--epochs", 1)[0] == 0
        other = shutil.copytree(image_folder, tmp_path / "other")
        for split in ("train", "val"):
            (other / split / "newt").rename(other / split / "owl")
        before = (tmp_path / "run" / "config.json").read_bytes()
        assert "lacks class 'newt' (3 classes, the run has 3)" in refused("--resume", tmp_path / "run", data=other)
        assert (tmp_path / "run" / "config.json").read_bytes() == before

    def test_no_run(self, refused, finetune, tmp_path):
        assert "no run at" in refused("--resume", tmp_path)
        assert finetune("--out", tmp_path / "run", "--epochs", 1)[0] == 0
        assert f"resume {tmp_path / 'run'}" in refused("--resume", tmp_path / "run" / "context-0")
        assert "leave --out" in refused("--resume", tmp_path / "run", "--out", tmp_path / "other")
