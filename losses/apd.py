"""APD: adaptive perspective distillation."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.base import Method, option, term_weight
from losses.functional import full_precision, label_entropy, labels_like, pixel_kl, resize_like


class APD(Method):
    """Each network sees the batch from its own perspective, the centroids of the classes in it; the student takes over the teacher's.

    Features `head` go through a small adaptor (two 1x1 convolutions) to the teacher's width. A centroid is the mean over all labelled
    pixels of its class in the batch. Every pixel is compared with its own network's centroids: 10 * cosine, softmax over the classes
    that are present. Term `similarity`: mean over pixels of KL(teacher's || student's). Term `centroid`: mean over present classes of
    0.5 * (1 - cosine of the teacher's and the student's centroid). Term `adaptor`: cross-entropy of the teacher's similarities with the
    labels; it alone trains the teacher's adaptor, with an Adam of its own. Term `kd`: plain KD, T = 1.

    Weights are the published 10, 10 and 10. The published KL divergence of the logits is averaged over classes too, so that on a mean
    over pixels its weight is 10 / K: 0.067 on ADE20K, the defaults of `--apd-kd-weight` here. Adam does not see the scale of its
    gradient, so the weight of `adaptor` decides only whether there is one; with 0 the teacher's features are used as they are.

    The paper's details that are chosen here: adaptors are conv1x1, BatchNorm, ReLU, conv1x1; labels are taken to the feature's
    resolution by nearest neighbour; `similarity` counts ignored pixels, as every published distillation term of this field does.
    """

    title = "Adaptive perspective distillation"
    paper = "Tian, Chen, Lai, Jiang, Liu, Zhao, Yu, Yang, Jia: Adaptive Perspective Distillation for Semantic Segmentation, TPAMI 2022"
    url = "https://github.com/dvlab-research/APD"
    over_batch = dict.fromkeys(("similarity", "centroid", "adaptor"), "rank")  # centroids of classes

    @dataclass(frozen=True)
    class Options:
        kd_weight: float = term_weight(
            0.5, "weight of plain KD: the published 10 divided by the number of classes (for your own data by 20)",
            shapes=1.25, camvid=0.91, citys=0.526, voc=0.476, ade20k=0.067, coco_stuff_164k=0.058, coco_stuff_182=0.055,
            coco_stuff_10k=0.058,
        )  # fmt: skip
        similarity_weight: float = term_weight(10.0, "weight of the KL divergence of the similarities to the centroids")
        centroid_weight: float = term_weight(10.0, "weight of the distance of the centroids")
        adaptor_weight: float = term_weight(1.0, "weight of the cross-entropy that trains the teacher's adaptor")
        scale: float = option(10.0, "factor on the cosine similarities before the softmax", above=0, terms=("similarity", "adaptor"))
        adaptor_lr: float = option(1e-5, "learning rate of the Adam that trains the teacher's adaptor", minimum=0, terms=("adaptor",))

    def __init__(self, options, setup):
        super().__init__(options, setup)
        self.perspective = any(map(self.active, ("similarity", "centroid")))
        self.needs = ("logits",) * self.active("kd") + ("head",) * (self.perspective or self.active("adaptor"))
        if self.perspective:
            self.student_adaptor = adaptor(setup.student["head"], setup.teacher["head"])
        if self.active("adaptor"):
            self.teacher_adaptor = adaptor(setup.teacher["head"], setup.teacher["head"])

    def own_optimizer(self):
        return torch.optim.Adam(self.teacher_adaptor.parameters(), lr=self.options.adaptor_lr, fused=True) if self.active("adaptor") else None

    def forward(self, student, teacher, batch):
        options, terms = self.options, {}
        if self.active("kd"):
            terms["kd"] = pixel_kl(student.logits, resize_like(teacher.logits, student.logits))
        if "head" not in self.needs:
            return terms
        classes = self.setup.num_classes
        labels = labels_like(batch.target, student.head)
        target = resize_like(teacher.head, student.head)
        target = self.teacher_adaptor(target) if self.active("adaptor") else target
        target_centroids, present = class_centroids(target, labels, classes)
        target_similarity = similarities(target, target_centroids, present, options.scale)
        if self.perspective:
            source = self.student_adaptor(student.head)
            centroids, _ = class_centroids(source, labels, classes)
            if self.active("similarity"):
                terms["similarity"] = pixel_kl(similarities(source, centroids, present, options.scale), target_similarity.detach())
            if self.active("centroid"):
                terms["centroid"] = centroid_distance(centroids, target_centroids.detach(), present)
        if self.active("adaptor"):
            terms["adaptor"] = label_entropy(target_similarity, labels)
        return terms


def adaptor(student: int, teacher: int) -> nn.Sequential:
    """conv1x1 - BatchNorm - ReLU - conv1x1 to the teacher's channels."""
    return nn.Sequential(nn.Conv2d(student, teacher, 1, bias=False), nn.BatchNorm2d(teacher), nn.ReLU(), nn.Conv2d(teacher, teacher, 1))


@full_precision
def class_centroids(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean feature of each class over the whole batch.

    Args:
        features: (B, C, h, w).
        labels: (B, h, w), 255 = ignore.

    Returns:
        centroids (K, C), zeros for absent classes, and present (K,) bool.
    """
    members = (labels[:, None] == torch.arange(num_classes, device=labels.device)[:, None, None]).to(features.dtype)  # (B, K, h, w)
    counts = members.sum((0, 2, 3))  # (K,)
    return torch.einsum("bkhw,bchw->kc", members, features) / counts[:, None].clamp(min=1), counts > 0


@full_precision
def similarities(features: Tensor, centroids: Tensor, present: Tensor, scale: float) -> Tensor:
    """scale * cosine of every pixel with every centroid, (B, K, h, w); -1e4 for absent classes, which a softmax turns into 0 (and,
    unlike minus infinity, into no NaN where every class is absent)."""
    cosine = torch.einsum("kc,bchw->bkhw", F.normalize(centroids, dim=1), F.normalize(features, dim=1))
    return (scale * cosine).masked_fill(~present[:, None, None], -1e4)


@full_precision
def centroid_distance(student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
    """Mean over present classes of 0.5 * (1 - cosine) of the centroids (K, C); a connected 0 without any."""
    distance = 0.5 * (1 - F.cosine_similarity(student, teacher, dim=1))
    return (distance * present).sum() / present.sum().clamp(min=1)
