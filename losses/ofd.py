"""OFD: the overhaul of feature distillation (margin ReLU, partial distance, features before the ReLU)."""

from dataclasses import dataclass
from math import pi, sqrt

import torch
from torch import Tensor, nn

from losses.base import Method, term_weight
from losses.functional import full_precision, resize_like

STAGES = {"p1": 8, "p2": 4, "p3": 2, "p4": 1}  # field: what its distance is divided by


class OFD(Method):
    """Squared distance of the four stages before their last ReLU, where a difference would matter behind it.

    Sum over stages of 1 / (d * B) * sum over (C, h, w) of (S - T')^2 where S > T' or T' > 0, else 0, with d = 8, 4, 2, 1 from the first
    stage to the last. S is the student's stage through a bias-free 1x1 convolution and BatchNorm to the teacher's width, T' the
    teacher's, floored at a negative margin per channel: max(T, m), m = E[x | x < 0] for x normal with the mean and standard deviation
    that the bias and weight of the teacher's last BatchNorm of the stage give. A response far below zero, which the ReLU drops, asks
    for a negative value and no more.

    The weight is the published one; the sums grow with the crop and the teacher's width. Stages that end in no ReLU (MobileNets) are
    taken as they are; for such a teacher m is the mean of the channel's negative values in the process's batch,
    and the term no mean over images.
    """

    title = "Overhaul of feature distillation"
    paper = "Heo, Kim, Yun, Park, Kwak, Choi: A Comprehensive Overhaul of Feature Distillation, ICCV 2019"
    url = "https://arxiv.org/abs/1904.01866"
    needs = tuple(STAGES)

    @dataclass(frozen=True)
    class Options:
        weight: float = term_weight(1e-5, "weight of the distance, summed over channels and positions")

    def __init__(self, options, setup):
        super().__init__(options, setup)
        self.connectors = nn.ModuleDict()
        for stage in STAGES:
            conv = nn.Conv2d(setup.student[stage], setup.teacher[stage], 1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out")
            self.connectors[stage] = nn.Sequential(conv, nn.BatchNorm2d(setup.teacher[stage]))
            norm = setup.teacher_norms.get(stage)
            # no part of checkpoints: it follows from the teacher
            self.register_buffer(f"margin_{stage}", None if norm is None else expected_negative(*norm), persistent=False)
        if not STAGES.keys() <= setup.teacher_norms.keys():
            self.over_batch = {self.name: "rank"}  # means over a batch in place of the margins

    def forward(self, student, teacher, batch):
        total = 0.0
        for stage, divider in STAGES.items():
            source = self.connectors[stage](getattr(student, stage))
            target = resize_like(getattr(teacher, stage), source)
            margin = getattr(self, f"margin_{stage}")
            total = total + partial_distance(source, target, mean_negative(target) if margin is None else margin) / divider
        return {self.name: total}


def expected_negative(weight: Tensor, bias: Tensor) -> Tensor:
    """E[x | x < 0] of x ~ N(bias, weight^2), per channel: bias - |weight| * phi(z) / Phi(-z), z = bias / |weight|; float32.

    phi(z) / Phi(-z) = sqrt(2 / pi) / erfcx(z / sqrt(2)), which has no 0 / 0 for channels that are hardly ever negative.
    """
    scale = weight.detach().double().abs().clamp(min=1e-6)
    bias = bias.detach().double()
    return (bias - scale * sqrt(2 / pi) / torch.special.erfcx(bias / scale / sqrt(2))).clamp(max=0).float()


@full_precision
def mean_negative(x: Tensor) -> Tensor:
    """Mean of the negative values of each channel of x (B, C, h, w), 0 where there are none: (C,)."""
    return x.clamp(max=0).sum((0, 2, 3)) / (x < 0).sum((0, 2, 3)).clamp(min=1)


@full_precision
def partial_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """1/B * sum of (S - T')^2 where S > T' or T' > 0, T' = max(teacher, margin); maps (B, C, h, w), margin (C,)."""
    target = torch.maximum(teacher, margin[:, None, None])
    counts = (student > target) | (target > 0)
    return ((student - target).square() * counts).sum() / len(student)
