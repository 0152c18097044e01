"""Matrix instructions: fragments in registers, matrices in shared memory, and products, which are summed in fp64 here.

PTX ISA: "Warp Level Matrix Instructions" and, for wgmma and what it describes in shared memory, "Asynchronous Warpgroup Level
Matrix Multiply-Accumulate Instructions".
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tests.emulated.instructions import Execute, from_bf16, makes
from tests.emulated.machine import LANE, UNSIGNED, Warp
from tests.emulated.memory import LANES
from tests.emulated.ptx import Instruction, Kernel, Operand, address, listed, operand

ROW, COLUMN = LANE // 4, LANE % 4  # of a lane in a fragment
SWIZZLES = {
    0: (0, 16),
    1: (7, 128),
    2: (3, 64),
    3: (1, 32),
}  # bits that are changed, and bytes of a row, by layout type


def _from_f16(value: np.ndarray) -> np.ndarray:
    return value.view(np.float16).astype(np.float32)


def _from_tf32(value: np.ndarray) -> np.ndarray:
    """The 19 bits of it that a tensor core looks at."""
    return (value & np.uint32(0xFFFF_E000)).view(np.float32)


class Format(NamedTuple):
    """Of the operands of a product."""

    itemsize: int
    values: Callable[[np.ndarray], np.ndarray]  # of bits

    @property
    def depth(self) -> int:
        """Elements that one product sums up."""
        return 32 // self.itemsize

    def unpacked(self, register: np.ndarray) -> np.ndarray:
        """Values (lanes, elements) of a register."""
        bits = UNSIGNED[self.itemsize]
        return self.values(np.ascontiguousarray(register).view(bits).reshape(LANES, 4 // self.itemsize))


FORMATS = {"bf16": Format(2, from_bf16), "f16": Format(2, _from_f16), "tf32": Format(4, _from_tf32)}


def _left(registers: list[np.ndarray], form: Format) -> np.ndarray:
    """The left operand of a product, 16 rows of 32 bytes."""
    matrix, width = np.zeros((16, form.depth)), 4 // form.itemsize
    for place, register in enumerate(registers):
        for part, values in enumerate(form.unpacked(register).T):
            matrix[ROW + 8 * (place % 2), width * COLUMN + part + 4 * width * (place // 2)] = values
    return matrix


def _right(registers: list[np.ndarray], form: Format) -> np.ndarray:
    """The right operand, 8 columns of 32 bytes."""
    matrix, width = np.zeros((form.depth, 8)), 4 // form.itemsize
    for place, register in enumerate(registers):
        for part, values in enumerate(form.unpacked(register).T):
            matrix[width * COLUMN + part + 4 * width * place, ROW] = values
    return matrix


def _result(product: np.ndarray, place: int) -> np.ndarray:
    """The part of a product (16, n) that register number `place` holds."""
    return product[ROW + 8 * (place // 2 % 2), 8 * (place // 4) + 2 * COLUMN + place % 2]


def _format(instruction: Instruction) -> Format:
    """Products are summed in fp32, of operands of one format."""
    types = re.search(r"\.f32\.(\w+)\.\1", instruction.opcode)
    if types is None:
        raise NotImplementedError(instruction.text)
    return FORMATS[types[1]]


@makes("mma")
def _mma(instruction: Instruction, _: Kernel) -> Execute:
    results, *sources = map(listed, instruction.operands)
    left, right, sums = (list(map(operand, source)) for source in sources)
    form = _format(instruction)

    def execute(warp: Warp) -> None:
        a, b = ([warp.read(each, "b32") for each in side] for side in (left, right))
        product = _left(a, form) @ _right(b, form)
        values = [_result(product, place) + warp.read(each, "f32") for place, each in enumerate(sums)]
        for name, value in zip(results, values, strict=True):
            warp.write(name, value.astype(np.float32))

    return execute


def _described(descriptor: int, rows: int, columns: int, itemsize: int, transposed: bool) -> np.ndarray:
    """Places in shared memory of the bytes of a matrix (rows, columns, itemsize), with columns along the sum."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle, width = SWIZZLES[descriptor >> 62 & 3]
    row, column = np.arange(rows)[:, None, None], np.arange(columns)[None, :, None]
    along, across = (row, column) if transposed else (column, row)  # the dimension that lies together, and the other
    byte = along * itemsize + np.arange(itemsize)
    apart = width if swizzle and not transposed else leading  # from one row of the swizzle to the next
    place = start + byte // width * apart + byte % width + across // 8 * stride + across % 8 * width
    return place ^ (place >> 7 & swizzle) << 4


def _matrix(warp: Warp, descriptor: int, rows: int, columns: int, form: Format, transposed: bool) -> np.ndarray:
    """Values of a matrix in shared memory, read by the asynchronous proxy."""
    places = _described(descriptor, rows, columns, form.itemsize, transposed)
    shared = warp.program.shared
    values = np.ascontiguousarray(shared.asynchronous(places, warp.number))
    shared.shadow.read(places.ravel(), warp.program.epoch, warp.number)
    return form.values(values.view(UNSIGNED[form.itemsize])[..., 0])


@makes("wgmma.mma_async")
def _wgmma(instruction: Instruction, _: Kernel) -> Execute:
    """Each of the four warps computes 16 of the 64 rows."""
    results, left, right, scale, *signs = instruction.operands
    names, right, scale, form = listed(results), operand(right), operand(scale), _format(instruction)
    in_registers = left.startswith("{")
    sources, left = (list(map(operand, listed(left))), None) if in_registers else ([], operand(left))
    columns = int(re.search(r"m64n(\d+)k", instruction.opcode)[1])
    if signs[:2] != ["1", "1"]:
        raise NotImplementedError(instruction.text)
    transposed = [sign == "1" for sign in signs[2:]]  # of the operands that lie in shared memory
    transposed = [False] * (2 - len(transposed)) + transposed

    def execute(warp: Warp) -> None:
        adds = warp.predicate(scale)[0]
        a, b = (0 if each is None else int(warp.read(each, "b64")[0]) for each in (left, right))

        def job() -> None:  # registers too are read while it runs
            if in_registers:
                rows = _left([warp.read(each, "b32") for each in sources], form)
            else:
                rows = _matrix(warp, a, 64, form.depth, form, transposed[0])[16 * (warp.number % 4) :][:16]
            product = rows.astype(np.float64) @ _matrix(warp, b, columns, form.depth, form, transposed[1]).T
            for place, name in enumerate(names):
                value = _result(product, place) + (warp.read(Operand("register", name), "f32") if adds else 0)
                warp.write(name, value.astype(np.float32))

        warp.start("product", job)

    return execute


@makes("wgmma.fence", "wgmma.commit_group", "wgmma.wait_group")
def _wgmma_order(instruction: Instruction, _: Kernel) -> Execute:
    match instruction.parts[1]:
        case "commit_group":
            return lambda warp: warp.commit("product")
        case "wait_group":
            return lambda warp: warp.wait("product", int(instruction.operands[0]))
    return lambda warp: None


@makes("ldmatrix")
def _ldmatrix(instruction: Instruction, _: Kernel) -> Execute:
    results, source = instruction.operands
    names, where, transposed = listed(results), address(source), "trans" in instruction.parts

    def execute(warp: Warp) -> None:
        addresses = warp.address(where)
        for place, name in enumerate(names):
            rows = np.resize(addresses[8 * place : 8 * place + 8], LANES)
            matrix = warp.load_shared(rows, 16, LANE < 8)[:8].view(np.uint16)
            matrix = matrix.T if transposed else matrix
            halves = np.stack([matrix[ROW, 2 * COLUMN], matrix[ROW, 2 * COLUMN + 1]], 1)
            warp.write(name, halves.view(np.uint32)[:, 0])

    return execute


@makes("stmatrix")
def _stmatrix(instruction: Instruction, _: Kernel) -> Execute:
    target, sources = instruction.operands
    where, registers, transposed = address(target), list(map(operand, listed(sources))), "trans" in instruction.parts

    def execute(warp: Warp) -> None:
        addresses = warp.address(where)
        for place, register in enumerate(registers):
            matrix = np.zeros((8, 8), np.uint16)
            halves = np.ascontiguousarray(warp.read(register, "b32")).view(np.uint16).reshape(LANES, 2)
            matrix[ROW, 2 * COLUMN], matrix[ROW, 2 * COLUMN + 1] = halves.T
            values = np.zeros((LANES, 16), np.uint8)
            values[:8] = np.ascontiguousarray(matrix.T if transposed else matrix).view(np.uint8)
            warp.store_shared(np.resize(addresses[8 * place : 8 * place + 8], LANES), values, LANE < 8)

    return execute
