import errno
import json
import os
import shutil
import stat
import threading
from contextlib import suppress
from dataclasses import replace

import pytest
import safetensors.torch
import timm
import torch

import ctxenc
from ctxenc.runs import folders, trained
from ctxenc.runs.config import atomic, read_config, write_config
from ctxenc.runs.errors import UserError


def rewrite(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("swap", [{}, {"aggregation": "mean"}])
def test_a_run_of_before_there_was_a_choice_took_the_sum(config, swap):
    model = folders.build_model(replace(config, swap={"num_codes": 4} | swap))
    assert {found.aggregation for found in ctxenc.find_context_blocks(model)} == {swap.get("aggregation", "sum")}


class TestConfig:
    def test_comes_back_equal(self, config, tmp_path):
        write_config(tmp_path, config)
        assert read_config(tmp_path) == config
        assert [each.name for each in tmp_path.iterdir()] == ["config.json"]

    @pytest.mark.parametrize(
        ("field", "value", "problem"),
        [
            ("model", 3, "model must be a valid string, got 3"),
            *(
                (
                    "model_kwargs",
                    value,
                    "model_kwargs must be keyword arguments of timm.create_model without num_classes",
                )
                for value in (
                    {"checkpoint_path": "/"},
                    {"pretrained_cfg_overlay": {"file": "a.pt"}},
                    {"num_classes": 3},
                )
            ),
            ("classes", [], "classes must have at least 1 item after validation, not 0, got []"),
            ("classes", "cat", "classes must be a valid list, got 'cat'"),
            ("swap", {"filter_fn": "os.system"}, "swap.filter_fn is unknown"),
            ("swap", "yes", "swap must be a valid dictionary, got 'yes'"),
            ("swap", {"rd_ratio": 1e308}, "swap.rd_ratio must be less than or equal to 1000000000, got 1e+308"),
            (
                "swap",
                {"num_codes": 2**70},
                "swap.num_codes must be less than or equal to 1000000, got 1180591620717411303424",
            ),
            ("swap", {"num_codes": 0}, "swap.num_codes must be greater than or equal to 1, got 0"),
            ("swap", {"fill_empty": 1}, "swap.fill_empty must be a valid boolean, got 1"),
            ("data_config", {}, "data_config.input_size is missing"),
            ("settings", None, "settings must be a valid dictionary, got None"),
            ("versions", {"torch": 2}, "versions.torch must be a valid string, got 2"),
        ],
    )
    def test_a_wrong_field_is_named_with_its_value(self, config, tmp_path, field, value, problem):
        write_config(tmp_path, config)
        rewrite(tmp_path, **{field: value})
        with pytest.raises(UserError) as caught:
            read_config(tmp_path)
        assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {problem}")
        with pytest.raises(ValueError, match=field):
            replace(config, **{field: value})

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("input_size", [3, 32]),
            ("input_size", [3, 32, 32.5]),
            ("input_size", "3x32"),
            ("mean", [0.5]),
            ("std", [0.1, 0.0, 0.1]),
            ("std", [0.1, float("nan"), 0.1]),
            ("std", [0.1, 1e-320, 0.1]),
            pytest.param("std", [0.1, 10**400, 0.1], id="std-10**400"),
            ("std", [0.1, 1e300, 0.1]),
            ("mean", [0.1, -1e300, 0.1]),
            ("input_size", [3, 2**70, 32]),
            ("input_size", [3, 32, 8193]),
            *(("crop_pct", value) for value in (0, 0.1, 1e9)),
            ("interpolation", None),
        ],
    )
    def test_a_wrong_data_config_is_refused(self, config, key, value):
        with pytest.raises(ValueError, match="data_config"):
            replace(config, data_config=config.data_config | {key: value})

    def test_another_format_is_refused_before_its_fields_are_read(self, config, tmp_path):
        write_config(tmp_path, config)
        rewrite(tmp_path, format=2, novelty=1)
        with pytest.raises(UserError, match="format must be 1, got 2"):
            read_config(tmp_path)

    def test_unknown_and_missing_fields_are_named(self, config, tmp_path):
        write_config(tmp_path, config)
        rewrite(tmp_path, novelty=1)
        with pytest.raises(UserError, match="novelty is unknown"):
            read_config(tmp_path)
        write_config(tmp_path, config)
        rewrite(tmp_path, **{"x-y": 1})
        with pytest.raises(UserError, match="x-y is unknown"):
            read_config(tmp_path)
        write_config(tmp_path, config)
        rewrite(tmp_path, novelty=1)
        table = json.loads((tmp_path / "config.json").read_text())
        del table["novelty"], table["classes"]
        (tmp_path / "config.json").write_text(json.dumps(table))
        with pytest.raises(UserError, match="classes is missing"):
            read_config(tmp_path)

    @pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", b'"x"'])
    def test_what_is_no_configuration_is_refused(self, tmp_path, text):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(UserError, match=r"config\.json"):
            read_config(tmp_path)

    def test_what_is_no_json_leaves_the_old_file(self, config, tmp_path):
        write_config(tmp_path, config)
        before = (tmp_path / "config.json").read_bytes()
        with pytest.raises(TypeError):
            write_config(tmp_path, replace(config, settings={"path": object()}))
        assert (tmp_path / "config.json").read_bytes() == before


class TestAtomic:
    def test_a_failure_leaves_what_was_there(self, tmp_path):
        path = tmp_path / "file.txt"
        path.write_text("old")
        with suppress(KeyboardInterrupt), atomic(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_readers_see_the_old_or_the_new(self, tmp_path):
        path = tmp_path / "file.txt"
        path.write_text("0" * 100_000)
        seen, stop = set(), threading.Event()

        def read():
            while not stop.is_set():
                seen.add(path.read_text())

        thread = threading.Thread(target=read)
        thread.start()
        for _ in range(50):
            with atomic(path) as temporary:
                temporary.write_text("1" * 100_000)
        stop.set()
        thread.join()
        assert seen <= {"0" * 100_000, "1" * 100_000}

    def test_an_error_with_another_file_is_not_called_one_of_writing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="elsewhere"), atomic(tmp_path / "file.txt"):
            (tmp_path / "elsewhere").read_bytes()
        assert not list(tmp_path.iterdir())
        with (
            pytest.raises(UserError, match=r"cannot write .*file\.txt"),
            atomic(tmp_path / "file.txt") as temporary,
        ):
            temporary.unlink()
        with pytest.raises(UserError, match=r"cannot write .*file\.txt"), atomic(tmp_path / "file.txt"):
            raise OSError(errno.ENOSPC, "No space left on device")

    @pytest.mark.parametrize("name", ["file.txt/below", "missing/file", "."])
    def test_what_cannot_be_written_is_told_before_the_body(self, tmp_path, name):
        (tmp_path / "file.txt").touch()
        with pytest.raises(UserError, match="cannot write"), atomic(tmp_path / name):
            pytest.fail("the body ran")


class TestBuild:
    def test_se_and_context(self, config):
        se = folders.build_model(replace(config, swap=None))
        assert not ctxenc.find_context_blocks(se)
        assert len(ctxenc.find_se_blocks(se)) == 2
        context = folders.build_model(config)
        assert len(ctxenc.find_context_blocks(context)) == 2
        assert not ctxenc.find_se_blocks(context)
        assert context(torch.zeros(2, 3, 32, 32)).shape == (2, len(config.classes))

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"model": "seresnet5O"}, "unknown model 'seresnet5O'; near names: seresnet50"),
            ({"model": "hf-hub:timm/resnet50"}, "unknown model"),
            ({"model": "local-dir:/tmp/model"}, "unknown model"),
            (
                {"model": "test_efficientnet.nonsense"},
                "unknown model 'test_efficientnet.nonsense'; near names: test_eff",
            ),
            ({"model_kwargs": {"nonsense": 1}}, "cannot build test_efficientnet: TypeError"),
            ({"model": "test_resnet"}, "test_resnet: patch_se_blocks"),
        ],
    )
    def test_what_cannot_be_built_is_one_line(self, config, fields, words):
        with pytest.raises(UserError) as caught:
            folders.build_model(replace(config, **fields))
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


class TestWeights:
    def test_come_back_equal(self, config, tmp_path):
        model, other = folders.build_model(config), folders.build_model(config)
        model.to(memory_format=torch.channels_last)
        folders.save_weights(tmp_path / "w.safetensors", model)
        folders.load_weights(other, tmp_path / "w.safetensors")
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name
        assert [each.name for each in tmp_path.iterdir()] == ["w.safetensors"]

    def test_shared_tensors_come_back_shared(self, tmp_path):
        def tied():
            model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
            model[1].weight = model[0].weight
            return model

        model, other = tied(), tied()
        folders.save_weights(tmp_path / "w.safetensors", model)
        folders.load_weights(other, tmp_path / "w.safetensors")
        assert torch.equal(other[1].weight, model[0].weight)
        assert other[0].weight is other[1].weight

    @pytest.mark.parametrize("kept", ["conv_stem.weight", "bn1.weight", "nowhere"])
    def test_a_second_name_that_the_model_does_not_have(self, config, tmp_path, kept):
        """A file may name any tensor as the second name of another, of its own or of none."""
        model, path = folders.build_model(config), tmp_path / "w.safetensors"
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = {name: tensor + 1 for name, tensor in before.items() if name != "bn1.bias"}
        safetensors.torch.save_file(state, path, {"bn1.bias": kept})
        with pytest.raises(UserError, match=r"does not fit the model of its configuration: .*bn1\.bias"):
            folders.load_weights(model, path)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    @pytest.mark.parametrize("length", [0, 4, 100, -1])
    def test_truncated(self, config, tmp_path, length):
        path = tmp_path / "w.safetensors"
        folders.save_weights(path, folders.build_model(config))
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(UserError, match="damaged"):
            folders.load_weights(folders.build_model(config), path)

    def test_missing(self, config, tmp_path):
        model, path = folders.build_model(config), tmp_path / "w.safetensors"
        with pytest.raises(UserError, match=r"cannot read .*w\.safetensors: No such file or directory"):
            folders.load_weights(model, path)
        path.symlink_to(path)  # as root, no file is forbidden
        with pytest.raises(UserError, match=r"cannot read .*w\.safetensors: Too many levels of symbolic links"):
            folders.load_weights(model, path)

    def test_are_as_open_as_other_files(self, config, tmp_path):
        before = os.umask(0o027)
        try:
            folders.save_weights(tmp_path / "w.safetensors", folders.build_model(config))
        finally:
            os.umask(before)
        assert stat.filemode((tmp_path / "w.safetensors").stat().st_mode) == "-rw-r-----"

    def test_of_another_model_leaves_the_model_unchanged(self, config, tmp_path):
        path = tmp_path / "w.safetensors"
        model = folders.build_model(config)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        folders.save_weights(path, folders.build_model(replace(config, classes=["one"])))
        with pytest.raises(UserError, match=r"classifier\.\w+ has shape"):
            folders.load_weights(model, path)
        folders.save_weights(path, folders.build_model(replace(config, swap=None)))
        with pytest.raises(
            UserError, match=r"it has blocks\.3\.0\.se\.conv_expand\.bias, .*; the network blocks\.3\.0\.se\.conv"
        ):
            folders.load_weights(model, path)
        safetensors.torch.save_file(before | {"extra": torch.zeros(1)}, path)
        with pytest.raises(UserError, match=r"it has extra \(1 and 0 such names\)"):
            folders.load_weights(model, path)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class TestResolve:
    def test_the_first_seed_whatever_the_scores(self, run_folder, tmp_path):
        """The best of several seeds would be chosen on the images that it is then judged by."""
        assert folders.resolve(run_folder).name == folders.resolve(run_folder, "last").name == "context-0"
        for name in ("context-10", "context-9", "encnet_no_se_loss-0"):
            shutil.copytree(run_folder / "se-0", tmp_path / name)
        assert folders.resolve(tmp_path).name == "context-9"
        assert folders.resolve(run_folder, preferred=("se-",)).name == "se-0"

    def test_an_arm_itself(self, run_folder):
        assert folders.resolve(run_folder / "se-0") == run_folder / "se-0"

    def test_se_arms_where_there_is_no_other(self, run_folder, tmp_path):
        for seed in range(2):
            shutil.copytree(run_folder / "se-0", tmp_path / f"se-{seed}")
        assert folders.resolve(tmp_path).name.startswith("se-")

    def test_errors(self, run_folder, tmp_path):
        with pytest.raises(UserError, match="no run at"):
            folders.resolve(tmp_path / "none")
        with pytest.raises(UserError, match="is no run folder"):
            folders.resolve(tmp_path)
        with pytest.raises(UserError, match="checkpoint must be one of best, last, got 'first'"):
            folders.resolve(run_folder, "first")
        shutil.copytree(run_folder, tmp_path / "run")
        (tmp_path / "run" / "context-0" / "best.safetensors").unlink()
        with pytest.raises(UserError, match=r"best\.safetensors does not exist"):
            folders.resolve(tmp_path / "run")


class TestLoad:
    def test_gives_the_trained_model(self, run_folder):
        model = ctxenc.load(run_folder, checkpoint="best")
        assert not model.training
        saved = safetensors.torch.load_file(run_folder / "context-0" / "best.safetensors")
        assert saved.keys() == model.state_dict().keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
        last = ctxenc.load(run_folder, checkpoint="last")
        assert any(not torch.equal(saved[name], tensor) for name, tensor in last.state_dict().items())

    def test_takes_no_memory_for_what_the_file_does_not_hold(self, run_folder, tmp_path, monkeypatch):
        """A configuration may name a network of any size."""
        run = shutil.copytree(run_folder / "context-0", tmp_path / "run")
        rewrite(run, model_kwargs={"channel_multiplier": 3.0})
        devices, real = [], trained.build_model
        monkeypatch.setattr(
            trained, "build_model", lambda *a: (devices.append(torch.empty(0).device.type), real(*a))[1]
        )
        with pytest.raises(UserError, match="does not fit the model of its configuration"):
            ctxenc.load(run)
        assert devices == ["meta"]

    def test_downloads_nothing(self, run_folder, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("a download was tried")

        monkeypatch.setattr(timm.models._builder, "load_pretrained", refuse)
        assert ctxenc.load(run_folder)

    def test_names_its_classes(self, run_folder, config):
        loaded = trained.load_run(run_folder)
        assert loaded.config.classes == config.classes
        assert loaded.folder == run_folder / "context-0"
        assert str(loaded) == f"{run_folder / 'context-0'} (arm context, seed 0), best checkpoint"

    @pytest.mark.parametrize("device", ["cuda:99", "nonsense", "cpu:x", "meta"])
    def test_a_device_that_is_not_there(self, run_folder, device):
        with pytest.raises(UserError, match=f"device '{device}' cannot be used"):
            ctxenc.load(run_folder, device=device)
