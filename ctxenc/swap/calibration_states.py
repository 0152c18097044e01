"""Keep the state around calibrate(): random states, modes, autocast, and after an error every value."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def random_states_kept(seed: int) -> Iterator[None]:
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
def no_kept_casts() -> Iterator[None]:
    """Disable autocast's cache in the body: it would keep rounded weights of a block from before its fit."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)
        torch.clear_autocast_cache()


@contextmanager
def all_or_nothing(blocks: Sequence[nn.Module], *models: nn.Module | None) -> Iterator[None]:
    """Set eval mode in the body and restore the modes; after an error restore the blocks' values too."""
    modes = {module: module.training for model in models if model is not None for module in model.modules()}
    before = [{key: value.clone() for key, value in block.state_dict().items()} for block in blocks]
    try:
        for model in models:
            if model is not None:
                model.eval()
        yield
    except BaseException:
        for block, values in zip(blocks, before, strict=True):
            block.load_state_dict(values)
        raise
    finally:
        for module, training in modes.items():
            module.training = training
