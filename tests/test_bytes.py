"""What launches of the Triton kernels move, counted: against what the launchers hand over, and against what was promised."""

from itertools import product

import pytest
import torch

from benchmarks.bytes import encode_bytes, project_bytes
from ctxenc.kernels.fused.tiles import Target, backward_tiles, forward_tiles

SHAPES = [(2, 3600, 512, 32), (16, 196, 256, 16), (32, 784, 128, 16)]  # B, N, D, K
TARGETS = [Target(80, 108), Target(90, 132), Target(100, 148)]
L2 = 40e6  # bytes; the smallest of these GPUs, an A100

everywhere = pytest.mark.parametrize(
    ("shape", "itemsize", "target"), list(product(SHAPES, (4, 2), TARGETS)), ids=lambda value: str(value)
)


def count(shape, itemsize, target):
    B, N, D, K = shape
    return encode_bytes(B, D, N, K, itemsize, target)


@everywhere
def test_partial_sums_are_a_tenth_of_x_at_most(shape, itemsize, target):
    for direction in count(shape, itemsize, target):
        assert direction.partial_written <= 0.1 * direction.x


@everywhere
def test_x_comes_from_memory_once(shape, itemsize, target):
    B, N, D, K = shape
    assert K * D <= 32 * 512
    for direction in count(shape, itemsize, target):
        assert direction.x == B * N * D * itemsize
        assert direction.l2_x == (direction.passes - 1) * direction.x
        assert direction.in_flight <= L2  # what is walked over again is still in the cache


def test_x_is_copied_once_where_its_tiles_are_resident():
    forward = count((16, 3600, 512, 32), 2, Target(90, 132)).forward
    assert (forward.passes, forward.l2, forward.in_flight) == (1, 0, 0)


def test_only_backward_writes_a_gradient():
    counts = count((2, 3600, 512, 32), 2, Target(80, 108))
    assert counts.forward.dx == 0
    assert counts.backward.dx == counts.backward.x
    assert counts.backward.memory > 2 * counts.backward.x


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("D", [16, 512])
def test_counts_are_what_the_launchers_hand_over(chip, dtype, channels_last, D):
    pytest.importorskip("triton")
    from benchmarks.compiled import DTYPES, main_launch
    from benchmarks.gpus import GPUS
    from benchmarks.kernel_report import Case

    K, torch_dtype = 32, DTYPES[dtype]
    x = Case(chip, "forward", dtype, channels_last, True, D, K).x()
    handed = {direction: main_launch(direction, x, K, GPUS[chip]).arguments for direction in ("forward", "backward")}
    B, _, N = x.shape
    options = {"dtype": torch_dtype, "channels_last": channels_last}
    forward, backward = encode_bytes(B, D, N, K, torch_dtype.itemsize, GPUS[chip].target, **options)

    def nbytes(direction, *names):
        return sum(handed[direction][name].nbytes for name in names)

    assert max(forward.partial_written, forward.results) == nbytes("forward", "p_encoding", "p_weight_sum")
    assert forward.passes == (1 if handed["forward"]["RESIDENT"] else handed["forward"]["groups"] + 1)
    parameters = ("p_codewords", "p_smoothing")
    prepared = nbytes("forward", "p_operands", "p_centers", "p_bias")
    assert forward.operands == nbytes("forward", *parameters) + 2 * prepared

    assert backward.dx == nbytes("backward", "p_dx")
    assert backward.partial_written == nbytes("backward", "p_dcodewords", "p_dsmoothing")
    prepared = nbytes("backward", "p_operands", "p_centers", "p_bias", "p_grad")
    grad = 4 * B * K * D
    assert backward.operands == nbytes("backward", *parameters) + 2 * prepared + 4 * grad


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("D", [16, 100])
def test_counts_of_the_projection_are_what_is_handed_over(dtype, channels_last, D):
    pytest.importorskip("triton")
    from benchmarks.compiled import DTYPES, main_launch
    from benchmarks.gpus import GPUS
    from benchmarks.kernel_report import Case

    K, torch_dtype = 16, DTYPES[dtype]
    x = Case("sm_90", "project", dtype, channels_last, True, D, K).x()
    handed = main_launch("project", x, K, GPUS["sm_90"]).arguments
    B, C, N = x.shape
    counted = project_bytes(B, C, N, D, K, GPUS["sm_90"].target, dtype=torch_dtype, channels_last=channels_last)
    assert handed["splits"] > 1
    once = ("p_x", "p_weight", "p_codewords", "p_smoothing")
    twice = ("p_operands", "p_centers", "p_bias", "p_encoding")
    nbytes = sum(handed[name].nbytes for name in once) + 2 * sum(handed[name].nbytes for name in twice)
    nbytes += D * torch_dtype.itemsize + 4 * B * K * D  # the shift, and the sum over the splits
    assert counted.memory == nbytes
    tiles = B * handed["tiles"]
    assert counted.l2 == tiles * handed["p_weight"].nbytes


# B, C, N, D, K: the four stages of seresnet50 at 224, bf16, 64 images.
STAGES = [(64, 256, 3136, 16, 16), (64, 512, 784, 32, 16), (64, 1024, 196, 64, 16), (64, 2048, 49, 128, 16)]


@pytest.mark.parametrize("shape", STAGES)
def test_projection_in_one_kernel_moves_little_more_than_x(shape):
    counted = project_bytes(*shape, Target(90, 132))
    x = 2 * shape[0] * shape[1] * shape[2]
    assert counted.memory < 1.12 * x
    assert counted.memory < 0.9 * counted.in_steps


@pytest.mark.parametrize("shape", [(16, 1024, 196, 64, 64), (8, 512, 784, 64, 64), (8, 64, 784, 64, 64)])
def test_projection_in_one_kernel_moves_no_more_than_its_steps(shape):
    """Where many programs share an image, by their partial sums it would."""
    counted = project_bytes(*shape, Target(90, 132))
    assert counted.memory < counted.in_steps


def test_a_dtype_of_another_size_is_refused():
    with pytest.raises(
        ValueError, match=r"^encode_bytes: dtype must have 2 bytes, as itemsize says, got torch.float32"
    ):
        encode_bytes(1, 16, 16, 16, 2, TARGETS[0], dtype=torch.float32)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("choose", [forward_tiles, backward_tiles])
@pytest.mark.parametrize(("D", "K"), [(16, 16), (96, 24), (512, 32), (2048, 64)])
def test_new_sizes_take_the_same_tiles(D, K, choose, channels_last, target):
    """Of images and batches, so that nothing is compiled for them."""
    chosen = set()
    for B, N in [(1, 8), (2, 784), (16, 784), (3, 3600), (256, 64), (1, 2**20), (2, 65536)]:
        x = torch.empty((B, N, D) if channels_last else (B, D, N), dtype=torch.bfloat16, device="meta")
        chosen.add(choose(x.transpose(1, 2) if channels_last else x, K, target)[0])
    assert len(chosen) == 1
