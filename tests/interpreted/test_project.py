"""Projection and encoding as one kernel. With small integers the projection is exact, so that the tolerance of encode holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import ctxenc
from ctxenc import ContextEncoding
from ctxenc.functional import can_fuse_projection
from ctxenc.kernels.fused import forward, launch
from ctxenc.kernels.fused import project as triton_project
from ctxenc.kernels.fused.project import can_project
from ctxenc.kernels.fused.tiles import Tiles
from tests.blocks import stirred
from tests.interpreted.test_encode import (
    DTYPES,
    EXAMPLES,
    LAYOUTS,
    lay_out,
    no_plan_is_left,
    nothing_is_zero_by_luck,
    thorough,
)
from tests.tolerance import largest_excess

__all__ = ["no_plan_is_left", "nothing_is_zero_by_luck"]  # fixtures that all tests here use
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of every overflow and NaN


@st.composite
def problems(draw: st.DrawFn):
    """Features (B, C, N), weight, shift, codewords, smoothing, and how the launch cuts its work; integers that bf16 holds."""
    D, K = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    block_d = max(16, 1 << (D - 1).bit_length())
    cut = (
        Tiles(draw(st.sampled_from([16, 32])), block_d, 4, 2),
        draw(st.sampled_from([1, 3, 8])),
    )
    unit = draw(st.sampled_from([1, 8]))  # 8: rows of 16 bytes in half precision
    C, N = draw(st.integers(1, 80 // unit)) * unit, draw(st.integers(1, 96 // unit)) * unit
    B, dtype = draw(st.integers(1, 3)), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def integers(*shape: int, bound: int = 1):
        return torch.randint(-bound, bound + 1, shape, generator=generator).to(dtype)

    x, weight, shift = integers(B, C, N), integers(D, C), integers(D, bound=40)
    offset = draw(st.sampled_from([0.0, 0.0, 20.0]))
    codewords = torch.randn(K, D, generator=generator) * draw(st.sampled_from([0.5, 5.0])) + offset
    hardness = draw(st.sampled_from([0.0, 1.0, 1.0, 10.0])) / (D * C)
    smoothing = torch.rand(() if draw(st.booleans()) else (K,), generator=generator) * hardness
    return lay_out(x, draw(st.sampled_from(LAYOUTS))), weight, shift, codewords, smoothing, cut


def projected(x, weight, shift):
    return (torch.einsum("dc,bcn->bdn", weight.double(), x.double()) + shift.double()[:, None]).relu()


def excess(x, weight, shift, codewords, smoothing, cut=None, mean=False):
    """Error over tolerance of the encoding; the gradients that largest_excess asks for are not there, and not looked at."""

    def encode(z, d, s):
        found = triton_project.project_forward(x, weight, shift, d.detach(), s.detach(), mean)
        return found * (x.shape[2] if mean else 1) + 0 * (z.float().sum() + d.sum() + s.sum())

    z = projected(x, weight, shift)
    assert torch.equal(z, z.to(x.dtype).double())
    B, (K, D) = x.shape[0], codewords.shape
    with pytest.MonkeyPatch.context() as patch:
        if cut is not None:
            launch.make_plan.cache_clear()
            patch.setattr(launch, "choose_tiles", lambda *_: cut[0])
            patch.setattr(forward, "count_slots", lambda *_: cut[1])
        errors = largest_excess(encode, z.to(x.dtype), codewords, smoothing, torch.ones(B, K, D), products=x.dtype)
    return errors["encoding"]


@thorough
@given(problems(), st.booleans())
def test_values(problem, mean):
    assert excess(*problem, mean=mean) <= 1


def problem(B=2, C=40, N=50, D=20, K=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, weight, shift = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((B, C, N), (D, C), (D,)))
    codewords, smoothing = torch.randn(K, D, generator=generator), torch.rand(K, generator=generator) / (D * C)
    return x, weight / C**0.5, shift, codewords, smoothing


@settings(max_examples=max(5, EXAMPLES // 5), deadline=None, derandomize=True)
@given(st.sampled_from([1, 40, 130]), st.sampled_from([1, 16, 50, 64]), st.sampled_from([1, 16]))
def test_as_two_steps(C, D, K):
    """Real numbers, and the tiles of a real call."""
    x, weight, shift, codewords, smoothing = problem(C=C, D=D, K=K)
    got = triton_project.project_encode(x, weight, shift, codewords, smoothing)
    wanted = ctxenc.encode(projected(x, weight, shift), codewords, smoothing)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def lost_shift(x, weight, shift, codewords, smoothing):
    return x, weight, torch.zeros_like(shift), codewords, smoothing


def lost_channel(x, weight, shift, codewords, smoothing):
    weight = weight.clone()
    weight[:, -1] = 0
    return x, weight, shift, codewords, smoothing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mutant", [lost_shift, lost_channel])
def test_the_tolerance_tells_mutants(mutant, dtype, monkeypatch):
    x, weight, shift, codewords, smoothing = problem(dtype=dtype)
    right = (x.sign(), weight.sign(), shift.sign() * 3, codewords, smoothing)
    assert excess(*right) <= 1
    encode = triton_project.project_forward
    monkeypatch.setattr(triton_project, "project_forward", lambda *args: encode(*mutant(*args[:5]), *args[5:]))
    assert excess(*right) > 1


@pytest.mark.parametrize("sizes", [{"B": 0}, {"N": 0}, {"N": 1, "B": 1}])
def test_little_or_nothing(sizes):
    x, weight, shift, codewords, smoothing = problem(**sizes)
    got = triton_project.project_encode(x, weight, shift, codewords, smoothing)
    wanted = ctxenc.encode(projected(x, weight, shift), codewords, smoothing)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


def test_nan_stays_in_its_image():
    x, weight, shift, codewords, smoothing = problem()
    x[1, 3, 7] = float("nan")
    got = triton_project.project_encode(x, weight, shift, codewords, smoothing)
    assert got[0].isfinite().all()
    assert got[1].isnan().any()


def test_opcheck():
    arguments = problem(N=6)
    torch.library.opcheck(
        torch.ops.ctxenc.project_encode.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_what_fits():
    assert can_project(torch.bfloat16, 64, 32)
    assert can_project(torch.float16, 32, 64)
    for dtype, D, K in [
        (torch.float32, 16, 16),
        (torch.float16, 64, 33),
        (torch.bfloat16, 65, 16),
        (torch.bfloat16, 33, 40),
    ]:
        assert not can_project(dtype, D, K)


# The block


def fused_block(**options):
    torch.manual_seed(0)
    return stirred(ContextEncoding(48, 6, rd_channels=20, **options)).eval().fuse()


@pytest.fixture
def calls(monkeypatch):
    """The shapes with which the kernel was called."""
    shapes, own = [], triton_project.project_encode
    monkeypatch.setattr(
        triton_project, "project_encode", lambda x, *rest: shapes.append(tuple(x.shape)) or own(x, *rest)
    )
    return shapes


def encodings(block, x):
    """By the Triton path and by the other."""
    results = []
    for backend in ("triton", "torch"):
        with ctxenc.use_backend(backend), torch.no_grad():
            results.append(block._encode(x))
    return results


def distance(got, wanted):
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("options", [{}, {"pool": "concat", "smoothing": 2.0}, {"smoothing": "sampled"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fused_block(dtype, options, channels_last, calls):
    block = fused_block(**options).to(dtype)
    x = torch.randn(2, 48, 5, 7).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    got, wanted = encodings(block, x)
    assert calls == [(2, 48, 35)]
    assert distance(got, wanted) < 0.005
    with ctxenc.use_backend("triton"), torch.no_grad():
        y = block(x)
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, block(x), rtol=0.05, atol=0.05)


def test_under_autocast(calls):
    block, x = fused_block(), torch.randn(2, 48, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        encodings(block, x)
        assert not calls  # the convolution would have rounded x
        got, wanted = encodings(block, x.bfloat16())
    assert len(calls) == 1
    assert distance(got, wanted) < 0.005


def test_compiled_without_a_break(calls):
    block, x = fused_block().bfloat16(), torch.randn(2, 48, 5, 7).bfloat16()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with ctxenc.use_backend("triton"), torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))
    assert len(calls) == 2


def with_hook(block):
    block.conv.register_forward_hook(lambda module, arguments, output: 2 * output)
    return block


def with_a_forward_in_its_place(block):
    forward = block.encoding.forward
    block.encoding.forward = lambda x: 2 * forward(x)
    return block


def with_a_stride(block):
    block.conv.stride = (2, 2)
    return block


def norm_of_its_own(block):
    block.norm = nn.Dropout(0.0)
    return block


def encoding_in_fp64(block):
    block.encoding.double()
    return block


def drawing(block):
    block = ContextEncoding(48, 6, rd_channels=20, smoothing="sampled").eval().fuse().bfloat16()
    block.encoding.train()
    return block


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.unfuse(),
        lambda block: block.float(),
        with_hook,
        with_a_forward_in_its_place,
        with_a_stride,
        norm_of_its_own,
        encoding_in_fp64,
        drawing,
        lambda block: ContextEncoding(48, 6, rd_channels=20, act_layer=nn.GELU).eval().fuse().bfloat16(),
        lambda block: ContextEncoding(48, 6, rd_channels=136).eval().fuse().bfloat16(),
    ],
)
def test_blocks_that_take_their_steps(change, calls):
    block, x = fused_block().bfloat16(), torch.randn(2, 48, 5, 7).bfloat16()
    with ctxenc.use_backend("triton"), torch.no_grad():
        assert block._can_fuse_projection(x)
        block = change(block)
        assert not block._can_fuse_projection(x)
        if block.encoding.codewords.dtype != torch.float64:
            block(x.to(block.conv.weight.dtype))
    assert not calls


def test_a_hook_on_all_modules_sees_every_part(calls):
    block, x, seen = fused_block().bfloat16(), torch.randn(2, 48, 5, 7).bfloat16(), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, arguments, output: seen.append(module))
    try:
        with ctxenc.use_backend("triton"), torch.no_grad():
            block(x)
    finally:
        hook.remove()
    assert not calls
    assert all(part in seen for part in (block.conv, block.act, block.encoding, block.gate))


@pytest.mark.parametrize("channels", [24, 47, 50, 96])
def test_another_number_of_channels_is_refused(channels, calls):
    """By the convolution: no kernel would notice."""
    x = torch.randn(2, channels, 5, 7).bfloat16()
    with ctxenc.use_backend("triton"), torch.no_grad(), pytest.raises(RuntimeError, match="to have 48 channels"):
        fused_block().bfloat16()(x)
    assert not calls
    x, weight, shift, codewords, smoothing = problem()
    with pytest.raises(ValueError, match=r"^project_encode: must get x \(B, C, N\).*got \(2, 39, 50\), \(20, 40\)"):
        triton_project.project_encode(x[:, 1:], weight, shift, codewords, smoothing)


def test_infinite_features_spoil_no_channel_that_is_not_there():
    block, x = fused_block().bfloat16(), torch.randn(2, 48, 5, 7).bfloat16()
    with torch.no_grad():
        block.conv.weight.copy_(-block.conv.weight.abs() - 0.1)
    x[1, 3, 2, 2] = float("inf")  # projected to -inf, and 0 behind the ReLU
    got, wanted = encodings(block, x)
    assert wanted.isfinite().all()
    assert distance(got, wanted) < 0.005


def test_gradients_are_had_in_steps(calls):
    block, x = fused_block().bfloat16(), torch.randn(2, 48, 5, 7).bfloat16()
    with ctxenc.use_backend("triton"):
        block(x).sum().backward()
    assert not calls
    assert block.conv.weight.grad.abs().sum() > 0


def test_products_are_counted():
    """As those of the steps are."""
    block, x = fused_block().half(), torch.randn(2, 48, 5, 7).half()
    totals = []
    for backend in ("torch", "triton"):
        with torch.no_grad(), ctxenc.use_backend(backend), FlopCounterMode(display=False) as counter:
            block(x)
        totals.append(counter.get_total_flops())
    codewords = block.encoding.codewords
    assert totals[0] == totals[1] + 2 * codewords.numel() * len(
        codewords
    )  # the PyTorch path finds the center by their products


def test_when_it_is_taken():
    x, weight, shift = (torch.randn(shape).half() for shape in ((2, 48, 5, 7), (20, 48, 1, 1), (20,)))
    codewords, smoothing = torch.randn(6, 20), torch.rand(6)
    rest = weight, shift, codewords, smoothing
    with torch.no_grad():
        assert not can_fuse_projection(x, *rest)
        with ctxenc.use_backend("triton"):
            assert can_fuse_projection(x, *rest)
            for other in (x.bfloat16(), x[:0], x[0], x[:, 1:], x.to("meta")):
                assert not can_fuse_projection(other, *rest)
            assert not can_fuse_projection(x.float(), *(tensor.float() for tensor in rest))
            for place, tensor in enumerate(rest):
                for changed in (tensor.double(), tensor.to("meta")):
                    assert not can_fuse_projection(x, *rest[:place], changed, *rest[place + 1 :])
            assert not can_fuse_projection(x, weight, shift, torch.randn(6, 19), smoothing)
            assert not can_fuse_projection(x, weight, shift.float(), codewords, smoothing)


def test_fakes():
    arguments = problem()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = triton_project.project_encode(*(mode.from_tensor(tensor) for tensor in arguments))
    real = triton_project.project_encode(*arguments)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
