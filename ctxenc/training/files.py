"""Find image files below a folder, in one way for every command; skip the leftovers of systems and tools."""

import os
import unicodedata
from collections.abc import Collection, Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

# Lower case. Notebooks, macOS and git hide theirs: .ipynb_checkpoints, ._x.jpg, .git. Possible class names are not here.
LEFT_BEHIND = {
    *("__macosx", "network trash folder", "temporary items", "lost+found", "found.000", "system volume information"),
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot", "$recycle.bin"),
    *("thumbs.db", "desktop.ini"),
}


def is_data(name: str) -> bool:
    """Return whether a file or folder called `name` belongs to a data set."""
    return not name.startswith(".") and name.lower() not in LEFT_BEHIND


def walk(folder: Path, suffixes: Collection[str] = IMG_EXTENSIONS) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield `folder` and each folder below it: its path, the names of its subfolders, and its files with `suffixes`.

    Names are sorted. Links are followed, except to a folder above them.

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


def nfc(name: str) -> str:
    """Return the name in the Unicode form NFC, so that equal-looking names are equal: macOS and zip tools write NFD."""
    return unicodedata.normalize("NFC", name)


def both(first: str | Path, second: str | Path) -> str:
    """Return the two paths as text; say so if they differ only in their Unicode form."""
    alike = nfc(str(first)) == nfc(str(second))
    return f"{first} and {second}{', one name in two Unicode forms' if alike else ''}"


def images_below(folder: Path, suffixes: Collection[str] = IMG_EXTENSIONS) -> list[Path]:
    """Return the paths of the image files at and below `folder`, sorted."""
    return sorted(Path(root, each) for root, _, files in walk(folder, suffixes) for each in files)


def subfolder(folder: Path, *names: str) -> Path | None:
    """Return the first existing subfolder of these lower-case `names`, in any case; None if there is no match."""
    found = {each.name.lower(): each for each in _subfolders(folder)}  # if two differ in case alone, the lower one
    return next((found[name] for name in names if name in found), None)


def unused(root: Path, *used: Path | None) -> list[str]:
    """Return the folders that are not `used`, as relative paths below `root`."""
    taken = [each for each in used if each is not None]
    beside = {each for parent in {each.parent for each in taken} for each in _subfolders(parent)}
    return sorted(str(each.relative_to(root)) for each in beside if each not in taken)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if is_data(each.name) and each.is_dir()) if folder.is_dir() else []
