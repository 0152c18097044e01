"""The embedded data set: scenes with ambiguous textures; only the rest of the scene tells their class.

EncNet (arXiv 1803.08904, figure 1) says: the scene narrows down the possible classes of a pixel, sand or earth. Here a scene
has three regions, each filled from one of the photographs in scikit-image's wheel: a background in every scene; a cue, found in
one type of scene; and an ambiguous region, whose photograph two types of scene share under two names. Everything but the cue is
drawn alike, so the other scene of the pair could hold the same pixels there. The cue lies more than GAP pixels away: a network
that sees no further than GAP is right on half of the ambiguous regions, whatever it learns. Nothing is downloaded.
"""

from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ctxenc.training.photographs import halves, read_photograph

TRAIN_SCENES, TEST_SCENES = 512, 256  # in an epoch; to be tested on
SIZE = 96
# Pixels between the cue and the ambiguous region. A 3x3 convolution on the first stage of timm's resnet10t or test_resnet
# (stride 4), upsampled, sees 24 pixels to the left and 21 to the right.
GAP = 24
IGNORED = 255

PHOTOGRAPHS = {
    "background": "retina.jpg",
    "brick": "brick.png",
    "stars": "hubble_deep_field.jpg",
    "tissue": "ihc.png",
    "coins": "coins.png",
    "road": "gravel.png",
    "rubble": "gravel.png",
    "fibres": "grass.png",
    "straw": "grass.png",
}
CLASSES = list(PHOTOGRAPHS)
# Regions of each type of scene after the background: the cue, which gives the type away, and the ambiguous class.
SCENES = {
    "street": ("brick", "road"),
    "space": ("stars", "rubble"),
    "slide": ("tissue", "fibres"),
    "hoard": ("coins", "straw"),
}
AMBIGUOUS = (("road", "rubble"), ("fibres", "straw"))
BACKGROUND, AMBIGUOUS_REGION, CUE = range(3)  # the regions of a layout, in the order in which they are filled
# Of the grey levels of 2,000 training scenes, as shares of white.
MEAN = (0.5,) * 3
STD = (0.16,) * 3


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """Draw scenes of SIZE x SIZE pixels, the types of SCENES in turn. Random draws follow from (seed, train, epoch, index).

    So a scene does not depend on the worker or on earlier scenes. Training and test textures come from halves of the
    photographs without a common pixel; see photographs.halves.

    Args:
        train: Whether textures come from the training halves.
        length: Scenes in an epoch.
        seed: Seed of all random draws.

    Returns:
        From indexing, an image (3, SIZE, SIZE) float32, grey and normalised by MEAN and STD, and its mask (SIZE, SIZE) int64 of
        indices into CLASSES, with IGNORED along the borders of regions, two pixels wide.

    Raises:
        ValueError: length is below 1.
        UserError: scikit-image is not installed, or lacks a photograph.
    """

    def __init__(self, train: bool, length: int, seed: int = 0) -> None:
        if length < 1:
            raise ValueError(f"Scenes: length must be at least 1, got {length}")
        self.train, self.length, self.seed = train, length, seed
        self.epoch = 0
        self.classes = list(CLASSES)
        self.textures = {name: read_texture(photograph, train) for name, photograph in PHOTOGRAPHS.items()}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next scenes; call it before the loader starts its workers."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"Scenes: index must be in [0, {self.length}), got {index}")
        generator = np.random.default_rng((self.seed, self.train, self.epoch, index))
        layout = draw_layout(generator)
        cue, ambiguous = SCENES[scene_type(index)]
        grey, mask = np.empty((SIZE, SIZE), np.float32), np.empty((SIZE, SIZE), np.int64)
        # The cue comes last: no earlier draw depends on the scene's place in its pair.
        for region, name in {BACKGROUND: "background", AMBIGUOUS_REGION: ambiguous, CUE: cue}.items():
            inside = layout == region
            grey[inside] = draw_crop(self.textures[name], generator)[inside]
            mask[inside] = CLASSES.index(name)
        image = torch.from_numpy((grey - MEAN[0]) / STD[0]).expand(3, -1, -1)
        return image.contiguous(), without_borders(torch.from_numpy(mask))

    def name(self, index: int) -> str:
        """Return the number of scene `index` and its type."""
        return f"scene {index} ({scene_type(index)})"


def scene_type(index: int) -> str:
    """Return the type of scene `index`, a member of SCENES."""
    return list(SCENES)[index % len(SCENES)]


@cache
def read_texture(photograph: str, train: bool) -> np.ndarray:
    """Read the training or test half of a photograph in grey at half its size, uint8: a brick is then 12 pixels wide, a patch 17.

    Raises:
        UserError: scikit-image is not installed, or its wheel does not hold the photograph.
    """
    half = halves(read_photograph(photograph).convert("L"))[0 if train else 1]
    return np.asarray(half.reduce(2))


def draw_layout(generator: np.random.Generator) -> np.ndarray:
    """Draw the region of each pixel, (SIZE, SIZE): hills with the ambiguous region below, the cue on top, and GAP pixels between.

    A square window of 2 * GAP + 1 pixels about a pixel of the ambiguous region never holds one of the cue.
    """
    while True:
        coarse = generator.random((2, 3), dtype=np.float32)
        if generator.random() < 0.5:
            coarse = coarse.T.copy()
        height = np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        ambiguous = height < np.quantile(height, generator.uniform(0.2, 0.4))
        cue = height > height[grown(ambiguous, GAP)].max()
        if cue.mean() > 0.08:
            return np.where(ambiguous, AMBIGUOUS_REGION, np.where(cue, CUE, BACKGROUND))


def draw_crop(texture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw a crop of SIZE x SIZE pixels as shares of white, turned, mirrored, and with another brightness and contrast."""
    top, left = (generator.integers(side - SIZE + 1) for side in texture.shape)
    crop = np.rot90(texture[top : top + SIZE, left : left + SIZE], int(generator.integers(4)))
    if generator.random() < 0.5:
        crop = crop[::-1]
    contrast, brightness = generator.uniform(0.75, 1.25), generator.uniform(-0.15, 0.15)
    return ((crop / 255 - 0.5) * contrast + 0.5 + brightness).clip(0, 1)


def grown(region: np.ndarray, radius: int) -> np.ndarray:
    """Return the pixels within `radius` of a region along both axes, (H, W) bool."""
    window = 2 * radius + 1
    for axis in (0, 1):
        margins = [(radius + 1, radius) if axis == each else (0, 0) for each in (0, 1)]
        counts = np.moveaxis(np.pad(region, margins).cumsum(axis), axis, 0)
        region = np.moveaxis(counts[window:] > counts[:-window], 0, axis)
    return region


def without_borders(mask: Tensor) -> Tensor:
    """Return the mask with IGNORED for pixels with more than one class in their 3 x 3 neighbourhood."""
    values = mask[None].float()
    highest, lowest = (sign * F.max_pool2d(sign * values, 3, stride=1, padding=1)[0] for sign in (1, -1))
    return mask.masked_fill(highest != lowest, IGNORED)


def draw_predictions(networks: Mapping[str, nn.Module], length: int = TEST_SCENES) -> Figure:
    """Draw a test scene of each type, one row each: the scene, its classes, and the prediction of each network.

    Of each type, take the quarter with most errors of the first network. The row is the scene of median gain: pixels right in
    the last network minus pixels right in the first.

    Args:
        networks: Segmentation networks by title, in evaluation mode on a CPU.
        length: Test scenes to choose from.
    """
    scenes = Scenes(False, length)
    images, masks = (torch.stack(each) for each in zip(*(scenes[index] for index in range(length)), strict=True))
    with torch.inference_mode():
        predicted = [
            torch.cat([network(part)["out"].argmax(1) for part in images.split(16)]) for network in networks.values()
        ]
    first, last = ((labels == masks).sum((1, 2)).tolist() for labels in (predicted[0], predicted[-1]))
    figure = Figure(figsize=(1.5 * (2 + len(networks)) + 1.7, 1.45 * len(SCENES) + 0.5), layout="constrained")
    axes = figure.subplots(len(SCENES), 2 + len(networks), squeeze=False)
    colours = ListedColormap([colormaps["tab10"](number) for number in range(len(CLASSES))])
    for row, kind in enumerate(SCENES):
        worst = sorted(range(row, length, len(SCENES)), key=first.__getitem__)[: max(1, length // len(SCENES) // 4)]
        index = sorted(worst, key=lambda each: last[each] - first[each])[len(worst) // 2]
        axes[row, 0].imshow((images[index, 0] * STD[0] + MEAN[0]).numpy(), cmap="gray", vmin=0, vmax=1)
        axes[row, 0].set_ylabel(kind)
        for axis, labels in zip(axes[row, 1:], [masks[index], *(each[index] for each in predicted)], strict=True):
            shown = np.ma.masked_where((masks[index] == IGNORED).numpy(), labels.numpy())
            axis.imshow(shown, colours, vmin=0, vmax=len(CLASSES) - 1, interpolation="nearest")
    for axis, title in zip(axes[0], ["scene", "truth", *networks], strict=True):
        axis.set_title(title, fontsize="small")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    patches = [Patch(color=colours(number), label=name) for number, name in enumerate(CLASSES)]
    patches.append(Patch(facecolor="white", edgecolor="gray", label="border, not counted"))
    figure.legend(handles=patches, loc="outside right upper", frameon=False, fontsize="small")
    return figure
