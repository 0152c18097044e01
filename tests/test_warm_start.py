"""The experiment of the warm start: what it measures, and the table and figure that the README shows."""

import pytest
import torch
from torch.utils.data import Subset

from benchmarks import warm_start
from benchmarks.record import Record, read
from benchmarks.warm_start import STARTS, TASKS, difference, draw_picture, main, markdown


def result(tmp_path, seeds=2):
    record = Record("warm_start", tmp_path / "warm_start.json", 1e-7, 0, "cpu")
    for seed in range(seeds):
        for number, start in enumerate(STARTS):
            row = {"data": "digits", "start": start, "seed": seed, "images": 8}
            record.add(*(row | {"epoch": epoch, "accuracy": 0.9 - 0.1 * number + 0.02 * seed} for epoch in range(3)))
    return read(record.path)


def test_the_table_compares_every_start_with_the_calibrated(tmp_path):
    table = markdown(result(tmp_path))
    header, rule, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert set(rule) == {"---"}
    assert [row[1] for row in rows] == list(STARTS)
    assert {len(row) for row in [header, rule, *rows]} == {8}
    assert rows[0][2] == "91.0 ± 1.4 %"
    assert rows[0][5].startswith("-10.0")
    assert rows[1][5:] == ["", "", ""]
    assert rows[3][7].startswith("+20.0")


def test_a_difference_has_the_interval_of_its_pairs():
    assert difference([0.5], [0.4]) == "+10.0"
    assert difference([0.9, 0.8, 0.7], [0.8, 0.7, 0.6]) == "+10.0 (+10.0 to +10.0)"
    # of 10, 20 and 30: a mean of 20, a deviation of 10, and Student's 4.303 for two degrees of freedom
    assert difference([0.1, 0.2, 0.3], [0, 0, 0]) == "+20.0 (-4.8 to +44.8)"


def test_the_figure_has_a_curve_for_each_start(tmp_path):
    (axes,) = draw_picture(result(tmp_path)).axes
    assert [bars.get_label() for bars in axes.containers] == list(STARTS)
    line, _, (bars,) = axes.containers[1]
    assert line.get_ydata().tolist() == pytest.approx([81] * 3)
    assert [y for ((_, y), _) in bars.get_segments()] == pytest.approx([81 - 2**0.5] * 3)


def test_every_start_is_trained_on_the_same_images():
    task = TASKS["digits"](0, 1, 1)
    first, again = (torch.cat([images for images, _ in task.batches(1)]) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.cat([images for images, _ in task.batches(2)]))
    train, test = (tuple(map(tuple, part.tensors[0].flatten(1).tolist())) for part in (task.train, task.test))
    assert len(train) + len(test) == 1797


def test_a_quick_run_writes_both_files(tmp_path, monkeypatch, capsys):
    def few(*args):
        task = TASKS["digits"](*args)
        small = [Subset(part, range(96)) for part in (task.train, task.test, task.plain)]
        return warm_start.Task("digits", 10, *small, *args[1:])

    monkeypatch.setattr(warm_start, "TASKS", {"digits": few, "photographs": few})
    path = tmp_path / "out.json"
    main(["--quick", "--data", "digits", "--out", str(path)])
    rows = read(path)["rows"]
    assert [(row["start"], row["epoch"]) for row in rows] == [(start, epoch) for start in STARTS for epoch in (0, 1)]
    for row in rows:
        assert ("gate_r2" in row) == (row["epoch"] == 0 and row["start"] != "SE goes on")
        assert 0 <= row["accuracy"] <= 1
    assert path.with_suffix(".png").stat().st_size > 5000
    assert "| digits | calibrated |" in capsys.readouterr().out
