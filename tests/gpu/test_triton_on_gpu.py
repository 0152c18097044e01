"""Values and gradients of the Triton path at real sizes, against fp64."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gpu.problems import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    assert_near,
    assert_right,
    assert_same_bits,
    features,
    on_a_gpu,
    problem,
    run,
    triton,
)
from tests.tolerance import largest_excess

pytestmark = on_a_gpu

# B, N, D, K
SHAPES = [
    (16, 3600, 512, 32),  # EncNet at a 480 crop, and its larger crops
    (2, 9409, 512, 32),
    (64, 3136, 16, 16),  # in place of SE in a ResNet, C' = C / 16
    (64, 784, 32, 16),
    (64, 196, 64, 16),
    (64, 49, 128, 16),
    (16, 784, 128, 16),  # and C' = C / 4
    (16, 196, 256, 16),
    (128, 64, 64, 32),  # CIFAR
    (4, 196, 1024, 32),
    (2, 196, 2048, 64),
    (2, 49, 2048, 16),
    (1, 65536, 64, 64),
    (1, 65536, 512, 32),
    (3, 1, 256, 32),
]
# N that is no multiple of 8, D and K that fit no block.
ODD_SHAPES = [(3, 195, 100, 17), (2, 3601, 33, 5), (5, 7, 1, 3), (2, 50, 300, 100), (4, 225, 1030, 31), (1, 1, 1, 1)]
EXAMPLES = int(os.environ.get("CTXENC_EXAMPLES", "60"))  # of all dtypes and layouts together


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + ODD_SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, layout):
    # One shape in both forms of smoothing, of the others a few in the shared one: each form is compiled for itself.
    for shared in [False, True] if shape == SHAPES[0] else [sum(shape[2:]) % 3 == 1]:
        assert_right(problem(*shape, dtype=dtype, layout=layout, shared=shared))


@st.composite
def draws(draw: st.DrawFn):
    """Sizes, and how the numbers lie."""
    D = draw(st.one_of(st.sampled_from([64, 128, 256, 512, 1024, 2048]), st.integers(1, 300)))
    K = draw(st.one_of(st.sampled_from([16, 32, 64]), st.integers(1, 100)))
    pixels = st.one_of(st.sampled_from([1, 49, 196, 784, 3600, 65536]), st.integers(1, 5000))
    sizes = [(draw(st.integers(1, 4)), draw(pixels)) for _ in range(2)]  # what compiling costs is paid for once
    shared = draw(st.booleans())
    return [
        (
            (1 if N * D * K > 2**24 else B, N, D, K),
            {
                "shared": shared,
                "offset": draw(st.sampled_from([0.0, 0.0, 1.0, 100.0, -1000.0])),
                "spread": draw(st.sampled_from([1e-3, 1.0, 1.0, 8.0])),
                "hardness": draw(st.sampled_from([0.0, 1.0, 1.0, 30.0, -1.0])),
                "seed": draw(st.integers(0, 2**20)),
            },
        )
        for B, N in sizes
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(
    max_examples=max(1, EXAMPLES // 6),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(problems=draws())
def test_drawn_values_and_gradients(dtype, layout, problems):
    for shape, numbers in problems:
        assert_right(problem(*shape, dtype=dtype, layout=layout, **numbers))


@pytest.mark.parametrize("layout", ["part_of_pixels", "part_of_channels", "no_unit_stride"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_part_of_a_larger_tensor(dtype, layout):
    assert_right(problem(3, 784, 128, 16, dtype=dtype, layout=layout))


@pytest.mark.parametrize("kind", ["sum", "mean_over_codes", "codes_last", "one_image"])
def test_incoming_gradients_of_any_stride(kind):
    """What autograd hands over is often expanded or transposed; the result is that of the same values laid out plainly."""
    x, codewords, smoothing, grad = problem(4, 196, 128, 16, dtype=torch.bfloat16)
    match kind:
        case "sum":
            grad = grad[:1, :1, :1].expand_as(grad)
        case "mean_over_codes":
            grad = grad[:, :1].expand_as(grad)
        case "codes_last":
            grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
        case "one_image":
            grad = grad[:1].expand_as(grad)
    wanted = run((x, codewords, smoothing, grad.contiguous()))
    assert_same_bits(run((x, codewords, smoothing, grad)), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "D", "K"), [(784, 64, 16), (1000, 512, 32), (49, 128, 64)])
def test_every_pixel_counts_once(N, D, K, dtype, layout):
    """One pixel in each of N images is not zero, a different one in each: with all weights 1 / K the encoding is that pixel / K.

    The tolerance of a sum over many pixels would let one pixel through.
    """
    x = torch.zeros(N, D, N, dtype=dtype, device=DEVICE)
    if layout == "channels_last":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    pixels = torch.arange(N, device=DEVICE)
    values = (1 + (pixels[:, None] + torch.arange(D, device=DEVICE)) % 7).to(dtype)  # exact in every dtype
    x[pixels, :, pixels] = values
    codewords, smoothing = torch.zeros(K, D, device=DEVICE), torch.zeros(K, device=DEVICE)
    encoding = triton(x, codewords, smoothing)
    assert_near([encoding], [(values.float() / K).unsqueeze(1).expand(N, K, D)], 2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("B", "D"), [(700, 1024), (1400, 512)])  # 512 in tiles that a GPU may copy on its own
def test_a_batch_over_4_gib(B, D, layout):
    """More than 2^31 elements; of the first, the middle and the last image everything is compared, the others get no gradient."""
    N, K = 3136, 16
    x = features(B, D, N, layout, torch.bfloat16, None)
    few = torch.tensor([0, B // 2, B - 1], device=DEVICE)
    _, codewords, smoothing, grad = problem(3, 1, D, K)
    assert x.numel() > 2**31

    def among_all(x_few, codewords, smoothing):
        whole = x.clone().index_copy_(0, few, x_few)
        assert whole.stride() == x.stride()
        return triton(whole, codewords, smoothing)[few]

    over = largest_excess(among_all, x[few], codewords, smoothing, grad, products=torch.bfloat16, large=True)
    assert max(over.values()) <= 1, f"error over tolerance {over}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_image_over_4_gib(layout):
    """Every channel has one value, and all weights are 1 / K, so that every sum is exact."""
    N, D, K = 2**21 + 24, 1024, 16
    channels = (torch.arange(D, device=DEVICE) % 8).to(torch.bfloat16)
    if layout == "channels_first":
        x = channels[:, None].expand(D, N).contiguous().unsqueeze(0)
    else:
        x = channels.expand(N, D).contiguous().t().unsqueeze(0)
    assert x.numel() > 2**31
    codewords, smoothing = torch.zeros(K, D, device=DEVICE), torch.zeros(K, device=DEVICE)
    grad = (torch.arange(D, device=DEVICE) % 5).float().expand(1, K, D)
    encoding, dx, *_ = run((x, codewords, smoothing, grad))
    assert_near([encoding], [(channels.float() * (N / K)).expand(1, K, D)], 2e-6)
    # dL/dx_i = sum_k w_ik g_k, the other terms have s = 0 in them
    assert dx.stride()[1:] == x.stride()[1:]
    assert torch.equal(dx.amax(2), dx.amin(2))
    assert_near([dx[:, :, 0]], [grad[:, 0].to(torch.bfloat16)], 1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("B", "N"), [(2, 70001), (70000, 4)])
def test_more_than_a_grid_dimension_holds(B, N, layout):
    assert_right(problem(B, N, 64, 16, dtype=torch.bfloat16, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 3600, 512, 32), (32, 196, 64, 16), (2, 65536, 128, 64)], ids=str)
def test_the_same_bits_in_every_run(shape, dtype, layout):
    arguments = problem(*shape, dtype=dtype, layout=layout)
    wanted = run(arguments)
    for _ in range(19):
        assert_same_bits(run(arguments), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_largest_features_are_finite(dtype):
    x, codewords, smoothing, _ = problem(2, 784, 512, 32, dtype=dtype)
    assert triton((x.sign() * 6e4).to(dtype), codewords, smoothing).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_goes_through_and_stays_in_its_image(dtype):
    x, codewords, smoothing, _ = problem(3, 784, 128, 16, dtype=dtype)
    x[1, 3, 700] = float("nan")
    encoding = triton(x, codewords, smoothing)
    assert encoding[[0, 2]].isfinite().all()
    assert encoding[1].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32_takes_no_tf32_unless_it_is_allowed(layout):
    arguments = problem(4, 784, 512, 32, layout=layout, offset=10.0)
    assert_right(arguments)
    matmul = torch.backends.cuda.matmul
    setting, allowed = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, setting)
    try:
        setattr(matmul, setting, allowed)
        assert_right(arguments, products=torch.float16)  # whose unit is that of tf32
    finally:
        setattr(matmul, setting, before)
    assert_right(arguments)
