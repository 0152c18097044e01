"""How the fused kernels cut their work: every tile has one program, and wide loads are claimed only where rows allow them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctxenc.kernels.fused.tiles import (
    GPU,
    choose_tiles,
    count_programs,
    find_vector,
    is_channels_last,
    is_run,
    split_images,
)


@given(st.integers(1, 300), st.integers(1, 3000), st.integers(1, 1200), st.integers(0, 800))
def test_every_tile_has_one_program(B, tiles, slots, partial):
    splits, share = split_images(B, tiles, slots, partial)
    assert (splits - 1) * share < tiles <= splits * share


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([108, 132, 264, 528]))
def test_the_gpu_is_filled_where_there_are_tiles(B, tiles, slots):
    """Where sums cost nothing, the last program ends at most 3 tiles or a third later than with tiles dealt out evenly."""
    splits, share = split_images(B, tiles, slots, 0)
    ideal = B * tiles / slots
    assert -(-B * splits // slots) * share <= max(ideal + 3, 1.34 * ideal)


def test_sums_that_cost_more_than_they_save_are_not_split():
    assert split_images(132, 2, 132, 800) == (1, 2)
    assert split_images(1, 57, 264, 200) == (57, 1)  # EncNet's 60 x 60 map of one image


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("last", [False, True])
def test_wide_loads_need_aligned_rows(dtype, last):
    widest = 16 // torch.empty(0, dtype=dtype).element_size()

    def width(start=0, B=2, D=16, N=16, row=0):
        """Of an x whose memory starts so many elements behind an aligned address, its rows so much longer than they need be."""
        rows, length = (N, D) if last else (D, N)
        room = torch.zeros(B * rows * (length + row) + start + widest, dtype=dtype)
        start += -room.data_ptr() // room.element_size() % widest
        x = room[start : start + B * rows * (length + row)].view(B, rows, length + row)[..., :length]
        x = x.transpose(1, 2) if last else x
        assert is_channels_last(x) == last
        return find_vector(x, last)

    assert width() == widest
    assert width(start=widest // 2) == width(row=widest // 2) == widest // 2  # rows of 8 bytes
    assert width(start=1) == 1  # the strides alone do not tell
    assert width(row=1) == 1
    if not last:
        assert width(N=widest * 2 + 1) == 1
        assert width(N=widest // 2) == widest // 2


def test_few_pixels_are_read_as_a_run():
    room = torch.zeros(2 * 64 * 64 + 8, dtype=torch.bfloat16)
    start = -room.data_ptr() // 2 % 8

    def run(D=16, N=49, more=0, dtype=torch.bfloat16):
        x = room[start + more : start + more + 2 * D * N].view(2, D, N)
        return is_run(x.to(dtype))

    assert run()
    assert run(D=24, N=50)  # no multiple of 8 bytes either
    assert not run(N=48)  # whose rows are
    assert not run(D=10)  # images of 980 bytes
    assert not run(more=1)
    assert not run(D=8, N=121)  # too many
    assert not run(dtype=torch.float32)
    assert not is_run(room[start : start + 1568].view(2, 49, 16).transpose(1, 2))
    assert not is_run(room[start : start + 1600].view(2, 16, 50)[:, :, :49])


def test_programs_that_fit_on_a_multiprocessor():
    gpu = GPU(90, 132, 65536, 228 * 1024, 2048)
    assert count_programs(gpu, 255, 30_000, 4) == 2  # 256 registers for each of 128 threads
    assert count_programs(gpu, 128, 30_000, 4) == 4
    assert count_programs(gpu, 32, 100_000, 4) == 2  # shared memory
    assert count_programs(gpu, 16, 0, 8) == 8  # threads
    assert count_programs(gpu, 255, 200_000, 8) == 1


@pytest.mark.parametrize("direction", ["forward", "backward", "backward without dx", "project"])
def test_tiles_are_powers_of_two_that_cover_few_channels_too(direction):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for D in (1, 16, 100, 4096):
            for K in (1, 33, 256):
                tiles = choose_tiles(direction, dtype, D, K, 80)
                assert all(size & (size - 1) == 0 for size in (tiles.block_n, tiles.block_d, tiles.warps))
                assert tiles.block_d >= 16
