"""Define the parts of benchmarks.swap_accuracy: arms, and the training of one network, with a JSON file as its result."""

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

import torch
import torch.nn.functional as F
from timm.layers import SEModule
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from benchmarks.environment import describe
from benchmarks.swap_remedies import REMEDIES, apply_after_epoch, apply_before_training
from benchmarks.swap_tasks import CLASSES, TASKS, Budget, Task
from ctxenc import ContextEncoding, assign
from ctxenc.encoding import Encoding
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
        remedy: one of benchmarks.swap_remedies.
    """

    block: str
    width: str = "quarter"
    start: str = "paper"
    pool: str = "mean"
    aggregation: str = "mean"
    num_codes: int = 16
    coarse: bool = False
    remedy: str = ""

    @property
    def name(self) -> str:
        """Return its name in tables and file names."""
        if self.block != "context":
            return {"none": "no attention", "se": "SE"}[self.block] + (", wide" if self.width == "wide" else "")
        parts = [self.pool, self.start, *(["sum"] if self.aggregation == "sum" else [])]
        parts += [f"K = {self.num_codes}"] if self.num_codes != 16 else []
        parts += [*(["coarse"] if self.coarse else []), *(["C/4"] if self.width == "quarter" else [])]
        return ", ".join([*parts, *([self.remedy] if self.remedy else [])])

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
REMEDIED = [replace(EQUAL[0], remedy=remedy) for remedy in REMEDIES]
# In training order.
ARMS = {
    arm.name: arm for arm in (SE, *EQUAL, SE_WIDE, *QUARTER[2:], *SUM, *FEWER, NONE, *QUARTER[:2], *COARSE, *REMEDIED)
}
QUICK = (SE.name, EQUAL[1].name, EQUAL[3].name)


def parameters(network: nn.Module) -> int:
    """Count the trained values."""
    return sum(parameter.numel() for parameter in network.parameters())


def build(make: Callable[..., nn.Module] | None, classes: int = 10) -> ResNet:
    """Build a residual network for small grey images: three stages of two basic blocks, widths 16, 32 and 64, strides 1, 2
    and 2.

    Args:
        make: Makes the attention block from its channels; None for no attention.
        classes: Number of logits.
    """
    layer = None if make is None else (lambda channels, **_: make(channels))
    # A deep stem of width 8 ends in 16 channels; one convolution replaces its three.
    shape = {"channels": (*CHANNELS, CHANNELS[-1]), "stem_type": "deep", "stem_width": CHANNELS[0] // 2}
    network = ResNet(BasicBlock, (2, 2, 2, 0), classes, 1, **shape, block_args={"attn_layer": layer})
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


def start_network(arm: Arm, size: int, seed: int, classes: int = 10) -> ResNet:
    """Build an arm's network; all arms of one seed have the same initial layers outside the blocks."""
    torch.manual_seed(seed)
    plain = build(None, classes).state_dict()
    network = build(maker(arm, size, solve_share(arm)), classes)
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


def train_epochs(
    network: nn.Module, task: Task, epochs: int, lr: float, seed: int, remedy: str = ""
) -> Iterator[dict[str, Any]]:
    """Train with AdamW and a cosine from lr to 0 after a warm-up of a tenth of the steps; return both splits' measures per epoch.

    The measures of the training split are means over the epoch's batches during training.
    """
    images, labels = task.train
    undecayed = () if remedy == "decay" else ("*.encoding.codewords", "*.encoding.smoothing")
    groups = param_groups_weight_decay(network, WEIGHT_DECAY, no_weight_decay_list=undecayed)
    optimizer = torch.optim.AdamW(groups, lr=lr)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, 0.1, cycle_momentum=False)
    generator = torch.Generator().manual_seed(seed)
    apply_before_training(remedy, network)
    for epoch in range(epochs):
        if epoch:
            apply_after_epoch(remedy, epoch, network, images[:256], generator)
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
    network = start_network(arm, budget.size, seed, CLASSES[budget.data])
    curves = list(train_epochs(network, task, budget.epochs, lr, seed, arm.remedy))
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
