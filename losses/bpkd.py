"""BPKD: boundary-privileged knowledge distillation."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.base import Method, option, term_weight
from losses.functional import channel_kl, full_precision, resize_like


class BPKD(Method):
    """The bodies and the borders of the classes distilled apart, with the borders taken from the label.

    The edge E_k of class k: dilation minus erosion (7x7 pixels of the label) of its one-hot label map, read at the label pixel that
    is nearest to each position of the logits. Term `body`: the channel-wise loss of `cwd` on logits that are 0 in the class's edge.
    Term `edge`: KL over classes per position, of logits that are 0 outside the class's edge; its mean over E_k, for every image and
    class, summed and divided by B * K. Both times T^2. Weights 20 and 50 with T = 1, as published.

    Differs from the released code: unknown, there are no reference values. This project's reading: the edges have the body's divisor
    B * K; every KL runs over all classes, since a sum of single classes' parts with unequal factors is not least at the teacher; the
    published alpha = 2 is the exponent of T. Widening the label at the logits' stride of 8 instead would make bands of 56 pixels
    (8 of 10 positions of a 96x96 crop of `shapes`).
    """

    title = "Boundary-privileged knowledge distillation"
    paper = "Liu et al.: BPKD: Boundary Privileged Knowledge Distillation For Semantic Segmentation, WACV 2024"
    url = "https://arxiv.org/abs/2306.08075"

    @dataclass(frozen=True)
    class Options:
        body_weight: float = term_weight(20.0, "weight of the channel-wise term outside the edges")
        edge_weight: float = term_weight(50.0, "weight of the pixel-wise term on the edges")
        temperature: float = option(1.0, "softmax temperature T of both terms", above=0)
        kernel: int = option(7, "side in pixels of the square that widens and narrows the classes, odd", minimum=3)

    def __init__(self, options, setup):
        super().__init__(options, setup)
        if options.kernel % 2 == 0:
            raise ValueError(f"--bpkd-kernel {options.kernel}: must be odd")

    def forward(self, student, teacher, batch):
        options, terms = self.options, {}
        student_logits, teacher_logits = student.logits, resize_like(teacher.logits, student.logits)
        edge = edges(batch.target, student_logits, options.kernel)
        if self.active("body"):
            terms["body"] = channel_kl(student_logits * ~edge, teacher_logits * ~edge, options.temperature).mean()
        if self.active("edge"):
            terms["edge"] = edge_kl(student_logits, teacher_logits, edge, options.temperature)
        return terms


def edges(target: Tensor, logits: Tensor, kernel: int = 7) -> Tensor:
    """(B, K, h, w) bool, the shape of `logits`: whether class k is in the square around a position's label pixel without filling it.

    target (B, H, W). The picture's border is no edge. Ignored pixels are no class's, so a border with them is one.
    """
    batch, num_classes, *positions = logits.shape
    rows, columns = (around(count, size, kernel, target.device) for count, size in zip(positions, target.shape[-2:], strict=True))
    square = target[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3).permute(0, 3, 1, 2)  # (B, kernel*kernel, h, w)
    # scattered per position: a one-hot map of the label would take 640 MB for 19 classes and 16 crops of 512x1024
    present = logits.new_zeros(batch, num_classes + 1, *positions, dtype=torch.bool)  # the last plane takes the ignored pixels
    present.scatter_(1, square.clamp(max=num_classes).long(), True)
    return present[:, :num_classes] & (square.amin(1, keepdim=True) != square.amax(1, keepdim=True))


def around(count: int, size: int, kernel: int, device=None) -> Tensor:
    """(count, kernel): of `size` pixels in a row the one nearest to each of `count` positions, as in `labels_like`, and its
    neighbours; beyond the picture its last pixel again, which adds no class."""
    centre = torch.arange(count, device=device) * size // count
    return (centre[:, None] + torch.arange(kernel, device=device) - kernel // 2).clamp(0, size - 1)


@full_precision
def edge_kl(student: Tensor, teacher: Tensor, edge: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 / (B*K) * sum over images and classes of the mean over the class's edge of KL over classes; logits (B, K, h, w)."""
    student, teacher = student * edge / temperature, teacher * edge / temperature
    kl = F.kl_div(F.log_softmax(student, 1), F.log_softmax(teacher, 1), reduction="none", log_target=True).sum(1)  # (B, h, w)
    share = edge / edge.sum((2, 3), keepdim=True).clamp(min=1)  # of each pixel in the mean of each class
    return temperature**2 * (share.sum(1) * kl).sum() / (share.shape[0] * share.shape[1])
