"""Nothing runs from a pickle or an archive, and nothing is written outside: every reader of a file that may come from others."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import ctxenc
from ctxenc.__main__ import main
from ctxenc.integrations import EncNet, load_encnet_checkpoint
from ctxenc.runs.errors import UserError
from ctxenc.training import data, durable, settings
from tests.training.attacks import Bomb, Watch, calls, climbing_zip, forge, pickles, saved
from tests.training.small_runs import checkpoints

SUFFIXES = (".pth", ".bin", ".pt", ".pth.tar", ".safetensors")


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
            "segment predict": ("segment", "predict", path, picture, "--out", out),
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
        run = shutil.copytree(done, tmp_path / "run")
        home = run / "context-1" / "checkpoints"
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
        with pytest.raises(UserError, match=r"it has \.\./\.\./x"):
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
