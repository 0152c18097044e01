"""The swap: what it finds, keeps and changes. What it refuses: test_refusals.py; the way back: test_restoring.py."""

import logging
import pickle
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import EffectiveSEModule, SEModule
from timm.layers.squeeze_excite import SqueezeExciteCl
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.hgnet import EseModule
from torch import nn

import ctxenc
from ctxenc import find_context_blocks, find_se_blocks, patch_se_blocks, restore_se_blocks
from tests.toys import Stubborn, Toy, X, assert_same, snapshot

# What is found


def test_found_blocks_are_described(net: nn.Module) -> None:
    found = find_se_blocks(net)
    assert [block.name for block in found] == ["blocks.3.0.se", "blocks.4.0.se"]
    assert {block.class_name for block in found} == {"timm.models._efficientnet_blocks.SqueezeExcite"}
    assert {(block.gate, block.layout) for block in found} == {("Sigmoid", "NCHW")}
    for block in found:
        se = net.get_submodule(block.name)
        assert (block.channels, block.rd_channels) == (se.conv_reduce.in_channels, se.conv_reduce.out_channels)


def test_found_blocks_without_reduction_and_with_other_layouts() -> None:
    effective, last = find_se_blocks(Toy(EffectiveSEModule(32), last=SqueezeExciteCl(32)))
    assert (effective.rd_channels, effective.gate, effective.layout) == (None, "Hardsigmoid", "NCHW")
    assert (last.rd_channels, last.gate, last.layout) == (8, "Sigmoid", "NHWC")
    assert find_se_blocks(nn.Linear(2, 2)) == []


def test_context_blocks_tell_what_was_replaced(net: nn.Module) -> None:
    found = find_se_blocks(net)
    assert find_context_blocks(net) == []
    patch_se_blocks(net, num_codes=5, smoothing=0.5, pool="concat")
    blocks = find_context_blocks(net)
    assert [block.replaced for block in blocks] == found
    assert [block.name for block in blocks] == [block.name for block in found]
    for block in blocks:
        assert (block.num_codes, block.smoothing, block.pool) == (5, 0.5, "concat")
        assert block.rd_channels == block.replaced.rd_channels
    assert find_context_blocks(pickle.loads(pickle.dumps(net))) == blocks


@pytest.mark.parametrize(("rd_ratio", "rd_channels"), [(None, 8), (1 / 4, 16), (1 / 64, 8)])
def test_reduction(rd_ratio: float | None, rd_channels: int) -> None:
    model = patch_se_blocks(Toy(SEModule(64, rd_channels=8)), rd_ratio=rd_ratio)
    assert model.se.rd_channels == model.se.conv.out_channels == rd_channels


@pytest.mark.parametrize("kind", [EffectiveSEModule, EseModule])
def test_reduction_of_blocks_without_one(kind: type[nn.Module]) -> None:
    model = Toy(kind(512))
    assert find_se_blocks(model)[0].rd_channels is None
    assert patch_se_blocks(model).se.rd_channels == 32


# What a swap keeps


def test_device_dtype_and_modes_are_kept() -> None:
    model = Toy(frozen=SEModule(16).requires_grad_(False), twice=SEModule(16).double(), nowhere=SEModule(16).to("meta"))
    model.se.eval()
    assert patch_se_blocks(model) is model
    assert not model.se.training
    assert all(not module.training for module in model.se.modules())
    assert all(module.training for module in model.frozen.modules())
    assert not any(parameter.requires_grad for parameter in model.frozen.parameters())
    assert all(parameter.requires_grad for parameter in model.se.parameters())
    assert {parameter.dtype for parameter in model.twice.parameters()} == {torch.float64}
    assert {parameter.dtype for parameter in model.se.parameters()} == {torch.float32}
    assert {parameter.device.type for parameter in model.nowhere.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in model.se.parameters()} == {"cpu"}


@pytest.mark.parametrize("frozen", ["fc1", "fc2"])
def test_a_block_that_trains_in_part_trains(frozen: str) -> None:
    model = Toy()
    getattr(model.se, frozen).requires_grad_(False)
    assert all(parameter.requires_grad for parameter in patch_se_blocks(model).se.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_networks_stay_half(dtype: torch.dtype) -> None:
    model = patch_se_blocks(Toy().to(dtype))
    assert model.se.encoding.codewords.dtype == model.se.fc.weight.dtype == dtype
    assert model.eval()(X.to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", ["test_efficientnet", "resnet10t"])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_format_is_kept(name: str, memory_format: torch.memory_format) -> None:
    model = timm.create_model(name).to(memory_format=memory_format)
    patch_se_blocks(model, fill_empty=name == "resnet10t")
    for block in find_context_blocks(model):
        weight = model.get_submodule(block.name).conv.weight
        expected = torch.empty_like(weight, memory_format=memory_format)
        assert weight.stride() == expected.stride()


@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid", "tanh"])
def test_gate_function_is_kept(gate: str) -> None:
    model = Toy(SEModule(32, gate_layer=gate))
    before = model.se.gate
    patch_se_blocks(model)
    assert type(model.se.gate) is type(before)
    assert model.se.gate is not before
    x = torch.linspace(-4, 4, 9)
    assert torch.equal(model.se.gate(x.clone()), before(x.clone()))


def test_channels_last_layout_is_kept() -> None:
    torch.manual_seed(0)
    last = Toy(SqueezeExciteCl(32, rd_channels=8))
    last.conv = nn.Linear(3, 32)
    x = torch.randn(2, 5, 7, 3)
    patch_se_blocks(last)
    y = last.eval()(x)
    assert y.shape == (2, 5, 7, 32)

    first = patch_se_blocks(Toy()).se.eval()
    first.load_state_dict(last.se.state_dict())
    torch.testing.assert_close(y, first(last.conv(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def test_weights_of_the_rest_are_kept(net: nn.Module) -> None:
    names = {block.name for block in find_se_blocks(net)}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    patch_se_blocks(net)
    after = net.state_dict()
    rest = [name for name in before if not any(name.startswith(block) for block in names)]
    assert rest == [name for name in after if not any(name.startswith(block) for block in names)]
    assert all(torch.equal(after[name], before[name]) for name in rest)


def test_weights_load_into_a_fresh_swap(net: nn.Module) -> None:
    patch_se_blocks(net)
    fresh = patch_se_blocks(timm.create_model("test_efficientnet")).eval()
    assert not torch.equal(fresh(X), net(X))
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(X), net(X))


def test_shared_block_stays_shared() -> None:
    model = Toy()
    model.again = model.se
    original = model.se
    patch_se_blocks(model)
    assert model.again is model.se
    assert isinstance(model.se, ctxenc.ContextEncoding)
    assert [(block.name, block.replaced.name) for block in find_context_blocks(model)] == [
        ("se", "se"),
        ("again", "again"),
    ]
    restore_se_blocks(model)
    assert model.again is model.se is original


@pytest.mark.parametrize("build", [torchvision.models, torchvision.models.quantization])
def test_torchvision(build: Any) -> None:
    name = "mobilenet_v3_small" if build is torchvision.models else "mobilenet_v3_large"
    model = getattr(build, name)(weights=None).eval()
    count = len(find_se_blocks(model))
    assert count == (9 if name == "mobilenet_v3_small" else 8)
    patch_se_blocks(model)
    assert {type(model.get_submodule(block.name).gate) for block in find_context_blocks(model)} == {nn.Hardsigmoid}
    assert len(find_context_blocks(model)) == count
    assert model(X).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*deprecated:DeprecationWarning")
def test_fused_blocks_are_found_and_quantized_ones_named() -> None:
    model = torchvision.models.quantization.mobilenet_v3_large(weights=None).eval()
    found = find_se_blocks(model)
    model.fuse_model()
    assert find_se_blocks(model) == found
    for block in found:  # as conversion does: a first layer that holds packed integers, no float weight
        model.get_submodule(block.name).fc1 = nn.Identity()
    assert find_se_blocks(model) == []
    with pytest.raises(ValueError, match="with 8 quantized SE blocks; patch before that"):
        patch_se_blocks(model)


def test_one_line_is_logged(net: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    before = sum(parameter.numel() for parameter in net.parameters())
    with caplog.at_level(logging.INFO, logger="ctxenc"):
        patch_se_blocks(net)
    after = sum(parameter.numel() for parameter in net.parameters())
    (record,) = caplog.records
    assert record.getMessage().startswith("patch_se_blocks: 2 blocks replaced, num_codes=16")
    assert record.getMessage().endswith(f"parameters {before} -> {after}")


def test_frozen_blocks_are_told(net: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    net.requires_grad_(False)
    patch_se_blocks(net)
    (record,) = caplog.records
    assert (record.levelname, "2 new blocks do not train" in record.getMessage()) == ("WARNING", True)


# Which blocks


def test_filter_fn_picks_blocks(net: nn.Module) -> None:
    asked = {}

    def pick(name: str, module: nn.Module) -> bool:
        asked[name] = module
        return name.endswith("4.0.se")

    blocks = {block.name: net.get_submodule(block.name) for block in find_se_blocks(net)}
    patch_se_blocks(net, filter_fn=pick)
    assert asked == blocks
    assert [block.name for block in find_context_blocks(net)] == ["blocks.4.0.se"]
    patch_se_blocks(net)  # the others, with the same settings
    assert len(find_context_blocks(net)) == 2
    restore_se_blocks(net)
    assert {name: net.get_submodule(name) for name in blocks} == blocks
    assert "no_weight_decay" not in vars(net)


@pytest.mark.parametrize("name", ["resnet10t", "test_resnet"])
def test_empty_slots_are_filled_and_emptied(name: str) -> None:
    model = timm.create_model(name).eval()
    before, keys, y = snapshot(model), list(model.state_dict()), model(X)
    patch_se_blocks(model, fill_empty=True)
    blocks = find_context_blocks(model)
    assert len(blocks) == sum(hasattr(module, "se") for module in model.modules()) > 0
    for block in blocks:
        owner = model.get_submodule(block.name.rpartition(".")[0])
        convolution = owner.conv2 if isinstance(owner, timm.models.resnet.BasicBlock) else owner.conv3
        assert block.replaced.channels == model.get_submodule(block.name).conv.in_channels == convolution.out_channels
    assert model(X).isfinite().all()

    restore_se_blocks(model)
    assert list(model.state_dict()) == keys
    for module in model.modules():
        if hasattr(module, "se"):
            assert vars(module)["se"] is None
            assert "se" not in module._modules
    assert torch.equal(model(X), y)
    assert_same(model, before)


def test_filter_fn_gets_the_convolution_of_an_empty_slot() -> None:
    model, asked = timm.create_model("resnet10t"), {}
    with pytest.raises(ValueError, match="ResNet: filter_fn refused all of its blocks"):
        patch_se_blocks(model, fill_empty=True, filter_fn=lambda name, module: asked.update({name: module}))
    assert asked == {f"layer{i}.0.se": model.get_submodule(f"layer{i}.0.conv2") for i in range(1, 5)}


# Twice


def test_same_settings_again_change_nothing(net: nn.Module) -> None:
    patch_se_blocks(net, num_codes=8, smoothing=1.0)
    before = snapshot(net)
    assert patch_se_blocks(net, num_codes=8, smoothing=1) is net
    assert_same(net, before)


@pytest.mark.parametrize(
    "other", [{"num_codes": 8}, {"smoothing": 0.5}, {"smoothing": "sampled"}, {"rd_ratio": 0.25}, {"pool": "concat"}]
)
def test_other_settings_are_refused(net: nn.Module, other: dict[str, Any]) -> None:
    patch_se_blocks(net, filter_fn=lambda name, _: name.endswith("4.0.se"))
    before = snapshot(net)
    with pytest.raises(
        ValueError, match=r"settings must be those of the blocks in place, blocks\.4\.0\.se has num_codes=16"
    ):
        patch_se_blocks(net, **other)
    assert_same(net, before)
    restore_se_blocks(net)
    patch_se_blocks(net, **other)


# All or nothing


def test_stages_have_settings_of_their_own(net: nn.Module) -> None:
    names = [block.name for block in find_se_blocks(net)]
    assert len(names) == 2
    for name, num_codes in zip(names, (4, 8), strict=True):
        patch_se_blocks(net, num_codes=num_codes, filter_fn=lambda found, _, name=name: found == name)
    assert [block.num_codes for block in find_context_blocks(net)] == [4, 8]
    before, modules = snapshot(net), []
    with pytest.raises(ValueError, match=rf"{names[0]} has num_codes=4.*leave them out by filter_fn"):
        patch_se_blocks(net, num_codes=8, filter_fn=lambda _, module: modules.append(module) or True)
    assert all(isinstance(module, SqueezeExcite) for module in modules)
    patch_se_blocks(net, num_codes=8, filter_fn=lambda name, _: name == names[1])
    with pytest.raises(ValueError, match="must have SE blocks"):
        patch_se_blocks(net, num_codes=16, filter_fn=lambda *_: False)
    assert_same(net, before)
    assert len(net.no_weight_decay()) == 4
    restore_se_blocks(net)
    assert [block.name for block in find_se_blocks(net)] == names
    assert "no_weight_decay" not in vars(net)


def test_error_in_an_owner_leaves_all_as_it_was() -> None:
    shared = Toy()
    model = nn.Sequential(shared, Toy(), shared, Stubborn())
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no"):
        patch_se_blocks(model)
    assert_same(model, before)
    patch_se_blocks(model, filter_fn=lambda name, _: name == "0.se")
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no"):
        patch_se_blocks(model)
    assert_same(model, before)
    restore_se_blocks(model)
    assert "no_weight_decay" not in vars(model)


def test_error_in_an_empty_slot_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Toy(), timm.create_model("resnet10t"))
    before, last = snapshot(model), model[1].layer4[0]

    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        if module is last and isinstance(value, nn.Module):
            raise RuntimeError("no")
        nn.Module.__setattr__(module, name, value)

    monkeypatch.setattr(timm.models.resnet.BasicBlock, "__setattr__", set_attribute)
    with pytest.raises(RuntimeError, match="no"):
        patch_se_blocks(model, fill_empty=True)
    assert_same(model, before)


def test_error_in_building_leaves_all_as_it_was(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Failing(ctxenc.ContextEncoding):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if kwargs["device"] != "meta":
                made.append(1)
            if len(made) == 2:
                raise MemoryError
            super().__init__(*args, **kwargs)

    before = snapshot(net)
    monkeypatch.setattr("ctxenc.swap.patching.ContextEncoding", Failing)
    with pytest.raises(MemoryError):
        patch_se_blocks(net)
    assert_same(net, before)


def test_error_in_the_models_own_rule_leaves_all_as_it_was(net: nn.Module) -> None:
    net.no_weight_decay = lambda: 1 / 0
    before = snapshot(net)
    with pytest.raises(ZeroDivisionError):
        patch_se_blocks(net)
    assert_same(net, before)
