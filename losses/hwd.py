"""HWD: channel-wise distillation that dwells on the classes where the student is furthest from the teacher."""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses.base import Method, option, term_weight
from losses.functional import channel_kl, full_precision, resize_like


class HWD(Method):
    """CWD on the logits with one weight per image and class, larger where student and teacher differ more.

    d[b, k] = T^2 * KL of class k's distributions over the positions of image b, as in `cwd`. Its z-score over the classes of the
    image, squashed to s = 1 / (1 + base^z) in (0, 1), gives the weights K * softmax over classes of s, whose mean is 1; they carry
    no gradient. The loss is the mean over images and classes of weight * d. Weight 3 and T = 4, as published and as in `cwd`.

    Differs from the released code: unknown, there are no reference values. The distance (the KL itself) and the saturating map (a
    logistic curve whose base is the published 0.1) are this project's reading of the method's description.
    """

    title = "Holistic weighted distillation"
    paper = "Sun et al.: Holistic Weighted Distillation for Semantic Segmentation, ICME 2023"
    url = "https://github.com/zju-SWJ/HWD"

    @dataclass(frozen=True)
    class Options:
        weight: float = term_weight(3.0, "weight of the class-weighted KL divergence")
        temperature: float = option(4.0, "softmax temperature T", above=0)
        base: float = option(0.1, "base of the saturating map, in (0, 1]; 1 weighs all classes alike, which is cwd", above=0, maximum=1)

    def forward(self, student, teacher, batch):
        distances = channel_kl(student.logits, resize_like(teacher.logits, student.logits), self.options.temperature)
        return {self.name: (class_weights(distances.detach(), self.options.base) * distances).mean()}


@full_precision
def class_weights(distances: Tensor, base: float = 0.1) -> Tensor:
    """K * softmax over classes of 1 / (1 + base^z), z the z-score of the distances (B, K) among the classes of an image."""
    centred = distances - distances.mean(1, keepdim=True)
    # a spread below the rounding of the distances would turn noise into weights
    spread = centred.square().mean(1, keepdim=True).sqrt() + 1e-6
    return distances.shape[1] * torch.softmax(1 / (1 + base ** (centred / spread)), 1)
