"""Define the shapes for measuring the operator: inputs from networks, and a sweep over each size."""

from typing import NamedTuple

from ctxenc.diagnosis.feeds import FEEDS as NETWORKS
from ctxenc.diagnosis.feeds import Feed

Shape = tuple[int, int, int, int]  # B, N, D, K


# Shapes of networks, the most important first, and two shapes measured from the start; their C' is C / 4.
FEEDS = {
    "facts": [
        NETWORKS[0],
        Feed("seresnet50, stage 3, C / 4", 256, (14, 14), 16, 64),
        Feed("seresnet50, stage 2, C / 4", 128, (28, 28), 16, 64),
    ],
    "networks": NETWORKS[1:],
}
QUICK = {"facts": [Feed("small", 16, (14, 14), 8, 2)]}
CPU_BATCH = {  # 16 for the others
    "EncNet-R50 at 480": 2,
    "EncNet-R50 at 769": 2,
    "seresnet50, stage 2, C / 4": 32,
    "encnet_cifar_16k64d, stage 3": 64,
    "small": 2,
}


class Sweep(NamedTuple):
    """Vary one size at a time about a middle."""

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
    """Hold a shape, and the reason to measure it."""

    group: str
    source: str
    shape: Shape
    spatial: tuple[int, int]


def problems(device: str, quick: bool = False) -> list[Problem]:
    """Return all shapes for a device, each once; on a CPU the first three with saturated assignments too."""
    found = []
    for group, feeds in (QUICK if quick else FEEDS).items():
        for feed in feeds:
            batch = CPU_BATCH.get(feed.source, 16) if device == "cpu" else feed.batch
            shape = batch, feed.spatial[0] * feed.spatial[1], feed.channels, feed.num_codes
            found.append(Problem(group, feed.source, shape, feed.spatial))
    if device == "cpu" and not quick:  # a product with a subnormal number can take 20 times as long on a CPU
        found += [each._replace(group="saturated", source=f"{each.source}, saturated") for each in found[:3]]
    batch, (side, D, K), sides, channels, num_codes = QUICK_SWEEP if quick else SWEEPS[device]
    sizes = [(other, D, K) for other in sides] + [(side, other, K) for other in channels]
    sizes += [(side, D, other) for other in num_codes]
    found += [Problem("sweep", "sweep", (batch, h * h, d, k), (h, h)) for h, d, k in dict.fromkeys(sizes)]
    return found
