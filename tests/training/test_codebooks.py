"""The health of codebooks in training: what it says of a network, where it is written, and how it is drawn."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from torch.utils.data import TensorDataset

import ctxenc
from ctxenc.training import codebooks
from ctxenc.training.checkpoint import write_rows
from ctxenc.training.codebooks import (
    COLUMNS,
    FILE,
    IMAGES,
    codebook_health,
    draw_codebooks,
    name_idle_codebooks,
)
from ctxenc.training.data import LEFT_OUT
from ctxenc.training.segmentation.pairs import IGNORED
from ctxenc.viz import codebook_usage, encoding_blocks


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=3)
    return ctxenc.patch_se_blocks(model, num_codes=5)


@pytest.fixture
def samples():
    return TensorDataset(torch.randn(100, 3, 32, 32), torch.zeros(100))


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_it_is_what_viz_says_of_these_images(network, samples, accelerator):
    with torch.no_grad():
        block = list(encoding_blocks(network).values())[-1].encoding
        block.codewords.mul_(0.03)[2] = 1e3  # where no pixel is
        block.smoothing.copy_(torch.tensor([10000.0, 14000.0, 10000.0, 9000.0, 10000.0]))
    rows = codebook_health(accelerator, network, samples, batch_size=7)
    assert [row["block"] for row in rows] == list(encoding_blocks(network))
    images = [samples[round(number * 99 / (IMAGES - 1))][0] for number in range(IMAGES)]
    for row in rows:
        usage = codebook_usage(network, images, row["block"])
        assert row["dead"] == len(usage.dead)
        numbers = (row["entropy"], row["pixel_entropy"], row["bits"])
        assert numbers == pytest.approx((usage.entropy, usage.pixel_entropy, usage.bits), abs=1e-5)
    assert rows[-1]["bits"] > 0.01  # of pixels that differ
    assert (rows[-1]["dead"], rows[-1]["codewords"]) == (1, 5)
    assert (rows[-1]["smoothing_min"], rows[-1]["smoothing_max"]) == (9000, 14000)


def test_processes_share_the_images_and_add_up(network, samples, accelerator, monkeypatch):
    whole, found = codebook_health(accelerator, network, samples, batch_size=8), []
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    monkeypatch.setattr(codebooks, "gather_object", lambda own: found.extend(own) or found)
    for rank in range(3):
        monkeypatch.setattr(Accelerator, "process_index", rank)
        rows = codebook_health(accelerator, network, samples, batch_size=8)
    first = next(iter(encoding_blocks(network)))
    pixels = [sum(each.pixels for each in part[first]) for part in found]
    assert [count / sum(pixels) for count in pixels] == [22 / 64, 21 / 64, 21 / 64]
    for row, expected in zip(rows, whole, strict=True):
        assert row == {name: pytest.approx(value, abs=1e-6) for name, value in expected.items()}


def test_fewer_images_than_the_sample(network, accelerator):
    few = TensorDataset(torch.randn(2, 3, 32, 32), torch.zeros(2))
    assert all(math.isfinite(row["entropy"]) for row in codebook_health(accelerator, network, few, batch_size=64))


def test_broken_images_do_not_count(network, samples, accelerator):
    for block in encoding_blocks(network).values():
        block.encoding.smoothing.data.fill_(50.0)  # far from all alike
    images, blank = samples.tensors[0][:6], torch.zeros(2, 3, 32, 32)
    whole = codebook_health(accelerator, network, TensorDataset(images, torch.full((6,), 255)), batch_size=2)
    classes = TensorDataset(torch.cat([blank, images]), torch.tensor([-1, -1, 255, 255, 255, 255, 255, 255]))
    masks = torch.full((8, 4, 4), 255)
    masks[2:, 0] = 1
    for some in (classes, TensorDataset(torch.cat([blank, images]), masks)):
        rows = codebook_health(accelerator, network, some, batch_size=2)
        assert [row["entropy"] for row in rows] == pytest.approx([row["entropy"] for row in whole])
    everything = codebook_health(accelerator, network, TensorDataset(classes.tensors[0], torch.zeros(8)), batch_size=2)
    assert [row["entropy"] for row in everything] != pytest.approx([row["entropy"] for row in whole])


@pytest.mark.parametrize("target", [torch.full((4, 4), IGNORED), LEFT_OUT])
def test_where_no_image_counts_there_is_no_row(network, samples, accelerator, target):
    """As of masks that are ignored throughout."""
    nothing = [(samples[number][0], target) for number in range(3)]
    assert codebook_health(accelerator, network, nothing, batch_size=2) == []


def test_nothing_is_left_behind(network, samples, accelerator):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    codebook_health(accelerator, network, samples, batch_size=8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_a_network_without_codebooks_has_no_row(samples, accelerator):
    assert codebook_health(accelerator, timm.create_model("test_efficientnet"), samples, batch_size=8) == []


def test_the_figure(network):
    rows = [
        dict(zip(COLUMNS, (epoch, block, 8, dead, 2.5, 1.5, 1.0, 0.1, 0.9), strict=True))
        for epoch in (1, 2)
        for block, dead in (("first", 0), ("last", epoch))
    ]
    dead, entropy, apart, smoothing = draw_codebooks(rows).axes
    assert {line.get_label(): list(line.get_ydata()) for line in dead.get_lines()} == {
        "first": [0, 0],
        "last": [12.5, 25],
    }
    assert [set(line.get_ydata()) for line in entropy.get_lines()] == [{2.5}] * 2
    assert [set(line.get_ydata()) for line in apart.get_lines()] == [{1.0}] * 2 + [{0.1}]  # the last is dashed
    assert apart.get_ylim() == (0, 1.05)
    assert sorted(line.get_ydata()[0] for line in smoothing.get_lines()) == [0.1, 0.1, 0.9, 0.9]
    assert "of 3" in entropy.get_title()


def write_bits(folder: Path, *rows: tuple[str, float]) -> None:
    """A codebooks.csv in which each block has these bits, epoch after epoch."""
    folder.mkdir()
    table = [{"epoch": 1, "block": block, "codewords": 1 + (block != "one"), "bits": bits} for block, bits in rows]
    write_rows(folder / FILE, ("epoch", "block", "codewords", "bits"), table)


def test_a_block_that_tells_less_than_a_tenth_of_a_bit_at_last_is_named(tmp_path):
    write_bits(
        tmp_path / "a-0",
        ("first", 0.5),
        ("second", 0.01),
        ("third", 0.1),
        ("first", 0.02),
        ("second", 0.6),
        ("third", 0.1),
        ("one", 0.0),  # codeword, which can tell nothing
    )
    (tmp_path / "se-0").mkdir()  # has no codebook
    (line,) = name_idle_codebooks(tmp_path, {"se": "SE", "a": "Arm"}, [0], started="paper")
    assert line.startswith(
        "Arm: after the last epoch the codebook of first (0.02) tells less than 0.1 bits about a pixel. "
    )
    assert line.endswith("; try --codebook-start spread.")
    (other,) = name_idle_codebooks(tmp_path, {"a": "Arm"}, [0], started="calibrated")
    assert other.endswith("SE's mean over the pixels.")


def test_each_arm_has_one_sentence_over_its_seeds(tmp_path):
    write_bits(tmp_path / "a-0", ("first", 0.02), ("second", 0.6), ("third", 0.0))
    write_bits(tmp_path / "a-1", ("first", 0.3), ("second", 0.4), ("third", 0.001))
    write_bits(tmp_path / "b-0", ("first", 0.01))
    lines = name_idle_codebooks(tmp_path, {"a": "A", "b": "B"}, [0, 1], started="spread")
    assert [line.partition(" tells")[0] for line in lines] == [
        "A: after the last epoch the codebook of first (0.02 to 0.30), third (0.00)",
        "B: after the last epoch the codebook of first (0.01)",
    ]


def test_a_run_writes_it_of_each_epoch(finetune, tmp_path, image_folder):
    assert finetune("--out", tmp_path / "run", "--epochs", 2, "--num-codes", 4)[0] == 0
    arm = tmp_path / "run" / "context-0"
    with open(arm / "codebooks.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    model = ctxenc.load(arm, checkpoint="last")
    blocks = list(encoding_blocks(model))
    assert [(row["epoch"], row["block"]) for row in rows] == [(epoch, block) for epoch in "12" for block in blocks]
    smoothing = [block.encoding.smoothing for block in encoding_blocks(model).values()]
    assert [float(row["smoothing_max"]) for row in rows[len(blocks) :]] == [each.max().item() for each in smoothing]
    assert np.all(np.array([float(row["entropy"]) for row in rows]) <= 2 + 1e-9)
    for name in ("report.html", "report.md"):
        text = (tmp_path / "run" / name).read_text()
        for row in rows[len(blocks) :]:
            assert float(row["bits"]) < 0.1
            assert f"{row['block']} ({float(row['bits']):.2f})" in text
