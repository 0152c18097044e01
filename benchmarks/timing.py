"""Measure milliseconds of a call, by the clock on a CPU and by events around CUDA graph replays on a GPU; interleave calls."""

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
Timer = Callable[[], float]  # runs once, returns milliseconds

REPLAYED_MS = 2.0  # between two events: launching the first graph takes some 10 us, half a percent of it
CPU_CACHE_BYTES = 2**25  # if the system does not report it
COPIES_AT_MOST = (
    2000  # enough for all but tiny shapes, which need no more: a CUDA graph of this many calls takes long to capture
)


def interleaved(
    timers: dict[str, Timer], rounds: int, slow: Collection[str] = (), every: int = 40
) -> dict[str, list[float]]:
    """Return milliseconds of each timer, all in random order in every round; the slow ones in some rounds only."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    order = random.Random(0)
    for round_ in range(rounds):
        for name in order.sample(list(timers), len(timers)):
            if name not in slow or round_ % every == 0:
                times[name].append(timers[name]())
    return times


def cpu_timer(call: Call, warm_up: int = 5) -> Timer:
    """Time single calls."""
    for _ in range(warm_up):
        call()

    def timer() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    return timer


def _each(calls: Sequence[Call]) -> list[Any]:
    """Run all calls and keep all results: a captured graph would otherwise reuse one call's memory for the next."""
    return [call() for call in calls]


def _check_no_waiting(call: Call, stream: torch.cuda.Stream) -> None:
    """Check that a call does not wait for the GPU: capturing it would fail and leave the process unable to draw random numbers.

    Raises:
        RuntimeError: the call waits.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def cuda_timer(calls: Sequence[Call]) -> tuple[Timer, str]:
    """Time a call on a GPU: `calls` run in turn, the same call on different inputs, larger together than the cache.

    Returns:
        The timer, and its method: "graph", or "calls" and why no graph could be captured; launch time may then
        dominate.
    """
    stream = torch.cuda.Stream()  # warm-up and capture on the same one, or autograd waits for the other
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in itertools.islice(itertools.cycle(calls), max(3, len(calls))):
            call()
    torch.cuda.synchronize()
    try:
        _check_no_waiting(calls[0], stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            _each(calls)
        replay, how = graph.replay, "graph"
    except RuntimeError as failure:
        torch.cuda.synchronize()
        replay, how = partial(_each, calls), f"calls: {first_line(failure)}"

    def run(times: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(times):
            replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / times

    run(2)
    repeats = max(1, math.ceil(REPLAYED_MS / max(run(1), 1e-3)))
    return lambda: run(repeats) / len(calls), how


def first_line(failure: BaseException) -> str:
    """Return its type and the first line of its message."""
    lines = str(failure).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0][:200]}"


def spread(times: Sequence[float]) -> dict[str, float]:
    """Return the median and the 20th and 80th percentiles."""
    low, high = statistics.quantiles(times, n=5, method="inclusive")[::3] if len(times) > 1 else (times[0], times[0])
    return {"median": statistics.median(times), "p20": low, "p80": high}


def cache_bytes(device: str) -> int:
    """Return the size of the last-level cache: a GPU's L2, or the largest that the system reports for the first core."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 2**10 for size in sizes if size.endswith("K")), default=CPU_CACHE_BYTES)


def copies_beyond_cache(tensor: Tensor, times: float = 4.0) -> int:
    """Count the copies of a tensor that together exceed the last-level cache several times."""
    wanted = math.ceil(times * cache_bytes(tensor.device.type) / tensor.nbytes)
    return min(max(2, wanted), COPIES_AT_MOST)


def _median_seconds(call: Call, device: str) -> float:
    timer = cuda_timer([call])[0] if device == "cuda" else cpu_timer(call, warm_up=2)
    return 1e-3 * statistics.median(timer() for _ in range(20 if device == "cuda" else 7))


def copy_bandwidth(device: str) -> float:
    """Return bytes read and written per second while copying a large tensor."""
    nbytes = min(2**31, torch.cuda.mem_get_info()[0] // 4) if device == "cuda" else 8 * cache_bytes(device)
    source = torch.ones(nbytes // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Return flops per second of a large square product; fp32 on a GPU with tf32 allowed, as in the Triton kernels."""
    size = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    c = torch.empty_like(a)
    before = torch.get_float32_matmul_precision()
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        return 2 * size**3 / _median_seconds(lambda: torch.matmul(a, b, out=c), device)
    finally:
        torch.set_float32_matmul_precision(before)
