"""Test whether context encoding in place of SE improves a classifier: networks trained from scratch, at equal parameters.

    python -m benchmarks.swap_accuracy [--quick] [--data digits photographs fashion_mnist] [--data-dir PATH]

Each arm of benchmarks.swap_training is a kind of block in a small residual network: by the start of the codebook, the
pool, a coarser map, the aggregation and the number of codewords. For one seed, all arms see the same images in the same
order for as many steps, and have the same initial weights outside the blocks. Each arm takes the learning rate with the
least cross entropy on images held out of the training set, over the first seeds. It writes every training with its
curves, each arm minus SE of the same seed with 95 % intervals, accuracy at other image sizes, and a figure. Every
training is a file in --runs: a stopped run resumes, and arms and seeds can be added. --continue takes a result in place of
these files, on another machine for example.
"""

import argparse
import statistics
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.stats import t as student

from benchmarks.forms import check_operator
from benchmarks.record import RESULTS, Record, read
from benchmarks.swap_tasks import BUDGETS, Budget
from benchmarks.swap_training import (
    ARMS,
    QUICK,
    SE,
    Arm,
    choose_lr,
    part,
    part_path,
    read_part,
    write_part,
)
from ctxenc.training.segmentation.segment_report import spread

Row = dict[str, Any]
Rows = Iterable[Row]

LRS = (0.003, 0.01, 0.03)
SEEDS = {"digits": 10, "photographs": 10, "fashion_mnist": 5}
TUNED = {"digits": 2, "photographs": 2, "fashion_mnist": 1}  # seeds for choosing the learning rate
DEBIAN = "/usr/share/datasets/fashion-mnist"
COLOURS = {"none": "#999999", "se": "#000000", "paper": "#E69F00", "spread": "#0072B2"}
DASHES = {"paper": "--", "spread": "-"}


def train_arms(
    arms: Iterable[Arm], budget: Budget, seeds: int, lrs: tuple[float, ...], folder: str, runs: Path, earlier: Rows = ()
) -> list[Row]:
    """Choose the learning rate of every arm, then train every seed; return the parts at the chosen learning rates.

    An arm of the rows of an earlier result keeps its learning rate, and trains only the seeds that are not there.
    """
    arms = list(arms)
    tuned = range(min(seeds, TUNED[budget.data]))
    chosen = {row["arm"]: row["lr"] for row in earlier}
    for arm in arms:
        if arm.name not in chosen:
            parts = [part(arm, budget, lr, seed, folder, runs) for seed in tuned for lr in lrs]
            chosen[arm.name] = choose_lr(parts)
        print(f"{budget.data}, {arm.name}: lr {chosen[arm.name]:g}", flush=True)
    rows = []
    for seed in range(seeds):
        for arm in arms:
            rows.append(part(arm, budget, chosen[arm.name], seed, folder, runs))
            print(f"{budget.data}, {arm.name}, seed {seed}: {rows[-1]['test']['accuracy']:.4f}", flush=True)
    return rows


def finished(
    arms: Iterable[Arm], budget: Budget, seeds: int, lrs: tuple[float, ...], runs: Path, earlier: Rows = ()
) -> list[Row]:
    """Return the finished rows of train_arms: arms with all of their learning rates, and the seeds present so far."""
    chosen = {row["arm"]: row["lr"] for row in earlier}
    rows = []
    for arm in arms:
        rates = [(lr, seed) for seed in range(min(seeds, TUNED[budget.data])) for lr in lrs]
        parts = [found for lr, seed in rates if (found := read_part(arm, budget, lr, seed, runs))]
        lr = chosen.get(arm.name) or (choose_lr(parts) if len(parts) == len(rates) else None)
        if lr:
            every = (read_part(arm, budget, lr, seed, runs) for seed in range(seeds))
            rows += [row for row in every if row]
    return rows


def unpack(path: Path, budget: Budget, runs: Path) -> list[Row]:
    """Write the rows of a result as parts, where no part is; return them."""
    rows = [row for row in read(path)["rows"] if row["data"] == budget.data]
    for row in rows:
        if row["budget"] != asdict(budget):
            raise SystemExit(f"--continue {path} is of another budget: {row['budget']}")
        if read_part(ARMS[row["arm"]], budget, row["lr"], row["seed"], runs) is None:
            write_part(row, part_path(ARMS[row["arm"]], budget, row["lr"], row["seed"], runs))
    return rows


def shorten(value: Any) -> Any:
    """Round the floats of a row to six digits: the curves of a hundred trainings make a large file."""
    if isinstance(value, dict):
        return {key: shorten(each) for key, each in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def of_arm(rows: list[Row], name: str) -> dict[int, Row]:
    """Return the rows of an arm by seed."""
    return {row["seed"]: row for row in rows if row["arm"] == name}


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean, and the half-width of its 95 % interval of Student's t; infinite for one value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, float("inf")
    return mean, float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def differences(rows: list[Row], name: str, reference: str, key: str = "accuracy", scale: str = "") -> list[float]:
    """Subtract one arm from another, seed by seed, on the test images, or at their size `scale`."""
    own, other = of_arm(rows, name), of_arm(rows, reference)

    def measure(row: Row) -> float:
        return row["scales"][scale][key] if scale else row["test"][key]

    return [measure(own[seed]) - measure(other[seed]) for seed in sorted(own.keys() & other.keys())]


def show(values: list[float], unit: float, digits: int) -> str:
    """Format mean and 95 % interval."""
    if not values:
        return ""
    mean, reach = interval([unit * value for value in values])
    span = f" ({mean - reach:+.{digits}f} to {mean + reach:+.{digits}f})" if len(values) > 1 else ""
    return f"{mean:+.{digits}f}{span}"


def _table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def accuracy_table(rows: list[Row]) -> str:
    """Return every arm of one data set: test accuracy, and its difference to SE of C / 4 and to SE of about as many parameters."""
    header = [
        "block",
        "parameters",
        "lr",
        "seeds",
        "accuracy",
        "cross entropy",
        "minus SE, points",
        "minus SE, cross entropy",
    ]
    header += ["minus SE of as many parameters, points", "bits of the codebook"]
    lines = []
    for name in dict.fromkeys(row["arm"] for row in rows):
        own = list(of_arm(rows, name).values())
        entropy = [row["test"]["cross_entropy"] for row in own]
        line = [name, f"{own[0]['network_parameters']:,}", f"{own[0]['lr']:g}", str(len(own))]
        line += [spread([row["test"]["accuracy"] for row in own]), f"{statistics.mean(entropy):.3f}"]
        other, reference = name != SE.name, ARMS[name].reference
        line.append(show(differences(rows, name, SE.name), 100, 2) if other else "")
        line.append(show(differences(rows, name, SE.name, "cross_entropy"), 1, 3) if other else "")
        line.append(show(differences(rows, name, reference), 100, 2) if reference != SE.name else "")
        bits = [row["bits"] for row in own if row["bits"] is not None]
        lines.append([*line, f"{statistics.mean(bits):.2f}" if bits else ""])
    return _table(header, lines)


def size_table(rows: list[Row]) -> str:
    """Return accuracy in per cent, and points minus SE, at other sizes of the test images, relative to the size of training."""
    scales = list(rows[0]["scales"])
    lines = []
    for name in dict.fromkeys(row["arm"] for row in rows):
        line = [name]
        for scale in scales:
            score = statistics.mean(row["scales"][scale]["accuracy"] for row in of_arm(rows, name).values())
            apart = show(differences(rows, name, SE.name, scale=scale), 100, 1) if name != SE.name else ""
            line.append(f"{100 * score:.1f}" + (f"; {apart}" if apart else ""))
        lines.append(line)
    return _table(["block", *scales], lines)


def markdown(result: Row) -> str:
    """Return the tables of every data set."""
    texts = []
    for data in dict.fromkeys(row["data"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["data"] == data]
        texts += [f"{data}, {rows[0]['budget']['train']:,} images", accuracy_table(rows), size_table(rows)]
    return "\n\n".join(texts)


def _draw_differences(ax: Axes, rows: list[Row]) -> None:
    """Draw a dot for each seed of each arm minus SE, and the mean with its interval."""
    names = [name for name in dict.fromkeys(row["arm"] for row in rows) if name != SE.name]
    for place, name in enumerate(names):
        arm = ARMS[name]
        found = [100 * value for value in differences(rows, name, SE.name)]
        if not found:
            continue
        colour = COLOURS[arm.start if arm.block == "context" else arm.block]
        ax.scatter(found, [place] * len(found), s=10, color=colour, alpha=0.4, linewidths=0)
        mean, reach = interval(found)
        shown = reach if len(found) > 1 else 0
        ax.errorbar(mean, place, xerr=shown, color=colour, marker="o", markersize=5, capsize=3)
    dots = [100 * value for name in names for value in differences(rows, name, SE.name)]
    ax.axvline(0, color="black", linewidth=1)
    ax.set_xlim(min([-1.0, *dots]) * 1.1, max([1.0, *dots]) * 1.1)  # intervals of few seeds exceed it
    ax.set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5), xlabel="test accuracy minus SE's (C/4), points")
    ax.set_yticklabels(names, fontsize=8)
    ax.grid(axis="x", color="#EEEEEE")


def _shown(rows: list[Row]) -> list[str]:
    """Return the arms with a drawn line: SE, and equal parameters with the whole map."""
    names = dict.fromkeys(row["arm"] for row in rows)
    return [
        name
        for name in names
        if name == SE.name or (ARMS[name].width == "equal" and not ARMS[name].coarse and not ARMS[name].remedy)
    ]


def _line(ax: Axes, name: str, xs: list[float], ys: list[float]) -> None:
    arm = ARMS[name]
    if arm.block == "se":
        style: Row = {"color": "black", "linewidth": 2}
    else:
        colours = {("mean", "mean"): "#0072B2", ("mean", "sum"): "#D55E00", ("concat", "mean"): "#009E73"}
        style = {"color": colours[arm.pool, arm.aggregation], "linestyle": DASHES[arm.start]}
        style["alpha"] = 1.0 if arm.num_codes == 16 else 0.5
    ax.plot(xs, ys, label=name, **style)


def picture(result: Row) -> Figure:
    """Draw a row per data set: differences to SE, curves of the held-out images, and accuracy against image size."""
    names = list(dict.fromkeys(row["data"] for row in result["rows"]))
    figure, axes = plt.subplots(len(names), 3, figsize=(15, 5 * len(names)), squeeze=False, layout="constrained")
    for line, data in zip(axes, names, strict=True):
        rows = [row for row in result["rows"] if row["data"] == data]
        _draw_differences(line[0], rows)
        for name in _shown(rows):
            own = list(of_arm(rows, name).values())
            epochs = list(own[0]["curves"])
            entropy = [
                statistics.mean(row["curves"][each]["held_out"]["cross_entropy"] for row in own) for each in epochs
            ]
            _line(line[1], name, [float(each) for each in epochs], entropy)
            scales = list(own[0]["scales"])
            score = [100 * statistics.mean(row["scales"][each]["accuracy"] for row in own) for each in scales]
            _line(line[2], name, [float(each) for each in scales], score)
        seeds = len({row["seed"] for row in rows})
        line[0].set_title(f"{data}, {rows[0]['budget']['train']:,} images, {seeds} seeds", fontsize=10)
        line[1].set(xlabel="epochs", ylabel="cross entropy, held-out images", yscale="log")
        line[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        line[1].yaxis.set_major_formatter("{x:g}")
        line[1].yaxis.set_minor_formatter(NullFormatter())
        line[2].set(xlabel="size of the test images / size of training", ylabel="accuracy on test images, %")
        line[2].legend(frameon=False, fontsize=8)
        for ax in line:
            ax.spines[["top", "right"]].set_visible(False)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m benchmarks.swap_accuracy")
    parser.add_argument("--quick", action="store_true", help="digits, few arms, seeds and epochs (into runs/)")
    parser.add_argument("--data", nargs="*", choices=list(BUDGETS), default=list(BUDGETS))
    parser.add_argument("--data-dir", default=DEBIAN, help=f"where Fashion-MNIST lies (default: {DEBIAN})")
    parser.add_argument(
        "--arms",
        nargs="*",
        choices=list(ARMS),
        default=list(ARMS),
        metavar="ARM",
        help=", ".join(f'"{name}"' for name in ARMS),
    )
    parser.add_argument("--seeds", type=int, help="default: 10, of Fashion-MNIST 5")
    parser.add_argument("--train", type=int, help="training images (default: 320, 1,020 and 12,000)")
    parser.add_argument("--epochs", type=int, help="default: 40, 10 and 3")
    parser.add_argument("--lrs", type=float, nargs="+", default=LRS, help="learning rates to choose from")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "swap_accuracy", help="folder of the trainings")
    parser.add_argument(
        "--continue",
        type=Path,
        dest="earlier",
        metavar="JSON",
        help="add to this result: its trainings are not repeated",
    )
    parser.add_argument("--report", action="store_true", help="train nothing: report on what --runs has")
    parser.add_argument("--out", type=Path, help="JSON to write; the figure goes beside it")
    args = parser.parse_args(arguments)
    if args.quick:
        args.data, args.arms, args.lrs = ["digits"], list(QUICK), args.lrs[:2]
    if args.threads:
        torch.set_num_threads(args.threads)
    out = args.out or (Path("runs") if args.quick else RESULTS) / "swap_accuracy.json"
    rows: list[Row] = []
    arms = [ARMS[name] for name in args.arms]
    for data in args.data:
        given = {"train": args.train, "epochs": args.epochs or (10 if args.quick else None)}
        budget = replace(BUDGETS[data], **{key: value for key, value in given.items() if value})
        seeds = args.seeds or (2 if args.quick else SEEDS[data])
        earlier = unpack(args.earlier, budget, args.runs) if args.earlier else []
        shared = (arms, budget, seeds, tuple(args.lrs))
        if args.report:
            rows += finished(*shared, args.runs, earlier)
        else:
            rows += train_arms(*shared, args.data_dir, args.runs, earlier)
    if not rows:
        raise SystemExit(f"{args.runs} has no finished arm of {', '.join(args.data)}")
    Record("swap_accuracy", out, check_operator("cpu"), 0, "cpu", lrs=list(args.lrs)).add(*map(shorten, rows))
    result = read(out)
    print(markdown(result))
    picture(result).savefig(out.with_suffix(".png"), dpi=100)
    print(f"written: {out} and {out.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
