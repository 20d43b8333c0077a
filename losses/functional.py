"""Shared maths of the losses: pure functions of tensors, each usable and tested alone.

Every function decorated with `full_precision` runs outside autocast on float32 (float64 stays float64): sums of exponentials and
of thousands of squares do not survive bfloat16.
"""

from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor


def widen(x):
    """float16 and bfloat16 tensors as float32; everything else unchanged."""
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(function):
    """Run a function of tensors outside autocast, its half precision arguments widened to float32."""

    @wraps(function)
    def wrapper(*args, **kwargs):
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*map(widen, args), **{name: widen(value) for name, value in kwargs.items()})

    return wrapper


def resize_like(x: Tensor, reference: Tensor) -> Tensor:
    """x (B, C, h, w) at the spatial size of `reference`: unchanged when equal, else bilinear with align_corners=False.

    The rule of this project where teacher and student differ in stride: the teacher's map is resized to the student's, so that
    the gradient of the student passes through no interpolation.
    """
    if x.shape[-2:] == reference.shape[-2:]:
        return x
    return F.interpolate(x, size=reference.shape[-2:], mode="bilinear", align_corners=False)


def labels_like(target: Tensor, reference: Tensor) -> Tensor:
    """target (B, H, W) at the spatial size of `reference`, by nearest neighbour: (B, h, w), same type."""
    if target.shape[-2:] == reference.shape[-2:]:
        return target
    return F.interpolate(target[:, None].float(), size=reference.shape[-2:], mode="nearest")[:, 0].to(target.dtype)


@full_precision
def pixel_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, valid: Tensor | None = None) -> Tensor:
    """T^2 * mean over pixels of KL(softmax(teacher / T) || softmax(student / T)), softmax over classes.

    Args:
        student, teacher: logits (B, K, h, w).
        valid: (B, h, w) bool; the mean runs over these pixels alone, and is a connected 0 when there are none.
    """
    kl = F.kl_div(
        F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1), reduction="none", log_target=True
    ).sum(1)  # (B, h, w)
    mean = kl.mean() if valid is None else (kl * valid).sum() / valid.sum().clamp(min=1)
    return temperature**2 * mean


@full_precision
def channel_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) per channel, softmax over positions: (B, C, h, w) -> (B, C).

    From logarithms throughout: over thousands of positions probabilities underflow, and their logarithm is -inf.
    """
    student, teacher = student.flatten(2) / temperature, teacher.flatten(2) / temperature  # (B, C, h*w)
    kl = F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), reduction="none", log_target=True)
    return temperature**2 * kl.sum(-1)


def spatial_attention(feature: Tensor, size: Tensor) -> Tensor:
    """Where features are large: mean over channels of feature^2 at the spatial size of the map `size`, as a unit vector over its
    positions: (B, C, h, w) -> (B, h'*w')."""
    return F.normalize(resize_like(feature.square().mean(1, keepdim=True), size).flatten(1), dim=1)
