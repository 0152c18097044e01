"""The Encoding layer.

Deep TEN: Texture Encoding Network (arXiv 1612.02844); Context Encoding for Semantic Segmentation (arXiv 1803.08904), section 3.1.
"""

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, Final

import torch
from torch import Tensor, nn

from ctxenc.functional import encode
from ctxenc.kernels.torch_encode import encode_plainly

AGGREGATIONS = ("sum", "mean")
STARTS = ("paper", "spread")
SPREAD_PIXELS = 256  # that "spread" draws to set the smoothing by
SAMPLED_EVAL_SMOOTHING = 0.5  # the mean of U(0, 1), which takes the draw's place in evaluation


@torch.jit.unused
def is_traced(x: Tensor) -> bool:
    """Whether x stands for a tensor in a torch.fx graph, which has no shape to look at."""
    return isinstance(x, torch.fx.Proxy)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled modules run eagerly meanwhile, for torch.compile leaves out the hooks that came after it."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled where its package was never imported
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _draw_smoothing(x: Tensor, like: Tensor, num_codes: int) -> Tensor:
    """Smoothing (K,) from U(0, 1). It takes x so that a torch.fx graph draws at every call, not once when it is traced."""
    return torch.rand(num_codes, device=like.device, dtype=like.dtype)


def _encode(x: Tensor, codewords: Tensor, smoothing: Tensor, aggregation: str = "sum") -> Tensor:
    """Encode, as a node of a torch.fx graph that TorchScript can compile: it takes no keyword-only arguments."""
    if torch.jit.is_scripting():
        encoding = encode_plainly(x.flatten(2), codewords, smoothing)
    else:
        encoding = encode(x, codewords, smoothing)
    return encoding / pixels_of(x) if aggregation == "mean" else encoding


def pixels_of(x: Tensor) -> int:
    """Count the pixels of a map (B, C, *spatial): N."""
    pixels = 1
    for size in x.shape[2:]:
        pixels *= size
    return pixels


torch.fx.wrap("_encode")  # the checks of encode look at shapes, which a traced graph does not have
torch.fx.wrap("_draw_smoothing")


class Encoding(nn.Module):
    """Encodes features as sums of residuals to a learned codebook, each pixel softly assigned to its codewords.

    State: `codewords` (K, C), a parameter that starts in U(-a, a), a = 1 / sqrt(K * C); `smoothing`, a parameter (K,) where it
    is learned, else a buffer ().

    Args:
        channels: C, channels of the input.
        num_codes: K, number of codewords.
        smoothing: "learned": a parameter a codeword, started in U(0, 1); nothing holds it there, and it may end negative.
            A positive number: fixed (the paper takes 0.5).
            "sampled": drawn from U(0, 1) a codeword at every training forward, 0.5 in evaluation (the paper's regulariser).
        aggregation: of the residuals over the pixels: "sum", as in the papers, or "mean", which does not depend on the map's size.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (B, C, *spatial) -> (B, K, C), fp32 or fp64 whatever the input's dtype.

    Raises:
        ValueError: a size is not positive, or smoothing or aggregation is none of the above.
        TypeError: a size is no integer, or smoothing is neither a string nor a number.
    """

    smoothing: Tensor
    sampled: Final[bool]
    aggregation: str

    def __init__(
        self,
        channels: int,
        num_codes: int = 32,
        smoothing: str | float = "learned",
        aggregation: str = "sum",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("Encoding", channels=channels, num_codes=num_codes)
        check_smoothing(smoothing, "Encoding")
        check_choice("Encoding", AGGREGATIONS, aggregation=aggregation)
        self.aggregation = aggregation
        self.channels = channels
        self.num_codes = num_codes
        self.sampled = smoothing == "sampled"
        self.mode = smoothing if isinstance(smoothing, str) else float(smoothing)
        self.codewords = nn.Parameter(torch.empty(num_codes, channels, device=device, dtype=dtype))
        if smoothing == "learned":
            self.smoothing = nn.Parameter(torch.empty(num_codes, device=device, dtype=dtype))
        else:
            self.register_buffer("smoothing", torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"aggregation": "sum"} | state)  # pickled layers may be older than this option

    def reset_parameters(self) -> None:
        """Start the codewords and the smoothing afresh."""
        bound = 1 / math.sqrt(self.num_codes * self.channels)
        nn.init.uniform_(self.codewords, -bound, bound)
        if isinstance(self.smoothing, nn.Parameter):
            nn.init.uniform_(self.smoothing, 0, 1)
        else:
            self.smoothing.fill_(SAMPLED_EVAL_SMOOTHING if isinstance(self.mode, str) else self.mode)

    def forward(self, x: Tensor) -> Tensor:
        smoothing = self.smoothing
        if self.sampled and self.training:
            smoothing = _draw_smoothing(x, smoothing, self.num_codes)
        return _encode(x, self.codewords, smoothing, self.aggregation)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that timm's optimizers should not decay, where this layer is the whole model."""
        return {"codewords", "smoothing"}

    def extra_repr(self) -> str:
        """Sizes and smoothing, for print()."""
        return f"{self.channels}, num_codes={self.num_codes}, smoothing={self.mode}, aggregation={self.aggregation}"


@torch.no_grad()
def spread_codebook(name: str, encoding: Encoding, norm: nn.Module, act: nn.Module) -> None:
    """Start a codebook where its features are: at act(norm(x)) of normal x, as a projection gives them.

    Codewords are drawn as such features. The smoothing is 2 / the deviation of |z - d_k|^2 over the codewords, for a feature z,
    so that pixels differ in their assignment. A fixed smoothing is kept: the norm's weight and bias are scaled instead.
    A single codeword owns every pixel, and stays.

    Raises:
        ValueError: the smoothing is not learned, and the norm has nothing to scale.
    """
    if encoding.num_codes == 1:
        return
    codewords, norm_of_projection = encoding.codewords, norm

    def draw(pixels: int) -> Tensor:
        norm, activation = copy.deepcopy(norm_of_projection).eval(), copy.deepcopy(act)
        projected = torch.randn(1, encoding.channels, pixels, 1, device=codewords.device, dtype=codewords.dtype)
        features = activation(norm(projected)).flatten(2).squeeze(0).t()
        return features.to(torch.promote_types(codewords.dtype, torch.float32))

    learned = isinstance(encoding.smoothing, nn.Parameter)
    scaled = [each for each in (getattr(norm, "weight", None), getattr(norm, "bias", None)) if each is not None]
    if not (learned or scaled):
        what = f"{type(norm).__name__} without a weight"
        raise ValueError(f"{name}: start must be 'paper' for a fixed smoothing behind {what}, got 'spread'")
    pixels, started = draw(SPREAD_PIXELS), draw(encoding.num_codes)
    distances = torch.cdist(pixels, started, compute_mode="donot_use_mm_for_euclid_dist")  # no (pixels, K, C)
    smoothing = 2 / distances.square().std(1, correction=0).mean().clamp(min=1e-6)
    if learned:
        encoding.smoothing.fill_(smoothing)
    else:
        for parameter in scaled:
            parameter.mul_((smoothing / encoding.smoothing).sqrt())
    codewords.copy_(draw(encoding.num_codes))


def check_sizes(name: str, **sizes: int) -> None:
    """Accept positive integers.

    Raises:
        ValueError: a size is zero or negative.
        TypeError: a size is no integer.
    """
    for argument, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool):
            raise TypeError(f"{name}: {argument} must be a positive integer, got {size!r}")
        if size < 1:
            raise ValueError(f"{name}: {argument} must be a positive integer, got {size}")


def check_choice(name: str, choices: Sequence[str], **given: str) -> None:
    """Accept a setting that is one of `choices`.

    Raises:
        ValueError: it is none of them.
    """
    for argument, value in given.items():
        if value not in choices:
            raise ValueError(f"{name}: {argument} must be one of {', '.join(choices)}, got {value!r}")


def check_smoothing(smoothing: str | float, name: str) -> None:
    """Accept "learned", "sampled" and positive finite numbers.

    Raises:
        ValueError: another string, or a number that is not positive and finite.
        TypeError: neither a string nor a number.
    """
    rule = f'{name}: smoothing must be "learned", "sampled" or a positive number'
    if isinstance(smoothing, str):
        if smoothing not in ("learned", "sampled"):
            raise ValueError(f"{rule}, got {smoothing!r}")
    elif isinstance(smoothing, bool) or not isinstance(smoothing, Real):
        raise TypeError(f"{rule}, got {type(smoothing).__name__}")
    elif not 0 < smoothing < math.inf:
        raise ValueError(f"{rule}, got {smoothing!r}")
