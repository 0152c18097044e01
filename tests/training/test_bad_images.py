"""Images of every kind: what is read of them, and what is refused."""

import errno
import os
import re
import signal
import subprocess
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from ctxenc.__main__ import main
from ctxenc.runs.errors import UserError
from ctxenc.training import data
from ctxenc.training.bad_images import BrokenImageError
from ctxenc.training.checkpoint import read_predictions
from ctxenc.training.prediction import find_images
from ctxenc.training.segmentation import datasets as segmentation
from ctxenc.training.segmentation import transforms
from ctxenc.training.segmentation.pairs import Pairs
from ctxenc.training.segmentation.segment_settings import SegmentSettings
from ctxenc.training.settings import Settings
from tests.training.odd_images import READ, REFUSED
from tests.training.small_runs import DATA_CONFIG, SMALL, make_pairs


def put(folder, name, kinds):
    kinds[name][0](folder / name)
    return folder / name


@pytest.mark.parametrize("name", READ, ids=ascii)
def test_pixels(tmp_path, name):
    _, expected, off = READ[name]
    image = data.open_image(put(tmp_path, name, READ))
    assert image.mode == "RGB"
    assert np.asarray(image).shape == expected.shape
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= off


def test_adobe_marks_its_inverted_cmyk(tmp_path):
    content = put(tmp_path, "cmyk.jpg", READ).read_bytes()
    assert b"Adobe" in content
    with Image.open(tmp_path / "cmyk.jpg") as image:
        assert image.mode == "CMYK"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_broken_is_named(tmp_path, name, monkeypatch):
    def run(*arguments, **_):
        raise AssertionError(f"ran {arguments}")

    monkeypatch.setattr(subprocess, "Popen", run)  # Pillow would have Ghostscript run a PostScript file
    path = put(tmp_path, name, REFUSED)
    with pytest.raises(BrokenImageError) as caught:
        data.open_image(path)
    text = str(caught.value)
    assert text.startswith(f"broken image {path}: ")
    assert REFUSED[name][1] in text
    assert "\n" not in text


def test_a_file_that_is_not_there_is_no_broken_image(tmp_path):
    for name, reason in {"none.png": "No such file or directory", "a folder.jpg": "Is a directory"}.items():
        (tmp_path / "a folder.jpg").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=reason) as caught:
            data.open_image(tmp_path / name)
        assert str(caught.value).startswith(f"cannot read image {tmp_path / name}: ")
        assert type(caught.value) is UserError


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("odd"), BrokenImageError),
        (TypeError("odd"), BrokenImageError),
        (OSError("odd"), BrokenImageError),
        (OSError(errno.EINVAL, "odd"), BrokenImageError),  # a wrong offset in the file
        (OSError(errno.EIO, "odd"), UserError),  # the disk
        (MemoryError("odd"), MemoryError),
    ],
)
def test_whatever_a_decoder_raises(tmp_path, monkeypatch, raised, expected):
    def fail(*_):
        raise raised

    path = put(tmp_path, "palette.png", READ)
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(expected, match="odd") as caught:
        data.open_image(path)
    assert type(caught.value) is expected


def test_a_large_image_is_read_without_a_warning(tmp_path, monkeypatch):
    path = put(tmp_path, "pages.tif", READ)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # of 64: Pillow warns, and refuses above twice as many
    assert data.open_image(path).size == (8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(BrokenImageError, match="decompression bomb"):
        data.open_image(path)


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by 90 degrees
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg", exif=exif)
    assert data.open_image(tmp_path / "a.jpg").size == (8, 6)


def test_a_folder_named_as_an_image_is_a_class(tmp_path):
    for name in ("x.jpg", "y"):
        (tmp_path / name).mkdir()
        put(tmp_path / name, "palette.png", READ)
    assert data.FolderSource(tmp_path).classes == ["x.jpg", "y"]


SIZES = [(1, 1), (1, 5000), (5000, 1), (2, 3)]


class TestSizes:
    """Images of any size become what the network takes."""

    @pytest.mark.parametrize("size", SIZES)
    def test_classification(self, size):
        settings = Settings(data="folder", random_erase=1.0, auto_augment="rand-m9-mstd0.5")
        image = Image.new("RGB", size, (200, 100, 0))
        for transform in (data.train_transform(settings, DATA_CONFIG), data.eval_transform(DATA_CONFIG)):
            with data.seed_draws(0):
                made = transform(image)
            assert made.shape == (3, 32, 32)
            assert made.isfinite().all()

    @pytest.mark.parametrize("size", SIZES)
    def test_segmentation(self, tmp_path, size):
        Image.new("RGB", size, (200, 100, 0)).save(tmp_path / "i.png")
        Image.new("L", size, 1).save(tmp_path / "m.png")
        pair = Pairs([(tmp_path / "i.png", tmp_path / "m.png")], ["a", "b"]).pair(0)
        settings = SegmentSettings(data="folder", base_size=40, crop_size=32)
        colours = ((0.5,) * 3, (0.5,) * 3)
        for seed in range(5):
            with data.seed_draws(seed):
                image, mask = transforms.train_transform(settings, *colours)(*pair)
            assert (image.shape, mask.shape) == ((3, 32, 32), (32, 32))
            assert image.isfinite().all()
            assert set(mask.unique().tolist()) <= {1, 255}
        image, mask = transforms.eval_transform(settings, *colours)(*pair)
        assert max(image.shape[1:]) == 40
        assert torch.equal(mask, torch.ones(size[::-1], dtype=torch.int64))


@pytest.fixture
def no_wait():
    """An open that waits for ever ends in an error of another text."""

    def fail(*_):
        raise RuntimeError("it waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_not_waited_for(tmp_path, no_wait, kind):
    """A named pipe has no end before somebody writes to it, and a device none at all."""

    def make(path):
        path.unlink(missing_ok=True)
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
        return path

    root = make_pairs(tmp_path / "pairs")
    for path in (root / "images" / "train" / "1.png", root / "masks" / "val" / "0.png"):
        kept = path.read_bytes()
        make(path)
        with pytest.raises(BrokenImageError, match=f"^broken image {re.escape(str(path))}: it is no file$"):
            segmentation.verify(segmentation.build_datasets(SegmentSettings(data=str(root))), False)
        path.unlink()
        path.write_bytes(kept)
    path = make(tmp_path / "x.png")
    for found in (find_images([str(path)]), find_images([str(tmp_path)])[-1:]):
        with pytest.raises(BrokenImageError, match="it is no file"):
            data.open_image(found[0])


@pytest.mark.parametrize("command", ["finetune", "evaluate"])
def test_a_process_that_loads_images_is_killed(tmp_path, capsys, monkeypatch, image_folder, run_folder, command):
    """As the system does where memory runs out."""

    def die(self, index):
        assert get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(data.FolderSource, "image", die)
    monkeypatch.setattr(data, "VERIFIED_UP_TO", 0)
    arguments = {"evaluate": [run_folder], "finetune": ["--data", image_folder, *SMALL, "--out", tmp_path / "run"]}[
        command
    ]
    assert main([command, *map(str, arguments), "--workers", "1"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("ctxenc: error: a process that loads images was ended: DataLoader worker (pid")
    assert line.endswith("; where memory runs out, take fewer --workers, or a smaller --batch-size")


def test_odd_names_go_through_every_command(tmp_path, capsys):
    """Training, its files, and what the commands print: nothing steers the terminal, and all of it is text."""
    names = ["\u96ea '%s' {0}.png", "line\nbreak.png", "no text \udcff.png", "\x1b]0;title\x07 \u202egpj.png"]
    shown = {"\u96ea '%s' {0}.png", r"line\nbreak.png", r"no text \udcff.png", r"\x1b]0;title\x07 \u202egpj.png"}
    root = tmp_path / "data \x1b[31m"
    for split in ("train", "val"):
        for label in ("cat", "d \udcfe\x9b5n"):
            (root / split / label).mkdir(parents=True)
            for name in names:
                Image.new("RGB", (40, 40)).save(root / split / label / name)
    (root / "val" / "cat" / "broken \x1b[2J.png").write_bytes(b"no image")
    run, stdout, stderr = tmp_path / "run \x1b[32m", tmp_path / "stdout", tmp_path / "stderr"
    options = (*SMALL, "--epochs", "1", "--on-bad-image", "skip", "--out", str(run))
    with open(stdout, "w") as out, open(stderr, "w") as err, redirect_stdout(out), redirect_stderr(err):
        assert main(["finetune", "--data", str(root), *options]) == 0
        assert main(["finetune", "--resume", str(run)]) == 0
        for layout in ([], ["--csv"], ["--json"]):
            assert main(["predict", str(run), str(root), "--skip-broken", *layout]) == 0
        assert main(["evaluate", str(run), "--skip-broken"]) == 0
        assert main(["evaluate", str(run), "--data", str(root / "no\nwhere")]) == 2
        images = [str(root / "val" / "cat" / name) for name in names]
        assert main(["look", str(run), *images, "--blocks", "1", "--out", str(run / "look")]) == 0
    written = [path for path in run.rglob("*") if path.suffix in (".txt", ".csv", ".md", ".html")]
    assert {"bad_images.txt", "report.md", "report.html", "predictions.csv", "metrics.csv"} <= {
        path.name for path in written
    }
    steering = {chr(code) for code in (*range(32), *range(127, 160), 0x202E)} - {"\n", "\r"}  # progress bars return
    for path in (stdout, stderr, *written):
        assert not set(path.read_text(encoding="utf-8")) & steering, path
    for path in (stderr, run / "bad_images.txt"):
        assert r"broken \x1b[2J.png" in path.read_text(encoding="utf-8"), path
    assert r"d \udcfe\x9b5n" in stdout.read_text(encoding="utf-8")
    found = {row[0].rpartition("/")[2] for row in read_predictions(run / "context-0" / "predictions.csv")}
    assert found == shown
