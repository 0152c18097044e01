"""Define losses for semantic segmentation: EncNet's, with the presence of classes as a second target, and Dice.

EncNet: Context Encoding for Semantic Segmentation (arXiv 1803.08904), sections 3.1 (Semantic Encoding Loss) and 3.2.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxenc.encoding import check_sizes

OUTPUTS = ("out", "aux", "se")
SE_LOSSES = ("bce", "mse")


def presence(target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Return which classes have a pixel in each mask: the target of EncNet's SE-loss (arXiv 1803.08904, section 3.1).

    Args:
        target: masks of class indices, (B, H, W), of any integer dtype.
        num_classes: number of classes.
        ignore_index: label of the ignored pixels.

    Returns:
        (B, num_classes) bool, on the target's device.

    Raises:
        ValueError: target is not (B, H, W), or num_classes is not positive.
        TypeError: target does not hold integers, or num_classes or ignore_index is not an integer.
        RuntimeError: a label is neither a class nor ignore_index (on a CPU; on a GPU a device assertion fails, as in
            torch's cross entropy).
    """
    check_sizes("presence", num_classes=num_classes)
    check_ignore_index("presence", ignore_index)
    _check_masks("presence", target)
    slots = _index_slots(target, num_classes, ignore_index).flatten(1)
    present = torch.zeros(target.shape[0], num_classes + 1, dtype=torch.bool, device=target.device)
    return present.scatter_(1, slots, True)[:, :num_classes]


class EncNetLoss(nn.Module):
    """Add pixel cross entropy, the auxiliary head's cross entropy and the SE-loss: the training loss of EncNet.

    The SE-loss predicts the classes of the image from the encoding alone, so small objects weigh as much as large ones.
    Ignored pixels count in no term: cross entropy is the mean over the labelled pixels, the SE-loss the mean over the
    images with a labelled pixel. Without labelled pixels the loss and its gradients are 0.

    Args:
        aux_weight: weight of the auxiliary head's cross entropy. 0 skips it.
        se_weight: weight of the SE-loss; 0.2 was the best of five in the paper. 0 skips it.
        ignore_index: label of the ignored pixels.
        class_weight: a weight for each class in both cross entropies, as torch's `weight`.
        se_loss: "bce", binary cross entropy, or "mse", the squared error of the sigmoid.
        label_smoothing: of both cross entropies, as in torch.

    Shape:
        A dict of logits, "out" (B, classes, H, W) and, if the network has them, "aux" (the same) and "se" (B, classes),
        with a target (B, H, W) of class indices, to a scalar, fp32 or fp64.

    Raises:
        ValueError: a weight is negative or not finite, class_weight is not one-dimensional, label_smoothing is not in
            [0, 1], or se_loss is unknown; in forward, a key is missing or a shape does not match.
        TypeError: an argument has the wrong type; in forward, outputs is not a dict or target does not hold integers.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        aux_weight: float = 0.2,
        se_weight: float = 0.2,
        ignore_index: int = 255,
        class_weight: Tensor | Sequence[float] | None = None,
        se_loss: str = "bce",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _check_number("EncNetLoss", "aux_weight", aux_weight)
        _check_number("EncNetLoss", "se_weight", se_weight)
        _check_number("EncNetLoss", "label_smoothing", label_smoothing, most=1)
        check_ignore_index("EncNetLoss", ignore_index)
        if se_loss not in SE_LOSSES:
            raise ValueError(f"EncNetLoss: se_loss must be one of {', '.join(SE_LOSSES)}, got {se_loss!r}")
        self.aux_weight = aux_weight
        self.se_weight = se_weight
        self.ignore_index = ignore_index
        self.se_loss = se_loss
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weight", None if class_weight is None else _check_class_weight(class_weight))

    def forward(self, outputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
        parts = self.parts(outputs, target)
        weights = {"out": 1.0, "aux": self.aux_weight, "se": self.se_weight}
        loss = parts["out"]
        for name in OUTPUTS[1:]:
            if name in parts:
                loss = loss + weights[name] * parts[name]
        return loss

    def parts(self, outputs: Mapping[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """Return the unweighted terms, under the names of their outputs; terms with weight 0 are left out."""
        self._check(outputs, target)
        target = target.long()
        parts = {"out": self._cross_entropy(outputs["out"], target)}
        if "aux" in outputs and self.aux_weight:
            parts["aux"] = self._cross_entropy(outputs["aux"], target)
        if "se" in outputs and self.se_weight:
            parts["se"] = self._presence_loss(outputs["se"], target)
        return parts

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        logits = _widen(logits)
        weight = None if self.class_weight is None else self.class_weight.to(logits.dtype)
        # Not reduction="mean": it is NaN if every pixel is ignored, and on a GPU its sum takes a different order every
        # run.
        losses = F.cross_entropy(
            logits,
            target,
            weight,
            ignore_index=self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        is_counted = target != self.ignore_index
        share = is_counted.to(logits.dtype) if weight is None else weight[target.where(is_counted, 0)] * is_counted
        return _divide(losses.sum(), share.sum())

    def _presence_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        logits = _widen(logits)
        present = presence(target, logits.shape[1], self.ignore_index)
        if self.se_loss == "bce":
            losses = F.binary_cross_entropy_with_logits(logits, present.to(logits.dtype), reduction="none")
        else:
            losses = (logits.sigmoid() - present.to(logits.dtype)).square()
        has_label = present.any(1)  # (B,): images without labels would teach that every class is absent
        return _divide(losses.mean(1).where(has_label, 0).sum(), has_label.sum())

    def _check(self, outputs: Mapping[str, Tensor], target: Tensor) -> None:
        if not isinstance(outputs, Mapping):
            raise TypeError(f"EncNetLoss: outputs must be a dict of out, aux and se, got {type(outputs).__name__}")
        if "out" not in outputs or not set(outputs) <= set(OUTPUTS):
            got = ", ".join(map(str, outputs)) or "none"
            raise ValueError(f"EncNetLoss: outputs must hold out, may hold aux and se, and no other key, got {got}")
        _check_logits("EncNetLoss", 'outputs["out"]', outputs["out"], target)
        shape = outputs["out"].shape
        for name, expected in (("aux", shape), ("se", shape[:2])):
            if name in outputs and not isinstance(outputs[name], Tensor):
                got = type(outputs[name]).__name__
                raise TypeError(f'EncNetLoss: outputs["{name}"] must be a tensor or left out, got {got}')
            if name in outputs and outputs[name].shape != expected:
                raise ValueError(
                    f'EncNetLoss: outputs["{name}"] must have shape {tuple(expected)} to match out {tuple(shape)},'
                    f" got {tuple(outputs[name].shape)}"
                )
        if self.class_weight is not None and len(self.class_weight) != shape[1]:
            raise ValueError(
                f"EncNetLoss: class_weight must have {shape[1]} values to match out {tuple(shape)},"
                f" got {len(self.class_weight)}"
            )

    def extra_repr(self) -> str:
        """Return weights, for print()."""
        return f"aux_weight={self.aux_weight}, se_weight={self.se_weight}, ignore_index={self.ignore_index}"


class DiceLoss(nn.Module):
    """Compute one minus the soft Dice coefficient of softmax probabilities, averaged over the classes present in the
    batch.

    With p the probabilities and y the mask of a class, both summed over all counted pixels of the batch, a class has
    the loss 1 - (2 sum p y + smooth) / (sum p + sum y + smooth). A class without a pixel in the batch's targets is left
    out of the mean; predicting it lowers the scores of the true classes. Without counted pixels the loss and its
    gradients are 0. V-Net (arXiv 1606.04797), section 3, without the squares in its denominator.

    Args:
        ignore_index: label of the ignored pixels.
        smooth: added to numerator and denominator; it softens the loss of classes with few pixels.

    Shape:
        Logits (B, classes, H, W) and a target (B, H, W) of class indices to a scalar, fp32 or fp64.

    Raises:
        ValueError: smooth is negative or not finite; in forward, a shape does not match.
        TypeError: ignore_index is not an integer or smooth is not a number; in forward, target does not hold integers.
    """

    def __init__(self, ignore_index: int = 255, smooth: float = 1.0) -> None:
        super().__init__()
        check_ignore_index("DiceLoss", ignore_index)
        _check_number("DiceLoss", "smooth", smooth)
        self.ignore_index = ignore_index
        self.smooth = smooth

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        _check_logits("DiceLoss", "logits", logits, target)
        num_classes = logits.shape[1]
        slots = _index_slots(target, num_classes, self.ignore_index).unsqueeze(1)  # (B, 1, H, W)
        one_hot = torch.zeros(
            len(slots), num_classes + 1, *slots.shape[2:], dtype=torch.bool, device=slots.device
        ).scatter_(1, slots, True)[:, :num_classes]
        p = _widen(logits).softmax(1)
        pixels = one_hot.sum((0, 2, 3))
        overlap = (p * one_hot).sum((0, 2, 3))
        total = (p * (slots < num_classes)).sum((0, 2, 3)) + pixels
        present = pixels > 0
        dice = (2 * overlap + self.smooth) / (total + self.smooth).where(present, 1)
        return _divide((1 - dice).where(present, 0).sum(), present.sum())

    def extra_repr(self) -> str:
        """Return settings, for print()."""
        return f"ignore_index={self.ignore_index}, smooth={self.smooth}"


def _index_slots(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Return the index of each label among num_classes + 1 places: its class, or the last place if it is ignored.

    Any other label gets an invalid index, so that scatter_ refuses it as cross entropy does. The label num_classes becomes
    num_classes + 1, because the place num_classes stands for ignored pixels.
    """
    labels = target.long()  # a uint8 label 156 equals -100 in uint8
    return labels.masked_fill(labels >= num_classes, num_classes + 1).masked_fill(labels == ignore_index, num_classes)


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


def _divide(total: Tensor, count: Tensor) -> Tensor:
    """Return total / count, or 0 with gradients of 0 if nothing was counted, without a device synchronisation."""
    return total / count.to(total.dtype).masked_fill(count == 0, 1)


def _check_class_weight(values: Tensor | Sequence[float]) -> Tensor:
    weight = torch.as_tensor(values, dtype=torch.float32).detach().clone()
    if weight.dim() != 1:
        raise ValueError(f"EncNetLoss: class_weight must have shape (classes,), got {tuple(weight.shape)}")
    if not bool((weight >= 0).all() & weight.isfinite().all()):
        raise ValueError(f"EncNetLoss: class_weight must hold finite numbers of at least 0, got {weight.tolist()}")
    return weight


def check_ignore_index(name: str, ignore_index: int) -> None:
    """Check that ignore_index is an integer.

    Raises:
        TypeError: ignore_index is not an integer.
    """
    if not isinstance(ignore_index, Integral) or isinstance(ignore_index, bool):
        raise TypeError(f"{name}: ignore_index must be an integer, got {ignore_index!r}")


def _check_number(name: str, argument: str, value: float, most: float = math.inf) -> None:
    rule = "must be a finite number of at least 0" if most == math.inf else f"must be a number from 0 to {most}"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: {argument} {rule}, got {value!r}")
    if not 0 <= value <= most or value == math.inf:
        raise ValueError(f"{name}: {argument} {rule}, got {value}")


def _check_masks(name: str, target: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: target must be a tensor of integers, got {type(target).__name__}")
    if target.dtype.is_floating_point or target.dtype.is_complex or target.dtype == torch.bool:
        raise TypeError(f"{name}: target must hold integers, got {target.dtype}")
    if target.dim() != 3:
        raise ValueError(f"{name}: target must have shape (B, H, W), got {tuple(target.shape)}")


def _check_logits(name: str, argument: str, logits: Tensor, target: Tensor) -> None:
    _check_masks(name, target)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"{name}: {argument} must be a floating-point tensor, got {got}")
    if logits.dim() != 4:
        raise ValueError(f"{name}: {argument} must have shape (B, classes, H, W), got {tuple(logits.shape)}")
    if logits.shape[0] != target.shape[0] or logits.shape[2:] != target.shape[1:]:
        raise ValueError(
            f"{name}: target must have shape {(logits.shape[0], *logits.shape[2:])} to match {argument}"
            f" {tuple(logits.shape)}, got {tuple(target.shape)}"
        )
    if logits.shape[1] == 1:  # with one class, every pixel belongs to it for any logits
        raise ValueError(f"{name}: {argument} must have two classes or more, as foreground and background are, got 1")
