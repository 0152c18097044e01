"""Fine-tune one arm with one seed, and evaluate it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import Mixup
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Subset
from torchmetrics.functional.classification import multiclass_confusion_matrix
from tqdm import tqdm

from ctxenc.runs.config import RunConfig, atomic
from ctxenc.runs.errors import UserError, one_line
from ctxenc.runs.folders import SCORE, build_model
from ctxenc.swap.calibration import calibrate
from ctxenc.training import pictures
from ctxenc.training.bad_images import skip_broken
from ctxenc.training.data import LEFT_OUT, Datasets, Samples, Source, eval_transform, seed_draws, train_transform
from ctxenc.training.loop import Loop, make_optimizer, to_format, worker_errors
from ctxenc.training.metrics import balanced_accuracy
from ctxenc.training.settings import Settings

CALIBRATED_ON = 256  # images; a quarter of them is held out for the report


@dataclass(frozen=True)
class Evaluation:
    """Hold the predictions of every readable validation sample, in order.

    Args:
        indices: The samples, (N,) int64 on the CPU.
        targets: (N,) int64 on the CPU.
        predictions: (N,) int64 on the CPU.
        losses: (N,) fp32 on the CPU, cross entropies.
        num_classes: Number of classes.
    """

    indices: Tensor
    targets: Tensor
    predictions: Tensor
    losses: Tensor
    num_classes: int

    @property
    def loss(self) -> float:
        """Return the mean cross entropy."""
        return float(self.losses.mean())

    @property
    def balanced_accuracy(self) -> float:
        """Return the mean of the accuracies of the classes, in [0, 1]."""
        return balanced_accuracy(self.targets, self.predictions, self.num_classes)

    @property
    def top1(self) -> float:
        """Return the share of samples predicted right, in [0, 1]."""
        return float((self.targets == self.predictions).double().mean())


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, loader: Iterable[Any], channels_last: bool = False
) -> Evaluation:
    """Run `model` in eval mode over `loader` (prepared by `accelerator`); count each sample once.

    Raises:
        UserError: No image can be read.
    """
    model.eval()
    kept: list[tuple[Tensor, ...]] = []
    for images, labels in tqdm(
        loader, "evaluating", delay=1, leave=False, disable=None if accelerator.is_main_process else True
    ):
        with accelerator.autocast():
            logits = model(to_format(images, channels_last)).float()
        loss = F.cross_entropy(logits, labels, reduction="none", ignore_index=LEFT_OUT)
        gathered = accelerator.gather_for_metrics((labels, logits.argmax(dim=1), loss))
        kept.append(tuple(each.cpu() for each in gathered))
    targets, predictions, losses = (torch.cat(each) for each in zip(*kept, strict=True))
    indices = (targets != LEFT_OUT).nonzero()[:, 0]
    if not len(indices):
        raise UserError(f"none of the {len(targets)} validation images can be read")
    return Evaluation(indices, targets[indices], predictions[indices], losses[indices], logits.shape[1])


class Trainer(Loop):
    """Fine-tune one arm with one seed, from its configuration to its files. See Loop for the other arguments."""

    settings: Settings

    def __init__(self, config: RunConfig, settings: Settings, datasets: Datasets, arm: Path, seed: int) -> None:
        self.config, self.datasets = config, datasets
        self.settings, self.arm, self.seed = settings, arm, seed
        self.mixup = build_mixup(settings, len(config.classes))
        self.ema_decay = settings.ema_decay if settings.model_ema else None
        self.samples = self._intact(datasets.train, train_transform(settings, config.data_config))
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if self.mixup else settings.label_smoothing)
        self.val = self._intact(datasets.val, eval_transform(config.data_config), train=False)
        super().__init__(settings, arm, seed)
        self.val_loader = self.accelerator.prepare(self.loader(self.val, train=False))

    def _intact(self, source: Source, transform: Any, train: bool = True) -> Any:
        """Return the samples of a source; without broken ones if the settings skip them."""
        total = len(self.datasets.train.targets) + len(self.datasets.val.targets)
        return skip_broken(Samples(source, transform, self.seed), self.settings, self.arm, total, train)

    def build(self, fresh: bool) -> nn.Module:
        """Build the network of the configuration; start its blocks as --init says."""
        settings = self.settings
        network = build_model(
            self.config, settings.pretrained and fresh, settings.initial_checkpoint if fresh else None
        )
        if fresh and self.config.swap is not None and settings.start != "random":
            self._calibrate(network.to(self.accelerator.device))
        return network

    def _calibrate(self, network: nn.Module) -> None:
        """Start the blocks from training images, and write how close they are to the SE blocks.

        Raises:
            UserError: The network or its data cannot be calibrated.
        """
        images = self._intact(self.datasets.train, eval_transform(self.config.data_config))
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))[:CALIBRATED_ON]
        batches = self.loader(Subset(images, chosen.tolist()), train=False)
        start = self.settings.start
        shown = self.accelerator.is_main_process
        try:
            with worker_errors():
                found = calibrate(network, batches, start=start, seed=self.seed, progress=shown)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--init {start}: {one_line(error)}") from error
        if shown:
            with atomic(self.arm / "calibration.txt") as path:
                path.write_text(f"{found}\n", encoding="utf-8")

    def make_optimizer(self) -> Optimizer:
        """Build the optimiser of the network."""
        return make_optimizer(self.network, self.settings)

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy."""
        return self.criterion(self.model(images), targets)

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch after mixup or CutMix, if requested, drawn from (seed, epoch, step, process)."""
        if self.mixup is None or len(images) % 2:
            return images, targets
        with seed_draws(self.seed, self.progress.epoch, self.progress.step, self.accelerator.process_index, 1):
            return self.mixup(images, targets)

    def evaluate(self) -> dict[str, float]:
        """Return loss and accuracies on the validation samples; store their predictions in the progress."""
        batches = self.until_stopped(self.val_loader, len(self.val_loader))
        model = self.model if self.ema is None else self.ema.module
        result = evaluate(self.accelerator, model, batches, self.settings.channels_last)
        indices = result.indices.tolist()
        names = map(self.datasets.val.name, indices)
        columns = (each.tolist() for each in (result.targets, result.predictions, result.losses))
        self.progress.predictions = list(zip(names, *columns, indices, strict=True))
        return {"val_loss": result.loss, SCORE: result.balanced_accuracy, "top1": result.top1}

    def finish(self) -> None:
        """Draw the confusion of classes, the images of the largest losses, and how two blocks encode images."""
        super().finish()
        classes, rows = [pictures.short(each) for each in self.config.classes], self.progress.predictions
        colours = {key: self.config.data_config[key] for key in ("mean", "std")}
        targets, predictions = (torch.tensor([row[column] for row in rows]) for column in (1, 2))
        matrix = multiclass_confusion_matrix(predictions, targets, len(classes))
        pictures.save(self.arm, pictures.CONFUSION, pictures.draw_confusion(matrix, classes))
        worst = sorted(rows, key=lambda row: math.inf if math.isnan(row[3]) else row[3], reverse=True)
        worst = worst[: pictures.WORST_SHOWN]
        captions = [
            f"{classes[target]},\nseen as {classes[prediction]} ({loss:.1f})"
            for _, target, prediction, loss, _ in worst
        ]
        images = [pictures.photograph(self.val[row[4]][0], **colours) for row in worst]
        pictures.save(self.arm, pictures.WORST, pictures.draw_worst(images, captions))
        shown = pictures.spread(rows, pictures.LOOKED_AT)
        names = [classes[row[1]] for row in shown]
        images = [self.val[row[4]][0] for row in shown]
        pictures.draw_assignments(self.arm, self.evaluated, images, names, colours)


def build_mixup(settings: Settings, num_classes: int) -> Mixup | None:
    """Return timm's mixup and CutMix if `settings` ask for one of them."""
    if not (settings.mixup or settings.cutmix):
        return None
    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.label_smoothing,
        num_classes=num_classes,
    )
