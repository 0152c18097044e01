"""The operator against its specification: values, gradients, properties, layouts, dtypes, extremes."""

import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import ctxenc
from ctxenc.kernels import reference, torch_encode
from tests.tolerance import flat_reference, largest_excess, results

LAYOUTS = ("contiguous", "channels_last", "transposed", "expanded", "sliced")
quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same shape in other strides; "expanded" repeats one value along the last dimension."""
    match layout:
        case "channels_last":
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        case "transposed":
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)
        case "expanded":
            return x[..., :1].expand_as(x)
        case "sliced":
            return torch.stack([x, x], dim=-1)[..., 0]
        case _:
            return x


@st.composite
def problems(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32,), min_batch: int = 0):
    """x, codewords, smoothing and an incoming gradient, in shapes that fit no tile."""
    B, D, K = draw(st.integers(min_batch, 4)), draw(st.integers(1, 70)), draw(st.integers(1, 40))
    spatial = draw(st.sampled_from([(1,), (2, 3), (7, 7), (1, 130), (5, 3, 4), (211,)]))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    offset = draw(st.sampled_from([0.0, 0.0, 1.0, 100.0, -1000.0]))
    spread = draw(st.sampled_from([1e-3, 1.0, 1.0, 8.0]))
    x = torch.randn(B, D, *spatial, generator=generator) * spread + offset
    codewords = torch.randn(K, D, generator=generator) * spread * draw(st.sampled_from([0.1, 1.0])) + offset
    hardness = draw(st.sampled_from([0.0, 1.0, 1.0, 30.0, -1.0])) / (D * spread**2)
    shared = draw(st.booleans())
    smoothing = torch.rand(() if shared else (K,), generator=generator) * hardness
    grad = torch.randn(B, K, D, generator=generator)
    parameters = torch.promote_types(dtype, torch.float32) if draw(st.booleans()) else dtype
    x = lay_out(x.to(dtype), draw(st.sampled_from(LAYOUTS)))
    return x, codewords.to(parameters), smoothing.to(parameters), grad


def assert_right(encode, problem) -> None:
    excess = largest_excess(encode, *problem)
    assert max(excess.values()) <= 1, f"error over tolerance {excess} at {[tuple(t.shape) for t in problem]}"


@quick
@given(problems())
def test_values_and_gradients_fp32(problem):
    assert_right(ctxenc.encode, problem)


@settings(quick, max_examples=40)
@given(problems(dtypes=(torch.float32, torch.bfloat16), min_batch=1))
def test_values_and_gradients_in_parts(problem):
    """As above where inference takes each image by itself, and each channel is squared by itself."""
    x, codewords, smoothing, _ = problem
    assume(x.numel() > 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_encode, "PART", 1)
        assert len(torch_encode._split_batch(x.flatten(2))) == x.shape[0]
        assert_right(ctxenc.encode, problem)
        with torch.no_grad():
            inference = ctxenc.encode(x, codewords, smoothing)
    recorded = ctxenc.encode(x, codewords.clone().requires_grad_(), smoothing).detach()
    torch.testing.assert_close(inference, recorded, rtol=1e-4, atol=1e-5 * float(recorded.abs().sum() + 1))


@quick
@given(problems(dtypes=(torch.float16, torch.bfloat16, torch.float64)))
def test_values_and_gradients_other_dtypes(problem):
    assert_right(ctxenc.encode, problem)


@quick
@given(problems(dtypes=(torch.float32, torch.float64, torch.bfloat16)))
def test_inference_and_assignment(problem):
    x, codewords, smoothing, _ = problem
    with torch.no_grad():
        without_graph = ctxenc.encode(x, codewords, smoothing)
        weights = ctxenc.assign(x, codewords, smoothing)
    recorded = ctxenc.encode(x, codewords.clone().requires_grad_(), smoothing)
    torch.testing.assert_close(
        without_graph, recorded.detach(), rtol=1e-5, atol=1e-5 * float(recorded.detach().abs().sum() + 1)
    )
    assert weights.shape == (x.shape[0], codewords.shape[0], *x.shape[2:])
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
    # Weights and encoding are of one another: e_k = sum_i w_ik x_i - (sum_i w_ik) d_k.
    w, flat = weights.flatten(2).double(), x.flatten(2).double()
    rebuilt = w @ flat.transpose(1, 2) - w.sum(2, keepdim=True) * codewords.double()
    scale = w.sum() * (flat.abs().max() if flat.numel() else 1) + 1e-9
    assert (rebuilt - without_graph.double()).abs().sum() <= 1e-5 * float(scale) * max(x.shape[1], 1)


def lost_pixel(x, codewords, smoothing):
    return reference.encode(x.flatten(2)[:, :, :-1], codewords, smoothing)


def lost_codeword(x, codewords, smoothing):
    smaller = smoothing if smoothing.dim() == 0 else smoothing[:-1]
    encoding = reference.encode(x.flatten(2), codewords[:-1], smaller)
    return torch.cat([encoding, torch.zeros_like(encoding[:, :1]) * codewords.sum() * smoothing.sum()], dim=1)


def softmax_over_pixels(x, codewords, smoothing):
    r = reference.residuals(x.flatten(2), codewords)
    weights = torch.softmax(-smoothing * r.square().sum(3), dim=1)
    return (weights.unsqueeze(3) * r).sum(1)


class WrongSign(torch.autograd.Function):
    """The right value with the codewords' gradient negated, as one code base has it."""

    @staticmethod
    def forward(ctx, codewords):
        return codewords.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


def wrong_sign(x, codewords, smoothing):
    return flat_reference(x, WrongSign.apply(codewords), smoothing)


@pytest.mark.parametrize("mutant", [lost_pixel, lost_codeword, softmax_over_pixels, wrong_sign])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tolerance_tells_mutants(mutant, dtype):
    """Every mutant fails on every draw: the tolerance hides none of them."""

    @settings(quick, max_examples=25)
    @given(problems(min_batch=1))
    def survives(problem):
        x, codewords, smoothing, grad = problem
        # A mutant of a degenerate problem can be right: one codeword, one pixel, one value repeated, codewords on one spot.
        distinct = x.flatten(2)[0].unique(dim=1).shape[1]
        assume(codewords.shape[0] > 1 and distinct > 1 and float(smoothing.abs().max()) > 0)
        x, codewords, smoothing = (tensor.to(dtype).float() for tensor in (x, codewords, smoothing))
        # Nor is a codeword missed that owns less than half a pixel.
        assume(reference.assign(x.flatten(2).double(), codewords.double(), smoothing.double())[:, -1].sum() > 0.5)
        assert max(largest_excess(mutant, x, codewords, smoothing, grad).values()) > 1

    survives()


@quick
@given(problems(dtypes=(torch.float64,), min_batch=1), st.integers(0, 999))
def test_symmetries(problem, seed):
    x, codewords, smoothing, _ = problem
    generator = torch.Generator().manual_seed(seed)
    encoding = ctxenc.encode(x, codewords, smoothing)
    close = {"rtol": 1e-6, "atol": 1e-6 * float(encoding.abs().max() + 1e-6)}
    flat = x.flatten(2)
    pixels = torch.randperm(flat.shape[2], generator=generator)
    torch.testing.assert_close(ctxenc.encode(flat[:, :, pixels], codewords, smoothing), encoding, **close)
    codes = torch.randperm(codewords.shape[0], generator=generator)
    permuted = smoothing if smoothing.dim() == 0 else smoothing[codes]
    torch.testing.assert_close(ctxenc.encode(x, codewords[codes], permuted), encoding[:, codes], **close)
    shift = torch.randn(codewords.shape[1], generator=generator, dtype=torch.float64)
    shifted = ctxenc.encode(flat + shift[:, None], codewords + shift, smoothing)
    torch.testing.assert_close(shifted, encoding, **close)
    if smoothing.dim() == 0:
        spelled_out = smoothing.expand(codewords.shape[0]).clone()
        torch.testing.assert_close(ctxenc.encode(x, codewords, spelled_out), encoding, **close)


def test_no_smoothing_gives_uniform_weights_and_finite_gradients():
    x, codewords = torch.randn(2, 8, 20), torch.randn(5, 8)
    for smoothing in (torch.zeros(5), torch.zeros(())):
        torch.testing.assert_close(ctxenc.assign(x, codewords, smoothing), torch.full((2, 5, 20), 0.2))
        got = results(ctxenc.encode, x, codewords, smoothing, torch.randn(2, 5, 8))
        assert all(value.isfinite().all() for value in got.values())


def test_hard_assignment_to_cluster_means_encodes_nothing():
    """With s -> infinity it is k-means / VLAD: with the codewords at the means of their clusters every sum of residuals is zero."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(6, 16, generator=generator) * 20
    x = centers.repeat_interleave(30, 0) + torch.randn(180, 16, generator=generator)
    means = x.reshape(6, 30, 16).mean(1)
    pixels = x.T[None]
    for smoothing in (torch.tensor(1e4), torch.full((6,), 1e4)):
        weights = ctxenc.assign(pixels, means, smoothing)
        assert set(weights.unique().tolist()) == {0.0, 1.0}
        assert ctxenc.encode(pixels, means, smoothing).abs().max() < 1e-3  # sums of 30 residuals of size 4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_pixels_encode_nothing(layout):
    x = lay_out(torch.randn(2, 4, 0, 3), layout)
    got = results(ctxenc.encode, x, torch.randn(3, 4), torch.rand(3), torch.ones(2, 3, 4))
    assert got["encoding"].shape == (2, 3, 4)
    assert not any(value.any() for value in got.values())


def test_one_codeword_is_the_sum():
    x, codeword = torch.randn(3, 7, 4, 5), torch.randn(1, 7)
    expected = x.flatten(2).sum(2)[:, None] - 20 * codeword
    torch.testing.assert_close(ctxenc.encode(x, codeword, torch.rand(1)), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_first_and_second_derivatives(shared):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    codewords = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    smoothing = torch.rand(() if shared else (3,), generator=generator, dtype=torch.float64, requires_grad=True)
    for function in (ctxenc.encode, ctxenc.assign):
        assert gradcheck(function, (x, codewords, smoothing))
        assert gradgradcheck(function, (x, codewords, smoothing))


@settings(quick, max_examples=25)
@given(problems(dtypes=(torch.float64,), min_batch=1))
def test_second_derivatives_are_those_of_the_specification(problem):
    x, codewords, smoothing, grad = problem
    probe = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def second(encode):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, codewords, smoothing)]
        gradients = torch.autograd.grad(encode(*leaves), leaves, grad.double(), create_graph=True)
        total = sum(weight * (gradient.sin()).sum() for weight, gradient in zip(probe, gradients, strict=True))
        return torch.autograd.grad(total, leaves)

    for got, wanted in zip(second(ctxenc.encode), second(flat_reference), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["sum", "expanded", "channels_last", "sliced"])
def test_incoming_gradients_of_any_strides(kind):
    x = torch.randn(2, 6, 9, dtype=torch.float64, requires_grad=True)
    codewords = torch.randn(4, 6, dtype=torch.float64)
    smoothing = torch.rand(4, dtype=torch.float64)

    def reduce(encoding: Tensor) -> Tensor:
        match kind:
            case "sum":
                return encoding.sum()
            case "expanded":
                return (encoding.mean(1, keepdim=True).expand(-1, 3, -1) ** 2).sum()
            case "channels_last":
                return (encoding.transpose(1, 2).contiguous().flatten(1) ** 3).sum()
            case _:
                return torch.cat([encoding, encoding], 1)[:, 1:6:2].prod(2).sum()

    (got,) = torch.autograd.grad(reduce(ctxenc.encode(x, codewords, smoothing)), x)
    (wanted,) = torch.autograd.grad(reduce(reference.encode(x, codewords, smoothing)), x)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("shared", [False, True])
def test_no_gradient_where_none_is_wanted(shared):
    """Of features that are not trained, two products of backward's four; the other gradients, and their own, stay the same."""
    torch.manual_seed(0)
    x, codewords = torch.randn(2, 6, 5, 4, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    parameters = [codewords, torch.rand(() if shared else (3,), dtype=torch.float64) / 6]
    parameters = [parameter.requires_grad_() for parameter in parameters]
    wanted = torch.autograd.grad(ctxenc.encode(x.clone().requires_grad_(), *parameters).square().sum(), parameters)
    encoding = ctxenc.encode(x, *parameters)
    with FlopCounterMode(display=False) as counter:
        got = torch.autograd.grad(encoding.square().sum(), parameters)
    assert counter.get_total_flops() == 2 * 2 * x.numel() * 3
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert gradgradcheck(lambda *parameters: ctxenc.encode(x, *parameters), parameters)


def test_gradient_keeps_the_layout_of_x():
    x = torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    ctxenc.encode(x, torch.randn(3, 6), torch.rand(3)).sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1e6, -1e-3])
def test_extremes_stay_finite(dtype, smoothing):
    """Values up to fp16's limits, where |x|^2 is finite in fp32."""
    x = torch.tensor([65504.0, -65504.0, 1.0, 0.0, 6e-8]).repeat(2, 64, 3).to(dtype)
    codewords = torch.linspace(-2, 2, 5 * 64).reshape(5, 64)
    for s in (torch.full((5,), smoothing), torch.tensor(smoothing)):
        got = results(ctxenc.encode, x, codewords, s, torch.ones(2, 5, 64) / 1e4)
        assert got["encoding"].isfinite().all()
        assert got["dcodewords"].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_goes_through(value):
    x = torch.randn(2, 4, 6)
    x[0, 1, 2] = value
    encoding = ctxenc.encode(x, torch.randn(3, 4), torch.rand(3))
    assert encoding[0].isnan().any()
    assert encoding[1].isfinite().all()


def test_same_inputs_same_bits():
    x, codewords, smoothing = torch.randn(4, 32, 28, 28), torch.randn(16, 32), torch.rand(16)
    grad = torch.randn(4, 16, 32)
    first = results(ctxenc.encode, x, codewords, smoothing, grad)
    for _ in range(5):
        again = results(ctxenc.encode, x, codewords, smoothing, grad)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
def test_common_offset_costs_nothing(offset, layout):
    """The plain matmul form is off by 6e-3 at offset 1000 (D = 256, fp32); ours stays within the tolerance, and far below that."""
    generator = torch.Generator().manual_seed(0)
    x = lay_out(torch.randn(2, 256, 400, generator=generator) + offset, layout)
    codewords = torch.randn(16, 256, generator=generator) / 4 + offset
    smoothing = torch.rand(16, generator=generator) / 256
    problem = x, codewords, smoothing, torch.randn(2, 16, 256, generator=generator)
    assert_right(ctxenc.encode, problem)
    exact = reference.encode(x.double(), codewords.double(), smoothing.double())
    error = (ctxenc.encode(x, codewords, smoothing) - exact).abs().max() / exact.abs().max()
    assert error < 1e-6


@pytest.mark.parametrize("offset", [1.0, 30.0, 1000.0])
def test_a_cluster_far_from_the_origin_keeps_its_digits(offset):
    """Most codewords at the offset, the others opposite, x near the first: their logits are small differences."""
    generator = torch.Generator().manual_seed(5)
    direction = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0) * offset
    side = torch.where(torch.arange(20) < 14, 1.0, -1.0)[:, None]
    codewords = side * direction + torch.randn(20, 32, generator=generator) / 6
    x = direction[:, None] + torch.randn(2, 32, 50, generator=generator) / 6
    smoothing = torch.rand(20, generator=generator)
    wanted = reference.encode(x.double(), codewords.double(), smoothing.double())
    error = (ctxenc.encode(x, codewords, smoothing) - wanted)[:, :14].abs().max() / wanted[:, :14].abs().max()
    assert error < 2e-6


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("away", [1e2, 1e4])
def test_one_codeword_far_away_spoils_no_other(away, shared):
    generator = torch.Generator().manual_seed(3)
    x, codewords = torch.randn(2, 64, 400, generator=generator), torch.randn(16, 64, generator=generator) / 10
    codewords[0] = away
    smoothing = torch.rand(() if shared else (16,), generator=generator) / 64
    exact = reference.encode(x.double(), codewords.double(), smoothing.double())[:, 1:]
    assert (ctxenc.encode(x, codewords, smoothing)[:, 1:] - exact).abs().max() < 1e-6 * exact.abs().max()
