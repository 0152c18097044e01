"""The embedded data set: 64 x 64 crops of the photographs in scikit-image's wheel, one class each.

Each photograph is cut in two along its longer side. Training draws random crops from the left or upper half; the test set is
the grid of disjoint tiles of the other half. Nothing is downloaded.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ctxenc.runs.errors import UserError
from ctxenc.training.metrics import balanced_accuracy

TILE = 64
CROPS_PER_CLASS = 60  # per epoch

# Left out of the wheel's images: drawings and masks (chessboards, colour wheel, horse, logo, phantom), images under two tiles
# wide (microaneurysms), the second view of a pair (motorcycle_right), and clock_motion, nearly all of it one flat blur. All
# others stay, unmerged: the smallest, page and text, have six test tiles each.
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
    *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg"),
    *("rocket.jpg", "text.png"),
)
CLASSES = [name.partition(".")[0] for name in PHOTOGRAPHS]
# The retina is a disc on black: use only its inscribed square, (left, upper, right, lower) in pixels.
INSCRIBED = {"retina.jpg": (220, 220, 1191, 1191)}


def read_photograph(name: str) -> Image.Image:
    """Read the RGB photograph called `name` (a member of PHOTOGRAPHS), without a black surround.

    Raises:
        UserError: scikit-image is not installed, or its wheel does not hold the photograph.
    """
    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise UserError("the embedded photographs need scikit-image: pip install 'ctxenc[train]'")
    try:
        with Image.open(Path(package.origin).parent / "data" / name) as image:
            photograph = image.convert("RGB")
    except OSError as error:
        raise UserError(f"this scikit-image does not hold the photograph {name}: {error}") from error
    return photograph.crop(INSCRIBED[name]) if name in INSCRIBED else photograph


def halves(photograph: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Return the training and the test region: two halves along the longer side, without a common pixel."""
    width, height = photograph.size
    if width >= height:
        return photograph.crop((0, 0, width // 2, height)), photograph.crop((width // 2, 0, width, height))
    return photograph.crop((0, 0, width, height // 2)), photograph.crop((0, height // 2, width, height))


def tiles(region: Image.Image, stride: int = TILE) -> list[Image.Image]:
    """Return all TILE x TILE squares of `region` on a grid of `stride` pixels, row by row."""
    width, height = region.size
    return [
        region.crop((left, upper, left + TILE, upper + TILE))
        for upper in range(0, height - TILE + 1, stride)
        for left in range(0, width - TILE + 1, stride)
    ]


class RandomCrops:
    """Draw training samples: CROPS_PER_CLASS random TILE x TILE crops of each training region in an epoch.

    The position of a crop comes from torch's global generator; the caller seeds it for each sample.
    """

    classes = CLASSES

    def __init__(self) -> None:
        self.regions = [halves(read_photograph(name))[0] for name in PHOTOGRAPHS]
        self.targets = [index for index in range(len(CLASSES)) for _ in range(CROPS_PER_CLASS)]

    def image(self, index: int) -> Image.Image:
        """Return a crop of the class of sample `index`."""
        region = self.regions[self.targets[index]]
        left, upper = (int(torch.randint(side - TILE + 1, ())) for side in region.size)
        return region.crop((left, upper, left + TILE, upper + TILE))

    def name(self, index: int) -> str:
        """Return the photograph of sample `index` and the crop's number within it."""
        return f"{PHOTOGRAPHS[self.targets[index]]}, crop {index % CROPS_PER_CLASS}"


class DisjointTiles:
    """Hold the test samples: the tiles of the test regions, in the order of PHOTOGRAPHS."""

    classes = CLASSES

    def __init__(self) -> None:
        grids = [tiles(halves(read_photograph(name))[1]) for name in PHOTOGRAPHS]
        self.images = [tile for grid in grids for tile in grid]
        self.targets = [index for index, grid in enumerate(grids) for _ in grid]
        pairs = zip(PHOTOGRAPHS, grids, strict=True)
        self.names = [f"{name}:{number}" for name, grid in pairs for number in range(len(grid))]

    def image(self, index: int) -> Image.Image:
        """Return tile `index`."""
        return self.images[index]

    def name(self, index: int) -> str:
        """Return the photograph of tile `index` and the tile's number within it."""
        return self.names[index]


def colour_neighbours() -> torch.Tensor:
    """Classify each test tile by its nearest training tile in colour alone, the score to beat.

    A tile is described by the mean and the standard deviation of each colour channel. The training tiles lie on a grid of half
    a tile.

    Returns:
        Class indices, int64, in the order of DisjointTiles.
    """
    known, labels = [], []
    for target, name in enumerate(PHOTOGRAPHS):
        grid = tiles(halves(read_photograph(name))[0], stride=TILE // 2)
        known += [_colour(tile) for tile in grid]
        labels += [target] * len(grid)
    asked = torch.stack([_colour(tile) for tile in DisjointTiles().images])
    nearest = torch.cdist(asked, torch.stack(known)).argmin(dim=1)
    return torch.tensor(labels)[nearest]


def colour_score() -> float:
    """Return the class-balanced accuracy of colour_neighbours on the test tiles."""
    return balanced_accuracy(torch.tensor(DisjointTiles().targets), colour_neighbours(), len(CLASSES))


def _colour(tile: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.asarray(tile, dtype=np.float32)).reshape(-1, 3)
    return torch.cat([pixels.mean(dim=0), pixels.std(dim=0)])
