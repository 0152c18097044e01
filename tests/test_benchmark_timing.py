"""How the benchmarks time: calls interleaved, copies beyond the cache, and what a machine can do, with times and caches made up."""

import itertools
import math
from functools import partial

import pytest
import torch

from benchmarks import timing


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**16)


def fake_timers(calls):
    """Each takes 1 ms more than the one before it."""

    def timer(name):
        calls.append(name)
        return float(len(calls))

    return {name: partial(timer, name) for name in ("a", "b", "c")}


def test_rounds_are_interleaved_and_slow_rows_rare():
    calls = []
    times = timing.interleaved(fake_timers(calls), 10, {"b", "other"}, every=4)
    assert {name: len(values) for name, values in times.items()} == {"a": 10, "b": 3, "c": 10}
    assert sorted(itertools.chain(*times.values())) == list(range(1, 24))
    rounds = [calls[0:3], calls[3:5], calls[5:7], calls[7:9], calls[9:12], calls[12:14], calls[14:16], calls[16:18]]
    assert all(sorted(each) == (["a", "b", "c"] if n % 4 == 0 else ["a", "c"]) for n, each in enumerate(rounds))
    assert len({tuple(each) for each in rounds if len(each) == 2}) == 2  # in no fixed order


def test_a_cpu_is_timed_by_the_clock(monkeypatch):
    clock = iter([1.0, 1.25, 5.0, 5.5])
    calls = []
    timer = timing.cpu_timer(lambda: calls.append(1), warm_up=2)
    assert len(calls) == 2
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert (timer(), timer(), len(calls)) == (250.0, 500.0, 4)


def test_bandwidth_and_rate_of_a_machine(monkeypatch):
    monkeypatch.setattr(timing, "cpu_timer", lambda call, warm_up: call() is None or (lambda: 2.0))
    assert timing.copy_bandwidth("cpu") == 2 * 8 * 2**16 / 2e-3
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: torch.zeros(shape))
    assert timing.matmul_rate("cpu", torch.float32) == 2 * 2048**3 / 2e-3


def test_spread():
    assert timing.spread([4.0, 1.0, 3.0, 2.0, 5.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    assert timing.spread([7.0]) == {"median": 7.0, "p20": 7.0, "p80": 7.0}


def test_copies_exceed_the_cache(monkeypatch):
    x = torch.zeros(1000)
    assert timing.copies_beyond_cache(x) == math.ceil(4 * 2**16 / 4000)
    assert timing.copies_beyond_cache(x, times=0.01) == 2
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**40)
    assert timing.copies_beyond_cache(x) == timing.COPIES_AT_MOST
