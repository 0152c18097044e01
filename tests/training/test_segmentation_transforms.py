"""Joint transforms: image and mask stay together, no new label arises, what lies outside is ignored."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms.v2 import RandomCrop, RandomRotation

from ctxenc.training.data import seed_draws
from ctxenc.training.segmentation.segment_settings import SegmentSettings
from ctxenc.training.segmentation.transforms import ScaleLongerSide, eval_transform, train_transform

MEAN, STD = (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)
STILL = {"scale_min": 1.0, "scale_max": 1.0, "rotate": 0.0, "flip": 0.0}


def settings(**chosen):
    return SegmentSettings(**{"data": "folder", "base_size": 64, "crop_size": 48} | chosen)


def pair(mask, colour=10):
    """An image whose grey value is ``colour`` times the label, so that it tells what its mask must be."""
    mask = torch.as_tensor(mask, dtype=torch.uint8)
    return tv_tensors.Image((mask * colour).expand(3, *mask.shape).clone()), tv_tensors.Mask(mask)


def regions(height=40, width=60):
    """Five labels with a gap between the last two: rings of unequal borders, with no symmetry."""
    mask = torch.zeros(height, width)
    for label, (top, left) in enumerate([(3, 5), (8, 20), (15, 25), (22, 40)], start=1):
        mask[top : height - top // 2, left : width - 2] = label + 3 * (label == 4)
    return mask


def draws(transform, images, count=20):
    for index in range(count):
        with seed_draws(index):
            yield transform(*images)


def labels_of(image):
    """The label that the grey value of a normalised ``pair`` stands for."""
    return image[1] * STD[1] * 255 / 10 + MEAN[1] * 255 / 10


class TestTraining:
    def test_shapes_and_types(self):
        for image, mask in draws(train_transform(settings(), MEAN, STD), pair(regions()), 3):
            assert (type(image), image.dtype, image.shape) == (torch.Tensor, torch.float32, (3, 48, 48))
            assert (type(mask), mask.dtype, mask.shape) == (torch.Tensor, torch.int64, (48, 48))

    def test_no_new_labels(self):
        found = set()
        for _, mask in draws(train_transform(settings(), MEAN, STD), pair(regions())):
            found |= set(mask.unique().tolist())
        assert found == {0, 1, 2, 3, 7, 255}

    @pytest.mark.parametrize("off", [(), ("flip",), ("rotate",), ("scale_min", "scale_max")])
    def test_image_and_mask_stay_together(self, off):
        chosen = settings(**{name: STILL[name] for name in off})
        seen = set()
        for image, mask in draws(train_transform(chosen, MEAN, STD), pair(regions()), 40):
            found = labels_of(image)[None]
            spread = F.max_pool2d(found, 3, 1, 1) + F.max_pool2d(-found, 3, 1, 1)
            inside = (spread[0] < 0.1) & (mask != 255)  # not on an edge of a region, where colours mix
            torch.testing.assert_close(found[0][inside], mask[inside].float(), atol=0.1, rtol=0)
            seen |= set(mask[inside].tolist())
        assert seen == {0, 1, 2, 3, 7}

    def test_the_still_transform_moves_nothing(self):
        mask = torch.randint(9, (48, 48), generator=torch.Generator().manual_seed(0))
        image, found = train_transform(settings(base_size=48, **STILL), MEAN, STD)(*pair(mask))
        assert torch.equal(found, mask)
        torch.testing.assert_close(labels_of(image), mask.float(), atol=1e-5, rtol=0)
        expected = (mask * 10 / 255 - MEAN[2]) / STD[2]
        torch.testing.assert_close(image[2], expected, atol=1e-5, rtol=0)

    def test_flips_half_of_the_time(self):
        mask = torch.zeros(48, 48)
        mask[:, :20] = 1
        transform = train_transform(settings(base_size=48, **STILL | {"flip": 0.5}), MEAN, STD)
        lefts = [bool(found[0, 0]) for _, found in draws(transform, pair(mask), 200)]
        assert 70 < sum(lefts) < 130  # six deviations

    def test_padding_is_ignored_and_of_the_mean_colour(self):
        images = pair(torch.full((10, 16), 3), colour=80)
        transform = train_transform(settings(base_size=16, crop_size=32, **STILL), MEAN, STD)
        corners = set()
        for image, mask in draws(transform, images):
            inside = mask == 3
            assert int(inside.sum()) == 160
            assert (mask[~inside] == 255).all()
            assert (image[:, ~inside] == 0).all()
            assert (image[:, inside] != 0).all()
            corners.add(tuple(inside.nonzero()[0].tolist()))
        assert len(corners) > 10  # anywhere in the crop

    def test_corners_of_a_rotation_are_ignored(self):
        chosen = settings(base_size=48, **STILL | {"rotate": 10.0})
        shares = []
        for image, mask in draws(train_transform(chosen, MEAN, STD), pair(torch.full((48, 48), 3), colour=80)):
            outside = mask == 255
            shares.append(float(outside.float().mean()))
            assert set(mask.unique().tolist()) <= {3, 255}
            assert mask[24, 24] == 3
            # Right at the border bilinear reading mixes in the mean colour; a pixel further nothing is left of the image.
            far = F.max_pool2d((~outside).float()[None], 3, 1, 1)[0] == 0
            assert (image[:, far] == 0).all()
        assert 0.03 < max(shares) < 0.1  # at 10 degrees a square loses 8 % in four corners
        assert min(shares) < 0.02

    def test_angles_go_both_ways_and_to_the_limit(self):
        chosen = train_transform(settings(rotate=30.0), MEAN, STD)
        rotation = next(each for each in chosen.transforms if isinstance(each, RandomRotation))
        with seed_draws(0):
            angles = [rotation.make_params([])["angle"] for _ in range(200)]
        assert -30 <= min(angles) < -25
        assert 25 < max(angles) <= 30

    def test_crops_come_from_everywhere(self):
        mask = torch.arange(64 * 64).reshape(64, 64) // 64  # the row
        transform = train_transform(settings(base_size=64, **STILL), MEAN, STD)
        tops = {int(found[0, 0]) for _, found in draws(transform, pair(mask, colour=1), 200)}
        assert tops == set(range(64 - 48 + 1))

    def test_a_crop_may_be_ignored_altogether(self):
        _, mask = next(draws(train_transform(settings(), MEAN, STD), pair(torch.full((40, 60), 255), colour=1), 1))
        assert mask.unique().tolist() == [255]

    def test_one_draw_for_one_seed(self):
        transform, images = train_transform(settings(), MEAN, STD), pair(regions())
        first, other = (image for image, _ in draws(transform, images, 2))
        again, _ = next(draws(transform, images))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_sides_that_almost_vanish(self):
        transform = train_transform(settings(base_size=8, crop_size=8), MEAN, STD)
        for _, mask in draws(transform, pair(torch.ones(2, 900))):
            assert mask.shape == (8, 8)
            assert (mask == 1).any()


class TestScaleLongerSide:
    @pytest.mark.parametrize(("shape", "size"), [((40, 80), (50, 100)), ((80, 40), (100, 50)), ((30, 30), (100, 100))])
    def test_the_longer_side_is_the_base_size(self, shape, size):
        image, mask = ScaleLongerSide(100)(*pair(torch.ones(shape)))
        assert image.shape[1:] == mask.shape == size

    def test_factors_are_uniform_between_the_limits(self):
        transform, images = ScaleLongerSide(1000, (0.5, 2.0)), pair(torch.ones(4, 4))
        with seed_draws(0):
            sizes = torch.tensor([transform.make_params(list(images))["size"][0] for _ in range(2000)])
        assert 500 <= sizes.min() < 510
        assert 1990 < sizes.max() <= 2000
        assert abs(float(sizes.float().mean()) - 1250) < 6 * 433 / 2000**0.5

    @pytest.mark.parametrize("size", [13, 43, 75, 150, 211])
    def test_the_mask_is_read_where_the_image_is(self, size):
        """An edge lies at the same place in both, in the mean: read at corners, masks are half a pixel off."""
        shifts = []
        for edge in range(20, 100):
            mask = torch.zeros(1, 128)
            mask[:, edge:] = 1
            image, found = ScaleLongerSide(size)(*pair(mask, colour=200))
            shifts.append(float(image[0].float().sum() / 200 - found.float().sum()))
        assert abs(sum(shifts) / len(shifts)) < 0.03

    def test_large_regions_are_read_exactly(self):
        mask = torch.zeros(4, 4)
        mask[2:, 1:] = 5
        _, found = ScaleLongerSide(16)(*pair(mask))
        assert torch.equal(found, torch.kron(mask, torch.ones(4, 4)).byte())


class TestValidation:
    def test_the_image_is_scaled_and_the_mask_is_as_it_was(self):
        image, mask = eval_transform(settings(base_size=30), MEAN, STD)(*pair(regions()))
        assert (image.shape, image.dtype, type(image)) == ((3, 20, 30), torch.float32, torch.Tensor)
        assert (mask.dtype, type(mask)) == (torch.int64, torch.Tensor)
        assert torch.equal(mask, regions().long())

    def test_nothing_is_drawn(self):
        transform = eval_transform(settings(), MEAN, STD)
        first, *others = (image for image, _ in draws(transform, pair(regions()), 5))
        assert all(torch.equal(first, each) for each in others)

    def test_the_whole_image_at_its_own_size_is_only_normalised(self):
        mask = regions(64, 64)
        image, found = eval_transform(settings(), MEAN, STD)(*pair(mask))
        torch.testing.assert_close(labels_of(image), found.float(), atol=1e-5, rtol=0)


def test_the_recipe_of_the_paper():
    transforms = train_transform(SegmentSettings(data="voc"), MEAN, STD).transforms
    scale, rotation, crop = (
        next(each for each in transforms if isinstance(each, kind))
        for kind in (ScaleLongerSide, RandomRotation, RandomCrop)
    )
    assert (scale.base_size, scale.scale, rotation.degrees, tuple(crop.size)) == (
        520,
        (0.5, 2.0),
        [-10, 10],
        (480, 480),
    )
    assert transforms[0].p == 0.5
    assert [transforms.index(each) for each in (scale, rotation, crop)] == [1, 4, 5]
    assert train_transform(replace(SegmentSettings(data="voc"), flip=0.0), MEAN, STD).transforms[0].p == 0
