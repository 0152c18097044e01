"""What each process of test_two_gpus.py does: python -m tests.gpu.training.two_gpus sync|sharded FILE, under a launcher."""

import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.distributed.tensor import DTensor

from tests.training.two_processes import NETWORKS, PROCESSES, gradients_of, network_and_batch

NAMES = ("patched", "registered", "EncNet")


def trained(name, device):
    """A network in training, with nothing that is drawn, and its batch."""
    network, images, targets = network_and_batch(name)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network.train().to(device), images.to(device), targets.to(device)


def statistics_of(network):
    """Running means and variances."""
    return {name: each.cpu() for name, each in network.named_buffers() if "running" in name}


def own_of(accelerator):
    """The part of the batch that is this process's."""
    assert accelerator.num_processes == PROCESSES
    return slice(2 * accelerator.process_index, 2 * accelerator.process_index + 2)


def sharded(accelerator):
    """The gradients of each network as Accelerate shards it with FSDP2."""
    assert accelerator.distributed_type == DistributedType.FSDP
    found, own = {}, own_of(accelerator)
    for name in NETWORKS:
        network, images, targets = network_and_batch(name)
        model = accelerator.prepare(network)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        images, targets = images[own].to(accelerator.device), targets[own].to(accelerator.device)
        found[name] = {key: each.cpu() for key, each in gradients_of(name, model, images, targets).items()}
    return found


def synchronized(accelerator):
    """The gradients and the statistics of each network in training, with SyncBatchNorm."""
    found, own = {}, own_of(accelerator)
    for name in NAMES:
        network, images, targets = trained(name, accelerator.device)
        network = convert_sync_batchnorm(network)
        gradients = gradients_of(name, accelerator.prepare(network), images[own], targets[own])
        found[name] = {key: each.cpu() for key, each in gradients.items()}, statistics_of(network)
    return found


def main(task, file):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2) if task == "sharded" else None
    accelerator = Accelerator(fsdp_plugin=plugin)
    found = {"sync": synchronized, "sharded": sharded}[task](accelerator)
    if accelerator.is_main_process:
        torch.save(found, file)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
