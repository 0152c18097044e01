"""The processes of a training: set them up, and let them decide and report errors as one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedType, broadcast_object_list, gather_object

from ctxenc.runs.errors import UserError, one_line
from ctxenc.runs.folders import pick_device
from ctxenc.training.settings import TrainingSettings

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def make_accelerator(settings: TrainingSettings, seed: int = 0, arm: Path | None = None) -> Accelerator:
    """Set up Accelerate for `settings`; the order of training samples follows from `seed` and the epoch.

    With `arm`, the trackers that `settings` ask for write to this folder.

    Raises:
        UserError: The device is missing, or lacks this precision or SyncBatchNorm; or the launcher asks for shards.
    """
    pick_device(settings.device)
    if settings.device not in ("auto", "cpu"):
        os.environ["ACCELERATE_TORCH_DEVICE"] = settings.device
    # The sampler seeds epoch e with data_seed + e: seeds lie far enough apart not to share an order.
    loading = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=100_000 * seed)
    try:
        accelerator = Accelerator(
            cpu=settings.device == "cpu",
            mixed_precision=settings.amp,  # None: the choice of accelerate launch, else full precision
            dynamo_backend="inductor" if settings.compile else None,
            dataloader_config=loading,
            log_with="tensorboard" if settings.tensorboard and arm is not None else None,
            project_dir=arm,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"--device {settings.device}, --amp {settings.amp}: {one_line(error)}") from error
    if settings.amp == "fp16" and accelerator.device.type == "cpu":  # Accelerate would ignore it silently
        raise UserError("--amp fp16 needs a GPU; a CPU has bf16")
    if accelerator.distributed_type in SHARDED:  # a checkpoint would have to gather its state
        raise UserError(
            f"accelerate launch must leave each process the whole network (DDP), got {accelerator.distributed_type.value}"
        )
    if settings.sync_bn and accelerator.device.type != "cuda":
        raise UserError(f"--sync-bn needs cuda: SyncBatchNorm does not train on {accelerator.device.type}")
    return accelerator


def agree(accelerator: Accelerator, choose: Callable[[], Any]) -> Any:
    """Return the main process's result of `choose()` on every process.

    Raises:
        UserError: On every process, if `choose` fails with it there.
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
    """Return whether `value` is the same on every process."""
    return len(set(gather_object([value]))) == 1


def is_reporter() -> bool:
    """Return whether this process reports errors: the first to meet one; before they connect, the first of its machine."""
    if not (dist.is_available() and dist.is_initialized()):
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("ctxenc/mistakes", 1) == 1
    except RuntimeError:  # the process with the store is gone
        return True
