"""Define the compared forms of the operator, their inputs, and their errors against fp64."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

import ctxenc
from benchmarks.shapes import Shape
from ctxenc.kernels import reference

LAYOUTS = ("channels_first", "channels_last")
# Relative to the largest value; half precision rounds the products too. A wrong form is off by far more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
CHECKED: list[Shape] = [(2, 49, 16, 8), (3, 196, 24, 16), (1, 900, 128, 32)]

Encode = Callable[[Tensor, Tensor, Tensor], Tensor]


def expanded(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """Encode with the residuals of every pixel to every codeword, held in memory twice."""
    return reference.encode(x, codewords, smoothing)


def shifted_matmul(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """Encode in the matmul form that is safe under offsets, with autograd."""
    center = codewords.mean(0)
    x, codewords = x - center[:, None], codewords - center
    distance = x.square().sum(1, keepdim=True) - 2 * (codewords @ x) + codewords.square().sum(1)[:, None]
    weights = torch.softmax(-smoothing[:, None] * distance, dim=1)
    return weights @ x.transpose(1, 2) - weights.sum(2, keepdim=True) * codewords


def shifted_under_autocast(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """Run the shifted matmul form in mixed precision; without the cast cache, which a CUDA graph cannot hold."""
    with torch.autocast(x.device.type, x.dtype, cache_enabled=False):
        return shifted_matmul(x, codewords, smoothing)


class _NoOps(ModuleType):
    """Replace mmcv's compiled operators: mmcv-lite lacks them, mmsegmentation imports them, and Encoding does not call them."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@cache
def _mmseg_encoding(channels: int, num_codes: int) -> nn.Module:
    if "mmcv._ext" not in sys.modules and importlib.util.find_spec("mmcv._ext") is None:
        sys.modules["mmcv._ext"] = _NoOps("mmcv._ext")
    module: nn.Module = importlib.import_module("mmseg.models.utils.encoding").Encoding(channels, num_codes)
    return module


def has_mmsegmentation() -> bool:
    """Return whether its wheel is installed; the first call shows whether it imports."""
    return importlib.util.find_spec("mmseg") is not None


def mmsegmentation(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """Encode with mmsegmentation's own class, which holds scale = -smoothing; passing the parameters takes 0.1 ms."""
    K, D = codewords.shape
    parameters = {"codewords": codewords, "scale": -smoothing}
    return torch.func.functional_call(_mmseg_encoding(D, K), parameters, (x.unsqueeze(2),))


class Products:
    """Run only the matrix products of the operator, into allocated memory: the time of torch.bmm, not a bound.

    No softmax, norm, sum, shift or new memory. Forward takes two; backward three, and the last one, dx, sums over 2 K.
    """

    def __init__(self, tensors: tuple[Tensor, ...], grad: Tensor) -> None:
        x, codewords, _ = (tensor.detach() for tensor in tensors)
        B, _, N = x.shape
        K = len(codewords)
        self.codewords = codewords.to(x.dtype).expand(B, -1, -1).contiguous()
        self.grad = grad.to(x.dtype)
        self.rows = torch.cat([self.grad, self.codewords], 1)  # (B, 2 K, D)
        self.columns = torch.randn(B, 2 * K, N, device=x.device).to(x.dtype)
        self.maps = torch.empty(B, K, N, dtype=x.dtype, device=x.device)
        self.sums = torch.empty_like(self.codewords)  # (B, K, D)
        self.dx = torch.empty_like(x)  # in the layout of x

    def _pass(self, rows: Tensor, x: Tensor) -> None:
        torch.bmm(rows, x, out=self.maps)
        torch.bmm(self.maps, x.transpose(1, 2), out=self.sums)

    @torch.no_grad()
    def forward(self, tensors: tuple[Tensor, ...]) -> None:
        """Run the products of forward."""
        self._pass(self.codewords, tensors[0])

    @torch.no_grad()
    def forward_backward(self, tensors: tuple[Tensor, ...]) -> None:
        """Run the products of forward and backward."""
        self._pass(self.codewords, tensors[0])
        self._pass(self.grad, tensors[0])
        if self.dx.stride(1) == 1:
            torch.bmm(self.columns.transpose(1, 2), self.rows, out=self.dx.transpose(1, 2))
        else:
            torch.bmm(self.rows.transpose(1, 2), self.columns, out=self.dx)


def inputs(
    shape: Shape, layout: str, dtype: torch.dtype = torch.float32, device: str = "cpu", saturated: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Random x (B, D, N) in a dtype, codewords (K, D) and learned smoothing (K,) in fp32, all with gradients.

    saturated: each pixel belongs to one or two codewords, and 7 to 10 % of the weights are below the smallest normal
    number.
    """
    B, N, D, K = shape
    if layout == "channels_last":
        x = torch.randn(B, N, D, dtype=dtype, device=device).transpose(1, 2)
    else:
        x = torch.randn(B, D, N, dtype=dtype, device=device)
    codewords, smoothing = torch.randn(K, D, device=device) / 4, torch.rand(K, device=device) / D
    if saturated:  # a pixel's logits then differ by 28 in the root mean square
        smoothing = 56 * (1 + smoothing) / D**0.5
    tensors = x, codewords, smoothing
    return tuple(tensor.requires_grad_() for tensor in tensors)  # type: ignore[return-value]


def forward(encode: Encode, tensors: tuple[Tensor, ...]) -> Tensor:
    """Run without a graph for backward."""
    with torch.no_grad():
        return encode(*tensors)


def gradients(encode: Encode, tensors: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """Run forward and backward."""
    return torch.autograd.grad(encode(*tensors), tensors, grad)


def results(encode: Encode, tensors: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """Return the encoding and its three gradients."""
    return encode(*tensors).detach(), *gradients(encode, tensors, grad)


def exact(encode: Encode, tensors: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """Return a form's results in fp64."""
    return results(encode, tuple(tensor.detach().double().requires_grad_() for tensor in tensors), grad.double())


def error(encode: Encode, tensors: tuple[Tensor, ...], grad: Tensor, wanted: tuple[Tensor, ...]) -> float:
    """Return the largest error of the results, each relative to its own largest value; NaN stays NaN."""
    errors = [
        (g.double() - w).abs().max() / w.abs().max()
        for g, w in zip(results(encode, tensors, grad), wanted, strict=True)
    ]
    return float(torch.stack(errors).max())


def check_operator(device: str) -> float:
    """Exit if ctxenc's operator is wrong in this process; every result needs this check.

    Returns:
        The largest error in fp32 of the encoding and the gradients over some shapes, both layouts, with and without an offset,
        relative to the largest value of each.

    Raises:
        SystemExit: the error exceeds TOLERANCE.
    """
    errors = {}
    for shape in CHECKED:
        for layout in LAYOUTS:
            for offset in (0.0, 100.0):
                torch.manual_seed(0)
                x, codewords, smoothing = (tensor.detach() for tensor in inputs(shape, layout, device=device))
                tensors = tuple(tensor.requires_grad_() for tensor in (x + offset, codewords + offset, smoothing))
                grad = torch.randn(shape[0], shape[3], shape[2], device=device)
                wanted = exact(expanded, tensors, grad)
                errors[shape, layout, offset] = error(ctxenc.encode, tensors, grad, wanted)
    if wrong := {case: value for case, value in errors.items() if not value <= TOLERANCE[torch.float32]}:
        raise SystemExit(f"no speed is reported for a wrong result: {wrong}")
    return max(errors.values())
