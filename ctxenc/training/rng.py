"""Save and restore a process's generators: Python's, numpy's, torch's, and its device's."""

import random
from typing import Any, cast

import numpy as np
import torch


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of all generators, in types that torch.load reads with weights_only."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(*_which(device))
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the generators; leave the generator of `device` as it is if the state lacks it."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type], *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # mps has only one
