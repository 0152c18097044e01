"""Plot results: speed against peers, the roofline, growth with each size, and the cost of the swap.

    python -m benchmarks.plot [RESULT.json ...] [--out FOLDER]

By default every result of benchmarks.encode and benchmarks.swap in benchmarks/results becomes PNGs beside it.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.networks import MAIN
from benchmarks.record import RESULTS, read
from benchmarks.swap_rows import named, of_first_setting

Row = dict[str, Any]

# The forms that a reader would choose between, each with one mark and one colour (from Okabe and Ito, distinguishable
# by everyone).
FORMS = {
    "ctxenc, triton": ("ctxenc, Triton", "#D55E00", "o"),
    "ctxenc, torch": ("ctxenc", "#0072B2", "o"),
    "torch.compile(shifted matmul)": ("torch.compile of the shifted matmul form", "#009E73", "s"),
    "shifted matmul": ("shifted matmul form, autograd", "#56B4E9", "^"),
    "expanded": ("expanded form", "#999999", "D"),
    "mmsegmentation": ("mmsegmentation's Encoding", "#CC79A7", "v"),
}
TITLES = {"forward": "forward", "forward_backward": "forward + backward"}
DTYPE_ORDER = ("bfloat16", "float32", "float16")


def _describe_machine(result: dict[str, Any]) -> str:
    environment = result["environment"]
    machine = environment["gpu"] or f"{environment['processor']}, {environment['threads']} threads"
    return f"{machine}, torch {environment['versions']['torch']}, commit {environment['commit']}"


def _make_figure(
    result: dict[str, Any], panels: int, width: float, height: float, title: str
) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(1, panels, figsize=(width, height), squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=12)
    figure.text(0.995, -0.01, _describe_machine(result), ha="right", va="top", fontsize=7, color="#555555")
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
    return figure, list(axes[0])


def _select_dtype(rows: Sequence[Row]) -> list[Row]:
    """Select the rows of one dtype: the most important measured one."""
    dtype = min((row["dtype"] for row in rows), key=DTYPE_ORDER.index)
    return [row for row in rows if row["dtype"] == dtype]


def _select_rows(result: dict[str, Any], sweep: bool) -> list[Row]:
    """Select the rows of a benchmarks.encode result with both times, in the first layout."""
    rows = [row for row in result["rows"] if "forward_backward_ms" in row and (row["group"] == "sweep") is sweep]
    return _select_dtype([row for row in rows if row["layout"] == "channels_first"]) if rows else []


def _name_source(row: Row) -> str:
    """Label a row's network and shape for an axis."""
    return f"{row['source']}\nB, N, D, K = {', '.join(map(str, row['shape']))}"


def _draw_forms(result: dict[str, Any], title: str, entry: str, mark_of_ours: bool) -> Figure | None:
    """Draw one entry of every form at the networks' shapes: a line per shape, a panel per direction."""
    rows = _select_rows(result, sweep=False)
    if not rows:
        return None
    sources = list(dict.fromkeys(map(_name_source, rows)))
    figure, axes = _make_figure(result, 2, 11, 1.6 + 0.42 * len(sources), title)
    for ax, (direction, name) in zip(axes, TITLES.items(), strict=True):
        for form, (label, colour, mark) in FORMS.items():
            points = [row for row in rows if row["form"] == form]
            if not points or (form == "ctxenc, torch" and not mark_of_ours):
                continue
            places = [sources.index(_name_source(row)) for row in points]
            values = [row[f"{direction}_{entry}"] for row in points]
            ax.scatter(values, places, color=colour, marker=mark, s=28, label=label, zorder=3)
        ax.axvline(1, color="black" if mark_of_ours else "#0072B2", label="roofline" if mark_of_ours else "ctxenc")
        ax.set(xscale="log", title=name, yticks=range(len(sources)), ylim=(len(sources) - 0.5, -0.5))
        ax.set_yticklabels(sources if ax is axes[0] else [], fontsize=9)
        ax.grid(axis="both", color="#EEEEEE", zorder=0)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=9, frameon=False)
    return figure


def draw_speed(result: dict[str, Any]) -> Figure | None:
    """Draw each form's time relative to ctxenc's."""
    return _draw_forms(
        result,
        "Time of other forms divided by the time of ctxenc (right of the line: ctxenc is faster)",
        "ratio",
        mark_of_ours=False,
    )


def draw_roofline(result: dict[str, Any]) -> Figure | None:
    """Draw the bound as a part of each form's time: x at the copy bandwidth, or the products at the rate of a large one.

    It can exceed 1 if the cache serves x, as the bandwidth of a large copy does not include the cache.
    """
    title = "Time of the roofline divided by the time of each form (roofline: copy bandwidth and matmul rate of the same run)"
    return _draw_forms(result, title, "floor", mark_of_ours=True)


def draw_growth(result: dict[str, Any]) -> Figure | None:
    """Draw time against N, K and D, one at a time."""
    rows = _select_rows(result, sweep=True)
    if not rows:
        return None
    middle = [statistics.mode(sizes) for sizes in zip(*(row["shape"] for row in rows), strict=True)]
    names = ("images", "pixels", "channels", "codewords")
    rest = ", ".join(f"{size} {name}" for size, name in zip(middle, names, strict=True))
    title = f"Time of forward + backward as one size grows. Other sizes: {rest}"
    figure, axes = _make_figure(result, 3, 12, 4.4, title)
    for ax, place in zip(axes, (1, 3, 2), strict=True):
        others = [other for other in range(4) if other != place]
        line = [row for row in rows if all(row["shape"][other] == middle[other] for other in others)]
        for form, (label, colour, mark) in FORMS.items():
            points = sorted((row["shape"][place], row["forward_backward_ms"]) for row in line if row["form"] == form)
            if points:
                sizes, times = zip(*points, strict=True)
                medians = [each["median"] for each in times]
                ax.plot(sizes, medians, color=colour, marker=mark, markersize=4, label=label)
                ax.fill_between(sizes, [t["p20"] for t in times], [t["p80"] for t in times], color=colour, alpha=0.2)
        ticks = sorted({row["shape"][place] for row in line})
        ax.set(xscale="log", yscale="log", xlabel=names[place], xticks=ticks)
        ax.set_xticklabels(list(map(str, ticks)))
        ax.minorticks_off()
        ax.grid(color="#EEEEEE")
    axes[0].set_ylabel("milliseconds: median, 20 to 80 % of the calls")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=9, frameon=False)
    return figure


def draw_cost(result: dict[str, Any]) -> Figure | None:
    """Draw the cost of the variants in the table of the docs, at the result's first setting: a block of lines a network."""
    rows = [row for row in of_first_setting(result) if row["variant"] in MAIN and "memory_ratio" in row]
    rows = [row for row in rows if row["variant"] != row["compared_with"]]
    if not rows:
        return None
    labels: dict[tuple[str, str], str] = {}
    for row in rows:
        labels.setdefault((row["network"], ""), f"{row['network']}: {row['compared_with']} = 1")
        labels.setdefault((row["network"], row["variant"]), named(row))
    places = list(labels)
    title = "Cost relative to the variant in bold: below 1 is cheaper. In brackets: the channels that are encoded, of C"
    figure, axes = _make_figure(result, 3, 12, 1.3 + 0.18 * len(places), title)
    panels = {
        "time of a training step": "training_ratio",
        "time of inference": "inference_ratio",
        "memory of training": "memory_ratio",
    }
    marks = {
        "with context encoding": ("#0072B2", "o"),
        "without": ("#999999", "o"),
        "with it, fused for inference": ("#D55E00", "|"),
    }
    for ax, (title, measure) in zip(axes, panels.items(), strict=True):
        ax.axvline(1, color="black", linewidth=1)
        for row in rows:
            if measure not in row or (row["fused"] and measure != "inference_ratio"):
                continue
            ours = named(row).startswith(("ContextEncoding", "EncNet"))
            colour, mark = list(marks.values())[2 if row["fused"] else 0 if ours else 1]
            place = places.index((row["network"], row["variant"]))
            ax.scatter(row[measure], place, color=colour, s=22, marker=mark, zorder=3)
        ax.set(title=title, ylim=(len(places) - 0.3, -0.7), yticks=range(len(places)))
        ax.set_yticklabels(list(labels.values()) if ax is axes[0] else [], fontsize=9)
        for (_, variant), label in zip(places, ax.get_yticklabels(), strict=True):
            label.set_fontweight("normal" if variant else "bold")
        ax.grid(color="#EEEEEE", zorder=0)
    for label, (colour, mark) in marks.items():
        axes[0].scatter([], [], color=colour, marker=mark, label=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=9, frameon=False)
    return figure


PICTURES: dict[str, dict[str, Callable[[dict[str, Any]], Figure | None]]] = {
    "encode": {"speed": draw_speed, "roofline": draw_roofline, "growth": draw_growth},
    "swap": {"cost": draw_cost},
}


def draw(path: Path, folder: Path) -> list[Path]:
    """Draw every picture for which a result has rows.

    Raises:
        SystemExit: the file is not a result, or its benchmark has no pictures here.
    """
    result = read(path)
    if (benchmark := result.get("benchmark")) not in PICTURES:
        raise SystemExit(f"{path}: there are pictures of {', '.join(PICTURES)}, got a result of {benchmark!r}")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw_figure in PICTURES[benchmark].items():
        if figure := draw_figure(result):
            written.append(folder / f"{path.stem}_{name}.png")
            figure.savefig(written[-1], dpi=110, bbox_inches="tight")
            plt.close(figure)
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m benchmarks.plot")
    parser.add_argument("results", type=Path, nargs="*", metavar="RESULT.json")
    parser.add_argument("--out", type=Path, help="folder of the pictures (default: beside each result)")
    args = parser.parse_args(arguments)
    results = args.results or [
        path for path in sorted(RESULTS.glob("*.json")) if read(path).get("benchmark") in PICTURES
    ]
    for path in results:
        for picture in draw(path, args.out or path.parent):
            print(picture)


if __name__ == "__main__":
    main()
