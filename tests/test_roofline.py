"""The roofline on paper: its arithmetic at one shape, by hand, and that every row of it is printed."""

import pytest

from benchmarks.roofline import GPUS, floor, main, shapes


def test_floor_by_hand():
    row = floor(GPUS["H200"], (16, 3600, 512, 32), "bf16", "forward")
    x = 16 * 3600 * 512 * 2
    assert row.bytes.x == x
    assert row.flops == 2 * 2 * 16 * 3600 * 512 * 32
    assert x / 4.8e12 < row.memory_seconds < 1.25 * x / 4.8e12  # the rest are partial sums and operands
    assert row.seconds == row.memory_seconds > row.product_seconds == pytest.approx(row.flops / 989e12)


def test_backward_reads_x_and_writes_its_gradient():
    row = floor(GPUS["A100"], (16, 3600, 512, 32), "fp32", "backward")
    assert row.memory_seconds > 2 * 16 * 3600 * 512 * 4 / 2.04e12


def test_every_row_is_printed(capsys):
    main(["--dtype", "bf16"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == len(shapes()) * len(GPUS) * 2
