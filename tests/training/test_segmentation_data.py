"""Pairs of image and mask from disk: layouts, what the numbers in a mask mean, and what is refused."""

import os
import re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from ctxenc.training.segmentation import datasets as data
from ctxenc.training.segmentation.pairs import Pairs, held_out, matched
from ctxenc.training.segmentation.segment_settings import SegmentSettings
from ctxenc.training.segmentation.segment_training import describe
from tests.training.pair_files import build, error_of, names, plain, read_error, write_image, write_mask, write_pair
from tests.training.test_segmentation_layouts import LISTS, make_voc


def write_turned(path, orientation):
    """An image that a viewer shows turned."""
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (8, 6)).save(path, exif=exif)
    return path


class TestPairs:
    def test_image_and_mask(self, tmp_path):
        image, mask = tmp_path / "i.png", write_mask(tmp_path / "m.png", ((0, 1), (2, 255)))
        pixels = torch.arange(6 * 8 * 3, dtype=torch.uint8).reshape(6, 8, 3)
        Image.fromarray(pixels.numpy()).save(image)
        source = Pairs([(image, mask)], ["x", "y", "z"])
        found, labels = source.pair(0)
        assert isinstance(found, tv_tensors.Image)
        assert isinstance(labels, tv_tensors.Mask)
        assert found.dtype == labels.dtype == torch.uint8
        assert torch.equal(found, pixels.permute(2, 0, 1))
        assert labels.shape == (6, 8)
        assert [int(labels[y, x]) for y in (0, 5) for x in (0, 7)] == [0, 1, 2, 255]
        assert (len(source), source.name(0), source.classes) == (1, str(image), ["x", "y", "z"])

    def test_files_are_read_only_when_asked_for(self, tmp_path):
        source = Pairs([(tmp_path / "i.png", tmp_path / "m.png")], ["x", "y"])
        assert "i.png: No such file" in error_of(source.pair, 0)

    def test_a_palette_gives_indices(self, tmp_path):
        image, mask = write_image(tmp_path / "i.png"), write_mask(tmp_path / "m.png", palette=True)
        with Image.open(mask) as opened:
            assert opened.mode == "P"
        assert Pairs([(image, mask)], ["x", "y"]).pair(0)[1].unique().tolist() == [0, 1, 255]

    @pytest.mark.parametrize("kind", ["1", "I;16", "I"])
    def test_other_depths(self, tmp_path, kind):
        array = np.array([[0, 1], [1, 1]], dtype=bool if kind == "1" else np.uint16)
        mask = Image.fromarray(array)
        mask.save(tmp_path / "m.png")
        image = write_image(tmp_path / "i.png", size=(2, 2))
        assert Pairs([(image, tmp_path / "m.png")], ["x", "y"]).pair(0)[1].tolist() == [[0, 1], [1, 1]]

    def test_numbers_have_their_classes(self, tmp_path):
        image, mask = write_image(tmp_path / "i.png"), write_mask(tmp_path / "m.png", ((0, 7), (33, 255)))
        labels = Pairs([(image, mask)], ["x", "y"], {0: 255, 7: 0, 33: 1}).pair(0)[1]
        assert [int(labels[y, x]) for y in (0, 5) for x in (0, 7)] == [255, 0, 1, 255]

    def test_exif_orientation_is_ignored_in_both(self, tmp_path):
        image, mask = tmp_path / "i.jpg", write_mask(tmp_path / "m.png")
        write_turned(image, 6)
        found, labels = Pairs([(image, mask)], ["x", "y"]).pair(0)
        assert found.shape[1:] == labels.shape == (6, 8)

    def test_a_mask_of_the_turned_image(self, tmp_path):
        image, mask = write_turned(tmp_path / "i.jpg", 6), write_mask(tmp_path / "m.png", size=(6, 8))
        text = error_of(Pairs([(image, mask)], ["x", "y"]).pair, 0)
        assert text.endswith("8 x 6, got 6 x 8; it has EXIF orientation 6, which is not applied: save it turned")

    def test_a_mask_of_another_size(self, tmp_path):
        text = read_error(tmp_path, lambda path: write_mask(path, size=(6, 8)))
        assert text == (
            f"mask {tmp_path / 'a mask.png'} must be of the size of its image {tmp_path / 'an image.png'}, 8 x 6, got 6 x 8"
        )

    @pytest.mark.parametrize("value", [3, 200, 254])
    def test_a_number_that_is_no_class(self, tmp_path, value):
        text = read_error(tmp_path, lambda path: write_mask(path, ((0, 1), (255, value))))
        assert text.endswith(f"must hold 0 to 2, or 255 where it is to be ignored, got {value}")

    @pytest.mark.parametrize("value", [256, 258, 65535])
    def test_a_number_beyond_eight_bits(self, tmp_path, value):
        array = np.full((6, 8), value, dtype=np.uint16)
        text = read_error(tmp_path, lambda path: Image.fromarray(array).save(path))
        assert text.endswith(f"got {value}")

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
    def test_a_mask_of_colours(self, tmp_path, mode):
        text = read_error(tmp_path, lambda path: Image.new(mode, (8, 6)).save(path))
        assert text.endswith(f"must be a PNG of class numbers, grey or with a palette, got PNG of mode {mode}")

    def test_a_jpeg_in_disguise(self, tmp_path):
        text = read_error(tmp_path, lambda path: Image.new("L", (8, 6)).save(path, format="JPEG"))
        assert text.endswith("got JPEG of mode L")

    @pytest.mark.parametrize("content", [b"", b"no image", "cut", "flipped"])
    def test_a_broken_mask(self, tmp_path, content):
        def write(path):
            whole = write_mask(path, size=(64, 64)).read_bytes()
            middle = len(whole) // 2
            damaged = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
            path.write_bytes({"cut": whole[:middle], "flipped": damaged}.get(content, content))

        assert read_error(tmp_path, write).startswith("broken image ")

    def test_a_broken_image(self, tmp_path):
        mask = write_mask(tmp_path / "m.png")
        image = tmp_path / "i.png"
        whole = write_image(tmp_path / "whole.png").read_bytes()
        image.write_bytes(whole[: whole.index(b"IDAT") + 6])
        assert error_of(Pairs([(image, mask)], ["x", "y"]).pair, 0).startswith(f"broken image {image}: ")

    def test_a_symlink_that_leads_nowhere(self, tmp_path):
        def write(path):
            path.symlink_to(tmp_path / "nowhere.png")

        assert read_error(tmp_path, write).endswith("a mask.png: No such file or directory")


class TestTurnedImages:
    """A mask that was drawn on the turned view fits a square image, and one that stands on its head, all the same."""

    @pytest.mark.parametrize("turn", range(2, 9))
    def test_are_told_of_once(self, tmp_path, turn):
        plain(tmp_path)
        for name in "bd":
            (tmp_path / "images" / f"{name}.png").unlink()
            write_turned(tmp_path / "images" / f"{name}.jpg", turn)
        where = re.escape(str(tmp_path / "images"))
        with pytest.warns(
            UserWarning, match=f"^2 of 5 images have an EXIF orientation, such as {where}/[bd].jpg: "
        ) as told:
            data.verify(build(tmp_path), show_progress=False)
        assert len(told) == 1

    def test_a_large_set_is_looked_at_in_part(self, tmp_path, monkeypatch):
        plain(tmp_path, names=[f"{number}" for number in range(9)])
        for path in (tmp_path / "images").iterdir():
            write_turned(path, 3)
        monkeypatch.setattr(data, "VERIFIED_UP_TO", 3)
        monkeypatch.setattr("ctxenc.training.data.VERIFIED_UP_TO", 3)
        with pytest.warns(UserWarning, match="3 of 3 images have"):
            data.verify(build(tmp_path), show_progress=False)

    @pytest.mark.parametrize("number", [0, 1, 9])
    def test_numbers_that_turn_nothing(self, tmp_path, number):
        plain(tmp_path)
        for path in (tmp_path / "images").iterdir():
            write_turned(path, number)
        data.verify(build(tmp_path), show_progress=False)  # a warning is an error here


class TestMatched:
    def test_by_path_without_suffix(self, tmp_path):
        for name in ("one.JPG", "two words.jpeg", "deep/er/3.1.png", "4.TIF"):
            write_image(tmp_path / "i" / name)
        for name in ("one.png", "two words.PNG", "deep/er/3.1.png", "4.png"):
            write_mask(tmp_path / "m" / name)
        (tmp_path / "i" / "notes.txt").write_text("to be left out")
        (tmp_path / "m" / "one.json").write_text("{}")
        write_image(tmp_path / "i" / ".ipynb_checkpoints" / "one.png")
        (tmp_path / "i" / "._one.jpg").write_bytes(b"what macOS leaves")
        pairs = [
            (image.relative_to(tmp_path).as_posix(), mask.relative_to(tmp_path).as_posix())
            for image, mask in matched(tmp_path / "i", tmp_path / "m")
        ]
        assert pairs == [
            ("i/4.TIF", "m/4.png"),
            ("i/deep/er/3.1.png", "m/deep/er/3.1.png"),
            ("i/one.JPG", "m/one.png"),
            ("i/two words.jpeg", "m/two words.PNG"),
        ]

    def test_through_symlinks(self, tmp_path):
        image, mask = write_pair(tmp_path / "real" / "i", tmp_path / "real" / "m", "a")
        (tmp_path / "i" / "linked").parent.mkdir()
        (tmp_path / "i" / "linked").symlink_to(image.parent, target_is_directory=True)
        (tmp_path / "m" / "linked").mkdir(parents=True)
        (tmp_path / "m" / "linked" / "a.png").symlink_to(mask)
        pairs = matched(tmp_path / "i", tmp_path / "m")
        assert pairs == [(tmp_path / "i/linked/a.png", tmp_path / "m/linked/a.png")]
        assert Pairs(pairs, ["x", "y"]).pair(0)[1].shape == (6, 8)

    def test_an_image_without_a_mask(self, tmp_path):
        write_pair(tmp_path / "i", tmp_path / "m", "a")
        image = write_image(tmp_path / "i" / "b.png")
        text = error_of(matched, tmp_path / "i", tmp_path / "m")
        assert text == f"image {image} must have a mask {tmp_path / 'm' / 'b'}.png, got none"

    def test_a_mask_without_an_image(self, tmp_path):
        write_pair(tmp_path / "i", tmp_path / "m", "a")
        mask = write_mask(tmp_path / "m" / "b.png")
        text = error_of(matched, tmp_path / "i", tmp_path / "m")
        assert text == f"mask {mask} must have an image of the same stem below {tmp_path / 'i'}, got none"

    def test_two_images_of_one_stem(self, tmp_path):
        write_pair(tmp_path / "i", tmp_path / "m", "a")
        write_image(tmp_path / "i" / "a.jpg")
        assert error_of(matched, tmp_path / "i", tmp_path / "m").startswith("two files of one stem: ")

    def test_empty_folders(self, tmp_path):
        (tmp_path / "i").mkdir()
        assert f"no folder {tmp_path / 'm'}" in error_of(matched, tmp_path / "i", tmp_path / "m")
        (tmp_path / "m").mkdir()
        assert f"{tmp_path / 'i'} must hold images (.jpg, " in error_of(matched, tmp_path / "i", tmp_path / "m")

    def test_a_folder_that_cannot_be_read_is_not_left_out(self, tmp_path, monkeypatch):
        write_pair(tmp_path / "i", tmp_path / "m", "a")
        write_pair(tmp_path / "i" / "b", tmp_path / "m" / "b", "a")
        real = os.scandir

        def scandir(path):
            if str(path).endswith("b"):
                raise PermissionError(13, "Permission denied", path)
            return real(path)

        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(PermissionError):
            matched(tmp_path / "i", tmp_path / "m")


class TestFolder:
    @pytest.mark.parametrize("layout", ["images/{}", "{}/images"])
    @pytest.mark.parametrize(
        ("train", "val"), [("train", "val"), ("training", "validation"), ("Train", "Testing"), ("TRAIN", "dev")]
    )
    def test_train_and_val(self, tmp_path, layout, train, val):
        for split, stems in ((train, ("a", "b")), (val, ("c",))):
            images = layout.format(split)
            for stem in stems:
                write_pair(tmp_path / images, tmp_path / images.replace("images", "masks"), stem)
        datasets = build(tmp_path)
        assert (names(datasets.train), names(datasets.val)) == (["a", "b"], ["c"])
        assert datasets.classes == ["0", "1"]
        data.verify(datasets, show_progress=False)

    def test_folders_of_masks_may_be_written_in_another_case(self, tmp_path):
        for split, other in (("train", "Train"), ("val", "Validation"), ("test", "TEST")):
            write_pair(tmp_path / "Images" / split, tmp_path / "MASKS" / other, split)
        datasets = build(tmp_path)
        assert (names(datasets.train), names(datasets.val), datasets.unused) == (["train"], ["val"], ["Images/test"])

    @pytest.mark.parametrize("layout", ["images/{}", "{}/images"])
    def test_folders_left_unused_are_named(self, tmp_path, layout):
        for split in ("train", "Val", "test", "more"):
            images = layout.format(split)
            write_pair(tmp_path / images, tmp_path / images.replace("images", "masks"), split)
        datasets = build(tmp_path)
        assert datasets.unused == [layout.format(each).removesuffix("/images") for each in ("more", "test")]
        line = describe(SegmentSettings(data=str(tmp_path)), datasets)
        assert line.endswith(f"; left unused: {', '.join(datasets.unused)}")

    @pytest.mark.parametrize("split", ["", "train"])
    def test_some_are_held_out(self, tmp_path, split):
        plain(tmp_path, "abcdefghij", split)
        splits = [build(tmp_path, val_fraction=0.3, seed=seed) for seed in (0, 0, 1)]
        found = [(names(each.train), names(each.val)) for each in splits]
        assert found[0] == found[1] != found[2]
        for train, val in found:
            assert (len(train), len(val)) == (7, 3)
            assert sorted(train + val) == list("abcdefghij")
            assert train == sorted(train)

    def test_one_is_held_out_and_one_is_left(self):
        paths = [(name, name) for name in "abc"]
        assert [len(each) for each in held_out(paths, 0.01, 0)] == [2, 1]
        assert [len(each) for each in held_out(paths, 0.99, 0)] == [1, 2]

    def test_one_pair_is_too_few(self, tmp_path):
        plain(tmp_path, "a")
        assert error_of(build, tmp_path) == (
            f"{tmp_path / 'images'} must hold at least 2 images for one to be held out, got 1"
        )

    def test_names_of_classes(self, tmp_path):
        plain(tmp_path)
        (tmp_path / "classes.txt").write_text("\ufeffroad \n old wall\nsky\x1b[2J\n\n", encoding="utf-8")
        datasets = build(tmp_path)
        assert datasets.classes == datasets.val.classes == ["road", "old wall", r"sky\x1b[2J"]

    def test_numbers_of_classes_come_from_all_masks(self, tmp_path):
        plain(tmp_path, split="train")
        write_pair(tmp_path / "images" / "val", tmp_path / "masks" / "val", "v", numbers=((0, 4), (255, 2)))
        assert build(tmp_path).classes == ["0", "1", "2", "3", "4"]

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "must name 2 to 255 classes (255 is ignored), got 0"),
            (b"road\n", "got 1"),
            (b"\n".join(b"class %d" % label for label in range(256)), "got 256"),
            (b"road\n\nsky\n", "got none in line 2"),
            (b"road\nsky\nroad\n", "must name each class once, got road twice"),
            (b"r\xffoad\n", "cannot read"),
        ],
    )
    def test_classes_that_are_not_as_they_must_be(self, tmp_path, content, words):
        plain(tmp_path)
        (tmp_path / "classes.txt").write_bytes(content)
        text = error_of(build, tmp_path)
        assert words in text
        assert str(tmp_path / "classes.txt") in text

    @pytest.mark.parametrize(("inside", "count"), [(0, 1), (255, 0)])
    def test_masks_of_one_class_or_none(self, tmp_path, inside, count):
        for name in "ab":
            write_pair(tmp_path / "images", tmp_path / "masks", name, numbers=((inside, 255), (255, 255)))
        assert error_of(build, tmp_path) == (
            f"the masks of {tmp_path} must hold 2 to 255 classes (255 is ignored), got {count}"
        )

    def test_too_many_numbers(self, tmp_path):
        plain(tmp_path)
        Image.fromarray(np.full((6, 8), 1000, dtype=np.uint16)).save(tmp_path / "masks" / "b.png")
        text = error_of(build, tmp_path)
        assert text == f"mask {tmp_path / 'masks' / 'b.png'} must hold class numbers below 255, got 1000"

    def test_wrong_folders(self, tmp_path):
        assert error_of(build, tmp_path / "no where") == f"no folder of images and masks at {tmp_path / 'no where'}"
        assert "must hold images/ and masks/, or train/images/ and train/masks/, got neither" in error_of(
            build, tmp_path
        )
        write_pair(tmp_path / "images" / "val", tmp_path / "masks" / "val", "a")
        assert "must have a training folder (train, training)" in error_of(build, tmp_path)

    def test_verify_reads_every_pair(self, tmp_path):
        plain(tmp_path)
        (tmp_path / "classes.txt").write_text("x\ny")
        datasets = build(tmp_path)
        mask = datasets.val.paths[0][1]
        write_mask(mask, ((0, 1), (1, 2)))
        assert str(mask) in error_of(data.verify, datasets, show_progress=False)


class TestClassesInMasks:
    def make(self, root, *numbers, classes=("sky", "road"), val=((0, 1), (1, 255))):
        """A training mask of each of the numbers, and one validation mask."""
        for index, each in enumerate(numbers):
            write_pair(root / "images" / "train", root / "masks" / "train", f"{index}", numbers=((each, 0), (0, 0)))
        write_pair(root / "images" / "val", root / "masks" / "val", "v", numbers=val)
        if classes:
            (root / "classes.txt").write_text("\n".join(classes))
        return build(root)

    def refused(self, datasets, skip=False):
        return error_of(data.verify, datasets, show_progress=False, skip=skip)

    def test_first_line(self, tmp_path):
        datasets = self.make(tmp_path, 1, 1, 0, 255)
        line = partial(describe, SegmentSettings(data=str(tmp_path)), datasets)
        assert ": 2 classes (sky, road), 4 training images" in line()
        data.verify(datasets, show_progress=False)
        assert ": 2 classes (sky 4, road 2 of 4 training masks, 6.2% of pixels ignored), 4 training images" in line()

    def test_255_for_the_object(self, tmp_path):
        assert self.refused(self.make(tmp_path, 0, 255, 255, val=((0, 0), (255, 255)))) == (
            "none of the 3 training masks holds a pixel of class 1 (road); they hold 0 and 255, which is taken for pixels to be"
            " ignored (17%)"
        )

    def test_numbers_with_gaps(self, tmp_path):
        text = self.refused(self.make(tmp_path, 128, 255, classes=None))
        assert text.startswith(
            "none of the 2 training masks holds a pixel of class 1 and of 126 more classes; they hold 0, 128 and 255,"
        )

    def test_a_class_that_only_validation_has(self, tmp_path):
        text = self.refused(self.make(tmp_path, 0, 1, classes=("sky", "\x1broad", "sea"), val=((1, 2), (0, 2))))
        assert text == (
            "none of the 2 training masks holds a pixel of class 2 (sea); they hold 0, 1; masks of the validation set hold it"
        )

    def test_broken_masks_are_passed_over_where_they_may_be(self, tmp_path):
        datasets = self.make(tmp_path, 1, 0)
        datasets.train.paths[0][1].write_bytes(b"")
        assert self.refused(datasets).startswith("broken image ")
        assert self.refused(datasets, skip=True).startswith(
            "none of the 1 training masks holds a pixel of class 1 (road)"
        )

    def test_a_large_set_is_read_until_each_class_is_found(self, tmp_path, monkeypatch):
        datasets = self.make(tmp_path, 1, *[0] * 8, classes=("sky", "road"))
        found = datasets.train.count(3, False)
        assert (found.counts, found.read) == ([3, 1], 3)
        later = Pairs(datasets.train.paths[1:] + datasets.train.paths[:1], ["sky", "road"])
        assert later.count(3, False).counts == [9, 1]
        assert Pairs(datasets.train.paths, ["sky", "road", "sea"]).count(3, False)[:2] == ([9, 1, 0], 9)

    def test_part_of_a_published_data_set(self, tmp_path):
        """May lack classes, of which the user did not write the list, but not all but one."""
        root = make_voc(tmp_path, LISTS)
        datasets = build("voc", data_dir=str(root))
        data.verify(datasets, show_progress=False)
        assert describe(SegmentSettings(data="voc"), datasets).startswith(
            "voc: 21 classes (background 2, aeroplane 2, bicycle 0,"
        )
        for name in "ab":
            write_mask(root / "SegmentationClass" / f"{name}.png", ((0, 0), (0, 255)))
        text = self.refused(build("voc", data_dir=str(root)))
        assert "holds a pixel of class 1 (aeroplane) and of 19 more classes; they hold 0 and 255" in text


class TestSamples:
    @pytest.fixture
    def samples(self, tmp_path):
        source = build(plain(tmp_path)).train

        def noisy(image, mask):
            return image + torch.rand(image.shape), mask.long()

        return data.PairSamples(source, noisy, seed=3)

    def test_follow_from_seed_epoch_and_index(self, samples):
        def all_of(samples):
            return torch.stack([samples[index][0] for index in range(len(samples))])

        first = all_of(samples)
        assert torch.equal(torch.stack([samples[index][0] for index in (3, 2, 1, 0)]).flip(0), first)
        assert len({float(each.sum()) for each in first}) == len(first)
        other = data.PairSamples(samples.source, samples.transform, seed=4)
        samples.set_epoch(1)
        for changed in (all_of(samples), all_of(other)):
            assert all(not torch.equal(a, b) for a, b in zip(first, changed, strict=True))
        samples.set_epoch(0)
        assert torch.equal(all_of(samples), first)

    def test_leave_the_generator_as_it_was(self, samples):
        before = torch.get_rng_state()
        samples[0]
        assert torch.equal(torch.get_rng_state(), before)


def test_workers_change_nothing(tmp_path):
    from ctxenc.training.segmentation.transforms import train_transform

    settings = SegmentSettings(data=str(plain(tmp_path)), base_size=12, crop_size=10)
    transform = train_transform(settings, (0.5,) * 3, (0.5,) * 3)
    samples = data.PairSamples(data.build_datasets(settings).train, transform, seed=0)
    samples.set_epoch(2)
    alone = [samples[index] for index in range(len(samples))]
    for workers in (0, 2):
        images, masks = next(iter(DataLoader(samples, batch_size=len(samples), num_workers=workers)))
        assert torch.equal(images, torch.stack([image for image, _ in alone]))
        assert torch.equal(masks, torch.stack([mask for _, mask in alone]))
        assert (images.shape, images.dtype, masks.dtype) == ((4, 3, 10, 10), torch.float32, torch.int64)


def test_a_large_set_is_not_read_beforehand(tmp_path, monkeypatch):
    class Counting(Pairs):
        def pair(self, index):
            read.append(index)

    read, paths = [], write_pair(tmp_path, tmp_path / "m", "i")
    monkeypatch.setattr("ctxenc.training.data.VERIFIED_UP_TO", 5)
    for count, expected in ((2, [0, 1, 0, 1]), (3, [])):
        read.clear()
        sources = [Counting([paths] * count, ["x", "y"]) for _ in range(2)]
        data.verify(data.Datasets(*sources), show_progress=False)
        assert read == expected
