"""Colours of masks, overlays and legends."""

import numpy as np
import pytest
import torch
from PIL import Image

from ctxenc.training.segmentation import mask_pictures
from ctxenc.training.segmentation.mask_pictures import (
    colour_mask,
    index_mask,
    legend,
    overlay,
    overlay_with_legend,
    voc_palette,
)
from ctxenc.training.segmentation.segment_report import draw_masks

MASK = torch.tensor([[0, 1, 1, 1], [2, 255, 1, 1]])
CLASSES = ["background", "aeroplane", "bicycle", "bird"]
PALETTE = voc_palette(4)
GREY = Image.new("RGB", (4, 2), (100, 100, 100))


@pytest.mark.parametrize("size", [(60, 80), (1200, 900)])
def test_a_picture_has_the_classes_at_half_strength_and_their_legend_beside_them(rows, size):
    """Letters have 16 pixels where the picture is shown at the width of a page, and the photograph is never shrunk."""
    photograph = Image.new("RGB", size, (100, 100, 100))
    mask = torch.ones(size[::-1], dtype=torch.int64)
    mask[:, : size[0] // 2] = 0
    picture = overlay_with_legend(photograph, mask, CLASSES, PALETTE)
    width, height = size if max(size) == 1200 else (480, 640)
    names = legend(mask, CLASSES, PALETTE, font_size=max(width, height) // 40)
    assert picture.size == (width + names.width, max(height, names.height))
    pixels = np.asarray(picture)
    assert pixels[height // 2, 2].tolist() == [100, 100, 100]  # the background
    assert pixels[height // 2, width - 3].tolist() == [114, 50, 50]
    assert {row[1:] for row in rows} == {("background", "50.0 %"), ("aeroplane", "50.0 %")}
    assert {row[1]: row[0] for row in rows[:2]} == {"background": (255, 255, 255), "aeroplane": (128, 0, 0)}


def test_a_mask_of_class_numbers_shows_their_colours():
    mask = MASK.where(MASK != 255, 3)
    picture = index_mask(mask, PALETTE)
    assert np.array_equal(np.asarray(picture), mask)
    assert np.array_equal(picture.convert("RGB"), colour_mask(mask, PALETTE))


def test_voc_palette():
    palette = voc_palette()
    assert len(set(palette)) == len(palette) == 256
    # As PASCAL VOC publishes them: background, aeroplane, bicycle, bird, boat, ..., cat, ..., tvmonitor, void.
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0)}
    known |= {15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {number: palette[number] for number in known} == known
    assert voc_palette(21) == palette[:21]


@pytest.mark.parametrize("num_classes", [0, 257])
def test_voc_palette_has_256_colours(num_classes):
    with pytest.raises(ValueError, match=f"voc_palette: num_classes must be from 1 to 256, got {num_classes}"):
        voc_palette(num_classes)


@pytest.mark.parametrize("palette", [PALETTE, voc_palette()])
@pytest.mark.parametrize("mask", [MASK, MASK.to(torch.uint8), MASK.numpy().astype(np.int32)])
def test_colour_mask(mask, palette):
    picture = colour_mask(mask, palette)
    assert (picture.mode, picture.size) == ("RGB", (4, 2))
    black, red, green, white = (0, 0, 0), (128, 0, 0), (0, 128, 0), (255, 255, 255)
    assert np.asarray(picture).tolist() == [
        list(map(list, row)) for row in ((black, red, red, red), (green, white, red, red))
    ]


def test_colour_mask_ignores_what_it_is_told():
    picture = np.asarray(colour_mask(MASK.where(MASK != 255, -1), PALETTE, ignore_index=-1))
    assert np.array_equal(picture, np.asarray(colour_mask(MASK, PALETTE)))


def test_overlay():
    image = np.asarray(overlay(GREY, MASK, PALETTE, alpha=0.25))
    assert image[0, 0].tolist() == [75, 75, 75]
    assert image[0, 1].tolist() == [107, 75, 75]
    assert image[1, 1].tolist() == [138, 138, 138]
    assert np.array_equal(overlay(GREY, MASK, PALETTE, alpha=0), GREY)
    assert np.array_equal(overlay(GREY, MASK, PALETTE, alpha=1), colour_mask(MASK, PALETTE))
    assert overlay(GREY.convert("L"), MASK, PALETTE).mode == "RGB"


def test_overlay_leaves_the_background():
    image = np.asarray(overlay(GREY, MASK, PALETTE, alpha=0.25, background=0)).copy()
    assert image[0, 0].tolist() == [100, 100, 100]
    image[0, 0] = 75
    assert np.array_equal(image, overlay(GREY, MASK, PALETTE, alpha=0.25))
    assert GREY.getcolors() == [(8, (100, 100, 100))]  # the photograph itself is untouched


@pytest.fixture
def rows(monkeypatch):
    """What legend draws, as text."""
    seen = []
    draw = mask_pictures._draw_rows

    def remember(rows, font_size):
        seen.extend(rows)
        return draw(rows, font_size)

    monkeypatch.setattr(mask_pictures, "_draw_rows", remember)
    return seen


def test_legend_lists_what_occurs_largest_first(rows):
    legend(MASK, CLASSES, PALETTE)
    assert rows == [
        ((128, 0, 0), "aeroplane", "62.5 %"),
        ((0, 0, 0), "background", "12.5 %"),
        ((0, 128, 0), "bicycle", "12.5 %"),
        ((255, 255, 255), "ignored", "12.5 %"),
    ]


def test_legend_of_names_that_are_no_text(rows):
    picture = legend(MASK, ["\ud800", "\x1b\n", "bicycle"], PALETTE)
    assert [row[1] for row in rows[:2]] == [r"\x1b\n", r"\ud800"]
    assert picture.height == legend(MASK, CLASSES, PALETTE).height


def test_legend_of_rare_and_of_ignored_pixels(rows):
    rare = torch.zeros(100, 100, dtype=torch.int64)
    rare[0, :4] = 1
    rare[1, :6] = 2
    legend(rare, CLASSES, voc_palette())
    legend(torch.full((2, 2), 255), CLASSES, PALETTE)
    assert [row[1:] for row in rows] == [
        ("background", "99.9 %"),
        ("bicycle", "0.1 %"),
        ("aeroplane", "< 0.1 %"),
        ("ignored", "100.0 %"),
    ]


@pytest.mark.parametrize("font_size", [9, 16, 40])
def test_legend_is_drawn_whole(font_size):
    """Swatches have their colours, every row has ink, and nothing touches the border."""
    picture = np.asarray(
        legend(MASK, ["background", "Flächen mit einem langen Namen, gypq", "b", "c"], PALETTE, font_size=font_size)
    )
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (border == 255).all()
    line, gap = round(1.75 * font_size), round(0.75 * font_size)
    for number, colour in enumerate([(128, 0, 0), (0, 0, 0), (0, 128, 0), (255, 255, 255)]):
        row = picture[gap + number * line : gap + (number + 1) * line]
        assert tuple(row[line // 2, gap + line // 2]) == colour
        text = row[:, 2 * gap + line :]
        assert (text < 80).any()
        assert (text[0] == 255).all()  # no letter reaches into the next row
        assert (text[-1] == 255).all()


def test_letters_beyond_ascii_are_not_boxes():
    pictures_of = [
        np.asarray(legend(torch.zeros(1, 1, dtype=torch.int64), [name], PALETTE)) for name in ("ä", "é", "ж")
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert pictures_of[one].shape != pictures_of[other].shape or (pictures_of[one] != pictures_of[other]).any()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: colour_mask(MASK.float(), PALETTE), TypeError, "colour_mask: mask must hold integers, got float32"),
        (lambda: colour_mask(MASK[None], PALETTE), ValueError, r"mask must have shape \(H, W\), got \(1, 2, 4\)"),
        (lambda: colour_mask(MASK, PALETTE[:2]), ValueError, r"must hold classes from 0 to 1 or 255, got \[2\]"),
        (lambda: colour_mask(MASK - 1, PALETTE, 254), ValueError, r"must hold classes from 0 to 3 or 254, got \[-1\]"),
        (lambda: overlay(GREY, MASK, PALETTE, alpha=1.5), ValueError, "overlay: alpha must be from 0 to 1, got 1.5"),
        (lambda: overlay(GREY, MASK.T, PALETTE), ValueError, r"mask must have shape \(2, 4\) .*, got \(4, 2\)"),
        (
            lambda: legend(MASK, CLASSES, PALETTE[:3]),
            ValueError,
            "legend: palette must have a colour .* 4 classes, got 3",
        ),
        (lambda: legend(MASK, CLASSES[:2], PALETTE), ValueError, r"legend: mask must hold .* 0 to 1 or 255, got \[2\]"),
        (lambda: legend(MASK[:0], CLASSES, PALETTE), ValueError, r"legend: mask must have pixels, got shape \(0, 4\)"),
    ],
)
def test_arguments_are_checked(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_sheet_shows_photograph_mask_and_prediction_beside_each_other():
    photograph = torch.full((3, 48, 96), 70, dtype=torch.uint8)
    mask, prediction = torch.zeros(48, 96, dtype=torch.int64), torch.ones(48, 96, dtype=torch.int64)
    picture = np.asarray(mask_pictures.sheet([(photograph, mask, prediction)] * 2, 2))
    assert picture.shape == (2 * 192 + 3 * 4, 3 * 384 + 4 * 4, 3)
    palette = mask_pictures.voc_palette(2)
    for top in (4, 200):
        for number, colour in enumerate([(70, 70, 70), *palette]):
            left = 4 + number * 388
            assert (picture[top : top + 192, left : left + 384] == colour).all()
    with pytest.raises(ValueError, match="sheet: rows must hold at least one"):
        mask_pictures.sheet([], 2)


def test_masks_of_the_report_have_titles_captions_and_a_legend():
    rows = [(torch.zeros(3, 2, 4, dtype=torch.uint8), MASK, torch.zeros(2, 4, dtype=torch.int64))] * 2
    figure = draw_masks(rows, ["50 % wrong", "25 % wrong"], CLASSES)
    assert [axes.get_title() for axes in figure.axes] == ["image", "truth", "prediction", "", "", ""]
    assert [axes.get_xlabel() for axes in figure.axes[2::3]] == ["50 % wrong", "25 % wrong"]
    assert np.array_equal(figure.axes[1].images[0].get_array(), np.asarray(colour_mask(MASK, PALETTE)))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["background", "aeroplane", "bicycle", "not counted"]
