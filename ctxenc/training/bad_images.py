"""--on-bad-image: what a training does where an image cannot be read.

"fail" stops it. With "skip" another image of the training set takes its place, and one of the validation set counts nowhere. The
substitute follows from (seed, epoch, index), so batches keep their size and a run that is resumed ends as one that was not.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ctxenc.training.console import UserError, printable

FAIL, SKIP = "fail", "skip"
CHOICES = (FAIL, SKIP)
FILE = "bad_images.txt"
SHARE = 0.1  # of all images: where more are broken, it is not the images
HANDFUL = 8  # broken ones that a small set may have all the same
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # Windows has none
TRIES = 16  # substitutes that may be broken themselves


class BrokenImageError(UserError):
    """The file is there, but is no image that can be read."""


class BadImages:
    """The images of a run that were left out, a line each in a file that all its processes add to.

    Args:
        path: The file, made where there is a first one.
        total: The number of images of the run.
    """

    def __init__(self, path: Path, total: int) -> None:
        self.path, self.total = path, total
        self.known: set[bytes] = set()

    def add(self, error: BrokenImageError) -> None:
        """Notes an image, unless it is noted already.

        Raises:
            UserError: There are too many, or the file cannot be written.
        """
        line = printable(error).encode()
        if line in self.known:
            return
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | NO_LINK, 0o666)
            with open(descriptor, "r+b", buffering=0) as file:
                self.known = set(file.read().splitlines())
                if line not in self.known:
                    file.write(line + b"\n")  # at the end, in one piece: O_APPEND
                    self.known.add(line)
        except OSError as problem:
            raise UserError(f"cannot write {self.path}: {problem.strerror}") from problem
        check_share(len(self.known), self.total, error)


def check_share(count: int, total: int, last: BrokenImageError) -> None:
    """Raises UserError where more of ``total`` images are broken than may be left out."""
    limit = max(HANDFUL, int(SHARE * total))
    if count > limit:
        raise UserError(
            f"--on-bad-image skip leaves out at most {limit} of {total} images, got {count}; the last: {last}"
        )


def noted(run: Path) -> list[str]:
    """What a report says of the images that the run left out; nothing where there are none."""
    try:
        count = len(set((run / FILE).read_bytes().splitlines()))
    except FileNotFoundError:
        return []
    return [
        f"{count} image{'s' if count > 1 else ''} could not be read and {'were' if count > 1 else 'was'} left out: {FILE}."
    ]


class Intact(Dataset[Any]):
    """Samples without those whose image is broken.

    Args:
        samples: With the methods of ``Samples`` in the data modules.
        bad: Where broken ones are noted, if anywhere.
        train: Whether another takes its place; else a blank one does that counts nowhere.
    """

    def __init__(self, samples: Any, bad: BadImages | None, train: bool) -> None:
        self.samples, self.bad, self.train = samples, bad, train

    def set_epoch(self, epoch: int) -> None:
        """Names the epoch that the next samples are drawn for."""
        self.samples.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self._found(index)[1]

    def name(self, index: int) -> str:
        """What to call sample ``index``, or that which takes its place."""
        return self.samples.name(self._found(index)[0])

    def _found(self, index: int) -> tuple[int, Any]:
        """Sample ``index`` or what takes its place, with its own index."""
        draws = np.random.default_rng((self.samples.seed, self.samples.epoch, index))
        chosen = index
        for _ in range(TRIES):
            try:
                return chosen, self.samples[chosen]
            except BrokenImageError as error:
                last = error
                if self.bad is not None:
                    self.bad.add(error)
            if not self.train:
                return chosen, self.samples.blank()
            chosen = int(draws.integers(len(self)))
        raise UserError(f"--on-bad-image skip found no whole image in {TRIES} draws; the last: {last}")
