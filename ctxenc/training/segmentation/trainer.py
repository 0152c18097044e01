"""The training of one segmentation network with one seed: timm's parts in Accelerate's loop."""

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ctxenc.integrations.encnet import EncNet
from ctxenc.integrations.losses import EncNetLoss
from ctxenc.training.checkpoint import Progress, load_state, newest_state, publish, save_state
from ctxenc.training.config import atomic
from ctxenc.training.console import UserError, one_line
from ctxenc.training.loop import in_format, make_accelerator, worker_errors
from ctxenc.training.segmentation.data import Datasets, samples_of
from ctxenc.training.segmentation.metrics import SegmentationMetrics, as_floats
from ctxenc.training.segmentation.networks import SegmentConfig, build_network
from ctxenc.training.segmentation.pictures import sheet
from ctxenc.training.segmentation.settings import SCENES, SegmentSettings

SCORE = "mean_iou"  # the column of metrics.csv by which the best epoch and the best arm are chosen
SHOWN = 4  # validation samples in the picture of each epoch


def make_optimizer(network: EncNet, settings: SegmentSettings) -> Optimizer:
    """The optimiser of ``settings``: the head learns faster than the backbone; codewords and smoothing do not decay.

    Raises:
        UserError: It needs a package that is not there, or does not take these settings.
    """
    kept = network.no_weight_decay()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        groups.setdefault((name.startswith("backbone."), name in kept), []).append(parameter)
    described: list[dict[str, Any]] = [
        {
            "params": parameters,
            "lr": settings.lr * (1 if backbone else settings.head_lr_mult),
            "weight_decay": 0.0 if undecayed else settings.weight_decay,
        }
        for (backbone, undecayed), parameters in groups.items()
    ]
    try:
        optimizer = create_optimizer_v2(
            described, settings.opt, lr=settings.lr, weight_decay=settings.weight_decay, momentum=settings.momentum
        )
    except Exception as error:  # each optimiser has its own
        raise UserError(f"--opt {settings.opt}: {one_line(error)}") from error
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"--opt must do with first derivatives, got {settings.opt}")
    return optimizer


class SegmentTrainer:
    """One arm with one seed, from its configuration to its files.

    Args:
        config: What to build.
        settings: How to train it.
        datasets: What to train and evaluate on.
        arm: The folder to write to; training goes on from the state in it, if there is one.
        seed: Seed of the weights and of all that is drawn.
    """

    def __init__(
        self, config: SegmentConfig, settings: SegmentSettings, datasets: Datasets, arm: Path, seed: int
    ) -> None:
        self.config, self.settings, self.arm = config, settings, arm
        self.accelerator = make_accelerator(settings, seed)
        state = newest_state(arm)
        set_seed(seed)
        with self.accelerator.local_main_process_first():
            network: Any = build_network(config, settings.pretrained_backbone and state is None)
        if self.accelerator.num_processes > 1 and self.accelerator.device.type == "cuda":
            network = convert_sync_batchnorm(network)  # timm's, which keeps the activation of its fused norms
        if settings.channels_last:
            network = network.to(memory_format=torch.channels_last)
        self.network = network.to(self.accelerator.device)
        self.criterion = EncNetLoss(settings.aux_weight, settings.se_weight).to(self.accelerator.device)
        optimizer = make_optimizer(self.network, settings)
        self.samples, self.val = samples_of(datasets, settings, config.mean, config.std, seed)
        self.model, self.optimizer, self.train_loader = self.accelerator.prepare(
            self.network, optimizer, self._train_loader()
        )
        self.updates_per_epoch = len(self.train_loader)
        self.scheduler, _ = create_scheduler_v2(
            optimizer,
            settings.sched,
            num_epochs=settings.epochs,
            warmup_epochs=settings.warmup_epochs,
            warmup_lr=settings.lr / 100,
            decay_epochs=settings.epochs / 3,
            decay_rate=settings.poly_power if settings.sched == "poly" else 0.1,
            step_on_epochs=False,
            updates_per_epoch=self.updates_per_epoch,
        )
        set_seed(seed, device_specific=True)  # what the network draws differs between processes
        resumed = state is not None and load_state(self.accelerator, state, None, SCORE)
        self.progress = resumed or Progress(score=SCORE)

    def _train_loader(self) -> DataLoader:
        full_batch = len(self.samples) >= self.settings.batch_size * self.accelerator.num_processes
        return DataLoader(
            self.samples,
            batch_size=self.settings.batch_size,
            shuffle=True,
            drop_last=full_batch,
            num_workers=self.settings.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _val_loader(self) -> DataLoader:
        """This process's share of the validation samples: each is in one share, and images differ in size."""
        share = range(self.accelerator.process_index, len(self.val), self.accelerator.num_processes)
        one_size = self.settings.data == SCENES
        return DataLoader(
            Subset(self.val, share),
            batch_size=self.settings.batch_size if one_size else 1,
            num_workers=self.settings.workers,
        )

    def fit(self, label: str) -> None:
        """Trains the epochs that are left; each ends with an evaluation, a state, a picture, and the published files.

        Raises:
            UserError: The loss is not finite, an image or mask is broken, or a file cannot be written.
        """
        main = self.accelerator.is_main_process
        total, done = (epochs * self.updates_per_epoch for epochs in (self.settings.epochs, self.progress.epoch))
        if main:
            publish(self.arm, self.progress, self.network)
        with worker_errors(), tqdm(total=total, initial=done, desc=label, disable=not main) as bar:
            for epoch in range(self.progress.epoch, self.settings.epochs):
                lr, loss, speed = self._train_epoch(epoch, bar)
                measures = self.evaluate()
                self.progress.rows.append(
                    {"epoch": epoch + 1, "lr": lr, "train_loss": loss, **measures, "images_per_s": speed}
                )
                save_state(self.accelerator, self.arm, self.progress, None)
                if main:
                    publish(self.arm, self.progress, self.network)
                    self.draw(self.arm / "pictures" / f"epoch-{epoch + 1:03d}.png")
                score = 100 * measures[SCORE]
                bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}", mIoU=f"{score:.1f} %")
        self.accelerator.free_memory()

    def _train_epoch(self, epoch: int, bar: tqdm) -> tuple[float, float, float]:
        """Trains one epoch; returns the last learning rate, the mean loss, and images a second over all processes."""
        self.model.train()
        self.samples.set_epoch(epoch)
        self.train_loader.set_epoch(epoch)
        losses = torch.zeros((), device=self.accelerator.device)
        images_seen, lr, started = 0, 0.0, time.perf_counter()
        for step, (images, masks) in enumerate(self.train_loader):
            lr = self.optimizer.param_groups[0]["lr"]  # the backbone's
            self.optimizer.zero_grad()
            loss = self.criterion(self.model(in_format(images, self.settings.channels_last)), masks)
            self.accelerator.backward(loss)
            if self.settings.clip_grad is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step_update(epoch * self.updates_per_epoch + step + 1)
            losses += loss.detach()
            images_seen += len(images)
            bar.update()
        mean = float(self.accelerator.reduce(losses, "mean")) / self.updates_per_epoch
        speed = images_seen * self.accelerator.num_processes / (time.perf_counter() - started)
        if not math.isfinite(mean):
            raise UserError(f"the training loss of epoch {epoch + 1} is {mean}; a lower --lr may help")
        if self.accelerator.num_processes > 1:
            distribute_bn(self.network, self.accelerator.num_processes, reduce=True)
        return lr, mean, speed

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Pixel accuracy, mean IoU and Dice and those of each class, over the pixels of all validation masks."""
        self.model.eval()
        metrics = SegmentationMetrics(len(self.config.classes)).to(self.accelerator.device)
        metrics.distributed_available_fn = lambda: False  # the sum over processes is taken below
        bar = tqdm(self._val_loader(), "evaluating", delay=1, leave=False, disable=not self.accelerator.is_main_process)
        for images, masks in bar:
            masks = masks.to(self.accelerator.device)
            metrics.update(self._logits(images, masks.shape[1:]).argmax(1), masks)
        metrics.matrix = self.accelerator.reduce(metrics.matrix, "sum")
        return as_floats(metrics.compute(), self.config.classes)

    def _logits(self, images: Tensor, size: torch.Size) -> Tensor:
        """Logits of the pixels of masks of this size, fp32."""
        images = in_format(images.to(self.accelerator.device), self.settings.channels_last)
        with self.accelerator.autocast():
            logits = self.network(images)["out"].float()
        if logits.shape[2:] != size:
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=self.network.align_corners)
        return logits

    @torch.no_grad()
    def draw(self, path: Path) -> None:
        """Writes a picture of some validation samples: image, mask and prediction.

        Raises:
            UserError: The file cannot be written.
        """
        self.network.eval()
        rows = []
        count = min(SHOWN, len(self.val))
        for index in range(count):
            image, mask = self.val[index * (len(self.val) - 1) // max(1, count - 1)]
            prediction = self._logits(image[None], mask.shape)[0].argmax(0).cpu()
            rows.append((self._photograph(image, mask.shape), mask, prediction))
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        with atomic(path) as temporary:
            sheet(rows, len(self.config.classes)).save(temporary)

    def _photograph(self, image: Tensor, size: torch.Size) -> Tensor:
        """The image (3, H, W) uint8 in the size of its mask, from what the network takes."""
        mean, std = (torch.tensor(each)[:, None, None] for each in (self.config.mean, self.config.std))
        resized = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        return ((resized * std + mean) * 255).round().clamp(0, 255).byte()
