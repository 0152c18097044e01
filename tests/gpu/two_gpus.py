"""What each process of test_two_gpus.py does: python -m tests.gpu.two_gpus FILE, under a launcher."""

import sys

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import nn

from tests.training.two_processes import PROCESSES, gradients_of, network_and_batch

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


def main(file):
    accelerator = Accelerator()
    assert accelerator.num_processes == PROCESSES
    found = {}
    for name in NAMES:
        network, images, targets = trained(name, accelerator.device)
        network = convert_sync_batchnorm(network)
        own = slice(2 * accelerator.process_index, 2 * accelerator.process_index + 2)
        gradients = gradients_of(name, accelerator.prepare(network), images[own], targets[own])
        found[name] = {key: each.cpu() for key, each in gradients.items()}, statistics_of(network)
    if accelerator.is_main_process:
        torch.save(found, file)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
