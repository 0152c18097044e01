"""Mixed precision follows fp32: loss curves of the default task, with five seeds, within what seeds differ by."""

import numpy as np
import pytest
import torch

from ctxenc.kernels import torch_encode
from tests.curves import assert_same_curve, fp16_on_the_cpu, train

SHORT = ("--epochs", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    return train(tmp_path_factory.mktemp("fp32") / "run", *SHORT)


@pytest.mark.slow
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

    def test_a_gradient_lost_in_half_precision_is_told(self, fp32, tmp_path, monkeypatch):
        """One that the curve shows: features get no gradient where they are half."""
        real = torch_encode._backward

        def backward(x, *arguments, **keywords):
            dx, *others = real(x, *arguments, **keywords)
            return -dx if x.dtype == torch.bfloat16 else dx, *others

        monkeypatch.setattr(torch_encode, "_backward", backward)
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
