"""MasKD: masked distillation with receptive tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losses.base import Method, option, term_weight
from losses.functional import full_precision, label_entropy, labels_like, resize_like
from losses.tokens import masked_mean, overlap, token_masks


class MasKD(Method):
    """Squared error of the logits inside soft masks that learned tokens find on the teacher's logits.

    Masks M_i = sigmoid(token_i . z_T), i = 1..8. Term `logits`: mean over images and masks of 0.5 * sum(M_i * e) / sum(M_i), where e is the
    squared error at a position, averaged over classes; every mask counts alike, whatever its area. Term `aux`: the same with the
    auxiliary logits of both networks in the same masks, where both have an auxiliary head.

    Terms `mask` and `diversity` train the tokens and nothing else, with an Adam of their own: cross-entropy of the masked teacher's
    logits, (sum of the masks) * z_T, which draws the masks to what the teacher needs, and the mean Dice coefficient of pairs of masks,
    which drives them apart. With both weights 0 the tokens stay as they were drawn.

    Differs from the paper: there a training of the masks comes first, 10k iterations, and the student's training then finds them
    fixed. Here both are one training: the tokens learn during its first quarter (10k of 40k iterations; `--maskd-pretrain`), in which
    the student is already distilled in the masks as they are, and are fixed from then on (but for the last momentum of Adam). The
    weights of `mask` and `diversity`, the tokens' learning rate and initial values, and the mean over classes are chosen here.
    The published runs use `--lr-floor 1e-4 --weight-decay 5e-4` (MobileNetV2 student: 2e-4).
    """

    title = "Masked distillation with receptive tokens"
    paper = "Huang, Zhang, You, Wang, Qian, Cao, Xu: Masked Distillation with Receptive Tokens, ICLR 2023"
    url = "https://arxiv.org/abs/2205.14589"
    over_batch = {"mask": "rank"}  # a mean over labelled pixels

    @dataclass(frozen=True)
    class Options:
        logits_weight: float = term_weight(1.0, "weight of the masked squared error of the logits")
        aux_weight: float = term_weight(0.4, "weight of that of the auxiliary logits, where both networks have them")
        mask_weight: float = term_weight(1.0, "weight of the masked teacher's cross-entropy, which trains the tokens")
        diversity_weight: float = term_weight(1.0, "weight of the overlap of the masks, which trains the tokens")
        tokens: int = option(8, "number of tokens, hence masks", minimum=2)
        pretrain: float = option(
            0.25, "share of the training, at its start, in which the tokens learn", minimum=0, maximum=1, terms=("mask", "diversity")
        )
        tokens_lr: float = option(1e-3, "learning rate of the Adam that trains the tokens", minimum=0, terms=("mask", "diversity"))

    def __init__(self, options, setup):
        super().__init__(options, setup)
        without = [who for who, channels in (("student", setup.student), ("teacher", setup.teacher)) if "aux" not in channels]
        if self.active("aux") and without:
            self.leave_out("aux", f"{' and '.join(without)} without auxiliary head")
        self.needs = ("logits", "aux") if self.active("aux") else ("logits",)
        self.learns = self.active("mask") or self.active("diversity")
        tokens = torch.randn(options.tokens, setup.num_classes) / setup.num_classes**0.5
        if self.learns:
            self.tokens = nn.Parameter(tokens)
        else:
            self.register_buffer("tokens", tokens)

    def own_optimizer(self):
        return torch.optim.Adam([self.tokens], lr=self.options.tokens_lr, fused=True) if self.learns else None

    def factors(self, progress):
        return dict.fromkeys(("mask", "diversity"), float(progress < self.options.pretrain))

    def forward(self, student, teacher, batch):
        terms = {}
        logits = resize_like(teacher.logits, student.logits)
        masks = token_masks(self.tokens, logits)
        if self.active("logits"):
            terms["logits"] = masked_error(student.logits, logits, masks.detach())
        if self.active("aux"):
            target = resize_like(teacher.aux, student.aux)
            terms["aux"] = masked_error(student.aux, target, resize_like(masks.detach(), student.aux))
        if self.active("mask"):
            terms["mask"] = label_entropy(masks.sum(1, keepdim=True) * logits, labels_like(batch.target, logits))
        if self.active("diversity"):
            terms["diversity"] = overlap(masks)
        return terms


@full_precision
def masked_error(student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
    """0.5 * mean over images and masks of the mask-weighted mean squared error; logits (B, K, h, w), masks (B, M, h, w)."""
    return 0.5 * masked_mean((student - teacher).square().mean(1), masks)
