"""Measure the swap's cost for whole networks: original, swapped, and without SE blocks; and EncNet against FCN and DeepLabV3.

    python -m benchmarks.swap [--device cuda] [--networks seresnet50 ...] [--seconds 300] [--out results/swap_<device>.json]

Training is a step of forward, loss, backward and SGD with momentum; inference is forward in eval mode, and once more with the
ContextEncoding blocks fused by timm's reparameterize_model. AMP (bf16, fp16) is autocast, without a gradient scaler. All variants
of a network start from the same weights and take the same images; their calls are interleaved, in random order in every round.
Memory is the peak of a step or a forward: parameters, buffers, momentum and the batch, plus the allocations of PyTorch's
allocator. Ratios are relative to the original network, for EncNet to the FCN with a head of the same width; above 1 costs more.
MACs count convolutions and matrix products in the inference of one image.

On a GPU a time is that of CUDA graph replays, if a graph can be captured, and ContextEncoding takes the Triton kernels unless
--backend says otherwise. A table starts only if it should end within --seconds; the most important come first. The default on a CPU
(about 20 minutes on two cores) has every network in eager mode, fp32 and channels last, and the other settings only for the main
variants of the first network.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

import ctxenc
from benchmarks import networks
from benchmarks.encode import default_path
from benchmarks.forms import check_operator
from benchmarks.memory import peak_bytes
from benchmarks.record import Record
from benchmarks.swap_rows import Row, Setting, add_ratios, line, markdown, title
from benchmarks.timing import Call, Timer, cpu_timer, cuda_timer, first_line, interleaved, spread

__all__ = ["markdown"]  # formats a result of this benchmark

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("eager", "compile")
LAYOUTS = {"channels_last": True, "contiguous": False}
BATCH = {"cpu": 4, "cuda": 64}
ENCNET_BATCH = {"cpu": 2, "cuda": 8}  # five training graphs are held at once, each with its own memory
SECONDS = {"cpu": 1800, "cuda": 300}
COMPILING = 100.0  # seconds per table; for three variants of test_efficientnet on two busy cores
LEARNING_RATE = 1e-4  # low enough to keep the weights finite over hundreds of steps


class Table(NamedTuple):
    """Name the variants of a network at one setting; None for all."""

    network: str
    setting: Setting
    names: Sequence[str] | None = None


class Entry(NamedTuple):
    """Hold a row, its network, and the function that runs it."""

    row: Row
    model: nn.Module
    run: Callable[[Tensor], Any]


FIRST = Setting()
OTHERS = [Setting(channels_last=False), Setting("compile"), Setting(precision="fp16")]
IMPORTANCE = {
    "cpu": [FIRST, Setting(precision="bf16"), Setting("compile", "bf16"), *OTHERS],
    "cuda": [Setting(precision="bf16"), Setting("compile", "bf16"), FIRST, *OTHERS],
}


def settings(args: argparse.Namespace) -> list[Setting]:
    """Return the requested settings, the most important first; empty without a request."""
    if not (args.modes or args.precisions or args.layouts):
        return []
    layouts = [LAYOUTS[name] for name in args.layouts or ["channels_last"]]
    every = itertools.starmap(Setting, itertools.product(args.modes or ["eager"], args.precisions or ["fp32"], layouts))
    ranks = IMPORTANCE[args.device]
    return sorted(every, key=lambda each: ranks.index(each) if each in ranks else len(ranks))


def tables(args: argparse.Namespace) -> list[Table]:
    """Return all tables, the most important first."""

    def table(network: str, setting: Setting, names: Sequence[str] | None = None) -> Table:
        main = networks.MAIN if setting.mode == "compile" else None  # all would take minutes to compile
        return Table(network, setting, args.variants or names or main)

    if chosen := settings(args):
        return [table(network, setting) for setting in chosen for network in args.networks]
    if args.device == "cpu":
        others = [Setting(precision="bf16"), Setting(channels_last=False), Setting("compile")]
        main = {networks.ENCNET: networks.MAIN}
        first = [table(network, FIRST, main.get(network)) for network in args.networks]
        return first + [table(args.networks[0], setting, networks.MAIN) for setting in others]
    every = list(map(Setting._make, itertools.product(MODES, PRECISIONS, LAYOUTS.values())))
    ranks = IMPORTANCE["cuda"]
    ordered = ranks + [setting for setting in every if setting not in ranks]
    ranked = [
        (rank + (0 if network in networks.NETWORKS[:2] else 1.5), table(network, setting))
        for rank, setting in enumerate(ordered)
        for network in args.networks
    ]
    return [each for _, each in sorted(ranked, key=lambda pair: pair[0])]


@contextmanager
def failing_alone(row: Row) -> Iterator[None]:
    """Write a row's failure into the row, and go on with the others."""
    try:
        yield
    except Exception as failure:  # a compiler raises any type
        if "CUDA error" in str(failure):  # the process can no longer use the GPU after it
            raise
        row["failed"] = first_line(failure)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def autocast(device: str, precision: str) -> torch.autocast:
    """Return the precision's autocast; without the cast cache, which a CUDA graph cannot hold."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False)


def training(entry: Entry, images: Tensor, targets: Tensor) -> tuple[Call, int]:
    """Make a training step, and return it with the bytes before and after it; the step has run once."""
    model, precision = entry.model.train(), entry.row["precision"]
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    loss = networks.loss_of(entry.row["network"])

    def step() -> None:
        with autocast(images.device.type, precision):
            value = loss(entry.run(images), targets)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()  # at the end, so that the gradients are part of the step's own memory

    step()
    momentum = [each for state in optimizer.state.values() for each in state.values() if isinstance(each, Tensor)]
    return step, nbytes([*model.parameters(), *model.buffers(), *momentum, images, targets])


def inference(entry: Entry, images: Tensor, _: Tensor) -> tuple[Call, int]:
    """Make a forward, and return it with the bytes before and after it; it has run once."""
    model, precision = entry.model.eval(), entry.row["precision"]

    def forward() -> Any:
        with torch.inference_mode(), autocast(images.device.type, precision):
            return entry.run(images)

    forward()
    return forward, nbytes([*model.parameters(), *model.buffers(), images])


CALLS = {"training": training, "inference": inference}


def timer_of(entry: Entry, direction: str, batch: tuple[Tensor, Tensor], device: str) -> Timer:
    """Make the timer of a row in one direction, and add its memory to the row."""
    call, held = CALLS[direction](entry, *batch)
    entry.row[f"{direction}_peak_bytes"] = held + peak_bytes(call, device)
    if device == "cpu":
        return cpu_timer(call, 0)  # it has run twice
    timer, entry.row[f"{direction}_timed_by"] = cuda_timer([call])
    return timer


def add_times(entries: list[Entry], direction: str, batch: tuple[Tensor, Tensor], device: str, rounds: int) -> None:
    """Measure times and memory of all rows in one direction."""
    timers: dict[str, Timer] = {}
    rows = {title(entry.row): entry.row for entry in entries}
    for entry in entries:
        if "failed" not in entry.row:
            with failing_alone(entry.row):
                timers[title(entry.row)] = timer_of(entry, direction, batch, device)
    for name, times in interleaved(timers, rounds).items():
        rows[name][f"{direction}_ms"] = spread(times)
        rows[name][f"{direction}_images_per_s"] = batch[0].shape[0] / statistics.median(times) * 1e3


def enter(row: Row, make: Callable[[], nn.Module], device: str) -> Entry | None:
    """Move a network to its device and layout and, on request, compile it; None if this fails."""
    with failing_alone(row):
        model = make()
        row["reduction"] = networks.reduction(model)
        row["n_parameters"] = sum(parameter.numel() for parameter in model.parameters())
        row["n_macs"] = networks.macs(model, row["size"])
        layout = torch.channels_last if row["channels_last"] else torch.contiguous_format
        model = model.to(device, memory_format=layout)
        if row["mode"] == "eager":
            return Entry(row, model, model)
        # Compile like the first network in a process: otherwise sizes that differ between variants would become
        # dynamic.
        return Entry(row, model, torch.compile(model, dynamic=False))
    return None


def measure(table: Table, args: argparse.Namespace) -> list[Row]:
    """Measure one table: every variant of a network at one setting."""
    torch._dynamo.reset()
    torch.manual_seed(args.seed)
    size = args.size or networks.image_size(table.network)
    number = args.batch or (ENCNET_BATCH if table.network == networks.ENCNET else BATCH)[args.device]
    first = networks.build(table.network)
    images, targets = (tensor.to(args.device) for tensor in networks.batch_of(table.network, number, size))
    if table.setting.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    rounds = args.rounds
    if table.network == networks.ENCNET and args.device == "cpu":
        rounds = max(1, rounds // 2)  # its calls take ten times as long, and vary less
    same = {"network": table.network, **table.setting._asdict(), "batch": number, "size": size}
    made: list[tuple[Row, Entry | None]] = []

    def add(variant: str, fused: bool, make: Callable[[], nn.Module]) -> None:
        row = {**same, "variant": variant, "fused": fused}
        made.append((row, enter(row, make, args.device)))

    for place, (name, change) in enumerate(networks.changes(first).items()):
        if not place or not table.names or name in table.names:
            add(name, False, partial(networks.variant, first, change))
    with torch._dynamo.config.patch(
        recompile_limit=256, fail_on_recompile_limit_hit=True
    ):  # never fall back to eager silently
        add_times([entry for _, entry in made if entry], "training", (images, targets), args.device, rounds)
        for row, entry in list(made):
            if entry and "failed" not in row and networks.fuses(entry.model):
                add(row["variant"], True, partial(networks.fused, entry.model))
        add_times([entry for _, entry in made if entry], "inference", (images, targets), args.device, rounds)
    rows = [row for row, _ in made]
    add_ratios(rows)
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--backend", choices=["torch", "triton"], help='of ctxenc; default: "triton" on a GPU, "torch" on a CPU'
    )
    parser.add_argument("--networks", nargs="+", default=list(networks.NETWORKS), help="also any other of timm with SE")
    parser.add_argument("--variants", nargs="+", help="beside the one that they are compared with, 'own, mean' for one")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: see above")
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), help="default: see above")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), help="default: see above")
    parser.add_argument("--batch", type=int, help="default: 4, EncNet 2; on a GPU 64, EncNet 8")
    parser.add_argument("--size", type=int, help="of the images; default: timm's own, at most 224, EncNet 480")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's")
    parser.add_argument("--seconds", type=float, help="default: 1800, on a GPU 300")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one small network and two rounds, to see that it runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is False")
    args.backend = args.backend or ("triton" if args.device == "cuda" else "torch")
    if args.quick:
        args.networks, args.variants, args.modes, args.batch, args.size = (
            ["seresnet18"],
            ["own, mean"],
            ["eager"],
            2,
            64,
        )
        args.rounds = 2
        args.out = args.out or Path("runs") / "swap_quick.json"
    for name in args.networks:
        if name != networks.ENCNET and not timm.is_model(name):
            parser.error(f"--networks: must be {networks.ENCNET} or a model of timm, got {name!r}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.monotonic()
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = args.device == "cuda"
    with ctxenc.use_backend(args.backend):
        run(args, start)


def run(args: argparse.Namespace, start: float) -> None:
    """Measure all tables that fit into the time, from start on."""
    correctness = check_operator(args.device)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    record = Record(
        "swap",
        args.out or default_path({"gpu": gpu}, "swap"),
        correctness,
        args.seed,
        args.device,
        backend=args.backend,
    )
    todo, longest = tables(args), dict.fromkeys(MODES, 0.0)
    limit = start + (SECONDS[args.device] if args.seconds is None else args.seconds)
    done = 0
    print(
        "network; setting; parameters; MACs; then training and inference: median ms [20 %, 80 %], ratio; memory, ratio"
    )
    for table in todo:
        began, mode = time.monotonic(), table.setting.mode
        expected = longest[mode] or max(longest.values()) + (COMPILING if mode == "compile" else 0)
        if done and began + expected > limit:
            continue  # a later one may be shorter
        rows = measure(table, args)
        record.add(*rows)
        print("\n".join(map(line, rows)), flush=True)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        done += 1
        longest[mode] = max(longest[mode], time.monotonic() - began)
    print(f"{done} of {len(todo)} tables in {time.monotonic() - start:.0f} s; written: {record.path}")


if __name__ == "__main__":
    main()
