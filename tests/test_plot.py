"""Pictures of results, and the command that makes everything."""

import pytest
from PIL import Image

from benchmarks import all as everything
from benchmarks import plot
from benchmarks.record import Record

HEAD = {"copy_bytes_per_second": 1e10, "matmul_flops_per_second": {"float32": 1e11}}


def times(median):
    return {"median": median, "p20": median * 0.9, "p80": median * 1.2}


def encode_row(form, shape, ratio, group="networks", layout="channels_first"):
    row = {
        "group": group,
        "source": "net, stage 1",
        "shape": list(shape),
        "layout": layout,
        "dtype": "float32",
        "form": form,
    }
    row |= {"forward_ms": times(ratio), "forward_backward_ms": times(3 * ratio)}
    row |= {"forward_floor": 0.5 / ratio, "forward_backward_floor": 0.5 / ratio}
    return row | {"forward_ratio": ratio, "forward_backward_ratio": ratio}


def swap_row(variant, ratio, fused=False, **more):
    row = {
        "network": "net",
        "variant": variant,
        "fused": fused,
        "mode": "eager",
        "precision": "fp32",
        "channels_last": True,
        "reduction": "C/16",
        "compared_with": "shipped",
    }
    return row | {"training_ratio": ratio, "inference_ratio": ratio, "memory_ratio": ratio} | more


@pytest.fixture
def encode_result(tmp_path):
    record = Record("encode", tmp_path / "encode_cpu.json", 1e-7, 0, "cpu", **HEAD)
    for shape in ((2, 49, 16, 8), (2, 196, 16, 8)):
        record.add(*(encode_row(form, shape, ratio) for form, ratio in (("ctxenc, torch", 1.0), ("expanded", 50.0))))
    sweep = (
        [(2, N, 16, 8) for N in (49, 196, 784)] + [(2, 196, D, 8) for D in (8, 32)] + [(2, 196, 16, K) for K in (4, 16)]
    )
    record.add(*(encode_row("ctxenc, torch", shape, shape[1] / 49, group="sweep") for shape in sweep))
    return record.path


@pytest.fixture
def swap_result(tmp_path):
    record = Record("swap", tmp_path / "swap_cpu.json", 1e-7, 0, "cpu")
    rows = [
        swap_row("shipped", 1.0),
        swap_row("no SE", 0.9),
        swap_row("own, mean", 1.04),
        swap_row("own, mean", 1.02, True),
    ]
    record.add(
        *rows,
        swap_row("own, mean", 7.0, mode="compile"),
        swap_row("1/4, mean", 1.2, failed="out of memory", reduction="C/4"),
        swap_row("own, concat", 1.5),
    )
    return record.path


def test_every_picture_of_the_layer_is_drawn(encode_result, tmp_path, capsys):
    plot.main([str(encode_result), "--out", str(tmp_path / "pictures")])
    names = ["encode_cpu_speed.png", "encode_cpu_roofline.png", "encode_cpu_growth.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "pictures" / name) for name in names]
    for name in names:
        with Image.open(tmp_path / "pictures" / name) as picture:
            assert picture.width > 600
            assert len(picture.convert("RGB").getcolors(2**24)) > 10  # not an empty page


def test_growth_follows_one_size_at_a_time(encode_result):
    figure = plot.draw_growth(plot.read(encode_result))
    sizes = [ax.lines[0].get_xdata().tolist() for ax in figure.axes]
    assert sizes == [[49, 196, 784], [4, 8, 16], [8, 16, 32]]


def test_every_form_stands_at_its_ratio_and_its_part_of_the_roofline(encode_result):
    result = plot.read(encode_result)
    speed, roofline = plot.draw_speed(result), plot.draw_roofline(result)
    shown = [
        [point for c in figure.axes[1].collections for point in c.get_offsets().tolist()]
        for figure in (speed, roofline)
    ]
    assert shown[0] == [[50.0, 0.0], [50.0, 1.0]]  # ours is the line at 1
    assert sorted(shown[1]) == [[0.01, 0.0], [0.01, 1.0], [0.5, 0.0], [0.5, 1.0]]


def test_cost_shows_eager_rows_of_the_table_alone(swap_result):
    figure = plot.draw_cost(plot.read(swap_result))
    shown = [offset[0] for collection in figure.axes[1].collections for offset in collection.get_offsets()]
    assert sorted(shown) == [0.9, 1.02, 1.04, 1.2]  # the first variant is the line at 1
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["net: shipped = 1", "no SE", "ContextEncoding (C/16)", "ContextEncoding (C/4)"]


def test_a_result_without_rows_gives_no_picture(tmp_path):
    record = Record("swap", tmp_path / "swap_cpu.json", 1e-7, 0, "cpu")
    record.add()
    assert plot.draw(record.path, tmp_path) == []


def test_by_default_it_draws_every_result_that_has_pictures(encode_result, swap_result, tmp_path, monkeypatch, capsys):
    Record("swap_accuracy", tmp_path / "swap_accuracy.json", 1e-7, 0, "cpu").add()
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    plot.main(["--out", str(tmp_path / "pictures")])
    assert len(capsys.readouterr().out.split()) == 4


def test_other_results_have_no_pictures(tmp_path):
    record = Record("scenes", tmp_path / "a.json", 1e-7, 0, "cpu")
    record.add()
    with pytest.raises(SystemExit, match="pictures of encode, swap, got a result of 'scenes'"):
        plot.draw(record.path, tmp_path)


# benchmarks.all


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """Statuses of the steps by name, and the commands that were run."""
    statuses, commands = {}, {}

    def run(name, command, seconds):
        commands[name] = list(command)
        if name in ("encode", "swap"):
            (tmp_path / f"{name}_cpu.json").write_text("{}")
        return statuses.get(name, 0)

    monkeypatch.setattr(everything, "run", run)
    return statuses, commands


def test_all_runs_everything(steps, tmp_path):
    everything.main(["--device", "cpu", "--out", str(tmp_path), "--quick"])
    _, commands = steps
    assert list(commands) == ["tests", "encode", "swap", "plot"]
    assert commands["swap"] == [
        "benchmarks.swap",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "swap_cpu.json"),
        "--quick",
    ]
    assert commands["plot"][1:3] == [str(tmp_path / "encode_cpu.json"), str(tmp_path / "swap_cpu.json")]


def test_nothing_is_timed_where_the_tests_fail(steps, tmp_path):
    statuses, commands = steps
    statuses["tests"] = 1
    with pytest.raises(SystemExit, match="no speed is reported"):
        everything.main(["--device", "cpu", "--out", str(tmp_path)])
    assert list(commands) == ["tests"]


@pytest.mark.parametrize(("status", "options"), [(everything.TIME_IS_OVER, []), (1, ["--keep-going"])])
def test_tests_that_did_not_end_hold_nothing_up(steps, tmp_path, status, options):
    statuses, commands = steps
    statuses["tests"] = status
    with pytest.raises(SystemExit, match=r"failed: tests$"):
        everything.main(["--device", "cpu", "--out", str(tmp_path), *options])
    assert list(commands) == ["tests", "encode", "swap", "plot"]


def test_one_benchmark_that_fails_is_named_and_the_rest_runs(steps, tmp_path):
    statuses, commands = steps
    statuses["encode"] = 3
    with pytest.raises(SystemExit, match=r"failed: encode$"):
        everything.main(["--device", "cpu", "--out", str(tmp_path), "--seconds", "100"])
    assert list(commands) == ["tests", "encode", "swap", "plot"]
    assert commands["encode"][-2:] == ["--seconds", "24"]


def test_a_step_that_does_not_end_is_ended():
    assert everything.run("slow", ["timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"], 1.0) == 124
    assert everything.run("fast", ["timeit", "-n", "1", "-r", "1", "pass"], 60) == 0
