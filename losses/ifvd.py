"""IFVD: intra-class feature variation distillation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses.adversarial import Adversary
from losses.base import Method, option, term_weight
from losses.functional import full_precision, labels_like, pixel_kl, resize_like


class IFVD(Method):
    """Squared difference of how similar each position is to the centre of its class, in the student and in the teacher.

    Per image, the centre of a class is the mean feature of its positions, s(n) the cosine of the feature at n and the centre of the
    class of n; term `ifvd` is the mean over B*N of (s_student - s_teacher)^2, in which ignored positions count as 0. The student's
    centres carry gradient. No projection is needed, since each network is compared with its own centres. Terms `adversarial` and
    `critic` are SKD's with the hinge loss, `kd` is plain KD with T = 1.

    The weights are the CIRKD line's. The original's are 200 for `ifvd`, and 10 for a KD that is also divided by the number of classes:
    0.53 here on Cityscapes.

    Differs from the released code: sums over classes by one-hot matrices instead of a loop over classes, and similarities without a map
    of centres (B, C, h, w); the critic works at any size of the map (see losses/adversarial.py).
    """

    title = "Intra-class feature variation distillation"
    paper = "Wang, Zhou, Jiang, Bai, Xu: Intra-class Feature Variation Distillation for Semantic Segmentation, ECCV 2020"
    url = "https://github.com/YukangWang/IFVD"
    over_batch = {"adversarial": "rank", "critic": "rank"}  # norms of the critic, which every pass changes

    @dataclass(frozen=True)
    class Options:
        kd_weight: float = term_weight(1.0, "weight of plain KD")
        adversarial_weight: float = term_weight(1e-3, "weight of the critic's verdict on the student")
        critic_weight: float = term_weight(0.1, "weight of the critic's own loss; with 0 it keeps its random weights")
        weight: float = term_weight(20.0, "weight of the similarities to class centres")
        feature: str = option("head", "which features are compared", choices=("head", "c4"), terms=("ifvd",))

    def __init__(self, options, setup):
        super().__init__(options, setup)
        adversarial = self.active("adversarial") or self.active("critic")
        self.adversary = Adversary(setup.num_classes, self.weights) if adversarial else None
        self.needs = (options.feature,) * self.active(self.name) + ("logits",) * (adversarial or self.active("kd"))

    def forward(self, student, teacher, batch):
        terms = {}
        if "logits" in self.needs:
            target = resize_like(teacher.logits, student.logits)
        if self.active("kd"):
            terms["kd"] = pixel_kl(student.logits, target)
        if self.adversary:
            terms |= self.adversary(student.logits, target)
        if self.active(self.name):
            source = getattr(student, self.options.feature)
            target = resize_like(getattr(teacher, self.options.feature), source)
            terms[self.name] = intra_class_difference(source, target, labels_like(batch.target, source), self.setup.num_classes)
        return terms

    def own_optimizer(self):
        return self.adversary.optimizer() if self.adversary else None


@full_precision
def intra_class_difference(student: Tensor, teacher: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean squared difference of the similarities to class centres of (B, Cs, h, w) and (B, Ct, h, w); labels (B, h, w)."""
    labels = labels.flatten(1).long()  # (B, N)
    valid = labels < num_classes
    members = (labels[..., None] == torch.arange(num_classes, device=labels.device)).to(student.dtype)  # (B, N, K)
    index = labels.clamp(max=num_classes - 1)
    difference = centre_similarity(student, members, index) - centre_similarity(teacher, members, index)
    return (difference.square() * valid).mean()


def centre_similarity(feature: Tensor, members: Tensor, index: Tensor) -> Tensor:
    """Cosine of every position's feature and the centre of its class: (B, N).

    feature (B, C, h, w), members (B, N, K) one-hot and 0 where ignored, index (B, N) the class, any where ignored.
    """
    vectors = feature.flatten(2)  # (B, C, N)
    # the few classes as rows: on a CPU 1.6 times the speed of the products with them as columns
    centres = members.mT @ vectors.mT / (members.sum(1) + 1e-6)[..., None]  # (B, K, C)
    products = centres @ vectors  # (B, K, N): less than a map of centres, (B, C, N)
    own = products.gather(1, index[:, None])[:, 0]
    norms = length(vectors) * length(centres.mT).gather(-1, index)
    return own / norms


def length(x: Tensor) -> Tensor:
    """L2 norm over the second dimension, at least 1e-8; on a CPU half the time of `norm` over a dimension that is not the last."""
    return x.square().sum(1).clamp(min=1e-16).sqrt()
