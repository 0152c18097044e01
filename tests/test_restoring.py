"""The way back from a swap, weight decay in between, and the other way in: timm building a network with the block."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import timm
import torch
from timm.layers import SEModule
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn

import ctxenc
from ctxenc import find_context_blocks, find_se_blocks, patch_se_blocks, restore_se_blocks
from tests.toys import Stubborn, Toy, X, assert_same, snapshot


def test_restored_blocks_are_the_same(net: nn.Module) -> None:
    before, y = snapshot(net), net(X)
    patch_se_blocks(net)
    assert not torch.equal(net(X), y)
    assert restore_se_blocks(net) is net
    assert_same(net, before)
    assert torch.equal(net(X), y)
    assert restore_se_blocks(net) is net  # nothing to restore
    assert_same(net, before)


def test_restored_blocks_follow_the_model() -> None:
    model = Toy(SEModule(32, norm_layer=nn.BatchNorm2d)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    patch_se_blocks(model)
    restore_se_blocks(model.double().train())
    assert list(model.state_dict()) == list(before)
    for name, value in model.state_dict().items():
        assert value.dtype == (torch.float64 if before[name].is_floating_point() else before[name].dtype)
        assert torch.equal(value, before[name].to(value.dtype))
    assert all(module.training for module in model.modules())


def test_restored_blocks_follow_the_device() -> None:
    model = patch_se_blocks(Toy()).to("meta")
    restore_se_blocks(model)
    assert all(parameter.is_meta for parameter in model.parameters())

    patch_se_blocks(model).to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.zero_()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="the SE block of se was on the meta device and has no values, got cpu"):
        restore_se_blocks(model)
    assert_same(model, before)


def test_patch_after_restore(net: nn.Module) -> None:
    before = snapshot(net)
    for num_codes in (4, 8):
        patch_se_blocks(net, num_codes=num_codes)
        assert {block.num_codes for block in find_context_blocks(net)} == {num_codes}
        restore_se_blocks(net)
        assert_same(net, before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_no_undo_record(net: nn.Module, duplicate: Any) -> None:
    patch_se_blocks(net)
    twin = duplicate(net)
    assert torch.equal(twin(X), net(X))
    before = snapshot(twin)
    with pytest.raises(RuntimeError, match=r"no undo record for blocks\.3\.0\.se: the model was copied or unpickled"):
        restore_se_blocks(twin)
    assert_same(twin, before)
    restore_se_blocks(net)  # the first is its own


def test_whole_models_that_earlier_versions_pickled_load() -> None:
    """They name the modules of before ctxenc/swap/."""
    model = patch_se_blocks(Toy()).eval()
    saved = pickle.dumps(model, protocol=2)  # names in plain text, without their lengths
    assert b"cctxenc.swap.patching\n" in saved
    saved = saved.replace(b"cctxenc.swap.patching\n", b"cctxenc.patching\n")
    saved = saved.replace(b"cctxenc.swap.se_classes\n", b"cctxenc.se_blocks\n")
    assert b"ctxenc.swap" not in saved
    twin = pickle.loads(saved)
    assert find_context_blocks(twin) == find_context_blocks(model) != []
    assert torch.equal(twin(X), model(X))
    assert twin.no_weight_decay() == model.no_weight_decay()


def test_undo_is_kept_out_of_what_is_saved() -> None:
    model = Toy()
    mark = torch.full_like(model.se.fc1.weight, 12345.678)
    model.se.fc1.weight.data.copy_(mark)
    trace = mark[0, :4].numpy().tobytes()
    assert trace in pickle.dumps(model)
    original = set(map(id, [*model.se.parameters(), *model.se.modules()]))
    patch_se_blocks(model)
    assert trace not in pickle.dumps(model)
    assert not original & set(map(id, [*model.parameters(), *model.modules()]))
    assert not any("fc1" in name for name in model.state_dict())


def test_undo_goes_with_the_model() -> None:
    model = Toy()
    original = weakref.ref(model.se)
    patch_se_blocks(model)
    gc.collect()
    assert original() is not None
    del model
    gc.collect()
    assert original() is None


def test_error_while_restoring_leaves_all_as_it_was() -> None:
    model = nn.Sequential(Toy(), Stubborn())
    model[1].closed = False
    patch_se_blocks(model)
    model[1].closed = True
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no"):
        restore_se_blocks(model)
    assert_same(model, before)


# Weight decay


def test_codewords_and_smoothing_are_not_decayed() -> None:
    model = patch_se_blocks(timm.create_model("test_efficientnet"))
    new = {f"blocks.{i}.0.se.encoding.{name}" for i in (3, 4) for name in ("codewords", "smoothing")}
    assert model.no_weight_decay() == new
    assert pickle.loads(pickle.dumps(model)).no_weight_decay() == new

    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    for optimizer_groups in (groups, create_optimizer_v2(model, "adamw", weight_decay=0.1).param_groups):
        decays = {id(parameter): group["weight_decay"] for group in optimizer_groups for parameter in group["params"]}
        assert len(decays) == len(list(model.parameters()))
        for name, parameter in model.named_parameters():
            assert decays[id(parameter)] == (0 if parameter.ndim < 2 or name in new else 0.1), name

    restore_se_blocks(model)
    assert "no_weight_decay" not in vars(model)


@pytest.mark.parametrize("name", ["test_coatnet", "gcvit_xxtiny"])
def test_the_models_own_rule_holds_too(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    own = set(model.no_weight_decay())
    assert own
    patch_se_blocks(model)
    new = {name for name, _ in model.named_parameters() if name.endswith((".codewords", ".smoothing"))}
    assert len(new) == 2 * len(find_context_blocks(model)) > 0
    assert model.no_weight_decay() == own | new
    restore_se_blocks(model)
    assert model.no_weight_decay() == own


def test_a_rule_of_the_instance_comes_back(net: nn.Module) -> None:
    def rule() -> list[str]:
        return ["conv_stem.weight"]

    net.no_weight_decay = rule
    patch_se_blocks(net, filter_fn=lambda name, _: name.endswith("4.0.se"))
    patch_se_blocks(net)
    assert len(net.no_weight_decay()) == 5
    assert "conv_stem.weight" in net.no_weight_decay()
    restore_se_blocks(net)
    assert net.no_weight_decay is rule


def test_a_part_that_was_patched_is_restored_with_the_whole() -> None:
    model = nn.Sequential(Toy(), Toy())
    found = find_se_blocks(model)
    patch_se_blocks(model[0])
    patch_se_blocks(model)
    assert [block.replaced for block in find_context_blocks(model)] == found
    assert model[0].no_weight_decay() == {"se.encoding.codewords", "se.encoding.smoothing"}
    assert len(model.no_weight_decay()) == 4
    restore_se_blocks(model)
    assert not any("no_weight_decay" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["test_efficientnet", "test_coatnet", "test_nfnet"])
def test_layer_decay(name: str) -> None:
    model = timm.create_model(name)
    depth = {}
    for patched in (False, True):
        if patched:
            patch_se_blocks(model)
        optimizer = create_optimizer_v2(model, "adamw", weight_decay=0.1, layer_decay=0.7)
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        depth[patched] = {key: groups[id(parameter)]["lr_scale"] for key, parameter in model.named_parameters()}
    assert all(depth[True][key] == scale for key, scale in depth[False].items() if key in depth[True])
    for block in find_context_blocks(model):
        before = {scale for key, scale in depth[False].items() if key.startswith(block.name)}
        assert {scale for key, scale in depth[True].items() if key.startswith(block.name)} == before
        assert groups[id(model.get_submodule(block.name).encoding.codewords)]["weight_decay"] == 0


# The ways in while timm builds a network

BLOCK = ctxenc.ContextEncoding
ROUTES = {
    "resnet10t": {"block_args": {"attn_layer": BLOCK}},
    "res2net50_26w_4s": {"block_args": {"attn_layer": BLOCK}},
    "skresnet18": {"block_args": {"attn_layer": BLOCK}},
    "test_byobnet": {"attn_layer": BLOCK},
    "test_nfnet": {"attn_layer": BLOCK},
    "ese_vovnet19b_slim_dw": {"attn": BLOCK},
    "test_efficientnet": {"se_layer": BLOCK},
    "test_coatnet": {"conv_attn_layer": BLOCK, "img_size": 32},
}


@pytest.mark.parametrize("name", ROUTES)
def test_timm_builds_with_the_block(name: str) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        count = max(1, len(find_se_blocks(timm.create_model(name))))
    model = timm.create_model(name, **ROUTES[name])
    blocks = [module for module in model.modules() if isinstance(module, ctxenc.ContextEncoding)]
    assert len(blocks) >= count
    assert find_se_blocks(model) == []
    assert find_context_blocks(model) == []  # these replaced nothing
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for block in blocks:
        for parameter in block.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
