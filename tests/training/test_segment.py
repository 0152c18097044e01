"""segment train and segment predict, through the command line, on made-up images and on the scenes."""

import json

import pytest
import torch
from PIL import Image

from ctxenc.__main__ import main
from ctxenc.integrations import EncNet, inference, save_encnet_checkpoint
from ctxenc.runs import segment_config
from ctxenc.runs.config import read_config
from ctxenc.runs.segment_config import SegmentConfig, build_network
from ctxenc.training.checkpoint import read_rows
from ctxenc.training.segmentation import segment_prediction, segment_settings, segment_trainer
from ctxenc.training.segmentation.arms import ARMS, arm_configs
from ctxenc.training.segmentation.segment_settings import SEVERAL
from tests.training.small_runs import SEGMENT, make_pairs


@pytest.fixture
def folder(tmp_path):
    return make_pairs(tmp_path / "data")


def train(folder, out, *more):
    return main(["segment", "train", "--data", str(folder), "--out", str(out), *SEGMENT, *more])


def test_train_writes_a_run_that_predict_takes(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(folder, out, "--lr", "0.02") == 0
    rows = read_rows(out / "encnet-0" / "metrics.csv")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[0]["lr"] > rows[1]["lr"] > 0
    assert {"iou/dark", "iou/light", "mean_iou", "pixel_accuracy", "mean_dice", "train_loss"} < rows[0].keys()
    written = {path.name for path in (out / "encnet-0").iterdir()}
    assert {"best.safetensors", "last.safetensors", "config.json", "pictures", "checkpoints"} < written
    with Image.open(out / "encnet-0" / "pictures" / "epoch-002.png") as picture:
        assert picture.width > 3 * 44
    assert "EncNet" in (out / "report.md").read_text()
    health = read_rows_of(out / "encnet-0" / "codebooks.csv")[-1].split(",")
    assert float(health[6]) < 0.1
    assert f"EncNet: after the last epoch the codebook of {health[1]} (" in (out / "report.html").read_text()
    printed, told = capsys.readouterr()
    assert "mIoU" in printed
    lines = told.splitlines()  # no progress bar where stderr is no terminal
    assert [line.partition(", loss ")[0] for line in lines] == [f"encnet, seed 0: epoch {each} of 2" for each in (1, 2)]
    image = folder / "images" / "val" / "1.png"
    masks = tmp_path / "masks"
    assert main(["segment", "predict", str(out), str(image), "--out", str(masks), "--flip"]) == 0
    assert sorted(path.name for path in masks.iterdir()) == ["1.mask.png", "1.overlay.png"]
    with Image.open(masks / "1.mask.png") as mask, Image.open(image) as photograph:
        assert (mask.mode, mask.size) == ("P", photograph.size)
        assert max(mask.getextrema()) <= 1


def test_all_arms_and_seeds_have_a_row_in_the_report(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "run", "--arms", "all", "--seeds", "2", "--epochs", "1") == 0
    report = (tmp_path / "run" / "report.md").read_text()
    assert all(f"| {name} |" in report for name, _ in ARMS.values())
    assert "±" in report
    assert len(read_rows_of(tmp_path / "run" / "metrics.csv")) == 8


def read_rows_of(path):
    return path.read_text().splitlines()[1:]


def test_arms_differ_in_their_context_alone():
    chosen = segment_settings.SegmentSettings(backbone="test_resnet", channels=16, num_codes=4, arms="all")
    configs = arm_configs(chosen, ["a", "b"])
    assert tuple(configs) == SEVERAL["all"] == tuple(ARMS)
    built = {arm: build_network(config) for arm, config in configs.items()}
    shared = set.intersection(*({*network.state_dict()} for network in built.values()))
    assert {name.partition(".")[0] for name in shared} == {"backbone", "reduce", "classifier", "aux"}
    x = torch.randn(2, 3, 32, 32)
    assert {arm: sorted(network(x)) for arm, network in built.items()} == {
        "fcn": ["aux", "out"],
        "fcn_se": ["aux", "out"],
        "encnet_no_se_loss": ["aux", "out"],
        "encnet": ["aux", "out", "se"],
    }
    assert isinstance(built["fcn"].encoding, segment_config.NoContext)
    assert isinstance(built["fcn_se"].encoding, segment_config.PooledContext)


def test_the_head_learns_faster_and_codewords_do_not_decay():
    chosen = segment_settings.SegmentSettings(
        backbone="test_resnet", channels=16, num_codes=4, lr=0.01, weight_decay=0.1
    )
    network = EncNet("test_resnet", 3, channels=16, num_codes=4)
    optimizer = segment_trainer.make_optimizer(network, chosen)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    assert len(groups) == len(list(network.parameters()))
    for name, parameter in network.named_parameters():
        group = groups[id(parameter)]
        assert group["lr"] == pytest.approx(0.01 if name.startswith("backbone.") else 0.1)
        assert group["weight_decay"] == (0 if name.endswith((".codewords", ".smoothing")) else 0.1)
        assert group["momentum"] == 0.9


def test_configuration_goes_through_a_file_and_refuses_others(tmp_path, folder, capsys):
    assert train(folder, tmp_path / "run", "--epochs", "1") == 0
    path = tmp_path / "run" / "encnet-0" / "config.json"
    config = read_config(path.parent, SegmentConfig)
    assert config.classes == ["dark", "light"]
    table = json.loads(path.read_text())
    for change in (
        {"context": "other"},
        {"mean": [1]},
        {"std": [0.1, 1e-320, 0.1]},
        {"network": {"pretrained_backbone": True}},
        {"kind": "finetune"},
    ):
        path.write_text(json.dumps(table | change))
        arguments = ["segment", "predict", str(path.parent), str(folder / "images" / "val")]
        assert main(arguments) == 2
        assert f"{path}: {next(iter(change))}{'.1' if 'std' in change else ''} must " in capsys.readouterr().err


@pytest.mark.parametrize("form", ["save_pretrained", "safetensors"])
def test_predict_takes_other_checkpoints(tmp_path, folder, form, capsys, monkeypatch):
    network = EncNet("test_resnet", 3, channels=16, num_codes=4).eval()
    checkpoint = tmp_path / ("saved" if form == "save_pretrained" else "network.safetensors")
    network.save_pretrained(checkpoint) if form == "save_pretrained" else save_encnet_checkpoint(network, checkpoint)
    names = tmp_path / "names.txt"
    names.write_text("sky\nsea\nsand\n")
    long = "x" * 240  # of 255 letters that a file system takes
    Image.new("RGB", (44, 30)).save(folder / "images" / "val" / f"{long}.png")
    arguments = ["segment", "predict", str(checkpoint), str(folder / "images" / "val")]
    arguments += ["--out", str(tmp_path / "masks"), "--classes", str(names), "--crop", "24", "--scales", "0.5", "1"]
    shown = []
    monkeypatch.setattr(
        segment_prediction,
        "predict",
        lambda *args, **options: shown.append(options) or inference.predict(*args, **options),
    )
    assert main([*arguments, "--base-size", "50"]) == 0
    assert {(tuple(each["scales"]), each["base_size"], each["crop"]) for each in shown} == {((0.5, 1.0), 50, 24)}
    assert len(list((tmp_path / "masks").iterdir())) == 6
    assert (tmp_path / "masks" / f"{long}.overlay.png").is_file()


def test_predict_leaves_out_broken_images(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_encnet_checkpoint(EncNet("test_resnet", 2, channels=16, num_codes=4), tmp_path / "a.safetensors")
    (tmp_path / "broken.png").write_text("no image")
    command, more = ["segment", "predict", "a.safetensors", "broken.png"], ["--skip-broken", "--device", "cpu"]
    assert main([*command, *more]) == 2
    assert "broken.png cannot be read" in capsys.readouterr().err
    assert main([*command, str(folder / "images" / "val" / "0.png"), *more]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("ctxenc: skipped broken image broken.png")
    assert out.splitlines()[-1] == "1 image: runs/predict/*.{overlay,mask}.png"
    assert sorted(path.name for path in (tmp_path / "runs" / "predict").iterdir()) == ["0.mask.png", "0.overlay.png"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train", "--backbone", "vovnet39a"], "cannot build the network: EncNet: backbone must be one that timm can"),
        (["train", "--opt", "nothing"], "unknown --opt 'nothing'"),
        (["train", "--backbone", "resnet18.nonsense"], "unknown model 'resnet18.nonsense'"),
        (["train", "--crop-size", "100000000"], "cannot run on crops of 100000000"),
        (["train", "--scale-max", "1e9"], "--scale-max must be less than or equal to 16"),
        (["train", "--amp", "fp16"], "--amp fp16 needs a GPU"),
        (["train", "--data", "scenes", "--rotate", "3"], "--rotate has no part in --data scenes"),
        (["train", "--resume", "nowhere"], "--resume: no run at nowhere"),
        (["train", "--data", "nowhere"], "no folder of images and masks at nowhere"),
        (["predict", "nowhere.pth", "IMAGE"], "no run at nowhere.pth"),
        (["predict", ".", "IMAGE"], "is no run folder"),
        (["predict", "CHECKPOINT", "IMAGE", "--stride", "2"], "--stride must be above 0 and at most 1, got 2.0"),
        (["predict", "CHECKPOINT", "IMAGE", "--scales", "-1"], "--scales must be above 0 and at most 16"),
        (["predict", "CHECKPOINT", "IMAGE", "--classes", "CLASSES"], "must name 3 classes, one a line, got 2"),
        (["predict", "CHECKPOINT", "IMAGE", "IMAGE2"], "images must differ in their names"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_line(arguments, text, tmp_path, folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_encnet_checkpoint(EncNet("test_resnet", 3, channels=16, num_codes=4), tmp_path / "a.safetensors")
    names = {
        "IMAGE": folder / "images" / "val" / "0.png",
        "IMAGE2": folder / "images" / "train" / "0.png",
        "CHECKPOINT": tmp_path / "a.safetensors",
        "CLASSES": folder / "classes.txt",
    }
    more = ["--data", str(folder), *SEGMENT] if arguments[0] == "train" and "--data" not in arguments else []
    more = more if "--resume" not in arguments else []
    assert main(["segment", *(str(names.get(each, each)) for each in [arguments[0], *more, *arguments[1:]])]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
