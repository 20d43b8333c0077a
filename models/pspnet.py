"""PSPNet: pyramid pooling (Zhao et al., CVPR 2017, https://arxiv.org/abs/1612.01105, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import nn

from .head import Head
from .layers import PooledBatchNorm2d, conv_bn_relu, regional_means

POOL_SIZES = (1, 2, 3, 6)


class PSPHead(Head):
    """c4 and its averages over 1, 4, 9 and 36 regions -> 3x3 to `width` -> classifier.

    Args:
        channels: of (c1, c2, c3, c4).
        stride: of c4; the pyramid is relative to the map's size, so it plays no part.
    """

    def __init__(self, channels: tuple[int, ...], width: int, num_classes: int, *, stride: int = 8, head_after_dropout: bool = False):
        super().__init__(width, num_classes, head_after_dropout)
        norms = [PooledBatchNorm2d if size == 1 else nn.BatchNorm2d for size in POOL_SIZES]
        self.pyramid = nn.ModuleList(conv_bn_relu(channels[3], channels[3] // 4, 1, norm=norm) for norm in norms)
        self.fuse = conv_bn_relu(2 * channels[3], width, 3)

    def features(self, stages):
        c4 = stages[3]
        levels = [level(regional_means(c4, size)) for level, size in zip(self.pyramid, POOL_SIZES, strict=True)]
        levels = [F.interpolate(level, c4.shape[2:], mode="bilinear", align_corners=True) for level in levels]
        return self.fuse(torch.cat([c4, *levels], dim=1))
