"""The training of one arm with one seed: timm's parts in Accelerate's loop."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from ctxenc.training.checkpoint import Progress, load_state, newest_state, publish, save_state
from ctxenc.training.console import UserError, one_line
from ctxenc.training.data import Datasets, Samples, eval_transform, seeded, train_transform
from ctxenc.training.metrics import balanced_accuracy
from ctxenc.training.runs import SCORE, RunConfig, build_model, pick_device
from ctxenc.training.settings import Settings


class Running(Protocol):
    """The settings of where and how any training runs."""

    @property
    def device(self) -> str:
        """A torch device, or "auto"."""

    @property
    def amp(self) -> str | None:
        """Mixed precision."""

    @property
    def compile(self) -> bool:
        """Whether the network is compiled."""


def make_accelerator(settings: Running, seed: int = 0) -> Accelerator:
    """Accelerate set up for ``settings``; the order of training samples follows from ``seed`` and the epoch.

    Raises:
        UserError: The device is not there, or does not do this precision.
    """
    pick_device(settings.device)
    if settings.device not in ("auto", "cpu"):
        os.environ["ACCELERATE_TORCH_DEVICE"] = settings.device
    # The sampler seeds epoch e with data_seed + e: seeds lie far enough apart not to share an order.
    loading = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=100_000 * seed)
    try:
        accelerator = Accelerator(
            cpu=settings.device == "cpu",
            mixed_precision=settings.amp,  # None: what accelerate launch was told, else none
            dynamo_backend="inductor" if settings.compile else None,
            dataloader_config=loading,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"--device {settings.device}, --amp {settings.amp}: {one_line(error)}") from error
    if settings.amp == "fp16" and accelerator.device.type == "cpu":  # which Accelerate would leave out without a word
        raise UserError("--amp fp16 needs a GPU; a CPU has bf16")
    return accelerator


def make_optimizer(network: nn.Module, settings: Settings) -> Optimizer:
    """The optimiser of ``settings`` for the parameters of ``network``.

    Raises:
        UserError: It needs a package that is not there, or does not take these settings.
    """
    try:
        optimizer = create_optimizer_v2(network, settings.opt, lr=settings.lr, weight_decay=settings.weight_decay)
    except Exception as error:  # each optimiser has its own
        raise UserError(f"--opt {settings.opt}: {one_line(error)}") from error
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"--opt must do with first derivatives, got {settings.opt}")
    return optimizer


@dataclass(frozen=True)
class Evaluation:
    """Predictions of every validation sample, in order.

    Args:
        targets: (N,) int64 on the CPU.
        predictions: (N,) int64 on the CPU.
        loss: Mean cross entropy.
        num_classes: Number of classes.
    """

    targets: Tensor
    predictions: Tensor
    loss: float
    num_classes: int

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the accuracies of the classes, in [0, 1]."""
        return balanced_accuracy(self.targets, self.predictions, self.num_classes)

    @property
    def top1(self) -> float:
        """Share of samples predicted right, in [0, 1]."""
        return float((self.targets == self.predictions).double().mean())


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader, channels_last: bool = False) -> Evaluation:
    """Runs ``model`` in eval mode over ``loader`` (prepared by ``accelerator``); each sample counts once."""
    model.eval()
    kept: list[tuple[Tensor, ...]] = []
    for images, labels in tqdm(loader, "evaluating", delay=1, leave=False, disable=not accelerator.is_main_process):
        with accelerator.autocast():
            logits = model(in_format(images, channels_last)).float()
        loss = F.cross_entropy(logits, labels, reduction="none")
        gathered = accelerator.gather_for_metrics((labels, logits.argmax(dim=1), loss))
        kept.append(tuple(each.cpu() for each in gathered))
    targets, predictions, losses = (torch.cat(each) for each in zip(*kept, strict=True))
    return Evaluation(targets, predictions, float(losses.mean()), logits.shape[1])


def in_format(images: Tensor, channels_last: bool) -> Tensor:
    """``images`` in the memory format of the network."""
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images


@contextmanager
def worker_errors() -> Iterator[None]:
    """Strips the traceback that the loader puts into the text of an error from one of its workers."""
    try:
        yield
    except UserError as error:
        _, _, text = str(error).strip().rpartition("UserError: ")
        raise UserError(text) from error


class Trainer:
    """One arm with one seed, from its configuration to its files.

    Order matters: the network is swapped, then put into its memory format and on its device, then copied for the
    moving average, then handed to the optimiser, then wrapped.

    Args:
        config: What to build.
        settings: How to train it.
        datasets: What to train and evaluate on.
        arm: The folder to write to; training goes on from the state in it, if there is one.
        seed: Seed of the weights and of all that is drawn.
    """

    def __init__(self, config: RunConfig, settings: Settings, datasets: Datasets, arm: Path, seed: int) -> None:
        self.settings, self.datasets, self.arm, self.seed = settings, datasets, arm, seed
        self.accelerator = make_accelerator(settings, seed)
        state = newest_state(arm)
        set_seed(seed)
        with self.accelerator.local_main_process_first():
            network = build_model(config, settings.pretrained and state is None)
        if settings.channels_last:
            network = network.to(memory_format=torch.channels_last)
        self.network = network.to(self.accelerator.device)
        self.ema = ModelEmaV3(self.network, settings.ema_decay, use_warmup=True) if settings.model_ema else None
        optimizer = make_optimizer(self.network, settings)
        self.samples = Samples(datasets.train, train_transform(settings, config.data_config), seed)
        tiles = Samples(datasets.val, eval_transform(config.data_config), seed)
        self.model, self.optimizer, self.train_loader, self.val_loader = self.accelerator.prepare(
            self.network, optimizer, self._loader(self.samples, train=True), self._loader(tiles, train=False)
        )
        self.mixup = self._mixup(len(config.classes))
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if self.mixup else settings.label_smoothing)
        self.updates_per_epoch = len(self.train_loader)
        self.scheduler, _ = create_scheduler_v2(
            optimizer,
            settings.sched,
            num_epochs=settings.epochs,
            warmup_epochs=settings.warmup_epochs,
            warmup_lr=settings.lr / 100,
            decay_epochs=settings.epochs / 3,
            decay_rate=0.9 if settings.sched == "poly" else 0.1,
            step_on_epochs=False,
            updates_per_epoch=self.updates_per_epoch,
        )
        set_seed(seed, device_specific=True)  # what the network draws differs between processes
        self.progress = Progress() if state is None else load_state(self.accelerator, state, self._averaged)

    @property
    def _averaged(self) -> nn.Module | None:
        return None if self.ema is None else self.ema.module

    def _loader(self, samples: Samples, train: bool) -> DataLoader:
        full_batch = len(samples) >= self.settings.batch_size * self.accelerator.num_processes
        return DataLoader(
            samples,
            batch_size=self.settings.batch_size,
            shuffle=train,
            drop_last=train and full_batch,
            num_workers=self.settings.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _mixup(self, num_classes: int) -> Mixup | None:
        if not (self.settings.mixup or self.settings.cutmix):
            return None
        return Mixup(
            mixup_alpha=self.settings.mixup,
            cutmix_alpha=self.settings.cutmix,
            label_smoothing=self.settings.label_smoothing,
            num_classes=num_classes,
        )

    def _mixed(self, images: Tensor, targets: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """The batch after mixup or CutMix, if asked for, drawn from (seed, epoch, step, process)."""
        if self.mixup is None or len(images) % 2:
            return images, targets
        with seeded(self.seed, epoch, step, self.accelerator.process_index, 1):
            return self.mixup(images, targets)

    def fit(self, label: str) -> None:
        """Trains the epochs that are left; each ends with an evaluation, a state, and the published files.

        Raises:
            UserError: The loss is not finite, an image is broken, or a file cannot be written.
        """
        evaluated = self._averaged or self.model
        main = self.accelerator.is_main_process
        total, done = (epochs * self.updates_per_epoch for epochs in (self.settings.epochs, self.progress.epoch))
        if main:
            publish(self.arm, self.progress, self._averaged or self.network)
        with worker_errors(), tqdm(total=total, initial=done, desc=label, disable=not main) as bar:
            for epoch in range(self.progress.epoch, self.settings.epochs):
                lr, loss, speed = self._train_epoch(epoch, bar)
                result = evaluate(self.accelerator, evaluated, self.val_loader, self.settings.channels_last)
                names = map(self.datasets.val.name, range(len(result.targets)))
                self.progress.predictions = list(
                    zip(names, result.targets.tolist(), result.predictions.tolist(), strict=True)
                )
                score = result.balanced_accuracy
                self.progress.rows.append(
                    {
                        "epoch": epoch + 1,
                        "lr": lr,
                        "train_loss": loss,
                        "val_loss": result.loss,
                        SCORE: score,
                        "top1": result.top1,
                        "images_per_s": speed,
                    }
                )
                save_state(self.accelerator, self.arm, self.progress, self._averaged)
                if main:
                    publish(self.arm, self.progress, self._averaged or self.network)
                bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}", accuracy=f"{100 * score:.1f} %")
        self.accelerator.free_memory()

    def _train_epoch(self, epoch: int, bar: tqdm) -> tuple[float, float, float]:
        """Trains one epoch; returns the last learning rate, the mean loss, and images a second over all processes."""
        self.model.train()
        self.samples.set_epoch(epoch)
        self.train_loader.set_epoch(epoch)
        losses = torch.zeros((), device=self.accelerator.device)
        images_seen, lr, started = 0, 0.0, time.perf_counter()
        for step, (images, targets) in enumerate(self.train_loader):
            update = epoch * self.updates_per_epoch + step + 1
            images, targets = self._mixed(images, targets, epoch, step)
            lr = max(group["lr"] for group in self.optimizer.param_groups)
            self.optimizer.zero_grad()
            loss = self.criterion(self.model(in_format(images, self.settings.channels_last)), targets)
            self.accelerator.backward(loss)
            if self.settings.clip_grad is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step_update(update)
            if self.ema is not None:
                self.ema.update(self.network, update)
            losses += loss.detach()
            images_seen += len(images)
            bar.update()
        mean = float(self.accelerator.reduce(losses, "mean")) / self.updates_per_epoch
        speed = images_seen * self.accelerator.num_processes / (time.perf_counter() - started)
        if not math.isfinite(mean):
            raise UserError(f"the training loss of epoch {epoch + 1} is {mean}; a lower --lr may help")
        if self.accelerator.num_processes > 1:
            for network in filter(None, (self.network, self._averaged)):
                distribute_bn(network, self.accelerator.num_processes, reduce=True)
        return lr, mean, speed
