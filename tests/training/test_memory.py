"""Resident memory stays flat over training steps, and over swaps and their undo.

Judged by the slope of the resident set over the second half of the turns, least squares. Before each look at it garbage is
collected and the C library gives back what is free, in which a leak could hide. The slope may be LEAK / 4 bytes a turn at most, and
its standard error LEAK / 8, so that a leak of LEAK bytes a turn, which is tried too, lies six standard errors above what passes.
"""

import ctypes
import gc
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ctxenc
from ctxenc.__main__ import main
from ctxenc.training import loop
from tests.toys import Toy

LEAK = 4096  # bytes a turn that must be seen
SAMPLES = 50
PAGE = os.sysconf("SC_PAGE_SIZE")
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

pytestmark = pytest.mark.skipif(not hasattr(LIBC, "malloc_trim"), reason="needs Linux with glibc")


class Watch:
    """The resident set, sampled at some of the turns; leaks a tensor a turn where it is told to."""

    def __init__(self, turns: int, leaks: bool) -> None:
        self.every, self.leaks = turns // SAMPLES, leaks
        self.turn, self.kept, self.sizes = 0, [], []

    def __call__(self) -> None:
        self.turn += 1
        if self.leaks:
            self.kept.append(torch.zeros(LEAK // 4))
        if self.turn % self.every == 0:
            gc.collect()
            LIBC.malloc_trim(0)
            self.sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE)

    def slope(self) -> tuple[float, float]:
        """Bytes a turn over the second half, and the standard error of that."""
        half = np.array(self.sizes[len(self.sizes) // 2 :], float)
        (rise, _), covariance = np.polyfit(self.every * np.arange(len(half)), half, 1, cov=True)
        return float(rise), float(covariance[0, 0] ** 0.5)

    def is_flat(self) -> bool:
        rise, error = self.slope()
        assert error <= LEAK / 8, f"the measurement is too coarse: {rise:.0f} ± {error:.0f} bytes a turn"
        return rise <= LEAK / 4


@pytest.fixture
def collected():
    """What was there before is no matter of the collector's: looking through all of it takes 0.2 s."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def train(watch: Watch, turns: int, folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch of so many steps: images loaded, clipped gradients, a moving average of the weights."""

    def batches(own):
        for _ in range(turns // len(own.train_loader)):
            for batch in own.train_loader:
                yield batch
                watch()

    monkeypatch.setattr(loop.Loop, "_batches_left", batches)
    tiny = (
        "--model",
        "test_efficientnet",
        "--image-size",
        "32",
        "--batch-size",
        "2",
        "--epochs",
        "1",
        "--arms",
        "context",
    )
    more = ("--model-ema", "--clip-grad", "1", "--smoothing", "sampled", "--device", "cpu", "--threads", "1")
    assert main(["finetune", "--data", str(data), *tiny, *more, "--out", str(folder)]) == 0


def swap(watch: Watch, turns: int) -> None:
    """A model swapped and restored again and again."""
    model = Toy(more=Toy())
    for _ in range(turns):
        ctxenc.patch_se_blocks(model, num_codes=4)
        ctxenc.restore_se_blocks(model)
        watch()


@pytest.mark.parametrize(
    ("turns", "leaks"),
    [(300, False), pytest.param(300, True, marks=pytest.mark.slow), pytest.param(2001, False, marks=pytest.mark.slow)],
)
def test_training_steps(turns, leaks, tmp_path, image_folder, monkeypatch, collected):
    watch = Watch(turns, leaks)
    train(watch, turns, tmp_path / "run", image_folder, monkeypatch)
    assert watch.turn == turns
    assert watch.is_flat() is not leaks, watch.slope()


@pytest.mark.parametrize("leaks", [False, True])
def test_swaps(leaks, collected):
    watch = Watch(500, leaks)
    swap(watch, 500)
    assert watch.is_flat() is not leaks, watch.slope()
