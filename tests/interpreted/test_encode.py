"""The kernels' own code, with small tiles so that most draws have several in N and in D, against the specification in fp64."""

import mmap
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import ctxenc
from ctxenc.kernels import reference
from ctxenc.kernels.fused import backward, encode, forward, launch
from ctxenc.kernels.fused.tiles import Tiles
from tests.tolerance import largest_excess

# NumPy, which the interpreter computes with, warns of every overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("channels_first", "channels_last", "expanded", "sliced_pixels", "sliced_channels", "no_unit_stride")
EXAMPLES = int(os.environ.get("CTXENC_EXAMPLES", "40"))  # of the first property below, a third of it of the second
thorough = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def triton(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    return ctxenc.encode(x, codewords, smoothing, backend="triton")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (B, D, N) in other strides; "expanded" repeats the first image."""
    B, D, N = x.shape
    match layout:
        case "channels_last":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "expanded":
            return x[:1].expand(B, D, N)
        case "sliced_pixels":
            return torch.cat([x, x], 2)[:, :, 1 : N + 1] if N > 1 else x
        case "sliced_channels":
            return torch.cat([x, x], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, D:]
        case "no_unit_stride":
            return torch.stack([x, x], 3)[..., 0]
        case _:
            return x


@st.composite
def problems(draw: st.DrawFn):
    """x, codewords, smoothing, an incoming gradient, and how the launch cuts its work."""
    tiles = Tiles(draw(st.sampled_from([16, 32, 64])), draw(st.sampled_from([16, 32])), 4, 2)
    unit = draw(st.sampled_from([1, 8]))  # 8: rows of 16 bytes in half precision
    N, D = (draw(st.integers(1, 3 * size // unit)) * unit for size in (tiles.block_n, tiles.block_d))
    B, K = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    dtype, shared = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    offset = draw(st.sampled_from([0.0, 0.0, 1.0, 100.0, -1000.0]))
    spread = draw(st.sampled_from([1e-3, 1.0, 1.0, 8.0]))
    x = torch.randn(B, D, N, generator=generator) * spread + offset
    codewords = torch.randn(K, D, generator=generator) * spread * draw(st.sampled_from([0.1, 1.0])) + offset
    hardness = draw(st.sampled_from([0.0, 1.0, 1.0, 30.0, -1.0])) / (D * spread**2)
    smoothing = torch.rand(() if shared else (K,), generator=generator) * hardness
    grad = torch.randn(B, K, D, generator=generator) * draw(st.sampled_from([1.0, 1e-6, 1e6]))
    cut = tiles, draw(st.sampled_from([1, 3, 8, 100]))
    return lay_out(x.to(dtype), draw(st.sampled_from(LAYOUTS))), codewords, smoothing, grad, cut


@pytest.fixture(autouse=True)
def nothing_is_zero_by_luck(monkeypatch):
    """What torch.empty gives is NaN: what is not written shows."""
    deterministic = torch.utils.deterministic
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def cut_into(patch: pytest.MonkeyPatch, cut: tuple[Tiles, int]) -> None:
    """Launch with these tiles, on a GPU with room for so many programs."""
    tiles, slots = cut
    launch.make_plan.cache_clear()
    patch.setattr(launch, "choose_tiles", lambda *_: tiles)
    for module in (forward, backward):
        patch.setattr(module, "count_slots", lambda *_: slots)


@pytest.fixture(autouse=True)
def no_plan_is_left():
    yield
    launch.make_plan.cache_clear()


def triton_means(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """The sums once more, from means."""
    return ctxenc.encode(x, codewords, smoothing, aggregation="mean", backend="triton") * x[0, 0].numel()


@thorough
@given(problems(), st.sampled_from([triton, triton_means]))
def test_values_and_gradients(problem, function):
    *arguments, cut = problem
    with pytest.MonkeyPatch.context() as patch:
        cut_into(patch, cut)
        excess = largest_excess(function, *arguments, products=arguments[0].dtype)
    assert max(excess.values()) <= 1, f"error over tolerance {excess} at {[tuple(t.shape) for t in arguments]}"


@settings(thorough, max_examples=EXAMPLES // 3)
@given(problems(), st.sampled_from(["sum", "mean_over_codes", "channels_last", "one_image"]))
def test_incoming_gradients_of_any_stride(problem, kind):
    """What autograd hands over is often expanded or transposed; the result is that of the same values laid out plainly."""
    x, codewords, smoothing, grad, cut = problem
    B, K, D = grad.shape
    match kind:
        case "sum":
            grad = torch.ones(()).expand(B, K, D)
        case "mean_over_codes":
            grad = grad[:, :1].expand(B, K, D)
        case "channels_last":
            grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
        case "one_image":
            grad = grad[:1].expand(B, K, D)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, codewords, smoothing)]
    with pytest.MonkeyPatch.context() as patch:
        cut_into(patch, cut)
        encoding = triton(*leaves)
        got = torch.autograd.grad(encoding, leaves, grad, retain_graph=True)
        plain = torch.autograd.grad(encoding, leaves, grad.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
    assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in leaves]


def lost_pixel(x, codewords, smoothing):
    return reference.encode(x[:, :, :-1], codewords, smoothing)


def softmax_over_pixels(x, codewords, smoothing):
    r = reference.residuals(x, codewords)
    weights = torch.softmax(-smoothing * r.square().sum(3), dim=1)
    return (weights.unsqueeze(3) * r).sum(1)


def lost_codeword(x, codewords, smoothing):
    encoding = reference.encode(x, codewords[:-1], smoothing[:-1])
    return torch.cat([encoding, torch.zeros_like(encoding[:, :1]) * codewords.sum() * smoothing.sum()], dim=1)


def wrong_product(x, codewords, smoothing):
    """A product 10 % off."""
    return reference.encode(x * 1.1, codewords, smoothing)


@pytest.mark.parametrize("mutant", [lost_pixel, softmax_over_pixels, lost_codeword, wrong_product])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tolerance_of_half_precision_tells_mutants(mutant, dtype):
    generator = torch.Generator().manual_seed(0)
    for N, D, K in [(17, 8, 3), (49, 33, 16), (196, 64, 32)]:
        x = torch.randn(2, D, N, generator=generator).to(dtype)
        codewords, smoothing = torch.randn(K, D, generator=generator) / 4, torch.rand(K, generator=generator) / D
        grad = torch.randn(2, K, D, generator=generator)

        def in_fp32(x, codewords, smoothing):
            return mutant(x.float(), codewords, smoothing)

        excess = largest_excess(in_fp32, x, codewords, smoothing, grad, products=dtype)
        assert max(excess.values()) > 1, f"{mutant.__name__} at N, D, K = {N, D, K}"


def problem(B=2, D=24, N=50, K=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, D, N, generator=generator).to(dtype)
    codewords, smoothing = torch.randn(K, D, generator=generator), torch.rand(K, generator=generator) / D
    return [tensor.requires_grad_() for tensor in (x, codewords, smoothing)]


@pytest.mark.parametrize("D", [24, 80], ids=["narrow", "wide"])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last", "run"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", [encode.FORWARD, encode.BACKWARD], ids=lambda operator: operator.name)
def test_every_dtype_solves_its_proof(operator, dtype, layout, D):
    """Whose tolerance is closer than that of any input: each term of the products shows, and channels far off the origin."""
    if layout == "run" and dtype == torch.float32:
        pytest.skip("rows of 4 bytes a pixel are read as they lie")
    x = lay_out(torch.zeros(2, D, 49 if layout == "run" else 48, dtype=dtype), layout)
    codewords, smoothing = torch.zeros(5, D), torch.zeros(5)
    given = (x, codewords, smoothing)
    if operator is encode.BACKWARD:
        given = (torch.zeros(2, 5, D), *given, torch.zeros(2, 5), True)
    constants = operator.constants(*given)
    assert (constants["block_d"] < D) == (D == 80)
    assert constants["layout"] == {"channels_first": "first", "channels_last": "last"}.get(layout, "run")
    (problem, *_) = operator.problems(constants, torch.device("cpu"))
    exact = operator.plain(*(each.double() if isinstance(each, Tensor) else each for each in problem))
    excess = operator.excess(problem, operator.kernel(*problem), exact)
    assert max(excess.values()) < 0.5, excess


@pytest.mark.parametrize("scale", [1.0, 1e6])  # a gradient beyond the range of fp16
@pytest.mark.parametrize("dtype", DTYPES)
def test_far_off_the_origin(dtype, scale):
    """Codewords of float32 lie closer together than half precision can tell features apart there."""
    generator = torch.Generator().manual_seed(0)
    x = (1000 + 1e-3 * torch.randn(2, 20, 130, generator=generator)).to(dtype)
    codewords = 1000 + 1e-3 * torch.randn(5, 20, generator=generator)
    grad, smoothing = scale * torch.randn(2, 5, 20, generator=generator), 1e4 * torch.rand(5, generator=generator)
    excess = largest_excess(triton, x, codewords, smoothing, grad, products=dtype)
    assert max(excess.values()) <= 1, excess


@pytest.mark.parametrize("D", [8, 80], ids=["narrow", "wide"])
def test_images_that_lie_gigabytes_apart(D):
    """Two of three begin beyond the reach of 32 bits. The system gives memory to the pages that are written alone."""
    apart = 2**31 - 8  # elements
    lazy = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    room = mmap.mmap(-1, 2 * (2 * apart + D * 16), flags=lazy)
    x = torch.frombuffer(room, dtype=torch.float16).as_strided((3, D, 16), (apart, 16, 1))
    generator = torch.Generator().manual_seed(0)
    x.copy_(torch.randn(x.shape, generator=generator))
    codewords, smoothing = torch.randn(3, D, generator=generator), torch.rand(3, generator=generator) / D
    together = x.contiguous().requires_grad_()
    apart_encoding, encoding = (
        triton(given.detach().requires_grad_(), codewords, smoothing) for given in (x, together)
    )
    assert torch.equal(apart_encoding, encoding)
    leaf = x.detach().requires_grad_()
    (got,) = torch.autograd.grad(triton(leaf, codewords, smoothing).sum(), leaf)
    (wanted,) = torch.autograd.grad(triton(together, codewords, smoothing).sum(), together)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("sizes", [{"B": 0}, {"D": 0}, {"N": 0}])
def test_nothing_to_encode(sizes):
    arguments = problem(**sizes)
    encoding = triton(*arguments)
    assert torch.equal(encoding, torch.zeros_like(encoding))
    assert encoding.shape == (arguments[0].shape[0], 5, arguments[0].shape[1])
    for argument, grad in zip(arguments, torch.autograd.grad(encoding.sum(), arguments), strict=True):
        assert torch.equal(grad, torch.zeros_like(argument))


@pytest.mark.parametrize("K", [2, 16])
def test_one_codeword_far_away_spoils_no_other(K):
    x, codewords, smoothing = (tensor.detach() for tensor in problem(D=64, N=100, K=K))
    codewords = codewords / 10
    codewords[0] = 1e4
    exact = reference.encode(x.double(), codewords.double(), smoothing.double())[:, 1:]
    assert (triton(x, codewords, smoothing)[:, 1:] - exact).abs().max() < 1e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_goes_through_and_stays_in_its_image(dtype):
    x, codewords, smoothing = (tensor.detach() for tensor in problem(dtype=dtype))
    x[1, 3, 7] = float("nan")
    encoding = triton(x, codewords, smoothing)
    assert encoding[0].isfinite().all()
    assert encoding[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_largest_features_are_finite(dtype):
    x, codewords, smoothing = (tensor.detach() for tensor in problem(dtype=dtype))
    x = x.sign() * 6e4
    assert triton(x.to(dtype), codewords, smoothing).isfinite().all()


def test_no_gradient_where_none_is_wanted():
    x, codewords, smoothing = problem()
    encoding = triton(x.detach(), codewords, smoothing)
    codewords_grad, smoothing_grad = torch.autograd.grad(encoding.square().sum(), (codewords, smoothing))
    wanted = torch.autograd.grad(triton(x, codewords, smoothing).square().sum(), (codewords, smoothing))
    assert torch.equal(codewords_grad, wanted[0])
    assert torch.equal(smoothing_grad, wanted[1])


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # opcheck's own doing
def test_opcheck():
    arguments = problem()
    torch.library.opcheck(torch.ops.ctxenc.encode.default, arguments)
    with torch.no_grad():
        encoding, weight_sum = torch.ops.ctxenc.encode(*arguments)
        backward = (torch.ones_like(encoding), *arguments, weight_sum, True)
        utilities = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.ctxenc.encode_backward.default, backward, test_utils=utilities)


@pytest.mark.parametrize(("backend", "again"), [("torch", 0), ("triton", 1)])
def test_products_are_counted(backend, again):
    """Those of the Triton path as PyTorch counts those of its own, and the logits of backward, which that path has saved."""
    x, codewords, smoothing = problem()
    product = 2 * x.numel() * codewords.shape[0]
    for features, count in [(x, 4), (x.detach(), 2)]:
        with FlopCounterMode(display=False) as counter:
            encoding = ctxenc.encode(features, codewords, smoothing.sum(), backend=backend)
        pairs = 2 * codewords.numel() * len(codewords) if backend == "torch" else 0  # of codewords, to find the center
        assert counter.get_total_flops() == 2 * product + pairs
        with FlopCounterMode(display=False) as counter:
            encoding.sum().backward()
        assert counter.get_total_flops() == (count + again) * product


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_the_gradient_lies_as_x_does(layout):
    x, codewords, smoothing = problem()
    x = lay_out(x.detach(), layout).requires_grad_()
    (dx,) = torch.autograd.grad(triton(x, codewords, smoothing).sum(), x)
    assert dx.stride() == x.stride()


def test_autocast_leaves_the_parameters_alone():
    arguments = problem(dtype=torch.bfloat16)
    wanted = triton(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(triton(*arguments), wanted)


def test_compiled_without_a_break():
    arguments = problem()
    compiled = torch.compile(triton, fullgraph=True, backend="aot_eager")
    encoding = compiled(*arguments)
    assert torch.equal(encoding, triton(*arguments))
    got = torch.autograd.grad(encoding.square().sum(), arguments)
    wanted = torch.autograd.grad(triton(*arguments).square().sum(), arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_fakes_lie_as_results_do():
    """Which opcheck does not see: of parameters of other strides."""
    x, codewords, smoothing = (tensor.detach() for tensor in problem())
    codewords, smoothing = codewords.t().contiguous().t(), torch.stack([smoothing, smoothing], 1)[:, 0]
    encoding, weight_sum = torch.ops.ctxenc.encode(x, codewords, smoothing)
    arguments = (encoding, x, codewords, smoothing, weight_sum, True)
    with FakeTensorMode() as mode:
        fakes = torch.ops.ctxenc.encode_backward(
            *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments)
        )
    for real, fake in zip(torch.ops.ctxenc.encode_backward(*arguments), fakes, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, d, s: (x.double(), d, s), "float64 has only the PyTorch path"),
        (lambda x, d, s: (x, d.double(), s), "float64 has only the PyTorch path"),
        (lambda x, d, s: (x, d, s.double()), "float64 has only the PyTorch path"),
        (
            lambda x, d, s: (x, d[:1].expand(257, -1), s[:1].expand(257)),
            "it takes 4096 channels and 256 codewords at most",
        ),
        (lambda x, d, s: (x.to("meta"), d.to("meta"), s.to("meta")), "x is on meta, and Triton needs a GPU"),
    ],
)
def test_what_it_cannot_do_is_told(change, reason):
    arguments = change(*(tensor.detach() for tensor in problem()))
    with pytest.raises(RuntimeError, match=f'^encode: backend="triton" cannot run: {reason}'):
        triton(*arguments)


def test_transforms_are_told():
    x, codewords, smoothing = (tensor.detach() for tensor in problem())
    with pytest.raises(RuntimeError, match=r"inside torch\.func transforms only the PyTorch path runs"):
        torch.func.vmap(triton, (0, None, None))(x.unsqueeze(1), codewords, smoothing)
