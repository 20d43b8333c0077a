"""DKD: decoupled knowledge distillation, at every labelled pixel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses.base import IGNORE, Method, option, term_weight
from losses.functional import full_precision, labels_like, resize_like


class DKD(Method):
    """Plain KD taken apart: how sure of the labelled class, and how the other classes compare with each other.

    At every labelled pixel, with p = softmax(z / T): term `tckd` = KL between the two-way distributions {labelled class, rest};
    term `nckd` = KL between the distributions over the K - 1 other classes. Plain KD is tckd + (1 - p_teacher[label]) * nckd, so
    it neglects the second where the teacher is sure. Both are means over the labelled pixels, times T^2; the labels are brought to
    the size of the logits by nearest neighbour.

    Weights are the paper's alpha and beta: 1 and 2 with T = 1 for segmentation (1, 8 and T = 4 for classification).
    """

    title = "Decoupled knowledge distillation"
    paper = "Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, CVPR 2022"
    url = "https://arxiv.org/abs/2203.08679"
    over_batch = {"tckd": "rank", "nckd": "rank"}  # means over labelled pixels

    @dataclass(frozen=True)
    class Options:
        tckd_weight: float = term_weight(1.0, "alpha, weight of the target class term")
        nckd_weight: float = term_weight(2.0, "beta, weight of the non-target class term")
        temperature: float = option(1.0, "softmax temperature T", above=0)

    def forward(self, student, teacher, batch):
        teacher_logits = resize_like(teacher.logits, student.logits)
        values = decoupled(student.logits, teacher_logits, labels_like(batch.target, student.logits), self.options.temperature)
        return {term: value for term, value in zip(("tckd", "nckd"), values, strict=True) if self.active(term)}


@full_precision
def decoupled(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(target class, non-target class) divergence of logits (B, K, h, w); target (B, h, w), 255 = ignore.

    Without a labelled pixel both are a connected 0.
    """
    valid = target != IGNORE
    index = torch.where(valid, target, 0).long()[:, None]  # (B, 1, h, w)
    labelled = index == torch.arange(student.shape[1], device=student.device)[:, None, None]  # (B, K, h, w)
    student_two, student_rest = split(student / temperature, index, labelled)
    teacher_two, teacher_rest = split(teacher / temperature, index, labelled)
    pixels = valid.sum().clamp(min=1)

    def mean_kl(log_p: Tensor, log_q: Tensor, p: Tensor) -> Tensor:
        return temperature**2 * ((p * (log_p - log_q)).sum(1) * valid).sum() / pixels

    target_class = mean_kl(teacher_two, student_two, teacher_two.exp())
    non_target_class = mean_kl(teacher_rest, student_rest, teacher_rest.exp().masked_fill(labelled, 0))
    return target_class, non_target_class


def split(logits: Tensor, index: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of {label, rest} (B, 2, h, w), and of the other classes among themselves (B, K, h, w; of no meaning at the
    label). From sums of exponentials of the other classes, not from 1 - p, which is 0 where the network is sure."""
    rest = logits.masked_fill(labelled, -torch.inf).logsumexp(1, keepdim=True)
    two = torch.cat([logits.gather(1, index), rest], 1)
    return two.log_softmax(1), logits - rest
