"""Write curves for TensorBoard, if requested."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ctxenc.runs.errors import UserError
from ctxenc.training.checkpoint import Progress

FOLDER = "tensorboard"
HEALTH = ("dead", "entropy", "pixel_entropy", "bits", "smoothing_min", "smoothing_max")


def check_tensorboard() -> None:
    """Raise UserError unless the package is installed."""
    if find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs a package that is not here: pip install 'ctxenc[tensorboard]'")


class Board:
    """Write the event files of one arm; the x axis is the number of the update.

    Args:
        arm: The folder of the arm.
        progress: Start or resume point of the training; later entries of an interrupted run are cut.
        updates_per_epoch: Updates per epoch.

    Raises:
        UserError: The folder's name is not valid text, so the package cannot write to it.
    """

    def __init__(self, arm: Path, progress: Progress, updates_per_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and needs the package

        self.updates_per_epoch = updates_per_epoch
        done = progress.epoch * updates_per_epoch + progress.step
        try:
            self.writer: Any = SummaryWriter(arm / FOLDER, purge_step=done + 1)
        except UnicodeEncodeError as error:
            raise UserError(f"--tensorboard must have a run folder whose name is text, got {str(arm)!r}") from error

    def step(self, update: int, loss: float, lr: float) -> None:
        """Log a step: the loss of this process, and the learning rate."""
        self.writer.add_scalar("step/loss", loss, update)
        self.writer.add_scalar("step/lr", lr, update)

    def epoch(self, progress: Progress) -> None:
        """Log the last finished epoch: its metrics, its speed, and the health of the codebooks."""
        update = progress.epoch * self.updates_per_epoch
        for group, row in (("epoch", progress.rows[-1]), ("speed", progress.timings[-1])):
            for name, value in row.items():
                if name != "epoch":
                    self.writer.add_scalar(f"{group}/{name}", value, update)
        for row in progress.codebooks:
            if row["epoch"] == progress.epoch:
                for name in HEALTH:
                    self.writer.add_scalar(f"codewords {name}/{row['block']}", row[name], update)
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()
