"""SE blocks of other libraries than timm and torchvision: those of segmentation_models_pytorch, and classes of a user's own."""

import copy
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from segmentation_models_pytorch.encoders._efficientnet import MBConvBlock
from segmentation_models_pytorch.encoders._senet import SEModule
from segmentation_models_pytorch.encoders.mobileone import SEBlock
from torch import Tensor, nn

import ctxenc
from ctxenc import (
    ContextEncoding,
    calibrate,
    find_context_blocks,
    find_se_blocks,
    patch_se_blocks,
    restore_se_blocks,
)
from ctxenc.swap import calibration, se_classes
from tests.toys import Toy, X


class SELayer(nn.Module):
    """As in senet.pytorch: one Sequential."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        middle = channels // reduction
        self.fc = nn.Sequential(nn.Linear(channels, middle), nn.ReLU(), nn.Linear(middle, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class HardSE(nn.Module):
    """Its layers are in an odd order, and its gate is another function."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Hardsigmoid()
        self.up = nn.Conv2d(8, channels, 1)
        self.down = nn.Conv2d(channels, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale(self.up(self.down(x.mean((2, 3), keepdim=True)).relu()))


class LastSE(nn.Module):
    """For maps whose channels come last, without a reduction."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.layer(x.mean((1, 2), keepdim=True)).sigmoid()


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Any:
    """register_se_class, taken back at the end."""
    monkeypatch.setattr(se_classes, "_SE_CLASSES", dict(se_classes._SE_CLASSES))
    return ctxenc.register_se_class


@pytest.mark.parametrize(("name", "kind"), [("se_resnet50", SEModule), ("mobileone_s4", SEBlock)])
def test_encoders_of_smp(name: str, kind: type[nn.Module]) -> None:
    model, x = smp.Unet(name, encoder_weights=None).eval(), torch.randn(1, 3, 64, 64)
    count = sum(isinstance(module, kind) for module in model.modules())
    keys, before = list(model.state_dict()), model(x)
    found = find_se_blocks(model)
    assert len(found) == count > 0
    assert {(block.gate, block.rd_channels == block.channels // 16) for block in found} == {("Sigmoid", True)}
    patch_se_blocks(model)
    assert model(x).isfinite().all()
    restore_se_blocks(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), before)


def test_a_class_by_one_line(register: Any) -> None:
    model = Toy(SELayer(32))
    with pytest.raises(
        ValueError, match=r"Toy with 1 SELayer, which may be SE: ctxenc\.register_se_class makes a class known; "
    ):
        patch_se_blocks(model)
    register(SELayer)
    (found,) = find_se_blocks(model)
    assert (found.channels, found.rd_channels, found.gate, found.layout) == (32, 8, "Sigmoid", "NCHW")
    patch_se_blocks(model)
    assert find_context_blocks(model)[0].rd_channels == 8
    assert model(X).isfinite().all()
    assert isinstance(restore_se_blocks(model).se, SELayer)


def test_what_the_line_may_say(register: Any) -> None:
    register(HardSE, first="down", gate="scale")
    register(LastSE, reduces=False, layout="NHWC")
    model = Toy(HardSE(64), last=LastSE(64))
    first, last = find_se_blocks(model)
    assert (first.channels, first.rd_channels, first.gate) == (64, 8, "Hardsigmoid")
    assert (last.channels, last.rd_channels, last.layout) == (64, None, "NHWC")
    patch_se_blocks(model)
    assert isinstance(model.se.gate, nn.Hardsigmoid)
    assert model.last(torch.randn(2, 5, 5, 64)).shape == (2, 5, 5, 64)


def test_subclasses_are_known_too(register: Any) -> None:
    register(SELayer)
    assert len(find_se_blocks(Toy(type("Own", (SELayer,), {})(32)))) == 1


KINDS = {"module": lambda: SEModule(32, 4), "function": lambda: SEBlock(32, 1 / 4), "registered": lambda: SELayer(32)}


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    se = KINDS[kind]()
    for layer in se.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and len(layer.weight) == 32:
            nn.init.normal_(layer.weight, std=2)  # gates that matter
    parts = nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), se, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)
    return nn.Sequential(*parts).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_calibrated(register: Any, kind: str) -> None:
    register(SELayer)
    network = make(kind)
    images = torch.randn(200, 3, 12, 12) + 2 * torch.randn(200, 3, 1, 1)
    for like in (None, network):
        model = patch_se_blocks(copy.deepcopy(network))
        report = calibrate(model, images.split(50), like=like, progress=False)
        assert report.blocks[0].gate_r2 > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_gates(register: Any, kind: str) -> None:
    """They are the input of the gate. Without a module for the gate, they are the output of the last layer."""
    register(SELayer)
    network, images = make(kind), torch.randn(40, 3, 12, 12)
    gates: list[Tensor] = []
    network[2].register_forward_hook(lambda _, args, out: gates.append((out / args[0].clamp(min=1e-6)).amax((2, 3))))
    with torch.no_grad():
        network(images)
        model = patch_se_blocks(copy.deepcopy(network))
        places = calibration._find_places(model, None, "random")
        logits = calibration._record_original_logits(model, None, places, [images])["2"]
    torch.testing.assert_close(logits.sigmoid(), gates[0], atol=1e-5, rtol=1e-5)


def test_blocks_that_squeeze_by_themselves_are_named() -> None:
    model = smp.Unet("efficientnet-b0", encoder_weights=None)
    count = sum(isinstance(module, MBConvBlock) for module in model.modules())
    with pytest.raises(ValueError, match=f"got Unet with {count} MBConvBlock, whose own forward squeezes: ") as told:
        patch_se_blocks(model)
    assert str(told.value).endswith("; looked for the SE classes of timm, torchvision and segmentation_models_pytorch")


def test_the_innermost_class_is_named() -> None:
    unit = type("SEUnit", (nn.Sequential,), {"__module__": __name__})(nn.Conv2d(3, 32, 1), SELayer(32))
    other = type("BASELayer", (nn.Conv2d,), {"__module__": __name__})(3, 3, 1)
    assert se_classes._count_lookalikes(list(nn.Sequential(unit, unit[1], other).modules())) == ("1 SELayer", "")


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_nothing_else_looks_like_it(name: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(timm.create_model(name), nn.SELU(), nn.MSELoss())
    assert se_classes._count_lookalikes(list(model.modules())) == ("", "")


@pytest.mark.parametrize(
    ("cls", "settings", "error", "text"),
    [
        (nn.Linear(1, 1), {}, TypeError, r"cls must be a subclass of torch.nn.Module, got Linear\("),
        (int, {}, TypeError, "cls must be a subclass of torch.nn.Module, got <class 'int'>"),
        (nn.Sequential, {}, ValueError, "cls must be a class of SE blocks, got torch.nn.modules.container.Sequential"),
        (SELayer, {"first": nn.Linear}, TypeError, "first must be the name of a module, got "),
        (SELayer, {"gate": None}, TypeError, "gate must be the name of a module, got None"),
        (SELayer, {"layout": "CHW"}, ValueError, "layout must be NCHW or NHWC, got 'CHW'"),
        (SELayer, {"reduces": "no"}, TypeError, "reduces must be True or False, got 'no'"),
        (ContextEncoding, {}, ValueError, "cls must be a class of SE blocks, got ctxenc.context.ContextEncoding"),
    ],
)
def test_what_cannot_be_registered(register: Any, cls: Any, settings: Any, error: type[Exception], text: str) -> None:
    known = dict(se_classes._SE_CLASSES)
    with pytest.raises(error, match=f"register_se_class: {text}"):
        register(cls, **settings)
    assert known == se_classes._SE_CLASSES


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"first": "fc.1"},
            "first must name a convolution or linear layer of the 32 channels of SELayer, got 'fc.1', no such layer",
        ),
        (
            {"first": "fc.2"},
            "first must name a convolution or linear layer of the 32 channels of SELayer, got 'fc.2', one of 8",
        ),
        ({"gate": "fc.0"}, "gate must name an activation of SELayer, got 'fc.0' with layers"),
    ],
)
def test_a_part_of_another_kind_is_named(register: Any, settings: Any, text: str) -> None:
    register(SELayer, **settings)
    with pytest.raises(ValueError, match=f"^register_se_class: {text}$"):
        patch_se_blocks(Toy(SELayer(32)))


@pytest.mark.parametrize("part", ["first", "gate"])
def test_a_part_that_the_class_lacks_is_named(register: Any, part: str) -> None:
    register(SELayer, **{part: "fc.9"})
    with pytest.raises(ValueError, match=r"register_se_class: SELayer must have a module fc\.9, got none"):
        find_se_blocks(Toy(SELayer(32)))
