"""Checkpoints of other trainers: what they wrap a network in, and what a file may not claim."""

import argparse
import zipfile

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ctxenc.integrations import EncNet, load_encnet_checkpoint
from ctxenc.integrations.checkpoints import MMSEGMENTATION, PYTORCH_ENCODING
from ctxenc.integrations.state_dicts import compare_names, read_pickle, unwrap
from ctxenc.runs import folders
from ctxenc.runs.errors import UserError


def prefixed(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def averaged(state):
    return {"n_averaged": torch.tensor(3), **prefixed("module.", state)}


def looped(state):
    table = {"state_dict": state}
    table["self"] = table
    return table


WRAPPED = {
    "bare": lambda state: state,
    "DDP": lambda state: {"state_dict": prefixed("module.", state)},
    "torch.compile": lambda state: prefixed("_orig_mod.", state),
    "torch.compile of DDP": lambda state: prefixed("_orig_mod.module.", state),
    "a compiled part": lambda state: {name.replace(".", "._orig_mod.", 1): each for name, each in state.items()},
    "FSDP": lambda state: prefixed("_fsdp_wrapped_module.", state),
    "Lightning": lambda state: {"state_dict": prefixed("model.", state), "loops": {}, "global_step": 3},
    "Lightning with a loss": lambda state: {"state_dict": {"loss.weight": torch.ones(3), **prefixed("net.", state)}},
    "Lightning, compiled": lambda state: {"state_dict": prefixed("model._orig_mod.", state)},
    "AveragedModel": lambda state: averaged(state),
    "torchvision's EMA": lambda state: {"model": prefixed("module.", state), "model_ema": averaged(state)},
    "DeepSpeed": lambda state: {"module": state, "optimizer": None},
    "MMCV's EMAHook": lambda state: {
        "state_dict": state | {f"ema_{name.replace('.', '_')}": each for name, each in state.items()}
    },
    "two containers": lambda state: {"model": {"state_dict": state}},
    "holds itself": looped,
    "numpy and arguments": lambda state: {
        **{"state_dict": state, "best": np.float64(0.7), "step": np.int64(3)},
        "args": argparse.Namespace(lr=0.1),
    },
}


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return timm.create_model("test_efficientnet", num_classes=5).state_dict()


@pytest.fixture(scope="module")
def encnets():
    """The state dicts that both code bases would have for one network, and that network's own."""
    own = EncNet("resnet50s", num_classes=3, channels=8, num_codes=2, align_corners=True).eval().state_dict()
    found = []
    for source in (PYTORCH_ENCODING, MMSEGMENTATION):
        state, back = {}, {ours: theirs for theirs, ours in source.names.items() if ours}
        for name, tensor in own.items():
            start = max((each for each in back if name.startswith(each)), key=len)
            theirs = back[start] + name.removeprefix(start).replace("smoothing", "scale")
            state[theirs] = -tensor if theirs.endswith("scale") else tensor
        found.append(state)
    return own, found


@pytest.mark.parametrize("how", WRAPPED)
def test_a_classifier_in_any_wrapping(classifier, tmp_path, how):
    model = timm.create_model("test_efficientnet", num_classes=5)
    torch.save(WRAPPED[how](classifier), tmp_path / "a.pth")
    folders.load_initial(model, tmp_path / "a.pth")
    assert all(torch.equal(tensor, classifier[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "how",
    ["bare", "torch.compile of DDP", "Lightning with a loss", "AveragedModel", "MMCV's EMAHook", "numpy and arguments"],
)
def test_an_encnet_in_any_wrapping(encnets, tmp_path, how):
    own, states = encnets
    torch.save(WRAPPED[how](states[0]), tmp_path / "a.pth")
    for source in (tmp_path / "a.pth", WRAPPED[how](states[1])):
        found = load_encnet_checkpoint(source).state_dict()
        assert all(torch.equal(tensor, own[name]) for name, tensor in found.items())


def test_what_trainers_themselves_save(classifier):
    """Not as we think that they do."""
    model = timm.create_model("test_efficientnet", num_classes=5)
    model.load_state_dict(classifier)
    whole = nn.Module()
    whole.model, whole.loss = torch.compile(model), nn.Linear(2, 2)
    for state in (AveragedModel(model).state_dict(), whole.state_dict(), AveragedModel(whole).state_dict()):
        found = unwrap(state, list(classifier))
        assert found.keys() == classifier.keys()
        assert all(torch.equal(tensor, classifier[name]) for name, tensor in found.items())


def test_a_beginning_that_only_some_names_have_stays():
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert unwrap(state, ["a", "b"]).keys() == state.keys()
    assert unwrap({"module.a": torch.ones(1), "a": torch.zeros(1)}, ["a"]).keys() == {"module.a", "a"}


def test_a_network_beside_which_one_name_lies_is_found():
    state = {"module.a": torch.ones(1), "module.b": torch.ones(1), "a": torch.zeros(1)}
    assert unwrap(state, ["a", "b"]) == {"a": torch.ones(1), "b": torch.ones(1)}


def test_of_several_networks_none_is_guessed(classifier, tmp_path):
    torch.save({"state_dict": prefixed("model.", classifier) | prefixed("teacher.", classifier)}, tmp_path / "a.pth")
    model = timm.create_model("test_efficientnet", num_classes=5)
    with pytest.raises(UserError, match=r"must hold one network, got several: model\., teacher\."):
        folders.load_initial(model, tmp_path / "a.pth")


def test_what_does_not_fit_is_shown_beside_ours(classifier, encnets, tmp_path):
    model = timm.create_model("test_efficientnet", num_classes=5)
    torch.save({name.replace("conv_stem", "stem.conv"): each for name, each in classifier.items()}, tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"it has stem\.conv\.weight; the network conv_stem\.weight \(1 and 1 such names\)"
    ):
        folders.load_initial(model, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"head\.encmodule\.encoding\.3\.codewords or .* such as backbone.0.weight"):
        load_encnet_checkpoint({"backbone.0.weight": torch.ones(1)})
    assert compare_names("ab", "ab") == ""
    assert compare_names("abcdef", "f") == "it has a, b, c (5 and 0 such names)"


class TestClaims:
    """A file takes no more memory than it has bytes."""

    def endless(self):
        return torch.ones(1).expand(10**6, 10**6)

    @pytest.mark.parametrize("where", ["state dict", "list", "deep", "parameter"])
    def test_a_tensor_that_repeats_a_number(self, tmp_path, where):
        content = {
            "state dict": {"state_dict": {"a": self.endless()}},
            "list": [3, self.endless()],
            "deep": {"a": [{"b": (self.endless(),)}]},
            "parameter": {"a": nn.Parameter(self.endless())},
        }[where]
        for zipped in (True, False):
            torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
            with pytest.raises(ValueError, match=r"a\.pth claims 4,000,000,000,000 bytes where it holds 4"):
                read_pickle(tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"load_encnet_checkpoint: .* claims"):
            load_encnet_checkpoint(tmp_path / "a.pth")

    def test_a_compressed_archive(self, tmp_path):
        torch.save({"a": torch.zeros(10**6)}, tmp_path / "whole.pth")
        with (
            zipfile.ZipFile(tmp_path / "whole.pth") as whole,
            zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as packed,
        ):
            for each in whole.infolist():
                packed.writestr(each.filename, whole.read(each))
        with pytest.raises(ValueError, match=r"claims 4,\d+,\d+ bytes where it holds \d+,\d+$"):
            read_pickle(tmp_path / "a.pth")

    def test_what_is_honest_is_read(self, tmp_path):
        base = torch.arange(12.0).reshape(3, 4)
        content = {"a": base.T, "b": base[1:], "c": base[:0], "d": torch.ones(5).expand(1, 5), "e": base}
        torch.save(content, tmp_path / "a.pth")
        found = read_pickle(tmp_path / "a.pth")
        assert all(torch.equal(tensor, content[name]) for name, tensor in found.items())
