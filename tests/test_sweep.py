"""Every timm and torchvision network with SE blocks: found, patched, of the same output, and restored, on the meta device."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from packaging.version import Version
from timm.models import is_model
from torch import Tensor, nn
from torchvision.models.regnet import BlockParams

import ctxenc
from tests.se_models import rows, short

pytestmark = pytest.mark.sweep

TIMM, OTHER = rows("timm_se_blocks.csv"), rows("timm_other_channel_attention.csv")
TORCHVISION = rows("torchvision_se_blocks.csv")
UNREDUCED = ("layers.EffectiveSEModule", "hgnet.EseModule")  # one layer, from C to C


def _cases(listed: list[dict[str, str]], known: Callable[[str], bool]) -> list[Any]:
    """A test case for each of the networks that the installed version knows."""
    return [pytest.param(row, id=row["model"]) for row in listed if known(row["model"])]


def _known_to_torchvision(name: str) -> bool:
    return name in torchvision.models.list_models()


def _detects(name: str) -> bool:
    return name.startswith(("fasterrcnn", "ssd"))


def test_the_lists_are_whole() -> None:
    assert (len(TIMM), len(OTHER), len(TORCHVISION)) == (353, 41, 28)
    missing = [row["model"] for row in TIMM + OTHER if not is_model(row["model"])]
    assert not missing or Version(timm.__version__) < Version("1.0.31")
    assert all(_known_to_torchvision(row["model"]) for row in TORCHVISION)


def _shapes(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.shape
    if isinstance(output, dict):
        return {key: _shapes(value) for key, value in output.items()}
    return [_shapes(value) for value in output]


@torch.no_grad()
def _check_swap(model: nn.Module, row: dict[str, str], shapes: Callable[[], Any]) -> None:
    found = ctxenc.find_se_blocks(model)
    channels = [block.channels for block in found]
    assert (len(found), min(channels), max(channels)) == tuple(int(row[key]) for key in ("count", "min_ch", "max_ch"))
    keys, before = list(model.state_dict()), shapes()

    assert ctxenc.patch_se_blocks(model) is model
    assert [block.replaced for block in ctxenc.find_context_blocks(model)] == found
    assert ctxenc.find_se_blocks(model) == []
    assert shapes() == before

    ctxenc.restore_se_blocks(model)
    assert ctxenc.find_se_blocks(model) == found
    assert ctxenc.find_context_blocks(model) == []
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("row", _cases(TIMM, is_model))
def test_timm(row: dict[str, str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(row["model"]).eval()
        x = torch.empty(1, *model.pretrained_cfg["input_size"])
    blocks = ctxenc.find_se_blocks(model)
    assert {short(block.class_name) for block in blocks} == {row["class"]}
    assert {block.rd_channels is None for block in blocks} == {row["class"] in UNREDUCED}
    _check_swap(model, row, lambda: _shapes(model(x)))


@pytest.mark.parametrize("row", _cases(OTHER, is_model))
def test_other_attention_is_left_alone(row: dict[str, str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(row["model"])
    modules = dict(model.named_modules())
    assert ctxenc.find_se_blocks(model) == []
    with pytest.raises(
        ValueError, match=rf"must have SE blocks, got \w+ with {row['count']} {row['class'].split('.')[-1]}"
    ):
        ctxenc.patch_se_blocks(model)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("row", _cases(TORCHVISION, _known_to_torchvision))
def test_torchvision(row: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    # RegNet's widths are computed with tensors, which must have values.
    widths = BlockParams.from_init_params

    def from_init_params(**kwargs: Any) -> BlockParams:
        with torch.device("cpu"):
            return widths(**kwargs)

    monkeypatch.setattr(BlockParams, "from_init_params", from_init_params)
    name = row["model"]
    settings = {"weights_backbone": None} if _detects(name) or name.startswith(("deeplab", "lraspp")) else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **settings).eval()
        x = torch.empty(1, 3, 224, 224)
    assert {block.class_name.split(".")[-1] for block in ctxenc.find_se_blocks(model)} == {row["class"]}
    # How many objects are detected depends on values, which no meta tensor has; the maps in which they are sought do not.
    network = model.backbone if _detects(name) else model
    _check_swap(model, row, lambda: _shapes(network(x)))


@pytest.mark.parametrize("name", [row["model"] for row in TORCHVISION if _detects(row["model"])])
def test_detection_with_values(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None).eval()
    ctxenc.patch_se_blocks(model)
    blocks, calls = [block.name for block in ctxenc.find_context_blocks(model)], []
    for block in blocks:
        model.get_submodule(block).register_forward_hook(lambda *_, block=block: calls.append(block))
    with torch.no_grad():
        detected = model([torch.rand(3, 64, 64)])[0]
    assert detected["boxes"].shape[1:] == (4,)
    assert calls == blocks
