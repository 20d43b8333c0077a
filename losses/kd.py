"""Plain knowledge distillation, pixel by pixel: the baseline of every comparison, and the file to copy for a method of your own."""

from dataclasses import dataclass

from losses.base import IGNORE, Method, option, term_weight
from losses.functional import labels_like, pixel_kl, resize_like


class KD(Method):
    """KL divergence between the class distributions of teacher and student at every pixel of the logits.

    T^2 / (B*N) * sum over pixels of KL(softmax(z_teacher / T) || softmax(z_student / T)) (Hinton et al. 2015). The
    logits are compared at the student's output stride, not upsampled. Other codebases divide the same sum by less (SKD: 8 times
    this weight) or by more (IFVD and CWD: also by K).
    """

    title = "Knowledge distillation"
    paper = "Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015"
    url = "https://arxiv.org/abs/1503.02531"
    needs = ("logits",)

    @dataclass(frozen=True)
    class Options:
        weight: float = term_weight(1.0, "weight of the KL divergence")
        temperature: float = option(1.0, "softmax temperature T", above=0)
        mask_ignored: bool = option(False, "leave out pixels whose label is ignored (the published code keeps them)")

    def __init__(self, options, setup):
        super().__init__(options, setup)
        if options.mask_ignored:
            self.over_batch = {self.name: "rank"}  # a mean over labelled pixels

    def forward(self, student, teacher, batch):
        teacher_logits = resize_like(teacher.logits, student.logits)
        valid = labels_like(batch.target, student.logits) != IGNORE if self.options.mask_ignored else None
        return {self.name: pixel_kl(student.logits, teacher_logits, self.options.temperature, valid)}
