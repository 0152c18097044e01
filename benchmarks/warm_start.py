"""Measure the accuracy lost by a swap in a trained network, with and without calibration of the blocks.

    python -m benchmarks.warm_start [--quick] [--seeds 5] [--out benchmarks/results/warm_start.json]

An SE network is trained on the embedded photographs, and one on scikit-learn's digits. Then its blocks are swapped,
initialised in each of three ways (ctxenc.calibrate), and the network is fine-tuned; for comparison the SE network
trains on, with the same images in the same order. It writes the accuracy on test images before any step and after every
epoch, and a figure.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import timm
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ctxenc
from benchmarks.forms import check_operator
from benchmarks.record import RESULTS, Record, read
from ctxenc.training.data import Samples, build_datasets, eval_transform, train_transform
from ctxenc.training.metrics import balanced_accuracy, interval_over_seeds
from ctxenc.training.segmentation.segment_report import spread
from ctxenc.training.settings import Settings

STARTS = ("SE goes on", "calibrated", "neutral", "random")
COLOURS = {"SE goes on": "#000000", "calibrated": "#0072B2", "neutral": "#E69F00", "random": "#999999"}
TITLES = {"photographs": "embedded photographs", "digits": "scikit-learn's digits"}
BATCH = 32
NETWORK = "mobilenetv3_small_050"  # nine SE blocks in the middle of its blocks, without a shortcut around them


@dataclass(frozen=True)
class Task:
    """Hold a data set, and the length of training and fine-tuning."""

    name: str
    classes: int
    train: Dataset
    test: Dataset
    plain: Dataset  # the training images as in evaluation, for calibration
    epochs: int
    further: int

    def batches(self, epoch: int) -> Iterator[Any]:
        """Return the training batches of an epoch, the same for every trained network."""
        if isinstance(self.train, Samples):
            self.train.set_epoch(epoch)
        generator = torch.Generator().manual_seed(epoch)
        return iter(DataLoader(self.train, BATCH, shuffle=True, drop_last=True, generator=generator))


def photographs(seed: int, epochs: int, further: int) -> Task:
    """Load 17 photographs, crops of 64 x 64."""
    settings = Settings.resolve({"crop_scale": 0.7})
    data = build_datasets(settings)
    config = {
        "input_size": (3, 64, 64),
        "interpolation": "bicubic",
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "crop_pct": 1.0,
    }
    plain = eval_transform(config)
    train = Samples(data.train, train_transform(settings, config), seed)
    return Task(
        "photographs",
        len(data.classes),
        train,
        Samples(data.val, plain, seed),
        Samples(data.train, plain, seed),
        epochs,
        further,
    )


def digits(seed: int, epochs: int, further: int) -> Task:
    """Load 1797 handwritten digits, enlarged to 32 x 32; another two fifths are the test set for every seed."""
    images, labels = load_digits(return_X_y=True)
    images = F.interpolate(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, scale_factor=4)
    parts = train_test_split(images.expand(-1, 3, -1, -1), torch.tensor(labels), test_size=0.4, random_state=seed)
    train, test = TensorDataset(*parts[::2]), TensorDataset(*parts[1::2])
    return Task("digits", 10, train, test, train, epochs, further)


EPOCHS = {"photographs": (12, 4), "digits": (20, 4)}  # of the SE network, and after the swap
TASKS: dict[str, Callable[[int, int, int], Task]] = {"photographs": photographs, "digits": digits}


def accuracy(network: nn.Module, task: Task) -> float:
    """Return the mean over classes of the accuracy on the test set."""
    network.eval()
    predictions, targets = [], []
    with torch.no_grad():
        for images, labels in DataLoader(task.test, 128):
            predictions.append(network(images).argmax(1))
            targets.append(labels)
    return balanced_accuracy(torch.cat(targets), torch.cat(predictions), task.classes)


def train(network: nn.Module, task: Task, epochs: range, lr: float) -> Iterator[float]:
    """Train with AdamW and a cosine from lr to 0; return the accuracy after each epoch."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    steps = len(epochs) * (len(task.train) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in epochs:
        network.train()
        for images, labels in task.batches(epoch):
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        yield accuracy(network, task)


def measure(task: Task, seed: int, images: int) -> Iterator[dict[str, Any]]:
    """Train the SE network, then return a row for each start."""
    torch.manual_seed(seed)
    network = timm.create_model(NETWORK, num_classes=task.classes)
    network.to(memory_format=torch.channels_last)
    for _ in train(network, task, range(task.epochs), 3e-3):
        pass
    chosen = torch.randperm(len(task.plain), generator=torch.Generator().manual_seed(seed))[:images].tolist()
    shown = torch.stack([task.plain[index][0] for index in chosen])
    for start in STARTS:
        own = copy.deepcopy(network)
        row: dict[str, Any] = {"data": task.name, "start": start, "seed": seed, "images": images}
        found: dict[str, Any] = {}
        if start != "SE goes on":
            torch.manual_seed(seed)
            ctxenc.patch_se_blocks(own)
            report = ctxenc.calibrate(own, shown.split(64), start=start, seed=seed, progress=False)
            r2 = statistics.mean(block.gate_r2 for block in report.blocks)
            found = {"gate_r2": r2, "agreement": report.agreement, "kl": report.kl}
        yield row | {"epoch": 0, "accuracy": accuracy(own, task)} | found
        further = range(task.epochs, task.epochs + task.further)
        for epoch, score in enumerate(train(own, task, further, 5e-4), 1):
            yield row | {"epoch": epoch, "accuracy": score}


def by_seed(rows: list[dict[str, Any]], start: str, epoch: int, key: str = "accuracy") -> list[float]:
    """Return a measure of one start after an epoch, seed by seed."""
    return [row[key] for row in rows if (row["start"], row["epoch"]) == (start, epoch) and key in row]


def difference(first: list[float], second: list[float]) -> str:
    """Return the mean of first - second in points, with the 95 % interval of Student's t over the seeds."""
    pairs = [100 * (a - b) for a, b in zip(first, second, strict=True)]
    mean = f"{statistics.mean(pairs):+.1f}"
    if len(pairs) < 2:
        return mean
    low, high = interval_over_seeds(pairs)
    return f"{mean} ({low:+.1f} to {high:+.1f})"


def markdown(result: dict[str, Any]) -> str:
    """Return the table: accuracy in per cent, mean and deviation over seeds, and calibrated minus each other start."""
    header = [
        "data",
        "start",
        "before any step",
        "after 1 epoch",
        "at the end",
        "calibrated minus this: before",
        "1 epoch",
        "end",
    ]
    lines = [header, ["---"] * len(header)]
    for data in dict.fromkeys(row["data"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["data"] == data]
        epochs = (0, 1, max(row["epoch"] for row in rows))
        for start in STARTS:
            own = [by_seed(rows, start, epoch) for epoch in epochs]
            ours = [by_seed(rows, "calibrated", epoch) for epoch in epochs]
            apart = [difference(*pair) if start != "calibrated" else "" for pair in zip(ours, own, strict=True)]
            lines.append([data, start, *map(spread, own), *apart])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_picture(result: dict[str, Any]) -> Figure:
    """Draw accuracy against epochs, a panel for each data set; bars are one deviation over the seeds to either side."""
    names = list(dict.fromkeys(row["data"] for row in result["rows"]))
    figure, axes = plt.subplots(1, len(names), figsize=(5.2 * len(names), 3.8), squeeze=False, layout="constrained")
    for ax, name in zip(axes[0], names, strict=True):
        rows = [row for row in result["rows"] if row["data"] == name]
        epochs = range(max(row["epoch"] for row in rows) + 1)
        for number, (start, colour) in enumerate(COLOURS.items()):
            scores = torch.tensor([by_seed(rows, start, epoch) for epoch in epochs]) * 100  # (epochs, seeds)
            mean, deviation = scores.mean(1), scores.std(1) if scores.shape[1] > 1 else 0 * scores[:, 0]
            style = "--" if start == "SE goes on" else "-"
            places = [epoch + 0.06 * (number - 1.5) for epoch in epochs]  # side by side, so that no bar hides another
            bars = {"elinewidth": 1, "capsize": 2, "marker": "o", "markersize": 3}
            ax.errorbar(places, mean, deviation, linestyle=style, color=colour, label=start, **bars)
        ax.set(
            title=TITLES[name], xlabel="epochs of fine-tuning", xticks=list(epochs), ylabel="accuracy on test images, %"
        )
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#EEEEEE")
    axes[0][0].legend(frameon=False, loc="lower right", title="bars: ± 1 deviation over the seeds")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m benchmarks.warm_start")
    parser.add_argument(
        "--quick", action="store_true", help="one seed and few epochs, to see that it runs (into runs/)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="networks of each data set (default: 5)")
    parser.add_argument(
        "--images", type=int, default=512, help="for the calibration, a quarter held out (default: 512)"
    )
    parser.add_argument(
        "--data",
        nargs="*",
        choices=list(TASKS),
        default=list(TASKS),
        help="measure these, and keep what the file has of others",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--out", type=Path, help="JSON to write; the figure goes beside it")
    args = parser.parse_args(arguments)
    out = args.out or (Path("runs") if args.quick else RESULTS) / "warm_start.json"
    if args.threads:
        torch.set_num_threads(args.threads)
    seeds, images = (1, min(64, args.images)) if args.quick else (args.seeds, args.images)
    epochs = {"photographs": (1, 1), "digits": (2, 1)} if args.quick else EPOCHS
    kept = [row for row in read(out)["rows"] if row["data"] not in args.data] if out.exists() else []
    record = Record("warm_start", out, check_operator("cpu"), 0, "cpu", network=NETWORK, epochs=epochs)
    record.add(*kept)
    for name in args.data:
        for seed in range(seeds):
            for row in measure(TASKS[name](seed, *epochs[name]), seed, images):
                record.add(row)
                print(*(f"{value:.3f}" if isinstance(value, float) else value for value in row.values()), flush=True)
    result = read(out)
    print(markdown(result))
    draw_picture(result).savefig(out.with_suffix(".png"), dpi=110)
    print(f"written: {out} and {out.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
