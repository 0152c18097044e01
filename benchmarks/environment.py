"""Describe the environment of a result: the machine, the versions, the commit."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def _processor() -> str:
    """Return the processor model; "unknown" if the system does not report it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _output(command: list[str]) -> str:
    """Return the output of a command; empty if there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        return ""


def _gpu() -> dict[str, Any]:
    """Return the GPU settings that affect times."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def _commit() -> str:
    def git(*args: str) -> str:
        return _output(["git", *args])

    return git("rev-parse", "--short=12", "HEAD") + (
        "+changes" if git("status", "--porcelain", "--", "../ctxenc") else ""
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """Return machine, versions and commit of this process, ready for JSON."""
    cuda = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        **({"gpu_properties": _gpu()} if cuda else {}),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "torchvision", "timm", "triton", "numpy")},
        "commit": _commit(),
    }
