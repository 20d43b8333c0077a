"""DDRNet: a high-resolution branch beside a deep one, and pyramid pooling of the deep one (Hong et al., IEEE Transactions on
Intelligent Transportation Systems 2022, https://arxiv.org/abs/2101.06085, sections III-A to III-C).

The backbone's tensors have the names of the authors' ImageNet file (`DDRNet23s_imagenet.pth`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from .head import Head
from .layers import PooledBatchNorm2d, initialize

HIGH, DEEP = 128, 512  # channels that the two branches end with
POOLED = 128  # channels of a level of the pyramid
POOLS = ((5, 2), (9, 4), (17, 8))  # window and stride of the averages between the whole map and its mean


class OpenBasicBlock(BasicBlock):
    """torchvision's block without the last ReLU: what the branches exchange may be negative."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return identity + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class OpenBottleneck(Bottleneck):
    """torchvision's block without the last ReLU, and half as wide at its end."""

    expansion = 2

    def forward(self, x: Tensor) -> Tensor:
        x, identity = self.relu(self.bn1(self.conv1(x))), self.downsample(x)
        return identity + self.bn3(self.conv3(self.relu(self.bn2(self.conv2(x)))))


def conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1, norm=nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False), norm(out_channels))


def two_blocks(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    changes = stride != 1 or in_channels != out_channels
    downsample = conv_bn(in_channels, out_channels, 1, stride) if changes else None
    return nn.Sequential(BasicBlock(in_channels, out_channels, stride, downsample), OpenBasicBlock(out_channels, out_channels))


def bottleneck(in_channels: int, stride: int = 1, norm=nn.BatchNorm2d) -> nn.Sequential:
    downsample = conv_bn(in_channels, 2 * in_channels, 1, stride, norm)
    return nn.Sequential(OpenBottleneck(in_channels, in_channels, stride, downsample, norm_layer=norm))


class DDRNet23Slim(nn.Module):
    """c1 (32 channels, stride 4) and c2 (64, stride 8) come before the branches, c3 (128, stride 16) and c4 (256, stride 32) are the
    deep branch behind the two exchanges; p1..p4 are the same before their ReLU. No stride can be traded for dilation.

    The further stages are the high-resolution branch behind the first exchange (64 channels, stride 8) and the ends of both branches
    (128, stride 8; 512, stride 64), all three without ReLU.
    """

    channels = (32, 64, 128, 256)
    output_strides = (32,)
    leftover = ("down5.", "last_layer.", "linear.")  # of the ImageNet file

    def __init__(self, output_stride: int, in_channels: int):
        super().__init__()
        stem = []
        for planes in (in_channels, 32):  # with bias, as in the authors' files
            stem += [nn.Conv2d(planes, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
        self.conv1 = nn.Sequential(*stem)
        self.layer1, self.layer2 = two_blocks(32, 32), two_blocks(32, 64, 2)
        # at stride 64 and below a small crop has a single position
        self.layer3, self.layer4, self.layer5 = two_blocks(64, 128, 2), two_blocks(128, 256, 2), bottleneck(256, 2, PooledBatchNorm2d)
        self.layer3_, self.layer4_, self.layer5_ = two_blocks(64, 64), two_blocks(64, 64), bottleneck(64)
        self.compression3, self.compression4 = conv_bn(128, 64, 1), conv_bn(256, 64, 1)
        self.down3 = conv_bn(64, 128, 3, 2)
        self.down4 = nn.Sequential(*conv_bn(64, 128, 3, 2), nn.ReLU(inplace=True), *conv_bn(128, 256, 3, 2))
        self.relu = nn.ReLU()  # not in place: what it reads is added to the other branch
        self.last_relus = nn.ModuleList(nn.ReLU() for _ in self.channels)
        initialize(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        relu = self.relu
        c1 = self.last_relus[0](self.layer1(self.conv1(x)))
        c2 = self.last_relus[1](self.layer2(c1))
        deep, high = self.layer3(c2), self.layer3_(c2)
        c3 = self.last_relus[2](deep + self.down3(relu(high)))
        first = high + enlarge(self.compression3(relu(deep)), high)
        deep, high = self.layer4(c3), self.layer4_(relu(first))
        c4 = self.last_relus[3](deep + self.down4(relu(high)))
        high = high + enlarge(self.compression4(relu(deep)), high)
        return c1, c2, c3, c4, first, self.layer5_(relu(high)), self.layer5(c4)


def norm_relu_conv(in_channels: int, out_channels: int, kernel: int, norm=PooledBatchNorm2d) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(norm(in_channels), nn.ReLU(inplace=True), conv)


class PyramidPooling(nn.Module):
    """DAPPM, deep aggregation pyramid pooling: averages over ever larger windows, each added to the sum before it is convolved;
    (B, 512, h, w) -> (B, 128, h, w)."""

    def __init__(self):
        super().__init__()
        pools = [nn.Identity(), *(nn.AvgPool2d(window, stride, window // 2) for window, stride in POOLS), nn.AdaptiveAvgPool2d(1)]
        self.levels = nn.ModuleList(nn.Sequential(pool, *norm_relu_conv(DEEP, POOLED, 1)) for pool in pools)
        self.smooth = nn.ModuleList(norm_relu_conv(POOLED, POOLED, 3) for _ in pools[1:])
        self.compress = norm_relu_conv(len(pools) * POOLED, HIGH, 1)
        self.shortcut = norm_relu_conv(DEEP, HIGH, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.levels[0](x)]
        for level, smooth in zip(self.levels[1:], self.smooth, strict=True):
            maps.append(smooth(maps[-1] + enlarge(level(x), x)))
        return self.compress(torch.cat(maps, dim=1)) + self.shortcut(x)


class SegmentationHead(Head):
    """One of the further stages -> BatchNorm, ReLU, 3x3 to `width`, BatchNorm, ReLU -> classifier; no dropout.

    Args:
        in_channels: of the stage.
        stage: its position in the backbone's output.
    """

    stride = 8

    def __init__(self, in_channels: int, width: int, num_classes: int, head_after_dropout: bool, stage: int):
        super().__init__(width, num_classes, head_after_dropout)
        self.dropout = nn.Identity()
        self.stage = stage
        self.project = nn.Sequential(*norm_relu_conv(in_channels, width, 3, nn.BatchNorm2d), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        initialize(self)

    def features(self, stages):
        return self.project(stages[self.stage])


class DDRHead(SegmentationHead):
    """The high-resolution branch plus the pooled deep one -> `SegmentationHead`; logits of stride 8. `aux` reads the high-resolution
    branch behind the first exchange.

    Args:
        channels: of (c1, c2, c3, c4).
        stride: of c4; plays no part.
    """

    def __init__(self, channels: tuple[int, ...], width: int, num_classes: int, *, stride: int = 32, head_after_dropout: bool = False):
        super().__init__(HIGH, width, num_classes, head_after_dropout, stage=5)
        self.pyramid = PyramidPooling()
        initialize(self.pyramid)

    def auxiliary(self, channels, num_classes):
        return {"aux": SegmentationHead(channels[1], self.classifier.in_channels, num_classes, False, stage=4)}

    def features(self, stages):
        return self.project(stages[5] + enlarge(self.pyramid(stages[6]), stages[5]))


def enlarge(x: Tensor, like: Tensor) -> Tensor:
    """x at the height and width of `like`, bilinear."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)
