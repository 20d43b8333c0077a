"""DeepLabV3+: DeepLabV3's pyramid with a decoder at stride 4 (Chen et al., ECCV 2018, https://arxiv.org/abs/1802.02611), as AICSD has it."""

import torch
import torch.nn.functional as F
from torch import nn

from .deeplabv3 import DeepLabV3Head
from .layers import conv_bn_relu

LOW = 48  # channels of c1 beside the `width` of the pyramid


class DeepLabV3PlusHead(DeepLabV3Head):
    """c4 through the pyramid, upsampled to c1, beside c1 in 48 channels -> 3x3 -> 3x3 -> classifier, at stride 4.

    AICSD's network also upsamples the logits to the picture; here the loss and the evaluation do that.

    Args:
        channels: of (c1, c2, c3, c4).
        stride: of c4; the dilations of the pyramid follow it: 6, 12, 18 at stride 16.
    """

    stride = 4

    def __init__(self, channels: tuple[int, ...], width: int, num_classes: int, **options):
        super().__init__(channels, width, num_classes, **options)
        self.low = conv_bn_relu(channels[0], LOW, 1)
        self.fuse = nn.Sequential(*conv_bn_relu(width + LOW, width, 3), nn.Dropout(0.5), *conv_bn_relu(width, width, 3))

    def features(self, stages):
        deep = F.interpolate(self.pyramid(stages[3]), stages[0].shape[2:], mode="bilinear", align_corners=True)
        return self.fuse(torch.cat([deep, self.low(stages[0])], dim=1))
