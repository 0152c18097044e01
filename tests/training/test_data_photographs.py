"""The embedded photographs: what lies where, and the score on colour."""

import numpy as np
import pytest
import torch
from PIL import Image

from ctxenc.runs.errors import UserError
from ctxenc.training import photographs
from ctxenc.training.data import seed_draws

PIXELS = photographs.TILE**2


def numbered(width, height):
    """An image in which no two pixels are equal: the number of a pixel lies in its three channels."""
    number = np.arange(width * height).reshape(height, width)
    return Image.fromarray(np.stack([number >> 16, number >> 8 & 255, number & 255], axis=-1).astype(np.uint8))


def numbers(image):
    red, green, blue = (channel.astype(int) for channel in np.moveaxis(np.asarray(image), -1, 0))
    return (red << 16 | green << 8 | blue).ravel()


@pytest.mark.parametrize("size", [(448, 172), (172, 448), (512, 512), (451, 300)])
def test_regions_share_no_pixel(size):
    train, test = map(numbers, photographs.halves(numbered(*size)))
    assert not set(train) & set(test)
    assert len(set(train) | set(test)) == size[0] * size[1]


def test_tiles_share_no_pixel():
    tiles = photographs.tiles(numbered(200, 130))
    assert len(tiles) == 3 * 2
    assert all(tile.size == (64, 64) for tile in tiles)
    assert len(set(np.concatenate([numbers(tile) for tile in tiles]))) == 6 * PIXELS


def test_training_crops_come_from_the_training_region(monkeypatch):
    image = numbered(300, 200)
    monkeypatch.setattr(photographs, "read_photograph", lambda name: image)
    source, test = photographs.RandomCrops(), photographs.DisjointTiles()
    tested = set(np.concatenate([numbers(tile) for tile in test.images]))
    corners = set()
    for index in range(200):
        with seed_draws(0, 0, index):
            pixels = numbers(source.image(index))
        assert not tested & set(pixels)
        corners.add(pixels[0])
    assert len(corners) > 150  # of (150 - 63) * (200 - 63) places


def test_every_class_has_enough_of_both():
    train, test = photographs.RandomCrops(), photographs.DisjointTiles()
    assert np.bincount(train.targets).tolist() == [photographs.CROPS_PER_CLASS] * 17
    counts = np.bincount(test.targets)
    assert (len(counts), counts.min(), counts.sum()) == (17, 6, 585)
    assert all(image.mode == "RGB" and image.size == (64, 64) for image in test.images)
    assert len(set(test.names)) == len(test.targets)
    for index, target in enumerate(test.targets):
        assert test.name(index).startswith(photographs.PHOTOGRAPHS[target])


def test_the_retina_is_without_its_black_surround():
    assert np.asarray(photographs.read_photograph("retina.jpg").convert("L")).min() > 20


@pytest.mark.figures
def test_the_score_on_colour():
    score = photographs.colour_score()
    assert score == pytest.approx(0.686, abs=0.03)  # a tile of a class of six, decoded otherwise, is worth 0.01
    assert score == photographs.colour_score()


def test_the_score_on_colour_is_perfect_where_colour_decides(monkeypatch):
    colours = {name: (15 * index, 255 - 15 * index, 0) for index, name in enumerate(photographs.PHOTOGRAPHS)}
    monkeypatch.setattr(photographs, "read_photograph", lambda name: Image.new("RGB", (256, 128), colours[name]))
    assert photographs.colour_score() == 1.0


def test_a_photograph_that_is_missing(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"does not hold the photograph nothing\.png"):
        photographs.read_photograph("nothing.png")
    monkeypatch.setattr(photographs, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ctxenc\[train\]'"):
        photographs.read_photograph("brick.png")


def test_crops_use_only_torch_numbers():
    source = photographs.RandomCrops()
    torch.manual_seed(0)
    first = source.image(0)
    torch.manual_seed(0)
    assert source.image(0) == first != source.image(0)
