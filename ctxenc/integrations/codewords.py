"""Codewords that start from data: k-means, which is the Encoding layer with hard assignment."""

from typing import Any

import torch
from torch import Tensor, nn

from ctxenc.encoding import Encoding, check_sizes, uncompiled
from ctxenc.starts import kmeans_centres

METHODS = ("kmeans", "sample")


@torch.no_grad()
def init_codewords(
    module: nn.Module, features: Tensor, method: str = "kmeans", *, samples: int = 20_000, seed: int = 0
) -> nn.Module:
    """Start the codewords of an Encoding layer from the features that it sees.

    With codewords at the means of their clusters and hard assignment (smoothing -> infinity) the encoding of these features is
    zero, and that of others tells how they differ: VLAD, of which Deep TEN (arXiv 1612.02844) is the soft and learned form.

    Args:
        module: an Encoding, or a module with one in it (ContextEncoding, EncodingModule, EncNet, DeepTEN).
        features: an input of the module; of the Encoding alone (B, C, *spatial).
        method: "kmeans": the centres of scikit-learn's MiniBatchKMeans; "sample": pixels drawn at random.
        samples: pixels drawn from the features, where they are more.
        seed: of both draws.

    Returns:
        The module, its codewords changed in place.

    Raises:
        ValueError: the module has no Encoding or several, or its forward does not reach it; the features hold too few pixels or
            values that are not finite; or the method is unknown.
        TypeError: module is no module, or features no tensor.
        ModuleNotFoundError: method="kmeans" without scikit-learn: pip install 'ctxenc[train]'.
    """
    layer = _only_encoding(module)
    if not isinstance(features, Tensor):
        raise TypeError(f"init_codewords: features must be a tensor, got {type(features).__name__}")
    if method not in METHODS:
        raise ValueError(f"init_codewords: method must be one of {', '.join(METHODS)}, got {method!r}")
    check_sizes("init_codewords", samples=samples)
    pixels = _seen(module, layer, features).flatten(2).mT.flatten(0, 1)  # (B * N, C)
    if len(pixels) < layer.num_codes or samples < layer.num_codes:
        found = min(len(pixels), samples)
        raise ValueError(f"init_codewords: features must hold {layer.num_codes} pixels, one a codeword, got {found}")
    if not pixels.isfinite().all():
        raise ValueError("init_codewords: features must be finite, got NaN or infinity")
    generator = torch.Generator().manual_seed(seed)
    pixels = pixels[torch.randperm(len(pixels), generator=generator)[:samples].to(pixels.device)]
    layer.codewords.copy_(
        kmeans_centres(pixels, layer.num_codes, seed) if method == "kmeans" else pixels[: layer.num_codes]
    )
    return module


def _only_encoding(module: nn.Module) -> Encoding:
    if not isinstance(module, nn.Module):
        raise TypeError(f"init_codewords: module must be a torch.nn.Module, got {type(module).__name__}")
    layers = [each for each in module.modules() if isinstance(each, Encoding)]
    if len(layers) != 1:
        raise ValueError(
            f"init_codewords: module must have one Encoding, got {type(module).__name__} with {len(layers)}"
        )
    return layers[0]


def _seen(module: nn.Module, layer: Encoding, features: Tensor) -> Tensor:
    """The input of the layer when the module is called on features, in eval mode, which changes no statistics."""
    seen: list[Any] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    modes = {each: each.training for each in module.modules()}
    try:
        with uncompiled():
            module.eval()(features)
    finally:
        hook.remove()
        for each, training in modes.items():
            each.training = training
    if not seen:
        raise ValueError(f"init_codewords: the forward of module must reach its Encoding, got {type(module).__name__}")
    return seen[0].float()
