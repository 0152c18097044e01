"""The search for tiles by fake times and launches: what is chosen, kept and ignored. What it gains on a GPU is tested nowhere."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ctxenc.kernels import triton_autotune
from ctxenc.kernels.triton_autotune import LIMITS, Choice, Key, load, recut, save, search
from ctxenc.kernels.triton_tiles import Target, Tiles, backward_tiles, forward_tiles, partial_rows

pytest.importorskip("triton")

H200 = Target(90, 132)
TABLES = {"forward": forward_tiles, "backward": backward_tiles}


def meta(B=16, D=512, N=3600, dtype=torch.bfloat16):
    return torch.empty(B, D, N, dtype=dtype, device="meta")


def key_of(x, direction="forward", K=32):
    table = tuple(map(int, TABLES[direction](x, K, H200)[0]))
    return Key("Fake GPU", direction, "bfloat16", False, True, "bf16", x.shape[1], K, False, table)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXENC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(triton_autotune, "target_of", lambda x: H200)
    monkeypatch.setattr(triton_autotune, "_found", {})
    return tmp_path / "cache"


def searched(cost, x=None, direction="forward", K=32, choose=None):
    """What a search finds where a cut takes cost(cut) seconds, and the cuts that it tried."""
    x = meta() if x is None else x
    tried = []

    def launch(cut):
        tried.append(cut)
        return cost(cut)

    choose = choose or (lambda x, K, target=H200: TABLES[direction](x, K, target))
    choice, time = search(direction, x, K, choose(x, K), choose, launch, lambda call: call())
    return choice, time, tried


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_table_stays_where_nothing_is_faster(direction):
    choice, time, tried = searched(lambda cut: 1.0, direction=direction)
    assert choice == Choice(TABLES[direction](meta(), 32, H200)[0])
    assert time == 1
    assert len(set(tried)) == len(tried) <= 22  # nothing is timed twice


def test_a_gain_within_the_margin_is_noise():
    assert searched(lambda cut: 1.0 - 0.015 * (cut[0].warps == 4), direction="backward")[0].tiles.warps == 8


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_fastest_is_found_field_by_field(direction):
    wanted = {"block_n": 64, "block_d": 64, "warps": 4, "stages": 3}

    def cost(cut):
        tiles, *_ = cut
        return 1 + sum(getattr(tiles, name) != value for name, value in wanted.items()) + tiles.resident

    choice, *_ = searched(cost, direction=direction)
    assert choice.tiles == Tiles(**wanted)
    assert choice.factor == 1


def test_fewer_programs_are_found():
    choice, *_ = searched(lambda cut: float(cut[1] * cut[2]), meta(dtype=torch.float32), "backward")
    assert choice.factor == 0.5


def test_what_does_not_compile_or_fit_is_passed_over():
    from triton.runtime.errors import OutOfResources

    def cost(cut):
        if cut[0].stages == 3:
            raise OutOfResources(300000, 232448, "shared memory")
        if cut[0].warps == 4:
            raise RuntimeError("PassManager::run failed")
        return 1.0 + cut[0].block_n

    choice, *_ = searched(cost, direction="backward")
    assert (choice.tiles.block_n, choice.tiles.warps) == (64, 8)


def test_a_broken_gpu_is_told():
    def cost(cut):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match=r"^CUDA error"):
        searched(cost)


def test_the_walking_form_may_take_the_place_of_the_resident_one():
    assert forward_tiles(meta(), 32, H200)[0].resident
    assert not searched(lambda cut: 1.0 + cut[0].resident)[0].tiles.resident
    choice, _, tried = searched(lambda cut: 2.0 - cut[0].resident)
    assert choice.tiles.resident
    assert min((tiles.block_n, tiles.stages) for tiles, *_ in tried if tiles.resident) == (64, 2)


@pytest.mark.parametrize("shape", [(2, 512, 3600), (16, 256, 196), (32, 128, 784), (1, 16, 1), (300, 24, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_cut_is_one_that_the_table_could_give(shape, dtype, direction):
    x = meta(*shape, dtype=dtype)
    (B, D, N), K = shape, 32
    *_, tried = searched(lambda cut: 1.0, x, direction)
    table = TABLES[direction](x, K, H200)
    assert tried[0] == table
    for tiles, programs, groups in tried:
        share = programs * (B if direction == "forward" else 1)
        assert 1 <= programs <= -(-N // tiles.block_n) * (1 if direction == "forward" else B)
        assert 1 <= groups <= -(-D // tiles.block_d)
        assert share <= max(partial_rows(x, K), share if programs == 1 else 0, table[1] * (share // programs))
        for name in ("block_n", "block_d", "warps", "stages"):
            low, high = LIMITS[name]
            assert low <= getattr(tiles, name) <= high


def test_a_choice_serves_other_sizes():
    x, small = meta(dtype=torch.float32), meta(B=1, N=20, dtype=torch.float32)
    choice = Choice(Tiles(64, 32, 8, 2), 2)
    assert recut("backward", x, 32, backward_tiles(x, 32, H200), choice)[0] == choice.tiles
    assert recut("backward", small, 32, backward_tiles(small, 32, H200), choice)[1:] == (1, 16)


def test_what_is_kept_comes_back(cache):
    key, choice = key_of(meta()), Choice(Tiles(64, 32, 8, 3, resident=True), 0.5)
    assert load(key) is None
    save(key, choice)
    assert load(key) == choice
    assert type(load(key).tiles.resident) is bool
    assert load(key._replace(gpu="Another GPU")) is None
    assert len(list(cache.iterdir())) == 1  # no temporary is left


def test_other_versions_search_again(monkeypatch):
    import ctxenc

    key = key_of(meta())
    save(key, Choice(Tiles(64, 32, 8, 2)))
    monkeypatch.setattr(ctxenc, "__version__", "999")
    assert load(key) is None


def damages(content):
    tiles = content["tiles"]
    return {
        "empty": "",
        "cut": json.dumps(content)[:-20],
        "list": "[]",
        "binary": "\udcff\udcfe",
        "other key": json.dumps(content | {"key": {}}),
        "no tiles": json.dumps({"key": content["key"]}),
        "text": json.dumps(content | {"tiles": tiles | {"warps": "4"}}),
        "zero": json.dumps(content | {"tiles": tiles | {"block_n": 0}}),
        "true": json.dumps(content | {"tiles": tiles | {"warps": True}}),
        "missing field": json.dumps(content | {"tiles": {"block_n": 64}}),
        "factor": json.dumps(content | {"factor": -1}),
        "factor of text": json.dumps(content | {"factor": "1"}),
    }


EXAMPLE = {"key": {}, "tiles": {}, "factor": 1}


@pytest.mark.parametrize("kind", list(damages(EXAMPLE)))
def test_a_damaged_file_is_ignored(cache, kind):
    key, choice = key_of(meta()), Choice(Tiles(64, 32, 8, 2))
    save(key, choice)
    (path,) = cache.iterdir()
    path.write_text(damages(json.loads(path.read_text()))[kind], errors="surrogateescape")
    with pytest.warns(UserWarning, match=r"^ctxenc: .*\.json is ignored, and tiles are searched for again"):
        assert load(key) is None
    save(key, choice)
    assert load(key) == choice


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CTXENC_CACHE_DIR", str(tmp_path / "file"))
    save(key_of(meta()), Choice(Tiles(64, 32, 8, 2)))
    assert load(key_of(meta())) is None


def test_a_file_that_cannot_be_put_in_place_leaves_nothing(cache, monkeypatch):
    def replace(*_):
        raise PermissionError

    monkeypatch.setattr(os, "replace", replace)
    save(key_of(meta()), Choice(Tiles(64, 32, 8, 2)))
    assert list(cache.iterdir()) == []


def test_processes_that_write_at_a_time_leave_whole_files(cache):
    code = """
        from ctxenc.kernels.triton_autotune import Choice, Key, Tiles, load, save
        for turn in range(200):
            key = Key("Fake GPU", "forward", "bfloat16", False, True, "bf16", turn % 3, 32, False, (1,))
            save(key, Choice(Tiles(64, 32, {warps}, 2)))
            assert load(key).tiles.warps in (4, 8)
    """
    root = Path(__file__).parent.parent

    def run(warps):
        lines = "\n".join(line[8:] for line in code.format(warps=warps).splitlines())
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", lines], cwd=root, capture_output=True, text=True, timeout=120
        )

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(run, (4, 8)):
            assert done.returncode == 0, done.stderr
    assert len(list(cache.iterdir())) == 3


class OnGpu:
    """Of a tensor what tuned() asks, as if it were on a GPU."""

    def __init__(self, x):
        self.x, self.is_cuda, self.device = x, True, torch.device("cuda:0")

    def __getattr__(self, name):
        return getattr(self.x, name)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is not there; gives what is captured, and the cuts that were launched."""
    state = {"capturing": False, "launched": []}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: torch.no_grad())
    monkeypatch.setattr(triton_autotune, "event_timer", lambda device: lambda call: call())
    return state


def ask(gpu, x):
    def launch(cut):
        gpu["launched"].append(cut)
        return 1.0 + (cut[0].warps == 8)

    def choose(x, K, target=H200):
        return backward_tiles(x, K, target)

    return triton_autotune.tuned("backward", "bf16", OnGpu(x), 32, False, choose, launch)


def test_the_first_call_searches_and_the_next_ones_know(gpu, monkeypatch):
    assert ask(gpu, meta())[0].warps == 4
    launched = len(gpu["launched"])
    assert launched > 5
    assert ask(gpu, meta(B=3, N=4000))[0].warps == 4  # another size, no other key
    monkeypatch.setattr(triton_autotune, "_found", {})  # as in another process
    assert ask(gpu, meta())[0].warps == 4
    assert len(gpu["launched"]) == launched
    ask(gpu, meta(D=256))
    assert len(gpu["launched"]) > launched


def test_nothing_is_timed_while_a_graph_is_captured(gpu, cache):
    gpu["capturing"] = True
    assert ask(gpu, meta()) == backward_tiles(meta(), 32, H200)
    assert not gpu["launched"]
    gpu["capturing"] = False
    assert ask(gpu, meta())[0].warps == 4
    gpu["capturing"] = True
    assert ask(gpu, meta())[0].warps == 4  # what is known is taken


def test_nothing_is_timed_while_compiling_or_where_the_same_bits_are_wanted(gpu, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        ask(gpu, meta())
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert ask(gpu, meta()) == backward_tiles(meta(), 32, H200)
    assert not gpu["launched"]


def test_what_never_ran_is_not_kept(gpu, cache, monkeypatch):
    def out_of_memory(call):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(triton_autotune, "event_timer", lambda device: out_of_memory)
    assert ask(gpu, meta()) == backward_tiles(meta(), 32, H200)
    assert not cache.exists()


def test_what_another_process_found_meanwhile_is_taken(gpu, monkeypatch):
    theirs = Choice(Tiles(16, 16, 8, 1))
    answers = iter([None, theirs])
    monkeypatch.setattr(triton_autotune, "load", lambda key, warn=True: next(answers))
    assert ask(gpu, meta())[0] == theirs.tiles


@pytest.mark.parametrize(
    ("environment", "on"),
    [({}, False), ({"CTXENC_AUTOTUNE": "1"}, True), ({"CTXENC_AUTOTUNE": "1", "TRITON_INTERPRET": "1"}, False)],
)
def test_it_is_off_by_default_and_in_the_interpreter(environment, on):
    clean = {name: value for name, value in os.environ.items() if name not in ("CTXENC_AUTOTUNE", "TRITON_INTERPRET")}
    code = "from ctxenc.kernels.triton_autotune import AUTOTUNE; print(AUTOTUNE)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        env=clean | environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(on), done.stderr


@pytest.mark.parametrize("on", [False, True])
def test_launchers_ask_the_search_only_where_it_is_on(on, monkeypatch):
    from benchmarks.kernel_report import Case, launches
    from ctxenc.kernels import triton_encode

    asked = []

    def tuned(direction, products, x, K, shared, choose, launch):
        asked.append((direction, products, K, shared))
        tiles, programs, groups = choose(x, K)
        launch((tiles._replace(block_n=16), programs, groups))
        return tiles, programs, groups

    monkeypatch.setattr(triton_encode, "AUTOTUNE", on)
    monkeypatch.setattr(triton_encode, "tuned", tuned)
    for direction in ("forward", "backward"):
        launches(Case("sm_80", direction, "bf16", False, True, 64, 32))
    assert asked == ([("forward", "bf16", 32, False), ("backward", "bf16", 32, False)] if on else [])
