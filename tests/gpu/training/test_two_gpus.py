"""SyncBatchNorm and Accelerate's FSDP2 on two GPUs: what one network learns from the double batch. Written without a GPU."""

import pytest
import torch

from tests.gpu.problems import DEVICE, on_a_gpu
from tests.gpu.training.two_gpus import NAMES, statistics_of, trained
from tests.training.launchers import launched
from tests.training.two_processes import gradients_of, network_and_batch

pytestmark = [
    *on_a_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, one for each process"),
]


def found_by(task, folder):
    code, log = launched("torchrun", folder, task, folder / "found.pt", program="tests.gpu.training.two_gpus")
    assert code == 0, log
    return torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return found_by("sync", tmp_path_factory.mktemp("two"))


def test_shards_have_the_gradients_of_the_double_batch(tmp_path):
    for name, gradients in found_by("sharded", tmp_path).items():
        network, images, targets = network_and_batch(name)
        wanted = gradients_of(name, network, images, targets)
        torch.testing.assert_close(gradients, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_sync_batch_norm_learns_from_the_double_batch(name, found):
    """In fp64, where a batch norm over one half of the batch is off in the first digits."""
    network, images, targets = trained(name, DEVICE)
    wanted = {key: each.cpu() for key, each in gradients_of(name, network, images, targets).items()}
    gradients, statistics = found[name]
    # A bias before a batch norm has no gradient but rounding.
    torch.testing.assert_close(gradients, wanted, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(statistics, statistics_of(network), rtol=1e-9, atol=1e-11)
