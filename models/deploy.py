"""A trained network as it is shipped: without what only training needs, picture in, labels out, in operations that exporters know."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .fold import FoldedNorm, fold_batchnorm
from .layers import average
from .output import AUXILIARY
from .segmentor import Segmentor


def deployable(model: Segmentor, fold: bool = True) -> tuple[Segmentor, int]:
    """(a copy in evaluation mode with the same logits, the number of BatchNorms that were folded into its convolutions, 0 without `fold`).

    Heads that the logits do not depend on are dropped: auxiliary and detail heads, but OCRNet's own `aux` stays.
    """
    model = copy.deepcopy(model)
    for name in AUXILIARY:
        setattr(model, f"{name}_head", None)
        if name not in model.head.intrinsic:
            model.channels.pop(name, None)
    model, folded = fold_batchnorm(model.eval(), ("logits",)) if fold else (model.eval(), 0)
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, FoldedNorm):  # its weight and bias are for methods
                setattr(module, name, nn.Identity())
    return model.requires_grad_(False), folded


class Labeller(nn.Module):
    """(B, 3, H, W) uint8 RGB -> labels (B, H, W) uint8, or (labels, scores (B, K, h, w) float32) with `scores`.

    The labels are those of `utils.metrics.Inference`: the argmax of the scores, upsampled to the picture with align_corners=True. As
    one argmax, which runtimes do faster than the running maximum of this project's CPU path (measured with onnxruntime: a third).
    """

    def __init__(self, model: Segmentor, scores: bool):
        super().__init__()
        self.model, self.scores = model, scores

    def forward(self, image: Tensor):
        with Exportable():
            scores = self.model(image).logits
            labels = F.interpolate(scores, image.shape[-2:], mode="bilinear", align_corners=True).argmax(1).to(torch.uint8)
        return (labels, scores) if self.scores else labels


class Exportable(TorchFunctionMode):
    """Inside, two operations that exporters do not know at every size are done by others with the same values.

    Adaptive averages become products with matrices that are made from the size; attention of three dimensions gets a fourth.
    """

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function is F.adaptive_avg_pool2d:
            return average(*arguments, **(keywords or {}))
        if function is F.scaled_dot_product_attention and arguments[0].dim() == 3:
            keywords = {name: fourth(value) for name, value in (keywords or {}).items()}
            return function(*map(fourth, arguments), **keywords)[:, 0]
        return function(*arguments, **(keywords or {}))


def fourth(value):
    """(B, M, N) -> (B, 1, M, N); what is no tensor of three dimensions stays: a missing mask, one of all pictures, a number."""
    return value[:, None] if isinstance(value, Tensor) and value.dim() == 3 else value
