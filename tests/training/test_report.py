"""The table and the files of a finished run, from made-up results."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from ctxenc.runs import folders
from ctxenc.training import report
from ctxenc.training.checkpoint import COLUMNS, PREDICTIONS, read_predictions, read_rows, write_rows
from ctxenc.training.settings import Settings

TARGETS = [0] * 6 + [1] * 3 + [2]
# How many of each class (6, 3 and 1 images) are right after the last epoch; the epoch before, all are.
RIGHT = {"se-0": (6, 3, 0), "se-1": (6, 0, 0), "context-0": (6, 3, 1), "context-1": (3, 3, 0)}
SPEED = {"se": (100.0, 300.0), "context": (80.0, 120.0)}


@pytest.fixture
def finished(tmp_path, config):
    """A run of two arms and two seeds."""
    settings = Settings(**(config.settings | {"arms": "both", "seeds": 2, "lr": 0.0123}))
    for arm, counts in RIGHT.items():
        folder = tmp_path / arm
        folder.mkdir()
        hits = [index < count for size, count in zip((6, 3, 1), counts, strict=True) for index in range(size)]
        predictions = [
            dict(zip(PREDICTIONS, (f"{i}", t, t if hit else (t + 1) % 3, 0.5, i), strict=True))
            for i, (t, hit) in enumerate(zip(TARGETS, hits, strict=True))
        ]
        write_rows(folder / "predictions.csv", PREDICTIONS, predictions)
        score = sum(count / size for size, count in zip((6, 3, 1), counts, strict=True)) / 3
        values = [(1.0, 0.1), (score, 0.2)]
        rows = [
            dict(zip(COLUMNS, (epoch, 0.01, loss, loss + 0.1, value, 0.5), strict=True))
            for epoch, (value, loss) in enumerate(values, start=1)
        ]
        write_rows(folder / "metrics.csv", COLUMNS, rows)
        timings = [{"epoch": epoch, "images_per_s": speed} for epoch, speed in enumerate(SPEED[arm[:-2]], start=1)]
        write_rows(folder / "timings.csv", ("epoch", "images_per_s"), timings)
    return tmp_path, {"se": replace(config, swap=None), "context": config}, settings


def test_table(finished):
    run, configs, settings = finished
    text = report.write_report(run, configs, settings, 12.0)
    se, context = (
        next(line for line in text.splitlines() if line.startswith(name)) for name in ("SE ", "ContextEncoding ")
    )
    parameters = {
        arm: sum(p.numel() for p in folders.build_model(config).parameters()) for arm, config in configs.items()
    }
    # 50 % is the mean of 2/3 and 1/3: the last epoch, though the first was perfect.
    assert se.split()[1:4] == [f"{parameters['se']:,}", "50.0", "%"]
    assert se.split()[-4:] == ["66.7,", "33.3", "200", "1.00"]
    assert context.split()[1:4] == [f"{parameters['context']:,}", "75.0", "%"]
    assert context.split()[-4:] == ["100.0,", "50.0", "100", "0.50"]
    # of 100 - 200/3 and 50 - 100/3 points: Student's 12.706 for one degree of freedom
    gain = "ContextEncoding minus SE: +25.0 points of balanced accuracy, 95 % interval -80.9 to +130.9 over 2 seeds."
    assert text.splitlines()[5] == gain
    assert f"**{gain}**" in (run / "report.md").read_text()
    assert (run / "report.html").read_text().partition("<table>")[0].count(gain) == 1
    assert "after the last epoch (not the best one), mean of 2 seeds" in text
    assert "nearest neighbour" not in text


def test_the_interval_is_over_samples(finished):
    run, configs, settings = finished
    arm = report.read_arm(run, "context", configs["context"], settings.seed_list)
    assert arm.share_right.tolist() == [1, 1, 1, 0.5, 0.5, 0.5, 1, 1, 1, 0.5]
    assert arm.score == pytest.approx(0.75)
    assert arm.correct.shape == (2, 10)


def test_files(finished):
    run, configs, settings = finished
    text = report.write_report(run, configs, settings, 12.0)
    with Image.open(run / "curves.png") as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 400
    written = (run / "report.md").read_text()
    for name, value in settings.as_dict().items():
        assert f"| `{name}` | `{value}` |" in written
    for line in text.splitlines()[6:]:
        assert line in written
    assert "| SE | " in written
    assert "(curves.png)" in written
    assert f"torch {torch.__version__}".partition("+")[0] in written
    assert "The command took 12 s" in written
    assert report.machine() in written
    rows = (run / "metrics.csv").read_text().splitlines()
    assert rows[0] == "arm,seed," + ",".join(COLUMNS)
    assert [row.split(",")[:3] for row in rows[1:]] == [
        [arm, seed, epoch] for arm in ("se", "context") for seed in "01" for epoch in "12"
    ]


def test_a_path_with_a_bar_breaks_no_table(finished):
    run, configs, settings = finished
    report.write_report(run, configs, replace(settings, data="/a|b"), 1.0)
    assert "| `data` | `/a\\|b` |" in (run / "report.md").read_text()


def test_the_photographs_have_the_score_on_colour(finished):
    run, configs, settings = finished
    text = report.write_report(run, configs, replace(settings, data="photographs"), 1.0)
    assert "nearest neighbour on colour" in text
    assert "68.6 %" in text
    assert "test tiles" in text


def test_one_seed_has_no_interval(finished):
    run, configs, settings = finished
    text = report.write_report(run, configs, replace(settings, seeds=1), 1.0)
    assert "ContextEncoding minus SE: +33.3 points of balanced accuracy; one seed, no interval." in text


def test_one_arm_has_no_difference(finished):
    run, configs, settings = finished
    one = replace(settings, arms="context", seeds=1)
    text = report.write_report(run, {"context": configs["context"]}, one, 1.0)
    assert "minus" not in text
    assert "100.0 %" in text
    assert "mean of 1 seed;" in text


def test_curves_show_every_arm(finished):
    run, configs, settings = finished
    arms = [report.read_arm(run, name, config, settings.seed_list) for name, config in configs.items()]
    accuracy, loss = report.draw_curves(arms, 0.6).axes
    lines = {line.get_label(): line.get_ydata() for line in accuracy.get_lines()}
    assert lines["SE"].tolist() == pytest.approx([100, 50])
    assert lines["ContextEncoding"].tolist() == pytest.approx([100, 75])
    assert set(lines["nearest neighbour on colour"]) == {60}
    assert len(loss.get_lines()) == 4


def test_rows_come_back(tmp_path):
    rows = [dict(zip(COLUMNS, (1, 0.1, 2.0, 3.0, 1 / 3, 0.5), strict=True))]
    write_rows(tmp_path / "metrics.csv", COLUMNS, rows)
    assert read_rows(tmp_path / "metrics.csv") == rows


def test_samples_that_some_runs_left_out_do_not_count(finished):
    """As when an image breaks between two seeds and --on-bad-image is skip."""
    run, configs, settings = finished
    path = run / "se-1" / "predictions.csv"
    kept = [row for row in read_predictions(path) if row[0] not in ("0", "9")]
    write_rows(path, PREDICTIONS, [dict(zip(PREDICTIONS, row, strict=True)) for row in kept])
    text = report.write_report(run, configs, settings, 12.0)
    assert "mean over classes on 8 validation images" in text
    se = next(line for line in text.splitlines() if line.startswith("SE "))
    assert se.split()[-4:-2] == ["100.0,", "50.0"]  # the two classes that are left: 5 and 3 of 8 right, then 5 and 0


def test_seeds_that_agree_have_no_interval():
    said = report.describe_gain("A", "B", [0.5, 0.6], [0.25, 0.35], "accuracy")
    assert said == "A minus B: +25.0 points of accuracy; all 2 seeds alike, no interval."
