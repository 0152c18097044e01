"""Count the bytes that a block moves through GPU memory, relative to its map x, against Squeeze-and-Excitation. No timing.

    TRITON_INTERPRET=1 python -m benchmarks.block_bytes [--batch 64]

A cell has training (forward and backward) and inference (of the fused block). Each computing torch operator, and each launch of our
kernels, reads its tensors once and writes its results once; in eager mode, in bf16 under autocast, channels last.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from timm.layers import SEModule
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

import ctxenc
from ctxenc.kernels import backends

WITHOUT_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view")
MAPS = [(256, 56), (512, 28), (1024, 14), (2048, 7)]  # channels and side of the maps of a seresnet50
BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "SE": SEModule,
    "ContextEncoding": ctxenc.ContextEncoding,
    "max_size=14": lambda channels: ctxenc.ContextEncoding(channels, max_size=14),
    "max_size=7": lambda channels: ctxenc.ContextEncoding(channels, max_size=7),
}


class Launches(TorchDispatchMode):
    """Record the names of launched operators and kernels, in order, and the bytes of each."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bytes: list[int] = []

    def add(self, name: str, *values: Any) -> None:
        """Count one launch that reads or writes these values."""
        tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
        self.names.append(name)
        self.bytes.append(sum(min(each.nbytes, each.untyped_storage().nbytes()) for each in tensors))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        with self:
            if func.namespace == "ctxenc":  # the operators inside it count
                return OPDEFS[name]._backend_fns["cpu"](*args, **kwargs)
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        view = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        result = func(*args, **kwargs)
        if not view and name.removeprefix("aten::") not in WITHOUT_LAUNCH:
            self.add(name.removeprefix("aten::"), args, kwargs, result)
        return result


@contextmanager
def counting(backend: str) -> Iterator[Callable[[Launches], AbstractContextManager[Any]]]:
    """Yield the byte counter of a region, under autocast in bf16; kernels do not run, so results are meaningless."""
    counters: list[Launches] = []

    def launch(kernel: InterpretedFunction, *args: Any, **_: Any) -> None:
        counters[-1].add(kernel.fn.__name__, args)

    @contextmanager
    def count(counter: Launches) -> Iterator[None]:
        counters.append(counter)
        with ctxenc.use_backend(backend), torch.autocast("cpu", torch.bfloat16), counter:
            yield

    with (
        mock.patch.object(InterpretedFunction, "run", launch),
        mock.patch.object(backends, "is_watched", bool),
        mock.patch.dict(os.environ, CTXENC_VERIFY="0"),  # a kernel that does not run cannot prove itself
    ):
        yield count


def launches(block: nn.Module, x: Tensor, backend: str) -> tuple[Launches, Launches]:
    """Return the launches of forward and backward in training."""
    forward, backward = Launches(), Launches()
    x = x.requires_grad_()
    with counting(backend) as count:
        with count(forward):
            y = block.train()(x)
        dy = torch.ones_like(y)
        with count(backward):
            torch.autograd.grad(y, (x, *block.parameters()), dy)
    return forward, backward


def inference_launches(block: nn.Module, x: Tensor, backend: str) -> Launches:
    """Return the launches of inference, of a fused block if it can be fused."""
    found = Launches()
    block.eval()
    if isinstance(block, ctxenc.ContextEncoding):
        block.fuse()
    with counting(backend) as count, torch.no_grad(), count(found):
        block(x)
    return found


def in_times_of_x(make: Callable[[int], nn.Module], batch: int, channels: int, side: int) -> tuple[float, float]:
    """Return the bytes of training and inference, relative to a map in bf16."""
    x = torch.zeros(batch, channels, side, side, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    training = sum(sum(each.bytes) for each in launches(make(channels), x, "triton"))
    return training / x.nbytes, sum(inference_launches(make(channels), x.detach(), "triton").bytes) / x.nbytes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m benchmarks.block_bytes")
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("set TRITON_INTERPRET=1: launches are counted in Triton's interpreter")
    print(f"| input, {args.batch} images | {' | '.join(BLOCKS)} |\n|{' --- |' * (len(BLOCKS) + 1)}")
    for channels, side in MAPS:
        cells = [in_times_of_x(make, args.batch, channels, side) for make in BLOCKS.values()]
        words = [f"{training:.1f} / {inference:.2f}" for training, inference in cells]
        print(f"| {channels} x {side} x {side} | {' | '.join(words)} |", flush=True)


if __name__ == "__main__":
    main()
