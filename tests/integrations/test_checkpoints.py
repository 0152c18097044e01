"""Conversion of checkpoints, judged by the logits of mmsegmentation's own code (tests/foreign.py)."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ctxenc.__main__ import main
from ctxenc.integrations import checkpoints
from ctxenc.integrations.checkpoints import load_encnet_checkpoint, save_encnet_checkpoint
from ctxenc.integrations.encnet import EncNet
from tests import foreign


def state_of(case):
    state = case.state_dict()
    return foreign.to_pytorch_encoding(state) if case.stem_channels == 128 else state


def furthest(network, case):
    """The largest difference to the source's logits, in standard deviations of these."""
    with torch.no_grad():
        outputs = network(case.images())
    wanted = case.outputs()
    found = {f"{name}_resized": outputs[name][..., foreign.SAMPLED, foreign.SAMPLED] for name in ("out", "aux")}
    if case.se_loss:
        found["se"] = outputs["se"]
    assert wanted.keys() - {"out", "aux"} == found.keys()
    return max(((found[name] - wanted[name]).abs().max() / wanted[name].std()).item() for name in found)


@pytest.fixture(scope="module")
def small_state():
    """The checkpoint of an EncNet of mmsegmentation with few parameters in its head."""
    case = foreign.read_case("mmseg_r50_no_se_loss")
    return case.state_dict()


@pytest.mark.parametrize("name", foreign.case_names())
def test_the_converted_network_gives_the_source_s_logits(name):
    case = foreign.read_case(name)
    network = load_encnet_checkpoint(state_of(case))
    assert not network.training
    assert furthest(network, case) < 2e-5  # 3e-6 here
    config = network.config
    assert config["backbone"] == f"resnet{case.depth}{'s' if case.stem_channels == 128 else 'c'}"
    assert config["align_corners"] == case.align_corners
    assert (config["se_loss"], config["lateral"]) == (case.se_loss, case.lateral)


def test_a_flipped_sign_and_a_softmax_over_pixels_do_not_pass(monkeypatch):
    case = foreign.read_case("mmseg_r50")
    network = load_encnet_checkpoint(case.state_dict())
    layer = network.encoding.context.encoding
    with torch.no_grad():
        layer.smoothing.neg_()
    assert furthest(network, case) > 1e-2
    with torch.no_grad():
        layer.smoothing.neg_()

    def over_pixels(x, codewords, smoothing, aggregation):
        residuals = x.flatten(2).mT[:, :, None] - codewords
        weights = (-smoothing * residuals.square().sum(3)).softmax(1)
        return (weights[..., None] * residuals).sum(1)

    monkeypatch.setattr("ctxenc.encoding.encode", over_pixels)
    assert furthest(network, case) > 1e-2


def test_align_corners_of_the_other_code_base_does_not_pass():
    case = foreign.read_case("pe_r50")
    network = load_encnet_checkpoint(state_of(case))
    network.align_corners = False
    assert furthest(network, case) > 1e-2


def test_learned_scales_of_either_sign(small_state):
    name = "decode_head.enc_module.encoding.0.scale"
    scale = torch.linspace(-1, 1, len(small_state[name]))
    layer = load_encnet_checkpoint(small_state | {name: scale}).encoding.context.encoding
    assert torch.equal(layer.smoothing, -scale)


def test_a_beginning_that_only_some_names_have_stays(small_state):
    names = list(small_state)
    mixed = {f"module.{name}" if name in names[::2] else name: small_state[name] for name in names}
    with pytest.raises(ValueError, match="load_encnet_checkpoint: "):
        load_encnet_checkpoint(mixed)


@pytest.mark.parametrize("form", ["state dict", "wrapped", "pth", "safetensors", "numpy", "without counts"])
def test_every_form_of_a_checkpoint(tmp_path, small_state, form):
    wanted = load_encnet_checkpoint(small_state).state_dict()
    source = small_state
    if form == "wrapped":
        source = {"state_dict": {f"module.{name}": tensor for name, tensor in small_state.items()}, "epoch": 79}
    elif form == "pth":
        source = tmp_path / "a.pth.tar"
        torch.save({"state_dict": small_state, "optimizer": {"lr": 0.1}, "meta": {"CLASSES": ("a", "b")}}, source)
    elif form == "safetensors":
        source = tmp_path / "a.safetensors"
        save_file(small_state, source)
    elif form == "numpy":
        source = tmp_path / "a.pth"
        scores = {"best_pred": np.float64(0.5), "epoch": np.int64(3), "lr": np.float32(0.1)}
        torch.save(scores | {"state_dict": small_state}, source)
    elif form == "without counts":
        source = {name: tensor for name, tensor in small_state.items() if "num_batches_tracked" not in name}
        wanted = {name: tensor for name, tensor in wanted.items() if "num_batches_tracked" not in name}
    found = load_encnet_checkpoint(source).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_scores_of_old_numpy_are_read(tmp_path, small_state):
    """What numpy 1 calls numpy.core is numpy._core in numpy 2."""
    path = tmp_path / "old.pth"
    torch.save({"best_pred": np.float64(0.5), "state_dict": small_state}, path, _use_new_zipfile_serialization=False)
    stored = path.read_bytes()
    for core in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        path.write_bytes(stored.replace(b"numpy._core.multiarray", core).replace(b"numpy.core.multiarray", core))
        load_encnet_checkpoint(path)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.pkl"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, name, small_state):
    touched = str(tmp_path / "touched")
    if name == "a.pth":
        torch.save({"state_dict": small_state, "hook": Attack(touched)}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps({"state_dict": {}, "hook": Attack(touched)}, protocol=2))
    with pytest.raises(
        ValueError,
        match=r"load_encnet_checkpoint: .*(which could run code|got something else|no valid safetensors file)",
    ):
        load_encnet_checkpoint(tmp_path / name)
    assert not os.path.exists(touched)


def without(state, part):
    return {name: tensor for name, tensor in state.items() if not name.startswith(part)}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (lambda s: s | {"decode_head.jpu.weight": torch.ones(1)}, "unknown in mmsegmentation's EncNet: decode_head.jpu.weight"),
        (lambda s: s | {"backbone.layer1.0.extra": torch.ones(1)}, "unknown: backbone.layer1.0.extra"),
        (lambda s: without(s, "backbone.layer4.2.conv3"), "missing: backbone.layer4.2.conv3.weight"),
        (lambda s: without(s, "auxiliary_head.conv_seg.bias"), "missing: aux.1.1.bias"),
        (lambda s: without(s, "decode_head.conv_seg"), "missing: classifier.1.weight"),
        (lambda s: without(s, "backbone.layer3.5"), r"a ResNet-50, 101 or 152, got stages of \(3, 4, 5, 3\) blocks"),
        (lambda s: without(s, "decode_head.enc_module"), "neither PyTorch-Encoding's nor mmsegmentation's"),
        (lambda s: s | {"decode_head.bottleneck.bn.bias": torch.ones(3)}, r"decode_head.bottleneck.bn.bias \(3,\) for \(512,\)"),
        (lambda s: s | {"decode_head.conv_seg.bias": "text"}, "must hold tensors, got str at 'decode_head.conv_seg.bias'"),
        (lambda s: s | {"decode_head.conv_seg.weight": torch.ones(())}, r"classifier.1.weight must have 4 dimensions, got"),
        (lambda s: s | {7: torch.ones(1)}, "a state dict must have names for keys, got 7"),
        (
            lambda s: s | {"decode_head.enc_module.encoding.0.codewords": torch.ones(1).expand(10**6, 10**6)},
            r"does not fit the network that it names: of another shape|cannot be built",
        ),
        (lambda s: s | {"decode_head.enc_module.encoding.0.scale": torch.ones(32, dtype=torch.bool)}, "another kind: .*bool for"),
        (lambda s: s | {"decode_head.conv_seg.bias": s["decode_head.conv_seg.bias"].to(torch.uint8)}, "another kind: .*uint8 for"),
        (lambda s: s | {"decode_head.conv_seg.bias": torch.ones(19).to_sparse()}, "dense tensors with values, got a torch.sparse"),
        (lambda s: s | {"decode_head.conv_seg.bias": torch.ones(19, device="meta")}, "dense tensors with values, got a meta one"),
        (lambda s: {"encoding.context.encoding.codewords": torch.ones(2, 3)}, "of ctxenc's own EncNet does not say what network"),
        (lambda s: {}, r"neither PyTorch-Encoding's nor mmsegmentation's EncNet: head\.encmodule\.encoding.* its 0 names"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(small_state, changed, text):
    with pytest.raises(ValueError, match=text):
        load_encnet_checkpoint(changed(small_state))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"hello world\n", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_files_that_are_none(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="load_encnet_checkpoint: "):
        load_encnet_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_encnet_checkpoint(tmp_path / "missing.pth")


def test_ours_goes_through_a_file(tmp_path):
    network = EncNet("resnet10t", 3, channels=16, num_codes=4, smoothing=0.5, lateral=True, align_corners=True).eval()
    save_encnet_checkpoint(network, tmp_path / "a.safetensors")
    (tmp_path / "b.txt").touch()
    loaded = load_encnet_checkpoint(tmp_path / "a.safetensors")
    x = torch.randn(1, 3, 40, 48)
    assert loaded.config == network.config
    assert all(torch.equal(output, loaded(x)[name]) for name, output in network(x).items())
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b.txt").stat().st_mode
    with pytest.raises(TypeError, match="save_encnet_checkpoint: network must be an EncNet, got Linear"):
        save_encnet_checkpoint(torch.nn.Linear(1, 1), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"save_encnet_checkpoint: path must end in .safetensors, got '.*c.pth'"):
        save_encnet_checkpoint(network, tmp_path / "c.pth")
    assert not (tmp_path / "c.pth").exists()


def test_files_of_others_and_of_before_there_was_a_choice_take_the_sum(tmp_path, small_state):
    assert load_encnet_checkpoint(small_state).encoding.context.aggregation == "sum"
    network = EncNet("resnet10t", 3, channels=16, num_codes=4).eval()
    assert network.encoding.context.aggregation == "mean"
    before = {name: value for name, value in network.config.items() if name not in ("aggregation", "start")}
    network.save_pretrained(tmp_path)
    assert EncNet.from_pretrained(tmp_path).config == network.config
    (tmp_path / "config.json").write_text(json.dumps(before))
    assert EncNet.from_pretrained(tmp_path).encoding.context.aggregation == "sum"
    network.config = before
    save_encnet_checkpoint(network, tmp_path / "a.safetensors")
    assert load_encnet_checkpoint(tmp_path / "a.safetensors").encoding.context.aggregation == "sum"


@pytest.mark.parametrize(
    "config",
    [
        '{"backbone": "hf_hub:somebody/network"}',
        '{"weights": 1}',
        "[1]",
        "no JSON",
        '{"backbone": "resnet10t"}',
        "[" * 10**5,
        '{"backbone": "resnet18.nonsense"}',
        '{"backbone": "resnet10t", "num_classes": 1000000000000}',
    ],
)
def test_a_configuration_in_a_file_cannot_do_harm(tmp_path, config):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {checkpoints.METADATA: config})
    with pytest.raises(ValueError, match="load_encnet_checkpoint: "):
        load_encnet_checkpoint(tmp_path / "a.safetensors")


class TestConvert:
    def test_convert(self, tmp_path, small_state, capsys):
        torch.save({"state_dict": small_state}, tmp_path / "in.pth")
        out = tmp_path / "out.safetensors"
        assert main(["convert", str(tmp_path / "in.pth"), str(out)]) == 0
        assert capsys.readouterr().out == f"{out}: EncNet on resnet50c, 21 classes, 32 codewords, aux\n"
        wanted = load_encnet_checkpoint(small_state).state_dict()
        assert all(
            torch.equal(wanted[name], tensor) for name, tensor in load_encnet_checkpoint(out).state_dict().items()
        )

    def test_a_formula_that_the_file_does_not_tell_is_said(self, tmp_path, capsys):
        torch.save(state_of(foreign.read_case("pe_r50")), tmp_path / "in.pth")
        assert main(["convert", str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors")]) == 0
        assert "softmax over pixels from November 2017 to September 2018" in capsys.readouterr().out

    def test_refusals(self, tmp_path, capsys):
        (tmp_path / "in.pth").write_bytes(b"nothing")
        (tmp_path / "same.safetensors").write_bytes(b"nothing")
        for source, out, text in (
            ("in.pth", "out.pth", "OUT must end in .safetensors"),
            ("in.pth", "out.safetensors", "must be what torch.save wrote"),
            ("same.safetensors", "same.safetensors", "OUT must be another file than IN"),
            ("missing.pth", "out.safetensors", "No such file or directory"),
        ):
            assert main(["convert", str(tmp_path / source), str(tmp_path / out)]) == 2
            error = capsys.readouterr().err
            assert text in error
            assert error.count("\n") == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "same.safetensors"]
