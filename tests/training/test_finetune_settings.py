"""What the command line means: defaults, rules, and what may change on --resume."""

import argparse
import json
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import timm

import ctxenc
from ctxenc import context, encoding, functional
from ctxenc.commands import look
from ctxenc.commands.finetune import add_arguments
from ctxenc.runs import config
from ctxenc.runs.errors import UserError
from ctxenc.swap import calibration
from ctxenc.training import bad_images
from ctxenc.training.settings import EMBEDDED, Settings, option_name
from ctxenc.viz import observing


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return Settings.read(parser.parse_args(arguments))


def test_nothing_given_means_the_photographs_with_both_arms():
    settings = Settings.resolve(parse())
    assert settings.data == "photographs"
    assert settings.arm_names == ("se", "context")
    assert len(settings.seed_list) >= 2
    assert all(getattr(settings, name) == value for name, value in EMBEDDED.items())


def test_other_data_means_the_swapped_network_alone():
    settings = Settings.resolve(parse("--data", "folder"))
    assert settings == Settings(data="folder")
    assert settings.arm_names == ("context",)


def test_another_model_drops_the_arguments_of_the_embedded_one():
    settings = Settings.resolve(parse("--model", "seresnet50", "--no-channels-last"))
    assert (settings.model, settings.model_kwargs, settings.image_size) == ("seresnet50", {}, 64)
    assert settings.channels_last is False


def test_the_swap_is_that_of_the_command_line():
    chosen = ("--aggregation", "sum", "--max-size", "7", "--codebook-start", "spread", "--pool", "concat")
    swap = Settings.resolve(parse("--data", "folder", *chosen)).swap
    assert swap | {"aggregation": "sum", "max_size": 7, "start": "spread", "pool": "concat"} == swap
    ctxenc.patch_se_blocks(model := timm.create_model("test_efficientnet"), **swap)
    block = ctxenc.find_context_blocks(model)[0]
    assert (block.aggregation, block.max_size, block.start, block.pool) == ("sum", 7, "spread", "concat")


def test_a_run_of_before_there_was_a_choice_goes_on_with_the_sum():
    stored = Settings(data="x").as_dict()
    for name in ("aggregation", "max_size", "codebook_start"):
        del stored[name]
    assert Settings.resume(stored, {}).swap["aggregation"] == "sum"
    assert Settings.resume(stored, {"aggregation": "sum"}).swap["aggregation"] == "sum"
    assert Settings.resume(Settings(data="x").as_dict(), {}).swap["aggregation"] == "mean"
    with pytest.raises(UserError, match="--aggregation was sum in this run, got mean"):
        Settings.resume(stored, {"aggregation": "mean"})


# The types of settings that are None unless named.
KINDS = dict.fromkeys(("image_size", "crop_padding", "max_size", "checkpoint_every", "threads"), int)
KINDS |= dict.fromkeys(("clip_grad", "rd_ratio"), float)
KINDS |= dict.fromkeys(("initial_checkpoint", "auto_augment", "amp", "init"), str) | {
    "sync_bn": bool,
    "smoothing": float,
}


def test_every_setting_has_an_option():
    values = {
        **{str: "cifar10", float: "0.5", int: "3", dict: '{"drop_rate": 0.1}', bool: None},
        **{
            "keep": "5",
            "arms": "se",
            "pool": "concat",
            "opt": "sgd",
            "sched": "tanh",
            "amp": "bf16",
            "init": "neutral",
            "aggregation": "sum",
            "codebook_start": "spread",
            "on_bad_image": "skip",
        },
    }
    usual = Settings().as_dict()
    for field in fields(Settings):
        value = values.get(field.name, values[KINDS.get(field.name, type(usual[field.name]))])
        given = parse(option_name(field.name), *([] if value is None else [value]))
        assert list(given) == [field.name]
        assert given[field.name] != usual[field.name]


def test_the_choices_are_those_of_the_library():
    """Settings name them again, since --help shall not import torch."""
    hints = get_type_hints(Settings)
    assert set(get_args(config.Pool)) == set(context.POOLS)
    assert set(get_args(config.Aggregation)) == set(functional.AGGREGATIONS)
    assert set(get_args(config.CodebookStart)) == set(encoding.STARTS)
    assert set(get_args(get_args(hints["init"])[0])) == set(calibration.STARTS)
    assert set(get_args(hints["on_bad_image"])) == set(bad_images.CHOICES)
    assert look.IMAGE_SIZE == observing.IMAGE_SIZE


def test_settings_are_json():
    settings = Settings.resolve(parse("--smoothing", "0.5"))
    assert Settings(**json.loads(json.dumps(settings.as_dict()))) == settings


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("lr", 0.0, "greater than 0"),
        ("lr", float("nan"), "a finite number"),
        ("val_fraction", 1.0, "less than 1"),
        ("crop_scale", 0.0, "greater than 0"),
        ("crop_padding", -1, "greater than or equal to 0"),
        ("label_smoothing", 1.5, "less than or equal to 1"),
        ("mixup", -1.0, "greater than or equal to 0"),
        ("workers", -1, "greater than or equal to 0"),
        ("workers", 10000, "less than or equal to 256"),
        ("on_bad_image", "ignore", "'fail' or 'skip'"),
        ("clip_grad", 0.0, "greater than 0"),
        ("clip_grad", float("inf"), "a finite number"),
        ("model_kwargs", {"num_classes": 5}, "without num_classes"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**32, "at most 4294967295 with --seeds 1"),
        ("warmup_epochs", 31, "at most --epochs 30"),
        ("weight_decay", float("inf"), "a finite number"),
    ],
)
def test_a_value_that_breaks_its_rule_is_named(name, value, rule):
    with pytest.raises(UserError) as error:
        Settings.resolve({"data": "folder", name: value})
    text = str(error.value)
    assert text.startswith(option_name(name) + " ")
    assert rule in text
    assert str(value) in text


def test_an_unknown_optimiser_has_near_names():
    with pytest.raises(UserError, match=r"unknown --opt 'adamwx'; near names: .*adamw"):
        Settings(opt="adamwx")
    with pytest.raises(UserError, match=r"unknown --opt '§§'; \d+ others are known$"):
        Settings(opt="§§")


@pytest.mark.parametrize("name", ["lbfgs", "LBFGS", "sparseadam"])
def test_an_optimiser_that_timm_lacks_is_told_apart(name):
    with pytest.raises(
        UserError, match=f"--opt must be an optimiser of timm, got '{name}', which only torch.optim has"
    ):
        Settings(opt=name)


def test_the_last_seed_counts():
    assert Settings(seed=2**32 - 3, seeds=3).seed_list[-1] == 2**32 - 1
    with pytest.raises(UserError, match="--seed must be at most 4294967293 with --seeds 3, got 4294967294"):
        Settings(seed=2**32 - 2, seeds=3)


def test_mixup_needs_pairs():
    with pytest.raises(UserError, match="--batch-size must be even with --mixup or --cutmix, got 3"):
        Settings(batch_size=3, cutmix=1.0)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--smoothing", "-1"),
        ("--model-kwargs", "[1]"),
        ("--model-kwargs", "{"),
        ("--model-kwargs", '{"drop_rate": 1e999}'),
        ("--epochs", "0"),
        ("--arms", "eca"),
    ],
)
def test_what_cannot_be_read_ends_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


class TestResumed:
    STORED = Settings(data="folder", lr=0.5).as_dict()

    def test_keeps_what_was_stored(self):
        assert Settings.resume(self.STORED, {}) == Settings(data="folder", lr=0.5)
        assert Settings.resume(self.STORED, {"lr": 0.5}).lr == 0.5

    def test_place_and_speed_may_change(self):
        settings = Settings.resume(self.STORED, {"data": "moved", "workers": 4, "device": "cpu", "threads": 2})
        assert settings == Settings(data="moved", lr=0.5, workers=4, device="cpu", threads=2)

    def test_nothing_else_may(self):
        with pytest.raises(UserError, match=r"--lr was 0\.5 in this run, got 0\.1"):
            Settings.resume(self.STORED, {"lr": 0.1})

    def test_settings_of_another_version(self):
        with pytest.raises(UserError, match="settings hold 'warp', which this version does not know"):
            Settings.resume(self.STORED | {"warp": 9}, {})
