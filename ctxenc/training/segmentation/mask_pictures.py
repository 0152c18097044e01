"""Masks as pictures: colours, overlays on a photograph, and legends, as Pillow images."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ctxenc.runs.errors import printable

Colour = tuple[int, int, int]
Labels = npt.NDArray[np.integer]

IGNORED: Colour = (255, 255, 255)
INK: Colour = (32, 32, 32)
RULE: Colour = (150, 150, 150)
PAPER: Colour = (255, 255, 255)
LEGIBLE = 640  # pixels; with letters of a 40th of this and the legend, a page's width of about 900


def voc_palette(num_classes: int = 256) -> list[Colour]:
    """Return the colours of PASCAL VOC: neighbours in number differ in colour, and class 0 is black.

    The lowest three bits of the class number become the highest bits of red, green and blue, the next three the bits below, and
    so on.

    Args:
        num_classes: Number of colours, from 1 to 256.

    Raises:
        ValueError: num_classes is not in this range.
    """
    if not 1 <= num_classes <= 256:
        raise ValueError(f"voc_palette: num_classes must be from 1 to 256, got {num_classes}")

    def channel(number: int, first: int) -> int:
        return sum((number >> (3 * place + first) & 1) << (7 - place) for place in range(8))

    return [(channel(number, 0), channel(number, 1), channel(number, 2)) for number in range(num_classes)]


def colour_mask(mask: Tensor | Labels, palette: Sequence[Colour], ignore_index: int = 255) -> Image.Image:
    """The mask with each class in its colour, and ignored pixels white.

    Args:
        mask: Class indices, (H, W) integers.
        palette: A colour for each class, as voc_palette gives them.
        ignore_index: Label of the pixels without a class.

    Raises:
        ValueError: mask is not (H, W), or holds a label that is neither ignore_index nor has a colour.
        TypeError: mask holds no integers.
    """
    labels = _labels("colour_mask", mask, len(palette), ignore_index)
    colours = np.array([*palette, IGNORED], dtype=np.uint8)
    return Image.fromarray(colours[labels])


def index_mask(mask: Tensor, palette: Sequence[Colour]) -> Image.Image:
    """Return class numbers (H, W), integers below 256, as a picture of these numbers, which viewers show in colour: VOC's form."""
    picture = Image.fromarray(mask.numpy().astype(np.uint8))
    picture.putpalette([channel for colour in palette for channel in colour])
    return picture


def overlay_with_legend(
    image: Image.Image, mask: Tensor | Labels, classes: Sequence[str], palette: Sequence[Colour]
) -> Image.Image:
    """Draw the classes over a photograph at half strength, and their legend beside it, legible at the width of a page.

    Args:
        image: The photograph. A class "background" leaves it as it is.
        mask: Class indices, (H, W) integers, of the photograph's size.
        classes: Names of the classes.
        palette: A colour for each class.

    Raises:
        ValueError, TypeError: As in overlay and legend.
    """
    background = classes.index("background") if "background" in classes else None
    swatches = [PAPER if number == background else colour for number, colour in enumerate(palette)]
    picture = overlay(image, mask, palette, alpha=0.5, background=background)
    scale = max(1.0, LEGIBLE / max(picture.size))
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    names = legend(mask, classes, swatches, font_size=max(picture.size) // 40)
    paper = Image.new("RGB", (picture.width + names.width, max(picture.height, names.height)), PAPER)
    paper.paste(picture)
    paper.paste(names, (picture.width, 0))
    return paper


def overlay(
    image: Image.Image,
    mask: Tensor | Labels,
    palette: Sequence[Colour],
    alpha: float = 0.6,
    ignore_index: int = 255,
    background: int | None = None,
) -> Image.Image:
    """The coloured mask over its photograph.

    Args:
        image: The photograph.
        mask: Class indices, (H, W) integers, of the photograph's size.
        palette: A colour for each class.
        alpha: Opacity of the mask, from 0 to 1.
        ignore_index: Label of the pixels without a class.
        background: A class that keeps the photograph as it is: VOC's is 0, whose black would darken it.

    Raises:
        ValueError: The mask is of another size than the photograph, alpha is not in [0, 1], or as in colour_mask.
        TypeError: mask holds no integers.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"overlay: alpha must be from 0 to 1, got {alpha}")
    coloured = colour_mask(mask, palette, ignore_index)
    if coloured.size != image.size:
        raise ValueError(
            f"overlay: mask must have shape {image.size[::-1]} to match the photograph, got {coloured.size[::-1]}"
        )
    photograph = image.convert("RGB")
    blended = Image.blend(photograph, coloured, alpha)
    if background is not None:
        labels = _labels("overlay", mask, len(palette), ignore_index)
        blended.paste(photograph, mask=Image.fromarray(labels == background))
    return blended


def legend(
    mask: Tensor | Labels,
    classes: Sequence[str],
    palette: Sequence[Colour],
    ignore_index: int = 255,
    font_size: int = 16,
) -> Image.Image:
    """The classes that occur in a mask, largest first: colour, name, and share of all its pixels. Ignored pixels come last.

    Args:
        mask: Class indices, (H, W) integers.
        classes: Names of the classes.
        palette: A colour for each class, or more.
        ignore_index: Label of the pixels without a class.
        font_size: Height of the letters in pixels, which everything else is in proportion to.

    Raises:
        ValueError: mask is not (H, W) or has no pixel, holds a label that is neither ignore_index nor has a name, or the palette is
            shorter than classes.
        TypeError: mask holds no integers.
    """
    if len(palette) < len(classes):
        raise ValueError(f"legend: palette must have a colour for each of {len(classes)} classes, got {len(palette)}")
    labels = _labels("legend", mask, len(classes), ignore_index)
    if not labels.size:
        raise ValueError(f"legend: mask must have pixels, got shape {labels.shape}")
    counts = np.bincount(labels.ravel(), minlength=len(classes) + 1)
    order = [*sorted(range(len(classes)), key=lambda number: -counts[number]), len(classes)]
    names, colours = [*map(printable, classes), "ignored"], [*palette[: len(classes)], IGNORED]
    rows = [
        (colours[number], names[number], _percent(counts[number] / labels.size)) for number in order if counts[number]
    ]
    return _draw_rows(rows, font_size)


def sheet(rows: Sequence[tuple[Tensor, Tensor, Tensor]], num_classes: int, ignore_index: int = 255) -> Image.Image:
    """Draw one row per sample: photograph, mask and prediction. All are as high as the first mask, at least 192 pixels.

    Args:
        rows: Photograph (3, H, W) uint8, mask (H, W) and prediction (H, W), both of integers.
        num_classes: Number of classes, for the colours.
        ignore_index: Label of the pixels without a class.

    Raises:
        ValueError: There is no row.
    """
    if not rows:
        raise ValueError("sheet: rows must hold at least one, got none")
    palette = voc_palette(num_classes)
    height, gap = max(192, rows[0][1].shape[0]), 4
    pictures = []
    for photograph, mask, prediction in rows:
        size = (max(1, round(mask.shape[1] * height / mask.shape[0])), height)
        row = [Image.fromarray(photograph.permute(1, 2, 0).numpy()).resize(size)]
        masks = (colour_mask(each, palette, ignore_index) for each in (mask, prediction))
        pictures.append(row + [each.resize(size, Image.Resampling.NEAREST) for each in masks])
    width = max(sum(each.width + gap for each in row) for row in pictures)
    paper = Image.new("RGB", (width + gap, len(rows) * (height + gap) + gap), PAPER)
    for number, row in enumerate(pictures):
        left = gap
        for picture in row:
            paper.paste(picture, (left, gap + number * (height + gap)))
            left += picture.width + gap
    return paper


def _draw_rows(rows: Sequence[tuple[Colour, str, str]], font_size: int) -> Image.Image:
    # matplotlib brings DejaVu Sans along; Pillow's own font lacks every letter beyond ASCII.
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), font_size)
    line, gap = round(1.75 * font_size), round(0.75 * font_size)
    name_width = max(round(font.getlength(name)) for _, name, _ in rows)
    share_width = max(round(font.getlength(share)) for _, _, share in rows)
    names_from = gap + line + gap
    width = names_from + name_width + 2 * gap + share_width + gap
    picture = Image.new("RGB", (width, len(rows) * line + 2 * gap), PAPER)
    draw = ImageDraw.Draw(picture)
    for number, (colour, name, share) in enumerate(rows):
        top = gap + number * line
        middle = top + line // 2
        draw.rectangle((gap, top + line // 8, gap + line, top + line - line // 8), fill=colour, outline=RULE)
        draw.text((names_from, middle), name, fill=INK, font=font, anchor="lm")
        draw.text((width - gap, middle), share, fill=INK, font=font, anchor="rm")
    return picture


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 else "< 0.1 %"


def _labels(name: str, mask: Tensor | Labels, num_classes: int, ignore_index: int) -> npt.NDArray[np.int64]:
    """The mask in int64, (H, W), with ignored pixels as num_classes."""
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name}: mask must hold integers, got {array.dtype}")
    if array.ndim != 2:
        raise ValueError(f"{name}: mask must have shape (H, W), got {array.shape}")
    labels = array.astype(np.int64)
    ignored = labels == ignore_index
    strange = np.unique(labels[((labels < 0) | (labels >= num_classes)) & ~ignored])
    if strange.size:
        raise ValueError(
            f"{name}: mask must hold classes from 0 to {num_classes - 1} or {ignore_index}, got {strange.tolist()}"
        )
    return np.where(ignored, num_classes, labels)
