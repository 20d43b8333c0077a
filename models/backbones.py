"""Backbones: torchvision's networks as four stages (c1, c2, c3, c4), dilated to an output stride.

The published CIRKD, CIRKDv2 and Af-DCD models use the same networks, so their weights fit. To add one, write a module whose
constructor takes (output_stride, in_channels) and which returns four stages, and add it to BACKBONES. Its attributes:
    channels: of the four stages. Further stages are for its own head alone.
    output_strides: the strides that c4 can have, where the geometry is fixed; an attribute of the class.
    aux_stage: position of the stage of the auxiliary head, where the published models have it on another one than c3.
    last_relus: the four ReLU modules that the stages end with, whose inputs are p1..p4, where all of them do.
    last_blocks: the four blocks that those end, where each has one last BatchNorm.
    leftover: how the names begin of what an ImageNet file of it holds besides, for its classifier.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call

from .ddrnet import DDRNet23Slim
from .hrnet import HRNet
from .layers import initialize, stages_of
from .segformer import MIX_TRANSFORMERS
from .stdc import STDC

STRIDES = (8, 16, 32)


def dilate(blocks: Iterable[nn.Module], stride: int, output_stride: int, *, at_once: bool = False) -> None:
    """Trade every stride beyond `output_stride` for dilation by rewriting the convolutions in place; parameter names stay.

    torchvision's own `replace_stride_with_dilation` raises on ResNet-18 and -34. A convolution that loses its stride keeps the
    dilation before it, so that it reads the grid its input has; all later ones get twice that (DeepLab's rule, and CIRKD's).

    Args:
        blocks: residual blocks in the order in which they run, each with at most one halving of the size.
        stride: of the first block's input.
        at_once: the convolution that loses its stride gets the new dilation, too.
    """
    dilation = 1
    for block in blocks:
        convs = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
        before, halves = dilation, any(conv.stride != (1, 1) for conv in convs)
        removed = halves and stride >= output_stride
        if removed:
            dilation *= 2
        elif halves:
            stride *= 2
        for conv in convs:
            rate = before if removed and conv.stride != (1, 1) and not at_once else dilation
            if removed:
                conv.stride = (1, 1)
            if conv.kernel_size != (1, 1):
                conv.dilation = (rate, rate)
                conv.padding = tuple(rate * (size // 2) for size in conv.kernel_size)


def widen_input(conv: nn.Conv2d, in_channels: int) -> nn.Conv2d:
    """The first convolution, or a freshly initialised one like it if the images have another number of channels."""
    if in_channels == conv.in_channels:
        return conv
    wide = nn.Conv2d(in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
    initialize(wide)
    return wide


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier.

    Args:
        constructor: `torchvision.models.resnet18` or a sibling.
        deep_stem: three 3x3 convolutions (64, 64, 128 channels) in place of the 7x7. This is what "resnet18" means in the CIRKD
            line; torchvision's ImageNet weights fit the plain stem only.
        at_once: see `dilate`.
        multi_grid: factors on the dilation of the blocks of the last stage, one for each; () for none.
    """

    def __init__(
        self, constructor: Callable, deep_stem: bool, output_stride: int, in_channels: int, at_once: bool = False, multi_grid: tuple[int, ...] = ()
    ):  # fmt: skip
        super().__init__()
        net = constructor(weights=None)
        self.deep_stem = deep_stem
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        if deep_stem:
            self.conv1 = nn.Conv2d(in_channels, 64, 3, stride=2, padding=1, bias=False)
            self.conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(64)
            self.conv3 = nn.Conv2d(64, 128, 3, padding=1, bias=False)
            self.bn3 = nn.BatchNorm2d(128)
            block = type(self.layer1[0])
            width = 64 * block.expansion
            self.layer1[0] = block(128, 64, downsample=nn.Sequential(nn.Conv2d(128, width, 1, bias=False), nn.BatchNorm2d(width)))
            for part in (self.conv1, self.conv2, self.conv3, self.layer1[0]):
                initialize(part)
        else:
            self.conv1 = widen_input(self.conv1, in_channels)
        dilate([*self.layer2, *self.layer3, *self.layer4], 4, output_stride, at_once=at_once)
        for block, factor in zip(self.layer4, multi_grid, strict=bool(multi_grid)):
            for conv in (block.conv1, block.conv2):
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (conv.dilation[0] * factor,) * 2
        self.channels = tuple(width * type(self.layer1[0]).expansion for width in (64, 128, 256, 512))

    @property
    def last_blocks(self) -> tuple[nn.Module, ...]:
        """The block that each stage ends with."""
        return tuple(layer[-1] for layer in (self.layer1, self.layer2, self.layer3, self.layer4))

    @property
    def last_relus(self) -> tuple[nn.Module, ...]:
        return tuple(block.relu for block in self.last_blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.relu(self.bn1(self.conv1(x)))
        if self.deep_stem:
            x = self.relu(self.bn2(self.conv2(x)))
            x = self.relu(self.bn3(self.conv3(x)))
        c1 = self.layer1(self.maxpool(x))
        c2 = self.layer2(c1)
        c3 = self.layer3(c2)
        return c1, c2, c3, self.layer4(c3)


class MobileNetV2(nn.Module):
    """torchvision's MobileNetV2 up to its 320 channels; the last 1280-channel convolution is left out, as in the CIRKD line."""

    channels = (24, 32, 96, 320)
    ends = (3, 6, 13, 17)  # the last block at each stride

    def __init__(self, output_stride: int, in_channels: int):
        super().__init__()
        self.features = torchvision.models.mobilenet_v2(weights=None).features[:18]
        self.features[0][0] = widen_input(self.features[0][0], in_channels)
        dilate(self.features[1:], 2, output_stride)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return stages_of(self.features, self.ends, x)


class MobileNetV3(nn.Module):
    """torchvision's MobileNetV3 up to its last 1x1 convolution; the convolutions that lose their stride are dilated at once, as in
    torchvision and in the CIRKD line.

    BatchNorm's epsilon is the CIRKD line's 1e-5 instead of torchvision's 1e-3; torchvision's weights are adapted in loading.
    The recorded outputs are of odd sizes; whether the published networks pad pictures of even size on both sides is not known.

    Args:
        constructor: `torchvision.models.mobilenet_v3_small` or `mobilenet_v3_large`.
        ends: the last block at each stride.
    """

    def __init__(self, constructor: Callable, ends: tuple[int, ...], output_stride: int, in_channels: int):
        super().__init__()
        self.features = constructor(weights=None).features
        self.features[0][0] = widen_input(self.features[0][0], in_channels)
        dilate(self.features[1:], 2, output_stride, at_once=True)
        self.ends = ends
        self.channels = tuple(self.features[end].out_channels for end in ends)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-5

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return stages_of(self.features, self.ends, x)


class PlainMobileNetV3(nn.Sequential):
    """torchvision's MobileNetV3 as its own segmentation networks have it, and with their names: dilated to stride 16 (`dilated=True`),
    c1 to c3 behind the first block of each stride instead of the last.

    Args:
        constructor: `torchvision.models.mobilenet_v3_small` or `mobilenet_v3_large`.
        ends: the first block at strides 4, 8 and 16, and the last of all.
    """

    output_strides = (16,)
    aux_stage = 1

    def __init__(self, constructor: Callable, ends: tuple[int, ...], output_stride: int, in_channels: int):
        super().__init__(*constructor(weights=None, dilated=True).features)
        self[0][0] = widen_input(self[0][0], in_channels)
        self.ends = ends
        self.channels = tuple(self[end].out_channels for end in ends)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return stages_of(self, self.ends, x)


DEPTHS = (18, 34, 50, 101)
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{n}": partial(ResNet, getattr(torchvision.models, f"resnet{n}"), True) for n in DEPTHS},
    **{f"resnet{n}_vanilla": partial(ResNet, getattr(torchvision.models, f"resnet{n}"), False) for n in DEPTHS},
    "mobilenetv2": MobileNetV2,
    "mobilenetv3_small": partial(MobileNetV3, torchvision.models.mobilenet_v3_small, (1, 3, 8, 12)),
    "mobilenetv3_large": partial(MobileNetV3, torchvision.models.mobilenet_v3_large, (3, 6, 12, 16)),
    "mobilenetv3_small_vanilla": partial(PlainMobileNetV3, torchvision.models.mobilenet_v3_small, (1, 2, 4, 12)),
    "mobilenetv3_large_vanilla": partial(PlainMobileNetV3, torchvision.models.mobilenet_v3_large, (2, 4, 7, 16)),
    **MIX_TRANSFORMERS,
    "hrnet_w18": partial(HRNet, 18),
    "stdc1": partial(STDC, (2, 2, 2)),
    "stdc2": partial(STDC, (4, 5, 3)),
    "ddrnet23_slim": DDRNet23Slim,
}


def output_strides(name: str) -> tuple[int, ...]:
    """The strides that c4 of a backbone can have."""
    build = BACKBONES[name]
    return getattr(build.func if isinstance(build, partial) else build, "output_strides", STRIDES)


def build_backbone(name: str, output_stride: int = 8, in_channels: int = 3, **options) -> nn.Module:
    """A module whose forward maps (B, in_channels, H, W) to (c1, c2, c3, c4), with `.channels` of the four.

    Strides are 4, 8, 16, 32, none above `output_stride`; `options` are further arguments of its constructor. Weights are random; see
    `models.weights`.

    Raises:
        ValueError: the backbone cannot have this stride.
    """
    possible = output_strides(name)
    if output_stride not in possible:
        raise ValueError(f"output stride {output_stride} is not possible with {name}; choose one of {', '.join(map(str, possible))}")
    backbone = BACKBONES[name](output_stride=output_stride, in_channels=in_channels, **options)
    # a backbone that ignores its stride still trains, to a wrong result: look at the real shapes
    stages = on_meta(backbone, torch.empty(1, in_channels, 64, 64, device="meta"))
    expected = [(1, c, 64 // s, 64 // s) for c, s in zip(backbone.channels, (min(n, output_stride) for n in (4, 8, 16, 32)), strict=True)]
    assert [tuple(stage.shape) for stage in stages[:4]] == expected, f"{name} at stride {output_stride}: {[s.shape for s in stages]}"
    return backbone


def on_meta(module: nn.Module, *args, **kwargs):
    """The module's output on the meta device: shapes without arithmetic. The module itself is left as it is."""
    tensors = {name: tensor.detach().to("meta") for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    return functional_call(module, tensors, args, kwargs)
