"""Load the images of benchmarks.swap_accuracy: digits, photographs and Fashion-MNIST, in three disjoint sets."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from ctxenc.training.fashion import FashionSource
from ctxenc.training.photographs import PHOTOGRAPHS, TILE, DisjointTiles, halves, read_photograph


@dataclass(frozen=True)
class Budget:
    """Set the length of training on a data set, and the number of images."""

    data: str
    train: int
    held_out: int
    epochs: int
    size: int

    @property
    def name(self) -> str:
        """Name the folder of its parts."""
        return f"{self.data}-{self.train}-{self.epochs}"


BUDGETS = {
    "digits": Budget("digits", 320, 216, 40, 16),
    "photographs": Budget("photographs", 1_020, 340, 10, 32),
    "fashion_mnist": Budget("fashion_mnist", 12_000, 3_000, 3, 28),
}


@dataclass(frozen=True)
class Task:
    """Hold images (N, 1, H, W) and labels of three disjoint sets."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(budget: Budget, seed: int, folder: str = "") -> Task:
    """Load 1797 handwritten digits, enlarged to 16 x 16; every seed draws another two fifths as the test set."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    images = F.interpolate(images, budget.size, mode="bilinear", antialias=True)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    return _task(images[order], torch.tensor(labels)[order], budget, len(images) * 3 // 5)


def fashion_mnist(budget: Budget, seed: int, folder: str) -> Task:
    """Load Fashion-MNIST: every seed draws its training and held-out images of the 60,000; the test set is the 10,000."""
    (images, labels), test = (_fashion(folder, split) for split in ("train", "val"))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    task = _task(images[order], labels[order], budget, len(images))
    return replace(task, test=test)


@cache
def _fashion(folder: str, split: str) -> tuple[Tensor, Tensor]:
    source = FashionSource(folder, split, download=False)
    images = torch.tensor(source.images, dtype=torch.float32)[:, None]
    return (images - 72.9) / 90.0, torch.tensor(source.targets)  # mean and deviation of the training pixels


def photographs(budget: Budget, seed: int, folder: str = "") -> Task:
    """Load the embedded photographs in grey, one class each, at half their resolution.

    Every seed draws other crops of one half of each photograph; the last third of that half is held out. The test set is the
    tiles of the other half.
    """
    draw = np.random.default_rng(seed)
    regions = [halves(read_photograph(name))[0] for name in PHOTOGRAPHS]
    parts = zip(*(_two_thirds(region) for region in regions), strict=True)
    sets = []
    for part, count in zip(parts, (budget.train, budget.held_out), strict=True):
        crops = [crop for region in part for crop in _crops(region, count // len(PHOTOGRAPHS), draw)]
        labels = torch.arange(len(PHOTOGRAPHS)).repeat_interleave(count // len(PHOTOGRAPHS))
        sets.append((_grey(crops, budget.size), labels))
    tiles = DisjointTiles()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(tiles.images)))  # at_scales takes the first
    return Task(*sets, (_grey(tiles.images, budget.size)[order], torch.tensor(tiles.targets)[order]))


def _two_thirds(region: Image.Image) -> tuple[Image.Image, Image.Image]:
    width, height = region.size
    if width >= height:
        cut = width * 2 // 3
        return region.crop((0, 0, cut, height)), region.crop((cut, 0, width, height))
    cut = height * 2 // 3
    return region.crop((0, 0, width, cut)), region.crop((0, cut, width, height))


def _crops(region: Image.Image, count: int, draw: np.random.Generator) -> list[Image.Image]:
    lefts, uppers = (draw.integers(0, side - TILE + 1, count).tolist() for side in region.size)
    return [region.crop((left, upper, left + TILE, upper + TILE)) for left, upper in zip(lefts, uppers, strict=True)]


def _grey(images: list[Image.Image], size: int) -> Tensor:
    pixels = torch.stack([torch.from_numpy(np.asarray(image.convert("L"), dtype=np.float32)) for image in images])
    return F.interpolate(pixels[:, None], size, mode="bilinear", antialias=True) / 64 - 2


def _task(images: Tensor, labels: Tensor, budget: Budget, before_test: int) -> Task:
    ends = (0, budget.train, budget.train + budget.held_out)
    if ends[2] > before_test:
        raise SystemExit(f"{budget.data} has {before_test} training images, of which {ends[2]} were asked for")
    sets = [slice(*ends[:2]), slice(*ends[1:]), slice(before_test, None)]
    return Task(*((images[part], labels[part].long()) for part in sets))


CLASSES = {"digits": 10, "photographs": len(PHOTOGRAPHS), "fashion_mnist": 10}
TASKS: dict[str, Callable[[Budget, int, str], Task]] = {
    "digits": digits,
    "photographs": photographs,
    "fashion_mnist": fashion_mnist,
}
