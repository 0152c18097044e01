"""Files that are damaged or made up: each ends in a result or in a clear error, and none in a crash."""

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save

from ctxenc.integrations import EncNet, load_encnet_checkpoint
from ctxenc.integrations.checkpoints import METADATA
from ctxenc.runs.config import RunConfig, read_config
from ctxenc.runs.errors import UserError
from ctxenc.runs.segment_config import SegmentConfig
from tests.draws import examples

patient = settings(
    max_examples=examples(500),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NAMES = {
    "head.encmodule.encoding.3.codewords": torch.zeros(3, 4),
    "head.encmodule.encoding.3.scale": torch.zeros(3),
    "pretrained.conv1.weight": torch.zeros(2, 3, 1, 1),
    "decode_head.enc_module.encoding.0.codewords": torch.zeros(3, 4),
    "decode_head.conv_seg.weight": torch.zeros(5, 4, 1, 1),
}
ARGUMENTS = {"backbone": "resnet18", "num_classes": 3, "channels": 8, "num_codes": 2}


def pickled(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


SEEDS = {
    "state.pth": pickled(dict(list(NAMES.items())[:3])),
    "whole.pt": pickled({"state_dict": NAMES, "epoch": 3, "best": 0.5}),
    "ours.safetensors": save(NAMES, {"format": "pt", METADATA: json.dumps(ARGUMENTS)}),
    "theirs.safetensors": save(NAMES),
}


@st.composite
def mutated(draw: Any, whole: bytes) -> bytes:
    """Bytes with some of them changed, left out, doubled or put in, mostly near the beginning, where the headers are."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 6))):
        end = draw(st.sampled_from([64, 600, len(content)]))
        place = draw(st.integers(0, max(0, min(end, len(content)) - 1)))
        match draw(st.integers(0, 4)):
            case 0 if content:
                content[place] ^= 1 << draw(st.integers(0, 7))
            case 1:
                del content[place : place + draw(st.integers(1, 200))]
            case 2:
                content[place:place] = draw(st.binary(min_size=1, max_size=20))
            case 3:
                content[place:place] = content[place : place + 40]
            case _:
                del content[place:]
    return bytes(content)


@pytest.mark.parametrize("name", SEEDS)
@patient
@given(data=st.data())
def test_checkpoints(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data.draw(mutated(SEEDS[name])))
    with pytest.raises(ValueError, match="load_encnet_checkpoint"):  # no seed is the whole of a network
        load_encnet_checkpoint(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@patient
@given(
    arguments=st.dictionaries(
        st.sampled_from([*ARGUMENTS, "aux", "lateral", "dropout", "unknown"]), json_values, max_size=3
    )
)
def test_arguments_in_a_checkpoint(tmp_path, arguments):
    path = tmp_path / "ours.safetensors"
    path.write_bytes(save(NAMES, {METADATA: json.dumps(ARGUMENTS | arguments)}))
    with pytest.raises(ValueError, match="load_encnet_checkpoint"):
        load_encnet_checkpoint(path)


RUN = RunConfig(
    model="seresnet18",
    model_kwargs={},
    classes=["a", "b"],
    swap={"num_codes": 4},
    data_config={
        "input_size": (3, 64, 64),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    },
    settings={"lr": 0.1},
    versions={"torch": "2"},
)


def read(run: Path, kind: Any) -> tuple[Any, str]:
    """The configuration, or what the error says."""
    try:
        return read_config(run, kind), ""
    except UserError as error:
        return None, str(error)


@patient
@given(data=st.data(), kind=st.sampled_from([RunConfig, SegmentConfig]))
def test_damaged_configurations(tmp_path, data, kind):
    (tmp_path / "config.json").write_bytes(data.draw(mutated(json.dumps(asdict(RUN)).encode())))
    config, told = read(tmp_path, kind)
    assert isinstance(config, kind) or "config.json" in told or " is a run of " in told


@patient
@given(field=st.sampled_from(list(asdict(RUN))), value=json_values)
def test_made_up_configurations(tmp_path, field, value):
    (tmp_path / "config.json").write_text(json.dumps(asdict(RUN) | {field: value}))
    config, told = read(tmp_path, RunConfig)
    assert isinstance(config, RunConfig) or field in told or "valid JSON" in told


def test_the_seeds_are_read():
    """Undamaged, they get as far as to the names that are missing."""
    assert safetensors.torch.load(SEEDS["theirs.safetensors"]).keys() == NAMES.keys()
    assert isinstance(EncNet(**ARGUMENTS), EncNet)
