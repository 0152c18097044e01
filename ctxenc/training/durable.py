"""Write folders whole or not at all, and detect damage in them.

A folder is written under a temporary name beside a list of its files with their checksums, flushed to disk, and renamed. An
interruption leaves the existing folders as they were.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

MANIFEST = "manifest.json"


def write_folder(target: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write a folder with these files, given as names and contents; replace an existing one.

    Raises:
        OSError: It cannot be written; nothing has changed then.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.mkdir(parents=True)
        sums = {}
        for name, content in files:
            _write(temporary / name, content)
            sums[name] = hashlib.sha256(content).hexdigest()
        _write(temporary / MANIFEST, json.dumps(sums, indent=2).encode())
        _sync(temporary)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Flush the names in `folder` to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(folder: Path) -> str:
    """Describe the damage to a folder of write_folder; return an empty text if each file is as written."""
    try:
        sums = json.loads((folder / MANIFEST).read_bytes())
        if not isinstance(sums, dict) or {each.name for each in folder.iterdir()} != {MANIFEST, *sums}:
            return f"its files are not those of {MANIFEST}"
        for name, checksum in sums.items():
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != checksum:
                    return f"{name} does not have the checksum that it was written with"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, RecursionError):
        return f"{MANIFEST} is no JSON"
    return ""


def keep_newest(folders: Path, last: str, keep: int, pattern: str = "*") -> None:
    """Keep the newest `keep` of `folders` by name up to `last`; ignore other names and entries that cannot be removed.

    The pattern matters: `folders` may be a link to a place with other files.
    """
    found = list(folders.glob(pattern))
    names = sorted(each.name for each in found if not each.name.startswith(".") and each.name <= last)
    for old in found:
        if old.name not in names[-keep:]:
            shutil.rmtree(old, ignore_errors=True)
