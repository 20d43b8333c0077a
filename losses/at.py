"""AT: attention transfer."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from losses.base import Method, option, term_weight
from losses.functional import full_precision, pixel_kl, resize_like, spatial_attention


class AT(Method):
    """Mean squared difference of the spatial attention maps of teacher and student (term `at`).

    The map of an image says where its features are large: a = v / ||v|| with v the mean over channels of f^2, flattened to the N
    positions. The loss is the mean over B*N of (a_student - a_teacher)^2; with unit vectors it is at most 4/N, hence the weight of
    10000. It needs no projection, since widths vanish in the mean. Term `kd` is plain KD with T = 1. The weights are the CIRKD line's,
    on `head`, the input of the last classifier.
    """

    title = "Attention transfer"
    paper = (
        "Zagoruyko, Komodakis: Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via "
        "Attention Transfer, ICLR 2017"
    )
    url = "https://arxiv.org/abs/1612.03928"

    @dataclass(frozen=True)
    class Options:
        kd_weight: float = term_weight(1.0, "weight of plain KD")
        weight: float = term_weight(1e4, "weight of the difference of attention maps")
        feature: str = option("head", "which features are compared", choices=("head", "c4"), terms=("at",))

    def __init__(self, options, setup):
        super().__init__(options, setup)
        self.needs = (options.feature,) * self.active(self.name) + ("logits",) * self.active("kd")

    def forward(self, student, teacher, batch):
        terms = {}
        if self.active("kd"):
            terms["kd"] = pixel_kl(student.logits, resize_like(teacher.logits, student.logits))
        if self.active(self.name):
            source, target = getattr(student, self.options.feature), getattr(teacher, self.options.feature)
            terms[self.name] = attention_transfer(source, target)
        return terms


@full_precision
def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the attention maps of (B, Cs, h, w) and (B, Ct, h', w'), the teacher's resized."""
    return F.mse_loss(spatial_attention(student, student), spatial_attention(teacher, student))
