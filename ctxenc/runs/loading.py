"""load(): rebuild the network of a trained run. Import the readers on call: they need the extra ctxenc[train]."""

from os import PathLike

from torch import nn


def load(run: str | PathLike[str], checkpoint: str = "best", device: str = "cpu") -> nn.Module:
    """Rebuild the network of a run of `ctxenc finetune` or `ctxenc segment train` from safetensors.

    Args:
        run: a run folder, to take the first seed of its swapped network or EncNet; the folder of one of its arms
            (RUN/context-0, RUN/encnet-0); or a checkpoint of an EncNet (see load_encnet_checkpoint).
        checkpoint: "best" or "last".
        device: the network's device.

    Returns:
        The network in eval mode.

    Raises:
        ImportError: the extra is not installed.
        ctxenc.runs.errors.UserError: the run does not exist, or its files are broken or do not fit each other.
    """
    try:
        from ctxenc.runs import trained
    except ImportError as error:
        raise ImportError(f"ctxenc.load needs the extra: pip install 'ctxenc[train]' ({error})") from error
    return trained.load_run(run, checkpoint, device).model
