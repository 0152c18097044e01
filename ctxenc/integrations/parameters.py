"""Which parameters of a network belong to Encoding layers: timm asks the whole network alone, not the layers inside it."""

from torch import nn

from ctxenc.encoding import Encoding


def encoding_parameters(model: nn.Module) -> set[str]:
    """Names of the codewords and the learned smoothing in a network, which timm's optimizers should not decay."""
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, Encoding)
        for parameter, _ in module.named_parameters()
    }
