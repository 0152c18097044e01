"""Log curves through Accelerate's trackers, if requested; the x axis is the number of the update."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from accelerate import Accelerator

from ctxenc.runs.errors import UserError
from ctxenc.training.checkpoint import Progress

FOLDER = "tensorboard"
HEALTH = ("dead", "entropy", "pixel_entropy", "bits", "smoothing_min", "smoothing_max")


def check_tensorboard() -> None:
    """Raise UserError unless the package is installed."""
    if find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs a package that is not here: pip install 'ctxenc[tensorboard]'")


@contextmanager
def log_curves(accelerator: Accelerator, done: int) -> Iterator[None]:
    """Open the trackers of `accelerator` in the body, after `done` updates; cut later entries of an interrupted run.

    Raises:
        UserError: The folder's name is not valid text, so tensorboard cannot write to it.
    """
    try:
        accelerator.init_trackers(FOLDER, init_kwargs={"tensorboard": {"purge_step": done + 1}})
    except UnicodeEncodeError as error:
        folder = str(accelerator.project_dir)
        raise UserError(f"--tensorboard must have a run folder whose name is text, got {folder!r}") from error
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def epoch_values(progress: Progress) -> dict[str, float]:
    """Return the values to log of the last finished epoch: its metrics, its speed, and the health of the codebooks."""
    groups = {"epoch": progress.rows[-1], "speed": progress.timings[-1]}
    values = {f"{group}/{key}": row[key] for group, row in groups.items() for key in row if key != "epoch"}
    blocks = [row for row in progress.codebooks if row["epoch"] == progress.epoch]
    return values | {f"codewords {name}/{row['block']}": row[name] for row in blocks for name in HEALTH}
