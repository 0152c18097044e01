"""Pixel accuracy, intersection over union and Dice, all from one confusion matrix."""

from collections.abc import Sequence

from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ctxenc.training.segmentation.pairs import IGNORED


def count_pixels(predictions: Tensor, masks: Tensor, num_classes: int) -> Tensor:
    """Count the pixels by true class (row) and predicted class (column); leave out those IGNORED in the mask.

    Args:
        predictions: Predicted classes, (B, H, W) integers below num_classes.
        masks: True classes, (B, H, W) integers below num_classes, or IGNORED.
        num_classes: Number of classes.

    Returns:
        (num_classes, num_classes) int64. Matrices of several batches or processes may be added.
    """
    # `Pairs` has checked the values of the masks.
    return multiclass_confusion_matrix(predictions, masks, num_classes, ignore_index=IGNORED, validate_args=False)


def measure_segmentation(matrix: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """Return the usual measures of semantic segmentation from the pixel counts of `count_pixels`.

    With M[i, j] the number of pixels of class i predicted as class j: pixel accuracy is the share of the diagonal, IoU of a class
    M[i, i] / (row i + column i - M[i, i]), Dice 2 M[i, i] / (row i + column i).

    Args:
        matrix: (classes, classes) int64.
        classes: Names of the classes, all different.

    Returns:
        "pixel_accuracy", "mean_iou", "mean_dice", and "iou/NAME" and "dice/NAME" of each class. A class that occurs neither in the
        masks nor in the predictions is NaN and left out of the means; without any pixel all is NaN.
    """
    matrix = matrix.cpu().double()  # not every device has fp64, and fp32 counts to 2^24 only
    right, both = matrix.diagonal(), matrix.sum(0) + matrix.sum(1)
    iou, dice = right / (both - right), 2 * right / both  # 0 / 0 = NaN
    means = {"pixel_accuracy": right.sum() / matrix.sum(), "mean_iou": iou.nanmean(), "mean_dice": dice.nanmean()}
    measures = {name: float(value) for name, value in means.items()}
    for name, values in (("iou", iou), ("dice", dice)):
        measures |= {f"{name}/{own}": value for own, value in zip(classes, values.tolist(), strict=True)}
    return measures
