import copy

import pytest
import torch
from torch import nn

from ctxenc import ContextEncoding, Encoding, assign, encode
from ctxenc.integrations.codewords import init_codewords
from ctxenc.integrations.encnet import EncNet


def clusters(num=5, channels=6, pixels=400, spread=0.05):
    """Features (2, C, pixels) about `num` centres far from each other, and the centres."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(num, channels, generator=generator)
    owner = torch.randint(num, (2, pixels), generator=generator)
    return (centres[owner] + spread * torch.randn(2, pixels, channels, generator=generator)).mT, centres


@pytest.mark.figures
def test_kmeans_finds_the_clusters_and_hard_assignment_leaves_no_residual():
    x, centres = clusters()
    layer = init_codewords(Encoding(6, 5), x)
    distances = torch.cdist(layer.codewords.detach(), centres)
    assert sorted(distances.argmin(1).tolist()) == [0, 1, 2, 3, 4]
    assert distances.min(1).values.max() < 0.03
    weights = assign(x, layer.codewords, 1e4)
    assert weights.amax(1).min() > 0.999
    residual = encode(x, layer.codewords, 1e4) / weights.sum(2)[:, :, None]
    assert residual.abs().max() < 0.03  # the mean of 80 pixels of a cluster, spread 0.05


def test_sample_takes_pixels():
    x, _ = clusters()
    layer = init_codewords(Encoding(6, 5), x, "sample", seed=3)
    pixels = x.mT.flatten(0, 1)
    rows = [(pixels == codeword).all(1).nonzero().flatten().tolist() for codeword in layer.codewords]
    assert all(len(row) == 1 for row in rows)
    assert len({row[0] for row in rows}) == 5


@pytest.mark.parametrize("method", ["kmeans", "sample"])
def test_the_same_seed_gives_the_same_codewords_and_leaves_the_generator_alone(method):
    x, _ = clusters()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (Encoding(6, 4, 1.0) for _ in range(3))
    torch.set_rng_state(state)
    for layer, seed in ((first, 1), (again, 1), (other, 2)):
        init_codewords(layer, x, method, samples=100, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.codewords, again.codewords)
    assert not torch.equal(first.codewords, other.codewords)


def test_compiled_modules_are_called_too():
    torch.manual_seed(0)
    block, x = ContextEncoding(8, 3).eval(), torch.randn(2, 8, 10, 10)
    plain = init_codewords(copy.deepcopy(block), x)
    block.compile(backend="eager")
    with torch.no_grad():
        block(x)
    init_codewords(block, x)
    torch.testing.assert_close(block.encoding.codewords, plain.encoding.codewords)


class NotReached(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Encoding(6, 3)

    def forward(self, x):
        return x


def test_modules_around_the_layer_are_called_and_left_as_they_were():
    block = ContextEncoding(8, 3).train()
    block.norm.eval()
    mean = block.norm.running_mean.clone()
    x = torch.randn(2, 8, 5, 5)
    init_codewords(block, x)
    assert block.training
    assert not block.norm.training
    assert torch.equal(block.norm.running_mean, mean)
    z = block.act(block.norm(block.conv(x))).flatten(2).mT.flatten(0, 1)
    assert (block.encoding.codewords >= z.min(0).values).all()
    assert (block.encoding.codewords <= z.max(0).values).all()
    assert not block.encoding._forward_pre_hooks
    assert block.encoding.codewords.requires_grad
    init_codewords(EncNet("resnet10t", 3, channels=16, num_codes=4), torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("module", "features", "arguments", "error", "text"),
    [
        (nn.Linear(2, 2), torch.ones(2, 2), {}, ValueError, "module must have one Encoding, got Linear with 0"),
        (nn.Sequential(Encoding(2), Encoding(2)), torch.ones(2, 2), {}, ValueError, "got Sequential with 2"),
        ("layer", torch.ones(2, 2), {}, TypeError, "module must be a torch.nn.Module, got str"),
        (Encoding(2, 4), [1.0], {}, TypeError, "features must be a tensor, got list"),
        (Encoding(2, 4), torch.ones(1, 2, 3), {}, ValueError, "features must hold 4 pixels, one a codeword, got 3"),
        (Encoding(2, 4), torch.ones(1, 2, 9), {"samples": 3}, ValueError, "features must hold 4 pixels, one a codeword, got 3"),
        (Encoding(2, 4), torch.ones(1, 2, 9), {"method": "vlad"}, ValueError, "method must be one of kmeans, sample"),
        (NotReached(), torch.ones(1, 6, 3), {}, ValueError, "the forward of module must reach its Encoding, got NotReached"),
        (Encoding(2, 4), torch.full((1, 2, 9), torch.nan), {}, ValueError, "features must be finite"),
    ],
)  # fmt: skip
def test_refusals(module, features, arguments, error, text):
    with pytest.raises(error, match=text):
        init_codewords(module, features, **arguments)
