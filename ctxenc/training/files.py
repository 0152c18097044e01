"""Image files below a folder: one walk for every command, past what systems and tools leave beside the data."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

# Lower case. Notebooks, macOS and git hide theirs: .ipynb_checkpoints, ._x.jpg, .git. Names that could be classes are not here.
LEFT_BEHIND = frozenset(
    (
        *(
            "__macosx",
            "network trash folder",
            "temporary items",
            "lost+found",
            "found.000",
            "system volume information",
        ),
        *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot", "$recycle.bin"),
        *("thumbs.db", "desktop.ini"),
    )
)


def is_data(name: str) -> bool:
    """Tell whether a file or folder of this `name`, found in a data set, belongs to it."""
    return not name.startswith(".") and name.lower() not in LEFT_BEHIND


def walk(folder: Path, suffixes: Collection[str] = IMG_EXTENSIONS) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield `folder` and each folder below it: its path, the names of its subfolders, and those of its files of `suffixes`.

    Names are sorted. Links are followed, but not to a folder that they lie in.

    Raises:
        OSError: A folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    def returns(link: Path) -> bool:
        return link.is_symlink() and any(
            os.path.samefile(link, each) for each in link.parents if each.is_relative_to(folder)
        )

    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(each for each in folders if is_data(each) and not returns(Path(root, each)))
        yield root, folders, sorted(each for each in files if is_data(each) and Path(each).suffix.lower() in suffixes)


def images_below(folder: Path, suffixes: Collection[str] = IMG_EXTENSIONS) -> list[Path]:
    """Return the paths of the image files at and below `folder`, sorted."""
    return sorted(Path(root, each) for root, _, files in walk(folder, suffixes) for each in files)
