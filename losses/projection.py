"""Masked generation (Af-DCD, MGD): alignment to the teacher's width, mask, projector; and its first layers in one.

Alignment (1x1) -> mask -> first convolution is linear up to the mask, which is the same for all channels. So it is one convolution of
the masked student with the product of both weights: a quarter of the products at 512 -> 2048 channels. The alignment's bias, which the
mask cuts out too, comes in as the weight of one more channel, the mask itself. Parameters, gradients and checkpoints are those of the
layers as written.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.functional import full_precision, widen


class Chain(nn.Sequential):
    """A projector of layers one after the other. A projector has its `first` convolution, without activation, and the `rest`."""

    @property
    def first(self) -> nn.Conv2d:
        return self[0]

    def rest(self, x: Tensor) -> Tensor:
        for layer in [*self][1:]:
            x = layer(x)
        return x


class Projector(Chain):
    """conv3x3 - ReLU - conv3x3, C -> C."""

    def __init__(self, channels: int):
        super().__init__(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1))


class BottleneckProjector(Chain):
    """conv1x1 - ReLU - conv3x3 - ReLU - conv3x3 - ReLU - conv1x1, C -> C/8 -> C: the plain projector's 5x5 positions, 1/34 of its products.

    Differs from the paper, which has no such projector."""

    def __init__(self, channels: int):
        width = max(1, channels // 8)
        super().__init__(
            nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, channels, 1),
        )  # fmt: skip


class EnhancedProjector(nn.Module):
    """x1 = ReLU(conv(x)), x2 = ReLU(conv(x1)), output (conv(x1) + conv(x2)) / 2; all 3x3, C -> C."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second, self.from_first, self.from_second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(4))

    def rest(self, x: Tensor) -> Tensor:
        first = F.relu(x)
        second = F.relu(self.second(first))
        return (self.from_first(first) + self.from_second(second)) / 2


PROJECTORS = {"plain": Projector, "enhanced": EnhancedProjector, "bottleneck": BottleneckProjector}


def generate(align: nn.Module, projector: nn.Module, feature: Tensor, mask: Tensor | None) -> Tensor:
    """projector(align(feature) * mask), the first layers of it in the form that costs least: (B, Cs, h, w) -> (B, Ct, h, w).

    Args:
        align: a 1x1 convolution Cs -> Ct, nn.Identity, or any module, which is then computed as written.
        mask: (B or 1, 1, h, w) of 0 and 1, None for no mask.
    """
    costs = front_costs(align, projector.first, feature, mask)
    return projector.rest(FRONTS[min(costs, key=costs.get)](align, projector.first, feature, mask))


def front_costs(align: nn.Module, first: nn.Conv2d, feature: Tensor, mask: Tensor | None) -> dict[str, int]:
    """Products of the forward pass of every form in `FRONTS` that computes `first(align(feature) * mask)`; those of "visible" twice."""
    batch, own, height, width = feature.shape
    positions, taps = batch * height * width, first.kernel_size[0] * first.kernel_size[1]
    if isinstance(align, nn.Identity):
        fold, costs = 0, {"plain": positions * taps * own * first.out_channels}
    elif is_pointwise(align):
        fold = first.weight.numel() * own
        costs = {
            "plain": positions * first.in_channels * (own + taps * first.out_channels),
            "folded": positions * taps * own * first.out_channels + fold,
        }
    else:
        return {"plain": 0}  # a norm or an activation in between: nothing can be folded
    if mask is not None and not feature.is_cuda:  # counting the visible positions would block a GPU
        visible = int(mask.expand(batch, 1, height, width).count_nonzero())
        # matrix products of float32 run at half the rate of convolutions (MKL 100 GFLOP/s, oneDNN 220, on one Zen 5 core)
        costs["visible"] = 2 * visible * taps * own * first.out_channels + fold
    return costs


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a 1x1 convolution and nothing else: what follows from its weight and bias alone."""
    return type(module) is nn.Conv2d and (module.kernel_size, module.stride, module.groups) == ((1, 1), (1, 1), 1)


def plain_front(align: nn.Module, first: nn.Conv2d, feature: Tensor, mask: Tensor | None) -> Tensor:
    """first(align(feature) * mask), as written."""
    aligned = align(feature)
    return first(aligned if mask is None else aligned * mask.to(aligned.dtype))


def folded_front(align: nn.Module, first: nn.Conv2d, feature: Tensor, mask: Tensor | None) -> Tensor:
    """`plain_front` as one convolution of the masked feature and the mask."""
    if mask is None:
        mask = feature.new_ones(1, 1, 1, 1)  # at the border the alignment's bias ends, as a mask does
    weight = folded_weight(align, first)  # (Co, Cs + 1 + padding, k, k)
    mask = mask.to(feature.dtype).expand(len(feature), 1, *feature.shape[-2:])
    padding = mask.new_zeros(1).expand(len(mask), weight.shape[1] - feature.shape[1] - 1, *mask.shape[-2:])
    return F.conv2d(torch.cat([feature * mask, mask, padding], 1), weight, first.bias, padding=first.padding)


def visible_front(align: nn.Module, first: nn.Conv2d, feature: Tensor, mask: Tensor) -> Tensor:
    """`plain_front` from the visible positions: one matrix product per tap of the kernel, added where the tap shifts them to."""
    batch, own, height, width = feature.shape
    image, row, column = mask.expand(batch, 1, height, width)[:, 0].nonzero(as_tuple=True)
    rows = feature.permute(0, 2, 3, 1).reshape(-1, own).index_select(0, (image * height + row) * width + column)  # (visible, Cs)
    if isinstance(align, nn.Identity):
        weight = first.weight
    else:
        weight = folded_weight(align, first)
        rows = torch.cat([rows, rows.new_ones(len(rows), 1), rows.new_zeros(len(rows), weight.shape[1] - own - 1)], 1)
    down, right = first.padding
    # a frame around the map takes what the border's taps shift out of it
    framed_height, framed_width = height + 2 * down, width + 2 * right
    total = None
    for tap_row in range(first.kernel_size[0]):
        for tap_column in range(first.kernel_size[1]):
            change = F.linear(rows, weight[:, :, tap_row, tap_column])  # (visible, Co)
            place = (image * framed_height + row + 2 * down - tap_row) * framed_width + column + 2 * right - tap_column
            if total is None:
                total = widen(change.new_zeros(batch * framed_height * framed_width, first.out_channels))
            total.index_add_(0, place, widen(change))
    total = total.view(batch, framed_height, framed_width, -1)[:, down : down + height, right : right + width] + first.bias
    total = total.to(change.dtype).permute(0, 3, 1, 2)
    # on a CPU the convolution behind it, forward and backward, is faster by a fifth on channels_last in bfloat16, slower by a tenth in float32
    return total if total.dtype == torch.bfloat16 else total.contiguous()


FRONTS = {"plain": plain_front, "folded": folded_front, "visible": visible_front}


def folded_weight(align: nn.Conv2d, first: nn.Conv2d) -> Tensor:
    """The product of both weights and of the alignment's bias: (Co, Cs + 1, k, k), zeros up to a multiple of 8 channels for tensor cores."""
    bias = align.weight.new_zeros(align.out_channels) if align.bias is None else align.bias
    wide = torch.cat([align.weight.flatten(1), bias[:, None]], 1)  # (Ct, Cs + 1)
    wide = F.pad(wide, (0, -wide.shape[1] % 8))
    # as a convolution, the kernels its images: twice the speed of a matrix product on a CPU
    return F.conv2d(first.weight.contiguous(memory_format=torch.channels_last), wide.T[..., None, None])


def random_mask(noise: Tensor, ratio: float) -> Tensor:
    """1 where noise <= 1 - ratio, else 0; noise (B, 1, h, w) uniform in [0, 1)."""
    return (noise <= 1 - ratio).to(noise.dtype)


def centre_mask(height: int, width: int, device=None) -> Tensor:
    """(1, 1, h, w): 0 in rows h // 3 to 2 * h // 3 - 1 and columns w // 3 to 2 * w // 3 - 1, else 1."""
    mask = torch.ones(1, 1, height, width, device=device)
    mask[..., height // 3 : 2 * height // 3, width // 3 : 2 * width // 3] = 0
    return mask


@full_precision
def mimicking(generated: Tensor, teacher: Tensor, mean: bool = False) -> Tensor:
    """Sum of squared differences over (C, h, w), averaged over B; `mean`: averaged over all elements."""
    return F.mse_loss(generated, teacher) if mean else F.mse_loss(generated, teacher, reduction="sum") / len(generated)
