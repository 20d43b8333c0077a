"""LR-ASPP: the light head of MobileNetV3 (Howard et al., ICCV 2019, https://arxiv.org/abs/1905.02244, section 6.4)."""

import torch.nn.functional as F
from torch import nn

from .head import Head
from .layers import conv_bn_relu


class LRASPPHead(Head):
    """c4 -> 1x1, times gates from its average -> upsampled to c2, stride 8 -> classifier; plus a classifier of c2 itself.

    `head` is what the first of the two classifiers reads: the logits are its scores plus those of c2. As published there is no dropout.

    Args:
        channels: of (c1, c2, c3, c4).
        stride: of c4; plays no part.
    """

    stride = 8

    def __init__(self, channels: tuple[int, ...], width: int, num_classes: int, *, stride: int = 16, head_after_dropout: bool = False):
        super().__init__(width, num_classes, head_after_dropout)
        self.dropout = nn.Identity()
        self.reduce = conv_bn_relu(channels[3], width, 1)
        self.gate = nn.Conv2d(channels[3], width, 1, bias=False)
        self.low_classifier = nn.Conv2d(channels[1], num_classes, 1)

    def features(self, stages):
        c4 = stages[3]
        gated = self.reduce(c4) * self.gate(c4.mean((2, 3), keepdim=True)).sigmoid()
        return F.interpolate(gated, stages[1].shape[2:], mode="bilinear", align_corners=False)

    def forward(self, stages):
        outputs = super().forward(stages)
        return {**outputs, "logits": outputs["logits"] + self.low_classifier(stages[1])}
