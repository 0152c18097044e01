"""The measures of segmentation: against NumPy, torchmetrics, and by hand."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score, multiclass_jaccard_index

from ctxenc.training.segmentation.segment_metrics import count_pixels, measure_segmentation

IGNORE = 255
# Class 3 occurs nowhere, class 2 in the predictions alone.
TARGET = torch.tensor([[[0, 0, 1], [1, 1, IGNORE]], [[0, IGNORE, 0], [1, 0, 0]]])
PREDICTED = torch.tensor([[[0, 1, 1], [1, 2, 3]], [[0, 3, 0], [1, 0, 2]]])


def flat(measures, count):
    """The measures with those of the classes in arrays."""
    means = {name: measures[name] for name in ("pixel_accuracy", "mean_iou", "mean_dice")}
    return means | {kind: np.array([measures[f"{kind}/{name}"] for name in range(count)]) for kind in ("iou", "dice")}


def measured(predictions, target, classes=4):
    return flat(measure_segmentation(count_pixels(predictions, target, classes), range(classes)), classes)


def by_numpy(predicted, target, classes):
    """Set by set, class by class."""
    counted = target != IGNORE
    iou, dice = np.full(classes, np.nan), np.full(classes, np.nan)
    for number in range(classes):
        ours, theirs = (predicted == number) & counted, (target == number) & counted
        if ours.any() or theirs.any():
            iou[number] = (ours & theirs).sum() / (ours | theirs).sum()
            dice[number] = 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())
    return {
        "pixel_accuracy": (predicted == target)[counted].mean(),
        "mean_iou": np.nanmean(iou),
        "mean_dice": np.nanmean(dice),
        "iou": iou,
        "dice": dice,
    }


def assert_measures(got, wanted):
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(np.asarray(got[name]), value, rtol=1e-12, err_msg=name)


def test_by_hand():
    nan = math.nan
    iou, dice = [4 / 6, 3 / 5, 0, nan], [8 / 10, 6 / 8, 0, nan]
    wanted = {"pixel_accuracy": 7 / 10, "iou": iou, "dice": dice}
    wanted |= {"mean_iou": sum(iou[:3]) / 3, "mean_dice": sum(dice[:3]) / 3}
    assert_measures(measured(PREDICTED, TARGET), wanted)
    assert_measures(by_numpy(PREDICTED.numpy(), TARGET.numpy(), 4), wanted)  # which the other tests rely on


def test_against_torchmetrics():
    """Its own accuracy, Jaccard index and F score; a class that occurs nowhere is 0 there in the last two."""
    generator = torch.Generator().manual_seed(0)
    preds, target = (torch.randint(0, 6, (4, 31, 33), generator=generator) for _ in range(2))
    target[torch.rand(target.shape, generator=generator) < 0.1] = IGNORE
    for classes in (6, 8):  # two of them occur nowhere
        got, shared = measured(preds, target, classes), {"num_classes": classes, "ignore_index": IGNORE}
        accuracy = multiclass_accuracy(preds, target, average="micro", **shared)
        iou = multiclass_jaccard_index(preds, target, average="none", **shared)
        dice = multiclass_f1_score(preds, target, average="none", **shared)
        assert got["pixel_accuracy"] == pytest.approx(accuracy.item(), rel=1e-6)
        for name, values in (("iou", iou), ("dice", dice)):
            np.testing.assert_allclose(np.nan_to_num(got[name]), values, rtol=1e-6)
            assert got[f"mean_{name}"] == pytest.approx(values[:6].mean().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_several_batches_against_numpy(dtype):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 7, 9, 11, generator=generator)
    target = torch.randint(0, 9, (6, 9, 11), generator=generator)
    target[target > 6] = IGNORE
    predictions = scores.argmax(1)
    parts = [count_pixels(predictions[a:b], target[a:b].to(dtype), 7) for a, b in ((0, 1), (1, 4), (4, 6))]
    wanted = by_numpy(predictions.numpy(), target.numpy(), 7)
    assert_measures(flat(measure_segmentation(sum(parts), range(7)), 7), wanted)


@pytest.mark.parametrize("target", [torch.full((1, 2, 2), IGNORE), torch.zeros(0, 2, 2, dtype=torch.int64)])
def test_nothing_to_count(target):
    for value in measured(torch.zeros_like(target), target).values():
        assert np.isnan(value).all()


def test_counts_are_integers():
    matrix = count_pixels(PREDICTED, TARGET, 4)
    large = 2**24  # fp32 counts no further
    matrix[0, :2] += torch.tensor([large + 1, large])
    # Class 0 has 4 right, 1 taken for 1 and 1 for 2; class 1 has 3 right, 1 taken for 2.
    assert matrix.tolist() == [[large + 5, large + 1, 1, 0], [0, 3, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    measures = measure_segmentation(matrix, "abcd")
    assert [measures["iou/a"], measures["iou/b"]] == pytest.approx([(large + 5) / (2 * large + 7), 3 / (large + 5)])


def test_rows_of_a_log():
    classes = ["sky", "sea", "land", "nothing"]
    rows = measure_segmentation(count_pixels(PREDICTED, TARGET, 4), classes)
    means = ["pixel_accuracy", "mean_iou", "mean_dice"]
    assert all(type(value) is float for value in rows.values())
    assert list(rows) == [*means, *(f"{kind}/{name}" for kind in ("iou", "dice") for name in classes)]
    assert math.isnan(rows["dice/nothing"])
