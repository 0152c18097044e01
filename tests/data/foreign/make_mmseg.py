"""Writes the cases of tests/foreign.py: what mmsegmentation's own EncNet makes of random weights and random images.

The network is mmsegmentation's (EncoderDecoder of ResNetV1c, EncHead and FCNHead) with the settings of its encnet_r50-d8 base
configuration, but BatchNorm for SyncBN, which has the same names and in evaluation does the same. It runs in fp64, and the logits
are rounded to fp32, so that they hardly depend on the machine or the number of threads.

The cases named pe_* stand for PyTorch-Encoding, which has no wheel: the arithmetic is mmsegmentation's, run with PyTorch-Encoding's
settings (a stem of 64, 64 and 128 channels, align_corners=True). In evaluation the two code bases compute the same.

In an environment of its own that has torch, numpy and scipy, from the root of a clone:

    pip install --no-deps mmsegmentation==1.2.2 mmcv-lite==2.1.0 mmengine==0.10.7
    pip install addict yapf pyyaml pillow termcolor rich prettytable packaging regex ftfy opencv-python-headless
    python -m tests.data.foreign.make_mmseg

For each case it prints where its assignments lie between hard (entropy 0) and uniform (1), and by how many standard deviations of
the logits these move where the encoding is wrong, which a test must see, and where mmsegmentation runs in fp32, which it must let
pass.
"""

import copy
import importlib
import json
import math
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from importlib.metadata import version
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from tests.foreign import DATA, SAMPLED, Case

PACKAGES = ("mmsegmentation", "mmcv-lite", "mmengine", "torch", "numpy")
MMSEG = {"depth": 50, "stem_channels": 64, "num_codes": 32, "lateral": False, "se_loss": True, "align_corners": False}
PE = MMSEG | {"stem_channels": 128, "align_corners": True}
CASES: dict[str, dict[str, Any]] = {
    "mmseg_r50": MMSEG | {"num_classes": 19, "images_shape": (2, 3, 65, 97)},
    "mmseg_r50_lateral": MMSEG | {"num_classes": 21, "images_shape": (1, 3, 97, 65), "lateral": True},
    "mmseg_r50_no_se_loss": MMSEG | {"num_classes": 21, "images_shape": (1, 3, 65, 97), "se_loss": False},
    "mmseg_r101": MMSEG | {"num_classes": 19, "images_shape": (1, 3, 65, 97), "depth": 101},
    "pe_r50": PE | {"num_classes": 21, "images_shape": (2, 3, 65, 97)},
    "pe_r50_lateral": PE | {"num_classes": 19, "images_shape": (1, 3, 97, 65), "lateral": True},
}
FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "scale's sign": lambda logits: (-logits).softmax(2),
    "softmax over pixels": lambda logits: logits.softmax(1),
}


class _NoOps(ModuleType):
    """Stands in for the compiled operators of mmcv, none of which EncNet calls."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def build(settings: dict[str, Any]) -> nn.Module:
    """The network, in evaluation and fp64, with whatever weights it starts from."""
    sys.modules.setdefault("mmcv._ext", _NoOps("mmcv._ext"))
    from mmseg.models import EncoderDecoder

    norm = {"type": "BN", "requires_grad": True}
    head = {"num_classes": settings["num_classes"], "align_corners": settings["align_corners"]}
    head |= {"dropout_ratio": 0.1, "norm_cfg": norm}
    network = EncoderDecoder(
        backbone={
            "type": "ResNetV1c",
            "depth": settings["depth"],
            "stem_channels": settings["stem_channels"],
            "num_stages": 4,
            "out_indices": (0, 1, 2, 3),
            "dilations": (1, 1, 2, 4),
            "strides": (1, 2, 1, 1),
            "norm_cfg": norm,
            "norm_eval": False,
            "style": "pytorch",
            "contract_dilation": True,
        },
        decode_head=head
        | {
            "type": "EncHead",
            "in_channels": [512, 1024, 2048],
            "in_index": (1, 2, 3),
            "channels": 512,
            "num_codes": settings["num_codes"],
            "use_se_loss": settings["se_loss"],
            "add_lateral": settings["lateral"],
        },
        auxiliary_head=head
        | {
            "type": "FCNHead",
            "in_channels": 1024,
            "in_index": 2,
            "channels": 256,
            "num_convs": 1,
            "concat_input": False,
        },
        test_cfg={"mode": "whole"},
    )
    return network.eval().double()


@torch.no_grad()
def run(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Its logits, by name as Case.outputs has them."""
    from mmseg.models.utils import resize

    features = network.extract_feat(images)
    head, aux_head, size = network.decode_head, network.auxiliary_head, images.shape[2:]
    out, *se = head(features) if head.use_se_loss else (head(features),)
    aux = aux_head(features)
    outputs = {
        "out": out,
        "out_resized": network.encode_decode(images, [{"img_shape": size}] * len(images)),
        "aux": aux,
        "aux_resized": resize(aux, size, mode="bilinear", align_corners=aux_head.align_corners),
    }
    for name in ("out_resized", "aux_resized"):
        outputs[name] = outputs[name][:, :, SAMPLED, SAMPLED]
    return outputs | dict(zip(["se"], se, strict=False))


def assigning(assign: Callable[[Tensor], Tensor]) -> AbstractContextManager:
    """Gives mmsegmentation's Encoding another softmax, of logits (B, N, K)."""
    encoding = importlib.import_module("mmseg.models.utils.encoding")
    return patch.object(encoding, "F", SimpleNamespace(softmax=lambda logits, dim: assign(logits)))


def entropy(network: nn.Module, images: Tensor) -> float:
    """Of the assignments, in units of that of the uniform one, the mean over the pixels."""
    seen = []

    def assign(logits: Tensor) -> Tensor:
        seen.append(torch.special.entr(logits.softmax(2)).sum(2).mean() / math.log(logits.shape[2]))
        return logits.softmax(2)

    with assigning(assign):
        run(network, images)
    return seen[0].item()


def moved(outputs: dict[str, Tensor], others: dict[str, Tensor]) -> str:
    """By how many standard deviations of an output the other one lies off it, root mean square."""
    ratios = {name: (others[name] - outputs[name]).square().mean().sqrt() / outputs[name].std() for name in outputs}
    return ", ".join(f"{name} {ratio:.2g}" for name, ratio in ratios.items())


def report(network: nn.Module, images: Tensor, outputs: dict[str, Tensor]) -> None:
    print(f"  entropy of the assignments {entropy(network, images):.2f}")
    print("  moved, in standard deviations of the logits")
    for fault, assign in FAULTS.items():
        with assigning(assign):
            print(f"    {fault}: {moved(outputs, run(network, images))}")
    in_fp32 = run(copy.deepcopy(network).float(), images.float())
    print(f"    in fp32: {moved(outputs, in_fp32)}")


def main() -> None:
    for seed, (name, settings) in enumerate(CASES.items()):
        network = build(settings)
        shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        case = Case(name, seed, shapes=shapes, versions={package: version(package) for package in PACKAGES}, **settings)
        network.load_state_dict(case.state_dict())
        images = case.images().double()
        outputs = run(network, images)
        print(name)
        report(network, images, outputs)
        fields = {key: value for key, value in asdict(case).items() if key != "name"}
        text = re.sub(r"\[[^\[\]]*\]", lambda shape: re.sub(r"\s+", " ", shape[0]), json.dumps(fields, indent=1))
        (DATA / f"{name}.json").write_text(f"{text}\n")
        np.savez(DATA / f"{name}.npz", **{key: tensor.float().numpy() for key, tensor in outputs.items()})


if __name__ == "__main__":
    main()
