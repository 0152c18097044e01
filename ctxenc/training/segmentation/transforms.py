"""Transform an image and its mask together, for training and for validation.

The recipe of EncNet (arXiv 1803.08904), section 4: flip, scale, rotate, crop. As in PyTorch-Encoding, scale the longer side to
base_size times the factor. Masks are read at the nearest pixel alone, so that no new label arises. Beyond the image, the mask
is IGNORED and the image has the mean colour (0 after normalisation). All draws come from torch's global generator; `Samples`
seeds it for each sample.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from ctxenc.training.segmentation.pairs import IGNORED
from ctxenc.training.segmentation.segment_settings import SegmentSettings

OUTSIDE = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}


class ScaleLongerSide(v2.Transform):
    """Resize an image, and its mask, so that the longer side is `base_size` times a factor; keep the ratio of the sides.

    Read the mask at the centres of the new pixels, like the image: torchvision's own resizing reads masks at the corners, half
    a pixel off.

    Args:
        base_size: The longer side at a factor of 1.
        scale: The range of the factor, drawn uniformly.
        masks: Whether masks are resized too.
    """

    def __init__(self, base_size: int, scale: tuple[float, float] = (1.0, 1.0), masks: bool = True) -> None:
        super().__init__()
        self.base_size, self.scale, self.masks = base_size, scale, masks

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Return the new height and width."""
        height, width = F.get_size(flat_inputs[0])
        longer = self.base_size * float(torch.empty(()).uniform_(*self.scale))
        return {"size": [max(1, round(side * longer / max(height, width))) for side in (height, width)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Return `inpt`, an image or a mask, in the new size."""
        if not isinstance(inpt, tv_tensors.Mask):
            return F.resize(inpt, params["size"], antialias=True)
        if not self.masks:
            return inpt
        pixels = inpt.as_subclass(torch.Tensor).unsqueeze(0)
        return tv_tensors.Mask(F.resize(pixels, params["size"], InterpolationMode.NEAREST_EXACT).squeeze(0))


def train_transform(settings: SegmentSettings, mean: Sequence[float], std: Sequence[float]) -> v2.Transform:
    """Build the joint transform of training: an image (3, crop_size, crop_size) float32 and a mask (crop_size, crop_size)
    int64.

    A pair smaller than the crop lies anywhere in it. A crop may hold IGNORED pixels alone.

    Args:
        settings: The settings of the run.
        mean: Mean of each colour channel, in [0, 1]; the backbone's own.
        std: Standard deviation of each colour channel, likewise.
    """
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(settings.flip),
            ScaleLongerSide(settings.base_size, (settings.scale_min, settings.scale_max)),
            *_normalized(mean, std),
            v2.RandomRotation(settings.rotate, InterpolationMode.BILINEAR, fill=OUTSIDE),
            v2.RandomCrop(settings.crop_size, pad_if_needed=True, fill=OUTSIDE),
            v2.ToPureTensor(),
        ]
    )


def eval_transform(settings: SegmentSettings, mean: Sequence[float], std: Sequence[float]) -> v2.Transform:
    """Build the transform of validation: the whole image with its longer side at base_size, and the mask unchanged.

    Resize logits to the mask: its pixels are scored. Sizes differ between samples, so a batch holds one: padding to a common
    size would enter the encoding.

    Args:
        settings: The settings of the run.
        mean: Mean of each colour channel, in [0, 1]; the backbone's own.
        std: Standard deviation of each colour channel, likewise.
    """
    return v2.Compose([ScaleLongerSide(settings.base_size, masks=False), *_normalized(mean, std), v2.ToPureTensor()])


def _normalized(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    dtypes = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}
    return [v2.ToDtype(dtypes, scale=True), v2.Normalize(list(mean), list(std))]
