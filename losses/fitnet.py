"""FitNet: the student's last features, regressed onto the teacher's."""

from dataclasses import dataclass

from torch import nn

from losses.base import Method, option, term_weight
from losses.feature import mean_squared_error
from losses.functional import pixel_kl, resize_like


class FitNet(Method):
    """Mean of (W f_student - f_teacher)^2 over all elements; W is a trained 1x1 convolution without bias (term `fitnet`).

    The convolution is there for equal widths too: the regressor belongs to the method. Term `kd` is plain KD with T = 1. The defaults
    are the CIRKD line's, a hint at `head`, the input of the last classifier, which is trained beside the task. Differs from the paper:
    there the hint is a middle layer and a training stage of its own, before distillation.
    """

    title = "FitNet"
    paper = "Romero, Ballas, Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets, ICLR 2015"
    url = "https://arxiv.org/abs/1412.6550"

    @dataclass(frozen=True)
    class Options:
        kd_weight: float = term_weight(1.0, "weight of plain KD")
        weight: float = term_weight(10.0, "weight of the squared error of the features")
        feature: str = option("head", "which features are compared", choices=("head", "c4"), terms=("fitnet",))

    def __init__(self, options, setup):
        super().__init__(options, setup)
        self.needs = (options.feature,) * self.active(self.name) + ("logits",) * self.active("kd")
        if self.active(self.name):
            # (B, Cs, h, w) -> (B, Ct, h, w)
            self.regressor = nn.Conv2d(setup.student[options.feature], setup.teacher[options.feature], 1, bias=False)

    def forward(self, student, teacher, batch):
        terms = {}
        if self.active("kd"):
            terms["kd"] = pixel_kl(student.logits, resize_like(teacher.logits, student.logits))
        if self.active(self.name):
            source, target = getattr(student, self.options.feature), getattr(teacher, self.options.feature)
            terms[self.name] = mean_squared_error(self.regressor(source), resize_like(target, source))
        return terms
