"""The counts of benchmarks.bytes, against what the kernels load, store and multiply in Triton's interpreter."""

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from benchmarks.bytes import by_storage, work_of
from benchmarks.compiled import Launch
from ctxenc.kernels.fused.backward import encode_backward
from ctxenc.kernels.fused.forward import encode_forward

run, load, store, dot = (
    InterpretedFunction.run,
    InterpreterBuilder.create_masked_load,
    InterpreterBuilder.create_masked_store,
    InterpreterBuilder.create_dot,
)


class Counts:
    """Launches of a call, and the bytes by storage and flops of each."""

    def __init__(self):
        self.launches, self.read, self.written, self.flops = [], [], [], []

    def run(self, kernel, *args, grid, warmup, **options):
        named = dict(zip(kernel.arg_names, args, strict=False))
        named |= {name: options[name] for name in kernel.arg_names if name in options}
        self.launches.append(Launch(kernel, grid, named, options))
        self.rooms = {
            each.untyped_storage()._cdata: (each.untyped_storage().data_ptr(), each.untyped_storage().nbytes())
            for each in named.values()
            if isinstance(each, torch.Tensor)
        }
        for kept in (self.read, self.written):
            kept.append(Counter())
        self.flops.append(0)
        return run(kernel, *args, grid=grid, warmup=warmup, **options)

    def count(self, kept, pointers, mask):
        places = pointers.data[mask.data.astype(bool)].astype("int64")
        for storage, (first, size) in self.rooms.items():
            inside = int(((places >= first) & (places < first + size)).sum())
            if inside:
                kept[storage] += inside * pointers.get_element_ty().primitive_bitwidth // 8

    def load(self, builder, pointers, mask, *rest):
        self.count(self.read[-1], pointers, mask)
        return load(builder, pointers, mask, *rest)

    def store(self, builder, pointers, value, mask, *rest):
        self.count(self.written[-1], pointers, mask)
        return store(builder, pointers, value, mask, *rest)

    def dot(self, builder, a, b, *rest):
        self.flops[-1] += 2 * a.data.size * b.data.shape[1]
        return dot(builder, a, b, *rest)


@pytest.fixture
def counts(monkeypatch):
    found = Counts()
    for owner, name, replaced in (
        (InterpretedFunction, "run", found.run),
        (InterpreterBuilder, "create_masked_load", found.load),
        (InterpreterBuilder, "create_masked_store", found.store),
        (InterpreterBuilder, "create_dot", found.dot),
    ):
        monkeypatch.setattr(
            owner, name, lambda self, *args, _replaced=replaced, **kwargs: _replaced(self, *args, **kwargs)
        )
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(("B", "D", "N", "K"), [(2, 24, 150, 5), (3, 200, 130, 17), (7, 64, 49, 16)])
def test_counts_are_what_kernels_do(counts, B, D, N, K, channels_last, dtype):
    x = torch.randn(B, N, D).transpose(1, 2) if channels_last else torch.randn(B, D, N)
    x = x.to(dtype)
    codewords, smoothing = torch.randn(K, D), torch.rand(K)
    encoding, weight_sum = encode_forward(x, codewords, smoothing)
    encode_backward(torch.randn_like(encoding), x, codewords, smoothing, weight_sum, True)
    assert len(counts.launches) >= 3
    for launch, read, written, flops in zip(counts.launches, counts.read, counts.written, counts.flops, strict=True):
        work = work_of(launch)
        again = by_storage(launch, work.again)
        assert read == Counter(by_storage(launch, work.reads)) + Counter(again), launch.kernel.__name__
        assert written == by_storage(launch, work.writes), launch.kernel.__name__
        terms = 3 if dtype == torch.float32 else 1  # a product in tf32x3 is one for the interpreter
        assert flops == work.flops / terms, launch.kernel.__name__
