"""What "auto" must not lose by taking the fused operators: everything that the PyTorch path does. CPU tensors count as a GPU's."""

import subprocess
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ctxenc
from ctxenc import functional
from ctxenc.kernels import backends, reference, verdicts
from ctxenc.kernels.fused import encode, gate
from tests.interpreted.test_verdicts import StandIn, a_gpu_of_its_own, draw, each_way, proof, silence, way

aten = torch.ops.aten
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")  # forward-mode AD's own
__all__ = ["a_gpu_of_its_own"]  # a fixture that all tests here use


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    leaves = draw(2, 6, 3, 5), draw(4, 6, seed=1), draw(4, seed=2).abs()
    return [leaf.to(dtype).requires_grad_() for leaf in leaves]


def specified(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    return reference.encode(x.flatten(2), codewords, smoothing)


def gated(x: Tensor, logits: Tensor) -> Tensor:
    assert functional.can_fuse_gate(x, logits)
    return functional.run_fused_gate(x, logits, False)


def plainly_gated(x: Tensor, logits: Tensor) -> Tensor:
    return x * logits.sigmoid()[..., None, None]


def pooled(encoding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    norm = torch.nn.BatchNorm2d(4)
    norm.weight, norm.bias = (torch.nn.Parameter(each.detach()) for each in (weight, bias))
    assert functional.can_fuse_pool(encoding, norm) or backends.is_watched()
    for name, each in (("weight", weight), ("bias", bias)):  # which may be no leaf
        del norm._parameters[name]
        object.__setattr__(norm, name, each)
    return functional.run_fused_pool(encoding, norm, torch.float32)


def plainly_pooled(encoding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(encoding, None, None, weight, bias, training=True).relu().mean(1)


def specified_means(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    return specified(x, codewords, smoothing) / x[0, 0].numel()


encode_means = partial(ctxenc.encode, aggregation="mean")
FUNCTIONS = {
    "encode": (ctxenc.encode, specified),
    "encode_means": (encode_means, specified_means),
    "gate": (gated, plainly_gated),
    "pool": (pooled, plainly_pooled),
}
each_function = pytest.mark.parametrize("name", list(FUNCTIONS))


def inputs(name: str) -> list[Tensor]:
    shapes = {"encode": [], "encode_means": [], "gate": [(2, 6, 3, 5), (2, 6)], "pool": [(3, 4, 6), (4,), (4,)]}[name]
    return [draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)] or tensors()


def launches() -> int:
    return sum(operator.kernel.calls for operator in verdicts.OPERATORS.values())


def assert_close(got, wanted) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def no_kernel():
    """Not one may be launched."""
    yield
    assert launches() == 0


@each_function
@each_way
def test_second_derivatives(name, registered):
    """A backward that is differentiated again takes the PyTorch path: what a kernel gave would count as a constant."""
    function, specification = FUNCTIONS[name]
    with way(registered):
        y = function(*(given := inputs(name)))
        assert launches()
        before = launches()
        first = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        assert launches() == before
        second = torch.autograd.grad(sum(each.square().sum() for each in first), given)
    wanted = inputs(name)
    first_wanted = torch.autograd.grad(specification(*wanted).square().sum(), wanted, create_graph=True)
    assert_close(first, first_wanted)
    assert_close(second, torch.autograd.grad(sum(each.square().sum() for each in first_wanted), wanted))


def test_third_derivatives_and_those_in_the_incoming_gradient():
    def third(function):
        given = tensors()
        incoming = draw(2, 4, 6, seed=3).requires_grad_()
        (first,) = torch.autograd.grad(function(*given), given[0], incoming, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), given[1], create_graph=True)
        return torch.autograd.grad(second.sum(), [*given, incoming])

    assert_close(third(ctxenc.encode), third(specified))


def test_an_input_made_of_another_is_differentiated_once():
    """A backward that is differentiated again must not run on into the codewords' own history."""

    def gradients(function):
        x = tensors()[0]
        codewords = x.mean((0, 2, 3)) * draw(4, 1, seed=4)
        e = function(x, codewords, draw(4, seed=2).abs())
        first = torch.autograd.grad(e.square().sum(), (x, codewords), create_graph=True)
        return *first, *torch.autograd.grad(first[0].square().sum(), x)

    for got, wanted in zip(gradients(ctxenc.encode), gradients(specified), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6 * float(wanted.detach().abs().max()))


@each_function
def test_a_part_of_the_inputs_requires_gradients(name):
    function, specification = FUNCTIONS[name]
    for place, _ in enumerate(inputs(name)):
        for create_graph in (False, True):

            def gradient(function, place=place, create_graph=create_graph):
                given = [each.detach().requires_grad_(i == place) for i, each in enumerate(inputs(name))]
                return torch.autograd.grad(function(*given).square().sum(), given[place], create_graph=create_graph)

            assert_close(gradient(function), gradient(specification))


@each_function
def test_a_jacobian_that_is_vectorised(name):
    """Its forward is an ordinary one, its backward runs under vmap."""
    function, specification = FUNCTIONS[name]
    given = tuple(each.detach() for each in inputs(name))
    got = torch.autograd.functional.jacobian(function, given, vectorize=True)
    assert launches()
    assert_close(got, torch.autograd.functional.jacobian(specification, given))


def test_forward_mode(no_kernel):
    given = [each.detach() for each in tensors()]
    tangents = [draw(*each.shape, seed=9) for each in given]
    with forward_ad.dual_level(), torch.no_grad():
        duals = [forward_ad.make_dual(*pair) for pair in zip(given, tangents, strict=True)]
        got = forward_ad.unpack_dual(ctxenc.encode(*duals)).tangent
        assert not functional.can_fuse_gate(duals[0], draw(2, 6))
    assert_close(got, jvp(specified, tuple(given), tuple(tangents))[1])


def test_forward_mode_over_a_backward():
    """The forward was a kernel's, before the level began; the tangent goes through the backward."""

    def tangent(function):
        given = tensors()
        e = function(*given)
        with forward_ad.dual_level():
            incoming = forward_ad.make_dual(draw(2, 4, 6, seed=3), draw(2, 4, 6, seed=4))
            (dx,) = torch.autograd.grad(e, given[0], incoming)
            return forward_ad.unpack_dual(dx).tangent

    with silence():
        tangent(ctxenc.encode)
    assert launches() == encode.FORWARD.kernel.calls
    assert_close(tangent(ctxenc.encode), tangent(specified))


def test_transforms(no_kernel):
    given = tuple(each.detach() for each in tensors())
    with torch.no_grad():
        assert_close(jvp(ctxenc.encode, given, given), jvp(specified, given, given))
    assert_close(jacrev(ctxenc.encode)(*given), jacrev(specified)(*given))
    assert_close(vmap(ctxenc.encode, (0, None, None))(given[0][:, None], *given[1:])[:, 0], specified(*given))

    def loss(function):
        return lambda *given: function(*given).square().sum()

    assert_close(grad(loss(ctxenc.encode), (0, 1, 2))(*given), grad(loss(specified), (0, 1, 2))(*given))
    vmap(lambda x: x * functional.can_fuse_gate(x, x[:, :, 0, 0]))(given[0][None])


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_inside_compiled_code(transform, no_kernel):
    given = tuple(each.detach() for each in tensors())

    def transformed(function):
        match transform:
            case "vmap":
                return lambda x, *rest: vmap(function, (0, None, None))(x[:, None], *rest)
            case "grad":
                return grad(lambda *given: function(*given).square().sum())
            case _:
                return lambda *given: jvp(function, given, given)[1]

    torch.compiler.reset()
    compiled = torch.compile(transformed(ctxenc.encode), fullgraph=True, backend="aot_eager")
    assert_close(compiled(*given), transformed(specified)(*given))


def test_compiled_code_takes_the_operators():
    """In both directions, and as eager code does: whether a kernel serves is seen at every call."""
    torch.compiler.reset()
    compiled = torch.compile(ctxenc.encode, fullgraph=True, backend="aot_eager")
    given = tensors()
    gradients = torch.autograd.grad(compiled(*given).square().sum(), given)
    assert (encode.FORWARD.kernel.calls, encode.BACKWARD.kernel.calls) == (
        proof(encode.FORWARD) + 1,
        proof(encode.BACKWARD) + 1,
    )
    wanted = tensors()
    assert_close(gradients, torch.autograd.grad(specified(*wanted).square().sum(), wanted))
    torch.compiler.reset()


@each_function
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # of Dynamo, which looks at inner tensors
def test_compiled_autograd(name):
    """Over an eager forward: Dynamo traces the backward of the Function that served it."""
    function, specification = FUNCTIONS[name]
    torch.compiler.reset()
    given = inputs(name)
    loss = function(*given).square().sum()
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.backward()
    assert launches()
    wanted = inputs(name)
    assert_close([each.grad for each in given], torch.autograd.grad(specification(*wanted).square().sum(), wanted))
    torch.compiler.reset()


@each_function
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")  # the gradients are dropped below
def test_second_derivatives_under_compiled_autograd(name):
    function, specification = FUNCTIONS[name]
    torch.compiler.reset()
    given = inputs(name)
    loss = function(*given).square().sum()
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.backward(create_graph=True)
    assert launches()
    first = [each.grad for each in given]
    second = torch.autograd.grad(sum(each.square().sum() for each in first), given)
    wanted = inputs(name)
    exact = torch.autograd.grad(specification(*wanted).square().sum(), wanted, create_graph=True)
    assert_close([first, second], [exact, torch.autograd.grad(sum(each.square().sum() for each in exact), wanted)])
    for each in given:
        each.grad = None  # a circle of the gradient and its graph
    torch.compiler.reset()


def test_a_wrong_kernel_in_compiled_code(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(encode.FORWARD, "kernel", StandIn(encode.FORWARD, torch.zeros_like))
    compiled = torch.compile(ctxenc.encode, fullgraph=True, backend="aot_eager")
    given = tensors()
    with pytest.warns(RuntimeWarning, match="serves in place of the fused kernel encode "):
        assert_close(compiled(*given), specified(*given))
    with ctxenc.use_backend("triton"), pytest.raises(RuntimeError, match="times its tolerance"):
        compiled(*given)
    with silence(), ctxenc.use_backend("torch"):
        assert_close(compiled(*given), specified(*given))
    torch.compiler.reset()


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_graph_holds_the_operator_not_its_result(pre_dispatch):
    given = [each.detach() for each in tensors()]
    graph = make_fx(lambda *given: ctxenc.encode(*given), pre_dispatch=pre_dispatch)(*given)
    assert "ctxenc.encode" in graph.code
    other = [each + 1 for each in given]
    assert_close(graph(*other), specified(*other))


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = ctxenc.ContextEncoding(16, 4)

    def forward(self, x):
        return self.block(x)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, no_kernel):
    module, x = Encoder().eval(), draw(2, 16, 5, 5)
    exported = torch.export.export(module, (x,), strict=strict)
    assert "ctxenc" not in exported.graph_module.code
    with ctxenc.use_backend("torch"):
        assert_close(exported.module()(x), module(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_torchscript(no_kernel):
    module, x = Encoder().eval(), draw(2, 16, 5, 5)
    with ctxenc.use_backend("torch"):
        wanted = module(x)
    assert_close(torch.jit.trace(module, x, check_trace=False)(x), wanted)
    assert_close(torch.jit.script(module)(x), wanted)


def test_what_the_kernels_do_not_take(no_kernel):
    with silence():
        given = tensors(torch.float64)
        assert torch.autograd.gradcheck(ctxenc.encode, given)
        assert torch.autograd.gradgradcheck(ctxenc.encode, given)
        x = draw(1, 4, 3, 3)
        many = draw(257, 4, seed=1), draw(257, seed=2).abs()
        assert_close(ctxenc.encode(x, *many), specified(x, *many))
        wide = draw(1, 4097, 2), draw(2, 4097, seed=1), draw(2, seed=2).abs() / 4097
        assert_close(ctxenc.encode(*wide), specified(*wide))
        assert not functional.can_fuse_gate(given[0], given[0][:, :, 0, 0])


class Marked(Tensor):
    """A subclass."""


def test_subclasses(no_kernel):
    x, *rest = (each.detach() for each in tensors())
    assert type(ctxenc.encode(x.as_subclass(Marked), *rest)) is Marked
    assert not functional.can_fuse_gate(x.as_subclass(Marked), x[:, :, 0, 0])
    with pytest.raises(RuntimeError, match="a Marked takes the PyTorch path"):
        ctxenc.encode(x.as_subclass(Marked), *rest, backend="triton")
    parameter = torch.nn.Parameter(rest[0])
    assert backends.why_not(x, parameter) is None


DTENSORS = """
import os, torch, torch.distributed as dist
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
import ctxenc
from ctxenc.kernels import backends
from ctxenc.kernels.fused import encode
backends.GPUS = ("cuda", "cpu")
encode.FORWARD.kernel = encode.BACKWARD.kernel = None
mesh = init_device_mesh("cpu", (1,))
torch.manual_seed(0)
plain = [torch.randn(2, 6, 5), torch.randn(4, 6), torch.rand(4)]
places = [Shard(0), Replicate(), Replicate()]
given = [distribute_tensor(t, mesh, [place]).requires_grad_() for t, place in zip(plain, places)]
e = ctxenc.encode(*given)
assert type(e).__name__ == "DTensor", type(e)
gradients = torch.autograd.grad(e.square().sum(), given)
leaves = [t.requires_grad_() for t in plain]
wanted = ctxenc.encode(*leaves, backend="torch")
torch.testing.assert_close(e.full_tensor(), wanted)
for got, right in zip(gradients, torch.autograd.grad(wanted.square().sum(), leaves)):
    torch.testing.assert_close(got.full_tensor(), right)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_distributed_tensors():
    done = subprocess.run([sys.executable, "-c", DTENSORS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    given = tensors()
    e = checkpoint(ctxenc.encode, *given, use_reentrant=use_reentrant)
    wanted = tensors()
    assert_close(
        torch.autograd.grad(e.square().sum(), given) if not use_reentrant else backward(e, given),
        torch.autograd.grad(specified(*wanted).square().sum(), wanted),
    )
    assert encode.BACKWARD.kernel.calls == proof(encode.BACKWARD) + 1


def backward(e: Tensor, given: list[Tensor]) -> tuple[Tensor, ...]:
    e.square().sum().backward()
    return tuple(each.grad for each in given)


def test_inference_mode():
    given = tensors()
    with torch.inference_mode():
        assert_close(ctxenc.encode(*given), specified(*given))
        with torch.enable_grad():
            assert_close(ctxenc.encode(*given), specified(*given))
            assert_close(gated(given[0], given[0][:, :, 0, 0]), plainly_gated(given[0], given[0][:, :, 0, 0]))
    assert encode.FORWARD.kernel.calls == proof(encode.FORWARD) + 2
    assert gate.FORWARD.kernel.calls == proof(gate.FORWARD) + 1


class NoValues(TorchDispatchMode):
    """Refuses what waits for a GPU, which a CUDA graph cannot hold."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
def test_a_block_that_has_been_called_reads_no_value(training, monkeypatch):
    """It can be captured in a CUDA graph: by all that a CPU shows, kernels launched eagerly and by the same names."""
    for module in (encode, gate, backends):
        monkeypatch.setattr(module, "is_watched", bool)
    block, x = ctxenc.ContextEncoding(16, 4).train(training), draw(2, 16, 5, 5).requires_grad_()
    block(x).sum().backward()
    before = launches()
    monkeypatch.setattr(verdicts, "_is_capturing", lambda device: True)
    for operator in verdicts.OPERATORS.values():
        operator.served.clear()  # as at another address
    with silence(), NoValues():
        block(x).sum().backward()
    assert launches() == before + 6  # encode, the pool and the gate, each way


def test_autocast_lowers_nothing_where_no_kernel_serves(monkeypatch):
    given = tensors(torch.bfloat16)
    monkeypatch.setattr(encode.FORWARD, "kernel", StandIn(encode.FORWARD, torch.zeros_like))
    monkeypatch.setattr(encode.BACKWARD, "kernel", StandIn(encode.BACKWARD, torch.zeros_like))
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(RuntimeWarning, match=r"fused kernel encode \("):
            e = ctxenc.encode(*given)
        gradients = torch.autograd.grad(e, given, torch.ones_like(e), create_graph=True)
        with pytest.warns(RuntimeWarning, match=r"fused kernel encode_backward \("):
            plain_gradients = torch.autograd.grad(ctxenc.encode(*given), given, torch.ones_like(e))
    wanted = tensors(torch.bfloat16)
    with ctxenc.use_backend("torch"):
        exact = ctxenc.encode(*wanted)
    assert_close(e, exact)
    for got in (gradients, plain_gradients):
        torch.testing.assert_close(got, torch.autograd.grad(exact.sum(), wanted, retain_graph=True))


# Triton and the GPU


@pytest.fixture
def asked_anew():
    backends._why_no_gpu.cache_clear()
    yield
    backends._why_no_gpu.cache_clear()


def test_no_triton(asked_anew, monkeypatch, no_kernel):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    given = tensors()
    with silence():
        assert_close(ctxenc.encode(*given), specified(*given))
    assert ctxenc.backend_info(*given) == ("torch", "Triton is not installed")
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        ctxenc.encode(*given, backend="triton")


def test_an_old_triton(asked_anew, monkeypatch, no_kernel):
    import triton

    monkeypatch.setattr(triton, "__version__", "3.4.0")
    given = tensors()
    with silence():
        assert_close(ctxenc.encode(*given), specified(*given))
    assert "Triton 3.5 or higher" in ctxenc.backend_info(*given).reason


def test_a_broken_triton(asked_anew, monkeypatch, no_kernel):
    """One line, once."""
    broken = ModuleType("triton")
    broken.__spec__ = ModuleSpec("triton", None)
    monkeypatch.setitem(sys.modules, "triton", broken)  # with no version
    given = tensors()
    with pytest.warns(
        RuntimeWarning, match="^ctxenc: the PyTorch path serves, for Triton does not work here: "
    ) as told:
        assert_close(ctxenc.encode(*given), specified(*given))
    assert len(told) == 1
    with silence():
        assert_close(ctxenc.encode(*given), specified(*given))
        assert_close(F.relu(ctxenc.ContextEncoding(16, 4)(draw(2, 16, 5, 5))).shape, torch.Size([2, 16, 5, 5]))
