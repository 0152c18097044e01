"""Commands and ctxenc.load on runs of either kind: they work, or name the command that does."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import ctxenc
from ctxenc.__main__ import main
from ctxenc.integrations import save_encnet_checkpoint
from ctxenc.runs.segment_config import NoContext, PooledContext
from ctxenc.training.checkpoint import read_rows
from tests.training.small_runs import SEGMENT, make_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs") / "data")


@pytest.fixture(scope="module")
def segmented(tmp_path_factory, pairs):
    """Four networks, two seeds each."""
    run = tmp_path_factory.mktemp("runs") / "segment"
    more = ("--arms", "all", "--seeds", "2", "--epochs", "1", "--lr", "0.02")
    assert main(["segment", "train", "--data", str(pairs), "--out", str(run), *SEGMENT, *more]) == 0
    return run


@pytest.fixture
def command(capsys):
    """Runs a command; gives the exit code, stdout and stderr."""
    return lambda *arguments: (main([str(each) for each in arguments]), *capsys.readouterr())


class TestLoad:
    @pytest.mark.parametrize("arm", ["", "encnet-1", "encnet_no_se_loss-0", "fcn_se-0", "fcn-0"])
    def test_gives_the_trained_network(self, segmented, arm):
        network = ctxenc.load(segmented / arm, checkpoint="last")
        assert not network.training
        saved = load_file(segmented / (arm or "encnet-0") / "last.safetensors")
        assert saved.keys() == network.state_dict().keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in network.state_dict().items())
        context = {"fcn_se-0": PooledContext, "fcn-0": NoContext}.get(arm)
        assert context is None or isinstance(network.encoding, context)

    def test_a_checkpoint_of_an_encnet(self, segmented, tmp_path):
        save_encnet_checkpoint(ctxenc.load(segmented), tmp_path / "a.safetensors")
        x = torch.randn(1, 3, 32, 40)
        with torch.no_grad():
            assert torch.equal(ctxenc.load(tmp_path / "a.safetensors")(x)["out"], ctxenc.load(segmented)(x)["out"])


def measures(out):
    """The first column of figures in the table of a command, by name."""
    return dict(line.rsplit("  ", 1) for line in out.splitlines()[3:])


class TestEvaluate:
    @pytest.mark.parametrize("arm", ["encnet-1", "fcn_se-0"])
    def test_agrees_with_training(self, command, segmented, arm):
        code, out, _ = command("segment", "evaluate", segmented / arm, "--checkpoint", "last")
        assert code == 0
        row = read_rows(segmented / arm / "metrics.csv")[-1]
        found = {name.strip(): value.strip() for name, value in measures(out).items()}
        wanted = {"pixel accuracy": "pixel_accuracy", "mean iou": "mean_iou", "mean dice": "mean_dice"}
        wanted |= {f"IoU of {name}": f"iou/{name}" for name in ("dark", "light")}
        assert found == {name: f"{100 * row[column]:.2f} %" for name, column in wanted.items()}
        name, _, seed = arm.rpartition("-")
        assert out.startswith(f"{segmented / arm} (arm {name}, seed {seed}), last checkpoint, on 2 validation images")

    def test_other_views_and_data(self, command, segmented, pairs, tmp_path):
        save_encnet_checkpoint(ctxenc.load(segmented), tmp_path / "a.safetensors")
        views = ("--flip", "--scales", "0.5", "1", "--crop", "24")
        usual, run, file = (
            command("segment", "evaluate", *each)[1]
            for each in (
                (segmented,),
                (segmented, *views),
                (tmp_path / "a.safetensors", "--data", pairs, "--base-size", "40", *views),
            )
        )
        names = ("IoU of dark", "IoU of light"), ("IoU of 0", "IoU of 1")
        found = [[line.split()[-2] for line in out.splitlines()[3:]] for out in (usual, run, file)]
        assert found[1] == found[2] != found[0]
        assert all(name in out for out, both in ((run, names[0]), (file, names[0])) for name in both)

    def test_what_does_not_fit(self, command, segmented, pairs, tmp_path):
        save_encnet_checkpoint(ctxenc.load(segmented), tmp_path / "a.safetensors")
        other = make_pairs(tmp_path / "other")
        (other / "classes.txt").write_text("dark\nlight\ngrey\n")
        for arguments, text in (
            ((tmp_path / "a.safetensors",), "is no run: name --data"),
            ((tmp_path / "a.safetensors", "--data", other), "has 2 classes, the data 3"),
            ((tmp_path / "a.safetensors", "--checkpoint", "last"), "RUN must be a run, which has a last checkpoint"),
            ((segmented, "--data", other), "the data has in addition class 'grey'"),
            ((segmented, "--scales", "99"), "--scales must be above 0"),
        ):
            code, out, err = command("segment", "evaluate", *arguments)
            assert (code, out, err.count("\n")) == (2, "", 1), err
            assert text in err


class TestExport:
    def test_both_forms(self, command, segmented, tmp_path):
        reference = pytest.importorskip("onnx.reference")
        files = ("--onnx", tmp_path / "a.onnx", "--torch-export", tmp_path / "a.pt2")
        assert command("export", segmented, *files)[::2] == (0, "")
        images = torch.randn(2, 3, 32, 32)  # the crop of its training
        with torch.no_grad():
            expected = ctxenc.load(segmented)(images)["out"]
            torch.testing.assert_close(torch.export.load(tmp_path / "a.pt2").module()(images), expected)
        [logits] = reference.ReferenceEvaluator(str(tmp_path / "a.onnx")).run(None, {"image": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-5, rtol=1e-4)

    def test_a_file_and_a_size(self, command, segmented, run_folder, tmp_path):
        save_encnet_checkpoint(ctxenc.load(segmented), tmp_path / "a.safetensors")
        for run in (tmp_path / "a.safetensors", run_folder):
            assert command("export", run, "--torch-export", tmp_path / "a.pt2", "--image-size", 48)[0] == 0
            torch.export.load(tmp_path / "a.pt2").module()(torch.randn(2, 3, 48, 48))


SEGMENT_RUN = "is a run of segment train: use ctxenc segment evaluate, segment predict, "
FINETUNE_RUN = "is a run of finetune: use ctxenc evaluate, predict, "


def test_the_other_kind_is_named_with_its_commands(command, segmented, run_folder, pairs, tmp_path):
    picture = pairs / "images" / "val" / "0.png"
    save_encnet_checkpoint(ctxenc.load(segmented), tmp_path / "a.safetensors")
    (tmp_path / "run").mkdir()
    config = (run_folder / "se-0" / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text(config)
    for arguments, text in (
        (("evaluate", segmented), SEGMENT_RUN),
        (("predict", segmented, picture), SEGMENT_RUN),
        (("finetune", "--resume", segmented), SEGMENT_RUN),
        (("segment", "evaluate", run_folder), FINETUNE_RUN),
        (("segment", "predict", run_folder, picture), FINETUNE_RUN),
        (("segment", "train", "--resume", tmp_path / "run"), FINETUNE_RUN),
        (("predict", tmp_path / "a.safetensors", picture), "RUN must be a run of finetune, got a file"),
    ):
        code, out, err = command(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert text in err


@pytest.mark.parametrize("arm", ["", "encnet-1"])
def test_the_arm_in_use_is_printed(command, segmented, pairs, tmp_path, arm):
    picture = pairs / "images" / "val" / "0.png"
    seed = 1 if arm else 0
    line = f"{segmented / f'encnet-{seed}'} (arm encnet, seed {seed}), best checkpoint"
    for name in (("segment", "predict"), ("look",)):
        code, out, _ = command(*name, segmented / arm, picture, "--out", tmp_path / "out")
        assert (code, out.splitlines()[0]) == (0, line)


def test_weights_that_are_not_finite_are_told(command, segmented, run_folder, pairs, tmp_path):
    """Their predictions were NaN, or class 0, and the exit code 0."""
    picture = pairs / "images" / "val" / "0.png"
    for source, name in (
        (run_folder / "context-0", "blocks.3.0.se.fc.bias"),
        (segmented / "encnet-0", "reduce.0.weight"),
    ):
        run = tmp_path / source.name
        run.mkdir()
        state = load_file(source / "best.safetensors")
        state[name].flatten()[0] = float("nan")
        save_file(state, run / "best.safetensors")
        shutil.copy(source / "config.json", run)
        kind = ("segment",) if name.startswith("reduce") else ()
        for arguments in (
            (*kind, "evaluate", run),
            (*kind, "predict", run, picture),
            ("export", run, "--torch-export", tmp_path / "a.pt2"),
        ):
            code, out, err = command(*arguments)
            assert (code, out, err.count("\n")) == (2, "", 1), err
            assert "are not finite; its weights are NaN or infinity in " in err
            assert err.endswith(f"{name}\n")
        code, _, err = command("look", run, picture, "--out", tmp_path / "look")
        assert (code, err.count("\n")) == (2, 1), err
        assert f"weights are not finite: NaN or infinity in {name}\n" in err
    assert not (tmp_path / "a.pt2").exists()
