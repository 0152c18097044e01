"""GPUs that need not be there: targets of the compiler, their limits, and the figures that estimates divide by.

Sources. Multiprocessors, bandwidth, size of the L2 cache and rates of the tensor cores (dense, with fp32 sums): NVIDIA's data
sheets of the A100 80GB SXM, A40, L40, H200 and HGX B200, and the paper on the RTX Blackwell architecture for the RTX 5090.
Registers, threads and shared memory of a multiprocessor: the table of compute capabilities in the CUDA programming guide. L2
bandwidth: measured in the public repository te42kyfo/gpu-benches (gpu-l2-cache for the A100, L40 and H200, gpu-cache for the A40);
none was found for the B200 and the RTX 5090, so theirs is that of the H200 and the L40 times the ratio of multiprocessors.
Latencies, unloaded: measured there for an A100, an H100 (taken for the H200 and B200) and an L40 (taken for the A40 and RTX 5090).
"""

from typing import Any, NamedTuple

from ctxenc.kernels.fused.tiles import GPU

KB = 1024


class Figures(NamedTuple):
    """Speed of a board, as the sources above give it."""

    board: str
    bandwidth: float  # bytes a second of memory
    l2_bandwidth: float  # bytes a second
    l2_bytes: float
    half_rate: float  # flops a second of the tensor cores in bf16 and fp16
    tf32_rate: float
    latency: float  # seconds that a load from memory takes
    l2_latency: float


class Gpu(NamedTuple):
    """A target of the compiler."""

    backend: str
    arch: int | str
    threads: int  # in a warp
    target: GPU  # as the choice of tiles sees it
    shared: int  # bytes of shared memory that a program may take
    figures: Figures | None = None  # None: no estimate is made


def _nvidia(capability: int, multiprocessors: int, shared_kb: int, threads: int, *figures: Any) -> Gpu:
    """A GPU with 64 K registers a multiprocessor, and 1 KB of shared memory more than a program may take."""
    target = GPU(capability, multiprocessors, 64 * KB, (shared_kb + 1) * KB, threads)
    return Gpu("cuda", capability, 32, target, shared_kb * KB, Figures(*figures))


GPUS = {
    "sm_80": _nvidia(80, 108, 163, 2048, "A100 80GB", 2.039e12, 5.4e12, 40e6, 312e12, 156e12, 405e-9, 149e-9),
    "sm_86": _nvidia(86, 84, 99, 1536, "A40", 0.696e12, 2.4e12, 6e6, 149.7e12, 74.8e12, 254e-9, 111e-9),
    "sm_89": _nvidia(89, 142, 99, 1536, "L40", 0.864e12, 5.2e12, 96e6, 181e12, 90.5e12, 254e-9, 111e-9),
    "sm_90": _nvidia(90, 132, 227, 2048, "H200", 4.8e12, 9.7e12, 50e6, 989e12, 494e12, 374e-9, 151e-9),
    "sm_100": _nvidia(100, 148, 227, 2048, "B200", 8.0e12, 10.9e12, 126e6, 2250e12, 1125e12, 374e-9, 151e-9),
    "sm_120": _nvidia(120, 170, 99, 1536, "RTX 5090", 1.792e12, 6.2e12, 96e6, 209.5e12, 104.8e12, 254e-9, 111e-9),
    "gfx942": Gpu("hip", "gfx942", 64, GPU(0, 304), 64 * KB),  # MI300X: compiled for, not estimated
}
