"""Two processes under torchrun: one tells of a mistake, and what is stopped and resumed is exact."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.training.small_runs import SMALL, assert_same_run, checkpoints

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ctxenc", "finetune")


def launched(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *TORCHRUN, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_mistake_is_told_once(tmp_path):
    process = launched("--data", tmp_path / "nowhere", *SMALL, "--out", tmp_path / "run")
    _, err = process.communicate(timeout=240)
    assert process.returncode
    assert err.count("ctxenc: error: no image folder at") == 1, err


@pytest.mark.slow
def test_stopped_and_resumed(tmp_path, image_folder):
    more = ("--smoothing", "sampled", "--model-ema", "--batch-size", "1", "--epochs", "4", "--model", "test_resnet")
    more += ("--image-size", "64")  # else the last map is one pixel, which a norm over one image refuses
    arguments = ("--data", image_folder, *SMALL, *more, "--fill-empty", "--checkpoint-every", 1)
    process = launched(*arguments, "--out", tmp_path / "whole")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    process = launched(*arguments, "--out", tmp_path / "cut")
    folder = tmp_path / "cut" / "context-0" / "checkpoints"
    while process.poll() is None and not any(folder.glob("epoch-00001-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=240)
    assert process.returncode
    assert "to go on: ctxenc finetune --resume" in err
    assert checkpoints(folder.parent)[-1] < "epoch-00004-step-0000000"
    process = launched("--resume", tmp_path / "cut")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert_same_run(tmp_path / "whole", tmp_path / "cut", ["context-0"])
