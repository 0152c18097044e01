"""Asynchronous copies: by threads (cp.async), and of whole tiles by descriptors (cp.async.bulk.tensor) with barriers of their own.

PTX ISA: "Data Movement and Conversion Instructions: Asynchronous copy", "mbarrier", and "Tensors" for the swizzling of tiles.
"""

from typing import NamedTuple

import numpy as np
import triton

from tests.emulated.instructions import Execute, makes, masked
from tests.emulated.machine import LANE, Program, Warp
from tests.emulated.memory import LANES, KernelError, check_programs
from tests.emulated.ptx import Instruction, Kernel, Operand, address, operand

SWIZZLED = {0: (0, None), 1: (1, 32), 2: (3, 64), 3: (7, 128)}  # bits that are changed, and the bytes of a row


# Of a copy by threads before a product of the asynchronous proxy, Triton 3.6 made none, 3.9 does.
NEEDS_FENCE = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


class TensorMap(NamedTuple):
    """What a descriptor says of a tensor in global memory and of the tiles that are copied; outermost dimension first."""

    base: int
    shape: list[int]
    strides: list[int]  # in elements
    block: list[int]
    itemsize: int
    swizzle: int


class Barrier:
    """An mbarrier: a phase is over when all have arrived and all bytes that they expect."""

    def __init__(self, count: int):
        self.count = self.pending = count
        self.bytes, self.phase = 0, 0

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase ^ 1, self.count


# Copies by threads


@makes("cp.async.ca", "cp.async.cg")
def _copy(instruction: Instruction, _: Kernel) -> Execute:
    target, source, size, *count = instruction.operands
    mask, target, source, size = masked(instruction), address(target), address(source), int(size, 0)
    count = operand(count[0]) if count else Operand("integer", size)

    def execute(warp: Warp) -> None:
        lanes, to, of, counts = mask(warp), warp.address(target), warp.address(source), warp.read(count, "u32")

        def job() -> None:  # what is not copied becomes 0
            values = np.zeros((LANES, size), np.uint8)
            for some in set(counts[lanes].tolist()) - {0}:
                values[:, :some] |= warp.load_global(of, some, lanes & (counts == some))
            warp.store_shared(to, values, lanes, NEEDS_FENCE)

        warp.start("copy", job)

    return execute


@makes("cp.async.commit_group", "cp.async.wait_group", "cp.async.bulk.commit_group", "cp.async.bulk.wait_group")
def _order(instruction: Instruction, _: Kernel) -> Execute:
    kind = "store" if "bulk" in instruction.parts else "copy"
    if "commit_group" in instruction.parts:
        return lambda warp: warp.commit(kind)
    return lambda warp: warp.wait(kind, int(instruction.operands[0]))


# Copies of tiles


def _tile(program: Program, map_: TensorMap, start: int, corner: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Places in shared memory of the elements of a tile, and in the tensor, -1 outside it."""
    bits, width = SWIZZLED[map_.swizzle]
    if width not in (None, map_.block[-1] * map_.itemsize):
        raise KernelError(f"a swizzle of {width} bytes for rows of {map_.block[-1] * map_.itemsize}")
    if start % max(128, 8 * (width or 0)):
        raise KernelError(f"a tile at {start}, which is no multiple of what its swizzle repeats after")
    place = np.arange(np.prod(map_.block)) * map_.itemsize
    inside, element = np.ones(len(place), bool), np.zeros(len(place), np.int64)
    for index, first, size, stride in zip(
        np.unravel_index(np.arange(len(place)), map_.block), corner, map_.shape, map_.strides, strict=True
    ):
        inside &= (index + first >= 0) & (index + first < size)
        element += (index + first) * stride
    return start + (place ^ (place >> 7 & bits) << 4), np.where(inside, element, -1)


def load_tile(program: Program, map_: TensorMap, start: int, corner: list[int], barrier: Barrier) -> None:
    """Into shared memory, with zeros for what lies outside the tensor."""
    places, elements = _tile(program, map_, start, corner)
    inside, places = elements >= 0, places[:, None] + np.arange(map_.itemsize)
    values = np.zeros(places.shape, np.uint8)
    buffer, source = program.memory.find(map_.base + elements[inside] * map_.itemsize, map_.itemsize)
    check_programs(buffer, source, program.number)
    values[inside] = buffer.data[source]
    shared = program.shared
    shared.data[places], shared.unfenced[places] = values, 0
    shared.shadow.forget(places)
    barrier.bytes -= values.size
    barrier.settle()


def store_tile(warp: Warp, map_: TensorMap, start: int, corner: list[int]) -> None:
    """Into the tensor, without what lies outside it."""
    program = warp.program
    places, elements = _tile(program, map_, start, corner)
    values = program.shared.asynchronous(places[:, None] + np.arange(map_.itemsize), warp.number)
    inside = elements >= 0
    buffer, target = program.memory.find(map_.base + elements[inside] * map_.itemsize, map_.itemsize)
    check_programs(buffer, target, program.number)
    buffer.data[target], buffer.program[target] = values[inside], program.number


def _map_and_corner(text: str) -> tuple[Operand, list[Operand]]:
    map_, *corner = text.strip("[]").split(";")
    return operand(map_), list(map(operand, reversed(corner)))


@makes("cp.async.bulk.tensor.3d.shared::cta", "cp.async.bulk.tensor.3d.shared::cluster")  # a cluster of one
def _load_tile(instruction: Instruction, _: Kernel) -> Execute:
    target, source, barrier = instruction.operands
    mask, target, barrier, (map_, corner) = (
        masked(instruction),
        address(target),
        address(barrier),
        _map_and_corner(source),
    )

    def execute(warp: Warp) -> None:
        program = warp.program
        for lane in LANE[mask(warp)]:
            values = [int(warp.read(each, "s32")[lane]) for each in corner]
            which, start = program.maps[int(warp.read(map_, "u64")[lane])], int(warp.address(target)[lane])
            arrival = program.barriers[int(warp.address(barrier)[lane])]

            def job(which=which, start=start, values=values, arrival=arrival) -> None:
                load_tile(program, which, start, values, arrival)

            if program.late:
                program.copies.append(job)
            else:
                job()

    return execute


@makes("cp.async.bulk.tensor.3d.global")
def _store_tile(instruction: Instruction, _: Kernel) -> Execute:
    target, source = instruction.operands
    mask, source, (map_, corner) = masked(instruction), address(source), _map_and_corner(target)

    def execute(warp: Warp) -> None:
        for lane in LANE[mask(warp)]:
            values = [int(warp.read(each, "s32")[lane]) for each in corner]
            which, start = warp.program.maps[int(warp.read(map_, "u64")[lane])], int(warp.address(source)[lane])
            warp.start("store", lambda which=which, start=start, values=values: store_tile(warp, which, start, values))

    return execute


# Barriers of copies, and fences


@makes("mbarrier.init", "mbarrier.inval", "mbarrier.arrive.expect_tx")
def _barrier(instruction: Instruction, _: Kernel) -> Execute:
    where, *rest = (each for each in instruction.operands if each != "_")
    mask, where, kind = masked(instruction), address(where), instruction.parts[1]
    number = operand(rest[0]) if rest else None

    def execute(warp: Warp) -> None:
        barriers = warp.program.barriers
        for lane in LANE[mask(warp)]:
            place = int(warp.address(where)[lane])
            if kind == "inval":
                del barriers[place]
            elif kind == "init":
                barriers[place] = Barrier(int(warp.read(number, "u32")[lane]))
            else:
                barriers[place].pending -= 1
                barriers[place].bytes += int(warp.read(number, "u32")[lane])
                barriers[place].settle()

    return execute


@makes("mbarrier.try_wait.parity")
def _wait(instruction: Instruction, _: Kernel) -> Execute:
    done, where, parity = instruction.operands
    where, parity = address(where), operand(parity)

    def execute(warp: Warp) -> None:
        waits_for = int(warp.address(where)[0]), int(warp.read(parity, "u32")[0]) & 1
        if warp.program.has_arrived(*waits_for):
            warp.write(done, np.ones(LANES, bool))
        else:  # to be tried again
            warp.state, warp.waits_for, warp.place = "waiting", waits_for, warp.place - 1

    return execute


@makes("fence.proxy.async")
def _fence(instruction: Instruction, _: Kernel) -> Execute:
    return lambda warp: warp.program.shared.fence(warp.number, warp.program.epoch)
