"""What timm and torchvision try on each of their models, on a patched one of each family: it works wherever it works unpatched."""

import copy

import pytest
import timm
import torch
import torchvision
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, get_notrace_functions, get_notrace_modules
from timm.utils import ModelEmaV2, ModelEmaV3, reparameterize_model
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import ctxenc
from ctxenc import ContextEncoding
from tests.blocks import stirred

pytestmark = [
    pytest.mark.nightly,
    # Of the networks and of TorchScript
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
SIDE = 64
TIMM = [
    *("cs3sedarknet_xdw", "cspnext_tiny", "efficientvim_m1", "efficientvit_m0", "ese_vovnet19b_slim_dw", "fastvit_t8"),
    *("gcvit_xxtiny", "ghostnet_050", "hgnet_tiny", "lcnetv2_small", "legacy_seresnet18", "rdnet_tiny", "regnety_002"),
    *("repghostnet_050", "repvit_m1", "rexnet_100", "seresnet18", "shvit_s1", "test_byobnet", "test_coatnet"),
    *("test_efficientnet", "test_nfnet", "tresnet_m"),
]
TORCHVISION = ["efficientnet_b0", "lraspp_mobilenet_v3_large", "mobilenet_v3_small", "regnet_y_400mf"]
# timm makes SplitBatchNorm2d of the BatchNorm1d in their classifiers, which refuses what these get.
SPLIT_BN_FAILS = ("efficientvit_m0", "repvit_m1", "shvit_s1")


def logits(output):
    return output["out"] if isinstance(output, dict) else output


def size_for(name):
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return cfg.input_size[1] if cfg and cfg.fixed_input_size else SIDE


@pytest.fixture(scope="module", params=[*TIMM, *(f"torchvision:{name}" for name in TORCHVISION)])
def family(request):
    """The name of a network, the network patched, and images for it."""
    torch.manual_seed(0)
    library, _, name = request.param.rpartition(":")
    if library:
        more = {"weights_backbone": None} if name.startswith("lraspp") else {}
        model = torchvision.models.get_model(name, num_classes=7, weights=None, **more)
    else:
        model = timm.create_model(name, num_classes=7)
    size = size_for(name)
    return name, stirred(ctxenc.patch_se_blocks(model)), torch.randn(4 if size == SIDE else 2, 3, size, size)


@torch.no_grad()
def evaluated(model, x):
    return logits(model.eval()(x))


def assert_same(output, wanted):
    assert (output - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def assert_trains(model, x):
    """Forward and backward in training: each part of a block has a gradient, and all of the network's are finite."""
    logits(model.train()(x)).float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    for module in model.modules():
        if isinstance(module, ContextEncoding):
            assert all(parameter.grad is not None for parameter in module.parameters())


def forward(model, x):
    output = evaluated(model, x)
    assert output.shape[:2] == (len(x), 7)
    assert output.isfinite().all()
    assert_same(evaluated(model, x[:1]), output[:1])


def backward(model, x):
    assert_trains(model, x)


def traced(model):
    """The fx graph up to the last node, as timm's tests take it, with the name of that in evaluation."""
    tracer = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    train, evaluate = get_graph_node_names(model, tracer_kwargs=tracer)
    nodes = {"train_return_nodes": [train[-1]], "eval_return_nodes": [evaluate[-1]]}
    return create_feature_extractor(model, tracer_kwargs=tracer, **nodes), evaluate[-1]


def fx(model, x):
    wanted = evaluated(model, x)
    graph, node = traced(model)
    with torch.no_grad():
        assert_same(graph.eval()(x)[node], wanted)
    (output,) = graph.train()(x).values()
    logits(output).square().mean().backward()


def script(model, x):
    wanted = evaluated(model, x)
    scripted = torch.jit.script(model)
    assert_same(evaluated(scripted, x), wanted)
    assert_trains(scripted, x)


def fx_script(model, x):
    wanted = evaluated(model, x)
    graph, node = traced(model)
    with torch.no_grad():
        assert_same(torch.jit.script(graph.eval())(x)[node], wanted)


def channels_last(model, x):
    wanted = evaluated(model, x)
    model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    assert_same(evaluated(model, x), wanted)
    assert_trains(model, x)


def sync_bn(model, x):
    wanted = evaluated(model, x)
    converted = convert_sync_batchnorm(model)
    assert not any(type(each) is nn.BatchNorm2d for each in converted.modules())
    assert_same(evaluated(converted, x), wanted)


def split_bn(model, x):
    wanted = evaluated(model, x)
    converted = convert_splitbn_model(model, num_splits=2)
    assert_same(evaluated(converted, x), wanted)
    assert_trains(converted, x)


def values(model):
    """All parameters and statistics, one after the other."""
    return torch.cat([each.flatten() for each in model.state_dict().values() if each.is_floating_point()])


def ema(model, x):
    average, before = ModelEmaV3(model, decay=0.75), values(model)
    with torch.no_grad():
        model.train()(x)  # moves the statistics
        for parameter in model.parameters():
            parameter.add_(0.01)
    average.update(model, step=10)
    torch.testing.assert_close(values(average.module), before.lerp(values(model), 0.25))
    assert evaluated(average, x).isfinite().all()


def reparameterize(model, x):
    wanted = evaluated(model, x)
    assert_same(evaluated(reparameterize_model(model), x), wanted)


def bf16(model, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_trains(copy.deepcopy(model), x)
    assert evaluated(model.bfloat16(), x.bfloat16()).isfinite().all()


CHECKS = [forward, backward, fx, script, fx_script, channels_last, sync_bn, split_bn, ema, reparameterize, bf16]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check(family, check):
    name, model, x = family
    if check is split_bn and name in SPLIT_BN_FAILS:
        pytest.skip("it fails unpatched too")
    check(copy.deepcopy(model), x)


@pytest.mark.parametrize("name", sorted({*TIMM} - {"fastvit_t8"}))  # whose SE block is behind the features
def test_features(name):
    """Patched after it was cut down to its features, which keep their sizes."""
    torch.manual_seed(0)
    model, x = timm.create_model(name, features_only=True).eval(), torch.randn(1, 3, size_for(name), size_for(name))
    wanted = [each.shape for each in model(x)]
    maps = ctxenc.patch_se_blocks(model)(x)
    assert [each.shape for each in maps] == wanted
    assert all(each.isfinite().all() for each in maps)


@pytest.mark.parametrize("kind", [ModelEmaV2, ModelEmaV3, AveragedModel])
def test_an_average_from_before_the_patch_raises_as_the_readme_says(kind):
    model = timm.create_model("seresnet18")
    average = kind(model)
    ctxenc.patch_se_blocks(model)
    update = average.update_parameters if kind is AveragedModel else average.update
    with pytest.raises(RuntimeError, match=r"output with shape .* doesn't match the broadcast shape"):
        update(model)
