"""Memory of a launch, and what may go wrong with it: bounds, alignment, races, and proxies without a fence between them."""

import ctypes

import numpy as np
from torch import Tensor

LANES = 32


class KernelError(Exception):
    """What would be wrong on a GPU, whatever values come out."""


class Shadow:
    """Who wrote and read each byte since when: a barrier ends an epoch, and inside one warps have no order."""

    def __init__(self, size: int):
        self.written, self.writer = np.full(size, -1), np.full(size, -1, np.int16)
        self.was_read, self.readers = np.full(size, -1), np.zeros(size, np.uint32)

    def read(self, places: np.ndarray, epoch: int, warp: int) -> None:
        raced = (self.written[places] == epoch) & (self.writer[places] != warp)
        if raced.any():
            raise KernelError(
                f"race: warp {warp} reads what warp {self.writer[places][raced][0]} wrote since the last barrier"
            )
        earlier = np.where(self.was_read[places] == epoch, self.readers[places], 0).astype(np.uint32)
        self.readers[places] = earlier | np.uint32(1 << warp)
        self.was_read[places] = epoch

    def write(self, places: np.ndarray, epoch: int, warp: int) -> None:
        by_another = (self.written[places] == epoch) & (self.writer[places] != warp)
        others = self.readers[places] & ~np.uint32(1 << warp)
        if (by_another | ((self.was_read[places] == epoch) & (others != 0))).any():
            raise KernelError(f"race: warp {warp} writes what another wrote or read since the last barrier")
        self.written[places], self.writer[places] = epoch, warp

    def forget(self, places: np.ndarray) -> None:
        """What a barrier of its own ordered."""
        self.written[places] = self.was_read[places] = -1


class Buffer:
    """The storage of a tensor, in global memory at the address that it has."""

    def __init__(self, start: int, size: int, name: str):
        self.start, self.size, self.name = start, size, name
        self.data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
        self.program = np.full(size, -1, np.int32)  # that wrote it in this launch


class GlobalMemory:
    """All tensors of a launch."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []

    def add(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() and all(buffer.start != storage.data_ptr() for buffer in self.buffers):
            self.buffers.append(Buffer(storage.data_ptr(), storage.nbytes(), name))

    def find(self, addresses: np.ndarray, size: int) -> tuple[Buffer, np.ndarray]:
        """The buffer that holds `size` bytes at every address, and their places in it, a row for each address."""
        low, high = int(addresses.min()), int(addresses.max()) + size
        for buffer in self.buffers:
            if buffer.start <= low and high <= buffer.start + buffer.size:
                return buffer, (addresses - buffer.start)[:, None] + np.arange(size)
        names = ", ".join(f"{buffer.name} ({buffer.size} bytes at {buffer.start:#x})" for buffer in self.buffers)
        raise KernelError(f"out of bounds: {low:#x} to {high:#x} is in none of {names}")


def check_programs(buffer: Buffer, places: np.ndarray, program: int) -> None:
    """Programs of a launch have no order at all."""
    owner = buffer.program[places]
    if ((owner != -1) & (owner != program)).any():
        raise KernelError(f"race: program {program} touches what program {owner.max()} wrote in {buffer.name}")


class SharedMemory:
    """The shared memory of a program; it begins as NaN."""

    def __init__(self, size: int):
        self.data = np.full(size, 0xFF, np.uint8)
        self.shadow = Shadow(size)
        # A bit for each warp whose asynchronous accesses would not see what was stored: until it has met a proxy fence.
        self.unfenced = np.zeros(size, np.uint32)
        self.epoch = np.zeros(size, np.int64)  # when it was stored

    def places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        if (addresses % size).any():
            raise KernelError(f"shared memory: {size} bytes at an address that is no multiple of it")
        if addresses.min() < 0 or addresses.max() + size > len(self.data):
            raise KernelError(f"shared memory: {addresses.max()} + {size} of {len(self.data)} bytes")
        return addresses[:, None] + np.arange(size)

    def fence(self, warp: int, epoch: int) -> None:
        """A proxy fence of this warp, for its own stores and those that a barrier let it see."""
        seen = (self.shadow.writer == warp) | (self.epoch < epoch)
        self.unfenced[seen] &= ~np.uint32(1 << warp)

    def barrier(self) -> None:
        """After it all see what one of them has fenced."""
        self.unfenced[self.unfenced != 0xFFFF_FFFF] = 0

    def asynchronous(self, places: np.ndarray, warp: int) -> np.ndarray:
        """What an access by the asynchronous proxy reads."""
        if places.max() >= len(self.data):
            raise KernelError(f"shared memory: an operand ends at {places.max()} of {len(self.data)} bytes")
        if (self.unfenced[places] & np.uint32(1 << warp)).any():
            raise KernelError("the asynchronous proxy reads what was stored without a fence")
        return self.data[places]
