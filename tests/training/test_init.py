"""How the blocks of a fine-tuned network begin: calibrated, neutral or random."""

import re

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ctxenc
from ctxenc.__main__ import main
from ctxenc.runs import folders
from ctxenc.runs.errors import UserError
from ctxenc.training.settings import Settings
from tests.training.small_runs import SMALL, assert_same_run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of 12 noisy images each, bright and dark."""
    folder = tmp_path_factory.mktemp("data") / "tones"
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("val", 2)):
        for name, low in (("bright", 120), ("dark", 0)):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = low + torch.randint(130, (40, 40, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture
def finetune(images, tmp_path):
    def run(out, *arguments):
        command = ["finetune", "--data", str(images), *SMALL, "--num-codes", "4", "--epochs", "1", "--lr", "1e-9"]
        assert main([*command, "--warmup-epochs", "0", "--out", str(tmp_path / out), *map(str, arguments)]) == 0
        return tmp_path / out

    return run


def test_each_start_is_what_it_says(finetune):
    """At a learning rate of next to nothing the weights are those of the start."""
    biases, reports = {}, {}
    for start in ("calibrated", "neutral", "random"):
        run = finetune(start, "--init", start)
        blocks = [
            each for each in ctxenc.load(run / "context-0", checkpoint="last").modules() if hasattr(each, "rd_channels")
        ]
        biases[start] = torch.cat([block.fc.weight.flatten() for block in blocks])
        report = run / "context-0" / "calibration.txt"
        reports[start] = report.read_text() if report.exists() else ""
    assert reports["random"] == ""
    assert reports["calibrated"].startswith("calibrated start, 18 images fitted, 6 held out\n")
    assert re.search(r"blocks\.3\.0\.se +-?\d\.\d+", reports["calibrated"])
    assert reports["neutral"].startswith("neutral start")
    assert biases["neutral"].abs().max() < 1e-6
    assert biases["calibrated"].abs().max() > 1e-3
    assert not torch.allclose(biases["calibrated"], biases["random"], atol=1e-3)


def test_the_se_arm_is_left_alone_and_equal_runs_are_equal(finetune):
    one = finetune("one", "--init", "calibrated", "--arms", "both")
    other = finetune("other", "--init", "calibrated", "--arms", "both")
    assert not (one / "se-0" / "calibration.txt").exists()
    assert_same_run(one, other, ["se-0", "context-0"])


def test_pretrained_weights_are_calibrated_to_unless_told_otherwise():
    assert Settings.resolve({}).start == "random"
    pretrained = {"pretrained": True, "model": "seresnet50"}
    assert Settings.resolve(pretrained).start == "calibrated"
    assert Settings.resolve({"initial_checkpoint": "x"}).start == "calibrated"
    assert Settings.resolve(pretrained | {"init": "random"}).start == "random"
    with pytest.raises(UserError, match="--pretrained and --initial-checkpoint x: take one"):
        Settings.resolve(pretrained | {"initial_checkpoint": "x"})
    with pytest.raises(UserError, match=r"--pretrained: timm has no weights .* give a --model"):
        Settings.resolve({"pretrained": True})
    with pytest.raises(UserError, match="--init must be 'calibrated', 'neutral' or 'random', got 'warm'"):
        Settings.resolve({"init": "warm"})


def test_too_few_images(image_folder, tmp_path, capsys):
    """Six, and a quarter of them held out, are enough; a network without anything to hold out is not."""
    folder = tmp_path / "few"
    for split in ("train", "val"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(folder / split / name / "0.png")
    command = [
        "finetune",
        "--data",
        str(folder),
        *SMALL,
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
        "--init",
        "calibrated",
    ]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "--init calibrated: calibrate: batches must hold two images to fit" in capsys.readouterr().err


@pytest.fixture
def weights(tmp_path):
    """The weights of an SE network of five classes."""
    torch.manual_seed(0)
    path = tmp_path / "se.safetensors"
    save_file(timm.create_model("test_efficientnet", num_classes=5).state_dict(), path)
    return path


class TestInitialCheckpoint:
    @pytest.fixture
    def model(self):
        return timm.create_model("test_efficientnet", num_classes=2)

    def test_all_but_the_classifier_of_other_classes_is_taken(self, weights, model):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        folders.load_initial(model, weights)
        stored = load_file(weights)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, (before if name.startswith("classifier.") else stored)[name]), name

    def test_that_of_as_many_classes_is_taken_too(self, weights):
        model = timm.create_model("test_efficientnet", num_classes=5)
        folders.load_initial(model, weights)
        stored = load_file(weights)
        assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())

    def test_the_averaged_weights_of_a_checkpoint_of_timm(self, tmp_path, model):
        average = {name: tensor + 1 for name, tensor in model.state_dict().items()}
        plain = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": plain, "state_dict_ema": average}, tmp_path / "last.pth.tar")
        folders.load_initial(model, tmp_path / "last.pth.tar")
        assert all(torch.equal(tensor, average[name]) for name, tensor in model.state_dict().items())

    def test_a_run_goes_on_from_the_se_network_of_another(self, finetune):
        first = finetune("first", "--arms", "both", "--lr", "1e-2")
        second = finetune("second", "--arms", "both", "--initial-checkpoint", first)
        began, went_on = (load_file(run / "se-0" / "best.safetensors") for run in (first, second))
        assert all(
            torch.allclose(went_on[name], began[name], atol=1e-6) for name in began if name.endswith(("weight", "bias"))
        )
        assert (second / "context-0" / "calibration.txt").exists()

    def test_resuming_does_not_need_it(self, finetune, weights):
        run = finetune("run", "--initial-checkpoint", weights, "--init", "random")
        weights.unlink()
        assert main(["finetune", "--resume", str(run)]) == 0

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "cannot be read: "),
            (b"no weights", "must be what torch.save wrote of tensors"),
            ({"conv_stem.weight": torch.zeros(3)}, "does not fit the model: the network bn1.weight, "),
            ({"conv_stem.weight": 3}, "a state dict must hold tensors, got int at 'conv_stem.weight'"),
            ([1, 2], "is no file of weights: "),
            (
                {"blocks.3.0.se.encoding.codewords": torch.zeros(3)},
                "it is of a swapped network, the model is not swapped",
            ),
            ({"model": Exception}, "is no file of weights: "),
        ],
    )
    def test_what_is_refused(self, content, message, tmp_path, model, caplog):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        path = tmp_path / "weights.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            folders.load_initial(model, path)
        assert f"--initial-checkpoint {path} " in str(caught.value)
        assert "weights_only=False" not in str(caught.value)
        assert not caplog.records
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
