"""Confusion matrix, its scores, and the evaluation of a model on a data set."""

import math
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from losses.base import IGNORE
from utils import distributed
from utils.distill import model_input
from utils.log import progress_bar


def confusion(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """(K, K) int64 counts: rows are the labels, columns the predictions; ignored pixels are not counted.

    Args:
        prediction, target: integer tensors of one shape; prediction in [0, K), target in [0, K) or 255.
    """
    target, prediction = target.flatten(), prediction.flatten()
    # ignored pixels go to a spare bin: no boolean gather, whose size a GPU would have to report to the host
    cells = (target.int() * num_classes + prediction).masked_fill_(target == IGNORE, num_classes**2)
    if cells.is_cuda:  # its bincount reads the largest cell back
        counts = torch.zeros(num_classes**2 + 1, dtype=torch.long, device=cells.device)
        counts.scatter_add_(0, cells.long(), torch.ones((), dtype=torch.long, device=cells.device).expand(len(cells)))
    else:
        counts = torch.bincount(cells, minlength=num_classes**2 + 1)
    return counts[: num_classes**2].view(num_classes, num_classes)


def class_of(scores: Tensor) -> Tensor:
    """argmax over the classes, the first of equals: (B, K, H, W) -> (B, H, W) uint8."""
    if scores.is_cuda:
        return scores.argmax(1).to(torch.uint8)
    return running_maximum(scores.unbind(1))


def labels_at(logits: Tensor, size) -> Tensor:
    """`class_of` the upsampled logits: (B, K, h, w) -> (B, *size). On a CPU one class at a time, whose map stays in the cache."""
    if logits.is_cuda:
        return class_of(upsampled(logits, size))
    return running_maximum(upsampled(plane.contiguous(), size)[:, 0] for plane in logits.split(1, dim=1))


def running_maximum(planes) -> Tensor:
    """The index, uint8, of the largest of the maps (B, H, W) at every place, the first of equals. (A CPU's argmax over a dimension that
    is not the last is 15 times slower.)"""
    planes = iter(planes)
    best = next(planes).clone()
    label = torch.zeros_like(best, dtype=torch.uint8)
    for number, plane in enumerate(planes, 1):
        larger = (plane > best).view(torch.uint8)
        torch.maximum(label, larger.mul_(number), out=label)  # later numbers are larger
        torch.maximum(best, plane, out=best)
    return label


@dataclass(frozen=True)
class Scores:
    """What a confusion matrix says, in percent.

    miou: mean IoU over the classes that occur in the labels or the predictions; miou_all: over all classes, absent ones as 0 (the
    figure of codebases that divide by K); aacc: share of all labelled pixels that are right; macc: mean over the classes in the
    labels of the share of their pixels that are right; iou, accuracy: per class, nan where the class is absent.
    """

    miou: float
    miou_all: float
    aacc: float
    macc: float
    iou: list[float]
    accuracy: list[float]
    matrix: list[list[int]]
    images: int

    @classmethod
    def of(cls, matrix: Tensor, images: int, scored=None) -> "Scores":
        """`scored`: the classes that count in the means, all if None; the others' pixels count against them where predicted."""
        counts = matrix.cpu().double().numpy()
        right, labelled, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            iou = 100 * right / (labelled + predicted - right)
            accuracy = 100 * right / labelled
            aacc = 100 * right.sum() / counts.sum()
        if scored is not None:
            unscored = np.setdiff1d(np.arange(len(counts)), scored)
            iou[unscored] = accuracy[unscored] = np.nan
        return cls(
            miou=mean_of_present(iou), miou_all=float(np.nan_to_num(iou).mean()), aacc=float(aacc), macc=mean_of_present(accuracy),
            iou=iou.tolist(), accuracy=accuracy.tolist(), matrix=matrix.cpu().tolist(), images=images,
        )  # fmt: skip

    def plain(self) -> dict:
        """All of it for a json file, which knows no nan: null where a class is absent."""
        known = {name: [None if math.isnan(v) else v for v in getattr(self, name)] for name in ("iou", "accuracy")}
        return vars(self) | known

    def summary(self) -> dict[str, float]:
        return {"mIoU": self.miou, "aAcc": self.aacc, "mAcc": self.macc}

    def table(self, names) -> str:
        """One line per class and the means, for a console."""
        width = max(len(name) for name in [*names, "all classes"])
        rows = [f"  {name:<{width}}  {iou:6.2f}  {acc:6.2f}" for name, iou, acc in zip(names, self.iou, self.accuracy, strict=True)]
        return "\n".join([
            f"  {'class':<{width}}     IoU     Acc", *rows,
            f"  {'mean':<{width}}  {self.miou:6.2f}  {self.macc:6.2f}   (mIoU and mAcc over present classes)",
            f"  {'all classes':<{width}}  {self.miou_all:6.2f}           (absent classes as 0)",
            f"  {'pixels':<{width}}          {self.aacc:6.2f}   (aAcc), {self.images} images",
        ])  # fmt: skip


def mean_of_present(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")


@dataclass(frozen=True)
class Inference:
    """How a picture is turned into labels.

    mode "whole": one forward pass per scale; "slide": windows of `window` pixels every `stride`, overlapping logits averaged.
    With several `scales` or `flip` the class probabilities of the passes are averaged.
    """

    mode: str = "whole"
    window: tuple[int, int] = (512, 512)
    stride: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __call__(self, model, image: Tensor) -> Tensor:
        """Labels (B, H, W), uint8, of uint8 pictures (B, 3, H, W)."""
        size = image.shape[-2:]
        passes = [(scale, flip) for scale in self.scales for flip in ((False, True) if self.flip else (False,))]
        if passes == [(1.0, False)]:
            return labels_at(model(image).logits, size) if self.mode == "whole" else class_of(self.logits(model, image))
        total = 0.0
        for scale, flip in passes:
            logits = self.logits(model, scaled(image.flip(-1) if flip else image, scale))
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
            total = total + (logits.flip(-1) if flip else logits).softmax(1)
        return class_of(total)

    def logits(self, model, image: Tensor) -> Tensor:
        """Logits (B, K, H, W) at the picture's size, float32; upsampled with align_corners=True, the convention of the CIRKD line."""
        if self.mode == "whole":
            return upsampled(model(image).logits, image.shape[-2:])
        height, width = image.shape[-2:]
        window = (min(self.window[0], height), min(self.window[1], width))
        stride = self.stride or tuple(max(1, 2 * side // 3) for side in self.window)
        total, count = 0.0, image.new_zeros(1, 1, height, width, dtype=torch.float32)
        for top in starts(height, window[0], stride[0]):
            for left in starts(width, window[1], stride[1]):
                box = (..., slice(top, top + window[0]), slice(left, left + window[1]))
                logits = upsampled(model(image[box]).logits, window)
                if isinstance(total, float):
                    total = logits.new_zeros(*logits.shape[:2], height, width)
                total[box] += logits
                count[box] += 1
        return total / count


def upsampled(logits: Tensor, size) -> Tensor:
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=True)


def scaled(image: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return image
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    return F.interpolate(image.float(), size=size, mode="bilinear", align_corners=False, antialias=False)


def starts(length: int, window: int, stride: int) -> list[int]:
    """First positions of windows that cover [0, length): every `stride`, the last one flush with the end."""
    return [*range(0, length - window, stride), length - window]


class Timed:
    """Inference that remembers how long every picture took, from the picture on the device to its labels."""

    def __init__(self, inference: Inference, device: torch.device):
        self.inference, self.device, self.seconds = inference, device, []

    def __call__(self, model, image):
        start = self._now()
        labels = self.inference(model, image)
        self.seconds.append((self._now() - start) / len(image))
        return labels

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @property
    def median_ms(self) -> float:
        return 1000 * statistics.median(self.seconds) if self.seconds else float("nan")


class Stopped(Exception):
    """The evaluation was asked to stop."""


@torch.no_grad()
def evaluate(model, loader, num_images: int, spec, device, inference=Inference(), amp=None, stop=None, visit=None,  # noqa: B008
             labelled: bool = True) -> Scores | None:  # fmt: skip
    """Scores over a data set, the same integers for any number of ranks, batches and workers.

    Args:
        model: in any mode; evaluated in eval mode and put back.
        loader: this rank's part of the pictures, each exactly once over all ranks.
        num_images: pictures on all ranks together.
        spec: the data set, for its number of classes and which of them are scored.
        amp: dtype of autocast, or None.
        stop: called now and then; when it returns True on any rank, `Stopped` is raised on all.
        visit: called with (batch, prediction) of every batch, to save pictures.
        labelled: False where there are no labels to compare with: the pictures are predicted for `visit` alone, and None is returned.

    Raises:
        Stopped.
    """
    training, benchmark = model.training, torch.backends.cudnn.benchmark
    model.eval()
    torch.backends.cudnn.benchmark = False  # pictures have many sizes, each of which would be tuned for
    matrix = torch.zeros(spec.num_classes, spec.num_classes, dtype=torch.int64, device=device)
    per_rank = -(-num_images // distributed.world())
    batches, seen = iter(loader), 0
    try:
        with progress_bar(per_rank, unit="image", description="evaluation") as bar:
            # every rank takes the same number of turns, so that all meet in `any_rank`; the last may be empty
            for turn in range(per_rank):
                if stop is not None and turn % 4 == 0 and distributed.any_rank(stop()):
                    raise Stopped
                batch = next(batches, None)
                if batch is None:
                    continue
                seen += len(batch)
                batch = batch.to(device, non_blocking=True)
                with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                    prediction = inference(model, model_input(model, batch))
                if labelled:
                    matrix += confusion(prediction, batch.target, spec.num_classes)
                if visit is not None:
                    visit(batch, prediction)
                bar.update(len(batch))
    finally:
        model.train(training)
        torch.backends.cudnn.benchmark = benchmark
    images = int(distributed.total(torch.tensor(seen)).item())
    if images != num_images:
        raise RuntimeError(f"{images} pictures were evaluated, {num_images} expected")
    if not labelled:
        return None
    matrix = distributed.total(matrix)
    if not int(matrix.sum()):
        raise ValueError(f"none of the {images} pictures has a labelled pixel; evaluate a split whose labels are public")
    return Scores.of(matrix, images, spec.scored)
