"""The operator, the layer, the block and a swapped network under TorchScript, FX, export, and vmap and its kin."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ctxenc
from ctxenc import ContextEncoding, Encoding
from ctxenc.kernels import reference
from tests.programs import (
    BLOCKS,
    MODULES,
    assert_close,
    each_block,
    each_module,
    gradients,
    module_and_input,
    swapped_network,
)

slow_strict = pytest.param("network", True, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def _same_draws():
    torch.manual_seed(0)


# TorchScript, whose own deprecation is no news


def through_a_file(scripted):
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


torchscript = [
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning"),  # of each torch.fx graph
]


class TestTorchScript:
    pytestmark = torchscript

    @each_module
    def test_script(self, name):
        module, x = module_and_input(name)
        scripted = through_a_file(torch.jit.script(module.eval()))
        for other in (x, module_and_input(name, 3, 9)[1]):
            assert_close(scripted(other), module(other))
        assert_close(gradients(scripted, x), gradients(module, x))

    @each_block
    def test_script_in_training(self, name):
        module, x = module_and_input(name)
        scripted = through_a_file(torch.jit.script(copy.deepcopy(module)))
        assert_close(gradients(scripted, x), gradients(module, x))
        assert_close(dict(scripted.named_buffers()), dict(module.named_buffers()))  # running statistics

    def test_script_draws_at_every_call(self):
        layer, x = Encoding(8, 4, smoothing="sampled"), torch.randn(2, 8, 5)
        scripted = torch.jit.script(layer)
        for each in (scripted, torch.jit.script(torch.fx.symbolic_trace(layer))):
            torch.manual_seed(1)
            wanted = layer(x)
            torch.manual_seed(1)
            assert_close(each(x), wanted)
            assert not torch.allclose(each(x), wanted)
        assert_close(scripted.eval()(x), layer.eval()(x))

    @pytest.mark.parametrize(
        ("name", "with_grad"), [*((name, recorded) for name in BLOCKS for recorded in (False, True)), ("network", True)]
    )
    def test_trace(self, name, with_grad):
        """With autograd recording too, though a traced autograd.Function could not be saved."""
        module, x = module_and_input(name)
        module.eval()
        with torch.set_grad_enabled(with_grad):
            traced = through_a_file(torch.jit.trace(module, x, check_trace=False))  # checked below
        assert_close(traced(x), module(x))
        other = module_and_input(name, 3)[1]
        assert_close(traced(other), module(other))
        assert_close(gradients(traced, x), gradients(module, x))

    @each_module
    @pytest.mark.parametrize("training", [True, False])
    def test_script_of_a_symbolic_trace(self, name, training):
        module, x = module_and_input(name)
        module.train(training)
        scripted = through_a_file(torch.jit.script(torch.fx.symbolic_trace(copy.deepcopy(module))))
        assert_close(gradients(scripted, x), gradients(module, x))

    def test_trace_of_the_function(self):
        codewords, smoothing, x = torch.randn(3, 8), torch.rand(3), torch.randn(2, 8, 5)
        traced = through_a_file(torch.jit.trace(ctxenc.encode, (x, codewords, smoothing)))
        assert_close(traced(x, codewords + 1, smoothing), ctxenc.encode(x, codewords + 1, smoothing))


# FX


@each_module
@pytest.mark.parametrize("training", [True, False])
def test_symbolic_trace(name, training):
    module, x = module_and_input(name)
    module.train(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(module))
    assert_close(gradients(traced, x), gradients(module, x))
    for shape in ((3, 5), (2, 8)):  # nothing of the first shape is left in the graph
        other = module_and_input(name, *shape)[1]
        assert_close(traced(other), module(other))


def test_symbolic_trace_draws_at_every_call():
    layer = Encoding(8, 4, smoothing="sampled")
    traced, x = torch.fx.symbolic_trace(layer), torch.randn(2, 8, 5)
    torch.manual_seed(1)
    wanted = layer(x)
    torch.manual_seed(1)
    assert torch.equal(traced(x), wanted)
    assert not torch.equal(traced(x), wanted)


def test_symbolic_trace_of_training_serves_evaluation():
    """The check of the batch is not frozen into the graph: BatchNorm has one of its own."""
    block = ContextEncoding(8, 4)
    traced, x = torch.fx.symbolic_trace(block), torch.randn(1, 8, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        traced(x)
    assert torch.equal(traced.eval()(x), block.eval()(x))


def test_feature_extractors():
    """Torchvision's trains too: it traces in both modes."""
    from timm.models import create_feature_extractor as timm_extractor
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model, x = swapped_network(), torch.randn(2, 3, 48, 48)
    block = ctxenc.find_context_blocks(model)[0].name
    nodes = get_graph_node_names(model)[1]
    node = next(name for name in reversed(nodes) if name.startswith(block + "."))
    seen = {}
    handle = model.get_submodule(block).register_forward_hook(lambda _, __, out: seen.update(out=out))
    wanted = model.eval()(x)
    handle.remove()
    for extractor in (
        create_feature_extractor(model, {node: "gated"}).eval(),
        timm_extractor(model.eval(), {node: "gated"}),
    ):
        assert_close(extractor(x)["gated"], seen["out"])
    training = create_feature_extractor(model, {nodes[-1]: "out"})
    assert_close(training.eval()(x)["out"], wanted)
    training.train()(x)["out"].sum().backward()


# Export


@pytest.mark.parametrize(
    ("name", "strict"),
    [*((name, strict) for name in BLOCKS for strict in (False, True)), ("network", False), slow_strict],
)
def test_export(name, strict):
    """With batch, height and width left open."""
    module, x = module_and_input(name, 2, 6)
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(module.eval(), (x,), dynamic_shapes=(dynamic,), strict=strict)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    again = torch.export.load(buffer).module()
    for shape in ((2, 6), (5, 9), (3, 5)):
        other = module_and_input(name, *shape)[1]
        assert_close(again(other), module(other))


def test_export_in_training():
    module, x = module_and_input("mean")
    exported = torch.export.export(copy.deepcopy(module), (x,)).module()
    assert_close(exported(x), module(x))
    assert_close(dict(exported.named_buffers()), dict(module.named_buffers()))


@pytest.mark.parametrize("way", ["export", "script", "trace"])
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_a_saved_graph_under_autocast_keeps_the_distances(way):
    """Its products are rounded (README, Limits), which factors close to each other must survive: |x|^2 goes into none of them."""
    layer, x = Encoding(512, 16), torch.randn(2, 512, 50)
    with torch.no_grad():
        layer.smoothing.uniform_(0.98, 1.02)
        layer.codewords.normal_(std=0.1)
        match way:
            case "export":
                graph = torch.export.export(layer, (x,)).module()
            case "script":
                graph = torch.jit.script(layer)
            case "trace":
                graph = torch.jit.trace(layer, x, check_trace=False)
        wanted = copy.deepcopy(layer).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            got = graph(x)
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()


# torch.func


def arguments(dtype=torch.float64):
    return torch.randn(5, 2, 8, 6, dtype=dtype), torch.randn(5, 3, 8, dtype=dtype), torch.rand(5, 3, dtype=dtype)


DIMENSIONS = [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, None), (None, 0, 0), (0, 0, 0)]
each_in_dims = pytest.mark.parametrize("in_dims", DIMENSIONS, ids=str)


def picked(tensors, in_dims, index: int):
    """The slice of the arguments that are mapped over, the first of those that are not."""
    return [tensor[index if dim == 0 else 0] for tensor, dim in zip(tensors, in_dims, strict=True)]


def mapped(tensors, in_dims):
    return [tensor if dim == 0 else tensor[0] for tensor, dim in zip(tensors, in_dims, strict=True)]


@each_in_dims
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vmap(in_dims, layout, dtype):
    tensors = arguments(dtype)
    if layout == "channels_last":
        tensors = tensors[0].transpose(2, 3).contiguous().transpose(2, 3), *tensors[1:]
    for function in (ctxenc.encode, ctxenc.assign):
        wanted = torch.stack([function(*picked(tensors, in_dims, index)) for index in range(5)])
        assert_close(vmap(function, in_dims)(*mapped(tensors, in_dims)), wanted)


@each_in_dims
def test_gradients_through_vmap(in_dims):
    """backward() of what vmap returns, and vmap of grad, against the loop."""
    tensors = arguments()

    def loss(x, codewords, smoothing):
        return ctxenc.encode(x, codewords, smoothing).sin().sum()

    leaves = [tensor.clone().requires_grad_() for tensor in mapped(tensors, in_dims)]
    got = torch.autograd.grad(vmap(loss, in_dims)(*leaves).sum(), leaves)
    full = [tensor.detach().requires_grad_() for tensor in tensors]
    looped = sum(loss(*picked(full, in_dims, index)) for index in range(5))
    wanted = torch.autograd.grad(looped, full)
    for one, other, dim in zip(got, wanted, in_dims, strict=True):
        assert_close(one, other if dim == 0 else other[0])
    each = vmap(grad(loss, argnums=(0, 1, 2)), in_dims)(*mapped(tensors, in_dims))
    for index in range(5):
        assert_close([one[index] for one in each], list(grad(loss, (0, 1, 2))(*picked(tensors, in_dims, index))))


@pytest.mark.parametrize("shared", [True, False])
def test_jacobians(shared):
    x, codewords, smoothing = (tensor[0] for tensor in arguments())
    smoothing = smoothing[0] if shared else smoothing
    wanted = torch.autograd.functional.jacobian(reference.encode, (x, codewords, smoothing))
    assert_close(jacrev(ctxenc.encode, argnums=(0, 1, 2))(x, codewords, smoothing), wanted)
    assert_close(torch.autograd.functional.jacobian(ctxenc.encode, (x, codewords, smoothing)), wanted)

    def total(function):
        return lambda codewords: function(x, codewords, smoothing).square().sum()

    second = torch.autograd.functional.hessian(total(reference.encode), codewords)
    assert_close(jacrev(jacrev(total(ctxenc.encode)))(codewords), second)


def test_batched_gradients():
    """Many incoming gradients in one backward, as vectorised Jacobians ask for."""
    tensors = [tensor[0].requires_grad_() for tensor in arguments()]
    encoding = ctxenc.encode(*tensors)
    incoming = torch.randn(7, *encoding.shape, dtype=encoding.dtype)
    got = torch.autograd.grad(encoding, tensors, incoming, is_grads_batched=True, retain_graph=True)
    for index in range(7):
        wanted = torch.autograd.grad(encoding, tensors, incoming[index], retain_graph=True)
        assert_close([one[index] for one in got], list(wanted))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # PyTorch's forward mode scripts
@pytest.mark.parametrize("shared", [True, False])
def test_forward_mode(shared):
    """Tangents, alone, of all directions at once, and of gradients."""
    x, codewords, smoothing = (tensor[0] for tensor in arguments())
    given = x, codewords, smoothing[0] if shared else smoothing
    tangents = tuple(torch.randn_like(tensor) for tensor in given)
    for function, wanted in ((ctxenc.encode, reference.encode), (ctxenc.assign, reference.assign)):
        expected = jvp(wanted, given, tangents)
        assert_close(jvp(function, given, tangents), expected)
        assert_close(jacfwd(function, (0, 1, 2))(*given), jacrev(wanted, (0, 1, 2))(*given))
        with forward_ad.dual_level():
            dual = function(*map(forward_ad.make_dual, given, tangents))
            assert_close(forward_ad.unpack_dual(dual).tangent, expected[1])

    def total(function):
        return lambda *given: function(*given).square().sum()

    assert_close(hessian(total(ctxenc.encode), (0, 1, 2))(*given), hessian(total(reference.encode), (0, 1, 2))(*given))


@pytest.mark.parametrize("name", ["encoding", "mean"])
def test_functional_call_of_an_ensemble(name):
    members = [MODULES[name]().eval() for _ in range(3)]
    x = module_and_input(name)[1]
    parameters, buffers = stack_module_state(members)

    def call(parameters, buffers, x):
        return functional_call(members[0], (parameters, buffers), (x,))

    wanted = torch.stack([member(x) for member in members])
    got = vmap(call, (0, 0, None))(parameters, buffers, x)
    assert_close(got, wanted)
    got.square().sum().backward()
    for index, member in enumerate(members):
        member(x).square().sum().backward()
        for key, parameter in member.named_parameters():
            torch.testing.assert_close(parameters[key].grad[index], parameter.grad, rtol=1e-3, atol=1e-3)


def test_per_sample_gradients():
    block, x = ContextEncoding(8, 4).eval(), torch.randn(4, 8, 3, 3)
    parameters = dict(block.named_parameters())

    def loss(parameters, sample):
        return functional_call(block, parameters, (sample[None],)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    for index in range(4):
        alone = grad(loss)(parameters, x[index])
        for key in parameters:
            assert_close(each[key][index], alone[key])


def test_sampled_smoothing_under_vmap():
    layer, x = Encoding(8, 4, smoothing="sampled"), torch.randn(8, 5)
    draws = vmap(lambda x: layer(x[None]), randomness="different")(x.expand(3, -1, -1))
    assert not torch.allclose(draws[0], draws[1])
    same = vmap(lambda x: layer(x[None]), randomness="same")(x.expand(3, -1, -1))
    assert_close(same[0], same[1])


def double_problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    codewords = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    return x, codewords, torch.rand(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)


def test_second_derivatives_through_vmap_over_smoothing_alone():
    def of_the_squares(encode):
        x, codewords, smoothing = double_problem()
        encoding = encode(x, codewords, smoothing)
        first = torch.autograd.grad(encoding.square().sum(), (x, codewords, smoothing), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), (x, codewords, smoothing))

    got = of_the_squares(vmap(ctxenc.encode, (None, None, 0)))
    wanted = of_the_squares(lambda x, d, s: torch.stack([ctxenc.encode(x, d, row) for row in s]))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("counted", ["forward", "backward"])
def test_checkpointing_where_one_run_is_under_another_mode(counted):
    """Such a mode hides values; what is saved is of the same shape all the same, and as right."""
    x, codewords, smoothing = double_problem()
    with FlopCounterMode(display=False) if counted == "forward" else nullcontext():
        encoding = checkpoint(ctxenc.encode, x, codewords, smoothing[0], use_reentrant=False)
    with FlopCounterMode(display=False) if counted == "backward" else nullcontext():
        (got,) = torch.autograd.grad(encoding.square().sum(), x)
    (wanted,) = torch.autograd.grad(ctxenc.encode(x, codewords, smoothing[0]).square().sum(), x)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx(mode, pre_dispatch):
    x, codewords, smoothing = (tensor.detach() for tensor in double_problem())
    graph = make_fx(lambda *args: ctxenc.encode(*args), tracing_mode=mode, pre_dispatch=pre_dispatch)(
        x, codewords, smoothing[0]
    )
    torch.testing.assert_close(graph(x, codewords + 9, smoothing[1]), ctxenc.encode(x, codewords + 9, smoothing[1]))
