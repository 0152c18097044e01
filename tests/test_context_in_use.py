"""The block: what others do to it, and the memory it takes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ctxenc import ContextEncoding
from ctxenc.kernels import reference
from tests.blocks import KINDS, each_pool, equal, group_norm, norms_of, stirred


@pytest.mark.parametrize("use_reentrant", [False, True])
@each_pool
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing(use_reentrant, pool, kind):
    """Gradients are those without it. The statistics move twice, as those of every BatchNorm do."""
    block = ContextEncoding(16, 4, pool=pool, smoothing=kind)
    x = torch.randn(3, 16, 4, 4)

    def gradients(run):
        torch.manual_seed(5)
        twin, leaf = copy.deepcopy(block), x.clone().requires_grad_()
        run(twin, leaf).square().sum().backward()
        return [leaf.grad, *(parameter.grad for parameter in twin.parameters())]

    plain = gradients(lambda twin, leaf: twin(leaf))
    checked = gradients(lambda twin, leaf: checkpoint(twin, leaf, use_reentrant=use_reentrant))
    for one, other in zip(checked, plain, strict=True):
        torch.testing.assert_close(one, other)


@each_pool
@pytest.mark.parametrize("kind", KINDS)
def test_copies(pool, kind):
    block = stirred(ContextEncoding(16, 4, pool=pool, smoothing=kind)).eval()
    x = torch.randn(2, 16, 3, 3)
    loaded = ContextEncoding(16, 4, pool=pool, smoothing=kind).eval()
    loaded.load_state_dict(block.state_dict())
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), loaded):
        assert torch.equal(other(x), block(x))
        assert repr(other) == repr(block)
        with torch.no_grad():
            other.fc.bias.add_(1)
        assert not torch.equal(other(x), block(x))


def test_repr_tells_the_settings():
    assert "16, num_codes=4, rd_channels=8, pool=mean" in repr(ContextEncoding(16, 4))


def test_moving_averages_follow():
    from timm.utils import ModelEmaV3

    block = ContextEncoding(16, 4)
    average = ModelEmaV3(block, decay=0.5)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    block(torch.randn(4, 16, 3, 3))  # moves the statistics
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(1)
    average.update(block, step=10)
    for name, tensor in block.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(average.module.state_dict()[name], (before[name] + tensor) / 2)
    assert average(torch.randn(1, 16, 1, 1)).shape == (1, 16, 1, 1)  # the copy is in eval mode


def test_sync_batch_norm_conversion():
    """Both norms are found; and what looks like one value a channel may not be, with other processes."""
    block = nn.SyncBatchNorm.convert_sync_batchnorm(stirred(ContextEncoding(16, 4)))
    assert type(block.norm) is type(block.norm_codes) is nn.SyncBatchNorm
    assert (block.norm_codes.running_mean != 0).all()  # the statistics came along
    assert block.eval()(torch.randn(2, 16, 3, 3)).isfinite().all()
    # One process alone: refused by SyncBatchNorm itself.
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        block.train()(torch.randn(1, 16, 1, 1))


def test_split_batch_norm_conversion():
    from timm.layers import SplitBatchNorm2d, convert_splitbn_model

    block = convert_splitbn_model(ContextEncoding(16, 4), num_splits=2)
    assert type(block.norm) is type(block.norm_codes) is SplitBatchNorm2d
    x = torch.randn(4, 16, 3, 3)
    before = norms_of(block)
    y = block.train()(x)
    y.square().sum().backward()
    after = norms_of(block)
    for name in ("norm.running_mean", "norm.aux_bn.0.running_mean", "norm_codes.running_mean"):
        assert not torch.equal(before[name], after[name]), name
    assert not torch.equal(before["norm_codes.aux_bn.0.running_var"], after["norm_codes.aux_bn.0.running_var"])
    assert block.half().norm_codes.running_var.dtype == torch.float32


def test_freezing_and_unfreezing():
    """Timm's freeze puts torchvision-like frozen norms in place, which then train with one sample of one pixel too."""
    from timm.layers import FrozenBatchNormAct2d
    from timm.utils import freeze, unfreeze
    from torchvision.ops import FrozenBatchNorm2d

    model = nn.Sequential(ContextEncoding(16, 4))
    freeze(model)
    block = model[0]
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert not isinstance(block.norm, nn.BatchNorm2d)
    assert not isinstance(block.norm_codes, (nn.BatchNorm2d, FrozenBatchNormAct2d))
    before = norms_of(block)
    for shape in ((2, 16, 3, 3), (1, 16, 1, 1)):
        assert model.train()(torch.randn(shape)).isfinite().all()
    assert equal(norms_of(block), before)
    unfreeze(model)
    assert isinstance(block.norm, nn.BatchNorm2d)
    assert isinstance(block.norm_codes, nn.BatchNorm2d)
    assert all(parameter.requires_grad for parameter in block.parameters())
    model(torch.randn(2, 16, 3, 3))
    assert not equal(norms_of(block), before)

    by_norm_layer = ContextEncoding(16, 4, norm_layer=lambda channels, **_: FrozenBatchNorm2d(channels))
    assert by_norm_layer(torch.randn(1, 16, 1, 1)).isfinite().all()


def test_frozen_norms_are_seen_as_such_after_half():
    from timm.utils import freeze

    model = nn.Sequential(ContextEncoding(16, 4))
    freeze(model)
    block = model.half()[0]
    assert block.norm_codes.running_var.dtype == torch.float32
    assert block(torch.randn(2, 16, 3, 3).half()).isfinite().all()


def lowered(block, parameters, buffers=torch.float32):
    """A twin whose norm over the codewords has parameters and statistics in these dtypes, rounded to bf16 beforehand."""
    with torch.no_grad():
        for tensor in block.norm_codes.state_dict().values():
            tensor.copy_(tensor.bfloat16())
    twin = copy.deepcopy(block)
    norm = twin.norm_codes
    norm.weight.data, norm.bias.data = norm.weight.to(parameters), norm.bias.to(parameters)
    norm.running_mean, norm.running_var = norm.running_mean.to(buffers), norm.running_var.to(buffers)
    return twin


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float16])
def test_lowered_parameters_leave_the_norm_over_the_codewords_in_fp32(parameters, training):
    """As FSDP's mixed precision lowers them. It stays a module that is called."""
    block = stirred(ContextEncoding(16, 4)).train(training)
    twin, x, called = lowered(block, parameters), torch.randn(3, 16, 5, 5), []
    twin.norm_codes.register_forward_hook(lambda _, inputs, output: called.append((inputs[0].dtype, output.dtype)))
    one, other = block(x), twin(x)
    assert torch.equal(one, other)
    assert called == [(torch.float32, torch.float32)]
    one.square().sum().backward()
    other.square().sum().backward()
    assert twin.norm_codes.weight.grad.dtype == parameters
    torch.testing.assert_close(twin.norm_codes.weight.grad, block.norm_codes.weight.grad.to(parameters))
    assert equal(norms_of(twin), norms_of(block))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_encoding_is_cast_to_a_norm_of_another_dtype(dtype):
    """And back, so that the features keep theirs."""
    block = stirred(ContextEncoding(16, 4))
    twin, x = lowered(block, dtype, dtype), torch.randn(3, 16, 5, 5)
    features = twin.features(x)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, block.features(x), rtol=0.02, atol=0.02)
    twin(x).square().sum().backward()
    assert twin.norm_codes.weight.grad.dtype == dtype


def test_a_wide_encoding_is_cast_to_the_norm():
    block, x = stirred(ContextEncoding(16, 4)), torch.randn(3, 16, 5, 5)
    wanted = block(x)
    block.encoding.double()
    torch.testing.assert_close(block(x), wanted, rtol=1e-4, atol=1e-5)
    assert list(vars(block.norm_codes)) == list(vars(nn.BatchNorm2d(4)))


@pytest.mark.skipif(torch.__version__ < "2.9", reason="torch 2.8 does not compile a change of a module's own names")
def test_lowered_parameters_under_compile():
    block, x = lowered(ContextEncoding(16, 4), torch.bfloat16), torch.randn(3, 16, 5, 5)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)


class TestFSDP:
    """In bf16, with norms that take no statistics before the block: on a CPU no BatchNorm takes statistics of another dtype."""

    pytestmark = pytest.mark.usefixtures("process_group")

    @staticmethod
    def network():
        return nn.Sequential(nn.Conv2d(3, 16, 1), ContextEncoding(16, 4, norm_layer=group_norm))

    @staticmethod
    def assert_trains(model):
        x = torch.randn(3, 3, 5, 5)
        for _ in range(2):
            y = model(x)
            y.float().square().sum().backward()
        assert y.dtype == torch.bfloat16
        for parameter in model.parameters():
            assert parameter.grad.abs().sum() > 0
        assert model.eval()(x).isfinite().all()

    @pytest.mark.parametrize("block_too", [True, False])
    def test_fully_shard(self, block_too):
        model, policy = self.network(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for module in [model[1], model] if block_too else [model]:
            fully_shard(module, mesh=mesh, mp_policy=policy)
        self.assert_trains(model)
        assert model[1].norm_codes.running_var.dtype == torch.float32

    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
    @pytest.mark.parametrize("use_orig_params", [True, False])
    @pytest.mark.parametrize("buffers", [None, torch.bfloat16])
    def test_fully_sharded_data_parallel(self, use_orig_params, buffers):
        precision = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=buffers)
        settings = {"mixed_precision": precision, "use_orig_params": use_orig_params}
        self.assert_trains(FullyShardedDataParallel(self.network(), device_id=torch.device("cpu"), **settings))


class Largest(TorchDispatchMode):
    """The most elements that any tensor had which was made within."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                # An expanded view has elements that are nowhere.
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@each_pool
@pytest.mark.parametrize("training", [True, False])
def test_residuals_are_never_formed(training, pool):
    """No tensor is larger than x, or the weights, neither in forward nor in backward: 1/32 of B x N x K x D."""
    B, D, K = 2, 32, 16
    block = ContextEncoding(D, K, rd_channels=D, pool=pool).train(training)
    x = torch.randn(B, D, 25, 40, requires_grad=True)
    with Largest() as largest:
        block(x).square().sum().backward()
    assert x.numel() <= largest.numel <= 2 * x.numel()  # rows of D + K, at most
    with Largest() as expanded:
        reference.encode(x.flatten(2), block.encoding.codewords, block.encoding.smoothing)
    assert expanded.numel == B * 1000 * K * D  # what the test would see


def test_normalised_features_have_unit_length():
    block = ContextEncoding(16, 4, pool="concat").eval()
    features = block.features(torch.randn(3, 16, 4, 4))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(F.normalize(features, dim=1), features)
