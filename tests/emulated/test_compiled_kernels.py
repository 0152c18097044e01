"""The kernels as they are compiled for an A100 and an H100, run from their PTX in an emulator and compared with fp64.

The interpreter runs a kernel's Python, one program after the other and each as if it were one thread. Here runs what the compiler
made of it: warps in random order, copies and products that are asynchronous, shared memory that is laid out for the tensor cores. A
race, an access out of bounds or a fence that is missing is an error even where the values come out right.
"""

import re

import pytest
import torch
from torch import Tensor

from ctxenc.kernels import reference
from ctxenc.kernels.fused import gate as triton_gate
from ctxenc.kernels.fused import pool as fused_pool
from ctxenc.kernels.fused import project as triton_project
from ctxenc.kernels.fused.backward import encode_backward
from ctxenc.kernels.fused.forward import encode_forward
from tests.emulated.copies import NEEDS_FENCE
from tests.emulated.launch import emulated
from tests.emulated.memory import KernelError
from tests.interpreted.test_encode import lay_out
from tests.tolerance import largest_excess

pytestmark = pytest.mark.slow
each_chip = pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
each_time = pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
each_layout = pytest.mark.parametrize("layout", ["channels_first", "channels_last"])


def problem(
    B: int, D: int, N: int, K: int, dtype: torch.dtype, layout: str, *, offset: float = 0.0, shared: bool = False
):
    """x, codewords, smoothing and an incoming gradient."""
    generator = torch.Generator().manual_seed(0)
    x = lay_out((torch.randn(B, D, N, generator=generator) + offset).to(dtype), layout)
    codewords = torch.randn(K, D, generator=generator) / 2 + offset
    smoothing = torch.rand(() if shared else (K,), generator=generator) / D
    return x, codewords, smoothing, torch.randn(B, K, D, generator=generator)


def excess(arguments, **how) -> float:
    """The largest error over tolerance of the encoding and its gradients."""
    x = arguments[0]

    class Encode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, features: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
            with emulated(**how):
                encoding, weight_sum = encode_forward(x, codewords, smoothing)
            ctx.save_for_backward(codewords, smoothing, weight_sum)
            return encoding

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
            codewords, smoothing, weight_sum = ctx.saved_tensors
            with emulated(**how):
                return encode_backward(grad, x, codewords, smoothing, weight_sum, True)

    return max(largest_excess(Encode.apply, *arguments, products=x.dtype).values())


@each_layout
@pytest.mark.parametrize(
    ("dtype", "late"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True), (torch.float32, True)],
    ids=str,
)
@each_chip
def test_encode(chip, dtype, late, layout):
    """Blocks of channels, some programs, and a last tile that is not full; K beyond 16 takes other instructions."""
    B, D, N, K = (2, 128, 168, 16) if dtype == torch.bfloat16 else (1, 64, 104, 20)
    assert excess(problem(B, D, N, K, dtype, layout), chip=chip, late=late) <= 1


@pytest.mark.parametrize(
    ("layout", "dtype", "D", "N", "K"),
    [
        ("channels_first", torch.bfloat16, 50, 75, 40),
        ("channels_last", torch.float16, 36, 49, 5),
        ("sliced_pixels", torch.float16, 34, 30, 64),
        ("sliced_channels", torch.bfloat16, 20, 150, 20),
        ("expanded", torch.float32, 24, 64, 8),
        ("no_unit_stride", torch.bfloat16, 16, 1, 1),
        ("channels_last", torch.bfloat16, 150, 20, 20),
        ("channels_first", torch.bfloat16, 48, 49, 5),  # as one run
        ("channels_first", torch.float16, 136, 25, 20),
    ],
)
@each_chip
def test_encode_what_is_not_aligned(chip, layout, dtype, D, N, K):
    """With an offset that half precision must be shifted by, and one smoothing factor."""
    arguments = problem(2, D, N, K, dtype, layout, offset=100.0, shared=True)
    assert excess(arguments, chip=chip, late=True) <= 1


@each_layout
@each_chip
def test_encode_more_channels_than_a_program_holds(chip, layout):
    """Two kernels a direction, and several blocks of channels."""
    assert excess(problem(1, 136, 72, 20, torch.bfloat16, layout), chip=chip, late=True) <= 1


@each_layout
@pytest.mark.parametrize(("dtype", "N"), [(torch.bfloat16, 90), (torch.float16, 90), (torch.bfloat16, 49)], ids=str)
@each_chip
def test_projection(chip, dtype, N, layout):
    generator = torch.Generator().manual_seed(0)
    x = lay_out(torch.randint(-1, 2, (2, 72, N), generator=generator).to(dtype), layout)
    weight, shift = (torch.randint(-1, 2, shape, generator=generator).to(dtype) for shape in ((20, 72), (20,)))
    codewords, smoothing = torch.randn(6, 20, generator=generator), torch.rand(6, generator=generator) / 500
    z = (torch.einsum("dc,bcn->bdn", weight.double(), x.double()) + shift.double()[:, None]).relu()
    with emulated(chip, late=True) as ran:
        got = triton_project.project_forward(x, weight, shift, codewords, smoothing)
    assert "project_encode_kernel" in ran
    exact = reference.encode(z, codewords.double(), smoothing.double())
    assert (got - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dy_layout", ["channels_first", "channels_last"])
@each_layout
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.bfloat16, (2, 72, 296)), (torch.bfloat16, (2, 40, 49)), (torch.float32, (1, 30, 49))],
    ids=str,
)
@each_chip
def test_gate(chip, dtype, shape, layout, dy_layout):
    generator = torch.Generator().manual_seed(0)
    x, dy = (lay_out(torch.randn(shape, generator=generator).to(dtype), lies) for lies in (layout, dy_layout))
    logits = torch.randn(shape[:2], generator=generator).to(dtype)
    leaves = [tensor.double().requires_grad_() for tensor in (x, logits)]
    exact = (leaves[0] + leaves[0] * leaves[1].sigmoid()[..., None]).relu()
    exact = [exact, *torch.autograd.grad(exact, leaves, dy.double())]
    with emulated(chip):
        got = [triton_gate._forward(x, logits, True), *triton_gate._backward(dy, x, logits, True, True)]
    for result, value in zip(got, exact, strict=True):
        assert result.dtype == dtype
        assert (result - value).abs().max() <= max(torch.finfo(dtype).eps, 5e-7) * value.abs().max()


@pytest.mark.parametrize(("training", "momentum"), [(True, 0.1), (True, None), (False, 0.1)])
@pytest.mark.parametrize(("K", "C"), [(5, 24), (16, 16)])
@each_chip
def test_pool(chip, K, C, training, momentum, monkeypatch):
    monkeypatch.setattr(fused_pool, "BLOCK", 128)
    monkeypatch.setattr(fused_pool, "PARTS", 2)
    constants = {"K": K, "C": C, "features": "float32", "training": training, "momentum": momentum, "eps": 1e-5}
    for operator, (problem,) in [
        (fused_pool.FORWARD, fused_pool._make_forward_problems(constants, torch.device("cpu"))),
        (fused_pool.BACKWARD, fused_pool._make_backward_problems(constants, torch.device("cpu"))),
    ]:
        with emulated(chip):
            results = operator.results(operator.kernel, problem)
        wide = [each.double() if isinstance(each, torch.Tensor) else each for each in problem]
        exact = operator.results(operator.plain, wide)
        excess = operator.excess(problem, results, exact)
        assert max(excess.values()) <= 1, excess
        assert len(excess) == len(results)


# What the emulator is to find


def without(pattern: str, instead: str = ""):
    return lambda ptx: re.sub(pattern, instead, ptx)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (without(r"bar\.sync \t0;"), "race|out of bounds"),
        pytest.param(
            without(r"fence\.proxy\.async[\w.:]*;"),
            "without a fence",
            marks=pytest.mark.skipif(not NEEDS_FENCE, reason="this Triton has none there"),
        ),
        (without(r"(cp\.async\.wait_group \t)\d+", r"\g<1>99"), "race|without a fence"),
        (without(r"(wgmma\.wait_group\.sync\.aligned \t?)\d", r"\g<1>7"), None),
        (without(r"(ld\.global\.b16 .*)\+ 0 \]", r"\g<1>+ 4096 ]"), "out of bounds"),
        (without(r"@%p\d+ (st\.global)", r"\g<1>"), "out of bounds"),
    ],
    ids=["barriers", "fences", "copies not waited for", "products not waited for", "an offset", "masks"],
)
def test_it_finds(change, what):
    """In the kernels of fp16 and of rows that are not aligned, without them; where no error need be told, values may be wrong."""
    # Wide maps are assigned with asynchronous copies.
    wide = what == "race|without a fence"
    arguments = problem(1, *((136, 72, 20) if wide else (36, 75, 5)), torch.float16, "channels_first")
    found = None
    try:
        over = excess(arguments, chip="sm_90", late=True, change=change)
    except KernelError as error:
        found = str(error)
    if found is None:
        assert what is None
        assert not over <= 1
    else:
        assert re.search(what or "", found)
