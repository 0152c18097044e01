"""The swap: find Squeeze-and-Excitation blocks in a model, replace them by ContextEncoding blocks, and undo it.

The undo records live outside the model, keyed weakly by the new block: they are in no state_dict, parameter list or pickle.
"""

import copy
import logging
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from ctxenc.context import POOLS, ContextEncoding
from ctxenc.encoding import (
    AGGREGATIONS,
    STARTS,
    check_choice,
    check_ratio,
    check_sizes,
    check_smoothing,
    reduce_channels,
)
from ctxenc.swap.se_classes import (
    SEBlock,
    check_model,
    describe_contents,
    find_empty_slots,
    find_first_layer,
    find_gate,
    find_se_blocks,
    iterate_blocks,
)

_logger = logging.getLogger(__name__)

__all__ = ["ContextBlock", "SEBlock", "find_context_blocks", "find_se_blocks", "patch_se_blocks", "restore_se_blocks"]

FilterFn = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class ContextBlock:
    """Describe a ContextEncoding block that patch_se_blocks put into a model.

    Attributes:
        name: qualified name in the model.
        replaced: the block that it replaced.
        num_codes: K.
        rd_channels: C'.
        smoothing: "learned", "sampled" or the fixed factor.
        pool: "mean" or "concat".
        aggregation: "mean" or "sum".
        max_size: limit for the size of the projected map, or None.
        start: start of the codebook, "paper" or "spread".
    """

    name: str
    replaced: SEBlock
    num_codes: int
    rd_channels: int
    smoothing: str | float
    pool: str
    aggregation: str
    max_size: int | None
    start: str


@dataclass(frozen=True)
class _Replaced:
    """Remember the replaced block and the requested ratio, in copies and pickles too."""

    block: SEBlock
    rd_ratio: float | None


def find_context_blocks(model: nn.Module) -> list[ContextBlock]:
    """List the blocks that patch_se_blocks put into a model, and the blocks that they replaced; copied and unpickled models
    work too.

    Args:
        model: any module.

    Returns:
        One record per block, in the order of the model's modules.
    """
    check_model("find_context_blocks", model)
    return [
        ContextBlock(
            name,
            replace(
                block.replaced.block, name=name
            ),  # if only a part of the model was patched, the name at that time is not the name here
            block.num_codes,
            block.rd_channels,
            block.smoothing,
            block.pool,
            block.aggregation,
            block.max_size,
            block.start,
        )
        for name, block in _iterate_blocks(model)
    ]


def _iterate_blocks(model: nn.Module) -> Iterator[tuple[str, ContextEncoding]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ContextEncoding) and module.replaced is not None:
            yield name, module


# The module that a patched block replaced (None: the slot was empty), while that very block lives.
_originals: "weakref.WeakKeyDictionary[ContextEncoding, nn.Module | None]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Swap:
    """Hold the settings of a swap."""

    num_codes: int
    smoothing: str | float
    rd_ratio: float | None
    pool: str
    aggregation: str
    max_size: int | None
    start: str

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))

    @classmethod
    def of(cls, block: ContextEncoding) -> "_Swap":
        rd_ratio = block.replaced.rd_ratio
        sizes = block.aggregation, block.max_size
        return cls(block.num_codes, block.smoothing, rd_ratio, block.pool, *sizes, block.start)

    def build(self, found: SEBlock, source: nn.Module) -> ContextEncoding:
        """Build the block for `found`, with the device, dtype and modes of `source`, the SE block or convolution."""
        gate, weight = find_gate(source), next(source.parameters())
        rd_channels = found.rd_channels if self.rd_ratio is None else None
        if rd_channels is None:
            rd_channels = reduce_channels(
                found.channels, 1 / 16 if self.rd_ratio is None else self.rd_ratio, rd_divisor=8
            )
        block = ContextEncoding(
            found.channels,
            self.num_codes,
            rd_channels=rd_channels,
            smoothing=self.smoothing,
            pool=self.pool,
            aggregation=self.aggregation,
            max_size=self.max_size,
            start=self.start,
            gate_layer="sigmoid" if gate is None else copy.deepcopy(gate),
            channels_last=found.layout == "NHWC",
            device=weight.device,
            dtype=weight.dtype,
        )
        block.replaced = _Replaced(found, self.rd_ratio)
        if weight.dim() == 4 and weight.stride(1) == 1 and weight.stride(3) == weight.shape[1] > 1:
            block.to(memory_format=torch.channels_last)
        block.requires_grad_(any(parameter.requires_grad for parameter in source.parameters()))
        return block.train(source.training)


def patch_se_blocks(
    model: nn.Module,
    *,
    num_codes: int = 16,
    smoothing: str | float = "learned",
    rd_ratio: float | None = None,
    pool: str = "mean",
    aggregation: str = "mean",
    max_size: int | None = None,
    start: str = "paper",
    filter_fn: FilterFn | None = None,
    fill_empty: bool = False,
) -> nn.Module:
    """Replace a model's SE blocks by ContextEncoding blocks.

    The model is changed in place, wholly or not at all. Each new block takes device, dtype, train or eval mode, requires_grad,
    memory format, gate function and layout (NCHW or NHWC) from the block that it replaces. Load the weights of the SE network
    before patching. Patch first, then wrap (DDP, FSDP, compile), then make the optimizer and the EMA: anything created earlier
    does not see the new parameters. `model.no_weight_decay()` then also names the codewords and smoothing, and timm's
    optimizers do not decay them. They query only the top-level model, so pass the whole network, and choose a part of it by
    filter_fn.

    Args:
        model: a model with SE blocks of a class known to find_se_blocks.
        num_codes: K, codewords per block.
        smoothing: "learned", "sampled" or a positive number; see Encoding.
        rd_ratio: C' / C, rounded to a multiple of 8. By default C' is the reduced width of the SE block (C / 16 if it does not
            reduce).
        pool: "mean" or "concat"; see ContextEncoding.
        aggregation: "mean" or "sum"; see ContextEncoding.
        max_size: average-pool larger maps to max_size x max_size at most before they are projected.
        start: start of the codebook, "paper" or "spread"; see ContextEncoding.
        filter_fn: takes the name and module of each block and returns whether to replace it; for an empty slot it takes the
            name of the slot and the convolution before it. Patch stages with different settings one after the other.
        fill_empty: also fill the empty slots of plain timm ResNets.

    Returns:
        The model.

    Raises:
        ValueError: the model has nothing to patch (the text says what it has), is wrapped, or is an SE block itself; blocks
            already in place are chosen again with other settings; or a setting is invalid.
        TypeError: model is not a module, or a setting has the wrong type.
    """
    swap = _Swap(num_codes, smoothing, rd_ratio, pool, aggregation, max_size, start)
    _check(model, swap)
    swap = replace(swap, smoothing=smoothing if isinstance(smoothing, str) else float(smoothing))
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"patch_se_blocks: filter_fn must be a function, got {filter_fn!r}")
    found = list(iterate_blocks(model)) + (list(find_empty_slots(model)) if fill_empty else [])
    chosen = [(block, source) for block, source in found if filter_fn is None or filter_fn(block.name, source)]
    alike = 0
    for name, block in _iterate_blocks(model):
        if _Swap.of(block) == swap:
            alike += 1
        elif filter_fn is None or filter_fn(name, _originals.get(block) or block):
            raise ValueError(
                f"patch_se_blocks: settings must be those of the blocks in place, {name} has {_Swap.of(block)}, got {swap};"
                " call restore_se_blocks first, or leave them out by filter_fn"
            )
    if not chosen:
        if alike:
            _logger.info("patch_se_blocks: nothing to do, %d blocks have been patched with these settings", alike)
            return model
        raise ValueError(f"patch_se_blocks: model must have SE blocks, got {describe_contents(model, bool(found))}")
    _replace(model, chosen, swap)
    return model


def _check(model: nn.Module, swap: _Swap) -> None:
    check_model("patch_se_blocks", model)
    if wrapper := _find_wrapper(model):
        raise ValueError(f"patch_se_blocks: model must not be wrapped yet, got {wrapper}: patch first, then wrap it")
    if find_first_layer(model) is not None:
        raise ValueError(
            f"patch_se_blocks: model must hold SE blocks, got one itself, {type(model).__name__}; use ContextEncoding"
        )
    check_smoothing(swap.smoothing, "patch_se_blocks")
    check_choice("patch_se_blocks", AGGREGATIONS, aggregation=swap.aggregation)
    check_choice("patch_se_blocks", STARTS, start=swap.start)
    check_choice("patch_se_blocks", POOLS, pool=swap.pool)
    check_sizes("patch_se_blocks", num_codes=swap.num_codes)
    if swap.max_size is not None:
        check_sizes("patch_se_blocks", max_size=swap.max_size)
    if swap.rd_ratio is not None:
        check_ratio("patch_se_blocks", swap.rd_ratio)


def _find_wrapper(model: nn.Module) -> str | None:
    """Return the wrapper of the model or of a part of it: wrappers hold on to parameters or graphs made earlier."""
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in (
                "DistributedDataParallel",
                "DataParallel",
                "FullyShardedDataParallel",
                "FSDPModule",
                "OptimizedModule",
            ):
                return f"{cls.__name__}{' at ' + name if name else ''}"
        if module._compiled_call_impl is not None:
            return f"a module compiled in place{' at ' + name if name else ''}"
    return None


def _replace(model: nn.Module, chosen: Collection[tuple[SEBlock, nn.Module]], swap: _Swap) -> None:
    # A module with two names gets one block under both. An empty slot has no module to share.
    blocks = {id(source): swap.build(found, source) for found, source in chosen}
    before = sum(parameter.numel() for parameter in model.parameters())
    _exclude_from_decay(model, [found.name for found, _ in chosen])
    try:
        _exchange(model, [(found.name, blocks[id(source)]) for found, source in chosen])
    except BaseException:
        _restore_decay(model)
        raise
    for _, source in chosen:
        _originals[blocks[id(source)]] = source if find_first_layer(source) is not None else None
    after = sum(parameter.numel() for parameter in model.parameters())
    if frozen := sum(not block.fc.weight.requires_grad for block in blocks.values()):
        _logger.warning(
            "patch_se_blocks: %d new blocks do not train, as what they replaced did not, and start at random", frozen
        )
    _logger.info("patch_se_blocks: %d blocks replaced, %s, parameters %d -> %d", len(chosen), swap, before, after)


def _exchange(model: nn.Module, modules: Collection[tuple[str, nn.Module | None]]) -> None:
    """Set all of these modules under their names; after an error restore every one."""
    done: list[tuple[nn.Module, str, nn.Module | None]] = []
    try:
        for name, module in modules:
            path, _, attribute = name.rpartition(".")
            owner = model.get_submodule(path)
            done.append((owner, attribute, getattr(owner, attribute)))
            _put(owner, attribute, module)
    except BaseException:
        for owner, attribute, module in reversed(done):
            _put(owner, attribute, module)
        raise


def _put(owner: nn.Module, attribute: str, module: nn.Module | None) -> None:
    if getattr(owner, attribute) is module:
        return
    if module is None:  # an empty slot is a plain attribute; setattr would turn it into an empty module entry
        delattr(owner, attribute)
    setattr(owner, attribute, module)


def restore_se_blocks(model: nn.Module) -> nn.Module:
    """Restore the SE blocks that patch_se_blocks replaced, with their values at that time.

    The model is changed in place, wholly or not at all. The SE blocks take the present device, dtype and train or eval mode of
    the blocks that they replace. A model that was never patched stays as it is.

    Args:
        model: a model that patch_se_blocks has patched; not a copy of one.

    Returns:
        The model.

    Raises:
        RuntimeError: a block has no undo record, because the model was copied or unpickled after patching; or the SE blocks
            were replaced on the meta device, where they have no values, and the model has left it.
    """
    check_model("restore_se_blocks", model)
    patched = list(_iterate_blocks(model))
    for name, block in patched:
        if block not in _originals:
            raise RuntimeError(
                f"restore_se_blocks: no undo record for {name}: the model was copied or unpickled after patching"
            )
        original, device = _originals[block], block.encoding.codewords.device
        if original is not None and device.type != "meta" and any(tensor.is_meta for tensor in original.parameters()):
            raise RuntimeError(
                f"restore_se_blocks: the SE block of {name} was on the meta device and has no values, got {device}"
            )
    for _, block in patched:
        if (original := _originals[block]) is not None:
            codewords = block.encoding.codewords
            original.to(device=codewords.device, dtype=codewords.dtype).train(block.training)
    _exchange(model, [(name, _originals[block]) for name, block in patched])
    for module in model.modules():
        while isinstance(vars(module).get("no_weight_decay"), _NoWeightDecay):
            _restore_decay(module)
    return model


class _NoWeightDecay:
    """Name the parameters without weight decay for timm: the model's own and the new blocks'. A class, so that it can be
    pickled.
    """

    def __init__(self, names: Collection[str], before: Any) -> None:
        self.names = frozenset(names)
        self.before = before  # the model's own attribute of this name, besides its class's method

    def __call__(self) -> set[str]:
        return set(self.names)


def _exclude_from_decay(model: nn.Module, new_blocks: Collection[str]) -> None:
    before = vars(model).get("no_weight_decay")
    names_before = model.no_weight_decay() if callable(getattr(model, "no_weight_decay", None)) else ()  # type: ignore[operator]
    blocks = {name for name, _ in _iterate_blocks(model)} | set(new_blocks)
    new_names = {f"{name}.encoding.{parameter}" for name in blocks for parameter in ("codewords", "smoothing")}
    model.no_weight_decay = _NoWeightDecay(set(names_before) | new_names, before)  # type: ignore[assignment]


def _restore_decay(model: nn.Module) -> None:
    before = vars(model)["no_weight_decay"].before
    del model.no_weight_decay
    if before is not None:
        model.no_weight_decay = before
