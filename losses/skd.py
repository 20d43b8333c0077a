"""SKD: structured knowledge distillation."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from losses.adversarial import Adversary
from losses.base import Method, option, term_weight
from losses.functional import full_precision, pixel_kl, resize_like


class SKD(Method):
    """Plain KD, similarities between positions as in the teacher, and class scores that a critic takes for the teacher's.

    Term `pairwise`: features are max-pooled, their vectors divided by their L2 norm over channels, A = f^T f (B, N', N'); mean of
    (A_student - A_teacher)^2. Term `adversarial`: -mean D(z_student). Term `critic`: the loss that D is trained with, which does not
    reach the student; it has an Adam of its own. Term `kd`: plain KD with T = 1.

    `form` "cirkd", the CIRKD line's and the default: max-pool 2x2, weight 10. "original": max-pool with half the map as kernel, which
    leaves about 2x2 nodes, the norm without gradient, weight 0.5. The original's weight 10 of KD is a sum over 8 images, thus 80 here
    (`--skd-form original --skd-kd-weight 80 --skd-objective wgan-gp`).

    Differs from the released code: the critic works at any size of the map (see losses/adversarial.py).
    """

    title = "Structured knowledge distillation"
    paper = "Liu, Chen, Liu, Qin, Luo, Wang: Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019"
    url = "https://arxiv.org/abs/1903.04197"
    over_batch = {"adversarial": "rank", "critic": "rank"}  # norms of the critic, which every pass changes

    @dataclass(frozen=True)
    class Options:
        kd_weight: float = term_weight(1.0, "weight of plain KD")
        pairwise_weight: float = term_weight(10.0, "weight of the similarities between positions", when=("form", "original", {"default": 0.5}))
        adversarial_weight: float = term_weight(1e-3, "weight of the critic's verdict on the student")
        critic_weight: float = term_weight(0.1, "weight of the critic's own loss; with 0 it keeps its random weights")
        form: str = option("cirkd", "how positions are pooled before they are compared", choices=("cirkd", "original"), terms=("pairwise",))
        feature: str = option("head", "which features are compared", choices=("head", "c4"), terms=("pairwise",))
        objective: str = option("hinge", "the critic's loss", choices=("hinge", "wgan-gp"), terms=("critic",))
        penalty: float = option(10.0, "weight of the gradient penalty of wgan-gp", minimum=0, terms=("critic",), only=("objective", "wgan-gp"))

    def __init__(self, options, setup):
        super().__init__(options, setup)
        adversarial = self.active("adversarial") or self.active("critic")
        self.adversary = Adversary(setup.num_classes, self.weights, options.objective, options.penalty) if adversarial else None
        self.needs = (options.feature,) * self.active("pairwise") + ("logits",) * (adversarial or self.active("kd"))

    def forward(self, student, teacher, batch):
        terms = {}
        if "logits" in self.needs:
            target = resize_like(teacher.logits, student.logits)
        if self.active("kd"):
            terms["kd"] = pixel_kl(student.logits, target)
        if self.active("pairwise"):
            source = getattr(student, self.options.feature)
            terms["pairwise"] = pairwise(source, resize_like(getattr(teacher, self.options.feature), source), self.options.form)
        if self.adversary:
            mix = self.uniform(batch, 1, 1, 1) if self.options.objective == "wgan-gp" else None
            terms |= self.adversary(student.logits, target, mix)
        return terms

    def own_optimizer(self):
        return self.adversary.optimizer() if self.adversary else None


@full_precision
def pairwise(student: Tensor, teacher: Tensor, form: str = "cirkd") -> Tensor:
    """Mean squared difference of the cosine similarities between all positions of the pooled (B, Cs, h, w) and (B, Ct, h, w)."""
    kernel = (2, 2) if form == "cirkd" else tuple(max(1, side // 2) for side in student.shape[-2:])
    student, teacher = (F.max_pool2d(x, kernel, kernel, ceil_mode=True).flatten(2) for x in (student, teacher))  # (B, C, N')
    if form == "cirkd":
        student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    else:
        student, teacher = (x / x.norm(dim=1, keepdim=True).detach().clamp(min=1e-12) for x in (student, teacher))
    channels, nodes = student.shape[1], student.shape[2]
    # multiplications of the two ways
    by_channels = channels**2 + channels * teacher.shape[1] + teacher.shape[1] ** 2
    by_nodes = nodes * (channels + teacher.shape[1])
    return similarity_difference_by_channels(student, teacher) if by_channels < by_nodes else similarity_difference(student, teacher)


def similarity_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """mean (S^T S - T^T T)^2 over images and pairs of positions; S (B, Cs, N), T (B, Ct, N)."""
    return F.mse_loss(student.mT @ student, teacher.mT @ teacher)


def similarity_difference_by_channels(student: Tensor, teacher: Tensor) -> Tensor:
    """The same from matrices of channels, which never holds N x N numbers: ||S^T S - T^T T||^2 = ||SS^T||^2 - 2 ||ST^T||^2 + ||TT^T||^2.

    The difference of large numbers would cost most digits of float32, since features after a ReLU have large means m. They are taken
    out first: with centred s = S - m and u = s^T m + |m|^2 / 2, S^T S = s^T s + u 1^T + 1 u^T, and s^T s has rows that sum to 0, so that
    the squares of the parts add up.
    """
    nodes = student.shape[-1]
    (student, u), (teacher, v) = centre(student), centre(teacher)
    difference = u - v  # (B, N)
    squares = (student @ student.mT).square().sum() - 2 * (student @ teacher.mT).square().sum() + (teacher @ teacher.mT).square().sum()
    linear = 2 * nodes * difference.square().sum() + 2 * difference.sum(-1).square().sum()
    return (squares + linear) / (len(student) * nodes**2)


def centre(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, C, N) -> x - mean over N, and (B, N) what the means add to each position's similarities."""
    mean = x.mean(-1, keepdim=True)  # (B, C, 1)
    centred = x - mean
    return centred, (centred * mean).sum(1) + mean.square().sum(1) / 2
