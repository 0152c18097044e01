"""EncNets of other code bases: their state dicts, rebuilt from a seed, and what their own code makes of them.

`tests/data/foreign/make_mmseg.py` fills mmsegmentation's networks with the values made here and runs them. For each case it
writes the settings with the names and shapes of the state dict (JSON), and the logits (npz). A test rebuilds the same state dict
and the same images without mmsegmentation. The values come from numpy's RandomState, whose stream is frozen, and are uniform, so
that no logarithm or cosine, which platforms round differently, has a part in them.
"""

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data" / "foreign"
SAMPLED = slice(1, None, 7)  # rows and columns that are kept of a map as large as the image; of 65 rows the last is one


@dataclass(frozen=True)
class Case:
    """A network of mmsegmentation, an image batch for it, and what it gives.

    stem_channels=128 and align_corners=True are PyTorch-Encoding's, with which mmsegmentation computes what that code base computes
    (`to_pytorch_encoding` gives its names); 64 and False are mmsegmentation's own.
    """

    name: str
    seed: int
    depth: int
    stem_channels: int
    num_classes: int
    num_codes: int
    lateral: bool
    se_loss: bool
    align_corners: bool
    images_shape: tuple[int, int, int, int]
    shapes: dict[str, tuple[int, ...]]
    versions: dict[str, str]

    def state_dict(self) -> dict[str, Tensor]:
        """The state dict, with mmsegmentation's names, in fp32."""
        return {name: values(name, shape, self.seed) for name, shape in self.shapes.items()}

    def images(self) -> Tensor:
        """The batch, as the backbone takes it: (B, 3, H, W), fp32."""
        return values("images", self.images_shape, self.seed)

    def outputs(self) -> dict[str, Tensor]:
        """Logits that mmsegmentation computed in fp64, rounded to fp32.

        "out" and "aux" (B, classes, h, w), at stride 8; "out_resized" and "aux_resized", the same resized to (H, W), of which the
        rows and columns SAMPLED are kept; "se" (B, classes), where se_loss.
        """
        with np.load(DATA / f"{self.name}.npz") as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def case_names() -> list[str]:
    return sorted(path.stem for path in DATA.glob("*.json"))


def read_case(name: str) -> Case:
    fields: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    fields["images_shape"] = tuple(fields["images_shape"])
    fields["shapes"] = {key: tuple(shape) for key, shape in fields["shapes"].items()}
    return Case(name, **fields)


def values(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The tensor of this name: fp32, uniform between its `_bounds`; num_batches_tracked is 7."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    draws = np.random.RandomState([seed, zlib.crc32(name.encode())]).random_sample(shape)
    low, high = _bounds(name, shape)
    return torch.from_numpy((low + (high - low) * draws).astype(np.float32))


def _bounds(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Between which values a tensor of this name lies.

    They are such that activations neither grow nor fade over 33 blocks, that the distances to the codewords (sums over 512
    channels) give assignments neither hard nor uniform, and that the gates do not saturate: else a fault there would hardly show.
    """
    match name.rsplit(".", 1)[-1]:
        case "images" | "codewords":
            return -1.0, 1.0
        case "scale":  # near to one another, so that the codewords too decide
            return -0.11, -0.1
        case "running_var":
            return 0.5, 1.5
        case "running_mean" | "bias":
            return -0.2, 0.2
    if len(shape) > 1:
        bound = math.sqrt(6 / math.prod(shape[1:]))  # a variance of 2 / fan-in
        return (-bound, bound) if len(shape) == 4 else (-bound / 2, bound / 2)
    if name.endswith("bn3.weight"):  # at the end of a residual branch
        return 0.0, 0.3
    if name.endswith("encoding_project.bn.weight"):
        return 0.1, 0.2
    return 0.5, 1.5


PYTORCH_ENCODING = {
    "backbone.stem.7": "pretrained.bn1",
    "backbone.stem": "pretrained.conv1",
    "backbone": "pretrained",
    "decode_head.bottleneck.conv": "head.conv5.0",
    "decode_head.bottleneck.bn": "head.conv5.1",
    "decode_head.lateral_convs.0.conv": "head.connect.0.0",
    "decode_head.lateral_convs.0.bn": "head.connect.0.1",
    "decode_head.lateral_convs.1.conv": "head.connect.1.0",
    "decode_head.lateral_convs.1.bn": "head.connect.1.1",
    "decode_head.fusion.conv": "head.fusion.0",
    "decode_head.fusion.bn": "head.fusion.1",
    "decode_head.enc_module.encoding_project.conv": "head.encmodule.encoding.0",
    "decode_head.enc_module.encoding_project.bn": "head.encmodule.encoding.1",
    "decode_head.enc_module.encoding.0": "head.encmodule.encoding.3",
    "decode_head.enc_module.encoding.1": "head.encmodule.encoding.4",
    "decode_head.enc_module.fc.0": "head.encmodule.fc.0",
    "decode_head.se_layer": "head.encmodule.selayer",
    "decode_head.conv_seg": "head.conv6.1",
    "auxiliary_head.convs.0.conv": "auxlayer.conv5.0",
    "auxiliary_head.convs.0.bn": "auxlayer.conv5.1",
    "auxiliary_head.conv_seg": "auxlayer.conv5.4",
}


def to_pytorch_encoding(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The state dict under PyTorch-Encoding's names, with the ImageNet classifier that its backbone keeps and never calls.

    Args:
        state: with mmsegmentation's names.
        prefix: before every name: "module." where the network was wrapped for several GPUs.
    """
    renamed = {}
    for name, tensor in state.items():
        old = next(old for old in PYTORCH_ENCODING if name.startswith(f"{old}."))  # the longer prefix stands first
        renamed[f"{prefix}{PYTORCH_ENCODING[old]}{name.removeprefix(old)}"] = tensor
    for name, shape in {"pretrained.fc.weight": (1000, 2048), "pretrained.fc.bias": (1000,)}.items():
        renamed[f"{prefix}{name}"] = values(name, shape, 0)
    return renamed
