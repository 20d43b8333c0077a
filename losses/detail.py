"""The detail loss of STDC: a shallow stage learns where the labels have boundaries (Fan et al., CVPR 2021,
https://arxiv.org/abs/2104.13188, section 3.3). Part of the task loss of models with a detail head, not a method."""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.base import IGNORE
from losses.functional import full_precision

FUSE = ((1, 6), (2, 3), (4, 1))  # stride of a level and tenths of its weight: the authors learn nothing, they fix 0.6, 0.3, 0.1
THRESHOLD = 1  # tenth that the weighted sum of the levels must exceed


@torch.no_grad()
def boundaries(target: Tensor) -> Tensor:
    """Where labels change: (B, H, W) integers, 255 = ignore -> (B, 1, H, W) float32, 1 on a boundary.

    A level is the Laplacian of the class numbers at every, every second or every fourth pixel, 8 times the pixel less its 3x3
    neighbours; it sees a boundary where that is positive, hence on the side of the larger number, and is enlarged by nearest
    neighbour. A pixel is a boundary if the weighted levels exceed 0.1: the coarsest alone does not.

    Differs from the released code: ignored pixels are no class of their own but missing neighbours, and have no boundary at a level;
    beyond the picture there is nothing, where the released code has class 0, so that its crops have frames.
    """
    known = (target != IGNORE)[:, None].float()
    labels = target[:, None].float() * known
    total = 0.0
    for stride, tenths in FUSE:
        # sums over 3x3, zeros beyond the picture; exact, as integers below 2^24
        neighbours, count = (F.avg_pool2d(x, 3, stride, padding=1, divisor_override=1) for x in (labels, known))
        here = slice(None, None, stride)
        edge = labels[..., here, here] * count > neighbours  # never where ignored, as 0 is not above a sum
        total = total + tenths * F.interpolate(edge.float(), target.shape[-2:], mode="nearest")
    return (total > THRESHOLD).float()


@full_precision
def detail_loss(logits: Tensor, target: Tensor, valid: Tensor | float) -> Tensor:
    """Binary cross-entropy plus dice loss of the boundary scores, over labelled pixels.

    The cross-entropy is a sum divided by `valid` (see `task.cross_entropy`). Dice, the mean over images of
    1 - (2 * sum(p * b) + 1) / (sum(p) + sum(b) + 1) with p the sigmoid of the scores and b the boundaries, does not depend on how few
    boundary pixels there are. An image without a labelled pixel adds 0.

    Args:
        logits: (B, 1, h, w), upsampled bilinearly with align_corners=True to the target's size.
        target: (B, H, W) integer labels, 255 = ignore.
        valid: number of labelled pixels, as in `task.cross_entropy`.
    """
    logits = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=True)
    known, edges = (target != IGNORE)[:, None].float(), boundaries(target)
    cross_entropy = (F.binary_cross_entropy_with_logits(logits, edges, reduction="none") * known).sum() / valid
    probability, edges = logits.sigmoid() * known, edges * known
    overlap, size = (x.sum((1, 2, 3)) for x in (probability * edges, probability + edges))
    return cross_entropy + (1 - (2 * overlap + 1) / (size + 1)).mean()
