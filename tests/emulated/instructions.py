"""Arithmetic, moves, branches, loads and stores; copies.py and tensor_cores.py hold the rest.

Every kind of instruction has a function that makes of one of them what a warp executes.
"""

import operator
from collections.abc import Callable

import numpy as np

from tests.emulated.machine import EVERY, LANE, TYPES, UNSIGNED, WIDTHS, Warp
from tests.emulated.memory import LANES
from tests.emulated.ptx import Instruction, Kernel, Operand, address, listed, operand

Execute = Callable[[Warp], None]
Make = Callable[[Instruction, Kernel], Execute]
MAKERS: dict[str, Make] = {}


def makes(*names: str) -> Callable[[Make], Make]:
    """Registers the function for instructions whose opcode begins so."""

    def register(make: Make) -> Make:
        MAKERS.update(dict.fromkeys(names, make))
        return make

    return register


def executable(instruction: Instruction, kernel: Kernel) -> Execute:
    """What a warp does at an instruction; the longest beginning of its opcode that is known tells."""
    parts = instruction.parts
    for count in range(len(parts), 0, -1):
        if make := MAKERS.get(".".join(parts[:count])):
            return make(instruction, kernel)
    raise NotImplementedError(instruction.text)


def masked(instruction: Instruction) -> Callable[[Warp], np.ndarray]:
    """The lanes in which an instruction takes effect."""
    if instruction.guard is None:
        return lambda warp: EVERY
    guard = Operand("register", instruction.guard)
    return lambda warp: warp.predicate(guard)


def bits(type_: str) -> str:
    """The type for bits of a width: b32 is computed with as u32."""
    return "u" + type_[1:] if type_ in ("b16", "b32", "b64") else type_


def to_bf16(value: np.ndarray) -> np.ndarray:
    """Bits of fp32 rounded to the nearest, to even where two are."""
    wide = value.view(np.uint32).astype(np.uint64)
    rounded = (wide + 0x7FFF + (wide >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


def from_bf16(value: np.ndarray) -> np.ndarray:
    return (value.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_tf32(value: np.ndarray) -> np.ndarray:
    """Bits of fp32 rounded to 10 bits of fraction, away from 0 where two are as near."""
    rounded = value.view(np.uint32).astype(np.uint64) + 0x1000 & ~np.uint64(0x1FFF)
    return np.where(np.isnan(value), 0x7FFF_FFFF, rounded).astype(np.uint32)


# Arithmetic

BINARY = {
    "add": operator.add, "sub": operator.sub, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "mul": operator.mul, "min": np.minimum, "max": np.maximum,
}  # fmt: skip
COMPARE = {
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}  # fmt: skip
UNARY = {
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "ex2": np.exp2,
    "rcp": lambda value: np.float32(1) / value,
    "rsqrt": lambda value: np.float32(1) / np.sqrt(value),
}
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


@makes(*BINARY)
def _binary(instruction: Instruction, _: Kernel) -> Execute:
    if "wide" in instruction.parts:
        return _multiply_add(instruction, _)
    result, *sources = instruction.operands
    compute, mask, a, b = BINARY[instruction.parts[0]], masked(instruction), *map(operand, sources)
    if "hi" in instruction.parts:
        compute = _high_product
    if instruction.type == "pred":
        return lambda warp: warp.write(result, compute(warp.predicate(a), warp.predicate(b)), mask(warp))
    type_ = bits(instruction.type)
    if type_ == "f32":  # of a number and NaN both give the number
        compute = {"min": np.fmin, "max": np.fmax}.get(instruction.parts[0], compute)
    return lambda warp: warp.write(result, compute(warp.read(a, type_), warp.read(b, type_)), mask(warp))


def _high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of products of 32 bits, with which the compiler divides by constants."""
    wide = np.int64 if a.dtype == np.int32 else np.uint64
    return (a.astype(wide) * b.astype(wide) >> wide(32)).astype(a.dtype)


@makes("mad", "fma")
def _multiply_add(instruction: Instruction, _: Kernel) -> Execute:
    result, *sources = instruction.operands
    mask, operands, type_ = masked(instruction), list(map(operand, sources)), instruction.type
    if "wide" in instruction.parts:
        wide = WIDER[type_]
    else:
        wide = "f64" if type_ == "f32" else type_
    dtype = np.float64 if wide == "f64" else TYPES[wide]

    def execute(warp: Warp) -> None:
        a, b, *c = (
            warp.read(each, type_ if place < 2 else wide.replace("f64", "f32")) for place, each in enumerate(operands)
        )
        value = a.astype(dtype) * b.astype(dtype)
        value = value + c[0] if c else value
        warp.write(result, value.astype(np.float32) if wide == "f64" else value, mask(warp))

    return execute


@makes("abs.bf16", "abs.bf16x2")
def _without_sign(instruction: Instruction, _: Kernel) -> Execute:
    result, source = instruction.operands
    mask, a = masked(instruction), operand(source)
    type_, kept = ("b32", np.uint32(0x7FFF_7FFF)) if instruction.type == "bf16x2" else ("b16", np.uint16(0x7FFF))
    return lambda warp: warp.write(result, warp.read(a, type_) & kept, mask(warp))


@makes(*UNARY)
def _unary(instruction: Instruction, _: Kernel) -> Execute:
    result, source = instruction.operands
    compute, mask, a, type_ = UNARY[instruction.parts[0]], masked(instruction), operand(source), bits(instruction.type)
    if type_ == "pred":
        return lambda warp: warp.write(result, ~warp.predicate(a), mask(warp))
    return lambda warp: warp.write(result, compute(warp.read(a, type_)), mask(warp))


@makes("div", "rem")
def _divide(instruction: Instruction, _: Kernel) -> Execute:
    remainder = instruction.parts[0] == "rem"
    result, *sources = instruction.operands
    mask, (a, b), type_ = masked(instruction), map(operand, sources), instruction.type
    if type_ == "f32":
        return lambda warp: warp.write(result, warp.read(a, type_) / warp.read(b, type_), mask(warp))

    def execute(warp: Warp) -> None:
        dividend, divisor = warp.read(a, type_), warp.read(b, type_)
        quotient = np.trunc(dividend.astype(np.float64) / divisor).astype(TYPES[type_])
        warp.write(result, dividend - quotient * divisor if remainder else quotient, mask(warp))

    return execute


@makes("shl", "shr")
def _shift(instruction: Instruction, _: Kernel) -> Execute:
    result, *sources = instruction.operands
    mask, (a, b), type_ = masked(instruction), map(operand, sources), bits(instruction.type)
    width, left = int(type_[1:]), instruction.parts[0] == "shl"

    def execute(warp: Warp) -> None:
        value, count = warp.read(a, type_), warp.read(b, "u32")
        kept = np.minimum(count, width - 1).astype(value.dtype)
        gone = value >> value.dtype.type(width - 1) if type_[0] == "s" else np.zeros_like(value)
        warp.write(result, np.where(count < width, value << kept if left else value >> kept, gone), mask(warp))

    return execute


@makes("bfe")
def _field(instruction: Instruction, _: Kernel) -> Execute:
    result, source, start, length = instruction.operands
    mask, a, start, length = masked(instruction), operand(source), int(start), int(length)

    def execute(warp: Warp) -> None:
        value = warp.read(a, "u32").astype(np.int64) >> start & (1 << length) - 1
        if instruction.type == "s32":
            value = np.where(value >> length - 1, value - (1 << length), value)
        warp.write(result, value.astype(np.int32), mask(warp))

    return execute


@makes("popc")
def _ones(instruction: Instruction, _: Kernel) -> Execute:
    result, source = instruction.operands
    mask, a = masked(instruction), operand(source)

    def execute(warp: Warp) -> None:
        bytes_ = np.ascontiguousarray(warp.read(a, "u32")).view(np.uint8).reshape(LANES, 4)
        warp.write(result, np.unpackbits(bytes_, axis=1).sum(1).astype(np.uint32), mask(warp))

    return execute


@makes("prmt")
def _permute(instruction: Instruction, _: Kernel) -> Execute:
    result, *sources = instruction.operands
    mask, (a, b, selector) = masked(instruction), map(operand, sources)

    def execute(warp: Warp) -> None:
        both = np.stack([warp.read(a, "u32"), warp.read(b, "u32")], 1).view(np.uint8)
        chosen = warp.read(selector, "u32")[:, None] >> np.uint32([0, 4, 8, 12]) & np.uint32(15)
        value = np.take_along_axis(both, (chosen & 7).astype(np.int64), 1)
        value = np.where(chosen & 8, np.where(value & 128, 255, 0), value).astype(np.uint8)
        warp.write(result, value.view(np.uint32)[:, 0], mask(warp))

    return execute


@makes("setp")
def _compare(instruction: Instruction, _: Kernel) -> Execute:
    result, *sources = instruction.operands
    mask, (a, b), type_, compare = (
        masked(instruction),
        map(operand, sources),
        bits(instruction.type),
        instruction.parts[1],
    )
    value = from_bf16 if type_ == "bf16" else lambda bits: bits
    return lambda warp: warp.write(
        result, COMPARE[compare](value(warp.read(a, type_)), value(warp.read(b, type_))), mask(warp)
    )


@makes("selp")
def _select(instruction: Instruction, _: Kernel) -> Execute:
    result, *sources = instruction.operands
    mask, (a, b, which), type_ = masked(instruction), map(operand, sources), instruction.type
    return lambda warp: warp.write(
        result, np.where(warp.predicate(which), warp.read(a, type_), warp.read(b, type_)), mask(warp)
    )


# Moves and conversions


@makes("mov", "cvta")
def _move(instruction: Instruction, _: Kernel) -> Execute:
    result, source = instruction.operands
    mask, type_ = masked(instruction), bits(instruction.type)
    if type_ == "pred":
        return lambda warp: warp.write(result, warp.predicate(operand(source)), mask(warp))
    dtype = TYPES[type_]
    if result.startswith("{"):  # a register into its parts, the lowest first
        names, a = listed(result), operand(source)
        part = UNSIGNED[WIDTHS[type_] // len(names)]

        def unpack(warp: Warp) -> None:
            parts = np.ascontiguousarray(warp.read(a, type_)).view(part).reshape(LANES, len(names))
            for place, name in enumerate(names):
                warp.write(name, parts[:, place].copy(), mask(warp))

        return unpack
    if source.startswith("{"):
        sources = list(map(operand, listed(source)))
        part_type = f"u{8 * WIDTHS[type_] // len(sources)}"
        return lambda warp: warp.write(
            result, np.stack([warp.read(each, part_type) for each in sources], 1).view(dtype)[:, 0], mask(warp)
        )
    a = operand(source)
    return lambda warp: warp.write(result, warp.read(a, type_), mask(warp))


@makes("cvt")
def _convert(instruction: Instruction, _: Kernel) -> Execute:
    result, *sources = instruction.operands
    mask, operands, (to, of) = masked(instruction), list(map(operand, sources)), instruction.parts[-2:]
    if to in ("bf16x2", "f16x2"):  # the second operand is the lower half
        half = to_bf16 if to == "bf16x2" else lambda value: value.astype(np.float16).view(np.uint16)

        def pack(warp: Warp) -> None:
            high, low = (half(warp.read(each, "f32")) for each in operands)
            warp.write(result, np.stack([low, high], 1).view(np.uint32)[:, 0], mask(warp))

        return pack
    special = {("tf32", "f32"): _to_tf32, ("bf16", "f32"): to_bf16, ("f32", "bf16"): from_bf16}.get((to, of))
    convert = special or (lambda value: value.astype(TYPES[to]))
    return lambda warp: warp.write(result, convert(warp.read(operands[0], of)), mask(warp))


@makes("shfl")
def _shuffle(instruction: Instruction, _: Kernel) -> Execute:
    result, *sources = instruction.operands
    mask, (a, b, clamp, members), how = masked(instruction), map(operand, sources), instruction.parts[2]
    if (clamp.value, members.value) != (31, -1):
        raise NotImplementedError(instruction.text)

    def execute(warp: Warp) -> None:
        other = warp.read(b, "u32").astype(np.int64)
        other = {"bfly": LANE ^ other, "idx": other & 31}[how]
        warp.write(result, warp.read(a, "u32")[other], mask(warp))

    return execute


@makes("redux.sync.add")
def _sum_of_lanes(instruction: Instruction, _: Kernel) -> Execute:
    result, source, _members = instruction.operands
    a = operand(source)
    return lambda warp: warp.write(result, np.full(LANES, warp.read(a, "s32").sum(), np.int32))


@makes("elect")
def _elect(instruction: Instruction, _: Kernel) -> Execute:
    chosen = instruction.operands[0].partition("|")[2]
    return lambda warp: warp.write(chosen, LANE == 0)


# Control


@makes("bra")
def _branch(instruction: Instruction, kernel: Kernel) -> Execute:
    mask, place = masked(instruction), kernel.target(instruction.operands[0], instruction.place)

    def execute(warp: Warp) -> None:
        taken = mask(warp)
        if taken.any() and not taken.all():
            raise NotImplementedError("lanes of a warp that branch apart")
        warp.place = place if taken.all() else warp.place

    return execute


@makes("bar.sync", "ret")
def _stop(instruction: Instruction, _: Kernel) -> Execute:
    state = "done" if instruction.opcode == "ret" else "barrier"
    if instruction.operands not in ([], ["0"]):
        raise NotImplementedError(instruction.text)
    return lambda warp: setattr(warp, "state", state)


@makes("bar.warp")
def _nothing(instruction: Instruction, _: Kernel) -> Execute:
    """The lanes of a warp are together anyway."""
    return lambda warp: None


# Loads and stores


@makes("ld.param")
def _load_parameter(instruction: Instruction, _: Kernel) -> Execute:
    result, source = instruction.operands
    dtype, name = TYPES[instruction.type], source.strip("[]")
    return lambda warp: warp.write(result, np.full(LANES, warp.program.parameters[name], np.uint64).astype(dtype))


SPACES = {"global": "global", "shared": "shared", "shared::cta": "shared"}


def _space(instruction: Instruction) -> str:
    for part in instruction.parts:
        if space := SPACES.get(part):
            return space
    raise NotImplementedError(instruction.text)


@makes("ld")
def _load(instruction: Instruction, _: Kernel) -> Execute:
    results, source = instruction.operands
    space, mask, names, where = _space(instruction), masked(instruction), listed(results), address(source)
    dtype = np.dtype(TYPES[instruction.type])

    def execute(warp: Warp) -> None:
        lanes = mask(warp)
        load = warp.load_global if space == "global" else warp.load_shared
        values = load(warp.address(where), dtype.itemsize * len(names), lanes).view(dtype)
        for place, name in enumerate(names):
            warp.write(name, values[:, place].copy(), lanes)

    return execute


@makes("st")
def _store(instruction: Instruction, _: Kernel) -> Execute:
    target, source = instruction.operands
    space, mask, where = _space(instruction), masked(instruction), address(target)
    sources, type_ = list(map(operand, listed(source))), instruction.type

    def execute(warp: Warp) -> None:
        values = np.stack([warp.read(each, type_) for each in sources], 1).view(np.uint8)
        store = warp.store_global if space == "global" else warp.store_shared
        store(warp.address(where), values, mask(warp))

    return execute
