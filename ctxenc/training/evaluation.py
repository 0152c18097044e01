"""Measure the accuracy of a run's model on its validation data, or on another image folder."""

import argparse
import sys
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader

from ctxenc.runs.config import RunConfig
from ctxenc.runs.errors import UserError
from ctxenc.runs.trained import LoadedRun, load_run
from ctxenc.training.bad_images import Intact
from ctxenc.training.console import say, text_table
from ctxenc.training.data import Samples, Source, eval_transform, validation_source
from ctxenc.training.loop import worker_errors
from ctxenc.training.metrics import bootstrap, interval
from ctxenc.training.nonfinite import check_outputs
from ctxenc.training.processes import make_accelerator
from ctxenc.training.settings import Settings
from ctxenc.training.trainer import Evaluation, evaluate

DATA_SETTINGS = {"data": str, "data_dir": str, "val_fraction": float, "seed": int}


def run(args: argparse.Namespace) -> None:
    """Print the accuracies and the interval over images."""
    loaded = load_run(args.run_folder, args.checkpoint, kind=RunConfig)
    settings = Settings(
        **data_settings(loaded), device=args.device, amp=args.amp, batch_size=args.batch_size, workers=args.workers
    )
    source = validation_source(settings, loaded.config.classes, args.data)
    accelerator = make_accelerator(settings)
    result = evaluate_run(accelerator, loaded, source, settings, args.skip_broken)
    check_outputs(loaded.model, result.losses, "the validation images")
    if accelerator.is_main_process:
        for index in sorted(set(range(len(source.targets))) - set(result.indices.tolist())):
            say(f"ctxenc: skipped broken image {source.name(index)}", sys.stderr)
        say(f"{loaded}, on {args.data or settings.data}")
        print(report(result))


def data_settings(loaded: LoadedRun) -> dict[str, Any]:
    """Return the run's settings for its validation data.

    Raises:
        UserError: One is missing or of a wrong type.
    """
    stored = loaded.config.settings
    for name, kind in DATA_SETTINGS.items():
        if type(stored.get(name)) is not kind:
            rule = f"settings: {name} must be of type {kind.__name__}, got {stored.get(name)!r}"
            raise UserError(f"{loaded.folder / 'config.json'}: {rule}")
    return {name: stored[name] for name in DATA_SETTINGS}


def evaluate_run(
    accelerator: Accelerator, loaded: LoadedRun, source: Source, settings: Settings, skip_broken: bool = False
) -> Evaluation:
    """Classify every image of the source, each once, over all processes.

    Raises:
        UserError: An image is broken, or with `skip_broken` every image is.
    """
    samples: Any = Samples(source, eval_transform(loaded.config.data_config), settings.seed)
    if skip_broken:
        samples = Intact(samples, None, train=False)
    workers = min(settings.workers, -(-len(samples) // settings.batch_size))
    loader = DataLoader(samples, batch_size=settings.batch_size, num_workers=workers)
    model = accelerator.prepare_model(loaded.model, evaluation_mode=True)
    with worker_errors():
        return evaluate(accelerator, model, accelerator.prepare(loader))


def report(result: Evaluation) -> str:
    """Return the accuracies as a table; the interval is a bootstrap over images within each class."""
    correct = result.predictions == result.targets
    low, high = interval(bootstrap(result.targets, correct))
    rows = [
        (
            "class-balanced accuracy",
            f"{100 * result.balanced_accuracy:.2f} %",
            f"{100 * low:.2f} to {100 * high:.2f} %"
            if low < high
            else "",  # none where every image of a class is alike
        ),
        ("top-1 accuracy", f"{100 * result.top1:.2f} %", ""),
        ("cross entropy", f"{result.loss:.4f}", ""),
        ("images", str(len(correct)), ""),
        ("classes seen", f"{len(result.targets.unique())} of {result.num_classes}", ""),
    ]
    return text_table(("measure", "value", "95 % interval"), rows, right=("value",))
