"""The benchmark of the operator runs, and reports no speed of a wrong result. What it measures on a GPU is tested nowhere."""

import json

import pytest
import torch

import ctxenc
from benchmarks.encode import main

QUICK = ["--quick", "--device", "cpu", "--dtype", "bf16", "fp32"]


@pytest.fixture(autouse=True)
def one_thread():
    """Two on a busy machine wait for each other, at 20 ms a call."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows_of(path):
    return json.loads(path.read_text())["rows"]


def test_a_quick_run(tmp_path):
    out = tmp_path / "new" / "encode.json"
    main([*QUICK, "--seed", "3", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["seed"] == 3
    assert result["environment"]["versions"]["torch"]
    rows = result["rows"]
    assert {row["form"] for row in rows} == {"ctxenc, torch", "shifted matmul", "expanded"}
    assert {(row["dtype"], row["layout"]) for row in rows} == {
        (dtype, layout) for dtype in ("bfloat16", "float32") for layout in ("channels_first", "channels_last")
    }
    for row in rows:
        assert row["error"] < (1e-5 if row["dtype"] == "float32" else 0.01)
        for direction in ("forward", "forward_backward"):
            times = row[f"{direction}_ms"]
            assert 0 < times["p20"] <= times["median"] <= times["p80"]
            assert row[f"{direction}_ratio"] == 1 or row["form"] != "ctxenc, torch"


def test_no_speed_of_a_wrong_result(tmp_path, monkeypatch):
    encode = ctxenc.encode
    monkeypatch.setattr(ctxenc, "encode", lambda x, *others, **options: encode(x[:, :, :-1], *others, **options))
    out = tmp_path / "encode.json"
    with pytest.raises(SystemExit, match="no speed is reported for a wrong result"):
        main([*QUICK, "--out", str(out)])
    for row in rows_of(out):
        assert ("refused" in row) == (row["form"] == "ctxenc, torch")
        assert ("forward_ms" in row) == ("refused" not in row)


def test_it_stops_when_its_time_is_over(tmp_path, capsys):
    out = tmp_path / "encode.json"
    main([*QUICK, "--seconds", "0", "--out", str(out)])
    assert len({(tuple(row["shape"]), row["layout"], row["dtype"]) for row in rows_of(out)}) == 1
    assert "1 of 8 tables" in capsys.readouterr().out
