"""A small run folder as finetune would leave it, without the training; and a small fine-tuning."""

from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from ctxenc.__main__ import main
from ctxenc.runs import folders
from ctxenc.runs.config import RunConfig, write_config
from ctxenc.training.settings import Settings
from tests.training.small_runs import DATA_CONFIG, SMALL

CLASSES = ["cat", "dog", "newt"]


def make_config(swap, settings):
    return RunConfig(
        model="test_efficientnet",
        model_kwargs={},
        classes=CLASSES,
        swap=swap,
        data_config=DATA_CONFIG,
        settings=settings,
        versions=folders.installed_versions(),
    )


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps precision and device for the life of a process; each test has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Noise of three classes in train/ and val/, the latter with unequal numbers of images a class."""
    folder = tmp_path_factory.mktemp("data") / "animals"
    generator = torch.Generator().manual_seed(0)
    for split, counts in {"train": (2, 2, 2), "val": (6, 3, 1)}.items():
        for name, count in zip(CLASSES, counts, strict=True):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(256, (40, 48, 3), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def config(image_folder):
    return make_config({"num_codes": 4}, Settings(data=str(image_folder)).as_dict())


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, config):
    """Arms se-0, context-0 (best at the last epoch) and context-1 (best of all, but not at the last epoch)."""
    run = tmp_path_factory.mktemp("runs") / "run"
    scores = {"se-0": (0.95, 0.96), "context-0": (0.5, 0.8), "context-1": (0.9, 0.4)}
    generator = torch.Generator().manual_seed(0)
    for arm, (best, last) in scores.items():
        folder = run / arm
        folder.mkdir(parents=True)
        own = replace(config, swap=None) if arm.startswith("se") else config
        write_config(folder, own)
        model = folders.build_model(own)
        for name in folders.CHECKPOINTS:
            for tensor in model.parameters():
                tensor.data.add_(torch.randn(tensor.shape, generator=generator), alpha=0.02)
            folders.save_weights(folder / f"{name}.safetensors", model)
        lines = (f"epoch,{folders.SCORE}", f"0,{best}", f"1,{last}")
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return run


@pytest.fixture(autouse=True, scope="module")
def threads():
    """The command sets the number of threads of the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def finetune(image_folder, capsys):
    """Runs the command on the small folder; gives the exit code, stdout and stderr."""

    def run(*arguments, data=image_folder):
        code = main(["finetune", "--data", str(data), *SMALL, *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(finetune):
    """Runs the command, which must fail as a mistake of the user; gives its last line."""

    def run(*arguments, **keywords):
        code, out, err = finetune(*arguments, **keywords)
        assert code == 2, (code, out, err)
        assert "Traceback" not in err
        line = err.strip().splitlines()[-1]
        assert line.startswith("ctxenc: error: ")
        return line

    return run


@pytest.fixture(scope="session")
def done(tmp_path_factory, image_folder):
    """Both arms, two seeds, two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "new" / "run"
    arguments = ("--data", image_folder, *SMALL, "--out", folder)
    assert main(["finetune", *map(str, arguments), "--arms", "both", "--seeds", "2", "--epochs", "2"]) == 0
    return folder


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "taken"


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"
