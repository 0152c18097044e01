"""Load and save EncNet checkpoints: from PyTorch-Encoding, from mmsegmentation, and our own.

Two tables below list the parameter names in network order (mmsegmentation's, PyTorch-Encoding's, ours). Both code bases store
scale = -smoothing.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from ctxenc.integrations.encnet import EncNet
from ctxenc.integrations.hub import build_without_memory, write_with_usual_mode
from ctxenc.integrations.state_dicts import read_pickle, read_safetensors, unwrap

NAME = "load_encnet_checkpoint"
METADATA = "ctxenc.EncNet"  # key of the configuration in the metadata of a safetensors file


class Source(NamedTuple):
    """Describe a code base: its name prefixes and our replacements; None if our network has no such part."""

    name: str
    align_corners: bool
    names: dict[str, str | None]


PYTORCH_ENCODING = Source(
    "PyTorch-Encoding",
    True,
    {
        "pretrained.": "backbone.",
        "pretrained.fc.": None,  # the ImageNet classifier, unused in segmentation
        "head.conv5.": "reduce.",
        "head.connect.": "laterals.",
        "head.fusion.": "fusion.",
        "head.encmodule.encoding.0.": "encoding.context.conv.",
        "head.encmodule.encoding.1.": "encoding.context.norm.",
        "head.encmodule.encoding.3.": "encoding.context.encoding.",
        "head.encmodule.encoding.4.": "encoding.context.norm_codes.",
        "head.encmodule.fc.0.": "encoding.context.fc.",
        "head.encmodule.selayer.": "encoding.presence.",
        "head.conv6.1.": "classifier.1.",
        "auxlayer.conv5.0.": "aux.0.0.",
        "auxlayer.conv5.1.": "aux.0.1.",
        "auxlayer.conv5.4.": "aux.1.1.",
    },
)
MMSEGMENTATION = Source(
    "mmsegmentation",
    False,
    {
        "backbone.": "backbone.",
        "backbone.stem.": "backbone.conv1.",
        "backbone.stem.7.": "backbone.bn1.",
        "decode_head.bottleneck.conv.": "reduce.0.",
        "decode_head.bottleneck.bn.": "reduce.1.",
        "decode_head.lateral_convs.0.conv.": "laterals.0.0.",
        "decode_head.lateral_convs.0.bn.": "laterals.0.1.",
        "decode_head.lateral_convs.1.conv.": "laterals.1.0.",
        "decode_head.lateral_convs.1.bn.": "laterals.1.1.",
        "decode_head.fusion.conv.": "fusion.0.",
        "decode_head.fusion.bn.": "fusion.1.",
        "decode_head.enc_module.encoding_project.conv.": "encoding.context.conv.",
        "decode_head.enc_module.encoding_project.bn.": "encoding.context.norm.",
        "decode_head.enc_module.encoding.0.": "encoding.context.encoding.",
        "decode_head.enc_module.encoding.1.": "encoding.context.norm_codes.",
        "decode_head.enc_module.fc.0.": "encoding.context.fc.",
        "decode_head.se_layer.": "encoding.presence.",
        "decode_head.conv_seg.": "classifier.1.",
        "auxiliary_head.convs.0.conv.": "aux.0.0.",
        "auxiliary_head.convs.0.bn.": "aux.0.1.",
        "auxiliary_head.conv_seg.": "aux.1.1.",
    },
)
# Names that identify a code base
CODEWORDS = {
    "head.encmodule.encoding.3.codewords": PYTORCH_ENCODING,
    "decode_head.enc_module.encoding.0.codewords": MMSEGMENTATION,
}


def load_encnet_checkpoint(source: str | os.PathLike[str] | Mapping[str, Any]) -> EncNet:
    """Build an EncNet from a checkpoint and load its weights.

    Recognises EncNet of PyTorch-Encoding and of mmsegmentation (ResNet-50, 101 and 152 with their own stem or timm's
    plain one, with and without laterals, auxiliary head and SE-loss), and files from save_encnet_checkpoint. Names and
    shapes determine the network; the code base determines align_corners: True in PyTorch-Encoding's networks, False in
    mmsegmentation's.

    From November 2017 to September 2018, PyTorch-Encoding computed the softmax over the pixels, not over the codewords.
    Networks trained then load without an error but give other outputs here, and neither names nor shapes reveal it.
    Measure such a network first.

    Args:
        source: a file of tensors (.safetensors, or from torch.save, read with weights_only=True), or a state dict,
            plain or wrapped by a trainer (DDP, Lightning, torch.compile, moving averages); see state_dicts.unwrap.

    Returns:
        The network, on the CPU, in eval mode.

    Raises:
        ValueError: the file has another format, or would run code; no EncNet is recognised; or a tensor is unknown,
            missing or of another shape.
        OSError: the file cannot be read.
    """
    try:
        content, config = (source, None) if isinstance(source, Mapping) else _read(Path(source))
        state = _find_state(content)
    except ValueError as error:
        raise ValueError(f"{NAME}: {error}") from error
    names = {name: name for name in state}
    if config is None:
        code_base = _recognise(state)
        names = _rename(state, code_base)
        state = {ours: _convert(theirs, state[theirs]) for ours, theirs in names.items()}
        config = _derive_config(state) | {"align_corners": code_base.align_corners}  # and the papers' sums; see _built
    # Allocate nothing before all shapes are checked.
    _check(build_without_memory(lambda: _build(config)).state_dict(), state, names)
    network = _build(config)
    network.load_state_dict(state, strict=False)  # old checkpoints lack the batch counts
    return network.eval()


def save_encnet_checkpoint(network: EncNet, path: str | os.PathLike[str]) -> None:
    """Write a network and its arguments into one safetensors file, for load_encnet_checkpoint.

    Raises:
        TypeError: network is not an EncNet, or one of its arguments is not JSON.
        ValueError: its arguments build another network, as after patch_se_blocks, or path does not end in .safetensors.
        OSError: the file cannot be written.
    """
    if not isinstance(network, EncNet):
        raise TypeError(f"save_encnet_checkpoint: network must be an EncNet, got {type(network).__name__}")
    if Path(path).suffix != ".safetensors":  # load_encnet_checkpoint recognises the file by it
        raise ValueError(f"save_encnet_checkpoint: path must end in .safetensors, got {str(path)!r}")
    metadata = {"format": "pt", METADATA: json.dumps(network.checked_config())}
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    write_with_usual_mode(Path(path), lambda: save_file(state, path, metadata))


def _read(path: Path) -> tuple[Any, dict[str, Any] | None]:
    """Read the content of a file, and the arguments of our network if it has them."""
    if path.suffix != ".safetensors":
        return read_pickle(path), None
    state, metadata = read_safetensors(path)
    try:
        return state, json.loads(metadata[METADATA]) if METADATA in metadata else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid safetensors file: {error}") from error


def _build(config: Any) -> EncNet:
    """Build our network from the arguments in a file."""
    if not isinstance(config, dict):
        raise ValueError(f"{NAME}: the arguments of EncNet must be a table, got {config!r}")
    try:
        # Networks from other code bases sum over the pixels, and so do ours saved before this option existed.
        arguments: dict[str, Any] = {"aggregation": "sum"} | config | {"pretrained_backbone": False}
        return EncNet(**arguments)
    except NotImplementedError:  # for without_memory
        raise
    except Exception as error:  # of any kind, up to a failed allocation
        raise ValueError(f"{NAME}: the checkpoint names a network that cannot be built: {error}") from error


def _find_state(content: Any) -> dict[str, Tensor]:
    """Find the state dict of an EncNet in a file's content, by the codewords of either code base; else return all of it."""
    for name in CODEWORDS:
        state = unwrap(content, [name])
        if name in state:
            return state
    return state


def _recognise(state: dict[str, Tensor]) -> Source:
    if source := next((CODEWORDS[name] for name in CODEWORDS if name in state), None):
        return source
    if "encoding.context.encoding.codewords" in state:
        raise ValueError(
            f"{NAME}: a state dict of ctxenc's own EncNet does not say what network it is of: build that and call its"
            " load_state_dict, or save with save_encnet_checkpoint"
        )
    raise ValueError(
        f"{NAME}: neither PyTorch-Encoding's nor mmsegmentation's EncNet: {' or '.join(CODEWORDS)} must be among its {len(state)}"
        f" names, such as {', '.join(sorted(state)[:3])}"
    )


def _rename(state: dict[str, Tensor], source: Source) -> dict[str, str]:
    """Return our name of each tensor, and the checkpoint's name."""
    names, unknown = {}, []
    for name in state:
        prefix = max((each for each in source.names if name.startswith(each)), key=len, default=None)
        if prefix is None:
            unknown.append(name)
        elif (ours := source.names[prefix]) is not None:
            names[(ours + name.removeprefix(prefix)).replace(".scale", ".smoothing")] = name
    if unknown:
        raise ValueError(f"{NAME}: unknown in {source.name}'s EncNet: {', '.join(unknown)}")
    return names


def _convert(name: str, tensor: Tensor) -> Tensor:
    return -tensor if name.endswith(".scale") and tensor.is_floating_point() else tensor


def _derive_config(state: dict[str, Tensor]) -> dict[str, Any]:
    """Derive the arguments of EncNet from names and shapes."""
    depths: Any = tuple(
        len({name.split(".")[2] for name in state if name.startswith(f"backbone.layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    layers = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}.get(depths)
    if layers is None or "backbone.layer1.0.conv3.weight" not in state:
        raise ValueError(f"{NAME}: the backbone must be a ResNet-50, 101 or 152, got stages of {depths} blocks")
    stem = {"backbone.conv1.weight": "", "backbone.conv1.0.weight": "c"}
    kind = next((kind for name, kind in stem.items() if name in state), "")
    if kind and state["backbone.conv1.0.weight"].shape[:1] == (64,):
        kind = "s"  # PyTorch-Encoding's: 64, 64, 128 channels; mmsegmentation's: 32, 32, 64
    dimensions = {"encoding.context.encoding.codewords": 2, "classifier.1.weight": 4}
    if missing := dimensions.keys() - state.keys():
        raise ValueError(f"{NAME}: missing: {', '.join(sorted(missing))}")
    for name, dim in dimensions.items():
        if state[name].dim() != dim:
            raise ValueError(f"{NAME}: {name} must have {dim} dimensions, got shape {tuple(state[name].shape)}")
    num_codes, channels = state["encoding.context.encoding.codewords"].shape
    return {
        "backbone": f"resnet{layers}{kind}",
        "num_classes": state["classifier.1.weight"].shape[0],
        "num_codes": num_codes,
        "channels": channels,
        "aux": "aux.1.1.weight" in state,
        "se_loss": "encoding.presence.weight" in state,
        "lateral": "fusion.0.weight" in state,
    }


def _check(expected: dict[str, Tensor], state: dict[str, Tensor], names: dict[str, str]) -> None:
    """Check names and shapes strictly; only the batch counts may be missing. names: the checkpoint's names by ours."""
    counts = {name for name in expected if name.endswith("num_batches_tracked")}
    wrong = {
        "missing": sorted(expected.keys() - state.keys() - counts),
        "unknown": sorted(names[name] for name in state.keys() - expected.keys()),
        "of another shape": [
            f"{names[name]} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
        "of another kind": [
            f"{names[name]} {state[name].dtype} for {tensor.dtype}"
            for name, tensor in expected.items()
            if name in state and state[name].is_floating_point() != tensor.is_floating_point()
        ],
    }
    if any(wrong.values()):
        found = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"{NAME}: the checkpoint does not fit the network that it names: {found}")
