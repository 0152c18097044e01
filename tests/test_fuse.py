"""Deployment: the norm folded into the projection and taken out again."""

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from timm.utils import reparameterize_model
from torch import nn

import ctxenc
from ctxenc import ContextEncoding
from tests.blocks import each_pool, equal, group_norm, stirred


def plain_norm(channels, **kwargs):
    return nn.BatchNorm2d(channels, affine=False, **kwargs)


@each_pool
@pytest.mark.parametrize("norm", [None, plain_norm])
def test_a_fused_block_computes_what_it_computed(pool, norm):
    block = ContextEncoding(24, 6, pool=pool, norm_layer=norm).double()
    for _ in range(3):
        block(3 * torch.randn(4, 24, 5, 7, dtype=torch.float64) + 1)  # statistics of its own
    block = (stirred(block) if norm is None else block).eval()
    x = torch.randn(2, 24, 5, 7, dtype=torch.float64)
    wanted = block(x)
    assert block.fuse() is block
    assert isinstance(block.norm, nn.Identity)
    assert set(block.state_dict()) & {"conv.weight", "conv.bias", "norm.weight"} == {"conv.weight", "conv.bias"}
    torch.testing.assert_close(block(x), wanted, rtol=1e-12, atol=1e-12)


def test_a_bias_of_a_convolution_put_in_by_hand_is_folded():
    block = ContextEncoding(24, 6)
    block.conv = nn.Conv2d(24, block.rd_channels, 1)
    nn.init.constant_(block.conv.bias, 3.0)
    block, x = stirred(block.double()).eval(), torch.randn(2, 24, 5, 7, dtype=torch.float64)
    wanted = block(x)
    torch.testing.assert_close(block.fuse()(x), wanted, rtol=1e-12, atol=1e-12)


def test_unfuse_brings_every_value_back():
    block = stirred(ContextEncoding(24, 6)).eval()
    before, values = copy.deepcopy(block.state_dict()), list(block.parameters())
    block.fuse().fuse().unfuse()
    assert list(block.state_dict()) == list(before)
    assert equal(block.state_dict(), before)
    assert all(one is other for one, other in zip(block.parameters(), values, strict=True))
    assert block.unfuse() is block


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_copies_of_a_fused_block_are_unfused_alone(duplicate):
    block = stirred(ContextEncoding(24, 6)).eval()
    before = copy.deepcopy(block.state_dict())
    twin = duplicate(block.fuse())
    assert equal(twin.unfuse().state_dict(), before)
    assert isinstance(block.norm, nn.Identity)


def test_unfuse_has_the_present_dtype_and_mode():
    block = stirred(ContextEncoding(24, 6)).eval().fuse()
    block.double().train().unfuse()
    assert block.conv.weight.dtype == block.norm.running_var.dtype == torch.float64
    assert block.norm.training


def test_half_is_folded_in_fp32():
    block = stirred(ContextEncoding(64, 6)).eval()
    block.norm.running_var.fill_(1e-9)  # beside eps nothing; in fp16 eps itself is lost
    block.norm.eps = 1e-6
    wanted = copy.deepcopy(block).fuse().conv
    got = copy.deepcopy(block).half().fuse().conv
    assert got.weight.dtype == torch.float16
    torch.testing.assert_close(got.weight.float(), wanted.weight, rtol=2e-3, atol=0)


@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_frozen_stays_frozen(frozen):
    block = ContextEncoding(24, 6).eval().requires_grad_(not frozen).fuse()
    assert all(parameter.requires_grad is not frozen for parameter in block.parameters())


@pytest.mark.parametrize(
    "norm", [group_norm, BatchNormAct2d, lambda c, **k: nn.BatchNorm2d(c, track_running_stats=False)]
)
def test_what_cannot_be_folded_stays(norm):
    block = ContextEncoding(24, 6, norm_layer=norm).eval()
    before = list(block.state_dict())
    block.fuse()
    assert list(block.state_dict()) == before
    assert block.unfused is None


class Adapter(nn.Module):
    """Holds a layer and has none of its attributes, as the layers of LoRA."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer

    def forward(self, x):
        return self.base_layer(x)


def test_a_wrapped_projection_is_printed_and_stays():
    block, x = stirred(ContextEncoding(24, 6)).eval(), torch.randn(2, 24, 5, 7)
    line, wanted = repr(block).splitlines()[1], block(x)
    block.conv, block.fc = Adapter(block.conv), Adapter(block.fc)
    assert repr(block).splitlines()[1] == line
    assert "24, num_codes=6, rd_channels=8, pool=mean" in line
    assert torch.equal(block.fuse()(x), wanted)
    assert block.unfused is None


def test_the_projection_is_a_convolution_by_its_exact_type():
    """Tools that count, quantise, prune and convert go by it."""
    block = ContextEncoding(24, 6)
    assert type(block.conv) is nn.Conv2d
    assert type(block.fuse().conv) is nn.Conv2d


def test_a_norm_that_keeps_its_output_trains():
    block = ContextEncoding(24, 6, norm_layer=BatchNormAct2d)
    block(torch.randn(2, 24, 5, 5)).sum().backward()


@pytest.mark.parametrize("inplace", [True, False])
def test_timm_reparameterizes_a_patched_network(inplace):
    torch.manual_seed(0)
    model = stirred(ctxenc.patch_se_blocks(timm.create_model("seresnet18", num_classes=5))).eval()
    x = torch.randn(2, 3, 64, 64)
    wanted = model(x)
    fused = reparameterize_model(model, inplace=inplace)
    blocks = [module for module in fused.modules() if isinstance(module, ContextEncoding)]
    assert len(blocks) == 8
    assert all(isinstance(block.norm, nn.Identity) for block in blocks)
    assert (fused is model) is inplace
    assert (
        any(isinstance(module.norm, nn.Identity) for module in model.modules() if isinstance(module, ContextEncoding))
        is inplace
    )
    torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("how", ["script", "trace", "export", "compile"])
def test_a_fused_block_in_graphs(how):
    block = stirred(ContextEncoding(24, 6)).eval().requires_grad_(False).fuse()
    x = torch.randn(2, 24, 3, 3).to(memory_format=torch.channels_last)
    graph = {
        "script": torch.jit.script,
        "trace": lambda block: torch.jit.trace(block, x),
        "export": lambda block: torch.export.export(block, (x,)).module(),
        "compile": lambda block: torch.compile(block, fullgraph=True, backend="aot_eager"),
    }[how](block)
    torch.testing.assert_close(graph(x), block(x))


@pytest.mark.parametrize("side", [3, 20])
def test_a_projection_strided_by_hand_encodes_a_coarser_map(side):
    """Fused and not, with few pixels and with many."""
    block = stirred(ContextEncoding(64, 6)).eval()
    block.conv.stride, block.conv.padding = (2, 2), (1, 1)
    x = torch.randn(1, 64, side, side).contiguous(memory_format=torch.channels_last)
    coarse = nn.functional.conv2d(x, block.conv.weight, stride=2, padding=1)
    wanted = block.encoding(block.act(block.norm(coarse)))
    for each in (block, block.fuse()):
        torch.testing.assert_close(each._encode(x), wanted, rtol=1e-4, atol=1e-4)
