"""AttnFD: attention-guided feature distillation."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.base import Method, option, term_weight
from losses.functional import full_precision, resize_like


class AttnFD(Method):
    """Squared difference of the last features of teacher and student, each refined by channel and spatial attention.

    1/B * sum of (R_T / ||R_T|| - R_S / ||R_S||)^2, the L2 norm being that of the whole tensor, all images of the process together. R is
    the feature behind a CBAM (Woo et al., ECCV 2018): scaled per channel by sigmoid(MLP(average) + MLP(maximum)), then per position by
    sigmoid(conv7x7 of the mean and the maximum over channels). The student's goes through a 1x1 convolution and BatchNorm to the
    teacher's width behind its CBAM.

    The term lies in [0, 4/B], whatever the crop and the widths. The norm of the whole tensor already holds B: with half as many images
    per process the term doubles.

    The paper's description leaves open, and is chosen here: each network has a CBAM of its own width and both are trained with the
    student (the features under the teacher's are constant); the MLP's hidden layer has 1/16 of the channels, as in CBAM's paper; the
    last feature is `head`, the classifier's input (`c4` is the backbone's last stage).
    """

    title = "Attention-guided feature distillation"
    paper = "Mansourian, Jalali, Ahmadi, Kasaei: Attention-guided Feature Distillation for Semantic Segmentation, 2024"
    url = "https://arxiv.org/abs/2403.05451"
    over_batch = {"attnfd": "rank"}  # the norm of a batch

    @dataclass(frozen=True)
    class Options:
        weight: float = term_weight(2.0, "weight of the squared difference")
        feature: str = option("head", "which features are refined and compared", choices=("head", "c4"))

    def __init__(self, options, setup):
        super().__init__(options, setup)
        student, teacher = setup.student[options.feature], setup.teacher[options.feature]
        self.needs = (options.feature,)
        self.student_attention, self.teacher_attention = CBAM(student), CBAM(teacher)
        # (B, Cs, h, w) -> (B, Ct, h, w); no bias in front of a BatchNorm
        self.align = nn.Sequential(nn.Conv2d(student, teacher, 1, bias=False), nn.BatchNorm2d(teacher))

    def forward(self, student, teacher, batch):
        source, target = getattr(student, self.options.feature), getattr(teacher, self.options.feature)
        refined = self.align(self.student_attention(source))
        return {self.name: normalised_distance(refined, self.teacher_attention(resize_like(target, source)))}


class CBAM(nn.Module):
    """Channel, then spatial attention: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.squeeze = nn.Conv2d(channels, hidden, 1, bias=False)
        self.expand = nn.Conv2d(hidden, channels, 1, bias=False)
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        average, maximum = (self.expand(F.relu(self.squeeze(pooled))) for pooled in (x.mean((2, 3), True), x.amax((2, 3), True)))
        x = x * (average + maximum).sigmoid()  # (B, C, 1, 1)
        return x * self.spatial(torch.cat([x.mean(1, True), x.amax(1, True)], 1)).sigmoid()  # (B, 1, h, w)


@full_precision
def normalised_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1/B * ||teacher / ||teacher|| - student / ||student|| ||^2 with norms over all elements; in [0, 4/B]."""
    units = [F.normalize(x.flatten(), dim=0) for x in (student, teacher)]
    return (units[0] - units[1]).square().sum() / len(student)
