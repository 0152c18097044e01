"""Small images and masks in files, and what is said of those that are wrong."""

import numpy as np
import pytest
from PIL import Image

from ctxenc.runs.errors import UserError
from ctxenc.training.segmentation import datasets
from ctxenc.training.segmentation.pairs import Pairs
from ctxenc.training.segmentation.segment_settings import SegmentSettings


def write_image(path, value=0, size=(8, 6), mode="RGB"):
    """A single-coloured image; one of two colours would not stay so in a JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (value, value, value) if mode == "RGB" else value).save(path)
    return path


def write_mask(path, numbers=((0, 1), (1, 255)), size=(8, 6), palette=False):
    """A mask of the four ``numbers`` in its quadrants."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    array = np.kron(np.asarray(numbers), np.ones((height // 2, width // 2))).astype(np.uint8)
    image = Image.fromarray(array)
    if palette:
        image.putpalette([(7 * index) % 256 for index in range(3 * 256)])
    image.save(path)
    return path


def write_pair(images, masks, name, value=0, **keywords):
    return write_image(images / f"{name}.png", value), write_mask(masks / f"{name}.png", **keywords)


def plain(root, names=("a", "b", "c", "d", "e"), split=""):
    for value, name in enumerate(names):
        write_pair(root / "images" / split, root / "masks" / split, name, value)
    return root


def names(source):
    return [path.stem for path, _ in source.paths]


def build(root, **chosen):
    return datasets.build_datasets(SegmentSettings.resolve({"data": str(root), **chosen}))


def error_of(call, *arguments, **keywords):
    """The text of the UserError, which must be one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text
    return text


def read_error(tmp_path, write, classes=3):
    """What reading a sample of two classes says, whose mask ``write`` puts at a path."""
    image, mask = write_image(tmp_path / "an image.png"), tmp_path / "a mask.png"
    write(mask)
    text = error_of(Pairs([(image, mask)], [str(label) for label in range(classes)]).pair, 0)
    assert str(mask) in text
    return text
