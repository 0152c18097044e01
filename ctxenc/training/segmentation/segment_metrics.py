"""Pixel accuracy, intersection over union and Dice, all from one confusion matrix."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ctxenc.encoding import check_sizes
from ctxenc.integrations.losses import check_ignore_index

MEANS = ("pixel_accuracy", "mean_iou", "mean_dice")
PER_CLASS = ("iou", "dice")


class SegmentationMetrics(Metric):
    """Compute the usual measures of semantic segmentation, over all pixels of all images since the last reset.

    One confusion matrix is the whole state: torchmetrics sums it over processes before computing anything from it.

    Args:
        num_classes: Number of classes.
        ignore_index: Label of the pixels that do not count.

    Raises:
        ValueError: num_classes is not positive.
        TypeError: num_classes or ignore_index is not an integer.
    """

    full_state_update = False  # else forward counts twice
    matrix: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        super().__init__()
        check_sizes("SegmentationMetrics", num_classes=num_classes)
        check_ignore_index("SegmentationMetrics", ignore_index)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.add_state("matrix", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count the pixels of a batch.

        Args:
            preds: Logits or probabilities, (B, classes, H, W), or predicted classes, (B, H, W) integers.
            target: True classes, (B, H, W) integers.

        Raises:
            ValueError: A shape does not fit, or a prediction or a label that counts is no class.
            TypeError: The target holds no integers.
        """
        if target.is_floating_point():
            raise TypeError(f"SegmentationMetrics: target must hold integers, got {target.dtype}")
        scores = preds.is_floating_point()
        wanted = (target.shape[0], self.num_classes, *target.shape[1:]) if scores else tuple(target.shape)
        if target.dim() != 3 or tuple(preds.shape) != wanted:
            raise ValueError(
                f"SegmentationMetrics: preds must have shape (B, {self.num_classes}, H, W) where they are scores, (B, H, W)"
                f" where they are classes, and target (B, H, W), got {tuple(preds.shape)} and {tuple(target.shape)}"
            )
        counted = target.long() != self.ignore_index  # a uint8 label 156 equals -100 in uint8
        classes = (preds.argmax(1) if scores else preds)[counted].long()
        target = target[counted].long()
        for name, labels in (("preds", classes), ("target", target)):
            strange = (labels < 0) | (labels >= self.num_classes)
            if bool(strange.any()):  # torchmetrics would count some of them as pixels of another class
                raise ValueError(
                    f"SegmentationMetrics: {name} must hold classes from 0 to {self.num_classes - 1} where the target is not"
                    f" {self.ignore_index}, got {labels[strange].unique().tolist()}"
                )
        self.matrix += multiclass_confusion_matrix(classes, target, self.num_classes, validate_args=False)

    def compute(self) -> dict[str, Tensor]:
        """The measures of all pixels so far.

        With M[i, j] the number of pixels of class i that were taken for class j: pixel accuracy is the share of the diagonal,
        IoU of a class M[i, i] / (row i + column i - M[i, i]), Dice 2 M[i, i] / (row i + column i).

        Returns:
            "pixel_accuracy", "mean_iou" and "mean_dice", (), and "iou" and "dice", (classes,), in fp64 on the CPU. A class that
            occurs neither in the targets nor in the predictions is NaN and left out of the means; without any pixel all is NaN.
        """
        matrix = self.matrix.cpu().double()  # not every device has fp64, and fp32 counts to 2^24 only
        right = matrix.diagonal()
        both = matrix.sum(0) + matrix.sum(1)
        iou, dice = right / (both - right), 2 * right / both  # 0 / 0 = NaN
        return {
            "pixel_accuracy": right.sum() / matrix.sum(),
            "mean_iou": iou.nanmean(),
            "mean_dice": dice.nanmean(),
            "iou": iou,
            "dice": dice,
        }


def as_floats(measures: Mapping[str, Tensor], classes: Sequence[str] | None = None) -> dict[str, float]:
    """Convert the result of SegmentationMetrics.compute to numbers for a log.

    Args:
        measures: The result of compute().
        classes: Names of the classes, for a row "iou/NAME" and "dice/NAME" each; without names, only the means.

    Returns:
        The means, then the classes; absent classes are NaN, so every row of a log has the same columns.

    Raises:
        ValueError: There are more or fewer names than classes, or two are the same.
    """
    rows = {name: float(measures[name]) for name in MEANS}
    if classes is None:
        return rows
    if len(classes) != len(measures["iou"]) or len(set(classes)) != len(classes):
        raise ValueError(f"as_floats: classes must be {len(measures['iou'])} different names, got {list(classes)}")
    for name in PER_CLASS:
        rows |= {f"{name}/{own}": value for own, value in zip(classes, measures[name].tolist(), strict=True)}
    return rows
