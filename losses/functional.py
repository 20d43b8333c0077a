"""Shared maths of the losses: pure functions of tensors, each usable and tested alone.

Every function decorated with `full_precision` runs outside autocast on float32 (float64 stays float64): sums of exponentials and
of thousands of squares do not survive bfloat16.
"""

from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.base import IGNORE


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
        groups, count, width = student_keys.shape
        row_gradient = torch.zeros_like(student) if with_rows else None
        key_gradient = student_keys.new_zeros(groups, width, count) if with_keys else None  # transposed, as its products come
        scaled, teacher = student / temperature, teacher / temperature
        weights = weights / groups
        step = max(1, block // count)
        total = student.new_zeros(())
        for group in range(groups):
            keys = student_keys[group]
            for start in range(0, len(student), step):
                rows = slice(start, start + step)
                difference, similarity = product(teacher[rows], teacher_keys[group]), product(scaled[rows], keys)  # (step, M)
                probability, log_sum = softmax_with_sum(difference)
                gradient, student_log_sum = softmax_with_sum(similarity)
                kl = difference.sub_(similarity).mul_(probability).sum(1) + student_log_sum - log_sum
                total += weights[rows] @ kl
                if with_rows or with_keys:
                    gradient -= probability
                    if with_rows:
                        row_gradient[rows] += product(gradient, keys.T)
                    if with_keys:
                        key_gradient[group] += product((scaled[rows] * weights[rows, None]).T, gradient.T)
        if with_rows:
            row_gradient *= weights[:, None] / temperature
        if with_keys:
            key_gradient = key_gradient.transpose(1, 2)
        ctx.save_for_backward(row_gradient, key_gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return *(None if saved is None else saved * gradient for saved in ctx.saved_tensors), None, None, None, None, None


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T of matrices (n, C), (m, C); float32 on a CPU by oneDNN where torch has it: 200 GFLOP/s on a Zen 5 core where MKL has 100."""
    if a.device.type == "cpu" and a.dtype == torch.float32 and ONEDNN is not None:
        return ONEDNN(a, b, None, "none", [], "")
    return a @ b.T


ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def softmax_with_sum(x: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """softmax(x) over `dim`, and log sum exp(x) without it: at the largest x, log softmax = x - log sum exp. One pass of exponentials,
    where a log-softmax and its exponential take two."""
    probability = x.softmax(dim)
    return probability, x.amax(dim) - probability.amax(dim).log()


@full_precision
def label_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, K, h, w), mean over labelled pixels of labels (B, h, w); a connected 0 without any."""
    # summed here: torch's own sum of it has no deterministic form on a GPU
    return F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="none").sum() / (labels != IGNORE).sum().clamp(min=1)
