"""What the trainer of segmentation does in a step, in an epoch and in evaluation, one thing at a time."""

import argparse
import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import tv_tensors

from ctxenc.__main__ import main
from ctxenc.commands.segment import add_predict_arguments
from ctxenc.integrations import EncNet
from ctxenc.runs.segment_config import PooledContext
from ctxenc.runs.trained import load_run
from ctxenc.training.checkpoint import read_rows
from ctxenc.training.segmentation import segment_prediction, segment_report, segment_trainer
from ctxenc.training.segmentation.arms import ARMS, arm_configs
from ctxenc.training.segmentation.datasets import Datasets
from ctxenc.training.segmentation.segment_settings import SegmentSettings
from ctxenc.training.segmentation.segment_trainer import share_wrong
from tests.training.small_runs import SEGMENT, make_pairs


class Halves:
    """Images of a dark left half, class 0, and a light right half, class 1; in the last one the classes are swapped."""

    classes = ("dark", "light")

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def pair(self, index):
        image = torch.full((3, 32, 40), 60, dtype=torch.uint8)
        image[:, :, 20:] = 200
        mask = (image[0] > 100).to(torch.uint8)
        return tv_tensors.Image(image), tv_tensors.Mask(1 - mask if index == self.count - 1 else mask)

    def name(self, index):
        return str(index)


class ByBrightness(nn.Module):
    """Stands in for a network: class 1 where the image is light. Its logits are half as large as the image."""

    align_corners = False

    def forward(self, x):
        assert not self.training
        light = nn.functional.avg_pool2d(x.mean(1, keepdim=True), 2)
        return {"out": torch.cat([-light, light], 1)}


def settings_of(**changed):
    usual = {
        **{"data": "halves", "backbone": "test_resnet", "channels": 16, "num_codes": 4, "epochs": 2, "batch_size": 2},
        **{"base_size": 40, "crop_size": 32, "lr": 0.02, "device": "cpu", "aux_weight": 0.3, "se_weight": 0.7},
    }
    return SegmentSettings(**(usual | changed))


def trainer_of(tmp_path, count=4, val=5, **changed):
    settings = settings_of(**changed)
    datasets = Datasets(Halves(count), Halves(val))
    (config,) = arm_configs(settings, list(Halves.classes)).values()
    config = replace(config, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])
    return segment_trainer.SegmentTrainer(config, settings, datasets, tmp_path, 0)


def test_the_rate_follows_poly_at_each_update(tmp_path):
    made = trainer_of(tmp_path)
    made.fit("test")
    rates = [row["lr"] for row in made.progress.rows]  # of the last of two updates an epoch, of four in all
    assert rates == pytest.approx([0.02 * (1 - done / 4) ** 0.9 for done in (1, 3)])


def test_warm_up_begins_low(tmp_path):
    made = trainer_of(tmp_path, warmup_epochs=1)
    assert made.optimizer.param_groups[0]["lr"] == pytest.approx(0.02 / 100)


def test_weights_of_the_losses_and_the_format_are_those_of_the_settings(tmp_path):
    made = trainer_of(tmp_path, channels_last=True)
    assert (made.criterion.aux_weight, made.criterion.se_weight) == (0.3, 0.7)
    assert made.network.reduce[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not made.network.reduce[0].weight.is_contiguous()


def test_each_epoch_draws_anew(tmp_path):
    made = trainer_of(tmp_path)
    made.fit("test")
    assert made.samples.epoch == 1


def test_the_gradient_is_clipped(tmp_path):
    moved = []
    for clip_grad in (None, 1e-9):
        made = trainer_of(tmp_path / str(clip_grad), clip_grad=clip_grad, weight_decay=0.0, epochs=1)
        before = made.network.reduce[0].weight.detach().clone()
        (tmp_path / str(clip_grad)).mkdir()
        made.fit("test")
        moved.append((made.network.reduce[0].weight - before).abs().max().item())
    assert moved[0] > 1e-4
    assert moved[1] < 1e-8


@pytest.mark.parametrize("batch_size", [1, 2])
def test_evaluation_counts_each_pixel_of_each_sample_once(tmp_path, batch_size):
    made = trainer_of(tmp_path, batch_size=batch_size, base_size=80)  # images are resized, masks are not
    made.model = made.network = ByBrightness()
    measures = made.evaluate()
    assert measures["pixel_accuracy"] == pytest.approx(4 / 5)
    assert measures["iou/dark"] == pytest.approx((4 / 5) / (6 / 5))  # right in 4 of 5, wrong both ways in the fifth
    assert measures["mean_iou"] == pytest.approx((measures["iou/dark"] + measures["iou/light"]) / 2)


def test_logits_are_resized_smoothly(tmp_path):
    made = trainer_of(tmp_path)
    made.network = ByBrightness().eval()
    x = torch.randn(1, 3, 32, 40)
    wanted = nn.functional.interpolate(made.network(x)["out"], (48, 60), mode="bilinear", align_corners=False)
    torch.testing.assert_close(made._logits(x, torch.Size((48, 60))), wanted)


def test_photographs_in_pictures_are_those_on_disk(tmp_path):
    made = trainer_of(tmp_path)
    image, mask = made.val[0]
    shown = made._photograph(image, mask.shape)
    assert (shown.int() - Halves(5).pair(0)[0].int()).abs().max() <= 1


def test_means_and_deviations_are_the_backbone_s():
    (config,) = arm_configs(settings_of(backbone="tf_efficientnet_lite0"), ["a", "b"]).values()
    assert config.mean == config.std == [0.5, 0.5, 0.5]


def test_pooling_takes_the_place_of_encoding_and_nothing_else():
    pooled, x = PooledContext(6).eval(), torch.randn(2, 6, 5, 7)
    gate = torch.sigmoid(pooled.project(x).mean((2, 3)) @ pooled.fc.weight.T + pooled.fc.bias)
    out, presence = pooled(x)
    assert presence is None
    torch.testing.assert_close(out, torch.relu(x + x * gate[:, :, None, None]))


def test_the_report_is_of_the_last_epoch():
    (config,) = arm_configs(settings_of(), ["a", "b"]).values()
    rows = [
        {"mean_iou": score, "pixel_accuracy": score, "images_per_s": 10.0, "iou/a": score, "iou/b": 0.0}
        for score in (0.9, 0.25)
    ]
    header, cells = segment_report.table({"encnet": [rows]}, {"encnet": config}, ["a"])
    row = dict(zip(header, cells[0], strict=True))
    assert (row["network"], row["mIoU"], row["pixel accuracy"]) == (ARMS["encnet"][0], "25.0 %", "25.0 %")
    assert (row["mIoU, ambiguous"], row["mIoU, others"]) == ("25.0 %", "0.0 %")


def test_predict_normalises_and_takes_the_likeliest_class(tmp_path, monkeypatch):
    EncNet("test_resnet", 2, channels=16, num_codes=4).save_pretrained(tmp_path / "saved")
    pixels = np.full((20, 30, 3), 255, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "white.png")
    seen = {}

    def stand_in(network, image, **options):
        seen.update(options, image=image)
        left = torch.arange(30).expand(20, 30) < 10
        return torch.stack([left, ~left]).float()[None]

    monkeypatch.setattr(segment_prediction, "predict", stand_in)
    parser = argparse.ArgumentParser()
    add_predict_arguments(parser)
    arguments = [
        tmp_path / "saved",
        tmp_path / "white.png",
        "--out",
        tmp_path / "out",
        "--flip",
        "--crop",
        8,
    ]
    segment_prediction.run(parser.parse_args([*map(str, arguments), "--device", "cpu"]))
    assert (seen["flip"], seen["crop"], seen["scales"]) == (True, 8, [1.0])
    config = load_run(tmp_path / "saved").config
    wanted = (1 - torch.tensor(config.mean)) / torch.tensor(config.std)
    torch.testing.assert_close(seen["image"].mean((1, 2)), wanted)
    mask = np.asarray(Image.open(tmp_path / "out" / "white.mask.png"))
    assert (mask[:, :10] == 0).all()
    assert (mask[:, 10:] == 1).all()
    coloured = np.asarray(Image.open(tmp_path / "out" / "white.mask.png").convert("RGB"))
    assert (coloured[:, 10:] == (128, 0, 0)).all()


def test_the_share_of_an_image_that_is_wrong():
    masks = torch.tensor([[[0, 1], [2, 255]], [[255, 255], [255, 255]], [[1, 1], [1, 1]]])
    predictions = torch.tensor([[[0, 0], [2, 1]], [[0, 1], [0, 1]], [[0, 0], [0, 1]]])
    assert share_wrong(predictions, masks).tolist() == pytest.approx([1 / 3, math.nan, 0.75], nan_ok=True)


def test_each_validation_image_has_its_share(tmp_path):
    pairs = make_pairs(tmp_path / "data")
    command = ["segment", "train", "--data", str(pairs), *SEGMENT, "--epochs", "1", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    arm = tmp_path / "run" / "encnet-0"
    with open(arm / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["name"]).name for row in rows] == ["0.png", "1.png"]
    pixels = [(30 + 4 * number - 1) * 44 for number in range(2)]  # a row of each mask is ignored
    wrong = sum(float(row["wrong"]) * count for row, count in zip(rows, pixels, strict=True)) / sum(pixels)
    assert 1 - wrong == pytest.approx(read_rows(arm / "metrics.csv")[-1]["pixel_accuracy"])
    assert {"confusion.png", "worst.png", "codebooks.png", "epoch-001.png"} == {
        path.name for path in (arm / "pictures").iterdir()
    }
