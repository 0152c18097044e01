"""The command on a few small images: what it writes, how arms compare, what settings do, and what is refused."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from PIL import Image
from safetensors.torch import load_file

import ctxenc
from ctxenc.__main__ import main
from ctxenc.runs import folders
from ctxenc.runs.config import RunConfig, read_config
from ctxenc.runs.errors import UserError
from ctxenc.training import loop, trainer
from ctxenc.training.checkpoint import Progress, publish, read_predictions, read_rows
from ctxenc.training.data import build_datasets
from ctxenc.training.settings import Settings
from tests.training.small_runs import SMALL, assert_same_run, checkpoints, metrics


class TestRun:
    def test_writes_the_whole_folder(self, done):
        arms = ["context-0", "context-1", "se-0", "se-1"]
        files = {
            str(path.relative_to(done))
            for path in done.rglob("*")
            if path.is_file() and "checkpoints" not in path.parts
        }
        own = ("best.safetensors", "config.json", "last.safetensors", "metrics.csv", "predictions.csv", "timings.csv")
        shared = {".lock", "config.json", "curves.png", "metrics.csv", "report.html", "report.md"}
        files_of_arms = {f"{arm}/{name}" for arm in arms for name in own}
        files_of_arms |= {
            f"{arm}-0/pictures/{name}.png" for arm in ("se", "context") for name in ("confusion", "worst")
        }
        context = {"context-0/pictures/codebooks.png", *(f"context-{seed}/codebooks.csv" for seed in (0, 1))}
        assert files == shared | files_of_arms | context
        for arm in arms:
            assert checkpoints(done / arm) == ["epoch-00001-step-0000000", "epoch-00002-step-0000000"]
        assert len({path.stat().st_mode for path in done.rglob("*") if path.is_file()}) == 1

    def test_metrics(self, done):
        with open(done / "metrics.csv", newline="") as file:
            table = list(csv.DictReader(file))
        assert [(row["arm"], row["seed"], row["epoch"]) for row in table] == [
            (arm, seed, epoch) for arm in ("se", "context") for seed in "01" for epoch in "12"
        ]
        for row in table:
            assert 0 <= float(row["balanced_accuracy"]) <= 1
        assert metrics(done / "se-0") != metrics(done / "se-1")
        for row in read_rows(done / "se-0" / "timings.csv"):
            assert row["images_per_s"] == pytest.approx(6 / row["seconds"])  # of an epoch

    def test_the_model_comes_back(self, done):
        config = read_config(done / "context-0")
        model = ctxenc.load(done / "context-0", checkpoint="last")
        loaded = load_file(done / "context-0" / "last.safetensors")
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
        assert ctxenc.find_context_blocks(model)
        assert not ctxenc.find_context_blocks(ctxenc.load(done / "se-0"))
        assert config.data_config["input_size"] == (3, 32, 32)
        assert config.classes == ["cat", "dog", "newt"]

    def test_evaluate_agrees_with_the_last_row(self, done, capsys):
        assert main(["evaluate", str(done / "context-1"), "--checkpoint", "last", "--device", "cpu"]) == 0
        score = metrics(done / "context-1")[-1]["balanced_accuracy"]
        assert f"{100 * score:.2f} %" in capsys.readouterr().out

    def test_predictions_are_those_of_the_last_epoch(self, done, image_folder):
        rows = read_predictions(done / "se-1" / "predictions.csv")
        assert [row[1] for row in rows] == [0] * 6 + [1] * 3 + [2]
        assert rows[0][0] == str(image_folder / "val" / "cat" / "0.png")
        top1 = sum(target == prediction for _, target, prediction, *_ in rows) / len(rows)
        assert top1 == pytest.approx(metrics(done / "se-1")[-1]["top1"])
        loss = sum(row[3] for row in rows) / len(rows)
        assert loss == pytest.approx(metrics(done / "se-1")[-1]["val_loss"])

    def test_a_second_run_is_the_same(self, done, finetune, tmp_path):
        code, out, _ = finetune(
            "--out", tmp_path / "run", "--arms", "both", "--seeds", 2, "--epochs", 2, "--workers", 2
        )
        assert code == 0
        assert "ContextEncoding minus SE: " in out
        assert_same_run(done, tmp_path / "run", ["se-0", "se-1", "context-0", "context-1"])

    def test_resuming_what_is_finished_mends_its_files(self, done, finetune, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(done, copy)
        for name in ("last.safetensors", "metrics.csv", "predictions.csv"):
            (copy / "context-0" / name).unlink()
        (copy / "report.md").unlink()
        assert finetune("--resume", copy)[0] == 0
        assert_same_run(done, copy, ["se-0", "context-0", "context-1"])
        assert (copy / "report.md").exists()


def test_no_arguments_but_time(tmp_path, capsys):
    """The default run, cut to one epoch and one seed."""
    assert main(["finetune", "--epochs", "1", "--seeds", "1", "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "photographs: 17 classes, 1,020 training crops an epoch (astronaut 60, brick 60, " in out
    assert ", text 60), 585 test tiles" in out
    starts = [line.split("  ")[0] for line in out.splitlines()]
    assert {"SE", "ContextEncoding", "nearest neighbour on colour"} <= set(starts)
    assert len(read_predictions(tmp_path / "run" / "se-0" / "predictions.csv")) == 585
    se, context = (folders.build_model(read_config(tmp_path / "run" / arm)) for arm in ("se-0", "context-0"))
    assert (len(ctxenc.find_se_blocks(se)), len(ctxenc.find_se_blocks(context))) == (4, 0)
    assert len(ctxenc.find_context_blocks(context)) == 4


def test_arms_start_from_the_same_backbone(config):
    set_seed(5)
    plain = folders.build_model(RunConfig(**{**vars(config), "swap": None})).state_dict()
    set_seed(5)
    swapped = folders.build_model(config).state_dict()
    shared = plain.keys() & swapped.keys()
    assert len(shared) > 0.8 * len(plain)
    assert len(swapped.keys() - plain.keys()) > 0
    assert all(torch.equal(plain[name], swapped[name]) for name in shared)


def test_the_order_of_samples_follows_from_seed_and_epoch(config, image_folder, tmp_path):
    settings = Settings(data=str(image_folder), image_size=32, device="cpu", batch_size=2, epochs=3)

    def orders(seed):
        made = trainer.Trainer(config, settings, build_datasets(settings), tmp_path, seed)
        found = []
        for epoch in (0, 1, 0):
            made.samples.set_epoch(epoch)
            made.train_loader.set_epoch(epoch)
            found.append(torch.cat([images for images, _ in made.train_loader]))
        return found

    first, again, other = orders(0), orders(0), orders(1)
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_mixing_follows_from_seed_epoch_and_step(config, image_folder, tmp_path):
    settings = Settings(data=str(image_folder), device="cpu", batch_size=2, cutmix=0.5, mixup=0.5)
    images, targets = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])

    def mixed(made, epoch, step):
        before = np.random.get_state()[1].tolist()
        made.progress.rows, made.progress.step = [{}] * epoch, step
        result = made.mix(images.clone(), targets)[1]
        assert np.random.get_state()[1].tolist() == before
        np.random.rand()
        return result

    made, other = (trainer.Trainer(config, settings, build_datasets(settings), tmp_path, seed) for seed in (0, 1))
    first = mixed(made, 2, 5)
    assert first.shape == (4, 3)
    assert torch.equal(first, mixed(made, 2, 5))
    for different in (mixed(made, 2, 6), mixed(made, 3, 5), mixed(other, 2, 5)):
        assert not torch.equal(first, different)


class TestSettingsTakeEffect:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("--amp", "bf16"),
            ("--channels-last", "--sched", "poly"),
            ("--clip-grad", "1e-6", "--sched", "step"),
            ("--opt", "sgd", "--sched", "tanh", "--lr", "0.1"),
            ("--label-smoothing", "0.3", "--sched", "none"),
            ("--mixup", "1.0"),
            ("--num-codes", "3", "--pool", "concat", "--smoothing", "0.5", "--rd-ratio", "0.25"),
            ("--model", "test_resnet", "--fill-empty"),
        ],
    )
    def test_each_changes_the_weights(self, finetune, done, tmp_path, arguments):
        code, _, err = finetune("--out", tmp_path, "--epochs", 2, *arguments)
        assert code == 0, err
        usual, changed = (load_file(run / "context-0" / "last.safetensors") for run in (done, tmp_path))
        shapes = [{name: tensor.shape for name, tensor in each.items()} for each in (usual, changed)]
        assert shapes[0] != shapes[1] or any(not torch.equal(usual[name], changed[name]) for name in usual)
        stored = read_config(tmp_path).settings
        name = arguments[0].removeprefix("--").replace("-", "_")
        assert stored[name] != Settings().as_dict()[name]

    def test_schedule(self, finetune, tmp_path):
        assert finetune("--out", tmp_path / "run", "--epochs", 4, "--lr", "0.01", "--warmup-epochs", 2)[0] == 0
        rates = [row["lr"] for row in metrics(tmp_path / "run" / "context-0")]
        assert rates[0] < rates[1] < 0.01
        assert rates[1] > rates[2] > rates[3] > 0

    def test_the_moving_average_is_what_is_saved(self, finetune, tmp_path):
        run = tmp_path / "run"
        assert finetune("--out", run, "--epochs", 2, "--model-ema")[0] == 0
        saved = load_file(run / "context-0" / "last.safetensors")
        state = run / "context-0" / "checkpoints" / "epoch-00002-step-0000000"
        average, current = load_file(state / "ema.safetensors"), load_file(state / "model.safetensors")
        assert all(torch.equal(saved[name], average[name]) for name in saved)
        assert any(not torch.equal(saved[name], current[name]) for name in saved)

    @pytest.mark.slow
    def test_compile(self, finetune, tmp_path):
        assert finetune("--out", tmp_path / "run", "--epochs", 1, "--compile")[0] == 0
        assert ctxenc.load(tmp_path / "run")


class TestBestAndLast:
    def test_best_keeps_the_first_of_the_highest(self, tmp_path):
        model = torch.nn.Linear(1, 1)
        progress = Progress()
        for epoch, score in enumerate((0.2, 0.6, 0.6, 0.4), start=1):
            torch.nn.init.constant_(model.weight, epoch)
            progress.rows.append({"epoch": epoch, "balanced_accuracy": score})
            publish(tmp_path, progress, model)
        weights = {name: float(load_file(tmp_path / f"{name}.safetensors")["weight"]) for name in ("best", "last")}
        assert weights == {"best": 2.0, "last": 4.0}


class TestErrors:
    def test_nothing_is_written(self, refused, tmp_path, image_folder):
        folder = tmp_path / "run"
        arguments = ("--out", folder, "--epochs", 1)
        assert "no image folder at" in refused(*arguments, data=tmp_path / "nowhere")
        (tmp_path / "empty").mkdir()
        assert "holds no images" in refused(*arguments, data=tmp_path / "empty")
        line = refused(*arguments, "--model", "seresnet5O")
        assert "unknown model 'seresnet5O'" in line
        assert "seresnet50" in line
        assert "which --fill-empty fills" in refused(*arguments, "--model", "test_resnet")
        broken = shutil.copytree(image_folder, tmp_path / "broken")
        (broken / "val" / "dog" / "1.png").write_bytes(b"no image")
        assert f"broken image {broken / 'val' / 'dog' / '1.png'}" in refused(*arguments, data=broken)
        assert "test_efficientnet" in refused(*arguments, "--model-kwargs", '{"no_such_argument": 1}')
        for wrong in ('{"num_classes": 5}', '{"pretrained": true}'):
            assert "--model-kwargs must be keyword arguments" in refused(*arguments, "--model-kwargs", wrong)
        line = refused(*arguments, "--model", "seresnet50.nope")
        assert "unknown model 'seresnet50.nope'; near names: seresnet50" in line
        assert "--device" in refused(*arguments, "--amp", "fp16")
        assert "cannot be used" in refused(*arguments, "--device", "warp")
        assert not folder.exists()

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (
                ("--auto-augment", "bogus"),
                "--auto-augment must be a policy of timm, such as rand-m9-mstd0.5, got 'bogus'",
            ),
            (("--auto-augment", "rand-q3"), "--auto-augment must be"),
            (
                ("--model-kwargs", '{"in_chans": 1}'),
                "--model-kwargs '{\"in_chans\": 1}' cannot run on images of 3 x 32 x 32: RuntimeError",
            ),
            (("--model-kwargs", '{"features_only": true}'), "must give 3 logits an image, got list for images of"),
            (("--batch-size", 1), "cannot run on images of 3 x 32 x 32: ValueError: Expected more than 1 value"),
            (("--num-codes", 10**15), "--num-codes must be less than or equal to 1000000, got '1000000000000000'"),
            (("--opt", "adahessian"), "--opt must do with first derivatives, got adahessian"),
            (("--seed", 5000000000), "--seed must be at most 4294967295 with --seeds 1, got 5000000000"),
        ],
    )
    def test_what_training_could_not_use_is_told_before_the_folder_is_made(self, refused, tmp_path, arguments, words):
        assert words in refused("--out", tmp_path / "run", "--epochs", 1, *arguments)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_broken_image_of_a_large_set_is_named_when_its_turn_comes(
        self, refused, tmp_path, image_folder, monkeypatch, workers
    ):
        monkeypatch.setattr("ctxenc.training.data.VERIFIED_UP_TO", 3)
        broken = shutil.copytree(image_folder, tmp_path / "broken")
        path = broken / "train" / "dog" / "1.png"
        path.write_bytes(path.read_bytes()[:500])
        line = refused("--out", tmp_path / "run", "--workers", workers, data=broken)
        assert line.startswith(f"ctxenc: error: broken image {path}: ")

    def test_out_that_cannot_be_written(self, refused, tmp_path):
        (tmp_path / "file").write_text("")
        assert "--out" in (line := refused("--out", tmp_path / "file" / "run"))
        assert "cannot be written" in line
        assert "--out" in refused("--out", tmp_path / "file")
        assert (tmp_path / "file").read_text() == ""

    def test_out_that_is_taken(self, refused, tmp_path, run_folder):
        shutil.copytree(run_folder, tmp_path / "run")
        (tmp_path / "run" / "config.json").write_text("{}")
        assert f"--resume {tmp_path / 'run'} goes on with it" in refused("--out", tmp_path / "run")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "thesis.txt").write_text("")
        before = sorted(tmp_path.rglob("*"))
        assert "is not empty" in refused("--out", tmp_path / "other")
        assert sorted(tmp_path.rglob("*")) == before

    def test_no_run_starts_where_weights_cannot_be_had(self, refused, tmp_path, monkeypatch):
        def refuse(*_, **__):
            raise OSError("no route to host")

        monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
        assert "no route to host" in refused("--out", tmp_path / "run", "--pretrained")
        assert not (tmp_path / "run").exists()


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--cpu", "--num_machines", "1", "--num_processes", "1")


@pytest.mark.parametrize(
    ("launcher", "processes"), [(TORCHRUN, 2), pytest.param(ACCELERATE, 1, marks=pytest.mark.slow)]
)
def test_launchers(launcher, processes, tmp_path, image_folder):
    """Every process trains, each validation image counts once, and only the first process writes."""
    run = tmp_path / "run"
    arguments = ("finetune", "--data", image_folder, *SMALL, "--out", run, "--epochs", "1")
    command = [sys.executable, "-m", *launcher, "-m", "ctxenc", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report.html") == 1
    assert len(read_predictions(run / "context-0" / "predictions.csv")) == 10
    assert json.loads((run / "config.json").read_text())["classes"] == ["cat", "dog", "newt"]
    states = torch.load(run / "context-0" / "checkpoints" / "epoch-00001-step-0000000" / "processes.pt")
    assert len(states) == processes
    assert len({tuple(each["rng"]["torch"].tolist()) for each in states}) == processes


def test_an_image_can_be_predicted_with_the_result(finetune, tmp_path, capsys):
    assert finetune("--out", tmp_path / "run", "--epochs", 1)[0] == 0
    Image.new("L", (50, 70), 90).save(tmp_path / "grey.png")
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "grey.png"), "--device", "cpu"]) == 0
    assert "grey.png" in capsys.readouterr().out


def test_an_error_without_a_worker_keeps_its_text():
    with pytest.raises(UserError, match=r"^plain: text$"), loop.worker_errors():
        raise UserError("plain: text")
