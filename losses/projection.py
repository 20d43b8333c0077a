"""Masked generation (Af-DCD, MGD): alignment to the teacher's width, mask, projector; and its first layers in one.

Alignment (1x1) -> mask -> first convolution is linear up to the mask, which is the same for all channels. So it is one convolution of
the masked student with the product of both weights: a quarter of the products at 512 -> 2048 channels. The alignment's bias, which the
mask cuts out too, comes in as the weight of one more channel, the mask itself. Parameters, gradients and checkpoints are those of the
layers as written.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.functional import widen


class Chain(nn.Sequential):
    """A projector of layers one after the other. A projector has its `first` convolution, without activation, and the `rest`."""

    @property
    def first(self) -> nn.Conv2d:
        return self[0]

    def rest(self, x: Tensor) -> Tensor:
        for layer in [*self][1:]:
            x = convolve(layer, x) if type(layer) is nn.Conv2d else layer(x)
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
        second = F.relu(convolve(self.second, first))
        return (convolve(self.from_first, first) + convolve(self.from_second, second)) / 2


PROJECTORS = {"plain": Projector, "enhanced": EnhancedProjector, "bottleneck": BottleneckProjector}


def generate(align: nn.Module, projector: nn.Module, feature: Tensor, mask: Tensor | None) -> Tensor:
    """projector(align(feature) * mask), (B, Cs, h, w) -> (B, Ct, h, w).

    Args:
        align: a 1x1 convolution Cs -> Ct, nn.Identity, or any module, which is then computed as written.
        mask: (B or 1, 1, h, w) of 0 and 1, None for no mask.
    """
    return projector.rest(front(align, projector.first, feature, mask))


def front(align: nn.Module, first: nn.Conv2d, feature: Tensor, mask: Tensor | None) -> Tensor:
    """first(align(feature) * mask) in the form that costs least."""
    costs = front_costs(align, first, feature, mask)
    return as_convolved(FRONTS[min(costs, key=costs.get)](align, first, as_convolved(feature), mask))


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """layer(x) of a convolution with a kernel size and a padding alone; under autocast its weight is converted as `_Converted` does."""
    dtype = computed_in(x)
    weight = layer.weight if layer.weight.dtype == dtype else _Converted.apply(layer.weight, dtype)
    return F.conv2d(x, weight, layer.bias, padding=layer.padding)


class _Converted(torch.autograd.Function):
    """A parameter in another type. Its gradient is stored as the parameter is at once, where autograd first converts and then arranges
    it: two float32 copies, 144 MiB each for 2048 -> 2048 channels."""

    @staticmethod
    def forward(ctx, weight, dtype):
        ctx.save_for_backward(weight)
        return weight.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return torch.empty_like(ctx.saved_tensors[0]).copy_(gradient), None


def as_convolved(x: Tensor) -> Tensor:
    """x in the memory format in which a convolution runs best: in float32 on a CPU NCHW, whatever the network is in (oneDNN takes a
    third longer for the gradients of 2048 -> 2048 channels in NHWC); as it is elsewhere."""
    return x if x.is_cuda or x.dtype != torch.float32 else x.contiguous()


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
    return F.conv2d(torch.cat([feature * mask, mask, padding], 1), as_convolved(weight), first.bias, padding=first.padding)


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
    dtype = computed_in(rows)
    down, right = first.padding
    # a frame around the map takes what the border's taps shift out of it
    framed = height + 2 * down, width + 2 * right
    places = (image * framed[0] + row + 2 * down) * framed[1] + column + 2 * right
    total = _ShiftedProducts.apply(rows.to(dtype), weight.to(dtype), places, batch, framed)
    total = total[:, down : down + height, right : right + width] + first.bias
    return total.to(dtype).permute(0, 3, 1, 2)


class _ShiftedProducts(torch.autograd.Function):
    """Adds rows (M, K) times every tap of a weight (Co, K, k, k) to a framed map, each at its place less the tap's shift: (B, h', w', Co).

    By hand, because index_add keeps what it adds for its backward pass, of which that needs the shape alone: 130 MiB for CamVid.
    """

    @staticmethod
    def forward(ctx, rows, weight, places, batch, framed):
        ctx.save_for_backward(rows, weight, places)
        total = widen(rows.new_zeros(batch * framed[0] * framed[1], len(weight)))
        for tap, shift in _ShiftedProducts.taps(weight, framed):
            total.index_add_(0, places - shift, widen(rows @ weight[tap].T))
        return total.view(batch, *framed, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        rows, weight, places = ctx.saved_tensors
        row_gradient, weight_gradient = widen(torch.zeros_like(rows)), torch.empty_like(weight)
        framed, gradient = gradient.shape[1:3], gradient.flatten(0, 2)
        for tap, shift in _ShiftedProducts.taps(weight, framed):
            change = gradient.index_select(0, places - shift).to(rows.dtype)  # (M, Co)
            row_gradient += change @ weight[tap]
            weight_gradient[tap] = change.T @ rows
        return row_gradient.to(rows.dtype), weight_gradient, None, None, None

    @staticmethod
    def taps(weight, framed):
        """The index of each tap in the weight, and by how many positions of the framed map it shifts."""
        height, width = weight.shape[-2:]
        return [((slice(None), slice(None), row, column), row * framed[1] + column) for row in range(height) for column in range(width)]


FRONTS = {"plain": plain_front, "folded": folded_front, "visible": visible_front}


def folded_weight(align: nn.Conv2d, first: nn.Conv2d) -> Tensor:
    """The product of both weights and of the alignment's bias: (Co, Cs + 1, k, k), zeros up to a multiple of 8 channels for tensor cores."""
    bias = align.weight.new_zeros(align.out_channels) if align.bias is None else align.bias
    wide = torch.cat([align.weight.flatten(1), bias[:, None]], 1)  # (Ct, Cs + 1)
    return _Product.apply(first.weight, F.pad(wide, (0, -wide.shape[1] % 8)), computed_in(first.weight))


class _Product(torch.autograd.Function):
    """Kernels (Co, Ct, k, k) times a matrix (Ct, K): (Co, K, k, k). As a 1x1 convolution whose images the kernels are: on a CPU twice
    the speed of a matrix product. By hand, to convert the kernels to NHWC again instead of keeping them: 144 MiB for 2048 channels."""

    @staticmethod
    def forward(ctx, kernels, matrix, dtype):
        ctx.save_for_backward(kernels, matrix)
        ctx.dtype = dtype
        return F.conv2d(*_Product.operands(kernels, matrix, dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        kernels, matrix = ctx.saved_tensors
        images, pointwise = _Product.operands(kernels, matrix, ctx.dtype)
        matrix_gradient = nn.grad.conv2d_weight(images, pointwise.shape, gradient)  # (K, Ct, 1, 1)
        del images  # as large as what comes next
        if ctx.dtype == kernels.dtype:
            kernel_gradient = nn.grad.conv2d_input(kernels.shape, pointwise, gradient)
        else:  # in blocks, since all of them in half precision are another 72 MiB for 2048 channels
            kernel_gradient = torch.empty_like(kernels)
            for start in range(0, len(kernels), 256):
                block = slice(start, start + 256)
                kernel_gradient[block] = nn.grad.conv2d_input(kernels[block].shape, pointwise, gradient[block])
        return kernel_gradient, matrix_gradient.flatten(1).T.to(matrix.dtype), None

    @staticmethod
    def operands(kernels, matrix, dtype):
        return kernels.to(dtype, memory_format=torch.channels_last), matrix.T[..., None, None].to(dtype)


def computed_in(x: Tensor) -> torch.dtype:
    """The type that a convolution of x computes in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def random_mask(noise: Tensor, ratio: float) -> Tensor:
    """1 where noise <= 1 - ratio, else 0; noise (B, 1, h, w) uniform in [0, 1)."""
    return (noise <= 1 - ratio).to(noise.dtype)


def centre_mask(height: int, width: int, device=None) -> Tensor:
    """(1, 1, h, w): 0 in rows h // 3 to 2 * h // 3 - 1 and columns w // 3 to 2 * w // 3 - 1, else 1."""
    mask = torch.ones(1, 1, height, width, device=device)
    mask[..., height // 3 : 2 * height // 3, width // 3 : 2 * width // 3] = 0
    return mask


def mimicking(generated: Tensor, teacher: Tensor, mean: bool = False) -> Tensor:
    """Sum of squared differences over (C, h, w), averaged over B, in float32 whatever the maps are in; `mean`: averaged over all elements."""
    return _SquaredDifference.apply(generated, teacher) / (generated.numel() if mean else len(generated))


class _SquaredDifference(torch.autograd.Function):
    """Sum of (generated - teacher)^2. By hand, to widen maps of half precision image by image, in both passes, instead of keeping wide
    copies of both: 127 MiB for CamVid."""

    @staticmethod
    def forward(ctx, generated, teacher):
        ctx.save_for_backward(generated, teacher)
        return sum((widen(ours) - widen(theirs)).square_().sum() for ours, theirs in zip(generated, teacher, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        generated, teacher = ctx.saved_tensors
        change = torch.empty_like(generated)
        for found, ours, theirs in zip(change, generated, teacher, strict=True):
            found.copy_((widen(ours) - widen(theirs)).mul_(2 * gradient))
        return change, -change.to(teacher.dtype) if ctx.needs_input_grad[1] else None
