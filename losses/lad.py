"""LAD: teachers that see a noised label as a fourth input channel (Qiu et al.: Make a Strong Teacher with Label Assistance: A Novel
Knowledge Distillation Approach for Semantic Segmentation).

`train_baseline.py --label-assisted` trains one, of any model; `train_kd.py` recognises it by its four input channels and feeds it
labels, with every method. Students have three channels: the published student's fourth is always 0, and a convolution of zeros adds
nothing, so that the plane can be left out exactly.
"""

import torch
from torch import Tensor

from losses.base import IGNORE, random_rows
from losses.functional import channel_kl

SCALE = 100.0  # of the plane, which joins colours of 0..255; networks normalise both
TRAINING_NOISE, TEACHING_NOISE = 0.03, 0.02
DROPOUT = 0.01  # in the heads of a label-assisted teacher
CONSISTENCY_WEIGHT, TEMPERATURE = 5.0, 4.0


def label_plane(target: Tensor, codes: Tensor, noise: Tensor) -> Tensor:
    """(code of the pixel's class + noise) * 100: the fourth input channel, (B, 1, H, W).

    Args:
        target: (B, H, W) labels, 255 = ignore, which is recoded as class K.
        codes: (B, K + 1), one scalar per class and image; K + 1 <= 256.
        noise: (B, H, W).
    """
    index = target.long().masked_fill(target == IGNORE, codes.shape[1] - 1)
    return SCALE * (codes.gather(1, index.flatten(1)).view_as(noise) + noise)[:, None]


def teaching_codes(num_classes: int, device=None) -> Tensor:
    """(K + 1,) codes from -1.1 to 1: (k - 11) / 10 for the 21 classes of VOC as published, spread over the same range for others."""
    return torch.arange(num_classes + 1, device=device) * (2.1 / num_classes) - 1.1


def teaching_image(batch, num_classes: int, seed: int) -> Tensor:
    """What a label-assisted teacher sees when it teaches, and when it is validated: (B, 4, H, W) float32, fixed codes, noise 0.02."""
    codes = teaching_codes(num_classes, batch.image.device).expand(len(batch), -1)
    noise = random_rows(torch.randn, "lad/teach", seed, batch, *batch.target.shape[1:])
    return torch.cat([batch.image.float(), label_plane(batch.target, codes, TEACHING_NOISE * noise)], 1)


def training_image(batch, num_classes: int, seed: int, path: int) -> Tensor:
    """What a label-assisted teacher is trained on, (B, 4, H, W) float32: codes from N(0, 1) for every image, noise 0.03; other ones
    for each of the two paths."""
    codes = random_rows(torch.randn, f"lad/codes{path}", seed, batch, num_classes + 1)
    noise = random_rows(torch.randn, f"lad/noise{path}", seed, batch, *batch.target.shape[1:])
    return torch.cat([batch.image.float(), label_plane(batch.target, codes, TRAINING_NOISE * noise)], 1)


def consistency(first: Tensor, second: Tensor) -> Tensor:
    """CWD (T = 4) of the first path's logits to the second's plus the reverse, the target side detached."""
    forth = channel_kl(first, second.detach(), TEMPERATURE).mean()
    return forth + channel_kl(second, first.detach(), TEMPERATURE).mean()
