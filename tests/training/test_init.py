"""How the blocks of a fine-tuned network begin: calibrated, neutral or random."""

import re

import pytest
import torch
from PIL import Image

import ctxenc
from ctxenc.__main__ import main
from ctxenc.training.console import UserError
from ctxenc.training.settings import resolve
from tests.training.small_runs import SMALL, assert_same_run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of 12 noisy images each, bright and dark."""
    folder = tmp_path_factory.mktemp("data") / "tones"
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("val", 2)):
        for name, low in (("bright", 120), ("dark", 0)):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = low + torch.randint(130, (40, 40, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture
def finetune(images, tmp_path):
    def run(out, *arguments):
        command = ["finetune", "--data", str(images), *SMALL, "--num-codes", "4", "--epochs", "1", "--lr", "1e-9"]
        assert main([*command, "--warmup-epochs", "0", "--out", str(tmp_path / out), *map(str, arguments)]) == 0
        return tmp_path / out

    return run


def test_each_start_is_what_it_says(finetune):
    """At a learning rate of next to nothing the weights are those of the start."""
    biases, reports = {}, {}
    for start in ("calibrated", "neutral", "random"):
        run = finetune(start, "--init", start)
        blocks = [
            each for each in ctxenc.load(run / "context-0", checkpoint="last").modules() if hasattr(each, "rd_channels")
        ]
        biases[start] = torch.cat([block.fc.weight.flatten() for block in blocks])
        report = run / "context-0" / "calibration.txt"
        reports[start] = report.read_text() if report.exists() else ""
    assert reports["random"] == ""
    assert reports["calibrated"].startswith("calibrated start, 18 images fitted, 6 held out\n")
    assert re.search(r"blocks\.3\.0\.se +-?\d\.\d+", reports["calibrated"])
    assert reports["neutral"].startswith("neutral start")
    assert biases["neutral"].abs().max() < 1e-6
    assert biases["calibrated"].abs().max() > 1e-3
    assert not torch.allclose(biases["calibrated"], biases["random"], atol=1e-3)


def test_the_se_arm_is_left_alone_and_equal_runs_are_equal(finetune):
    one = finetune("one", "--init", "calibrated", "--arms", "both")
    other = finetune("other", "--init", "calibrated", "--arms", "both")
    assert not (one / "se-0" / "calibration.txt").exists()
    assert_same_run(one, other, ["se-0", "context-0"])


def test_pretrained_weights_are_calibrated_to_unless_told_otherwise():
    assert resolve({}).start == "random"
    assert resolve({"pretrained": True}).start == "calibrated"
    assert resolve({"pretrained": True, "init": "random"}).start == "random"
    with pytest.raises(UserError, match="--init must be calibrated, neutral, random, got warm"):
        resolve({"init": "warm"})


def test_too_few_images(image_folder, tmp_path, capsys):
    """Six, and a quarter of them held out, are enough; a network without anything to hold out is not."""
    folder = tmp_path / "few"
    for split in ("train", "val"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(folder / split / name / "0.png")
    command = [
        "finetune",
        "--data",
        str(folder),
        *SMALL,
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
        "--init",
        "calibrated",
    ]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "--init calibrated: calibrate: batches must hold two images to fit" in capsys.readouterr().err
