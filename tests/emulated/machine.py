"""Programs of a launch and their warps, which run a few instructions at a time in an order drawn at random."""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from tests.emulated.memory import LANES, GlobalMemory, KernelError, Shadow, SharedMemory, check_programs
from tests.emulated.ptx import Address, Kernel, Operand

TYPES: dict[str, Any] = {
    "b8": np.uint8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "bf16": np.uint16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
}  # fmt: skip
LANE = np.arange(LANES)
EVERY = np.ones(LANES, bool)


UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # by bytes
WIDTHS = {name: np.dtype(dtype).itemsize for name, dtype in TYPES.items()}


@cache
def immediate(value: int, type_: str) -> np.ndarray:
    """An immediate value in every lane."""
    return np.full(LANES, value & (256 ** WIDTHS[type_] - 1), UNSIGNED[WIDTHS[type_]]).view(TYPES[type_])


class Warp:
    """32 threads that take every instruction together, each register an array of their values."""

    def __init__(self, program: "Program", number: int):
        self.program, self.number = program, number
        self.place, self.state = 0, "ready"  # "ready", "barrier", "waiting" for a copy, or "done"
        self.waits_for = (0, 0)  # the address of a barrier of copies, and the parity of the phase
        self.registers: dict[str, np.ndarray] = {}
        # Groups of what runs asynchronously, each a list of jobs, and the group that is open.
        self.groups: dict[str, list[list[Callable[[], None]]]] = {"copy": [], "product": [], "store": []}
        self.open: dict[str, list[Callable[[], None]]] = {"copy": [], "product": [], "store": []}

    def run(self, count: int) -> None:
        """At most so many instructions."""
        code = self.program.code
        while count and self.state == "ready":
            execute, text = code[self.place]
            self.place, count = self.place + 1, count - 1
            try:
                execute(self)
            except KernelError as error:
                raise KernelError(f"{error}; program {self.program.number}, warp {self.number}: {text}") from None

    def read(self, operand: Operand, type_: str) -> np.ndarray:
        """An operand's value in every lane."""
        bits, dtype = UNSIGNED[WIDTHS[type_]], TYPES[type_]
        if operand.kind == "register":
            # What was never written may be anything, and the compiler relies on it where it does not matter.
            value = self.registers.get(operand.value, immediate(-1, type_))
            return value.astype(bits, copy=False).view(dtype)
        if operand.kind == "special":
            values = {"%tid.x": self.number * LANES + LANE, "%ctaid.x": self.program.number + 0 * LANE}
            return values[operand.value].astype(bits).view(dtype)
        return immediate(operand.value, type_)

    def predicate(self, operand: Operand) -> np.ndarray:
        if operand.kind == "integer":
            return EVERY if operand.value else ~EVERY
        name = operand.value
        return ~self.registers[name[1:]] if name.startswith("!") else self.registers[name]

    def write(self, name: str, value: np.ndarray, mask: np.ndarray = EVERY) -> None:
        """Sets a register in the lanes of the mask."""
        if name == "_":
            return
        value = value if value.dtype == bool else value.view(UNSIGNED[value.dtype.itemsize])
        if mask is not EVERY and not mask.all():
            value = np.where(mask, value, self.registers.get(name, np.zeros(LANES, value.dtype)))
        self.registers[name] = value

    def address(self, address: Address) -> np.ndarray:
        if address.base is None:
            return np.full(LANES, address.offset)
        wide = address.base.value.startswith("%rd")
        return self.read(address.base, "b64" if wide else "b32").astype(np.int64) + address.offset

    def start(self, kind: str, job: Callable[[], None]) -> None:
        """Something asynchronous: at once, or as late as its group allows."""
        if self.program.late:
            self.open[kind].append(job)
        else:
            job()

    def commit(self, kind: str) -> None:
        self.groups[kind].append(self.open[kind])
        self.open[kind] = []

    def wait(self, kind: str, left: int) -> None:
        """For all groups but the last so many."""
        while len(self.groups[kind]) > left:
            for job in self.groups[kind].pop(0):
                job()

    def load_global(self, addresses: np.ndarray, size: int, mask: np.ndarray) -> np.ndarray:
        """Bytes (lanes, size), 0 outside the mask."""
        values, program = np.zeros((LANES, size), np.uint8), self.program
        if mask.any():
            if (addresses[mask] % size).any():
                raise KernelError(f"{size} bytes of global memory at an address that is no multiple of it")
            buffer, places = program.memory.find(addresses[mask], size)
            check_programs(buffer, places, program.number)
            if shadow := program.shadows.get(buffer.start):
                shadow.read(places.ravel(), program.epoch, self.number)
            values[mask] = buffer.data[places]
        return values

    def store_global(self, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        program, size = self.program, values.shape[1]
        if not mask.any():
            return
        if (addresses[mask] % size).any():
            raise KernelError(f"{size} bytes of global memory at an address that is no multiple of it")
        buffer, places = program.memory.find(addresses[mask], size)
        places, values = places.ravel(), values[mask].ravel()
        new = places[buffer.data[places] != values]  # where all write the same, their order does not matter
        check_programs(buffer, new, program.number)
        program.shadows.setdefault(buffer.start, Shadow(buffer.size)).write(new, program.epoch, self.number)
        buffer.data[places], buffer.program[new] = values, program.number
        if (buffer.data[places] != values).any():
            raise KernelError("lanes of a warp write different values to one address")

    def load_shared(self, addresses: np.ndarray, size: int, mask: np.ndarray) -> np.ndarray:
        """Bytes (lanes, size), 0 outside the mask."""
        values, shared = np.zeros((LANES, size), np.uint8), self.program.shared
        if mask.any():
            places = shared.places(addresses[mask], size)
            shared.shadow.read(places.ravel(), self.program.epoch, self.number)
            values[mask] = shared.data[places]
        return values

    def store_shared(
        self, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray, needs_fence: bool = True
    ) -> None:
        shared, program = self.program.shared, self.program
        if not mask.any():
            return
        places = shared.places(addresses[mask], values.shape[1])
        new = places[shared.data[places] != values[mask]]
        shared.shadow.write(new, program.epoch, self.number)
        shared.data[places] = values[mask]
        if needs_fence:
            shared.unfenced[new], shared.epoch[new] = 0xFFFF_FFFF, program.epoch
        else:
            shared.unfenced[places] = 0


class Program:
    """One program (a CTA) of a launch."""

    def __init__(
        self,
        kernel: Kernel,
        code: list[tuple[Callable[[Warp], None], str]],
        number: int,
        memory: GlobalMemory,
        parameters: dict[str, int],
        maps: dict[int, Any],
        shared: int,
        draw: random.Random,
        late: bool,
    ):
        self.code, self.number, self.memory, self.parameters, self.maps = code, number, memory, parameters, maps
        self.shared, self.shadows = SharedMemory(shared), {}
        self.draw, self.late, self.epoch = draw, late, 0
        self.barriers: dict[int, Any] = {}  # of copies, by their address
        self.copies: list[Callable[[], None]] = []  # of tiles, that are under way
        self.warps = [Warp(self, number) for number in range(kernel.threads // LANES)]

    def run(self) -> None:
        while any(warp.state != "done" for warp in self.warps):
            if ready := [warp for warp in self.warps if warp.state == "ready"]:
                self.draw.choice(ready).run(self.draw.randint(1, 400))
            else:
                self._release()

    def _release(self) -> None:
        """What lets the warps go on that all wait."""
        states = {warp.state for warp in self.warps}
        if states == {"barrier"}:
            self.epoch += 1
            self.shared.barrier()
            for warp in self.warps:
                warp.state = "ready"
            return
        copies, self.copies = self.copies, []
        for copy in copies:
            copy()
        arrived = [warp for warp in self.warps if warp.state == "waiting" and self.has_arrived(*warp.waits_for)]
        for warp in arrived:
            warp.state = "ready"
        if not arrived and not copies:
            raise KernelError(f"all warps of program {self.number} wait: {[warp.state for warp in self.warps]}")

    def has_arrived(self, barrier: int, parity: int) -> bool:
        """Whether the phase of that parity of a barrier of copies is over."""
        return self.barriers[barrier].phase != parity
