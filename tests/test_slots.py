"""Every kind of slot that SE blocks sit in, once for real: what is found on the meta device must also train."""

from collections import Counter

import pytest
import timm
import torch
from torch import nn

import ctxenc
from tests.se_models import rows, short

SIZE = 64
SLOTS = rows("se_slots.csv")
TOLD_THEIR_SIZE = ("coatnet_bn_0_rw_224", "gcvit_xxtiny", "test_coatnet")  # their attention is made for one map size


def _build(name: str) -> nn.Module:
    model = timm.create_model(name, **({"img_size": SIZE} if name in TOLD_THEIR_SIZE else {}))
    # Many networks start branches at zero, where no gate has an effect.
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.uniform_(0.1, 0.5)
    return model


def _slots(model: nn.Module) -> dict[tuple[str, str, str], ctxenc.ContextEncoding]:
    """A block for each kind of slot in a patched model."""
    slots = {}
    for block in ctxenc.find_context_blocks(model):
        path, _, attribute = block.name.rpartition(".")
        parent = type(model.get_submodule(path))
        kind = (
            short(block.replaced.class_name),
            f"{parent.__module__}.{parent.__qualname__}".removeprefix("timm."),
            attribute,
        )
        slots[kind] = model.get_submodule(block.name)
    return slots


def _with_gate(model: nn.Module, block: ctxenc.ContextEncoding, x: torch.Tensor, bias: float) -> torch.Tensor:
    with torch.no_grad():
        block.fc.weight.zero_()
        block.fc.bias.fill_(bias)
        return model.eval()(x)


def test_the_list_is_whole() -> None:
    assert len(SLOTS) == 43


@pytest.mark.parametrize("name", dict.fromkeys(slot["smallest_model"] for slot in SLOTS))
def test_blocks_in_these_slots_work(name: str) -> None:
    torch.manual_seed(0)
    model = ctxenc.patch_se_blocks(_build(name))
    blocks = [block.name for block in ctxenc.find_context_blocks(model)]
    slots = _slots(model)
    assert slots.keys() >= {(row["class"], row["parent"], row["attribute"]) for row in SLOTS if name in row.values()}

    calls: Counter[str] = Counter()
    for block in blocks:
        model.get_submodule(block).register_forward_hook(lambda *_, block=block: calls.update([block]))
    x = torch.randn(2, 3, SIZE, SIZE)
    y = model.train()(x)
    assert calls == dict.fromkeys(blocks, 1)

    (y * torch.randn_like(y)).sum().backward()
    for block in blocks:
        for parameter_name, parameter in model.get_submodule(block).named_parameters():
            assert parameter.grad is not None, f"{block}.{parameter_name}"
            assert parameter.grad.isfinite().all(), f"{block}.{parameter_name}"
            assert parameter.grad.any(), f"{block}.{parameter_name}"

    for kind, block in slots.items():
        assert not torch.allclose(_with_gate(model, block, x, 4), _with_gate(model, block, x, -4)), kind
