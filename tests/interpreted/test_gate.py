"""The gate's kernels with small tiles, so that most draws have several, against the plain expression in fp64."""

import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ctxenc
from ctxenc.functional import can_fuse_gate
from ctxenc.kernels.fused import gate as triton_gate

# NumPy, which the interpreter computes with, warns of every overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (
    "channels_first",
    "channels_last",
    "one_image",
    "one_channel",
    "one_pixel",
    "one_value",
    "sliced",
    "unaligned",
)
LAYOUTS += ("sliced_channels", "no_unit_stride", "images_inside")
EXAMPLES = int(os.environ.get("CTXENC_EXAMPLES", "60"))
thorough = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
both_forms = pytest.mark.parametrize("residual", [False, True])


def plain(x: Tensor, logits: Tensor, residual: bool) -> Tensor:
    y = x * logits.sigmoid().to(x.dtype).unsqueeze(2)
    return (x + y).relu() if residual else y


def exactly(x: Tensor, logits: Tensor, residual: bool) -> Tensor:
    """The same by way of the logarithm: plain()'s derivative in a logit of 40 is 0 even in fp64."""
    y = x * torch.nn.functional.logsigmoid(logits).exp().unsqueeze(2)
    return (x + y).relu() if residual else y


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (B, C, N) in other strides; "one_..." repeats the first of them, with a stride of 0."""
    B, C, N = x.shape
    match layout:
        case "channels_last":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "one_image":
            return x[:1].expand(B, C, N)
        case "one_channel":
            return x[:, :1].expand(B, C, N)
        case "one_pixel":
            return x[:, :, :1].expand(B, C, N)
        case "one_value":
            return x[:1, :1, :1].expand(B, C, N)
        case "sliced":
            return torch.cat([x, x], 2)[:, :, 1 : N + 1]
        case "sliced_channels":
            return torch.cat([x, x], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, C:]
        case "no_unit_stride":
            return torch.stack([x, x], 3)[..., 0]
        case "unaligned":
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(B, C, N)
        case "images_inside":
            return x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        case _:
            return x


@st.composite
def problems(draw: st.DrawFn):
    """x, logits, an incoming gradient, the form, and how a launch cuts its work."""
    block_c, block_n = draw(st.sampled_from([8, 16, 32])), draw(st.sampled_from([8, 16, 32]))
    B, C, N = draw(st.integers(1, 3)), draw(st.integers(1, 2 * block_c + 3)), draw(st.integers(1, 4 * block_n + 3))
    dtype, aligned = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    C = -(-C // 8) * 8 if aligned else C  # then most maps are loaded by 16 bytes, whatever N is
    layouts = st.just("channels_first") if aligned else st.sampled_from(LAYOUTS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    x = torch.randn(B, C, N, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 100.0]))
    x = torch.where(torch.rand(B, C, N, generator=generator) < 0.1, 0.0, x)  # where relu has its kink
    logits = torch.randn(B, C, generator=generator) * draw(st.sampled_from([1.0, 10.0, 80.0]))
    dy = torch.randn(B, C, N, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 100.0]))
    x, dy = (lay_out(tensor.to(dtype), draw(layouts)) for tensor in (x, dy))
    logits = logits.to(draw(st.sampled_from([dtype, torch.float32])))
    if draw(st.booleans()):
        logits = logits.t().contiguous().t()
    return x, logits, dy, draw(st.booleans()), (block_c, block_n, block_n * draw(st.integers(1, 3)))


def results(function, x: Tensor, logits: Tensor, dy: Tensor, residual: bool) -> dict[str, Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, logits)]
    y = function(*leaves, residual)
    return dict(zip(("y", "dx", "dlogits"), (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True))


def largest_excess(function, x: Tensor, logits: Tensor, dy: Tensor, residual: bool) -> dict[str, float]:
    """Error over tolerance of each result: right where none is above 1. NaN, a wrong shape or dtype counts as infinite.

    The tolerance is 2 units of the result's own dtype, and of fp32 what the exponential may be off by, which goes with its
    argument; for dlogits of the sum of the absolute terms too, 8 units.
    """
    exact = results(exactly, x.double(), logits.double(), dy.double(), residual)
    got = results(function, x, logits, dy, residual)
    gate, slope = logits.double().sigmoid(), logits.double().sigmoid() * (-logits.double()).sigmoid()
    x, dy = x.double().abs(), dy.double().abs()
    fp32 = torch.finfo(torch.float32)
    moved = fp32.eps * (1 + logits.double().abs())
    gate_off = (moved * gate + fp32.tiny).unsqueeze(2)  # what is subnormal in fp32 or bf16 may count as 0
    slope_off = (moved + 8 * fp32.eps) * slope + fp32.tiny
    spread = {"y": gate_off * x, "dx": gate_off * dy, "dlogits": slope_off * (x * dy).sum(2)}
    excess = {}
    for name, wanted in exact.items():
        own = torch.finfo(logits.dtype if name == "dlogits" else got["y"].dtype)
        fits = wanted.abs() < 0.99 * own.max
        right = got[name].shape == wanted.shape and got[name].dtype == getattr(torch, own.dtype)
        if not right or not got[name][fits].isfinite().all():
            excess[name] = float("inf")
            continue
        tolerance = 2 * own.eps * wanted.abs() + spread[name] + max(own.smallest_normal * own.eps, fp32.tiny)
        excess[name] = float(torch.where(fits, (got[name].double() - wanted).abs() / tolerance, 0).max())
    return excess


@pytest.fixture(autouse=True)
def nothing_is_zero_by_luck(monkeypatch):
    """What torch.empty gives is NaN: what is not written shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def cut_into(patch: pytest.MonkeyPatch, block_c: int, block_n: int, walk: int) -> None:
    patch.setattr(triton_gate, "_choose_tile", lambda *_: (block_c, block_n))
    patch.setattr(triton_gate, "WALK", walk)
    patch.setattr(triton_gate, "PROGRAMS", 1000)


@thorough
@given(problems())
def test_values_and_gradients(problem):
    *arguments, cut = problem
    with pytest.MonkeyPatch.context() as patch:
        cut_into(patch, *cut)
        excess = largest_excess(triton_gate.gate, *arguments)
    assert max(excess.values()) <= 1, f"error over tolerance {excess}"


def lost_pixel(x, logits, residual):
    return torch.cat([plain(x[:, :, :-1], logits, residual), torch.zeros_like(x[:, :, -1:])], 2)


def pixel_lost_in_the_sum(x, logits, residual):
    return torch.cat([plain(x[:, :, :-1], logits, residual), plain(x[:, :, -1:], logits.detach(), residual)], 2)


def no_derivative_of_the_sigmoid(x, logits, residual):
    gate = logits + (logits.sigmoid() - logits).detach()
    return x * gate.unsqueeze(2)


def other_side_of_relu(x, logits, residual):
    y = x + x * logits.sigmoid().to(x.dtype).unsqueeze(2)
    return y.relu().detach() + y.clamp(max=0) - y.clamp(max=0).detach()


MUTANTS = [
    (lost_pixel, False),
    (lost_pixel, True),
    (pixel_lost_in_the_sum, False),
    (pixel_lost_in_the_sum, True),
    (no_derivative_of_the_sigmoid, False),
    (other_side_of_relu, True),
]


def problem(B=2, C=12, N=50, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, logits = torch.randn(B, C, N, generator=generator).to(dtype), torch.randn(B, C, generator=generator).to(dtype)
    return x.requires_grad_(), logits.requires_grad_()


@pytest.mark.parametrize(("mutant", "residual"), MUTANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tolerance_tells_mutants(mutant, residual, dtype):
    for N in (2, 49, 196):
        x, logits = (tensor.detach() for tensor in problem(N=N, dtype=dtype))
        dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

        def in_fp32(x, logits, residual):
            return mutant(x.float(), logits.float(), residual).to(x.dtype)

        excess = largest_excess(in_fp32, x, logits, dy, residual)
        assert max(excess.values()) > 1, f"{mutant.__name__} at N = {N}"


@both_forms
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (1, 130, 1), (1, 1, 700), (3, 67, 300), (2, 64, 256)])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last", "no_unit_stride"])
def test_with_the_tiles_of_a_gpu(shape, layout, residual):
    generator = torch.Generator().manual_seed(0)
    x, dy = (lay_out(torch.randn(shape, generator=generator).bfloat16(), layout) for _ in range(2))
    excess = largest_excess(triton_gate.gate, x, torch.randn(shape[:2], generator=generator), dy, residual)
    assert max(excess.values()) <= 1


@both_forms
@pytest.mark.parametrize("sizes", [{"B": 0}, {"C": 0}, {"N": 0}])
def test_nothing_to_gate(sizes, residual):
    x, logits = problem(**sizes)
    y = triton_gate.gate(x, logits, residual)
    assert y.shape == x.shape
    dx, dlogits = torch.autograd.grad(y.sum(), (x, logits))
    assert dx.shape == x.shape
    assert torch.equal(dlogits, torch.zeros_like(logits))


@both_forms
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_goes_where_it_does_in_torch(dtype, residual):
    x, logits = (tensor.detach() for tensor in problem(B=3, dtype=dtype))
    nan, inf = float("nan"), float("inf")
    x[0, 3, 7], x[0, 4, 8], x[0, 5, 9] = nan, inf, -inf
    logits[1, 0], logits[1, 1], logits[1, 2] = nan, inf, -inf
    logits[2, 0], logits[2, 1] = 1e4, -1e4
    got, wanted = (results(f, x, logits, torch.ones_like(x), residual) for f in (triton_gate.gate, plain))
    for name in got:
        assert torch.equal(got[name].isnan(), wanted[name].isnan()), name
        assert torch.equal(got[name].isinf(), wanted[name].isinf()), name
    assert got["y"][0, 3, 7].isnan()
    assert got["y"][1, 0].isnan().all()
    assert got["y"][1, 1:].isfinite().all()


@both_forms
def test_only_the_gradient_that_is_wanted(residual):
    x, logits = problem()
    dx, dlogits = torch.autograd.grad(triton_gate.gate(x, logits, residual).square().sum(), (x, logits))
    (alone,) = torch.autograd.grad(triton_gate.gate(x.detach(), logits, residual).square().sum(), logits)
    assert torch.equal(alone, dlogits)
    (alone,) = torch.autograd.grad(triton_gate.gate(x, logits.detach(), residual).square().sum(), x)
    assert torch.equal(alone, dx)


@both_forms
@pytest.mark.parametrize("layout", ["channels_first", "channels_last", "no_unit_stride"])
def test_results_lie_as_x_does(layout, residual):
    x, logits = problem()
    x = lay_out(x.detach(), layout).requires_grad_()
    dense = x if x.stride(1) == 1 else x.contiguous()
    y = triton_gate.gate(x, logits, residual)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.stride() == dx.stride() == dense.stride()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's doing
@both_forms
@pytest.mark.parametrize("layout", ["channels_first", "channels_last", "no_unit_stride"])
def test_opcheck(layout, residual):
    x, logits = problem(N=6)
    x = lay_out(x.detach(), layout).requires_grad_()
    torch.library.opcheck(torch.ops.ctxenc.gate.default, (x, logits, residual))
    for wanted in (True, False):
        backward = (torch.ones_like(x), x.detach(), logits.detach(), residual, wanted)
        utilities = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.ctxenc.gate_backward.default, backward, test_utils=utilities)


@both_forms
def test_compiled_without_a_break(residual):
    x, logits = problem()
    y = torch.compile(triton_gate.gate, fullgraph=True, backend="aot_eager")(x, logits, residual)
    wanted = triton_gate.gate(x, logits, residual)
    assert torch.equal(y, wanted)
    got, wanted = (torch.autograd.grad(each.square().sum(), (x, logits)) for each in (y, wanted))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def vector(*tensors: Tensor) -> int:
    last = triton_gate.is_channels_last(tensors[0])
    return triton_gate._plan_launch(*(triton_gate._copy_to_runs(x, last) for x in tensors), last=last)[2]["VECTOR"]


@pytest.mark.parametrize("elements", [1, 3])
def test_alignment_is_seen(elements):
    """Of the address, the stride of an image and its length, or that of a pixel."""
    x = torch.zeros(2 * 8 * 16 + elements)
    for aligned in (x[:-elements].view(2, 8, 16), x[:-elements].view(2, 16, 8).transpose(1, 2)):
        assert (vector(aligned), vector(aligned.half()), vector(aligned.half(), aligned.half())) == (4, 8, 8)
    unaligned = x[elements:].view(2, 8, 16)
    assert vector(unaligned) == vector(x[:-elements].view(2, 8, 16), unaligned) == 1
    assert vector(torch.zeros(2, 8 * 16 + elements)[:, elements:].unflatten(1, (8, 16))) == 1
    assert vector(torch.zeros(2, 8 * 16 + elements)[:, :-elements].unflatten(1, (8, 16))) == 1
    assert vector(torch.zeros(2, 8, 16 + elements)[:, :, :-elements]) == 4  # a copy
    assert vector(torch.zeros(2, 16, 8 + elements).transpose(1, 2)) == 1


@pytest.mark.parametrize(("C", "N"), [(8, 49), (8, 196), (2, 196), (24, 15), (1, 64), (40, 8), (16, 9)])
def test_rows_need_not_be_aligned(C, N):
    """Where the image is: 7 x 7 and 14 x 14 pixels of half precision."""
    x = torch.zeros(2, C, N)
    assert vector(x.half()) == vector(x.bfloat16(), x.bfloat16()) == 8
    assert vector(x) == 4
    assert vector(torch.zeros(2, 7, N | 1).half()) == vector(torch.zeros(2, 8, 7).half()) == 1


@both_forms
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("C", "N"), [(40, 49), (36, 196), (8, 63), (8, 9), (130, 12), (8, 801)])
def test_chunks_across_rows(C, N, dtype, residual):
    generator = torch.Generator().manual_seed(N)
    x, dy = (torch.randn(2, C, N, generator=generator).to(dtype) for _ in range(2))
    logits = torch.randn(2, C, generator=generator).to(dtype)
    assert vector(x, dy) == 16 // dtype.itemsize
    excess = largest_excess(triton_gate.gate, x, logits, dy, residual)
    assert max(excess.values()) <= 1, excess


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_a_channel_is_not_told_of_what_is_beside_it(layout):
    """NaN in one row stays there, though chunks are shared."""
    x, dy, logits = torch.ones(1, 16, 49), torch.ones(1, 16, 49), torch.zeros(1, 16)
    x[:, 5], dy[:, 9] = float("nan"), float("inf")
    results_ = results(triton_gate.gate, lay_out(x.half(), layout), logits.half(), lay_out(dy.half(), layout), False)
    assert results_["y"].isnan().all(2).nonzero()[:, 1].tolist() == [5]
    assert results_["y"].isnan().any(2).sum() == 1
    assert results_["dx"].isinf().any(2).nonzero()[:, 1].tolist() == [9]
    assert results_["dlogits"].isfinite().logical_not().nonzero()[:, 1].tolist() == [5, 9]


@pytest.mark.parametrize(("B", "N", "launches"), [(2, 196, 1), (2, 800, 2), (600, 300, 1)])
def test_sums_are_added_up_where_programs_share_the_pixels(B, N, launches, monkeypatch):
    """Else the kernel itself writes the gradient, in the dtype of the logits."""
    x, logits, grids = torch.ones(B, 8, N).bfloat16(), torch.zeros(B, 8).bfloat16(), []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    for name in ("gate_bwd_kernel", "add_splits_kernel"):
        monkeypatch.setattr(triton_gate, name, Kernel())
    _, dlogits = triton_gate._backward(x, x, logits, False, True)
    assert len(grids) == launches
    assert (dlogits.dtype, dlogits.shape) == (torch.bfloat16, (B, 8))


# The block


def block_results(block, x, backend):
    leaf = x.detach().requires_grad_()
    with ctxenc.use_backend(backend):
        y = block(leaf)
    grads = torch.autograd.grad(y.float().square().sum(), [leaf, *block.parameters()])
    return [y, *grads]


@pytest.fixture
def calls(monkeypatch):
    """The shapes with which the fused gate was called."""
    shapes, gate = [], triton_gate.gate
    monkeypatch.setattr(triton_gate, "gate", lambda x, *rest: shapes.append(tuple(x.shape)) or gate(x, *rest))
    return shapes


@pytest.mark.parametrize("map_lies", ["channels_first", "channels_last", "as timm's channels_last blocks have it"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_block(map_lies, dtype, calls):
    torch.manual_seed(0)
    block = ctxenc.ContextEncoding(16, 4, channels_last=map_lies.startswith("as"), dtype=dtype).eval()
    x = torch.randn(2, 5, 6, 16) if block.channels_last else torch.randn(2, 16, 5, 6)
    memory_format = torch.channels_last if map_lies == "channels_last" else torch.contiguous_format
    x = x.to(dtype).contiguous(memory_format=memory_format)
    got, wanted = (block_results(block, x, backend) for backend in ("triton", "torch"))
    assert calls == [(2, 16, 30)]
    assert got[0].stride() == wanted[0].stride()
    exact = block_results(copy.deepcopy(block).double(), x.double(), "torch")
    for result, value in zip(got, exact, strict=True):
        assert (result - value).abs().max() <= (1e-5 if dtype == torch.float32 else 0.01) * value.abs().max()


def test_under_autocast(calls):
    torch.manual_seed(0)
    block, x = ctxenc.ContextEncoding(16, 4).eval(), torch.randn(2, 16, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = (block_results(block, x, backend)[0] for backend in ("triton", "torch"))
    assert len(calls) == 1
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)


def test_the_block_compiled(calls):
    torch.manual_seed(0)
    block, x = ctxenc.ContextEncoding(16, 4).eval(), torch.randn(2, 16, 5, 6)
    wanted = block_results(block, x, "triton")
    assert len(calls) == 1
    got = block_results(torch.compile(block, fullgraph=True, backend="aot_eager"), x, "triton")
    assert len(calls) == 1  # a compiler fuses the plain gate with the layers around
    torch.testing.assert_close(got, wanted)


def test_another_gate_and_one_with_hooks_are_called(calls):
    torch.manual_seed(0)
    block, x = ctxenc.ContextEncoding(16, 4, gate_layer="tanh").eval(), torch.randn(2, 16, 5, 6)
    torch.testing.assert_close(
        block_results(block, x, "triton"), block_results(block, x, "torch"), rtol=1e-4, atol=1e-4
    )
    block, seen = ctxenc.ContextEncoding(16, 4).eval(), []
    block.gate.register_forward_hook(lambda module, arguments, gate: seen.append(gate))
    block_results(block, x, "triton")
    assert len(seen) == 1
    assert not calls


def test_when_it_is_taken():
    x, logits = (tensor.detach() for tensor in problem())
    assert not can_fuse_gate(x, logits)
    with ctxenc.use_backend("triton"):
        assert can_fuse_gate(x, logits)
        assert not can_fuse_gate(x.double(), logits)
        with pytest.raises(RuntimeError, match=r'^gate: backend="triton" cannot run: x is on meta'):
            can_fuse_gate(x.to("meta"), logits.to("meta"))
        with pytest.raises(RuntimeError, match=r"inside torch\.func transforms only the PyTorch path runs"):
            torch.func.vmap(lambda x: x * can_fuse_gate(x, logits))(x)
