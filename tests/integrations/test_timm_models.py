"""What timm's own tests ask of every model, asked of the networks that are registered with it."""

import re

import pytest
import timm
import torch
from timm.models import group_parameters, save_for_hf
from timm.models.resnet import BasicBlock, Bottleneck
from timm.optim import create_optimizer_v2

import ctxenc
from ctxenc.integrations import timm_models

NAMES = sorted(timm_models.default_cfgs)
SMALL = ["ctxenc_resnet18", "deepten_resnet18", "encnet_cifar_16k64d", "seresnet_cifar_64d", "resnet_cifar_64d"]
NARROW = {"widen": 1}
each_small = pytest.mark.parametrize("name", SMALL)
each_kind = pytest.mark.parametrize("name", [*SMALL, "ctxenc_resnext50_32x4d"])


@pytest.fixture(autouse=True)
def _same_draws():
    torch.manual_seed(0)


def make(name: str, **arguments) -> torch.nn.Module:
    """A network in eval mode whose norms are no identities, so that a wrong order of layers is seen."""
    model = timm.create_model(name, **((NARROW if "cifar" in name else {}) | arguments)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.running_mean.normal_(std=0.1)
    return model


def images(name: str, channels: int = 3, batch: int = 2) -> torch.Tensor:
    size = 16 if "cifar" in name else 64
    return torch.randn(batch, channels, size, size)


# The registry


def test_names():
    assert set(NAMES) == set(timm.list_models(module="timm_models"))
    assert timm.list_models("ctxenc_*") == [name for name in timm.list_models(module="timm_models") if "ctxenc" in name]
    assert {"ctxenc_resnet18", "ctxenc_seresnet50", "ctxenc_seresnext50_32x4d", "encnet_cifar_32k128d"} <= set(NAMES)
    assert {"ctxenc_resnet152", "ctxenc_resnext50_32x4d", "deepten_resnet101", "encnet_cifar_16k64d"} <= set(NAMES)
    assert all(timm.is_model(name) and callable(getattr(timm_models, name)) for name in NAMES)
    assert set(timm_models.__all__) == {"ContextResNet", *NAMES}
    assert not set(NAMES) & set(timm.list_pretrained())


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_is_refused(name):
    with torch.device("meta"), pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("ctxenc_")])
def test_it_is_the_patched_network_of_timm(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        twin = ctxenc.patch_se_blocks(timm.create_model(name.removeprefix("ctxenc_")), fill_empty=True)

    def shapes(network):
        return {key: tensor.shape for key, tensor in network.state_dict().items()}

    assert shapes(model) == shapes(twin)
    assert model.no_weight_decay() == set(twin.no_weight_decay())
    assert len(model.no_weight_decay()) == 2 * sum(isinstance(m, (BasicBlock, Bottleneck)) for m in model.modules())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("encnet_cifar_16k64d", 3_514_000),  # as published
        ("encnet_cifar_32k128d", 16_788_000),
        ("resnet_cifar_64d", 2_778_000),
        ("seresnet_cifar_64d", 2_801_000),
        ("deepten_resnet18", 11_176_512 + 512 * 128 + 2 * 128 + 32 * 129 + 23 * 4097),
        ("deepten_resnet50", 23_508_032 + 2048 * 128 + 2 * 128 + 32 * 129 + 23 * 4097),
        ("deepten_resnet101", 42_500_160 + 2048 * 128 + 2 * 128 + 32 * 129 + 23 * 4097),
    ],
)
def test_sizes(name, parameters):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
    assert (round(count, -3) if "cifar" in name else count) == parameters


# Forward


@each_kind
def test_default_cfg_tells_the_truth(name):
    model = make(name)
    cfg, parameters = model.default_cfg, dict(model.named_parameters())
    assert cfg["architecture"] == name
    assert cfg["classifier"] + ".weight" in parameters
    assert parameters[cfg["classifier"] + ".weight"] is model.get_classifier().weight
    assert parameters[cfg["first_conv"] + ".weight"].shape[1] == 3
    assert model.num_classes == cfg["num_classes"] == model.get_classifier().out_features

    x = torch.randn(1, *cfg["input_size"])
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (1, model.num_features, *cfg["pool_size"])
        logits = model(x)
        assert logits.shape == (1, cfg["num_classes"])
        assert torch.equal(logits, model.forward_head(features))
        pre_logits = model.forward_head(features, pre_logits=True)
        assert pre_logits.shape == (1, model.head_hidden_size)
        assert torch.equal(model.get_classifier()(pre_logits), logits)


@each_small
def test_classifier_is_reset(name):
    model, x = make(name), images(name)
    with torch.no_grad():
        pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
        model.train().reset_classifier(7)
        assert model.get_classifier().training
        assert model.eval()(x).shape == (2, 7)
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert torch.equal(model(x), pre_logits)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), model.forward_features(x))
        bare = make(name, num_classes=0, global_pool="")
        assert bare(x).shape == model(x).shape


@pytest.mark.parametrize("name", ["deepten_resnet18", "resnet_cifar_64d"])  # whose reset_classifier is ours
def test_new_classifier_has_the_dtype_and_device_of_the_rest(name):
    model = make(name).double()
    model.reset_classifier(3)
    assert model.get_classifier().weight.dtype == torch.float64
    with torch.device("meta"):
        model = timm.create_model(name)
    model.reset_classifier(3)
    assert model.get_classifier().weight.is_meta


@each_small
@pytest.mark.parametrize("channels", [1, 4])
def test_channels_of_the_image(name, channels):
    model = make(name, in_chans=channels, num_classes=3)
    assert model(images(name, channels)).shape == (2, 3)


@each_small
@pytest.mark.parametrize("size", [(33, 47), (96, 32)])
def test_any_size(name, size):
    assert make(name, num_classes=3)(torch.randn(1, 3, *size)).isfinite().all()


@each_small
def test_dropout_before_the_classifier(name):
    model, x = make(name, drop_rate=0.9), images(name)
    assert model.drop_rate == 0.9
    features = model.forward_features(x).detach()
    kept = model.forward_head(features, pre_logits=True)
    model.train()
    dropped = model.forward_head(features, pre_logits=True)
    zeros = (dropped == 0) & (kept != 0)
    assert zeros.sum() > 0.7 * (kept != 0).sum()
    torch.testing.assert_close(dropped[~zeros], kept[~zeros] * 10)


@each_small
def test_arguments_of_timms_training_script(name):
    """It names every one of these; those that are None timm leaves to the network."""
    unset = ("global_pool", "num_classes", "drop_path_rate", "drop_block_rate", "bn_momentum", "bn_eps")
    model = timm.create_model(
        name, pretrained=False, in_chans=3, drop_rate=0.0, scriptable=False, checkpoint_path="", **dict.fromkeys(unset)
    )
    assert model.num_classes == model.default_cfg["num_classes"]


# Backward


@each_kind
def test_every_parameter_gets_a_gradient(name):
    model = make(name, num_classes=42).train()
    logits = model(images(name))
    assert logits.shape == (2, 42)
    logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any() or key.endswith("conv1.bias"), key  # which the norm after it takes out


@each_small
def test_gradient_checkpointing(name):
    """The same gradients from fewer kept tensors."""
    model, x = make(name, num_classes=3), images(name)

    def gradients():
        model.zero_grad()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = model(x).square().sum()
        loss.backward()
        return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}, sum(kept)

    plain, much = gradients()
    model.set_grad_checkpointing()
    checked, less = gradients()
    assert less < much / 2
    for key, gradient in plain.items():
        torch.testing.assert_close(checked[key], gradient, msg=lambda text, key=key: f"{key}: {text}")
    model.set_grad_checkpointing(False)
    assert gradients()[1] == much


@each_small
def test_bfloat16(name):
    model = make(name, num_classes=3)
    x = images(name)
    wanted = model(x)
    logits = model.bfloat16()(x.bfloat16())
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), wanted, rtol=0.1, atol=0.1 * wanted.abs().max().item())
    model.train()(x.bfloat16()).float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# Features


@each_kind
def test_features_only(name):
    model, x = make(name, features_only=True), images(name)
    maps = model(x)
    info = model.feature_info
    assert len(maps) == len(info.channels()) >= 4
    for map_, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
        assert map_.shape == (2, channels, x.shape[2] // reduction, x.shape[3] // reduction)
    assert info.reduction()[-1] == (4 if "cifar" in name else 32)

    chosen = make(name, features_only=True, out_indices=(1, 3))
    chosen.load_state_dict(
        {key: tensor for key, tensor in model.state_dict().items() if key in chosen.state_dict()}, strict=True
    )
    for map_, other in zip(chosen(x), (maps[1], maps[3]), strict=True):
        assert torch.equal(map_, other)


@each_small
@pytest.mark.parametrize("feature_cls", ["fx", "hook", "getter"])
@pytest.mark.filterwarnings(
    "ignore:NOTE. The nodes obtained by tracing:UserWarning"
)  # smoothing is drawn in training alone
def test_other_ways_to_features(name, feature_cls):
    """All ways give the maps that forward_intermediates gives."""
    x, state = images(name), make(name).state_dict()
    model = make(name)
    model.load_state_dict(state)
    # copies, since those in place overwrite a map that is kept by reference
    wanted = [map_.clone() for map_ in model.forward_intermediates(x, intermediates_only=True)]
    wrapped = make(name, features_only=True, feature_cls=feature_cls)
    kept = wrapped.state_dict()
    renamed = {key: re.sub(r"^(graph_module|body|model)\.", "", key) for key in kept}
    wrapped.load_state_dict({key: state[original] for key, original in renamed.items()})
    for map_, other in zip(wrapped(x), wanted, strict=True):
        torch.testing.assert_close(map_, other)


@each_small
def test_forward_intermediates(name):
    model, x = make(name), images(name)
    with torch.no_grad():
        features, maps = model.forward_intermediates(x)
        assert torch.equal(features, model.forward_features(x))
        for map_, info in zip(maps, model.feature_info, strict=True):
            assert map_.shape == (2, info["num_chs"], *(side // info["reduction"] for side in x.shape[2:]))
        two = model.forward_intermediates(x, indices=2, intermediates_only=True)
        assert [torch.equal(map_, other) for map_, other in zip(two, maps[-2:], strict=True)] == [True, True]
        last, (first,) = model.forward_intermediates(x, indices=[1], stop_early=True)
        assert torch.equal(first, maps[1])
        assert torch.equal(last, maps[1])


@each_small
def test_pruning_keeps_what_the_maps_need(name):
    model, x = make(name), images(name)
    wanted = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert list(model.prune_intermediate_layers([0, 2])) == [0, 2]
    got = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    assert sum(parameter.numel() for parameter in model.parameters()) < count / 3


# Graphs


@each_small
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_torchscript(name):
    model = make(name, num_classes=3, scriptable=True)
    scripted = torch.jit.script(model)
    for size in (images(name).shape[-1], 48):
        x = torch.randn(1, 3, size, size)
        torch.testing.assert_close(scripted(x), model(x))


@each_small
def test_fx_trace(name):
    model = make(name, num_classes=3)
    graph = torch.fx.symbolic_trace(model)
    for size in (images(name).shape[-1], 48):
        x = torch.randn(1, 3, size, size)
        torch.testing.assert_close(graph(x), model(x))


# Optimizers


@pytest.mark.parametrize("name", ["ctxenc_resnet18", "deepten_resnet18", "encnet_cifar_16k64d"])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_codewords_and_smoothing_are_not_decayed(name, layer_decay):
    model = make(name)
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.1, layer_decay=layer_decay)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    codewords = {key for key in named if key.endswith(("encoding.codewords", "encoding.smoothing"))}
    assert codewords == model.no_weight_decay()
    assert any(named[key].dim() == 2 for key in codewords)
    for key, parameter in named.items():
        assert decay[id(parameter)] == (0 if key in codewords or parameter.dim() == 1 else 0.1), key


@each_small
@pytest.mark.parametrize("coarse", [False, True])
def test_groups_of_layers(name, coarse):
    """From the stem to the classifier, a stage or a unit at a time."""
    model = make(name)
    layer = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert layer.keys() == dict(model.named_parameters()).keys()
    cfg = model.default_cfg
    prefix = cfg["first_conv"].removesuffix("conv1")
    units = [key for key in layer if key.endswith("conv2.weight")]
    groups = [layer[key] for key in units]
    stages = [int(key.removeprefix(prefix + "layer")[0]) for key in units]
    assert layer[cfg["first_conv"] + ".weight"] == layer[prefix + "bn1.weight"] == 0
    assert groups == (stages if coarse else list(range(1, len(units) + 1)))
    assert layer[cfg["classifier"] + ".weight"] == groups[-1] + 1
    assert all(layer[key] == layer[key.partition(".se.")[0] + ".conv2.weight"] for key in layer if ".se." in key)


# Saving


@each_small
def test_timm_saves_and_loads_it(name, tmp_path):
    arguments = {"num_classes": 5, "in_chans": 1, **({"drop_path_rate": 0.1} if "cifar" not in name else NARROW)}
    model, x = make(name, **arguments), images(name, 1)
    save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(loaded) is type(model)
    assert torch.equal(loaded(x), model(x))
    with torch.no_grad():
        loaded.get_classifier().bias.add_(1)
    assert not torch.equal(loaded(x), model(x))


def test_a_saved_deepten_needs_no_weights_of_the_backbone(tmp_path, monkeypatch):
    model = make("deepten_resnet18")
    save_for_hf(model, tmp_path, model_args={"pretrained_backbone": True}, safe_serialization=True)
    asked = []
    create = timm.create_model

    def spy(name, pretrained, **arguments):
        asked.append(pretrained)
        return create(name, pretrained=False, **arguments)

    monkeypatch.setattr("ctxenc.integrations.deepten.timm.create_model", spy)
    loaded = create(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert asked == [False]
    x = images("deepten")
    assert torch.equal(loaded(x), model(x))
    create("deepten_resnet18", pretrained_backbone=True)
    assert asked == [False, True]
