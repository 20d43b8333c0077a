"""DIST: correlations with the teacher instead of equal probabilities."""

from dataclasses import dataclass

from torch import Tensor

from losses.base import Method, option, term_weight
from losses.functional import full_precision, resize_like


class DIST(Method):
    """One minus the Pearson correlation of teacher and student, across the classes of a pixel and across the pixels of a class.

    p = softmax over classes of the logits, without temperature; rho = centred cosine. inter = 1 - mean over pixels of rho across
    the K classes; intra = 1 - mean over classes of rho across all B*N pixels; the loss is beta * inter + gamma * intra. Term
    `logits` has weight 1; term `aux`, on the logits of the auxiliary heads, 0.4. Where student or teacher has no auxiliary head,
    `aux` is left out, and the log says so.

    The published runs train with weight decay 5e-4 and a learning rate that ends at 1e-4; the baselines quoted beside them used
    1e-4 and end at 0.
    """

    title = "Distillation from a stronger teacher"
    paper = "Huang, You, Wang, Qian, Xu: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022"
    url = "https://arxiv.org/abs/2205.10536"
    over_batch = {"logits": "rank", "aux": "rank"}  # correlations over all pixels

    @dataclass(frozen=True)
    class Options:
        logits_weight: float = term_weight(1.0, "weight of the term on the logits")
        aux_weight: float = term_weight(0.4, "weight of the term on the auxiliary logits, left out where a model has no auxiliary head")
        beta: float = option(1.0, "factor of the correlation across classes", minimum=0)
        gamma: float = option(1.0, "factor of the correlation across pixels", minimum=0)

    def __init__(self, options, setup):
        super().__init__(options, setup)
        without = [who for who, channels in (("student", setup.student), ("teacher", setup.teacher)) if "aux" not in channels]
        if self.active("aux") and without:
            self.leave_out("aux", f"{' and '.join(without)} without auxiliary head")
        self.needs = tuple(self.weights)

    def forward(self, student, teacher, batch):
        options, terms = self.options, {}
        if self.active("logits"):
            terms["logits"] = correlation_loss(student.logits, resize_like(teacher.logits, student.logits), options.beta, options.gamma)
        if self.active("aux"):
            terms["aux"] = correlation_loss(student.aux, resize_like(teacher.aux, student.aux), options.beta, options.gamma)
        return terms


@full_precision
def correlation_loss(student: Tensor, teacher: Tensor, beta: float = 1.0, gamma: float = 1.0) -> Tensor:
    """beta * inter + gamma * intra of logits (B, K, h, w)."""
    student, teacher = (x.softmax(1).transpose(0, 1).flatten(1) for x in (student, teacher))  # (K, B*h*w)
    inter = 1 - pearson(student, teacher, 0).mean()
    intra = 1 - pearson(student, teacher, 1).mean()
    return beta * inter + gamma * intra


def pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Correlation of a and b along `dim`; 1e-8 is added to the product of the norms."""
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    return (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + 1e-8)
