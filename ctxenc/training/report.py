"""Report a finished run: the table, report.md, report.html, curves.png and the metrics of all arms in one file."""

import os
import platform
import statistics
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ctxenc.runs.config import RunConfig, atomic
from ctxenc.runs.errors import printable
from ctxenc.runs.folders import SCORE, build_model
from ctxenc.training import photographs
from ctxenc.training.bad_images import noted
from ctxenc.training.checkpoint import COLUMNS, SPEED, Row, read_predictions, read_results, write_rows
from ctxenc.training.codebooks import name_idle_codebooks
from ctxenc.training.console import text_table
from ctxenc.training.metrics import balanced_accuracy, bootstrap, interval, interval_over_seeds
from ctxenc.training.page import write_page
from ctxenc.training.settings import PHOTOGRAPHS, Settings, TrainingSettings

NETWORKS = {"se": "SE", "context": "ContextEncoding"}
COLOURS = {"se": "tab:orange", "context": "tab:blue"}
CURVES = "![score and loss by epoch](curves.png)"
HEADER = ("network", "parameters", "balanced accuracy", "95 % interval", "each seed", "images/s", "ratio")


@dataclass(frozen=True)
class Arm:
    """Hold the results of one arm, all seeds.

    Args:
        name: "se" or "context".
        parameters: Number of parameters of the network.
        rows: The metrics and the speed of each seed, one row per epoch.
        targets: True classes of the validation samples, (N,).
        correct: Whether each seed's network was right after the last epoch, (seeds, N) bool.
        scores: Class-balanced accuracy of each seed after the last epoch.
    """

    name: str
    parameters: int
    rows: list[list[Row]]
    targets: Tensor
    correct: Tensor
    scores: list[float]

    @property
    def score(self) -> float:
        """Return the class-balanced accuracy, the mean over seeds."""
        return statistics.mean(self.scores)

    @property
    def share_right(self) -> Tensor:
        """Return the share of seeds that were right on each sample, (N,) float64."""
        return self.correct.double().mean(dim=0)

    @property
    def images_per_s(self) -> float:
        """Return images per second in training, the median over epochs and seeds."""
        return statistics.median(row[SPEED] for rows in self.rows for row in rows)


def read_arm(
    run: Path, name: str, config: RunConfig, seeds: Sequence[int], samples: Container[int] | None = None
) -> Arm:
    """Read the results of arm `name` from the folder `run`, for the validation samples of these indices (default: all)."""
    folders = [run / f"{name}-{seed}" for seed in seeds]
    rows = [read_predictions(each / "predictions.csv") for each in folders]
    kept = [[row[1:3] for row in each if samples is None or row[4] in samples] for each in rows]
    predictions = [torch.tensor(each) for each in kept]
    targets = predictions[0][:, 0]
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_model(config).parameters())
    return Arm(
        name=name,
        parameters=parameters,
        rows=[read_results(each) for each in folders],
        targets=targets,
        correct=torch.stack([each[:, 0] == each[:, 1] for each in predictions]),
        scores=[balanced_accuracy(each[:, 0], each[:, 1], len(config.classes)) for each in predictions],
    )


def write_report(run: Path, configs: dict[str, RunConfig], settings: Settings, seconds: float) -> str:
    """Write metrics.csv, curves.png, report.md and report.html into `run`.

    Args:
        run: A folder in which every arm has finished.
        configs: The configuration of each arm.
        settings: The run's settings.
        seconds: Run time of the command.

    Returns:
        The table and its notes, as printed.
    """
    every = [
        read_predictions(run / f"{name}-{seed}" / "predictions.csv") for name in configs for seed in settings.seed_list
    ]
    common = set.intersection(*({row[4] for row in each} for each in every))  # some may have broken on the way
    arms = [read_arm(run, name, config, settings.seed_list, common) for name, config in configs.items()]
    rows = [
        {"arm": arm.name, "seed": seed, **{column: row[column] for column in COLUMNS}}
        for arm in arms
        for seed, seed_rows in zip(settings.seed_list, arm.rows, strict=True)
        for row in seed_rows
    ]
    write_rows(run / "metrics.csv", ("arm", "seed", *COLUMNS), rows)
    colour = photographs.colour_score() if settings.data == PHOTOGRAPHS else None
    with atomic(run / "curves.png") as path:
        draw_curves(arms, colour).savefig(path, dpi=120)
    cells = table_rows(arms, colour)
    started = "calibrated" if settings.start == "calibrated" else settings.codebook_start
    idle = name_idle_codebooks(run, {name: NETWORKS[name] for name in configs}, settings.seed_list, started=started)
    gains = [
        describe_gain(NETWORKS[arm.name], NETWORKS[arms[0].name], arm.scores, arms[0].scores, "balanced accuracy")
        for arm in arms[1:]
    ]
    notes = [*describe_figures(arms, settings), *idle, *noted(run)]
    config = next(iter(configs.values()))
    title, made = f"{config.model} on {settings.data}", how_made(config.versions, seconds)
    with atomic(run / "report.md") as path:
        text = markdown(title, gains, HEADER, cells, [*notes, CURVES, made], settings)
        path.write_text(text, encoding="utf-8")
    folders = {f"{arm.name}-{settings.seed}": f"{NETWORKS[arm.name]}, seed {settings.seed}" for arm in arms}
    write_page(run, title, gains, HEADER, cells, [*notes, made], folders, settings.as_dict())
    return "\n".join([text_table(HEADER, cells, right=(HEADER[1], *HEADER[5:])), "", *gains, *notes])


def table_rows(arms: Sequence[Arm], colour: float | None) -> list[tuple[str, ...]]:
    """Return the cells under HEADER: one row per arm, and one for the nearest neighbour on colour."""
    baseline = arms[0].images_per_s
    rows: list[tuple[str, ...]] = []
    for arm in arms:
        low, high = interval(bootstrap(arm.targets, arm.share_right))
        rows.append(
            (
                NETWORKS[arm.name],
                f"{arm.parameters:,}",
                f"{100 * arm.score:.1f} %",
                f"{100 * low:.1f} to {100 * high:.1f} %",
                ", ".join(f"{100 * score:.1f}" for score in arm.scores),
                f"{arm.images_per_s:,.0f}",
                f"{arm.images_per_s / baseline:.2f}",
            )
        )
    if colour is not None:
        rows.append(("nearest neighbour on colour", "", f"{100 * colour:.1f} %", "", "", "", ""))
    return rows


def describe_gain(name: str, other: str, scores: Sequence[float], others: Sequence[float], measure: str) -> str:
    """State the mean difference of two networks' scores, shares by seed, with its 95 % interval over the seeds."""
    points = [100 * (one - base) for one, base in zip(scores, others, strict=True)]
    text = f"{name} minus {other}: {statistics.mean(points):+.1f} points of {measure}"
    if len(points) < 2:
        return f"{text}; one seed, no interval."
    low, high = interval_over_seeds(points)
    if low == high:
        return f"{text}; all {len(points)} seeds alike, no interval."
    return f"{text}, 95 % interval {low:+.1f} to {high:+.1f} over {len(points)} seeds."


def describe_figures(arms: Sequence[Arm], settings: Settings) -> list[str]:
    """Return the notes beside the table: how its figures were made."""
    samples = "test tiles" if settings.data == PHOTOGRAPHS else "validation images"
    count = len(arms[0].targets)
    lines = [
        f"Accuracy: mean over classes on {count:,} {samples}, after the last epoch (not the best one), mean of "
        f"{settings.seeds} seed{'s' if settings.seeds > 1 else ''}; interval: {samples} drawn again inside each class.",
        "images/s: in training, data included, the median epoch"
        + (f"; ratio: of {NETWORKS[arms[0].name]}'s." if len(arms) > 1 else "."),
    ]
    lines.append(f"best.safetensors holds the epoch chosen on these very {samples}: its accuracy flatters it.")
    if len(arms) == 2:
        difference = arms[1].share_right - arms[0].share_right
        low, high = interval(bootstrap(arms[0].targets, difference))
        lines.append(
            f"Over {samples}, not over seeds, the difference has an interval of {100 * low:+.1f} to {100 * high:+.1f} points."
        )
    return lines


def markdown(
    title: str,
    gains: Sequence[str],
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    notes: Sequence[str],
    settings: TrainingSettings,
) -> str:
    """Return the text of report.md: the differences of the networks, a table, its notes, and every setting."""

    def table(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
        rows = (
            [printable(cell).replace("|", "\\|") for cell in row] for row in (header, ["---"] * len(header), *cells)
        )
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    listing = [(f"`{name}`", f"`{value}`") for name, value in settings.as_dict().items()]
    return (
        "\n\n".join(
            [
                f"# {printable(title)}",
                *(f"**{each}**" for each in gains),
                table(header, cells),
                *map(printable, notes),
                table(("setting", "value"), listing),
            ]
        )
        + "\n"
    )


def how_made(versions: Mapping[str, str], seconds: float) -> str:
    """Describe the machine, the time and the versions that made a run."""
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"Machine: {machine()}. The command took {seconds:.0f} s. Versions: {listed}."


def machine() -> str:
    """Describe the processor, the cores available to this process, and the GPU if there is one."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or an architecture whose kernel gives no name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {cores} core{'' if cores == 1 else 's'}{gpu}"


def draw_curves(arms: Sequence[Arm], colour: float | None) -> Figure:
    """Draw accuracy and losses by epoch: the mean over seeds, shaded from the lowest to the highest seed."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for arm in arms:
        name = NETWORKS[arm.name]
        _band(accuracy, arm, SCORE, name, "-", scale=100)
        _band(loss, arm, "train_loss", f"{name}, training", "--")
        _band(loss, arm, "val_loss", f"{name}, validation", "-")
    if colour is not None:
        accuracy.axhline(100 * colour, color="tab:gray", linestyle=":", label="nearest neighbour on colour")
    accuracy.set(xlabel="epoch", ylabel="class-balanced accuracy (%)")
    loss.set(xlabel="epoch", ylabel="cross entropy")
    loss.set_ylim(bottom=0)
    for axes in (accuracy, loss):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _band(axes: Axes, arm: Arm, column: str, label: str, style: str, scale: float = 1.0) -> None:
    epochs = [row["epoch"] for row in arm.rows[0]]
    values = torch.tensor([[row[column] * scale for row in rows] for rows in arm.rows], dtype=torch.float64)
    axes.plot(epochs, values.mean(dim=0), style, marker=".", color=COLOURS[arm.name], label=label)
    axes.fill_between(epochs, values.amin(dim=0), values.amax(dim=0), color=COLOURS[arm.name], alpha=0.15, linewidth=0)
