"""A finite loss whose gradient is not: caught in its step, before the optimiser moves, told of and counted; fp16's scaler."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from ctxenc.training import trainer
from ctxenc.training.nonfinite import nonfinite_gradients
from tests.curves import fp16_on_the_cpu
from tests.training.small_runs import SMALL, checkpoints

ARGUMENTS = ("--model", "test_resnet", "--fill-empty", "--epochs", 2, "--checkpoint-every", 1)
# What lies before the norm that breaks, nearest the loss first.
STEM = [f"conv1.{name}" for name in ("6.weight", "4.bias", "4.weight", "3.weight", "1.bias", "1.weight", "0.weight")]


class BreaksBackward(torch.nn.Module):
    """Is right forward, and sends ``factor`` times its gradient back at some of its calls in training, counted from one."""

    def __init__(self, inner, calls, factor):
        super().__init__()
        self.inner, self.calls, self.factor, self.count = inner, calls, factor, 0

    def forward(self, x):
        self.count += self.training
        if self.training and self.count in self.calls:
            x.register_hook(lambda grad: grad * self.factor)
        return self.inner(x)


@pytest.fixture
def broken(monkeypatch):
    """Makes what comes to the first norm of the networks of all runs to come break in backward at these calls."""
    real = trainer.build_model

    def install(*calls, factor=float("nan")):
        def build(*arguments):
            network = real(*arguments)
            network.bn1 = BreaksBackward(network.bn1, calls, factor)
            return network

        monkeypatch.setattr(trainer, "build_model", build)

    return install


def state(folder):
    """The bytes of all of a checkpoint but its progress, which has timings."""
    names = ("model.safetensors", "optimizer.pt", "processes.pt")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [(), ("--clip-grad", 1)])
def test_stops_in_that_step(refused, tmp_path, broken, image_folder, clip, factor):
    broken(5, factor=factor)
    line = refused("--out", tmp_path / "run", *ARGUMENTS, *clip)
    text, _, named = line.partition("the gradient of step 2 of epoch 2 is not finite, on ")
    images, _, rest = named.partition("; it is NaN or infinite in ")
    assert text.endswith("error: ")
    assert len(set(images.split(", "))) == 2
    assert all(each.startswith(str(image_folder / "train")) for each in images.split(", "))
    folder = tmp_path / "run" / "context-0" / "checkpoints" / "epoch-00001-step-0000001"
    assert rest == f"{', '.join(STEM)}, nearest the loss first; the state before it is {folder}"


def test_the_state_before_is_saved_as_it_was(finetune, refused, tmp_path, broken):
    """Neither weights nor running statistics, the optimiser's state or the generators hold anything of the broken step."""
    arguments = (*ARGUMENTS, "--smoothing", "sampled", "--clip-grad", 0.5, "--keep", 9, "--checkpoint-every")
    broken()
    assert finetune("--out", tmp_path / "whole", *arguments, 1)[0] == 0
    broken(3)
    refused("--out", tmp_path / "run", *arguments, 100)
    name = "epoch-00000-step-0000002"
    assert checkpoints(tmp_path / "run" / "context-0") == [name]
    whole, run = (state(tmp_path / each / "context-0" / "checkpoints" / name) for each in ("whole", "run"))
    assert whole == run


def test_some_may_be_left_out(finetune, tmp_path, broken):
    broken(2, 5)
    code, _, err = finetune("--out", tmp_path / "run", *ARGUMENTS, "--skip-nonfinite", 2, "--model-ema")
    assert code == 0
    assert "the gradient of step 2 of epoch 1 is not finite, on " in err
    assert "left out, 2 of 2 that may be" in err
    folder = tmp_path / "run" / "context-0" / "checkpoints" / "epoch-00002-step-0000000"
    for name in ("model", "ema"):
        assert all(each.isfinite().all() for each in load_file(folder / f"{name}.safetensors").values())
    assert json.loads((folder / "progress.json").read_text())["skipped"] == 2


def test_no_more_than_those(refused, tmp_path, broken):
    broken(2, 5)
    line = refused("--out", tmp_path / "run", *ARGUMENTS, "--skip-nonfinite", 1)
    assert "the gradient of step 2 of epoch 2 is not finite" in line


def test_a_step_left_out_moves_nothing(finetune, tmp_path, broken):
    """With every step left out the weights are those of the beginning, and the steps before and after are the next one's."""
    broken(*range(1, 7))
    assert finetune("--out", tmp_path / "out", *ARGUMENTS, "--skip-nonfinite", 6, "--keep", 9)[0] == 0
    folder = tmp_path / "out" / "context-0" / "checkpoints"
    weights = [load_file(each / "model.safetensors") for each in sorted(folder.iterdir())]
    assert len(weights) == 6
    for each in weights[1:]:
        assert all(torch.equal(value, weights[0][name]) for name, value in each.items())


def test_what_is_told_of_the_parameters():
    network = torch.nn.Sequential(*(torch.nn.Linear(1, 1, bias=False) for _ in range(4)))
    for number, each in enumerate(network):
        each.weight.grad = torch.tensor([[float("inf") if number < 3 else 1.0]])
    assert (
        nonfinite_gradients(network, 9)
        == "it is NaN or infinite in 2.weight, 1.weight, 0.weight, nearest the loss first"
    )
    assert (
        nonfinite_gradients(network, 2)
        == "it is NaN or infinite in 2.weight, 1.weight and 1 more, nearest the loss first"
    )
    for each in network:
        each.weight.grad = torch.tensor([[2e38]])
    network[0].weight.grad = None
    assert nonfinite_gradients(network, 2) == "each number of it is finite, but its norm is not"


def test_a_norm_beyond_fp32_is_not_finite_either(refused, tmp_path, broken):
    """AdamW squares it: its second moment would stay infinite, and the weight where it is, for good."""
    broken(2, factor=1e25)
    line = refused("--out", tmp_path / "run", *ARGUMENTS)
    assert "the gradient of step 2 of epoch 1 is not finite, on " in line
    assert "; each number of it is finite, but its norm is not; " in line


# With fp16 the first gradients are infinite as a rule, until the scale of the loss fits.


@pytest.fixture
def fp16(monkeypatch):
    """Makes runs to come train in fp16, with this scale at first."""
    return lambda scale: fp16_on_the_cpu(monkeypatch, scale)


def saved(run, name):
    folder = run / "context-0" / "checkpoints" / name
    return torch.load(folder / "optimizer.pt"), json.loads((folder / "progress.json").read_text())


@pytest.mark.parametrize("clip", [(), ("--clip-grad", 1)])
def test_fp16_finds_its_scale(finetune, tmp_path, broken, fp16, clip):
    """Gradients that overflow at a scale above 1 neither stop the run nor count, and move nothing."""
    broken(1, 2)
    fp16(1024.0)
    assert finetune("--out", tmp_path / "run", *ARGUMENTS, *clip, "--keep", 9)[0] == 0
    states = [saved(tmp_path / "run", name) for name in checkpoints(tmp_path / "run" / "context-0")]
    assert [each["scaler"]["scale"] for each, _ in states] == [512, 256, 256, 256, 256, 256]
    assert [len(each["optimizer"]["state"]) > 0 for each, _ in states] == [False, False, True, True, True, True]
    assert all(progress["skipped"] == 0 for _, progress in states)
    assert states[1][1]["finite"] == 2  # its loss is one


def test_fp16_goes_on_no_longer_than_there_is_a_scale(refused, tmp_path, broken, fp16):
    """What is not finite unscaled is none of the scaler's."""
    broken(*range(2, 9))
    fp16(4.0)
    line = refused("--out", tmp_path / "run", *ARGUMENTS, "--keep", 9)
    assert "the gradient of step 1 of epoch 2 is not finite, on " in line  # the fourth: after 4 and 2 the scale is 1
    assert checkpoints(tmp_path / "run" / "context-0")[-1] == "epoch-00001-step-0000000"
    kept, progress = saved(tmp_path / "run", "epoch-00001-step-0000000")
    assert kept["scaler"]["scale"] == 1
    assert progress["skipped"] == 0


def test_fp16_leaves_out_those_too(finetune, tmp_path, broken, fp16, monkeypatch):
    """And a loss that is not finite; the scaler takes the gradients after them."""
    broken(2, 3)
    fp16(1.0)
    real = trainer.Trainer.loss

    def loss(own, *batch):
        return real(own, *batch) * (float("nan") if (own.progress.epoch, own.progress.step) == (1, 1) else 1)

    monkeypatch.setattr(trainer.Trainer, "loss", loss)
    code, _, err = finetune("--out", tmp_path / "run", *ARGUMENTS, "--skip-nonfinite", 3)
    assert code == 0
    assert "the loss of step 2 of epoch 2 is nan, on " in err
    assert "left out, 3 of 3 that may be" in err
    folder = tmp_path / "run" / "context-0" / "checkpoints" / "epoch-00002-step-0000000"
    kept, progress = saved(tmp_path / "run", folder.name)
    assert kept["scaler"]["scale"] == 0.125
    assert progress["skipped"] == 3
    assert all(each.isfinite().all() for each in load_file(folder / "model.safetensors").values())


@pytest.mark.figures
def test_fp16_clips_the_gradient_not_its_multiple(finetune, tmp_path, broken, fp16):
    """What SGD changes, which goes with the size of the gradient, is the same whatever the scale."""
    changes = []
    for scale in (1.0, 512.0):
        broken()
        fp16(scale)
        run = tmp_path / str(scale)
        more = ("--opt", "sgd", "--lr", 0.1, "--clip-grad", 0.5, "--keep", 9)
        assert finetune("--out", run, *ARGUMENTS, *more)[0] == 0
        folder = run / "context-0" / "checkpoints"
        first, *_, last = (load_file(each / "model.safetensors") for each in sorted(folder.iterdir()))
        changes.append(torch.cat([(last[name] - first[name]).flatten() for name in first if name.endswith("weight")]))
    assert (changes[0] - changes[1]).norm() < 0.2 * changes[0].norm()  # 0.003 to 0.012


PROGRAM = """
import os, sys
from ctxenc.__main__ import main
from ctxenc.training import trainer
from tests.training.test_nonfinite import BreaksBackward

def build(*arguments, real=trainer.build_model):
    network = real(*arguments)
    network.bn1 = BreaksBackward(network.bn1, [2] if os.environ["RANK"] == "1" else [3], float("nan"))
    return network

trainer.build_model = build
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_processes_decide_alike(tmp_path, image_folder):
    """The gradient of one is not finite, then that of the other: both leave the step out, then both stop."""
    (tmp_path / "program.py").write_text(PROGRAM)
    more = ("--batch-size", "1", "--image-size", "64", "--skip-nonfinite", "1", "--out", tmp_path / "run")
    command = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "program.py", "finetune")
    arguments = map(str, (*command, "--data", image_folder, *SMALL, *ARGUMENTS, *more))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode
    assert done.stderr.count("the gradient of step 2 of epoch 1 is not finite, on ") == 1, done.stderr
    assert done.stderr.count("left out, 1 of 1 that may be") == 1
    (line,) = [each for each in done.stderr.splitlines() if "ctxenc: error: " in each]
    images = line.partition("the gradient of step 3 of epoch 1 is not finite, on ")[2].partition("; ")[0]
    assert len(set(images.split(", "))) == 2  # one of each process
    kept, progress = saved(tmp_path / "run", checkpoints(tmp_path / "run" / "context-0")[-1])
    assert (progress["step"], progress["skipped"]) == (2, 1)
    assert len(kept["optimizer"]["state"])
