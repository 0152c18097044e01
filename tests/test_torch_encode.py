"""What only the PyTorch path has: one rule for the center, no tiny weights, plain graphs, the same operations at every call."""

from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ctxenc
from ctxenc import ContextEncoding, Encoding
from ctxenc.kernels import reference, torch_encode
from tests.test_operator import LAYOUTS, lay_out
from tests.tolerance import largest_excess, results

TINY = torch.finfo(torch.float32).tiny
WAYS = ("eager", "inference", "strided", "compile", "export", "trace")


def by(way, x, codewords, smoothing):
    """The encoding of ctxenc.encode in a way that it can be called."""
    given = x, codewords, smoothing
    match way:
        case "inference":
            with torch.inference_mode():
                return ctxenc.encode(*given)
        case "strided":
            return ctxenc.encode(lay_out(x, "sliced"), codewords, smoothing)
        case "compile":
            torch.compiler.reset()
            return torch.compile(ctxenc.encode, fullgraph=True, backend="aot_eager")(*given)
        case "export":
            return torch.export.export(Function(), given).module()(*given)
        case "trace":
            return torch.jit.trace(ctxenc.encode, given, check_trace=False)(*given)
    return ctxenc.encode(*given)


class Function(torch.nn.Module):
    def forward(self, x, codewords, smoothing):
        return ctxenc.encode(x, codewords, smoothing)


# The center


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_codewords_that_run_off_cost_no_digit(way, offset):
    """One of 2, one of 9, and a quarter of 8, which crowd together there."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 64, 200, generator=generator) + offset
    for K, far in ((2, [0]), (2, [1]), (9, [0]), (9, [5]), (8, [0, 3])):
        for place in (1e4, -1e4):
            codewords = torch.randn(K, 64, generator=generator) / 4 + offset
            codewords[far] += place
            smoothing = torch.rand(K, generator=generator) / 64
            wanted = reference.encode(x.double(), codewords.double(), smoothing.double())
            error = (by(way, x, codewords, smoothing) - wanted).abs().max() / wanted.abs().max()
            assert error < 1e-6, (K, far, place, float(error))


def central(codewords):
    """The center as a tensor in any case."""
    c = torch_encode.find_center(codewords)
    return codewords.new_zeros(codewords.shape[1]) if c is None else c


def test_the_center_is_in_a_crowd_or_at_the_origin():
    generator = torch.Generator().manual_seed(4)
    codewords = torch.randn(8, 24, generator=generator)
    find = torch_encode.find_center
    for about in (codewords, codewords[:3], torch.zeros(5, 24), codewords * torch.tensor([1e6] + [1.0] * 7)[:, None]):
        assert find(about) is None
        assert torch.equal(central(about), torch.zeros(24))
    crowd = codewords / 4 + 100
    for few in (crowd, crowd[:1], torch.cat([codewords, crowd])):  # all, one, and half
        nearest = few[few.norm(dim=1).argmin()] if len(few) < 16 else crowd[crowd.norm(dim=1).argmin()]
        assert torch.equal(find(few), nearest)
        assert torch.equal(central(few), nearest)
    assert find(torch.cat([codewords, crowd[:7]])) is None  # one less than half


def test_the_center_is_the_same_where_no_value_can_be_read():
    generator = torch.Generator().manual_seed(5)
    about = torch.randn(6, 24, generator=generator)
    for codewords in (about, about + 100, torch.cat([about, about[:1] + 1e5])):
        assert torch.equal(torch.vmap(central)(codewords[None])[0], central(codewords))
        compiled = torch.compile(central, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(codewords), central(codewords))


# Tiny weights


class Products(TorchDispatchMode):
    """Notes every product that takes a subnormal number."""

    def __init__(self):
        super().__init__()
        self.count, self.slow = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("bmm", "mm", "matmul", "mul", "addcmul_"):
            self.count += 1
            tensors = [each for each in args if isinstance(each, torch.Tensor) and each.is_floating_point()]
            self.slow += [name] * any(bool(((each != 0) & (each.abs() < TINY)).any()) for each in tensors)
        return function(*args, **(kwargs or {}))


def saturated(shared=False):
    """A problem where some of the weights lie below the smallest normal number."""
    generator = torch.Generator().manual_seed(6)
    x, codewords = torch.randn(3, 128, 50, generator=generator), torch.randn(16, 128, generator=generator) / 10
    smoothing = torch.tensor(15.0) if shared else torch.rand(16, generator=generator)
    weights = reference.assign(x, codewords, smoothing)
    assert ((weights > 0) & (weights < TINY)).float().mean() > 0.02
    return x, codewords, smoothing


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_no_product_takes_a_subnormal_number(shared, scale):
    """With gradients as small as those of a mean too."""
    given = saturated(shared)
    grad = torch.randn(3, 16, 128, generator=torch.Generator().manual_seed(7)) * scale
    with Products() as seen:
        results(ctxenc.encode, *given, grad)
    assert seen.count > 8
    assert not seen.slow
    assert max(largest_excess(ctxenc.encode, *given, grad).values()) <= 1


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", ["export", "script"])
def test_no_product_of_a_saved_graph_takes_one(way):
    x, codewords, smoothing = saturated()
    layer = Encoding(128, 16)
    layer.codewords.data, layer.smoothing.data = codewords, smoothing
    graph = torch.export.export(layer, (x,)).module() if way == "export" else torch.jit.script(layer)
    with Products() as seen:
        graph(x.requires_grad_()).square().sum().backward()
    assert seen.count > 8
    assert not seen.slow


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", ["eager", "inference", "compile", "trace"])
def test_weights_are_zero_or_normal(way):
    given = saturated()
    assign = ctxenc.assign
    if way == "compile":
        assign = torch.compile(assign, fullgraph=True, backend="aot_eager")
    elif way == "trace":
        assign = torch.jit.trace(assign, given, check_trace=False)
    with torch.set_grad_enabled(way == "eager"):
        weights = assign(*given)
    assert weights[weights > 0].min() > 1e-30 / 16
    wanted = reference.assign(*(tensor.double() for tensor in given))
    torch.testing.assert_close(weights.double(), wanted, rtol=1e-3, atol=1.001e-30)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, 50))


# Graphs and calls


def operations(way):
    """Names of the operations in a saved graph of the layer."""
    layer, x = Encoding(8, 3), torch.randn(2, 8, 5)
    match way:
        case "export":
            nodes = torch.export.export(layer, (x,)).graph.nodes
        case "decomposed":
            nodes = torch.export.export(layer, (x,)).run_decompositions({}).graph.nodes
        case "trace":
            return [node.kind() for node in torch.jit.trace(layer, x, check_trace=False).inlined_graph.nodes()]
        case _:
            return [node.kind() for node in torch.jit.freeze(torch.jit.script(layer.eval())).graph.nodes()]
    return [str(node.target) for node in nodes if node.op == "call_function"]


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", ["export", "decomposed", "trace", "script"])
def test_saved_graphs_hold_plain_products_and_sums(way):
    """Converters know no product that adds to a scaled matrix, as baddbmm does, and no work in place."""
    with torch.no_grad():
        names = [name.removeprefix("aten").strip(":.").split(".")[0] for name in operations(way)]
    assert any(name in ("matmul", "bmm") for name in names), names
    fused = {name for name in names if name.startswith(("add", "badd")) and name != "add"}
    assert not fused
    assert not {name for name in names if name.endswith("_") and not name.endswith("__")}


class Recorder(TorchFunctionMode):
    """Notes the calls that a quantisation tool sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("mode", [Recorder, Dispatched])
def test_each_call_takes_the_same_operations(mode, offset):
    layer, x = Encoding(8, 3), torch.randn(2, 8, 5) + offset
    layer.codewords.data.add_(offset)
    calls = []
    for _ in range(4):
        with mode() as recorder:
            with torch.no_grad():
                layer(x)
            layer(x).sum().backward()
        layer.zero_grad()
        calls.append(recorder.names)
    assert len(calls[0]) > 30
    assert all(Counter(call) == Counter(calls[0]) and call == calls[0] for call in calls)


@pytest.mark.parametrize("module", [torch.nn.Linear(5, 4), Encoding(8, 3), ContextEncoding(8, 3)], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_recording_inside_inference_mode(module, compiled):
    """An inference tensor without a graph, as from any layer of PyTorch."""
    torch.compiler.reset()
    module, x = module.eval(), torch.randn(2, 8, 5, 5)
    call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    with torch.inference_mode(), torch.enable_grad():
        got = call(x)
    assert got.is_inference()
    assert not got.requires_grad
    torch.testing.assert_close(got.clone(), module(x).detach())


# For the fused path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_fused_path_falls_back_to(layout, shared, dtype):
    """The same as encode() and its backward, with no graph; the gradient of x is dense, channels last where x is."""
    x = lay_out(torch.randn(2, 6, 4, 5), layout).flatten(2).to(dtype)
    codewords, smoothing = torch.randn(3, 6), torch.rand(() if shared else (3,))
    leaves = [tensor.detach().requires_grad_() for tensor in (x, codewords, smoothing)]
    encoding, weight_sum = torch_encode.encode_with_weight_sum(*leaves)
    assert not encoding.requires_grad
    wanted = torch_encode.encode(*leaves)
    torch.testing.assert_close(encoding, wanted.detach())
    torch.testing.assert_close(weight_sum, torch_encode.assign(x, codewords, smoothing).sum(2))
    grad = torch.randn_like(encoding)
    got = torch_encode.compute_gradients(grad, *leaves, True)
    for one, other in zip(got, torch.autograd.grad(wanted, leaves, grad), strict=True):
        torch.testing.assert_close(one, other)
        assert not one.requires_grad
    dense = got[0].mT if x.stride(1) == 1 else got[0]
    assert dense.is_contiguous()
    nothing, *others = torch_encode.compute_gradients(grad, *leaves, False)
    assert nothing.shape == (0,)
    assert nothing.dtype == dtype
    for one, other in zip(others, got[1:], strict=True):
        torch.testing.assert_close(one, other)
