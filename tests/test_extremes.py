"""Maps and smoothing at the ends of what can come: what the operator, the layer and the block give is finite, and right.

Finite where its dtype can hold it: a gradient that leaves fp16's range does so rightly, and the tolerance allows for it.
"""

import itertools

import pytest
import torch
from torch import nn

import ctxenc
from ctxenc import ContextEncoding, Encoding
from tests.blocks import each_pool
from tests.tolerance import largest_excess

HALF = (torch.float16, torch.bfloat16)
LIMIT = 65504.0  # fp16's largest number
SMOOTHING = (0.0, 0.5, -0.5, 1e6, -1e6)


def maps(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Of shape (B, C, H, W), in fp32, each number one that fp16 has."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half().float()
    dead = torch.arange(shape[1])[:, None, None] % 2
    ends = torch.tensor([LIMIT, -LIMIT, 1.0, 0.0, 2.0**-24])
    return {
        "at the limits": noise.sign() * LIMIT,
        "from limit to limit": ends.repeat(noise.numel() // 5 + 1)[: noise.numel()].reshape(shape),
        "constant": torch.full(shape, 3.0),
        "constant at the limit": torch.full(shape, LIMIT),
        "zero": torch.zeros(shape),
        "dead channels": noise * dead,
        "dead channels, at the limits": noise.sign() * LIMIT * dead,
        "one pixel": noise[:, :, :1, :1],
    }


each_map = pytest.mark.parametrize("name", maps((1, 2, 1, 1)))


@each_map
@pytest.mark.parametrize(
    ("dtype", "own"),
    [(torch.float32, torch.float32), *itertools.product(HALF, [torch.float32]), *zip(HALF, HALF, strict=True)],
)
def test_the_operator(name, dtype, own):
    """Features in dtype, codewords and smoothing in a dtype of their own; 1, 5 and 64 codewords for at most 20 pixels."""
    x = maps((2, 16, 4, 5))[name].to(dtype)
    generator = torch.Generator().manual_seed(1)
    for K, value, shared in itertools.product((1, 5, 64), SMOOTHING, (False, True)):
        codewords = (torch.randn(K, 16, generator=generator) / 8).to(own)
        smoothing = torch.full(
            () if shared else (K,), max(-LIMIT, min(value, LIMIT)) if own == torch.float16 else value
        ).to(own)
        grad = torch.randn(2, K, 16, generator=generator)
        excess = largest_excess(ctxenc.encode, x, codewords, smoothing, grad)
        assert max(excess.values()) <= 1, (K, value, shared, excess)
        weights = ctxenc.assign(x, codewords, smoothing)
        torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
        assert ctxenc.encode(x, codewords, smoothing).isfinite().all()


# The layer and the block, as they are trained


def nonfinite(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[str]:
    """What is not finite of the output, the gradients and the buffers, after backward of a small loss, for the sake of fp16."""
    (y.float().mean() / 1024).backward()
    tensors = {"output": y, "gradient of x": x.grad} | dict(module.named_buffers())
    tensors |= {f"gradient of {name}": each.grad for name, each in module.named_parameters()}
    return [name for name, each in tensors.items() if not each.isfinite().all()]


def fill(module: nn.Module, smoothing: float) -> None:
    """Smoothing as it may have become in training: only what is given is checked."""
    held = next(each for each in module.modules() if isinstance(each, Encoding)).smoothing
    held.data.fill_(max(-LIMIT, min(smoothing, LIMIT)) if held.dtype == torch.float16 else smoothing)


@each_map
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_layer_under_autocast(name, dtype):
    """As after a convolution under autocast: half features, fp32 parameters; nothing of theirs leaves fp32's range."""
    for K, smoothing in itertools.product((1, 5, 64), SMOOTHING):
        x = maps((2, 16, 4, 5))[name].to(dtype).requires_grad_()
        layer = Encoding(16, K)
        fill(layer, smoothing)
        with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else dtype, enabled=dtype in HALF):
            encoding = layer(x)
        assert encoding.dtype == torch.float32
        assert encoding.isfinite().all()
        wrong = nonfinite(layer, x, encoding)
        if (
            dtype == torch.float16 and abs(smoothing) == 1e6
        ):  # logits of 1e17: what fp32 rounds there is more than fp16 holds
            wrong = [each for each in wrong if each != "gradient of x"]
        assert not wrong, (K, smoothing, wrong)


def block_at(pool: str, K: int, smoothing: float) -> ContextEncoding:
    """A block whose projection of numbers at the limits stays within them."""
    block = ContextEncoding(16, K, rd_channels=8, pool=pool)
    with torch.no_grad():
        block.conv.weight.div_(1.01 * block.conv.weight.abs().sum(1, keepdim=True))
    for norm in (block.norm, block.norm_codes):
        norm.momentum = 1.0  # running statistics that fit, as at the end of a training
    fill(block, smoothing)
    return block


@each_pool
@each_map
@pytest.mark.parametrize(("dtype", "cast"), [(torch.float32, False), *itertools.product(HALF, (False, True))])
def test_the_block(pool, name, dtype, cast):
    """Under autocast, or cast as a whole; in training, then with the statistics of it."""
    for K, smoothing in itertools.product((1, 5, 64), SMOOTHING):
        torch.manual_seed(0)
        block = block_at(pool, K, smoothing)
        if cast:
            block.to(dtype)
            fill(block, smoothing)
        for training in (True, False):
            x = maps((2, 16, 4, 5))[name].to(dtype).requires_grad_()
            block.train(training).zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype in HALF and not cast):
                y = block(x)
            assert y.dtype == dtype
            wrong = nonfinite(block, x, y)
            if dtype == torch.float16:
                # What PyTorch's own norm makes of these: a variance of 4e9, and 1 / sqrt(eps) where there is none.
                beyond = ["norm.running_var"] * cast + ["gradient of conv.weight"] * (name == "constant at the limit")
                wrong = [each for each in wrong if each not in beyond]
            assert not wrong, (K, smoothing, training, wrong)
