"""Tasks of the child processes: look at the machine, try one kernel, time kernels.

    python -m ctxenc.diagnosis.tasks TASK REQUEST

REQUEST is JSON. Results are lines of JSON after MARK: libraries may print other lines.
"""

import contextlib
import copy
import difflib
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ctxenc
from ctxenc.diagnosis.examination import MARK
from ctxenc.kernels import backends, records, verdicts

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}
INTERPRETED_BATCH = 2

Request = dict[str, Any]
Result = dict[str, Any]


class MistakeError(Exception):
    """Report a user error on one line."""


def look(request: Request) -> Iterator[Result]:
    """Describe the machine, then the kernels and the encode calls that the subjects need."""
    device = torch.device("cpu" if request["interpret"] else "cuda" if torch.cuda.is_available() else "meta")
    if device.type == "cpu":
        backends.GPUS = ("cuda", "cpu")  # in the interpreter "auto" chooses the kernels for CPU tensors
        request |= {"batch": INTERPRETED_BATCH}
    subjects = [_build_model(request, device)] if request["model"] else _build_blocks(request, device)
    yield {"environment": describe_environment()}
    reason = backends.why_not(torch.empty(1, device=device))
    kinds: dict[str, None] = {}
    calls: dict[str, Result] = {}
    for module, shape in subjects:
        for dtype in request["dtypes"]:
            for layout in request["layouts"]:
                with ctxenc.use_backend("auto"), verdicts.collect_kinds() as new_kinds:
                    _train_and_evaluate(module, shape, dtype, layout, calls)
                kinds |= dict.fromkeys(kind.to_json() for kind in new_kinds)
    needs = {"device": device.type, "why_no_kernels": reason, "kinds": list(kinds), "calls": list(calls.values())}
    yield {"needs": needs}


def describe_environment() -> Result:
    """Return versions, GPUs, the choice of auto with its reason, and the cache folders."""
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append(
            {
                "name": properties.name,
                "capability": getattr(properties, "gcnArchName", capability) if torch.version.hip else capability,
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
            }
        )
    triton_cache = Path(
        os.environ.get("TRITON_CACHE_DIR") or Path(os.environ.get("TRITON_HOME") or "~", ".triton/cache")
    )
    return {
        "versions": {name: _find_version(name) for name in ("ctxenc", "torch", "triton", "timm")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "driver": _find_driver(),
        "gpus": gpus,
        "auto": ctxenc.backend_info()._asdict(),
        "caches": {
            "verdicts": _check_writable(records.find_directory),
            "compiled kernels": _check_writable(lambda: triton_cache.expanduser()),
        },
    }


def _find_version(package: str) -> str | None:
    try:
        return ctxenc.__version__ if package == "ctxenc" else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _find_driver() -> str | None:
    """Return the version of NVIDIA's driver."""
    try:
        process = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.split()[0] if process.returncode == 0 and process.stdout.strip() else None


def _check_writable(find: Any) -> Result:
    """Return a folder, and the reason if it cannot be written to."""
    path = None
    try:
        path = find()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return {"path": str(path), "problem": None}
    except (OSError, RuntimeError) as error:
        return {"path": path and str(path), "problem": f"{type(error).__name__}: {error}"}


def _build_blocks(request: Request, device: torch.device) -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    """Yield blocks for maps of the requested shapes; fewer images in the interpreter: kernels do not depend on their number."""
    for B, D, H, W, K in request["shapes"]:
        block = ctxenc.ContextEncoding(D, num_codes=K, rd_channels=D, device=device)
        yield block, (request["batch"] if device.type == "cpu" else B, D, H, W)


def _build_model(request: Request, device: torch.device) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a patched timm network, and the shape of its input.

    Raises:
        MistakeError: timm does not know it, or it has nothing to patch.
    """
    timm = importlib.import_module("timm")
    name = request["model"]
    if name not in (known := timm.list_models()) and not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise MistakeError(
            f"--model: timm has no {name!r}; "
            + (f"near names: {', '.join(near)}" if near else f"{len(known)} others are known")
        )
    network = timm.create_model(name)
    try:
        ctxenc.patch_se_blocks(network, num_codes=request["num_codes"])
    except ValueError as error:
        raise MistakeError(f"--model {name}: {' '.join(str(error).split())}") from error
    size = timm.data.resolve_model_data_config(network)["input_size"]
    return network.to(device), (request["batch"], *size)


@contextlib.contextmanager
def _record_calls(module: nn.Module, calls: dict[str, Result]) -> Iterator[None]:
    """Record the encode calls of a module in the with block: shape, dtype and layout of x, and codewords."""

    def record(encoding: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        layout = "channels_last" if x.shape[1] > 1 and x.stride(1) == 1 else "channels_first"
        call = {
            "shape": list(x.shape),
            "num_codes": encoding.num_codes,
            "dtype": _name_dtype(x.dtype),
            "layout": layout,
        }
        calls.setdefault(json.dumps(call), call)

    with contextlib.ExitStack() as stack:
        for encoding in module.modules():
            if isinstance(encoding, ctxenc.Encoding):
                stack.enter_context(encoding.register_forward_pre_hook(record))
        yield


def _name_dtype(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))


def _train_and_evaluate(
    module: nn.Module, shape: tuple[int, ...], dtype: str, layout: str, calls: dict[str, Result]
) -> None:
    """Run one training step, and one evaluation with the norms folded into the projections, as for deployment."""
    device = next(module.parameters()).device
    half = dtype != "fp32" and device.type != "meta"
    x = torch.randn(shape, device=device).contiguous(memory_format=LAYOUTS[layout])
    if half and isinstance(module, ctxenc.ContextEncoding):  # inside a network its input is the output of a convolution
        x = x.to(DTYPES[dtype])
    module.to(memory_format=LAYOUTS[layout])
    with torch.autocast(device.type, DTYPES[dtype]) if half else contextlib.nullcontext():
        with _record_calls(module, calls):
            output = module.train()(x.requires_grad_())
        output.backward(torch.randn_like(output))
        fused = copy.deepcopy(module).eval()  # without hooks: under a hook the projection has no kernel
        for block in fused.modules():
            if isinstance(block, ctxenc.ContextEncoding):
                block.fuse()
        with torch.no_grad():
            fused(x.detach())


def prove(request: Request) -> Iterator[Result]:
    """Try one kernel now; ignore any recorded verdict."""
    kind = verdicts.Kind.from_json(request["kind"])
    verdict = verdicts.prove(kind, request["device"])
    is_recorded = verdict.lasts == "always" and records.find_record(verdicts.make_record_key(kind)) is not None
    yield verdict._asdict() | {"kept": is_recorded}


def time_calls(request: Request) -> Iterator[Result]:
    """Time the encode calls on the kernels and on the PyTorch path, in milliseconds of GPU time."""
    from triton.testing import do_bench

    for call in request["calls"]:
        x = torch.randn(call["shape"], device=request["device"], dtype=DTYPES[call["dtype"]])
        x = x.contiguous(memory_format=LAYOUTS[call["layout"]]).requires_grad_()
        D, K = call["shape"][1], call["num_codes"]
        parameters = torch.randn(K, D, device=x.device) / 4, torch.rand(K, device=x.device) / D
        tensors = x, *(parameter.requires_grad_() for parameter in parameters)
        grad = torch.randn(x.shape[0], K, D, device=x.device)
        result: Result = {"call": call}
        for backend in ("triton", "torch"):

            def forward(backend: str = backend, tensors: tuple[Tensor, ...] = tensors) -> Tensor:
                return ctxenc.encode(*tensors, backend=backend)

            def run_both(forward: Any = forward, tensors: tuple[Tensor, ...] = tensors, grad: Tensor = grad) -> None:
                torch.autograd.grad(forward(), tensors, grad)

            try:
                with torch.no_grad():
                    result[backend] = {"forward_ms": do_bench(forward, warmup=5, rep=20, return_mode="median")}
                result[backend]["both_ms"] = do_bench(run_both, warmup=5, rep=20, return_mode="median")
            except RuntimeError as error:  # the kernel does not work, or memory is short
                result[backend] = {"problem": " ".join(str(error).split())[:300]}
        yield result


TASKS = {"look": look, "prove": prove, "times": time_calls}


def main() -> None:
    task, request = sys.argv[1:]
    try:
        for result in TASKS[task](json.loads(request)):
            print(MARK + json.dumps(result), flush=True)
    except MistakeError as error:
        print(MARK + json.dumps({"mistake": str(error)}), flush=True)


if __name__ == "__main__":
    main()
