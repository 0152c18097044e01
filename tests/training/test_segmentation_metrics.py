"""The measures of segmentation: against NumPy, by hand, and over two processes."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score, multiclass_jaccard_index

from ctxenc.training.segmentation.segment_metrics import SegmentationMetrics, as_floats

IGNORE = 255
# Class 3 occurs nowhere, class 2 in the predictions alone.
TARGET = torch.tensor([[[0, 0, 1], [1, 1, IGNORE]], [[0, IGNORE, 0], [1, 0, 0]]])
PREDICTED = torch.tensor([[[0, 1, 1], [1, 2, 3]], [[0, 3, 0], [1, 0, 2]]])


def measured(preds, target, classes=4, **settings):
    metrics = SegmentationMetrics(classes, **settings)
    metrics.update(preds, target)
    return metrics.compute()


def by_numpy(predicted, target, classes, ignore_index=IGNORE):
    """Set by set, class by class."""
    counted = target != ignore_index
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
        assert got["pixel_accuracy"].item() == pytest.approx(accuracy.item(), rel=1e-6)
        for name, values in (("iou", iou), ("dice", dice)):
            torch.testing.assert_close(got[name].nan_to_num().float(), values)
            assert got[f"mean_{name}"].item() == pytest.approx(values[:6].mean().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_several_batches_against_numpy(dtype):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 7, 9, 11, generator=generator)
    target = torch.randint(0, 9, (6, 9, 11), generator=generator)
    target[target > 6] = IGNORE
    metrics = SegmentationMetrics(7)
    for start, end in ((0, 1), (1, 4), (4, 6)):
        metrics.update(scores[start:end], target[start:end].to(dtype))
    wanted = by_numpy(scores.argmax(1).numpy(), target.numpy(), 7)
    assert_measures(metrics.compute(), wanted)
    metrics.reset()
    metrics.update(scores.argmax(1).to(dtype), target)
    assert_measures(metrics.compute(), wanted)


@pytest.mark.parametrize("ignore_index", [-100, 0, 1])
def test_any_label_can_be_ignored(ignore_index):
    target = TARGET.where(TARGET != IGNORE, ignore_index)
    wanted = by_numpy(PREDICTED.numpy(), target.numpy(), 4, ignore_index)
    assert_measures(measured(PREDICTED, target, ignore_index=ignore_index), wanted)


def test_a_uint8_label_is_not_taken_for_a_negative_one():
    target = torch.full((1, 2, 2), 156, dtype=torch.uint8)  # -100 in eight bits
    assert measured(target, target, 157, ignore_index=-100)["pixel_accuracy"] == 1


@pytest.mark.parametrize("target", [torch.full((1, 2, 2), IGNORE), torch.zeros(0, 2, 2, dtype=torch.int64)])
def test_nothing_to_count(target):
    for value in measured(torch.zeros_like(target), target).values():
        assert value.isnan().all()


def test_one_state_of_integers():
    metrics = SegmentationMetrics(4)
    assert set(metrics.metric_state) == {"matrix"}
    large = 2**24  # fp32 counts no further
    metrics.matrix[0, :2] += torch.tensor([large + 1, large])
    metrics.update(PREDICTED, TARGET)
    # Class 0 gains 4 right, 1 taken for 1 and 1 for 2; class 1 gains 3 right, 1 taken for 2.
    assert metrics.matrix.tolist() == [[large + 5, large + 1, 1, 0], [0, 3, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    wanted = [(large + 5) / (2 * large + 7), 3 / (large + 5)]
    np.testing.assert_allclose(metrics.compute()["iou"][:2], wanted, rtol=1e-12)


def test_forward_gives_the_batch_and_counts_it_once():
    metrics = SegmentationMetrics(4)
    first = metrics(PREDICTED[:1], TARGET[:1])
    assert_measures(first, by_numpy(PREDICTED[:1].numpy(), TARGET[:1].numpy(), 4))
    metrics(PREDICTED[1:], TARGET[1:])
    assert_measures(metrics.compute(), by_numpy(PREDICTED.numpy(), TARGET.numpy(), 4))


def test_the_states_of_processes_are_added_up():
    """As torchmetrics does it, with a gathering that stands for the second process."""
    own, other = SegmentationMetrics(4), SegmentationMetrics(4)
    own.update(PREDICTED[:1], TARGET[:1])
    other.update(PREDICTED[1:], TARGET[1:])
    own.distributed_available_fn = lambda: True
    own.dist_sync_fn = lambda state, group=None: [state, other.matrix]
    assert_measures(own.compute(), by_numpy(PREDICTED.numpy(), TARGET.numpy(), 4))


def _measure_own_image(rank, store, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save(measured(PREDICTED[rank : rank + 1], TARGET[rank : rank + 1]), f"{results}{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # each process imports torch anew
def test_two_processes_count_together(tmp_path):
    """Each sees one image; both get the measures of both."""
    torch.multiprocessing.spawn(_measure_own_image, (str(tmp_path / "store"), str(tmp_path / "results")), nprocs=2)
    for rank in range(2):
        got = torch.load(tmp_path / f"results{rank}")
        assert_measures(got, by_numpy(PREDICTED.numpy(), TARGET.numpy(), 4))


def test_as_floats():
    measures = measured(PREDICTED, TARGET)
    means = as_floats(measures)
    assert list(means) == ["pixel_accuracy", "mean_iou", "mean_dice"]
    rows = as_floats(measures, ["sky", "sea", "land", "nothing"])
    assert all(type(value) is float for value in rows.values())
    assert list(rows) == [
        *means,
        *(f"{name}/{own}" for name in ("iou", "dice") for own in ("sky", "sea", "land", "nothing")),
    ]
    assert (
        {name: rows[name] for name in means}
        == means
        == pytest.approx({"pixel_accuracy": 7 / 10, "mean_iou": (4 / 6 + 3 / 5) / 3, "mean_dice": (8 / 10 + 6 / 8) / 3})
    )
    assert rows["iou/sea"] == pytest.approx(3 / 5)
    assert rows["dice/sea"] == pytest.approx(6 / 8)
    assert math.isnan(rows["dice/nothing"])


@pytest.mark.parametrize("classes", [["a", "b", "c"], ["a", "b", "c", "a"]])
def test_names_are_checked(classes):
    with pytest.raises(ValueError, match="as_floats: classes must be 4 different names, got"):
        as_floats(measured(PREDICTED, TARGET), classes)


@pytest.mark.parametrize(
    ("preds", "target", "error", "text"),
    [
        (PREDICTED, TARGET + 3, ValueError, r"target must hold classes from 0 to 3 where .* not 255, got \[4, 258\]"),
        (PREDICTED, TARGET.where(TARGET > 0, -1), ValueError, r"target must hold .*, got \[-1\]"),
        (PREDICTED + 3, TARGET, ValueError, r"preds must hold .*, got \[4, 5\]"),
        (PREDICTED - 1, TARGET, ValueError, r"preds must hold .*, got \[-1\]"),
        (PREDICTED[:1], TARGET, ValueError, r"got \(1, 2, 3\) and \(2, 2, 3\)"),
        (PREDICTED[0], TARGET[0], ValueError, r"target \(B, H, W\), got \(2, 3\) and \(2, 3\)"),
        (torch.zeros(2, 5, 2, 3), TARGET, ValueError, r"preds must have shape \(B, 4, H, W\) .*, got \(2, 5, 2, 3\)"),
        (PREDICTED, TARGET.float(), TypeError, "SegmentationMetrics: target must hold integers, got torch.float32"),
    ],
)
def test_batches_are_checked_before_they_count(preds, target, error, text):
    metrics = SegmentationMetrics(4)
    with pytest.raises(error, match=text):
        metrics.update(preds, target)
    assert not metrics.matrix.any()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0,), ValueError, "SegmentationMetrics: num_classes must be a positive integer, got 0"),
        (("4",), TypeError, "SegmentationMetrics: num_classes must be a positive integer, got '4'"),
        ((4, None), TypeError, "SegmentationMetrics: ignore_index must be an integer, got None"),
    ],
)
def test_settings_are_checked(arguments, error, text):
    with pytest.raises(error, match=text):
        SegmentationMetrics(*arguments)
