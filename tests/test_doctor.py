"""ctxenc doctor: what it says and how it exits, on a machine without a GPU and where kernels fail."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ctxenc
from ctxenc.__main__ import main
from ctxenc.commands.doctor import environment_text, times_text
from ctxenc.diagnosis import examination, tasks
from ctxenc.kernels.backends import BackendInfo

SMALL = ["doctor", "--shapes", "2,16,5,5,4", "--dtypes", "fp32", "--layouts", "channels_first"]


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXENC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def doctor(*arguments):
    """The exit code of a run in this process."""
    try:
        return main([*arguments])
    except SystemExit as end:
        return end.code


def test_without_a_gpu_it_says_what_serves(tmp_path, capsys):
    assert doctor(*SMALL, "--out", str(tmp_path / "found.json")) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("ctxenc ")
    assert "no GPU that PyTorch can use" in printed
    assert 'backend="auto" takes torch: ' in printed[2]
    assert (
        "encode calls of 1 kinds: the PyTorch path serves all; --interpret checks the kernels without a GPU" in printed
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["environment"]["versions"].keys() == {"ctxenc", "torch", "triton", "timm"}
    assert found["environment"]["gpus"] == found["verdicts"] == found["times"] == found["problems"] == []
    call = {"shape": [2, 16, 5, 5], "num_codes": 4, "dtype": "fp32", "layout": "channels_first"}
    assert found["needs"] == {"device": "meta", "kinds": [], "calls": [call]} | {
        "why_no_kernels": "x is on meta, and Triton needs a GPU (or TRITON_INTERPRET=1 in the environment)"
    }


def test_the_default_shapes_are_those_of_the_benchmarks():
    from benchmarks.shapes import FEEDS as ALL
    from ctxenc.diagnosis.feeds import FEEDS

    assert len(FEEDS) == 12
    assert {*FEEDS} < {feed for group in ALL.values() for feed in group}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "seresnet5"], "--model: timm has no 'seresnet5'; near names: seresnet50"),
        (["--model", "resnet50"], "--model resnet50: "),
    ],
)
def test_a_mistake_is_one_line(arguments, said, capsys):
    assert doctor("doctor", *arguments) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"ctxenc: error: {said}")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("shape", ["2,16,5,5", "2,16,5,5,0", "2,16,5,5,x"])
def test_a_wrong_shape_is_refused(shape, capsys):
    assert doctor("doctor", "--shapes", shape) == 2
    assert f"must be B,D,H,W,K, five positive integers, got {shape!r}" in capsys.readouterr().err


def test_a_model_is_asked_what_it_encodes(tmp_path):
    out = tmp_path / "found.json"
    assert doctor("doctor", "--model", "seresnet50", "--num-codes", "8", "--dtypes", "fp32", "--out", str(out)) == 0
    calls = {(*call["shape"], call["num_codes"]) for call in json.loads(out.read_text())["needs"]["calls"]}
    assert calls == {(8, 16, 56, 56, 8), (8, 32, 28, 28, 8), (8, 64, 14, 14, 8), (8, 128, 7, 7, 8)}


@pytest.fixture
def sick(monkeypatch):
    script = Path(__file__).parent / "sick_kernels.py"
    monkeypatch.setattr(examination, "CHILD", [sys.executable, str(script)])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(script.parent.parent), os.environ.get("PYTHONPATH", "")]))


@pytest.mark.usefixtures("sick")
def test_each_failure_is_told(tmp_path, capsys):
    out = tmp_path / "found.json"
    assert doctor("doctor", "--interpret", "--seconds", "20", "--jobs", "2", "--out", str(out)) == 1
    found = json.loads(out.read_text())
    verdicts = {verdict["kind"][0]: verdict for verdict in found["verdicts"]}
    wanted = {
        "wrong": "doubled is off by 1e+05 times its tolerance",
        "random": "5 runs on the same inputs gave different bits",
        "raising": "RuntimeError: no such instruction",
        "killed": "its process was ended by SIGKILL",
        "sleeping": "no result within 20 s",
        "leaving": "its process ended with code 3",
    }
    assert {name: verdict["reason"] for name, verdict in verdicts.items() if not verdict["serves"]} == wanted
    assert verdicts["healthy"]["serves"]
    assert verdicts["healthy"]["kept"]
    assert not verdicts["raising"]["kept"]  # an installation can be mended
    printed = capsys.readouterr().out
    for name, reason in wanted.items():
        assert f"FAILED {name} (x float32): {reason}\n" in printed
    assert "1 of 1" in printed
    assert found["problems"] == []


@pytest.mark.usefixtures("sick")
def test_children_end_with_the_doctor():
    """An interrupted doctor leaves no process behind."""
    with examination.Children(interpret=True) as children:
        kind = json.dumps(["sleeping", {"x": "float32"}, "interpreter"])
        ended = []
        thread = threading.Thread(
            daemon=True, target=lambda: ended.append(children.run("prove", {"kind": kind, "device": "cpu"}, 500))
        )
        thread.start()
        while not children._running:
            time.sleep(0.05)
        (child,) = children._running
        children.end()
        thread.join(30)
        assert not thread.is_alive()
    assert ended[0].problem == "its process was ended by SIGKILL"
    assert child.returncode is not None
    assert children.run("prove", {}, 1).problem == "interrupted"


def test_a_cache_that_cannot_be_written_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("CTXENC_CACHE_DIR", os.devnull)
    monkeypatch.setenv("TRITON_CACHE_DIR", os.path.join(os.devnull, "triton"))
    assert doctor(*SMALL) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "cannot be kept" in line]
    assert len(told) == 2
    assert told[0].startswith("verdicts cannot be kept: ")
    assert told[1].startswith("compiled kernels cannot be kept: ")


@pytest.mark.parametrize(("broken", "code"), [("torch", 1), ("triton", 1)])
def test_a_broken_installation_is_one_line(broken, code, tmp_path, monkeypatch, capsys):
    (tmp_path / broken).mkdir()
    (tmp_path / broken / "__init__.py").write_text("raise ImportError('libwhatever.so: no such file')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    assert doctor(*SMALL, "--interpret") == code
    told = [line for line in capsys.readouterr().out.splitlines() if "libwhatever.so: no such file" in line]
    assert len(told) == 1


def test_help_is_quick_and_imports_no_torch():
    """As far as the command's own modules go."""
    code = (
        "import sys, argparse, types; sys.modules['ctxenc'] = package = types.ModuleType('ctxenc')\n"
        f"package.__path__ = [{str(Path(examination.__file__).parent.parent)!r}]\n"
        "import ctxenc.commands.doctor as doctor, ctxenc.diagnosis.examination\n"
        "doctor.add_arguments(argparse.ArgumentParser()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_kernels_of_a_block_are_checked_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "found.json"
    arguments = ["--shapes", "2,16,5,5,4", "--dtypes", "bf16", "--layouts", "channels_last", "--interpret"]
    assert doctor("doctor", *arguments, "--jobs", "2", "--out", str(out)) == 0
    found = json.loads(out.read_text())
    verdicts = {verdict["kind"][0]: verdict for verdict in found["verdicts"]}
    operators = {"encode", "encode_backward", "gate", "gate_backward", "pool", "pool_backward", "project_encode"}
    assert set(verdicts) == operators
    for verdict in verdicts.values():
        assert verdict["serves"]
        assert verdict["kept"]
        assert 0 < max(verdict["excess"].values()) < 1
        constants = verdict["kind"][1]  # the pool's features are those of the block's dtype
        assert constants.get("x", constants.get("features")) == "bfloat16"
    assert found["times"] == []


def test_gpus_are_described(monkeypatch):
    known = SimpleNamespace(name="Test GPU", major=9, minor=0, multi_processor_count=132, total_memory=144 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: known)
    monkeypatch.setattr(ctxenc, "backend_info", lambda: BackendInfo("triton", "all is well"))
    monkeypatch.setattr(tasks, "_find_driver", lambda: "570.1")
    text = environment_text(tasks.describe_environment())
    assert ", driver 570.1, Python" in text
    assert "GPU 0: Test GPU, 9.0, 132 multiprocessors, 144 GiB\n" in text
    assert 'backend="auto" takes triton: all is well' in text


def test_kernel_and_pytorch_path_are_timed_side_by_side(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    ran = []

    def do_bench(function, **how):
        ran.append(function())
        return 1.5 if ran[-1] is not None else 4.5

    monkeypatch.setattr(testing, "do_bench", do_bench)
    call = {"shape": [2, 16, 5, 5], "num_codes": 4, "dtype": "bf16", "layout": "channels_last"}
    (found,) = tasks.time_calls({"calls": [call], "device": "cpu"})
    assert found["call"] == call
    assert found["torch"] == {"forward_ms": 1.5, "both_ms": 4.5}
    assert found["triton"]["problem"].startswith('encode: backend="triton" cannot run: ')
    assert ran[0].shape == (2, 4, 16)
    slow = {"call": call, "triton": {"forward_ms": 0.5, "both_ms": 9.0}, "torch": found["torch"]}
    table = times_text([found, slow]).splitlines()
    assert table[2].split() == ["2x16x5x5,", "4", "bf16", "last", "-", "1.500", "-", "-", "4.500", "-"]
    assert table[3].split()[4:] == ["0.500", "1.500", "3.00", "9.000", "4.500", "0.50"]
