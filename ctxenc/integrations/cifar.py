"""Define EncNet's CIFAR networks: a small residual network with a Context-Encoding block, an SE block, or nothing in each unit.

Context Encoding for Semantic Segmentation (arXiv 1803.08904), section 4.3.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from ctxenc.context import ContextEncoding, Layer
from ctxenc.encoding import check_sizes
from ctxenc.weight_decay import encoding_parameters


def _build_stage(in_channels: int, channels: int, stride: int, attn_layer: Any) -> nn.Sequential:
    """Build two units; if the first changes the map's shape, its shortcut is a convolution with a bias and no norm."""
    shortcut = nn.Conv2d(in_channels, channels, 1, stride) if stride != 1 or in_channels != channels else None
    return nn.Sequential(
        BasicBlock(in_channels, channels, stride, shortcut, attn_layer=attn_layer),
        BasicBlock(channels, channels, attn_layer=attn_layer),
    )


def _describe_map(module: str, channels: int, reduction: int) -> dict[str, Any]:
    """Return an entry of timm's feature_info."""
    return {"num_chs": channels, "reduction": reduction, "module": module}


class CifarNet(nn.Module):
    """Build the 14-layer residual network of EncNet's CIFAR-10 experiments: three stages of two units, strides 1, 2 and 2.

    A unit is conv3x3 BN ReLU conv3x3 BN, then the attention, then the shortcut and ReLU. After the last unit come BN,
    ReLU, pooling and the linear classifier. Made for 32 x 32 images; any other size works.

    Args:
        num_classes: of the classifier; 0 for no classifier.
        in_chans: channels of the image.
        global_pool: timm's pooling, such as "avg"; "" for no pooling, with num_classes=0.
        widen: the stages have 16, 32 and 64 times this many channels.
        attn_layer: class or function that builds a block from its channels, a timm name, or None.
        drop_rate: dropout before the classifier.

    Shape:
        (B, in_chans, H, W) -> (B, num_classes)

    Raises:
        ValueError: a size is not positive.
        TypeError: a size is not an integer.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        *,
        widen: int = 4,
        attn_layer: str | Layer | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes("CifarNet", in_chans=in_chans, widen=widen)
        width = 16 * widen
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = 4 * width
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = _build_stage(width, width, 1, attn_layer)
        self.layer2 = _build_stage(width, 2 * width, 2, attn_layer)
        self.layer3 = _build_stage(2 * width, 4 * width, 2, attn_layer)
        self.norm: nn.Module = nn.BatchNorm2d(4 * width)
        self.act = nn.ReLU(inplace=True)
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.feature_info = [
            _describe_map("act1", width, 1),
            _describe_map("layer1", width, 1),
            _describe_map("layer2", 2 * width, 2),
            _describe_map("layer3", 4 * width, 4),
        ]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm's optimizers should not decay."""
        return encoding_parameters(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the patterns for timm's parameter groups, by stage if coarse, else by unit."""
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each unit's activations in backward, to save memory."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; num_classes 0 removes it, global_pool None keeps the pooling."""
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.fc.to(self.conv1.weight).train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of feature_info and the result of forward_features.

        Args:
            x: images (B, in_chans, H, W).
            indices: indices of the maps, the number of last maps, or None for all.
            norm: norm the last map.
            stop_early: stop after the last of these maps, and return it first.
            output_fmt: "NCHW".
            intermediates_only: return only the list of maps.

        Raises:
            ValueError: output_fmt is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f'CifarNet.forward_intermediates: output_fmt must be "NCHW", got {output_fmt!r}')
        chosen, last = feature_take_indices(len(self.feature_info), indices)
        x = self.act1(self.bn1(self.conv1(x)))
        maps = [x]
        for stage in (self.layer1, self.layer2, self.layer3)[: last if stop_early else None]:
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            maps.append(x)
        complete = len(maps) == len(self.feature_info)
        if norm and complete:
            maps[-1] = self.norm(x)
        taken = [maps[index] for index in chosen]
        if intermediates_only:
            return taken
        return (self.act(self.norm(x)) if complete else x), taken

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove everything that the maps of these indices do not need; return their numbers."""
        chosen, last = feature_take_indices(len(self.feature_info), indices)
        for stage in ("layer1", "layer2", "layer3")[last:]:
            setattr(self, stage, nn.Sequential())
        cut = last < len(self.feature_info) - 1
        if cut or prune_norm:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.feature_info[last]["num_chs"]
        if cut or prune_head:
            self.reset_classifier(0, "")
        return chosen

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the map before the pooling, (B, num_features, H / 4, W / 4), from images."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        else:
            x = self.layer3(self.layer2(self.layer1(x)))
        return self.act(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits, or the classifier's input, from the result of forward_features."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def cifar_encnet(num_classes: int = 10, widen: int = 4, num_codes: int = 16, **kwargs: Any) -> CifarNet:
    """Build EncNet for CIFAR, with ContextEncoding.paper in every unit. Widen 4 with 16 codewords is the paper's 16k64d, 8
    with 32 is 32k128d.

    Args:
        num_classes: of the classifier.
        widen: the stages have 16, 32 and 64 times this many channels.
        num_codes: K, number of codewords in each block.
        **kwargs: any other argument of CifarNet.
    """
    return CifarNet(num_classes, widen=widen, attn_layer=partial(ContextEncoding.paper, num_codes=num_codes), **kwargs)


def cifar_senet(num_classes: int = 10, widen: int = 4, **kwargs: Any) -> CifarNet:
    """Build the paper's SE-ResNet baseline, with timm's SEModule (reduction to a sixteenth) in every unit.

    Args:
        num_classes: of the classifier.
        widen: the stages have 16, 32 and 64 times this many channels.
        **kwargs: any other argument of CifarNet.
    """
    return CifarNet(num_classes, widen=widen, attn_layer="se", **kwargs)


def cifar_resnet(num_classes: int = 10, widen: int = 4, **kwargs: Any) -> CifarNet:
    """Build the paper's plain ResNet baseline.

    Args:
        num_classes: of the classifier.
        widen: the stages have 16, 32 and 64 times this many channels.
        **kwargs: any other argument of CifarNet.
    """
    return CifarNet(num_classes, widen=widen, **kwargs)
