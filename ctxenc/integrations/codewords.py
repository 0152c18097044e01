"""Initialise codewords from data by k-means, which is the Encoding layer with hard assignment."""

from typing import Any

import torch
from torch import Tensor, nn

from ctxenc.encoding import Encoding, check_sizes, run_eagerly
from ctxenc.swap.starts import find_centres
from ctxenc.swap.states import set_eval_mode

METHODS = ("kmeans", "sample")


@torch.no_grad()
def init_codewords(
    module: nn.Module, features: Tensor, method: str = "kmeans", *, samples: int = 20_000, seed: int = 0
) -> nn.Module:
    """Initialise the codewords of an Encoding layer from its input features.

    With codewords at the cluster means and hard assignment (smoothing -> infinity), the encoding of these features is
    zero, and the encoding of other features shows their difference. This is VLAD; Deep TEN (arXiv 1612.02844) is its
    soft and learned form.

    Args:
        module: an Encoding, or a module that contains one (ContextEncoding, EncodingModule, EncNet, DeepTEN).
        features: an input of the module; of the Encoding alone (B, C, *spatial).
        method: "kmeans": the centres of scikit-learn's MiniBatchKMeans; "sample": pixels drawn at random.
        samples: most pixels to draw from the features.
        seed: of both draws.

    Returns:
        The module, with its codewords changed in place.

    Raises:
        ValueError: the module has no Encoding or several, or its forward does not reach it; the features hold too few pixels or
            values that are not finite; or the method is unknown.
        TypeError: module is not a module, or features is not a tensor.
        ModuleNotFoundError: method="kmeans" without scikit-learn: pip install 'ctxenc[train]'.
    """
    layer = _find_encoding(module)
    if not isinstance(features, Tensor):
        raise TypeError(f"init_codewords: features must be a tensor, got {type(features).__name__}")
    if method not in METHODS:
        raise ValueError(f"init_codewords: method must be one of {', '.join(METHODS)}, got {method!r}")
    check_sizes("init_codewords", samples=samples)
    pixels = _record_input(module, layer, features).flatten(2).mT.flatten(0, 1)  # (B * N, C)
    if len(pixels) < layer.num_codes or samples < layer.num_codes:
        count = min(len(pixels), samples)
        raise ValueError(f"init_codewords: features must hold {layer.num_codes} pixels, one a codeword, got {count}")
    if not pixels.isfinite().all():
        raise ValueError("init_codewords: features must be finite, got NaN or infinity")
    generator = torch.Generator().manual_seed(seed)
    pixels = pixels[torch.randperm(len(pixels), generator=generator)[:samples].to(pixels.device)]
    layer.codewords.copy_(
        find_centres(pixels, layer.num_codes, seed) if method == "kmeans" else pixels[: layer.num_codes]
    )
    return module


def _find_encoding(module: nn.Module) -> Encoding:
    if not isinstance(module, nn.Module):
        raise TypeError(f"init_codewords: module must be a torch.nn.Module, got {type(module).__name__}")
    layers = [each for each in module.modules() if isinstance(each, Encoding)]
    if len(layers) != 1:
        raise ValueError(
            f"init_codewords: module must have one Encoding, got {type(module).__name__} with {len(layers)}"
        )
    return layers[0]


def _record_input(module: nn.Module, layer: Encoding, features: Tensor) -> Tensor:
    """Return the layer's input when the module runs on features, in eval mode, so that no statistics change."""
    inputs: list[Any] = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    with hook, run_eagerly(), set_eval_mode(module):
        module(features)
    if not inputs:
        raise ValueError(f"init_codewords: the forward of module must reach its Encoding, got {type(module).__name__}")
    return inputs[0].float()
