"""SP: similarity-preserving distillation."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from losses.base import Method, option, term_weight
from losses.functional import full_precision
from utils import distributed


class SP(Method):
    """Squared difference of the similarities that teacher and student see between the images of a batch.

    G = F F^T with F the flattened features, one row per image: (B, B). Rows are divided by their L2 norm; the loss is the sum of
    (G_student - G_teacher)^2 / B^2, B counting the images of all ranks. Widths and strides may differ.

    Differs from the released code: the images of all ranks are compared, by `gather`. Segmentation has one or two images per process,
    and a 1x1 matrix with unit rows is 1 for any features. `--no-sp-gather` compares the images of each process alone.
    """

    title = "Similarity-preserving distillation"
    paper = "Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019"
    url = "https://arxiv.org/abs/1907.09682"
    min_batch = 2

    @dataclass(frozen=True)
    class Options:
        weight: float = term_weight(3000.0, "weight of the difference of similarities")
        feature: str = option("head", "which features are compared", choices=("head", "c4"))
        gather: bool = option(True, "compare the images of all ranks")

    def __init__(self, options, setup):
        super().__init__(options, setup)
        self.needs = (options.feature,)
        self.over_batch = {self.name: "ranks" if options.gather else "rank"}  # pairs of images
        if not options.gather and setup.global_batch < 2 * distributed.world():
            raise ValueError(
                f"--no-{self.name}-gather: {setup.global_batch} images on {distributed.world()} ranks leave one per rank, with no other to compare; "
                f"drop the flag or double --batch-size"
            )

    def forward(self, student, teacher, batch):
        source, target = getattr(student, self.options.feature), getattr(teacher, self.options.feature)
        if self.options.gather:
            source, target = distributed.gather_with_gradient(source), distributed.gather(target)
        return {self.name: similarity_difference(source, target)}


@full_precision
def similarity_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of squared differences of the similarity matrices of (B, Cs, h, w) and (B, Ct, h', w')."""
    return F.mse_loss(similarity(student), similarity(teacher))


def similarity(feature: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, B): inner products of the images' features, rows with L2 norm 1."""
    rows = feature.flatten(1)  # (B, C*h*w)
    return F.normalize(rows @ rows.mT, dim=1)
