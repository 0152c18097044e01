"""benchmarks.occupancy: its arithmetic at one launch by hand, rows of compiled kernels, and aims that a worse launch misses."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import occupancy
from benchmarks.bytes import Traffic, Work, traffic, work_of
from benchmarks.compiled import Launch, Resources, launches, main_launch
from benchmarks.gpus import GPUS
from benchmarks.occupancy import estimate, main, row
from benchmarks.shapes import Feed
from ctxenc.kernels.fused import forward
from ctxenc.kernels.fused.tiles import count_programs

FEED = Feed("by hand", 32, (28, 28), 16, 64)


def test_a_launch_by_hand(monkeypatch):
    """156 programs of 8 warps and 224 registers on 132 multiprocessors, 11 tiles each."""
    monkeypatch.setattr(occupancy, "resources", lambda *_: Resources(registers=224, stack=0, shared=100_000, warps=8))
    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="some_kernel"))
    work = Work({"p_x": 1}, {}, memory_waits=11, l2_waits=2, tiles=156 * 11, share=11, flops=989 * 10**6)
    launch = Launch(kernel, (156,), {"DOT": "bf16"}, {"num_warps": 8})
    found = estimate(launch, work, Traffic(memory=48 * 10**6, l2=97 * 10**6), GPUS["sm_90"])
    assert (found.programs, found.programs_at_a_time) == (156, 1)  # 224 * 256 = 57,344 of 65,536 registers
    assert found.waves == pytest.approx(156 / 132)
    assert found.at_work == pytest.approx(156 / 264)  # the second of two programs on 24 multiprocessors
    assert (found.best_at_work, found.busy, found.could_be_busy) == (1, 1, 1)  # 1,716 tiles are 13 on each
    assert found.memory_seconds == pytest.approx(10e-6)
    assert found.l2_seconds == pytest.approx(10e-6 * 264 / 156)
    assert found.product_seconds == pytest.approx(1e-6 * 264 / 156)
    assert found.latency_seconds == pytest.approx(2 * (11 * 374e-9 + 2 * 151e-9))
    assert (found.seconds, found.bound) == (found.l2_seconds, "L2")
    slow = work._replace(memory_waits=100)
    found = estimate(launch, slow, Traffic(memory=48 * 10**6, l2=97 * 10**6), GPUS["sm_90"])
    assert (found.seconds, found.bound) == (found.latency_seconds, "latency")


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        ("sm_90", 255, 0, 4, 2),  # 256 * 128 = 32,768 registers
        ("sm_90", 120, 0, 4, 4),
        ("sm_90", 32, 0, 4, 16),  # 64 warps
        ("sm_86", 32, 0, 4, 12),  # 48 warps
        ("sm_86", 32, 49 * 1024, 4, 2),  # of 100 KB, and 1 KB more for each
        ("sm_86", 32, 50 * 1024, 4, 1),
        ("sm_80", 32, 50 * 1024, 4, 3),  # 164 KB
    ],
)
def test_programs_that_fit_on_a_multiprocessor(target, registers, shared, warps, programs):
    assert count_programs(GPUS[target].target, registers, shared, warps) == programs


def test_memory_moves_x_once_and_what_l2_cannot_hold():
    x = occupancy.dense(1, 32, 784, torch.bfloat16, False)
    made = launches("forward", x, 16, GPUS["sm_90"])
    assert [launch.kernel.fn.__name__ for launch in made] == ["encode_fwd_kernel", "finish_fwd_kernel"]
    results = 4 * 16 * 33
    partial = made[0].programs * results
    parameters = results
    assert [each.memory for each in traffic(made, 50e6)] == [x.nbytes + parameters, results]
    assert [each.memory for each in traffic(made, 0)] == [x.nbytes + parameters + partial, partial + results]
    assert [each.l2 for each in traffic(made, 50e6)] == [
        x.nbytes + made[0].programs * parameters + partial,
        partial + results,
    ]


def test_tiles_are_those_of_the_launch():
    x = occupancy.dense(3, 64, 500, torch.float16, True)
    for direction in occupancy.DIRECTIONS:
        launch = main_launch(direction, x, 16, GPUS["sm_80"])
        work, tiles = work_of(launch), 3 * -(-500 // launch.arguments["BLOCK_N"])
        assert work.tiles == tiles
        assert (launch.programs - 1) * work.share < tiles <= launch.programs * work.share + 3 * work.share


def test_a_call_that_fills_the_gpu(monkeypatch):
    found = row("sm_90", FEED, 64, "forward", "bf16", False)
    assert found.shape == (64, 32, 784, 16)
    assert found.faults() == []
    x = 64 * 32 * 784 * 2
    assert found.floor_seconds == pytest.approx((x + 4 * 16 * 33 * 65) / 4.8e12)
    assert found.seconds >= found.floor_seconds
    monkeypatch.setattr(forward, "split_images", lambda B, tiles, *_: (1, tiles))  # an image has one program
    (fault,) = row("sm_90", FEED, 64, "forward", "bf16", False).faults()
    assert fault == "encode_fwd_kernel gives 48% of the multiprocessors a tile where 100% could have one"


def test_codewords_read_at_every_tile_are_too_many_bytes(monkeypatch):
    monkeypatch.setattr(forward, "split_images", lambda B, tiles, *_: (tiles, 1))
    (fault,) = row("sm_90", FEED, 256, "forward", "bf16", False).faults()
    assert fault.startswith("L2 moves 2.6")


def test_quick(tmp_path, capsys):
    out = tmp_path / "occupancy.json"
    main(["--quick", "--jobs", "1", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    printed = capsys.readouterr().out.splitlines()
    assert len(rows) == 8
    assert len(printed) == 1 + 2 + len(rows)
    assert {(each["target"], each["direction"]) for each in rows} == {("sm_90", "forward"), ("sm_90", "backward")}
    assert all(each["bound"] in ("memory", "L2", "tensor", "latency") for each in rows)


def test_check_fails_where_programs_are_too_few(monkeypatch):
    monkeypatch.setattr(forward, "split_images", lambda B, tiles, *_: (1, tiles))
    with pytest.raises(SystemExit, match=r"\n\d aims do not hold in 8 rows$"):
        main(["--quick", "--check", "--jobs", "1"])
