"""DeepLabV3: atrous spatial pyramid pooling (Chen et al., 2017, https://arxiv.org/abs/1706.05587, section 3.3)."""

import torch
from torch import nn

from .head import Head
from .layers import PooledBatchNorm2d, conv_bn_relu


class DeepLabV3Head(Head):
    """c4 at five fields of view -> 1x1 -> 3x3 -> classifier, every layer `width` wide.

    Args:
        channels: of (c1, c2, c3, c4).
        stride: of c4. The 3x3 branches are dilated by 12, 24, 36 at stride 8 and by half of that at twice the stride, so that they
            see the same pixels.
        rates: other dilations.
    """

    def __init__(
        self, channels: tuple[int, ...], width: int, num_classes: int, *, stride: int = 8, head_after_dropout: bool = False,
        rates: tuple[int, ...] = (),
    ):  # fmt: skip
        super().__init__(width, num_classes, head_after_dropout)
        rates = rates or [96 * k // stride for k in (1, 2, 3)]
        self.aspp = nn.ModuleList([conv_bn_relu(channels[3], width, 1), *(conv_bn_relu(channels[3], width, 3, rate) for rate in rates)])
        self.pool = conv_bn_relu(channels[3], width, 1, norm=PooledBatchNorm2d)
        self.project = nn.Sequential(*conv_bn_relu(5 * width, width, 1), nn.Dropout(0.5))
        self.fuse = conv_bn_relu(width, width, 3)

    def pyramid(self, c4):
        """(B, C, h, w) -> (B, width, h, w)."""
        pooled = self.pool(c4.mean((2, 3), keepdim=True))  # (B, width, 1, 1)
        branches = [branch(c4) for branch in self.aspp]
        return self.project(torch.cat([*branches, pooled.expand_as(branches[0])], dim=1))

    def features(self, stages):
        return self.fuse(self.pyramid(stages[3]))
