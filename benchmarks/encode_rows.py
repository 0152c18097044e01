"""Measure one table of benchmarks.encode: check, then time, every row at one shape, layout and dtype."""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ctxenc
from benchmarks.forms import (
    LAYOUTS,
    TOLERANCE,
    Encode,
    Products,
    error,
    exact,
    expanded,
    forward,
    gradients,
    has_mmsegmentation,
    inputs,
    mmsegmentation,
    shifted_matmul,
    shifted_under_autocast,
)
from benchmarks.memory import peak_bytes
from benchmarks.shapes import Shape
from benchmarks.timing import Timer, copies_beyond_cache, cpu_timer, cuda_timer, first_line, interleaved, spread

COMPILED = "torch.compile(shifted matmul)"
PEER_TOLERANCE = 1e-2  # limit for a wrong peer in fp32; a merely less precise one is timed, and its error shown
EXPANDING = {"expanded", "mmsegmentation", "torch.compile(expanded)"}
SLOW_ROUNDS = {"cpu": 3, "cuda": 5}  # rounds for slow rows: seconds a call on a CPU
EXPANDED_PART = 0.1  # of free memory, for one B x N x K x D tensor: autograd takes five or six of them
PRODUCTS = "products alone"
WORK = {
    "forward": (1, 2),
    "forward_backward": (3, 6),
}  # least traffic as a multiple of x's bytes; products of B x N x K x D

Row = dict[str, Any]
Pass = Callable[[tuple[Tensor, ...]], Any]  # one direction of a row, on x, codewords and smoothing


class Table(NamedTuple):
    """Describe one table of rows."""

    group: str
    source: str
    shape: Shape
    spatial: tuple[int, int]
    layout: str
    dtype: torch.dtype

    def row(self, form: str) -> Row:
        """Make a row without measures."""
        return self._asdict() | {"dtype": str(self.dtype).removeprefix("torch."), "form": form}


class Run(NamedTuple):
    """Hold settings of all tables."""

    device: str
    seed: int
    rounds: int
    bandwidth: float  # bytes per second, read and written
    rates: dict[torch.dtype, float]  # flops per second of a large product

    def roofline_ms(self, table: Table, direction: str) -> float:
        """Return the time bound of a call that has x in memory and computes every product."""
        B, N, D, K = table.shape
        passes, products = WORK[direction]
        moving = passes * B * N * D * table.dtype.itemsize / self.bandwidth
        return 1e3 * max(moving, products * 2 * B * N * K * D / self.rates[table.dtype])


def forms_of(table: Table, device: str) -> dict[str, Encode]:
    """Return the rows of a table."""
    forms: dict[str, Encode] = {"ctxenc, torch": partial(ctxenc.encode, backend="torch")}
    if device == "cuda":  # Triton's interpreter has no meaningful speed
        forms["ctxenc, triton"] = partial(ctxenc.encode, backend="triton")
    forms["shifted matmul"] = shifted_matmul
    if table.group != "sweep" or device == "cpu":  # it takes most of a table's time
        forms[COMPILED] = torch.compile(shifted_matmul)
        if table.dtype != torch.float32:
            forms[f"{COMPILED}, autocast"] = torch.compile(shifted_under_autocast)
    forms["expanded"] = expanded
    if has_mmsegmentation():
        forms["mmsegmentation"] = mmsegmentation
    if table.group == "facts" and table.layout == LAYOUTS[0] and table.dtype == torch.float32:
        forms["torch.compile(expanded)"] = torch.compile(expanded)
    return forms


def free_bytes(device: str) -> int:
    """Return the free memory."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) * 2**10 if found else 2**33


def check(table: Table, forms: dict[str, Encode], tensors: tuple[Tensor, ...], grad: Tensor, free: int) -> list[Row]:
    """Make a row for each form: its error, or the reason why it has no error."""
    wanted = exact(shifted_matmul, tensors, grad)  # in fp64, where the expanded form would not fit
    nbytes, rows = 4 * math.prod(table.shape), []
    for name, form in forms.items():
        row = table.row(name)
        rows.append(row)
        ours = name.startswith("ctxenc")
        tolerance = TOLERANCE[table.dtype] if ours else PEER_TOLERANCE
        if name in EXPANDING and nbytes > EXPANDED_PART * free:
            row["failed"] = (
                f"B x N x K x D takes {nbytes / 1e9:.1f} GB, over {EXPANDED_PART} of {free / 1e9:.1f} GB free"
            )
            continue
        try:
            row["error"] = error(form, tensors, grad, wanted)
        except Exception as failure:  # a compiler raises any type, and the other rows should go on
            if "CUDA error" in str(failure):  # the process can no longer use the GPU after it
                raise RuntimeError(f"{name} at {table}") from failure
            row["failed"] = first_line(failure)
            if ours and "cannot run" not in row["failed"]:
                row["refused"] = row["failed"]
        else:
            if (ours or table.dtype == torch.float32) and not row["error"] <= tolerance:
                row["refused"] = f"error {row['error']:.1e} is over {tolerance:.0e}"
    return rows


def passes_of(form: Encode, grad: Tensor) -> dict[str, Pass]:
    """Return both directions of a form."""
    return {
        "forward": lambda tensors: forward(form, tensors),
        "forward_backward": lambda tensors: gradients(form, tensors, grad),
    }


def timer_of(
    row: Row, direction: str, call: Pass, sets: list[tuple[Tensor, ...]], turns: Iterator[tuple[Tensor, ...]]
) -> Timer | None:
    """Make the timer of a row in one direction; None if it fails, with the reason in the row.

    Args:
        row: gets the memory of the call.
        direction: a key of WORK.
        call: the timed call.
        sets: its inputs, with copies of x that together exceed the cache.
        turns: cycles over the sets, shared by all rows, so that a CPU's cache never holds a copy just read by another row.
    """
    device = sets[0][0].device.type
    try:
        call(sets[0])  # compiles, which takes extra memory
        row[f"{direction}_peak_bytes"] = peak_bytes(partial(call, sets[0]), device)
        if device == "cpu":
            return cpu_timer(lambda: call(next(turns)), 0 if row["form"] in EXPANDING else 5)
        timer, row[f"{direction}_timed_by"] = cuda_timer([partial(call, tensors) for tensors in sets])
    except Exception as failure:  # mostly out of memory
        row["failed"] = first_line(failure)
        return None
    return timer


def add_times(
    run: Run, table: Table, rows: list[Row], calls: dict[str, dict[str, Pass]], sets: list[tuple[Tensor, ...]]
) -> None:
    """Add times and ratios to all correct rows, in both directions."""
    every = math.ceil(run.rounds / SLOW_ROUNDS[run.device])
    for direction in WORK:
        turns, timers = itertools.cycle(sets), {}
        for row in rows:
            if "failed" in row or "refused" in row:
                continue
            if timer := timer_of(row, direction, calls[row["form"]][direction], sets, turns):
                timers[row["form"]] = timer
        times = {name: spread(values) for name, values in interleaved(timers, run.rounds, EXPANDING, every).items()}
        base, products = times.get("ctxenc, triton") or times.get("ctxenc, torch"), times.get(PRODUCTS)
        for row in rows:
            if row["form"] not in times:
                continue
            row[f"{direction}_ms"] = times[row["form"]]
            median = times[row["form"]]["median"]
            row[f"{direction}_floor"] = run.roofline_ms(table, direction) / median
            if products:
                row[f"{direction}_products"] = products["median"] / median
            if base:
                row[f"{direction}_ratio"] = median / base["median"]


def measure(table: Table, run: Run) -> list[Row]:
    """Measure one table: every row at one shape, layout and dtype."""
    torch._dynamo.reset()
    torch.manual_seed(run.seed)
    B, _, D, K = table.shape
    tensors = inputs(table.shape, table.layout, table.dtype, run.device, saturated=table.group == "saturated")
    grad = torch.randn(B, K, D, device=run.device)
    forms = forms_of(table, run.device)
    rows = check(table, forms, tensors, grad, free_bytes(run.device))
    rows.append(table.row(PRODUCTS))
    products = Products(tensors, grad)
    calls: dict[str, dict[str, Pass]] = {name: passes_of(form, grad) for name, form in forms.items()}
    calls[PRODUCTS] = {"forward": products.forward, "forward_backward": products.forward_backward}
    x, *parameters = tensors
    copies = [x.detach().clone().requires_grad_() for _ in range(copies_beyond_cache(x) - 1)]
    add_times(run, table, rows, calls, [(each, *parameters) for each in (x, *copies)])
    return rows
