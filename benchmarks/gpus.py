"""Describe GPUs that need not be present: compiler targets, their limits, and the figures behind estimates.

Sources. Multiprocessors, bandwidth, size of the L2 cache and rates of the tensor cores (dense, with fp32 sums):
NVIDIA's data sheets of the A100 80GB SXM, A40, L40, H200 and HGX B200, and the paper on the RTX Blackwell architecture
for the RTX 5090. Registers, threads and shared memory of a multiprocessor: the table of compute capabilities in the
CUDA programming guide. L2 bandwidth: measured in the public repository te42kyfo/gpu-benches (gpu-l2-cache for the A100,
L40 and H200, gpu-cache for the A40); no measurement was found for the B200 and the RTX 5090, so they take the H200's
and the L40's times the ratio of multiprocessors. Latencies, unloaded: measured there for an A100, an H100 (taken for
the H200 and B200) and an L40 (taken for the A40 and RTX 5090).
"""

from typing import Any, NamedTuple

from ctxenc.kernels.fused.tiles import GPU

KB = 1024


class Figures(NamedTuple):
    """Hold the speed of a board, from the sources above."""

    board: str
    bandwidth: float  # bytes per second of memory
    l2_bandwidth: float  # bytes per second
    l2_bytes: float
    half_rate: float  # flops per second of the tensor cores in bf16 and fp16
    tf32_rate: float
    latency: float  # seconds of a load from memory
    l2_latency: float


class Gpu(NamedTuple):
    """Describe a compiler target."""

    backend: str
    arch: int | str
    threads: int  # per warp
    target: GPU  # for the choice of tiles
    shared: int  # most bytes of shared memory per program
    figures: Figures | None = None  # None: no estimate


def _nvidia(capability: int, multiprocessors: int, shared_kb: int, threads: int, *figures: Any) -> Gpu:
    """Build a GPU with 64 K registers a multiprocessor; its shared memory is 1 KB more than a program may take."""
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
