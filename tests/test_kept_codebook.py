"""What inference keeps between calls on a CPU: the prepared codebook, which must follow every change of the values."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import ctxenc
from ctxenc.kernels import torch_encode
from tests.tolerance import flat_reference


@pytest.fixture(autouse=True)
def nothing_kept():
    torch_encode._kept.clear()
    yield
    torch_encode._kept.clear()


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(6)
    layer = ctxenc.Encoding(24, num_codes=5)
    with torch.no_grad():
        layer.codewords.copy_(torch.randn(5, 24, generator=generator))
    return layer


@pytest.fixture
def x():
    return torch.randn(2, 24, 3, 4, generator=torch.Generator().manual_seed(7))


def right(layer, x):
    wanted = flat_reference(x.double(), layer.codewords.double(), layer.smoothing.double())
    return torch.allclose(layer(x).double(), wanted, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_kept_while_the_values_stay(layer, x, monkeypatch):
    first = layer(x)
    monkeypatch.setattr(torch_encode, "_codebook", None)  # not called again
    assert torch.equal(layer(x), first)
    assert torch.allclose(layer(x[:1]), first[:1], rtol=1e-5, atol=1e-5)  # other products for one image


@torch.no_grad()
@pytest.mark.parametrize("name", ["codewords", "smoothing"])
@pytest.mark.parametrize("way", ["in place", "data", "numpy", "replaced"])
def test_changed_values_are_seen(layer, x, name, way):
    assert right(layer, x)
    parameter = getattr(layer, name)
    if way == "in place":
        parameter.add_(3)
    elif way == "data":  # which counts as no new version of the tensor
        parameter.data.add_(3)
    elif way == "numpy":
        parameter.detach().numpy()[...] += 3
    else:
        setattr(layer, name, torch.nn.Parameter(parameter + 3))
    assert right(layer, x)


@torch.no_grad()
def test_offset_that_comes_later(layer, x):
    assert right(layer, x)
    layer.codewords.data.add_(1000)
    assert right(layer, x + 1000)


@torch.no_grad()
@pytest.mark.parametrize("shapes", [((5, 24), (3, 24)), ((3, 24), (3, 24))])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.float64)])
def test_another_tensor_at_the_same_address(x, shapes, dtypes):
    memory, smoothing = torch.zeros(240, dtype=torch.float64), torch.ones(())
    generator = torch.Generator().manual_seed(8)
    for shape, dtype in zip(shapes, dtypes, strict=True):
        codewords = memory.view(dtype)[: shape[0] * shape[1]].view(shape)
        codewords.copy_(torch.randn(shape, generator=generator))
        wanted = flat_reference(x.double(), codewords.double(), smoothing.double())
        assert torch.allclose(ctxenc.encode(x.double(), codewords, smoothing), wanted, rtol=1e-9, atol=1e-9)
    assert len(torch_encode._kept) == 1  # the key was the same


@torch.no_grad()
def test_x_of_another_kind(layer, x):
    """What is prepared depends on x's dtype, and on whether it must be copied anyway."""
    assert right(layer, x)
    wanted = flat_reference(x.double(), layer.codewords.double(), layer.smoothing.double())
    assert torch.allclose(layer(x.double()), wanted, rtol=1e-9, atol=1e-9)
    before = len(torch_encode._kept)
    strided = x.repeat_interleave(2, 3)[..., ::2]
    assert right(layer, strided)
    assert len(torch_encode._kept) == before + 1


@torch.no_grad()
def test_nothing_is_kept_inside_a_transform(layer, x):
    def frozen(scale):
        with torch.no_grad():
            encoding = layer(x)
        return (scale * encoding).sum()

    with torch.enable_grad():
        torch.func.grad(frozen)(torch.tensor(2.0))
    assert not torch_encode._kept


def test_training_keeps_nothing(layer, x):
    layer(x).sum().backward()
    assert not torch_encode._kept


@torch.no_grad()
def test_no_more_than_so_many(layer, x, monkeypatch):
    monkeypatch.setattr(torch_encode, "REMEMBERED", 3)
    layers = [copy.deepcopy(layer) for _ in range(5)]
    for each in layers:
        each(x)
        assert len(torch_encode._kept) <= 3
    monkeypatch.setattr(torch_encode, "LARGEST", 100)
    torch_encode._kept.clear()
    layer(x)
    assert not torch_encode._kept


@torch.no_grad()
def test_kept_in_inference_mode_and_used_outside(layer, x):
    with torch.inference_mode():
        first = layer(x).clone()
    assert torch_encode._kept
    assert torch.equal(layer(x), first)
    with torch.enable_grad():
        layer(x).sum().backward()
    assert layer.codewords.grad is not None


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # PyTorch's forward mode scripts
@torch.no_grad()
def test_a_tangent_is_not_kept(layer, x):
    layer(x)
    with forward_ad.dual_level():
        codewords = forward_ad.make_dual(layer.codewords.detach(), torch.ones_like(layer.codewords))
        tangent = forward_ad.unpack_dual(ctxenc.encode(x, codewords, layer.smoothing)).tangent
    step = 1e-3
    change = ctxenc.encode(x, layer.codewords + step, layer.smoothing) - ctxenc.encode(
        x, layer.codewords - step, layer.smoothing
    )
    assert torch.allclose(tangent, change / (2 * step), rtol=1e-2, atol=1e-2)
