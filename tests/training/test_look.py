"""The command look, on small runs, checkpoints, and names of models."""

import json
from argparse import Namespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import ctxenc
from ctxenc.__main__ import main
from ctxenc.integrations import EncNet, save_encnet_checkpoint
from ctxenc.runs.errors import UserError
from ctxenc.training import looking as command
from ctxenc.training.prediction import read_names
from ctxenc.training.segmentation import scenes
from ctxenc.viz import codebook_usage


@pytest.fixture
def look(tmp_path, capsys):
    """Runs the command; gives the exit code, stdout, stderr, and the size of each picture by its name."""

    def run(*arguments):
        code = main(["look", "--out", str(tmp_path / "out"), "--device", "cpu", *map(str, arguments)])
        sizes = {}
        for path in sorted((tmp_path / "out").glob("*")):
            with Image.open(path) as picture:
                assert np.asarray(picture.convert("L")).std() > 5  # something is drawn
                sizes[path.name] = picture.size
        return code, *capsys.readouterr(), sizes

    return run


@pytest.fixture
def refused(look):
    """Runs a command line that must fail as a mistake of the user; gives the message."""

    def run(*arguments):
        code, out, err, sizes = look(*arguments)
        assert (code, out, err.count("\n"), sizes) == (2, "", 1, {}), (code, out, err, sizes)
        return err.strip().removeprefix("ctxenc: error: ")

    return run


@pytest.fixture(scope="module")
def encnet(tmp_path_factory):
    """A checkpoint of a tiny EncNet."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "encnet.safetensors"
    save_encnet_checkpoint(EncNet("test_resnet", 3, num_codes=4, channels=8, aux=False), path)
    return path


BLOCKS = ["blocks.3.0.se", "blocks.4.0.se"]


def test_a_run_of_finetune(look, run_folder, image_folder):
    code, out, err, sizes = look(run_folder, image_folder / "val", "--count", 2)
    assert (code, err) == (0, "")
    assert list(sizes) == [f"{name}.png" for name in BLOCKS]
    assert all(width == 1200 and 700 < height < 1600 for width, height in sizes.values())
    lines = out.splitlines()
    assert lines[0] == f"{run_folder / 'context-0'} (arm context, seed 0), best checkpoint"
    assert [line.split()[0] for line in lines[3:5]] == BLOCKS
    assert lines[-1].startswith("2 images: ")
    # What is printed is what the network of the run gives, its colours included.
    images = [image_folder / "val" / "cat" / "0.png", image_folder / "val" / "newt" / "0.png"]
    for name, line in zip(BLOCKS, lines[3:5], strict=True):
        usage = codebook_usage(ctxenc.load(run_folder), images, name, mean=(0.5,) * 3, std=(0.5,) * 3, image_size=32)
        numbers = (f"{each:.2f}" for each in (usage.entropy, usage.pixel_entropy, usage.bits))
        assert line.split()[2:] == ["4", *numbers, str(len(usage.dead))]


def test_a_checkpoint_of_encnet_also_shows_presence(look, encnet, image_folder):
    image = image_folder / "val" / "cat" / "0.png"
    code, out, _, sizes = look(encnet, image, "--codewords", 1, 3)
    assert code == 0
    assert list(sizes) == ["encoding.context.png", "presence.png"]
    assert all(width == 1200 for width, _ in sizes.values())
    assert out.splitlines()[-1].startswith("1 image: ")


def test_a_model_by_name_is_patched_at_random_and_said_to_be(look, monkeypatch):
    read = []
    monkeypatch.setattr(
        command.photographs, "read_photograph", lambda name: read.append(name) or Image.new("RGB", (40, 30), "teal")
    )
    code, out, _, sizes = look("test_efficientnet", "--blocks", 1)
    assert code == 0
    assert list(sizes) == [f"{BLOCKS[-1]}.png"]
    assert out.splitlines()[0].startswith("test_efficientnet was patched and has no trained weights")
    assert tuple(read) == command.SHOWN


def test_embedded_photographs_exist():
    names, images = command.choose_pictures([], None, 9)
    assert names == ["astronaut", "chelsea", "coffee", "brick"]
    assert all(isinstance(image, Image.Image) for image in images)


def test_a_network_of_the_embedded_scenes_gets_scenes(monkeypatch):
    monkeypatch.setattr(scenes, "TEST_SCENES", 2)
    assert len(command.choose_pictures([], list(scenes.CLASSES), 2**70)[1]) == 2
    monkeypatch.undo()
    names, images = command.choose_pictures([], list(scenes.CLASSES), 5)
    assert names == ["street", "space", "slide", "hoard", "street"]
    test = scenes.Scenes(train=False, length=5)
    assert all(torch.equal(image, test[index][0]) for index, image in enumerate(images))


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (["all"], list("abcdefg")),
        (["1"], ["g"]),
        (["2"], ["a", "g"]),
        (["3"], ["a", "d", "g"]),
        (["9"], list("abcdefg")),
        (["f", "b", "f"], ["f", "b"]),
    ],
)
def test_blocks_are_chosen(given, chosen):
    assert command.choose("abcdefg", given, "net") == chosen


@pytest.fixture(scope="module")
def timm_checkpoint(tmp_path_factory):
    """A checkpoint of timm's train.py of five classes, with averaged weights, and the module that registers its network."""
    folder = tmp_path_factory.mktemp("timm")
    (folder / "my_networks.py").write_text(
        "import timm, ctxenc\n"
        "from timm.models import register_model\n"
        "@register_model\n"
        "def my_context_network(pretrained=False, **kwargs):\n"
        "    return ctxenc.patch_se_blocks(timm.create_model('test_efficientnet', **kwargs), num_codes=4, aggregation='sum')\n"
    )
    torch.manual_seed(0)
    network = ctxenc.patch_se_blocks(
        timm.create_model("test_efficientnet", num_classes=5), num_codes=4, aggregation="sum"
    )
    averaged = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    plain = {name: torch.zeros_like(tensor) for name, tensor in averaged.items()}
    args = Namespace(img_size=32, mean=[0.5, 0.5, 0.5], std=[0.5], device_modules=["os"], model_kwargs={})
    path = folder / "last.pth.tar"
    torch.save({"epoch": 3, "arch": "x", "args": args, "state_dict": plain, "state_dict_ema": averaged}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield path, network.eval()


NETWORK = ("--model", "my_context_network", "--device-modules", "my_networks")


def test_a_checkpoint_of_timm(look, timm_checkpoint, image_folder):
    path, network = timm_checkpoint
    image = image_folder / "val" / "cat" / "0.png"
    code, out, err, sizes = look(path, image, *NETWORK)
    assert (code, err) == (0, "")
    assert list(sizes) == [f"{name}.png" for name in BLOCKS]
    assert out.splitlines()[0] == f"{path}, EMA checkpoint"
    for name, line in zip(BLOCKS, out.splitlines()[3:5], strict=True):  # at the size of its training, averaged weights
        usage = codebook_usage(network, [image], name, mean=(0.5,) * 3, std=(0.5,) * 3, image_size=32)
        assert line.split()[3:6] == [f"{each:.2f}" for each in (usage.entropy, usage.pixel_entropy, usage.bits)]
    code, _, err, _ = look(path, image, *NETWORK, "--image-size", 40)
    assert code == 0
    assert err == 'ctxenc: warning: aggregation "sum" was trained at 32: at 40 the gates differ\n'


def test_predict_takes_it_too(timm_checkpoint, image_folder, tmp_path, capsys):
    path, network = timm_checkpoint
    image = image_folder / "val" / "cat" / "0.png"
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\ne\n")
    command = ["predict", str(path), str(image), *NETWORK, "--json", "--device", "cpu"]
    assert main(command) == 0
    (numbers,) = json.loads(capsys.readouterr().out)
    assert main([*command, "--classes", str(names)]) == 0
    (letters,) = json.loads(capsys.readouterr().out)
    config = timm.data.resolve_data_config({"img_size": 32, "mean": [0.5] * 3, "std": [0.5]}, model=network)
    with Image.open(image) as picture, torch.no_grad():
        expected = network(timm.data.create_transform(**config)(picture.convert("RGB"))[None]).softmax(1)[0]
    ranked = expected.sort(descending=True)
    assert [each["class"] for each in numbers["classes"]] == [str(index) for index in ranked.indices.tolist()]
    assert [each["class"] for each in letters["classes"]] == ["abcde"[index] for index in ranked.indices]
    assert [each["probability"] for each in letters["classes"]] == pytest.approx(ranked.values.tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("text", "said"), [("\ufeffa\nb\n\n", None), ("a\n\nb", "got 3, 1 of them empty"), ("a", "got 1")]
)
def test_names_of_classes(text, said, tmp_path):
    path = tmp_path / "names.txt"
    path.write_text(text, encoding="utf-8")
    if said is None:
        assert read_names(path, 2) == ["a", "b"]
    else:
        with pytest.raises(UserError, match=said):
            read_names(path, 2)


def test_mistakes_with_a_checkpoint_of_timm(refused, timm_checkpoint, tmp_path):
    path, _ = timm_checkpoint
    assert refused(path, *NETWORK[:2], "--device-modules", "nothing_such").startswith(
        "--device-modules: cannot import nothing_such: "
    )
    (tmp_path / "broken_code.py").write_text('raise RuntimeError("boom")')
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        said = refused(path, *NETWORK[:2], "--device-modules", "broken_code")
    assert said == "--device-modules: cannot import broken_code: RuntimeError: boom"
    assert refused(path, *NETWORK, "--checkpoint", "last").startswith("--checkpoint last is for runs; with --model, ")
    assert refused(path, *NETWORK[2:]).startswith("--device-modules needs --model")
    assert refused(path, "--model", "test_efficientne").startswith("unknown model 'test_efficientne'; near names: ")
    wrong = refused(path, "--model", "test_efficientnet")
    assert wrong.endswith("; it is of a swapped network, the model is not swapped")
    assert refused(tmp_path / "none.pth.tar", *NETWORK).endswith("cannot be read: No such file or directory")
    torch.save({"state_dict": Namespace, "code": print}, tmp_path / "code.pth.tar")
    assert "which could run code" in refused(tmp_path / "code.pth.tar", *NETWORK)


def test_mistakes(refused, tmp_path, run_folder, image_folder, encnet):
    image = image_folder / "val" / "cat" / "0.png"
    assert refused("seresnet5").startswith("unknown model 'seresnet5'; near names: ")
    assert refused("resnet18").startswith("resnet18: patch_se_blocks: model must have SE blocks")
    assert refused("runs/none") == "no run or checkpoint at runs/none"
    assert "is no run folder" in refused(tmp_path)
    assert refused(run_folder / "se-0", image).endswith("has no ContextEncoding or Encoding block to look into")
    wrong = refused(run_folder, image, "--blocks", "blocks.3.se")
    assert wrong.endswith(" has no block 'blocks.3.se'; near names: blocks.3.0.se, blocks.4.0.se")
    assert refused(encnet, image, "--codewords", 4).startswith("--codewords: overview: codewords must be from 0 to 3")
    assert refused(encnet, "nowhere.png") == "no such image, folder or glob: nowhere.png"
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    assert refused(encnet, broken).startswith(f"broken image {broken}")
    assert refused(encnet, image, "--device", "nonsense").startswith("device 'nonsense' cannot be used")
    assert "broken.png" in refused(broken, image)


def test_an_image_that_the_network_refuses(refused, image_folder, monkeypatch):
    def assertion(*_, **__):
        raise AssertionError("Input height (40) doesn't match model (224).")

    monkeypatch.setattr(command, "look", assertion)
    image = image_folder / "val" / "cat" / "0.png"
    wrong = refused("test_efficientnet", image)
    assert wrong == "test_efficientnet cannot run on these images: Input height (40) doesn't match model (224)."


def test_a_folder_that_cannot_be_written(tmp_path, encnet, image_folder, capsys):
    (tmp_path / "file").write_text("")
    image = image_folder / "val" / "cat" / "0.png"
    assert main(["look", str(encnet), str(image), "--out", str(tmp_path / "file" / "out"), "--device", "cpu"]) == 2
    assert f"--out {tmp_path / 'file' / 'out'} cannot be written" in capsys.readouterr().err
