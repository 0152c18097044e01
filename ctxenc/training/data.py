"""The data sets: sources of images, their splits, and timm's transforms for a configuration."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.utils import natural_key
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import Compose, RandomCrop, Resize
from tqdm import tqdm

from ctxenc.runs.errors import UserError, one_line, printable
from ctxenc.swap.states import seed_generators
from ctxenc.training import photographs
from ctxenc.training.bad_images import BrokenImageError, check_share
from ctxenc.training.fashion import FASHION_MNIST, FashionSource
from ctxenc.training.files import both, nfc, subfolder, unused, walk
from ctxenc.training.images import open_image
from ctxenc.training.settings import PHOTOGRAPHS, Settings

CIFAR = ("cifar10", "cifar100")
IMAGENET = "imagenet"
VERIFIED_UP_TO = 2000  # images: about ten seconds of decoding; a larger set fails at the broken image
LEFT_OUT = -1  # as a target: counts nowhere
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "dev", "eval", "test", "testing")  # the first existing one is used


class Source(Protocol):
    """Provide RGB images with their classes."""

    classes: list[str]
    targets: list[int]

    def image(self, index: int) -> Image.Image:
        """Return the RGB image of sample `index`; may draw from the global generators, which are seeded for the sample."""

    def name(self, index: int) -> str:
        """Return a name for sample `index`: a path or a number."""


class FolderSource:
    """Read an image folder. Each folder with images is one class under its own name, in timm's order.

    timm's reader is not used: it skips unreadable files and joins folders of one name, and its dataset replaces an image that
    it cannot open by the next one.

    Args:
        folder: Holds the class folders, at any depth.
        class_to_index: The numbering of classes (default: in the order of their names).

    Raises:
        UserError: The folder does not exist, an image lies outside the class folders, a class folder is empty, two share a
            name, or one is not in `class_to_index`.
    """

    def __init__(self, folder: Path, class_to_index: dict[str, int] | None = None) -> None:
        if not folder.is_dir():
            raise UserError(f"no image folder at {folder}")
        self.folder = folder
        images = class_images(folder)
        self.class_to_index = class_to_index or {
            name: index for index, name in enumerate(sorted(images, key=natural_key))
        }
        if unknown := sorted(images.keys() - self.class_to_index.keys()):
            raise UserError(f"{folder} has the class {unknown[0]}, which the training set lacks")
        self.classes = list(self.class_to_index)
        samples = [(path, self.class_to_index[name]) for name, paths in images.items() for path in paths]
        samples.sort(key=lambda sample: natural_key(sample[0]))
        self.paths = [path for path, _ in samples]
        self.targets = [target for _, target in samples]

    def image(self, index: int) -> Image.Image:
        """Decode sample `index`.

        Raises:
            UserError: The file cannot be read as an image; the text holds its path.
        """
        return open_image(self.paths[index])

    def name(self, index: int) -> str:
        """Return the printable path of sample `index`."""
        return printable(self.paths[index])


def class_images(folder: Path) -> dict[str, list[str]]:
    """Return the paths of the images below `folder`, by the name of their own folder.

    Raises:
        UserError: There is no image, an image lies outside the class folders, a class folder is empty, or two share a name.
        OSError: A folder cannot be read.
    """
    images: dict[str, list[str]] = {}
    for root, folders, files in walk(folder):
        name = nfc(os.path.basename(root))
        found = [os.path.join(root, file) for file in files]
        if root == str(folder):
            if found:
                raise UserError(f"{found[0]} lies in no class folder: {folder} must hold one folder a class")
        elif found:
            if name in images:
                raise UserError(f"two folders of the class {name}: {both(os.path.dirname(images[name][0]), root)}")
            images[name] = found
        elif not folders:
            raise UserError(f"the class folder {root} holds no images ({', '.join(IMG_EXTENSIONS)})")
    if not images:
        raise UserError(f"{folder} holds no images in class folders")
    return images


class CifarSource:
    """Read CIFAR-10 or CIFAR-100 through torchvision.

    Raises:
        UserError: The files are missing, or cannot be downloaded.
    """

    def __init__(self, name: str, folder: str, split: str, download: bool) -> None:
        try:
            self.dataset = create_dataset(f"torch/{name}", root=folder, split=split, download=download)
        except (RuntimeError, OSError) as error:
            hint = "" if download else "; --download fetches it"
            raise UserError(f"{name} cannot be had from {folder}{hint}: {one_line(error)}") from error
        self.classes = list(self.dataset.classes)
        self.targets = list(self.dataset.targets)
        self.split = split

    def image(self, index: int) -> Image.Image:
        """Return image `index`."""
        return self.dataset[index][0]

    def name(self, index: int) -> str:
        """Return the split and number of image `index`."""
        return f"{self.split}:{index}"


class Subset:
    """Select some samples of a source."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices
        self.classes = source.classes
        self.targets = [source.targets[index] for index in indices]

    def image(self, index: int) -> Image.Image:
        """Return image `index` of the subset."""
        return self.source.image(self.indices[index])

    def name(self, index: int) -> str:
        """Return name `index` of the subset."""
        return self.source.name(self.indices[index])


class Samples(Dataset[tuple[Tensor, Any]]):
    """Apply a transform to a source. Random draws follow from (seed, epoch, index).

    So the sample does not depend on the worker, on earlier samples, or on an interruption, and the generators of the process
    keep their states.

    Args:
        source: Provides the images.
        transform: Makes a (3, H, W) tensor of an image.
        seed: Seed of all random draws.
    """

    def __init__(self, source: Source, transform: Any, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next samples; call it before the loader starts its workers."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.source.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        with seed_draws(self.seed, self.epoch, index):
            return self.transform(self.source.image(index)), self.source.targets[index]

    def blank(self) -> tuple[Tensor, Any]:
        """Return a sample that counts nowhere."""
        return self.transform(Image.new("RGB", (1, 1))), LEFT_OUT

    def name(self, index: int) -> str:
        """Return a name for sample `index`."""
        return self.source.name(index)


@dataclass(frozen=True)
class Datasets:
    """Hold the data of a training: two sources over the same classes.

    Args:
        train: The training source.
        val: The validation source.
        unused: Unused folders of the data.
        every_class: Whether every class must occur in the training masks: a part of a published data set may lack some.
    """

    train: Any
    val: Any
    unused: Sequence[str] = field(default=(), kw_only=True)
    every_class: bool = field(default=False, kw_only=True)

    @property
    def classes(self) -> list[str]:
        """Return the class names in the order of the logits."""
        return self.train.classes


def seed_draws(*key: int) -> AbstractContextManager[None]:
    """Seed the CPU generators with `key` in the body, and restore their states at the end."""
    return seed_generators(*map(int, np.random.SeedSequence(key).generate_state(3)))


def build_datasets(settings: Settings) -> Datasets:
    """Build the training and validation sources of `settings`.

    Raises:
        UserError: A path is wrong, a folder is empty, classes do not agree, or there are too few images.
    """
    if settings.data == PHOTOGRAPHS:
        datasets = Datasets(photographs.RandomCrops(), photographs.DisjointTiles())
    elif settings.data in CIFAR:
        train, val = (
            CifarSource(settings.data, settings.data_dir, split, settings.download) for split in ("train", "val")
        )
        datasets = Datasets(train, val)
    elif settings.data == FASHION_MNIST:
        datasets = Datasets(*(FashionSource(settings.data_dir, split, settings.download) for split in ("train", "val")))
    else:
        datasets = _folder_datasets(_folder_of(settings), settings)
    if len(datasets.classes) < 2:
        raise UserError(f"--data {settings.data} holds one class ({datasets.classes[0]}); at least two are needed")
    return datasets


def validation_source(settings: Settings, classes: Sequence[str], data: str | None = None) -> Source:
    """Return the source to evaluate a trained model on.

    Args:
        settings: The settings of the run.
        classes: The model's class names.
        data: A folder to use in place of the run's own validation set; its val folder if it has one, else all of it.

    Raises:
        UserError: The data does not exist, or has a class missing from `classes`.
    """
    if data is None:
        source = build_datasets(settings).val
        if list(source.classes) != list(classes):
            raise UserError(f"the classes of --data {settings.data} are no longer those that the run was trained on")
        return source
    folder = Path(data)
    return FolderSource(subfolder(folder, *VAL_NAMES) or folder, {name: i for i, name in enumerate(classes)})


def _folder_of(settings: Settings) -> Path:
    if settings.data != IMAGENET:
        return Path(settings.data)
    folder = Path(settings.data_dir)
    if not (subfolder(folder, *TRAIN_NAMES) and subfolder(folder, *VAL_NAMES)):
        raise UserError(f"--data imagenet needs a --data-dir with folders train and val, got {folder}")
    return folder


def _folder_datasets(folder: Path, settings: Settings) -> Datasets:
    train_folder, val_folder = subfolder(folder, *TRAIN_NAMES), subfolder(folder, *VAL_NAMES)
    if train_folder and val_folder:
        train = FolderSource(train_folder)
        val = FolderSource(val_folder, train.class_to_index)
        return Datasets(train, val, unused=unused(folder, train_folder, val_folder))
    whole = FolderSource(train_folder or folder)
    train_indices, val_indices = stratified_split(whole, settings.val_fraction, settings.seed)
    return Datasets(Subset(whole, train_indices), Subset(whole, val_indices), unused=unused(folder, train_folder))


def stratified_split(source: Source, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split the samples of `source` class by class: the same split for the same seed and files.

    Args:
        source: At least two samples per class.
        fraction: Share of each class for validation, rounded; at least one sample goes to each side.
        seed: Seed of the draw.

    Returns:
        Sorted indices for training, and for validation.

    Raises:
        UserError: A class has a single image.
    """
    train: list[int] = []
    val: list[int] = []
    generator = np.random.default_rng(seed)
    targets = np.asarray(source.targets)
    for target, name in enumerate(source.classes):
        own = generator.permutation(np.flatnonzero(targets == target))
        if len(own) < 2:
            raise UserError(f"class {name} has {len(own)} image; at least 2 are needed to hold one out")
        held_out = min(max(round(fraction * len(own)), 1), len(own) - 1)
        val += own[:held_out].tolist()
        train += own[held_out:].tolist()
    return sorted(train), sorted(val)


def verify(datasets: Datasets, show_progress: bool = True, skip: bool = False) -> None:
    """Decode every image of a small image folder, so that a broken one shows before training starts.

    Raises:
        UserError: An image is broken, or with `skip` too many are; the text holds its path.
    """
    sources = [source for source in (datasets.train, datasets.val) if isinstance(_base(source), FolderSource)]
    samples = [(source.image, index) for source in sources for index in range(len(source.targets))]
    read_all(samples, "checking images", show_progress, skip)


def read_all(samples: Sequence[tuple[Callable[[int], Any], int]], text: str, show_progress: bool, skip: bool) -> None:
    """Read the samples of a small set: functions with their arguments.

    Raises:
        UserError: An image is broken, or with `skip` too many are.
    """
    if len(samples) > VERIFIED_UP_TO:
        return
    broken = 0
    for read, index in tqdm(samples, text, delay=1, disable=None if show_progress else True):
        try:
            read(index)
        except BrokenImageError as error:
            if not skip:
                raise
            broken += 1
            check_share(broken, len(samples), error)


def _base(source: Source) -> Source:
    return source.source if isinstance(source, Subset) else source


def train_transform(settings: Settings, data_config: dict[str, Any]) -> Any:
    """Build timm's training transform for `data_config` with the augmentation of `settings`.

    Raises:
        UserError: timm does not know the policy of --auto-augment.
    """
    _, height, width = data_config["input_size"]
    padding, scale, ratio = settings.crop_padding, (settings.crop_scale, 1.0), None
    if padding is not None:  # timm then crops the whole of it
        scale, ratio = (1.0, 1.0), (width / height, width / height)
    try:
        transform = create_transform(
            input_size=data_config["input_size"],
            is_training=True,
            scale=scale,
            ratio=ratio,
            color_jitter=settings.color_jitter,
            auto_augment=settings.auto_augment,
            re_prob=settings.random_erase,
            interpolation=data_config["interpolation"],
            mean=data_config["mean"],
            std=data_config["std"],
        )
    except Exception as error:  # timm asserts, or fails to read a number
        if settings.auto_augment is None:
            raise
        rule = "must be a policy of timm, such as rand-m9-mstd0.5"
        raise UserError(f"--auto-augment {rule}, got {settings.auto_augment!r}: {one_line(error)}") from error
    if padding is None:
        return transform
    cropped = RandomCrop((height, width), padding=padding, pad_if_needed=True)
    return Compose([Resize(max(height, width)), cropped, transform])


def eval_transform(data_config: dict[str, Any]) -> Any:
    """Build timm's evaluation transform for `data_config`."""
    return create_transform(**data_config, is_training=False)
