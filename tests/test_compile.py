"""The operator, the layer, the block and a swapped network under torch.compile."""

import copy
import os
import shutil

import pytest
import torch
import torch._dynamo.testing

import ctxenc
from ctxenc import Encoding
from ctxenc.kernels import backends
from tests.programs import (
    MODULES,
    assert_close,
    each_module,
    gradients,
    module_and_input,
)

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++", "c++"))), reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_gradients(module, x, **settings):
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, **settings)
    return gradients(module, x, compiled)


@each_module
@pytest.mark.parametrize("training", [True, False])
def test_compile(name, training):
    module, x = module_and_input(name)
    module.train(training)
    twin = copy.deepcopy(module)
    assert_close(compiled_gradients(twin, x, backend="aot_eager"), gradients(module, x))
    assert_close(twin.state_dict(), module.state_dict())  # running statistics
    with torch.no_grad():
        assert_close(torch.compile(twin.eval(), fullgraph=True, backend="aot_eager")(x), module.eval()(x))


class Told(torch.nn.Module):
    """What the choice of the form is told while a graph is made."""

    def forward(self, x):
        return x + (1 if backends.is_saving_graph() else 0)


def test_only_export_makes_a_saved_graph():
    """A compiled call takes the operator's own backward. torch.compiler.is_exporting() tells the two apart in new versions only."""
    x = torch.zeros(1)
    assert not torch.compile(Told(), fullgraph=True, backend="eager")(x)
    for strict in (False, True):
        assert torch.export.export(Told(), (x,), strict=strict).module()(x)


@needs_compiler
@pytest.mark.parametrize(("channels_last", "mode"), [(False, None), (True, None), (False, "reduce-overhead")])
def test_compile_with_inductor(channels_last, mode):
    module, x = module_and_input("mean")
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    assert_close(compiled_gradients(copy.deepcopy(module), x, mode=mode), gradients(module, x))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("function", [ctxenc.encode, ctxenc.assign], ids=["encode", "assign"])
def test_compile_of_the_functions(function, shared):
    x, codewords = torch.randn(2, 8, 5, 6, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    smoothing = torch.rand(() if shared else (3,), requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = [x, codewords, smoothing]
    got, wanted = compiled(*inputs), function(*inputs)
    assert_close(got, wanted)
    weight = torch.randn_like(wanted)
    assert_close(torch.autograd.grad(got, inputs, weight), torch.autograd.grad(wanted, inputs, weight))
    for number in (0.5, 0.25, 2):
        assert_close(compiled(x, codewords, number), function(x, codewords, number))


@pytest.mark.parametrize("channels_last", [False, True])
def test_compile_under_autocast(channels_last):
    """Nothing but x is half there either, in forward or backward."""
    layer, x = Encoding(8, 4), torch.randn(2, 8, 5, 6).bfloat16()
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def under_autocast(x):
        with torch.autocast("cpu", torch.bfloat16):
            encoding = compiled(x)
        assert encoding.dtype == torch.float32
        return encoding

    assert_close(under_autocast(x), layer(x))
    got, wanted = gradients(layer, x, under_autocast), gradients(layer, x)
    assert_close(got, wanted)


def test_compile_draws_once_for_forward_and_backward():
    layer, x = Encoding(8, 4, smoothing="sampled"), torch.randn(2, 8, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    torch.manual_seed(1)
    got = compiled(leaf)
    torch.manual_seed(1)
    drawn = torch.rand(4)
    twin = x.clone().requires_grad_()
    wanted = ctxenc.encode(twin, layer.codewords, drawn)
    assert_close(got, wanted)
    got.square().sum().backward()
    wanted.square().sum().backward()
    assert_close(leaf.grad, twin.grad)
    assert not torch.allclose(compiled(x), got)


@pytest.mark.parametrize("name", ["encoding", "shared", "mean", "concat"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_new_sizes_do_not_recompile(name, channels_last):
    """The second size makes the sizes dynamic; from the third on, in batch and pixels, no frame is compiled again."""
    module = MODULES[name]()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    sizes = [(2, 6), (3, 7), (4, 7), (4, 9), (9, 4), (2, 30)]
    for count, shape in enumerate(sizes):
        x = module_and_input(name, *shape)[1]
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        twin = copy.deepcopy(module)
        assert_close(gradients(module, x, compiled), gradients(twin, x))
        if count == 1:
            after_two = counter.frame_count
    assert counter.frame_count == after_two == 2


def test_new_sizes_of_one_kind_only():
    """First only N changes, then only B."""
    x, codewords, smoothing = torch.randn(2, 8, 5), torch.randn(3, 8), torch.rand(3)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ctxenc.encode, fullgraph=True, backend=counter)
    for shape in ((2, 8, 5), (2, 8, 6), (2, 8, 7), (2, 8, 49)):
        compiled(torch.randn(shape), codewords, smoothing)
    assert counter.frame_count == 2
    for shape in ((3, 8, 50), (4, 8, 51), (7, 8, 3)):
        x = torch.randn(shape)
        assert_close(compiled(x, codewords, smoothing), ctxenc.encode(x, codewords, smoothing))
    assert counter.frame_count == 3


def test_the_preference_is_seen_by_compiled_code():
    """Each changes the graph: nothing that was compiled for one preference serves another."""
    x, codewords, smoothing = torch.randn(2, 8, 5), torch.randn(3, 8), torch.rand(3)
    compiled = torch.compile(ctxenc.encode, fullgraph=True, backend="eager")
    compiled(x, codewords, smoothing)
    with ctxenc.use_backend("triton"), pytest.raises(RuntimeError):  # in words of torch.compile's, before 2.9
        compiled(x, codewords, smoothing)
    with ctxenc.use_backend("torch"):
        compiled(x, codewords, smoothing)
