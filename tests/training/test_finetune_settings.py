"""What the command line means: defaults, rules, and what may change on --resume."""

import argparse
import json
from dataclasses import fields

import pytest
import timm

import ctxenc
from ctxenc.commands.finetune import add_arguments
from ctxenc.runs.errors import UserError
from ctxenc.training import settings as options
from ctxenc.training.settings import EMBEDDED, Settings


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return options.given(parser.parse_args(arguments))


def test_nothing_given_means_the_photographs_with_both_arms():
    settings = options.resolve(parse())
    assert settings.data == "photographs"
    assert settings.arm_names == ("se", "context")
    assert len(settings.seed_list) >= 2
    assert all(getattr(settings, name) == value for name, value in EMBEDDED.items())


def test_other_data_means_the_swapped_network_alone():
    settings = options.resolve(parse("--data", "folder"))
    assert settings == Settings(data="folder")
    assert settings.arm_names == ("context",)


def test_another_model_drops_the_arguments_of_the_embedded_one():
    settings = options.resolve(parse("--model", "seresnet50", "--no-channels-last"))
    assert (settings.model, settings.model_kwargs, settings.image_size) == ("seresnet50", {}, 64)
    assert settings.channels_last is False


def test_the_swap_is_that_of_the_command_line():
    chosen = ("--aggregation", "sum", "--max-size", "7", "--codebook-start", "spread", "--pool", "concat")
    swap = options.resolve(parse("--data", "folder", *chosen)).swap
    assert swap | {"aggregation": "sum", "max_size": 7, "start": "spread", "pool": "concat"} == swap
    ctxenc.patch_se_blocks(model := timm.create_model("test_efficientnet"), **swap)
    block = ctxenc.find_context_blocks(model)[0]
    assert (block.aggregation, block.max_size, block.start, block.pool) == ("sum", 7, "spread", "concat")


def test_a_run_of_before_there_was_a_choice_goes_on_with_the_sum():
    stored = Settings(data="x").as_dict()
    for name in ("aggregation", "max_size", "codebook_start"):
        del stored[name]
    assert options.resumed(stored, {}).swap["aggregation"] == "sum"
    assert options.resumed(stored, {"aggregation": "sum"}).swap["aggregation"] == "sum"
    assert options.resumed(Settings(data="x").as_dict(), {}).swap["aggregation"] == "mean"
    with pytest.raises(UserError, match="--aggregation was sum in this run, got mean"):
        options.resumed(stored, {"aggregation": "mean"})


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
        kind = next(each for each in (dict, bool, float, str, int) if each.__name__ in str(field.type))
        value = values.get(field.name, values[kind])
        given = parse(options.option_name(field.name), *([] if value is None else [value]))
        assert list(given) == [field.name]
        assert given[field.name] != usual[field.name]


def test_settings_are_json():
    settings = options.resolve(parse("--smoothing", "0.5"))
    assert Settings(**json.loads(json.dumps(settings.as_dict()))) == settings


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("lr", 0.0, "a positive number"),
        ("lr", float("nan"), "a positive number"),
        ("val_fraction", 1.0, "below 1"),
        ("crop_scale", 0.0, "above 0"),
        ("crop_padding", -1, "in [0, 512]"),
        ("label_smoothing", 1.5, "in [0, 1]"),
        ("mixup", -1.0, "at least 0"),
        ("workers", -1, "in [0, 256]"),
        ("workers", 10000, "in [0, 256]"),
        ("on_bad_image", "ignore", "one of fail, skip"),
        ("clip_grad", 0.0, "a positive number"),
        ("clip_grad", float("inf"), "a positive number"),
        ("model_kwargs", {"num_classes": 5}, "without num_classes"),
        ("seed", -1, "at least 0"),
        ("seed", 2**32, "at most 4294967295 with --seeds 1"),
        ("warmup_epochs", 31, "at most --epochs 30"),
        ("weight_decay", float("inf"), "at least 0"),
    ],
)
def test_a_value_that_breaks_its_rule_is_named(name, value, rule):
    with pytest.raises(UserError) as error:
        options.resolve({"data": "folder", name: value})
    text = str(error.value)
    assert text.startswith(options.option_name(name) + " ")
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
        assert options.resumed(self.STORED, {}) == Settings(data="folder", lr=0.5)
        assert options.resumed(self.STORED, {"lr": 0.5}).lr == 0.5

    def test_place_and_speed_may_change(self):
        settings = options.resumed(self.STORED, {"data": "moved", "workers": 4, "device": "cpu", "threads": 2})
        assert settings == Settings(data="moved", lr=0.5, workers=4, device="cpu", threads=2)

    def test_nothing_else_may(self):
        with pytest.raises(UserError, match=r"--lr was 0\.5 in this run, got 0\.1"):
            options.resumed(self.STORED, {"lr": 0.1})

    def test_settings_of_another_version(self):
        with pytest.raises(UserError, match=r"not those of this version: .*'warp'"):
            options.resumed(self.STORED | {"warp": 9}, {})
