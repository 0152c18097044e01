"""What ctxenc.viz shows: the numbers in its figures, who owns what, which codewords are dead, and that colours stay apart."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from torch import nn

import ctxenc
from ctxenc import ContextEncoding, Encoding, assign, viz
from ctxenc.integrations import DeepTEN, EncNet
from ctxenc.viz.figures import colour_owners
from ctxenc.viz.palette import choose_colours, measure_ownership
from ctxenc.viz.usage import Usage, measure_usage

K = 6
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def placed() -> Encoding:
    """Six codewords of three channels, far apart: numbers 3 to 5 are red, green and blue."""
    layer = Encoding(3, K, smoothing=4.0)
    with torch.no_grad():
        layer.codewords.copy_(10 * torch.eye(K, 3).roll(3, 0))
        layer.codewords[:3] = -10 * torch.eye(3) - 10
    return layer


def halves(height: int = 8, width: int = 12, left: int = 6) -> torch.Tensor:
    """The left part at codeword 3, the rest at codeword 5."""
    x = torch.zeros(3, height, width)
    x[0, :, :left] = 10
    x[2, :, left:] = 10
    return x


@pytest.fixture
def patched() -> nn.Module:
    torch.manual_seed(0)
    return ctxenc.patch_se_blocks(timm.create_model("test_efficientnet").eval(), num_codes=5)


@pytest.fixture
def photograph() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def map_of(figure) -> np.ndarray:
    """The RGBA of the owners in a figure of assignment_map: the second image of its second axes."""
    photograph, owners = figure.axes[1].images
    assert photograph.get_extent() == owners.get_extent()
    return np.asarray(owners.get_array())


@pytest.mark.parametrize("network", [placed, lambda: nn.Sequential(nn.Identity(), placed())])
def test_each_half_belongs_to_the_codeword_put_there(network):
    figure = viz.assignment_map(network(), halves(left=7))
    owners = map_of(figure)
    assert owners.shape == (8, 12, 4)
    first, second = (np.array(to_rgb(colour)) for colour in viz.PALETTE[:2])
    assert (owners[:, :7, :3] == first).all()  # the larger part has the first colour
    assert (owners[:, 7:, :3] == second).all()
    assert np.allclose(owners[:, :7, 3], math.log2(12 / 7))  # the bits that a codeword tells which 7 of 12 pixels have
    assert (owners[:, 7:, 3] == 1).all()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["3: 58 %", "5: 42 %"]
    assert figure.axes[1].images[1].get_extent() == [0, 12, 8, 0]


def test_alpha_is_the_bits_told_and_colour_the_codeword_most_above_its_mean():
    torch.manual_seed(0)
    layer, x = Encoding(3, K, smoothing=2.0), 2 * torch.randn(3, 7, 9)
    weights = assign(x[None], layer.codewords, layer.smoothing)[0].detach().double()
    mean = weights.mean((1, 2), keepdim=True)
    bits, owner = (weights * (weights / mean).log2()).sum(0), (weights - mean).argmax(0)
    owner[bits < 0.1] = -1
    owners = map_of(viz.assignment_map(layer, x))
    assert 0 < (bits > 1).sum() < (bits > 0.1).sum() < bits.numel()
    assert (owner != weights.argmax(0))[owner >= 0].any()
    assert np.allclose(owners[..., 3], bits.clamp(max=1) * (owner >= 0))
    assert measure_usage([weights]).bits == pytest.approx(bits.mean().item())
    colours, shares = choose_colours([weights]), measure_ownership([weights]).tolist()
    assert len(set(owner.flatten().tolist())) > 3
    for code in range(K):
        mine = (owner == code).numpy()
        assert (owners[mine][:, :3] == to_rgb(colours[code])).all()
        assert shares[code] == pytest.approx(mine.mean())


@pytest.mark.parametrize("alike", [[0.25] * 4, [0.4, 0.3, 0.2, 0.1], [1.0, 0, 0, 0]])
def test_where_all_pixels_are_alike_nothing_has_a_colour(alike):
    """Up to rounding, and though one codeword has the largest weight everywhere."""
    torch.manual_seed(0)
    weights = (torch.tensor(alike)[:, None, None] * (1 + 1e-6 * torch.randn(4, 5, 5))).float()
    seen = viz.Look([torch.rand(5, 5, 3)], {"b": viz.Observation([weights], None)}, None)
    figure = viz.overview(seen, "b")
    assert (np.asarray(figure.axes[1].images[1].get_array())[..., 3] == 0).all()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["no owner: 100 %"]
    assert figure.texts[0].get_text().endswith("; 0.00 of 2.00 bits tell pixels apart")


def test_below_a_tenth_of_a_bit_a_pixel_has_no_owner():
    """A codeword that 920 of 1,000 pixels have alone tells 0.12 bits about each of them, one that 940 have 0.09."""
    assert measure_ownership([weights_of(0.92, 0.08)]).tolist() == [0.92, 0.08]
    assert measure_ownership([weights_of(0.94, 0.06)]).tolist() == [0, 0.06]


def test_owners_are_by_means_over_all_images():
    """Of two images one has codeword 0 alone, the other codeword 1: within each, all pixels are alike."""
    images = [weights_of(1, 0), weights_of(0, 1)]
    colours = choose_colours(images)
    for code, shown in enumerate(colour_owners(images, colours)):
        assert (shown == [*to_rgb(colours[code]), 1]).all()
    assert measure_ownership(images[:1]).tolist() == [0, 0]


def test_weights_are_those_of_assign_on_what_the_layer_got(patched, photograph):
    got = {}
    for name, block in viz.encoding_blocks(patched).items():
        block.encoding.register_forward_pre_hook(lambda _, inputs, name=name: got.update({name: inputs[0]}))
    seen = viz.look(patched, [photograph])
    assert list(seen.blocks) == ["blocks.3.0.se", "blocks.4.0.se"]
    for name, observation in seen.blocks.items():
        encoding = patched.get_submodule(name).encoding
        (weights,) = observation.weights
        assert torch.equal(weights, assign(got[name], encoding.codewords, encoding.smoothing)[0])
        assert torch.allclose(weights.sum(0), torch.ones(weights.shape[1:]))


def test_gates_are_what_the_block_multiplies_by(patched, photograph):
    block = patched.blocks[4][0].se
    kept = {}
    block.register_forward_hook(lambda _, inputs, output: kept.update(x=inputs[0], y=output))
    (observed,) = viz.gates(patched, [photograph])
    assert torch.allclose(kept["x"][0] * observed[:, None, None], kept["y"][0], atol=1e-6)
    assert torch.equal(viz.look(patched, [photograph]).blocks["blocks.4.0.se"].gates[0], observed)


def test_a_gate_that_works_in_place_is_applied_once():
    torch.manual_seed(0)
    block = ContextEncoding(3, 4, gate_layer=nn.Hardsigmoid(inplace=True)).eval()
    x = torch.randn(1, 3, 5, 5)
    (observed,) = viz.gates(block, [x])
    assert torch.allclose(x[0] * observed[:, None, None], block(x)[0], atol=1e-6)


def test_channels_last_blocks():
    torch.manual_seed(0)
    last = ContextEncoding(8, 4, channels_last=True).eval()
    first = ContextEncoding(8, 4).eval()
    first.load_state_dict(last.state_dict())
    x = torch.randn(8, 5, 7)
    one, other = (viz.look(block, [x]).blocks[""] for block in (first, last))
    assert torch.allclose(one.weights[0], other.weights[0])
    assert one.weights[0].shape == (4, 5, 7)
    assert torch.allclose(one.gates, other.gates)


def test_compiled_models_give_the_same(patched, photograph):
    whole = viz.look(patched, [photograph]).blocks
    compiled = viz.look(torch.compile(patched, backend="eager"), [photograph]).blocks
    assert list(compiled) == list(whole)
    assert all(torch.equal(compiled[name].weights[0], whole[name].weights[0]) for name in whole)
    patched.compile(backend="eager")
    patched(torch.randn(1, 3, 40, 64))  # a graph without our hooks
    in_place = viz.look(patched, [photograph]).blocks
    assert all(torch.equal(in_place[name].weights[0], whole[name].weights[0]) for name in whole)


def test_half_precision(patched, photograph):
    whole = viz.look(patched, [photograph]).blocks
    half = viz.look(patched.bfloat16(), [photograph]).blocks
    for name, observation in whole.items():
        assert half[name].weights[0].dtype == torch.float32
        assert torch.allclose(half[name].weights[0], observation.weights[0], atol=0.02)


def test_a_look_leaves_the_model_as_it_was(patched, photograph):
    patched.train()
    patched.blocks[3].eval()
    modes = {name: module.training for name, module in patched.named_modules()}
    values = {name: tensor.clone() for name, tensor in patched.state_dict().items()}
    hooks = sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in patched.modules())
    viz.look(patched, [photograph])
    assert {name: module.training for name, module in patched.named_modules()} == modes
    assert all(torch.equal(tensor, values[name]) for name, tensor in patched.state_dict().items())
    assert sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in patched.modules()) == hooks


def test_pictures_are_normalised_and_shown_as_they_are(photograph, tmp_path):
    photograph.save(tmp_path / "a.png")
    got = []
    layer = Encoding(3, 2)
    layer.register_forward_pre_hook(lambda _, inputs: got.append(inputs[0]))
    pixels = torch.from_numpy(np.array(photograph)).float().div(255)
    normalised = ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)
    images = [photograph, str(tmp_path / "a.png"), tmp_path / "a.png", normalised, normalised[None]]
    seen = viz.look(layer, images, mean=MEAN, std=STD)
    for x, shown in zip(got, seen.photographs, strict=True):
        assert torch.allclose(x, normalised[None], atol=1e-6)
        assert torch.allclose(shown, pixels, atol=1e-6)


def test_the_colours_that_timm_knows_come_before_imagenet_s(photograph):
    model = nn.Sequential(Encoding(3, 2))
    usual = viz.look(model, [photograph], mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert torch.equal(viz.look(model, [photograph]).blocks["0"].weights[0], usual.blocks["0"].weights[0])
    model.pretrained_cfg = {"mean": MEAN, "std": STD}
    own = viz.look(model, [photograph], mean=MEAN, std=STD)
    assert torch.equal(viz.look(model, [photograph]).blocks["0"].weights[0], own.blocks["0"].weights[0])
    assert not torch.equal(own.blocks["0"].weights[0], usual.blocks["0"].weights[0])


def test_sizes_of_pictures(photograph):
    model = nn.Sequential(Encoding(3, 2))
    shape = {size: tuple(viz.look(model, [photograph], image_size=size).photographs[0].shape) for size in (32, 64, 99)}
    assert shape == {32: (20, 32, 3), 64: (40, 64, 3), 99: (40, 64, 3)}
    model.pretrained_cfg = {"input_size": (3, 16, 24), "fixed_input_size": True}
    assert viz.look(model, [photograph]).photographs[0].shape == (16, 24, 3)


def test_blocks_are_chosen_by_name_index_and_module(patched, photograph):
    names = ["blocks.3.0.se", "blocks.4.0.se"]
    for chosen in (names[1], 1, -1, patched.blocks[4][0].se):
        assert list(viz.look(patched, [photograph], [chosen]).blocks) == names[1:]
    titles = [viz.assignment_map(patched, photograph, block).texts[0].get_text() for block in (None, 0)]
    assert [title.partition(":")[0] for title in titles] == names[::-1]


def test_networks_with_blocks_of_other_kinds(photograph):
    torch.manual_seed(0)
    encnet = EncNet("test_resnet", 7, num_codes=4, channels=8, aux=False)
    seen = viz.look(encnet, [photograph, photograph.rotate(90, expand=True)])
    assert {name: each.gates.shape for name, each in seen.blocks.items()} == {"encoding.context": (2, 8)}
    assert [tuple(each.shape) for each in seen.blocks["encoding.context"].weights] == [(4, 5, 8), (4, 8, 5)]
    x = viz.look(encnet, [photograph]).photographs[0]
    x = (x - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        logits = encnet.eval()(x.permute(2, 0, 1)[None])["se"][0]
    assert torch.allclose(seen.presence[0], logits.sigmoid(), atol=1e-5)
    texture = viz.look(DeepTEN("test_resnet", 3, num_codes=4, rd_channels=8), [photograph])
    assert {name: each.gates for name, each in texture.blocks.items()} == {"encoding": None}
    assert texture.presence is None


def weights_of(*shares: float, pixels: int = 1000) -> torch.Tensor:
    """Weights (K, 1, pixels) in which each codeword owns its share of the pixels alone."""
    owner = torch.repeat_interleave(torch.arange(len(shares)), (torch.tensor(shares) * pixels).round().long())
    return nn.functional.one_hot(owner, len(shares)).T[:, None].float()


def test_usage_of_constructed_weights():
    quarter = measure_usage([weights_of(0.25, 0.25, 0.25, 0.25)])
    assert quarter.shares.tolist() == [0.25] * 4
    assert (quarter.entropy, quarter.pixel_entropy, quarter.bits, quarter.dead) == (2.0, 0.0, 2.0, [])
    alone = measure_usage([weights_of(1, 0, 0, 0)])
    assert (alone.entropy, alone.pixel_entropy, alone.bits, alone.dead) == (0.0, 0.0, 0.0, [1, 2, 3])
    soft = measure_usage([torch.full((8, 3, 5), 1 / 8)])
    assert (soft.entropy, soft.pixel_entropy, soft.bits) == pytest.approx((3.0, 3.0, 0.0))
    # Pixels count alike, whatever the image: 1,000 of codeword 0 and 3,000 of codeword 1.
    mixed = measure_usage([weights_of(1, 0), weights_of(0, 1, pixels=3000)])
    assert mixed.shares.tolist() == [0.25, 0.75]
    assert mixed.entropy == pytest.approx(2 - 0.75 * math.log2(3))


def test_bits_are_never_negative_and_nan_where_entropies_are():
    assert Usage(torch.ones(4) / 4, 2.0, 2.0 + 1e-15, []).bits == 0
    assert math.isnan(Usage(torch.ones(4) / 4, math.nan, math.nan, []).bits)


def test_a_codeword_is_dead_below_a_hundredth_of_its_part():
    """K = 4: a hundredth of a quarter is 0.0025."""
    assert measure_usage([weights_of(0.497, 0.497, 0.003, 0.003)]).dead == []
    assert measure_usage([weights_of(0.497, 0.498, 0.003, 0.002)]).dead == [3]


def test_usage_and_gates_of_a_model_are_those_of_the_look(patched, photograph):
    images = [photograph, photograph.crop((0, 0, 32, 40))]
    seen = viz.look(patched, images)
    for name, observation in seen.blocks.items():
        usage = viz.codebook_usage(patched, images, name)
        expected = torch.cat([each.flatten(1) for each in observation.weights], 1).double().mean(1)
        assert torch.allclose(usage.shares, expected)
        assert usage.shares.sum() == pytest.approx(1)
        assert torch.equal(viz.gates(patched, images, name), observation.gates)
    assert torch.equal(viz.codebook_usage(patched, images).shares, usage.shares)
    small = viz.codebook_usage(patched, images, image_size=32)
    assert not torch.equal(small.shares, usage.shares)


def test_the_most_used_codewords_have_colours_on_all_images_and_the_rest_are_grey():
    one = weights_of(*[1 / 20] * 6, 14 / 20, *[0] * 6)
    other = weights_of(*[0] * 7, *[1 / 10] * 4, 6 / 10, 0)
    colours = choose_colours([one, other])
    # Of 2,000 pixels codeword 6 owns 700, 11 owns 600, 7 to 10 own 100 each, 0 to 5 own 50 each, 12 none.
    assert list(colours) == [6, 11, 7, 8, 9, 10, 0, 1, 2, 3]
    assert tuple(colours.values()) == viz.PALETTE
    first, second = colour_owners([one, other], colours)
    assert (second[0, 0] == [*to_rgb(colours[7]), 1]).all()
    assert (first[0, 220] == [*to_rgb(viz.OTHERS), 1]).all()  # codeword 4
    look = viz.Look([torch.rand(4, 4, 3)] * 2, {"b": viz.Observation([one, other], None)}, None)
    texts = [text.get_text() for text in viz.overview(look, "b").legends[0].get_texts()]
    assert texts[:3] == ["6: 35 %", "11: 30 %", "7: 5 %"]
    assert texts[-1] == "2 others: 5 %"
    assert len(texts) == 11


def test_what_owns_next_to_nothing_is_in_the_legend():
    look = viz.Look([torch.rand(4, 4, 3)], {"b": viz.Observation([weights_of(0.6, 0.396, 0.004, 0)], None)}, None)
    texts = [text.get_text() for text in viz.overview(look, "b").legends[0].get_texts()]
    assert texts == ["0: 60 %", "1: 40 %", "2: < 1 %"]


def test_codewords_that_own_nothing_go_by_their_weight():
    weights = torch.tensor([0.1, 0.5, 0.15, 0.25])[:, None, None].expand(4, 2, 2)
    assert list(choose_colours([weights])) == [1, 3, 2, 0]


def test_an_overview_shows_what_was_seen():
    torch.manual_seed(0)
    block = ContextEncoding(3, K).eval()
    seen = viz.look(block, [torch.randn(3, 16, 24), torch.randn(3, 24, 16)])
    observation = seen.blocks[""]
    figure = viz.overview(seen, "", ["wide", "high"], codewords=[4, 1])
    *maps, usage, _, strip = figure.axes
    rows = np.reshape(np.array(maps), (2, 4))
    assert [axes.get_title() for axes in rows[0]] == ["image", "owners", "codeword 4", "codeword 1"]
    assert [axes.get_ylabel() for axes in rows[:, 0]] == ["wide", "high"]
    colours = choose_colours(observation.weights)
    owners = colour_owners(observation.weights, colours)
    for row, weights, expected in zip(rows, observation.weights, owners, strict=True):
        assert np.array_equal(np.asarray(row[1].images[1].get_array()), expected)
        for axes, code in zip(row[2:], (4, 1), strict=True):
            drawn = np.asarray(axes.images[1].get_array())
            assert np.allclose(drawn[..., 3], weights[code])
            assert (drawn[..., :3] == to_rgb(colours.get(code, viz.OTHERS))).all()
    heights = [bar.get_height() for bar in usage.patches]
    assert np.allclose(heights, 100 * measure_usage(observation.weights).shares)
    drawn = np.asarray(strip.images[0].get_array())
    assert drawn.shape == (2, 3)
    assert np.allclose(np.sort(drawn), np.sort(observation.gates))
    assert (np.diff(drawn.mean(0)) >= 0).all()


def test_dead_codewords_are_marked():
    look = viz.Look([torch.rand(4, 4, 3)], {"b": viz.Observation([weights_of(0.5, 0, 0.5, 0)], None)}, None)
    axes = viz.overview(look, "b").axes[-1]
    (marks,) = (line for line in axes.lines if line.get_marker() == "x")
    assert list(marks.get_xdata()) == [1, 3]
    assert "entropy 1.00 of 2.00 bits, of one pixel 0.00" in axes.get_title()
    assert "; 2 dead (×)" in axes.get_title()


def test_presence_lists_the_likeliest_classes():
    presence = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.3]])
    look = viz.Look([torch.rand(4, 4, 3)] * 2, {}, presence)
    figure = viz.presence_chart(look, ["sky", "road", "tree"], ["a", "b"])
    bars = [axes for axes in figure.axes if axes.patches]
    assert [[label.get_text() for label in axes.get_yticklabels()] for axes in bars] == [
        ["road", "tree", "sky"],
        ["sky", "tree", "road"],
    ]
    assert np.allclose([[bar.get_width() for bar in axes.patches] for axes in bars], [[0.9, 0.5, 0.1], [0.7, 0.3, 0.2]])
    many = viz.presence_chart(viz.Look([torch.rand(4, 4, 3)], {}, torch.rand(1, 30)))
    assert len(many.axes[1].patches) == 8


# Machado, Oliveira and Fernandes, A Physiologically-based Model for Simulation of Color Vision Deficiency (2009), severity 1, on
# linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour: str, vision: np.ndarray) -> np.ndarray:
    """CIELAB under D65 of a colour as it is seen."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(np.clip(TO_XYZ @ np.clip(vision @ linear, 0, 1) / (0.9505, 1, 1.089), 1e-6, 1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISIONS)
def test_colours_stay_apart(vision):
    """15 in CIELAB is several times what one just notices; red and green of one lightness, the classical mistake, come to less."""
    for one, other in itertools.combinations([*viz.PALETTE, viz.OTHERS], 2):
        assert np.linalg.norm(lab(one, VISIONS[vision]) - lab(other, VISIONS[vision])) > 15, (one, other)
    if vision == "deuteranopia":
        assert np.linalg.norm(lab("#C56A6A", VISIONS[vision]) - lab("#8A8A63", VISIONS[vision])) < 15


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: viz.encoding_blocks("net"), TypeError, "model must be a torch.nn.Module, got str"),
        (
            lambda: viz.look(nn.Linear(1, 1), [halves()]),
            ValueError,
            "look: model must have .* blocks, got Linear without",
        ),
        (lambda: viz.look(placed(), []), ValueError, "look: images must hold at least one, got none"),
        (lambda: viz.look(placed(), halves()), TypeError, "images must be a sequence of images, got one Tensor"),
        (lambda: viz.look(placed(), [halves()], ["se"]), ValueError, "look: block must be one of '', .*, got 'se'"),
        (lambda: viz.look(placed(), [halves()], [1]), ValueError, "its index or module, got 1"),
        (lambda: viz.look(placed(), [halves()], [-2]), ValueError, "its index or module, got -2"),
        (lambda: viz.look(placed(), [halves()], [nn.ReLU()]), ValueError, "its index or module, got ReLU"),
        (lambda: viz.look(placed(), [halves()], [1.0]), TypeError, "a name, an index or a module, got float"),
        (lambda: viz.look(placed(), [halves()], [True]), TypeError, "a name, an index or a module, got bool"),
        (lambda: viz.look(placed(), [halves()[0]]), ValueError, r"\(C, H, W\) or \(1, C, H, W\), got \(8, 12\)"),
        (lambda: viz.look(placed(), [torch.rand(2, 3, 4, 4)]), ValueError, r"got \(2, 3, 4, 4\)"),
        (lambda: viz.look(placed(), [halves().byte()]), TypeError, "normalised tensor of floats, got torch.uint8"),
        (lambda: viz.look(placed(), [7]), TypeError, "a Pillow image, a path or a tensor, got int"),
        (
            lambda: viz.look(placed(), [halves()], image_size=0),
            ValueError,
            "look: image_size must be a positive integer",
        ),
        (lambda: viz.assignment_map(placed(), halves(), "x"), ValueError, "assignment_map: block must be one of"),
        (
            lambda: viz.gates(placed(), [halves()]),
            ValueError,
            "gates: block must be a ContextEncoding, .* got Encoding",
        ),
        (lambda: viz.overview(viz.look(placed(), [halves()]), "x"), ValueError, "overview: block must be .* got 'x'"),
        (
            lambda: viz.overview(viz.look(placed(), [halves()]), "", ["a", "b"]),
            ValueError,
            "one for each of 1 .* got 2",
        ),
        (lambda: viz.overview(viz.look(placed(), [halves()]), "", None, [6]), ValueError, r"from 0 to 5, .* got \[6\]"),
        (lambda: viz.overview(viz.look(placed(), [halves()]), "", None, []), ValueError, r"one or more, got \[\]"),
        (lambda: viz.presence_chart(viz.look(placed(), [halves()])), ValueError, "with an SE branch, got one without"),
        (
            lambda: viz.presence_chart(viz.Look([halves()], {}, torch.rand(1, 3)), ["a"]),
            ValueError,
            "classes must name 3 classes, got 1",
        ),
    ],
)
def test_arguments_are_checked(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_block_that_is_not_reached_is_named():
    model = nn.ModuleDict({"used": placed(), "idle": placed()})
    model.forward = lambda x: model["used"](x)
    assert list(viz.look(model, [halves()], ["used"]).blocks) == ["used"]
    with pytest.raises(ValueError, match="must call the block 'idle', got none"):
        viz.look(model, [halves()])
    assert not any(each._forward_pre_hooks for each in model.modules())


def test_the_extra_is_named_where_it_is_missing():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "try: import ctxenc.viz\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ctxenc.viz needs the extra: pip install 'ctxenc[viz]'" in done.stdout


def test_pictures_are_read_as_for_training(patched, tmp_path):
    """16 bits a channel are not clipped, and PostScript is nobody's image, whatever it is called."""
    ramp = np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    (shown,) = viz.look(patched, [tmp_path / "ramp.png"]).photographs
    torch.testing.assert_close(shown[..., 0], torch.from_numpy((ramp >> 8).astype(np.float32)) / 255, atol=1e-6, rtol=0)
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(OSError, match="cannot identify image file"):
        viz.look(patched, [tmp_path / "script.png"])
    with pytest.raises(ValueError, match="image must have 8 or 16 bits a channel, got 32"):
        viz.look(patched, [Image.fromarray(ramp.astype(np.float32))])


def test_colours_may_be_arrays(patched, photograph):
    as_lists, as_arrays = (
        viz.look(patched, [photograph], mean=kind(MEAN), std=kind(STD)).photographs[0] for kind in (list, torch.tensor)
    )
    assert torch.equal(as_lists, as_arrays)
