"""HRNet: branches of four resolutions side by side (Wang et al., TPAMI 2020, https://arxiv.org/abs/1908.07919, figure 2: HRNetV2).

Tensors have the names of the authors' ImageNet files (`hrnetv2_w18_imagenet_pretrained.pth`), which therefore load as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from .layers import initialize


def conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1, relu: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out_channels)]
    return nn.Sequential(*layers, *[nn.ReLU(inplace=True)] * relu)


class Exchange(nn.Module):
    """Every branch through four residual blocks, then each becomes the ReLU of the sum of all, brought to its size and width.

    Args:
        widths: channels of the branches, each at half the resolution of the one before.
    """

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(width, width) for _ in range(4))) for width in widths)
        self.fuse_layers = nn.ModuleList(nn.ModuleList(self.path(widths, j, i) for j in range(len(widths))) for i in range(len(widths)))
        self.relus = nn.ModuleList(nn.ReLU(inplace=True) for _ in widths)

    @staticmethod
    def path(widths: tuple[int, ...], source: int, goal: int) -> nn.Module:
        """From one branch to another: a 1x1 convolution upwards (enlarged in `forward`), halvings downwards, the last without ReLU."""
        if source >= goal:
            return conv_bn(widths[source], widths[goal], 1, relu=False) if source > goal else nn.Identity()
        halvings = [conv_bn(widths[source], widths[source], 3, stride=2) for _ in range(goal - source - 1)]
        return nn.Sequential(*halvings, conv_bn(widths[source], widths[goal], 3, stride=2, relu=False))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        fused = []
        for goal, (paths, relu) in enumerate(zip(self.fuse_layers, self.relus, strict=True)):
            parts = [path(x) for path, x in zip(paths, maps, strict=True)]
            fused.append(relu(sum(resize(x, maps[goal]) for x in parts)))
        return fused


class HRNet(nn.Module):
    """c1..c4 are the four branches behind the last exchange, at strides 4, 8, 16, 32: maps of one depth and of different resolution.
    p1..p4 are the sums before their ReLU. No stride can be traded for dilation.

    Upwards, maps are enlarged bilinearly (align_corners=False) as in the authors' segmentation code and mmsegmentation's; their
    classification code repeats pixels.

    Args:
        width: channels of the first branch; each further one has twice as many.
    """

    output_strides = (32,)
    leftover = ("incre_modules.", "downsamp_modules.", "final_layer.")  # of the ImageNet file, beside its classifier

    def __init__(self, width: int, output_stride: int, in_channels: int):
        super().__init__()
        self.channels = widths = tuple(width << branch for branch in range(4))
        self.conv1 = nn.Conv2d(in_channels, 64, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        downsample = conv_bn(64, 256, 1, relu=False)
        self.layer1 = nn.Sequential(Bottleneck(64, 64, downsample=downsample), *(Bottleneck(256, 64) for _ in range(3)))
        self.transition1 = nn.ModuleList([conv_bn(256, widths[0], 3), nn.Sequential(conv_bn(256, widths[1], 3, stride=2))])
        self.stage2 = self.stage(widths[:2], 1)
        self.transition2 = self.new_branch(widths[1:3], 2)
        self.stage3 = self.stage(widths[:3], 4)
        self.transition3 = self.new_branch(widths[2:4], 3)
        self.stage4 = self.stage(widths, 3)
        initialize(self)

    @staticmethod
    def stage(widths: tuple[int, ...], exchanges: int) -> nn.Sequential:
        return nn.Sequential(*(Exchange(widths) for _ in range(exchanges)))

    @staticmethod
    def new_branch(widths: tuple[int, int], branches: int) -> nn.ModuleList:
        """The present branches as they are, and a new one from the last of them."""
        halving = nn.Sequential(conv_bn(*widths, 3, stride=2))
        return nn.ModuleList([*(nn.Identity() for _ in range(branches)), halving])

    @property
    def last_relus(self) -> tuple[nn.Module, ...]:
        return tuple(self.stage4[-1].relus)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer1(self.relu(self.bn2(self.conv2(x))))
        maps = self.stage2([path(x) for path in self.transition1])
        for transition, stage in ((self.transition2, self.stage3), (self.transition3, self.stage4)):
            maps = stage([path(x) for path, x in zip(transition, [*maps, maps[-1]], strict=True)])
        return tuple(maps)


def join(branches: tuple[Tensor, ...]) -> Tensor:
    """The four branches at stride 4, one behind the other: (B, C1 + C2 + C3 + C4, h, w) of c1. What heads read in place of c4."""
    return torch.cat([resize(branch, branches[0]) for branch in branches[:4]], dim=1)


def resize(x: Tensor, like: Tensor) -> Tensor:
    """x at the height and width of `like`, bilinear."""
    return x if x.shape[2:] == like.shape[2:] else F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)
