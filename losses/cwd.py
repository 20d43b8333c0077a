"""CWD: channel-wise knowledge distillation."""

from dataclasses import dataclass

from torch import Tensor, nn

from losses.base import Method, option, term_weight
from losses.functional import channel_kl, resize_like


class CWD(Method):
    """KL divergence between the places where teacher and student find each channel.

    Every channel of a map is a distribution over the N positions: p = softmax(x / T). The loss is T^2 times the mean over images
    and channels of KL(p_teacher || p_student), on the class scores (term `logits`) or on the input of the last classifier (term
    `head`, the student's through a 1x1 convolution without bias when the widths differ).

    The defaults are the original recipe: logits with T = 4 and weight 3 alone. The CIRKD line's recipe for features is
    `--cwd-logits-weight 0 --cwd-head-weight 50` (its SegFormer runs: 0.3 and 5, a tenth of both), beside plain KD with weight 1
    (`--method cwd kd`) and the adversarial term of `skd`; mmrazor runs the logits with T = 1 and weight 5.

    `head_divisor` "student": the sum over the teacher's channels is divided by the student's width before the convolution, as
    released, which makes the published weight 50 act as 50 * Ct / Cs on the mean over channels; "teacher": that mean.

    Differs from the released code: log-softmax instead of the logarithm of a softmax, which underflows.
    """

    title = "Channel-wise knowledge distillation"
    paper = "Shu, Liu, Gao, Yan, Shen: Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021"
    url = "https://arxiv.org/abs/2011.13256"

    @dataclass(frozen=True)
    class Options:
        logits_weight: float = term_weight(3.0, "weight of the term on the logits")
        head_weight: float = term_weight(0.0, "weight of the term on the features before the last classifier, 50 in the CIRKD line")
        logits_temperature: float = option(4.0, "softmax temperature T of the logits", above=0, terms=("logits",))
        head_temperature: float = option(4.0, "softmax temperature T of the features", above=0, terms=("head",))
        head_divisor: str = option("student", "the width that the sum over channels is divided by", choices=("student", "teacher"), terms=("head",))

    def __init__(self, options, setup):
        super().__init__(options, setup)
        self.needs = tuple(self.weights)
        if self.active("head"):
            student, teacher = setup.student["head"], setup.teacher["head"]
            # (B, Cs, h, w) -> (B, Ct, h, w)
            self.align = nn.Identity() if student == teacher else nn.Conv2d(student, teacher, 1, bias=False)
            self.head_scale = teacher / student if options.head_divisor == "student" else 1.0

    def forward(self, student, teacher, batch):
        options, terms = self.options, {}
        if self.active("logits"):
            terms["logits"] = channel_wise(student.logits, teacher.logits, options.logits_temperature)
        if self.active("head"):
            terms["head"] = self.head_scale * channel_wise(self.align(student.head), teacher.head, options.head_temperature)
        return terms


def channel_wise(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The mean over images and channels of T^2 * KL; maps (B, C, h, w), the teacher's of any size."""
    return channel_kl(student, resize_like(teacher, student), temperature).mean()
