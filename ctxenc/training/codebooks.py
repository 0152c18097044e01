"""Measure the health of codebooks in training: dead codewords, evenness of use, and how well they tell pixels apart.

Measured after each epoch, on the evaluated network and a sample of the validation images.
"""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import matplotlib
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from ctxenc.context import ContextEncoding
from ctxenc.encoding import Encoding
from ctxenc.functional import assign
from ctxenc.training.data import LEFT_OUT
from ctxenc.training.pictures import spread
from ctxenc.training.segmentation.pairs import IGNORED
from ctxenc.viz.observing import encoding_blocks
from ctxenc.viz.usage import FEW_BITS, UsageSum

# of the validation set, evenly spaced: entropies at most 0.11 bits of 4 off, against all 585 tiles of the photographs
IMAGES = 64
COLUMNS = ("epoch", "block", "codewords", "dead", "entropy", "pixel_entropy", "bits", "smoothing_min", "smoothing_max")
FILE = "codebooks.csv"
Row = dict[str, Any]


@torch.no_grad()
def codebook_health(
    accelerator: Accelerator, network: nn.Module, samples: Dataset[Any], batch_size: int, channels_last: bool = False
) -> list[Row]:
    """Measure how a network uses its codebooks. Call it on all processes; each takes its share of the images.

    Args:
        accelerator: The training's accelerator.
        network: Not wrapped; left in eval mode.
        samples: Validation samples: an image (C, H, W), and a class or a mask (H, W). Stand-ins of broken images do not count.
        batch_size: Images per batch; 1 if they differ in size.
        channels_last: Whether the network is in this memory format.

    Returns:
        One row per block, in the order of the network's modules; no row if no image counts, or no image reaches the block.
        "block" is its name; "codewords" is K; "dead" counts the codewords with a share below 1 % of 1 / K. "entropy" is the
        entropy of the shares and "pixel_entropy" the mean entropy of a pixel's weights, in bits, at most log2(K). "bits" is
        their difference, which tells pixels apart. "smoothing_min" and "smoothing_max" follow.
    """
    blocks = {
        name: block.encoding if isinstance(block, ContextEncoding) else block
        for name, block in encoding_blocks(network).items()
    }
    if not blocks:
        return []
    chosen = spread(range(len(samples)), IMAGES)  # type: ignore[arg-type]
    own = chosen[accelerator.process_index :: accelerator.num_processes]
    found: dict[str, list[UsageSum]] = {name: [] for name in blocks}

    def watch(sums: list[UsageSum]) -> Callable[[Encoding, tuple[Tensor, ...]], None]:
        return lambda encoding, inputs: sums.append(
            UsageSum.of(assign(inputs[0], encoding.codewords, encoding.smoothing))
        )

    handles = [block.register_forward_pre_hook(watch(found[name])) for name, block in blocks.items()]
    network.eval()
    try:
        for batch in DataLoader(Subset(samples, own), batch_size=batch_size, collate_fn=list):
            intact = [image for image, target in batch if not left_out(target)]
            if not intact:
                continue
            images = torch.stack(intact).to(accelerator.device)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with accelerator.autocast():
                network(images)
    finally:
        for handle in handles:
            handle.remove()
    gathered: list[dict[str, list[UsageSum]]] = gather_object([found])
    sums = {name: [each for part in gathered for each in part[name]] for name in blocks}
    return [_row(name, block, sums[name]) for name, block in blocks.items() if sums[name]]


def left_out(target: int | Tensor) -> bool:
    """Return whether a class or a mask stands for an unreadable image."""
    mask = torch.as_tensor(target)
    return bool((mask == (IGNORED if mask.dim() else LEFT_OUT)).all())


def _row(name: str, block: Encoding, sums: Sequence[UsageSum]) -> Row:
    usage = reduce(add, sums).usage()
    smoothing = block.smoothing.detach().float()
    return {
        "block": name,
        "codewords": block.num_codes,
        "dead": len(usage.dead),
        "entropy": usage.entropy,
        "pixel_entropy": usage.pixel_entropy,
        "bits": usage.bits,
        "smoothing_min": smoothing.min().item(),
        "smoothing_max": smoothing.max().item(),
    }


def name_idle_codebooks(run: Path, arms: Mapping[str, str], seeds: Sequence[int], *, started: str) -> list[str]:
    """Name the blocks with less than 0.1 bits to tell pixels apart after the last epoch, one sentence per arm.

    Args:
        run: A folder in which every arm has finished.
        arms: Titles of the arms.
        seeds: Seeds of each arm; one of them below the limit is enough to name a block.
        started: Start of the codebooks: "paper", "spread" or "calibrated".
    """
    lines = []
    advice = "; try --codebook-start spread" if started == "paper" else ""
    for arm, label in arms.items():
        bits: dict[str, list[float]] = {}
        for seed in seeds:
            for block, value in _last_bits(run / f"{arm}-{seed}" / FILE).items():
                bits.setdefault(block, []).append(value)
        idle = [f"{block} ({_range(values)})" for block, values in bits.items() if min(values) < FEW_BITS]
        if idle:
            lines.append(
                f"{label}: after the last epoch the codebook of {', '.join(idle)} tells less than {FEW_BITS:g} bits about a pixel. "
                f"It assigns all pixels almost alike, so the block sees little more than SE's mean over the pixels{advice}."
            )
    return lines


def _last_bits(path: Path) -> dict[str, float]:
    """Return the bits of each block of several codewords in its last row; an empty dict if the network has no codebook."""
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {row["block"]: float(row["bits"]) for row in csv.DictReader(file) if int(row["codewords"]) > 1}


def _range(values: Sequence[float]) -> str:
    lowest, highest = f"{min(values):.2f}", f"{max(values):.2f}"
    return lowest if lowest == highest else f"{lowest} to {highest}"


def draw_codebooks(rows: Sequence[Row]) -> Figure:
    """Draw dead codewords, use, bits and smoothing by epoch; one line per block, from the first (dark) to the last.

    Args:
        rows: Rows of codebook_health with their epochs, at least one.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    names = list(dict.fromkeys(row["block"] for row in rows))
    colours = matplotlib.colormaps["cividis"].resampled(max(2, len(names)))
    most = math.log2(max(row["codewords"] for row in rows))
    panels: dict[str, Callable[[Row], Any]] = {
        "dead codewords (%)": lambda row: 100 * row["dead"] / row["codewords"],
        f"entropy of the shares (bits, of {most:.3g})": lambda row: row["entropy"],
        f"bits that tell pixels apart (of {most:.3g})": lambda row: row["bits"],
        "smoothing, lowest and highest": lambda row: (row["smoothing_min"], row["smoothing_max"]),
    }
    dead, entropy, bits, smoothing = figure.subplots(1, 4)
    for axes, (title, value) in zip((dead, entropy, bits, smoothing), panels.items(), strict=True):
        for number, name in enumerate(names):
            own = [row for row in rows if row["block"] == name]
            style = {"color": colours(number), "marker": "." if len(own) < 3 else None}
            axes.plot([row["epoch"] for row in own], [value(row) for row in own], label=name, **style)
        axes.set(xlabel="epoch", title=title)
        axes.title.set_fontsize("medium")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    dead.set_ylim(-2, 102)
    entropy.set_ylim(0, 1.05 * max(most, 1))
    bits.set_ylim(0, 1.05 * max(0.5, *(row["bits"] for row in rows)))  # few use much of log2(K)
    bits.axhline(FEW_BITS, color="black", linestyle="--", linewidth=1)
    few = names if len(names) <= 6 else [names[0], names[-1]]
    handles = {handle.get_label(): handle for handle in dead.get_lines()}
    figure.legend([handles[name] for name in few], few, loc="outside lower center", ncols=6, fontsize="small")
    return figure
