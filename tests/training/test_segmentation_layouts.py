"""Data sets as they are unpacked: VOC, Cityscapes, ADE20K."""

import pytest

from ctxenc.training.segmentation import datasets as data
from tests.training.pair_files import build, error_of, names, write_image, write_mask

LISTS = {"train.txt": "a\nb\n", "val.txt": "v\n"}


def make_voc(root, lists, masks="SegmentationClass", mask_names="abcv"):
    for name, content in lists.items():
        path = root / "ImageSets" / "Segmentation" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    for value, name in enumerate(mask_names):
        write_image(root / "JPEGImages" / f"{name}.jpg", value)
        write_mask(root / masks / f"{name}.png", ((0, 20), (1, 255)), palette=masks == "SegmentationClass")
    return root


class TestVoc:
    @pytest.mark.parametrize("inner", ["VOCdevkit/VOC2012", "VOC2012", "."])
    def test_layout(self, tmp_path, inner):
        make_voc(tmp_path / inner, LISTS)
        datasets = build("voc", data_dir=str(tmp_path))
        assert (names(datasets.train), names(datasets.val)) == (["a", "b"], ["v"])
        assert (len(datasets.classes), datasets.classes[0], datasets.classes[20]) == (21, "background", "tvmonitor")
        image, mask = datasets.val.pair(0)
        assert image.unique().tolist() == [3]
        assert mask.unique().tolist() == [0, 1, 20, 255]

    @pytest.mark.parametrize("name", ["train_aug.txt", "trainaug.txt"])
    @pytest.mark.parametrize("line", ["{0}", "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png"])
    def test_augmented(self, tmp_path, name, line):
        lists = LISTS | {name: "".join(line.format(each) + "\n" for each in "abc")}
        root = make_voc(tmp_path / "VOCdevkit" / "VOC2012", lists)
        make_voc(root, {}, "SegmentationClassAug", "abcv")
        datasets = build("voc_aug", data_dir=str(tmp_path))
        assert names(datasets.train) == ["a", "b", "c"]
        assert {mask.parent.name for _, mask in datasets.train.paths} == {"SegmentationClassAug"}
        assert datasets.val.paths == [(root / "JPEGImages" / "v.jpg", root / "SegmentationClass" / "v.png")]

    def test_training_on_the_validation_set(self, tmp_path):
        root = make_voc(tmp_path, LISTS | {"train_aug.txt": "a\nv\n"})
        make_voc(root, {}, "SegmentationClassAug")
        text = error_of(build, "voc_aug", data_dir=str(tmp_path))
        assert text == f"train_aug.txt of {root} must hold no image of val.txt, got v"

    def test_what_is_missing(self, tmp_path):
        text = error_of(build, "voc", data_dir=str(tmp_path))
        assert text == (
            "--data voc needs a --data-dir with VOCdevkit/VOC2012 (or that folder itself): "
            f"no folder {tmp_path / 'ImageSets/Segmentation'}"
        )
        make_voc(tmp_path, LISTS)
        text = error_of(build, "voc_aug", data_dir=str(tmp_path))
        assert text.endswith(f"no folder {tmp_path / 'SegmentationClassAug'}")
        (tmp_path / "SegmentationClassAug").mkdir()
        text = error_of(build, "voc_aug", data_dir=str(tmp_path))
        assert text == f"cannot read {tmp_path / 'ImageSets/Segmentation/train_aug.txt'}: No such file or directory"

    def test_lists_and_files_disagree(self, tmp_path):
        make_voc(tmp_path, LISTS)
        (tmp_path / "SegmentationClass" / "b.png").unlink()
        assert error_of(build, "voc", data_dir=str(tmp_path)).endswith("SegmentationClass/b.png, got none")
        (tmp_path / "JPEGImages" / "b.jpg").unlink()
        assert error_of(build, "voc", data_dir=str(tmp_path)) == f"image {tmp_path / 'JPEGImages/b.jpg'} is missing"
        (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("\n")
        assert error_of(build, "voc", data_dir=str(tmp_path)).endswith("val.txt must name at least one image, got none")

    def test_label_200_of_21_classes(self, tmp_path):
        make_voc(tmp_path, LISTS)
        mask = write_mask(tmp_path / "SegmentationClass" / "v.png", ((0, 0), (0, 200)))
        text = error_of(build("voc", data_dir=str(tmp_path)).val.pair, 0)
        assert text == f"mask {mask} must hold 0 to 20, or 255 where it is to be ignored, got 200"


class TestCityscapes:
    # The label ids that count, in the order of their train ids, from the data set's label table.
    COUNTED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

    def make(self, root, kind="labelIds", numbers=((7, 33), (0, 11)), splits=("train", "val")):
        for split in splits:
            write_image(root / "leftImg8bit" / split / "ulm" / "ulm_0_leftImg8bit.png")
            write_mask(root / "gtFine" / split / "ulm" / f"ulm_0_gtFine_{kind}.png", numbers)
            write_image(root / "gtFine" / split / "ulm" / "ulm_0_gtFine_color.png")
        return root

    def test_every_label_id(self):
        labels = data.CITYSCAPES_LABELS
        assert sorted(labels) == list(range(34))
        assert [labels[each] for each in self.COUNTED] == list(range(19))
        assert {labels[each] for each in set(labels) - set(self.COUNTED)} == {255}

    @pytest.mark.parametrize("inner", ["cityscapes", "."])
    def test_layout(self, tmp_path, inner):
        self.make(tmp_path / inner)
        datasets = build("cityscapes", data_dir=str(tmp_path))
        assert (len(datasets.train), len(datasets.val), len(datasets.classes)) == (1, 1, 19)
        assert (datasets.classes[0], datasets.classes[18]) == ("road", "bicycle")
        mask = datasets.train.pair(0)[1]
        assert [int(mask[y, x]) for y in (0, 5) for x in (0, 7)] == [0, 18, 255, 2]

    def test_prepared_train_ids_go_first(self, tmp_path):
        self.make(self.make(tmp_path), "labelTrainIds", ((0, 18), (255, 2)))
        mask = build("cityscapes", data_dir=str(tmp_path)).val.pair(0)[1]
        assert mask.unique().tolist() == [0, 2, 18, 255]

    def test_train_ids_of_some_images_alone(self, tmp_path):
        self.make(self.make(tmp_path), "labelTrainIds", ((0, 18), (255, 2)))
        write_image(tmp_path / "leftImg8bit" / "train" / "bonn" / "bonn_1_leftImg8bit.png")
        text = error_of(build, "cityscapes", data_dir=str(tmp_path))
        assert text.endswith("gtFine/train/bonn/bonn_1_gtFine_labelTrainIds.png, got none")

    def test_label_ids_in_place_of_train_ids(self, tmp_path):
        self.make(tmp_path, "labelTrainIds", ((7, 33), (0, 11)))
        assert "must hold 0 to 18, or 255" in error_of(build("cityscapes", data_dir=str(tmp_path)).train.pair, 0)

    def test_what_is_missing(self, tmp_path):
        self.make(tmp_path, splits=("train",))
        assert error_of(build, "cityscapes", data_dir=str(tmp_path)).endswith(
            f"no folder {tmp_path / 'leftImg8bit/val'}"
        )
        for part in ("leftImg8bit", "gtFine"):
            (tmp_path / part / "val").mkdir()
        text = error_of(build, "cityscapes", data_dir=str(tmp_path))
        assert text == f"{tmp_path / 'leftImg8bit/val'} must hold */*_leftImg8bit.png, got none"


class TestAde20k:
    def make(self, root, numbers=((0, 1), (150, 2))):
        for split in ("training", "validation"):
            write_image(root / "images" / split / "ADE 1.jpg")
            write_mask(root / "annotations" / split / "ADE 1.png", numbers)
        return root

    @pytest.mark.parametrize("inner", ["ADEChallengeData2016", "."])
    def test_zero_is_ignored_and_the_others_move_down(self, tmp_path, inner):
        self.make(tmp_path / inner)
        datasets = build("ade20k", data_dir=str(tmp_path))
        assert datasets.classes == [str(label) for label in range(150)]
        mask = datasets.train.pair(0)[1]
        assert [int(mask[y, x]) for y in (0, 5) for x in (0, 7)] == [255, 0, 149, 1]

    def test_a_label_beyond_the_last(self, tmp_path):
        self.make(tmp_path, ((0, 1), (151, 2)))
        assert error_of(build("ade20k", data_dir=str(tmp_path)).val.pair, 0).endswith(
            "must hold 0 to 150, or 255 where it is to be ignored, got 151"
        )

    def test_names(self, tmp_path):
        self.make(tmp_path)
        rows = [f"{index}\t0.1\t1\t1\tname {index}, other; third" for index in range(1, 151)]
        (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")
        assert build("ade20k", data_dir=str(tmp_path)).classes == [f"name {index}" for index in range(1, 151)]
        (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tName", *rows[:-1]]))
        assert error_of(build, "ade20k", data_dir=str(tmp_path)).endswith("got 149 lines")

    def test_what_is_missing(self, tmp_path):
        assert "--data ade20k needs a --data-dir with ADEChallengeData2016" in error_of(
            build, "ade20k", data_dir=str(tmp_path / "nowhere")
        )
