"""The training of one segmentation network with one seed."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ctxenc.integrations.encnet import EncNet
from ctxenc.integrations.losses import EncNetLoss
from ctxenc.training import loop
from ctxenc.training.config import atomic
from ctxenc.training.console import UserError
from ctxenc.training.loop import Loop, in_format
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
    return loop.make_optimizer(described, settings, momentum=settings.momentum)


class SegmentTrainer(Loop):
    """One arm with one seed, from its configuration to its files.

    Args:
        config: What to build.
        settings: How to train it.
        datasets: What to train and evaluate on.
        arm: The folder to write to; training goes on from the newest checkpoint in it, if there is one.
        seed: Seed of the weights and of all that is drawn.
    """

    score = SCORE
    score_label = "mIoU"
    sync_bn = True  # as the paper
    settings: SegmentSettings

    def __init__(
        self, config: SegmentConfig, settings: SegmentSettings, datasets: Datasets, arm: Path, seed: int
    ) -> None:
        self.config, self.poly_power = config, settings.poly_power
        self.samples, self.val = samples_of(datasets, settings, config.mean, config.std, seed)
        self.criterion = EncNetLoss(settings.aux_weight, settings.se_weight)
        super().__init__(settings, arm, seed)
        self.criterion.to(self.accelerator.device)

    def build(self, fresh: bool) -> nn.Module:
        """The network of the configuration."""
        return build_network(self.config, self.settings.pretrained_backbone and fresh)

    def make_optimizer(self) -> Optimizer:
        """The optimiser of the network."""
        return make_optimizer(self.network, self.settings)

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """EncNet's loss."""
        return self.criterion(self.model(images), targets)

    def _val_loader(self) -> DataLoader:
        """This process's share of the validation samples: each is in one share, and images differ in size."""
        share = range(self.accelerator.process_index, len(self.val), self.accelerator.num_processes)
        one_size = self.settings.data == SCENES
        return self.loader(Subset(self.val, share), train=False, batch_size=None if one_size else 1)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Pixel accuracy, mean IoU and Dice and those of each class, over the pixels of all validation masks."""
        self.model.eval()
        metrics = SegmentationMetrics(len(self.config.classes)).to(self.accelerator.device)
        metrics.distributed_available_fn = lambda: False  # the sum over processes is taken below
        loader = self._val_loader()
        common = len(self.val) // self.accelerator.num_processes // (loader.batch_size or 1)
        bar = tqdm(loader, "evaluating", delay=1, leave=False, disable=not self.accelerator.is_main_process)
        for images, masks in self.until_told(bar, common):
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

    def publish(self) -> None:
        """Writes what an epoch leaves for others, a picture among it; on the main process."""
        super().publish()
        self.draw()

    @torch.no_grad()
    def draw(self) -> None:
        """Writes a picture of some validation samples: image, mask and prediction.

        Raises:
            UserError: The file cannot be written.
        """
        self.network.eval()
        path = self.arm / "pictures" / f"epoch-{self.progress.epoch:03d}.png"
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
