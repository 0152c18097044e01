"""Tiles by measurement, where CTXENC_AUTOTUNE=1 was set before the first import: off by default, and then one test of a constant.

At the first call with a key (GPU, direction, dtype, layout, alignment, products, D, K, the table's own tiles, versions) the launch
itself is timed on the tensors of that call: beginning with the table's tiles, one field after the other is halved and doubled
(stages: one more and one less), and what is faster by more than MARGIN is kept. Searched are block_n 16 to 256, block_d 16 to 128,
4 and 8 warps, 1 to 3 stages, and half to four times as many programs; where forward's tiles are resident, the walking form too.
That is about 10 candidates, 20 at most, each compiled, which takes seconds.

The pixels and images of a call are not in the key: no new search for a new image size. What was found is kept in a file a key, so
that processes which write at the same time lose nothing of each other's. Other tiles add in another order: results may differ in
their last bits from those of the table, and between machines; under torch.use_deterministic_algorithms the table holds.
"""

import hashlib
import json
import os
import statistics
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ctxenc.kernels.triton_tiles import (
    Target,
    Tiles,
    block_of,
    ceil_div,
    is_channels_last,
    partial_rows,
    target_of,
    vector,
)

AUTOTUNE = os.environ.get("CTXENC_AUTOTUNE") == "1" and os.environ.get("TRITON_INTERPRET") != "1"  # which has no speed

MARGIN = 0.02  # of the time: less is noise
WARM_UP, REPETITIONS = 3, 15
LIMITS = {"block_n": (16, 256), "block_d": (16, 128), "warps": (4, 8), "stages": (1, 3), "factor": (0.5, 4)}
# A resident tile needs the 64 rows of a warpgroup's product, or 2904 bytes spill (D = 512, K = 32, sm_90); with one tile in
# flight the compiler fails, in Triton 3.9.
RESIDENT_LOWEST = {"block_n": 64, "stages": 2}
SLEEP = 1_000_000  # clock cycles, some 0.6 ms: more than it takes to launch a call

Cut = tuple[Tiles, int, int]  # tiles, programs that share the pixels, groups that share the channels
Choose = Callable[..., Cut]  # forward_tiles or backward_tiles
Launch = Callable[[Cut], Any]  # the call itself
Timer = Callable[[Callable[[], Any]], float]


class Choice(NamedTuple):
    """What is searched for, and kept."""

    tiles: Tiles
    factor: float = 1  # programs in all, of those that the table gives


class Key(NamedTuple):
    """What a choice depends on, beside the versions."""

    gpu: str
    direction: str
    dtype: str
    channels_last: bool
    aligned: bool
    products: str
    D: int
    K: int
    shared: bool
    table: tuple[int, ...]  # the table's tiles: where they change, what was found is out of date


_found: dict[tuple[Any, ...], Choice] = {}
_lock = threading.Lock()  # backward runs in threads of autograd's


def tuned(direction: str, products: str, x: Tensor, K: int, shared: bool, choose: Choose, launch: Launch) -> Cut:
    """Tiles, programs and groups of a launch, by what was found to be the fastest for calls like this one.

    The table's where nothing was found yet and nothing can be timed: while a graph is captured or compiled, on tensors that are not
    on a GPU, under torch.use_deterministic_algorithms.

    Args:
        direction: What is launched, a name.
        products: How products are taken.
        x: Features (B, D, N).
        K: Codewords.
        shared: Whether there is one smoothing factor for all codewords.
        choose: The table: forward_tiles or backward_tiles.
        launch: Runs the call with the given cut.
    """
    cut = choose(x, K)
    if not x.is_cuda or torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled():
        return cut
    memo = (x.device, direction, products, x.dtype, is_channels_last(x), _aligned(x), x.shape[1], K, shared, cut[0])
    if memo not in _found:
        with _lock:
            choice = _found.get(memo) or _find(direction, products, x, K, shared, choose, launch)
            if choice is None:
                return cut
            _found[memo] = choice
    choice = _found[memo]
    return recut(direction, x, K, _base(x, K, cut, choice.tiles.resident, choose), choice)


def _aligned(x: Tensor) -> bool:
    return vector(x, is_channels_last(x)) > 1


def _find(
    direction: str, products: str, x: Tensor, K: int, shared: bool, choose: Choose, launch: Launch
) -> Choice | None:
    """From the disk, else by a search; None where there can be no search now."""
    cut = choose(x, K)
    key = Key(
        torch.cuda.get_device_name(x.device),
        direction,
        str(x.dtype).removeprefix("torch."),
        is_channels_last(x),
        _aligned(x),
        products,
        x.shape[1],
        K,
        shared,
        tuple(map(int, cut[0])),
    )
    if choice := load(key):
        return choice
    if torch.cuda.is_current_stream_capturing():  # a graph holds what it captures, and cannot be waited for
        return None
    with torch.cuda.device_of(x):
        choice, time = search(direction, x, K, cut, choose, launch, event_timer(x.device))
    if other := load(key, warn=False):  # from a process beside this one, which was faster: all are to take the same
        return other
    if time < float("inf"):  # else nothing ran, and the call itself will tell why
        save(key, choice)
    return choice


def _base(x: Tensor, K: int, cut: Cut, resident: bool, choose: Choose) -> Cut:
    """The table's cut, in the walking form where that is wanted of tiles that the table makes resident."""
    if cut[0].resident and not resident:
        return choose(x, K, Target(0, target_of(x).multiprocessors))
    return cut


def recut(direction: str, x: Tensor, K: int, base: Cut, choice: Choice) -> Cut:
    """The cut of this x by a choice: programs in proportion to the table's, with its bounds on tiles and on partial sums.

    As in the table, programs share the pixels first, and what is left of them shares the channels.
    """
    tiles, (_, programs, groups) = choice.tiles, base
    B, D, N = x.shape
    items, rows = ceil_div(N, tiles.block_n), partial_rows(x, K)
    if direction.startswith("forward"):  # whose programs share one image
        rows //= B
    else:
        items *= B
    fill = max(1, int(programs * groups * choice.factor))
    programs = min(fill, items, max(rows, programs))
    return tiles, programs, 1 if tiles.resident else max(1, min(ceil_div(D, tiles.block_d), fill // programs))


def neighbours(choice: Choice, field: str, D: int) -> Iterator[Choice]:
    """The choices next to this one in a field, inside the limits."""
    low, high = LIMITS[field]
    if choice.tiles.resident:
        low = RESIDENT_LOWEST.get(field, low)
    if field == "block_d":
        high = min(high, block_of(D))
    value = choice.factor if field == "factor" else getattr(choice.tiles, field)
    for other in (value - 1, value + 1) if field == "stages" else (value / 2, value * 2):
        if not low <= other <= high:
            continue
        if field == "factor":
            yield choice._replace(factor=other)
        else:
            changed: dict[str, Any] = {field: int(other)}
            yield choice._replace(tiles=choice.tiles._replace(**changed))


def search(
    direction: str, x: Tensor, K: int, cut: Cut, choose: Choose, launch: Launch, timer: Timer
) -> tuple[Choice, float]:
    """The fastest choice, one field after the other from the table's tiles, and its time; nothing changes within the margin."""
    bases = {form: _base(x, K, cut, form, choose) for form in {cut[0].resident, False}}
    tried: dict[Cut, float] = {}

    def seconds(choice: Choice) -> float:
        this = recut(direction, x, K, bases[choice.tiles.resident], choice)
        if this not in tried:
            tried[this] = _time(this, launch, timer)
        return tried[this]

    winner = Choice(cut[0])
    least = seconds(winner)
    for form in sorted(bases, reverse=True):  # the resident one first
        best = Choice(bases[form][0])
        now = seconds(best)
        for field in LIMITS:
            if form and field == "block_d":  # no part of a resident tile
                continue
            for other in list(neighbours(best, field, x.shape[1])):
                if (then := seconds(other)) < now * (1 - MARGIN):
                    best, now = other, then
        if now < least * (1 - MARGIN):
            winner, least = best, now
    return winner, least


def _time(cut: Cut, launch: Launch, timer: Timer) -> float:
    """Of a call with this cut; infinite where it does not compile, or takes what the GPU has not."""
    from triton.errors import TritonError  # its out of resources, and the compiler's own

    try:
        return timer(lambda: launch(cut))
    except (TritonError, RuntimeError) as failure:
        if "CUDA error" in str(failure):  # after which this process can use the GPU no more
            raise
        return float("inf")


def event_timer(device: torch.device) -> Timer:
    """Times calls on a GPU: the median by events, with nothing of x in the L2 cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size

    def timer(call: Callable[[], Any]) -> float:
        for _ in range(WARM_UP):
            call()
        flush = torch.empty(2 * cache, dtype=torch.int8, device=device)
        events = []
        for _ in range(REPETITIONS):
            flush.zero_()
            torch.cuda._sleep(SLEEP)  # or the GPU would wait for the launches, and that would be what is timed
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.current_stream(device).synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    return timer


def directory() -> Path:
    """Where choices are kept: $CTXENC_CACHE_DIR, else ~/.cache/ctxenc."""
    return Path(os.environ.get("CTXENC_CACHE_DIR") or os.path.expanduser("~/.cache/ctxenc"))


def _identity(key: Key) -> dict[str, Any]:
    """The key and the versions, as JSON gives them back."""
    import triton

    version = sys.modules[__name__.partition(".")[0]].__version__  # the arrows between modules point the other way
    versions = {"ctxenc": version, "torch": str(torch.__version__), "triton": triton.__version__}
    return json.loads(json.dumps({**key._asdict(), **versions}))


def _file(identity: dict[str, Any]) -> Path:
    return directory() / f"tiles-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]}.json"


def load(key: Key, warn: bool = True) -> Choice | None:
    """What was found for a key, by this process or another; None, with a warning, where its file holds anything else."""
    identity = _identity(key)
    path = _file(identity)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != identity:
            raise ValueError("it is of another key")
        return _choice(content["tiles"], content["factor"])
    except OSError:
        return None
    except (ValueError, KeyError, TypeError) as failure:
        if warn:
            warnings.warn(f"ctxenc: {path} is ignored, and tiles are searched for again: {failure!r}", stacklevel=2)
        return None


def _choice(tiles: dict[str, Any], factor: float) -> Choice:
    """A choice as it was written, which anything may have changed since."""
    types = get_type_hints(Tiles)
    if set(tiles) != set(types) or any(type(tiles[name]) is not kind for name, kind in types.items()):
        raise ValueError(f"tiles must be {types}, got {tiles}")
    low, high = LIMITS["factor"]
    if not all(value is True or value is False or value > 0 for value in tiles.values()) or not low <= factor <= high:
        raise ValueError(f"tiles must be above 0 and the factor from {low} to {high}, got {tiles}, {factor!r}")
    return Choice(Tiles(**tiles), factor)


def save(key: Key, choice: Choice) -> None:
    """Keeps a choice on disk, whole or not at all. Where that cannot be written, this process alone knows it."""
    identity = _identity(key)
    content = {"key": identity, "tiles": choice.tiles._asdict(), "factor": choice.factor}
    path, temporary = _file(identity), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            temporary = file.name
            file.write(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
