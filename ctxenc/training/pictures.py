"""Draw a trained network's results: its confusions, its worst images, and how its blocks encode them."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure
from torch import Tensor, nn

from ctxenc.runs.config import atomic
from ctxenc.runs.errors import UserError
from ctxenc.viz import encoding_blocks, look, overview
from ctxenc.viz.figures import escape

FOLDER = "pictures"
CONFUSION, WORST, CODEBOOKS, ASSIGNMENT = "confusion.png", "worst.png", "codebooks.png", "assignment-{}.png"
WORST_SHOWN, LOOKED_AT, BLOCKS = 12, 3, 2
SMALLEST = 7  # pixels a side: nothing can be recognised in a smaller map
LABELLED = 40  # classes; the names of more would overlap
LONGEST = 24  # letters of a name
Item = TypeVar("Item")


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return `count` items, evenly from the first to the last; for one, the last."""
    if count >= len(items):
        return list(items)
    if count == 1:
        return [items[-1]]
    return [items[round(number * (len(items) - 1) / (count - 1))] for number in range(count)]


def short(name: str) -> str:
    """Shorten a class or file name to one line that leaves room for the picture."""
    line = " ".join(name.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def save(arm: Path, name: str, figure: Figure) -> None:
    """Write a figure into the pictures of an arm.

    Raises:
        UserError: It cannot be written.
    """
    folder = arm / FOLDER
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    write(folder / name, figure, dpi=90, format="png")


def write(path: Path, figure: Figure, **options: Any) -> None:
    """Write a figure to `path`, whole or not at all; the `options` are keyword arguments of `savefig`."""
    with atomic(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names may be of any script; the font draws boxes
        figure.savefig(temporary, **options)


def photograph(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return the picture (H, W, 3) in [0, 1] of a normalised image (3, H, W)."""
    shift, scale = (image.new_tensor(each)[:, None, None] for each in (mean, std))
    return (image * scale + shift).clamp(0, 1).permute(1, 2, 0)


def draw_confusion(matrix: Tensor, classes: Sequence[str]) -> Figure:
    """Draw the confusion matrix in per cent of each row.

    Args:
        matrix: Number of samples of class i predicted as class j, (classes, classes); a row may be empty.
        classes: Their names.
    """
    shares = 100 * matrix.double() / matrix.sum(1, keepdim=True).clamp_min(1)
    classes = [short(each) for each in classes]
    size = len(classes)
    side = min(11.0, max(5.0, 1.6 + 0.42 * size))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(shares.numpy(), cmap="cividis", vmin=0, vmax=100)
    figure.colorbar(shown, ax=axes, shrink=0.8, label="% of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(escape(_most_confused(shares, classes)), fontsize="medium", wrap=True)
    if size <= LABELLED:
        names = [escape(each) for each in classes]
        axes.set_xticks(range(size), names, rotation=90, fontsize="small")
        axes.set_yticks(range(size), names, fontsize="small")
    if size <= LABELLED // 2:
        for row in range(size):
            for column in range(size):
                if (share := float(shares[row, column])) >= 0.5:
                    colour = "black" if share > 50 else "white"
                    axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour, fontsize="x-small")
    return figure


def _most_confused(shares: Tensor, classes: Sequence[str], count: int = 3) -> str:
    """Describe the most frequent confusions: a true class and a wrong prediction."""
    others = shares.clone().fill_diagonal_(0)
    values, places = others.flatten().topk(min(count, others.numel()))
    pairs = [
        f"{classes[place // len(classes)]} as {classes[place % len(classes)]} ({value:.0f} %)"
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
        if value
    ]
    return f"most often: {', '.join(pairs)}" if pairs else "no class is taken for another"


def draw_worst(images: Sequence[Tensor], captions: Sequence[str], columns: int = 6) -> Figure:
    """Draw images (H, W, 3) in [0, 1] with their captions below."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(11, 2.5 * rows), layout="constrained")
    for number, (image, caption) in enumerate(zip(images, captions, strict=True), start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.imshow(image.numpy())
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(escape(caption), fontsize="small")
    return figure


def draw_assignments(
    arm: Path, network: nn.Module, images: Sequence[Tensor], names: Sequence[str], colours: dict[str, Any]
) -> None:
    """Draw how a network encodes some normalised images: its first and its last block with a map that is large enough.

    `colours` holds the mean and std of the normalisation.
    """
    if blocks := list(encoding_blocks(network)):
        seen = look(network, images, blocks, **colours)
        large = [each for each in blocks if min(seen.blocks[each].weights[0].shape[1:]) >= SMALLEST]
        for block in spread(large, BLOCKS):
            save(arm, ASSIGNMENT.format(block), overview(seen, block, [short(each) for each in names]))
