"""What the command line of segment means: defaults by data set, rules, and what may change on --resume."""

import argparse
import json
from dataclasses import fields

import pytest

from ctxenc.commands.segment import add_train_arguments
from ctxenc.runs.errors import UserError
from ctxenc.training.segmentation.segment_settings import OWN_DEFAULTS, SegmentSettings
from ctxenc.training.settings import option_name


def parser():
    made = argparse.ArgumentParser(prog="segment")
    add_train_arguments(made)
    return made


def parse(*arguments):
    return SegmentSettings.read(parser().parse_args(arguments))


def test_nothing_given_means_the_scenes():
    settings = SegmentSettings.resolve(parse())
    assert settings == SegmentSettings(**OWN_DEFAULTS["scenes"])
    assert settings.data == "scenes"


def test_other_data_means_the_recipe_of_the_paper():
    settings = SegmentSettings.resolve(parse("--data", "voc"))
    assert settings == SegmentSettings(data="voc")
    recipe = {
        **{"opt": "momentum", "momentum": 0.9, "lr": 0.001, "head_lr_mult": 10, "weight_decay": 1e-4, "sched": "poly"},
        **{"poly_power": 0.9, "batch_size": 16, "epochs": 50, "warmup_epochs": 0, "clip_grad": None},
        **{"base_size": 520, "crop_size": 480, "scale_min": 0.5, "scale_max": 2, "rotate": 10, "flip": 0.5},
        **{"backbone": "resnet50", "num_codes": 32, "output_stride": 8, "channels": 512, "smoothing": "learned"},
        **{"aux": True, "aux_weight": 0.2, "se_loss": True, "se_weight": 0.2, "lateral": False},
    }
    assert {name: getattr(settings, name) for name in recipe} == recipe


def test_some_data_have_defaults_of_their_own():
    ade, city = (SegmentSettings.resolve(parse("--data", data)) for data in ("ade20k", "cityscapes"))
    assert (ade.lr, ade.epochs, ade.base_size, ade.crop_size) == (0.01, 120, 520, 480)
    assert (city.lr, city.epochs, city.base_size, city.crop_size) == (0.001, 50, 2048, 720)
    assert SegmentSettings.resolve(parse("--data", "ade20k", "--lr", "0.5")).lr == 0.5


def test_every_setting_has_an_option():
    values = {
        **{str: "name", float: "0.7", int: "3", bool: None},
        **{"opt": "adamw", "sched": "tanh", "amp": "bf16", "output_stride": "16", "smoothing": "0.5"},
        **{
            "aux": "no",
            "se_loss": "no",
            "arms": "all",
            "keep": "5",
            "aggregation": "sum",
            "codebook_start": "spread",
            "on_bad_image": "skip",
        },
    }
    usual = SegmentSettings().as_dict()
    kinds = {"stages": int, "clip_grad": float, "checkpoint_every": int, "threads": int, "amp": str, "sync_bn": bool}
    for field in fields(SegmentSettings):
        kind = kinds.get(field.name, type(usual[field.name]))
        value = values.get(field.name, values[kind])
        name = option_name(field.name)
        given = (
            parse(name.replace("--", "--no-")) if value == "no" else parse(name, *([] if value is None else [value]))
        )
        assert list(given) == [field.name]
        assert given[field.name] != usual[field.name]
        assert isinstance(given[field.name], float if field.name == "smoothing" else kind)


def test_help_tells_every_default():
    text = " ".join(parser().format_help().split())
    assert "(default: 0.001; 0.003 for scenes; 0.01 for ade20k)" in text
    assert "(default: 480; 96 for scenes; 720 for cityscapes)" in text


def test_settings_are_json():
    settings = SegmentSettings.resolve(parse("--smoothing", "0.5"))
    assert SegmentSettings(**json.loads(json.dumps(settings.as_dict()))) == settings


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("val_fraction", 0.0, "greater than 0"),
        ("val_fraction", 1.0, "less than 1"),
        ("workers", -1, "greater than or equal to 0"),
        ("workers", 257, "less than or equal to 256"),
        ("aux_weight", -0.1, "greater than or equal to 0"),
        ("se_weight", float("nan"), "a finite number"),
        ("momentum", 1.0, "less than 1"),
        ("momentum", -0.1, "greater than or equal to 0"),
        ("lr", 0.0, "greater than 0"),
        ("lr", float("inf"), "a finite number"),
        ("head_lr_mult", 0.0, "greater than 0"),
        ("weight_decay", -1.0, "greater than or equal to 0"),
        ("poly_power", 0.0, "greater than 0"),
        ("warmup_epochs", -1, "greater than or equal to 0"),
        ("warmup_epochs", 51, "at most --epochs 50"),
        ("clip_grad", 0.0, "greater than 0"),
        ("scale_min", 0.0, "greater than 0"),
        ("scale_max", float("nan"), "a finite number"),
        ("scale_max", 17.0, "less than or equal to 16"),
        ("scale_min", 2.5, "at most --scale-max 2.0"),
        ("rotate", -1.0, "greater than or equal to 0"),
        ("rotate", 181.0, "less than or equal to 180"),
        ("flip", 1.5, "less than or equal to 1"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**32, "at most 4294967295 with --seeds 1"),
    ],
)
def test_a_value_that_breaks_its_rule_is_named(name, value, rule):
    with pytest.raises(UserError) as error:
        SegmentSettings.resolve({"data": "folder", name: value})
    assert str(error.value) == f"{option_name(name)} must be {rule}, got {value}"


@pytest.mark.parametrize(("name", "value"), [("val_fraction", 0.99), ("momentum", 0.0), ("rotate", 0), ("flip", 1.0)])
def test_a_value_at_the_edge_of_its_rule_holds(name, value):
    assert getattr(SegmentSettings.resolve({"data": "folder", name: value}), name) == value


def test_an_unknown_optimiser_has_near_names():
    with pytest.raises(UserError, match=r"unknown --opt 'sgdd'; near names: .*sgd"):
        SegmentSettings(opt="sgdd")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--smoothing", "-1"),
        ("--output-stride", "4"),
        ("--crop-size", "0"),
        ("--base-size", "-5"),
        ("--num-codes", "0"),
        ("--sched", "cubic"),
        ("--amp", "fp8"),
    ],
)
def test_what_cannot_be_read_ends_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


class TestResumed:
    STORED = SegmentSettings(data="folder", lr=0.5).as_dict()

    def test_place_and_speed_may_change(self):
        settings = SegmentSettings.resume(self.STORED, {"data": "moved", "workers": 4, "device": "cpu", "threads": 2})
        assert settings == SegmentSettings(data="moved", lr=0.5, workers=4, device="cpu", threads=2)

    def test_nothing_else_may(self):
        with pytest.raises(UserError, match=r"--crop-size was 480 in this run, got 64"):
            SegmentSettings.resume(self.STORED, {"crop_size": 64})

    def test_settings_of_another_version(self):
        with pytest.raises(UserError, match="settings hold 'warp', which this version does not know"):
            SegmentSettings.resume(self.STORED | {"warp": 9}, {})
