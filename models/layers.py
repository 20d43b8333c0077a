"""Layers that several heads share, and a look inside them."""

from collections.abc import Iterable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int, dilation: int = 1, norm=nn.BatchNorm2d) -> nn.Sequential:
    """Convolution without bias that keeps the size, normalisation, ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False)
    return nn.Sequential(conv, norm(out_channels), nn.ReLU(inplace=True))


def regional_means(x: Tensor, size) -> Tensor:
    """Means over `size` x `size` regions of (B, C, h, w): `F.adaptive_avg_pool2d`, whose gradient has no deterministic form on a GPU; under
    `torch.use_deterministic_algorithms` by products with matrices."""
    return average(x, size) if torch.are_deterministic_algorithms_enabled() else F.adaptive_avg_pool2d(x, size)


def average(x: Tensor, size) -> Tensor:
    """`F.adaptive_avg_pool2d`: means over `size` x `size` regions, those of a side of n pixels from floor(k n / size) to
    ceil((k + 1) n / size). As x times a matrix of shares on either side, which needs no sizes in advance."""
    rows, columns = (size, size) if isinstance(size, int) else size
    if rows == columns == 1:
        return x.mean((2, 3), keepdim=True)
    return shares(rows, x.shape[2], x) @ x @ shares(columns, x.shape[3], x).mT


def shares(regions: int, length: int, like: Tensor) -> Tensor:
    """(regions, length): the weight of every position in the mean of every region."""
    region, place = torch.arange(regions, device=like.device)[:, None], torch.arange(length, device=like.device)
    inside = (place >= region * length // regions) & (place < ((region + 1) * length + regions - 1) // regions)
    return inside.to(like.dtype) / inside.sum(1, keepdim=True).to(like.dtype)


def initialize(part: nn.Module) -> None:
    """Kaiming-normal convolutions, fan out: as torchvision initialises its networks."""
    for module in part.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def stages_of(blocks: Iterable[nn.Module], ends: tuple[int, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Run the blocks one after the other; the outputs of those whose position is in `ends`."""
    stages = []
    for index, block in enumerate(blocks):
        x = block(x)
        if index in ends:
            stages.append(x)
    return tuple(stages)


@contextmanager
def inputs_of(modules: dict[str, nn.Module]):
    """{name: input of the module's last call inside the context}. torchvision's residual blocks call one ReLU two or three times; the
    last call gets what the block would return without it. Copies, as those ReLUs overwrite their input."""
    inputs = {}

    def keep(name):
        return lambda module, args: inputs.update({name: args[0].clone()})

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in modules.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


class PooledBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d for maps that may have a single position, as those pooled to 1x1, which trains on a batch of one image too.

    One image then gives one value per channel. Its variance is 0 and its normalised value 0 whatever the image (torch raises), so
    such a batch is normalised with the running statistics, as in evaluation, and leaves them unchanged. SyncBatchNorm, which
    replaces this class when a model is converted, sees one value per rank and needs no such rule on two ranks or more.
    """

    def is_single(self, x: Tensor) -> bool:
        """Whether there is one value per channel."""
        return x.numel() == x.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.is_single(x):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps)
        return super().forward(x)
