"""GPUs that need not be there: targets of the compiler, their limits, and the figures that estimates divide by.

Sources. Multiprocessors, bandwidth, size of the L2 cache and rates of the tensor cores (dense, with fp32 sums): NVIDIA's data sheets of
the A100 80GB SXM, A40, L40, H200 and HGX B200, and the paper on the RTX Blackwell architecture for the RTX 5090. Registers, warps and
shared memory of a multiprocessor: the table of compute capabilities in the CUDA programming guide. L2 bandwidth: measured in the
public repository te42kyfo/gpu-benches (gpu-l2-cache for the A100, L40 and H200, gpu-cache for the A40); none was found for the B200
and the RTX 5090, so theirs is that of the H200 and the L40 times the ratio of multiprocessors. Latency of memory, unloaded: measured
there for an A100, an H100 (taken for the H200 and B200) and an L40 (taken for the A40 and RTX 5090).
"""

from typing import NamedTuple

from ctxenc.kernels.fused.tiles import Target

KB = 1024
REGISTERS = 64 * KB  # of a multiprocessor; the same on all of NVIDIA's GPUs below
PARTITIONS = 4  # of a multiprocessor: registers are divided among them
REGISTER_UNIT = 256  # registers are given to a warp in multiples of this
RESERVED_SHARED, SHARED_UNIT = KB, 128  # bytes that CUDA takes of every program's shared memory; its granularity


class Figures(NamedTuple):
    """Speed of a board, as the sources above give it."""

    board: str
    bandwidth: float  # bytes a second of memory
    l2_bandwidth: float  # bytes a second
    l2_bytes: float
    half_rate: float  # flops a second of the tensor cores in bf16 and fp16
    tf32_rate: float
    latency: float  # seconds from a load to its value in memory


class Gpu(NamedTuple):
    """A target of the compiler."""

    backend: str
    arch: int | str
    threads: int  # in a warp
    target: Target  # as the choice of tiles sees it
    shared: int  # bytes of shared memory that a program may take
    warps: int = 0  # that run on a multiprocessor
    figures: Figures | None = None  # None: no estimate is made

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory of a multiprocessor."""
        return self.shared + RESERVED_SHARED


def _nvidia(capability: int, multiprocessors: int, shared_kb: int, warps: int, *figures: float | str) -> Gpu:
    target = Target(capability, multiprocessors)
    return Gpu("cuda", capability, 32, target, shared_kb * KB, warps, Figures(*figures))  # type: ignore[arg-type]


GPUS = {
    "sm_80": _nvidia(80, 108, 163, 64, "A100 80GB", 2.039e12, 5.4e12, 40e6, 312e12, 156e12, 405e-9),
    "sm_86": _nvidia(86, 84, 99, 48, "A40", 0.696e12, 2.4e12, 6e6, 149.7e12, 74.8e12, 254e-9),
    "sm_89": _nvidia(89, 142, 99, 48, "L40", 0.864e12, 5.2e12, 96e6, 181e12, 90.5e12, 254e-9),
    "sm_90": _nvidia(90, 132, 227, 64, "H200", 4.8e12, 9.7e12, 50e6, 989e12, 494e12, 374e-9),
    "sm_100": _nvidia(100, 148, 227, 64, "B200", 8.0e12, 10.9e12, 126e6, 2250e12, 1125e12, 374e-9),
    "sm_120": _nvidia(120, 170, 99, 48, "RTX 5090", 1.792e12, 6.2e12, 96e6, 209.5e12, 104.8e12, 254e-9),
    "gfx942": Gpu("hip", "gfx942", 64, Target(0, 304), 64 * KB),  # MI300X: compiled for, not estimated
}


def programs_at_a_time(gpu: Gpu, registers: int, shared: int, warps: int) -> int:
    """Programs of a kernel that fit on a multiprocessor of NVIDIA at a time.

    Args:
        gpu: An NVIDIA GPU.
        registers: Of a thread.
        shared: Bytes of shared memory of a program.
        warps: Of a program, 4 or more: with fewer the limit on programs, which is not looked at, could be lower.
    """
    of_warp = -(-registers * gpu.threads // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // PARTITIONS // of_warp * PARTITIONS // warps
    of_program = -(-(shared + RESERVED_SHARED) // SHARED_UNIT) * SHARED_UNIT
    return min(by_registers, gpu.warps // warps, gpu.shared_memory // of_program)
