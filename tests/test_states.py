"""Any sequence of patching, restoring, training, saving, copying, casting, moving, converting and fusing leaves the model as the
rules say.

After it restore_se_blocks gives back the very SE modules, with the values that they had when they were taken out, on the model's
present device and in its dtype; or, for a copy, a RuntimeError, and the copy as it was. The meta device is the second one, where
values are lost, but neither modules nor dtypes.
"""

import copy
import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from timm.layers import SEModule, convert_sync_batchnorm
from torch import nn

import ctxenc
from tests.draws import examples
from tests.toys import Toy

X = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))


def values_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def dtypes_of(module: nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point()}


class Model(RuleBasedStateMachine):
    """A network with two SE blocks, one of them reached by two names, and what its state ought to be."""

    @initialize(shared=st.booleans(), ends_on_meta=st.booleans())
    def build(self, shared: bool, ends_on_meta: bool) -> None:
        second = Toy(SEModule(32, rd_channels=8, norm_layer=nn.BatchNorm2d))
        self.net: Any = Toy(more=second)
        if shared:
            second.se = self.net.se
        self.blocks = [self.net.se, second.se]
        self.patched = self.copied = False
        self.ends_on_meta = ends_on_meta
        self.dtype = torch.float32
        self.taken: list[dict[str, torch.Tensor]] = []  # values of the SE blocks when they were taken out

    def slots(self) -> list[nn.Module]:
        return [self.net.se, self.net.more.se]

    # What may happen

    @rule(
        num_codes=st.sampled_from([1, 3]),
        pool=st.sampled_from(["mean", "concat"]),
        smoothing=st.sampled_from(["learned", 0.5]),
    )
    def patch(self, num_codes: int, pool: str, smoothing: str | float) -> None:
        arguments = {"num_codes": num_codes, "pool": pool, "smoothing": smoothing}
        if not self.patched:
            self.taken = [values_of(block) for block in self.blocks]
            self.arguments = arguments
        elif arguments != self.arguments:
            with pytest.raises(ValueError, match="restore_se_blocks first"):
                ctxenc.patch_se_blocks(self.net, **arguments)
            return
        assert ctxenc.patch_se_blocks(self.net, **arguments) is self.net
        self.patched = True

    @rule()
    def restore(self) -> None:
        if self.patched and self.copied:
            before = self.slots()
            with pytest.raises(RuntimeError, match="no undo record"):
                ctxenc.restore_se_blocks(self.net)
            assert all(one is other for one, other in zip(self.slots(), before, strict=True))
            return
        ctxenc.restore_se_blocks(self.net)
        assert all(one is other for one, other in zip(self.slots(), self.blocks, strict=True))
        if self.patched:
            for block, values in zip(self.blocks, self.taken, strict=True):
                for name, value in block.state_dict().items():
                    wanted = values[name].to(self.dtype) if value.is_floating_point() else values[name]
                    assert value.dtype == wanted.dtype
                    assert value.is_meta or torch.equal(value, wanted)
        self.patched = False

    @rule()
    def train_step(self) -> None:
        net = self.net.train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        net(X.to(self.dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    @rule()
    def save_and_load(self) -> None:
        values = values_of(self.net)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.add_(1)
        self.net.load_state_dict(values, strict=True)
        assert all(torch.equal(value, values[name]) for name, value in self.net.state_dict().items())

    @rule(duplicate=st.sampled_from([copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))]))
    def duplicate(self, duplicate: Any) -> None:
        self.net = duplicate(self.net)
        if self.patched:
            self.copied = True
        else:  # its SE blocks are the ones that are to come back from now on
            self.blocks = self.slots()

    @rule(dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    def cast(self, dtype: torch.dtype) -> None:
        self.net.to(dtype)
        self.dtype = dtype

    @rule(training=st.booleans())
    def mode(self, training: bool) -> None:
        self.net.train(training)

    @rule(channels_last=st.booleans())
    def memory_format(self, channels_last: bool) -> None:
        self.net.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    @rule()
    def away_and_back(self) -> None:
        """As a large model is loaded: without memory first, then with the values of a state dict."""
        values = values_of(self.net)
        self.net.to("meta").to_empty(device="cpu")
        self.net.load_state_dict(values, strict=True)

    @rule(convert=st.sampled_from([nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm]))
    def convert(self, convert: Any) -> None:
        """Norms become such as count all processes' batches; with one process they run on a CPU too."""
        values = values_of(self.net)
        self.net = convert(self.net)
        assert not any(type(module) is nn.BatchNorm2d for module in self.net.modules())
        assert all(torch.equal(value, values[name]) for name, value in self.net.state_dict().items())

    @precondition(lambda self: self.patched)
    @rule()
    def fuse_and_unfuse(self) -> None:
        values = values_of(self.net)
        for block in {id(block): block for block in self.slots()}.values():
            block.fuse().unfuse()
        assert all(torch.equal(value, values[name]) for name, value in self.net.state_dict().items())

    # What must hold at any time

    @invariant()
    def it_is_what_it_should_be(self) -> None:
        if not hasattr(self, "net"):
            return
        kind = ctxenc.ContextEncoding if self.patched else SEModule
        assert all(type(block) is kind for block in self.slots())
        assert len(ctxenc.find_context_blocks(self.net)) == (2 if self.patched else 0)
        assert hasattr(self.net, "no_weight_decay") is self.patched
        assert self.patched or all(dtypes_of(block) == {self.dtype} for block in self.blocks)
        was = self.net.training
        output = self.net.eval()(X.to(self.dtype))
        self.net.train(was)
        assert output.shape == (2, 32, 5, 6)
        assert output.isfinite().all()

    def teardown(self) -> None:
        if not hasattr(self, "net"):
            return
        if self.ends_on_meta:
            self.net.to("meta")
        self.restore()
        assert all(tensor.is_meta is self.ends_on_meta for tensor in self.net.state_dict().values())


TestModel = Model.TestCase
TestModel.settings = settings(
    max_examples=examples(200),
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
