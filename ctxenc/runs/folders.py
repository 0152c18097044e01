"""Run folders: store the weights, and rebuild a model from them.

RUN/config.json  metrics.csv  report.html  report.md  curves.png
RUN/<arm>-<seed>/config.json  metrics.csv  timings.csv  codebooks.csv  predictions.csv  last, best (.safetensors)  checkpoints/
RUN/<arm>-<first seed>/pictures/
"""

import importlib.metadata
import platform
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_IMODE
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models import get_arch_pretrained_cfgs, split_model_name_tag
from torch import nn

import ctxenc.integrations.timm_models  # register our networks with timm
from ctxenc.integrations.state_dicts import compare_names, read_pickle, read_safetensors, unwrap
from ctxenc.runs.config import RunConfig, atomic
from ctxenc.runs.errors import UserError, near_names, one_line
from ctxenc.swap.patching import patch_se_blocks

SCORE = "balanced_accuracy"  # the column of metrics.csv that chooses the best epoch
CHECKPOINTS = ("best", "last")


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a run depends on."""
    names = ("torch", "torchvision", "timm", "accelerate")
    versions = {"python": platform.python_version(), "ctxenc": ctxenc.__version__}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def check_model_name(name: str) -> None:
    """Raise UserError, with near names, if timm does not know the architecture or the pretrained tag in name."""
    if not timm.is_model(name):
        raise unknown_model(name, timm.list_models())
    architecture, tag = split_model_name_tag(name)
    if tag and name not in (tagged := get_arch_pretrained_cfgs(architecture)):
        raise unknown_model(name, [architecture, *tagged])


def unknown_model(name: str, known: Sequence[str]) -> UserError:
    """Return the error for an unknown model; it names the nearest known ones."""
    return UserError(f"unknown model {name!r}; {near_names(name, known)}")


def build_model(config: RunConfig, pretrained: bool = False, initial: str | None = None) -> nn.Module:
    """Build the timm model of config; swap its SE blocks if the configuration asks for it.

    Args:
        config: The run's configuration.
        pretrained: Start from timm's pretrained weights (may download); they are loaded before the swap.
        initial: Start from this file of weights instead, also before the swap; see load_initial.

    Raises:
        UserError: The model is unknown, rejects its arguments, has nothing to swap, or its weights are unavailable or do not
            fit.
    """
    model = create_model(config.model, pretrained=pretrained, num_classes=len(config.classes), **config.model_kwargs)
    if initial is not None:
        load_initial(model, Path(initial))
    if config.swap is not None:
        try:
            # Runs older than this option used the sum.
            patch_se_blocks(model, **({"aggregation": "sum"} | config.swap))
        except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: no memory for the codewords
            raise UserError(f"{config.model}: {one_line(error)}") from error
    return model


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """Return the timm model of this name; `kwargs` are those of `timm.create_model`.

    Raises:
        UserError: The model is unknown, rejects its arguments, or its weights are unavailable.
    """
    check_model_name(name)
    try:
        return timm.create_model(name, **kwargs)
    except Exception as error:  # timm's builders and the hub raise a dozen kinds, down to bare assertions
        raise UserError(f"cannot build {name}: {type(error).__name__}: {one_line(error)}") from error


def load_initial(model: nn.Module, path: Path) -> None:
    """Load initial weights into a timm model; keep the present classifier if the number of classes differs.

    Args:
        model: Not swapped yet.
        path: A run of finetune (its first SE network), safetensors, or a checkpoint of timm's train.py, torchvision's
            references, Lightning or others (see state_dicts.unwrap); averaged weights are preferred. Read as data, never
            executed.

    Raises:
        UserError: The file is missing, unreadable, or of another model. The model is then unchanged.
    """
    if path.is_dir():
        path = resolve(path, preferred=("se-",)) / "best.safetensors"
    try:
        load_checkpoint(model, path, read_checkpoint(path))
    except UserError as error:
        raise UserError(f"--initial-checkpoint {error}") from error


def read_checkpoint(path: Path) -> Any:
    """Read safetensors or a file of torch.save as data, never executed.

    Raises:
        UserError: The file is missing or unreadable.
    """
    try:
        return read_safetensors(path)[0] if path.suffix == ".safetensors" else read_pickle(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except ValueError as error:
        raise UserError(f"{path} is no file of weights: {one_line(error)}") from error


def load_checkpoint(model: Any, path: Path, content: Any, take_classes: bool = False) -> None:
    """Load the content of another trainer's file into a timm model; prefer averaged weights, as timm's loaders do.

    Args:
        model: Built as in the training.
        path: The file, for the text of errors.
        content: See state_dicts.unwrapped.
        take_classes: If the number of classes differs, give the model the file's classifier; by default it keeps its own.

    Raises:
        UserError: The content is of another model. The weights of `model` are then unchanged.
    """
    own = model.state_dict()
    try:
        weights = unwrap(content, list(own))
    except ValueError as error:
        raise UserError(f"{path} is no file of weights: {one_line(error)}") from error
    classifiers: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{each}." for each in ([classifiers] if isinstance(classifiers, str) else classifiers))
    other = [
        name for name in own if name in weights and name.startswith(prefixes) and weights[name].shape != own[name].shape
    ]
    if other and take_classes and weights[other[0]].dim():
        model.reset_classifier(len(weights[other[0]]))
        own = model.state_dict()
    else:
        weights |= {name: own[name] for name in other}
    shapes, wanted = ({name: tuple(each.shape) for name, each in table.items()} for table in (weights, own))
    if problem := _mismatch(shapes, wanted):
        swapped = any(name.endswith(".encoding.codewords") for name in shapes.keys() - wanted.keys())
        hint = "; it is of a swapped network, the model is not swapped" if swapped else ""
        raise UserError(f"{path} does not fit the model: {problem}{hint}")
    model.load_state_dict(weights)


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the parameters and buffers of model as safetensors, whole or not at all.

    Raises:
        UserError: The file cannot be written.
    """
    with atomic(path) as temporary:
        mode = temporary.stat().st_mode  # that of any new file: safetensors lets only the owner read its files
        try:
            safetensors.torch.save_model(model, str(temporary))
        except SafetensorError as error:
            raise UserError(f"cannot write {path}: {one_line(error)}") from error
        with suppress(PermissionError):  # a file system without modes
            temporary.chmod(S_IMODE(mode))


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of save_weights into model; every name and shape must match.

    Raises:
        UserError: The file is missing, damaged or of another model. The model is then unchanged.
    """
    aliases = check_weights(model, path)
    own = model.state_dict()
    for name, kept in aliases.items():
        if own[name].data_ptr() != own[kept].data_ptr():
            raise UserError(f"{path} does not fit the model of its configuration: {name} is missing, {kept} is another")
    safetensors.torch.load_model(model, path)


def check_weights(model: nn.Module, path: Path) -> dict[str, str]:
    """Raise UserError unless the file has the names and shapes of model, which may be on the meta device.

    Returns:
        Second names in the file for tensors of model, each with the first name.
    """
    try:
        path.open("rb").close()  # the system's own error: safetensors reports any file that it cannot open as missing
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            second = file.metadata() or {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or no safetensors file: {one_line(error)}") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    aliases = {name: kept for name, kept in second.items() if name in wanted.keys() - shapes.keys() and kept in wanted}
    shapes |= {name: shapes[kept] for name, kept in aliases.items() if kept in shapes}
    if problem := _mismatch(shapes, wanted):
        raise UserError(f"{path} does not fit the model of its configuration: {problem}")
    return aliases


def _mismatch(shapes: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> str:
    if names := compare_names(shapes, wanted):
        return names
    name = next((name for name, shape in wanted.items() if shapes[name] != shape), None)
    return "" if name is None else f"{name} has shape {shapes[name]}, the model {wanted[name]}"


def resolve(run: Path, checkpoint: str = "best", preferred: tuple[str, ...] = ("context-", "encnet-")) -> Path:
    """Find the folder of one arm in run.

    run may also be the folder of an arm. Of several arms, take the first seed of an arm whose name begins with `preferred`,
    else the first seed of any. The best of several seeds would be chosen on the same images that then judge it.

    Raises:
        UserError: The folder does not exist, is not a run, or has no such checkpoint.
    """
    if checkpoint not in CHECKPOINTS:
        raise UserError(f"checkpoint must be one of {', '.join(CHECKPOINTS)}, got {checkpoint!r}")
    if not run.is_dir():
        raise UserError(f"no run at {run}")
    if _is_arm(run):
        arms = [run]
    else:
        arms = [each for each in run.iterdir() if each.is_dir() and _is_arm(each)]
        if not arms:
            raise UserError(f"{run} is no run folder: neither it nor a folder in it holds a configuration and weights")
    arm = min([each for each in arms if each.name.startswith(preferred)] or arms, key=_name_and_seed)
    weights = arm / f"{checkpoint}.safetensors"
    if not weights.is_file():
        raise UserError(f"{weights} does not exist")
    return arm


def _is_arm(folder: Path) -> bool:
    weights = any((folder / f"{checkpoint}.safetensors").is_file() for checkpoint in CHECKPOINTS)
    return weights and (folder / "config.json").is_file()


def _name_and_seed(arm: Path) -> tuple[str, int, str]:
    name, _, seed = arm.name.rpartition("-")
    return name, int(seed) if seed.isdecimal() else 0, seed


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called name; "auto" is the accelerator if there is one, else the CPU.

    Raises:
        UserError: The device is unknown or not present on this machine.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name!r} cannot be used: {one_line(error)}") from error
    return device


def autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """Return the mixed-precision context for inference; amp is "bf16", "fp16" or None for full precision."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}[amp]
    return torch.autocast(device.type, dtype=dtype, enabled=amp is not None)
