"""--on-bad-image: handle unreadable images in training.

"fail" stops the training. "skip" replaces a broken image of the training set by another one, and leaves a broken validation
image out of all measures. The substitute follows from (seed, epoch, index). So batches keep their size, and a resumed run ends
like an uninterrupted one.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ctxenc.runs.errors import UserError, printable

FAIL, SKIP = "fail", "skip"
CHOICES = (FAIL, SKIP)
FILE = "bad_images.txt"
SHARE = 0.1  # of all images: with more, something else is broken
HANDFUL = 8  # broken images that even a small set may have
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # Windows lacks it
TRIES = 16  # substitutes to try, since they may be broken too


class BrokenImageError(UserError):
    """Report a file that exists but is not a readable image."""


class BadImages:
    """List the skipped images of a run, one line each, in a file that all its processes append to.

    Args:
        path: The file, created for the first broken image.
        total: The number of images of the run.
    """

    def __init__(self, path: Path, total: int) -> None:
        self.path, self.total = path, total
        self.known: set[bytes] = set()

    def add(self, error: BrokenImageError) -> None:
        """Record an image once.

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
                    file.write(line + b"\n")  # append in one piece: O_APPEND
                    self.known.add(line)
        except OSError as problem:
            raise UserError(f"cannot write {self.path}: {problem.strerror}") from problem
        check_share(len(self.known), self.total, error)


def check_share(count: int, total: int, last: BrokenImageError) -> None:
    """Raise UserError if more than the allowed share of `total` images is broken."""
    limit = max(HANDFUL, int(SHARE * total))
    if count > limit:
        raise UserError(
            f"--on-bad-image skip leaves out at most {limit} of {total} images, got {count}; the last: {last}"
        )


def noted(run: Path) -> list[str]:
    """Return the report's notes on the images that the run skipped; an empty list if it skipped no image."""
    try:
        count = len(set((run / FILE).read_bytes().splitlines()))
    except FileNotFoundError:
        return []
    return [
        f"{count} image{'s' if count > 1 else ''} could not be read and {'were' if count > 1 else 'was'} left out: {FILE}."
    ]


class Intact(Dataset[Any]):
    """Wrap samples and replace broken images.

    Args:
        samples: With the methods of `Samples` in the data modules.
        bad: Records broken images; None records none.
        train: Replace a broken image by another sample; otherwise by a blank one that no measure counts.
    """

    def __init__(self, samples: Any, bad: BadImages | None, train: bool) -> None:
        self.samples, self.bad, self.train = samples, bad, train

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next samples."""
        self.samples.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self._found(index)[1]

    def name(self, index: int) -> str:
        """Return a name for sample `index`, or for its substitute."""
        return self.samples.name(self._found(index)[0])

    def _found(self, index: int) -> tuple[int, Any]:
        """Return sample `index` or its substitute, with the index of the returned one."""
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


def skip_broken(samples: Any, settings: Any, arm: Path, total: int, train: bool) -> Any:
    """Wrap the samples of an arm in Intact if its settings skip broken images; `total` counts the images of the run."""
    return Intact(samples, BadImages(arm.parent / FILE, total), train) if settings.on_bad_image == SKIP else samples
