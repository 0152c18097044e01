"""The picture of the block: its shapes are those of the modules, and all of its words are where they belong."""

import pytest
import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import ctxenc
from benchmarks import block_picture
from benchmarks.record import RESULTS

SIZES = {"B": 2, "K": 3, "C'": 8, "C": 160, "H": 5, "W": 7, "C/16": 10}
X = torch.randn(*(SIZES[name] for name in "BCHW"))


def stated(steps):
    """The shapes in a column of the picture, with numbers for letters."""
    shapes = [shape.partition("(")[2].rstrip(")").split(", ") for *_, shape in steps]
    return [tuple(SIZES[name] for name in shape) for shape in shapes]


def seen(block, *inputs_of, gate):
    """Shapes of what goes into some modules, and of the gate's output, without sizes of 1 at the end."""
    shapes = []
    for module in inputs_of:
        module.register_forward_pre_hook(lambda module, args: shapes.append(args[0].squeeze().shape))
    gate.register_forward_hook(lambda module, args, output: shapes.append(output.squeeze().shape))
    block(X)
    return list(map(tuple, shapes))


def test_shapes_of_squeeze_and_excitation():
    block = timm.layers.SEModule(SIZES["C"], rd_ratio=1 / 16, rd_divisor=1)
    assert seen(block, block.fc1, block.fc2, gate=block.gate) == stated(block_picture.SQUEEZE)


def test_shapes_of_context_encoding():
    block = ctxenc.ContextEncoding(SIZES["C"], SIZES["K"], rd_channels=SIZES["C'"])
    parts = block.encoding, block.norm_codes, block.fc
    assert seen(block, *parts, gate=block.gate) == stated(block_picture.CONTEXT)


def test_the_inset_is_what_the_library_computes():
    axes = block_picture.Figure().add_axes((0, 0, 1, 1))
    block_picture._encoding(axes)
    pixels = torch.tensor(axes.collections[0].get_offsets().tolist())
    distance = (pixels[:, None] - block_picture.CODEWORDS).square().sum(2)
    owners = (-block_picture.SMOOTHING * distance).softmax(1).argmax(1)
    assert owners.unique().tolist() == list(range(len(block_picture.CODEWORDS)))
    colours = [tuple(colour[:3]) for colour in axes.collections[0].get_facecolor().tolist()]
    assert len(set(zip(owners.tolist(), colours, strict=True))) == len(block_picture.CODEWORDS)


@pytest.mark.parametrize("right", [True, False])
def test_no_word_leaves_its_place(right):
    figure = block_picture.draw_picture()
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes = figure.axes[0]
    left, bottom, width, height = block_picture.PANEL
    limits = (left, bottom, left + width, bottom + height) if right else (0, 0, left, block_picture.HEIGHT)
    labels = [label for _, label, _, _ in block_picture.SQUEEZE + block_picture.CONTEXT]
    found = 0
    for text in axes.texts:
        if text.get_text() and (text.get_position()[0] > left) is right:
            box = text.get_window_extent(renderer).transformed(axes.transData.inverted())
            assert limits[0] < box.x0 < box.x1 < limits[2], text
            assert limits[1] < box.y0 < box.y1 < limits[3], text
            assert text.get_text() not in labels or box.width < block_picture.BOX_WIDTH - 0.1, text
            found += 1
    assert found > 5


def test_the_command_writes_the_picture_that_is_shown(tmp_path, capsys):
    block_picture.main(["--out", str(tmp_path / "block.png")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "block.png")
    with Image.open(tmp_path / "block.png") as picture, Image.open(RESULTS / "block.png") as shown:
        assert picture.size == shown.size == (1200, 750)
        assert len(picture.convert("RGB").getcolors(2**24)) > 100
