"""Decide whether a fused kernel has proved itself on this GPU.

A kernel must first solve a small problem there: five runs with equal bits, each value within tolerance of the same formula in fp64.
The verdict counts for a `Kind`: the operator, every compile-time constant of the kernel, and the GPU. records.py keeps it on disk.
`CTXENC_VERIFY=0` trusts every kernel without a proof.

For `doctor` and other tools:

    with verdicts.collect_kinds() as kinds:  # a dict of kinds; proves nothing, the PyTorch path serves
        model(x).sum().backward()
    for kind in kinds:  # kind.to_json() and Kind.from_json() carry one to another process
        verdicts.find_verdict(kind)  # its Verdict(serves, reason, lasts, excess), or None; launches nothing
        verdicts.prove(kind, device)  # tries the kernel now, ignoring the record, and records the verdict
    records.find_record(verdicts.make_record_key(kind))  # the file of a record, to send with a report, or None
"""

import contextlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctxenc.kernels import records

RUNS = 5
REMEMBERED = 4096  # calls whose verdict is found without computing their kind
RETRY = 64  # calls between two tries of a kernel that ran out of memory

Constants = dict[str, Any]  # its values are JSON
Arguments = tuple[Any, ...]


class Kind(NamedTuple):
    """Identify one compiled kernel on one GPU."""

    operator: str
    constants: tuple[tuple[str, Any], ...]
    gpu: str  # name and capability, or "interpreter"

    def to_json(self) -> str:
        return json.dumps([self.operator, dict(self.constants), self.gpu])

    @classmethod
    def from_json(cls, text: str) -> "Kind":
        operator, constants, gpu = json.loads(text)
        return cls(operator, tuple(constants.items()), gpu)

    def __str__(self) -> str:
        constants = ", ".join(f"{name} {value}" for name, value in self.constants)
        return f"{self.operator} ({constants}) on {self.gpu}"


class Verdict(NamedTuple):
    """Tell whether a kernel serves, and why."""

    serves: bool
    reason: str
    lasts: str = "always"  # "process": not written to disk; "call": the next call asks again
    excess: dict[str, float] | None = None  # error over tolerance, per result


@dataclass(eq=False)
class Operator:
    """Pair a kernel with its PyTorch path: a call takes the kernel if it has proved itself, else the PyTorch path.

    Args:
        name: as in `Kind.operator`.
        kernel: launches the kernel and returns a tensor or a tuple of tensors. It handles empty inputs itself.
        plain: computes the same on the PyTorch path, with the same shapes, dtypes and strides.
        constants: from the same arguments, every compile-time constant of the kernel; None if nothing is launched.
        problems: from constants and a device, lists of arguments with the same `constants`: ragged N, several tiles, splits and
            images, and values that expose a lost term. Empty if it can make no such problem.
        excess: from arguments, results and the fp64 results of `plain`, error over tolerance by name; above 1 is wrong.
        key: from the arguments, a tuple that decides the constants. It is cheap to compute. Two keys may share one kind.
        changes: positions of the arguments that the kernel writes to. They count as results, after the others.
    """

    name: str
    kernel: Callable[..., Any]
    plain: Callable[..., Any]
    constants: Callable[..., Constants | None]
    problems: Callable[[Constants, torch.device], list[Arguments]]
    excess: Callable[[Arguments, tuple[Tensor, ...], tuple[Tensor, ...]], dict[str, float]]
    key: Callable[..., tuple[Any, ...]]
    changes: tuple[int, ...] = ()
    served: dict[tuple[Any, ...], Verdict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        OPERATORS[self.name] = self

    def __call__(self, strict: bool, *arguments: Any) -> Any:
        """Return the result for these arguments. strict: raise RuntimeError instead of taking the PyTorch path."""
        key = self.key(*arguments)
        verdict = self.served.get(key) or self._look_up(key, arguments)
        if verdict.serves:
            return self.kernel(*arguments)
        if strict and _collected is None:
            raise RuntimeError(f'{self.name}: backend="triton" cannot run: {verdict.reason}')
        with torch.autocast(arguments[0].device.type, enabled=False):
            return self.plain(*arguments)

    def _look_up(self, key: tuple[Any, ...], arguments: Arguments) -> Verdict:
        kind = self.kind(*arguments)
        verdict = _judge(kind, arguments[0].device) if kind else Verdict(True, "nothing is launched")
        if verdict.lasts != "call":
            if len(self.served) >= REMEMBERED:
                self.served.clear()
            self.served[key] = verdict
        return verdict

    def results(self, function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        """Run the kernel or the PyTorch path and return its results and changed arguments, on copies of the latter."""
        fresh = [a.clone() if place in self.changes else a for place, a in enumerate(arguments)]
        results = function(*fresh)
        return (*(results if isinstance(results, tuple) else (results,)), *(fresh[place] for place in self.changes))

    def kind(self, *arguments: Any) -> Kind | None:
        """Return the kind of kernel that these arguments take; None if nothing is launched."""
        constants = self.constants(*arguments)
        return Kind(self.name, tuple(constants.items()), _name_gpu(arguments[0].device)) if constants else None


OPERATORS: dict[str, Operator] = {}
_verdicts: dict[Kind, Verdict] = {}
_calls_without_memory: dict[Kind, int] = {}
_collected: dict[Kind, None] | None = None
_lock = threading.RLock()


def describe_placement(x: Tensor) -> tuple[Any, ...]:
    """Return every property of a tensor, except its values, that can affect a launch."""
    return x.dtype, x.shape, x.stride(), x.data_ptr() & 15, x.get_device()


def _name_gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.gcnArchName if torch.version.hip else f'{properties.major}.{properties.minor}'}"


@contextlib.contextmanager
def collect_kinds() -> Iterator[dict[Kind, None]]:
    """Collect the kinds of kernels that calls ask for in the with block, in every thread.

    Nothing tries or launches a kernel meanwhile: the PyTorch path serves, even with `backend="triton"`.
    """
    global _collected
    before, _collected = _collected, {}
    for operator in OPERATORS.values():
        operator.served.clear()
    try:
        yield _collected
    finally:
        _collected = before


def make_record_key(kind: Kind) -> dict[str, Any]:
    """Return the key of a record: the kind, and its versions."""
    return {"operator": kind.operator, "constants": dict(kind.constants), "gpu": kind.gpu, **records.read_versions()}


def find_verdict(kind: Kind) -> Verdict | None:
    """Return the verdict of this process or the one on disk; None if there is no verdict yet."""
    if kind not in _verdicts and (record := records.read(make_record_key(kind))):
        return Verdict(record["serves"], record["reason"], excess=record.get("excess"))
    return _verdicts.get(kind)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _judge(kind: Kind, device: torch.device) -> Verdict:
    """Return the verdict of a kind; prove the kernel first if there is no verdict."""
    if _collected is not None:
        _collected[kind] = None
        return Verdict(False, "no kernel runs inside verdicts.collect_kinds()", "call")
    if os.environ.get("CTXENC_VERIFY") == "0":
        return Verdict(True, "not checked: CTXENC_VERIFY=0", "process")
    with _lock:  # one proof at a time: other threads want the same kernel
        if kind in _verdicts:
            return _verdicts[kind]
        if _is_capturing(device):  # nor may a kernel be loaded during capture
            return Verdict(
                False, "while a CUDA graph is captured no kernel runs for the first time: call it before", "call"
            )
        calls = _calls_without_memory.get(kind, 0)
        if calls % RETRY:
            verdict = Verdict(False, "there was no memory to prove it", "call")
        else:
            verdict = find_verdict(kind) or _find_crash(kind) or prove(kind, device)
        if verdict.lasts == "call":
            _calls_without_memory[kind] = calls + 1
            return verdict
        _verdicts[kind] = verdict
    if not verdict.serves:
        _warn(kind, verdict)
    return verdict


def _find_crash(kind: Kind) -> Verdict | None:
    """Return the verdict of a kernel if its trial crashed a process, else None."""
    if not records.find_stale_markers(make_record_key(kind)):
        return None
    verdict = Verdict(False, "a process ended while it tried this kernel; `python -m ctxenc doctor` tries it again")
    records.write_verdict(make_record_key(kind), verdict._asdict())
    return verdict


def prove(kind: Kind, device: torch.device | str) -> Verdict:
    """Try a kernel now, ignoring any record, and record the verdict.

    Args:
        kind: from `watching()` or `Operator.kind`.
        device: a GPU with the kind's name; "cpu" in the interpreter.

    Returns:
        The verdict. A temporary one (no memory, no compiler) is not recorded.
    """
    if kind.operator not in OPERATORS:  # not imported before the process's first call
        from ctxenc.kernels.fused import encode, gate, pool, project  # noqa: F401
    device, key = torch.device(device), make_record_key(kind)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # surfaces earlier errors, which are not this kernel's
    marker = records.mark(key)
    try:
        verdict = _try(OPERATORS[kind.operator], kind, device)
        if verdict.lasts == "always":
            records.write_verdict(key, verdict._asdict())
    finally:
        if marker:
            marker.unlink(missing_ok=True)
    return verdict


def _try(operator: Operator, kind: Kind, device: torch.device) -> Verdict:
    anywhere = torch.empty(0, device=device)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.cuda.device_of(anywhere):
            problems = operator.problems(dict(kind.constants), device)
            if not problems:
                return Verdict(False, "no small problem of this kind could be made", "process")
            excess: dict[str, float] = {}
            for arguments in problems:
                first = operator.results(operator.kernel, arguments)
                wide = [a.double() if isinstance(a, Tensor) else a for a in arguments]
                excesses = operator.excess(arguments, first, operator.results(operator.plain, wide))
                excess = {name: max(over, excess.get(name, 0.0)) for name, over in excesses.items()}
                worst = max(excess, key=lambda name: excess[name])
                if excess[worst] > 1:
                    return Verdict(False, f"{worst} is off by {excess[worst]:.3g} times its tolerance", excess=excess)
                for _ in range(RUNS - 1):
                    if not all(map(torch.equal, first, operator.results(operator.kernel, arguments))):
                        return Verdict(False, f"{RUNS} runs on the same inputs gave different bits", excess=excess)
    except Exception as error:
        return _judge_failure(error, device)
    return Verdict(True, f"{RUNS} runs of equal bits, errors within tolerance", excess=excess)


def _judge_failure(error: Exception, device: torch.device) -> Verdict:
    """Return the verdict for a kernel that raised. It lasts if this GPU will fail again, not if a repaired setup may help."""
    line = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in line:
        return Verdict(False, f"there was no memory to prove it ({line})", "call")
    lasts = "always" if type(error).__name__ == "OutOfResources" else "process"
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:  # the kernel broke the GPU context and with it this process
        lasts = "always"
    return Verdict(False, line, lasts)


def _warn(kind: Kind, verdict: Verdict) -> None:
    send = records.find_record(make_record_key(kind)) or "what `python -m ctxenc doctor --out FILE` writes"
    warnings.warn(
        f"ctxenc: the PyTorch path serves in place of the fused kernel {kind}: {verdict.reason}. To report it, send {send}",
        RuntimeWarning,
        stacklevel=2,
    )
