"""Does context encoding do what the paper says? EncNet and its ablations on the embedded scenes.

    python -m benchmarks.context_scenes [--full] [--out benchmarks/results/context_scenes.json]

In the scenes (ctxenc.training.segmentation.scenes) two pairs of classes are drawn from one pool of textures each, and only a
region that lies farther away than the backbone sees tells which class it is. The networks are those of the ablation in EncNet
(arXiv 1803.08904), section 4: FCN, FCN with global pooling (SE), EncNet without and with its SE-loss. --full trains five seeds, and
also K in {8, 16, 32} and SE-loss weights in {0.1, 0.2, 0.4} (K = 0 is the FCN, weight 0 EncNet without SE-loss). Written: a JSON
file with every seed, and beside it a figure with predictions. A run that is stopped goes on where it was, from the folder --runs.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.environment import describe
from ctxenc.training.checkpoint import read_rows
from ctxenc.training.config import read_config, write_config
from ctxenc.training.console import UserError, text_table
from ctxenc.training.runs import load_weights
from ctxenc.training.segmentation.data import build_datasets
from ctxenc.training.segmentation.local_patches import local_patch_accuracy
from ctxenc.training.segmentation.networks import ARMS, SegmentConfig, arm_configs, build_network
from ctxenc.training.segmentation.report import mean_iou, spread
from ctxenc.training.segmentation.scenes import AMBIGUOUS, CLASSES, IGNORED, MEAN, SCENES, STD, Scenes
from ctxenc.training.segmentation.settings import SegmentSettings, resolve
from ctxenc.training.segmentation.trainer import SegmentTrainer

RESULTS = Path(__file__).parent / "results"
PAIRED = [name for pair in AMBIGUOUS for name in pair]


def variants(full: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """What is trained: a name, the arm, and the settings that differ from those of `ctxenc segment train`."""
    found: dict[str, tuple[str, dict[str, Any]]] = {arm: (arm, {}) for arm in ARMS}
    if full:
        found |= {f"encnet, K = {codes}": ("encnet", {"num_codes": codes}) for codes in (8, 32)}
        found |= {f"encnet, SE-loss {weight}": ("encnet", {"se_weight": weight}) for weight in (0.1, 0.4)}
    return found


def train(name: str, arm: str, settings: SegmentSettings, seed: int, runs: Path) -> dict[str, Any]:
    """Trains one network; gives what the last epoch measured."""
    folder = runs / f"{name.replace(' ', '').replace(',', '-')}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    config = arm_configs(settings, list(CLASSES))[arm]
    if (folder / "config.json").is_file() and read_config(folder, SegmentConfig) != config:
        raise UserError(f"{folder} holds a run of other settings or versions: remove it, or name another --runs")
    write_config(folder, config)
    SegmentTrainer(config, settings, build_datasets(settings), folder, seed).fit(f"{name}, seed {seed}")
    last = read_rows(folder / "metrics.csv")[-1]
    others = [each for each in CLASSES if each not in PAIRED]
    return {
        "name": name,
        "arm": arm,
        "seed": seed,
        "folder": folder.name,
        "num_codes": settings.num_codes,
        "se_weight": settings.se_weight,
        "ambiguous": mean_iou(last, PAIRED),
        "others": mean_iou(last, others),
        **last,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and deviation over seeds of each variant."""
    header = ("network", "mIoU", "mIoU, ambiguous", "mIoU, others", "pixel accuracy", "seeds")
    cells = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        measures = [[row[key] for row in own] for key in ("mean_iou", "ambiguous", "others", "pixel_accuracy")]
        title = ARMS[name][0] if name in ARMS else name.replace("encnet", "EncNet")
        cells.append((title, *map(spread, measures), str(len(own))))
    return text_table(header, cells, right=header[1:])


def markdown(result: dict[str, Any]) -> str:
    """The table as the README has it."""
    lines = table(result["rows"]).splitlines()
    cells = [[each.strip() for each in line.split("  ") if each.strip()] for line in (lines[0], *lines[2:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], ["---"] * len(cells[0]), *cells[1:]))


def picture(settings: SegmentSettings, rows: list[dict[str, Any]], runs: Path, scenes: int = 1) -> Figure:
    """Test scenes of every type, a row each: image, truth, and what each arm's first seed predicts."""
    arms = {row["arm"]: row for row in reversed(rows) if row["name"] == row["arm"]}
    networks = {}
    for arm in [each for each in ARMS if each in arms]:
        networks[arm] = build_network(arm_configs(settings, list(CLASSES))[arm]).eval()
        load_weights(networks[arm], runs / arms[arm]["folder"] / "last.safetensors")
    test = Scenes(False, scenes * len(SCENES))
    figure = Figure(figsize=(1.5 * (2 + len(networks)) + 1.6, 1.45 * len(test)), layout="constrained")
    axes = figure.subplots(len(test), 2 + len(networks), squeeze=False)
    colours = ListedColormap([colormaps["tab10"](number) for number in range(len(CLASSES))])
    shown = {"vmin": 0, "vmax": len(CLASSES) - 1, "interpolation": "nearest"}
    for index in range(len(test)):
        image, mask = test[index]
        ignored = mask == IGNORED
        row = axes[index % len(SCENES) * scenes + index // len(SCENES)]
        row[0].imshow(image[0] * STD[0] + MEAN[0], cmap="gray", vmin=0, vmax=1)
        row[1].imshow(mask.masked_fill(ignored, 0).numpy(), colours, **shown, alpha=(~ignored).float().numpy())
        for axis, network in zip(row[2:], networks.values(), strict=True):
            with torch.no_grad():
                prediction = network(image[None])["out"][0].argmax(0)
            axis.imshow(prediction.numpy(), colours, **shown, alpha=(~ignored).float().numpy())
    titles = [
        "scene",
        "truth",
        *(ARMS[arm][0].replace(" + ", "\n+ ").replace(" without", "\nwithout") for arm in networks),
    ]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize="small")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    patches = [Patch(color=colours(number), label=name) for number, name in enumerate(CLASSES)]
    figure.legend(handles=patches, loc="outside right upper", frameon=False)
    return figure


def control(full: bool) -> dict[str, Any]:
    """What a classifier that sees a patch alone gets right."""
    found = local_patch_accuracy() if full else local_patch_accuracy(400, 400, 200)
    return {
        "in_pair": {" or ".join(pair): right / count for pair, (right, count) in found.in_pair.items()},
        "patches": {" or ".join(pair): count for pair, (_, count) in found.in_pair.items()},
        "alone_others": statistics.mean(share for name, share in found.alone.items() if name not in PAIRED),
        "told_ambiguous": statistics.mean(found.told[name] for name in PAIRED),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="five seeds, and K and SE-loss weights")
    parser.add_argument("--seeds", type=int, help="how many (default: 1, with --full 5)")
    parser.add_argument("--epochs", type=int, help="passes of each training (default: those of ctxenc segment train)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "context_scenes", help="folder of the trainings")
    parser.add_argument("--out", type=Path, default=RESULTS / "context_scenes.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = resolve({"epochs": args.epochs} if args.epochs else {})
    local = control(args.full)
    print("A classifier of patches alone:", json.dumps(local, indent=1))
    rows = []
    for seed in range(args.seeds or (5 if args.full else 1)):
        for name, (arm, own) in variants(args.full).items():
            rows.append(train(name, arm, replace(settings, **own), seed, args.runs))
    print(table(rows))
    result = {"environment": describe(), "settings": settings.as_dict(), "local_patches": local, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    picture(settings, rows, args.runs).savefig(args.out.with_suffix(".png"), dpi=100)
    print(f"written: {args.out} and {args.out.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
