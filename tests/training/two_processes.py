"""What each process of test_distributed.py does: python -m tests.training.two_processes TASK ..., under a launcher.

measure FOLDER: one backward of each network under DDP and FSDP2, each process with its share of the images; and which samples
  are trained on and evaluated, for many sizes of sets and batches.
watched FOLDER COMMAND...: a command of ctxenc; what a process writes stands in FOLDER/RANK.json.
apart FOLDER COMMAND...: a command, in FOLDER/RANK, as on two machines that share no files.
dying HOW FOLDER COMMAND...: a command in which process 1 dies in its second step; FOLDER/RANK.pid holds who runs.
"""

import gc
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.layers import GroupNorm1
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

import ctxenc
import ctxenc.integrations.timm_models
from ctxenc import ContextEncoding
from ctxenc.__main__ import main
from ctxenc.integrations import EncNet, EncNetLoss, EncodingModule
from ctxenc.training import trainer
from ctxenc.training.loop import Loop
from ctxenc.training.settings import TrainingSettings

NARROW = {"channels": (8, 8, 16, 16), "num_classes": 5}
GROUPED = partial(ContextEncoding, num_codes=3, pool="concat", norm_layer=partial(nn.GroupNorm, 1))
# Three codewords, which two processes cannot share evenly. Norms are frozen, or of each sample by itself.
NETWORKS = {
    "patched": lambda: ctxenc.patch_se_blocks(
        timm.create_model("test_efficientnet", num_classes=5), num_codes=3
    ).eval(),
    "registered": lambda: timm.create_model("ctxenc_resnet18", **NARROW).eval(),
    "EncNet": lambda: EncNet("test_resnet", 5, channels=16, num_codes=3).eval(),
    "GroupNorm": lambda: timm.create_model(
        "resnet10t", norm_layer=GroupNorm1, stem_width=8, block_args={"attn_layer": GROUPED}, **NARROW
    ),
}
WRAPPERS = ("DDP", "FSDP2")
MUTANTS = ("summed", "one share twice")
PROCESSES = 2
# Samples and the batch of a process: too few for a batch, for both, just enough, and more by each remainder.
SIZES = [(1, 1), (3, 1), *((count, 3) for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12))]


def network_and_batch(name):
    """A network no weight of which is a start's 0 or 1, and images with their targets, as many as the processes share."""
    torch.manual_seed(0)
    network = NETWORKS[name]().double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    images = torch.randn(2 * PROCESSES, 3, 32, 32, dtype=torch.float64)
    targets = torch.randint(5, (len(images), 32, 32) if name == "EncNet" else (len(images),))
    return network, images, targets


def loss_of(name, outputs, targets):
    return EncNetLoss()(outputs, targets) if name == "EncNet" else nn.functional.cross_entropy(outputs, targets)


def gradients_of(name, model, images, targets):
    """The gradient of each parameter, by the name that it has in the network itself."""
    loss_of(name, model(images), targets).backward()
    whole = {}
    for key, parameter in model.named_parameters():
        gradient = parameter.grad
        whole[key.removeprefix("module.")] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return whole


def sharded(network):
    """Under FSDP2: each block by itself, and the rest. EncNet's block goes with its module, which calls it by its parts."""
    mesh = torch.distributed.init_device_mesh("cpu", (PROCESSES,))
    for module in network.modules():
        if isinstance(module, EncodingModule) or (isinstance(module, ContextEncoding) and not module.residual):
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)
    for parameter in network.parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.to_local().numel() < parameter.numel() or parameter.shape[0] == 1
    return network


def summed(_, bucket):
    """A hook of DDP that forgets the mean."""
    work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def gradients(accelerator):
    """By network and wrapper."""
    found = {}
    for name in NETWORKS:
        for wrapper in (*WRAPPERS, *MUTANTS):
            network, images, targets = network_and_batch(name)
            model = sharded(network) if wrapper == "FSDP2" else accelerator.prepare(network)
            assert wrapper == "FSDP2" or isinstance(model, nn.parallel.DistributedDataParallel)
            if wrapper == "summed":
                model.register_comm_hook(None, summed)
            share = 0 if wrapper == "one share twice" else accelerator.process_index
            own = slice(2 * share, 2 * share + 2)
            found[name, wrapper] = gradients_of(name, model, images[own], targets[own])
    return found


class Numbers(Dataset):
    """Sample i is the number i, and its class too."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def set_epoch(self, epoch):
        pass

    def __getitem__(self, index):
        return torch.tensor([float(index)]), index


class Echo(nn.Module):
    """The class of a number."""

    def __init__(self, classes):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(classes))

    def forward(self, x):
        return nn.functional.one_hot(x[:, 0].long(), len(self.weight)) * self.weight


class Counting(Loop):
    """A training that keeps what it was given."""

    score = "top1"

    def __init__(self, count, batch_size, arm):
        self.samples = self.val = Numbers(count)
        self.seen = []
        super().__init__(TrainingSettings(batch_size=batch_size, epochs=1, lr=1e-9, device="cpu"), arm, 0)
        self.val_loader = self.accelerator.prepare(self.loader(self.samples, train=False))

    def build(self, fresh):
        return Echo(len(self.samples))

    def make_optimizer(self):
        return torch.optim.SGD(self.network.parameters(), self.settings.lr)

    def loss(self, images, targets):
        self.seen.append(targets.tolist())
        return nn.functional.cross_entropy(self.model(images), targets)

    def evaluate(self):
        result = trainer.evaluate(
            self.accelerator, self.model, self.until_stopped(self.val_loader, len(self.val_loader))
        )
        self.evaluated_on = [result.targets.tolist(), result.predictions.tolist()]
        return {"top1": result.top1}

    def publish(self):
        pass

    def save(self):
        pass


def counts():
    """For each count of samples and batch size, from each process: updates, batches trained on, targets and predictions."""
    found = []
    for count, batch_size in SIZES:
        made = Counting(count, batch_size, Path("nowhere"))
        made.fit("counting")
        own = [made.updates_per_epoch, made.seen, *made.evaluated_on]
        found.append([count, batch_size, gather_object([own])])
    return found


def measure(folder):
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == PROCESSES
    found = gradients(accelerator)
    gc.freeze()  # each fit ends with a collection, which would look through all that was imported
    counted = counts()
    if accelerator.is_main_process:
        torch.save(found, Path(folder) / "gradients.pt")
        (Path(folder) / "counts.json").write_text(json.dumps(counted))
    accelerator.end_training()


WRITING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}


def watched(folder, *command):
    run = str(command[command.index("--out") + 1])
    written = []

    def note(event, arguments):
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            path, writes = (arguments or [None])[0], event in WRITING
        if writes and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(run):
            written.append(f"{event} {os.fspath(path)}")

    sys.addaudithook(note)
    code = main(command)
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(written))
    return code


def apart(folder, *command):
    os.chdir(Path(folder) / os.environ["RANK"])
    return main(command)


def dying(how, folder, *command):
    rank = os.environ["RANK"]
    (Path(folder) / f"{rank}.pid").write_text(str(os.getpid()))
    train, steps = trainer.Trainer.loss, []

    def loss(self, images, targets):
        steps.append(1)
        if rank == "1" and len(steps) == 2:
            (Path(folder) / "died").touch()
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("process 1 has had enough")
        return train(self, images, targets)

    trainer.Trainer.loss = loss
    return main(command)


if __name__ == "__main__":
    task, *rest = sys.argv[1:]
    sys.exit({"measure": measure, "watched": watched, "apart": apart, "dying": dying}[task](*rest))
