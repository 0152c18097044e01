"""Write a run's model as an ONNX file or a torch.export program; verify it before it takes its name."""

import argparse
import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from tqdm import tqdm

from ctxenc.runs.config import RunConfig, atomic
from ctxenc.runs.errors import UserError, one_line
from ctxenc.runs.trained import LoadedRun, load_run
from ctxenc.training.console import say
from ctxenc.training.nonfinite import check_outputs

TRACED_BATCH = 2
CHECKED_BATCHES = (1, 3)  # differ from the traced one: the batch size must be free
TOLERANCE = 1e-4  # of the largest logit; onnx.reference was off by at most 5e-6 over five networks
ONNX_LIMIT = 2**31  # bytes: an ONNX file is one protobuf message


def run(args: argparse.Namespace) -> None:
    """Write the requested files; no file appears unless all agree with the model."""
    if not args.onnx and not args.torch_export:
        raise UserError("export needs --onnx FILE or --torch-export FILE")
    if args.torch_export and args.torch_export.suffix != ".pt2":
        raise UserError(f"--torch-export: the file name must end in .pt2, got {args.torch_export}")
    if args.onnx and args.torch_export and os.path.realpath(args.onnx) == os.path.realpath(args.torch_export):
        raise UserError(f"--onnx and --torch-export must name two files, got {args.onnx} and {args.torch_export}")
    if args.onnx:
        import onnx  # noqa: F401  (before anything is built: the extra may be missing)
        import onnxscript  # noqa: F401
    lines = []
    steps = 2 + bool(args.torch_export) + bool(args.onnx)
    with ExitStack() as files, tqdm(total=steps, leave=False, disable=None) as bar:
        onnx_file = files.enter_context(atomic(args.onnx)) if args.onnx else None
        torch_file = files.enter_context(atomic(args.torch_export)) if args.torch_export else None
        bar.set_description("loading")
        loaded = load_run(args.run_folder, args.checkpoint)
        model, size = exported_as(loaded, args.image_size)
        _next(bar, "tracing")
        program = trace(model, torch.zeros(TRACED_BATCH, *size))
        if torch_file:
            _next(bar, "writing and checking the torch.export program")
            difference = write_torch_export(program, torch_file, model, size)
            lines.append(f"{args.torch_export}: reloaded by torch.export.load, {difference}")
        if onnx_file:
            _next(bar, "writing and checking the ONNX model")
            lines.append(f"{args.onnx}: {write_onnx(program, onnx_file, model, size)}")
    for line in lines:
        say(line)


class Logits(nn.Module):
    """Return only an EncNet's pixel logits: its other heads are for training."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)["out"]


def exported_as(loaded: LoadedRun, side: int | None) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return the network of a run with one output, and the (channels, height, width) of its images."""
    channels, height, width = loaded.input_size
    network = loaded.model if isinstance(loaded.config, RunConfig) else Logits(loaded.model).eval()
    return network, (channels, side or height, side or width)


def _next(bar: tqdm, step: str) -> None:
    bar.update()
    bar.set_description(step)


def trace(model: nn.Module, images: Tensor) -> ExportedProgram:
    """Export the model with a free batch size.

    Raises:
        UserError: torch.export cannot trace the model.
    """
    try:
        with torch.no_grad():
            return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # torch.export raises many kinds
        raise UserError(f"torch.export cannot trace this model: {type(error).__name__}: {one_line(error)}") from error


def write_torch_export(program: ExportedProgram, path: Path, model: nn.Module, size: tuple[int, int, int]) -> str:
    """Write a torch.export program and compare the reloaded one with the model."""
    torch.export.save(program, path)
    return compare(torch.export.load(path).module(), model, size)


def write_onnx(program: ExportedProgram, path: Path, model: nn.Module, size: tuple[int, int, int]) -> str:
    """Write an ONNX model, check it, and compare it with the model in the installed runtime.

    Raises:
        UserError: The model is too large for one file, or ONNX cannot express it.
    """
    import onnx

    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    if weights >= ONNX_LIMIT:
        raise UserError(
            f"an ONNX file holds less than 2 GiB, the weights take {weights / 2**30:.1f} GiB: use --torch-export"
        )
    try:
        exported = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["image"], output_names=["logits"], external_data=False
        )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"torch.onnx cannot export this model: {one_line(error)}") from error
    assert exported is not None
    exported.save(path, external_data=False)
    onnx.checker.check_model(path, full_check=True)
    runtime, predict = onnx_runtime(path)
    return f"onnx.checker found no fault; run by {runtime}, {compare(predict, model, size)}"


def onnx_runtime(path: Path) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Return the name of the installed runtime, and the ONNX model as a function of images."""
    if importlib.util.find_spec("onnxruntime"):
        onnxruntime = importlib.import_module("onnxruntime")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return "onnxruntime", lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
    from onnx.reference import ReferenceEvaluator

    evaluator: Any = ReferenceEvaluator(str(path))
    return "onnx.reference", lambda images: torch.from_numpy(evaluator.run(None, {"image": images.numpy()})[0])


def compare(exported: Callable[[Tensor], Tensor], model: nn.Module, size: tuple[int, int, int]) -> str:
    """Run both on random images in several batch sizes and return the largest difference of the logits as text.

    Raises:
        UserError: They differ by more than TOLERANCE of the largest logit, or are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    worst, largest = 0.0, 0.0
    for batch in CHECKED_BATCHES:
        images = torch.randn(batch, *size, generator=generator)
        with torch.no_grad():
            expected = model(images)
            got = exported(images)
        check_outputs(model, expected, "random images")
        worst = max(worst, (got - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    batches = " and ".join(map(str, CHECKED_BATCHES))
    text = f"largest difference {worst:.2g} of logits up to {largest:.2g} (batches of {batches})"
    if not worst <= TOLERANCE * largest:
        raise UserError(f"the exported program does not give the model's outputs: {text}")
    return text
