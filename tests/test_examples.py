"""The examples: their scripts give options that the real parsers take and models that can be built, and the tour runs."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from matplotlib import pyplot
from PIL import Image
from timm.models import get_pretrained_cfg
from torch.distributed.run import get_args_parser

import ctxenc
from ctxenc.__main__ import COMMANDS, build_parser, main
from ctxenc.context import ContextEncoding
from ctxenc.runs.config import read_config
from ctxenc.runs.trained import load_run
from ctxenc.training.segmentation.segment_settings import SegmentSettings
from ctxenc.training.settings import Settings
from tests.training.small_runs import make_cifar

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = {  # with the commands that each runs
    "cifar10.sh": ["finetune"],
    "encnet_ade20k.sh": ["segment train", "segment evaluate", "segment predict"],
    "imagenet_seresnet50.sh": ["finetune"],
    "imagenet_timm_finetune.sh": ["patched_timm_model.py", "train.py"],
    "imagenet_timm_train.sh": ["train.py"],
}
ARGUMENTS = {name: ["TIMM"] * ("timm" in name) + ["some data"] for name in SCRIPTS}


@pytest.fixture
def recorded(tmp_path):
    """Runs a script with a python and a torchrun that do nothing but note their arguments; gives these."""
    tools, notes = tmp_path / "bin", tmp_path / "notes"
    tools.mkdir()
    for name in ("python", "torchrun"):
        lines = ["import json, os, sys", f"note = json.dumps([{name!r}, *sys.argv[1:]])"]
        lines.append(f"with open({str(notes)!r}, 'a') as file:\n    print(note, file=file)")
        (tools / name).write_text("\n".join([f"#!{sys.executable}", *lines]))
        (tools / name).chmod(0o755)

    def run(script, *arguments, **environment):
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", EXAMPLES / script, *arguments],
            env=os.environ | {"PATH": path} | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in notes.read_text().splitlines()]

    return run


def program(command):
    """What a command runs, a module or a file, with its arguments and the number of processes."""
    launcher, *arguments = command
    if launcher == "torchrun":
        args = get_args_parser().parse_args(arguments)
        return args.training_script, args.training_script_args, int(args.nproc_per_node)
    if arguments[0] == "-m":
        arguments = arguments[1:]
    return arguments[0], arguments[1:], 1


def parsed(arguments):
    """What the real parser makes of the arguments of `python -m ctxenc`, and their settings where it trains."""
    args = build_parser(arguments[0]).parse_args(arguments)
    name = f"segment {args.segment_command}" if args.command == "segment" else args.command
    assert args.command in COMMANDS
    options = {"finetune": Settings, "segment train": SegmentSettings}.get(name)
    return name, args if options is None else options.resolve(options.read(args))


def cells():
    """The code cells of the tour."""
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_tour_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pyplot.switch_backend("Agg")
    names = {"__name__": "tour"}
    for number, cell in enumerate(cells()):
        exec(compile("".join(cell["source"]), f"tour.ipynb, code cell {number}", "exec"), names)
    pyplot.close("all")
    assert not list(tmp_path.iterdir())


def test_the_tour_is_committed_as_it_was_run():
    assert (EXAMPLES / "tour.ipynb").stat().st_size < 800_000
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    outputs = [output for cell in cells() for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}  # no error
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)  # no warning
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3


def test_every_script_is_known():
    assert sorted(path.name for path in EXAMPLES.glob("*.sh")) == sorted(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_real_parsers_take_the_options(script, recorded):
    names = []
    for command in recorded(script, *ARGUMENTS[script]):
        target, arguments, _ = program(command)
        names.append(parsed(arguments)[0] if target == "ctxenc" else Path(target).name)
    assert names == SCRIPTS[script]


@pytest.mark.parametrize("script", SCRIPTS)
def test_further_options_reach_the_training(script, recorded):
    commands = recorded(script, *ARGUMENTS[script], "--epochs", "7")
    training = next(each for each in commands if each[-1] == "7")
    target, arguments, _ = program(training)
    assert target != "ctxenc" or parsed(arguments)[1].epochs == 7


def test_lines_of_the_index(recorded, tmp_path):
    text = (EXAMPLES / "README.md").read_text()
    assert sorted(re.findall(r"^\| \[(.*?)\]\(\1\) \|", text, flags=re.M)) == sorted([*SCRIPTS, "tour.ipynb"])
    (block,) = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "lines.sh").write_text(block)
    found = [parsed(program(command)[1])[1] for command in recorded(tmp_path / "lines.sh")]
    for options, thousands in zip(found, (16_788, 3_514), strict=True):
        model = timm.create_model(options.model)
        if "context" in options.arm_names:
            ctxenc.patch_se_blocks(model, **options.swap)
        assert round(sum(each.numel() for each in model.parameters()) / 1000) == thousands


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_without_data_says_how_to_call_it(script):
    done = subprocess.run(["bash", EXAMPLES / script], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert f"usage: bash examples/{script}" in done.stderr


@pytest.mark.parametrize("gpus", [1, 4])
def test_ade20k_is_the_papers_whatever_the_number_of_gpus(gpus, recorded):
    train, _, predict = (program(each) for each in recorded("encnet_ade20k.sh", "some data", GPUS=str(gpus)))
    _, found = parsed(train[1])
    assert train[2] == gpus
    assert found.batch_size * gpus == 16
    papers = SegmentSettings.resolve({"data": "ade20k", "data_dir": "some data"})
    ours = ("backbone", "pretrained_backbone", "batch_size", "workers")
    assert {name for name, value in papers.as_dict().items() if found.as_dict()[name] != value} <= set(ours)
    assert (found.epochs, found.lr, found.se_weight) == (120, 0.01, 0.2)
    _, args = parsed(predict[1])
    assert (args.scales, args.flip, args.crop) == ([0.5, 0.75, 1, 1.25, 1.5, 1.75], True, 480)
    assert args.base_size == 520


@pytest.mark.parametrize(
    ("script", "images"),
    [("imagenet_seresnet50.sh", 1024), ("imagenet_timm_finetune.sh", 1024), ("imagenet_timm_train.sh", 2048)],
)
def test_the_number_of_gpus_does_not_change_the_batch(script, images, recorded):
    for gpus, command in (
        (8, recorded(script, *ARGUMENTS[script])[-1]),
        (2, recorded(script, *ARGUMENTS[script], GPUS="2")[-1]),
    ):
        _, arguments, processes = program(command)
        assert processes == gpus
        assert int(arguments[arguments.index("--batch-size") + 1]) * gpus == images


def test_mixed_targets_become_0_or_1_in_recipe_a2(recorded):
    arguments = recorded("imagenet_timm_train.sh", "TIMM", "DATA")[-1]
    assert "--bce-loss" in arguments
    assert arguments[arguments.index("--bce-target-thresh") + 1] == "0.2"


def test_the_two_fine_tunings_have_one_recipe(recorded):
    ours = recorded("imagenet_seresnet50.sh", "DATA")[-1]
    timms = recorded("imagenet_timm_finetune.sh", "TIMM", "DATA")[-1]
    names = {"--auto-augment": "--aa", "--label-smoothing": "--smoothing", "--ema-decay": "--model-ema-decay"}
    shared = [
        "--epochs",
        "--batch-size",
        "--opt",
        "--lr",
        "--weight-decay",
        "--warmup-epochs",
        "--sched",
        "--clip-grad",
    ]
    for name in [*shared, *names, "--mixup", "--cutmix"]:
        assert ours[ours.index(name) + 1] == timms[timms.index(names.get(name, name)) + 1], name


@pytest.fixture
def example_module(monkeypatch):
    """patched_timm_model.py, imported as --device-modules imports it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("patched_timm_model")


@pytest.mark.parametrize("script", ["imagenet_timm_train.sh", "imagenet_timm_finetune.sh"])
def test_timm_knows_the_models_after_device_modules(script, recorded, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    _, arguments, _ = program(recorded(script, *ARGUMENTS[script])[-1])
    parser = argparse.ArgumentParser()
    parser.add_argument("--device-modules", nargs="+")
    parser.add_argument("--model")
    args, _ = parser.parse_known_args(arguments)
    for name in args.device_modules:
        importlib.import_module(name)
    assert timm.is_model(args.model)
    model = timm.create_model(args.model, num_classes=5, device="meta")
    assert sum(isinstance(module, ContextEncoding) for module in model.modules()) == 16


def test_the_patched_model_starts_from_its_calibration(example_module, tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (300, 250), "white").save(tmp_path / "images" / name / "0.png")

    def calibrate(model, batches):
        assert not model.training
        (images, _labels), *others = batches
        assert (images.shape, others) == ((2, 3, 224, 224), [])
        assert images.amin() > 2  # normalised
        for module in model.modules():
            if isinstance(module, ContextEncoding):
                module.encoding.codewords.data.fill_(3)
        return "the report"

    monkeypatch.setattr(ctxenc, "calibrate", create_autospec(ctxenc.calibrate, side_effect=calibrate))
    out = tmp_path / "start.safetensors"
    example_module.write_start(tmp_path / "images", out, pretrained=False)
    assert capsys.readouterr().out == "the report\n"
    start = timm.create_model("seresnet50_context", checkpoint_path=str(out))
    assert start.pretrained_cfg["architecture"] == "seresnet50"
    assert (start.layer4[2].se.encoding.codewords == 3).all()


@pytest.mark.parametrize("name", ["seresnet50", "resnet50s"])
def test_what_is_fetched_is_there_to_be_had(name):
    assert get_pretrained_cfg(name).has_weights


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    return make_cifar(tmp_path)


@pytest.fixture
def cifar_arguments(cifar, recorded):
    """What cifar10.sh gives to python -m ctxenc, made small."""
    target, arguments, _ = program(*recorded("cifar10.sh", str(cifar)))
    assert target == "ctxenc"
    small = ("--epochs", "1", "--batch-size", "4", "--device", "cpu", "--threads", "1", "--out", str(cifar / "run"))
    before = torch.get_num_threads()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield [*arguments, *small]
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(before)


def test_cifar_compares_the_papers_networks(cifar, cifar_arguments):
    assert main(cifar_arguments) == 0
    trained = {arm: load_run(cifar / "run" / f"{arm}-0").model.state_dict() for arm in ("se", "context")}
    for arm, name in (("se", "seresnet_cifar_64d"), ("context", "encnet_cifar_16k64d")):
        papers = timm.create_model(name).state_dict()
        assert {key: value.shape for key, value in trained[arm].items()} == {
            key: value.shape for key, value in papers.items()
        }
    config = read_config(cifar / "run" / "context-0")
    assert (config.swap["smoothing"], config.swap["pool"], config.settings["opt"]) == ("sampled", "concat", "momentum")
    assert (config.settings["lr"], config.settings["weight_decay"], config.settings["warmup_epochs"]) == (0.1, 5e-4, 0)


def test_cifar_takes_the_registered_network_by_name(cifar, cifar_arguments):
    assert main([*cifar_arguments, "--model", "encnet_cifar_16k64d", "--arms", "se"]) == 0
    model = load_run(cifar / "run").model
    assert sum(isinstance(module, ContextEncoding) for module in model.modules()) == 6
