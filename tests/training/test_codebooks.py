"""The health of codebooks in training: what it says of a network, where it is written, and how it is drawn."""

import csv
import math

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from torch.utils.data import TensorDataset

import ctxenc
from ctxenc.training import codebooks
from ctxenc.training.codebooks import COLUMNS, IMAGES, codebook_health, draw_codebooks
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
        block.codewords[2] = 1e3  # where no pixel is
        block.smoothing.copy_(torch.tensor([0.5, 2.0, 1.0, 0.25, 1.0]))
    rows = codebook_health(accelerator, network, samples, batch_size=7)
    assert [row["block"] for row in rows] == list(encoding_blocks(network))
    images = [samples[round(number * 99 / (IMAGES - 1))][0] for number in range(IMAGES)]
    for row in rows:
        usage = codebook_usage(network, images, row["block"])
        assert row["dead"] == len(usage.dead)
        assert (row["entropy"], row["pixel_entropy"]) == pytest.approx((usage.entropy, usage.pixel_entropy), abs=1e-5)
    assert (rows[-1]["dead"], rows[-1]["codewords"]) == (1, 5)
    assert (rows[-1]["smoothing_min"], rows[-1]["smoothing_max"]) == (0.25, 2.0)


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
        dict(zip(COLUMNS, (epoch, block, 8, dead, 2.5, 1.5, 0.1, 0.9), strict=True))
        for epoch in (1, 2)
        for block, dead in (("first", 0), ("last", epoch))
    ]
    dead, entropy, pixel, smoothing = draw_codebooks(rows).axes
    assert {line.get_label(): list(line.get_ydata()) for line in dead.get_lines()} == {
        "first": [0, 0],
        "last": [12.5, 25],
    }
    assert [set(line.get_ydata()) for line in (*entropy.get_lines(), *pixel.get_lines())] == [{2.5}] * 2 + [{1.5}] * 2
    assert sorted(line.get_ydata()[0] for line in smoothing.get_lines()) == [0.1, 0.1, 0.9, 0.9]
    assert "of 3" in entropy.get_title()


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
