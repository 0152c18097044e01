"""Observe the blocks of a network: hooks record assignments and gates while images run through it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ctxenc.context import ContextEncoding
from ctxenc.encoding import Encoding, check_sizes, run_eagerly
from ctxenc.functional import assign
from ctxenc.swap.states import set_eval_mode
from ctxenc.viz.reading import FORMATS, as_rgb

Block = ContextEncoding | Encoding
Chosen = str | int | nn.Module
Picture = Image.Image | str | os.PathLike[str] | Tensor

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of the colours, if a model names none
IMAGE_SIZE = 512


@dataclass(frozen=True)
class Observation:
    """Hold a block's record of some images.

    Attributes:
        weights: the assignment (K, h, w) of each image, fp32 or fp64; the weights of a pixel sum to one.
        gates: (images, C), the factor of each channel; None for an Encoding alone: it gates nothing.
    """

    weights: list[Tensor]
    gates: Tensor | None


@dataclass(frozen=True)
class Look:
    """Hold a network's record of some images, on the CPU.

    Attributes:
        photographs: the images as the network got them, with their colours restored: (H, W, 3) in [0, 1].
        blocks: the record of each block, by its name.
        presence: (images, classes), the probability of each class in the image by the SE branch of an EncNet; None if the network
            has no such branch.
    """

    photographs: list[Tensor]
    blocks: dict[str, Observation]
    presence: Tensor | None


@dataclass(frozen=True)
class _Pass:
    """Hold a Look's data of one image."""

    photograph: Tensor
    weights: dict[str, Tensor]
    gates: dict[str, Tensor]
    presence: Tensor | None


def encoding_blocks(model: nn.Module) -> dict[str, Block]:
    """Return the observable blocks of a model: every ContextEncoding, and every Encoding outside of one.

    Args:
        model: any module; a block alone has the name "".

    Returns:
        The blocks by name, in the order of the model's modules.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"encoding_blocks: model must be a torch.nn.Module, got {type(model).__name__}")
    found: dict[str, Block] = {}
    inner: set[Encoding] = set()
    for name, module in _unwrap(model).named_modules():
        if isinstance(module, ContextEncoding):
            found[name] = module
            inner.add(module.encoding)
        elif isinstance(module, Encoding) and module not in inner:
            found[name] = module
    return found


def look(
    model: nn.Module,
    images: Sequence[Picture],
    blocks: Sequence[Chosen] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int = IMAGE_SIZE,
) -> Look:
    """Run images through a network, one by one in eval mode, and record its blocks.

    Each block is observed at its Encoding layer: ctxenc.assign gets the layer's input with its codewords and smoothing.
    If a forward calls a block more than once, the last call counts. Compiled models run eagerly meanwhile.

    Args:
        model: a patched network, an EncNet, a DeepTEN, or any other module with a block, or a block; on any device, in any dtype.
            Afterwards each module returns to its previous mode.
        images: Pillow images, paths, or normalised tensors (C, H, W) or (1, C, H, W); C = 3, except for a block alone.
        blocks: names, indices or modules; all by default. See encoding_blocks.
        mean: of the colours, to normalise a picture and to restore a tensor's colours. By default timm's value for the model, else
            ImageNet's.
        std: of the colours, likewise.
        image_size: shrink a picture to this longer side if it is larger. A network of a fixed size gets its own size instead.

    Returns:
        A Look.

    Raises:
        ValueError: there is no image, no block, or no such block; a tensor has another shape, a picture 32 bits a channel;
            image_size is not positive; or the forward did not reach a block.
        TypeError: model is not a module, or an image or a block has the wrong type.
        OSError: an image file cannot be read.
    """
    chosen = choose_blocks("look", model, blocks)
    passes = list(observe("look", model, images, chosen, mean, std, image_size))
    observations = {
        name: Observation(
            [each.weights[name] for each in passes],
            torch.stack([each.gates[name] for each in passes]) if name in passes[0].gates else None,
        )
        for name in chosen
    }
    presence = [each.presence for each in passes if each.presence is not None]
    return Look([each.photograph for each in passes], observations, torch.stack(presence) if presence else None)


def choose_blocks(caller: str, model: nn.Module, blocks: Sequence[Chosen] | None) -> dict[str, Block]:
    """Return the chosen blocks by name; None chooses all.

    Raises:
        ValueError: the model has no block, or no such block.
        TypeError: model is not a module, or a block is neither a name, an index nor a module.
    """
    found = encoding_blocks(model)
    if not found:
        raise ValueError(
            f"{caller}: model must have ContextEncoding or Encoding blocks, got {type(model).__name__} without"
        )
    if blocks is None:
        return found
    names = list(found)
    by_module = {id(module): name for name, module in found.items()}
    chosen: dict[str, Block] = {}
    for each in blocks:
        if isinstance(each, str) and each in found:
            name = each
        elif isinstance(each, nn.Module) and id(each) in by_module:
            name = by_module[id(each)]
        elif isinstance(each, int) and not isinstance(each, bool) and -len(names) <= each < len(names):
            name = names[each]
        elif isinstance(each, str | int | nn.Module) and not isinstance(each, bool):
            got = type(each).__name__ if isinstance(each, nn.Module) else repr(each)
            raise ValueError(
                f"{caller}: block must be one of {', '.join(map(repr, names))}, its index or module, got {got}"
            )
        else:
            raise TypeError(f"{caller}: block must be a name, an index or a module, got {type(each).__name__}")
        chosen[name] = found[name]
    return chosen


def observe(
    caller: str,
    model: nn.Module,
    images: Sequence[Picture],
    blocks: Mapping[str, Block],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    image_size: int,
) -> Iterator[_Pass]:
    """Run images through the model one by one, keeping nothing: the weights of all images may exceed the memory."""
    check_sizes(caller, image_size=image_size)
    if isinstance(images, str | os.PathLike | Image.Image | Tensor):
        raise TypeError(f"{caller}: images must be a sequence of images, got one {type(images).__name__}")
    if not len(images):
        raise ValueError(f"{caller}: images must hold at least one, got none")
    model = _unwrap(model)
    config = getattr(model, "pretrained_cfg", None) or {}
    colours = [
        torch.as_tensor(config.get(key) or usual if inputs is None else inputs, dtype=torch.float32)[:, None, None]
        for key, inputs, usual in zip(("mean", "std"), (mean, std), IMAGENET, strict=True)
    ]
    fixed = (
        tuple(config["input_size"][:0:-1]) if config.get("fixed_input_size") else None
    )  # (width, height), as Pillow's
    like = next(model.parameters())
    for image in images:
        x = _prepare_input(caller, image, colours, image_size, fixed)
        inputs = x.permute(0, 2, 3, 1) if getattr(model, "channels_last", False) and model in blocks.values() else x
        with torch.no_grad(), run_eagerly(), set_eval_mode(model), _record_blocks(blocks) as (weights, gates):
            output = model(inputs.to(like.device, like.dtype))
        for name in blocks:
            if name not in weights:
                raise ValueError(
                    f"{caller}: the forward of model must call the block {name!r}, got none: it was not reached"
                )
        logits = output.get("se") if isinstance(output, Mapping) else None
        presence = None if logits is None else logits[0].float().sigmoid().cpu()
        yield _Pass(_restore_photograph(x[0], colours), weights, gates, presence)


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile's wrapper, so that blocks keep their names."""
    return getattr(model, "_orig_mod", model)


def _prepare_input(
    caller: str, image: Picture, colours: Sequence[Tensor], image_size: int, fixed: tuple[int, int] | None
) -> Tensor:
    """Return the network's input for an image, (1, C, H, W)."""
    if isinstance(image, Tensor):
        if not image.is_floating_point():
            raise TypeError(f"{caller}: image must be a normalised tensor of floats, got {image.dtype}")
        if image.dim() not in (3, 4) or (image.dim() == 4 and image.shape[0] != 1) or 0 in image.shape:
            raise ValueError(f"{caller}: image must have shape (C, H, W) or (1, C, H, W), got {tuple(image.shape)}")
        return image.detach() if image.dim() == 4 else image.detach()[None]
    if isinstance(image, str | os.PathLike):
        with Image.open(image, formats=FORMATS) as file:
            image = as_rgb(file)
    if not isinstance(image, Image.Image):
        raise TypeError(f"{caller}: image must be a Pillow image, a path or a tensor, got {type(image).__name__}")
    image = as_rgb(image)
    scale = min(1.0, image_size / max(image.size))
    size = fixed or tuple(max(1, round(side * scale)) for side in image.size)
    if size != image.size:
        image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
    mean, std = colours
    return ((pixels - mean) / std)[None]


def _restore_photograph(x: Tensor, colours: Sequence[Tensor]) -> Tensor:
    """Return the picture (H, W, 3) in [0, 1] of a tensor (C, H, W); if its channels are not colours, their mean in grey."""
    x = x.float().cpu()
    if len(x) == 3:
        mean, std = colours
        return (x * std + mean).clamp(0, 1).permute(1, 2, 0)
    grey = x.mean(0)
    grey = (grey - grey.min()) / (grey.max() - grey.min()).clamp_min(torch.finfo(grey.dtype).tiny)
    return grey[:, :, None].expand(-1, -1, 3)


@contextmanager
def _record_blocks(blocks: Mapping[str, Block]) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Record weights (K, h, w) and gates (C,) by the block's name, while the model runs.

    The hooks sit on the children of a block, because EncodingModule calls methods of the block and never the block itself. The gate
    function is applied to the output of the linear layer, because a hook on the gate would disable the fused product.
    """
    weights: dict[str, Tensor] = {}
    gates: dict[str, Tensor] = {}

    def record_weights(name: str, encoding: Any, inputs: tuple[Tensor, ...]) -> None:
        weights[name] = assign(inputs[0], encoding.codewords, encoding.smoothing)[0].cpu()

    def record_gate(name: str, gate: nn.Module, _: nn.Module, __: tuple[Tensor, ...], logits: Tensor) -> None:
        gates[name] = gate(logits.clone())[0].float().cpu()  # a clone: the gate may work in place

    with ExitStack() as stack:
        for name, block in blocks.items():
            encoding = block.encoding if isinstance(block, ContextEncoding) else block
            stack.enter_context(encoding.register_forward_pre_hook(partial(record_weights, name)))
            if isinstance(block, ContextEncoding):
                stack.enter_context(block.fc.register_forward_hook(partial(record_gate, name, block.gate)))
        yield weights, gates
