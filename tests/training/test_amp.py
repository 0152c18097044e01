"""Mixed precision follows fp32: loss curves of the default task, with five seeds, within what seeds differ by.

This sees what training as a whole does, not a fault of the block: turning its gradient in half precision round leaves the
curve where it was. That is for the tests of the operator and of the block under autocast.
"""

import itertools

import numpy as np
import pytest
from accelerate.optimizer import AcceleratedOptimizer

from tests.curves import assert_same_curve, fp16_on_the_cpu, train

SHORT = ("--epochs", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    return train(tmp_path_factory.mktemp("fp32") / "run", *SHORT)


@pytest.mark.figures
@pytest.mark.nightly  # the class takes minutes, fp16 most of them
class TestCurves:
    def test_bf16(self, fp32, tmp_path):
        bf16 = train(tmp_path / "run", *SHORT, "--amp", "bf16")
        assert not np.array_equal(bf16, fp32)
        assert_same_curve(fp32, bf16)

    def test_fp16(self, fp32, tmp_path, monkeypatch):
        fp16_on_the_cpu(monkeypatch, 2.0**16)
        fp16 = train(tmp_path / "run", *SHORT)
        assert not np.array_equal(fp16, fp32)
        assert_same_curve(fp32, fp16)

    def test_steps_left_out_are_told(self, fp32, tmp_path, monkeypatch):
        """As by a scaler that finds no scale: every other one."""
        real, count = AcceleratedOptimizer.step, itertools.count()
        monkeypatch.setattr(AcceleratedOptimizer, "step", lambda own: real(own) if next(count) % 2 else None)
        with pytest.raises(AssertionError, match="deviations apart"):
            assert_same_curve(fp32, train(tmp_path / "run", *SHORT, "--amp", "bf16"))


def test_the_criterion_tells_a_shift_and_a_stray_seed():
    exact = 1 + np.linspace(-0.1, 0.1, 5)[:, None] * np.ones(3)
    assert_same_curve(exact, exact + 0.05)
    stray = exact.copy()
    stray[2, 1] += 0.11
    for other in (exact + 0.09, stray, exact * np.nan):
        with pytest.raises(AssertionError, match="deviations apart"):
            assert_same_curve(exact, other)
