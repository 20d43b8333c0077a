"""OCRNet: object-contextual representations (Yuan et al., ECCV 2020, https://arxiv.org/abs/1909.11065, sections 3.2 and 3.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fcn import FCNHead
from .head import Head
from .hrnet import join, resize
from .layers import conv_bn_relu


class OCRHead(Head):
    """Every position described by the objects it looks like -> classifier.

    The auxiliary classifier's scores, softmax over positions, are soft regions, one per class; a region's representation is the mean
    of the features it covers. Each position attends to these K representations, and what it gets is joined with its own features.
    So `aux` is part of the model: the logits depend on it.

    The auxiliary classifier reads c3 and the features come from c4, as in mmsegmentation; on HRNet both read all branches at stride 4.
    Keys have half of `width`: 256 of 512 as published. No dropout on HRNet, 0.1 elsewhere.

    Args:
        channels: of (c1, c2, c3, c4).
        stride: of c4; plays no part.
        parallel: the stages are branches of one depth, all of which are read: `hrnet.join`.
    """

    intrinsic = ("aux",)

    def __init__(
        self, channels: tuple[int, ...], width: int, num_classes: int, *, stride: int = 8, head_after_dropout: bool = False, parallel: bool = False
    ):
        super().__init__(width, num_classes, head_after_dropout)
        self.parallel = parallel
        if parallel:
            self.stride, self.dropout = 4, nn.Identity()
            self.regions = FCNHead(channels, sum(channels), num_classes, parallel=True)
        else:
            self.regions = FCNHead(channels, channels[2] // 4, num_classes, stage=2)
        keys = width // 2
        self.reduce = conv_bn_relu(sum(channels) if parallel else channels[3], width, 3)
        self.query = nn.Sequential(conv_bn_relu(width, keys, 1), conv_bn_relu(keys, keys, 1))
        self.key = nn.Sequential(conv_bn_relu(width, keys, 1), conv_bn_relu(keys, keys, 1))
        self.value = conv_bn_relu(width, keys, 1)
        self.expand = conv_bn_relu(keys, width, 1)
        self.fuse = conv_bn_relu(2 * width, width, 1)

    def extend(self, stages):
        return *stages, self.regions(stages)["logits"]

    def features(self, stages):
        pixels = self.reduce(join(stages) if self.parallel else stages[3])  # (B, width, h, w)
        objects = region_means(pixels, resize(stages[-1], pixels))  # (B, width, K, 1); at output stride 32 c3 is the larger
        query, key, value = (part.flatten(2).mT for part in (self.query(pixels), self.key(objects), self.value(objects)))
        context = F.scaled_dot_product_attention(query, key, value)  # (B, h*w, keys)
        context = self.expand(context.mT.unflatten(2, pixels.shape[2:]))
        return self.fuse(torch.cat([context, pixels], dim=1))

    def forward(self, stages):
        return {**super().forward(stages), "aux": stages[-1]}


def region_means(pixels: Tensor, scores: Tensor) -> Tensor:
    """Mean over positions of the features (B, C, h, w), weighted with the softmax over positions of the scores (B, K, h, w): (B, C, K, 1)."""
    return (pixels.flatten(2) @ scores.flatten(2).softmax(2).mT).unsqueeze(3)
