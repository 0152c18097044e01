"""The pool's kernels with small tiles, so that most draws have several, against the plain expression in fp64."""

import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import ctxenc
from ctxenc import functional
from ctxenc.kernels import backends
from ctxenc.kernels.fused import pool as fused

# NumPy, which the interpreter computes with, warns of every overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RESULTS = ("features", "dencoding", "dweight", "dbias", "running_mean", "running_var", "num_batches_tracked")
EXAMPLES = int(os.environ.get("CTXENC_EXAMPLES", "60"))
thorough = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def plain(encoding: Tensor, norm: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    return norm(encoding.unsqueeze(3)).squeeze(3).relu().mean(1).to(dtype)


def problem(
    B: int = 3, K: int = 5, C: int = 20, training: bool = True, momentum: float | None = 0.1, seed: int = 0, offset: float = 0.0
):  # fmt: skip
    """An encoding and a norm, each codeword with a mean and a deviation of its own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    norm = nn.BatchNorm2d(K, momentum=momentum).train(training)
    norm.weight.data, norm.bias.data = draw(K), draw(K)
    norm.running_mean, norm.running_var = draw(K) + offset, draw(K).exp()
    norm.num_batches_tracked += 6
    return draw(B, K, C) * draw(K, 1).exp() + draw(K, 1) + offset, norm


def results(function, encoding: Tensor, norm: nn.Module, dfeatures: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    norm, leaf = copy.deepcopy(norm), encoding.detach().requires_grad_()
    features = function(leaf, norm, dtype)
    grads = torch.autograd.grad(features, (leaf, norm.weight, norm.bias), dfeatures.to(features.dtype))
    return dict(zip(RESULTS, (features.detach(), *grads, *norm.buffers()), strict=True))


def tolerances(encoding: Tensor, norm: nn.Module, dfeatures: Tensor, exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """Errors that are allowed: some roundings of fp32, carried through, and what relu's kink makes of them.

    A mean may be off by 2 eps of the largest value, a deviation by 8 eps of itself.
    """
    eps, (B, K, C) = torch.finfo(torch.float32).eps, encoding.shape
    e, g = encoding.double(), dfeatures.double().unsqueeze(1) / K
    weight, bias = (parameter.detach().double()[:, None] for parameter in (norm.weight, norm.bias))
    mean, variance = (buffer.double()[:, None] for buffer in (norm.running_mean, norm.running_var))
    moved = torch.zeros(K, 1).double()  # error of the mean
    if norm.training:
        mean, variance = e.mean((0, 2))[:, None], e.var((0, 2), unbiased=False)[:, None]
        moved = 2 * eps * e.abs().amax((0, 2))[:, None]
    scale = (variance + norm.eps).rsqrt()
    normed = (e - mean) * scale
    spread = 8 * eps + (moved * scale) ** 2  # error of the deviation, of itself
    normed_off = scale * moved + (spread + 2 * eps) * normed.abs()
    z = normed * weight + bias
    z_off = weight.abs() * normed_off + 2 * eps * ((normed * weight).abs() + bias.abs())
    kink = torch.where(z.abs() <= z_off, g.abs(), 0)  # gradients that may be taken or left out
    dz = torch.where(z > 0, g, 0)
    dbias_off = (8 * eps * dz.abs() + kink).sum((0, 2))[:, None]
    dweight_off = (dz.abs() * (normed_off + 8 * eps * normed.abs()) + kink * normed.abs()).sum((0, 2))[:, None]
    de_off = kink + 4 * eps * dz.abs()
    if norm.training:
        through = exact["dbias"].abs()[:, None] + normed.abs() * exact["dweight"].abs()[:, None]
        through_off = dbias_off + normed.abs() * dweight_off + normed_off * exact["dweight"].abs()[:, None]
        de_off = de_off + (through_off + 8 * eps * through) / (B * C)
    running = {"running_mean": moved, "running_var": (spread + 4 * eps) * variance}
    bounds = {name: bound[:, 0] + 4 * eps * exact[name].abs() for name, bound in running.items()}
    return bounds | {
        "features": z_off.where(z > -z_off, 0).mean(1) + 8 * eps * exact["features"].abs(),
        "dencoding": de_off * scale * weight.abs() + spread * exact["dencoding"].abs(),
        "dweight": dweight_off[:, 0],
        "dbias": dbias_off[:, 0],
        "num_batches_tracked": torch.zeros(()),
    }


def largest_excess(
    function, encoding: Tensor, norm: nn.Module, dfeatures: Tensor, dtype: torch.dtype
) -> dict[str, float]:
    """Error over tolerance of each result: right where none is above 1. NaN, a wrong shape or dtype counts as infinite."""
    got = results(function, encoding, norm, dfeatures, dtype)
    # The gradient comes in features' dtype.
    exact = results(plain, encoding.double(), copy.deepcopy(norm).double(), dfeatures.to(dtype), torch.float64)
    allowed = tolerances(encoding, norm, dfeatures.to(dtype), exact)
    own = torch.finfo(dtype)
    allowed["features"] = allowed["features"] + own.eps / 2 * exact["features"] + own.smallest_normal * own.eps
    excess = {}
    for name, wanted in exact.items():
        expected = dtype if name == "features" else torch.int64 if name == "num_batches_tracked" else torch.float32
        if got[name].shape != wanted.shape or got[name].dtype != expected or not got[name].isfinite().all():
            excess[name] = float("inf")
            continue
        off = (got[name].double() - wanted).abs()
        excess[name] = float(torch.where(off == 0, 0, off / allowed[name]).max())
    return excess


@pytest.fixture(autouse=True)
def nothing_is_zero_by_luck(monkeypatch):
    """What torch.empty gives is NaN: what is not written shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def cut_into(patch: pytest.MonkeyPatch, block: int, parts: int) -> None:
    """Parts of a codeword of so many values a step, and at most so many parts."""
    patch.setattr(fused, "BLOCK", block)
    patch.setattr(fused, "PARTS", parts)


@st.composite
def problems(draw: st.DrawFn):
    block, parts = draw(st.sampled_from([8, 16, 64])), draw(st.sampled_from([1, 2, 8]))
    B, K, C = draw(st.integers(1, 7)), draw(st.integers(1, 9)), draw(st.integers(2, 40))
    training, momentum = draw(st.booleans()), draw(st.sampled_from([0.1, 0.0, 1.0, None]))
    seed, offset = draw(st.integers(0, 2**20)), draw(st.sampled_from([0.0, 0.0, 10.0, 100.0]))
    encoding, norm = problem(B, K, C, training, momentum, seed, offset)
    dfeatures = torch.randn(B, C, generator=torch.Generator().manual_seed(seed + 1))
    dfeatures = torch.where(dfeatures.abs() < 0.1, 0.0, dfeatures)
    return encoding, norm, dfeatures, draw(st.sampled_from(DTYPES)), (block, parts)


@thorough
@given(problems())
def test_values_gradients_and_running_statistics(problem):
    *arguments, cut = problem
    with pytest.MonkeyPatch.context() as patch:
        cut_into(patch, *cut)
        excess = largest_excess(fused.pool, *arguments)
    assert max(excess.values()) <= 1, f"error over tolerance {excess}"


def lost_codeword(encoding, norm, dtype):
    z = norm(encoding.unsqueeze(3)).squeeze(3).relu()
    return z[:, :-1].sum(1).div(z.shape[1]).to(dtype)


def relu_of_the_mean(encoding, norm, dtype):
    return norm(encoding.unsqueeze(3)).squeeze(3).mean(1).relu().to(dtype)


def lost_value_in_the_mean(encoding, norm, dtype):
    plain(encoding, norm, dtype)
    mean, variance = encoding[:, :, 1:].mean((0, 2)), encoding.var((0, 2), unbiased=False)
    z = (encoding - mean[:, None]) * (variance + norm.eps).rsqrt()[:, None]
    return (z * norm.weight[:, None] + norm.bias[:, None]).relu().mean(1).to(dtype)


def variance_without_gradient(encoding, norm, dtype):
    plain(encoding, norm, dtype)
    mean, variance = encoding.mean((0, 2)), encoding.var((0, 2), unbiased=False).detach()
    z = (encoding - mean[:, None]) * (variance + norm.eps).rsqrt()[:, None]
    return (z * norm.weight[:, None] + norm.bias[:, None]).relu().mean(1).to(dtype)


def biased_running_variance(encoding, norm, dtype):
    features, values = plain(encoding, norm, dtype), encoding.shape[0] * encoding.shape[2]
    norm.running_var.data -= 0.1 * encoding.detach().var((0, 2)) / values
    return features


MUTANTS = [(lost_codeword, True), (lost_codeword, False), (relu_of_the_mean, True), (relu_of_the_mean, False)]
MUTANTS += [(lost_value_in_the_mean, True), (variance_without_gradient, True), (biased_running_variance, True)]


@pytest.mark.parametrize(("mutant", "training"), MUTANTS)
def test_the_tolerance_tells_mutants(mutant, training):
    for seed in range(5):
        encoding, norm = problem(10, 5, 40, training=training, seed=seed)
        dfeatures = torch.randn(10, 40, generator=torch.Generator().manual_seed(seed))
        assert max(largest_excess(mutant, encoding, norm, dfeatures, torch.float32).values()) > 10


@both_modes
@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 1, 700), (3, 65, 40), (5, 16, 500)])
def test_with_the_tiles_of_a_gpu(shape, training):
    encoding, norm = problem(*shape, training=training)
    dfeatures = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(1))
    assert max(largest_excess(fused.pool, encoding, norm, dfeatures, torch.bfloat16).values()) <= 1


@both_modes
def test_the_same_bits_every_time(training, monkeypatch):
    cut_into(monkeypatch, 8, 4)
    encoding, norm = problem(training=training)
    first, second = (results(fused.pool, encoding, norm, torch.ones(3, 20), torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in RESULTS)


@both_modes
def test_nan_goes_through(training):
    encoding, norm = problem(training=training)
    encoding[1, 2, 3] = float("nan")
    got, wanted = (results(f, encoding, norm, torch.ones(3, 20), torch.float32) for f in (fused.pool, plain))
    assert got["features"][1, 3].isnan()
    for name in RESULTS:
        assert torch.equal(got[name].isnan(), wanted[name].isnan()), name


@both_modes
def test_at_the_kink_of_relu_there_is_no_gradient(training):
    encoding, norm = problem(training=training)
    norm.weight.data[2], norm.bias.data[2] = 0, 0
    got, wanted = (results(f, encoding, norm, torch.ones(3, 20), torch.float32) for f in (fused.pool, plain))
    for name in ("dencoding", "dweight", "dbias"):
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-6)
    assert got["dbias"][2] == got["dweight"][2] == 0


def test_a_gradient_of_any_strides():
    encoding, norm = problem()
    encoding.requires_grad_()
    (one,) = torch.autograd.grad(fused.pool(encoding, norm, torch.float32).sum(), encoding)
    (other,) = torch.autograd.grad(fused.pool(encoding, norm, torch.float32), encoding, torch.ones(20, 3).t())
    assert torch.equal(one, other)


def test_only_the_gradient_that_is_wanted():
    encoding, norm = problem()
    every = results(fused.pool, encoding, norm, torch.ones(3, 20), torch.float32)
    norm.requires_grad_(False)
    leaf = encoding.requires_grad_()
    assert torch.equal(torch.autograd.grad(fused.pool(leaf, norm, torch.float32).sum(), leaf)[0], every["dencoding"])
    norm.bias.requires_grad_()
    features = fused.pool(encoding.detach(), norm, torch.float32)
    assert torch.equal(torch.autograd.grad(features.sum(), norm.bias)[0], every["dbias"])
    with torch.inference_mode():
        assert torch.equal(fused.pool(encoding, norm, torch.float32), features)


@both_modes
def test_second_derivatives_are_those_of_the_plain_expression(training):
    seconds = []
    for function in (fused.pool, plain):
        encoding, norm = problem(training=training, seed=3)
        leaves = (encoding.double().float().requires_grad_(), norm.weight, norm.bias)
        features = function(leaves[0], norm, torch.float32)
        first = torch.autograd.grad(features.square().sum(), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves))
    for got, wanted in zip(*seconds, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_a_change_of_the_running_statistics_is_told_to_autograd():
    encoding, norm = problem()
    before = norm.running_mean._version, norm.running_var._version, norm.num_batches_tracked._version
    fused.pool(encoding, norm.eval(), torch.float32)
    assert before == (norm.running_mean._version, norm.running_var._version, norm.num_batches_tracked._version)
    kept = plain(encoding.requires_grad_(), norm)
    fused.pool(encoding, norm.train(), torch.float32)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


# The block


@pytest.fixture
def calls(monkeypatch):
    """The shapes with which the fused pool was called."""
    shapes, pool = [], fused.pool
    monkeypatch.setattr(fused, "pool", lambda e, *rest: shapes.append(tuple(e.shape)) or pool(e, *rest))
    return shapes


def block_results(block, x, backend, dtype=None):
    block, leaf = copy.deepcopy(block), x.detach().requires_grad_()
    with ctxenc.use_backend(backend), torch.autocast("cpu", dtype, enabled=dtype is not None):
        y = block(leaf)
    grads = torch.autograd.grad(y.float().square().sum(), [leaf, *block.parameters()])
    return [y, *grads, *block.norm_codes.buffers()]


@both_modes
@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_block(training, momentum, calls):
    torch.manual_seed(0)
    block, x = ctxenc.ContextEncoding(16, 4).train(training), torch.randn(3, 16, 5, 6)
    block.norm_codes.momentum = momentum
    got, wanted = (block_results(block, x, backend) for backend in ("triton", "torch"))
    assert calls == [(3, 4, 8)]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_have_the_dtype_of_the_map(dtype, calls):
    torch.manual_seed(0)
    block, x = ctxenc.ContextEncoding(16, 4, dtype=dtype), torch.randn(3, 16, 5, 6).to(dtype)
    with ctxenc.use_backend("triton"):
        assert block.features(x).dtype == dtype
    got, wanted = (block_results(block, x, backend)[0] for backend in ("triton", "torch"))
    torch.testing.assert_close(got, wanted)
    assert len(calls) == 2


def test_under_autocast(calls):
    torch.manual_seed(0)
    block, x = ctxenc.ContextEncoding(16, 4), torch.randn(3, 16, 5, 6).bfloat16()
    got, wanted = (block_results(block, x, backend, torch.bfloat16)[0] for backend in ("triton", "torch"))
    assert len(calls) == 1
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)


def test_one_value_a_channel_is_refused_before_anything_changes(calls):
    block = ctxenc.ContextEncoding(16, 4, rd_channels=1)
    with ctxenc.use_backend("triton"), pytest.raises(ValueError, match="more than one value a channel"):
        block(torch.randn(1, 16, 5, 6))
    assert not calls
    assert block.norm_codes.num_batches_tracked == 0


class OwnNorm(nn.BatchNorm2d):
    pass


def with_hook(norm):
    norm.register_forward_hook(lambda *_: None)
    return norm


def parametrized(norm):
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    return norm


LEFT = {
    "another class": lambda norm: OwnNorm(4),
    "a hook": with_hook,
    "a parametrization": parametrized,
    "no parameters": lambda norm: nn.BatchNorm2d(4, affine=False),
    "no running statistics": lambda norm: nn.BatchNorm2d(4, track_running_stats=False),
    "no norm": lambda norm: nn.Identity(),
}


@both_modes
@pytest.mark.parametrize("change", LEFT.values(), ids=LEFT)
def test_what_is_left_to_the_plain_expression(change, training, calls):
    torch.manual_seed(0)
    block, x = ctxenc.ContextEncoding(16, 4), torch.randn(3, 16, 5, 6)
    block.norm_codes = change(block.norm_codes)
    block.train(training)
    got, wanted = (block_results(block, x, backend) for backend in ("triton", "torch"))
    assert not calls
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_when_it_is_taken(monkeypatch):
    encoding, norm = problem()
    assert not functional.can_fuse_pool(encoding, norm)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "GPUS", ("cuda", "cpu"))
        assert functional.can_fuse_pool(encoding, norm)
    with ctxenc.use_backend("triton"):
        assert functional.can_fuse_pool(encoding, norm)
        assert functional.can_fuse_pool(encoding, norm.eval())
        assert not functional.can_fuse_pool(encoding.double(), norm.double())
        assert not functional.can_fuse_pool(encoding, norm.bfloat16())
        assert not functional.can_fuse_pool(encoding.transpose(0, 2), problem(20, 5, 3)[1])
        assert not functional.can_fuse_pool(encoding[:0], norm.float())
        assert not functional.can_fuse_pool(encoding.to("meta"), norm)
        assert not functional.can_fuse_pool(torch.empty(301)[1:].view(3, 5, 20), norm)
        assert not functional.can_fuse_pool(torch.randn(2, 300, 4), nn.BatchNorm2d(300))
        assert not functional.can_fuse_pool(encoding.as_subclass(nn.Buffer), norm)
        seen = []
        torch.func.vmap(lambda e: seen.append(functional.can_fuse_pool(e, norm)) or e)(encoding)
        make_fx(lambda e: seen.append(functional.can_fuse_pool(e, norm)) or e.clone())(encoding)
        assert seen == [False, False]


def test_the_block_compiled(calls):
    torch.manual_seed(0)
    block, x = ctxenc.ContextEncoding(16, 4), torch.randn(3, 16, 5, 6)
    wanted = block_results(block, x, "torch")
    with ctxenc.use_backend("triton"):
        got = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")(x)
    assert not calls  # a compiler fuses the plain expression
    torch.testing.assert_close(got, wanted[0], rtol=1e-4, atol=1e-4)
