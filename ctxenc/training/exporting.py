"""Write a run's model as an ONNX file or a torch.export program; verify it before it takes its name.

Batch and image size are free where the network and the format allow it.
"""

import argparse
import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
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
STEP = 32  # pixels by which the checked sides differ from those of training: the stride of most networks
TOLERANCE = 1e-4  # of the largest logit; onnx.reference was off by at most 5e-6 over five networks
ONNX_LIMIT = 2**31  # bytes: an ONNX file is one protobuf message
Shape = tuple[int, ...]


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
    with ExitStack() as files:
        temporary = {path: files.enter_context(atomic(path)) for path in (args.torch_export, args.onnx) if path}
        loaded = load_run(args.run_folder, args.checkpoint)
        model, size = prepare(loaded, args.image_size)
        traced = cache(partial(trace, model, size))
        writers = [
            (args.torch_export, write_torch_export),
            (args.onnx, partial(write_onnx, metadata=describe(loaded))),
        ]
        for path, write in tqdm(writers, "exporting", leave=False, disable=None):
            if path:
                lines.append(f"{path}: {write_freest(write, traced, temporary[path], model)}")
    for line in lines:
        say(line)


class Logits(nn.Module):
    """Return only an EncNet's pixel logits: its other heads are for training."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)["out"]


def prepare(loaded: LoadedRun, side: int | None) -> tuple[nn.Module, Shape]:
    """Return the network of a run with one output, and the (channels, height, width) of its images."""
    channels, height, width = loaded.input_size
    network = loaded.model if isinstance(loaded.config, RunConfig) else Logits(loaded.model).eval()
    return network, (channels, side or height, side or width)


def describe(loaded: LoadedRun) -> dict[str, str]:
    """Return the metadata of a file, each a JSON text: classes, and the normalisation of images in [0, 1]."""
    config = loaded.config
    data = config.data_config if isinstance(config, RunConfig) else {"mean": config.mean, "std": config.std}
    return {
        "classes": json.dumps(config.classes),
        "mean": json.dumps(data["mean"]),
        "std": json.dumps(data["std"]),
    }


def trace(model: nn.Module, size: Shape, free: bool) -> tuple[ExportedProgram, list[Shape]]:
    """Export the model with a free batch size, and a free image size or (channels, height, width) = `size`.

    Returns:
        The program, and the shapes to check it at, none of which was traced.

    Raises:
        UserError: torch.export cannot trace the model.
    """
    channels, height, width = size
    # torch.export takes equal sides for one number, and a last map of one pixel for a constant: trace larger, unequal sides.
    traced, other = ((channels, height + step * STEP, width + (step + 1) * STEP) if free else size for step in (1, 2))
    sizes = dict.fromkeys((0, 2, 3) if free else (0,), torch.export.Dim.DYNAMIC)
    try:
        with torch.no_grad():
            model(torch.zeros(1, *other))
            return torch.export.export(model, (torch.zeros(TRACED_BATCH, *traced),), dynamic_shapes=(sizes,)), [
                (1, *size),
                (3, *other),
            ]
    except Exception as error:  # torch.export raises many kinds
        raise UserError(f"torch.export cannot trace this model: {type(error).__name__}: {one_line(error)}") from error


def write_freest(write: Callable[..., str], traced: Callable[[bool], Any], path: Path, model: nn.Module) -> str:
    """Write a program for any image size; where it cannot be written or run, one for the size of training.

    Raises:
        UserError: Neither can be written, or gives the model's outputs.
    """
    try:
        program, shapes = traced(True)
        return f"for any batch and image size; {write(program, path, model, shapes)}"
    except Exception as error:
        # max_size in ONNX, a fixed position embedding, timm's "same" padding in torch.export, ...
        reason = one_line(error, 120)
    program, shapes = traced(False)
    side = "x".join(map(str, shapes[0][2:]))
    written = write(program, path, model, shapes)
    return f"for any batch of images of {side}; {written}. A file for any image size failed: {reason}"


def write_torch_export(program: ExportedProgram, path: Path, model: nn.Module, shapes: list[Shape]) -> str:
    """Write a torch.export program and compare the reloaded one with the model."""
    torch.export.save(program, path)
    return f"reloaded by torch.export.load, {compare(torch.export.load(path).module(), model, shapes)}"


def write_onnx(
    program: ExportedProgram, path: Path, model: nn.Module, shapes: list[Shape], metadata: dict[str, str]
) -> str:
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
    exported.model.metadata_props.update(metadata)
    exported.save(path, external_data=False)
    onnx.checker.check_model(path, full_check=True)
    runtime, predict = open_onnx(path)
    return f"onnx.checker found no fault; run by {runtime}, {compare(predict, model, shapes)}"


def open_onnx(path: Path) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Return the name of the installed runtime, and the ONNX model as a function of images."""
    if importlib.util.find_spec("onnxruntime"):
        onnxruntime = importlib.import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # a failure raises; it need not be logged too
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return "onnxruntime", lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
    from onnx.reference import ReferenceEvaluator

    evaluator: Any = ReferenceEvaluator(str(path))
    return "onnx.reference", lambda images: torch.from_numpy(evaluator.run(None, {"image": images.numpy()})[0])


def compare(exported: Callable[[Tensor], Tensor], model: nn.Module, shapes: list[Shape]) -> str:
    """Run both on random images of several shapes (B, C, H, W) and return the largest difference of the logits as text.

    Raises:
        UserError: They differ by more than TOLERANCE of the largest logit, or are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    worst, largest = 0.0, 0.0
    for shape in shapes:
        images = torch.randn(shape, generator=generator)
        with torch.no_grad():
            expected = model(images)
            got = exported(images)
        check_outputs(model, expected, "random images")
        worst = max(worst, (got - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    checked = " and ".join("x".join(map(str, shape)) for shape in shapes)
    text = f"largest difference {worst:.2g} of logits up to {largest:.2g} (images of {checked})"
    if not worst <= TOLERANCE * largest:
        raise UserError(f"the exported program does not give the model's outputs: {text}")
    return text
