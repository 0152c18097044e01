"""Signals, damaged checkpoints, full disks and numbers that are not finite: what a training does, and how it goes on."""

import errno
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from ctxenc.__main__ import main
from ctxenc.training import durable, loop, signals, trainer
from ctxenc.training.segmentation.segment_trainer import SegmentTrainer
from tests.training.small_runs import RANDOM, SEGMENT, SMALL, assert_same_run, checkpoints, make_pairs

ARMS = ["se-0", "context-0"]


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory, image_folder):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["finetune", "--data", str(image_folder), *SMALL, "--out", str(folder), *RANDOM]) == 0
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs") / "data")


@pytest.fixture(scope="module")
def segmented(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("runs") / "segment"
    assert (
        main(["segment", "train", "--data", str(pairs), *SEGMENT, "--smoothing", "sampled", "--out", str(folder)]) == 0
    )
    return folder


def signalled_in(monkeypatch, kind, where, number, arm, epoch, step):
    """Sends the process a signal in the method ``where`` of an arm at an epoch and step."""
    real = getattr(kind, where)

    def method(made, *arguments):
        if (made.arm.name, made.progress.epoch, made.progress.step) == (arm, epoch, step):
            os.kill(os.getpid(), number)
        return real(made, *arguments)

    monkeypatch.setattr(kind, where, method)


@pytest.fixture(autouse=True)
def interruptible():
    """As in a terminal: for what it runs with & a shell ignores SIGINT, and then so do we."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def outcome(call):
    """The exit code of a command."""
    try:
        return call()
    except SystemExit as end:
        return end.code


class TestSignals:
    @pytest.mark.parametrize(
        ("number", "where", "arm", "epoch", "step", "left"),
        [
            (signal.SIGTERM, "_step", "se-0", 0, 0, "epoch-00000-step-0000001"),
            (signal.SIGTERM, "_step", "context-0", 1, 1, "epoch-00001-step-0000002"),
            (signal.SIGINT, "_step", "context-0", 2, 2, "epoch-00002-step-0000003"),
            (signal.SIGTERM, "evaluate", "context-0", 1, 3, "epoch-00001-step-0000003"),
            (signal.SIGTERM, "save", "se-0", 2, 0, "epoch-00002-step-0000000"),
            (signal.SIGTERM, "finish", "se-0", 3, 0, "epoch-00003-step-0000000"),
            (signal.SIGINT, "finish", "context-0", 3, 0, "epoch-00003-step-0000000"),
        ],
    )
    def test_finish_the_step_and_resuming_is_exact(
        self, finetune, never_stopped, tmp_path, monkeypatch, capsys, number, where, arm, epoch, step, left
    ):
        run = tmp_path / "run"
        kind = trainer.Trainer if where in ("evaluate", "finish") else loop.Loop
        with monkeypatch.context() as patch:
            signalled_in(patch, kind, where, number, arm, epoch, step)
            code = outcome(lambda: finetune("--out", run, *RANDOM)[0])
        assert code == 128 + number
        assert checkpoints(run / arm)[-1] == left
        assert arm == "context-0" or not (run / "context-0").exists()  # the next arm has not begun
        assert not (run / "report.md").exists()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert finetune("--resume", "auto", "--out", run, "--workers", 1)[0] == 0
        assert_same_run(never_stopped, run, ARMS)

    @pytest.mark.parametrize(("where", "epoch", "step"), [("_step", 0, 0), ("_step", 1, 1), ("evaluate", 1, 2)])
    def test_segmentation_too(self, pairs, segmented, tmp_path, monkeypatch, where, epoch, step):
        arguments = ["--data", str(pairs), *SEGMENT, "--smoothing", "sampled", "--out", str(tmp_path / "run")]
        with monkeypatch.context() as patch:
            kind = SegmentTrainer if where == "evaluate" else loop.Loop
            signalled_in(patch, kind, where, signal.SIGTERM, "encnet-0", epoch, step)
            assert outcome(lambda: main(["segment", "train", *arguments])) == 143
        assert main(["segment", "train", "--resume", str(tmp_path / "run")]) == 0
        assert_same_run(segmented, tmp_path / "run", ["encnet-0"])

    def test_how_to_go_on_is_told(self, finetune, tmp_path, monkeypatch, capsys):
        signalled_in(monkeypatch, loop.Loop, "_step", signal.SIGTERM, "context-0", 0, 0)
        assert outcome(lambda: finetune("--out", tmp_path / "run", "--epochs", 1)) == 143
        assert f"to go on: ctxenc finetune --resume {tmp_path / 'run'}" in capsys.readouterr().err

    def test_before_training_they_act_at_once(self):
        with pytest.raises(signals.Stopped) as stopped, signals.stop_on_signals():
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.signal == signal.SIGTERM

    def test_what_the_process_was_started_to_ignore_stays_ignored(self):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with signals.stop_on_signals(), signals.record_signals() as record:
                os.kill(os.getpid(), signal.SIGINT)
                assert record.signal is None
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
                assert record.signal == signal.SIGTERM
        finally:
            signal.signal(signal.SIGINT, before)


class TestCheckpoints:
    def test_every_so_many_steps(self, finetune, never_stopped, tmp_path):
        assert finetune("--out", tmp_path / "run", *RANDOM, "--checkpoint-every", 2, "--keep", 4)[0] == 0
        places = [(0, 2), (1, 0), (1, 1), (2, 0), (2, 2), (3, 0)]  # updates 2, 4 and 8; the sixth ends an epoch
        names = [f"epoch-{epoch:05d}-step-{step:07d}" for epoch, step in places]
        assert checkpoints(tmp_path / "run" / "se-0") == names[-4:]
        assert_same_run(never_stopped, tmp_path / "run", ARMS)

    @pytest.fixture
    def cut(self, finetune, never_stopped, tmp_path):
        """A finished run, of which the newest checkpoint of an arm is to be damaged."""
        run = shutil.copytree(never_stopped, tmp_path / "cut")
        (run / "report.md").unlink()
        return run, run / "context-0" / "checkpoints" / "epoch-00003-step-0000000"

    @pytest.mark.parametrize(
        "name", ["model.safetensors", "optimizer.pt", "processes.pt", "progress.json", "best.safetensors"]
    )
    def test_a_damaged_one_is_told_and_the_one_before_is_taken(self, finetune, never_stopped, cut, name):
        run, newest = cut
        content = bytearray((newest / name).read_bytes())
        if name == "optimizer.pt":
            del content[len(content) // 2 :]
        else:
            content[len(content) // 2] ^= 4
        (newest / name).write_bytes(content)
        code, out, _ = finetune("--resume", run)
        assert code == 0
        assert f"damaged checkpoint {newest}: {name} does not have the checksum" in out
        assert "going on from epoch-00002-step-0000000" in out
        assert_same_run(never_stopped, run, ARMS)
        assert durable.damage(newest) == ""

    def test_rows_and_weights_after_the_checkpoint_are_cut(self, finetune, never_stopped, cut, monkeypatch):
        """Where training differs afterwards, as on a GPU, nothing of what was cut may stay."""
        run, newest = cut
        (newest / "progress.json").write_bytes(b"")
        for name in ("best", "last"):
            (run / "context-0" / f"{name}.safetensors").write_bytes(b"of an epoch that is no more")
        monkeypatch.setattr(loop.Loop, "_train_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert finetune("--resume", run)[0] == 130
        whole = (never_stopped / "context-0" / "metrics.csv").read_text().splitlines()
        assert (run / "context-0" / "metrics.csv").read_text().splitlines() == whole[:3]
        assert len((run / "context-0" / "timings.csv").read_text().splitlines()) == 3
        before = newest.with_name("epoch-00002-step-0000000")
        assert (run / "context-0" / "best.safetensors").read_bytes() == (before / "best.safetensors").read_bytes()
        last, average = load_file(run / "context-0" / "last.safetensors"), load_file(before / "ema.safetensors")
        assert last.keys() == average.keys()
        assert all(torch.equal(last[name], average[name]) for name in last)

    def test_none_intact_is_an_error(self, refused, cut):
        run, newest = cut
        for each in newest.parent.iterdir():
            (each / "manifest.json").unlink()
        weights = (run / "context-0" / "last.safetensors").read_bytes()
        line = refused("--resume", run)
        assert "no checkpoint to go on from is intact" in line
        assert all(each.name in line for each in newest.parent.iterdir())
        assert (run / "context-0" / "last.safetensors").read_bytes() == weights

    def test_one_that_runs_code_is_refused(self, refused, cut):
        """Its checksum is right, as anyone can make it; but it is read as data alone."""
        run, newest = cut

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(run / "taken"),)

        files = [(each.name, each.read_bytes()) for each in newest.iterdir() if each.name != durable.MANIFEST]
        torch.save({"optimizer": Evil()}, newest / "optimizer.pt")
        evil = (newest / "optimizer.pt").read_bytes()
        durable.write_folder(newest, [(name, evil if name == "optimizer.pt" else content) for name, content in files])
        assert f"cannot resume from {newest}" in refused("--resume", run)
        assert not (run / "taken").exists()

    def test_another_number_of_processes_is_refused(self, refused, cut):
        run, newest = cut
        files = {each.name: each.read_bytes() for each in newest.iterdir() if each.name != durable.MANIFEST}
        processes = torch.load(newest / "processes.pt")
        torch.save(processes * 2, newest / "processes.pt")
        durable.write_folder(newest, (files | {"processes.pt": (newest / "processes.pt").read_bytes()}).items())
        assert "it is of 2 processes, got 1" in refused("--resume", run)

    def test_a_full_disk_ends_with_an_error_and_all_that_was(
        self, finetune, refused, never_stopped, tmp_path, monkeypatch
    ):
        run, real = tmp_path / "run", durable._write

        def write(path, content):
            if "epoch-00002" in str(path) and "context" in str(path) and path.name == "optimizer.pt":
                path.write_bytes(content[:100])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            real(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(durable, "_write", write)
            line = refused("--out", run, *RANDOM)
        where = run / "context-0" / "checkpoints"
        assert f"cannot write {where / 'epoch-00002-step-0000000'}: No space left on device" in line
        assert "epoch-00001-step-0000000 is intact, and --resume goes on from it" in line
        assert [each.name for each in where.iterdir()] == ["epoch-00001-step-0000000"]
        assert finetune("--resume", run)[0] == 0
        assert_same_run(never_stopped, run, ARMS)


class Breaks(torch.nn.Module):
    """Gives NaN at some of its calls in training, after changing its statistics as a norm does."""

    def __init__(self, inner, calls):
        super().__init__()
        self.inner, self.calls, self.count = inner, calls, 0

    def forward(self, x):
        self.count += self.training
        return self.inner(x * float("nan") if self.training and self.count in self.calls else x)


@pytest.fixture
def broken(monkeypatch):
    """Makes the second norm of the networks of all runs to come break at these calls."""
    real = trainer.build_model

    def install(*calls):
        def build(*arguments):
            network = real(*arguments)
            network.bn1 = Breaks(network.bn1, calls)
            return network

        monkeypatch.setattr(trainer, "build_model", build)

    return install


class TestNonfinite:
    ARGUMENTS = ("--model", "test_resnet", "--fill-empty", "--epochs", 2, "--checkpoint-every", 1)

    def test_stops_and_names_step_images_and_layer(self, refused, tmp_path, broken, image_folder):
        broken(5, 6)  # the second pass is the sixth call
        line = refused("--out", tmp_path / "run", *self.ARGUMENTS)
        assert "the loss of step 2 of epoch 2 is nan, on " in line
        named = line.partition(" is nan, on ")[2].partition(";")[0].split(", ")
        assert len(set(named)) == 2
        assert all(each.startswith(str(image_folder / "train")) for each in named)
        assert "it first arises in layer bn1.inner (BatchNorm" in line
        assert "weights" not in line
        state = tmp_path / "run" / "context-0" / "checkpoints" / "epoch-00001-step-0000001"
        assert line.endswith(f"the state before it is {state}")

    @pytest.mark.parametrize("step", [1, 3])
    def test_the_images_are_those_of_the_batch(self, refused, tmp_path, broken, monkeypatch, step):
        seen, real = [], trainer.Samples.__getitem__
        monkeypatch.setattr(trainer.Samples, "__getitem__", lambda own, i: (seen.append(own.name(i)), real(own, i))[1])
        broken(3 + step, 4 + step)
        line = refused("--out", tmp_path / "run", *self.ARGUMENTS)
        first = (
            6 + 2 * 10 + 2 * (step - 1)
        )  # after an epoch of training, its validation, and the health of its codebooks
        assert f"step {step} of epoch 2 is nan, on {', '.join(seen[first : first + 2])};" in line

    def test_the_state_before_is_saved_as_it_was(self, finetune, refused, tmp_path, broken):
        """Neither its weights nor its running statistics hold anything of the broken step."""
        arguments = (*self.ARGUMENTS, "--smoothing", "sampled", "--keep", 9, "--checkpoint-every")
        broken()
        assert finetune("--out", tmp_path / "whole", *arguments, 1)[0] == 0
        broken(3, 4)
        refused("--out", tmp_path / "run", *arguments, 100)
        assert checkpoints(tmp_path / "run" / "context-0") == ["epoch-00000-step-0000002"]
        whole, run = (
            {each.name: each.read_bytes() for each in where.iterdir()}
            for where in (
                tmp_path / name / "context-0/checkpoints/epoch-00000-step-0000002" for name in ("whole", "run")
            )
        )
        for name in ("model.safetensors", "optimizer.pt", "processes.pt"):
            assert whole[name] == run[name], name

    def test_some_may_be_left_out(self, finetune, refused, tmp_path, broken):
        broken(2, 5)
        code, _, err = finetune("--out", tmp_path / "run", *self.ARGUMENTS, "--skip-nonfinite", 2)
        assert code == 0
        assert "the loss of step 2 of epoch 1 is nan" in err
        assert "left out, 2 of 2 that may be" in err
        folder = tmp_path / "run" / "context-0" / "checkpoints" / "epoch-00002-step-0000000"
        assert all(each.isfinite().all() for each in load_file(folder / "model.safetensors").values())
        assert json.loads((folder / "progress.json").read_text())["skipped"] == 2

    def test_no_more_than_those(self, refused, tmp_path, broken):
        broken(2, 5, 6)
        line = refused("--out", tmp_path / "run", *self.ARGUMENTS, "--skip-nonfinite", 1)
        assert "the loss of step 2 of epoch 2 is nan" in line

    def test_a_rate_far_too_high(self, refused, tmp_path):
        line = refused("--out", tmp_path / "run", "--opt", "sgd", "--lr", "1e9", "--epochs", 3, "--warmup-epochs", 0)
        assert "the loss of step " in line
        assert "it first arises in " in line


def test_loaders_workers_do_not_hear_signals():
    before = {each: signal.getsignal(each) for each in signals.SIGNALS}
    try:
        signals.ignore_signals(0)
        assert all(signal.getsignal(each) is signal.SIG_IGN for each in signals.SIGNALS)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
