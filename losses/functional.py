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


@full_precision
def unit(x: Tensor, dim: int) -> Tensor:
    """x / ||x||_2 along `dim`; 0, and no gradient, where the norm is below 1e-12. (Dividing by max(norm, 1e-12), as usual, sends 1e12
    times the incoming gradient to positions where a ReLU left no channel.)"""
    norm = x.norm(dim=dim, keepdim=True)
    return x / norm.masked_fill(norm < 1e-12, torch.inf)


@full_precision
def similarity_kl(
    student: Tensor,
    student_keys: Tensor,
    teacher: Tensor,
    teacher_keys: Tensor,
    temperature: float = 0.1,
    weights: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """KL between teacher and student in what each row finds similar: softmax over the M keys of row . key / temperature.

    Sum over rows of weights[row] * KL(teacher || student), averaged over G sets of keys, each with a softmax of its own. Exact,
    but the R x M similarities are never there whole: a block of rows at a time, and its gradient in the same pass, so that what
    is kept is as large as the inputs.

    Args:
        student, teacher: rows (R, C), student_keys, teacher_keys: (G, M, C); the student's C may differ from the teacher's.
        weights: (R,), default 1 / R each.
        block: similarities of one block, at least one row.
    """
    if weights is None:
        weights = student.new_full((len(student),), 1 / len(student))
    # three blocks are alive at once: 4 MiB each on a CPU (8 MiB are 12 % faster at 64x128), 64 MiB on a GPU, which wants large products
    if block is None:
        block = 1 << (24 if student.is_cuda else 20)
    return _SimilarityKL.apply(student, student_keys, teacher, teacher_keys, temperature, weights.to(student.dtype), block)


class _SimilarityKL(torch.autograd.Function):
    """The gradient of a row's KL with respect to its similarities is softmax(student) - softmax(teacher): both are at hand in the
    forward pass, so the backward pass only scales what was summed there."""

    @staticmethod
    def forward(ctx, student, student_keys, teacher, teacher_keys, temperature, weights, block):
        with_rows, with_keys = ctx.needs_input_grad[:2]
        row_gradient = torch.zeros_like(student) if with_rows else None
        key_gradient = torch.zeros_like(student_keys) if with_keys else None
        scaled, teacher = student / temperature, teacher / temperature
        weights = weights / len(student_keys)
        step = max(1, block // student_keys.shape[1])
        total = student.new_zeros(())
        for group in range(len(student_keys)):
            keys = student_keys[group]
            for start in range(0, len(student), step):
                rows = slice(start, start + step)
                log_student = (scaled[rows] @ keys.T).log_softmax(1)  # (step, M)
                difference = (teacher[rows] @ teacher_keys[group].T).log_softmax(1)
                probability = difference.exp()
                difference -= log_student
                total += weights[rows] @ difference.mul_(probability).sum(1)
                if with_rows or with_keys:
                    gradient = log_student.exp_().sub_(probability)
                    if with_rows:
                        row_gradient[rows].addmm_(gradient, keys)
                    if with_keys:
                        key_gradient[group].addmm_(gradient.T, scaled[rows] * weights[rows, None])
        if with_rows:
            row_gradient *= weights[:, None] / temperature
        ctx.save_for_backward(row_gradient, key_gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return *(None if saved is None else saved * gradient for saved in ctx.saved_tensors), None, None, None, None, None
