"""Try remedies against a codebook that tells nothing about a pixel, for benchmarks.swap_accuracy.

"k-means": after the first epoch, codewords move to the k-means centres of the features of a batch, with a smoothing that assigns a
pixel to K^0.9 of them. At the first batch all features are equal, because timm starts the last norm of a residual block at zero.
"restart": after each epoch, a codeword with less than a quarter of its share of the pixels moves onto a pixel.
"sharp": smoothing times C', because the distances between random features and codewords differ less with more channels.
"decay": weight decay on codewords and smoothing too, which all other arms leave out.
"""

import torch
from torch import Tensor, nn

from ctxenc import assign
from ctxenc.encoding import Encoding
from ctxenc.swap.starts import find_centres, find_smoothing

REMEDIES = ("k-means", "restart", "sharp", "decay")


def pixels_of(network: nn.Module, images: Tensor) -> dict[Encoding, Tensor]:
    """Run the network once; return the pixels (N, C') that each codebook encodes."""
    pixels: dict[Encoding, Tensor] = {}

    def keep(layer: nn.Module, x: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, Encoding)
        pixels[layer] = x[0].detach().flatten(2).mT.flatten(0, 1)

    layers = [each for each in network.modules() if isinstance(each, Encoding)]
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    with torch.no_grad():
        network(images)
    for hook in hooks:
        hook.remove()
    return pixels


def apply_before_training(remedy: str, network: nn.Module) -> None:
    """Change the codebooks of a new network."""
    if remedy == "sharp":
        with torch.no_grad():
            for module in network.modules():
                if isinstance(module, Encoding):
                    module.smoothing.mul_(module.codewords.shape[1])


def apply_after_epoch(remedy: str, epoch: int, network: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """Change the codebooks after an epoch, counted from 1."""
    if remedy not in ("restart", "k-means") or (remedy == "k-means" and epoch > 1):
        return
    with torch.no_grad():
        for layer, pixels in pixels_of(network.eval(), images).items():
            if remedy == "k-means":
                layer.codewords.copy_(find_centres(pixels, len(layer.codewords), seed=epoch))
                layer.smoothing.fill_(find_smoothing(pixels[::16], layer.codewords, 0.9))
            else:
                use = assign(pixels.mT[None], layer.codewords, layer.smoothing).mean((0, 2))
                idle = use < 1 / (4 * len(use))
                places = torch.randint(len(pixels), (int(idle.sum()),), generator=generator)
                layer.codewords[idle] = pixels[places]
