"""The folder of a run: one training at a time, and nothing outside it."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

from ctxenc.training import runner
from ctxenc.training.console import UserError

HOLDER = """
import sys
from contextlib import ExitStack
from pathlib import Path
from ctxenc.training.runner import take_folder
with ExitStack() as held:
    take_folder(Path(sys.argv[1]), None, Path("runs"), held)
    print(flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path / "run"."""
    (tmp_path / "run").mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], **pipes) as process:
        process.stdout.readline()
        yield process
        process.kill()


class TestOneTraining:
    def test_numbers_are_taken_by_one(self, tmp_path, monkeypatch):
        """Of two that see the same numbers the second takes the next one."""
        (tmp_path / "001").mkdir()
        monkeypatch.setattr(type(tmp_path), "glob", lambda *_: [])  # as it was before the other one made 001
        assert runner.new_folder(None, tmp_path) == tmp_path / "002"
        assert runner.new_folder(None, tmp_path) == tmp_path / "003"

    def test_a_held_folder_is_refused_and_a_dead_holder_is_no_obstacle(
        self, refused, finetune, holder, tmp_path, monkeypatch
    ):
        run = tmp_path / "run"
        monkeypatch.setattr(runner, "PATIENCE", 0)
        before = sorted(run.iterdir())
        assert refused("--out", run).endswith(f"{run} is in use by another training")
        assert refused("--out", run, "--resume", "auto").endswith(f"{run} is in use by another training")
        assert sorted(run.iterdir()) == before
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        assert finetune("--out", run, "--epochs", 1)[0] == 0
        assert finetune("--resume", run)[0] == 0  # the first has let go of it

    def test_a_run_that_is_going_on_is_not_resumed(self, refused, finetune, tmp_path, monkeypatch):
        assert finetune("--out", tmp_path / "run", "--epochs", 1)[0] == 0
        monkeypatch.setattr(runner, "PATIENCE", 0)
        with ExitStack() as held:
            runner.take_folder(tmp_path / "run", None, tmp_path, held)
            assert "is in use by another training" in refused("--resume", tmp_path / "run")

    def test_one_that_came_and_went_meanwhile_is_seen(self, tmp_path, monkeypatch):
        """Between the first look at --out and the lock, another training may have finished there."""
        monkeypatch.setattr(runner, "locked", lambda folder: ExitStack())
        monkeypatch.setattr(runner, "new_folder", lambda *_: tmp_path)
        (tmp_path / "config.json").touch()
        with ExitStack() as held, pytest.raises(UserError, match="already holds a run"):
            runner.take_folder(None, tmp_path, tmp_path, held)

    def test_a_file_system_without_locks_is_told(self, tmp_path, monkeypatch, capsys):
        def acquire(*_, **__):
            raise OSError("No locks available")

        monkeypatch.setattr("filelock.FileLock.acquire", acquire)
        with ExitStack() as held:
            assert runner.take_folder(tmp_path, None, tmp_path, held) == tmp_path
        assert "cannot be locked (No locks available)" in capsys.readouterr().err
