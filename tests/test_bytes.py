"""What launches of the Triton kernels move, counted: the promises of the kernels' docstrings at large shapes."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.bytes import traffic
from benchmarks.compiled import launches, source
from benchmarks.gpus import GPUS
from benchmarks.occupancy import dense

each_direction = pytest.mark.parametrize("direction", ["forward", "backward"])
each_target = pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])


def in_times_of_x(direction, x, K, target):
    """Bytes of memory and of L2."""
    gpu = GPUS[target]
    moved = traffic(launches(direction, x, K, gpu), gpu.figures.l2_bytes)
    return sum(each.memory for each in moved) / x.nbytes, sum(each.l2 for each in moved) / x.nbytes


@each_target
@each_direction
def test_memory_moves_x_once_where_a_program_holds_all_channels(direction, target):
    memory, l2 = in_times_of_x(direction, dense(64, 64, 3136, torch.bfloat16, False), 16, target)
    passes = 1 if direction == "forward" else 2  # backward writes the gradient in x
    assert passes < memory < 1.1 * passes
    assert memory < l2 < 2 * passes


@each_target
@each_direction
def test_wide_maps_are_read_twice(direction, target):
    """From memory where L2 does not hold them."""
    written = 0 if direction == "forward" else 1
    memory, _ = in_times_of_x(direction, dense(256, 512, 3600, torch.bfloat16, True), 32, target)
    assert 2 + written < memory < 2.5 + written
    memory, _ = in_times_of_x(direction, dense(1, 512, 3600, torch.bfloat16, True), 32, target)
    assert 1 + written < memory < 1.2 + written


# B, C, N: the first three stages of seresnet50 at 224, C' = C / 16
@pytest.mark.parametrize("shape", [(64, 256, 3136), (64, 512, 784), (64, 1024, 196)])
def test_projection_in_one_kernel_moves_little_more_than_x(shape):
    memory, _ = in_times_of_x("project", dense(*shape, torch.bfloat16, False), 16, "sm_90")
    assert 1 < memory < 1.12


@each_target
@each_direction
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("D", "K"), [(16, 16), (96, 24), (512, 32)])
def test_new_sizes_compile_nothing_new(D, K, direction, channels_last, target):
    def kinds(B, N):
        made = launches(direction, dense(B, D, N, torch.bfloat16, channels_last), K, GPUS[target])
        return {
            (
                launch.kernel.fn.__name__,
                str(source(launch).signature),
                str(source(launch).constants),
                str(launch.options),
            )
            for launch in made
        }

    first = kinds(2, 784)
    for B, N in [(16, 784), (3, 3600), (256, 64), (1, 65536)]:
        assert kinds(B, N) <= first


def test_bytes_of_the_gate():
    """The sums of programs that share the pixels come to little, and there are none where the images are enough."""

    def memory(B, C, N):
        x = dense(B, C, N, torch.bfloat16, False)
        forward, *backward = traffic(launches("gate", x, 16, GPUS["sm_90"]), l2_bytes=0)
        return forward.memory, sum(each.memory for each in backward)

    x, logits, sums = 2 * 3 * 800 * 2, 2 * 3 * 2, 4 * 2 * 3 * 4
    assert memory(2, 3, 800) == (2 * x + logits, 3 * x + 2 * logits + 2 * sums)
    x, logits = 64 * 1024 * 196 * 2, 64 * 1024 * 2
    assert memory(64, 1024, 196) == (2 * x + logits, 3 * x + 2 * logits)
    forward, backward = memory(8, 512, 56 * 56)
    assert backward < 1.51 * forward  # three passes for two, and the partial sums
