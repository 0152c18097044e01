"""The benchmark of whole networks: what its variants are, what its columns mean, and that it goes on where a row fails."""

import json
from unittest import mock

import pytest
import timm
import torch
from timm.layers import get_attn
from torch import nn

import ctxenc
from benchmarks import networks, swap
from benchmarks.memory import peak_bytes
from benchmarks.swap_rows import named
from ctxenc.kernels.backends import get_preferred

TINY = ["--device", "cpu", "--networks", "test_efficientnet", "--modes", "eager", "--size", "64", "--batch", "2"]
SHORT = [*TINY, "--rounds", "2", "--variants", "own, mean"]


@pytest.fixture(autouse=True)
def one_thread():
    """Two on a busy machine wait for each other, at 20 ms a call."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unfused(monkeypatch):
    monkeypatch.delattr(ctxenc.ContextEncoding, "fuse", raising=False)


def rows_of(path):
    return json.loads(path.read_text())["rows"]


def test_a_quick_run(tmp_path):
    out = tmp_path / "new" / "swap.json"
    swap.main(["--quick", "--device", "cpu", "--seed", "3", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["seed"] == 3
    assert result["operator_error"] < 1e-4
    rows = [row for row in result["rows"] if not row["fused"]]
    assert [row["variant"] for row in rows] == ["shipped", "own, mean"]
    for row in rows:
        assert (row["network"], row["mode"], row["precision"], row["batch"]) == ("seresnet18", "eager", "fp32", 2)
        assert "failed" not in row
        for direction in ("training", "inference"):
            times = row[f"{direction}_ms"]
            assert 0 < times["p20"] <= times["median"] <= times["p80"]
            assert row[f"{direction}_images_per_s"] == pytest.approx(2e3 / times["median"])
            assert (row[f"{direction}_ratio"] == 1) == (row["variant"] == "shipped")
        assert row["training_peak_bytes"] > 3 * 4 * row["n_parameters"] > 2 * row["inference_peak_bytes"]
    assert rows[1]["n_parameters"] - rows[0]["n_parameters"] == 2560
    assert 1 < rows[1]["memory_ratio"] < 1.01


@pytest.mark.parametrize(("device", "backend"), [("cpu", "torch"), ("cuda", "triton")])
def test_the_backend_that_is_measured_is_in_force_and_told(device, backend, tmp_path, monkeypatch):
    """The kernels' on a GPU, by name, so that a refused kernel shows; in the check of the operator too."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(swap, "check_operator", lambda device: seen.append(ctxenc.backend_info().backend) or 0.0)
    monkeypatch.setattr(swap, "measure", lambda *_: seen.append(ctxenc.backend_info().backend) or [])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(swap, "Record", lambda *_, **facts: seen.append(facts["backend"]) or mock.MagicMock())
    swap.main(
        ["--device", device, "--networks", "seresnet18", "--modes", "eager", "--out", str(tmp_path / "swap.json")]
    )
    assert set(seen) == {backend}
    assert len(seen) > 2
    assert get_preferred() == "auto"


def test_nothing_is_measured_where_the_operator_is_wrong(tmp_path, monkeypatch):
    encode = ctxenc.encode
    monkeypatch.setattr(ctxenc, "encode", lambda x, codewords, smoothing: encode(x, codewords, -smoothing))
    out = tmp_path / "swap.json"
    with pytest.raises(SystemExit, match="no speed is reported for a wrong result"):
        swap.main([*SHORT, "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize("network", networks.CLASSIFIERS[:-1])
def test_without_se_blocks_a_network_is_one_whose_gates_are_open(network):
    model = networks.build(network).eval()
    plain = networks.variant(model, networks.changes(model)["no SE"])
    assert not ctxenc.find_se_blocks(plain)
    blocks = ctxenc.find_se_blocks(model)
    assert len(blocks) == {"regnety_032": 21, "nfnet_f0": 12, "mobilenetv3_large_100": 8}.get(network, 16)
    for block in blocks:
        model.get_submodule(block.name).register_forward_hook(lambda module, inputs, output: inputs[0])
    if network == "nfnet_f0":  # whose branches begin at zero
        for each in (model, plain):
            for name, parameter in each.named_parameters():
                if name.endswith("skipinit_gain"):
                    nn.init.constant_(parameter, 0.5)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("network", ["seresnet18", "resnet18"])
def test_variants_are_what_their_names_say(network):
    model = networks.build(network)
    empty = network == "resnet18"
    weights = model.state_dict()
    kept = [name for name in weights if ".se." not in name]
    found = networks.changes(model)
    other, first = ("SE", "1/16") if empty else ("no SE", "own")
    assert list(found) == [
        "shipped",
        other,
        *(f"{first}, {pool}" for pool in ("mean", "concat")),
        *(() if empty else ("own, mean, 14", "own, mean, 7")),
        "1/4, mean",
        "1/4, concat",
    ]
    for name, change in found.items():
        changed = networks.variant(model, change)
        own = changed.state_dict()
        assert all(torch.equal(own[key], weights[key]) for key in kept)
        blocks = ctxenc.find_context_blocks(changed)
        se_blocks = ctxenc.find_se_blocks(changed)
        assert len(blocks) == (8 if "," in name else 0)
        assert len(se_blocks) == (8 if name == ("SE" if empty else "shipped") else 0)
        _, pool, max_size, *_ = [*name.split(", "), None, None]
        assert {(block.pool, block.max_size) for block in blocks} <= {(pool, int(max_size) if max_size else None)}
        for block in blocks:
            assert block.rd_channels == max(8, block.replaced.channels // (4 if name.startswith("1/4") else 16))
    assert weights.keys() == model.state_dict().keys()


@pytest.mark.parametrize(("name", "kind"), networks.OTHERS.items())
def test_other_attention_takes_the_place_of_each_se_block(name, kind):
    model = networks.build("seresnet50")
    blocks = ctxenc.find_se_blocks(model)
    changed = networks.variant(model, networks.changes(model)[name])
    assert {type(changed.get_submodule(block.name)) for block in blocks} == {get_attn(kind)}
    assert not ctxenc.find_se_blocks(changed)


def test_se_in_empty_slots_is_that_of_the_se_network():
    model = networks.variant(timm.create_model("resnet18"), networks.changes(timm.create_model("resnet18"))["SE"])
    wanted = timm.create_model("seresnet18")
    wanted.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), wanted.eval()(x))


def test_c_over_16_is_left_out_only_where_it_is_the_blocks_own():
    assert "1/16, mean" in networks.changes(timm.create_model("test_efficientnet"))


def test_encnet_and_what_it_is_compared_with():
    model = networks.build(networks.ENCNET)
    found = {name: networks.variant(model, change).eval() for name, change in networks.changes(model).items()}
    fcn, encnet, full = list(found.values())[:3]
    assert list(found)[:2] == ["FCN-R50", "EncNet-R50"]
    assert not any(isinstance(module, ctxenc.ContextEncoding) for module in fcn.modules())
    sizes = {name: sum(parameter.numel() for parameter in each.parameters()) for name, each in found.items()}
    assert sizes["FCN-R50"] == sizes["torchvision FCN-R50"]  # the same head
    # conv 512 x 512, its norm, 32 codewords and their smoothing and norm, the gate; then 21 classes.
    assert sizes["EncNet-R50"] - sizes["FCN-R50"] == 512 * 512 + 1024 + 32 * 512 + 32 + 64 + 512 * 513
    assert sizes["EncNet-R50, SE-loss"] - sizes["EncNet-R50"] == 21 * 513
    x, target = networks.batch_of(networks.ENCNET, 2, 64)
    with torch.no_grad():
        assert fcn(x).keys() == encnet(x).keys() == {"out"}
        assert full(x).keys() == {"out", "se"}
        for each in found.values():
            assert each(x)["out"].shape == (2, 21, 64, 64)
            assert networks.loss_of(networks.ENCNET)(each(x), target) > 0
    fcn.encoding = encnet.encoding
    with torch.no_grad():
        assert torch.equal(fcn(x)["out"], encnet(x)["out"])  # nothing else differs


def test_macs_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    assert networks.macs(model, 10) == 10 * 10 * 8 * 3 * 9 + 8 * 5
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_macs_of_the_encoding_are_counted():
    block = ctxenc.ContextEncoding(3, 4, rd_channels=8)
    distances_and_sums = 2 * 10 * 10 * 4 * 8
    assert networks.macs(block, 10) >= 10 * 10 * 3 * 8 + distances_and_sums + 8 * 3


def test_reduction():
    assert networks.reduction(timm.create_model("resnet18")) == ""
    assert networks.reduction(timm.create_model("seresnet18")) == "C/8 to C/16"
    model = timm.create_model("resnet18")
    assert networks.reduction(ctxenc.patch_se_blocks(model, fill_empty=True, rd_ratio=1 / 4)) == "C/4"


def test_image_sizes_are_the_networks_own_at_most_224():
    assert [networks.image_size(name) for name in ("nfnet_f0", "efficientnet_b3", networks.ENCNET)] == [192, 224, 480]


def entry(model, precision="fp32"):
    return swap.Entry({"network": "none", "precision": precision}, model, model)


def test_memory_of_a_step_holds_parameters_momentum_and_gradients():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 1000))
    images, targets = networks.batch_of("none", 2, 8)
    before = model[1].weight.detach().clone()
    step, held = swap.training(entry(model), images, targets)
    assert not torch.equal(model[1].weight, before)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert held == 2 * parameters + images.nbytes + targets.nbytes
    assert 3 * parameters < held + peak_bytes(step, "cpu") < 3.2 * parameters
    forward, held = swap.inference(entry(model), images, targets)
    assert held == parameters + images.nbytes
    assert 0 < peak_bytes(forward, "cpu") < 0.2 * parameters


def test_modes_and_precision():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 1000), nn.Dropout())
    images, targets = networks.batch_of("none", 2, 8)
    swap.training(entry(model, "bf16"), images, targets)
    assert model.training
    forward, _ = swap.inference(entry(model, "bf16"), images, targets)
    assert not model.training
    assert forward().dtype == torch.bfloat16
    assert forward().is_inference()
    assert swap.inference(entry(model), images, targets)[0]().dtype == torch.float32


def measured(training, inference, peaks):
    names = ("training_peak_bytes", "inference_peak_bytes")
    times = {"training_ms": {"median": training}, "inference_ms": {"median": inference}}
    return {"variant": "a", "fused": False} | times | dict(zip(names, peaks, strict=True))


def test_ratios_are_costs_against_the_first_row():
    rows = [
        measured(4.0, 1.0, (50, 10)) | {"variant": "shipped"},
        measured(5.0, 2.0, (40, 30)),
        {"variant": "a", "fused": True, "inference_ms": {"median": 1.5}, "inference_peak_bytes": 7},
        {"variant": "b", "fused": False, "failed": "out of memory"},
    ]
    swap.add_ratios(rows)
    assert [rows[1][key] for key in ("training_ratio", "inference_ratio", "memory_ratio")] == [1.25, 2, 0.8]
    assert [rows[2].get(key) for key in ("training_ratio", "inference_ratio", "memory_ratio")] == [None, 1.5, 0.7]
    assert all(row["compared_with"] == "shipped" for row in rows)
    assert not any(key.endswith("ratio") for key in rows[3])


def test_a_row_fails_alone(tmp_path, monkeypatch, capsys):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = ctxenc.ContextEncoding(8)

        def forward(self, x):
            raise RuntimeError("no forward\nsecond line")

    found = networks.changes

    def with_broken(model):
        broken = {"unbuilt": lambda _: 1 // 0, "broken": lambda _: Broken()}
        first, *others = found(model).items()
        return dict([first]) | broken | dict(others)

    monkeypatch.setattr(networks, "changes", with_broken)
    monkeypatch.setattr(ctxenc.ContextEncoding, "fuse", lambda self: nn.Identity(), raising=False)
    out = tmp_path / "swap.json"
    swap.main([*SHORT, "unbuilt", "broken", "--out", str(out)])
    assert [row["variant"] for row in rows_of(out) if row["fused"]] == ["own, mean"]
    rows = {row["variant"]: row for row in rows_of(out) if not row["fused"]}
    assert rows["unbuilt"]["failed"].startswith("ZeroDivisionError")
    assert rows["broken"]["failed"] == "RuntimeError: no forward"
    for name in ("shipped", "own, mean"):
        assert rows[name]["training_ratio"] > 0
        assert rows[name]["inference_ratio"] > 0
    assert "failed: ZeroDivisionError" in capsys.readouterr().out
    assert markdown_names(out) == ["shipped", "ContextEncoding (C/16)"]


def markdown_names(path):
    lines = swap.markdown(json.loads(path.read_text())).splitlines()
    return [line.split(" | ")[1] for line in lines[2:] if line.startswith("|")]


def test_fused_blocks_are_timed_in_inference_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(ctxenc.ContextEncoding, "fuse", lambda self: nn.Identity(), raising=False)
    out = tmp_path / "swap.json"
    swap.main([*SHORT, "no SE", "--out", str(out)])
    rows = rows_of(out)
    assert [(row["variant"], row["fused"]) for row in rows] == [
        ("shipped", False), ("no SE", False), ("own, mean", False), ("own, mean", True),
    ]  # fmt: skip
    fused = rows[3]
    assert fused["n_parameters"] == rows[1]["n_parameters"] < rows[2]["n_parameters"]
    assert fused["n_macs"] == rows[1]["n_macs"]
    assert fused["inference_ratio"] == fused["inference_ms"]["median"] / rows[0]["inference_ms"]["median"]
    assert not any(key.startswith("training") for key in fused)
    assert 0 < fused["memory_ratio"] == fused["inference_peak_bytes"] / rows[0]["inference_peak_bytes"]
    shown = swap.markdown(json.loads(out.read_text())).splitlines()
    assert f", fused {fused['inference_ratio']:.2f} |" in shown[4]
    assert sum("fused" in line for line in shown) == 1


def test_without_fuse_there_are_no_such_rows(tmp_path, unfused):
    out = tmp_path / "swap.json"
    swap.main([*SHORT, "--out", str(out)])
    assert [row["fused"] for row in rows_of(out)] == [False, False]


def test_compiled_networks_are_what_runs(tmp_path, monkeypatch, unfused):
    calls = []

    def fake(model, dynamic):
        return lambda x: calls.append(model.training) or model(x)

    monkeypatch.setattr(torch, "compile", fake)
    out = tmp_path / "swap.json"
    swap.main([*SHORT, "--modes", "compile", "--rounds", "1", "--out", str(out)])
    assert {row["mode"] for row in rows_of(out)} == {"compile"}
    # Two rows, in each direction: at first, for its memory, and once in the one round.
    assert calls.count(True) == calls.count(False) == 2 * 3


def test_tables_differ_in_layout_alone(tmp_path, monkeypatch, unfused):
    seen, batches = [], []
    step = swap.training

    def spy(entry, images, targets):
        weight = entry.model.conv_stem.weight
        seen.append([each.is_contiguous(memory_format=torch.channels_last) for each in (images, weight)])
        batches.append((images.contiguous(), targets))
        return step(entry, images, targets)

    monkeypatch.setitem(swap.CALLS, "training", spy)
    out = tmp_path / "swap.json"
    swap.main([*SHORT, "--layouts", "channels_last", "contiguous", "--variants", "none", "--out", str(out)])
    assert [row["channels_last"] for row in rows_of(out)] == [True, False]
    assert seen == [[True, True], [False, False]]
    assert batches[0][0].shape == (2, 3, 64, 64)
    assert all(map(torch.equal, *batches))


def test_it_stops_when_its_time_is_over(tmp_path, capsys):
    out = tmp_path / "swap.json"
    swap.main([*SHORT, "--precisions", "fp32", "bf16", "--seconds", "0", "--out", str(out)])
    assert {row["precision"] for row in rows_of(out)} == {"fp32"}
    assert "1 of 2 tables" in capsys.readouterr().out


def planned(*arguments, device="cpu"):
    args = swap.parse(["--device", "cpu", *arguments])
    args.device = device
    return swap.tables(args)


def test_a_first_compiled_table_is_not_begun_where_it_would_be_ended(tmp_path, monkeypatch, capsys):
    begun = []
    monkeypatch.setattr(swap, "measure", lambda table, args: begun.append(table.setting.mode) or [])
    modes = ["--modes", "eager", "compile", "--layouts", "channels_last", "contiguous"]
    arguments = [*SHORT, *modes, "--out", str(tmp_path / "swap.json")]
    swap.main([*arguments, "--seconds", f"{swap.COMPILING / 2}"])
    assert begun == ["eager", "eager"]
    assert "2 of 4 tables" in capsys.readouterr().out
    swap.main([*arguments, "--seconds", f"{2 * swap.COMPILING}"])
    assert "4 of 4 tables" in capsys.readouterr().out


def test_the_default_on_a_cpu():
    plan = planned()
    count = len(networks.NETWORKS)
    assert [table.network for table in plan[:count]] == ["seresnet50", "EncNet-R50", *networks.CLASSIFIERS[1:]]
    assert {table.setting for table in plan[:count]} == {swap.FIRST}
    assert [table.names is None for table in plan[:count]] == [True, False] + [True] * (count - 2)
    assert [(table.network, table.names) for table in plan[count:]] == [("seresnet50", networks.MAIN)] * 3
    assert [table.setting for table in plan[count:]] == [
        ("eager", "bf16", True),
        ("eager", "fp32", False),
        ("compile", "fp32", True),
    ]


def test_the_default_on_a_gpu_is_everything():
    plan = planned(device="cuda")
    assert len({(table.network, table.setting) for table in plan}) == len(plan) == 9 * 2 * 3 * 2
    assert [(table.network, table.setting.precision) for table in plan[:4]] == [
        ("seresnet50", "bf16"), ("EncNet-R50", "bf16"), ("seresnet50", "bf16"), ("EncNet-R50", "bf16"),
    ]  # fmt: skip
    assert [table.setting.mode for table in plan[:4]] == ["eager"] * 2 + ["compile"] * 2
    assert {table.names for table in plan if table.setting.mode == "compile"} == {networks.MAIN}


def test_settings_asked_for_by_name():
    plan = planned("--precisions", "fp16", "bf16", "--networks", "nfnet_f0", "resnet50", "--variants", "SE")
    assert [(table.network, table.setting.precision) for table in plan] == [
        ("nfnet_f0", "bf16"), ("resnet50", "bf16"), ("nfnet_f0", "fp16"), ("resnet50", "fp16"),
    ]  # fmt: skip
    assert all(table.names == ["SE"] for table in plan)


def test_there_must_be_such_a_network(capsys):
    with pytest.raises(SystemExit):
        swap.parse(["--networks", "seresnet5"])
    assert "must be EncNet-R50 or a model of timm, got 'seresnet5'" in capsys.readouterr().err


def test_variants_have_names_for_readers():
    names = [named({"variant": each, "reduction": "C/16"}) for each in ("no SE", "own, mean, 14", "1/4, mean")]
    assert names == ["no SE", "ContextEncoding (C/16), max_size 14", "ContextEncoding (C/16)"]


def test_the_table_of_the_readme():
    row = {
        "network": "seresnet50", "variant": "own, mean", "fused": False, "mode": "eager", "precision": "fp32",
        "channels_last": True, "batch": 4, "size": 224, "reduction": "C/16", "n_parameters": 28_104_000,
        "n_macs": 4_307_000_000, "training_ratio": 1.046, "inference_ratio": 1.081, "memory_ratio": 1.024,
    }  # fmt: skip
    others = [row | {"precision": "bf16"}, row | {"mode": "compile"}, row | {"channels_last": False}]
    environment = {
        "gpu": None,
        "processor": "a CPU",
        "threads": 2,
        "commit": "abc",
        "versions": {"torch": "2", "timm": "1"},
    }
    for first, told in [(row, "eager, fp32, channels last"), (others[1], "torch.compile, fp32, channels last")]:
        lines = swap.markdown({"rows": [first, row, *others], "environment": environment}).splitlines()
        assert set(lines[2:-2]) == {
            "| seresnet50, 4 at 224 | ContextEncoding (C/16) | 28.1 M | 4.31 G | 1.05 | 1.08 | 1.02 |"
        }
        assert len(lines[2:-2]) == 2
        assert lines[-1] == f"a CPU, 2 threads, torch 2, timm 1, {told}; commit abc."
