"""ICSD: inter-class similarity distillation."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from losses.base import Method, option, term_weight
from losses.functional import full_precision, pixel_kl, resize_like, widen


class ICSD(Method):
    """How similar the places of any two classes are: a K x K matrix per image, the student's to equal the teacher's.

    Term `ics`, form "paper": class k is a distribution over all positions, p_k = softmax of its logits; ICS[k, l] = KL(p_k || p_l)
    per image; the loss is the mean squared difference of the two matrices. Form "released", what the authors' code computes: softmax
    over the height alone; one matrix per batch with the entries (1/B) * sum of p_l * (log p_l - p_k) for k <= l, mirrored below;
    rows divided by their L2 norm, which takes 1/B out again; the mean squared difference divided by B, the images of one process: with half as
    many per process the gradient at an image's logits is four times as large, where that of a mean over images is twice (the published runs
    have 6). Both are one product of matrices and one vector of entropies.

    Term `kd` is plain KD. The authors' is divided by K as well and has weight 10, which is 10 / K here. Their weight of `ics`, 9500,
    belongs to the released form. That of the paper form, 1, is this project's: on `shapes` the gradient at the student's logits is
    then 0.5 to 0.8 times that of the released form with 9500.

    `upsample` compares at the labels' size, as the authors do. Differs from the released code: the logits' own size is the default.
    """

    title = "Inter-class similarity distillation"
    paper = "Mansourian, Ahmadi, Kasaei: AICSD: Adaptive Inter-Class Similarity Distillation for Semantic Segmentation, 2023"
    url = "https://arxiv.org/abs/2308.04243"

    @dataclass(frozen=True)
    class Options:
        ics_weight: float = term_weight(1.0, "weight of the inter-class similarity", when=("form", "released", {"default": 9500.0}))
        kd_weight: float = term_weight(
            0.5, "weight of plain KD, 10 / K (for your own data 10 / 20)", shapes=1.25, camvid=0.909, citys=0.526, voc=0.476, ade20k=0.0667,
            coco_stuff_164k=0.0585, coco_stuff_182=0.0549, coco_stuff_10k=0.0585,
        )  # fmt: skip
        form: str = option(
            "paper", "divergences over all positions, or what the authors' code computes", choices=("paper", "released"), terms=("ics",)
        )
        upsample: bool = option(False, "compare logits that are upsampled to the labels' size")
        temperature: float = option(1.0, "softmax temperature of both terms", above=0)

    def __init__(self, options, setup):
        super().__init__(options, setup)
        if options.form == "released":
            self.over_batch = {"ics": "rank"}  # divided by the number of images

    def forward(self, student, teacher, batch):
        options, terms = self.options, {}
        logits = student.logits, resize_like(teacher.logits, student.logits)
        size = batch.target.shape[-2:] if options.upsample else None
        if self.active("ics"):
            loss = {"paper": divergence_loss, "released": released_loss}[options.form]
            terms["ics"] = loss(*(x if options.temperature == 1 else x / options.temperature for x in logits), size)
        if self.active("kd"):
            terms["kd"] = pixel_kl(*(upsampled(x, size) for x in logits), options.temperature)
        return terms


def upsampled(logits: Tensor, size) -> Tensor:
    """Logits at a size (height, width), in NCHW and float32, as the released code enlarges them; as they are where it is None."""
    return logits if size is None else F.interpolate(widen(logits).contiguous(), size=size, mode="bilinear", align_corners=True)


@full_precision
def divergence_loss(student: Tensor, teacher: Tensor, size=None) -> Tensor:
    """Mean squared difference of the matrices of KL divergences between classes; logits (B, K, h, w), compared at `size`."""
    return F.mse_loss(divergences(upsampled(student, size)), divergences(upsampled(teacher, size)))


def divergences(logits: Tensor) -> Tensor:
    """KL(p_k || p_l) per image, p softmax over positions: (B, K, h, w) -> (B, K, K)."""
    log_p = logits.flatten(2).log_softmax(-1)  # (B, K, h*w)
    # adding log N cancels in the difference below, since p sums to 1, but leaves parts of the result's own size to accumulate
    # over N positions instead of -log N, -13 at full size
    cross = log_p.exp() @ (log_p + math.log(log_p.shape[-1])).transpose(1, 2)  # sum over n of p_k log(p_l * N)
    return cross.diagonal(dim1=1, dim2=2)[..., None] - cross


@full_precision
def released_loss(student: Tensor, teacher: Tensor, size=None) -> Tensor:
    """Mean squared difference of the released similarity matrices, divided by B; logits (B, K, h, w), compared at `size`."""
    return (F.mse_loss(released_similarity(student, size), released_similarity(teacher, size)) / len(student)).to(student.dtype)


def released_similarity(logits: Tensor, size=None) -> Tensor:
    """(B, K, h, w), upsampled to `size` -> (K, K) float64 with unit rows.

    At 512x512 the entries are near -3000 and differ by a few: the sums of rows and images are in double precision, which brings the
    gradient 2 to 5 times nearer to that of float64. A row is summed in single: one double copy of the maps would take half the time.
    """
    return _Rows.apply(logits, size)


class _Rows(torch.autograd.Function):
    """The released matrix. Keeps log p alone of its maps, and has two at a time, with the gradient three, where autograd would have seven."""

    @staticmethod
    def forward(ctx, logits, size):
        log_p = upsampled(logits, size).log_softmax(2).contiguous()  # over the height
        p = log_p.exp()
        rows = p.flatten(2)
        gram = (rows @ rows.transpose(1, 2)).sum(0, dtype=torch.float64)  # (K, K)
        entropy = p.mul_(log_p).sum(3).sum((0, 2), dtype=torch.float64)  # (K,)
        upper = (entropy - gram).triu()  # times B; the diagonal is negative, so that no row has the norm 0
        matrix = upper + upper.triu(1).T
        norm = matrix.norm(dim=1, keepdim=True)
        matrix /= norm
        ctx.save_for_backward(None if size is None else logits, log_p, matrix, norm)
        ctx.size = size
        return matrix

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        with torch.autocast(gradient.device.type, enabled=False):
            return _Rows.gradient(ctx.size, gradient, *ctx.saved_tensors), None

    @staticmethod
    def gradient(size, gradient, logits, log_p, matrix, norm):
        gradient = (gradient - matrix * (gradient * matrix).sum(1, keepdim=True)) / norm
        both = (gradient + gradient.T).to(log_p.dtype)
        of_entropy = both.triu(1).sum(0).add_(gradient.diagonal())
        p = log_p.exp()
        rows = p.flatten(2)
        of_map = torch.baddbmm(rows, both.expand(len(p), -1, -1), rows, beta=0, alpha=-1).view_as(p)  # of the products, to log p below
        of_map.addcmul_(of_entropy[:, None, None], log_p).mul_(p)  # without of_entropy itself, which the next line takes off again
        of_map.addcmul_(p, of_map.sum(2, keepdim=True), value=-1)
        if size is None:
            return of_map
        del p, rows
        with torch.enable_grad():  # interpolated once more: `interpolate` has a deterministic form on a GPU, its backward operation alone has not
            logits = logits.detach().requires_grad_()
            return torch.autograd.grad(upsampled(logits, size), logits, of_map)[0]
