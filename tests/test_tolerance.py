"""The tolerance of large problems, where the matmul form in fp64 stands for the specification, still tells what is wrong."""

import pytest
import torch

import ctxenc
from tests.tolerance import largest_excess, matmul_form


def problem(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 3601, generator=generator).to(dtype)
    codewords, smoothing = torch.randn(16, 64, generator=generator) / 4, torch.rand(16, generator=generator) / 64
    return x, codewords, smoothing, torch.randn(2, 16, 64, generator=generator)


def lost_pixel(x, codewords, smoothing):
    return matmul_form(x[:, :, :-1], codewords, smoothing)


def lost_codeword(x, codewords, smoothing):
    return torch.cat([matmul_form(x, codewords[:-1], smoothing[:-1]), codewords[-1:].expand(len(x), 1, -1) * 0], dim=1)


def wrong_product(x, codewords, smoothing):
    return matmul_form(x.float() * 1.1, codewords, smoothing)


def wrong_assignment(x, codewords, smoothing):
    return matmul_form(x, codewords, -smoothing)


def softmax_over_pixels(x, codewords, smoothing):
    x = x.float()
    center = codewords.mean(0).detach()
    logits = ctxenc.assign(x, codewords, smoothing).log()
    weights = torch.softmax(logits, dim=2)
    return weights @ (x - center[:, None]).transpose(1, 2) - weights.sum(2, keepdim=True) * (codewords - center)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_right_result_is_within_it(dtype):
    excess = largest_excess(matmul_form, *problem(dtype), products=dtype, large=True)
    assert max(excess.values()) <= 1, excess


@pytest.mark.parametrize(
    "mutant",
    [lost_pixel, lost_codeword, wrong_product, wrong_assignment, softmax_over_pixels],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_mutant_is_not(mutant, dtype):
    excess = largest_excess(mutant, *problem(dtype), products=dtype, large=True)
    assert max(excess.values()) > 1, excess


def test_both_references_agree():
    arguments = [
        tensor[..., :200] if tensor.dim() == 3 and tensor.shape[2] > 64 else tensor for tensor in problem(torch.float64)
    ]
    for large in (False, True):
        excess = largest_excess(matmul_form, *arguments, products=torch.float64, large=large)
        assert max(excess.values()) <= 1, excess
