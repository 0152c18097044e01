"""The walk that every command takes through a data set: past what systems and tools leave there, and never round in a circle."""

import unicodedata
from functools import partial

import pytest

from ctxenc.training import data, finetuning
from ctxenc.training.console import list_counts, list_names
from ctxenc.training.files import LEFT_BEHIND, images_below, walk
from ctxenc.training.prediction import find_images
from ctxenc.training.segmentation import segment_training as segment
from ctxenc.training.segmentation.pairs import Pairs, matched
from ctxenc.training.segmentation.segment_settings import SegmentSettings
from ctxenc.training.settings import Settings
from tests.training import test_segmentation_layouts as layouts
from tests.training.pair_files import build, error_of, names, plain, write_image, write_mask, write_pair

FOLDERS = (
    ".ipynb_checkpoints",
    ".@__thumb",
    ".AppleDouble",
    "__MACOSX",
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    "lost+found",
)


def litter(folder, images=("a.png",)):
    """What a notebook, a NAS, a zip tool and desktops leave in a folder and in its subfolders."""
    for place in [folder, *(each for each in folder.rglob("*") if each.is_dir())]:
        for name in FOLDERS:
            for image in images:
                write_image(place / name / image)
                write_image(place / name / "deeper" / image)
        for image in images:
            (place / f"._{image}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
        for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
            (place / name).write_bytes(b"no image")


@pytest.fixture
def classes(tmp_path):
    """Two classes of three images, with litter everywhere."""
    for name in ("cat", "dog"):
        for number in range(3):
            write_image(tmp_path / "set" / name / f"{number}.png")
    litter(tmp_path / "set", ("0.png", "9.jpg"))
    return tmp_path / "set"


def test_every_name_is_compared_in_lower_case(tmp_path):
    assert all(name == name.lower() for name in LEFT_BEHIND)
    for name in LEFT_BEHIND:
        write_image(tmp_path / name / "a.png")
        write_image(tmp_path / name.upper() / "a.png")
    assert images_below(tmp_path) == []


def test_names_that_a_class_may_have(tmp_path):
    kept = ("@home", "#1", "recycled", "$", "_", "~", "tmp", "cache", "trash", "__init__")
    for name in kept:
        write_image(tmp_path / name / "a.png")
    assert sorted(path.parent.name for path in images_below(tmp_path)) == sorted(kept)


def test_images_and_classes_of_finetune(classes):
    datasets = data.build_datasets(Settings(data=str(classes)))
    assert datasets.classes == ["cat", "dog"]
    assert len(datasets.train.targets) + len(datasets.val.targets) == 6
    data.verify(datasets, show_progress=False)


def test_images_of_evaluate(classes):
    assert data.validation_source(Settings(), ["cat", "dog"], str(classes)).targets == [0] * 3 + [1] * 3


def test_images_of_predict_and_look(classes):
    wanted = sorted(classes / name / f"{number}.png" for name in ("cat", "dog") for number in range(3))
    assert find_images([str(classes)]) == wanted
    assert find_images([str(classes / "*")]) == wanted
    assert find_images([str(classes / "**" / "*.png")]) == wanted
    shell = [str(each) for each in sorted(classes.iterdir()) if not each.name.startswith(".")]  # what `set/*` gives
    assert find_images(shell) == wanted


def test_what_is_hidden_may_be_named(classes):
    hidden = classes / "cat" / ".ipynb_checkpoints"
    assert find_images([str(hidden), str(classes / "*" / ".@*" / "*.png")]) == [
        *sorted([hidden / "0.png", hidden / "9.jpg", hidden / "deeper" / "0.png", hidden / "deeper" / "9.jpg"]),
        *(classes / name / ".@__thumb" / "0.png" for name in ("cat", "dog")),
    ]
    assert data.FolderSource(write_image(classes / ".set" / "cat" / "0.png").parents[1]).classes == ["cat"]


def test_a_link_back_is_not_followed(tmp_path):
    for name in ("cat", "dog"):
        write_image(tmp_path / "set" / name / "0.png")
        for other in ("all", "more"):  # two links in a folder would double the paths forty times
            (tmp_path / "set" / name / other).symlink_to(tmp_path / "set", target_is_directory=True)
        (tmp_path / "set" / name / "self").symlink_to(".", target_is_directory=True)
    assert data.class_images(tmp_path / "set").keys() == {"cat", "dog"}
    assert len(list(walk(tmp_path / "set"))) == 3


def test_pairs_of_segmentation(tmp_path):
    plain(tmp_path)
    litter(tmp_path / "images")
    litter(tmp_path / "masks")
    datasets = build(tmp_path)
    assert sorted(names(datasets.train) + names(datasets.val)) == list("abcde")


def test_cityscapes(tmp_path):
    root = layouts.TestCityscapes().make(tmp_path)
    litter(root / "leftImg8bit", ("x_leftImg8bit.png",))
    assert len(build("cityscapes", data_dir=str(root)).train) == 1


def test_the_first_line_names_the_classes(classes, tmp_path):
    settings = Settings(data=str(classes))
    line = finetuning.describe(settings, data.build_datasets(settings))
    assert line == f"{classes}: 2 classes, 4 training images (cat 2, dog 2), 2 validation images"
    plain(tmp_path / "pairs")
    (tmp_path / "pairs" / "classes.txt").write_text("road\nold wall\nsky\n")
    settings = SegmentSettings(data=str(tmp_path / "pairs"))
    line = segment.describe(settings, segment.build_datasets(settings))
    assert line.endswith("pairs: 3 classes (road, old wall, sky), 4 training images, 1 validation images")


def test_a_line_of_many_or_strange_names():
    assert list_counts(["a", "b"], [1234, 0]) == "a 1,234, b 0"
    assert list_counts(list("abcde"), [5, 1, 4, 1, 3], 3) == "fewest: b 1, d 1, e 3, ..."
    assert list_names([str(number) for number in range(1234)], 3) == "0, 1, 2, 1,231 more"
    assert list_names(["a\x1b[2J", "b\nc", "\udcff", "\u202eexe", "été", "日本"]) == (
        r"a\x1b[2J, b\nc, \udcff, \u202eexe, été, 日本"
    )


class TestUnicodeForms:
    """Two names that look the same: macOS and zip tools write e with an accent as two characters."""

    NFC, NFD = (unicodedata.normalize(form, "é한") for form in ("NFC", "NFD"))

    def test_images_and_masks(self, tmp_path):
        write_image(tmp_path / "images" / self.NFD / f"{self.NFC}.jpg")
        write_mask(tmp_path / "masks" / self.NFC / f"{self.NFD}.png")
        pairs = matched(tmp_path / "images", tmp_path / "masks")
        assert len(pairs) == 1
        Pairs(pairs, ["x", "y"]).pair(0)

    def test_names_in_a_list(self, tmp_path):
        make_voc = partial(layouts.make_voc, tmp_path, mask_names=[self.NFD])
        make_voc({"train.txt": self.NFC, "val.txt": self.NFD})
        for source in (build("voc", data_dir=str(tmp_path)).train, build("voc", data_dir=str(tmp_path)).val):
            source.pair(0)
        make_voc({"train_aug.txt": self.NFC}, "SegmentationClassAug")
        assert "must hold no image of val.txt" in error_of(build, "voc_aug", data_dir=str(tmp_path))

    def test_classes(self, tmp_path):
        for split, form in (("train", self.NFC), ("val", self.NFD)):
            write_image(tmp_path / split / form / "0.png")
            write_image(tmp_path / split / "a" / "0.png")
        assert data.build_datasets(Settings(data=str(tmp_path))).val.targets == [0, 1]

    def test_both_in_one_folder(self, tmp_path):
        for form in (self.NFC, self.NFD):
            write_image(tmp_path / form / "0.png")
            write_pair(tmp_path / "i", tmp_path / "m", form)
        assert error_of(matched, tmp_path / "i", tmp_path / "m").endswith(", one name in two Unicode forms")
        assert error_of(data.FolderSource, tmp_path).endswith(", one name in two Unicode forms")
