"""MGD: masked generative distillation."""

from dataclasses import dataclass

from torch import nn

from losses.base import Method, option, term_weight
from losses.functional import resize_like
from losses.projection import Projector, generate, mimicking, random_mask


class MGD(Method):
    """The student's c4, most of its positions zeroed, has to regenerate the teacher's whole c4.

    1/B * sum over (C, h, w) of (P(m * A(S)) - T)^2: A a 1x1 convolution to the teacher's width, m a random mask (one for all
    channels), P two 3x3 convolutions with a ReLU between them. It is Af-DCD without its contrast and without plain KD.

    The weight is the published one; the sum grows with the crop and the teacher's width. The published segmentation runs add CWD on
    the logits, temperature 4, weight 3: that is a method of its own, `--method mgd cwd`.
    """

    title = "Masked generative distillation"
    paper = "Yang, Li, Shao, Shi, Yuan, Yuan: Masked Generative Distillation, ECCV 2022"
    url = "https://arxiv.org/abs/2205.01529"
    needs = ("c4",)

    @dataclass(frozen=True)
    class Options:
        weight: float = term_weight(2e-5, "weight of the squared error, summed over channels and positions")
        mask_ratio: float = option(0.75, "share of the positions that are zeroed, in [0, 1)", minimum=0, below=1)

    def __init__(self, options, setup):
        super().__init__(options, setup)
        student, teacher = setup.student["c4"], setup.teacher["c4"]
        self.align = nn.Identity() if student == teacher else nn.Conv2d(student, teacher, 1)  # (B, Cs, h, w) -> (B, Ct, h, w)
        self.projector = Projector(teacher)

    def forward(self, student, teacher, batch):
        mask = random_mask(self.uniform(batch, 1, *student.c4.shape[-2:]), self.options.mask_ratio)
        generated = generate(self.align, self.projector, student.c4, mask)
        return {self.name: mimicking(generated, resize_like(teacher.c4, student.c4))}
