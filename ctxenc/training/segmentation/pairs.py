"""Match image and mask files, and read them.

EXIF orientation is ignored in both: a mask is drawn over the pixels as stored.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as F

from ctxenc.runs.errors import UserError, printable
from ctxenc.training.bad_images import BrokenImageError
from ctxenc.training.files import both, images_below, nfc
from ctxenc.training.images import open_image, opened, orientation

IGNORED = 255  # in a mask: counts neither in the loss nor in a metric
UNKNOWN = -1
SPREAD = {"L;2": 85, "L;4": 17}  # Pillow's factor for grey of 2 and 4 bits, by its name for the bytes in a PNG
Paths = list[tuple[Path, Path]]


class Presence(NamedTuple):
    """Hold the number of masks with each class, the number of masks read, and the share of ignored pixels."""

    counts: list[int]
    read: int
    ignored: float


class Pairs:
    """Read images and masks from files, on demand.

    Args:
        paths: The image and the mask of each sample.
        classes: Class names in the order of the logits.
        labels: The class of each number that a mask may hold (default: itself). IGNORED always stands for itself.
    """

    presence: Presence | None = None  # as far as it was asked for

    def __init__(self, paths: Paths, classes: Sequence[str], labels: Mapping[int, int] | None = None) -> None:
        self.paths, self.classes = paths, list(classes)
        labels = labels or {label: label for label in range(len(classes))}
        self.rule = f"{min(labels)} to {max(labels)}, or {IGNORED} where it is to be ignored"
        self.table = np.full(IGNORED + 1, UNKNOWN, dtype=np.int16)
        self.table[list(labels)] = list(labels.values())
        self.table[IGNORED] = IGNORED

    def __len__(self) -> int:
        return len(self.paths)

    def pair(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Read image (3, H, W) and mask (H, W) of sample `index`, both uint8.

        Raises:
            UserError: A file cannot be read, the mask is no PNG of class numbers, it is of another size than the image, or it
                holds a number that is no class. The text holds the paths.
        """
        image_path, mask_path = self.paths[index]
        image, classes = open_image(image_path), self._classes(mask_path)
        height, width = classes.shape
        if (width, height) != image.size:
            sizes = f"must be of the size of its image {image_path}, {image.width} x {image.height}"
            turn = orientation(image_path)
            hint = f"; it has EXIF orientation {turn}, which is not applied: save it turned" if turn > 1 else ""
            raise UserError(f"mask {mask_path} {sizes}, got {width} x {height}{hint}")
        return tv_tensors.Image(F.pil_to_tensor(image)), tv_tensors.Mask(torch.from_numpy(classes))

    def _classes(self, path: Path) -> np.ndarray:
        numbers = read_mask(path)
        classes = self.table[np.minimum(numbers, IGNORED)]
        if (wrong := numbers[(classes == UNKNOWN) | (numbers > IGNORED)]).size:
            raise UserError(f"mask {path} must hold {self.rule}, got {wrong[0]}")
        return classes.astype(np.uint8)

    def count(self, enough: int, skip: bool) -> Presence:
        """Find the classes that occur: read `enough` masks spread over all, and more only for a class missing from these.

        Raises:
            UserError: A mask holds a number that is no class, or, without `skip`, cannot be read.
        """
        masks = [mask for _, mask in self.paths]
        step = max(1, len(masks) // enough)
        first = masks[::step]
        counts, pixels, read = np.zeros(len(self.classes), np.int64), np.zeros(2, np.int64), 0
        for mask in first + [each for number, each in enumerate(masks) if number % step]:
            if read >= len(first) and counts.all():
                break
            try:
                classes = self._classes(mask)
            except BrokenImageError:
                if not skip:
                    raise
                continue
            found = np.bincount(classes.ravel(), minlength=IGNORED + 1)
            counts += found[: len(counts)] > 0
            pixels += found[IGNORED], classes.size
            read += 1
        self.presence = Presence(counts.tolist(), read, float(pixels[0] / max(pixels[1], 1)))
        return self.presence

    def name(self, index: int) -> str:
        """Return the printable path of image `index`."""
        return printable(self.paths[index][0])


def read_mask(path: Path) -> np.ndarray:
    """Read the numbers in the mask at `path`, (H, W): the grey values, or the indices where it has a palette.

    Raises:
        UserError: It cannot be read, or is no PNG with one number a pixel; the text holds the path.
    """
    with opened(path) as image:
        if image.format != "PNG" or not (image.mode in ("1", "L", "P", "I") or image.mode.startswith("I;16")):
            raise UserError(
                f"mask {path} must be a PNG of class numbers, grey or with a palette, got {image.format} of mode {image.mode}"
            )
        spread = SPREAD.get(cast(Any, image).tile[0][3], 1)  # before Pillow decodes, and forgets
        return np.asarray(image).astype(np.int32) // spread


def held_out(paths: Paths, fraction: float, seed: int) -> tuple[Paths, Paths]:
    """Split `paths` for training and validation: a rounded share for validation, at least one pair on each side.

    Raises:
        UserError: There is a single pair.
    """
    if len(paths) < 2:
        raise UserError(f"{paths[0][0].parent} must hold at least 2 images for one to be held out, got {len(paths)}")
    order = np.random.default_rng(seed).permutation(len(paths)).tolist()
    count = min(max(round(fraction * len(paths)), 1), len(paths) - 1)
    return [paths[index] for index in sorted(order[count:])], [paths[index] for index in sorted(order[:count])]


def matched(images: Path, masks: Path) -> Paths:
    """Match images below one folder with masks below another, by the same path except for the suffix.

    Raises:
        UserError: The folder or its images are missing, a file has no counterpart, or two have one stem.
    """
    for each in (images, masks):
        if not each.is_dir():
            raise UserError(f"no folder {each}: it must stand beside {(masks if each == images else images).name}")
    image_paths, mask_paths = _by_stem(images, IMG_EXTENSIONS), _by_stem(masks, (".png",))
    if not image_paths:
        raise UserError(f"{images} must hold images ({', '.join(IMG_EXTENSIONS)}), got none")
    if missing := sorted(image_paths.keys() - mask_paths.keys()):
        raise UserError(f"image {image_paths[missing[0]]} must have a mask {masks / missing[0]}.png, got none")
    if left := sorted(mask_paths.keys() - image_paths.keys()):
        raise UserError(f"mask {mask_paths[left[0]]} must have an image of the same stem below {images}, got none")
    return [(image_paths[stem], mask_paths[stem]) for stem in sorted(image_paths)]


def _by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in images_below(folder, suffixes):
        stem = nfc(path.relative_to(folder).with_suffix("").as_posix())
        if stem in found:
            raise UserError(f"two files of one stem: {both(found[stem], path)}")
        found[stem] = path
    return found


def present(paths: Paths) -> Paths:
    """Return `paths` with their names on disk, which may be in another Unicode form.

    Raises:
        UserError: One of them is not a file.
    """
    found = []
    for image, mask in paths:
        if not (stored := _stored(image)):
            raise UserError(f"image {image} is missing")
        if not (stored_mask := _stored(mask)):
            raise UserError(f"image {image} must have a mask {mask}, got none")
        found.append((stored, stored_mask))
    return found


def _stored(path: Path) -> Path | None:
    if path.is_file():
        return path
    return next((each for each in path.parent.glob("*") if nfc(each.name) == nfc(path.name) and each.is_file()), None)
