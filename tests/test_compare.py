"""Records of benchmarks and what is made of two of them."""

import json

import pytest

from benchmarks import compare
from benchmarks.record import Record, read


def row(form, median, **more):
    return {
        "form": form,
        "shape": [2, 9, 4, 3],
        "forward_ms": {"median": median, "p20": median * 0.9, "p80": median * 1.1},
    } | more


@pytest.fixture
def record(tmp_path):
    def make(name, *rows, benchmark="encode"):
        result = Record(benchmark, tmp_path / name, 1e-7, 0, "cpu", copies=3)
        result.add(*rows)
        return tmp_path / name

    return make


def test_a_record_says_where_it_comes_from(record):
    result = read(record("a.json", row("ours", 1.0)))
    assert result["rows"] == [row("ours", 1.0)]
    assert result["environment"]["versions"]["torch"]
    assert {"commit", "processor", "gpu", "threads"} <= result["environment"].keys()
    assert (result["benchmark"], result["seed"], result["copies"], result["operator_error"]) == ("encode", 0, 3, 1e-7)


def test_rows_are_kept_table_by_table(tmp_path):
    result = Record("encode", tmp_path / "deep" / "a.json", 0.0, 0, "cpu")
    result.add(row("ours", 1.0))
    result.add(row("expanded", 9.0))
    assert [each["form"] for each in read(tmp_path / "deep" / "a.json")["rows"]] == ["ours", "expanded"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": 3}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SystemExit, match=r"a\.json: no result of a benchmark"):
        read(tmp_path / "a.json")


def test_rows_are_matched_and_marked(record, capsys):
    before = record("a.json", row("ours", 1.0, forward_peak_bytes=100), row("expanded", 50.0), row("gone", 1.0))
    after = record("b.json", row("expanded", 52.0), row("ours", 2.0, forward_peak_bytes=50), row("new", 1.0))
    found = {(change.row, change.measure): change for change in compare.changes(read(before), read(after))}
    ours = found["ours, shape [2, 9, 4, 3]", "forward_ms"]
    assert (ours.ratio, ours.mark) == (2.0, "slower")
    assert found["ours, shape [2, 9, 4, 3]", "forward_peak_bytes"].ratio == 0.5
    assert found["expanded, shape [2, 9, 4, 3]", "forward_ms"].mark == ""
    assert len(found) == 3
    compare.main([str(before), str(after)])
    printed = capsys.readouterr().out
    assert "2.000" in printed
    assert "1.442  geometric mean of 2" in printed  # of 2 and 1.04
    assert "2 rows are in one of the two alone" in printed


def test_faster_is_said_too(record):
    found = compare.changes(read(record("a.json", row("ours", 2.0))), read(record("b.json", row("ours", 1.0))))
    assert [change.mark for change in found] == ["faster"]


def test_what_differs_between_the_machines_is_named(record, capsys):
    before, after = record("a.json", row("ours", 1.0)), record("b.json", row("ours", 1.0))
    result = read(after)
    result["environment"]["versions"]["torch"] = "9.9"
    result["environment"]["threads"] = 64
    after.write_text(json.dumps(result))
    compare.main([str(before), str(after)])
    printed = capsys.readouterr().out
    assert "| 9.9" in printed
    assert "| 64" in printed


def test_results_of_two_benchmarks_are_not_compared(record):
    before, after = record("a.json", row("ours", 1.0)), record("b.json", row("ours", 1.0), benchmark="swap")
    with pytest.raises(SystemExit, match='must be of one benchmark, got "encode" and "swap"'):
        compare.main([str(before), str(after)])


def test_nothing_in_common(record):
    with pytest.raises(SystemExit, match="no row in common"):
        compare.main([str(record("a.json", row("ours", 1.0))), str(record("b.json", row("other", 1.0)))])
