"""The embedded scenes: that nothing but the cue tells the class of an ambiguous region, and that the cue lies out of sight."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.local_patches import cut_patches, local_patch_accuracy
from ctxenc.training.segmentation import scenes
from ctxenc.training.segmentation.scenes import AMBIGUOUS, CLASSES, GAP, IGNORED, MEAN, SCENES, SIZE, STD, Scenes

CUES = [cue for cue, _ in SCENES.values()]
AMBIGUOUS_CLASSES = [name for pair in AMBIGUOUS for name in pair]


def numbers(names):
    return torch.tensor([CLASSES.index(name) for name in names])


def twins(monkeypatch, length):
    """Scenes, and the same drawn as the other type of the pair."""
    dataset = Scenes(False, length)
    first = [dataset[index] for index in range(length)]
    street, space, slide, hoard = SCENES.items()
    with monkeypatch.context() as patch:
        patch.setattr(scenes, "SCENES", dict([space, street, hoard, slide]))
        other = Scenes(False, length)
        return list(zip(first, [other[index] for index in range(length)], strict=True))


def test_what_is_where():
    dataset = Scenes(True, 8)
    assert len(dataset) == 8
    for index, (kind, own) in enumerate(list(SCENES.items()) * 2):
        image, mask = dataset[index]
        assert scenes.scene_type(index) == kind
        assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((3, 96, 96), torch.float32, (96, 96), torch.int64)
        assert torch.equal(image[0], image[1])
        assert torch.equal(image[0], image[2])
        assert set(mask.unique().tolist()) == {0, *numbers(own).tolist(), IGNORED}


def test_a_pair_shares_a_photograph_and_nobody_else_does():
    photographs = scenes.PHOTOGRAPHS
    for first, second in AMBIGUOUS:
        assert photographs[first] == photographs[second]
    assert len(set(photographs.values())) == len(CLASSES) - len(AMBIGUOUS)
    assert sorted(AMBIGUOUS_CLASSES) == sorted(ambiguous for _, ambiguous in SCENES.values())
    assert len(set(CUES)) == len(SCENES)


def test_only_the_cue_tells_twins_apart(monkeypatch):
    swap = torch.arange(256)
    for first, second in AMBIGUOUS:
        swap[numbers([first, second])] = numbers([second, first])
    for index, ((image, mask), (other_image, other_mask)) in enumerate(twins(monkeypatch, 24)):
        layout = scenes.draw_layout(np.random.default_rng((0, False, 0, index)))
        cue = torch.from_numpy(layout == scenes.CUE)
        assert torch.equal(image[:, ~cue], other_image[:, ~cue])
        assert not torch.equal(image[:, cue], other_image[:, cue])
        assert torch.equal(swap[mask[~cue]], other_mask[~cue])
        assert torch.isin(other_mask[cue], torch.cat([numbers(CUES), torch.tensor([IGNORED])])).all()


def test_the_cue_lies_further_than_the_gap():
    for index in range(24):
        layout = scenes.draw_layout(np.random.default_rng(index))
        ambiguous = layout == scenes.AMBIGUOUS_REGION
        rows, columns = np.nonzero(ambiguous)
        cue = np.argwhere(layout == scenes.CUE)
        distances = np.maximum(abs(cue[:, :1] - rows), abs(cue[:, 1:] - columns))
        assert distances.min() > GAP
        assert len(cue) > 0.08 * SIZE**2
        assert 0.19 < ambiguous.mean() < 0.41


@pytest.mark.parametrize(("stage", "blind"), [(1, True), (4, False)])
def test_what_a_small_network_sees(monkeypatch, stage, blind):
    torch.manual_seed(0)
    # The last norm of a block starts at zero in timm, which would hide what its convolutions see.
    kwargs = {"features_only": True, "out_indices": (stage,), "output_stride": 8, "zero_init_last": False}
    backbone = timm.create_model("test_resnet", **kwargs).eval()
    head = nn.Conv2d(backbone.feature_info.channels()[-1], 4, 3, padding=1)
    for (image, mask), (other, _) in twins(monkeypatch, 8):
        with torch.inference_mode():
            logits = F.interpolate(head(backbone(torch.stack([image, other]))[0]), image.shape[1:], mode="bilinear")
        ambiguous = torch.isin(mask, numbers(AMBIGUOUS_CLASSES))
        difference = (logits[0] - logits[1]).abs()
        assert (difference[:, ambiguous].max() < 1e-6 * difference.max()) == blind


@pytest.mark.figures
def test_a_patch_is_not_enough_and_the_type_of_scene_is():
    result = local_patch_accuracy(train_scenes=240, test_scenes=400, steps=120)
    for right, count in result.in_pair.values():
        assert count > 190  # of 200
        # Each patch has a scene of its own, so that chance is Binomial(count, 1/2): five deviations, one run in a million.
        assert abs(right - count / 2) < 5 * math.sqrt(count) / 2
    assert all(
        result.told[name] > 0.75 for name in AMBIGUOUS_CLASSES
    )  # 0.94 and more; 0.68 is the most that may pass above
    assert np.mean([result.alone[name] for name in CUES]) > 0.5  # 0.77; chance is 1 / 9
    assert result.alone["background"] > 0.8  # 0.97


def test_patches_lie_inside_their_regions(monkeypatch):
    levels = {photograph: 30 * number for number, photograph in enumerate(set(scenes.PHOTOGRAPHS.values()))}
    flat = {photograph: np.full((100, 120), level, np.uint8) for photograph, level in levels.items()}
    monkeypatch.setattr(scenes, "read_texture", lambda photograph, train: flat[photograph])
    patches, labels, types = cut_patches(Scenes(True, 12), each=3, seed=0)
    assert patches.shape == (len(labels), 1, 17, 17)
    assert torch.equal(patches.amax((1, 2, 3)), patches.amin((1, 2, 3)))
    for label, kind in zip(labels.tolist(), types.tolist(), strict=True):
        assert CLASSES[label] in ("background", *list(SCENES.values())[kind])


def test_a_region_is_filled_from_the_texture_of_its_class(monkeypatch):
    monkeypatch.setattr(scenes, "draw_crop", lambda texture, generator: np.full((SIZE, SIZE), texture))
    dataset = Scenes(True, 4)
    dataset.textures = {name: number / 10 for number, name in enumerate(CLASSES)}
    for index in range(4):
        image, mask = dataset[index]
        seen = mask != IGNORED
        grey = image[0] * scenes.STD[0] + scenes.MEAN[0]
        torch.testing.assert_close(grey[seen], mask[seen] / 10)


def test_borders_are_ignored():
    mask = torch.zeros(5, 6, dtype=torch.int64)
    mask[:, 3:] = 7
    expected = mask.clone()
    expected[:, 2:4] = IGNORED
    assert torch.equal(scenes.without_borders(mask), expected)
    assert torch.equal(scenes.without_borders(mask[:, :3]), mask[:, :3])


def test_a_scene_depends_on_its_key_alone():
    dataset, again = Scenes(True, 9, seed=1), Scenes(True, 9, seed=1)
    state = torch.get_rng_state()
    images = [dataset[index][0] for index in range(9)]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    for index in reversed(range(9)):
        assert torch.equal(again[index][0], images[index])
    again.set_epoch(1)
    others = [images[4], again[0][0], Scenes(True, 9, seed=2)[0][0], Scenes(False, 9, seed=1)[0][0]]
    assert not any(torch.equal(images[0], other) for other in others)
    assert not torch.equal(dataset[0][1], Scenes(False, 9, seed=1)[0][1])  # the layout too, not the textures alone


def test_workers_change_nothing():
    dataset = Scenes(True, 6)
    loaded = torch.cat([images for images, _ in DataLoader(dataset, 2, num_workers=2)])
    assert torch.equal(loaded, torch.stack([dataset[index][0] for index in range(6)]))


def test_training_and_test_textures_share_no_pixel(monkeypatch):
    pixels = np.zeros((200, 400), np.uint8)
    pixels[:, 200:] = 255
    monkeypatch.setattr(scenes, "read_photograph", lambda name: Image.fromarray(pixels))
    read = scenes.read_texture.__wrapped__
    assert (read("brick.png", True) == 0).all()
    assert (read("brick.png", False) == 255).all()
    assert read("brick.png", True).shape == (100, 100)


def test_crops_are_turned_mirrored_and_changed_in_level():
    texture = np.arange(100 * 130).reshape(100, 130) % 256
    generator = np.random.default_rng(0)
    crops = np.stack([scenes.draw_crop(texture, generator) for _ in range(400)])
    assert crops.shape[1:] == (SIZE, SIZE)
    assert (crops.min(), crops.max()) == (0, 1)
    steps = {tuple(np.sign([crop[48, 49] - crop[48, 48], crop[49, 48] - crop[48, 48]]).astype(int)) for crop in crops}
    assert len(steps) >= 4
    means = crops.mean((1, 2))
    assert means.min() < 0.4 < 0.6 < means.max()


def test_mean_and_std_are_those_of_the_images():
    dataset = Scenes(True, 200, seed=3)
    images = torch.stack([dataset[index][0][0] for index in range(200)])
    assert abs(float(images.mean())) < 0.1
    assert abs(float(images.std()) - 1) < 0.1


class Guess(nn.Module):
    """Be right in the first rows of pixels of each scene, and wrong in most others."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__()
        self.rows, self.seen = rows, 0

    def forward(self, x):
        out = []
        for _ in x:
            mask = Scenes(False, len(self.rows))[self.seen][1]
            mask[mask == IGNORED] = 0
            mask[self.rows[self.seen] :] = 1  # a class that few pixels have
            out.append(F.one_hot(mask, len(CLASSES)).permute(2, 0, 1).float())
            self.seen += 1
        return {"out": torch.stack(out)}


def test_each_row_is_the_scene_of_median_gain_among_those_that_the_first_network_has_worst():
    """Of twelve scenes of each type, the first network is wrong in the last three; the second mends all, none or half of these."""
    kinds = len(SCENES)
    first = [SIZE] * 9 * kinds + [0] * 3 * kinds
    second = [0] * 9 * kinds + [SIZE] * kinds + [0] * kinds + [SIZE // 2] * kinds
    figure = scenes.draw_predictions({"first": Guess(first), "second": Guess(second)}, length=12 * kinds)
    axes = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in axes[:4]] == ["scene", "truth", "first", "second"]
    for row in range(kinds):
        image = Scenes(False, 12 * kinds)[11 * kinds + row][0]
        shown = axes[4 * row].images[0].get_array()
        np.testing.assert_allclose(shown, image[0] * STD[0] + MEAN[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Scenes(True, 0), "Scenes: length must be at least 1, got 0"),
        (lambda: local_patch_accuracy(test_scenes=3), "local_patch_accuracy: test_scenes must be at least 4, got 3"),
        (lambda: local_patch_accuracy(steps=0), "local_patch_accuracy: steps must be at least 1, got 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        call()


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside(index):
    with pytest.raises(IndexError, match=rf"index must be in \[0, 4\), got {index}"):
        Scenes(True, 4)[index]
