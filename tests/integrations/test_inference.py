"""Sliding crops, scales and flips: with models whose result is known for every pixel."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxenc.integrations import inference
from ctxenc.integrations.inference import predict


class PerPixel(nn.Module):
    """Logits (x0, x1, x0 - x1) of each pixel, whatever is around it; keeps what it was shown."""

    def __init__(self, as_dict: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.as_dict = as_dict
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        self.seen.append(x)
        assert not torch.is_grad_enabled()
        assert not self.training
        assert not self.norm.training
        out = torch.stack([x[:, 0], x[:, 1], x[:, 0] - x[:, 1]], 1)
        return {"out": out, "se": out[:, :, 0, 0]} if self.as_dict else out


class Column(nn.Module):
    """Probability 1 of class c in the crop's column c: a result that depends on where the crop lies."""

    classes = 6

    def forward(self, x: Tensor) -> Tensor:
        columns = torch.arange(x.shape[3]).clamp(max=self.classes - 1)
        hot = F.one_hot(columns, self.classes).T[:, None]  # (classes, 1, w)
        return 100.0 * hot.expand(len(x), -1, x.shape[2], -1)


class Corner(nn.Module):
    """Every pixel gets the class that the upper left pixel of its crop names."""

    classes = 12

    def forward(self, x: Tensor) -> Tensor:
        return 100.0 * F.one_hot(x[:, 0, 0, 0].long(), self.classes)[:, :, None, None].expand(-1, -1, *x.shape[2:])


def noise(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def expected(images):
    return torch.stack([images[:, 0], images[:, 1], images[:, 0] - images[:, 1]], 1).softmax(1)


@pytest.mark.parametrize("as_dict", [True, False])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("stride", [1.0, 2 / 3, 0.25, 0.01])
@pytest.mark.parametrize("crop", [None, 1, 7, (4, 9), (40, 5), 50])
@pytest.mark.parametrize("size", [(13, 17), (8, 6)])
def test_what_each_pixel_says_is_not_changed(size, crop, stride, flip, as_dict):
    if crop == 1 and stride < 1:
        stride = 1e-9  # rounds to no step at all
    images = noise(2, 3, *size)
    got = predict(PerPixel(as_dict), images, crop=crop, stride=stride, flip=flip, batch_size=5)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected(images), rtol=0, atol=1e-6)


def test_one_image_is_a_batch_of_one():
    image = noise(3, 9, 7)
    torch.testing.assert_close(predict(PerPixel(), image, crop=4), expected(image[None]), rtol=0, atol=1e-6)


def test_crops_start_every_stride_and_end_with_the_border():
    model = PerPixel()
    rows = torch.arange(11.0)[:, None].expand(11, 14)
    columns = torch.arange(14.0).expand(11, 14)
    predict(model, torch.stack([rows, columns, rows]), crop=(6, 9), stride=2 / 3, batch_size=100)
    (crops,) = model.seen  # 6 * 2/3 = 4: rows 0, 4, 5; 9 * 2/3 = 6: columns 0, 5
    assert crops.shape == (6, 3, 6, 9)
    assert crops[:, 0, 0, 0].tolist() == [0, 0, 4, 4, 5, 5]
    assert crops[:, 1, 0, 0].tolist() == [0, 5, 0, 5, 0, 5]


@pytest.mark.parametrize(
    ("side", "crop", "stride", "starts"),
    [
        (480, 480, 2 / 3, [0]),
        (481, 480, 2 / 3, [0, 1]),
        (800, 480, 2 / 3, [0, 320]),
        (801, 480, 2 / 3, [0, 320, 321]),
        (300, 480, 2 / 3, [0]),
        (8, 4, 1, [0, 4]),
        (9, 4, 1, [0, 4, 5]),
    ],
)
def test_starts(side, crop, stride, starts):
    assert inference._place_along(side, crop, stride) == starts


def test_overlaps_are_averaged_as_probabilities():
    # Crops of 4 columns at 0, 2 and 3: a pixel is the mean of the classes that it has in them.
    got = predict(Column(), noise(3, 1, 7), crop=(1, 4), stride=0.5)[0, :, 0]
    wanted = torch.zeros(6, 7)
    covers = {0: [0], 1: [1], 2: [2, 0], 3: [3, 1, 0], 4: [2, 1], 5: [3, 2], 6: [3]}
    for pixel, classes in covers.items():
        wanted[classes, pixel] = 1 / len(classes)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_overlaps_are_counted_in_both_directions():
    """Against a plain loop over all crops."""
    image = torch.randint(0, 12, (3, 10, 9), generator=torch.Generator().manual_seed(3)).float()
    total, covers = torch.zeros(12, 10, 9), torch.zeros(10, 9)
    for top in (0, 2, 4, 6):
        for left in (0, 3, 4):
            total[int(image[0, top, left]), top : top + 4, left : left + 5] += 1
            covers[top : top + 4, left : left + 5] += 1
    assert covers.max() > 3
    got = predict(Corner(), image, crop=(4, 5), stride=0.6)[0]
    torch.testing.assert_close(got, total / covers, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_do_not_change_the_result_nor_exceed_their_size(batch_size):
    model, images = PerPixel(), noise(3, 3, 11, 10)
    got = predict(model, images, crop=4, batch_size=batch_size, flip=True)
    torch.testing.assert_close(got, expected(images), rtol=0, atol=1e-6)
    crops = 3 * 4 * 3  # rows 0, 3, 6, 7 and columns 0, 3, 6 of three images
    assert max(map(len, model.seen)) == min(batch_size, crops)
    assert sum(map(len, model.seen)) == 2 * crops


def test_a_flipped_crop_is_flipped_back():
    image = noise(3, 4, 6)
    plain, both = (predict(Column(), image, flip=flip) for flip in (False, True))
    torch.testing.assert_close(both, (plain + plain.flip(-1)) / 2)
    assert not torch.allclose(both, plain, atol=0.1)


@pytest.mark.parametrize("crop", [None, 8])
def test_a_mirrored_image_gives_the_mirrored_result(crop):
    """Of a convolution that is not symmetric itself, at scales too; with crops on a grid that is."""
    torch.manual_seed(0)
    model, images = nn.Conv2d(3, 4, 3, padding=1), noise(2, 3, 12, 16)

    def call(x, flip):
        return predict(model, x, scales=(0.5, 1.0, 1.25), flip=flip, crop=crop, stride=0.5)

    torch.testing.assert_close(call(images.flip(-1), True), call(images, True).flip(-1), rtol=0, atol=1e-6)
    assert not torch.allclose(call(images.flip(-1), False), call(images, False).flip(-1), atol=1e-2)


@pytest.mark.parametrize("size", [(3, 5), (3, 12), (12, 5)])
def test_padding_is_zero_at_the_right_and_below_and_never_leaks(size):
    model, images = PerPixel(), noise(1, 3, *size) + 10
    got = predict(model, images, crop=(8, 10))
    for crops in model.seen:
        assert crops.shape[2:] == (8, 10)
        assert (crops[:, :, : size[0], : size[1]] > 0).all()
        assert not crops[:, :, size[0] :].any()
        assert not crops[:, :, :, size[1] :].any()
    torch.testing.assert_close(got, expected(images), rtol=0, atol=1e-6)
    assert got.shape == (1, 3, *size)


@pytest.mark.parametrize("flip", [False, True])
def test_what_the_model_says_of_padding_is_cut_off(flip):
    class Loud(nn.Module):
        """Class 1 where there is padding, class 0 elsewhere; NaN in the last row."""

        def forward(self, x):
            padding = (x == 0).all(1)
            out = 100.0 * torch.stack([~padding, padding], 1)
            out[:, :, -1] = torch.nan
            return out

    got = predict(Loud(), torch.ones(3, 5, 6), crop=(7, 9), scales=(0.5, 1.0), flip=flip)
    torch.testing.assert_close(got, torch.tensor([1.0, 0.0])[None, :, None, None].expand(1, 2, 5, 6))


@pytest.mark.parametrize(
    ("size", "scale", "shown"),
    [  # as MultiEvalModule of PyTorch-Encoding computes them, but for the last, where it gets 0
        ((375, 500), 1.0, (390, 520)),
        ((500, 375), 1.0, (520, 390)),
        ((200, 300), 1.0, (347, 520)),
        ((64, 64), 0.5, (260, 260)),
        ((256, 683), 1.75, (341, 910)),
        ((683, 256), 0.75, (390, 146)),
        ((97, 96), 1.25, (650, 643)),
        ((3, 2000), 0.5, (1, 260)),
    ],
)
def test_scales_of_the_longer_side(size, scale, shown):
    model = PerPixel()
    result = predict(model, noise(3, *size), scales=[scale], base_size=520)
    assert model.seen[0].shape == (1, 3, *shown)
    assert result.shape == (1, 3, *size)


def test_scales_against_torch():
    images = noise(2, 3, 10, 15)

    def resized(x, size):
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)

    # 10 x 15 at 0.5, 1 and 1.25; halves are rounded to even, as Python does.
    sides = [(5, 8), (10, 15), (12, 19)]
    model = PerPixel()
    got = predict(model, images, scales=(0.5, 1.0, 1.25))
    assert [tuple(each.shape[2:]) for each in model.seen] == sides
    wanted = torch.stack([resized(expected(resized(images, side)), (10, 15)) for side in sides]).mean(0)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.sum(1), torch.ones(2, 10, 15))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (31, 2)])
def test_tiny_and_odd_sizes(size):
    got = predict(PerPixel(), noise(1, 3, *size), scales=(0.25, 0.5, 1.0, 1.75), flip=True, crop=4)
    assert got.shape == (1, 3, *size)
    torch.testing.assert_close(got.sum(1), torch.ones(1, *size))


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.25, 1.75])
def test_pixels_keep_their_place_at_any_scale(scale):
    """A ramp along each axis, away from the border, is shifted by less than a fiftieth of a pixel on average."""
    ramp = 0.01 * torch.arange(48.0)
    image = torch.stack([ramp.expand(40, 48), ramp[:40, None].expand(40, 48), torch.zeros(40, 48)])
    got, wanted = (
        each[0, :2, 5:-5, 5:-5] for each in (predict(PerPixel(), image, scales=(scale,)), expected(image[None]))
    )
    for number, axis in ((0, 1), (1, 0)):
        slope = wanted[number].diff(dim=axis).mean()
        assert abs((got - wanted)[number].mean() / slope) < 0.02


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_image_keeps_its_dtype_and_the_result_is_fp32(dtype):
    model, images = PerPixel(), noise(1, 3, 9, 9, dtype=dtype)
    got = predict(model, images, scales=(0.75, 1.0))
    assert [each.dtype for each in model.seen] == [dtype, dtype]
    assert got.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_softmax_is_taken_in_fp32(dtype):
    class Half(nn.Module):
        def forward(self, x):
            return torch.cat([x, -x], 1).to(dtype)

    image = 3 * noise(1, 8, 8)
    logits = torch.cat([image, -image]).to(dtype)
    assert torch.equal(predict(Half(), image)[0], logits.float().softmax(0))


def test_autocast_is_the_callers():
    class Watch(nn.Conv2d):
        def forward(self, x):
            out = super().forward(x)
            self.seen = out.dtype
            return out

    model, image = Watch(3, 4, 1), noise(3, 6, 6)
    plain = predict(model, image)
    assert model.seen == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = predict(model, image, scales=(0.5, 1.0), crop=4)
    assert model.seen == torch.bfloat16
    assert mixed.dtype == plain.dtype == torch.float32


@pytest.mark.parametrize("fails", [False, True])
def test_modes_of_all_modules_come_back(fails):
    class Fails(PerPixel):
        def forward(self, x):
            raise RuntimeError("out of memory")

    model = nn.Sequential(nn.Dropout(), Fails() if fails else PerPixel())
    model[1].norm.eval()  # frozen, in a network that trains
    before = [module.training for module in model.modules()]
    assert before == [True, True, True, False]
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            predict(model, noise(3, 4, 4))
    else:
        predict(model, noise(3, 4, 4))
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_the_image_is_not_changed():
    image = noise(3, 9, 9)
    before = image.clone()
    got = predict(nn.Identity(), image, scales=(1.0, 1.0), crop=4, flip=True)
    got.zero_()
    assert torch.equal(image, before)


def test_the_models_device_is_used():
    """The meta device stands for a second one."""
    got = predict(nn.Conv2d(3, 4, 1, device="meta"), noise(3, 6, 7), crop=4)
    assert (got.device.type, got.shape) == ("meta", (1, 4, 6, 7))
    assert inference._find_device(nn.BatchNorm2d(3, affine=False, device="meta"), noise(3)).type == "meta"


def test_progress(capsys, monkeypatch):
    arguments = {"crop": 4, "scales": (1.0, 2.0), "batch_size": 5}
    predict(PerPixel(), noise(2, 3, 6, 6), **arguments)
    assert capsys.readouterr().err == ""
    predict(PerPixel(), noise(2, 3, 6, 6), progress=True, **arguments)
    # 6 / 4: starts 0 and 2; 12 / 4, every 3: starts 0, 3, 6, 8; twice, for two images.
    assert "100%" in (err := capsys.readouterr().err)
    assert f"{2 * (2 * 2 + 4 * 4)}/{2 * (2 * 2 + 4 * 4)}" in err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    predict(PerPixel(), noise(3, 6, 6))
    with pytest.raises(ImportError, match="predict: progress=True needs tqdm: pip install tqdm"):
        predict(PerPixel(), noise(3, 6, 6), progress=True)


def test_one_buffer_of_the_results_size_per_scale():
    """Not a list of all crops: the peak of what is alive does not grow with the number of crops."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Allocations(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.large = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result._base is None and result.numel() >= 6 * 40 * 40:
                self.large += func is torch.ops.aten.new_zeros.default
            return result

    with Allocations() as seen:
        predict(Column(), noise(1, 3, 40, 40), crop=4, stride=0.5, batch_size=2)
    assert seen.large == 1


MODEL, IMAGE = PerPixel(), noise(3, 6, 6)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"model": lambda x: x}, TypeError, "model must be a torch.nn.Module, got function"),
        ({"image": IMAGE[0]}, ValueError, r"image must have shape \(C, H, W\) or \(B, C, H, W\), none 0, got \(6, 6\)"),
        ({"image": IMAGE[:, :0]}, ValueError, r"image must have shape .*, got \(3, 0, 6\)"),
        ({"image": IMAGE[None][:0]}, ValueError, r"image must have shape .*, got \(0, 3, 6, 6\)"),
        ({"image": IMAGE.to(torch.uint8)}, TypeError, "image must be a normalised .* tensor, got torch.uint8"),
        ({"image": [IMAGE]}, TypeError, "image must be a normalised .* tensor, got list"),
        ({"scales": ()}, ValueError, r"scales must be at least one positive number, got \(\)"),
        ({"scales": (1.0, 0)}, ValueError, r"scales must be at least one positive number, got \(1.0, 0\)"),
        ({"scales": (float("nan"),)}, ValueError, r"scales must be at least one positive number, got \(nan,\)"),
        ({"scales": 1.0}, TypeError, "scales must be a sequence of positive numbers, got 1.0"),
        ({"scales": "1"}, TypeError, "scales must be a sequence of positive numbers, got '1'"),
        ({"stride": 0}, ValueError, r"stride must be a share of the crop in \(0, 1\], got 0"),
        ({"stride": 1.5}, ValueError, r"stride must be a share of the crop in \(0, 1\], got 1.5"),
        ({"stride": "2/3"}, TypeError, r"stride must be a share of the crop in \(0, 1\], got '2/3'"),
        ({"base_size": 0}, ValueError, "base_size must be a positive integer, got 0"),
        ({"base_size": 520.0}, TypeError, "base_size must be a positive integer, got 520.0"),
        ({"batch_size": 0}, ValueError, "batch_size must be a positive integer, got 0"),
        ({"batch_size": 1.0}, TypeError, "batch_size must be a positive integer, got 1.0"),
        ({"crop": 0}, ValueError, "crop must be a positive integer, a pair of them or None, got 0"),
        ({"crop": (4, -1)}, ValueError, r"crop must be a positive .*, got \(4, -1\)"),
        ({"crop": (4, 4, 4)}, ValueError, r"crop must be a positive .*, got \(4, 4, 4\)"),
        ({"crop": 4.0}, TypeError, "crop must be a positive .*, got 4.0"),
        ({"crop": "480"}, TypeError, "crop must be a positive .*, got '480'"),
    ],
)
def test_arguments_are_checked(settings, error, text):
    arguments = {"model": MODEL, "image": IMAGE} | settings
    with pytest.raises(error, match=f"predict: {text}"):
        predict(arguments.pop("model"), arguments.pop("image"), **arguments)
    assert not MODEL.seen


@pytest.mark.parametrize(
    ("output", "error", "text"),
    [
        (lambda x: {"logits": x, "aux": x}, ValueError, 'model must return a dict with "out", got logits, aux'),
        (lambda x: {}, ValueError, 'model must return a dict with "out", got none'),
        (lambda x: [x], TypeError, "model must return a tensor or a dict with one, got list"),
        (
            lambda x: x[:, :, ::2],
            ValueError,
            r"model must map \(1, 3, 6, 6\) to logits \(1, 'classes', 6, 6\), got \(1, 3, 3, 6\)",
        ),
        (lambda x: x.mean((2, 3)), ValueError, r"got \(1, 3\)"),
    ],
)
def test_what_the_model_returns_is_checked(output, error, text):
    class Returns(nn.Module):
        def forward(self, x):
            return output(x)

    with pytest.raises(error, match=f"{text}$"):
        predict(Returns(), IMAGE)
