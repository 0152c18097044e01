"""Define the Context-Encoding block, a replacement for Squeeze-and-Excitation.

SE squeezes a map to its mean. This block encodes it with a learned codebook: it assigns every pixel softly to the codewords, sums
the residuals, and computes the channel gates from the sums. EncNet (arXiv 1803.08904), sections 3.1 and 4.3 (the CIFAR block).
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxenc.encoding import (
    AGGREGATIONS,
    STARTS,
    Encoding,
    check_choice,
    check_sizes,
    check_smoothing,
    is_traced,
    spread_codebook,
)
from ctxenc.functional import fused_gate, fused_pool, fused_projection, fuses_gate, fuses_pool, fuses_projection
from ctxenc.kernels.backends import makes_saved_graph

Layer = Callable[..., nn.Module]

GATES: dict[str, Layer] = {
    "sigmoid": nn.Sigmoid,
    "hard_sigmoid": nn.Hardsigmoid,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}
POOLS = ("mean", "concat")
# For the norm over the codewords. Means over N pixels have 1 / N^2 of the variance of sums: 1e-5 would hide it.
MEAN_EPS = 1e-10


def _gate(layer: str | Layer | nn.Module) -> nn.Module:
    if isinstance(layer, nn.Module):
        return layer
    if isinstance(layer, str):
        if layer not in GATES:
            raise ValueError(
                f"ContextEncoding: gate_layer must be one of {', '.join(GATES)}, a class or a module, got {layer!r}"
            )
        layer = GATES[layer]
    if not callable(layer):
        raise TypeError(f"ContextEncoding: gate_layer must be a name, a class or a module, got {layer!r}")
    return layer()


def reduced_channels(channels: int, rd_ratio: float, rd_divisor: int) -> int:
    """Return the multiple of rd_divisor nearest to channels * rd_ratio, at least one rd_divisor: timm's rule for SE."""
    return max(rd_divisor, int(channels * rd_ratio + rd_divisor / 2) // rd_divisor * rd_divisor)


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


def _takes_statistics(norm: nn.Module) -> bool:
    """Return whether a norm is a BatchNorm that will take batch statistics; SyncBatchNorm counts other processes' samples too."""
    return (
        norm.training and isinstance(norm, nn.modules.batchnorm._BatchNorm) and not isinstance(norm, nn.SyncBatchNorm)
    )


def _must_be_called(module: nn.Module) -> bool:
    """Return whether this module must be called: it has a hook, a global hook exists, or its forward was replaced."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__ or nn.modules.module._has_any_global_hook()


def _check_batch(x: Tensor, rd_channels: int, conv_norm: bool, code_norm: bool) -> None:
    """Refuse one value per channel in training, as BatchNorm does, but before any running statistic changes."""
    if x.dim() != 4:
        raise ValueError(f"ContextEncoding: x must have shape (B, C, H, W), got {tuple(x.shape)}")
    one_pixel = conv_norm and x.shape[0] * x.shape[2] * x.shape[3] == 1
    if one_pixel or (code_norm and x.shape[0] * rd_channels == 1):
        raise ValueError(
            "ContextEncoding: in training x must give BatchNorm more than one value a channel, i.e. more than one sample or"
            f" pixel, got x of shape {list(x.shape)} with {rd_channels} reduced channels; use a larger batch, or eval()"
        )


def _is_product(conv: nn.Conv2d) -> bool:
    """Return whether a 1x1 convolution takes every pixel once; user-set stride or padding encodes another map."""
    return conv.stride == (1, 1) and conv.padding == (0, 0)


def _coarsen(x: Tensor, max_size: int) -> Tensor:
    """Average-pool a map (B, C, H, W) to at most max_size x max_size."""
    height, width = min(x.shape[2], max_size), min(x.shape[3], max_size)
    # A saved graph may run at any size, so it pools in the form for any size, and copies maps that already fit.
    if torch.jit.is_scripting() or not makes_saved_graph():
        if height == x.shape[2] and width == x.shape[3]:
            return x
        if x.numel() > 0 and x.shape[2] % height == 0 and x.shape[3] % width == 0:
            # The same values. Its backward is deterministic on CUDA, that of the adaptive form is not.
            return F.avg_pool2d(x, (x.shape[2] // height, x.shape[3] // width))
    return F.adaptive_avg_pool2d(x, (height, width))


torch.fx.wrap("_coarsen")  # it reads shapes, and a traced graph has none


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """Return norm(x), computed in the dtype of its statistics and cast back.

    FSDP's mixed precision lowers the parameters but not the statistics, and BatchNorm accepts no two dtypes beside x's.
    """
    if is_traced(x):
        return norm(x)
    statistics = getattr(norm, "running_var", None)
    dtype = x.dtype if statistics is None else statistics.dtype
    affine = {name: getattr(norm, name) for name in ("weight", "bias") if getattr(norm, name, None) is not None}
    if all(each.dtype == dtype for each in (x, *affine.values())):
        return norm(x)
    own = vars(norm)  # FSDP1 puts its tensors here, out of reach of torch.func.functional_call
    held = {name: own[name] for name in affine if name in own}
    own.update({name: each.to(dtype) for name, each in affine.items()})  # these hide the parameters for one call
    try:
        return norm(x.to(dtype)).to(x.dtype)
    finally:
        for name in affine:
            del own[name]
        own.update(held)


Projection = nn.Conv2d  # pickles of whole blocks use this name for the projection's class


class ContextEncoding(nn.Module):
    """Gate the channels of a map by its encoding of the whole image: x * gate(linear(pool(encode(project(x))))).

    The block encodes a projection to C' channels: z = act(norm(conv1x1(x))), e = encode(z) / N. Pooling "mean" takes
    the mean over the codewords of relu(norm over K(e)), as in EncNet's segmentation module. Pooling "concat" takes the
    L2-normalised flattened encoding, as in EncNet's CIFAR block.

    A drop-in replacement for timm's attention layers, for example in
    `timm.create_model("resnet50", block_args=dict(attn_layer=ContextEncoding))`.

    Args:
        channels: C, channels of the map.
        num_codes: K, number of codewords.
        rd_ratio: C' / C, used if rd_channels is None.
        rd_channels: C', channels of the projection that is encoded.
        rd_divisor: C' = C * rd_ratio is rounded to a multiple of this.
        smoothing: "learned", "sampled" or a positive number; see Encoding.
        pool: "mean" or "concat".
        aggregation: of the residuals over the pixels: "mean" makes the gates independent of the image size; "sum" is
            the papers' code. Pooling "concat" gives the same result for both.
        max_size: average-pool a larger map to at most max_size x max_size before the projection; the gate still applies
            to the whole map. None encodes every pixel.
        start: initial codebook. "paper": codewords from U(-a, a), a = 1 / sqrt(K C'), smoothing from U(0, 1). "spread":
            codewords from the initial distribution of the projected features, and a smoothing at which the assignments
            of pixels differ.
        act_layer: activation after the projection, ReLU by default.
        norm_layer: norm after the projection, BatchNorm2d by default.
        gate_layer: "sigmoid", "hard_sigmoid", "tanh", "identity", a class or a module.
        channels_last: the map is (B, H, W, C), as in networks with timm's SqueezeExciteCl.
        residual: the output is relu(x + x * gate) instead of x * gate, as in EncNet's segmentation head.
        device: of the parameters.
        dtype: of the parameters; the norm over the codewords stays fp32 if this is half precision.

    Shape:
        (B, C, H, W) -> the same, in x's dtype; or (B, H, W, C) with channels_last.

    Raises:
        ValueError: a size or ratio is not positive, or pool, smoothing or gate_layer is unknown; in a training forward,
            also if the batch is one sample of one pixel.
        TypeError: a size is not an integer, or another argument has the wrong type.
    """

    rd_channels: Final[int]
    pool: Final[str]
    channels_last: Final[bool]
    residual: Final[bool]
    max_size: int | None
    start: str

    def __init__(
        self,
        channels: int,
        num_codes: int = 16,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        smoothing: str | float = "learned",
        pool: str = "mean",
        aggregation: str = "mean",
        max_size: int | None = None,
        start: str = "paper",
        act_layer: Layer | None = None,
        norm_layer: Layer | None = None,
        gate_layer: str | Layer | nn.Module = "sigmoid",
        channels_last: bool = False,
        residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("ContextEncoding", channels=channels, num_codes=num_codes, rd_divisor=rd_divisor)
        check_ratio("ContextEncoding", rd_ratio)
        if rd_channels is None:
            rd_channels = reduced_channels(channels, rd_ratio, rd_divisor)
        check_sizes("ContextEncoding", rd_channels=rd_channels)
        check_choice("ContextEncoding", POOLS, pool=pool)
        check_smoothing(smoothing, "ContextEncoding")
        check_choice("ContextEncoding", AGGREGATIONS, aggregation=aggregation)
        check_choice("ContextEncoding", STARTS, start=start)
        if max_size is not None:
            check_sizes("ContextEncoding", max_size=max_size)
        gate = _gate(gate_layer)
        for argument, layer in {"act_layer": act_layer, "norm_layer": norm_layer}.items():
            if layer is not None and not callable(layer):
                raise TypeError(f"ContextEncoding: {argument} must be a class or a function, got {layer!r}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.replaced: Any = None  # set by patch_se_blocks
        self.channels = channels
        self.num_codes = num_codes
        self.rd_channels = rd_channels
        self.pool = pool
        self.channels_last = channels_last
        self.residual = residual
        self.max_size = max_size
        self.start = start
        self.conv = nn.Conv2d(channels, rd_channels, 1, bias=False, **dd)
        self.norm: nn.Module = (norm_layer or nn.BatchNorm2d)(rd_channels, **dd)
        # A custom norm may keep its output for backward; BatchNorm keeps its input.
        self.act = act_layer() if act_layer is not None else nn.ReLU(inplace=norm_layer is None)
        self.unfused: Any = None  # set by fuse(): the folded convolution and norm, not part of the model
        self.encoding = Encoding(rd_channels, num_codes, smoothing, aggregation, **dd)
        # SyncBN, SplitBN and freezing look for BatchNorm2d and overlook BatchNorm1d, so the norm over K takes (B, K,
        # C', 1).
        self.norm_codes: nn.Module = nn.Identity()
        if pool == "mean":
            half = (dtype or torch.get_default_dtype()).itemsize < 4
            eps = MEAN_EPS if aggregation == "mean" else 1e-5
            self.norm_codes = nn.BatchNorm2d(num_codes, eps, device=device, dtype=torch.float32 if half else dtype)
        features = rd_channels if pool == "mean" else num_codes * rd_channels
        self.fc = nn.Linear(features, channels, **dd)
        self.gate = gate
        if start == "spread":
            spread_codebook("ContextEncoding", self.encoding, self.norm, self.act)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Older pickled blocks lack these options.
        super().__setstate__({"max_size": None, "start": "paper"} | state)

    @classmethod
    def paper(cls, channels: int, num_codes: int, **kwargs: Any) -> "ContextEncoding":
        """Build the block of EncNet's CIFAR networks (arXiv 1803.08904), section 4.3: C' = C / 4, "concat", "sampled".

        Args:
            channels: C, channels of the map.
            num_codes: K, number of codewords.
            **kwargs: any other argument of ContextEncoding.
        """
        check_sizes("ContextEncoding.paper", channels=channels, num_codes=num_codes)
        layers: dict[str, Any] = {"pool": "concat", "smoothing": "sampled", "start": "paper"}
        return cls(channels, num_codes, **({"rd_channels": max(1, channels // 4)} | layers | kwargs))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ContextEncoding":
        """Convert like nn.Module, but keep the norm over the codewords in fp32 if the rest becomes half precision.

        Its running variance may come from sums over thousands of pixels, which half() would turn into infinities.
        """

        def keep_fp32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            lowered = moved.is_floating_point() and moved.dtype.itemsize < 4 <= tensor.dtype.itemsize
            return tensor.to(moved.device, torch.float32) if lowered else moved

        if recurse:
            for child in self.children():
                child._apply(keep_fp32 if child is self.norm_codes else fn)
        return super()._apply(fn, recurse=False)

    @torch.no_grad()
    def fuse(self) -> "ContextEncoding":
        """Fold the norm into the convolution, with its evaluation statistics, for deployment; unfuse() reverts it.

        timm's `reparameterize_model` calls it. It works in place: `conv` gets a bias and `norm` becomes an Identity, in
        the state dict too. A block stays as it is if it is already fused, if its norm is not a BatchNorm with running
        statistics, or if its projection is not a plain Conv2d (a LoRA wrapper, say). On a GPU, a fused block with its
        default ReLU projects and encodes in one kernel, in half precision with gradients disabled.

        Returns:
            This block.
        """
        norm: Any = self.norm
        plain = type(self.conv) is nn.Conv2d and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
        if not plain or norm.running_var is None:
            return self
        wide = torch.promote_types(self.conv.weight.dtype, torch.float32)
        scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
        shift = -norm.running_mean.to(wide) * scale
        if norm.affine:
            scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
        if self.conv.bias is not None:  # a user-replaced convolution may have a bias
            shift = shift + scale * self.conv.bias
        conv = nn.Conv2d(self.conv.in_channels, self.rd_channels, 1, device="meta", dtype=self.conv.weight.dtype)
        conv.weight = nn.Parameter((self.conv.weight * scale[:, None, None, None]).to(self.conv.weight))
        conv.bias = nn.Parameter(shift.to(self.conv.weight.dtype))
        conv.stride, conv.padding = self.conv.stride, self.conv.padding
        conv.requires_grad_(self.conv.weight.requires_grad).train(self.training)
        self.unfused = (self.conv, norm)
        self.conv, self.norm = conv, nn.Identity()
        return self

    def unfuse(self) -> "ContextEncoding":
        """Revert fuse(): restore the convolution and the norm of that time, on the present device and in the present dtype.

        Returns:
            This block, unchanged if it is not fused.
        """
        if self.unfused is not None:
            weight = self.conv.weight
            self.conv, self.norm = (part.to(weight.device, weight.dtype) for part in self.unfused)
            self.unfused = None
            self.train(self.training)
        return self

    def _encode(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self._fuses_projection(x):
            shift: Any = self.conv.bias
            codebook = self.encoding.codewords, self.encoding.smoothing
            return fused_projection(x, self.conv.weight, shift, *codebook, self.aggregation)
        return self.encoding(self.act(self.norm(self.conv(x))))

    @torch.jit.unused
    def _fuses_projection(self, x: Tensor) -> bool:
        """Return whether one kernel projects and encodes: in a fused block without replaced parts or parts that must be called."""
        parts = (self.conv, self.norm, self.act, self.encoding)
        own = [type(part) for part in parts] == [nn.Conv2d, nn.Identity, nn.ReLU, Encoding]
        if not own or is_traced(x) or any(_must_be_called(part) for part in parts):
            return False
        encoding, shift = self.encoding, self.conv.bias
        if shift is None or not _is_product(self.conv) or (encoding.sampled and encoding.training):
            return False
        return fuses_projection(x, self.conv.weight, shift, encoding.codewords, encoding.smoothing)

    @torch.jit.unused
    def _fuses_pool(self, encoding: Tensor) -> bool:
        """Return whether norm, ReLU and mean over the codewords are fused: only if the norm need not be called."""
        norm = self.norm_codes
        return not _must_be_called(norm) and not is_traced(encoding) and fuses_pool(encoding, norm)

    def features(self, x: Tensor) -> Tensor:
        """Compute the input of the gate from x (B, C, H, W): (B, C') for "mean", (B, K * C') for "concat"; fp32 or x's dtype."""
        max_size = self.max_size
        if max_size is not None:
            x = _coarsen(x, max_size)
        if not torch.jit.is_scripting() and not torch.jit.is_tracing() and not is_traced(x):
            _check_batch(x, self.rd_channels, _takes_statistics(self.norm), _takes_statistics(self.norm_codes))
        encoding = self._encode(x)
        if self.pool == "mean":
            if not torch.jit.is_scripting() and self._fuses_pool(encoding):
                return fused_pool(encoding, self.norm_codes, x.dtype)
            encoding = encoding.unsqueeze(3)
            if torch.jit.is_scripting():
                encoding = self.norm_codes(encoding)
            else:
                encoding = _normed(self.norm_codes, encoding)
            return encoding.squeeze(3).relu().mean(1)
        return F.normalize(encoding.flatten(1), dim=1)

    @torch.jit.unused
    def _fuses_gate(self, x: Tensor, logits: Tensor) -> bool:
        """Return whether the product is fused: only for a plain sigmoid gate, as hooks need a call."""
        gate = self.gate
        return type(gate) is nn.Sigmoid and not _must_be_called(gate) and not is_traced(x) and fuses_gate(x, logits)

    def gated(self, x: Tensor, features: Tensor) -> Tensor:
        """Return the output for x (B, C, H, W) and features, the result of features(x)."""
        logits = self.fc(features.to(x.dtype))
        if not torch.jit.is_scripting() and self._fuses_gate(x, logits):
            return fused_gate(x, logits, self.residual)
        gated = x * self.gate(logits).to(x.dtype)[:, :, None, None]
        # Not relu, which saves its output: the next layer may change that in place.
        return F.threshold(x + gated, 0.0, 0.0) if self.residual else gated

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x = x.permute(0, 3, 1, 2)
        x = self.gated(x, self.features(x))
        return x.permute(0, 2, 3, 1) if self.channels_last else x

    __jit_unused_properties__: ClassVar[list[str]] = ["smoothing", "aggregation"]

    @property
    def aggregation(self) -> str:
        """The `aggregation` argument of this block."""
        return self.encoding.aggregation

    @property
    def smoothing(self) -> str | float:
        """The `smoothing` argument of this block."""
        return self.encoding.mode

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm's optimizers should not decay, if this block is the whole model."""
        return {"encoding.codewords", "encoding.smoothing"}

    def extra_repr(self) -> str:
        """Return sizes, for print()."""
        sizes = f"{self.channels}, num_codes={self.num_codes}, rd_channels={self.rd_channels}, pool={self.pool}"
        return sizes + (f", max_size={self.max_size}" if self.max_size else "")
