"""The shapes at which the operator is measured: what networks feed it, and a sweep over each size."""

from typing import NamedTuple

Shape = tuple[int, int, int, int]  # B, N, D, K


class Feed(NamedTuple):
    """What one layer of a network feeds the operator."""

    source: str
    channels: int  # D, the C' of a block
    spatial: tuple[int, int]
    num_codes: int
    cpu_batch: int
    gpu_batch: int


# Swapped networks with the reduction of their own SE blocks, at timm's input size (224, nfnet_f0 192); tests/test_benchmarks.py
# looks at what they feed. "facts" are the three at which the operator was measured from the start, the first of them a network's
# own; of the others C' is C / 4.
FEEDS = {
    "facts": [
        Feed("EncNet-R50 at 480", 512, (60, 60), 32, 2, 16),
        Feed("seresnet50, stage 3, C / 4", 256, (14, 14), 16, 16, 64),
        Feed("seresnet50, stage 2, C / 4", 128, (28, 28), 16, 32, 64),
    ],
    "networks": [
        Feed("EncNet-R50 at 769", 512, (97, 97), 32, 2, 4),
        Feed("seresnet50, stage 1", 16, (56, 56), 16, 16, 256),
        Feed("seresnet50, stage 2", 32, (28, 28), 16, 16, 256),
        Feed("seresnet50, stage 3", 64, (14, 14), 16, 16, 256),
        Feed("seresnet50, stage 4", 128, (7, 7), 16, 16, 256),
        Feed("efficientnet_b0, stage 1", 8, (112, 112), 16, 16, 256),
        Feed("efficientnet_b0, stage 4", 20, (14, 14), 16, 16, 256),
        Feed("efficientnet_b0, stage 6", 48, (7, 7), 16, 16, 256),
        Feed("nfnet_f0, stage 2", 256, (24, 24), 16, 16, 256),
        Feed("nfnet_f0, stage 3", 768, (12, 12), 16, 16, 256),
        Feed("encnet_cifar_16k64d, stage 3", 64, (8, 8), 16, 64, 128),
    ],
}
QUICK = {"facts": [Feed("small", 16, (14, 14), 8, 2, 2)]}


class Sweep(NamedTuple):
    """One size at a time about a middle."""

    batch: int
    middle: tuple[int, int, int]  # side of the map, D, K
    sides: tuple[int, ...]
    channels: tuple[int, ...]
    num_codes: tuple[int, ...]


SWEEPS = {
    "cpu": Sweep(4, (28, 128, 32), (7, 14, 28, 56, 112), (16, 64, 128, 256, 512), (8, 16, 32, 64)),
    "cuda": Sweep(16, (56, 512, 32), (14, 28, 56, 112), (64, 128, 256, 512, 1024), (16, 32, 64)),
}
QUICK_SWEEP = Sweep(3, (9, 16, 4), (9,), (16,), (4,))


class Problem(NamedTuple):
    """A shape, and why it is measured."""

    group: str
    source: str
    shape: Shape
    spatial: tuple[int, int]


def problems(device: str, quick: bool = False) -> list[Problem]:
    """All shapes for a device, each once."""
    found = []
    for group, feeds in (QUICK if quick else FEEDS).items():
        for feed in feeds:
            batch = feed.cpu_batch if device == "cpu" else feed.gpu_batch
            shape = batch, feed.spatial[0] * feed.spatial[1], feed.channels, feed.num_codes
            found.append(Problem(group, feed.source, shape, feed.spatial))
    batch, (side, D, K), sides, channels, num_codes = QUICK_SWEEP if quick else SWEEPS[device]
    sizes = [(other, D, K) for other in sides] + [(side, other, K) for other in channels]
    sizes += [(side, D, other) for other in num_codes]
    found += [Problem("sweep", "sweep", (batch, h * h, d, k), (h, h)) for h, d, k in dict.fromkeys(sizes)]
    return found
