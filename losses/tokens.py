"""Learned tokens that turn a map into soft masks: shared maths of maskd and freekd.

M tokens, each a vector of the map's C channels; a mask is the sigmoid of a token's inner product with every position.
"""

import torch
from torch import Tensor

from losses.functional import full_precision


@full_precision
def token_masks(tokens: Tensor, x: Tensor) -> Tensor:
    """tokens (M, C), x (B, C, h, w) -> masks (B, M, h, w) in (0, 1)."""
    return torch.einsum("mc,bchw->bmhw", tokens, x).sigmoid()


@full_precision
def masked_mean(error: Tensor, masks: Tensor) -> Tensor:
    """Mean over images and masks of sum(mask * error) / sum(mask); error (B, h, w), masks (B, M, h, w)."""
    return (torch.einsum("bmhw,bhw->bm", masks, error) / masks.sum((2, 3)).clamp(min=1e-12)).mean()


@full_precision
def overlap(masks: Tensor) -> Tensor:
    """Mean Dice coefficient 2 <a, b> / (<a, a> + <b, b>) over the pairs of different masks of an image; (B, M, h, w) -> [0, 1]."""
    count = masks.shape[1]
    products = torch.einsum("bmhw,bnhw->bmn", masks, masks)
    squares = products.diagonal(dim1=1, dim2=2)  # (B, M)
    dice = 2 * products / (squares[:, :, None] + squares[:, None]).clamp(min=1e-12)
    others = ~torch.eye(count, dtype=torch.bool, device=masks.device)
    return (dice * others).sum((1, 2)).mean() / (count * (count - 1))
