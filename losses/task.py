"""The supervised loss of every student and teacher: cross-entropy on the main and the auxiliary logits."""

import torch.nn.functional as F
from torch import Tensor, nn

from losses.base import IGNORE
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
    logits = F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=True)
    return F.cross_entropy(logits, target.long(), ignore_index=IGNORE, reduction="sum") / valid


class TaskLoss(nn.Module):
    """{"ce": cross-entropy of the logits, "aux": of the auxiliary logits}; `weights` are 1 and `aux_weight`.

    With `aux_weight` 0 the auxiliary head is not run. The divisor is `batch.valid`, which the engine sets.
    """

    def __init__(self, aux_weight: float):
        super().__init__()
        self.weights = {"ce": 1.0} | ({"aux": aux_weight} if aux_weight else {})
        self.needs = ("logits", "aux") if aux_weight else ("logits",)

    def forward(self, student, batch) -> dict[str, Tensor]:
        terms = {"ce": cross_entropy(student.logits, batch.target, batch.valid)}
        if "aux" in self.weights:
            terms["aux"] = cross_entropy(student.aux, batch.target, batch.valid)
        return terms
