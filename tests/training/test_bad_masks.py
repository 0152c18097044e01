"""Masks and labels that do not fit: named with their file and their value, before training or when their turn comes."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ctxenc.__main__ import main
from ctxenc.training.segmentation.pairs import read_mask
from tests.training.odd_images import png
from tests.training.small_runs import SEGMENT, make_pairs

SIZE = (44, 34)  # of the image with number 1


def sixteen(value):
    return lambda path: Image.fromarray(np.full(SIZE[::-1], value, np.uint16)).save(path)


# What is written in the place of a mask, and what the error says of it; None where all is well.
MASKS = {
    "another size": (
        lambda path: Image.new("L", (43, 34)).save(path),
        "must be of the size of its image {image}, 44 x 34, got 43 x 34",
    ),
    "turned": (lambda path: Image.new("L", SIZE[::-1]).save(path), "44 x 34, got 34 x 44"),
    "out of range": (
        lambda path: Image.new("L", SIZE, 2).save(path),
        "must hold 0 to 1, or 255 where it is to be ignored, got 2",
    ),
    "colours": (
        lambda path: Image.new("RGB", SIZE).save(path),
        "must be a PNG of class numbers, grey or with a palette, got PNG of mode RGB",
    ),
    "alpha": (lambda path: Image.new("RGBA", SIZE).save(path), "got PNG of mode RGBA"),
    "palette": (lambda path: Image.new("P", SIZE, 1).save(path), None),
    "palette with alpha": (lambda path: Image.new("P", SIZE, 1).save(path, transparency=b"\0\1"), None),
    "one bit": (lambda path: Image.new("1", SIZE, 1).save(path), None),
    "sixteen bits": (sixteen(1), None),
    "sixteen bits, ignored": (sixteen(255), None),
    "sixteen bits, out of range": (sixteen(257), "got 257"),
    "four bits": (lambda path: png(path, *SIZE, (b"\0" + b"\x11" * 22) * 34, 4), None),
    "four bits, out of range": (lambda path: png(path, *SIZE, (b"\0" + b"\xff" * 22) * 34, 4), "got 15"),
    "animated": (
        lambda path: Image.new("L", SIZE, 1).save(path, save_all=True, append_images=[Image.new("L", SIZE, 7)]),
        None,
    ),
    "missing": (lambda path: None, "image {image} must have a mask {mask}, got none"),
    "empty": (lambda path: path.write_bytes(b""), "broken image {mask}: cannot identify image file it"),
    "leads nowhere": (
        lambda path: path.symlink_to(path.with_name("no such")),
        "broken image {mask}: No such file or directory",
    ),
    "a JPEG": (lambda path: Image.new("L", SIZE).save(path, format="JPEG"), "got JPEG of mode L"),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(tmp_path, name, capsys):
    root = make_pairs(tmp_path / "data")
    image, mask = (root / part / "train" / "1.png" for part in ("images", "masks"))
    mask.unlink()
    write, text = MASKS[name]
    write(mask)
    code = main(["segment", "train", "--data", str(root), *SEGMENT, "--epochs", "1", "--out", str(tmp_path / "run")])
    err = capsys.readouterr().err
    assert code == (0 if text is None else 2), err
    if text is not None:
        line = err.splitlines()[-1]
        assert text.format(image=image, mask=mask) in line
        assert str(mask) in line
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("colour", [0, 3], ids=["grey", "palette"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_number_of_few_bits(tmp_path, bits, colour):
    """Raw: Pillow spreads grey of 2 and 4 bits over 0 to 255."""
    numbers = np.arange(2**bits, dtype=np.uint8)
    rows = np.packbits(np.unpackbits(numbers[:, None], axis=1)[:, 8 - bits :].ravel()).tobytes()
    more = {"palette": bytes(range(256)) * 3} if colour else {}
    png(tmp_path / "a.png", len(numbers), 1, b"\0" + rows, bits, colour, **more)
    assert read_mask(tmp_path / "a.png").tolist() == [numbers.tolist()]


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_of_a_large_set_when_their_turn_comes(tmp_path, monkeypatch, capsys, workers, split):
    monkeypatch.setattr("ctxenc.training.data.VERIFIED_UP_TO", 3)
    root = make_pairs(tmp_path / "data")
    mask = root / "masks" / split / "0.png"
    Image.new("L", (44, 30), 9).save(mask)
    arguments = ["--data", str(root), *SEGMENT, "--workers", workers, "--out", str(tmp_path / "run")]
    assert main(["segment", "train", *arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"ctxenc: error: mask {mask} must hold 0 to 1, or 255 where it is to be ignored, got 9"


class TestClasses:
    """Labels, configurations and weights that do not go together."""

    def test_weights_of_another_number(self, run_folder, tmp_path, image_folder, capsys):
        run = shutil.copytree(run_folder / "context-0", tmp_path / "run")
        table = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(table | {"classes": ["cat", "dog"]}))
        for command in (
            ["predict", str(run), str(image_folder)],
            ["look", str(run)],
            ["evaluate", str(run), "--data", str(tmp_path)],
        ):
            assert main(command) == 2
            err = capsys.readouterr().err
            assert f"{run / 'best.safetensors'} does not fit the model of its configuration: classifier." in err
            assert "has shape (3" in err
            assert ", the model (2" in err

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (
                lambda root: shutil.move(root / "newt", root / "wolf"),
                "the data lacks class 'newt' (3 classes, the run has 3)",
            ),
            (
                lambda root: shutil.copytree(root / "newt", root / "wolf"),
                "the data has in addition class 'wolf' (4 classes, the run has 3)",
            ),
        ],
    )
    def test_data_of_others(self, done, image_folder, tmp_path, capsys, change, text):
        root = shutil.copytree(image_folder, tmp_path / "data")
        for split in ("train", "val"):
            change(root / split)
        run = shutil.copytree(done, tmp_path / "run")
        assert main(["finetune", "--resume", str(run), "--data", str(root)]) == 2
        assert text in capsys.readouterr().err

    def test_segmentation(self, tmp_path, capsys):
        root, run = make_pairs(tmp_path / "data"), tmp_path / "run"
        assert main(["segment", "train", "--data", str(root), *SEGMENT, "--epochs", "1", "--out", str(run)]) == 0
        (root / "classes.txt").write_text("dark\nlight\ngrey\n")
        assert main(["segment", "train", "--resume", str(run)]) == 2
        assert "the data has in addition class 'grey' (3 classes, the run has 2)" in capsys.readouterr().err
        table = json.loads((run / "encnet-0" / "config.json").read_text())
        changed = {"classes": ["a", "b", "c"], "network": table["network"] | {"num_classes": 3}}
        (run / "encnet-0" / "config.json").write_text(json.dumps(table | changed))
        picture = str(root / "images" / "val" / "0.png")
        assert main(["segment", "predict", str(run), picture, "--out", str(tmp_path / "out")]) == 2
        assert "does not fit the model of its configuration: " in capsys.readouterr().err
        (run / "encnet-0" / "config.json").write_text(json.dumps(table | {"classes": ["a", "b", "c"]}))
        assert main(["segment", "predict", str(run), picture, "--out", str(tmp_path / "out")]) == 2
        assert "config.json: classes must be num_classes names" in capsys.readouterr().err
