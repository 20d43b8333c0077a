"""Af-DCD: augmentation-free dense contrastive distillation."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.base import Method, option, term_weight
from losses.functional import full_precision, pixel_kl, resize_like


class AfDCD(Method):
    """Masked feature mimicking, contrasted with the teacher inside small patches across space and channel groups at once.

    The student's c4 is aligned to the teacher's width (1x1), most of its positions are zeroed, and a projector regenerates the
    teacher's c4 from the rest (term `fd`). The regenerated map and the teacher's are cut into patches and channel
    groups; every (pixel, group) cell of the student is pulled to the teacher's same cell and pushed from the teacher's others
    (term `contrast`, similarity = negative L1 distance / tau). Term `kd` is plain KD with T = 1.

    `normalise` "released": `fd` is the sum of squares / B and `contrast` the sum over groups of the mean over pixels, with the
    published weights; both then grow with the crop and the teacher's width. "mean": both are means, with weights that equal the
    published ones at the published crop and width (ResNet-101 teacher), for any other size.

    Differs from the released code: student and teacher of equal width use no alignment (the release crashes); maps of any size are
    cropped to whole patches from the top left, where the release does so for CamVid alone; the centre hole and the enhanced
    projector are flags (those of the released Cityscapes ResNet-18 script do not parse). Differs from the paper: the default
    negatives are the released ones, which leave out the cells of the anchor's own group at other pixels (`omni` has them).
    """

    title = "Augmentation-free dense contrastive distillation"
    paper = "Fan, Li, Liu, Song, Yao: Augmentation-free Dense Contrastive Knowledge Distillation for Efficient Semantic Segmentation, NeurIPS 2023"
    url = "https://arxiv.org/abs/2312.04168"

    @dataclass(frozen=True)
    class Options:
        kd_weight: float = term_weight(1.0, "weight of plain KD", ade20k=0.5, coco_stuff_164k=0.5, coco_stuff_182=0.5)
        fd_weight: float = term_weight(
            2e-6, "weight of the masked feature mimicking",
            citys=2e-6, voc=1e-6, camvid=8e-6, ade20k=1e-6, coco_stuff_164k=5e-6, coco_stuff_182=5e-6,
            when=("normalise", "mean", {
                "default": 8.4, "shapes": 1.0, "camvid": 33.2, "citys": 33.6, "voc": 8.4, "ade20k": 8.4,
                "coco_stuff_164k": 41.9, "coco_stuff_182": 41.9,
            }),
        )  # fmt: skip
        contrast_weight: float = term_weight(
            5e-3, "weight of the contrast",
            citys=5e-3, voc=5e-3, camvid=1e-2, ade20k=4e-2, coco_stuff_164k=5e-3, coco_stuff_182=5e-3,
            when=("normalise", "mean", {
                "default": 0.08, "shapes": 0.01, "camvid": 0.16, "citys": 0.08, "voc": 0.08, "ade20k": 0.64,
                "coco_stuff_164k": 0.08, "coco_stuff_182": 0.08,
            }),
        )  # fmt: skip
        normalise: str = option(
            "released", "sums with the published weights, or means with weights for any crop and width", choices=("released", "mean"), shapes="mean"
        )
        mask: str = option("random", "which positions of the student are zeroed", choices=("random", "centre", "none"))
        mask_ratio: float = option(0.75, "share of the positions that a random mask zeroes, in [0, 1)")
        projector: str = option("plain", "two 3x3 convolutions, or the two-branch one with four", choices=("plain", "enhanced"))
        negatives: str = option("released", "cells an anchor is pushed from", choices=("released", "omni", "channel", "spatial"))
        distance: str = option("l1", "distance between cells; the paper's ablation reports l2 as best", choices=("l1", "l2"))
        tau: float = option(0.07, "temperature of the contrast")
        groups: int = option(16, "channel groups M")
        patch: int = option(4, "side of a patch, in positions of the pooled map")
        pool: int = option(4, "max-pooling of the maps before the contrast, 0 for none", camvid=0, shapes=0)
        grad_clip: float = option(15.0, "largest gradient norm of alignment and projector, 0 for no clipping")

    def __init__(self, options, setup):
        super().__init__(options, setup)
        student, teacher = setup.student["c4"], setup.teacher["c4"]
        self.needs = ("logits",) * self.active("kd")
        if self.active("fd") or self.active("contrast"):
            self.needs += ("c4",)
            # (B, Cs, h, w) -> (B, Ct, h, w)
            self.align = nn.Identity() if student == teacher else nn.Conv2d(student, teacher, 1)
            self.projector = {"plain": Projector, "enhanced": EnhancedProjector}[options.projector](teacher)
        if not 0 <= options.mask_ratio < 1:
            raise ValueError(f"--afdcd-mask-ratio {options.mask_ratio}: must be in [0, 1)")
        if self.active("contrast") and options.negatives != "spatial" and teacher % options.groups:
            raise ValueError(f"--afdcd-groups {options.groups}: must divide the teacher's {teacher} channels of c4")
        self.grad_clip = options.grad_clip or None

    def forward(self, student, teacher, batch):
        options, terms = self.options, {}
        if self.active("kd"):
            terms["kd"] = pixel_kl(student.logits, resize_like(teacher.logits, student.logits))
        if not (self.active("fd") or self.active("contrast")):
            return terms
        target = resize_like(teacher.c4, student.c4)
        aligned = self.align(student.c4)
        mask = self.mask(batch, *aligned.shape[-2:])
        generated = self.projector(aligned if mask is None else aligned * mask)
        mean = options.normalise == "mean"
        if self.active("fd"):
            terms["fd"] = mimicking(generated, target, mean)
        if self.active("contrast"):
            terms["contrast"] = contrast(
                generated, target, options.pool, options.patch, options.groups, options.tau, options.negatives, options.distance, mean
            )
        return terms

    def mask(self, batch, height: int, width: int) -> Tensor | None:
        """(B or 1, 1, h, w) with 0 at hidden and 1 at visible positions, one mask for all channels; None hides nothing."""
        if self.options.mask == "none":
            return None
        if self.options.mask == "centre":
            return centre_mask(height, width, batch.image.device)
        return random_mask(self.uniform(batch, 1, height, width), self.options.mask_ratio)


class Projector(nn.Sequential):
    """conv3x3 - ReLU - conv3x3, C -> C."""

    def __init__(self, channels: int):
        super().__init__(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1))


class EnhancedProjector(nn.Module):
    """x1 = ReLU(conv(x)), x2 = ReLU(conv(x1)), output (conv(x1) + conv(x2)) / 2; all 3x3, C -> C."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second, self.from_first, self.from_second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.first(x))
        second = F.relu(self.second(first))
        return (self.from_first(first) + self.from_second(second)) / 2


def random_mask(noise: Tensor, ratio: float) -> Tensor:
    """1 where noise <= 1 - ratio, else 0; noise (B, 1, h, w) uniform in [0, 1)."""
    return (noise <= 1 - ratio).to(noise.dtype)


def centre_mask(height: int, width: int, device=None) -> Tensor:
    """(1, 1, h, w): 0 in rows h // 3 to 2 * h // 3 - 1 and columns w // 3 to 2 * w // 3 - 1, else 1."""
    mask = torch.ones(1, 1, height, width, device=device)
    mask[..., height // 3 : 2 * height // 3, width // 3 : 2 * width // 3] = 0
    return mask


@full_precision
def mimicking(generated: Tensor, teacher: Tensor, mean: bool = False) -> Tensor:
    """Sum of squared differences over (C, h, w), averaged over B; `mean`: averaged over all elements."""
    return F.mse_loss(generated, teacher) if mean else F.mse_loss(generated, teacher, reduction="sum") / len(generated)


@full_precision
def contrast(
    generated: Tensor,
    teacher: Tensor,
    pool: int = 4,
    patch: int = 4,
    groups: int = 16,
    tau: float = 0.07,
    negatives: str = "released",
    distance: str = "l1",
    mean: bool = False,
) -> Tensor:
    """Omni-contrast of two maps (B, C, h, w) inside patches; vectors are not normalised.

    Anchor: the student's cell (pixel n, group k) of a patch; positive: the teacher's cell (n, k). Negatives, all the teacher's:
    `released` (n', k') with k' != k at any pixel n'; `omni` every other cell; `channel` the other groups at the pixel n;
    `spatial` whole pixel vectors at the other pixels (one group).

    Returns: the sum over groups of the mean over pixels of -log softmax(-distance / tau) at the positive; `mean`: the mean over
    all anchors, smaller by the number of groups.
    """
    if pool:
        generated, teacher = F.max_pool2d(generated, pool), F.max_pool2d(teacher, pool)
    if min(generated.shape[-2:]) < patch:
        height, width = generated.shape[-2:]
        raise ValueError(
            f"the map to contrast is {height}x{width}, smaller than a {patch}x{patch} patch; pass a larger --crop-size or --afdcd-pool 0"
        )
    if negatives == "spatial":
        groups = 1
    student_cells, teacher_cells = to_cells(generated, patch, groups), to_cells(teacher, patch, groups)
    distances = torch.cdist(
        student_cells, teacher_cells, p=1.0 if distance == "l1" else 2.0, compute_mode="donot_use_mm_for_euclid_dist"
    )  # (patches, cells, cells); the matrix product form of l2 loses the small distances, which decide at tau 0.07
    similarity = -distances / tau
    if (excluded := excluded_cells(patch * patch, groups, negatives, generated.device)) is not None:
        similarity = similarity.masked_fill(excluded, -torch.inf)
    loss = (similarity.logsumexp(-1) - similarity.diagonal(dim1=-2, dim2=-1)).mean()
    return loss if mean else loss * groups


def to_cells(x: Tensor, patch: int, groups: int) -> Tensor:
    """(B, C, h, w) -> (patches, patch*patch*groups, C/groups): whole patches from the top left, cells ordered by pixel, then group."""
    batch, channels, height, width = x.shape
    rows, columns = height // patch, width // patch
    x = x[..., : rows * patch, : columns * patch].reshape(batch, groups, channels // groups, rows, patch, columns, patch)
    return x.permute(0, 3, 5, 4, 6, 1, 2).reshape(batch * rows * columns, patch * patch * groups, channels // groups)


def excluded_cells(pixels: int, groups: int, negatives: str, device=None) -> Tensor | None:
    """(cells, cells) bool: teacher cells that are neither positive nor negative of an anchor; None when there are none."""
    if negatives in ("omni", "spatial"):
        return None
    cell = torch.arange(pixels * groups, device=device)
    pixel, group = cell // groups, cell % groups
    same_pixel, same_group = pixel[:, None] == pixel, group[:, None] == group
    return same_group & ~same_pixel if negatives == "released" else ~same_pixel
