"""Segment whole images: average sliding crops, several scales and flips.

This is the evaluation of EncNet (arXiv 1803.08904): crops overlap by a third, and images run at scales from 0.5 to 1.75, each also
mirrored. It averages probabilities, never logits, so that large logits give no crop, scale or view more weight. The authors' code
differs: it pads with black, lets the last crop of a row run over the border, multiplies the exponentials of the logits of a crop
and of its mirrored view, and averages these products over crops and scales.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from math import ceil, prod
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxenc.encoding import check_sizes
from ctxenc.swap.states import set_eval_mode

Size = tuple[int, int]
Window = tuple[int, int, int]  # image number, row and column of the upper left corner


def predict(
    model: nn.Module,
    image: Tensor,
    *,
    scales: Sequence[float] = (1.0,),
    base_size: int | None = None,
    flip: bool = False,
    crop: int | Size | None = None,
    stride: float = 2 / 3,
    batch_size: int = 8,
    progress: bool = False,
) -> Tensor:
    """Predict class probabilities of every pixel of an image, or of a batch of images of one size.

    At each scale the image is resized and cut into crops that cover every pixel; the last crop of a row or column is
    aligned with the border. The softmax of each crop's logits is averaged over overlapping crops, then over the
    mirrored view, then, resized to the image's own size, over the scales. An image smaller than the crop is padded with
    0, the mean of a normalised image, on the right and bottom; predictions on the padding are dropped.

    Both resizings are bilinear with align_corners=False and antialias. So pixels keep their place at every scale, a
    mirrored image gives the mirrored result, shrinking skips no pixel, and probabilities still sum to 1.

    Args:
        model: maps (n, C, h, w) to logits (n, classes, h, w), or to a dict with them as "out". It runs in eval mode and
            without gradients; afterwards each module returns to its previous mode. Autocast is up to the caller.
        image: normalised, (C, H, W) or (B, C, H, W), on any device.
        scales: factors of the image's own size, or of `base_size`.
        base_size: longer side at scale 1, in pixels; the shorter one follows. EncNet's authors use 520, crops of 480,
            and scales 0.5, 0.75, 1, 1.25, 1.5 and 1.75.
        flip: also predict each crop mirrored left to right.
        crop: side or (height, width) of the crops; None: the whole image at once.
        stride: step between crops, as a share of the crop, in (0, 1].
        batch_size: crops per forward of the model.
        progress: show a progress bar.

    Returns:
        (B, classes, H, W) fp32, on the model's device; B = 1 for (C, H, W).

    Raises:
        ValueError: image has another shape or no pixel, or scales, base_size, crop, stride or batch_size is out of its
            range; or the model's logits do not have the size of its input.
        TypeError: an argument or the model's output has the wrong type.
        ImportError: progress=True without tqdm.
    """
    _check(model, image, scales, stride, batch_size)
    if base_size is not None:
        check_sizes("predict", base_size=base_size)
    size = _check_crop(crop)
    images = image if image.dim() == 4 else image.unsqueeze(0)
    images = images.to(_find_device(model, image))
    height, width = images.shape[2:]
    sides = [_scale_size(height, width, scale, base_size) for scale in scales]
    counts = [len(images) * prod(map(len, _place_crops(side, size or side, stride))) for side in sides]
    total: Tensor | None = None
    with torch.no_grad(), set_eval_mode(model), _make_progress_bar(sum(counts), progress) as bar:
        for side in sides:
            probabilities = _slide_crops(model, _resize(images, side), size or side, stride, flip, batch_size, bar)
            probabilities = _resize(probabilities, (height, width))
            total = probabilities if total is None else total.add_(probabilities)
    assert total is not None  # there is at least one scale
    return total.div_(len(sides))


def _scale_size(height: int, width: int, scale: float, base_size: int | None) -> Size:
    """Return the size of an image at a scale; with `base_size`, rounded as by the authors."""
    if base_size is None:
        return max(1, round(height * scale)), max(1, round(width * scale))
    longer = ceil(base_size * scale)
    shorter = max(1, int(min(height, width) * longer / max(height, width) + 0.5))
    return (longer, shorter) if height > width else (shorter, longer)


def _slide_crops(
    model: nn.Module, images: Tensor, crop: Size, stride: float, flip: bool, batch_size: int, bar: Any
) -> Tensor:
    """Compute probabilities (B, classes, H, W), averaged over the crops that cover a pixel."""
    height, width = images.shape[2:]
    padded = F.pad(images, (0, max(0, crop[1] - width), 0, max(0, crop[0] - height)))
    rows, columns = _place_crops((height, width), crop, stride)
    windows: list[Window] = [(b, top, left) for b in range(len(images)) for top in rows for left in columns]
    total: Tensor | None = None
    for first in range(0, len(windows), batch_size):
        chunk = windows[first : first + batch_size]
        crops = torch.stack([padded[b, :, top : top + crop[0], left : left + crop[1]] for b, top, left in chunk])
        probabilities = _predict_crops(model, crops)
        if flip:
            probabilities = (probabilities + _predict_crops(model, crops.flip(-1)).flip(-1)) / 2
        if total is None:
            total = probabilities.new_zeros(len(images), probabilities.shape[1], height, width)
        for (b, top, left), crop_probabilities in zip(chunk, probabilities, strict=True):
            place = total[b, :, top : top + crop[0], left : left + crop[1]]
            place += crop_probabilities[:, : place.shape[1], : place.shape[2]]  # without the padding
        if bar is not None:
            bar.update(len(chunk))
    assert total is not None  # there is at least one crop
    covers = torch.outer(_count_crops(rows, crop[0], height), _count_crops(columns, crop[1], width))
    return total.div_(covers.to(total.device))


def _predict_crops(model: nn.Module, crops: Tensor) -> Tensor:
    output = model(crops)
    if isinstance(output, Mapping):
        if "out" not in output:
            raise ValueError(
                f'predict: model must return a dict with "out", got {", ".join(map(str, output)) or "none"}'
            )
        output = output["out"]
    if not isinstance(output, Tensor):
        raise TypeError(f"predict: model must return a tensor or a dict with one, got {type(output).__name__}")
    if output.dim() != 4 or len(output) != len(crops) or output.shape[2:] != crops.shape[2:]:
        raise ValueError(
            f"predict: model must map {tuple(crops.shape)} to logits {(len(crops), 'classes', *crops.shape[2:])},"
            f" got {tuple(output.shape)}"
        )
    return output.float().softmax(1)


def _place_crops(side: Size, crop: Size, stride: float) -> tuple[list[int], list[int]]:
    """Return the first rows and columns of the crops."""
    rows, columns = (_place_along(*pair, stride) for pair in zip(side, crop, strict=True))
    return rows, columns


def _place_along(side: int, crop: int, stride: float) -> list[int]:
    """Return the crop positions along a side: one per stride, and the last at the end of the side."""
    last = max(0, side - crop)
    return [*range(0, last, max(1, round(crop * stride))), last]


def _count_crops(places: list[int], crop: int, side: int) -> Tensor:
    """Count the crops that cover each pixel along a side, (side,)."""
    counts = torch.zeros(side)
    for first in places:
        counts[first : first + crop] += 1
    return counts


def _resize(images: Tensor, side: Size) -> Tensor:
    if tuple(images.shape[2:]) == side:
        return images
    # In fp32: antialias does not support bfloat16 on a CPU.
    resized = F.interpolate(images.float(), size=side, mode="bilinear", align_corners=False, antialias=True)
    return resized.to(images.dtype)


def _make_progress_bar(crops: int, progress: bool) -> Any:
    if not progress:
        return nullcontext()
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(f"predict: progress=True needs tqdm: pip install tqdm ({error})") from error
    return tqdm(total=crops, unit="crop", desc="predict")


def _find_device(model: nn.Module, image: Tensor) -> torch.device:
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return image.device


def _check_crop(crop: int | Size | None) -> Size | None:
    rule = "predict: crop must be a positive integer, a pair of them or None"
    if crop is None:
        return None
    sides = tuple(crop) if isinstance(crop, Sequence) and not isinstance(crop, str) else (crop, crop)
    if not all(isinstance(side, Integral) and not isinstance(side, bool) for side in sides):
        raise TypeError(f"{rule}, got {crop!r}")
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"{rule}, got {crop!r}")
    return sides[0], sides[1]


def _check(model: nn.Module, image: Tensor, scales: Sequence[float], stride: float, batch_size: int) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"predict: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(image, Tensor) or not image.is_floating_point():
        got = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"predict: image must be a normalised floating-point tensor, got {got}")
    if image.dim() not in (3, 4) or not image.numel():
        raise ValueError(f"predict: image must have shape (C, H, W) or (B, C, H, W), none 0, got {tuple(image.shape)}")
    if not isinstance(scales, Sequence) or not all(map(_is_number, scales)):
        raise TypeError(f"predict: scales must be a sequence of positive numbers, got {scales!r}")
    if not scales or not all(0 < scale < float("inf") for scale in scales):
        raise ValueError(f"predict: scales must be at least one positive number, got {scales!r}")
    if not _is_number(stride):
        raise TypeError(f"predict: stride must be a share of the crop in (0, 1], got {stride!r}")
    if not 0 < stride <= 1:
        raise ValueError(f"predict: stride must be a share of the crop in (0, 1], got {stride}")
    check_sizes("predict", batch_size=batch_size)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
