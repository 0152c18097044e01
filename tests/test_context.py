"""The block: what it computes, and the maps, dtypes and owners it must fit."""

import copy
import math
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.export import Dim

import ctxenc
from ctxenc import ContextEncoding
from ctxenc.context import _coarsen, reduced_channels
from ctxenc.kernels import reference
from tests.blocks import KINDS, each_pool, equal, group_norm, norms_of, stirred

# What it computes


def batch_norm(x: torch.Tensor, norm: nn.BatchNorm2d) -> torch.Tensor:
    """Of x (B, C, N)."""
    if norm.training:
        mean, var = x.mean((0, 2)), x.var((0, 2), unbiased=False)
    else:
        mean, var = norm.running_mean, norm.running_var
    x = (x - mean[:, None]) / (var[:, None] + norm.eps).sqrt()
    return x * norm.weight[:, None] + norm.bias[:, None]


def recompute(block: ContextEncoding, x: torch.Tensor) -> torch.Tensor:
    """Design, section 7, line by line, of x (B, C, H, W) in fp64."""
    z = torch.einsum("cd,bdn->bcn", block.conv.weight[:, :, 0, 0], x.flatten(2))
    z = batch_norm(z, block.norm).clamp(min=0)
    e = reference.encode(z, block.encoding.codewords, block.encoding.smoothing)
    if block.aggregation == "mean":
        e = e / z.shape[2]
    if block.pool == "mean":
        m = batch_norm(e, block.norm_codes).clamp(min=0).mean(1)
    else:
        m = e.flatten(1) / e.flatten(1).square().sum(1, keepdim=True).sqrt()
    gate = 1 / (1 + torch.exp(-(m @ block.fc.weight.T + block.fc.bias)))
    return x * gate[:, :, None, None]


@each_pool
@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 24, 5, 7), (3, 17, 1, 1), (1, 40, 4, 4)])
def test_it_is_the_formula(pool, aggregation, training, shape):
    block = stirred(ContextEncoding(shape[1], 6, pool=pool, aggregation=aggregation)).double().train(training)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    got, wanted = block(x), recompute(block, x)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    inputs = [x, *block.parameters()]
    grad = torch.randn_like(got)
    for one, other in zip(
        torch.autograd.grad(got, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@each_pool
def test_features_are_what_the_gate_is_computed_from(pool):
    block, x = ContextEncoding(16, 4, rd_channels=8, pool=pool).eval(), torch.randn(2, 16, 5, 5)
    features = block.features(x)
    assert features.shape == ((2, 8) if pool == "mean" else (2, 32))
    assert torch.equal(block(x), x * block.fc(features).sigmoid()[:, :, None, None])


def test_the_block_of_the_paper():
    """EncNet, section 4.3: C' = C / 4, the encoding concatenated, smoothing drawn."""
    block = ContextEncoding.paper(64, 16)
    assert (block.rd_channels, block.num_codes, block.pool, block.smoothing) == (16, 16, "concat", "sampled")
    assert block.fc.in_features == 16 * 16
    assert isinstance(block.norm_codes, nn.Identity)
    assert ContextEncoding.paper(2, 4).rd_channels == 1
    other = ContextEncoding.paper(64, 16, smoothing=0.5, gate_layer="tanh")
    assert (other.smoothing, type(other.gate)) == (0.5, nn.Tanh)
    assert block(torch.randn(2, 64, 3, 3)).shape == (2, 64, 3, 3)


def test_defaults():
    block = ContextEncoding(256)
    assert (block.num_codes, block.rd_channels, block.pool, block.smoothing) == (16, 16, "mean", "learned")
    assert ContextEncoding(16).rd_channels == 8  # the divisor is the least
    assert ContextEncoding(100, rd_ratio=0.25).rd_channels == 24
    assert ContextEncoding(100, rd_ratio=0.25, rd_divisor=1).rd_channels == 25
    assert ContextEncoding(100, rd_channels=7).rd_channels == 7


def test_rd_channels_are_rounded_as_timm_rounds_them():
    from timm.layers.helpers import make_divisible

    for channels in range(1, 600, 7):
        for ratio in (1 / 16, 0.25, 1 / 3):
            assert reduced_channels(channels, ratio, 8) == make_divisible(channels * ratio, 8, round_limit=0.0)


def test_state_names():
    """What is saved is found again: names do not change."""
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    names = {"conv.weight", "encoding.codewords", "encoding.smoothing", "fc.weight", "fc.bias"}
    names |= {f"norm.{name}" for name in norm}
    assert set(ContextEncoding(16, pool="concat").state_dict()) == names
    assert set(ContextEncoding(16).state_dict()) == names | {f"norm_codes.{name}" for name in norm}
    assert ContextEncoding(16).no_weight_decay() == {"encoding.codewords", "encoding.smoothing"}


# Maps of all kinds


@each_pool
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [(2, 1, 3, 3), (2, 3, 1, 1), (2, 13, 4, 4), (1, 17, 5, 1), (2, 100, 2, 3), (0, 8, 3, 3)]
)
def test_any_channels_and_sizes(pool, kind, shape):
    block = ContextEncoding(shape[1], 4, pool=pool, smoothing=kind)
    x = torch.randn(shape, requires_grad=True)
    for training in (True, False):
        y = block.train(training)(x)
        assert y.shape == x.shape
        assert y.isfinite().all()
        y.sum().backward()
        assert x.grad.isfinite().all()
        for name, parameter in block.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@each_pool
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_sample_of_one_pixel_is_refused_in_training(pool, channels_last):
    """As BatchNorm refuses it, but with no statistic changed, num_batches_tracked included."""
    block = ContextEncoding(16, 4, pool=pool, channels_last=channels_last)
    x = torch.randn(1, 1, 1, 16) if channels_last else torch.randn(1, 16, 1, 1)
    before = norms_of(block)
    with pytest.raises(
        ValueError,
        match=r"^ContextEncoding: in training x must give BatchNorm more than one value .*, got x of shape \[1, 16, 1, 1\] "
        r"with 8 reduced channels; use a larger batch, or eval\(\)",
    ):
        block(x)
    assert equal(norms_of(block), before)
    assert block.eval()(x).isfinite().all()


def test_one_sample_and_one_reduced_channel_is_refused_in_training():
    """The norm over the codewords then has one value of each, whatever the size of the map."""
    block = ContextEncoding(16, 4, rd_channels=1)
    before = norms_of(block)
    with pytest.raises(ValueError, match=r"got x of shape \[1, 16, 5, 5\] with 1 reduced channels"):
        block(torch.randn(1, 16, 5, 5))
    assert equal(norms_of(block), before)
    block(torch.randn(2, 16, 5, 5))
    ContextEncoding(16, 4, rd_channels=1, pool="concat")(torch.randn(1, 16, 5, 5))


def test_one_sample_of_one_pixel_trains_where_no_norm_takes_statistics():
    x = torch.randn(1, 16, 1, 1)
    in_eval = ContextEncoding(16, 4)
    in_eval.norm.eval()
    in_eval.norm_codes.eval()
    assert in_eval(x).isfinite().all()
    assert ContextEncoding(16, 4, norm_layer=group_norm)(x).isfinite().all()  # 8 values for the norm over K
    assert ContextEncoding(16, 4, norm_layer=group_norm, pool="concat")(x).isfinite().all()


@each_pool
@pytest.mark.parametrize("size", [(4, 5), (1, 1)])
def test_memory_format(pool, size):
    block = ContextEncoding(16, 4, pool=pool)
    x = torch.randn(2, 16, *size)
    wanted = copy.deepcopy(block)(x)
    # Memory of its own: of a 1x1 map both formats are views of the same strides.
    last = x.to(memory_format=torch.channels_last).clone().requires_grad_()
    y = block.to(memory_format=torch.channels_last)(last)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.square().sum().backward()
    assert last.grad.is_contiguous(memory_format=torch.channels_last)


@each_pool
@pytest.mark.parametrize("training", [True, False])
def test_nhwc_is_nchw_turned(pool, training):
    block = stirred(ContextEncoding(12, 4, pool=pool)).train(training)
    turned = ContextEncoding(12, 4, pool=pool, channels_last=True).train(training)
    turned.load_state_dict(block.state_dict())
    x = torch.randn(2, 12, 4, 5)
    nchw, nhwc = x.clone().requires_grad_(), x.permute(0, 2, 3, 1).contiguous().requires_grad_()
    one, other = block(nchw), turned(nhwc)
    assert other.shape == (2, 4, 5, 12)
    assert other.is_contiguous()
    torch.testing.assert_close(other.permute(0, 3, 1, 2), one, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(one)
    one.backward(grad)
    other.backward(grad.permute(0, 2, 3, 1))
    torch.testing.assert_close(nhwc.grad.permute(0, 3, 1, 2), nchw.grad, rtol=1e-4, atol=1e-5)
    assert nhwc.grad.is_contiguous()


# Dtypes


@each_pool
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_keeps_the_norm_over_the_codewords(pool, dtype):
    """Sums over thousands of pixels have variances that fp16 calls infinite: that norm stays fp32."""
    block = ContextEncoding(16, 4, pool=pool).to(dtype)
    if pool == "mean":
        assert {tensor.dtype for tensor in block.norm_codes.state_dict().values()} == {torch.float32, torch.int64}
    assert {parameter.dtype for name, parameter in block.named_parameters() if "norm_codes" not in name} == {dtype}
    x = torch.randn(2, 16, 40, 40).to(dtype).requires_grad_()
    for training in (True, False):
        y = block.train(training)(x)
        assert y.dtype == dtype
        assert y.isfinite().all()
        y.float().square().mean().backward()
        assert x.grad.dtype == dtype
        assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


@pytest.mark.parametrize("casts", [("half",), ("double", "half"), ("bfloat16", "half"), ("half", "float", "bfloat16")])
def test_the_norm_over_the_codewords_is_fp32_however_half_is_reached(casts):
    block = stirred(ContextEncoding(16, 4))
    block.norm_codes.running_var.fill_(1e6)
    for cast in casts:
        getattr(block, cast)()
    assert block.norm_codes.weight.dtype == block.norm_codes.running_var.dtype == torch.float32
    assert (block.norm_codes.running_var == 1e6).all()
    assert block(torch.randn(2, 16, 3, 3, dtype=block.conv.weight.dtype)).isfinite().all()


def test_other_casts_reach_every_tensor():
    block = ContextEncoding(16, 4)
    assert {tensor.dtype for tensor in block.double().state_dict().values()} == {torch.float64, torch.int64}
    assert {tensor.device.type for tensor in block.to("meta").state_dict().values()} == {"meta"}
    assert not any(tensor.is_meta for tensor in block.to_empty(device="cpu").state_dict().values())
    halved = nn.Sequential(ContextEncoding(16, 4, device="meta")).half()
    assert {tensor.device.type for tensor in halved.state_dict().values()} == {"meta"}
    assert halved[0].norm_codes.weight.dtype == torch.float32


def test_a_cast_that_fails_leaves_the_block_whole():
    class Failing(nn.ReLU):
        def _apply(self, fn, recurse=True):
            raise MemoryError

    block = ContextEncoding(16, 4)
    block.act = Failing()
    with pytest.raises(MemoryError):
        block.half()
    assert [name for name, _ in block.named_children()] == [
        "conv",
        "norm",
        "act",
        "encoding",
        "norm_codes",
        "fc",
        "gate",
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_built_half_is_as_cast(dtype):
    built, cast = ContextEncoding(16, 4, dtype=dtype), ContextEncoding(16, 4).to(dtype)
    assert {n: t.dtype for n, t in built.state_dict().items()} == {n: t.dtype for n, t in cast.state_dict().items()}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        by_default = ContextEncoding(16, 4)
    finally:
        torch.set_default_dtype(before)
    assert by_default(torch.randn(2, 16, 3, 3, dtype=dtype)).dtype == dtype


@each_pool
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", ["float32", "half"])
def test_autocast(pool, dtype, x_dtype):
    block = stirred(ContextEncoding(32, 4, pool=pool, rd_channels=16))
    x = torch.randn(4, 32, 6, 6)
    wanted = copy.deepcopy(block)(x)
    x = (x if x_dtype == "float32" else x.to(dtype)).requires_grad_()
    with torch.autocast("cpu", dtype):
        y = block(x)
        assert y.dtype == x.dtype
        torch.testing.assert_close(y.float(), wanted, rtol=0.05, atol=0.05)
        y.float().square().mean().backward()
    assert {parameter.grad.dtype for parameter in block.parameters()} == {torch.float32}
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


# Owners, and the layers that are handed in


@each_pool
@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid", "tanh", "identity"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_owners_may_change_the_output_in_place(pool, gate, channels_last):
    """As ResNet does: y = block(x); y += shortcut; relu_(y)."""
    block = ContextEncoding(12, 4, pool=pool, gate_layer=gate, channels_last=channels_last)
    x = torch.randn((2, 4, 5, 12) if channels_last else (2, 12, 4, 5))

    def gradients(owner):
        leaf = x.clone().requires_grad_()
        block.zero_grad()
        owner(leaf, copy.deepcopy(block)).square().sum().backward()
        return leaf.grad

    def in_place(x, block):
        y = block(x)
        y += x
        return y.relu_()

    torch.testing.assert_close(gradients(in_place), gradients(lambda x, block: (block(x) + x).relu()))


@pytest.mark.parametrize("act", [None, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Tanh, nn.Identity, nn.Hardswish])
@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d, group_norm, nn.Identity])
def test_activations_and_norms_give_right_gradients(act, norm):
    """In place or not: the gradient is that of finite differences."""
    torch.manual_seed(0)
    block = ContextEncoding(4, 3, rd_channels=4, act_layer=act, norm_layer=norm, dtype=torch.float64)
    if norm is not None:
        assert isinstance(block.norm, nn.GroupNorm if norm is group_norm else norm)
    x = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(copy.deepcopy(block).eval(), (x,), fast_mode=True)


def test_timm_layers_are_taken():
    """Norms that bring an activation of their own, in place, among them."""
    from timm.layers import BatchNormAct2d, LayerNorm2d
    from timm.layers.activations import HardSwish

    block = ContextEncoding(16, 4, norm_layer=LayerNorm2d, act_layer=HardSwish)
    block(torch.randn(2, 16, 3, 3)).sum().backward()
    ContextEncoding(16, 4, norm_layer=BatchNormAct2d)(torch.randn(2, 16, 3, 3)).sum().backward()


def test_gates():
    class Shifted(nn.Module):
        def forward(self, x):
            return x + 1

    for gate, kind in (
        ("sigmoid", nn.Sigmoid),
        ("hard_sigmoid", nn.Hardsigmoid),
        ("tanh", nn.Tanh),
        ("identity", nn.Identity),
        (nn.Softplus, nn.Softplus),
        (Shifted(), Shifted),
    ):
        block = ContextEncoding(16, 4, gate_layer=gate).eval()
        assert type(block.gate) is kind
        x = torch.randn(2, 16, 3, 3)
        assert torch.equal(block(x), x * block.gate(block.fc(block.features(x)))[:, :, None, None])
    own = Shifted()
    assert ContextEncoding(16, 4, gate_layer=own).gate is own


RULE = 'smoothing must be "learned", "sampled" or a positive number'


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"channels": 0}, ValueError, "channels must be a positive integer, got 0"),
        ({"channels": 8.0}, TypeError, "channels must be a positive integer, got 8.0"),
        ({"num_codes": 0}, ValueError, "num_codes must be a positive integer, got 0"),
        ({"rd_channels": 0}, ValueError, "rd_channels must be a positive integer, got 0"),
        ({"rd_channels": 2.5}, TypeError, "rd_channels must be a positive integer, got 2.5"),
        ({"rd_divisor": 0}, ValueError, "rd_divisor must be a positive integer, got 0"),
        ({"rd_ratio": 0}, ValueError, "rd_ratio must be a positive number, got 0"),
        ({"rd_ratio": -0.25}, ValueError, "rd_ratio must be a positive number, got -0.25"),
        ({"rd_ratio": math.nan}, ValueError, "rd_ratio must be a positive number, got nan"),
        ({"rd_ratio": math.inf}, ValueError, "rd_ratio must be a positive number, got inf"),
        ({"pool": "max"}, ValueError, "pool must be one of mean, concat, got 'max'"),
        ({"pool": None}, ValueError, "pool must be one of mean, concat, got None"),
        ({"smoothing": "fixed"}, ValueError, RULE + ", got 'fixed'"),
        ({"smoothing": -1}, ValueError, RULE + ", got -1"),
        ({"smoothing": None}, TypeError, RULE + ", got NoneType"),
        (
            {"gate_layer": "softmax"},
            ValueError,
            "gate_layer must be one of sigmoid, hard_sigmoid, tanh, identity, a class or a module, got 'softmax'",
        ),
        ({"gate_layer": None}, TypeError, "gate_layer must be a name, a class or a module, got None"),
    ],
)
def test_errors_come_before_anything_is_allocated(arguments, error, text, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: pytest.fail("the error comes too late"))
    with pytest.raises(error) as raised:
        ContextEncoding(**{"channels": 16, "num_codes": 4} | arguments)
    assert str(raised.value) == f"ContextEncoding: {text}"


@each_pool
@pytest.mark.parametrize("times", [(2, 2), (1, 3)])
def test_gates_do_not_depend_on_the_size_of_the_image(pool, times):
    """The same content, tiled: its means are the same."""
    block, x = stirred(ContextEncoding(24, 6, pool=pool)).eval(), torch.randn(2, 24, 6, 5).relu()
    tiled = block(x.repeat(1, 1, *times))[:, :, :6, :5]
    torch.testing.assert_close(tiled, block(x), rtol=1e-5, atol=1e-5)
    if pool == "mean":
        block.encoding.aggregation = "sum"
        assert (block(x.repeat(1, 1, *times))[:, :, :6, :5] - block(x)).abs().max() > 1e-3


@pytest.mark.parametrize("start", ["paper", "spread"])
def test_the_mean_is_normed_as_the_sum_is(start):
    """Its variance is small, and the norm must not take it for nothing."""
    torch.manual_seed(0)
    block, x = ContextEncoding(64, 16, rd_channels=8, start=start).train(), torch.randn(4, 64, 14, 14)
    features = block.features(x)
    block.encoding.aggregation = "sum"
    assert 0.97 < features.norm() / block.features(x).norm() < 1.01


def test_a_map_that_is_pooled_to_a_pixel_has_no_statistics():
    block = ContextEncoding(32, 4, max_size=1)
    with pytest.raises(ValueError, match="training"):
        block(torch.randn(1, 32, 8, 8))
    assert block.norm.num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_pickle_from_before_there_was_a_choice():
    block = ContextEncoding(16, 4, aggregation="sum").eval()
    for module, names in ((block, ("max_size", "start")), (block.encoding, ("aggregation",))):
        for name in names:
            del module.__dict__[name]
    again, x = pickle.loads(pickle.dumps(block)), torch.randn(2, 16, 5, 5)
    assert (again.aggregation, again.max_size, again.start) == ("sum", None, "paper")
    torch.testing.assert_close(torch.jit.script(again)(x), again(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("size", [(15, 9), (7, 3), (28, 28)])
def test_a_pooled_map_in_graphs(size):
    block, x = ContextEncoding(16, 4, max_size=7).eval(), torch.randn(2, 16, *size)
    wanted = block(x)
    assert (_coarsen(x, 7) is x) == (size == (7, 3))  # a map that fits is not copied

    def exported(*size: int) -> torch.nn.Module:
        shapes = ({2: Dim.AUTO, 3: Dim.AUTO},)
        return torch.export.export(block, (torch.randn(2, 16, *size),), dynamic_shapes=shapes).module()

    for graph in (torch.jit.script(block), torch.fx.symbolic_trace(block), exported(16, 17), exported(5, 4)):
        torch.testing.assert_close(graph(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(28, 14), (7, 21), (56, 7)])
def test_a_whole_stride_pools_without_the_adaptive_form(size, monkeypatch):
    """Its backward on CUDA is not deterministic."""
    x = torch.randn(2, 3, *size, requires_grad=True)
    wanted = torch.nn.functional.adaptive_avg_pool2d(x, (7, 7))
    (slope,) = torch.autograd.grad(wanted.square().sum(), x)
    monkeypatch.delattr(torch.nn.functional, "adaptive_avg_pool2d")
    got = _coarsen(x, 7)
    assert torch.equal(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), x)[0], slope)


@each_pool
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last", "NHWC"])
@pytest.mark.parametrize("size", [(15, 9), (8, 8), (7, 3), (16, 2), (28, 14)])
def test_a_large_map_is_pooled_before_it_is_projected(pool, training, layout, size):
    block = stirred(ContextEncoding(24, 6, pool=pool, channels_last=layout == "NHWC")).train(training)
    coarse = copy.deepcopy(block)
    coarse.max_size = 7
    x = torch.randn(2, 24, *size)
    small = torch.nn.functional.adaptive_avg_pool2d(x, tuple(min(side, 7) for side in size))
    features = block.features(small)
    given = x.permute(0, 2, 3, 1).contiguous() if layout == "NHWC" else x
    given = given.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else given
    got = coarse(given)
    wanted = x * block.gate(block.fc(features))[:, :, None, None]
    torch.testing.assert_close(got.permute(0, 3, 1, 2) if layout == "NHWC" else got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"max_size": 0}, ValueError, "max_size must be a positive integer, got 0"),
        ({"max_size": 7.0}, TypeError, "max_size must be a positive integer, got 7.0"),
        ({"aggregation": "max"}, ValueError, "aggregation must be one of sum, mean, got 'max'"),
    ],
)
@pytest.mark.parametrize("name", ["ContextEncoding", "patch_se_blocks"])
def test_what_the_size_and_the_aggregation_may_be(arguments, error, text, name):
    model = timm.create_model("test_efficientnet")
    make = {"ContextEncoding": lambda: ContextEncoding(24, **arguments)}.get(
        name, lambda: ctxenc.patch_se_blocks(model, **arguments)
    )
    with pytest.raises(error, match=f"^{name}: {text}"):
        make()
