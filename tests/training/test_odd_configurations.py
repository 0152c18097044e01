"""Configurations that hold code, are no JSON, are of any type, or of another version: nothing runs, and what is wrong is named."""

import json
import shutil
from contextlib import suppress
from typing import get_args, get_type_hints

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ctxenc
from ctxenc.__main__ import main
from ctxenc.integrations import EncNet, load_encnet_checkpoint
from ctxenc.integrations.checkpoints import METADATA, save_encnet_checkpoint
from ctxenc.runs import folders
from ctxenc.runs.config import DataConfig, RunConfig
from ctxenc.runs.errors import UserError
from ctxenc.training import checkpoint, data, durable
from ctxenc.training.segmentation.segment_settings import SegmentSettings
from ctxenc.training.settings import Settings
from tests.training.attacks import Watch, forge, saved

CODE = "__import__('os').system('touch taken')"
NAMES = [
    CODE,
    "os.system",
    "hf-hub:timm/resnet18",
    "hf_hub:timm/resnet18.a1_in1k",
    "hf-hub:evil/model",
    "local-dir:.",
    "local-dir:/",
]
NAMES += [
    "file:///etc/passwd",
    "http://localhost/model",
    "https://localhost/model.pth",
    "../../resnet18",
    "timm.models.resnet18",
    "\0",
]
ARGUMENTS = [
    {"checkpoint_path": "evil.pth"},
    {"cache_dir": "/"},
    {"pretrained": True},
    {"pretrained_cfg": {"url": "http://localhost/model.pth"}},
    {"pretrained_cfg_overlay": {"file": "evil.pth", "custom_load": True}},
    {"pretrained_strict": False},
    *(
        {key: CODE}
        for key in ("act_layer", "norm_layer", "global_pool", "se_layer", "pad_type", "round_chs_fn", "block_args")
    ),
    *({key: "os.system"} for key in ("norm_layer", "se_layer", "attn_layer", "cls", "model_cfg", "feature_cfg")),
    *({"features_only": True, "feature_cls": name} for name in (CODE, "os.system")),
    *({key: CODE} for key in ("device", "dtype", "drop_rate", "block_fn", "stem_size")),
    {"block_args": {"attn_layer": "os.system"}},
    {"block_args": {"attn_layer": CODE}},
    {"model_name": "resnet18"},
]


class TestConfigurations:
    @pytest.fixture
    def run(self, run_folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # where the code would leave its marker
        return shutil.copytree(run_folder / "context-0", tmp_path / "run")

    def change(self, run, **fields):
        table = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(table | fields))

    @pytest.mark.parametrize("name", NAMES)
    def test_names_of_models(self, run, tmp_path, marker, picture, capsys, name):
        self.change(run, model=name)
        path = tmp_path / "a.safetensors"
        network = EncNet("test_resnet", 3, channels=8, num_codes=2)
        save_encnet_checkpoint(network, path)
        save_file(load_file(path), path, {METADATA: json.dumps(network.config | {"backbone": name})})
        with Watch(marker):
            with pytest.raises(UserError, match="unknown model"):
                ctxenc.load(run)
            with pytest.raises(ValueError, match="backbone must be the name of a timm model"):
                load_encnet_checkpoint(path)
            assert main(["predict", str(run), str(picture)]) == 2
            for command in (["finetune", "--model", name], ["segment", "train", "--backbone", name]):
                assert main(command) == 2
        assert "Traceback" not in capsys.readouterr().err

    @pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
    @pytest.mark.parametrize("model", ["test_efficientnet", "seresnet18", "vit_tiny_patch16_224"])
    def test_arguments_of_models(self, config, marker, tmp_path, monkeypatch, model, arguments):
        """Refused, or of no effect: JSON holds no code, and timm looks names up in tables of its own."""
        monkeypatch.chdir(tmp_path)
        with Watch(marker), suppress(UserError, ValueError):
            folders.build_model(RunConfig(**vars(config) | {"model": model, "model_kwargs": arguments, "swap": None}))
        if {"pretrained", "cache"} & {each.partition("_")[0] for each in arguments} or "checkpoint_path" in arguments:
            with pytest.raises(ValueError, match="must be keyword arguments"):
                RunConfig(**vars(config) | {"model_kwargs": arguments})

    @pytest.mark.parametrize(
        ("key", "value"), [("interpolation", CODE), ("interpolation", "cubic"), ("crop_mode", CODE)]
    )
    def test_transforms(self, run, marker, picture, config, capsys, key, value):
        self.change(run, data_config=config.data_config | {key: value})
        with Watch(marker):
            assert main(["predict", str(run), str(picture)]) == 2
        assert f"config.json: data_config.{key} must be" in capsys.readouterr().err

    def test_every_interpolation_that_is_allowed_is_timms(self, config):
        hints = get_type_hints(DataConfig)
        for key in ("interpolation", "crop_mode"):
            for value in get_args(hints[key]):
                transform = data.eval_transform(config.data_config | {key: value})
                assert transform(Image.new("RGB", (50, 40))).shape == (3, 32, 32)

    @pytest.mark.parametrize(
        "text",
        [
            "!!python/object/apply:os.system ['touch taken']",
            "format: 1\nmodel: !!python/object/apply:os.system ['touch taken']\n",
            '{"format": !!python/name:os.system , "model": 1}',
            CODE,
            '{"format": 1, "format": 1}',
            '{"format": 1, "settings": {"lr": 1, "lr": 2}}',
            '{"format": NaN}',
            '{"settings": {"lr": -Infinity}}',
            '{"settings": {"lr": 1e999}}',
            '{"format": ' + "1" * 10_000 + "}",
            '{"a":' * 100_000,
            "[" * 100_000 + "]" * 100_000,
        ],
        ids=lambda text: text[:30],
    )
    def test_what_is_no_json_or_odd(self, run, marker, picture, capsys, text):
        (run / "config.json").write_text(text)
        commands = (["predict", run, picture], ["evaluate", run], ["look", run, picture], ["finetune", "--resume", run])
        commands += (["segment", "predict", run, picture], ["segment", "train", "--resume", run])
        for command in commands:
            with Watch(marker):
                assert main([str(each) for each in command]) == 2
            message = capsys.readouterr().err
            assert f"{run / 'config.json'} is not valid JSON: " in message
            assert len(message) < 600

    def test_no_yaml_is_read(self, run, picture, marker, capsys):
        (run / "config.json").rename(run / "config.yaml")
        with Watch(marker):
            assert main(["predict", str(run), str(picture)]) == 2
        assert "is no run folder" in capsys.readouterr().err

    def test_json_on_the_command_line(self, capsys):
        for text in ("[" * 50_000, '{"a":' * 20_000, '{"a": 1, "a": 2}', '{"a": NaN}', CODE):
            assert main(["finetune", "--model-kwargs", text]) == 2
            assert "error: --model-kwargs must be a JSON object: " in capsys.readouterr().err

    def test_deep_nesting_in_a_checkpoint(self, tmp_path):
        path = tmp_path / "a.safetensors"
        save_file({"weight": torch.zeros(2)}, path, {METADATA: "[" * 100_000})
        with pytest.raises(ValueError, match="no valid safetensors file"):
            load_encnet_checkpoint(path)
        (tmp_path / durable.MANIFEST).write_text("[" * 100_000)
        assert durable.damage(tmp_path) == "manifest.json is no JSON"


ODD = (None, True, 0, -1, 10**400, 0.5, 1e308, 1e-320, "x", CODE, "", "\ud800", "\0", [], [1], {}, {"a": 1})


@pytest.mark.parametrize("options", [Settings, SegmentSettings], ids=["finetune", "segment train"])
def test_settings_of_any_type(options):
    """Each is as argparse would have made it, or is named."""
    stored = options.resolve({"data": "folder"}).as_dict()
    for name, usual in stored.items():
        for value in ODD:
            try:
                made = getattr(options.resume(stored | {name: value}, {}), name)
            except UserError as error:
                told = str(error)
                assert "--" in told and len(told) < 300 and "\n" not in told, (name, told)  # noqa: PT018
                continue
            assert made == value
            if usual is not None and name != "smoothing":  # a text or a number
                assert isinstance(made, type(usual)) or (type(usual) is float and type(made) is int), (name, value)
                assert isinstance(made, bool) == isinstance(usual, bool), (name, value)


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("threads", "1000000", "less than or equal to 1024"),
        ("image-size", "100000", "less than or equal to 8192"),
        ("seeds", str(2**70), f"less than or equal to {2**63 - 1}"),
        *(
            (name, "1e308", "less than or equal to 1000000000")
            for name in ("lr", "weight-decay", "color-jitter", "rd-ratio", "mixup")
        ),
        ("smoothing", "1e308", "'learned' or 'sampled' or be less than or equal to 1000000000"),
        *((name, "-1e308", "greater than 0") for name in ("lr", "rd-ratio")),
        ("lr", "inf", "a finite number"),
    ],
)
def test_numbers_beyond_fp32_or_the_machine(refused, option, value, rule):
    assert refused(f"--{option}={value}").startswith(f"ctxenc: error: --{option} must be {rule}, got ")


@pytest.mark.parametrize("option", ["lr", "weight-decay", "head-lr-mult", "poly-power", "aux-weight", "se-weight"])
def test_numbers_of_segmentation(option, capsys):
    assert main(["segment", "train", f"--{option}", "1e308"]) == 2
    assert (
        capsys.readouterr().err == f"ctxenc: error: --{option} must be less than or equal to 1000000000, got '1e308'\n"
    )
    assert main(["segment", "train", "--data", "folder", "--base-size", "1000000"]) == 2
    assert capsys.readouterr().err == "ctxenc: error: --base-size must be less than or equal to 8192, got '1000000'\n"


class TestVersions:
    def test_a_run_from_before_a_setting_goes_on(self, done, tmp_path):
        run = shutil.copytree(done, tmp_path / "run")
        table = json.loads((run / "config.json").read_text())
        del table["settings"]["on_bad_image"]
        (run / "config.json").write_text(json.dumps(table))
        assert main(["finetune", "--resume", str(run)]) == 0

    @pytest.mark.parametrize("changed", [{"format": 2}, {"format": True}, {"format": "1"}, {"format": None}])
    def test_a_configuration_of_another_format(self, run_folder, tmp_path, changed, capsys):
        run = shutil.copytree(run_folder / "context-0", tmp_path / "run")
        table = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(table | changed))
        for command in (["predict", str(run), str(run)], ["finetune", "--resume", str(run)], ["look", str(run)]):
            assert main(command) == 2
            assert "format must be" in capsys.readouterr().err or command[0] == "predict"

    def test_a_checkpoint_with_more_than_this_version_knows(self, done, tmp_path, capsys):
        run = shutil.copytree(done, tmp_path / "run")
        newest = run / "context-0" / "checkpoints" / "epoch-00002-step-0000000"
        progress = json.loads((newest / "progress.json").read_bytes())
        older = progress | {"predictions": [row[:3] for row in progress["predictions"]]}
        odd = ({"novelty": 1}, {"step": 10**9}, {"step": 1e9}, {"rows": [1]}, {"timings": []})
        for changed in ({}, [1], {"predictions": 3}, older, *(progress | each for each in odd)):
            forge(newest, {"progress.json": json.dumps(changed).encode()})
            assert main(["finetune", "--resume", str(run)]) == 2
            assert f"cannot resume from {newest}: " in capsys.readouterr().err
        endless = saved(torch.ones(1).expand(10**6, 10**6))
        for name in ("processes.pt", "optimizer.pt"):  # the latter is read first
            forge(newest, {"progress.json": json.dumps(progress).encode(), name: endless})
            assert main(["finetune", "--resume", str(run)]) == 2
            assert f"{name} claims 4,000,000,000,000 bytes where it holds 4" in capsys.readouterr().err


def test_progress_that_no_training_makes(done):
    """Any of these would hang, train nothing, or end in a traceback later."""
    newest = done / "context-0" / "checkpoints" / "epoch-00002-step-0000000"
    progress = json.loads((newest / "progress.json").read_bytes())
    classes = len(json.loads((done / "config.json").read_text())["classes"])
    limits = ("balanced_accuracy", 2, 3, checkpoint.PREDICTIONS, 10, classes)
    checkpoint.check_progress(checkpoint.Progress(**progress), *limits)
    checkpoint.check_progress(checkpoint.Progress(), *limits)
    row, first = progress["rows"][0], progress["predictions"][0]
    impossible = [
        *({"step": value} for value in (10**9, 1e9, -1, 4, True, "1", None)),
        *({"images": value} for value in (-1, 1.5, None)),
        *({"skipped": -1}, {"finite": 10**9}, {"score": "loss"}, {"lr": "0.1"}, {"seconds": None}, {"lr": 10**400}),
        *({"rows": value} for value in (3, [1], [row, row], [row] * 3, [{}], [row, row | {"epoch": 3}], [[]])),
        *(
            {"rows": [row, row | changed]}
            for changed in ({"epoch": 2, "more": 1.0}, {"epoch": 2, "balanced_accuracy": "x"})
        ),
        *({"timings": value} for value in ([], [1], [progress["timings"][0]] * 2, [{"epoch": 1}, {"epoch": 2}])),
        *({"codebooks": value} for value in ([1], [{"epoch": 1}], [progress["codebooks"][0] | {"dead": []}])),
        *({"predictions": [[*progress["predictions"][0][:4], value]]} for value in (-1, 10**9, "x", None)),
        *({"predictions": [[*first[:1], value, *first[2:]]]} for value in (classes, 99, -1, 0.5, None)),
        *(
            {"confusion": value}
            for value in ([[{}]], [[1]], [[1, 2], [3]], [[1, 2], [3, 10**400]], [[1, 2], [3, -1]], 5)
        ),
    ]

    def is_taken(changed):
        try:
            checkpoint.check_progress(checkpoint.Progress(**progress | changed), *limits)
        except (ValueError, TypeError, AttributeError, LookupError, OverflowError):
            return False
        return True

    assert not [changed for changed in impossible if is_taken(changed)]
