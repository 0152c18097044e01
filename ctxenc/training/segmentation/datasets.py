"""The data sets of segmentation: sources of image and mask pairs, and the meaning of the numbers in a mask.

On disk they lie as Pascal VOC, Cityscapes and ADE20K are unpacked, or in plain folders. torchvision's own classes for VOC and
Cityscapes are not used: they lack the augmented VOC and the 19 classes that count, and notice a missing mask only on reading
it.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes
from tqdm import tqdm

from ctxenc.runs.errors import UserError, one_line, printable
from ctxenc.training.bad_images import SKIP, BrokenImageError
from ctxenc.training.console import list_names
from ctxenc.training.data import TRAIN_NAMES, VAL_NAMES, VERIFIED_UP_TO, Datasets, Samples, read_all, seed_draws
from ctxenc.training.files import images_below, nfc, subfolder, unused
from ctxenc.training.images import orientation
from ctxenc.training.segmentation.pairs import IGNORED, Pairs, Paths, held_out, matched, present, read_mask
from ctxenc.training.segmentation.scenes import TEST_SCENES, TRAIN_SCENES, Scenes
from ctxenc.training.segmentation.segment_settings import SCENES, SegmentSettings
from ctxenc.training.segmentation.transforms import eval_transform, train_transform

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
ADE20K_CLASSES = 150
CITYSCAPES_CLASSES = sorted(
    (each for each in Cityscapes.classes if 0 <= each.train_id < IGNORED), key=lambda c: c.train_id
)
CITYSCAPES_LABELS = {each.id: each.train_id for each in Cityscapes.classes if each.id >= 0}


class PairSamples(Samples):
    """Apply a joint transform (see the transforms module) to a source of pairs.

    The source has the methods of `Pairs`. Its `pair` may draw from the global generators, which are seeded for the sample.
    """

    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with seed_draws(self.seed, self.epoch, index):
            return self.transform(*self.source.pair(index))

    def blank(self) -> tuple[Tensor, Tensor]:
        """Return a sample that counts nowhere."""
        side = 32
        mask = torch.full((side, side), IGNORED, dtype=torch.uint8)
        return self.transform(tv_tensors.Image(torch.zeros(3, side, side, dtype=torch.uint8)), tv_tensors.Mask(mask))


def build_datasets(settings: SegmentSettings) -> Datasets:
    """Build the training and validation sources of `settings`.

    Raises:
        UserError: A folder, a list or a mask is missing, there are too few images, or the classes are wrong.
    """
    layouts = {"voc": voc, "voc_aug": voc_aug, "cityscapes": cityscapes, "ade20k": ade20k}
    if settings.data == SCENES:
        return Datasets(Scenes(True, TRAIN_SCENES, settings.seed), Scenes(False, TEST_SCENES))
    if settings.data in layouts:
        return layouts[settings.data](Path(settings.data_dir))
    return folder(Path(settings.data), settings.val_fraction, settings.seed, settings.on_bad_image == SKIP)


def build_samples(
    datasets: Datasets, settings: SegmentSettings, mean: Sequence[float], std: Sequence[float], seed: int
) -> tuple[Any, Any]:
    """Return the training and validation samples: normalised images with their masks, drawn with `seed`."""
    if isinstance(datasets.train, Scenes) or isinstance(datasets.val, Scenes):
        return Scenes(True, len(datasets.train), seed), datasets.val
    train = PairSamples(datasets.train, train_transform(settings, mean, std), seed)
    return train, PairSamples(datasets.val, eval_transform(settings, mean, std), seed)


def verify(datasets: Datasets, show_progress: bool = True, skip: bool = False) -> None:
    """Read every pair of a small data set, so that a broken one shows before training starts.

    Warns:
        UserWarning: Photographs have an EXIF orientation, so masks may have been drawn on another view of them.

    Raises:
        UserError: See `Pairs.pair`; with `skip` only too many broken files are an error. Or training masks lack a class.
    """
    sources = [source for source in (datasets.train, datasets.val) if isinstance(source, Pairs)]
    samples = [(source.pair, index) for source in sources for index in range(len(source))]
    read_all(samples, "checking masks", show_progress, skip)
    images = [image for source in sources for image, _ in source.paths]
    seen = images[:: max(1, len(images) // VERIFIED_UP_TO)]
    if turned := [image for image in seen if orientation(image) > 1]:
        warnings.warn(
            f"{len(turned)} of {len(seen)} images have an EXIF orientation, such as {printable(turned[0])}: it is not applied,"
            " and masks must be drawn over the pixels as they are stored",
            stacklevel=2,
        )
    if isinstance(datasets.train, Pairs):
        check_classes(datasets.train, datasets.val, datasets.every_class, skip)


def check_classes(train: Pairs, val: Any, every_class: bool, skip: bool) -> None:
    """Count the classes in the masks of `train`.

    Raises:
        UserError: With `every_class`, a class occurs in no mask; without it, fewer than two classes occur.
    """
    counts, read, ignored = train.count(VERIFIED_UP_TO, skip)
    missing = [number for number, count in enumerate(counts) if not count]
    if not missing or (not every_class and len(counts) - len(missing) > 1):
        return
    number, held = missing[0], [str(number) for number, count in enumerate(counts) if count]
    name = "" if train.classes[number] == str(number) else f" ({printable(train.classes[number])})"
    more = f" and of {len(missing) - 1} more classes" if len(missing) > 1 else ""
    text = f"none of the {read} training masks holds a pixel of class {number}{name}{more}"
    text += f"; they hold {list_names(held) or 'no class'}"
    if ignored:
        text += f" and {IGNORED}, which is taken for pixels to be ignored ({ignored:.0%})"
    if val.count(VERIFIED_UP_TO, skip).counts[number]:
        text += "; masks of the validation set hold it"
    raise UserError(text)


def voc(data_dir: Path) -> Datasets:
    """Read Pascal VOC 2012: 1,464 training and 1,449 validation images, with borders ignored."""
    root = _voc_root(data_dir, "voc")
    train, val = _listed(root, "train.txt"), _listed(root, "val.txt")
    return Datasets(*(Pairs(_voc_pairs(root, names, "SegmentationClass"), VOC_CLASSES) for names in (train, val)))


def voc_aug(data_dir: Path) -> Datasets:
    """Read Pascal VOC 2012 with the annotations of SBD for training: PNG files in SegmentationClassAug, not SBD's own .mat files.

    Validation is the same as for VOC. The list is ImageSets/Segmentation/train_aug.txt or trainaug.txt. Each line holds a name,
    or the paths of an image and its mask.
    """
    root = _voc_root(data_dir, "voc_aug", "SegmentationClassAug")
    lists = ("train_aug.txt", "trainaug.txt")
    found = next((each for each in lists if (root / "ImageSets/Segmentation" / each).is_file()), lists[0])
    train, val = _listed(root, found), _listed(root, "val.txt")
    if common := sorted(set(train) & set(val)):  # SBD's own lists overlap VOC's
        raise UserError(f"{found} of {root} must hold no image of val.txt, got {common[0]}")
    train_pairs = Pairs(_voc_pairs(root, train, "SegmentationClassAug"), VOC_CLASSES)
    return Datasets(train_pairs, Pairs(_voc_pairs(root, val, "SegmentationClass"), VOC_CLASSES))


def _voc_root(data_dir: Path, data: str, *more: str) -> Path:
    needed = ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass", *more)
    return _root(data_dir, data, ("VOCdevkit/VOC2012", "VOC2012"), needed)


def _voc_pairs(root: Path, names: Sequence[str], masks: str) -> Paths:
    return present([(root / "JPEGImages" / f"{name}.jpg", root / masks / f"{name}.png") for name in names])


def _listed(root: Path, name: str) -> list[str]:
    path = root / "ImageSets" / "Segmentation" / name
    names = [nfc(Path(line.split()[0]).stem) for line in _lines(path) if line.strip()]
    if not names:
        raise UserError(f"{path} must name at least one image, got none")
    return names


def cityscapes(data_dir: Path) -> Datasets:
    """Read Cityscapes with its fine annotations: 2,975 training and 500 validation images, 19 classes.

    Masks are read from *_labelTrainIds.png if they exist, else from *_labelIds.png.
    """
    splits = ("train", "val")
    needed = [f"{part}/{split}" for part in ("leftImg8bit", "gtFine") for split in splits]
    root = _root(data_dir, "cityscapes", ("cityscapes",), needed)
    return Datasets(*(_cityscapes_pairs(root, split) for split in splits))


def _cityscapes_pairs(root: Path, split: str) -> Pairs:
    images = [path for path in images_below(root / "leftImg8bit" / split) if path.name.endswith("_leftImg8bit.png")]
    if not images:
        raise UserError(f"{root / 'leftImg8bit' / split} must hold */*_leftImg8bit.png, got none")

    def masks(kind: str) -> list[Path]:
        files = [each.name.removesuffix("leftImg8bit.png") + f"gtFine_{kind}.png" for each in images]
        return [root / "gtFine" / split / each.parent.name / file for each, file in zip(images, files, strict=True)]

    names = [each.name for each in CITYSCAPES_CLASSES]
    prepared = masks("labelTrainIds")
    if any(each.is_file() for each in prepared):
        return Pairs(present(list(zip(images, prepared, strict=True))), names)
    return Pairs(present(list(zip(images, masks("labelIds"), strict=True))), names, CITYSCAPES_LABELS)


def ade20k(data_dir: Path) -> Datasets:
    """Read the scene parsing benchmark of ADE20K: 20,210 training and 2,000 validation images.

    A mask holds 0 for pixels outside the 150 classes: they are ignored, and class c of a mask becomes c - 1.
    """
    splits = ("training", "validation")
    needed = [f"{part}/{split}" for part in ("images", "annotations") for split in splits]
    root = _root(data_dir, "ade20k", ("ADEChallengeData2016",), needed)
    classes = _ade20k_names(root / "objectInfo150.txt")
    labels = {0: IGNORED} | {label + 1: label for label in range(ADE20K_CLASSES)}
    return Datasets(
        *(Pairs(matched(root / "images" / split, root / "annotations" / split), classes, labels) for split in splits)
    )


def _ade20k_names(path: Path) -> list[str]:
    """Read the first synonym of each class from the last column of a table; return numbers if the file does not exist."""
    if not path.is_file():
        return [str(label) for label in range(ADE20K_CLASSES)]
    rows = [line.split("\t") for line in _lines(path)[1:] if line.strip()]
    names = [row[-1].replace(";", ",").partition(",")[0].strip() for row in rows]
    if len(names) != ADE20K_CLASSES or len({*names, ""}) != ADE20K_CLASSES + 1:
        raise UserError(f"{path} must name {ADE20K_CLASSES} different classes below its header, got {len(names)} lines")
    return names


def folder(root: Path, val_fraction: float, seed: int, skip: bool = False) -> Datasets:
    """Read plain folders: images and masks of one stem, under images/ and masks/.

    The layouts are ROOT/images/train with ROOT/masks/train, ROOT/train/images with ROOT/train/masks (the same for val), and
    ROOT/images with ROOT/masks, names in any case. Without val, some pairs are held out: the same for the same seed and files.
    ROOT/classes.txt names the classes, one per line; without it they are the numbers up to the highest in any mask (with
    `skip`, in any readable mask).

    Raises:
        UserError: A folder or a mask is missing, there are too few images, or classes.txt does not name 2 to 255 classes.
    """
    if not root.is_dir():
        raise UserError(f"no folder of images and masks at {root}")
    (train_folder, train), (val_folder, val) = (_split(root, names) for names in (TRAIN_NAMES, VAL_NAMES))
    images, masks = _kinds(root)
    if not (train or val or images):
        raise UserError(f"{root} must hold images/ and masks/, or train/images/ and train/masks/, got neither")
    if val is None:
        train, val = held_out(train or matched(images or root, masks), val_fraction, seed)
    elif train is None:
        raise UserError(
            f"{root} must have a training folder ({', '.join(TRAIN_NAMES)}) beside that for validation, got none"
        )
    path = root / "classes.txt"
    classes = _names(path) if path.is_file() else [str(label) for label in range(_highest(train + val, root, skip) + 1)]
    if not 2 <= len(classes) <= IGNORED:
        counted = f"{path} must name" if path.is_file() else f"the masks of {root} must hold"
        raise UserError(f"{counted} 2 to {IGNORED} classes ({IGNORED} is ignored), got {len(classes)}")
    left = unused(root, train_folder, val_folder)
    return Datasets(Pairs(train, classes), Pairs(val, classes), unused=left, every_class=True)


def _split(root: Path, names: Sequence[str]) -> tuple[Path | None, Paths | None]:
    """Return the folder of the split with one of these `names`, and its pairs."""
    images, masks = _kinds(root)
    if images and (split := subfolder(images, *names)):
        return split, matched(split, subfolder(masks, split.name.lower(), *names) or masks / split.name)
    split = subfolder(root, *names)
    images, masks = _kinds(split or root)
    return (split, matched(images, masks)) if split and images else (None, None)


def _kinds(folder: Path) -> tuple[Path | None, Path]:
    return subfolder(folder, "images"), subfolder(folder, "masks") or folder / "masks"


def _highest(paths: Paths, root: Path, skip: bool) -> int:
    """Return the highest number in any mask except IGNORED, or -1 if there is no such number."""
    highest = -1
    for _, mask in tqdm(paths, f"counting classes: no classes.txt in {root}", delay=1, disable=None):
        try:
            numbers = read_mask(mask)
        except BrokenImageError:
            if not skip:
                raise
            continue
        highest = max(highest, int(numbers.max(initial=-1, where=numbers != IGNORED)))
        if highest > IGNORED:
            raise UserError(f"mask {mask} must hold class numbers below {IGNORED}, got {highest}")
    return highest


def _names(path: Path) -> list[str]:
    names = [printable(line.strip()) for line in _lines(path)]
    while names and not names[-1]:
        names.pop()
    if "" in names:
        raise UserError(f"{path} must name a class in every line, got none in line {names.index('') + 1}")
    if len(set(names)) < len(names):
        raise UserError(
            f"{path} must name each class once, got {next(each for each in names if names.count(each) > 1)} twice"
        )
    return names


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or one_line(error)}") from error


def _root(data_dir: Path, data: str, inner: Sequence[str], needed: Sequence[str]) -> Path:
    root = next((data_dir / each for each in inner if (data_dir / each).is_dir()), data_dir)
    for each in needed:
        if not (root / each).is_dir():
            raise UserError(
                f"--data {data} needs a --data-dir with {inner[0]} (or that folder itself): no folder {root / each}"
            )
    return root
