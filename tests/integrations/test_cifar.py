"""The CIFAR networks of EncNet: what they compute, and how large they are."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from timm.layers import SEModule

from ctxenc import ContextEncoding
from ctxenc.integrations.cifar import CifarNet, cifar_encnet, cifar_resnet, cifar_senet

BUILDERS = {"encnet": cifar_encnet, "senet": cifar_senet, "resnet": cifar_resnet}
each_builder = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("widen", "num_codes", "thousands"), [(4, 16, 3514), (8, 32, 16788)])
def test_encnets_have_the_published_number_of_parameters(widen, num_codes, thousands):
    with torch.device("meta"):
        assert round(parameters(cifar_encnet(10, widen, num_codes)) / 1000) == thousands


def test_twins_differ_in_the_blocks_alone():
    networks = [build(widen=1) for build in BUILDERS.values()]
    plain = {key: tensor.shape for key, tensor in networks[-1].state_dict().items()}
    for network in networks:
        rest = {key: tensor.shape for key, tensor in network.state_dict().items() if ".se." not in key}
        assert rest == plain
    blocks = [[m for m in n.modules() if isinstance(m, (ContextEncoding, SEModule))] for n in networks]
    assert [len(found) for found in blocks] == [6, 6, 0]
    for block, channels in zip(blocks[0], (16, 16, 32, 32, 64, 64), strict=True):
        assert (block.conv.in_channels, block.rd_channels, block.num_codes) == (channels, channels // 4, 16)
        assert (block.pool, block.smoothing) == ("concat", "sampled")
    assert {type(block) for block in blocks[1]} == {SEModule}


def test_biases_are_where_the_original_has_them():
    """In the stem and the two shortcuts that change the map's shape, and in what is linear; the block's projection has none."""
    network = cifar_encnet(widen=1)
    biased = {key.removesuffix(".bias") for key in network.state_dict() if key.endswith(".bias")}
    norms = {name for name, module in network.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    gates = {f"layer{stage}.{unit}.se.fc" for stage in (1, 2, 3) for unit in (0, 1)}
    assert biased - norms == {"conv1", "layer2.0.downsample", "layer3.0.downsample", "fc"} | gates


def recompute(network: CifarNet, x: torch.Tensor) -> torch.Tensor:
    """Section 4.3 with the original's layers, line by line, in eval mode."""
    state = network.state_dict()

    def norm(x, name):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.batch_norm(x, mean, var, weight, bias)

    x = F.conv2d(x, state["conv1.weight"], state["conv1.bias"], padding=1)
    x = norm(x, "bn1").relu()
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        for unit in (0, 1):
            name = f"layer{stage}.{unit}"
            step = stride if unit == 0 else 1
            y = norm(F.conv2d(x, state[f"{name}.conv1.weight"], stride=step, padding=1), f"{name}.bn1").relu()
            y = norm(F.conv2d(y, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            block = network.get_submodule(name).se
            if block is not None:
                y = block(y)
            if step == 2:
                x = F.conv2d(x, state[f"{name}.downsample.weight"], state[f"{name}.downsample.bias"], stride=2)
            x = (x + y).relu()
    x = norm(x, "norm").relu().mean((2, 3))
    return x @ state["fc.weight"].T + state["fc.bias"]


@each_builder
@pytest.mark.parametrize("size", [(32, 32), (9, 13), (1, 1)])
def test_it_is_the_network_of_the_paper(build, size):
    torch.manual_seed(0)
    network = build(num_classes=7, widen=1).double().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in ((module.weight.data, 0.5, 1.5), (module.running_var, 0.5, 1.5)):
                tensor.uniform_(low, high)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(std=0.3)
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(x), recompute(network, x), rtol=1e-9, atol=1e-9)


def test_smoothing_is_drawn_in_training_alone():
    network, x = cifar_encnet(widen=1), torch.randn(2, 3, 8, 8)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0  # so that two passes differ in the draw alone
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


@each_builder
def test_convolutions_start_as_kaiming_would(build):
    torch.manual_seed(0)
    for name, parameter in build(widen=4).named_parameters():
        if parameter.dim() == 4 and ".se." not in name:
            fan_out = parameter.shape[0] * parameter.shape[2] * parameter.shape[3]
            assert parameter.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name


def test_arguments_reach_the_network():
    network = cifar_encnet(5, 1, 3, in_chans=2, global_pool="max", drop_rate=0.25)
    assert {m.num_codes for m in network.modules() if isinstance(m, ContextEncoding)} == {3}
    assert (network.num_classes, network.in_chans, network.drop_rate) == (5, 2, 0.25)
    assert network(torch.randn(2, 2, 8, 8)).shape == (2, 5)
    features = network.eval().forward_features(torch.randn(2, 2, 8, 8))
    assert torch.equal(network.forward_head(features, pre_logits=True), features.amax((2, 3)))
    assert CifarNet(widen=1, attn_layer="eca").layer1[0].se is not None
    both = CifarNet(widen=1, num_classes=0, global_pool="catavgmax")
    assert both.head_hidden_size == 2 * both.num_features == both(torch.randn(2, 3, 8, 8)).shape[1]


def test_norm_of_the_last_map():
    network, x = cifar_resnet(widen=1).eval(), torch.randn(2, 3, 8, 8)
    features, maps = network.forward_intermediates(x, norm=True)
    plain = network.forward_intermediates(x, intermediates_only=True)
    assert torch.equal(maps[-1].relu(), features)
    assert torch.equal(network.norm(plain[-1]), maps[-1])
    assert torch.equal(maps[2], plain[2])
    early = network.forward_intermediates(x, indices=[1], norm=True, stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], maps[1])


def test_pruning_removes_the_head_and_its_norm():
    network = cifar_resnet(widen=1)
    network.prune_intermediate_layers([0, 2])
    assert [len(stage) for stage in (network.layer1, network.layer2, network.layer3)] == [2, 2, 0]
    assert network.num_features == network.head_hidden_size == 32
    assert isinstance(network.norm, torch.nn.Identity)
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 32, 4, 4)

    whole = cifar_resnet(widen=1)
    whole.prune_intermediate_layers(2, prune_head=False)
    assert whole(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    assert isinstance(whole.norm, torch.nn.BatchNorm2d)
    whole.prune_intermediate_layers(2, prune_norm=True)
    assert isinstance(whole.norm, torch.nn.Identity)
    assert whole(torch.randn(2, 3, 8, 8)).shape == (2, 64, 2, 2)


def test_copies():
    network, x = cifar_encnet(widen=1).eval(), torch.randn(2, 3, 8, 8)
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), network(x))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"widen": 0}, ValueError, "CifarNet: widen must be a positive integer, got 0"),
        ({"widen": 1.5}, TypeError, "CifarNet: widen must be a positive integer, got 1.5"),
        ({"in_chans": 0}, ValueError, "CifarNet: in_chans must be a positive integer, got 0"),
        ({"num_codes": 0}, ValueError, "ContextEncoding.paper: num_codes must be a positive integer, got 0"),
    ],
)
def test_errors(arguments, error, text):
    with pytest.raises(error) as raised:
        cifar_encnet(**arguments)
    assert str(raised.value) == text


def test_another_layout_is_refused():
    with pytest.raises(ValueError, match=r'CifarNet.forward_intermediates: output_fmt must be "NCHW", got \'NLC\''):
        cifar_resnet(widen=1).forward_intermediates(torch.randn(1, 3, 8, 8), output_fmt="NLC")
