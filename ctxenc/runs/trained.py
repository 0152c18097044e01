"""Load trained networks: from a run of either kind, from a checkpoint of an EncNet, or from one of timm's train.py."""

import importlib
import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from ctxenc.integrations.checkpoints import load_encnet_checkpoint
from ctxenc.integrations.encnet import EncNet
from ctxenc.integrations.hub import build_without_memory
from ctxenc.runs.config import RunConfig, read_config
from ctxenc.runs.errors import UserError, one_line
from ctxenc.runs.folders import (
    build_model,
    check_weights,
    create_model,
    load_checkpoint,
    load_weights,
    pick_device,
    read_checkpoint,
    resolve,
)
from ctxenc.runs.segment_config import IMAGENET, SegmentConfig, build_network

CROP = 480  # crop size of the paper


@dataclass(frozen=True)
class LoadedRun:
    """Hold a trained network, its configuration, its folder or file, and the name of its checkpoint."""

    model: nn.Module
    config: Any
    folder: Path
    checkpoint: str = ""

    @property
    def input_size(self) -> tuple[int, int, int]:
        """The (channels, height, width) of its training images; of an EncNet that states none, the paper's."""
        if isinstance(self.config, RunConfig):
            channels, height, width = self.config.data_config["input_size"]
            return channels, height, width
        crop = self.config.settings.get("crop_size")
        side = crop if type(crop) is int and crop > 0 else CROP
        return self.config.network.get("in_chans", 3), side, side

    def __str__(self) -> str:
        arm, _, seed = self.folder.absolute().name.rpartition("-")
        which = f" (arm {arm}, seed {seed})" if arm and seed.isdecimal() else ""
        return f"{self.folder}{which}, {self.checkpoint} checkpoint" if self.checkpoint else str(self.folder)


def load_run(run: str | os.PathLike[str], checkpoint: str = "best", device: str = "cpu", kind: Any = None) -> LoadedRun:
    """Rebuild a trained network, load its weights, and put it on `device` in eval mode.

    Args:
        run: A run folder (see resolve), an arm's folder, a folder of save_pretrained, or a file for load_encnet_checkpoint.
        checkpoint: "best" or "last" epoch of a run.
        device: A torch device, or "auto".
        kind: RunConfig or SegmentConfig to accept only classification or only segmentation.

    Raises:
        UserError: The run or file is missing, broken or of another kind, or the device cannot be used.
    """
    where, path = pick_device(device), Path(run)
    if path.is_file() or (path / "model.safetensors").is_file():
        if checkpoint != "best" or kind is RunConfig:
            wanted = "a run of finetune" if kind is RunConfig else f"a run, which has a {checkpoint} checkpoint"
            raise UserError(
                f"RUN must be {wanted}, got a file: {path}; for a checkpoint of timm's train.py give its --model"
            )
        network, config = read_encnet(path)
        return LoadedRun(network.to(where).eval(), config, path)
    arm = resolve(path, checkpoint)
    config = read_config(arm, *((RunConfig, SegmentConfig) if kind is None else (kind,)))
    weights = arm / f"{checkpoint}.safetensors"

    build = partial(build_network if isinstance(config, SegmentConfig) else build_model, config)
    check_claims(build, weights)
    model = build()
    load_weights(model, weights)
    return LoadedRun(model.to(where).eval(), config, arm, checkpoint)


def load_timm_checkpoint(path: Path, name: str, modules: Sequence[str] = (), device: str = "cpu") -> LoadedRun:
    """Build a network of timm's train.py, and load its checkpoint: weights only, averaged ones (EMA) if the file has them.

    Args:
        path: The checkpoint. It is read as data, never executed. Its classes have numbers for names.
        name: The model's name, as `--model` of train.py.
        modules: Import these modules first, as `--device-modules` of train.py: they register the model.
        device: A torch device, or "auto".

    Raises:
        UserError: A module or the model is unknown, the file cannot be read or is of another model, or the device cannot be used.
    """
    where = pick_device(device)
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # the user's own code
            hint = "; PYTHONPATH=. finds a module of this folder" if isinstance(error, ImportError) else ""
            raise UserError(
                f"--device-modules: cannot import {module}: {type(error).__name__}: {one_line(error)}{hint}"
            ) from error
    content = read_checkpoint(path)
    args = content.get("args") if isinstance(content, Mapping) else None
    stored = vars(args) if isinstance(args, Namespace) else {}
    model: Any = create_model(name)
    load_checkpoint(model, path, content, take_classes=True)
    try:
        data = resolve_data_config(stored, model=model)
        classes = [str(number) for number in range(model.num_classes)]
        config = RunConfig(name, {}, classes, None, data, settings={}, versions={})
    except Exception as error:  # timm asserts
        raise UserError(f"{path}: {one_line(error)}") from error
    averaged = any(each in content for each in ("state_dict_ema", "model_ema"))
    return LoadedRun(model.to(where).eval(), config, path, "EMA" if averaged else "")


def check_claims(build: Callable[[], nn.Module], weights: Path) -> None:
    """Raise UserError if a network does not fit its file, before allocating it: a configuration may claim any size."""
    try:
        skeleton = build_without_memory(build)
    except UserError:
        return  # the real build reports the reason, unless only the meta device is the obstacle
    check_weights(skeleton, weights)


def read_encnet(path: Path) -> tuple[EncNet, SegmentConfig]:
    """Load an EncNet from a file or save_pretrained folder; take its backbone's mean and std, and number its classes.

    Raises:
        UserError: The path is not an EncNet, or its files are broken or do not fit each other.
    """
    try:
        network = EncNet.from_pretrained(path, local_files_only=True) if path.is_dir() else load_encnet_checkpoint(path)
    except Exception as error:  # huggingface_hub, safetensors and torch each raise their own
        text = (
            str(error) if path.is_file() and isinstance(error, ValueError) else f"cannot load {path}: {one_line(error)}"
        )
        raise UserError(text) from error
    cfg = get_pretrained_cfg(network.config["backbone"])
    colours = {"mean": cfg.mean, "std": cfg.std} if cfg else IMAGENET
    return network, SegmentConfig(
        network=network.config,
        context="encoding",
        classes=[str(number) for number in range(network.num_classes)],
        mean=list(colours["mean"]),
        std=list(colours["std"]),
        settings={},
        versions={},
    )
