"""Images of every kind: what is read of them, and what is refused."""

import errno
import subprocess
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from PIL import Image

from ctxenc.__main__ import main
from ctxenc.training import data
from ctxenc.training.bad_images import BrokenImageError
from ctxenc.training.checkpoint import read_predictions
from ctxenc.training.console import UserError
from ctxenc.training.segmentation import transforms
from ctxenc.training.segmentation.pairs import Pairs
from ctxenc.training.segmentation.settings import SegmentSettings
from ctxenc.training.settings import Settings
from tests.training.odd_images import READ, REFUSED
from tests.training.small_runs import DATA_CONFIG, SMALL


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
            with data.seeded(0):
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
            with data.seeded(seed):
                image, mask = transforms.train_transform(settings, *colours)(*pair)
            assert (image.shape, mask.shape) == ((3, 32, 32), (32, 32))
            assert image.isfinite().all()
            assert set(mask.unique().tolist()) <= {1, 255}
        image, mask = transforms.eval_transform(settings, *colours)(*pair)
        assert max(image.shape[1:]) == 40
        assert torch.equal(mask, torch.ones(size[::-1], dtype=torch.int64))


def test_odd_names_go_through_every_command(tmp_path, capsys):
    """Training, its table of predictions, and what predict prints."""
    names = ["\u96ea '%s' {0}.png", "line\nbreak.png", "no text \udcff.png"]
    for split in ("train", "val"):
        for label in ("cat", "d \udcfe"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for name in names:
                Image.new("RGB", (40, 40)).save(tmp_path / "data" / split / label / name)
    run, stdout = tmp_path / "run", tmp_path / "stdout"
    with open(stdout, "w", encoding="utf-8") as file, redirect_stdout(file):
        assert main(["finetune", "--data", str(tmp_path / "data"), *SMALL, "--epochs", "1", "--out", str(run)]) == 0
        assert main(["finetune", "--resume", str(run)]) == 0
        for layout in ([], ["--csv"], ["--json"]):
            assert main(["predict", str(run), str(tmp_path / "data"), *layout]) == 0
        assert main(["evaluate", str(run)]) == 0
    assert b"no text \\udcff.png" in stdout.read_bytes()
    found = {row[0].rpartition("/")[2] for row in read_predictions(run / "context-0" / "predictions.csv")}
    assert found == {names[0], "line\\nbreak.png", "no text \\udcff.png"}
