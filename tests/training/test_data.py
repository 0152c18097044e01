"""Sources, splits, and samples that follow from (seed, epoch, index) alone."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import DataLoader
from torchvision.datasets import FashionMNIST
from torchvision.datasets.folder import IMG_EXTENSIONS

from ctxenc.runs.errors import UserError
from ctxenc.training import data, finetuning
from ctxenc.training.fashion import FashionSource
from ctxenc.training.prediction import find_images
from ctxenc.training.settings import Settings
from tests.training.small_runs import DATA_CONFIG, make_cifar, make_fashion


def make_folder(folder, counts):
    """Single-coloured images: those of class i are of grey value 10 * i + number."""
    for grey, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (40, 40), 10 * grey + number).save(folder / name / f"{number:02d}.png")
    return folder


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


class TestSeeded:
    def test_puts_every_generator_back(self):
        before = states()
        with data.seed_draws(1, 2, 3):
            random.random(), np.random.rand(), torch.rand(())
        assert states() == before

    def test_puts_them_back_after_an_error(self):
        before = states()
        with pytest.raises(ZeroDivisionError), data.seed_draws(1):
            torch.rand(()) / (1 // 0)
        assert states() == before

    def test_the_key_decides(self):
        def draw(*key):
            with data.seed_draws(*key):
                return random.random(), np.random.rand(), float(torch.rand(()))

        assert draw(0, 1, 2) == draw(0, 1, 2)
        draws = [draw(*key) for key in [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 1, 2, 0, 1)]]
        for values in zip(*draws, strict=True):
            assert len(set(values)) == len(draws)


class TestSamples:
    @pytest.fixture
    def samples(self):
        settings = Settings.resolve({"random_erase": 0.5, "auto_augment": "rand-m9-mstd0.5"})
        source = data.build_datasets(settings).train
        picked = data.Subset(source, list(range(0, len(source.targets), 90)))
        return data.Samples(picked, data.train_transform(settings, DATA_CONFIG), seed=3)

    def test_do_not_depend_on_workers_or_order(self, samples):
        alone = torch.stack([samples[index][0] for index in reversed(range(len(samples)))]).flip(0)
        for workers in (0, 2):
            batches = list(DataLoader(samples, batch_size=5, num_workers=workers))
            assert torch.equal(torch.cat([images for images, _ in batches]), alone)
            assert torch.cat([targets for _, targets in batches]).tolist() == samples.source.targets

    def test_epoch_and_seed_change_every_sample(self, samples):
        first = [samples[index][0] for index in range(len(samples))]
        samples.set_epoch(1)
        second = [samples[index][0] for index in range(len(samples))]
        other = data.Samples(samples.source, samples.transform, seed=4)
        third = [other[index][0] for index in range(len(other))]
        for a, b, c in zip(first, second, third, strict=True):
            assert not torch.equal(a, b)
            assert not torch.equal(a, c)

    def test_workers_see_the_epoch(self, samples):
        samples.set_epoch(7)
        expected = torch.stack([samples[index][0] for index in range(len(samples))])
        loader = DataLoader(samples, batch_size=len(samples), num_workers=1)
        assert torch.equal(next(iter(loader))[0], expected)


class TestFolders:
    def test_train_and_val(self, image_folder):
        datasets = data.build_datasets(Settings(data=str(image_folder)))
        assert datasets.classes == ["cat", "dog", "newt"]
        assert datasets.train.targets == [0, 0, 1, 1, 2, 2]
        assert datasets.val.targets == [0] * 6 + [1] * 3 + [2]
        assert datasets.val.name(9) == str(image_folder / "val" / "newt" / "0.png")

    def test_one_folder_is_split_class_by_class(self, tmp_path):
        folder = make_folder(tmp_path / "set", {"a": 10, "b": 5, "c": 2})
        datasets = data.build_datasets(Settings(data=str(folder), val_fraction=0.3))
        assert np.bincount(datasets.val.targets).tolist() == [3, 2, 1]
        assert np.bincount(datasets.train.targets).tolist() == [7, 3, 1]

        def greys(source):
            return {source.image(index).getpixel((0, 0))[0] for index in range(len(source.targets))}

        assert not greys(datasets.train) & greys(datasets.val)
        assert greys(datasets.train) | greys(datasets.val) == {*range(10), *range(10, 15), 20, 21}

    def test_the_split_follows_from_the_seed(self, tmp_path):
        folder = make_folder(tmp_path / "set", {"a": 20, "b": 20})
        splits = [data.build_datasets(Settings(data=str(folder), seed=seed)).val.indices for seed in (0, 0, 1)]
        assert splits[0] == splits[1] != splits[2]

    def test_only_a_train_folder(self, tmp_path):
        make_folder(tmp_path / "set" / "train", {"a": 4, "b": 4})
        datasets = data.build_datasets(Settings(data=str(tmp_path / "set"), val_fraction=0.25))
        assert (datasets.classes, len(datasets.val.targets)) == (["a", "b"], 2)

    @pytest.mark.parametrize(
        ("train", "val"),
        [
            *(("train", "val"), ("Train", "Validation"), ("TRAIN", "VALID"), ("train", "Val"), ("train", "dev")),
            *(("Training", "Testing"), ("training", "Eval"), ("train", "test")),
        ],
    )
    def test_names_of_splits(self, tmp_path, train, val):
        make_folder(tmp_path / train, {"a": 4, "b": 4})
        make_folder(tmp_path / val, {"a": 3, "b": 3})
        datasets = data.build_datasets(Settings(data=str(tmp_path)))
        assert (len(datasets.train.targets), len(datasets.val.targets), datasets.unused) == (8, 6, [])
        assert len(data.validation_source(Settings(), ["a", "b"], str(tmp_path)).targets) == 6

    @pytest.mark.parametrize(
        ("folders", "unused"),
        [
            (("train", "Val", "test", "TEST", ".git", "@eaDir"), ["TEST", "test"]),
            (("train", "holdout"), ["holdout"]),
            (("train", "Train", "val"), ["Train"]),
            (("TRAIN", "validation", "valid"), ["validation"]),
            (("train", "val"), []),
        ],
    )
    def test_folders_left_unused_are_named(self, tmp_path, folders, unused):
        for folder in folders:
            make_folder(tmp_path / folder, {"a": 2, "b": 2})
        settings = Settings(data=str(tmp_path))
        datasets = data.build_datasets(settings)
        assert datasets.unused == unused
        line = finetuning.describe(settings, datasets)
        assert line.endswith(f"; left unused: {', '.join(unused)}") if unused else "; left" not in line

    def test_val_may_lack_a_class(self, tmp_path):
        make_folder(tmp_path / "train", {"a": 2, "b": 2, "c": 2})
        make_folder(tmp_path / "val", {"b": 1, "c": 1})
        assert data.build_datasets(Settings(data=str(tmp_path))).val.targets == [1, 2]

    @pytest.mark.parametrize(
        ("train", "val", "words"),
        [
            ({}, None, "holds no images"),
            ({"a": 3}, None, "holds one class (a)"),
            ({"a": 3, "b": 1}, None, "class b has 1 image"),
            ({"a": 3, "b": 3}, {"a": 1, "d": 1}, "the class d, which the training set lacks"),
            ({"a": 3, "b": 3}, {}, "holds no images"),
        ],
    )
    def test_errors(self, tmp_path, train, val, words):
        make_folder(tmp_path / "set" / "train", train)
        (tmp_path / "set" / "train").mkdir(parents=True, exist_ok=True)
        if val is not None:
            (tmp_path / "set" / "val").mkdir()
            make_folder(tmp_path / "set" / "val", val)
        with pytest.raises(UserError) as error:
            data.build_datasets(Settings(data=str(tmp_path / "set")))
        assert words in str(error.value)
        assert "\n" not in str(error.value)

    def test_images_in_no_class_folder(self, tmp_path):
        make_folder(tmp_path, {"a": 2, "b": 2})
        Image.new("RGB", (4, 4)).save(tmp_path / "stray.png")
        with pytest.raises(UserError, match=r"stray\.png lies in no class folder"):
            data.build_datasets(Settings(data=str(tmp_path)))

    def test_names_and_order_are_those_of_timm(self, tmp_path):
        make_folder(tmp_path, {"b10": 3, "b9": 2, "A": 2, "A/z": 1, "a2": 12})
        source = data.FolderSource(tmp_path)
        reader = create_dataset("", root=str(tmp_path), search_split=False).reader
        assert list(zip(source.paths, source.targets, strict=True)) == reader.samples
        assert source.class_to_index == reader.class_to_idx

    def test_every_kind_of_image_that_predict_takes(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            for suffix in IMG_EXTENSIONS:
                Image.new("L", (8, 8)).save(tmp_path / name / f"image{suffix.upper()}")
        paths = data.FolderSource(tmp_path).paths
        assert len(paths) == 2 * len(IMG_EXTENSIONS)
        assert sorted(paths) == sorted(map(str, find_images([str(tmp_path)])))

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_a_class_folder_without_images(self, tmp_path, split):
        for each in ("train", "val"):
            make_folder(tmp_path / each, {"a": 2, "b": 2, ".ipynb_checkpoints": 0})
        (tmp_path / split / "x" / "c").mkdir(parents=True)
        (tmp_path / split / "x" / "c" / "0.heic").touch()
        with pytest.raises(UserError) as error:
            data.build_datasets(Settings(data=str(tmp_path)))
        assert f"the class folder {tmp_path / split / 'x' / 'c'} holds no images (.jpg, " in str(error.value)

    def test_two_folders_of_one_class(self, tmp_path):
        make_folder(tmp_path, {"x/n": 2, "y/n": 2, "y/m": 2})
        with pytest.raises(UserError) as error:
            data.build_datasets(Settings(data=str(tmp_path)))
        assert str(error.value) == f"two folders of the class n: {tmp_path / 'x' / 'n'} and {tmp_path / 'y' / 'n'}"

    def test_a_class_folder_that_cannot_be_read_is_not_left_out(self, tmp_path, monkeypatch):
        make_folder(tmp_path, {"a": 2, "b": 2, "c": 2})
        real = data.os.scandir

        def scandir(path):
            if str(path).endswith("c"):
                raise PermissionError(13, "Permission denied", path)
            return real(path)

        monkeypatch.setattr(data.os, "scandir", scandir)
        with pytest.raises(PermissionError):
            data.FolderSource(tmp_path)

    def test_a_wrong_path(self, tmp_path):
        with pytest.raises(UserError, match=r"no image folder at .*nowhere"):
            data.build_datasets(Settings(data=str(tmp_path / "nowhere")))

    def test_imagenet_needs_both_splits(self, tmp_path):
        make_folder(tmp_path / "train", {"a": 2, "b": 2})
        settings = Settings(data="imagenet", data_dir=str(tmp_path))
        with pytest.raises(UserError, match="needs a --data-dir with folders train and val"):
            data.build_datasets(settings)
        make_folder(tmp_path / "val", {"a": 1, "b": 1})
        assert data.build_datasets(settings).val.targets == [0, 1]


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "big.tif", "grey.pgm"])
def test_sixteen_bits_keep_their_tones(tmp_path, name):
    tones = np.arange(0, 65536, 64, dtype=">u2" if name == "big.tif" else "<u2").reshape(32, 32)
    Image.fromarray(tones).save(tmp_path / name)
    image = data.open_image(tmp_path / name)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.stack([tones // 256] * 3, axis=-1))


class TestBrokenImages:
    def damage(self, path, kind):
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "text": b"no image", "truncated": whole[: len(whole) // 2]}[kind])

    @pytest.mark.parametrize("kind", ["empty", "text", "truncated"])
    @pytest.mark.parametrize("split", ["train", "val"])
    def test_a_small_set_is_checked_first(self, tmp_path, kind, split):
        for each in ("train", "val"):
            make_folder(tmp_path / each, {"a": 2, "b": 2})
        broken = tmp_path / split / "b" / "01.png"
        self.damage(broken, kind)
        with pytest.raises(UserError) as error:
            data.verify(data.build_datasets(Settings(data=str(tmp_path))))
        assert str(broken) in str(error.value)
        assert "\n" not in str(error.value)

    def test_a_split_folder_is_checked(self, tmp_path):
        make_folder(tmp_path, {"a": 3, "b": 3})
        self.damage(tmp_path / "a" / "02.png", "text")
        with pytest.raises(UserError, match=r"broken image .*02\.png"):
            data.verify(data.build_datasets(Settings(data=str(tmp_path))))

    def test_a_large_set_is_not(self, tmp_path, monkeypatch):
        make_folder(tmp_path, {"a": 3, "b": 3})
        self.damage(tmp_path / "a" / "02.png", "text")
        monkeypatch.setattr(data, "VERIFIED_UP_TO", 5)
        datasets = data.build_datasets(Settings(data=str(tmp_path)))
        data.verify(datasets)
        indices = [datasets.train.source.paths.index(str(tmp_path / "a" / "02.png"))]
        with pytest.raises(UserError, match=r"broken image .*02\.png"):
            data.Samples(data.Subset(datasets.train.source, indices), data.eval_transform(DATA_CONFIG), 0)[0]


class TestCifar:
    @pytest.fixture
    def cifar(self, tmp_path, monkeypatch):
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        return make_cifar(tmp_path)

    def test_splits(self, cifar):
        datasets = data.build_datasets(Settings(data="cifar10", data_dir=str(cifar)))
        assert datasets.classes == [f"class {number}" for number in range(10)]
        assert (len(datasets.train.targets), datasets.val.targets) == (20, [0, 1, 2, 9])
        assert datasets.val.image(3).size == (32, 32)
        assert datasets.val.name(3) == "val:3"

    def test_not_there(self, tmp_path):
        with pytest.raises(UserError, match=r"cifar100 cannot be had from .*--download fetches it"):
            data.build_datasets(Settings(data="cifar100", data_dir=str(tmp_path)))

    def test_download_without_a_network(self, tmp_path, monkeypatch):
        def refuse(*_, **__):
            raise OSError("no route to host")

        monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
        with pytest.raises(UserError, match="no route to host"):
            data.build_datasets(Settings(data="cifar10", data_dir=str(tmp_path), download=True))


class TestFashionMnist:
    @pytest.mark.parametrize("inner", ["", "FashionMNIST/raw"])  # Debian's layout, torchvision's
    @pytest.mark.parametrize("zipped", [True, False])
    def test_both_layouts(self, tmp_path, inner, zipped):
        make_fashion(tmp_path / inner, zipped)
        datasets = data.build_datasets(Settings(data="fashion_mnist", data_dir=str(tmp_path)))
        assert (datasets.classes[0], len(datasets.classes)) == ("T-shirt/top", 10)
        assert (datasets.train.targets, datasets.val.targets) == ([*range(10)] * 2, [*range(10)])
        image = datasets.train.image(17)
        assert (image.mode, image.size, image.getpixel((27, 0))) == ("RGB", (28, 28), (17, 17, 17))
        assert datasets.val.name(3) == "val:3"
        settings = Settings(data="fashion_mnist", data_dir=str(tmp_path))
        for transform in (data.train_transform(settings, DATA_CONFIG), data.eval_transform(DATA_CONFIG)):
            assert data.Samples(datasets.train, transform, 0)[0][0].shape == DATA_CONFIG["input_size"]

    def test_torchvision_reads_the_same(self, tmp_path):
        make_fashion(tmp_path / "FashionMNIST" / "raw", zipped=False)
        source = FashionSource(str(tmp_path), "train", False)
        for index, (image, target) in enumerate(FashionMNIST(str(tmp_path))):
            assert (image.convert("RGB").tobytes(), target) == (source.image(index).tobytes(), source.targets[index])

    @pytest.mark.parametrize("gone", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
    def test_a_file_that_is_missing(self, tmp_path, gone):
        (make_fashion(tmp_path, False) / gone).unlink()
        with pytest.raises(
            UserError, match=f"fashion_mnist cannot be had from .*--download fetches it: no {gone}"
        ) as error:
            data.build_datasets(Settings(data="fashion_mnist", data_dir=str(tmp_path)))
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("content", "text"),
        [
            (b"", "is no IDX file"),
            (b"GIF89a", "is no IDX file"),
            (bytes([0, 0, 13, 3]) + bytes(12), "is no IDX file"),  # of floats
            (bytes([0, 0, 8, 3]) + bytes(5), "must hold 1 to"),
            (bytes([0, 0, 8, 3]) + b"\xff" * 12, "must hold 1 to"),
            # 2**28 values where the product of the sizes wraps round 64 bits
            (bytes([0, 0, 8, 3]) + np.array([2**14 * 4097, 2**14 * 433, 38737], ">u4").tobytes(), "must hold 1 to"),
            (
                bytes([0, 0, 8, 3, 0, 0, 0, 20, 0, 0, 0, 28, 0, 0, 0, 28, 1]),
                "must hold 15680 values by its header, got 1",
            ),
            (
                bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(784),
                "must hold images of 28 x 28 and as many",
            ),
            (bytes([0, 0, 8, 1, 0, 0, 0, 20]) + bytes(20), "must hold images of 28 x 28"),
        ],
    )
    def test_a_file_of_something_else(self, tmp_path, content, text):
        (make_fashion(tmp_path, False) / "train-images-idx3-ubyte").write_bytes(content)
        with pytest.raises(UserError, match=text) as error:
            data.build_datasets(Settings(data="fashion_mnist", data_dir=str(tmp_path)))
        assert "\n" not in str(error.value)

    def test_a_label_that_there_is_not(self, tmp_path):
        path = make_fashion(tmp_path, False) / "t10k-labels-idx1-ubyte"
        path.write_bytes(path.read_bytes()[:-1] + b"\x0a")
        with pytest.raises(UserError, match="labels under 10"):
            data.build_datasets(Settings(data="fashion_mnist", data_dir=str(tmp_path)))

    @pytest.mark.parametrize(
        "damage", [lambda content: content[:-9], lambda content: content[:20] + b"damage" + content[26:]]
    )
    def test_a_gzipped_file_that_is_damaged(self, tmp_path, damage):
        path = make_fashion(tmp_path, True) / "train-images-idx3-ubyte.gz"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(UserError, match="fashion_mnist cannot be had"):
            data.build_datasets(Settings(data="fashion_mnist", data_dir=str(tmp_path)))

    def test_download(self, tmp_path, monkeypatch):
        def fetch(url, download_root, **_):
            assert url.endswith(".gz")
            make_fashion(Path(download_root), False)

        monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fetch)
        settings = Settings(data="fashion_mnist", data_dir=str(tmp_path), download=True)
        assert len(data.build_datasets(settings).val.targets) == 10
        monkeypatch.setattr(
            "torchvision.datasets.mnist.download_and_extract_archive", None
        )  # what is there is not fetched again
        assert len(data.build_datasets(settings).val.targets) == 10

    def test_download_without_a_network(self, tmp_path, monkeypatch):
        def refuse(*_, **__):
            raise RuntimeError("no route to host")

        monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse)
        with pytest.raises(UserError, match="no route to host") as error:
            data.build_datasets(Settings(data="fashion_mnist", data_dir=str(tmp_path), download=True))
        assert "\n" not in str(error.value)


class TestValidationSource:
    def test_the_runs_own(self, image_folder):
        settings = Settings(data=str(image_folder))
        assert len(data.validation_source(settings, ["cat", "dog", "newt"]).targets) == 10

    def test_classes_that_changed(self, image_folder):
        with pytest.raises(UserError, match="no longer those"):
            data.validation_source(Settings(data=str(image_folder)), ["cat", "dog"])

    def test_another_folder_keeps_the_runs_numbering(self, tmp_path):
        make_folder(tmp_path, {"dog": 2, "newt": 1})
        source = data.validation_source(Settings(), ["cat", "dog", "newt"], str(tmp_path))
        assert source.targets == [1, 1, 2]
        with pytest.raises(UserError, match="the class dog"):
            data.validation_source(Settings(), ["cat", "newt"], str(tmp_path))


class TestCropPadding:
    """Each pixel's red is its row and green its column, so that what is left of an image tells where it was cropped."""

    CONFIG = DATA_CONFIG | {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

    def crops(self, padding, size=(32, 32)):
        rows, columns = (100 + each for each in np.mgrid[: size[0], : size[1]])
        image = Image.fromarray(np.stack([rows, columns, columns * 0], axis=2).astype(np.uint8))
        settings = Settings(crop_padding=padding, color_jitter=0.0)
        transform = data.train_transform(settings, self.CONFIG | {"input_size": (3, *size)})
        for seed in range(60):
            with data.seed_draws(seed):
                yield (255 * transform(image)).round().int()

    def test_images_are_shifted_and_mirrored_and_nothing_else(self):
        shifts, mirrored = set(), 0
        for crop in self.crops(4):
            if bool((crop[1].diff(dim=1) < 0).sum() > 16 * 32):
                crop, mirrored = crop.flip(2), mirrored + 1
            inside = crop[0] > 0
            top, left = crop[0][inside].min() - 100, crop[1][inside].min() - 100
            down, right = inside.any(1).int().argmax(), inside.any(0).int().argmax()
            shifts.add((int(down - top), int(right - left)))
            height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
            expected = torch.arange(100 + top, 100 + top + height)[:, None].expand(height, width)
            assert torch.equal(crop[0][inside].view(height, width), expected.int())
        assert {shift for pair in shifts for shift in pair} == set(range(-4, 5))
        assert 15 < mirrored < 45

    def test_no_padding_leaves_the_image(self):
        assert len({tuple(crop[0].flatten().tolist()) for crop in self.crops(0)}) == 1

    def test_other_shapes(self):
        assert {tuple(crop.shape) for crop in self.crops(4, (24, 40))} == {(3, 24, 40)}
