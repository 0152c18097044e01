"""The figures: matplotlib's, made for 1200 pixels of width at 100 dpi and readable at 800."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from ctxenc.viz.observing import IMAGE_SIZE, Chosen, Look, Observation, Picture, choose_blocks, look
from ctxenc.viz.palette import OTHERS, PALETTE, colours_of
from ctxenc.viz.usage import usage_of

WIDTH, DPI = 12.0, 100  # inches and pixels an inch
FONT = 12.0  # points: 17 pixels, 11 where 1200 pixels are shown at 800
FOLLOWED = 4
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
    """Which codeword owns each pixel of an image: the image, and over its grey copy the owners in their colours.

    A pixel's owner is the codeword of its largest weight; that weight is the colour's opacity. The map is the block's own, each of
    its pixels drawn as a rectangle. Codewords that own most have a colour, the others are grey.

    Args:
        model: as for look.
        image: a Pillow image, a path, or a normalised tensor (C, H, W) or (1, C, H, W).
        block: a name, an index or a module; the last block by default.
        mean: as for look.
        std: likewise.
        image_size: likewise.

    Returns:
        A matplotlib figure, not known to pyplot: a notebook shows it, `figure.savefig(path)` writes it.

    Raises:
        ValueError: as look.
        TypeError: likewise.
        OSError: the image file cannot be read.
    """
    chosen = choose_blocks("assignment_map", model, [-1 if block is None else block])
    ((name, module),) = chosen.items()
    seen = look(model, [image], [module], mean=mean, std=std, image_size=image_size)
    (photograph,), (weights,) = seen.photographs, seen.blocks[name].weights
    colours, shares = colours_of([weights])
    height, width = photograph.shape[:2]
    figure = Figure(figsize=(WIDTH, min(12.0, WIDTH * 0.42 * height / width + 1.1)), dpi=DPI, layout="constrained")
    figure.suptitle(_title(name, weights), fontsize=FONT + 2)
    left, right = figure.subplots(1, 2)
    _show(left, photograph)
    _show(right, _grey(photograph), owner_colours(weights, colours))
    _legend(figure, colours, shares)
    return figure


def overview(
    seen: Look, block: str, names: Sequence[str] | None = None, codewords: Sequence[int] | None = None
) -> Figure:
    """What a block saw in some images, on a sheet: owners, codewords to follow from image to image, use, and gates.

    A row an image: the image, its owners as in assignment_map, and for a few codewords the weight of each pixel as the opacity of the
    codeword's colour. A codeword has one colour on the whole sheet. Below, the share of each codeword, and the gates as a strip.

    Args:
        seen: what look returned.
        block: the name of one of its blocks.
        names: of the images; numbers by default.
        codewords: which ones to follow; those that own most by default.

    Returns:
        A matplotlib figure, 1200 pixels wide at its own resolution.

    Raises:
        ValueError: there is no such block or codeword, or names are not one an image.
    """
    if block not in seen.blocks:
        raise ValueError(f"overview: block must be one of {', '.join(map(repr, seen.blocks))}, got {block!r}")
    observation = seen.blocks[block]
    weights, num_codes = observation.weights, len(observation.weights[0])
    labels = _labels("overview", seen, names)
    colours, shares = colours_of(weights)
    followed = list(shares)[:FOLLOWED] if codewords is None else list(codewords)
    if not followed or any(not 0 <= code < num_codes for code in followed):
        raise ValueError(f"overview: codewords must be from 0 to {num_codes - 1}, one or more, got {followed}")
    column = WIDTH / (2 + len(followed))
    ratios = [photograph.shape[0] / photograph.shape[1] for photograph in seen.photographs]
    heights = [column * sum(ratios) + 0.3 * len(ratios) + 1.7, 2.6]
    if observation.gates is not None:
        heights.append(1.2 + 0.35 * len(labels))
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout="constrained")
    figure.suptitle(_title(block, weights[0]), fontsize=FONT + 2)
    parts = np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights))
    _draw_maps(parts[0], seen.photographs, observation, labels, ratios, followed, (colours, shares))
    _draw_usage(parts[1].subplots(), weights, colours)
    if observation.gates is not None:
        _draw_gates(parts[2], observation.gates, labels)
    return figure


def presence_chart(seen: Look, classes: Sequence[str] | None = None, names: Sequence[str] | None = None) -> Figure:
    """What the SE branch of an EncNet believes is in each scene: its likeliest classes, eight at most.

    EncNet (arXiv 1803.08904), section 3.2.

    Args:
        seen: what look returned.
        classes: their names; numbers by default.
        names: of the images; numbers by default.

    Returns:
        A matplotlib figure, 1200 pixels wide at its own resolution.

    Raises:
        ValueError: the network has no such branch, or classes or names are not as many as there are.
    """
    if seen.presence is None:
        raise ValueError("presence_chart: seen must be of a network with an SE branch, got one without")
    num_classes = seen.presence.shape[1]
    if classes is not None and len(classes) != num_classes:
        raise ValueError(f"presence_chart: classes must name {num_classes} classes, got {len(classes)}")
    labels = _labels("presence_chart", seen, names)
    figure = Figure(figsize=(WIDTH, 2.9 * len(labels) + 0.8), dpi=DPI, layout="constrained")
    figure.suptitle("What the SE branch believes is in the scene", fontsize=FONT + 2)
    rows = figure.subplots(len(labels), 2, squeeze=False, width_ratios=(1, 2))
    for (left, right), label, photograph, presence in zip(
        rows, labels, seen.photographs, seen.presence, strict=True
    ):
        _show(left, photograph)
        left.set_title(label, fontsize=FONT)
        values, order = presence.topk(min(TOP_CLASSES, num_classes))
        bars = right.barh(range(len(order)), values.tolist(), color=PALETTE[1])
        right.bar_label(bars, fmt="%.2f", padding=4, fontsize=FONT - 1)
        right.set_yticks(range(len(order)), [str(index) if classes is None else classes[index] for index in order.tolist()])
        right.set(xlim=(0, 1.08), xticks=(0, 0.5, 1))
        right.invert_yaxis()
        right.tick_params(labelsize=FONT - 1)
        right.spines[["top", "right"]].set_visible(False)
    rows[-1][1].set_xlabel("probability", fontsize=FONT)
    return figure


def owner_colours(weights: Tensor, colours: Mapping[int, str]) -> Pixels:
    """The colour of each pixel's owner with its weight as alpha, (h, w, 4), of weights (K, h, w)."""
    table = np.array([to_rgb(colours.get(code, OTHERS)) for code in range(len(weights))])
    strength, owner = weights.max(0)
    return np.concatenate([table[owner.numpy()], strength.numpy()[:, :, None]], axis=2)


def _draw_maps(
    part: SubFigure,
    photographs: Sequence[Tensor],
    observation: Observation,
    labels: Sequence[str],
    ratios: Sequence[float],
    followed: Sequence[int],
    owners: tuple[Mapping[int, str], Mapping[int, float]],
) -> None:
    colours, shares = owners
    grid = part.subplots(len(labels), 2 + len(followed), squeeze=False, height_ratios=ratios)
    titles = ["image", "owners", *(f"codeword {code}" for code in followed)]
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=FONT)
    for row, photograph, weights, label in zip(grid, photographs, observation.weights, labels, strict=True):
        grey = _grey(photograph)
        _show(row[0], photograph)
        row[0].set_ylabel(label, fontsize=FONT)
        _show(row[1], grey, owner_colours(weights, colours))
        for axes, code in zip(row[2:], followed, strict=True):
            colour = np.broadcast_to(to_rgb(colours.get(code, OTHERS)), (*weights.shape[1:], 3))
            _show(axes, grey, np.concatenate([colour, weights[code].numpy()[:, :, None]], axis=2))
    _legend(part, colours, shares)


def _draw_usage(axes: Axes, weights: Sequence[Tensor], colours: Mapping[int, str]) -> None:
    usage = usage_of(weights)
    num_codes = len(usage.shares)
    axes.bar(
        range(num_codes), 100 * usage.shares.numpy(), color=[colours.get(code, OTHERS) for code in range(num_codes)]
    )
    axes.axhline(100 / num_codes, color="black", linestyle="--", linewidth=1)
    axes.plot(usage.dead, [0] * len(usage.dead), "x", color="black", markersize=9, markeredgewidth=2, clip_on=False)
    dead = f"dead (×): {', '.join(map(str, usage.dead))}" if usage.dead else "none is dead"
    most = np.log2(num_codes)
    axes.set_title(
        f"share of each codeword: entropy {usage.entropy:.2f} of {most:.2f} bits, of one pixel {usage.pixel_entropy:.2f}; {dead}",
        fontsize=FONT,
    )
    axes.set_xlabel("codeword (dashed: all alike)", fontsize=FONT)
    axes.set_ylabel("%", fontsize=FONT)
    axes.set(xlim=(-0.7, num_codes - 0.3))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=33, integer=True))
    axes.tick_params(labelsize=FONT - 1)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_gates(part: SubFigure, gates: Tensor, labels: Sequence[str]) -> None:
    """A line an image, a column a channel, in the order of the channel's mean so that differences between images stand out."""
    axes = part.subplots()
    shown = axes.imshow(gates[:, gates.mean(0).argsort()].numpy(), aspect="auto", cmap="cividis", interpolation="nearest")
    axes.set_title(f"gates of the {gates.shape[1]} channels", fontsize=FONT)
    axes.set_xlabel("channels, from the lowest mean gate to the highest", fontsize=FONT)
    axes.set_xticks([])
    axes.set_yticks(range(len(labels)), labels, fontsize=FONT - 1)
    part.colorbar(shown, ax=axes, pad=0.01).ax.tick_params(labelsize=FONT - 1)


def _show(axes: Axes, photograph: Tensor, over: Pixels | None = None) -> None:
    """A photograph (H, W, 3) in axes without ticks, and over it a map (h, w, 4) stretched to its size."""
    height, width = photograph.shape[:2]
    extent = (0.0, float(width), float(height), 0.0)
    axes.imshow(photograph.numpy(), extent=extent)
    if over is not None:
        axes.imshow(over, extent=extent, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def _grey(photograph: Tensor) -> Tensor:
    """The photograph without its colours, which are the codewords' here."""
    return photograph.mean(2, keepdim=True).expand(-1, -1, 3)


def _legend(figure: Figure | SubFigure, colours: Mapping[int, str], shares: Mapping[int, float]) -> None:
    """The share of the pixels that each codeword with a colour owns, and that of all others."""
    handles = [
        Patch(facecolor=colour, edgecolor="black", linewidth=0.5, label=f"{code}: {100 * shares[code]:.0f} %")
        for code, colour in colours.items()
    ]
    others = [share for code, share in shares.items() if code not in colours]
    if others:
        label = f"{len(others)} others: {100 * sum(others):.0f} %"
        handles.append(Patch(facecolor=OTHERS, edgecolor="black", linewidth=0.5, label=label))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=6,
        fontsize=FONT,
        title="codeword: share of the pixels that it owns; the stronger the colour, the larger the weight",
        title_fontsize=FONT,
        frameon=False,
        handlelength=1.2,
    )


def _labels(caller: str, seen: Look, names: Sequence[str] | None) -> list[str]:
    count = len(seen.photographs)
    if names is None:
        return [str(number) for number in range(count)]
    if len(names) != count:
        raise ValueError(f"{caller}: names must be one for each of {count} images, got {len(names)}")
    return [name if len(name) <= 16 else f"{name[:15]}…" for name in names]


def _title(block: str, weights: Tensor) -> str:
    codes, height, width = weights.shape
    return f"{block or 'block'}: {codes} codewords, map {height} x {width}"
