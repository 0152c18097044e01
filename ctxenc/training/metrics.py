"""Compute class-balanced accuracy and intervals."""

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix


def balanced_accuracy(targets: Tensor, predictions: Tensor, num_classes: int) -> float:
    """Return the mean over classes of their accuracies.

    Classes without a sample do not count.

    Args:
        targets: True classes, (N,) int64.
        predictions: Predicted classes, (N,) int64.
        num_classes: Number of classes.

    Returns:
        A share in [0, 1].

    Raises:
        ValueError: There is no sample.
    """
    if not len(targets):
        raise ValueError("balanced_accuracy: targets must hold at least one sample, got none")
    matrix = multiclass_confusion_matrix(predictions, targets, num_classes).double()
    support = matrix.sum(dim=1)
    return float((matrix.diagonal() / support)[support > 0].mean())


def bootstrap(targets: Tensor, scores: Tensor, draws: int = 2000, seed: int = 0) -> Tensor:
    """Return class-balanced means of `scores` over samples redrawn, with replacement, inside each class.

    For the interval of the difference of two models on the same samples, pass the difference of their scores.

    Args:
        targets: True classes, (N,) int64.
        scores: One number per sample, (N,), for instance the share of seeds that were right.
        draws: Number of resamplings.
        seed: Seed of the draws.

    Returns:
        (draws,) float64.
    """
    generator = torch.Generator().manual_seed(seed)
    means = []
    for target in targets.unique():
        own = scores[targets == target].double()
        picks = torch.randint(len(own), (draws, len(own)), generator=generator)
        means.append(own[picks].mean(dim=1))
    return torch.stack(means).mean(dim=0)


def interval(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Return the central `level` of `values`, from quantile to quantile."""
    tail = (1 - level) / 2
    low, high = values.quantile(torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
    return low, high


def interval_over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of Student's t about the mean of two or more values, one a seed."""
    from scipy.stats import t as student  # it takes half a second to import

    mean = statistics.mean(values)
    reach = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean - reach, mean + reach
