"""start="spread": a codebook that begins where the features are, so that pixels differ in their assignment."""

import copy

import pytest
import timm
import torch
from torch import nn

import ctxenc
from ctxenc import ContextEncoding
from ctxenc.functional import assign
from ctxenc.integrations import DeepTEN, EncNet
from ctxenc.integrations.encoding_module import EncodingModule
from ctxenc.viz.usage import UsageSum


def bits(block: nn.Module, pixels: int = 4096) -> float:
    """What an assignment tells of a pixel, on features as the block's norm and activation give them of normal ones."""
    norm, act = copy.deepcopy(block.norm).eval(), copy.deepcopy(block.act)
    features = act(norm(torch.randn(1, block.encoding.channels, pixels, 1)))
    usage = UsageSum.of(assign(features, block.encoding.codewords, block.encoding.smoothing)).usage()
    return usage.entropy - usage.pixel_entropy


@pytest.mark.parametrize("smoothing", ["learned", "sampled", 0.5, 3])
@pytest.mark.parametrize(("channels", "num_codes"), [(8, 16), (16, 16), (64, 16), (128, 16), (512, 32)])
def test_it_tells_pixels_apart(smoothing, channels, num_codes):
    block = ContextEncoding(channels, num_codes, rd_channels=channels, smoothing=smoothing, start="spread").eval()
    plain = ContextEncoding(channels, num_codes, rd_channels=channels, smoothing=smoothing).eval()
    assert bits(block) > 0.4 > 0.25 > bits(plain)


@pytest.mark.parametrize("act_layer", [None, nn.SiLU, nn.GELU])
@pytest.mark.parametrize("norm_layer", [None, timm.layers.LayerNorm2d, lambda channels, **_: nn.GroupNorm(2, channels)])
def test_norms_and_activations(act_layer, norm_layer):
    for smoothing in ("learned", 0.5):
        layers = {"act_layer": act_layer, "norm_layer": norm_layer, "smoothing": smoothing}
        assert bits(ContextEncoding(32, 16, rd_channels=32, start="spread", **layers)) > 0.3


def test_a_norm_without_a_weight():
    layers = {"norm_layer": lambda channels, **_: nn.BatchNorm2d(channels, affine=False), "start": "spread"}
    assert bits(ContextEncoding(32, 16, rd_channels=32, **layers)) > 0.4
    with pytest.raises(
        ValueError,
        match=r"^ContextEncoding: start must be 'paper' for a fixed smoothing behind BatchNorm2d without a weight, got",
    ):
        ContextEncoding(32, 16, smoothing=0.5, **layers)


def test_a_single_codeword_leaves_the_smoothing():
    block = ContextEncoding(16, 1, start="spread")
    assert 0 <= float(block.encoding.smoothing.detach()) <= 1
    assert block(torch.randn(2, 16, 3, 3)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_follows_from_the_seed(dtype):
    def made(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return list(ContextEncoding(32, 8, start="spread", dtype=dtype).parameters())

    assert all(torch.equal(*pair) for pair in zip(made(3), made(3), strict=True))
    assert not all(torch.equal(*pair) for pair in zip(made(3), made(4), strict=True))
    assert {each.dtype for each in made(3)} <= {dtype, torch.float32}


@pytest.mark.parametrize("smoothing", ["learned", "sampled"])
def test_the_meta_device(smoothing):
    block = ContextEncoding(32, 8, smoothing=smoothing, start="spread", device="meta")
    assert {each.device.type for each in block.parameters()} == {"meta"}


def test_every_network_takes_it():
    model = ctxenc.patch_se_blocks(timm.create_model("test_efficientnet"), start="spread")
    blocks = [module for module in model.modules() if isinstance(module, ContextEncoding)]
    assert {found.start for found in ctxenc.find_context_blocks(model)} == {"spread"}
    module = EncodingModule(32, 8, start="spread").context
    encnet = EncNet("test_resnet", 5, channels=32, num_codes=8, start="spread").encoding.context
    deepten = DeepTEN("test_resnet", 5, rd_channels=32, num_codes=8, start="spread")
    for block in (*blocks, module, encnet, deepten):
        assert bits(block) > 0.3
    with pytest.raises(ValueError, match=r"settings must be those of the blocks in place, .* start='spread'"):
        ctxenc.patch_se_blocks(model)


@pytest.mark.parametrize(
    "make", [ContextEncoding, DeepTEN, EncNet, lambda start: ctxenc.patch_se_blocks(nn.Module(), start=start)]
)
def test_what_a_start_may_be(make):
    arguments = {ContextEncoding: {"channels": 16}}.get(make, {})
    with pytest.raises(ValueError, match="start must be one of paper, spread, got 'wide'"):
        make(**arguments, start="wide")


def test_a_saved_network_comes_back(tmp_path):
    network = DeepTEN("test_resnet", 5, rd_channels=8, num_codes=4, start="spread").eval()
    network.save_pretrained(tmp_path)
    again, x = DeepTEN.from_pretrained(tmp_path).eval(), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(x), network(x))
    assert again.config["start"] == "spread"
