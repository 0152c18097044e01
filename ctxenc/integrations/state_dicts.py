"""Read weights from files of any trainer: as data, with sizes bounded by the file's, and unwrapped."""

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

# Keys under which trainers store the weights, averaged ones first: timm, torchvision, Lightning and mmengine,
# DeepSpeed.
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module")
NESTED = 4  # depth of nested containers; a pickle may contain itself
WRAPPERS = {
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}  # parts of names that stand for no module
SHOWN = 3


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file and its metadata.

    Raises:
        ValueError: The file is not a safetensors file.
        OSError: It cannot be read.
    """
    path.open("rb").close()  # raises the system's reason: safetensors calls every unreadable file missing
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no valid safetensors file: {error}") from error


def read_pickle(path: Path) -> Any:
    """Read a torch.save file as data: tensors, numbers and texts.

    Raises:
        ValueError: It holds anything else, or claims more data than its size: a tensor may repeat a few numbers without end, and
            a member of the archive may be compressed.
        OSError: It cannot be read.
    """
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _check_claim(path, sum(each.file_size for each in archive.infolist()), size)
        with torch.serialization.safe_globals(_list_harmless_names()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickle protocols
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, _TooLargeError):
        raise
    except Exception as error:  # the unpickler raises a dozen types
        name = re.search(r"GLOBAL:? (\S+)", str(error))
        found = f"{name[1]}, which could run code" if name else "something else"
        raise ValueError(
            f"{path} must be what torch.save wrote of tensors, numbers and texts, got {found}; where you trust it, keep its state"
            " dict and nothing more"
        ) from error
    for tensor in _collect_tensors(content):
        if tensor.layout is torch.strided and not tensor.is_meta:
            _check_claim(path, tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
    return content


class _TooLargeError(ValueError):
    pass


def _check_claim(path: Path, size: int, limit: int) -> None:
    if size > limit:
        raise _TooLargeError(f"{path} claims {size:,} bytes where it holds {limit:,}")


def _collect_tensors(content: Any) -> Iterable[Tensor]:
    """Collect the tensors in tables and lists, entering each container once."""
    queue, entered = [content], set()
    while queue:
        each = queue.pop()
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, Mapping | list | tuple) and id(each) not in entered:
            entered.add(id(each))
            queue += each.values() if isinstance(each, Mapping) else each


def _list_harmless_names() -> list[Any]:
    """Return the names in pickles of timm's arguments and numpy's numbers (numpy 1 and 2): trainers store scores like this."""
    number: Any = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")]
    scalars = [(number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [argparse.Namespace, np.dtype, *kinds, *scalars]


def unwrap(content: Any, wanted: Sequence[str]) -> dict[str, Tensor]:
    """Return the state dict from a trainer's file, under the network's own names.

    It may lie in one of CONTAINERS. Its names may have the trainer's prefix for the network ("module.", "model."),
    contain parts inserted by torch.compile and FSDP, and stand beside AveragedModel's count or the copies of mmcv's
    EMAHook.

    Args:
        content: The content of a file.
        wanted: Names that identify the network; it must have all of them.

    Returns:
        Its tensors. If no part of the content has all wanted names, the names stay unchanged.

    Raises:
        ValueError: The content is not a table of tensors, or holds several such networks.
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
    state = _remove_prefix(state, wanted)
    copies = {f"ema_{name.replace('.', '_')}" for name in state}
    state = {name: each for name, each in state.items() if name not in copies and name != "n_averaged"}
    for name, each in state.items():
        if not isinstance(each, Tensor):
            raise ValueError(f"a state dict must hold tensors, got {type(each).__name__} at {name!r}")
        if each.layout is not torch.strided or each.is_quantized or each.is_meta:
            kind = "quantized" if each.is_quantized else "meta" if each.is_meta else str(each.layout)
            raise ValueError(f"a state dict must hold dense tensors with values, got a {kind} one at {name!r}")
    return state


def _remove_prefix(state: dict[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """Select the entries under the prefix shared by all wanted names, and remove it."""
    if all(name in state for name in wanted):
        return state
    prefixes = [name.removesuffix(wanted[0]) for name in state if name.endswith(f".{wanted[0]}")]
    matches = [each for each in prefixes if all(f"{each}{name}" in state for name in wanted)]
    if len(matches) > 1:
        raise ValueError(f"a state dict must hold one network, got several: {', '.join(matches)}")
    if not matches:
        return state
    return {name.removeprefix(matches[0]): each for name, each in state.items() if name.startswith(matches[0])}


def compare_names(theirs: Iterable[str], ours: Iterable[str]) -> str:
    """Describe the first names present on one side only; empty if there is no difference."""
    theirs, ours = list(theirs), list(ours)
    missing, more = (
        [name for name in one if name not in set(other)] for one, other in ((ours, theirs), (theirs, ours))
    )
    parts = [
        f"{text} {', '.join(names[:SHOWN])}" for text, names in (("it has", more), ("the network", missing)) if names
    ]
    return f"{'; '.join(parts)} ({len(more)} and {len(missing)} such names)" if parts else ""
