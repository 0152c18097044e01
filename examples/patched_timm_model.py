"""timm's seresnet50 with ContextEncoding in place of SE, for timm's own scripts: --device-modules patched_timm_model.

    python examples/patched_timm_model.py IMAGES OUT.safetensors

writes its start: timm's pretrained weights, and in the place of the SE blocks what calibration makes of 256 of the IMAGES, a folder
with a folder a class. For a network of your own, register it in a module of your own, as here.
"""

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models import register_model
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

import ctxenc

CALIBRATED_ON = 256


@register_model
def seresnet50_context(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Timm's seresnet50, patched; with ``pretrained`` all but the blocks have timm's weights."""
    model = timm.create_model("seresnet50", pretrained=pretrained, **kwargs)
    ctxenc.patch_se_blocks(model)  # after the weights, which are those of the SE network
    return model


def write_start(images: Path, out: Path, pretrained: bool = True) -> None:
    """Calibrates a new network on some of the images and writes its weights, which --initial-checkpoint takes."""
    model = timm.create_model("seresnet50_context", pretrained=pretrained).eval()
    dataset = ImageFolder(images, create_transform(**resolve_data_config(model=model)))
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:CALIBRATED_ON]
    print(ctxenc.calibrate(model, DataLoader(Subset(dataset, chosen.tolist()), batch_size=32)))
    save_file(model.state_dict(), out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the calibrated start of seresnet50_context.")
    parser.add_argument("images", type=Path, metavar="IMAGES")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors")
    args = parser.parse_args()
    write_start(args.images, args.out)
