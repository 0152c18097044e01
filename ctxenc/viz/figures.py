"""Draw the figures with matplotlib, for a width of 1200 pixels at 100 dpi and readable at 800."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from ctxenc.viz.observing import IMAGE_SIZE, Chosen, Look, Picture, choose_blocks, look
from ctxenc.viz.palette import OTHERS, PALETTE, choose_colours, find_owners, measure_ownership
from ctxenc.viz.usage import measure_usage

WIDTH, DPI = 12.0, 100  # inches, and pixels per inch; the lengths below are inches too
FONT = 12.0  # points: 17 pixels, or 11 if 1200 pixels are shown at 800
MARGIN, GAP, LINE = 0.15, 0.08, 0.3
TITLE = 0.5
LEGEND, USAGE = 1.0, 2.9
LABELS = 1.6  # to the left of axes
HIGHEST = 8.0  # height limit of the image in assignment_map
FOLLOWED = 3
TOP_CLASSES = 8

Pixels = npt.NDArray[np.floating[Any]]


def assignment_map(
    model: nn.Module,
    image: Picture,
    block: Chosen | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int = IMAGE_SIZE,
) -> Figure:
    """Show the owner codeword of each pixel: the image, and the owners' colours over its grey copy.

    The owner of a pixel is the codeword with the largest excess of weight over its mean in the image. The opacity of a colour is
    the information of the pixel's assignment in bits, full from 1 bit on. A pixel with less than 0.1 bits has no owner and no
    colour, so a block with the same assignment for all pixels leaves the copy grey. The map has the block's own resolution: its
    pixels are rectangles. The codewords that own the most pixels have colours, the others are dark grey.

    Args:
        model: as for look.
        image: a Pillow image, a path, or a normalised tensor (C, H, W) or (1, C, H, W).
        block: a name, an index or a module; the last block by default.
        mean: as for look.
        std: as for look.
        image_size: as for look.

    Returns:
        A matplotlib figure: a notebook shows it once matplotlib.pyplot is imported, `figure.savefig(path)` writes it.

    Raises:
        ValueError: as for look.
        TypeError: as for look.
        OSError: the image file cannot be read.
    """
    chosen = choose_blocks("assignment_map", model, [-1 if block is None else block])
    ((name, module),) = chosen.items()
    record = look(model, [image], [module], mean=mean, std=std, image_size=image_size)
    (photograph,), (weights,) = record.photographs, record.blocks[name].weights
    colours = choose_colours([weights])
    ratio = photograph.shape[0] / photograph.shape[1]
    side = min((WIDTH - 2 * MARGIN - GAP) / 2, HIGHEST / ratio)
    figure = _make_page(name, [weights], TITLE + side * ratio + LEGEND)
    _show_photograph(_add_axes(figure, WIDTH / 2 - GAP / 2 - side, TITLE, side, side * ratio), photograph)
    right = _add_axes(figure, WIDTH / 2 + GAP / 2, TITLE, side, side * ratio)
    _show_photograph(right, _pale(photograph), *colour_owners([weights], colours))
    _draw_legend(figure, TITLE + side * ratio, [weights], colours)
    return figure


def overview(
    seen: Look, block: str, names: Sequence[str] | None = None, codewords: Sequence[int] | None = None
) -> Figure:
    """Draw a block's view of some images on one sheet: owners, codewords across images, use, and gates.

    Each image has a row: the image, its owners as in assignment_map (but with means over all images), and for a few codewords
    their weight at each pixel as the opacity of their colour. A codeword has one colour on the whole sheet. Below are the share of
    each codeword, and the gates.

    Args:
        seen: the result of look.
        block: the name of one of its blocks.
        names: of the images; numbers by default.
        codewords: indices to follow across images; by default those with the most pixels.

    Returns:
        A matplotlib figure, 1200 pixels wide at its own resolution.

    Raises:
        ValueError: there is no such block or codeword, or the number of names differs from the number of images.
    """
    if block not in seen.blocks:
        raise ValueError(f"overview: block must be one of {', '.join(map(repr, seen.blocks))}, got {block!r}")
    observation = seen.blocks[block]
    weights, num_codes = observation.weights, len(observation.weights[0])
    labels = _make_labels("overview", seen, names)
    colours = choose_colours(weights)
    codes = list(colours)[:FOLLOWED] if codewords is None else list(codewords)
    if not codes or any(not 0 <= code < num_codes for code in codes):
        raise ValueError(f"overview: codewords must be from 0 to {num_codes - 1}, one or more, got {codes}")
    columns = 2 + len(codes)
    side = (WIDTH - MARGIN - LINE - (columns - 1) * GAP - MARGIN) / columns
    maps = sum(side * each.shape[0] / each.shape[1] + GAP for each in seen.photographs)
    strip = 0.0 if observation.gates is None else max(0.6, 0.3 * len(labels))
    top = TITLE + LINE
    figure = _make_page(block, weights, top + maps + LEGEND + USAGE + (strip and strip + 2 * LINE))
    _draw_maps(figure, top, side, seen.photographs, weights, labels, codes, colours)
    _draw_legend(figure, top + maps, weights, colours)
    top += maps + LEGEND
    inner = WIDTH - LABELS - 0.85  # leaves room for three decimals beside the bar
    _draw_usage(_add_axes(figure, LABELS, top + LINE, inner, USAGE - 3.2 * LINE), weights, colours)
    if observation.gates is not None:
        top += USAGE + LINE
        bar = _add_axes(figure, LABELS + inner + GAP, top, 0.15, strip)
        _draw_gates(_add_axes(figure, LABELS, top, inner, strip), bar, observation.gates, labels)
    return figure


def presence_chart(seen: Look, classes: Sequence[str] | None = None, names: Sequence[str] | None = None) -> Figure:
    """Chart the SE branch's prediction for each scene: the most likely classes, at most eight.

    EncNet (arXiv 1803.08904), section 3.2.

    Args:
        seen: the result of look.
        classes: their names; numbers by default.
        names: of the images; numbers by default.

    Returns:
        A matplotlib figure, 1200 pixels wide at its own resolution.

    Raises:
        ValueError: the network has no such branch, or classes or names have the wrong length.
    """
    if seen.presence is None:
        raise ValueError("presence_chart: seen must be of a network with an SE branch, got one without")
    num_classes = seen.presence.shape[1]
    if classes is not None and len(classes) != num_classes:
        raise ValueError(f"presence_chart: classes must name {num_classes} classes, got {len(classes)}")
    labels = _make_labels("presence_chart", seen, names)
    figure = Figure(figsize=(WIDTH, TITLE + 2.9 * len(labels)), dpi=DPI)
    _write_heading(figure, "what the SE branch believes is in the scene: probabilities")
    for number, (label, photograph, presence) in enumerate(zip(labels, seen.photographs, seen.presence, strict=True)):
        top = TITLE + LINE + 2.9 * number
        left = _add_axes(figure, MARGIN, top, 4.0, 2.4)
        _show_photograph(left, photograph)
        left.set_title(label, fontsize=FONT)
        values, order = presence.topk(min(TOP_CLASSES, num_classes))
        right = _add_axes(figure, 6.6, top, WIDTH - 6.6 - 0.7, 2.4)
        bars = right.barh(range(len(order)), values.tolist(), color=PALETTE[1])
        right.bar_label(bars, fmt="%.2f", padding=4, fontsize=FONT - 1)
        ticks = [str(index) if classes is None else _shorten(classes[index], 24) for index in order.tolist()]
        right.set_yticks(range(len(order)), ticks, fontsize=FONT - 1)
        right.set(xlim=(0, 1), xticks=[])
        right.invert_yaxis()
        right.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


def colour_owners(weights: Sequence[Tensor], colours: Mapping[int, str]) -> list[Pixels]:
    """Return the colour of each pixel's owner, (h, w, 4) an image, from weights (K, h, w); alpha is the assignment's bits."""
    table = np.array([to_rgb(colours.get(code, OTHERS)) for code in range(len(weights[0]))])
    return [
        np.concatenate([table[owner.numpy()], (information.clamp(max=1) * (owner >= 0)).numpy()[:, :, None]], axis=2)
        for owner, information in find_owners(weights)
    ]


def _colour_weights(weights: Tensor, code: int, colours: Mapping[int, str]) -> Pixels:
    """Return one codeword's colour with its weight as alpha, (h, w, 4)."""
    colour = np.broadcast_to(to_rgb(colours.get(code, OTHERS)), (*weights.shape[1:], 3))
    return np.concatenate([colour, weights[code].numpy()[:, :, None]], axis=2)


def _draw_maps(
    figure: Figure,
    top: float,
    side: float,
    photographs: Sequence[Tensor],
    weights: Sequence[Tensor],
    labels: Sequence[str],
    codes: Sequence[int],
    colours: Mapping[int, str],
) -> None:
    titles = ["image", "owners", *(f"codeword {code}" for code in codes)]
    owner_maps = colour_owners(weights, colours)
    for row, (photograph, each, label) in enumerate(zip(photographs, weights, labels, strict=True)):
        height = side * photograph.shape[0] / photograph.shape[1]
        grey = _pale(photograph)
        maps = [None, owner_maps[row], *(_colour_weights(each, code, colours) for code in codes)]
        for column, (over, title) in enumerate(zip(maps, titles, strict=True)):
            axes = _add_axes(figure, MARGIN + LINE + column * (side + GAP), top, side, height)
            _show_photograph(axes, photograph if over is None else grey, over)
            if row == 0:
                axes.set_title(title, fontsize=FONT)
            if column == 0:
                axes.set_ylabel(label, fontsize=FONT)
        top += height + GAP


def _draw_usage(axes: Axes, weights: Sequence[Tensor], colours: Mapping[int, str]) -> None:
    usage = measure_usage(weights)
    num_codes = len(usage.shares)
    axes.bar(
        range(num_codes), 100 * usage.shares.numpy(), color=[colours.get(code, OTHERS) for code in range(num_codes)]
    )
    axes.axhline(100 / num_codes, color="black", linestyle="--", linewidth=1)
    axes.plot(usage.dead, [0] * len(usage.dead), "x", color="black", markersize=9, markeredgewidth=2, clip_on=False)
    entropies = f"entropy {usage.entropy:.2f} of {np.log2(num_codes):.2f} bits, of one pixel {usage.pixel_entropy:.2f}"
    dead = f"{len(usage.dead)} dead (×)" if usage.dead else "none dead"
    axes.set_title(f"share of each codeword: {entropies}; {dead}", fontsize=FONT)
    axes.set_xlabel("codeword (dashed: all alike)", fontsize=FONT)
    axes.set_ylabel("%", fontsize=FONT)
    axes.set(xlim=(-0.7, num_codes - 0.3))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=33, integer=True))
    axes.tick_params(labelsize=FONT - 1)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_gates(axes: Axes, bar: Axes, gates: Tensor, labels: Sequence[str]) -> None:
    """Draw a row per image and a column per channel, sorted by the channel's mean so that differences between images stand out."""
    rows = gates[:, gates.mean(0).argsort()].numpy()
    picture = axes.imshow(rows, aspect="auto", cmap="cividis", interpolation="nearest")
    axes.set_title(f"gates of the {gates.shape[1]} channels, from the lowest mean to the highest", fontsize=FONT)
    axes.set(xticks=[])
    axes.set_yticks(range(len(labels)), labels, fontsize=FONT - 1)
    axes.figure.colorbar(picture, cax=bar)
    bar.tick_params(labelsize=FONT - 1)
    bar.yaxis.set_major_locator(MaxNLocator(nbins=3))


def _make_page(block: str, weights: Sequence[Tensor], height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    codes, *size = weights[0].shape
    information = f"{measure_usage(weights).bits:.2f} of {np.log2(codes):.2f} bits tell pixels apart"
    _write_heading(figure, f"{block or 'block'}: {codes} codewords, map {size[0]} x {size[1]}; {information}")
    return figure


def _write_heading(figure: Figure, text: str) -> None:
    figure.text(0.5, 1 - MARGIN / figure.get_figheight(), text, fontsize=FONT + 2, ha="center", va="top")


def _add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes at a place in inches from the upper left corner."""
    page = figure.get_figheight()
    return figure.add_axes((left / WIDTH, 1 - (top + height) / page, width / WIDTH, height / page))


def _show_photograph(axes: Axes, photograph: Tensor, over: Pixels | None = None) -> None:
    """Show a photograph (H, W, 3) in axes without ticks, under a map (h, w, 4) stretched to its size."""
    height, width = photograph.shape[:2]
    extent = (0.0, float(width), float(height), 0.0)
    axes.imshow(photograph.numpy(), extent=extent)
    if over is not None:
        axes.imshow(over, extent=extent, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def _pale(photograph: Tensor) -> Tensor:
    """Return the photograph in pale grey: colours belong to the codewords, and on black no colour would show."""
    return (0.4 + 0.6 * photograph.mean(2, keepdim=True)).expand(-1, -1, 3)


def _draw_legend(figure: Figure, top: float, weights: Sequence[Tensor], colours: Mapping[int, str]) -> None:
    """List the share of pixels owned by each coloured codeword, by all others, and by none."""
    shares = measure_ownership(weights).tolist()
    entries = [(colour, f"{code}: {_format_share(shares[code])}") for code, colour in colours.items() if shares[code]]
    others = [share for code, share in enumerate(shares) if share and code not in colours]
    if others:
        entries.append((OTHERS, f"{len(others)} others: {_format_share(sum(others))}"))
    if (rest := 1 - sum(shares)) > 1e-9:
        entries.append(("white", f"no owner: {_format_share(rest)}"))
    figure.legend(
        handles=[Patch(facecolor=colour, edgecolor="black", linewidth=0.5, label=label) for colour, label in entries],
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - top / figure.get_figheight()),
        ncols=6,
        fontsize=FONT,
        title="codeword: share of the pixels that it owns. Pale: the pixel is assigned almost like the average pixel.",
        title_fontsize=FONT,
        frameon=False,
        handlelength=1.2,
    )


def _format_share(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.005 else "< 1 %"


def _make_labels(caller: str, seen: Look, names: Sequence[str] | None) -> list[str]:
    count = len(seen.photographs)
    if names is None:
        return [str(number) for number in range(count)]
    if len(names) != count:
        raise ValueError(f"{caller}: names must be one for each of {count} images, got {len(names)}")
    return [_shorten(name, 16) for name in names]


def _shorten(text: str, limit: int) -> str:
    return escape(text if len(text) <= limit else f"{text[: limit - 1]}…")


def escape(text: str) -> str:
    """Escape a name for matplotlib: text between two dollars is not a formula, and invalid characters become question marks."""
    return text.replace("$", r"\$").encode("utf-8", "replace").decode("utf-8")
