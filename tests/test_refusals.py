"""What cannot be patched: the errors say why, and leave the network alone."""

from typing import Any

import pytest
import timm
import torch
from timm.layers import SEModule
from torch import nn
from torch.distributed.fsdp import fully_shard

import ctxenc
from ctxenc import find_context_blocks, patch_se_blocks
from tests.toys import Toy, X, assert_same, snapshot


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"num_codes": 0}, ValueError, "patch_se_blocks: num_codes must be .*, got 0"),
        ({"num_codes": "16"}, TypeError, "patch_se_blocks: num_codes must be .*, got '16'"),
        ({"rd_ratio": 0}, ValueError, "patch_se_blocks: rd_ratio must be .*, got 0"),
        ({"rd_ratio": float("inf")}, ValueError, "patch_se_blocks: rd_ratio must be .*, got inf"),
        ({"rd_ratio": float("nan")}, ValueError, "patch_se_blocks: rd_ratio must be .*, got nan"),
        ({"smoothing": "soft"}, ValueError, "patch_se_blocks: smoothing must be .*, got 'soft'"),
        ({"smoothing": -1}, ValueError, "patch_se_blocks: smoothing must be .*, got -1"),
        ({"smoothing": None}, TypeError, "patch_se_blocks: smoothing must be .*, got NoneType"),
        ({"pool": "max"}, ValueError, "pool must be one of mean, concat, got 'max'"),
    ],
)
def test_settings_are_checked(net: nn.Module, settings: dict[str, Any], error: type[Exception], text: str) -> None:
    before = snapshot(net)
    with pytest.raises(error, match=text):
        patch_se_blocks(net, **settings)
    assert_same(net, before)


def _fx(model: nn.Module) -> nn.Module:
    return torch.fx.symbolic_trace(model)


NOTHING_TO_PATCH = {
    "nothing": (lambda: timm.create_model("test_vit"), "VisionTransformer with no channel attention; looked for"),
    "eca": (lambda: timm.create_model("ecaresnext26t_32x4d"), "ResNet with 8 EcaModule"),
    "empty": (lambda: timm.create_model("resnet10t"), "ResNet with 4 empty slots, which fill_empty=True fills"),
    "fx": (lambda: _fx(timm.create_model("test_efficientnet")), "a torch.fx graph keeps no SE blocks as modules"),
    "traced": (lambda: torch.jit.trace(Toy().eval(), X), "a scripted or traced model shows no SE blocks"),
    "scripted": (lambda: torch.jit.script(Toy()), "a scripted or traced model shows no SE blocks"),
    "part scripted": (lambda: nn.Sequential(torch.jit.script(Toy())), "a scripted or traced model shows"),
    "root": (lambda: SEModule(32), "must hold SE blocks, got one itself, SEModule; use ContextEncoding"),
    "built": (lambda: Toy(ctxenc.ContextEncoding(32)), "Toy with 1 ContextEncoding"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("case", NOTHING_TO_PATCH)
def test_nothing_to_patch(case: str) -> None:
    build, text = NOTHING_TO_PATCH[case]
    model = build()
    modules = list(model.named_modules())
    with pytest.raises(ValueError, match=text):
        patch_se_blocks(model)
    assert list(model.named_modules()) == modules


@pytest.mark.parametrize("model", [None, SEModule, "seresnet50"])
def test_only_modules(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
        patch_se_blocks(model)


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def _part_compiled(model: nn.Module) -> nn.Module:
    model.conv = torch.compile(model.conv)
    return model


def _sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))


WRAPPERS = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "FSDPModule": _sharded,
    "OptimizedModule": torch.compile,
    "OptimizedModule at (0.)?conv": _part_compiled,
    "a module compiled in place": _compiled_in_place,
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_are_refused(wrapper: str) -> None:
    model = WRAPPERS[wrapper](Toy())
    for whole in (model, nn.Sequential(model)):
        with pytest.raises(ValueError, match=f"must not be wrapped yet, got {wrapper}.*: patch first, then wrap it"):
            patch_se_blocks(whole)
        assert find_context_blocks(whole) == []


@pytest.mark.usefixtures("process_group")
def test_patched_models_are_wrapped() -> None:
    model = nn.parallel.DistributedDataParallel(patch_se_blocks(Toy()))
    model(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("function", [ctxenc.find_se_blocks, ctxenc.find_context_blocks, ctxenc.restore_se_blocks])
def test_what_is_no_module(function):
    with pytest.raises(TypeError, match=f"^{function.__name__}: model must be a torch.nn.Module, got str$"):
        function("seresnet50")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"rd_ratio": "0.1"}, "rd_ratio must be a positive number, got '0.1'"),
        ({"rd_ratio": None}, "rd_ratio must be a positive number, got None"),
        ({"act_layer": "relu"}, "act_layer must be a class or a function, got 'relu'"),
        ({"norm_layer": "bn"}, "norm_layer must be a class or a function, got 'bn'"),
    ],
)
def test_arguments_of_another_type(keywords, message):
    with pytest.raises(TypeError, match=f"^ContextEncoding: {message}$"):
        ctxenc.ContextEncoding(16, 4, **keywords)


def test_patching_takes_a_function_and_a_number():
    model = torch.nn.Sequential()
    with pytest.raises(TypeError, match=r"^patch_se_blocks: filter_fn must be a function, got 3$"):
        ctxenc.patch_se_blocks(model, filter_fn=3)
    with pytest.raises(TypeError, match=r"^patch_se_blocks: rd_ratio must be a positive number, got '1'$"):
        ctxenc.patch_se_blocks(model, rd_ratio="1")


def test_a_map_of_another_shape():
    with pytest.raises(ValueError, match=r"^ContextEncoding: x must have shape \(B, C, H, W\), got \(2, 16, 5\)$"):
        ctxenc.ContextEncoding(16, 4)(torch.randn(2, 16, 5))


def test_numbers_of_numpy_are_numbers():
    np = pytest.importorskip("numpy")
    x, codewords = torch.randn(2, 8, 5), torch.randn(3, 8)
    assert torch.equal(ctxenc.encode(x, codewords, np.float32(0.5)), ctxenc.encode(x, codewords, 0.5))
