"""The control of the scenes: what a network that sees a patch alone gets right, and what it would if told the type of scene."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxenc.training.segmentation.scenes import AMBIGUOUS, CLASSES, IGNORED, SCENES, SIZE, Scenes, grown, scene_type

PATCH = 17  # pixels, as wide as the ambiguous regions allow: a wider one fits into fewer of them
BATCH = 128


@dataclass(frozen=True)
class PatchAccuracy:
    """How a classifier of patches fares on test scenes, one patch a region, so that no two share a region.

    Args:
        alone: The share of each class that is right among all classes.
        told: The same where the type of scene is told, so that the choice is among its three classes.
        in_pair: Of each pair in AMBIGUOUS, how many patches are right, where the choice is between the two, and how many there are.
    """

    alone: dict[str, float]
    told: dict[str, float]
    in_pair: dict[tuple[str, str], tuple[int, int]]


def local_patch_accuracy(
    train_scenes: int = 1000, test_scenes: int = 1000, steps: int = 400, seed: int = 0
) -> PatchAccuracy:
    """Trains a small convolutional network on patches of PATCH x PATCH pixels that lie wholly inside a region of a training scene.

    Args:
        train_scenes: Scenes that the training patches are cut from, four a region.
        test_scenes: Scenes that the test patches are cut from, one a region.
        steps: Updates, each on BATCH patches.
        seed: Of the scenes, the patches and the network.

    Raises:
        ValueError: There are fewer scenes than types of scenes, or steps is below 1.
        UserError: scikit-image is not installed, or lacks a photograph.
    """
    for argument, value, least in (
        ("train_scenes", train_scenes, len(SCENES)),
        ("test_scenes", test_scenes, len(SCENES)),
        ("steps", steps, 1),
    ):
        if value < least:
            raise ValueError(f"local_patch_accuracy: {argument} must be at least {least}, got {value}")
    patches, labels, _ = cut_patches(Scenes(True, train_scenes, seed), each=4, seed=seed)
    network = train_on_patches(patches, labels, steps, seed)
    patches, labels, types = cut_patches(Scenes(False, test_scenes, seed), each=1, seed=seed)
    with torch.inference_mode():
        logits = network(patches)
    possible = torch.tensor([[name in ("background", *own) for name in CLASSES] for own in SCENES.values()])
    told = logits.masked_fill(~possible[types], -torch.inf)
    return PatchAccuracy(
        alone=_shares(logits.argmax(1), labels),
        told=_shares(told.argmax(1), labels),
        in_pair={pair: _forced(logits, labels, pair) for pair in AMBIGUOUS},
    )


def cut_patches(scenes: Scenes, each: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts ``each`` patches at random out of every region that is wide enough for one.

    Returns:
        Patches (N, 1, PATCH, PATCH), their classes (N,) and the types of their scenes (N,), indices into CLASSES and SCENES.
    """
    generator = np.random.default_rng((seed, each))
    reach = PATCH // 2
    patches, labels, types = [], [], []
    for index in range(len(scenes)):
        image, mask = scenes[index]
        for label in set(mask.unique().tolist()) - {IGNORED}:
            inside = ~grown((mask != label).numpy(), reach)
            centres = np.argwhere(
                inside[reach : SIZE - reach, reach : SIZE - reach]
            )  # so numbered, a centre is the patch's corner
            if not len(centres):
                continue
            for top, left in centres[generator.integers(len(centres), size=each)]:
                patches.append(image[:1, top : top + PATCH, left : left + PATCH])
                labels.append(label)
                types.append(list(SCENES).index(scene_type(index)))
    return torch.stack(patches), torch.tensor(labels), torch.tensor(types)


def train_on_patches(patches: Tensor, labels: Tensor, steps: int, seed: int) -> nn.Module:
    """Trains three convolutions and a linear layer, with AdamW in one cycle; gives the network in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            *(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(CLASSES))),
        )
        optimizer = torch.optim.AdamW(network.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
        for _ in range(steps):
            picks = torch.randint(len(labels), (BATCH,))
            loss = F.cross_entropy(network(patches[picks]), labels[picks])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def _shares(predictions: Tensor, labels: Tensor) -> dict[str, float]:
    right = predictions == labels
    return {name: float(right[labels == number].float().mean()) for number, name in enumerate(CLASSES)}


def _forced(logits: Tensor, labels: Tensor, pair: tuple[str, str]) -> tuple[int, int]:
    """Look only at the two logits of a pair. Return how many of its patches get the right one, and how many there are."""
    first, second = (CLASSES.index(name) for name in pair)
    own = (labels == first) | (labels == second)
    chosen = torch.where(logits[own, first] > logits[own, second], first, second)
    return int((chosen == labels[own]).sum()), int(own.sum())
