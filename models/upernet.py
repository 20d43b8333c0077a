"""UPerNet: a feature pyramid over the stages, on top of pyramid pooling (Xiao et al., ECCV 2018, https://arxiv.org/abs/1807.10221)."""

import torch
import torch.nn.functional as F
from torch import nn

from .head import Head
from .layers import PooledBatchNorm2d, conv_bn_relu, regional_means
from .pspnet import POOL_SIZES

POOLED = 512  # channels of a level of the pyramid, whatever the width


class EnlargedBatchNorm2d(PooledBatchNorm2d):
    """`PooledBatchNorm2d` for maps that have been pooled to 1x1 and enlarged again."""

    def is_single(self, x: torch.Tensor) -> bool:
        return len(x) == 1


class UPerHead(Head):
    """Pyramid pooling of c4, added from the deepest stage to the shallowest -> all four maps at c1's size -> 3x3 with stride 2 ->
    classifier.

    Like the released code of CIRKDv2, the pooled maps are enlarged before their 1x1 convolution, the logits have twice the stride of
    c1, and no dropout precedes the classifier.

    Args:
        channels: of (c1, c2, c3, c4).
        width: of the feature pyramid and of `head`: 512, in the "lite" model 128.
        stride: of c4; it plays no part.
        head_after_dropout: no difference here.
    """

    stride = 8

    def __init__(self, channels: tuple[int, ...], width: int, num_classes: int, *, stride: int = 8, head_after_dropout: bool = False):
        super().__init__(width, num_classes, head_after_dropout)
        self.dropout = nn.Identity()
        norms = [EnlargedBatchNorm2d if size == 1 else nn.BatchNorm2d for size in POOL_SIZES]
        self.pyramid = nn.ModuleList(conv_bn_relu(channels[3], POOLED, 1, norm=norm) for norm in norms)
        self.deepest = conv_bn_relu(channels[3] + len(POOL_SIZES) * POOLED, width, 3)
        self.lateral = nn.ModuleList(conv_bn_relu(channel, width, 1) for channel in channels[:3])
        self.smooth = nn.ModuleList(conv_bn_relu(width, width, 3) for _ in channels[:3])
        self.fuse = conv_bn_relu(4 * width, width, 3)
        self.fuse[0].stride = (2, 2)

    def features(self, stages):
        c4 = stages[3]
        levels = [level(resize(regional_means(c4, size), c4)) for level, size in zip(self.pyramid, POOL_SIZES, strict=True)]
        top = self.deepest(torch.cat([c4, *levels], dim=1))
        maps = [top]
        for stage, lateral, smooth in zip(stages[2::-1], self.lateral[::-1], self.smooth[::-1], strict=True):
            stage = lateral(stage)
            top = stage + resize(top, stage)
            maps.insert(0, smooth(top))
        return self.fuse(torch.cat([maps[0], *(resize(level, maps[0]) for level in maps[1:])], dim=1))  # (B, 4 * width, h, w) of c1


def resize(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x at the height and width of `like`, bilinear."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)
