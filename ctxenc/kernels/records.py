"""Store verdicts: one JSON file per kind of kernel and version, in `$CTXENC_CACHE_DIR`, by default `~/.cache/ctxenc`.

A marker lies beside the record while a kernel is being tried. A marker of an ended process means that the kernel
crashed the process. Files are written atomically. An unreadable file counts as absent, and a failed write is skipped.
"""

import hashlib
import json
import os
import socket
import tempfile
import time
import uuid
from functools import cache
from pathlib import Path
from typing import Any

import torch

PATIENCE = 600  # seconds until another machine's marker counts as left behind, as its processes are out of sight
Key = dict[str, Any]  # operator, constants, gpu and versions


def find_directory() -> Path:
    """Return the folder of all records.

    Raises:
        OSError: there is no home directory.
    """
    root = os.path.expanduser(os.environ.get("CTXENC_CACHE_DIR") or "~/.cache/ctxenc")
    if root.startswith("~"):
        raise OSError("there is no home directory")
    return Path(root) / "verdicts"


@cache
def read_versions() -> dict[str, str]:
    """Return the versions of a verdict, with a hash of the kernels' sources."""
    import triton

    files = sorted((Path(__file__).parent / "fused").glob("*.py"))
    sources = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return {"torch": torch.__version__, "triton": triton.__version__, "sources": sources}


def _name_record(key: Key) -> str:
    return f"{key['operator']}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}"


def read(key: Key) -> dict[str, Any] | None:
    """Return the record of exactly this key; None if it is missing or invalid."""
    try:
        record = json.loads((find_directory() / f"{_name_record(key)}.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or any(record.get(name) != value for name, value in key.items()):
        return None
    is_valid = isinstance(record.get("serves"), bool) and isinstance(record.get("reason"), str)
    return record if is_valid else None


def find_record(key: Key) -> Path | None:
    """Return the file of a record, or None."""
    return find_directory() / f"{_name_record(key)}.json" if read(key) else None


def write_verdict(key: Key, verdict: dict[str, Any]) -> None:
    """Record a verdict and remove leftover markers, which are then settled."""
    if _write(f"{_name_record(key)}.json", key | verdict):
        for marker in find_stale_markers(key):
            marker.unlink(missing_ok=True)


def _write(name: str, content: dict[str, Any]) -> Path | None:
    """Write a file and return its path; None if it cannot be written."""
    try:
        find_directory().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=find_directory(), suffix=".tmp", delete=False) as file:
            json.dump(content, file)
        os.replace(file.name, find_directory() / name)
    except OSError:
        return None
    return find_directory() / name


def _read_start_time(pid: int) -> str:
    """Return the start of a process on this machine in ticks since boot; empty if it has ended or cannot be seen."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _identify_machine() -> list[str]:
    """Return this machine with its process namespace (for containers), and its boot id."""
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    host = f"{socket.gethostname()} {os.readlink(processes) if processes.exists() else ''}"
    return [host, boot.read_text().strip() if boot.exists() else ""]


def mark(key: Key) -> Path | None:
    """Leave a marker before this process tries a kernel; None if it cannot be written."""
    owner = {"machine": _identify_machine(), "pid": os.getpid(), "started": _read_start_time(os.getpid())}
    return _write(f"{_name_record(key)}.{uuid.uuid4().hex}.pending", owner)


def find_stale_markers(key: Key) -> list[Path]:
    """Return the markers of ended processes."""
    try:
        return [path for path in find_directory().glob(f"{_name_record(key)}.*.pending") if _has_ended(path)]
    except OSError:
        return []


def _has_ended(marker: Path) -> bool:
    try:
        owner, age = json.loads(marker.read_bytes()), time.time() - marker.stat().st_mtime
        (host, boot), pid, started = owner["machine"], int(owner["pid"]), str(owner["started"])
    except (OSError, ValueError, TypeError, KeyError):
        return False  # not our marker
    machine = _identify_machine()
    if [host, boot] == machine and started:
        return _read_start_time(pid) != started
    return (host == machine[0] and boot != machine[1]) or age > PATIENCE
