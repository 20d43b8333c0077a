"""FreeKD: distillation of the high frequencies of features."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losses.base import Method, option, term_weight
from losses.functional import full_precision, label_entropy, labels_like, resize_like
from losses.tokens import masked_mean, overlap, token_masks


class FreeKD(Method):
    """Absolute difference of the high Haar bands of the features, inside masks that learned prompts find on the teacher's bands.

    The feature (student's through a 1x1 convolution to the teacher's width) is split three times into a low and three high bands, the
    low one again each time. Masks M_i = sigmoid(token_i . band of the teacher). Term `bands`: mean over levels, bands, images and
    masks of sum(M_i * e) / sum(M_i), e the absolute difference at a position of the band, averaged over channels.

    Terms `prompt` and `diversity` train the tokens and nothing else, with an Adam of their own, during the first quarter of the
    training: the cross-entropy of a 1x1 classifier on the teacher's feature put together again from its low band and its masked high
    bands (times the sum of the masks), and the mean Dice coefficient of pairs of masks. With both weights 0 the tokens stay as they
    were drawn.

    Differs from the paper: its prompts are tuned inside the teacher before the student's training, here beside it, as in `maskd`, with
    a classifier of their own in place of the teacher's head; its weighting of positions by their relations across levels is left out.
    Chosen here: one set of 8 tokens for all bands and levels, the means above, c4 as the feature, the weights of `prompt` and `diversity`.
    """

    title = "Distillation with semantic frequency prompts"
    paper = "Zhang, Huang, Liu, Jiang, Cheng, Zhang: FreeKD: Knowledge Distillation via Semantic Frequency Prompt, CVPR 2024"
    url = "https://arxiv.org/abs/2311.12079"
    over_batch = {"prompt": "rank"}  # a mean over labelled pixels

    @dataclass(frozen=True)
    class Options:
        bands_weight: float = term_weight(1.0, "weight of the masked difference of the high bands")
        prompt_weight: float = term_weight(1.0, "weight of the masked teacher's cross-entropy, which trains the tokens")
        diversity_weight: float = term_weight(1.0, "weight of the overlap of the masks, which trains the tokens")
        feature: str = option("c4", "which features are compared", choices=("c4", "head"))
        levels: int = option(3, "how often the low band is split", minimum=1)
        tokens: int = option(8, "number of tokens, hence masks of a band", minimum=2)
        pretrain: float = option(
            0.25, "share of the training, at its start, in which the tokens learn", minimum=0, maximum=1, terms=("prompt", "diversity")
        )
        tokens_lr: float = option(
            1e-3, "learning rate of the Adam that trains the tokens and their classifier", minimum=0, terms=("prompt", "diversity")
        )

    def __init__(self, options, setup):
        super().__init__(options, setup)
        self.needs = (options.feature,)
        student, teacher = setup.student[options.feature], setup.teacher[options.feature]
        self.learns = self.active("prompt") or self.active("diversity")
        tokens = torch.randn(options.tokens, teacher) / teacher**0.5
        if self.learns:
            self.tokens = nn.Parameter(tokens)
        else:
            self.register_buffer("tokens", tokens)
        if self.active("bands"):
            self.align = nn.Identity() if student == teacher else nn.Conv2d(student, teacher, 1)  # (B, Cs, h, w) -> (B, Ct, h, w)
        if self.active("prompt"):
            self.classifier = nn.Conv2d(teacher, setup.num_classes, 1)

    def own_optimizer(self):
        if not self.learns:
            return None
        classifier = self.classifier.parameters() if self.active("prompt") else ()
        return torch.optim.Adam([self.tokens, *classifier], lr=self.options.tokens_lr, fused=True)

    def factors(self, progress):
        return dict.fromkeys(("prompt", "diversity"), float(progress < self.options.pretrain))

    def forward(self, student, teacher, batch):
        terms = {}
        source = getattr(student, self.options.feature)
        target = resize_like(getattr(teacher, self.options.feature), source)
        low, high = wavelet(target, self.options.levels)
        masks = [token_masks(self.tokens, bands.flatten(0, 1)) for bands in high]  # (B*3, M, h', w')
        if self.active("bands"):
            _, source_high = wavelet(self.align(source), self.options.levels)
            levels = [band_distance(s, t, mask.detach()) for s, t, mask in zip(source_high, high, masks, strict=True)]
            terms["bands"] = sum(levels) / len(levels)
        if self.active("prompt"):
            gates = [mask.sum(1)[:, None].unflatten(0, (-1, 3)) for mask in masks]  # (B, 3, 1, h', w')
            rebuilt = inverse_wavelet(low, [gate * bands for gate, bands in zip(gates, high, strict=True)])
            height, width = target.shape[-2:]
            terms["prompt"] = label_entropy(self.classifier(rebuilt[..., :height, :width]), labels_like(batch.target, target))
        if self.active("diversity"):
            terms["diversity"] = sum(map(overlap, masks)) / len(masks)
        return terms


@full_precision
def wavelet(x: Tensor, levels: int) -> tuple[Tensor, list[Tensor]]:
    """Orthonormal Haar transform of x (B, C, h, w).

    Sizes that 2^levels does not divide are filled up by repeating the last row and column, which adds no high frequency.

    Returns:
        the last low band (B, C, h / 2^levels, w / 2^levels) and per level the high bands (B, 3, C, h', w'): differences of columns, of
        rows, and of both; finest first.
    """
    for dim in (-2, -1):
        last = x.narrow(dim, x.shape[dim] - 1, 1)
        # a concatenation and not a replicating pad, whose gradient on CUDA is not deterministic
        x = torch.cat([x, *[last] * (-x.shape[dim] % 2**levels)], dim)
    high = []
    for _ in range(levels):
        a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
        high.append(torch.stack([a - b + c - d, a + b - c - d, a - b - c + d], 1) / 2)
        x = (a + b + c + d) / 2
    return x, high


@full_precision
def inverse_wavelet(low: Tensor, high: list[Tensor]) -> Tensor:
    """What `wavelet` was given, its filled up rows and columns included."""
    for bands in reversed(high):
        columns, rows, both = bands.unbind(1)
        quarters = [low + columns + rows + both, low - columns + rows - both, low + columns - rows - both, low - columns - rows + both]
        low = nn.functional.pixel_shuffle(torch.stack(quarters, 2).flatten(1, 2) / 2, 2)
    return low


@full_precision
def band_distance(student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
    """Mean over images, bands and masks of the mask-weighted mean absolute difference; (B, 3, C, h, w) twice, (B*3, M, h, w)."""
    return masked_mean((student - teacher).abs().mean(2).flatten(0, 1), masks)
