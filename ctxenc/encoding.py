"""Define the Encoding layer.

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

from ctxenc.functional import AGGREGATIONS, encode
from ctxenc.kernels.torch_encode import encode_plainly

STARTS = ("paper", "spread")
SPREAD_PIXELS = 256  # drawn by "spread" to set the smoothing
SAMPLED_EVAL_SMOOTHING = 0.5  # the mean of U(0, 1), used in evaluation in place of the draw


@torch.jit.unused
def is_traced(x: Tensor) -> bool:
    """Return whether x is a torch.fx proxy, which has no shape to read."""
    return isinstance(x, torch.fx.Proxy)


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Run compiled modules eagerly inside the block: torch.compile ignores hooks added after compilation."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled unless this package was imported
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _draw_smoothing(x: Tensor, like: Tensor, num_codes: int) -> Tensor:
    """Draw smoothing (K,) from U(0, 1). The unused x makes a torch.fx graph draw at every call, not once at tracing."""
    return torch.rand(num_codes, device=like.device, dtype=like.dtype)


def _encode(x: Tensor, codewords: Tensor, smoothing: Tensor, aggregation: str = "sum") -> Tensor:
    """Encode as a node of a torch.fx graph. TorchScript can compile it, as it takes no keyword-only arguments."""
    if torch.jit.is_scripting():
        x = x.flatten(2)
        encoding = encode_plainly(x, codewords, smoothing)
        return encoding / x.shape[2] if aggregation == "mean" else encoding
    return encode(x, codewords, smoothing, aggregation=aggregation)


torch.fx.wrap("_encode")  # encode checks shapes, and a traced graph has none
torch.fx.wrap("_draw_smoothing")


class Encoding(nn.Module):
    """Encode features as sums of residuals to a learned codebook, with soft assignment of every pixel.

    State: `codewords`, a parameter (K, C), initialised from U(-a, a) with a = 1 / sqrt(K * C); `smoothing`, a parameter
    (K,) if learned, else a buffer ().

    Args:
        channels: C, channels of the input.
        num_codes: K, number of codewords.
        smoothing: "learned": one parameter per codeword, initialised from U(0, 1); it is unbounded and may become
            negative. "sampled": drawn from U(0, 1) per codeword at every training forward, 0.5 in evaluation (the
            paper's regulariser). A positive number: fixed (the paper takes 0.5).
        aggregation: of the residuals over the pixels: "sum", as in the papers, or "mean", independent of the map's
            size.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (B, C, *spatial) -> (B, K, C), fp32, or fp64 if the input or a parameter is fp64.

    Raises:
        ValueError: a size is not positive, or smoothing or aggregation is not one of the above.
        TypeError: a size is not an integer, or smoothing is neither a string nor a number.
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
        super().__setstate__({"aggregation": "sum"} | state)  # layers pickled before this option existed lack it

    def reset_parameters(self) -> None:
        """Initialise the codewords and the smoothing again."""
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
        """Return the parameters that timm's optimizers should not decay, if this layer is the whole model."""
        return {"codewords", "smoothing"}

    def extra_repr(self) -> str:
        """Return sizes and smoothing, for print()."""
        return f"{self.channels}, num_codes={self.num_codes}, smoothing={self.mode}, aggregation={self.aggregation}"


@torch.no_grad()
def spread_codebook(name: str, encoding: Encoding, norm: nn.Module, act: nn.Module) -> None:
    """Initialise a codebook from the distribution of its features: act(norm(x)) of normal x, as a projection gives them.

    The codewords are such features. So that pixels differ in their assignment, the smoothing is 2 over the standard deviation of
    |z - d_k|^2 over k, on average over features z. A smoothing that is not learned stays, and the norm's weight and bias are scaled
    instead. A single codeword owns every pixel: nothing changes.

    Raises:
        ValueError: the smoothing is not learned, and the norm has no weight to scale.
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
    affine = [each for each in (getattr(norm, "weight", None), getattr(norm, "bias", None)) if each is not None]
    if not (learned or affine):
        norm_name = f"{type(norm).__name__} without a weight"
        raise ValueError(f"{name}: start must be 'paper' for a fixed smoothing behind {norm_name}, got 'spread'")
    pixels, initial = draw(SPREAD_PIXELS), draw(encoding.num_codes)
    distances = torch.cdist(pixels, initial, compute_mode="donot_use_mm_for_euclid_dist")  # avoids (pixels, K, C)
    smoothing = 2 / distances.square().std(1, correction=0).mean().clamp(min=1e-6)
    if learned:
        encoding.smoothing.fill_(smoothing)
    else:
        for parameter in affine:
            parameter.mul_((smoothing / encoding.smoothing).sqrt())
    codewords.copy_(draw(encoding.num_codes))


def check_sizes(name: str, **sizes: int) -> None:
    """Check that sizes are positive integers.

    Raises:
        ValueError: a size is zero or negative.
        TypeError: a size is not an integer.
    """
    for argument, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool):
            raise TypeError(f"{name}: {argument} must be a positive integer, got {size!r}")
        if size < 1:
            raise ValueError(f"{name}: {argument} must be a positive integer, got {size}")


def check_ratio(name: str, rd_ratio: float) -> None:
    """Check that rd_ratio is a positive finite number.

    Raises:
        ValueError: rd_ratio is not positive and finite.
        TypeError: rd_ratio is not a number.
    """
    if not isinstance(rd_ratio, Real) or isinstance(rd_ratio, bool):
        raise TypeError(f"{name}: rd_ratio must be a positive number, got {rd_ratio!r}")
    if not 0 < rd_ratio < math.inf:
        raise ValueError(f"{name}: rd_ratio must be a positive number, got {rd_ratio}")


def check_choice(name: str, choices: Sequence[str], **settings: str) -> None:
    """Check that a setting is one of `choices`.

    Raises:
        ValueError: it is not.
    """
    for argument, value in settings.items():
        if value not in choices:
            raise ValueError(f"{name}: {argument} must be one of {', '.join(choices)}, got {value!r}")


def check_smoothing(smoothing: str | float, name: str) -> None:
    """Check that smoothing is "learned", "sampled" or a positive finite number.

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


def reduce_channels(channels: int, rd_ratio: float, rd_divisor: int) -> int:
    """Return the multiple of rd_divisor nearest to channels * rd_ratio, at least one rd_divisor: timm's rule for SE."""
    return max(rd_divisor, int(channels * rd_ratio + rd_divisor / 2) // rd_divisor * rd_divisor)
