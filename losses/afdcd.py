"""Af-DCD: augmentation-free dense contrastive distillation."""

from dataclasses import dataclass

from torch import Tensor, nn

from losses.base import Method, option, term_weight
from losses.contrast import FORMS, contrast
from losses.functional import pixel_kl, resize_like
from losses.projection import PROJECTORS, centre_mask, generate, mimicking, random_mask


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
        kd_weight: float = term_weight(1.0, "weight of plain KD", ade20k=0.5, coco_stuff_164k=0.5, coco_stuff_182=0.5, coco_stuff_10k=0.5)
        fd_weight: float = term_weight(
            2e-6, "weight of the masked feature mimicking",
            citys=2e-6, voc=1e-6, camvid=8e-6, ade20k=1e-6, coco_stuff_164k=5e-6, coco_stuff_182=5e-6, coco_stuff_10k=5e-6,
            when=("normalise", "mean", {
                "default": 8.4, "shapes": 1.0, "camvid": 33.2, "citys": 33.6, "voc": 8.4, "ade20k": 8.4,
                "coco_stuff_164k": 41.9, "coco_stuff_182": 41.9, "coco_stuff_10k": 41.9,
            }),
        )  # fmt: skip
        contrast_weight: float = term_weight(
            5e-3, "weight of the contrast",
            citys=5e-3, voc=5e-3, camvid=1e-2, ade20k=4e-2, coco_stuff_164k=5e-3, coco_stuff_182=5e-3, coco_stuff_10k=5e-3,
            when=("normalise", "mean", {
                "default": 0.08, "shapes": 0.01, "camvid": 0.16, "citys": 0.08, "voc": 0.08, "ade20k": 0.64,
                "coco_stuff_164k": 0.08, "coco_stuff_182": 0.08, "coco_stuff_10k": 0.08,
            }),
        )  # fmt: skip
        normalise: str = option(
            "released", "sums with the published weights, or means with weights for any crop and width", choices=("released", "mean"), shapes="mean",
            folder="mean", terms=("fd", "contrast"),
        )
        mask: str = option("random", "which positions of the student are zeroed", choices=("random", "centre", "none"), terms=("fd", "contrast"))
        mask_ratio: float = option(
            0.75, "share of the positions that a random mask zeroes, in [0, 1)", minimum=0, below=1, terms=("fd", "contrast"), only=("mask", "random")
        )
        projector: str = option(
            "plain", "two 3x3 convolutions, the two-branch one with four, or (not in the paper) two 3x3 between 1x1 of an eighth of the width",
            choices=tuple(PROJECTORS), terms=("fd", "contrast"),
        )  # fmt: skip
        negatives: str = option("released", "cells an anchor is pushed from", choices=("released", "omni", "channel", "spatial"), terms=("contrast",))
        distance: str = option("l1", "distance between cells; the paper's ablation reports l2 as best", choices=("l1", "l2"), terms=("contrast",))
        tau: float = option(0.07, "temperature of the contrast", above=0, terms=("contrast",))
        groups: int = option(16, "channel groups M", minimum=1, terms=("contrast",), only=("negatives", "released", "omni", "channel"))
        patch: int = option(4, "side of a patch, in positions of the pooled map", minimum=1, terms=("contrast",))
        pool: int = option(4, "max-pooling of the maps before the contrast, 0 for none", minimum=0, camvid=0, shapes=0, terms=("contrast",))
        contrast: str = option(
            "auto", "the contrast as written or fused, equal to rounding; auto: fused, compiled if large; plain for spatial on a CPU",
            choices=FORMS, terms=("contrast",),
        )
        grad_clip: float = option(15.0, "largest gradient norm of alignment and projector, 0 for no clipping", minimum=0, terms=("fd", "contrast"))

    def __init__(self, options, setup):
        super().__init__(options, setup)
        student, teacher = setup.student["c4"], setup.teacher["c4"]
        self.needs = ("logits",) * self.active("kd")
        if self.active("fd") or self.active("contrast"):
            self.needs += ("c4",)
            # (B, Cs, h, w) -> (B, Ct, h, w)
            self.align = nn.Identity() if student == teacher else nn.Conv2d(student, teacher, 1)
            self.projector = PROJECTORS[options.projector](teacher)
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
        generated = generate(self.align, self.projector, student.c4, self.mask(batch, *student.c4.shape[-2:]))
        mean = options.normalise == "mean"
        if self.active("fd"):
            terms["fd"] = mimicking(generated, target, mean)
        if self.active("contrast"):
            terms["contrast"] = contrast(
                generated, target, options.pool, options.patch, options.groups, options.tau, options.negatives, options.distance, mean,
                options.contrast,
            )  # fmt: skip
        return terms

    def mask(self, batch, height: int, width: int) -> Tensor | None:
        """(B or 1, 1, h, w) with 0 at hidden and 1 at visible positions, one mask for all channels; None hides nothing."""
        if self.options.mask == "none":
            return None
        if self.options.mask == "centre":
            return centre_mask(height, width, batch.image.device)
        return random_mask(self.uniform(batch, 1, height, width), self.options.mask_ratio)
