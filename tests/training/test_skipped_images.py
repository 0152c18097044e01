"""--on-bad-image: what takes the place of a broken image, what counts, and that a resumed run stays exact; data that vanishes."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ctxenc.__main__ import main
from ctxenc.runs.errors import UserError
from ctxenc.training import bad_images, data, durable, loop, trainer
from ctxenc.training.bad_images import BadImages, BrokenImageError, Intact
from ctxenc.training.checkpoint import read_predictions
from ctxenc.training.settings import Settings
from tests.training.small_runs import RANDOM, SEGMENT, SMALL, assert_same_run, checkpoints, make_pairs, metrics

SKIP = ("--on-bad-image", "skip")


class Numbers:
    """Samples that tell what they were drawn with; some are broken."""

    seed, epoch = 0, 0

    def __init__(self, broken, count=100):
        self.broken, self.count = broken, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenImageError(f"broken image {index}: cut")
        return index

    def blank(self):
        return "blank"

    def name(self, index):
        return f"name {index}"


class TestSubstitutes:
    def test_follow_from_seed_epoch_and_index(self):
        def drawn(seed, epoch):
            samples = Numbers(range(50))
            samples.seed, samples.epoch = seed, epoch
            return [Intact(samples, None, train=True)[index] for index in range(100)]

        first = drawn(0, 0)
        assert first == drawn(0, 0)
        assert first[50:] == [*range(50, 100)]
        assert set(first[:50]) <= {*range(50, 100)}
        assert len(set(first[:50])) > 20  # of 50: not the same one for all
        for other in (drawn(1, 0), drawn(0, 1)):
            assert sum(a != b for a, b in zip(first[:50], other[:50], strict=True)) > 40

    def test_go_on_where_one_is_broken_too(self):
        index = 7
        chosen = Intact(Numbers({index}), None, train=True)[index]
        further = Intact(Numbers({index, chosen}), None, train=True)[index]
        assert len({index, chosen, further}) == 3

    def test_errors_name_what_was_seen(self):
        samples = Intact(Numbers({7}), None, train=True)
        assert samples.name(7) == f"name {samples[7]}"
        assert samples.name(8) == "name 8"

    def test_end_where_all_are_broken(self):
        with pytest.raises(UserError, match=r"no whole image in 16 draws; the last: broken image \d+: cut"):
            Intact(Numbers(range(100)), None, train=True)[0]

    def test_are_blank_in_validation(self):
        samples = Intact(Numbers({7}), None, train=False)
        assert [samples[6], samples[7]] == [6, "blank"]


class TestNotes:
    def test_each_once_over_all_processes(self, tmp_path):
        path = tmp_path / "bad.txt"
        logs = [BadImages(path, 100) for _ in range(3)]
        for log in logs:
            for name in ("a.png", "line\nbreak \udcff.png", "a.png"):
                log.add(BrokenImageError(f"broken image {name}: cut"))
        assert path.read_bytes() == b"broken image a.png: cut\nbroken image line\\nbreak \\udcff.png: cut\n"

    @pytest.mark.parametrize(("total", "limit"), [(20, 8), (80, 8), (200, 20)])
    def test_too_many(self, tmp_path, total, limit):
        log = BadImages(tmp_path / "bad.txt", total)
        for number in range(limit):
            log.add(BrokenImageError(str(number)))
        with pytest.raises(UserError, match=f"at most {limit} of {total} images, got {limit + 1}; the last: {limit}$"):
            BadImages(tmp_path / "bad.txt", total).add(BrokenImageError(str(limit)))

    def test_what_a_report_says(self, tmp_path):
        assert bad_images.noted(tmp_path) == []
        path = tmp_path / bad_images.FILE
        path.write_text("a\na\n")  # two processes at once
        assert bad_images.noted(tmp_path) == ["1 image could not be read and was left out: bad_images.txt."]
        path.write_text("a\nb\n")
        assert bad_images.noted(tmp_path) == ["2 images could not be read and were left out: bad_images.txt."]

    def test_cannot_be_written(self, tmp_path):
        with pytest.raises(UserError, match=r"cannot write .*bad\.txt: No such file"):
            BadImages(tmp_path / "none" / "bad.txt", 9).add(BrokenImageError("a"))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, image_folder):
    """Two training images and a validation image are broken."""
    folder = shutil.copytree(image_folder, tmp_path_factory.mktemp("damaged") / "animals")
    for name in ("train/dog/1.png", "train/cat/0.png", "val/cat/3.png"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:500])
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, damaged):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["finetune", "--data", str(damaged), *SMALL, *RANDOM, *SKIP, "--out", str(folder)]) == 0
    return folder


def lines(run):
    return sorted((run / bad_images.FILE).read_text().splitlines())


class TestFinetune:
    ARMS = ("se-0", "context-0")

    def test_tells_how_many(self, damaged, whole, tmp_path, finetune):
        code, out, _ = finetune("--out", tmp_path / "run", "--epochs", 1, *SKIP, data=damaged)
        assert code == 0
        text = "3 images could not be read and were left out: bad_images.txt."
        assert text in out
        assert text in (tmp_path / "run" / "report.md").read_text()
        assert [line.partition(": ")[0] for line in lines(tmp_path / "run")] == [
            f"broken image {damaged / name}" for name in ("train/cat/0.png", "train/dog/1.png", "val/cat/3.png")
        ]
        assert "image is truncated" in lines(tmp_path / "run")[0] or "broken" in lines(tmp_path / "run")[0]
        assert lines(whole) == lines(tmp_path / "run")

    def test_validation_counts_the_others(self, damaged, whole):
        names = [row[0] for row in read_predictions(whole / "context-0" / "predictions.csv")]
        expected = sorted(map(str, (damaged / "val").glob("*/*.png")))
        assert names == [name for name in expected if not name.endswith("cat/3.png")]
        assert len(names) == 9
        targets = [row[1] for row in read_predictions(whole / "context-0" / "predictions.csv")]
        assert targets == [0] * 5 + [1] * 3 + [2]
        rows = read_predictions(whole / "context-0" / "predictions.csv")
        assert metrics(whole / "context-0")[-1]["top1"] == sum(row[1] == row[2] for row in rows) / 9

    def test_evaluate_says_the_same(self, damaged, whole, capsys):
        run = str(whole / "context-0")
        assert main(["evaluate", run, "--checkpoint", "last"]) == 2
        assert f"broken image {damaged / 'val/cat/3.png'}" in capsys.readouterr().err
        for workers in ("0", "1"):
            assert main(["evaluate", run, "--checkpoint", "last", "--skip-broken", "--workers", workers]) == 0
            out, err = capsys.readouterr()
            assert err == f"ctxenc: skipped broken image {damaged / 'val/cat/3.png'}\n"
            cells = {line.split("  ")[0]: line.split()[-1] for line in out.splitlines()}
            assert cells["images"] == "9"
            assert cells["cross entropy"] == f"{metrics(whole / 'context-0')[-1]['val_loss']:.4f}"

    def test_evaluate_says_what_it_says_without_the_broken_one(self, damaged, whole, tmp_path, capsys):
        folder = shutil.copytree(damaged / "val", tmp_path / "val")
        outs = []
        for more in (["--skip-broken"], []):
            assert main(["evaluate", str(whole / "context-0"), "--data", str(folder), *more]) == 0
            outs.append(capsys.readouterr().out)
            (folder / "cat" / "3.png").unlink(missing_ok=True)
        assert outs[0] == outs[1]

    def test_nothing_else_changes(self, image_folder, finetune, tmp_path):
        """Where no image is broken."""
        for name, more in (("fail", ()), ("skip", SKIP)):
            assert finetune("--out", tmp_path / name, "--epochs", 1, "--mixup", 0.3, *more)[0] == 0
        assert_same_run(tmp_path / "fail", tmp_path / "skip", ["context-0"])
        assert not (tmp_path / "skip" / bad_images.FILE).exists()

    @pytest.mark.parametrize(
        ("where", "arm", "epoch", "step"),
        [("_step", "se-0", 0, 0), ("_step", "context-0", 1, 1), ("evaluate", "context-0", 2, 3)],
    )
    def test_resuming_is_exact(self, finetune, damaged, whole, tmp_path, monkeypatch, where, arm, epoch, step):
        kind = trainer.Trainer if where == "evaluate" else loop.Loop
        real = getattr(kind, where)

        def stopped(made, *arguments):
            if (made.arm.name, made.progress.epoch, made.progress.step) == (arm, epoch, step):
                os.kill(os.getpid(), signal.SIGTERM)
            return real(made, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(kind, where, stopped)
            with pytest.raises(SystemExit):
                finetune("--out", tmp_path / "run", *RANDOM, *SKIP, data=damaged)
        assert finetune("--resume", tmp_path / "run", "--workers", 1 if arm == "se-0" else 0, data=damaged)[0] == 0
        assert_same_run(whole, tmp_path / "run", self.ARMS)
        assert set(lines(tmp_path / "run")) == set(lines(whole))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_run_that_failed_may_go_on_with_skip(
        self, finetune, refused, damaged, whole, tmp_path, monkeypatch, workers
    ):
        monkeypatch.setattr(data, "VERIFIED_UP_TO", 3)
        arguments = ("--out", tmp_path / "run", *RANDOM, "--workers", workers)
        assert "broken image" in refused(*arguments, data=damaged)
        assert finetune("--resume", tmp_path / "run", *SKIP, data=damaged)[0] == 0
        assert_same_run(whole, tmp_path / "run", self.ARMS)

    @pytest.mark.parametrize(("verified", "workers"), [(2000, 0), (3, 0), (3, 1)])
    def test_too_many(self, refused, damaged, tmp_path, monkeypatch, verified, workers):
        monkeypatch.setattr(data, "VERIFIED_UP_TO", verified)
        monkeypatch.setattr(bad_images, "HANDFUL", 1)
        line = refused("--out", tmp_path / "run", *SKIP, "--workers", workers, data=damaged)
        assert "--on-bad-image skip leaves out at most 1 of 16 images, got 2; the last: broken image " in line
        assert (tmp_path / "run").exists() == (verified == 3)

    def test_no_validation_image_is_left(self, refused, image_folder, tmp_path):
        folder = shutil.copytree(image_folder, tmp_path / "data")
        for path in [*(folder / "val" / "cat").iterdir()][1:]:
            path.unlink()
        for path in (folder / "val").glob("*/*"):
            path.write_bytes(b"no image")
        line = refused("--out", tmp_path / "run", "--epochs", 1, *SKIP, data=folder)
        assert "none of the 5 validation images can be read" in line

    def test_blocks_are_calibrated_on_others(self, finetune, damaged, tmp_path):
        code, _, err = finetune(
            "--out", tmp_path / "run", "--epochs", 1, "--init", "calibrated", "--num-codes", 2, *SKIP, data=damaged
        )
        assert code == 0, err


class TestSegmentation:
    def start(self, root, *more):
        return main(["segment", "train", "--data", str(root), *SEGMENT, "--epochs", "1", *map(str, more)])

    def test_images_and_masks(self, tmp_path, capsys):
        root = make_pairs(tmp_path / "data")
        for name in ("images/train/1.png", "masks/train/2.png", "images/val/0.png"):
            path = root / name
            path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
        (root / "classes.txt").unlink()  # so that classes are counted in the masks
        assert self.start(root, "--out", tmp_path / "fail") == 2
        assert "broken image " in capsys.readouterr().err
        runs = [tmp_path / "none", tmp_path / "two"]
        for run, workers in zip(runs, (0, 1), strict=True):
            assert self.start(root, *SKIP, "--workers", workers, "--out", run) == 0, capsys.readouterr()
            assert "3 images could not be read and were left out: bad_images.txt." in capsys.readouterr().out
        assert_same_run(*runs, ["encnet-0"])
        assert "3 images could not be read" in (runs[0] / "report.md").read_text()

    def test_a_broken_validation_image_counts_nowhere(self, tmp_path):
        root = make_pairs(tmp_path / "data")
        assert self.start(root, *SKIP, "--out", tmp_path / "all") == 0
        (root / "images/val/2.png").write_bytes((root / "images/val/0.png").read_bytes()[:300])
        shutil.copy(root / "masks/val/0.png", root / "masks/val/2.png")
        assert self.start(root, *SKIP, "--out", tmp_path / "one more") == 0
        assert_same_run(tmp_path / "all", tmp_path / "one more", ["encnet-0"])

    @pytest.mark.parametrize("broken", [True, False])
    def test_no_validation_image_counts(self, tmp_path, capsys, broken):
        root = make_pairs(tmp_path / "data")
        for number in range(2):
            if broken:
                (root / f"images/val/{number}.png").write_bytes(b"no image")
            else:
                Image.new("L", (44, 30 + 4 * number), 255).save(root / f"masks/val/{number}.png")
        assert self.start(root, *SKIP, "--out", tmp_path / "run") == 2
        assert "error: none of the 2 validation images counts: " in capsys.readouterr().err

    def test_a_mask_that_can_be_read_but_is_wrong_is_not_skipped(self, tmp_path, capsys):
        root = make_pairs(tmp_path / "data")
        Image.new("L", (44, 34), 200).save(root / "masks/train/1.png")
        assert self.start(root, *SKIP, "--out", tmp_path / "run") == 2
        assert capsys.readouterr().err.endswith(
            "masks/train/1.png must hold 0 to 1, or 255 where it is to be ignored, got 200\n"
        )


class TestVanished:
    """Images that are gone between two epochs: an error, skip or not, and no hang."""

    @pytest.fixture
    def vanishing(self, monkeypatch):
        def install(folder, arm):
            real = loop.Loop.save

            def save(made):
                path = real(made)
                if (made.arm.name, made.progress.epoch, made.progress.step) == (arm, 1, 0):
                    folder.rename(folder.with_name("gone"))
                return path

            monkeypatch.setattr(loop.Loop, "save", save)

        yield install
        monkeypatch.undo()

    @pytest.mark.parametrize(("workers", "more"), [(0, ()), (2, SKIP)])
    def test_finetune(self, finetune, refused, image_folder, done, tmp_path, vanishing, workers, more):
        folder = shutil.copytree(image_folder, tmp_path / "data")
        vanishing(folder / "train", "context-0")
        line = refused("--out", tmp_path / "run", "--epochs", 2, "--workers", workers, *more, data=folder)
        assert line.startswith(f"ctxenc: error: cannot read image {folder / 'train'}/")
        assert line.endswith(".png: No such file or directory")
        assert not multiprocessing.active_children()  # for which the process would wait at its exit
        arm = tmp_path / "run" / "context-0"
        assert checkpoints(arm) == ["epoch-00001-step-0000000"]
        assert durable.damage(arm / "checkpoints" / "epoch-00001-step-0000000") == ""
        assert finetune("--resume", tmp_path / "run", "--workers", 0)[0] == 0
        for name in ("metrics.csv", "last.safetensors", "predictions.csv"):
            assert (arm / name).read_bytes() == (done / "context-0" / name).read_bytes()

    @pytest.mark.parametrize(("part", "workers"), [("images/val", 0), ("masks/train", 2)])
    def test_segmentation(self, tmp_path, vanishing, capsys, workers, part):
        root = make_pairs(tmp_path / "data")
        vanishing(root / part, "encnet-0")
        arguments = ["segment", "train", "--data", str(root), *SEGMENT, *SKIP, "--workers", str(workers)]
        assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"ctxenc: error: cannot read image {root / part}/")
        assert not multiprocessing.active_children()
        assert checkpoints(tmp_path / "run" / "encnet-0") == ["epoch-00001-step-0000000"]


@pytest.mark.parametrize(("train", "size", "started"), [(True, None, 3), (False, None, 3), (False, 1, 6)])
def test_no_more_workers_than_batches(image_folder, tmp_path, train, size, started):
    """Each is a process; hundreds of them for three batches would only take memory."""
    settings = Settings(data=str(image_folder), batch_size=2, workers=256)
    made = loop.Loop.__new__(trainer.Trainer)
    made.settings, made.accelerator = settings, loop.make_accelerator(settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where the machine has fewer CPUs than that
        assert made.loader(Numbers((), 6), train=train, batch_size=size).num_workers == started


@pytest.mark.parametrize(("processes", "start"), [(1, None), (2, "forkserver")])
def test_processes_that_train_together_do_not_fork(image_folder, processes, start):
    """Their backend's threads may hold a lock, on which a forked worker waits for ever."""
    made = loop.Loop.__new__(trainer.Trainer)
    made.settings = Settings(data=str(image_folder), batch_size=2, workers=1)
    made.accelerator = SimpleNamespace(num_processes=processes, device=torch.device("cpu"))
    context = made.loader(Numbers((), 6), train=True).multiprocessing_context
    assert (context and context.get_start_method()) == start


@pytest.mark.slow
def test_two_processes(damaged, whole, tmp_path):
    """Both note what they meet, and what is left out counts nowhere."""
    command = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ctxenc", "finetune")
    arguments = ("--data", damaged, *SMALL, "--epochs", 1, *SKIP, "--workers", 1, "--out", tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-m", *command, *map(str, arguments)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "3 images could not be read and were left out: bad_images.txt." in done.stdout
    assert set(lines(tmp_path / "run")) == set(lines(whole))
    found, expected = (read_predictions(run / "context-0" / "predictions.csv") for run in (tmp_path / "run", whole))
    assert [row[:2] for row in found] == [row[:2] for row in expected]
