"""Draw the block: Squeeze-and-Excitation beside ContextEncoding, with shapes, and an explanation of the encoding.

    python -m benchmarks.block_picture [--out FILE]

Nothing is measured. The pixels of the inset are random; the library computes their assignment and encoding.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Polygon
from torch import Tensor

import ctxenc
from benchmarks.record import RESULTS
from ctxenc.viz.palette import PALETTE

WIDTH, HEIGHT, DPI = 12.0, 7.5, 100  # inches, like the lengths below
FONT = 14.0  # points: 19 pixels, or 13 if 1200 pixels are shown at 800
INK, PALE = "#222222", "#666666"
PLAIN, ENCODING, GATE = (
    "#F2F2F2",
    "#FBE8C6",
    "#D6E8F4",
)  # box colours: grey, and tints of the palette's first two colours
BOX_WIDTH, BOX, MAP_WIDTH = 2.75, 0.6, 1.75
INPUT, GATES, PRODUCT, OUTPUT = 6.35, 2.1, 1.25, 0.45  # heights of the parts that the blocks share
LEFT, RIGHT = 1.85, 5.75  # their centres
PANEL = (7.95, 0.75, 3.8, 5.9)  # of the inset: left, bottom, width, height

Step = tuple[float, str, str, str]  # height of a box, its text, its colour, and its output shape
SQUEEZE: list[Step] = [
    (4.95, "mean over pixels", PLAIN, "(B, C)"),
    (3.52, "linear, ReLU", PLAIN, "(B, C/16)"),
    (GATES, "linear, sigmoid", GATE, "gates (B, C)"),
]
CONTEXT: list[Step] = [
    (5.3, "1×1 conv, norm, ReLU", PLAIN, "(B, C', H, W)"),
    (4.22, "encode", ENCODING, "(B, K, C')"),
    (3.14, "norm, ReLU, mean over K", PLAIN, "(B, C')"),
    (GATES, "linear, sigmoid", GATE, "gates (B, C)"),
]
CODEWORDS = torch.tensor([[0.26, 0.64], [0.64, 0.80], [0.40, 0.24], [0.78, 0.38]])  # (K, C') with C' = 2
CENTRES = torch.tensor([[0.17, 0.76], [0.76, 0.84], [0.30, 0.16], [0.85, 0.26]])  # of the pixels' clusters
SMOOTHING = torch.full((len(CODEWORDS),), 30.0)
PIXELS_A_CLUSTER, PIXELS_BETWEEN = 20, 12
ARROW = 1.3 / PIXELS_A_CLUSTER  # scales the sums of residuals, which would leave the picture


def draw_picture() -> Figure:
    """Draw both blocks side by side, and an inset with the encoding."""
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    _block(axes, LEFT, "Squeeze-and-Excitation", SQUEEZE)
    _block(axes, RIGHT, "ContextEncoding", CONTEXT)
    left, bottom, width, height = PANEL
    corner, middle = RIGHT + BOX_WIDTH / 2, CONTEXT[1][0]
    cone = [(corner, middle + BOX / 2), (left, bottom + height), (left, bottom), (corner, middle - BOX / 2)]
    axes.add_patch(Polygon(cone, color=ENCODING, alpha=0.45, linewidth=0))
    _box(axes, left + width / 2, bottom + height / 2, width, height, "", "white", PALETTE[0])
    _encoding(figure.add_axes(((left + 0.2) / WIDTH, 2.85 / HEIGHT, (width - 0.4) / WIDTH, (width - 0.4) / HEIGHT)))
    lines = {
        6.35: "K = 4 codewords, C' = 2",
        2.62: r"$w_{ik} = \mathrm{softmax}_k\,(-s_k\,\|x_i - d_k\|^2)$",
        2.1: r"$e_k = \sum_i\, w_{ik}\,(x_i - d_k)$",
    }
    for y, text in lines.items():
        axes.text(left + width / 2, y, text, fontsize=FONT + 1, color=INK, ha="center", va="center")
    _legend(axes, left + 0.3)
    return figure


def _block(axes: Axes, x: float, title: str, steps: Sequence[Step]) -> None:
    """Draw a block from top to bottom at x, and the bypass of the map to the gate."""
    axes.text(x, HEIGHT - 0.35, title, fontsize=FONT + 4, weight="bold", color=INK, ha="center", va="center")
    ends = [(INPUT, BOX), *((y, BOX) for y, *_ in steps), (PRODUCT, 0.44)]
    _box(axes, x, INPUT, MAP_WIDTH, BOX, "x (B, C, H, W)", "white")
    for (y, text, colour, shape), (above, _), (below, size) in zip(steps, ends, ends[2:], strict=False):
        _arrow(axes, (x, above - BOX / 2), (x, y + BOX / 2))
        _box(axes, x, y, BOX_WIDTH, BOX, text, colour)
        axes.text(x + 0.13, (y - BOX / 2 + below + size / 2) / 2, shape, fontsize=FONT - 1, color=PALE, va="center")
    side = x - BOX_WIDTH / 2 - 0.3
    axes.plot(
        [x - MAP_WIDTH / 2, side, side], [INPUT, INPUT, PRODUCT], color=INK, linewidth=1.5, solid_joinstyle="round"
    )
    _arrow(axes, (side, PRODUCT), (x - 0.22, PRODUCT))
    _arrow(axes, (x, GATES - BOX / 2), (x, PRODUCT + 0.22))
    axes.add_patch(Circle((x, PRODUCT), 0.22, facecolor=GATE, edgecolor=INK, linewidth=1.5))
    axes.plot(x, PRODUCT, "x", color=INK, markersize=10, markeredgewidth=2)
    _arrow(axes, (x, PRODUCT - 0.22), (x, OUTPUT + BOX / 2))
    _box(axes, x, OUTPUT, MAP_WIDTH, BOX, "(B, C, H, W)", "white")


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, edge: str = "#8A8A8A"
) -> None:
    corner = (x - width / 2, y - height / 2)
    shape = "round,pad=0,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch(corner, width, height, shape, facecolor=colour, edgecolor=edge, linewidth=1.3))
    axes.text(x, y, text, fontsize=FONT, color=INK, ha="center", va="center")


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 15}
    axes.annotate("", end, start, arrowprops=style)


def _pixels() -> Tensor:
    """Return features of some pixels, (N, C'): clusters off the codewords, so that residuals do not cancel, and a few between."""
    generator = torch.Generator().manual_seed(4)
    spread = 0.055 * torch.randn(len(CENTRES), PIXELS_A_CLUSTER, 2, generator=generator)
    between = 0.25 + 0.5 * torch.rand(PIXELS_BETWEEN, 2, generator=generator)
    return torch.cat([(CENTRES[:, None] + spread).reshape(-1, 2), between]).clamp(0.03, 0.97)


def _encoding(axes: Axes) -> None:
    """Draw pixels in their codewords' colours, with the weight as opacity, and each codeword's sum of residuals."""
    x = _pixels()
    weights = ctxenc.assign(x.T[None], CODEWORDS, SMOOTHING)[0]  # (K, N)
    sums = ctxenc.encode(x.T[None], CODEWORDS, SMOOTHING)[0]  # (K, C')
    strength, owner = weights.max(0)
    axes.scatter(*x.T, c=[PALETTE[code] for code in owner], alpha=strength.numpy(), s=34, linewidths=0)
    for code, (codeword, total) in enumerate(zip(CODEWORDS, ARROW * sums, strict=True)):
        style = {"arrowstyle": "-|>", "color": INK, "linewidth": 2.2, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 18}
        axes.annotate("", (codeword + total).tolist(), codeword.tolist(), arrowprops=style)
        axes.plot(*codeword, "D", color=PALETTE[code], markeredgecolor=INK, markersize=11)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")


def _legend(axes: Axes, x: float) -> None:
    grey = "#8A8A8A"
    axes.plot(x, 1.6, "o", color=grey, markersize=6)
    axes.plot(x, 1.3, "D", color=grey, markeredgecolor=INK, markersize=8)
    _arrow(axes, (x - 0.12, 1.0), (x + 0.14, 1.0))
    texts = {
        1.6: "pixel $x_i$, pale where it is shared",
        1.3: "codeword $d_k$, learned",
        1.0: "$e_k$, sum of residuals, shortened",
    }
    for y, text in texts.items():
        axes.text(x + 0.25, y, text, fontsize=FONT - 2, color=INK, va="center")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m benchmarks.block_picture")
    parser.add_argument("--out", type=Path, default=RESULTS / "block.png", metavar="FILE", help="default: %(default)s")
    args = parser.parse_args(arguments)
    draw_picture().savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
