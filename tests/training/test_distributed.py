"""Two processes do what one does with the double batch: gradients, the samples that count, what is written, and how they end."""

import csv
import json
import os
import shutil
import time
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

import ctxenc
from ctxenc.__main__ import main
from ctxenc.integrations import EncNet
from ctxenc.runs.config import read_config
from ctxenc.runs.folders import load_weights
from ctxenc.runs.segment_config import SegmentConfig
from ctxenc.runs.trained import load_run
from ctxenc.training.checkpoint import read_predictions
from ctxenc.training.evaluation import data_settings, evaluate_run, validation_source
from ctxenc.training.processes import is_reporter, make_accelerator
from ctxenc.training.segmentation import segment_training as segmentation
from ctxenc.training.segmentation.segment_settings import SegmentSettings
from ctxenc.training.segmentation.segment_trainer import SegmentTrainer
from ctxenc.training.settings import Settings
from ctxenc.training.trainer import Trainer
from tests.training.launchers import launched
from tests.training.small_runs import SEGMENT, SMALL, make_pairs, metrics
from tests.training.two_processes import (
    MUTANTS,
    NETWORKS,
    PROCESSES,
    WRAPPERS,
    gradients_of,
    network_and_batch,
)

QUICK, SLOW = "torchrun", pytest.param("accelerate launch", marks=pytest.mark.slow)
# In fp64, of a gradient's largest value: two halves of a sum differ from the whole by 5e-15 here, a wrong mean by 8e-3 or more.
TOLERANCE = 1e-12


@pytest.fixture(scope="module", params=[QUICK, SLOW])
def measured(request, tmp_path_factory):
    """What two processes computed, in one launch."""
    folder = tmp_path_factory.mktemp("measured")
    code, log = launched(request.param, folder, "measure", folder)
    assert code == 0, log
    return torch.load(folder / "gradients.pt"), json.loads((folder / "counts.json").read_text())


@pytest.fixture(scope="module", params=NETWORKS)
def compared(request, measured):
    """The gradients of one process, and the largest difference from them of those of two, by wrapper."""
    name = request.param
    wanted = gradients_of(name, *network_and_batch(name))
    assert all(gradient.abs().max() > 0 for gradient in wanted.values())
    differences = {}
    for wrapper in (*WRAPPERS, *MUTANTS):
        got = measured[0][name, wrapper]
        assert got.keys() == wanted.keys()
        differences[wrapper] = {key: (got[key] - each).abs().max() / each.abs().max() for key, each in wanted.items()}
    return differences


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_are_those_of_the_double_batch(compared, wrapper):
    assert max(compared[wrapper].values()) < TOLERANCE


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_gradients_are_seen_in_every_parameter(compared, mutant):
    assert min(compared[mutant].values()) > 1e9 * TOLERANCE


def test_every_process_trains_as_many_full_batches(measured):
    for count, batch_size, processes in measured[1]:
        updates = max(1, count // (batch_size * PROCESSES))
        for announced, batches, *_ in processes:
            assert announced == len(batches) == updates
            assert {len(batch) for batch in batches} == {batch_size}


def test_no_sample_is_trained_on_twice_unless_there_are_too_few(measured):
    for count, batch_size, processes in measured[1]:
        seen = [index for _, batches, *_ in processes for batch in batches for index in batch]
        if count >= batch_size * PROCESSES:
            assert len(seen) == len(set(seen))
        else:
            assert set(seen) == set(range(count))


def test_evaluation_counts_each_sample_once(measured):
    for count, _, processes in measured[1]:
        for _, _, targets, predictions in processes:
            assert targets == predictions == list(range(count))


def test_an_uneven_finetune(tmp_path, image_folder):
    """Ten validation images in batches of 3: what two processes measured, one measures; and only the first process wrote."""
    run = tmp_path / "run"
    arguments = ("--data", image_folder, *SMALL, "--batch-size", 3, "--epochs", 2, "--out", run)
    code, log = launched("torchrun", tmp_path, "watched", tmp_path, "finetune", *arguments)
    assert code == 0, log
    loaded = load_run(run, "last")
    settings = Settings(**data_settings(loaded), device="cpu", batch_size=10)
    source = validation_source(settings, loaded.config.classes, None)
    result = evaluate_run(make_accelerator(settings), loaded, source, settings)
    written = read_predictions(run / "context-0" / "predictions.csv")
    assert [each[1:3] for each in written] == list(
        zip(result.targets.tolist(), result.predictions.tolist(), strict=True)
    )
    assert len({name for name, *_ in written}) == 10
    assert metrics(run / "context-0")[-1]["val_loss"] == pytest.approx(result.loss, rel=1e-5)
    assert_first_wrote(tmp_path, run)


def assert_first_wrote(folder, run):
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    names = ("config.json", "metrics.csv", "last.safetensors", "manifest.json", "report.md")
    assert all(any(run.rglob(name)) for name in names)
    assert len(first) >= len(names)  # under random names, until a file is whole
    assert second == []


@pytest.mark.slow
def test_an_uneven_segmentation(tmp_path):
    """Five validation images, three for the first process and two for the second, of several sizes."""
    data, run = make_pairs(tmp_path / "data"), tmp_path / "run"
    for number in range(3):
        for kind in ("images", "masks"):
            shutil.copy(data / kind / "train" / f"{number}.png", data / kind / "val" / f"{number + 2}.png")
    arguments = ("segment", "train", "--data", data, *SEGMENT, "--out", run)
    code, log = launched("torchrun", tmp_path, "watched", tmp_path, *arguments)
    assert code == 0, log
    (arm,) = (each for each in run.iterdir() if each.name.startswith("encnet"))
    config = read_config(arm, SegmentConfig)
    settings = SegmentSettings(**config.settings)
    made = SegmentTrainer(config, settings, segmentation.build_datasets(settings), tmp_path / "alone", 0)
    load_weights(made.network, arm / "last.safetensors")
    with open(arm / "metrics.csv", newline="") as file:
        *_, last = csv.DictReader(file)
    measures = made.evaluate()
    assert {name: float(last[name]) for name in measures} == pytest.approx(measures, nan_ok=True)
    assert_first_wrote(tmp_path, run)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_validation_image_is_in_one_share(processes, count):
    """Ratios of a confusion matrix do not tell whether all was counted twice."""
    found = []
    for index in range(processes):
        made = SegmentTrainer.__new__(SegmentTrainer)
        made.val = range(count)
        made.settings = SimpleNamespace(data="voc", batch_size=2, workers=0)
        made.accelerator = SimpleNamespace(num_processes=processes, process_index=index, device=torch.device("cpu"))
        found += [sample for batch in made._val_loader() for sample in batch.tolist()]
    assert sorted(found) == list(range(count))


@pytest.mark.parametrize(
    ("launcher", "how"),
    [
        (QUICK, "killed"),
        pytest.param("torchrun", "raising", marks=pytest.mark.slow),
        pytest.param("accelerate launch", "killed", marks=pytest.mark.slow),
        pytest.param("accelerate launch", "raising", marks=pytest.mark.slow),
    ],
)
def test_one_that_dies_ends_the_others(tmp_path, image_folder, launcher, how):
    arguments = ("finetune", "--data", image_folder, *SMALL, "--epochs", 1000, "--out", tmp_path / "run")
    code, log = launched(launcher, tmp_path, "dying", how, tmp_path, *arguments)
    ended = time.time()
    assert code == 1, log
    assert ("SIGKILL" if how == "killed" else "RuntimeError: process 1 has had enough") in log
    assert ended - (tmp_path / "died").stat().st_mtime < 60
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"{rank}.pid").read_text()), 0)


@pytest.mark.slow
def test_a_run_that_one_machine_lacks(tmp_path, finetune, image_folder):
    (tmp_path / "1").mkdir()
    assert finetune("--epochs", 1, "--out", tmp_path / "0" / "run")[0] == 0
    arguments = ("finetune", "--data", image_folder, *SMALL, "--epochs", 1, "--resume", "auto", "--out", "run")
    code, log = launched("torchrun", tmp_path, "apart", tmp_path, *arguments)
    assert code == 1, log
    assert log.count("ctxenc: error: --resume auto: not every process finds the same run") == 1, log
    assert not (tmp_path / "1" / "run").exists()


@pytest.mark.parametrize(("local", "rank", "wanted"), [("0", "0", True), ("0", "8", True), ("1", "9", False)])
def test_the_first_of_each_machine_tells_of_a_mistake(local, rank, wanted, monkeypatch):
    """Before the processes are connected: what is wrong on one machine only would else be told nowhere."""
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setenv("RANK", rank)
    assert is_reporter() == wanted


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_network_in_shards_is_refused(kind, monkeypatch, finetune, tmp_path):
    monkeypatch.setattr(Accelerator, "distributed_type", kind)  # on a CPU Accelerate gives DDP whatever is asked for
    code, _, err = finetune("--out", tmp_path / "run")
    assert code == 2
    assert f"accelerate launch must leave each process the whole network (DDP), got {kind.value}" in err
    assert not (tmp_path / "run").exists()


def patched():
    return ctxenc.patch_se_blocks(timm.create_model("test_efficientnet", num_classes=5))


BUILT = {
    "block": lambda: ctxenc.ContextEncoding(16, 4),
    "patched": patched,
    "EncNet": lambda: EncNet("test_resnet", 5, channels=16, num_codes=4),
    "registered": lambda: timm.create_model("ctxenc_resnet18", channels=(8, 8, 16, 16), num_classes=5),
}


@pytest.mark.parametrize("name", BUILT)
def test_conversion_to_sync_batch_norm(name):
    """Of every BatchNorm, to the same state and output. torch's own would drop the activations in timm's norms."""
    network = BUILT[name]().train()
    images = torch.randn(4, 16, 6, 6) if name == "block" else torch.randn(4, 3, 32, 32)
    network(images)  # moves the statistics
    before = {key: each.clone() for key, each in network.state_dict().items()}
    names = {key for key, each in network.named_modules() if isinstance(each, nn.BatchNorm2d)}
    output = network.eval()(images)
    converted = timm.layers.convert_sync_batchnorm(network)
    assert names == {key for key, each in converted.named_modules() if isinstance(each, nn.SyncBatchNorm)}
    assert not any(isinstance(each, nn.BatchNorm2d) for each in converted.modules())
    torch.testing.assert_close(dict(converted.state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(converted(images), output, rtol=0, atol=0)


@pytest.mark.parametrize("command", [("finetune",), ("segment", "train")])
def test_sync_batch_norm_is_refused_on_a_cpu(command, tmp_path, capsys):
    assert main([*command, "--device", "cpu", "--sync-bn", "--out", str(tmp_path / "run")]) == 2
    assert "--sync-bn needs cuda: SyncBatchNorm does not train on cpu" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("trainer", "asked", "processes", "wanted"),
    [
        *((Trainer, None, 2, False), (Trainer, True, 2, True), (Trainer, True, 1, False)),
        *((SegmentTrainer, None, 2, True), (SegmentTrainer, False, 2, False), (SegmentTrainer, None, 1, False)),
    ],
)
def test_who_trains_with_sync_batch_norm(trainer, asked, processes, wanted):
    made = trainer.__new__(trainer)
    made.settings = SimpleNamespace(sync_bn=asked)
    made.accelerator = SimpleNamespace(num_processes=processes, device=torch.device("cuda"))
    network = made.synchronized(nn.Sequential(nn.BatchNorm2d(4)))
    assert isinstance(network[0], nn.SyncBatchNorm) == wanted
    made.accelerator.device = torch.device("cpu")
    assert not isinstance(made.synchronized(nn.Sequential(nn.BatchNorm2d(4)))[0], nn.SyncBatchNorm)
