"""The benchmark of the operator: what it measures, how it times, and that it reports no speed of a wrong result.

torch.compile is left out here, for its time; `.ci/run` has it. What is measured on a GPU is tested nowhere.
"""

import itertools
import json
import math
import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ctxenc
from benchmarks import encode, encode_rows, environment, timing
from benchmarks.encode import default_path, main, markdown, parse, tables
from benchmarks.encode_rows import PRODUCTS, Run, check, measure
from benchmarks.forms import LAYOUTS, Products, expanded, forward, gradients, inputs, shifted_matmul
from benchmarks.memory import peak_bytes
from benchmarks.shapes import FEEDS, problems
from ctxenc.kernels import reference

QUICK = ["--quick", "--device", "cpu", "--dtype", "bf16", "fp32"]
DIRECTIONS = ("forward", "forward_backward")
ROOT = Path(__file__).parent.parent
BANDWIDTH, RATE = 1e9, 1e10
RUN = Run("cpu", 0, 3, BANDWIDTH, {torch.float32: RATE})


@contextmanager
def cheap():
    """One thread (two on a busy machine wait for each other, at 20 ms a call), no compiler, few copies, a machine by heart."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda form: form)
        patch.setattr(timing, "cache_bytes", lambda device: 2**16)
        patch.setattr(encode, "copy_bandwidth", lambda device: BANDWIDTH)
        patch.setattr(encode, "matmul_rate", lambda device, dtype: RATE)
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _cheap():
    with cheap():
        yield


def flipped_sign(x, codewords, smoothing, **options):
    return shifted_matmul(x, codewords, -smoothing)


def lost_pixel(x, codewords, smoothing, **options):
    return shifted_matmul(x[:, :, :-1], codewords, smoothing)


def lost_gradient(x, codewords, smoothing, **options):
    return shifted_matmul(x, codewords.detach() + 0 * codewords, smoothing)


def one_table(group="facts", dtype=torch.float32):
    return next(t for t in tables(problems("cpu", quick=True), [dtype], "cpu") if t.group == group)


def problem_of(table):
    torch.manual_seed(0)
    B, _, D, K = table.shape
    return inputs(table.shape, table.layout, table.dtype), torch.randn(B, K, D)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("new") / "folder" / "encode.json"
    with cheap():
        main([*QUICK, "--seed", "3", "--threads", "1", "--out", str(out)])
    return json.loads(out.read_text())


def test_what_holds_for_a_run(result):
    assert (result["benchmark"], result["seed"], result["device"]) == ("encode", 3, "cpu")
    assert result["environment"]["threads"] == 1
    assert result["environment"]["gpu"] is None
    assert 0 < result["operator_error"] < 1e-4
    assert result["copy_bytes_per_second"] == BANDWIDTH
    assert result["matmul_flops_per_second"] == {"bfloat16": RATE, "float32": RATE}
    assert result["cache_bytes"] > 2**16


def test_rows_of_a_quick_run(result):
    shapes = {"facts": [2, 196, 16, 8], "sweep": [3, 81, 16, 4]}
    forms = {"ctxenc, torch", "shifted matmul", "torch.compile(shifted matmul)", "expanded", PRODUCTS}
    found = {}
    for row in result["rows"]:
        assert row["shape"] == shapes[row["group"]]
        assert row["spatial"] == [math.isqrt(row["shape"][1])] * 2
        found.setdefault((row["group"], row["dtype"], row["layout"]), set()).add(row["form"])
    assert {key: names - {"mmsegmentation"} for key, names in found.items()} == {
        ("facts", "float32", LAYOUTS[0]): forms | {"torch.compile(expanded)"},
        ("facts", "float32", LAYOUTS[1]): forms,
        ("facts", "bfloat16", LAYOUTS[0]): forms | {"torch.compile(shifted matmul), autocast"},
        ("facts", "bfloat16", LAYOUTS[1]): forms | {"torch.compile(shifted matmul), autocast"},
        ("sweep", "float32", LAYOUTS[0]): forms,
        ("sweep", "bfloat16", LAYOUTS[0]): forms | {"torch.compile(shifted matmul), autocast"},
    }


def test_every_row_has_every_column(result):
    medians = {}
    for row in result["rows"]:
        if row["form"] in ("ctxenc, torch", PRODUCTS):
            for direction in DIRECTIONS:
                key = row["group"], row["layout"], row["dtype"], row["form"], direction
                medians[key] = row[f"{direction}_ms"]["median"]
    for row in result["rows"]:
        assert not {"failed", "refused"} & set(row)
        if row["form"] != PRODUCTS:
            assert 0 < row["error"] < (1e-5 if row["dtype"] == "float32" else 0.02)
        B, N, D, K = row["shape"]
        nbytes = B * N * D * (4 if row["dtype"] == "float32" else 2)
        for direction, passes, products in (("forward", 1, 2), ("forward_backward", 3, 6)):
            times = row[f"{direction}_ms"]
            assert 0 < times["p20"] <= times["median"] <= times["p80"]
            key = row["group"], row["layout"], row["dtype"]
            ratio = times["median"] / medians[*key, "ctxenc, torch", direction]
            assert row[f"{direction}_ratio"] == pytest.approx(ratio)
            part = medians[*key, PRODUCTS, direction] / times["median"]
            assert row[f"{direction}_products"] == pytest.approx(part)
            roofline = 1e3 * max(passes * nbytes / BANDWIDTH, products * 2 * B * N * D * K / RATE)
            assert row[f"{direction}_floor"] == pytest.approx(roofline / times["median"])
            assert row[f"{direction}_peak_bytes"] > 0 or row["form"] == PRODUCTS
        if row["form"] != PRODUCTS:  # the gradient of x at least
            assert row["forward_backward_peak_bytes"] > row["forward_peak_bytes"] + nbytes // 2


@pytest.mark.parametrize("mutant", [flipped_sign, lost_pixel, lost_gradient])
def test_nothing_is_measured_where_the_operator_is_wrong(mutant, tmp_path, monkeypatch):
    monkeypatch.setattr(ctxenc, "encode", mutant)
    out = tmp_path / "encode.json"
    with pytest.raises(SystemExit, match="no speed is reported for a wrong result"):
        main([*QUICK, "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize("mutant", [flipped_sign, lost_pixel, lost_gradient])
def test_no_speed_of_ours_where_one_shape_is_wrong(mutant, tmp_path, monkeypatch):
    monkeypatch.setattr(ctxenc, "encode", mutant)
    monkeypatch.setattr(encode, "check_operator", lambda device: 0.0)  # as if its shapes were all right
    out = tmp_path / "encode.json"
    with pytest.raises(SystemExit, match="no speed is reported for a wrong result"):
        main([*QUICK, "--groups", "sweep", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    for row in rows:
        assert ("refused" in row) == (row["form"] == "ctxenc, torch")
        assert ("forward_ms" in row) == ("forward_backward_ms" in row) == ("refused" not in row)
        assert "forward_ratio" not in row


def test_a_wrong_peer_is_refused_in_fp32_and_one_that_fails_says_why():
    def broken(*tensors):
        raise RuntimeError("no such thing\nand more")

    table = one_table()
    forms = {"expanded": flipped_sign, "shifted matmul": shifted_matmul, "broken": broken}
    rows = {row["form"]: row for row in check(table, forms, *problem_of(table), 2**40)}
    assert rows["expanded"]["refused"].startswith("error ")
    assert not {"refused", "failed"} & set(rows["shifted matmul"])
    assert rows["broken"]["failed"] == "RuntimeError: no such thing"
    assert "refused" not in rows["broken"]
    rows = check(one_table(dtype=torch.bfloat16), {"expanded": flipped_sign}, *problem_of(table), 2**40)
    assert "refused" not in rows[0]
    assert rows[0]["error"] > 0.02


def test_what_would_not_fit_is_left_out(monkeypatch):
    nbytes = 4 * 2 * 196 * 16 * 8
    monkeypatch.setattr(encode_rows, "free_bytes", lambda device: 10 * nbytes - 10)
    for row in measure(one_table(), RUN):
        assert ("failed" in row) == ("expanded" in row["form"] or row["form"] == "mmsegmentation")
        assert ("forward_ms" in row) == ("failed" not in row)
    monkeypatch.setattr(encode_rows, "free_bytes", lambda device: 10 * nbytes + 10)
    assert not any("failed" in row for row in measure(one_table(), RUN))


def test_free_bytes():
    assert 2**27 < encode_rows.free_bytes("cpu") < 2**45


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_the_expanded_form_beside_ours(layout):
    shape = B, N, D, K = 2, 784, 64, 32
    tensors, grad = inputs(shape, layout), torch.randn(B, K, D)
    x, weights, big = B * N * D * 4, B * N * K * 4, B * N * K * D * 4
    # two of B x N x K x D in forward; one more in backward, where a residual, its square and a gradient live
    for form, call, low, high in (
        (ctxenc.encode, lambda form: forward(form, tensors), weights, x + 3 * weights),
        (ctxenc.encode, lambda form: gradients(form, tensors, grad), x + 2 * weights, 2 * x + 6 * weights),
        (expanded, lambda form: forward(form, tensors), 2 * big, 2.1 * big),
        (expanded, lambda form: gradients(form, tensors, grad), 3 * big, 5.1 * big),
    ):
        call(form)
        assert low <= peak_bytes(lambda form=form, call=call: call(form), "cpu") <= high


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_are_those_of_the_operator(layout):
    shape = B, N, D, K = 2, 30, 8, 5
    tensors, grad = inputs(shape, layout), torch.randn(B, K, D)
    x, codewords, _ = (tensor.detach() for tensor in tensors)
    products = Products(tensors, grad)
    for direction, count in {"forward": 2, "forward_backward": 6}.items():
        with FlopCounterMode(display=False) as counter:
            getattr(products, direction)(tensors)
        assert counter.get_total_flops() == count * 2 * B * N * D * K
        assert encode_rows.WORK[direction][1] == count
        rows = codewords if direction == "forward" else grad
        torch.testing.assert_close(products.sums, rows @ x @ x.transpose(1, 2))
    torch.testing.assert_close(products.dx, products.rows.transpose(1, 2) @ products.columns)
    assert products.dx.stride() == x.stride()


MMSEG = """
import importlib

import torch
from torch import nn
from ctxenc.kernels import reference

assert hasattr(importlib.import_module("mmcv._ext"), "a_compiled_operator")

class Encoding(nn.Module):
    def __init__(self, channels, num_codes):
        super().__init__()
        self.codewords = nn.Parameter(torch.zeros(num_codes, channels))
        self.scale = nn.Parameter(torch.zeros(num_codes))

    def forward(self, x):
        return reference.encode(x.view(*x.shape[:2], -1), self.codewords, -self.scale)
"""


USE = """
import torch
from benchmarks import forms
from ctxenc.kernels import reference

assert forms.has_mmsegmentation()
for shape in ((2, 30, 8, 5), (2, 30, 8, 4)):
    for layout in forms.LAYOUTS:
        tensors, grad = forms.inputs(shape, layout), torch.randn(shape[0], shape[3], shape[2])
        wanted = forms.exact(reference.encode, tensors, grad)
        assert forms.error(forms.mmsegmentation, tensors, grad, wanted) < 1e-5
"""


def test_mmsegmentation_is_called_where_its_wheel_is(tmp_path):
    """A stand-in of the same structure: it imports operators that mmcv-lite lacks, and its scale is -s."""
    for package in ("mmcv", "mmseg", "mmseg/models", "mmseg/models/utils"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "mmseg/models/utils/encoding.py").write_text(MMSEG)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    subprocess.run(
        [sys.executable, "-c", USE], check=True, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    )


def test_every_call_takes_the_next_copy_whatever_the_row():
    sets = [(torch.zeros(1),), (torch.ones(1),), (torch.full((1,), 2.0),)]
    taken, turns = [], itertools.cycle(sets)
    rows = [{"form": "a"}, {"form": "expanded"}]
    timers = []
    for row in rows:
        timers.append(encode_rows.timer_of(row, "forward", lambda tensors: taken.append(int(tensors[0])), sets, turns))
    assert taken == [
        0,
        0,
        *[0, 1, 2, 0, 1],
        0,
        0,
    ]  # compiling and the peak, five to warm up; none where a call takes seconds
    taken.clear()
    for timer in timers * 2:
        timer()
    assert taken == [2, 0, 1, 2]
    assert all(row["forward_peak_bytes"] == 0 for row in rows)


def test_a_table_is_timed_on_copies_that_exceed_the_cache(monkeypatch):
    taken = []
    monkeypatch.setattr(encode_rows, "forward", lambda form, tensors: taken.append(tensors[0].data_ptr()))
    measure(one_table(), RUN)
    assert len(set(taken)) == math.ceil(4 * 2**16 / (4 * 2 * 196 * 16)) == 11


def test_twelve_shapes_of_networks_two_more_and_a_sweep():
    for device in ("cpu", "cuda"):
        found = problems(device)
        fed = [each for each in found if each.group != "saturated"]
        assert sum("C / 4" not in each.source for each in fed if each.group != "sweep") == 12
        assert len({each.shape for each in fed}) == len(fed)
        assert len({(each.group, each.source, each.shape) for each in found}) == len(found)
        for group, source, (B, N, D, K), (height, width) in found:
            assert height * width == N
            assert B > 0 < D * K
            assert (group == "sweep") == (source == "sweep")
    sweep = [each.shape for each in problems("cpu") if each.group == "sweep"]
    assert {shape[1] for shape in sweep} == {49, 196, 784, 3136, 12544}
    assert {shape[2] for shape in sweep} == {16, 64, 128, 256, 512}
    assert {shape[3] for shape in sweep} == {8, 16, 32, 64}
    assert all(sum(a != b for a, b in zip(shape, (4, 784, 128, 32), strict=True)) <= 1 for shape in sweep)
    assert [each.shape for each in problems("cpu")[:3]] == [
        (2, 3600, 512, 32),
        (16, 196, 256, 16),
        (32, 784, 128, 16),
    ]


def test_saturated_rows_on_a_cpu():
    """The three first shapes, with inputs that have weights below the smallest normal number, and no others do."""
    found = [each for each in problems("cpu") if each.group == "saturated"]
    assert [each.shape for each in found] == [each.shape for each in problems("cpu")[:3]]
    assert all(each.source.endswith(", saturated") for each in found)
    assert not [each for each in problems("cuda") if each.group == "saturated"]
    for saturated in (False, True):
        torch.manual_seed(0)
        weights = reference.assign(*inputs((1, 50, 128, 16), LAYOUTS[0], saturated=saturated))
        assert (((weights > 0) & (weights < torch.finfo(torch.float32).tiny)).float().mean() > 0.01) == saturated


def test_a_table_of_saturated_rows_takes_such_inputs(monkeypatch):
    asked = []

    def noted(*args, saturated):
        asked.append(saturated)
        return inputs(*args, saturated=saturated)

    monkeypatch.setattr(encode_rows, "inputs", noted)
    for group in ("facts", "saturated"):
        measure(one_table()._replace(group=group), RUN)
    assert asked == [False, True]


def test_the_processor_is_named(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: "processor : 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert environment._processor() == "Some CPU @ 2 GHz"
    monkeypatch.setattr(Path, "read_text", lambda self: "processor : 0\n")  # as on Arm
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert environment._processor() == "unknown"


def fed(network, size):
    """The shapes (D, H, W, K) that a network on the meta device feeds the operator."""
    found = set()
    for module in network.modules():
        if isinstance(module, ctxenc.Encoding):
            module.register_forward_pre_hook(lambda m, inputs: found.add((*inputs[0].shape[1:], m.num_codes)))
    network.eval()(torch.empty(1, 3, size, size))
    return found


def test_shapes_are_what_networks_feed():
    import timm

    from ctxenc.integrations import EncNet, cifar_encnet

    wanted = {}
    for feed in itertools.chain(*FEEDS.values()):
        network = feed.source.split(",")[0] + (" C / 4" if "C / 4" in feed.source else "")
        wanted.setdefault(network, set()).add((feed.channels, *feed.spatial, feed.num_codes))
    with torch.device("meta"), torch.no_grad():
        for name, shapes in wanted.items():
            if name.startswith("EncNet-R50"):
                found = fed(EncNet("resnet50", num_classes=21), int(name.split()[-1]))
            elif name == "encnet_cifar_16k64d":
                found = fed(cifar_encnet(10, widen=4, num_codes=16), 32)
            else:
                network = timm.create_model(name.split()[0])
                ctxenc.patch_se_blocks(network, **({"rd_ratio": 1 / 4} if "C / 4" in name else {}))
                found = fed(network, 192 if name == "nfnet_f0" else 224)
            assert shapes <= found, name
    assert len(wanted) == 7


def test_the_most_important_tables_first():
    def heads(device, dtypes):
        found = tables(problems(device), dtypes, device)
        return [(t.source, t.group, t.dtype) for t in found], found

    order, found = heads("cuda", [torch.float32, torch.bfloat16])
    assert [source for source, _, _ in order[:4]] == ["EncNet-R50 at 480"] * 2 + ["EncNet-R50 at 769"] * 2
    assert order[0][2] == torch.bfloat16
    assert len(found) == len(set(found)) == 2 * 2 * len(problems("cuda"))
    _, found = heads("cpu", [torch.float32])
    assert {t.layout for t in found if t.group == "sweep"} == {LAYOUTS[0]}
    assert len(found) == sum(1 if each.group == "sweep" else 2 for each in problems("cpu"))


def test_it_stops_when_its_time_is_over(tmp_path, capsys):
    out = tmp_path / "encode.json"
    main([*QUICK, "--seconds", "0", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert len({(tuple(row["shape"]), row["layout"], row["dtype"]) for row in rows}) == 1
    assert "1 of 6 tables" in capsys.readouterr().out


def test_defaults_of_a_cpu():
    args = parse(["--device", "cpu"])
    assert (args.seconds, args.dtype, args.rounds, args.groups) == (math.inf, ["fp32"], 100, encode.GROUPS)
    assert parse(["--device", "cpu", "--rounds", "7"]).rounds == 7
    assert default_path({"gpu": None}).name == "encode_cpu.json"
    assert default_path({"gpu": "NVIDIA H200"}).name == "encode_nvidia_h200.json"
    assert default_path({"gpu": None}, "swap").name == "swap_cpu.json"


def test_markdown(result):
    rows = [row for row in result["rows"] if row["dtype"] == "float32"]
    lines = markdown(result | {"rows": rows}).splitlines()
    assert len([line for line in lines if line.startswith("| small | 2, 16, 14 x 14, 8 | ")]) == 1
    at = {(row["layout"], row["form"]): row for row in rows if row["group"] == "facts"}
    ours, compiled = at[LAYOUTS[0], "ctxenc, torch"], at[LAYOUTS[0], encode.COMPILED]
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert len(cells) == len(lines[0].split("|")[1:-1])
    assert cells[2] == " / ".join(f"{ours[f'{d}_ms']['median']:.2f}" for d in DIRECTIONS)
    assert cells[4] == " / ".join(f"{compiled[f'{d}_ratio']:.2f}" for d in DIRECTIONS)
    last = at[LAYOUTS[1], encode.COMPILED]
    assert f"median {last['forward_ratio']:.2f} / " in lines[4]
    assert ", 1 thread, torch " in lines[-1]
