"""DSD: double similarity distillation."""

from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.base import Method, option, term_weight
from losses.functional import full_precision, resize_like, spatial_attention, widen


class DSD(Method):
    """Differences between the attention maps of a network's levels, and similarities between its class maps, as the teacher's.

    Term `psd` (pixel-wise similarity): the attention map of a level is a = v / ||v|| with v the mean over channels of its square,
    flattened to N positions. For every two levels the residual r = a_m - a_n, divided by its norm, is compared with the teacher's:
    mean over the three pairs and B*N of squared differences. Levels: a middle feature (c3) or the auxiliary class scores, the input of
    the last classifier, the class scores.

    Term `csd` (category-wise similarity): class scores are average-pooled 2x2, p = softmax over positions of z / 4 per class,
    G = p p^T (B, K, K); mean of (G_student - G_teacher)^2. Entries of G are about 1/N, so that the term is about 1e-7 at the published
    weight of 10: it hardly acts.

    Levels of different size (SegFormer's) have their one-channel maps resized to the student's class scores.
    """

    title = "Double similarity distillation"
    paper = "Feng, Sun, Diao, Li, Gao: Double Similarity Distillation for Semantic Image Segmentation, IEEE Transactions on Image Processing 2021"
    url = "https://arxiv.org/abs/2107.08591"

    @dataclass(frozen=True)
    class Options:
        psd_weight: float = term_weight(1000.0, "weight of the pixel-wise similarity")
        csd_weight: float = term_weight(10.0, "weight of the category-wise similarity")
        level: str = option("c3", "the first level; the others are the last classifier's input and output", choices=("c3", "aux"), terms=("psd",))
        temperature: float = option(4.0, "softmax temperature of the class maps", above=0, terms=("csd",))

    def __init__(self, options, setup):
        super().__init__(options, setup)
        self.levels = (options.level, "head", "logits")
        self.needs = self.levels if self.active("psd") else ("logits",)

    def forward(self, student, teacher, batch):
        terms = {}
        if self.active("psd"):
            levels = ([getattr(output, level) for level in self.levels] for output in (student, teacher))
            terms["psd"] = residual_difference(student.logits, *levels)
        if self.active("csd"):
            target = resize_like(teacher.logits, student.logits)
            terms["csd"] = class_similarity_difference(student.logits, target, self.options.temperature)
        return terms


@full_precision
def residual_difference(size: Tensor, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean squared difference of the residuals between levels (B, C, h, w), all at the spatial size of the map `size`."""
    return F.mse_loss(residuals(student, size), residuals(teacher, size))


def residuals(levels: list[Tensor], size: Tensor) -> Tensor:
    """Unit differences of the attention maps of every two levels: (pairs, B, N)."""
    maps = [spatial_attention(widen(level), size) for level in levels]
    # the released code normalises the residual twice, which changes nothing
    return torch.stack([F.normalize(second - first, dim=1) for first, second in combinations(maps, 2)])


@full_precision
def class_similarity_difference(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Mean squared difference of the similarities between classes (B, K, K); logits (B, K, h, w)."""
    return F.mse_loss(class_similarity(student, temperature), class_similarity(teacher, temperature))


def class_similarity(logits: Tensor, temperature: float) -> Tensor:
    """(B, K, h, w) -> (B, K, K): inner products of the classes' distributions over the positions of the 2x2 pooled map."""
    p = (F.avg_pool2d(logits, 2, 2, ceil_mode=True).flatten(2) / temperature).softmax(-1)  # (B, K, N/4)
    return p @ p.mT
