"""Save and restore states around other work: generators, train modes, autocast, and after an error every value."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

CPU = torch.device("cpu")


def rng_state(device: torch.device = CPU) -> dict[str, Any]:
    """Return the states of Python's, numpy's, torch's and the device's generators, as torch.load reads with weights_only."""
    import numpy as np  # import ctxenc needs torch alone

    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    state = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(*_which(device))
    return state


def set_rng_state(state: dict[str, Any], device: torch.device = CPU) -> None:
    """Restore the generators; leave the generator of `device` as it is if the state lacks it."""
    import numpy as np

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type], *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # mps has only one


@contextmanager
def seed_generators(python: int, numpy: int, torch_seed: int) -> Iterator[None]:
    """Seed the CPU generators, and restore their states at the end."""
    import numpy as np

    state = rng_state()
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(torch_seed)
    try:
        yield
    finally:
        set_rng_state(state)


@contextmanager
def set_eval_mode(*models: nn.Module | None) -> Iterator[None]:
    """Set eval mode, and restore each module's mode afterwards, also after an error."""
    modes = {module: module.training for model in models if model is not None for module in model.modules()}
    try:
        for model in models:
            if model is not None:
                model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def disable_cast_cache() -> Iterator[None]:
    """Disable autocast's cache in the body: it would keep rounded weights of a block from before its fit."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
        torch.clear_autocast_cache()


@contextmanager
def restore_on_error(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Restore the values of the blocks after an error."""
    before = [{key: value.clone() for key, value in block.state_dict().items()} for block in blocks]
    try:
        yield
    except BaseException:
        for block, values in zip(blocks, before, strict=True):
            block.load_state_dict(values)
        raise
