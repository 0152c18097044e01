"""The least time that forward and backward of the operator can take on a GPU, on paper: nothing is run, and nothing is measured.

    python -m benchmarks.roofline [--dtype bf16 ...] [--layout channels_first]

Bytes are those of benchmarks.bytes, for the tiles that a launch would get; flops are those of the formulas, 2 products
of N x K x D in forward and 5 in backward, each once, though fp32 takes three terms of tf32 by default and bf16 a second one for the
codewords. The floor is the greater of bytes from memory by bandwidth, and flops by the rate of the tensor cores (bf16 or tf32).
Partial sums and operands count as memory's, though the cache may keep the small ones. What is to come from the L2 cache has no part
in the floor: it is shown as a multiple of x, beside the MB that must stay there for it, and where either is large the floor is far.

Bandwidths and rates are the vendor's, from NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 SXM and (HGX) B200; rates are
dense, half of those with sparsity that the last three are listed with. Boards differ: a B200 is also listed with 7.7 TB/s.
"""

import argparse
from typing import NamedTuple

import torch

from benchmarks.bytes import Bytes, encode_bytes
from benchmarks.shapes import Shape, problems
from ctxenc.kernels.fused.tiles import Target


class Gpu(NamedTuple):
    """What a vendor says of a GPU."""

    target: Target
    bandwidth: float  # bytes a second
    rates: dict[str, float]  # flops a second of the tensor cores, by dtype of x


GPUS = {
    "A100": Gpu(Target(80, 108), 2.04e12, {"bf16": 312e12, "fp32": 156e12}),
    "H100 SXM": Gpu(Target(90, 132), 3.35e12, {"bf16": 989e12, "fp32": 494e12}),
    "H200": Gpu(Target(90, 132), 4.8e12, {"bf16": 989e12, "fp32": 494e12}),
    "B200": Gpu(Target(100, 148), 8.0e12, {"bf16": 2250e12, "fp32": 1125e12}),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PRODUCTS = {"forward": 2, "backward": 5}


class Floor(NamedTuple):
    """One direction of one shape on one GPU."""

    bytes: Bytes
    flops: int
    memory_seconds: float
    product_seconds: float

    @property
    def seconds(self) -> float:
        """No launch that moves these bytes and takes these products is faster."""
        return max(self.memory_seconds, self.product_seconds)


def floor(gpu: Gpu, shape: Shape, dtype: str, direction: str, channels_last: bool = False) -> Floor:
    """The floor of forward or of backward."""
    B, N, D, K = shape
    counts = encode_bytes(B, D, N, K, DTYPES[dtype].itemsize, gpu.target, channels_last=channels_last)
    moved = counts.forward if direction == "forward" else counts.backward
    flops = PRODUCTS[direction] * 2 * B * N * K * D
    return Floor(moved, flops, moved.memory / gpu.bandwidth, flops / gpu.rates[dtype])


def shapes() -> list[Shape]:
    """Those of benchmarks.encode on a GPU, each once, so that its times can be laid beside these."""
    return list(dict.fromkeys(problem.shape for problem in problems("cuda")))


def line(name: str, shape: Shape, dtype: str, direction: str, row: Floor) -> str:
    """A row of the table."""
    bound = "memory" if row.memory_seconds >= row.product_seconds else "products"
    return (
        f"{', '.join(map(str, shape)):<20} {dtype:<5} {direction:<9} {name:<9} {row.bytes.x / 1e6:>8.1f}"
        f" {row.bytes.memory / 1e6:>8.1f} {row.bytes.l2 / row.bytes.x:>6.1f} {row.bytes.in_flight / 1e6:>6.1f}"
        f" {row.flops / 1e9:>8.2f} {row.seconds * 1e6:>8.1f}  {bound}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=list(DTYPES), help="of x")
    parser.add_argument("--layout", choices=["channels_first", "channels_last"], default="channels_first")
    args = parser.parse_args(arguments)
    print("on paper, by NVIDIA's data sheets: nothing was measured; MB and GFLOP are powers of ten")
    print(
        f"{'B, N, D, K':<20} {'dtype':<5} {'':<9} {'GPU':<9} {'x, MB':>8} {'all, MB':>8} {'L2 / x':>6} {'in use':>6}"
        f" {'GFLOP':>8} {'floor us':>8}  bound by"
    )
    for dtype in args.dtype:
        for shape in shapes():
            for direction in PRODUCTS:
                for name, gpu in GPUS.items():
                    row = floor(gpu, shape, dtype, direction, args.layout == "channels_last")
                    print(line(name, shape, dtype, direction, row))


if __name__ == "__main__":
    main()
