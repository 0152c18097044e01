"""parameter_groups(): each trained parameter in one of two groups, and timm's rule for which of them decays."""

import math

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

import ctxenc


def names_of(model, groups):
    """The parameters of each group by their names in the model; a parameter that a group holds twice is there twice."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [sorted(names[id(parameter)] for parameter in group["params"]) for group in groups]


@pytest.mark.parametrize("smoothing", ["learned", "sampled"])
def test_as_timm_groups_a_patched_network(smoothing):
    model = ctxenc.patch_se_blocks(timm.create_model("seresnet18", num_classes=4), smoothing=smoothing)
    groups = ctxenc.parameter_groups(model, 0.05)
    expected = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert names_of(model, groups) == names_of(model, expected)
    assert [group["weight_decay"] for group in groups] == [0.0, 0.05]
    assert sum(map(len, names_of(model, groups)), 0) == len(list(model.parameters()))
    assert "layer1.0.se.encoding.codewords" in names_of(model, groups)[0]


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: nn.ModuleDict({"net": model})])
def test_codewords_in_wrapped_networks_do_not_decay(wrap):
    # timm.create_model(block_args=...) and wrappers have no no_weight_decay that names the codewords
    model = timm.create_model("resnet18", block_args={"attn_layer": ctxenc.ContextEncoding})
    undecayed, decayed = names_of(wrap(model), ctxenc.parameter_groups(wrap(model), 0.1))
    assert sum(name.endswith(("codewords", "smoothing")) for name in undecayed) == 16
    assert not any(name.endswith(("codewords", "smoothing")) for name in decayed)


def test_shards_of_fsdp1_are_refused():
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    model = nn.Sequential(nn.Conv2d(3, 4, 1), FullyShardedDataParallel(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"must hold no FullyShardedDataParallel, .*make the groups before wrapping"):
        ctxenc.parameter_groups(model, 0.1)


def test_names_of_a_part_count():
    class Part(nn.Linear):
        def no_weight_decay(self):
            return {"weig*"}

    model = nn.Sequential(Part(3, 3), nn.Linear(3, 3), Part(3, 3))
    assert names_of(model, ctxenc.parameter_groups(model, 0.1)) == [
        ["0.bias", "0.weight", "1.bias", "2.bias", "2.weight"],
        ["1.weight"],
    ]


def test_shared_parameters_once_and_frozen_ones_never():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), ctxenc.Encoding(3, 2), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    assert names_of(model, ctxenc.parameter_groups(model, 0.1)) == [
        ["1.bias", "2.codewords", "2.smoothing", "3.bias", "3.weight"],
        ["0.weight"],
    ]


def test_a_shared_parameter_that_one_owner_excludes_does_not_decay():
    model = nn.ModuleList([nn.Linear(3, 2, bias=False), ctxenc.Encoding(3, 2)])
    model[0].weight = model[1].codewords
    assert names_of(model, ctxenc.parameter_groups(model, 0.1)) == [["0.weight", "1.smoothing"], []]


def test_a_rule_may_name_a_shared_parameter_by_its_second_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.second = nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def no_weight_decay(self):
            return {"second.weight"}

    model = Tied()
    assert names_of(model, ctxenc.parameter_groups(model, 0.1)) == [["first.weight"], []]


def test_a_bias_of_two_dimensions_does_not_decay():
    model = nn.Module()
    for name in ("bias", "table", "table_bias"):
        model.register_parameter(name, nn.Parameter(torch.zeros(2, 2)))
    assert names_of(model, ctxenc.parameter_groups(model, 0.1)) == [["bias"], ["table", "table_bias"]]


def test_an_optimizer_takes_them():
    optimizer = torch.optim.AdamW(ctxenc.parameter_groups(ctxenc.ContextEncoding(16), 0.1), lr=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]


@pytest.mark.parametrize(
    ("model", "weight_decay", "error"),
    [
        (nn.Linear(2, 2).state_dict(), 0.1, "model must be a torch.nn.Module, got OrderedDict"),
        (nn.Linear(2, 2), "0.1", "weight_decay must be a finite number of at least 0, got '0.1'"),
        (nn.Linear(2, 2), True, "weight_decay must be .*, got True"),
    ],
)
def test_wrong_types(model, weight_decay, error):
    with pytest.raises(TypeError, match=f"parameter_groups: {error}"):
        ctxenc.parameter_groups(model, weight_decay)


@pytest.mark.parametrize("weight_decay", [-0.1, math.inf, math.nan])
def test_wrong_values(weight_decay):
    with pytest.raises(ValueError, match=f"weight_decay must be a finite number of at least 0, got {weight_decay}"):
        ctxenc.parameter_groups(nn.Linear(2, 2), weight_decay)
