"""Train one segmentation network with one seed."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ctxenc.integrations.encnet import EncNet
from ctxenc.integrations.losses import EncNetLoss
from ctxenc.runs.config import atomic
from ctxenc.runs.errors import UserError
from ctxenc.runs.segment_config import SegmentConfig, build_network
from ctxenc.training import loop, pictures
from ctxenc.training.bad_images import skip_broken
from ctxenc.training.loop import Loop, to_format
from ctxenc.training.segmentation.datasets import Datasets, build_samples
from ctxenc.training.segmentation.mask_pictures import sheet
from ctxenc.training.segmentation.segment_metrics import count_pixels, measure_segmentation
from ctxenc.training.segmentation.segment_report import draw_masks
from ctxenc.training.segmentation.segment_settings import SCENES, SegmentSettings

SCORE = "mean_iou"  # the column of metrics.csv that chooses the best epoch
SHOWN = 4  # validation samples in the picture of each epoch
WORST = 6  # in that of the worst


def make_optimizer(network: EncNet, settings: SegmentSettings) -> Optimizer:
    """Build the optimiser of `settings`: the head learns faster than the backbone; codewords and smoothing do not decay.

    Raises:
        UserError: It needs a missing package, or rejects these settings.
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
    return loop.make_optimizer(described, settings, momentum=settings.momentum)


class SegmentTrainer(Loop):
    """Train one arm with one seed, from its configuration to its files. See Loop for the other arguments."""

    score = SCORE
    score_label = "mIoU"
    predicted = ("name", "wrong", "index")
    sync_bn = True  # as the paper
    settings: SegmentSettings

    def __init__(
        self, config: SegmentConfig, settings: SegmentSettings, datasets: Datasets, arm: Path, seed: int
    ) -> None:
        self.config, self.poly_power = config, settings.poly_power
        self.names = [datasets.val.name(index) for index in range(len(datasets.val))]
        self.samples, self.val = build_samples(datasets, settings, config.mean, config.std, seed)
        total = len(self.samples) + len(self.val)
        self.samples = skip_broken(self.samples, settings, arm, total, train=True)
        self.val = skip_broken(self.val, settings, arm, total, train=False)
        self.criterion = EncNetLoss(settings.aux_weight, settings.se_weight)
        self.val_batch = None if settings.data == SCENES else 1  # images differ in size
        super().__init__(settings, arm, seed)
        self.criterion.to(self.accelerator.device)

    def build(self, fresh: bool) -> nn.Module:
        """Build the network of the configuration."""
        return build_network(self.config, self.settings.pretrained_backbone and fresh)

    def make_optimizer(self) -> Optimizer:
        """Build the optimiser of the network."""
        return make_optimizer(self.network, self.settings)

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return EncNet's loss."""
        return self.criterion(self.model(images), targets)

    def _val_loader(self) -> DataLoader:
        """Build a loader of this process's share of the validation samples: each is in one share."""
        share = range(self.accelerator.process_index, len(self.val), self.accelerator.num_processes)
        return self.loader(Subset(self.val, share), train=False, batch_size=self.val_batch)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the measures of measure_segmentation over the pixels of all validation masks.

        Store each image's share of wrong pixels, and the confusion of classes, in the progress.

        Raises:
            UserError: No image counts.
        """
        self.model.eval()
        classes = self.config.classes
        matrix = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=self.accelerator.device)
        loader = self._val_loader()
        common = len(self.val) // self.accelerator.num_processes // (loader.batch_size or 1)
        bar = tqdm(
            loader, "evaluating", delay=1, leave=False, disable=None if self.accelerator.is_main_process else True
        )
        wrong: list[float] = []
        for images, masks in self.until_stopped(bar, common):
            masks = masks.to(self.accelerator.device)
            predictions = self._logits(images, masks.shape[1:]).argmax(1)
            matrix += count_pixels(predictions, masks, len(classes))
            wrong += share_wrong(predictions, masks).tolist()
        matrix = self.accelerator.reduce(matrix, "sum")
        self.progress.confusion = matrix.tolist()
        shares = gather_object([wrong])
        found = [
            (name, shares[index % len(shares)][index // len(shares)], index) for index, name in enumerate(self.names)
        ]
        self.progress.predictions = [row for row in found if not math.isnan(row[1])]
        if not self.progress.predictions:
            raise UserError(
                f"none of the {len(self.val)} validation images counts: its file is broken or all of its mask is ignored"
            )
        return measure_segmentation(matrix, classes)

    def _logits(self, images: Tensor, size: torch.Size) -> Tensor:
        """Return the logits of the pixels of masks of this size, fp32."""
        images = to_format(images.to(self.accelerator.device), self.settings.channels_last)
        with self.accelerator.autocast():
            return pixel_logits(self.network, images, size)

    def publish(self) -> None:
        """Write an epoch's results for other commands, with a picture of some validation samples; on the main process."""
        super().publish()
        path = self.arm / pictures.FOLDER / f"epoch-{self.progress.epoch:03d}.png"
        rows = self._predict(pictures.spread(range(len(self.val)), SHOWN))
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        with atomic(path) as temporary:
            sheet(rows, len(self.config.classes)).save(temporary)

    def finish(self) -> None:
        """Draw the confusion of classes, the images with most wrong pixels, and how two blocks encode images."""
        super().finish()
        matrix = torch.tensor(self.progress.confusion)
        pictures.save(self.arm, pictures.CONFUSION, pictures.draw_confusion(matrix, self.config.classes))
        rows = self.progress.predictions
        worst = sorted(rows, key=lambda row: -row[1])[:WORST]
        captions = [f"{100 * share:.0f} % wrong" for _, share, _ in worst]
        figure = draw_masks(self._predict([index for _, _, index in worst]), captions, self.config.classes)
        pictures.save(self.arm, pictures.WORST, figure)
        shown = pictures.spread(rows, pictures.LOOKED_AT)
        colours = {"mean": self.config.mean, "std": self.config.std}
        images = [self.val[index][0] for _, _, index in shown]
        pictures.draw_assignments(self.arm, self.network, images, [Path(row[0]).stem for row in shown], colours)

    @torch.no_grad()
    def _predict(self, chosen: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return image (3, H, W) uint8, mask (H, W) and prediction (H, W) of some validation samples."""
        self.network.eval()
        rows = []
        for index in chosen:
            image, mask = self.val[index]
            prediction = self._logits(image[None], mask.shape)[0].argmax(0).cpu()
            rows.append((self._photograph(image, mask.shape), mask, prediction))
        return rows

    def _photograph(self, image: Tensor, size: torch.Size) -> Tensor:
        """Undo the network's input transform: return the image (3, H, W) uint8 in the size of its mask."""
        resized = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        pixels = pictures.photograph(resized, self.config.mean, self.config.std)
        return (pixels * 255).round().byte().permute(2, 0, 1)


def pixel_logits(network: Any, images: Tensor, size: torch.Size) -> Tensor:
    """Return the logits of images at the pixels of masks of this size, fp32."""
    logits = network(images)["out"].float()
    if logits.shape[2:] != size:
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=network.align_corners)
    return logits


def share_wrong(predictions: Tensor, masks: Tensor, ignore_index: int = 255) -> Tensor:
    """Return the share of wrong pixels among the labelled ones of each mask (B, H, W), (B,) fp64; NaN without labelled pixels."""
    counted = masks != ignore_index
    wrong = (predictions != masks) & counted
    return wrong.flatten(1).sum(1).cpu().double() / counted.flatten(1).sum(1).cpu()
