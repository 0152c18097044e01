"""Define the parts of benchmarks.swap_accuracy: arms, data, and the training of one network, with a JSON file as its result."""

import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from timm.layers import SEModule
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from benchmarks.environment import describe
from ctxenc import ContextEncoding, assign
from ctxenc.encoding import Encoding
from ctxenc.training.fashion import FashionSource
from ctxenc.training.photographs import PHOTOGRAPHS, TILE, DisjointTiles, halves, read_photograph
from ctxenc.viz.usage import UsageSum

CHANNELS = (16, 32, 64)
BATCH = 64
SCALES = (0.75, 1.0, 1.25, 1.5, 2.0)
AT_SCALES = 1000  # most test images per size: size 2 takes four times as long as size 1
WEIGHT_DECAY = 0.05
AGREEMENT = 0.03  # most difference in parameters between arms at equal parameters


@dataclass(frozen=True)
class Arm:
    """Describe a kind of block.

    Attributes:
        block: "none", "se" or "context".
        width: "quarter": C' = C / 4. "equal": the network has about as many parameters as with SE of C / 4. "wide", for SE alone:
            as many as the "concat" block at C / 4.
        start: argument of ContextEncoding.
        pool: argument of ContextEncoding.
        aggregation: argument of ContextEncoding.
        coarse: max_size is a quarter of the images' side.
    """

    block: str
    width: str = "quarter"
    start: str = "paper"
    pool: str = "mean"
    aggregation: str = "mean"
    num_codes: int = 16
    coarse: bool = False

    @property
    def name(self) -> str:
        """Return its name in tables and file names."""
        if self.block != "context":
            return {"none": "no attention", "se": "SE"}[self.block] + (", wide" if self.width == "wide" else "")
        parts = [self.pool, self.start, *(["sum"] if self.aggregation == "sum" else [])]
        parts += [f"K = {self.num_codes}"] if self.num_codes != 16 else []
        parts += [*(["coarse"] if self.coarse else []), *(["C/4"] if self.width == "quarter" else [])]
        return ", ".join(parts)

    @property
    def reference(self) -> str:
        """Return the SE arm for comparison: of as many parameters if there is one, else of C / 4."""
        return SE_WIDE.name if self.pool == "concat" and self.width == "quarter" else SE.name


NONE, SE, SE_WIDE = Arm("none"), Arm("se"), Arm("se", "wide")
EQUAL = [Arm("context", "equal", start, pool) for pool in ("mean", "concat") for start in ("paper", "spread")]
QUARTER = [replace(arm, width="quarter") for arm in EQUAL]
COARSE = [replace(arm, coarse=True) for arm in (*EQUAL, *QUARTER)]
SUM = [replace(arm, aggregation="sum") for arm in EQUAL[:2]]  # concat normalises, so a sum gives the same there
FEWER = [replace(arm, num_codes=4) for arm in EQUAL[2:]]  # the same parameters in fewer codewords of more channels
# In training order.
ARMS = {arm.name: arm for arm in (SE, *EQUAL, SE_WIDE, *QUARTER[2:], *SUM, *FEWER, NONE, *QUARTER[:2], *COARSE)}
QUICK = (SE.name, EQUAL[1].name, EQUAL[3].name)


@dataclass(frozen=True)
class Budget:
    """Set the length of training on a data set, and the number of images."""

    data: str
    train: int
    held_out: int
    epochs: int
    size: int

    @property
    def name(self) -> str:
        """Name the folder of its parts."""
        return f"{self.data}-{self.train}-{self.epochs}"


BUDGETS = {
    "digits": Budget("digits", 320, 216, 40, 16),
    "photographs": Budget("photographs", 1_020, 340, 10, 32),
    "fashion_mnist": Budget("fashion_mnist", 12_000, 3_000, 3, 28),
}


@dataclass(frozen=True)
class Task:
    """Hold images (N, 1, H, W) and labels of three disjoint sets."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(budget: Budget, seed: int, folder: str = "") -> Task:
    """Load 1797 handwritten digits, enlarged to 16 x 16; every seed draws another two fifths as the test set."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    images = F.interpolate(images, budget.size, mode="bilinear", antialias=True)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    return _task(images[order], torch.tensor(labels)[order], budget, len(images) * 3 // 5)


def fashion_mnist(budget: Budget, seed: int, folder: str) -> Task:
    """Load Fashion-MNIST: every seed draws its training and held-out images of the 60,000; the test set is the 10,000."""
    (images, labels), test = (_fashion(folder, split) for split in ("train", "val"))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    task = _task(images[order], labels[order], budget, len(images))
    return replace(task, test=test)


@cache
def _fashion(folder: str, split: str) -> tuple[Tensor, Tensor]:
    source = FashionSource(folder, split, download=False)
    images = torch.tensor(source.images, dtype=torch.float32)[:, None]
    return (images - 72.9) / 90.0, torch.tensor(source.targets)  # mean and deviation of the training pixels


def photographs(budget: Budget, seed: int, folder: str = "") -> Task:
    """Load the embedded photographs in grey, one class each, at half their resolution.

    Every seed draws other crops of one half of each photograph; the last third of that half is held out. The test set is the
    tiles of the other half.
    """
    draw = np.random.default_rng(seed)
    regions = [halves(read_photograph(name))[0] for name in PHOTOGRAPHS]
    parts = zip(*(_two_thirds(region) for region in regions), strict=True)
    sets = []
    for part, count in zip(parts, (budget.train, budget.held_out), strict=True):
        crops = [crop for region in part for crop in _crops(region, count // len(PHOTOGRAPHS), draw)]
        labels = torch.arange(len(PHOTOGRAPHS)).repeat_interleave(count // len(PHOTOGRAPHS))
        sets.append((_grey(crops, budget.size), labels))
    tiles = DisjointTiles()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(tiles.images)))  # at_scales takes the first
    return Task(*sets, (_grey(tiles.images, budget.size)[order], torch.tensor(tiles.targets)[order]))


def _two_thirds(region: Image.Image) -> tuple[Image.Image, Image.Image]:
    width, height = region.size
    if width >= height:
        cut = width * 2 // 3
        return region.crop((0, 0, cut, height)), region.crop((cut, 0, width, height))
    cut = height * 2 // 3
    return region.crop((0, 0, width, cut)), region.crop((0, cut, width, height))


def _crops(region: Image.Image, count: int, draw: np.random.Generator) -> list[Image.Image]:
    lefts, uppers = (draw.integers(0, side - TILE + 1, count).tolist() for side in region.size)
    return [region.crop((left, upper, left + TILE, upper + TILE)) for left, upper in zip(lefts, uppers, strict=True)]


def _grey(images: list[Image.Image], size: int) -> Tensor:
    pixels = torch.stack([torch.from_numpy(np.asarray(image.convert("L"), dtype=np.float32)) for image in images])
    return F.interpolate(pixels[:, None], size, mode="bilinear", antialias=True) / 64 - 2


def _task(images: Tensor, labels: Tensor, budget: Budget, before_test: int) -> Task:
    ends = (0, budget.train, budget.train + budget.held_out)
    if ends[2] > before_test:
        raise SystemExit(f"{budget.data} has {before_test} training images, of which {ends[2]} were asked for")
    sets = [slice(*ends[:2]), slice(*ends[1:]), slice(before_test, None)]
    return Task(*((images[part], labels[part].long()) for part in sets))


TASKS: dict[str, Callable[[Budget, int, str], Task]] = {
    "digits": digits,
    "photographs": photographs,
    "fashion_mnist": fashion_mnist,
}


def parameters(network: nn.Module) -> int:
    """Count the trained values."""
    return sum(parameter.numel() for parameter in network.parameters())


def build(make: Callable[..., nn.Module] | None) -> ResNet:
    """Build a residual network for small grey images: three stages of two basic blocks, widths 16, 32 and 64, strides 1, 2
    and 2.

    Args:
        make: Makes the attention block from its channels; None for no attention.
    """
    layer = None if make is None else (lambda channels, **_: make(channels))
    # A deep stem of width 8 ends in 16 channels; one convolution replaces its three.
    shape = {"channels": (*CHANNELS, CHANNELS[-1]), "stem_type": "deep", "stem_width": CHANNELS[0] // 2}
    network = ResNet(BasicBlock, (2, 2, 2, 0), 10, 1, **shape, block_args={"attn_layer": layer})
    network.conv1 = nn.Conv2d(1, CHANNELS[0], 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def maker(arm: Arm, size: int, share: float) -> Callable[..., nn.Module] | None:
    """Return a function that makes an arm's block, with C' = C * share."""
    if arm.block == "none":
        return None
    if arm.block == "se":
        return lambda channels: SEModule(channels, rd_channels=max(1, round(share * channels)))
    chosen = {"start": arm.start, "pool": arm.pool, "aggregation": arm.aggregation}
    if arm.coarse:
        chosen["max_size"] = size // 4
    return lambda channels: ContextEncoding(
        channels, arm.num_codes, rd_channels=max(1, round(share * channels)), **chosen
    )


def count_parameters(arm: Arm, share: float) -> int:
    """Count the parameters of an arm's network with blocks of C' = C * share."""
    make = maker(replace(arm, start="paper"), 28, share)
    with torch.device("meta"):
        blocks = [] if make is None else [make(channels) for channels in CHANNELS]
        return _parameters_outside() + 2 * sum(map(parameters, blocks))


@cache
def _parameters_outside() -> int:
    return parameters(build(None))


@cache
def solve_share(arm: Arm) -> float:
    """Return C' / C of an arm: 1/4, or the share at which its network is nearest to the parameter count of its width.

    Raises:
        AssertionError: No share comes within 3 %.
    """
    if arm.width == "quarter" or arm.block == "none":
        return 1 / 4
    wanted = count_parameters(QUARTER[2] if arm.width == "wide" else SE, 1 / 4)

    def excess(share: float) -> float:
        return abs(count_parameters(arm, share) / wanted - 1)

    share = min((step / CHANNELS[-1] for step in range(1, 3 * CHANNELS[-1])), key=excess)
    assert excess(share) <= AGREEMENT, f"{arm.name}: parameters must agree within 3 %, got {excess(share):.1%}"
    return share


def start_network(arm: Arm, size: int, seed: int) -> ResNet:
    """Build an arm's network; all arms of one seed have the same initial layers outside the blocks."""
    torch.manual_seed(seed)
    plain = build(None).state_dict()
    network = build(maker(arm, size, solve_share(arm)))
    network.load_state_dict(plain, strict=False)
    return network.to(memory_format=torch.channels_last)


def evaluate(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy and cross entropy."""
    network.eval()
    with torch.inference_mode():
        logits = torch.cat([network(batch) for batch in images.split(250)])
    right = (logits.argmax(1) == labels).float().mean()
    return {"accuracy": float(right), "cross_entropy": float(F.cross_entropy(logits, labels))}


def at_scales(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
    """Run evaluate() at each image size."""
    images, labels = images[:AT_SCALES], labels[:AT_SCALES]
    resize = partial(F.interpolate, images, mode="bilinear", antialias=True)
    sized = {scale: images if scale == 1 else resize(round(scale * images.shape[-1])) for scale in SCALES}
    return {str(scale): evaluate(network, each, labels) for scale, each in sized.items()}


def codebook_bits(network: nn.Module, images: Tensor) -> list[float]:
    """Return the bits by which each codebook tells pixels apart: usage entropy minus the mean entropy of a pixel's weights."""
    sums: dict[str, UsageSum] = {}

    def add(name: str, layer: Encoding, x: tuple[Tensor, ...]) -> None:
        found = UsageSum.of(assign(x[0], layer.codewords, layer.smoothing))
        sums[name] = sums[name] + found if name in sums else found

    layers = {name: each for name, each in network.named_modules() if isinstance(each, Encoding)}
    hooks = [each.register_forward_pre_hook(partial(add, name)) for name, each in layers.items()]
    network.eval()
    with torch.no_grad():
        for batch in images.split(250):
            network(batch)
    for hook in hooks:
        hook.remove()
    return [sums[name].usage().entropy - sums[name].usage().pixel_entropy for name in layers]


def train_epochs(network: nn.Module, task: Task, epochs: int, lr: float, seed: int) -> Iterator[dict[str, Any]]:
    """Train with AdamW and a cosine from lr to 0 after a warm-up of a tenth of the steps; return both splits' measures per epoch.

    The measures of the training split are means over the epoch's batches during training.
    """
    images, labels = task.train
    groups = param_groups_weight_decay(
        network, WEIGHT_DECAY, no_weight_decay_list=("*.encoding.codewords", "*.encoding.smoothing")
    )
    optimizer = torch.optim.AdamW(groups, lr=lr)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, 0.1, cycle_momentum=False)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        network.train()
        seen = torch.zeros(2)
        for batch in torch.randperm(len(images), generator=generator).split(BATCH)[: len(images) // BATCH]:
            logits = network(images[batch].contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            right = (logits.argmax(1) == labels[batch]).float().mean()
            seen += torch.stack([right, loss]).detach()
        accuracy, cross_entropy = (seen / (len(images) // BATCH)).tolist()
        train = {"accuracy": accuracy, "cross_entropy": cross_entropy}
        yield {"train": train, "held_out": evaluate(network, *task.held_out)}


def train_part(arm: Arm, budget: Budget, lr: float, seed: int, folder: str) -> dict[str, Any]:
    """Train one network; return its measures, ready for JSON."""
    task = TASKS[budget.data](budget, seed, folder)
    network = start_network(arm, budget.size, seed)
    curves = list(train_epochs(network, task, budget.epochs, lr, seed))
    bits = codebook_bits(network, task.held_out[0][:500])
    return {
        "data": budget.data,
        "arm": arm.name,
        "seed": seed,
        "network_parameters": parameters(network),
        "lr": lr,
        "processor": describe()["processor"],
        "held_out": curves[-1]["held_out"],
        "test": evaluate(network, *task.test),
        "scales": at_scales(network, *task.test),
        "bits": statistics.mean(bits) if bits else None,
        "bits_of_blocks": {str(number): each for number, each in enumerate(bits)},
        "curves": {str(number): curve for number, curve in enumerate(curves, 1)},
        "budget": asdict(budget),
    }


def part(arm: Arm, budget: Budget, lr: float, seed: int, folder: str, runs: Path) -> dict[str, Any]:
    """Read the result of a training, or train and write it.

    Raises:
        SystemExit: The file has another budget.
    """
    found = read_part(arm, budget, lr, seed, runs)
    if found is None:
        found = train_part(arm, budget, lr, seed, folder)
        write_part(found, part_path(arm, budget, lr, seed, runs))
    return found


def write_part(found: dict[str, Any], path: Path) -> None:
    """Write the result of a training, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(temporary, path)


def part_path(arm: Arm, budget: Budget, lr: float, seed: int, runs: Path) -> Path:
    """Return the file of a training."""
    words = "-".join(re.findall(r"\w+", arm.name))
    return runs / budget.name / f"{words}-{lr:g}-{seed}.json"


def read_part(arm: Arm, budget: Budget, lr: float, seed: int, runs: Path) -> dict[str, Any] | None:
    """Read the result of a training; None if it is missing.

    Raises:
        SystemExit: The file has another budget.
    """
    path = part_path(arm, budget, lr, seed, runs)
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    if found["budget"] != asdict(budget):
        raise SystemExit(f"{path} is of another budget: remove it, or name another --runs")
    return found


def choose_lr(parts: list[dict[str, Any]]) -> float:
    """Return the learning rate with the least cross entropy on held-out images, from parts that differ in seed and rate."""
    rates = dict.fromkeys(each["lr"] for each in parts)

    def held_out(lr: float) -> float:
        found = statistics.mean(each["held_out"]["cross_entropy"] for each in parts if each["lr"] == lr)
        return found if math.isfinite(found) else math.inf

    return min(rates, key=held_out)
