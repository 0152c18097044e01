"""The Context-Encoding block, which takes the place of Squeeze-and-Excitation.

Where SE squeezes a map to its mean, this block encodes it: a learned codebook, a soft assignment of every pixel to it, and the
sums of residuals, from which the channel gates are computed. EncNet (arXiv 1803.08904), sections 3.1 and 4.3 (the CIFAR block).
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
    pixels_of,
    spread_codebook,
)
from ctxenc.functional import fused_gate, fused_pool, fused_projection, fuses_gate, fuses_pool, fuses_projection

Layer = Callable[..., nn.Module]

GATES: dict[str, Layer] = {
    "sigmoid": nn.Sigmoid,
    "hard_sigmoid": nn.Hardsigmoid,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}
POOLS = ("mean", "concat")
# Of the norm over the codewords. Means over N pixels have 1 / N^2 of the variance of sums: 1e-5 would hide it.
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
    """The multiple of rd_divisor nearest to channels * rd_ratio, one rd_divisor at least: timm's rule for SE."""
    return max(rd_divisor, int(channels * rd_ratio + rd_divisor / 2) // rd_divisor * rd_divisor)


def check_ratio(name: str, rd_ratio: float) -> None:
    """Accept positive finite numbers.

    Raises:
        ValueError: rd_ratio is not positive and finite.
        TypeError: rd_ratio is no number.
    """
    if not isinstance(rd_ratio, Real) or isinstance(rd_ratio, bool):
        raise TypeError(f"{name}: rd_ratio must be a positive number, got {rd_ratio!r}")
    if not 0 < rd_ratio < math.inf:
        raise ValueError(f"{name}: rd_ratio must be a positive number, got {rd_ratio}")


def _takes_statistics(norm: nn.Module) -> bool:
    """Whether a norm is a BatchNorm that will take those of the batch; SyncBatchNorm counts the other processes' too."""
    return (
        norm.training and isinstance(norm, nn.modules.batchnorm._BatchNorm) and not isinstance(norm, nn.SyncBatchNorm)
    )


def _must_be_called(module: nn.Module) -> bool:
    """Whether something waits for a call of this module: a hook, of its own or of all modules, or a forward put in its place."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__ or nn.modules.module._has_any_global_hook()


def _check_batch(x: Tensor, rd_channels: int, conv_norm: bool, code_norm: bool) -> None:
    """As BatchNorm refuses one value a channel in training, but before a running statistic has changed."""
    if x.dim() != 4:
        raise ValueError(f"ContextEncoding: x must have shape (B, C, H, W), got {tuple(x.shape)}")
    one_pixel = conv_norm and x.shape[0] * x.shape[2] * x.shape[3] == 1
    if one_pixel or (code_norm and x.shape[0] * rd_channels == 1):
        raise ValueError(
            "ContextEncoding: in training x must give BatchNorm more than one value a channel, i.e. more than one sample or"
            f" pixel, got x of shape {list(x.shape)} with {rd_channels} reduced channels; use a larger batch, or eval()"
        )


def _is_product(conv: nn.Conv2d) -> bool:
    """Whether a 1x1 convolution takes every pixel once; who strides or pads one by hand encodes another map."""
    return conv.stride == (1, 1) and conv.padding == (0, 0)


def _coarsen(x: Tensor, max_size: int) -> Tensor:
    """Average-pool a map (B, C, H, W) to max_size x max_size at most."""
    height, width = min(x.shape[2], max_size), min(x.shape[3], max_size)
    return F.adaptive_avg_pool2d(x, (height, width))


torch.fx.wrap("_coarsen")  # which looks at shapes, and a traced graph has none


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x) in the dtype of its statistics, cast back.

    FSDP's mixed precision lowers the parameters and not the statistics, and BatchNorm takes no two dtypes beside x's.
    """
    if is_traced(x):
        return norm(x)
    statistics = getattr(norm, "running_var", None)
    dtype = x.dtype if statistics is None else statistics.dtype
    affine = {name: getattr(norm, name) for name in ("weight", "bias") if getattr(norm, name, None) is not None}
    if all(each.dtype == dtype for each in (x, *affine.values())):
        return norm(x)
    own = vars(norm)  # where FSDP1 puts its tensors, out of reach of torch.func.functional_call
    held = {name: own[name] for name in affine if name in own}
    own.update({name: each.to(dtype) for name, each in affine.items()})  # these hide the parameters, for one call
    try:
        return norm(x.to(dtype)).to(x.dtype)
    finally:
        for name in affine:
            del own[name]
        own.update(held)


Projection = nn.Conv2d  # as the projection's class is called in pickles of whole blocks


class ContextEncoding(nn.Module):
    """Gates the channels of a map by what its encoding says about the whole image: x * gate(linear(pool(encode(project(x))))).

    The encoding is taken of a projection to C' channels: z = act(norm(conv1x1(x))), e = encode(z) / N. Pooling "mean": the
    mean over the codewords of relu(norm over K(e)), as EncNet's segmentation module does. Pooling "concat": the L2-normalised
    flattened encoding, as EncNet's CIFAR block does.

    A drop-in for timm's attention layers, as in `timm.create_model("resnet50", block_args=dict(attn_layer=ContextEncoding))`.

    Args:
        channels: C, channels of the map.
        num_codes: K, number of codewords.
        rd_ratio: C' / C, where rd_channels is not given.
        rd_channels: C', channels that the encoding is taken of.
        rd_divisor: C' = C * rd_ratio is rounded to a multiple of this.
        smoothing: "learned", "sampled" or a positive number; see Encoding.
        pool: "mean" or "concat".
        aggregation: of the residuals over the pixels: "mean", so that the gates do not depend on the size of the image, or "sum",
            as in the papers' code. "concat" takes no notice of it.
        max_size: average-pool a larger map to max_size x max_size at most before it is projected; the gate applies to the whole
            map. None encodes every pixel.
        start: of the codebook. "paper": codewords in U(-a, a), a = 1 / sqrt(K C'), smoothing in U(0, 1). "spread": codewords as the
            projected features are distributed at the start, and a smoothing at which pixels differ in their assignment.
        act_layer: activation after the projection, ReLU by default.
        norm_layer: norm after the projection, BatchNorm2d by default.
        gate_layer: "sigmoid", "hard_sigmoid", "tanh", "identity", a class or a module.
        channels_last: the map is (B, H, W, C), as in the networks that use timm's SqueezeExciteCl.
        residual: the output is relu(x + x * gate) in place of x * gate, as in EncNet's segmentation head.
        device: of the parameters.
        dtype: of the parameters; the norm over the codewords stays fp32 where this is half.

    Shape:
        (B, C, H, W) -> the same, in x's dtype; or (B, H, W, C) with channels_last.

    Raises:
        ValueError: a size or ratio is not positive, or pool, smoothing or gate_layer is unknown; in a training forward, if there
            is one sample of one pixel.
        TypeError: a size is no integer, or another argument is of no such type.
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
        # A norm of the caller's own may keep its output for backward; BatchNorm keeps its input.
        self.act = act_layer() if act_layer is not None else nn.ReLU(inplace=norm_layer is None)
        self.unfused: Any = None  # set by fuse(): the convolution and the norm that it folded, no part of the model
        self.encoding = Encoding(rd_channels, num_codes, smoothing, aggregation, **dd)
        # Over K: as BatchNorm2d of (B, K, C', 1) it is what SyncBN, SplitBN and freezing look for, where BatchNorm1d is overlooked.
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
        # Pickled blocks may be older than these options.
        super().__setstate__({"max_size": None, "start": "paper"} | state)

    @classmethod
    def paper(cls, channels: int, num_codes: int, **kwargs: Any) -> "ContextEncoding":
        """The block of the CIFAR networks in EncNet (arXiv 1803.08904), section 4.3: C' = C / 4, "concat", "sampled".

        Args:
            channels: C, channels of the map.
            num_codes: K, number of codewords.
            **kwargs: any other argument of ContextEncoding.
        """
        check_sizes("ContextEncoding.paper", channels=channels, num_codes=num_codes)
        layers: dict[str, Any] = {"pool": "concat", "smoothing": "sampled", "start": "paper"}
        return cls(channels, num_codes, **({"rd_channels": max(1, channels // 4)} | layers | kwargs))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ContextEncoding":
        """As nn.Module's, but the norm over the codewords stays fp32 where the rest becomes half.

        Its running variance may be that of sums over thousands of pixels, which half() would turn into infinities.
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
        """Fold the norm into the convolution before it, as evaluation applies it, for deployment; unfuse() takes it back.

        timm's `reparameterize_model` calls it. In place: `conv` gets a bias and `norm` becomes an Identity, in the state dict too.
        A block stays as it is if its norm is no BatchNorm with running statistics, if its projection is no plain Conv2d (LoRA has
        wrapped it, say), or if it is fused. On a GPU a fused block with the ReLU of its own projects and encodes in one kernel, in
        half precision where no gradient is wanted.

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
        if self.conv.bias is not None:  # of a convolution that somebody put in its place
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
        """Take fuse() back: the convolution and the norm as they were then, on the present device and in the present dtype.

        Returns:
            This block, as it is if it is not fused.
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
            sums = fused_projection(x, self.conv.weight, shift, self.encoding.codewords, self.encoding.smoothing)
            return sums / pixels_of(x) if self.aggregation == "mean" else sums
        return self.encoding(self.act(self.norm(self.conv(x))))

    @torch.jit.unused
    def _fuses_projection(self, x: Tensor) -> bool:
        """Whether projection and encoding are one kernel: in a fused block where no part is another's or must be called."""
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
        """Whether norm, ReLU and mean over the codewords are fused: only where nothing waits for a call of the norm."""
        norm = self.norm_codes
        return not _must_be_called(norm) and not is_traced(encoding) and fuses_pool(encoding, norm)

    def features(self, x: Tensor) -> Tensor:
        """What the gate is computed from: (B, C') for "mean", (B, K * C') for "concat", of x (B, C, H, W); fp32 or x's dtype."""
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
        """Whether the product is fused: only where the gate is the sigmoid and nothing else, for one with hooks is to be called."""
        gate = self.gate
        return type(gate) is nn.Sigmoid and not _must_be_called(gate) and not is_traced(x) and fuses_gate(x, logits)

    def gated(self, x: Tensor, features: Tensor) -> Tensor:
        """The output for x (B, C, H, W) and what features(x) gave."""
        logits = self.fc(features.to(x.dtype))
        if not torch.jit.is_scripting() and self._fuses_gate(x, logits):
            return fused_gate(x, logits, self.residual)
        gated = x * self.gate(logits).to(x.dtype)[:, :, None, None]
        # relu, which would save its output: the layer behind may change that in place.
        return F.threshold(x + gated, 0.0, 0.0) if self.residual else gated

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x = x.permute(0, 3, 1, 2)
        x = self.gated(x, self.features(x))
        return x.permute(0, 2, 3, 1) if self.channels_last else x

    __jit_unused_properties__: ClassVar[list[str]] = ["smoothing", "aggregation"]

    @property
    def aggregation(self) -> str:
        """The argument `aggregation` that this block was made with."""
        return self.encoding.aggregation

    @property
    def smoothing(self) -> str | float:
        """The argument `smoothing` that this block was made with."""
        return self.encoding.mode

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that timm's optimizers should not decay, where this block is the whole model."""
        return {"encoding.codewords", "encoding.smoothing"}

    def extra_repr(self) -> str:
        """Sizes, for print()."""
        sizes = f"{self.channels}, num_codes={self.num_codes}, rd_channels={self.rd_channels}, pool={self.pool}"
        return sizes + (f", max_size={self.max_size}" if self.max_size else "")
