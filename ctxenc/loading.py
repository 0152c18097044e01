"""load(): a fine-tuned run back as a network. The work is done in ctxenc.training, which needs the extra ctxenc[train]."""

from os import PathLike

from torch import nn


def load(run: str | PathLike[str], checkpoint: str = "best", device: str = "cpu") -> nn.Module:
    """Rebuild the network of a run of `python -m ctxenc finetune`: built by timm, patched, filled from safetensors.

    Args:
        run: the run folder, or the folder of one of its arms (RUN/context-0). A run with several arms gives its best swapped one.
        checkpoint: "best" or "last".
        device: where the network is put.

    Returns:
        The network in eval mode.

    Raises:
        ImportError: the extra is not installed.
        ctxenc.training.runs.UserError: there is no such run, or its files are broken or do not fit each other.
    """
    try:
        from ctxenc.training import runs
    except ImportError as error:
        raise ImportError(f"ctxenc.load needs the extra: pip install 'ctxenc[train]' ({error})") from error
    return runs.load(run, checkpoint=checkpoint, device=device)
