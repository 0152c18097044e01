"""The Encoding layer: state, smoothing of three kinds, randomness, dtypes, copies."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ctxenc
from ctxenc import Encoding

KINDS = ("learned", 0.7, "sampled")


def parameters_of(layer: nn.Module) -> set[str]:
    return {name for name, _ in layer.named_parameters()}


# State


@pytest.mark.parametrize("kind", KINDS)
def test_state_names(kind):
    layer = Encoding(8, 5, smoothing=kind)
    assert list(layer.state_dict()) == ["codewords", "smoothing"]
    assert parameters_of(layer) == ({"codewords", "smoothing"} if kind == "learned" else {"codewords"})
    assert layer.codewords.shape == (5, 8)
    assert layer.smoothing.shape == ((5,) if kind == "learned" else ())


def test_defaults_are_those_of_the_paper():
    layer = Encoding(8)
    assert layer.num_codes == 32
    assert isinstance(layer.smoothing, nn.Parameter)


def test_where_codewords_and_smoothing_start():
    torch.manual_seed(0)
    codewords, bound = Encoding(50, 40).codewords.detach(), 1 / math.sqrt(50 * 40)
    assert codewords.abs().max() <= bound
    # Uniform over the whole range: 2000 draws come near both ends, and their deviation is that of U(-a, a).
    assert codewords.min() < -0.98 * bound < 0.98 * bound < codewords.max()
    assert float(codewords.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    smoothing = Encoding(2, 2000).smoothing.detach()
    assert 0 <= smoothing.min() < 0.01
    assert 0.99 < smoothing.max() <= 1
    assert float(smoothing.mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("kind", "value"), [(0.7, 0.7), (2, 2.0), ("sampled", 0.5)])
def test_what_is_not_learned_is_a_buffer(kind, value):
    layer = Encoding(8, 5, smoothing=kind)
    assert dict(layer.named_buffers())["smoothing"].item() == pytest.approx(value)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_encode_with_its_state(kind):
    layer = Encoding(8, 5, smoothing=kind).eval()
    x = torch.randn(3, 8, 4, 5)
    assert torch.equal(layer(x), ctxenc.encode(x, layer.codewords, layer.smoothing))
    assert layer(x.flatten(2)).shape == layer(x.unsqueeze(4)).shape == (3, 5, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_reset_parameters_after_meta(kind):
    """to_empty leaves garbage, here NaN; reset_parameters makes a layer of it that nobody can tell from a new one."""
    layer = Encoding(8, 5, smoothing=kind, device="meta")
    assert layer.codewords.is_meta
    assert layer.smoothing.is_meta
    layer.to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(math.nan)
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    fresh = Encoding(8, 5, smoothing=kind)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name
    assert parameters_of(layer) == parameters_of(fresh)


def test_device_and_dtype():
    layer = Encoding(8, 5, device="meta", dtype=torch.float64)
    assert {(tensor.device.type, tensor.dtype) for tensor in layer.state_dict().values()} == {("meta", torch.float64)}
    assert Encoding(8, 5, smoothing=0.5, dtype=torch.bfloat16).smoothing.dtype == torch.bfloat16
    with torch.device("meta"):
        assert Encoding(8, 5).codewords.is_meta


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0,), ValueError, "channels must be a positive integer, got 0"),
        ((-3,), ValueError, "channels must be a positive integer, got -3"),
        ((2.0,), TypeError, "channels must be a positive integer, got 2.0"),
        (("8",), TypeError, "channels must be a positive integer, got '8'"),
        ((True,), TypeError, "channels must be a positive integer, got True"),
        ((8, 0), ValueError, "num_codes must be a positive integer, got 0"),
        ((8, None), TypeError, "num_codes must be a positive integer, got None"),
        ((8, 4, "fixed"), ValueError, 'smoothing must be "learned", "sampled" or a positive number, got \'fixed\''),
        ((8, 4, 0), ValueError, 'smoothing must be "learned", "sampled" or a positive number, got 0'),
        ((8, 4, -0.5), ValueError, 'smoothing must be "learned", "sampled" or a positive number, got -0.5'),
        ((8, 4, math.inf), ValueError, 'smoothing must be "learned", "sampled" or a positive number, got inf'),
        ((8, 4, math.nan), ValueError, 'smoothing must be "learned", "sampled" or a positive number, got nan'),
        ((8, 4, True), TypeError, 'smoothing must be "learned", "sampled" or a positive number, got bool'),
        ((8, 4, None), TypeError, 'smoothing must be "learned", "sampled" or a positive number, got NoneType'),
        ((8, 4, [1]), TypeError, 'smoothing must be "learned", "sampled" or a positive number, got list'),
    ],
)
def test_errors_come_before_anything_is_allocated(arguments, error, text, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: pytest.fail("the error comes too late"))
    with pytest.raises(error) as raised:
        Encoding(*arguments)
    assert str(raised.value) == f"Encoding: {text}"


def test_a_map_of_other_channels_is_an_error():
    with pytest.raises(
        ValueError, match=r"encode: codewords must have shape \(K, 7\) to match x \(2, 7, 3\), got \(5, 8\)"
    ):
        Encoding(8, 5)(torch.randn(2, 7, 3))


# Sampled smoothing


def draw_recorded(layer: Encoding, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The encoding, and the smoothing that was drawn for it, replayed from the RNG state before."""
    state = torch.get_rng_state()
    encoding = layer(x)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    drawn = torch.rand(layer.num_codes)
    assert torch.equal(torch.get_rng_state(), after), "one draw, and no other"
    return encoding, drawn


def test_a_draw_is_the_same_in_forward_and_backward():
    layer = Encoding(6, 4, smoothing="sampled")
    x = torch.randn(2, 6, 9, requires_grad=True)
    encoding, drawn = draw_recorded(layer, x)
    grad = torch.randn_like(encoding)
    got = torch.autograd.grad(encoding, [x, layer.codewords], grad)
    expected = ctxenc.encode(x, layer.codewords, drawn)
    assert torch.equal(encoding, expected)
    for one, other in zip(got, torch.autograd.grad(expected, [x, layer.codewords], grad), strict=True):
        assert torch.equal(one, other)


def test_draws_differ_between_forwards_and_codewords():
    layer = Encoding(6, 4, smoothing="sampled")
    x = torch.randn(2, 6, 9)
    first, drawn = draw_recorded(layer, x)
    assert drawn.unique().numel() == 4
    assert not torch.equal(first, layer(x))


def test_training_goes_on_after_resuming_from_an_rng_state():
    layer = Encoding(6, 4, smoothing="sampled")
    x = torch.randn(2, 6, 9)
    layer(x)
    saved, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    wanted = [layer(x) for _ in range(3)]
    torch.manual_seed(99)
    resumed = Encoding(6, 4, smoothing="sampled")
    resumed.load_state_dict(saved)
    torch.set_rng_state(state)
    for encoding in wanted:
        assert torch.equal(resumed(x), encoding)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing(use_reentrant, kind):
    layer = Encoding(6, 4, smoothing=kind)
    x = torch.randn(2, 6, 9, requires_grad=True)
    state = torch.get_rng_state()
    plain = layer(x)
    torch.set_rng_state(state)
    checked = checkpoint(layer, x, use_reentrant=use_reentrant)
    assert torch.equal(plain, checked)
    torch.randn(5)  # what comes in between moves the generator on
    grad = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, [x, *layer.parameters()], grad)
    checked.backward(grad)
    got = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


def test_evaluation_takes_the_mean_of_the_draws():
    layer = Encoding(6, 4, smoothing="sampled").eval()
    x = torch.randn(2, 6, 9)
    state = torch.get_rng_state()
    assert torch.equal(layer(x), ctxenc.encode(x, layer.codewords, 0.5))
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn in evaluation"


@pytest.mark.parametrize("kind", ["learned", 0.7])
def test_nothing_is_drawn_where_smoothing_is_not_sampled(kind):
    layer = Encoding(6, 4, smoothing=kind)
    state = torch.get_rng_state()
    x = torch.randn(2, 6, 9)
    torch.set_rng_state(state)
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), state)


# Copies and dtypes


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind):
    layer = Encoding(6, 4, smoothing=kind).eval()
    x = torch.randn(2, 6, 9)
    with_state = Encoding(6, 4, smoothing=kind).eval()
    with_state.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    from_file = Encoding(6, 4, smoothing=kind).eval()
    from_file.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), with_state, from_file):
        assert torch.equal(other(x), layer(x))
        assert repr(other) == repr(layer)
        with torch.no_grad():
            other.codewords.add_(1)  # a copy is a copy
        assert not torch.equal(other(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_the_layer(kind, dtype):
    layer = Encoding(6, 4, smoothing=kind).to(dtype)
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {dtype}
    x = torch.randn(2, 6, 9).to(dtype).requires_grad_()
    encoding = layer(x)
    assert encoding.dtype == torch.promote_types(dtype, torch.float32)
    encoding.sum().backward()
    assert x.grad.dtype == dtype
    for parameter in layer.parameters():
        assert parameter.grad.dtype == dtype
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_keeps_the_codewords(dtype):
    """What a convolution under autocast hands on is half; the parameters, the result and all gradients of them are not."""
    conv, layer = nn.Conv2d(3, 6, 1), Encoding(6, 4)
    x = torch.randn(2, 3, 5, 5)
    with torch.autocast("cpu", dtype):
        features = conv(x)
        assert features.dtype == dtype
        encoding = layer(features)
        encoding.square().mean().backward()
    assert encoding.dtype == torch.float32
    # Exactly the half features, in fp32 arithmetic: nothing else has been rounded.
    assert torch.equal(encoding, layer(features))
    wanted = torch.autograd.grad(layer(features.detach()).square().mean(), list(layer.parameters()))
    for parameter, grad in zip(layer.parameters(), wanted, strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("kind", KINDS)
def test_repr_tells_the_settings(kind):
    assert repr(Encoding(6, 4, smoothing=kind)) == f"Encoding(6, num_codes=4, smoothing={kind}, aggregation=sum)"


def test_parameters_that_should_not_decay():
    layer = Encoding(6, 4)
    assert layer.no_weight_decay() == parameters_of(layer)
