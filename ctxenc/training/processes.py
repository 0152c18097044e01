"""What the processes of a training do as one: decide, and tell the user of a mistake."""

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ctxenc.training.console import UserError


def agree(accelerator: Accelerator, choose: Callable[[], Any]) -> Any:
    """What ``choose()`` gives on the main process, on every process.

    Raises:
        UserError: ``choose`` raised it there; on every process.
    """
    chosen: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            chosen[0] = choose()
        except UserError as error:
            if accelerator.num_processes == 1:
                raise
            chosen[1] = str(error)
    found, problem = broadcast_object_list(chosen)
    if problem is not None:
        raise UserError(problem)
    return found


def same(accelerator: Accelerator, value: str) -> bool:
    """Whether ``value`` is the same on every process."""
    return len(set(gather_object([value]))) == 1


def speaks() -> bool:
    """Whether this process tells of a mistake: the first that meets one, or before they are connected, the first of its machine."""
    if not (dist.is_available() and dist.is_initialized()):
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("ctxenc/mistakes", 1) == 1
    except RuntimeError:  # the process that kept the store is gone
        return True
