"""Protect state from calibrate(): random states, autocast's cache and, after an error, the values of the blocks."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def keep_random_states(seed: int) -> Iterator[None]:
    """Seed the generators that an image loader may use, and restore their states at the end."""
    import numpy as np  # scikit-learn brings it

    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


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
    """Restore the values of the blocks after an error in the body."""
    before = [{key: value.clone() for key, value in block.state_dict().items()} for block in blocks]
    try:
        yield
    except BaseException:
        for block, values in zip(blocks, before, strict=True):
            block.load_state_dict(values)
        raise
