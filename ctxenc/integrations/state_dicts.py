"""Weights in files of any trainer: read as data, their sizes held to the file's, and taken out of their wrappings."""

import argparse
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# Where trainers put the weights, averaged ones first: timm, torchvision, Lightning and mmengine, DeepSpeed.
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module")
NESTED = 4  # containers in each other; a pickle may hold itself
WRAPPERS = {
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}  # parts of names that stand for no module
SHOWN = 3


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and its metadata.

    Raises:
        ValueError: It is no safetensors file.
        OSError: It cannot be read.
    """
    path.open("rb").close()  # for the system's reason: safetensors calls missing whatever it cannot open
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no valid safetensors file: {error}") from error


def read_pickle(path: Path) -> Any:
    """What torch.save wrote, as data: tensors, numbers and texts.

    Raises:
        ValueError: It holds anything else, or claims more than the file has: a tensor may repeat a few numbers without end, and
            a member of the archive may be compressed.
        OSError: It cannot be read.
    """
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _check_claim(path, sum(each.file_size for each in archive.infolist()), size)
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on old protocols of pickle
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, _TooLargeError):
        raise
    except Exception as error:  # its unpickler raises a dozen kinds
        refused = re.search(r"GLOBAL:? (\S+)", str(error))
        found = f"{refused[1]}, which could run code" if refused else "something else"
        raise ValueError(
            f"{path} must be what torch.save wrote of tensors, numbers and texts, got {found}; where you trust it, keep its state"
            " dict and nothing more"
        ) from error
    for tensor in _tensors(content):
        if tensor.layout is torch.strided and not tensor.is_meta:
            _check_claim(path, tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
    return content


class _TooLargeError(ValueError):
    pass


def _check_claim(path: Path, claimed: int, there: int) -> None:
    if claimed > there:
        raise _TooLargeError(f"{path} claims {claimed:,} bytes where it holds {there:,}")


def _tensors(content: Any) -> Iterable[Tensor]:
    """The tensors in tables and lists, each of which is entered once."""
    left, seen = [content], set()
    while left:
        each = left.pop()
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, Mapping | list | tuple) and id(each) not in seen:
            seen.add(id(each))
            left += each.values() if isinstance(each, Mapping) else each


def _harmless() -> list[Any]:
    """What pickles of timm's arguments and of numpy's numbers name, in numpy 1 and 2: trainers keep their scores so."""
    number: Any = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")]
    scalars = [(number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [argparse.Namespace, np.dtype, *kinds, *scalars]


def unwrapped(content: Any, wanted: Sequence[str]) -> dict[str, Tensor]:
    """The state dict in what a trainer saved, by the names that its network gives them.

    It may lie in one of CONTAINERS. Its names may begin with what the trainer calls the network ("module.", "model."), hold parts
    that torch.compile and FSDP insert, and have AveragedModel's count or the copies of mmcv's EMAHook beside them.

    Args:
        content: What a file holds.
        wanted: Names that it must hold, by which the network is found.

    Returns:
        Its tensors. Where no part of it holds all that is wanted, their names are as they are.

    Raises:
        ValueError: It is no table of tensors, or holds several such networks.
    """
    for _ in range(NESTED):
        key = next(
            (key for key in CONTAINERS if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)), None
        )
        content = content if key is None else content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"a state dict must be a table, got {type(content).__name__}")
    if strange := [name for name in content if not isinstance(name, str)]:
        raise ValueError(f"a state dict must have names for keys, got {strange[0]!r}")
    state = {".".join(part for part in name.split(".") if part not in WRAPPERS): each for name, each in content.items()}
    state = _within(state, wanted)
    copies = {f"ema_{name.replace('.', '_')}" for name in state}
    state = {name: each for name, each in state.items() if name not in copies and name != "n_averaged"}
    for name, each in state.items():
        if not isinstance(each, Tensor):
            raise ValueError(f"a state dict must hold tensors, got {type(each).__name__} at {name!r}")
        if each.layout is not torch.strided or each.is_quantized or each.is_meta:
            kind = "quantized" if each.is_quantized else "meta" if each.is_meta else str(each.layout)
            raise ValueError(f"a state dict must hold dense tensors with values, got a {kind} one at {name!r}")
    return state


def _within(state: dict[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """What lies under the beginning of names that all wanted ones have, without it."""
    if all(name in state for name in wanted):
        return state
    beginnings = [name.removesuffix(wanted[0]) for name in state if name.endswith(f".{wanted[0]}")]
    found = [each for each in beginnings if all(f"{each}{name}" in state for name in wanted)]
    if len(found) > 1:
        raise ValueError(f"a state dict must hold one network, got several: {', '.join(found)}")
    if not found:
        return state
    return {name.removeprefix(found[0]): each for name, each in state.items() if name.startswith(found[0])}


def side_by_side(theirs: Iterable[str], ours: Iterable[str]) -> str:
    """The first names that only one of both has, in words; empty where there is no difference."""
    theirs, ours = list(theirs), list(ours)
    lacking, more = (
        [name for name in one if name not in set(other)] for one, other in ((ours, theirs), (theirs, ours))
    )
    parts = [
        f"{text} {', '.join(names[:SHOWN])}" for text, names in (("it has", more), ("the network", lacking)) if names
    ]
    return f"{'; '.join(parts)} ({len(more)} and {len(lacking)} such names)" if parts else ""
