"""SegFormer: the Mix Transformer (MiT) and its MLP decoder (Xie et al., NeurIPS 2021, https://arxiv.org/abs/2105.15203).

Inside the encoder maps are (B, h, w, C), so that linear layers and LayerNorm run over the last dimension; convolutions see them
as channels-last images. Nothing is copied in between.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from .head import Head

HEADS = (1, 2, 5, 8)
REDUCTIONS = (8, 4, 2, 1)  # keys and values are averaged over squares of this size
DROP_PATH = 0.1
# name: (channels, blocks) of the four stages
SIZES = {
    "mit_b0": ((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b1": ((64, 128, 320, 512), (2, 2, 2, 2)),
    "mit_b2": ((64, 128, 320, 512), (3, 4, 6, 3)),
    "mit_b3": ((64, 128, 320, 512), (3, 4, 18, 3)),
    "mit_b4": ((64, 128, 320, 512), (3, 8, 27, 3)),
    "mit_b5": ((64, 128, 320, 512), (3, 6, 40, 3)),
}


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of (B, h, w, C)."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Self-attention whose keys and values come from the map reduced by `reduction` in height and width (section 3.1).

    A map smaller than `reduction` is padded with zeros, as every other convolution pads, and has one key per direction. Differs from the
    released code: it fails on such maps, of pictures below 29 pixels.
    """

    def __init__(self, width: int, heads: int, reduction: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.sr, self.norm = None, None
        if reduction > 1:
            self.sr = nn.Conv2d(width, width, reduction, stride=reduction)
            self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:  # (B, h, w, C), so is the result
        reduced = x if self.sr is None else self.norm(convolve(self.sr, self.padded(x)))
        q = self.q(x).flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, C / heads)
        k, v = self.kv(reduced).flatten(1, 2).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # of M <= N positions
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))

    def padded(self, x: Tensor) -> Tensor:
        """(B, h, w, C) with at least one window of `sr` in height and width."""
        below, right = (max(0, self.sr.stride[0] - side) for side in x.shape[1:3])
        return F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x


class MixFFN(nn.Module):
    """Linear to four times the width, depthwise 3x3 that tells positions apart, GELU, linear back."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.dwconv = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(convolve(self.dwconv, self.fc1(x))))


class Block(nn.Module):
    """Attention and MixFFN, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int, reduction: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, reduction)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MixFFN(width)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Overlapping patches, blocks, LayerNorm. (B, C, H, W) -> (B, width, H / stride, W / stride), sizes rounded up.

    The LayerNorm behind the patches has torch's epsilon 1e-5 and those of the blocks 1e-6, as in the released code.
    """

    def __init__(self, in_channels: int, width: int, kernel: int, stride: int, heads: int, reduction: int, drop_paths: list[float]):
        super().__init__()
        self.patch = nn.Conv2d(in_channels, width, kernel, stride, padding=kernel // 2)
        self.patch_norm = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(Block(width, heads, reduction, drop_path) for drop_path in drop_paths))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_norm(self.patch(x).permute(0, 2, 3, 1))
        return self.norm(self.blocks(x)).permute(0, 3, 1, 2)


class MixTransformer(nn.Module):
    """The encoder. Its stages end in a LayerNorm.

    Args:
        channels, depths: of the four stages, see SIZES.
    """

    output_strides = (32,)

    def __init__(self, channels: tuple[int, ...], depths: tuple[int, ...], output_stride: int, in_channels: int):
        super().__init__()
        self.channels = channels
        # without .tolist on a tensor: models are built on the meta device too
        rates = [DROP_PATH * index / (sum(depths) - 1) for index in range(sum(depths))]
        inputs, strides, kernels = (in_channels, *channels[:3]), (4, 2, 2, 2), (7, 3, 3, 3)
        self.stages = nn.ModuleList()
        for number, depth in enumerate(depths):
            own, rates = rates[:depth], rates[depth:]
            self.stages.append(
                Stage(inputs[number], channels[number], kernels[number], strides[number], HEADS[number], REDUCTIONS[number], own)
            )
        self.apply(initialize)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps)


def initialize(module: nn.Module) -> None:
    """The released code's initial weights: linear layers truncated normal (0.02), convolutions normal by their fan-out."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(module.bias)


MIX_TRANSFORMERS = {name: partial(MixTransformer, *size) for name, size in SIZES.items()}


class SegFormerHead(Head):
    """A linear layer per stage, all maps at c1's size, 1x1 convolution with BatchNorm and ReLU, classifier.

    Args:
        channels: of (c1, c2, c3, c4).
        stride: of c4; it plays no part.
    """

    stride = 4

    def __init__(self, channels: tuple[int, ...], width: int, num_classes: int, *, stride: int = 32, head_after_dropout: bool = False):
        super().__init__(width, num_classes, head_after_dropout)
        self.project = nn.ModuleList(nn.Linear(channel, width) for channel in channels)
        # CIRKD's files hold a bias in front of the BatchNorm, which therefore has no effect in training
        self.fuse = nn.Sequential(nn.Conv2d(4 * width, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))

    def features(self, stages):
        size = stages[0].shape[2:]
        maps = [linear(stage.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for linear, stage in zip(self.project, stages, strict=True)]
        enlarged = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in maps[:0:-1]]
        return self.fuse(torch.cat([*enlarged, maps[0]], dim=1))  # c4, c3, c2, c1: the order of the published weights
