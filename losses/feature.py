"""Feature KD: the student's projected features, pulled to the teacher's by a plain distance. The control of every comparison."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from losses.base import Method, option, term_weight
from losses.functional import full_precision, resize_like


class FeatureKD(Method):
    """Distance between the projected student's and the teacher's features at every position.

    `distance` "mse": mean of (P f_student - f_teacher)^2 over all elements. "cosine": mean over positions of 1 - cos across channels.
    "standardised": the same mean of squares after every channel of both maps is brought to mean 0 and variance 1 over the images and
    positions of the process; it equals 2 * (1 - correlation), averaged over channels. The last two ignore the scale of the features.

    `projector` "linear" is a 1x1 convolution, "mlp" conv1x1 - ReLU - conv1x1 of the teacher's width. There is no plain KD inside:
    combine with `--method kd feature`. The paper compares such features at equal wall-clock time with the methods made for
    segmentation and finds them no worse; the weight is this project's choice.
    """

    title = "Canonical feature distillation"
    paper = "Canonical feature distillation for semantic segmentation, as in arXiv 2604.25530, 2026"
    url = "https://arxiv.org/abs/2604.25530"

    @dataclass(frozen=True)
    class Options:
        weight: float = term_weight(1.0, "weight of the distance")
        feature: str = option("c4", "which features are compared", choices=("c4", "head"))
        distance: str = option("mse", "how features are compared", choices=("mse", "cosine", "standardised"))
        projector: str = option("linear", "one 1x1 convolution, or two with a ReLU between them", choices=("linear", "mlp"))

    def __init__(self, options, setup):
        super().__init__(options, setup)
        self.needs = (options.feature,)
        if options.distance == "standardised":
            self.over_batch = {self.name: "rank"}  # statistics of a batch
        student, teacher = setup.student[options.feature], setup.teacher[options.feature]
        # (B, Cs, h, w) -> (B, Ct, h, w)
        self.projector = nn.Conv2d(student, teacher, 1)
        if options.projector == "mlp":
            self.projector = nn.Sequential(self.projector, nn.ReLU(), nn.Conv2d(teacher, teacher, 1))

    def forward(self, student, teacher, batch):
        source, target = getattr(student, self.options.feature), getattr(teacher, self.options.feature)
        distance = {"mse": mean_squared_error, "cosine": cosine_distance, "standardised": standardised_error}[self.options.distance]
        return {self.name: distance(self.projector(source), resize_like(target, source))}


@full_precision
def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of squared differences over all elements."""
    return F.mse_loss(student, teacher)


@full_precision
def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine across the channels of (B, C, h, w), mean over positions; in [0, 2]."""
    return 1 - F.cosine_similarity(student, teacher, dim=1).mean()


@full_precision
def standardised_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of squared differences of (B, C, h, w) whose channels have mean 0 and variance 1 over (B, h, w); in [0, 4]."""
    # batch normalisation without parameters and running averages is that very standardisation, in one kernel
    student, teacher = (F.batch_norm(x, None, None, training=True) for x in (student, teacher))
    return F.mse_loss(student, teacher)
