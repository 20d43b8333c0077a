"""The supervised loss of every student and teacher: cross-entropy on the main and the auxiliary logits, and a detail head's loss."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.base import IGNORE
from losses.detail import detail_loss
from losses.functional import full_precision


@full_precision
def cross_entropy(logits: Tensor, target: Tensor, valid: Tensor | float) -> Tensor:
    """Cross-entropy of the upsampled logits, summed over labelled pixels and divided by `valid`.

    Args:
        logits: (B, K, h, w), upsampled bilinearly with align_corners=True to the target's size, as the CIRKD line does.
        target: (B, H, W) integer labels, 255 = ignore.
        valid: what the sum is divided by. With the number of labelled pixels of all ranks over the number of ranks, DDP's
            average of the gradients is the gradient of the mean over all labelled pixels (a mean per rank is off by 17 % when one
            rank has 75 % ignored pixels). A crop without a labelled pixel gives a connected 0, where a plain mean gives NaN.
    """
    return _UpsampledCrossEntropy.apply(logits, target, 1 << (25 if logits.is_cuda else 19)) / valid


class _UpsampledCrossEntropy(torch.autograd.Function):
    """The sum over labelled pixels, a band of rows at a time with its gradient in the same pass: the upsampled scores, 64 times the
    logits, are never whole, and on a CPU a band stays in the second cache."""

    @staticmethod
    def forward(ctx, logits, target, block):
        """`block`: upsampled scores of a band, at least one row."""
        (images, classes, height, width), (rows, columns) = logits.shape, target.shape[-2:]
        gradient = torch.zeros_like(logits, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        down, across = upsampling(height, rows, logits), upsampling(width, columns, logits)  # (H, h), (W, w)
        ratio, step = (height - 1) / max(rows - 1, 1), max(1, block // (images * classes * columns))
        total = logits.new_zeros((), dtype=torch.float64)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            # the rows that this band lies between; a rounded position may lie a hair before a row
            source = slice(int(start * ratio - 1e-3), min(height, int((stop - 1) * ratio + 1e-3) + 2))
            mix = down[start:stop, source]
            wide = F.interpolate(logits[:, :, source].contiguous(), (mix.shape[1], columns), mode="bilinear", align_corners=True)
            log_probability = (mix @ wide).log_softmax(1)  # (B, K, band, W)
            labels = target[:, None, start:stop].long()
            labelled = labels != IGNORE
            labels = labels.masked_fill(~labelled, 0)
            total -= log_probability.gather(1, labels).masked_fill(~labelled, 0).sum(dtype=torch.float64)
            if gradient is not None:
                difference = log_probability.exp_().scatter_add_(1, labels, log_probability.new_full((), -1.0).expand(labels.shape))
                gradient[:, :, source] += mix.T @ difference.mul_(labelled) @ across  # (B, K, rows of the source, w)
        ctx.save_for_backward(gradient)
        return total.to(logits.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return ctx.saved_tensors[0] * gradient, None, None


def upsampling(length: int, size: int, like: Tensor) -> Tensor:
    """(size, length): what each of `size` places takes of each of `length`, bilinearly with align_corners=True."""
    unit = torch.eye(length, dtype=like.dtype, device=like.device)
    return F.interpolate(unit[None], size, mode="linear", align_corners=True)[0].T.contiguous()


@full_precision
def hard_cross_entropy(logits: Tensor, target: Tensor, threshold: float = 0.7, fewest: float = 1 / 16) -> Tensor:
    """Online hard example mining: the mean cross-entropy of the labelled pixels whose own class has a probability below `threshold`;
    of the hardest ones where those are fewer than `fewest` of the process's pixels, ignored ones counted.

    STDC's defaults; DDRNet's threshold is 0.9. Which pixels are hard is found per process, and so is the mean, on any number of ranks.

    Args:
        logits, target: as in `cross_entropy`. Without a labelled pixel the loss is a connected 0.

    Differs from the released code: with fewer labelled pixels than the least number, the mean is over the labelled ones.
    """
    logits = F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=True)
    losses = F.cross_entropy(logits, target.long(), ignore_index=IGNORE, reduction="none").flatten()  # 0 where ignored
    least = max(1, int(len(losses) * fewest))
    hard = losses > -math.log(threshold)
    hardest, labelled = losses.topk(least).values, (target != IGNORE).sum()
    # both, and no branch: the host does not wait for the number of hard pixels
    return torch.where(hard.sum() > least, (losses * hard).sum() / hard.sum().clamp(min=1), hardest.sum() / labelled.clamp(1, least))


class TaskLoss(nn.Module):
    """{"ce": cross-entropy of the logits, "aux" and "aux2": of auxiliary logits, "detail": loss of a detail head}.

    `weights` are 1 and the arguments. A head whose weight is 0 is not run. The divisor is `batch.valid`, which the engine sets.

    Args:
        kind: "ce", or "ohem" for `hard_cross_entropy` in its place, on all logits; it names the first term.
    """

    def __init__(self, aux_weight: float, aux2_weight: float = 0.0, detail_weight: float = 0.0, kind: str = "ce"):
        super().__init__()
        self.kind = kind
        auxiliary = {"aux": aux_weight, "aux2": aux2_weight, "detail": detail_weight}
        auxiliary = {name: weight for name, weight in auxiliary.items() if weight}
        self.weights = {kind: 1.0, **auxiliary}
        self.needs = ("logits", *auxiliary)

    def forward(self, student, batch) -> dict[str, Tensor]:
        terms = {self.kind: self.pixels(student.logits, batch)}
        for name in self.needs[1:]:
            scores = getattr(student, name)
            terms[name] = detail_loss(scores, batch.target, batch.valid) if name == "detail" else self.pixels(scores, batch)
        return terms

    def pixels(self, logits: Tensor, batch) -> Tensor:
        return cross_entropy(logits, batch.target, batch.valid) if self.kind == "ce" else hard_cross_entropy(logits, batch.target)
