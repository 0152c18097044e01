"""The CIFAR networks of EncNet: a small residual network with a Context-Encoding block, an SE block, or nothing in each unit.

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
from ctxenc.integrations.parameters import encoding_parameters


def _stage(in_channels: int, channels: int, stride: int, attn_layer: Any) -> nn.Sequential:
    """Two units; the shortcut of the first is a convolution with a bias and no norm where it changes the map's shape."""
    shortcut = nn.Conv2d(in_channels, channels, 1, stride) if stride != 1 or in_channels != channels else None
    return nn.Sequential(
        BasicBlock(in_channels, channels, stride, shortcut, attn_layer=attn_layer),
        BasicBlock(channels, channels, attn_layer=attn_layer),
    )


def _map(module: str, channels: int, reduction: int) -> dict[str, Any]:
    """An entry of timm's feature_info."""
    return {"num_chs": channels, "reduction": reduction, "module": module}


class CifarNet(nn.Module):
    """The 14-layer residual network that EncNet compares on CIFAR-10: three stages of two units, strides 1, 2 and 2.

    A unit is conv3x3 BN ReLU conv3x3 BN, then the attention, then the shortcut and ReLU; after the last come BN, ReLU and the
    pooled linear classifier. Made for 32 x 32 images; any other size works.

    Args:
        num_classes: of the classifier; 0 for none.
        in_chans: channels of the image.
        global_pool: timm's pooling, "avg" for one; "" for none, which needs num_classes=0.
        widen: the stages have 16, 32 and 64 times this many channels.
        attn_layer: class or function that makes a block of its channels, a name that timm knows, or None.
        drop_rate: dropout before the classifier.

    Shape:
        (B, in_chans, H, W) -> (B, num_classes)

    Raises:
        ValueError: a size is not positive.
        TypeError: a size is no integer.
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
        self.layer1 = _stage(width, width, 1, attn_layer)
        self.layer2 = _stage(width, 2 * width, 2, attn_layer)
        self.layer3 = _stage(2 * width, 4 * width, 2, attn_layer)
        self.norm: nn.Module = nn.BatchNorm2d(4 * width)
        self.act = nn.ReLU(inplace=True)
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.feature_info = [
            _map("act1", width, 1),
            _map("layer1", width, 1),
            _map("layer2", 2 * width, 2),
            _map("layer3", 4 * width, 4),
        ]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that timm's optimizers should not decay."""
        return encoding_parameters(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns by which timm groups parameters, by stage if coarse, else by unit."""
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each unit's activations again in backward, for less memory."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place; num_classes 0 for none, global_pool None for the pooling that it has."""
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
        """The maps of feature_info, and the map that forward_features gives.

        Args:
            x: images (B, in_chans, H, W).
            indices: which maps; a number for that many last ones, None for all.
            norm: norm the last map.
            stop_early: compute nothing after the last of these maps; the first result is then that map.
            output_fmt: "NCHW".
            intermediates_only: give the list of maps alone.

        Raises:
            ValueError: output_fmt is another.
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
        """Remove what the maps of these indices do not need; gives their numbers."""
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
        """Images to the map before the pooling, (B, num_features, H / 4, W / 4)."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        else:
            x = self.layer3(self.layer2(self.layer1(x)))
        return self.act(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """That map to the logits, or to what the classifier takes."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def cifar_encnet(num_classes: int = 10, widen: int = 4, num_codes: int = 16, **kwargs: Any) -> CifarNet:
    """EncNet for CIFAR: ContextEncoding.paper in every unit. Widen 4 with 16 codewords is the paper's 16k64d, 8 with 32 is 32k128d.

    Args:
        num_classes: of the classifier.
        widen: the stages have 16, 32 and 64 times this many channels.
        num_codes: K, number of codewords in each block.
        **kwargs: any other argument of CifarNet.
    """
    return CifarNet(num_classes, widen=widen, attn_layer=partial(ContextEncoding.paper, num_codes=num_codes), **kwargs)


def cifar_senet(num_classes: int = 10, widen: int = 4, **kwargs: Any) -> CifarNet:
    """The SE-ResNet that EncNet is compared with: timm's SEModule, which reduces channels to a sixteenth, in every unit.

    Args:
        num_classes: of the classifier.
        widen: the stages have 16, 32 and 64 times this many channels.
        **kwargs: any other argument of CifarNet.
    """
    return CifarNet(num_classes, widen=widen, attn_layer="se", **kwargs)


def cifar_resnet(num_classes: int = 10, widen: int = 4, **kwargs: Any) -> CifarNet:
    """The plain ResNet that EncNet is compared with.

    Args:
        num_classes: of the classifier.
        widen: the stages have 16, 32 and 64 times this many channels.
        **kwargs: any other argument of CifarNet.
    """
    return CifarNet(num_classes, widen=widen, **kwargs)
