"""Problems on the GPU, and how a result is judged. Compiling takes most of the time, so a shape that was compiled is used again."""

import pytest
import torch
from torch import Tensor

import ctxenc
from tests.tolerance import largest_excess

DEVICE = "cuda"
LAYOUTS = ("channels_first", "channels_last")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RESIDUALS = (
    2**26
)  # elements of B x N x K x D up to which the residual form is taken: 0.5 GB in fp64, several times over

# Warnings of a driver or a GPU that nobody has tried are no failures.
on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch.cuda can use"),
    pytest.mark.filterwarnings("default"),
]

Arguments = tuple[Tensor, Tensor, Tensor, Tensor]


def triton(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    return ctxenc.encode(x, codewords, smoothing, backend="triton")


def features(B: int, D: int, N: int, layout: str, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Normal x (B, D, N): as one lies in memory, or a part of one that is larger."""
    kind = {"device": DEVICE, "dtype": dtype, "generator": generator}
    match layout:
        case "channels_first":
            return torch.randn(B, D, N, **kind)
        case "channels_last":
            return torch.randn(B, N, D, **kind).transpose(1, 2)
        case "part_of_pixels":  # begins at no multiple of 16 bytes
            return torch.randn(B, D, N + 3, **kind)[:, :, 1 : N + 1]
        case "part_of_channels":
            return torch.randn(B, N, D + 5, **kind).transpose(1, 2)[:, 5:]
        case "no_unit_stride":
            return torch.randn(B, D, N, 2, **kind)[..., 0]
    raise ValueError(layout)


def problem(
    B: int,
    N: int,
    D: int,
    K: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_first",
    shared: bool = False,
    offset: float = 0.0,
    spread: float = 1.0,
    hardness: float = 1.0,
    seed: int = 0,
) -> Arguments:
    """Features (B, D, N), codewords, smoothing and an incoming gradient; x is rounded with the offset in it."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    kind = {"device": DEVICE, "generator": generator}
    x = features(B, D, N, layout, dtype, generator)
    if spread != 1 or offset:
        x.mul_(spread).add_(offset)
    codewords = torch.randn(K, D, **kind) * spread / 4 + offset
    smoothing = torch.rand(() if shared else (K,), **kind) * hardness / (D * spread**2)
    return x, codewords, smoothing, torch.randn(B, K, D, **kind)


def excess(arguments: Arguments, products: torch.dtype | None = None) -> dict[str, float]:
    """Error over tolerance of the Triton path, by tests/tolerance.py; the products of half-precision x are half precision."""
    x, codewords, *_ = arguments
    large = x.numel() * codewords.shape[0] > RESIDUALS
    return largest_excess(triton, *arguments, products=products or x.dtype, large=large)


def assert_right(arguments: Arguments, products: torch.dtype | None = None) -> None:
    over = excess(arguments, products)
    x, codewords, smoothing, _ = arguments
    shapes = f"x {tuple(x.shape)} {x.stride()} {x.dtype}, K {codewords.shape[0]}, smoothing {tuple(smoothing.shape)}"
    assert max(over.values()) <= 1, f"error over tolerance {over} at {shapes}"


def run(arguments: Arguments) -> list[Tensor]:
    """The encoding and the gradients in x, codewords and smoothing; no autograd graph outlives the call."""
    *tensors, grad = arguments
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    encoding = triton(*leaves)
    return [encoding.detach(), *torch.autograd.grad(encoding, leaves, grad)]


def assert_same_bits(got: list[Tensor], wanted: list[Tensor]) -> None:
    for name, a, b in zip(("encoding", "dx", "dcodewords", "dsmoothing"), got, wanted, strict=True):
        assert torch.equal(a, b), f"{name} differs, by {float((a.double() - b.double()).abs().max())} at most"


def assert_near(got: list[Tensor], wanted: list[Tensor], relative: float) -> None:
    """To a part of the largest value."""
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert float((a.double() - b.double()).abs().max()) <= relative * float(b.double().abs().max())
