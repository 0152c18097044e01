"""Launches of Triton kernels on CPU tensors: compiled for a GPU that is not there, and run from their PTX."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.compiled import Launch, room, source
from benchmarks.gpus import GPUS
from ctxenc.kernels.fused import launch as launcher
from tests.emulated import copies, tensor_cores
from tests.emulated.instructions import executable
from tests.emulated.machine import Program
from tests.emulated.memory import GlobalMemory
from tests.emulated.ptx import Kernel, parameter_address

__all__ = ["copies", "tensor_cores"]  # which register their instructions

_compiled: dict[tuple, tuple[str, Any]] = {}


def _compile(launch: Launch, chip: str) -> tuple[str, Any]:
    """PTX and what the launcher must know besides."""
    made, target = source(launch), GPUS[chip]
    for parameter in launch.kernel.params:  # source() takes every tensor for aligned
        value = launch.arguments[parameter.name]
        if isinstance(value, Tensor) and value.data_ptr() % 16:
            made.attrs.pop((parameter.num,), None)
    key = chip, launch.kernel.fn.__name__, *map(str, (made.signature, made.constants, made.attrs, launch.options))
    if key not in _compiled:
        gpu = GPUTarget(target.backend, target.arch, target.threads)
        compiled = triton.compile(made, target=gpu, options=launch.options)
        _compiled[key] = compiled.asm["ptx"], compiled.metadata
    return _compiled[key]


def _check_descriptor(descriptor: TensorDescriptor) -> None:
    """What cuTensorMapEncodeTiled refuses."""
    itemsize = descriptor.base.element_size()
    outer = [stride * itemsize for stride in descriptor.strides[:-1]]
    assert descriptor.base.data_ptr() % 16 == 0
    assert descriptor.strides[-1] == 1
    assert all(stride % 16 == 0 and stride < 2**40 for stride in outer)
    assert all(0 < size < 2**32 for size in descriptor.shape)


def _bind(launch: Launch, kernel: Kernel, metadata: Any) -> tuple[GlobalMemory, dict[str, int], dict[int, Any]]:
    """Memory, the values of the parameters in their order, and the maps of tiles by the address of their parameter."""
    memory, values, maps = GlobalMemory(), [], {}
    described = iter(getattr(metadata, "tensordesc_meta", None) or [])
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            continue
        if isinstance(value, TensorDescriptor):
            _check_descriptor(value)
            meta, tensor = next(described), value.base
            assert max(meta["block_size"]) <= 256
            name = kernel.parameters[len(values)][1]
            maps[parameter_address(name)] = copies.TensorMap(
                tensor.data_ptr(), list(value.shape), list(value.strides), list(meta["block_size"]),
                meta["elem_size"], meta["swizzle"],
            )  # fmt: skip
            memory.add(tensor, parameter.name)
            values += [0, *value.shape, *value.strides]
        elif isinstance(value, Tensor):
            memory.add(value, parameter.name)
            values.append(value.data_ptr())
        else:
            values.append(value)
    names = [name for _, name in kernel.parameters]
    assert len(names) - len(values) in (0, 1, 2), "Triton's own scratch memory comes last"
    values += [0] * (len(names) - len(values))
    return memory, {name: value % 2**64 for name, value in zip(names, values, strict=True)}, maps


@contextmanager
def emulated(
    chip: str, *, late: bool = False, seed: int = 0, change: Callable[[str], str] = lambda ptx: ptx
) -> Iterator[list[str]]:
    """Triton kernels that are launched inside run as compiled for a chip of benchmarks.gpus, on CPU tensors.

    Args:
        chip: "sm_80" or "sm_90".
        late: What is asynchronous happens as late as it may, not at once.
        seed: Of the order in which programs and warps run.
        change: Made to the PTX.

    Yields:
        The names of the kernels that ran.
    """
    draw, ran = random.Random(seed), []

    def run(kernel: JITFunction, *args: Any, grid: tuple[int], warmup: bool, **kwargs: Any) -> Any:
        named = dict(zip(kernel.arg_names, args, strict=False))
        named |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        launch = Launch(kernel, grid, named, options)
        if warmup:
            return room(launch, GPUS[chip])
        ptx, metadata = _compile(launch, chip)
        read = Kernel(change(ptx))
        code = [(executable(each, read), each.text) for each in read.instructions]
        memory, parameters, maps = _bind(launch, read, metadata)
        numbers = list(range(grid[0]))
        draw.shuffle(numbers)
        with np.errstate(all="ignore"):
            for number in numbers:
                Program(read, code, number, memory, parameters, maps, metadata.shared, draw, late).run()
        ran.append(kernel.fn.__name__)
        return None

    launcher._slots.clear()
    launcher.make_plan.cache_clear()
    target, before = GPUS[chip].target, torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    try:
        with (
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(launcher, "describe_gpu", return_value=target),
        ):
            yield ran
    finally:
        torch.use_deterministic_algorithms(before)
