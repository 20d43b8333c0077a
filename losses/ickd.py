"""ICKD: inter-channel correlation knowledge distillation."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from losses.base import Method, option, term_weight
from losses.functional import full_precision, resize_like


class ICKD(Method):
    """How the channels of a map relate to each other: the matrix of their inner products, the student's to equal the teacher's.

    G = X X^T of X (C, N) per image, rows divided by their L2 norm; the loss is the squared difference summed over both axes,
    divided by B * C. Term `logits`: on the class scores, as in the comparison of the `aicsd` paper. Term `feature`: on backbone or
    head features as in the original, the student's through a 1x1 convolution with BatchNorm to the teacher's width.

    Weight 3 is this project's, none is known for this form: on `shapes` its gradient at the student's logits then equals that of
    plain KD with weight 1, once the first fifty steps are over.

    Differs from the paper: one matrix for the whole map; its segmentation variant that cuts the map into a grid of cells is not here.
    """

    title = "Inter-channel correlation knowledge distillation"
    paper = "Liu et al.: Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation, ICCV 2021"
    url = "https://arxiv.org/abs/2202.03680"

    @dataclass(frozen=True)
    class Options:
        logits_weight: float = term_weight(3.0, "weight of the term on the logits")
        feature_weight: float = term_weight(0.0, "weight of the term on features")
        feature: str = option("c4", "which features", choices=("c4", "c3", "head"), terms=("feature",))

    def __init__(self, options, setup):
        super().__init__(options, setup)
        self.needs = ("logits",) * self.active("logits")
        if self.active("feature"):
            self.needs += (options.feature,)
            student, teacher = setup.student[options.feature], setup.teacher[options.feature]
            self.embed = nn.Sequential(nn.Conv2d(student, teacher, 1, bias=False), nn.BatchNorm2d(teacher))

    def forward(self, student, teacher, batch):
        terms = {}
        if self.active("logits"):
            terms["logits"] = correlation_distance(student.logits, resize_like(teacher.logits, student.logits))
        if self.active("feature"):
            student_map, teacher_map = (getattr(output, self.options.feature) for output in (student, teacher))
            terms["feature"] = correlation_distance(self.embed(student_map), resize_like(teacher_map, student_map))
        return terms


@full_precision
def correlation_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum of squared differences of the channels' Gram matrices with unit rows, divided by B * C; maps (B, C, h, w)."""
    return (gram(student) - gram(teacher)).square().sum((1, 2)).mean() / student.shape[1]


def gram(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, C) with unit rows."""
    x = x.flatten(2)
    return F.normalize(x @ x.transpose(1, 2), dim=-1)
