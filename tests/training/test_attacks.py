"""Nothing runs from a file, and nothing is written outside: every reader of a file that may come from others."""

import json
import os
import pickle
import shutil
from contextlib import suppress

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ctxenc
from ctxenc.__main__ import main
from ctxenc.integrations import EncNet, load_encnet_checkpoint
from ctxenc.integrations.checkpoints import METADATA, save_encnet_checkpoint
from ctxenc.training import data, durable, runs, settings
from ctxenc.training.console import UserError
from ctxenc.training.segmentation import settings as segment_settings
from tests.training.attacks import Bomb, Watch, calls, climbing_zip, pickles, saved
from tests.training.small_runs import checkpoints

SUFFIXES = (".pth", ".bin", ".pt", ".pth.tar", ".safetensors")


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "taken"


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_the_attacks_would_work(tmp_path, marker):
    """Read carelessly, they do what they are made for; and the watch sees it."""
    for name, (call, argument) in calls(marker).items():
        if name == "import":
            continue
        pickle.loads(pickle.dumps(Bomb(call, argument)))
        assert marker.exists(), name
        marker.rmdir() if marker.is_dir() else marker.unlink()
    with pytest.raises(AssertionError, match=r"os\.system"), Watch(marker):
        os.system("true")
    with pytest.raises(AssertionError, match=r"pickle\.find_class"), Watch(marker):
        pickle.loads(pickle.dumps(os.getcwd))


class TestPickles:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_checkpoints(self, tmp_path, marker, suffix):
        path = tmp_path / f"evil{suffix}"
        for name, content in pickles(marker).items():
            path.write_bytes(content)
            with Watch(marker), pytest.raises(ValueError, match="load_encnet_checkpoint: ") as caught:
                load_encnet_checkpoint(path)
            assert str(path) in str(caught.value), name
            if suffix != ".safetensors" and name in ("system, zip 2", "system, legacy 2"):
                assert "got posix.system, which could run code" in str(caught.value), name

    @pytest.mark.parametrize("command", ["convert", "segment predict", "look"])
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_commands_that_take_a_checkpoint(self, tmp_path, marker, picture, capsys, command, suffix):
        path, out = tmp_path / f"evil{suffix}", tmp_path / "out"
        arguments = {
            "convert": ("convert", path, tmp_path / "out.safetensors"),
            "segment predict": ("segment", "predict", "--checkpoint", path, picture, "--out", out),
            "look": ("look", path, picture, "--out", out),
        }[command]
        attacks = pickles(marker)
        for name in (
            "system, pickle 0",
            "system, pickle 4",
            "exec, zip 2",
            "mkdir, legacy 2",
            "tar",
            "a class",
            "TorchScript",
        ):
            path.write_bytes(attacks[name])
            with Watch(marker):
                assert main([str(each) for each in arguments]) == 2
            assert str(path) in capsys.readouterr().err
            assert not out.exists()
            assert not (tmp_path / "out.safetensors").exists()

    @pytest.mark.parametrize("name", ["system, pickle 4", "exec, zip 2", "mkdir, legacy 2", "tar", "TorchScript"])
    def test_the_weights_of_a_run(self, run_folder, tmp_path, marker, picture, capsys, name):
        run = shutil.copytree(run_folder / "context-0", tmp_path / "run")
        (run / "best.safetensors").write_bytes(pickles(marker)[name])
        (run / "best.pth").write_bytes(pickles(marker)[name])
        with Watch(marker):
            with pytest.raises(UserError, match="damaged or no safetensors file"):
                ctxenc.load(run)
            export = ("export", run, "--torch-export", tmp_path / "a.pt2")
            for arguments in (("predict", run, picture), ("evaluate", run), ("look", run, picture), export):
                assert main([str(each) for each in arguments]) == 2
                assert "best.safetensors is damaged or no safetensors file" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "file", ["optimizer.pt", "processes.pt", "model.safetensors", "progress.json", "best.safetensors"]
    )
    def test_resuming(self, done, tmp_path, marker, capsys, file):
        attacks = pickles(marker)
        for name in ("system, pickle 2", "exec, zip 2", "mkdir, legacy 2", "tar")[
            : 1 if file == "best.safetensors" else None
        ]:
            run = shutil.copytree(done, tmp_path / "run")
            forge(run / "context-0" / "checkpoints" / "epoch-00002-step-0000000", {file: attacks[name]})
            with Watch(marker):
                code = main(["finetune", "--resume", str(run)])
            assert code == (0 if file == "best.safetensors" else 2)  # which is copied, and read by others
            assert code == 0 or "cannot resume from" in capsys.readouterr().err
            if code == 0:
                with Watch(marker), pytest.raises(UserError, match="damaged or no safetensors file"):
                    ctxenc.load(run / "context-0")
            shutil.rmtree(run)

    def test_a_folder_of_save_pretrained(self, tmp_path, marker, picture, capsys):
        network = EncNet("test_resnet", 3, channels=8, num_codes=2)
        for file in ("model.safetensors", "config.json"):
            folder = tmp_path / file
            network.save_pretrained(folder)
            for name in ("system, pickle 4", "exec, zip 2", "tar"):
                (folder / "pytorch_model.bin").write_bytes(pickles(marker)[name])
                (folder / file).write_bytes(pickles(marker)[name])
                with Watch(marker):
                    code = main(
                        [
                            "segment",
                            "predict",
                            "--checkpoint",
                            str(folder),
                            str(picture),
                            "--out",
                            str(tmp_path / "out"),
                        ]
                    )
                assert code == 2
                assert "cannot load" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["cifar10", "cifar100"])
    def test_cifar(self, tmp_path, marker, monkeypatch, name):
        """Torchvision unpacks and unpickles what has the checksum of the real files, and no more."""
        evil = pickle.dumps({"data": Bomb(*calls(marker)["system"]), "labels": []})
        folder = tmp_path / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
        folder.mkdir()
        for file in (
            *(f"data_batch_{number}" for number in range(1, 6)),
            "test_batch",
            "batches.meta",
            "train",
            "test",
            "meta",
        ):
            (folder / file).write_bytes(evil)
        archive = folder.with_name({"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}[name])
        archive.write_bytes(pickles(marker)["tar"])
        tried = []

        def refuse(request, *_, **__):
            tried.append(request.full_url)
            raise OSError("no route to host")

        monkeypatch.setattr("urllib.request.urlopen", refuse)
        before = everything(tmp_path)
        for download in (False, True):
            with Watch(marker), pytest.raises(UserError, match=f"{name} cannot be had from"):
                data.build_datasets(settings.Settings(data=name, data_dir=str(tmp_path), download=download))
        assert tried
        assert everything(tmp_path).items() <= before.items()


def forge(folder, changed):
    """Changes files of a checkpoint, as anyone can who makes the checksums anew."""
    files = {each.name: each.read_bytes() for each in folder.iterdir() if each.name != durable.MANIFEST}
    durable.write_folder(folder, (files | changed).items())


class TestPaths:
    @pytest.mark.parametrize("name", ["../../x", "/etc/hostname", "model.safetensors/../../x"])
    def test_a_manifest_that_names_files_elsewhere(self, tmp_path, name):
        folder = tmp_path / "checkpoints" / "epoch-00001-step-0000000"
        durable.write_folder(folder, [("model.safetensors", b"x")])
        (tmp_path / "x").write_bytes(b"x")
        sums = json.loads((folder / durable.MANIFEST).read_text())
        (folder / durable.MANIFEST).write_text(json.dumps(sums | {name: sums["model.safetensors"]}))
        before = everything(tmp_path)
        assert durable.damage(folder) == "its files are not those of manifest.json"
        assert everything(tmp_path) == before

    def test_old_checkpoints_are_removed_by_name(self, done, tmp_path, marker):
        """Where checkpoints/ leads elsewhere, nothing else is removed there."""
        run = shutil.copytree(done, tmp_path / "run")
        home = tmp_path / "home"
        (run / "context-1" / "checkpoints").rename(home)
        (run / "context-1" / "checkpoints").symlink_to(home)
        shutil.rmtree(home / "epoch-00002-step-0000000")
        for name in ("thesis", ".ssh", "epoch", "zebra"):
            (home / name).mkdir()
            (home / name / "file").write_text("dear")
        before = {name: each for name, each in everything(home).items() if not name.startswith("epoch-")}
        with Watch(marker):
            assert main(["finetune", "--resume", str(run), "--keep", "1"]) == 0
        assert checkpoints(run / "context-1") == sorted(
            [*(".ssh", "epoch", "thesis", "zebra"), "epoch-00002-step-0000000"]
        )
        assert before.items() <= everything(home).items()

    def test_names_of_tensors(self, run_folder, tmp_path):
        run = shutil.copytree(run_folder / "context-0", tmp_path / "inner" / "run")
        state = load_file(run / "best.safetensors")
        save_file(state | {"../../x": torch.zeros(1)}, run / "best.safetensors")
        with pytest.raises(UserError, match=r"the model has no \.\./\.\./x"):
            ctxenc.load(run)
        torch.save({"../../x": torch.zeros(1)}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match="neither PyTorch-Encoding's nor mmsegmentation's"):
            load_encnet_checkpoint(tmp_path / "a.pth")
        assert {each.name for each in tmp_path.iterdir()} == {"inner", "a.pth"}

    def test_names_of_classes(self, config, run_folder, tmp_path, picture, monkeypatch):
        run = shutil.copytree(run_folder / "context-0", tmp_path / "inner" / "run")
        table = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(table | {"classes": ["../../x", "/x", "x\0y"]}))
        monkeypatch.chdir(tmp_path / "inner")
        before = {name: each for name, each in everything(tmp_path).items() if not name.startswith("inner")}
        for arguments in (["predict", str(run), str(picture)], ["look", str(run), str(picture), "--out", "out"]):
            assert main(arguments) == 0
        assert {name: each for name, each in everything(tmp_path).items() if not name.startswith("inner")} == before

    def test_members_of_an_archive_are_not_unpacked(self, tmp_path, marker):
        (tmp_path / "inner").mkdir()
        path = tmp_path / "inner" / "a.pth"
        for content in (climbing_zip(saved({"weight": torch.zeros(2)})), pickles(marker)["tar"]):
            path.write_bytes(content)
            before = everything(tmp_path)
            with Watch(marker), pytest.raises(ValueError, match="load_encnet_checkpoint"):
                load_encnet_checkpoint(path)
            assert everything(tmp_path) == before


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
            runs.build_model(runs.RunConfig(**vars(config) | {"model": model, "model_kwargs": arguments, "swap": None}))
        if {"pretrained", "cache"} & {each.partition("_")[0] for each in arguments} or "checkpoint_path" in arguments:
            with pytest.raises(ValueError, match="model_kwargs must be"):
                runs.RunConfig(**vars(config) | {"model_kwargs": arguments})

    @pytest.mark.parametrize(
        ("key", "value"), [("interpolation", CODE), ("interpolation", "cubic"), ("crop_mode", CODE)]
    )
    def test_transforms(self, run, marker, picture, config, capsys, key, value):
        self.change(run, data_config=config.data_config | {key: value})
        with Watch(marker):
            assert main(["predict", str(run), str(picture)]) == 2
        assert "config: data_config must be" in capsys.readouterr().err

    def test_every_interpolation_that_is_allowed_is_timms(self, config):
        from ctxenc.training.config import CROP_MODES, INTERPOLATIONS

        for key, values in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            for value in values:
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
        commands += (["segment", "predict", "--checkpoint", run, picture], ["segment", "train", "--resume", run])
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
            with pytest.raises(SystemExit) as caught:
                main(["finetune", "--model-kwargs", text])
            assert caught.value.code == 2
            assert "argument --model-kwargs: must be a JSON object: " in capsys.readouterr().err

    def test_deep_nesting_in_a_checkpoint(self, tmp_path):
        path = tmp_path / "a.safetensors"
        save_file({"weight": torch.zeros(2)}, path, {METADATA: "[" * 100_000})
        with pytest.raises(ValueError, match="no valid safetensors file"):
            load_encnet_checkpoint(path)
        (tmp_path / durable.MANIFEST).write_text("[" * 100_000)
        assert durable.damage(tmp_path) == "manifest.json is no JSON"


ODD = (None, True, 0, -1, 10**400, 0.5, "x", CODE, "", [], [1], {}, {"a": 1})


@pytest.mark.parametrize("options", [settings, segment_settings], ids=["finetune", "segment train"])
def test_settings_of_any_type(options):
    """Each is as argparse would have made it, or is named."""
    stored = options.resolve({"data": "folder"}).as_dict()
    for name, usual in stored.items():
        for value in ODD:
            try:
                made = getattr(options.resumed(stored | {name: value}, {}), name)
            except UserError as error:
                told = str(error)
                assert "--" in told and len(told) < 300 and "\n" not in told, (name, told)  # noqa: PT018
                continue
            assert made is value
            if usual is not None and name != "smoothing":  # a text or a number
                assert isinstance(made, type(usual)) or (type(usual) is float and type(made) is int), (name, value)
                assert isinstance(made, bool) == isinstance(usual, bool), (name, value)


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
        for changed in (progress | {"novelty": 1}, {}, [1], {"predictions": 3}):
            forge(newest, {"progress.json": json.dumps(changed).encode()})
            assert main(["finetune", "--resume", str(run)]) == 2
            assert f"cannot resume from {newest}: " in capsys.readouterr().err
