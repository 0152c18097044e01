"""load(): a trained run back as a network. The work is done in ctxenc.training, which needs the extra ctxenc[train]."""

from os import PathLike

from torch import nn


def load(run: str | PathLike[str], checkpoint: str = "best", device: str = "cpu") -> nn.Module:
    """Rebuild the network of a run of `python -m ctxenc finetune` or `segment train`, and fill it from safetensors.

    Args:
        run: the run folder: the first seed of its swapped network or EncNet is taken; or the folder of one of its arms
            (RUN/context-0, RUN/encnet-0); or a checkpoint of an EncNet (see load_encnet_checkpoint).
        checkpoint: "best" or "last".
        device: where the network is put.

    Returns:
        The network in eval mode.

    Raises:
        ImportError: the extra is not installed.
        ctxenc.training.console.UserError: there is no such run, or its files are broken or do not fit each other.
    """
    try:
        from ctxenc.training import trained
    except ImportError as error:
        raise ImportError(f"ctxenc.load needs the extra: pip install 'ctxenc[train]' ({error})") from error
    return trained.load_run(run, checkpoint, device).model
