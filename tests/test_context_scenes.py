"""The experiment's benchmark: what it trains, and the table that the README shows."""

import json

from benchmarks import context_scenes
from benchmarks.context_scenes import markdown, table, train, variants
from ctxenc.training.segmentation.segment_settings import SegmentSettings


def row(name, seed, score):
    return {
        "name": name,
        "seed": seed,
        "mean_iou": score,
        "ambiguous": score / 2,
        "others": score,
        "pixel_accuracy": 0.9,
    }


def test_the_full_form_covers_arms_codewords_and_weights():
    assert list(variants(False)) == ["fcn", "fcn_se", "encnet_no_se_loss", "encnet"]
    base = SegmentSettings.resolve({})
    full = [base.__class__(**(base.as_dict() | own)) for _, own in variants(True).values()]
    assert {settings.num_codes for settings in full} == {8, 16, 32}
    assert {settings.se_weight for settings in full} == {0.1, 0.2, 0.4}
    assert all(arm == "encnet" for arm, own in variants(True).values() if own)


def test_the_table_has_means_and_deviations_over_seeds():
    rows = [row("fcn", 0, 0.5), row("fcn", 1, 0.7), row("encnet, K = 8", 0, 0.8)]
    lines = table(rows).splitlines()
    assert lines[2].split("  ")[0] == "FCN"
    assert "60.0 ± 14.1 %" in lines[2]
    assert "30.0 ± 7.1 %" in lines[2]
    assert lines[3].startswith("EncNet, K = 8")
    assert "80.0 %" in lines[3]
    cells = [line.count("|") for line in markdown({"rows": rows}).splitlines()]
    assert cells == [7] * 4


def test_a_network_is_trained_and_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("ctxenc.training.segmentation.datasets.TRAIN_SCENES", 32)
    monkeypatch.setattr("ctxenc.training.segmentation.datasets.TEST_SCENES", 8)
    settings = SegmentSettings.resolve({"epochs": 1, "device": "cpu"})
    measured = train("encnet", "encnet", settings, 0, tmp_path)
    assert 0 < measured["others"] < 1
    assert 0 <= measured["ambiguous"] < 1
    assert measured["epoch"] == 1


def test_one_network_alone_is_trained_and_has_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("ctxenc.training.segmentation.datasets.TRAIN_SCENES", 32)
    monkeypatch.setattr("ctxenc.training.segmentation.datasets.TEST_SCENES", 8)
    monkeypatch.setattr(context_scenes, "control", lambda full: {})
    out = tmp_path / "scenes.json"
    chosen = ["--only", "encnet, spread", "--epochs", "1", "--runs", str(tmp_path / "runs"), "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["context_scenes", *chosen])
    context_scenes.main()
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == ["encnet, spread"]
    assert not out.with_suffix(".png").exists()
