"""Mixed precision on a GPU follows fp32: loss curves of the default task, all of its epochs, within what seeds differ by."""

import pytest
from accelerate.state import AcceleratorState

from tests.curves import assert_same_curve, train
from tests.gpu.problems import DEVICE, on_a_gpu

pytestmark = on_a_gpu
ON_GPU = ("--device", DEVICE, "--workers", "4")


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    AcceleratorState._reset_state(reset_partial_state=True)
    return train(tmp_path_factory.mktemp("fp32") / "run", *ON_GPU)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_the_curve(fp32, tmp_path, amp):
    assert_same_curve(fp32, train(tmp_path / "run", *ON_GPU, "--amp", amp))
