"""Compile kernels for GPUs that need not be present: a launch is made as at run time, on tensors without memory."""

import math
import re
import subprocess
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.gpus import Gpu
from ctxenc.kernels.fused import gate, pool
from ctxenc.kernels.fused import launch as launcher
from ctxenc.kernels.fused.backward import encode_backward
from ctxenc.kernels.fused.forward import encode_forward
from ctxenc.kernels.fused.project import project_forward

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int32: "i32", torch.int64: "i64"}  # in a signature
FOUND = ("registers", "stack", "matrix", "loads", "loads_16_bytes", "loads_8_bytes", "instructions")  # in a binary
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Launch(NamedTuple):
    """Hold a kernel and the arguments of its call."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def programs(self) -> int:
        """Return the number of programs of the launch."""
        return math.prod(self.grid)


def launches(direction: str, x: Tensor, K: int, gpu: Gpu) -> list[Launch]:
    """Return all kernels of a call on a GPU, in order.

    Args:
        direction: "forward" or "backward" of encode; "project": C / 16 channels, projected and encoded in one kernel; "gate":
            forward and backward of the block's gate; "pool": of the norm and mean over the K codewords of C channels.
        x: (B, C, N), without memory.
        K: Codewords.
        gpu: The GPU of the call.
    """
    made: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        named = dict(zip(kernel.arg_names, args, strict=False))
        named |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        launch = Launch(kernel, tuple(grid), named, options)
        return room(launch, gpu) if warmup else made.append(launch)

    launcher._slots.clear()
    launcher.make_plan.cache_clear()
    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(launcher, "describe_gpu", return_value=gpu.target),
        mock.patch.object(torch.version, "hip", "any" if gpu.backend == "hip" else None),
    ):
        _call(direction, x, K)
    return made


def _call(direction: str, x: Tensor, K: int) -> None:
    B, C, _ = x.shape
    D = C // 16 if direction == "project" else C
    empty = partial(torch.empty, device="meta")
    codewords, smoothing, encoding, logits = empty(K, D), empty(K), empty(B, K, D), empty(B, C, dtype=x.dtype)
    if direction == "forward":
        encode_forward(x, codewords, smoothing)
    elif direction == "backward":
        encode_backward(encoding, x, codewords, smoothing, empty(B, K), True)
    elif direction == "project":
        project_forward(x, empty(D, C, dtype=x.dtype), empty(D, dtype=x.dtype), codewords, smoothing)
    elif direction == "gate":
        gate._forward(x, logits, False)
        gate._backward(torch.empty_like(x), x, logits, False, True)
    else:
        running, tracked = (empty(K), empty(K)), empty((), dtype=torch.int64)
        given = encoding, empty(K), empty(K)
        features, statistics = pool._forward(*given, *running, tracked, True, 0.1, 1e-5, x.dtype)
        pool._backward(features, *given, statistics, True)


def main_launch(direction: str, x: Tensor, K: int, gpu: Gpu) -> Launch:
    """Return the kernel of a call that reads x."""
    return next(each for each in launches(direction, x, K, gpu) if "p_x" in each.arguments)


def source(launch: Launch) -> ASTSource:
    """Return the kernel, specialised as by Triton's own launcher."""
    signature, constants, attributes = {}, {}, {}
    for parameter in launch.kernel.params:
        value, name = launch.arguments[parameter.name], parameter.name
        if parameter.is_constexpr or value is None:
            signature[name], constants[(parameter.num,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compiled(launch: Launch, gpu: Gpu) -> Any:
    """Compile a launch with Triton; its cache on disk keeps the result for later processes."""
    target = GPUTarget(gpu.backend, gpu.arch, gpu.threads)
    return triton.compile(source(launch), target=target, options=launch.options)


class Resources(NamedTuple):
    """Hold the resources of one program."""

    registers: int  # per thread
    stack: int  # bytes per thread: spills
    shared: int  # bytes
    warps: int


_resources: dict[str, Resources] = {}


def resources(launch: Launch, gpu: Gpu) -> Resources:
    """Return the registers and memory of a launch on an NVIDIA GPU; each kind of kernel is compiled once per process."""
    made = source(launch)
    kind = gpu.arch, launch.kernel.fn.__name__, made.signature, made.constants, made.attrs, launch.options
    if (key := str(kind)) not in _resources:
        kernel = compiled(launch, gpu)
        registers, stack = usage(kernel.asm["cubin"])
        _resources[key] = Resources(registers, stack, kernel.metadata.shared, launch.options["num_warps"])
    return _resources[key]


def room(launch: Launch, gpu: Gpu) -> Any:
    """Answer a launcher that asks for a kernel's resources to choose the number of programs; the kernel is compiled but not run."""
    taken = resources(launch, gpu)
    return SimpleNamespace(run=None, n_regs=taken.registers, metadata=SimpleNamespace(shared=taken.shared))


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout


def usage(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack per thread."""
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump(cubin, "-res-usage")).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)


def disassemble(cubin: bytes) -> dict[str, int]:
    """Return resources and instructions of an NVIDIA binary."""
    registers, stack = usage(cubin)
    operations = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", _cuobjdump(cubin, "-sass")))

    def count(pattern: str) -> int:
        return sum(n for name, n in operations.items() if re.match(pattern, name))

    return {
        "registers": registers,
        "stack": stack,
        "matrix": count(r"[A-Z]*(HGMMA|HMMA|UTC\w*MMA|QGMMA)"),
        "loads": count(r"LDG\.|LDGSTS\."),
        "loads_16_bytes": count(r"(LDG|LDGSTS)\..*128"),
        "loads_8_bytes": count(r"(LDG|LDGSTS)\..*\b64\b"),
        "instructions": sum(operations.values()),
    }


def read_amdgcn(text: str) -> dict[str, int]:
    """Return resources and instructions of an AMD binary, from its assembly and metadata."""

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # type: ignore[union-attr]

    lines = [line.split()[0] for line in text.splitlines() if re.match(r"\s+[vsdgb]\w*_\w+", line)]
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size") + field("vgpr_spill_count"),
        "matrix": sum(line.startswith("v_mfma") for line in lines),
        "loads": sum(line.startswith(("global_load", "buffer_load")) for line in lines),
        "loads_16_bytes": sum(line.endswith("load_dwordx4") for line in lines),
        "loads_8_bytes": sum(line.endswith("load_dwordx2") for line in lines),
        "instructions": len(lines),
    }
