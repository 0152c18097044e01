"""Report a finished segmentation run: the table, report.md, and curves.png."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from ctxenc.runs.config import atomic
from ctxenc.runs.folders import load_weights
from ctxenc.runs.segment_config import SegmentConfig, build_network
from ctxenc.training.bad_images import noted
from ctxenc.training.checkpoint import SPEED, Row, read_results, write_rows
from ctxenc.training.codebooks import name_idle_codebooks
from ctxenc.training.console import text_table
from ctxenc.training.page import write_page
from ctxenc.training.pictures import short
from ctxenc.training.report import CURVES, describe_gain, how_made, markdown
from ctxenc.training.segmentation.arms import ARMS
from ctxenc.training.segmentation.mask_pictures import colour_mask, voc_palette
from ctxenc.training.segmentation.segment_settings import SCENES, SegmentSettings
from ctxenc.viz.figures import escape

PREDICTIONS = "predictions.png"
Results = dict[str, list[list[Row]]]  # of each arm, the rows of each seed, one an epoch


def ambiguous_classes(data: str) -> list[str]:
    """Return the classes of the scenes that only the rest of the scene tells apart."""
    if data != SCENES:
        return []
    from ctxenc.training.segmentation.scenes import AMBIGUOUS

    return [name for pair in AMBIGUOUS for name in pair]


def mean_iou(row: Row, classes: Sequence[str]) -> float:
    """Return the mean IoU of some classes after an epoch; absent classes do not count."""
    values = [row[f"iou/{name}"] for name in classes if not math.isnan(row[f"iou/{name}"])]
    return statistics.mean(values) if values else math.nan


def write_report(folder: Path, configs: Mapping[str, SegmentConfig], settings: SegmentSettings, seconds: float) -> str:
    """Write metrics.csv, curves.png, report.md and report.html into `folder`, after every arm has finished.

    Returns:
        The table and its notes, as printed.
    """
    results = {arm: [read_results(folder / f"{arm}-{seed}") for seed in settings.seed_list] for arm in configs}
    rows = [
        {"arm": arm, "seed": seed, **{name: value for name, value in row.items() if name != SPEED}}
        for arm, seeds in results.items()
        for seed, own in zip(settings.seed_list, seeds, strict=True)
        for row in own
    ]
    write_rows(folder / "metrics.csv", list(rows[0]), rows)
    with atomic(folder / "curves.png") as path:
        draw_curves(results).savefig(path, dpi=120)
    if settings.data == SCENES and len(configs) > 1:
        with atomic(folder / PREDICTIONS) as path:
            draw_scenes(folder, configs, settings, results).savefig(path, dpi=120)
    header, cells = table(results, configs, ambiguous_classes(settings.data))
    named = {arm: ARMS[arm][0] for arm in configs}
    idle = name_idle_codebooks(folder, named, settings.seed_list, started=settings.codebook_start)
    scores = {arm: [rows[-1]["mean_iou"] for rows in seeds] for arm, seeds in results.items()}
    *others, last = configs
    gains = [describe_gain(named[last], named[arm], scores[last], scores[arm], "mIoU") for arm in reversed(others)]
    notes = [*describe_figures(settings), *idle, *noted(folder)]
    config = next(iter(configs.values()))
    title, made = f"EncNet on {settings.data}", how_made(config.versions, seconds)
    with atomic(folder / "report.md") as path:
        text = markdown(title, gains, header, cells, [*notes, CURVES, made], settings)
        path.write_text(text, encoding="utf-8")
    arms = {f"{arm}-{settings.seed}": f"{named[arm]}, seed {settings.seed}" for arm in configs}
    write_page(folder, title, gains, header, cells, [*notes, made], arms, settings.as_dict())
    return "\n".join([text_table(header, cells, right=header[1:]), "", *gains, *notes])


def draw_scenes(
    folder: Path, configs: Mapping[str, SegmentConfig], settings: SegmentSettings, results: Results
) -> Figure:
    """Draw what the first seed of each arm predicts; the titles have its mean IoU over all test scenes."""
    from ctxenc.training.segmentation.scenes import draw_predictions

    networks = {}
    for arm, config in configs.items():
        network = build_network(config).eval()
        load_weights(network, folder / f"{arm}-{settings.seed}" / "last.safetensors")
        networks[column_title(arm, results[arm][0][-1]["mean_iou"])] = network
    return draw_predictions(networks)


def draw_masks(
    rows: Sequence[tuple[Tensor, Tensor, Tensor]],
    captions: Sequence[str],
    classes: Sequence[str],
    ignore_index: int = 255,
) -> Figure:
    """Draw a row per sample: image, truth, and prediction with a caption; and a legend of the classes in them.

    Args:
        rows: Photograph (3, H, W) uint8, mask (H, W) and prediction (H, W), both of integers.
        captions: A line for each row.
        classes: Names of the classes.
        ignore_index: Label of the pixels without a class.
    """
    palette = voc_palette(len(classes))
    present = torch.cat([mask.flatten() for _, *masks in rows for mask in masks]).unique().tolist()
    patches = [
        Patch(
            facecolor="#{:02x}{:02x}{:02x}".format(*palette[label]),
            edgecolor="gray",
            label=escape(short(classes[label])),
        )
        for label in present
        if label != ignore_index
    ]
    if ignore_index in present:
        patches.append(Patch(facecolor="white", edgecolor="gray", label="not counted"))
    height, width = rows[0][1].shape
    figure = Figure(
        figsize=(9, min(4.5, 3 * height / width) * len(rows) + 0.5 + 0.05 * len(patches)), layout="constrained"
    )
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for line, (photograph, *masks), caption in zip(axes, rows, captions, strict=True):
        shown = [photograph.permute(1, 2, 0).numpy(), *(colour_mask(each, palette, ignore_index) for each in masks)]
        for axis, picture in zip(line, shown, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[-1].set_xlabel(caption)
    for axis, title in zip(axes[0], ("image", "truth", "prediction"), strict=True):
        axis.set_title(title)
    figure.legend(handles=patches, loc="outside upper center", ncols=4, fontsize="small", frameon=False)
    return figure


def column_title(arm: str, score: float) -> str:
    """Return the title of a column of predictions, with the mean IoU."""
    name = ARMS[arm][0].replace(" + ", "\n+ ").replace(" without", "\nwithout")
    return f"{name}\nmIoU {100 * score:.1f} %"


def table(
    results: Results, configs: Mapping[str, SegmentConfig], ambiguous: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Return header and cells: parameters and final measures of each arm, mean and deviation over seeds."""
    header = ["network", "parameters", "mIoU", *(["mIoU, ambiguous", "mIoU, others"] if ambiguous else [])]
    header += ["pixel accuracy", "images/s"]
    cells = []
    for arm, seeds in results.items():
        config = configs[arm]
        parameters = sum(parameter.numel() for parameter in build_network(config).parameters())
        last = [rows[-1] for rows in seeds]
        measures = [[row["mean_iou"] for row in last]]
        if ambiguous:
            others = [name for name in config.classes if name not in ambiguous]
            measures += [[mean_iou(row, names) for row in last] for names in (ambiguous, others)]
        measures.append([row["pixel_accuracy"] for row in last])
        speed = statistics.median(row[SPEED] for rows in seeds for row in rows)
        cells.append([ARMS[arm][0], f"{parameters:,}", *map(spread, measures), f"{speed:,.0f}"])
    return header, cells


def spread(values: Sequence[float]) -> str:
    """Mean and, of more than one, standard deviation, in per cent."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation} %"


def describe_figures(settings: SegmentSettings) -> list[str]:
    """Return the notes beside the table."""
    seeds = f"mean ± standard deviation over {settings.seeds} seeds" if settings.seeds > 1 else "one seed"
    lines = [
        f"After the last epoch (not the best one), {seeds}. images/s: in training, data included, the median epoch."
    ]
    if settings.data == SCENES:
        lines.append(
            "Ambiguous classes: pairs that are drawn from one pool of textures; only the rest of the scene tells which it is."
        )
        if len(settings.arm_names) > 1:
            lines.append(
                f"{PREDICTIONS}: of each type of scene, take the quarter with most errors of the first network. "
                "Shown is the scene with the median gain of the last network over the first."
            )
        lines.append(
            "Next, on your own data: ctxenc segment train --data FOLDER (it holds images/ and masks/), "
            "or ctxenc finetune --data FOLDER (a folder of images for each class)."
        )
    return lines


def draw_curves(results: Results) -> Figure:
    """Mean IoU and training loss by epoch: the mean over seeds, shaded from the lowest to the highest seed."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, column, label, scale in zip(
        figure.subplots(1, 2), ("mean_iou", "train_loss"), ("mean IoU (%)", "training loss"), (100, 1), strict=True
    ):
        for number, (arm, seeds) in enumerate(results.items()):
            values = torch.tensor([[scale * row[column] for row in rows] for rows in seeds], dtype=torch.float64)
            epochs = [row["epoch"] for row in seeds[0]]
            axes.plot(epochs, values.mean(dim=0), marker=".", color=f"C{number}", label=ARMS[arm][0])
            axes.fill_between(
                epochs, values.amin(dim=0), values.amax(dim=0), color=f"C{number}", alpha=0.15, linewidth=0
            )
        axes.set(xlabel="epoch", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure
