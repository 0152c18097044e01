"""Calibration, the health of codebooks and a short fine-tune on a GPU. Written on a machine without one."""

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import TensorDataset

import ctxenc
from ctxenc.__main__ import main
from ctxenc.training.checkpoint import read_rows
from ctxenc.training.codebooks import codebook_health
from ctxenc.viz import encoding_blocks
from tests.gpu.problems import DEVICE, on_a_gpu

pytestmark = on_a_gpu


def swapped(device):
    torch.manual_seed(0)
    return ctxenc.patch_se_blocks(timm.create_model("test_efficientnet", num_classes=10).eval().to(device))


def test_calibration_is_as_good_as_on_a_cpu():
    """Codewords may differ where a pixel lies between two, so that what the blocks do is compared, not their weights."""
    batches = torch.randn(96, 3, 64, 64, generator=torch.Generator().manual_seed(0)).split(32)
    networks = [swapped("cpu"), swapped(DEVICE)]
    here, there = (ctxenc.calibrate(network, batches, progress=False) for network in networks)
    assert all(parameter.device.type == "cuda" for parameter in networks[1].parameters())
    for ours, theirs in zip(here.blocks, there.blocks, strict=True):
        assert theirs.gate_r2 == pytest.approx(ours.gate_r2, abs=0.05)
    assert there.agreement == pytest.approx(here.agreement, abs=0.1)


def test_health_is_that_of_a_cpu():
    network = swapped("cpu")
    samples = TensorDataset(torch.randn(32, 3, 64, 64), torch.zeros(32))
    here = codebook_health(Accelerator(cpu=True), network, samples, batch_size=8)
    AcceleratorState._reset_state(reset_partial_state=True)
    there = codebook_health(Accelerator(), network.to(DEVICE), samples, batch_size=8)
    assert [row["block"] for row in there] == list(encoding_blocks(network))
    for row, expected in zip(there, here, strict=True):
        assert row == {name: pytest.approx(value, abs=1e-3) for name, value in expected.items()}


@pytest.mark.parametrize("amp", [None, "bf16", "fp16"])
def test_a_fine_tune_learns_and_goes_on(tmp_path, amp):
    arguments = ["finetune", "--epochs", "2", "--seeds", "1", "--arms", "context", "--device", "cuda"]
    arguments += ["--init", "calibrated", *(["--amp", amp] if amp else [])]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    rows = read_rows(tmp_path / "run" / "context-0" / "metrics.csv")
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert (tmp_path / "run" / "report.html").is_file()
    assert main(["finetune", "--resume", str(tmp_path / "run")]) == 0
