"""Test the paper's claim about context encoding: EncNet and its ablations on the embedded scenes.

    python -m benchmarks.context_scenes [--full] [--out benchmarks/results/context_scenes.json]

The scenes (ctxenc.training.segmentation.scenes) have two pairs of classes. The classes of a pair share one pool of
textures, and only a region beyond the backbone's receptive field decides between them. The networks follow EncNet's
ablation (arXiv 1803.08904), section 4: FCN, FCN with global pooling (SE), EncNet without and with its SE-loss. --full
trains five seeds, and also EncNet with the spread start and with sums over the pixels, K in {8, 16, 32} and SE-loss
weights in {0.1, 0.2, 0.4} (K = 0 is the FCN, weight 0 EncNet without SE-loss). It writes a JSON file with every seed,
and a figure with predictions. A stopped run resumes from the folder --runs.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.environment import describe
from benchmarks.local_patches import local_patch_accuracy
from ctxenc.runs.config import read_config, write_config
from ctxenc.runs.errors import UserError
from ctxenc.runs.folders import load_weights
from ctxenc.runs.segment_config import SegmentConfig, build_network
from ctxenc.training.checkpoint import read_rows
from ctxenc.training.console import text_table
from ctxenc.training.segmentation.arms import ARMS, arm_configs
from ctxenc.training.segmentation.datasets import build_datasets
from ctxenc.training.segmentation.scenes import AMBIGUOUS, CLASSES, draw_predictions
from ctxenc.training.segmentation.segment_report import column_title, mean_iou, spread
from ctxenc.training.segmentation.segment_settings import SegmentSettings
from ctxenc.training.segmentation.segment_trainer import SegmentTrainer

RESULTS = Path(__file__).parent / "results"
PAIRED = [name for pair in AMBIGUOUS for name in pair]


def variants(full: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the runs: a name, the arm, and the settings that differ from `ctxenc segment train`'s."""
    found: dict[str, tuple[str, dict[str, Any]]] = {arm: (arm, {}) for arm in ARMS}
    if full:
        found |= {f"encnet, K = {codes}": ("encnet", {"num_codes": codes}) for codes in (8, 32)}
        found |= {"encnet, spread": ("encnet", {"codebook_start": "spread"})}
        found |= {"encnet, sum": ("encnet", {"aggregation": "sum"})}
        found |= {f"encnet, SE-loss {weight}": ("encnet", {"se_weight": weight}) for weight in (0.1, 0.4)}
    return found


def train(name: str, arm: str, settings: SegmentSettings, seed: int, runs: Path) -> dict[str, Any]:
    """Train one network; return the last epoch's measures."""
    folder = runs / f"{name.replace(' ', '').replace(',', '-')}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    config = arm_configs(replace(settings, arms="all"), list(CLASSES))[arm]
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
    """Return mean and deviation over seeds of each variant."""
    header = ("network", "mIoU", "mIoU, ambiguous", "mIoU, others", "pixel accuracy", "seeds")
    cells = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        measures = [[row[key] for row in own] for key in ("mean_iou", "ambiguous", "others", "pixel_accuracy")]
        title = ARMS[name][0] if name in ARMS else name.replace("encnet", "EncNet")
        cells.append((title, *map(spread, measures), str(len(own))))
    return text_table(header, cells, right=header[1:])


def markdown(result: dict[str, Any]) -> str:
    """Return the table in the format of the pages."""
    lines = table(result["rows"]).splitlines()
    cells = [[each.strip() for each in line.split("  ") if each.strip()] for line in (lines[0], *lines[2:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], ["---"] * len(cells[0]), *cells[1:]))


def draw_picture(settings: SegmentSettings, rows: list[dict[str, Any]], runs: Path) -> Figure:
    """Draw test scenes and the prediction of each arm's first seed."""
    networks = {}
    for row in [row for row in rows if row["name"] == row["arm"] and row["seed"] == 0]:
        network = build_network(arm_configs(replace(settings, arms="all"), list(CLASSES))[row["arm"]]).eval()
        load_weights(network, runs / row["folder"] / "last.safetensors")
        networks[column_title(row["arm"], row["mean_iou"])] = network
    return draw_predictions(networks)


def control(full: bool) -> dict[str, Any]:
    """Measure a classifier that sees a patch alone."""
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
    parser.add_argument("--only", nargs="+", choices=list(variants(True)), metavar="NETWORK", help="train these alone")
    parser.add_argument("--seeds", type=int, help="how many (default: 1, with --full 5)")
    parser.add_argument("--epochs", type=int, help="passes of each training (default: those of ctxenc segment train)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "context_scenes", help="folder of the trainings")
    parser.add_argument("--out", type=Path, default=RESULTS / "context_scenes.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = SegmentSettings.resolve({"epochs": args.epochs} if args.epochs else {})
    local = control(args.full)
    print("A classifier of patches alone:", json.dumps(local, indent=1))
    rows = []
    chosen = {
        name: each for name, each in variants(args.full or bool(args.only)).items() if name in (args.only or [name])
    }
    for seed in range(args.seeds or (5 if args.full else 1)):
        for name, (arm, own) in chosen.items():
            rows.append(train(name, arm, replace(settings, **own), seed, args.runs))
    print(table(rows))
    result = {"environment": describe(), "settings": settings.as_dict(), "local_patches": local, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {args.out}")
    if any(row["name"] == row["arm"] for row in rows):
        draw_picture(settings, rows, args.runs).savefig(args.out.with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
