"""STDC: short-term dense concatenation, and the decoder of BiSeNet without its spatial path (Fan et al., CVPR 2021,
https://arxiv.org/abs/2104.13188, sections 3.1 and 3.2).

The backbones' tensors have the names of the authors' ImageNet files (`STDCNet813M_73.91.tar`, `STDCNet1446_76.47.tar`).
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fcn import FCNHead
from .head import Head
from .layers import PooledBatchNorm2d, conv_bn_relu, initialize, stages_of

CONTEXT = 128  # channels of the context path
FUSED = 256  # channels behind the feature fusion


def conv_x(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """The paper's ConvX: convolution, BatchNorm, ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), relu=nn.ReLU(inplace=True)))


class ShortTermConcat(nn.Module):
    """The STDC module: four convolutions one behind the other, the first 1x1, with 1/2, 1/4, 1/8 and 1/8 of the channels; their
    outputs, concatenated. With stride 2 a depthwise convolution halves the size behind the first, whose own output is averaged."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        half, quarter, eighth = out_channels // 2, out_channels // 4, out_channels // 8
        self.conv_list = nn.ModuleList(
            [conv_x(in_channels, half, 1), conv_x(half, quarter, 3), conv_x(quarter, eighth, 3), conv_x(eighth, eighth, 3)]
        )
        self.avd_layer = self.skip = nn.Identity()
        if stride == 2:
            depthwise = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
            self.avd_layer, self.skip = nn.Sequential(depthwise, nn.BatchNorm2d(half)), nn.AvgPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.conv_list
        x = first(x)
        outputs, x = [self.skip(x)], self.avd_layer(x)
        for conv in others:
            x = conv(x)
            outputs.append(x)
        return torch.cat(outputs, dim=1)


class STDC(nn.Module):
    """c1 (64 channels, stride 4) is the second convolution, c2, c3, c4 (256, 512, 1024; strides 8, 16, 32) end the stages of STDC
    modules, as concatenations of four ReLUs; p1..p4 are equal to them. No stride can be traded for dilation.

    Args:
        depths: STDC modules of the three stages.
    """

    channels = (64, 256, 512, 1024)
    output_strides = (32,)
    leftover = ("conv_last.", "bn.", "linear.")  # of the ImageNet file, beside fc

    def __init__(self, depths: tuple[int, ...], output_stride: int, in_channels: int):
        super().__init__()
        blocks, self.ends = [conv_x(in_channels, 32, 3, 2), conv_x(32, 64, 3, 2)], [1]
        for depth, narrow, wide in zip(depths, self.channels[:3], self.channels[1:], strict=True):
            blocks += [ShortTermConcat(wide if number else narrow, wide, 1 if number else 2) for number in range(depth)]
            self.ends.append(len(blocks) - 1)
        self.features = nn.Sequential(*blocks)
        initialize(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return stages_of(self.features, self.ends, x)


class Refinement(nn.Module):
    """The attention refinement module: 3x3, times a gate per channel from its average."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.reduce = conv_bn_relu(in_channels, CONTEXT, 3)
        self.gate = nn.Sequential(nn.Conv2d(CONTEXT, CONTEXT, 1, bias=False), PooledBatchNorm2d(CONTEXT), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        return x * self.gate(x.mean((2, 3), keepdim=True))


class STDCHead(Head):
    """The context of c4 and c3, enlarged step by step to stride 8, fused with c2 -> 3x3 to `width` -> classifier.

    `aux` reads the context at stride 8, `aux2` at stride 16; `detail` learns on c2 where the labels have boundaries (`losses/detail.py`).
    All three are for training alone. Dropout 0.1 before each classifier as in mmsegmentation; the authors' code has none.

    Args:
        channels: of (c1, c2, c3, c4).
        stride: of c4; plays no part.
    """

    stride = 8

    def __init__(self, channels: tuple[int, ...], width: int, num_classes: int, *, stride: int = 32, head_after_dropout: bool = False):
        super().__init__(width, num_classes, head_after_dropout)
        self.average = conv_bn_relu(channels[3], CONTEXT, 1, norm=PooledBatchNorm2d)
        self.refine = nn.ModuleList(Refinement(channel) for channel in channels[:1:-1])  # of c4, c3
        self.smooth = nn.ModuleList(conv_bn_relu(CONTEXT, CONTEXT, 3) for _ in self.refine)
        self.fuse = conv_bn_relu(channels[1] + CONTEXT, FUSED, 1)
        self.gate = nn.Sequential(
            nn.Conv2d(FUSED, FUSED // 4, 1, bias=False), nn.ReLU(inplace=True), nn.Conv2d(FUSED // 4, FUSED, 1, bias=False), nn.Sigmoid()
        )
        self.project = conv_bn_relu(FUSED, width, 3)

    def extend(self, stages):
        context, maps = self.average(stages[3].mean((2, 3), keepdim=True)), []
        for refine, smooth, deep, shallow in zip(self.refine, self.smooth, stages[3:1:-1], stages[2:0:-1], strict=True):
            context = smooth(F.interpolate(refine(deep) + context, shallow.shape[2:], mode="nearest"))
            maps.append(context)
        return *stages, *maps  # (B, 128, h, w) at strides 16 and 8

    def auxiliary(self, channels, num_classes):
        channels = (*channels, CONTEXT, CONTEXT)
        return {
            "aux": FCNHead(channels, 64, num_classes, stage=5),
            "aux2": FCNHead(channels, 64, num_classes, stage=4),
            "detail": FCNHead(channels, 64, 1, stage=1),
        }

    def features(self, stages):
        fused = self.fuse(torch.cat([stages[1], stages[5]], dim=1))
        return self.project(fused + fused * self.gate(fused.mean((2, 3), keepdim=True)))
