"""Plain forms of what this project computes in another order: the formula as it is written or released, loops and whole maps included.

The tests take them as oracles, `python -m scripts.benchmark` as the yardstick of time and memory. Each has the name, the signature and
the result of the function that it stands for; `forms` puts all of them in its place.
"""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dataset.layout import FilePair
from dataset.transforms import PAD_COLOUR, Draw
from losses import contrast as omni
from losses import icsd, projection
from losses.base import IGNORE
from losses.functional import widen


def cross_entropy(logits: Tensor, target: Tensor, valid: Tensor | float) -> Tensor:
    """`losses.task.cross_entropy` on a map of all upsampled scores."""
    logits = F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=True)
    return F.cross_entropy(logits, target.long(), ignore_index=IGNORE, reduction="sum") / valid


def similarity_kl(student, student_keys, teacher, teacher_keys, temperature=0.1, weights=None, block=None) -> Tensor:
    """`losses.functional.similarity_kl` by one R x M map per set of keys; `block` plays no part."""
    total = 0.0
    for keys, other in zip(student_keys, teacher_keys, strict=True):
        s, t = student @ keys.T / temperature, teacher @ other.T / temperature  # (R, M)
        kl = F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="none").sum(-1)
        total = total + (kl.mean() if weights is None else (kl * weights).sum())
    return total / len(student_keys)


def minibatch_relation(student: Tensor, teacher: Tensor, temperature: float = 0.1, gather: bool = False) -> Tensor:
    """`losses.cirkd.minibatch_relation` pair by pair, on one process."""
    pairs = [
        similarity_kl(s, other_s[None], t, other_t[None], temperature)
        for s, t in zip(student, teacher, strict=True)
        for other_s, other_t in zip(student, teacher, strict=True)
    ]
    return torch.stack(pairs).mean()


def enqueue(queue, entries: Tensor, counts: Tensor) -> None:
    """`losses.memory.Queue.enqueue`, one image and class after the other."""
    for image, numbers in zip(entries, counts, strict=True):
        for k in range(queue.num_classes):
            n, start = int(numbers[k]), int(queue.pointer[k])
            wraps = start + n >= queue.size
            start = queue.size - n if wraps else start
            if n:
                queue.entries[k, start : start + n] = image[k, :n].to(queue.rows.dtype)
                queue.pointer[k] = 0 if wraps else start + n


def class_pixels(features: Tensor, labels: Tensor, noise: Tensor, num_classes: int, most: int = 16, released: bool = False):
    """`losses.memory.class_pixels`, one image and class after the other."""
    most = min(most, labels.shape[1])
    vectors = features.new_zeros(len(labels), num_classes, most, features.shape[1])
    counts = torch.zeros(len(labels), num_classes, dtype=torch.long, device=labels.device)
    for b, image in enumerate(labels):
        for k in image.unique().tolist():
            if k < num_classes:
                members = (image == k).nonzero()[:, 0]
                pool = torch.arange(len(members), device=labels.device) if released else members
                picked = pool[noise[b, pool].argsort()][:most]
                vectors[b, k, : len(picked)] = features[b][:, picked].T
                counts[b, k] = len(picked)
    return vectors, counts


def class_means(features: Tensor, labels: Tensor, num_classes: int):
    """`losses.memory.class_means`, one image and class after the other."""
    means = features.new_zeros(len(labels), num_classes, 1, features.shape[1])
    present = torch.zeros(len(labels), num_classes, dtype=torch.long, device=labels.device)
    for b, image in enumerate(labels):
        for k in image.unique().tolist():
            if k < num_classes:
                means[b, k, 0] = F.normalize(features[b][:, image == k].mean(1), dim=0)
                present[b, k] = 1
    return means, present


def intra_class_difference(student: Tensor, teacher: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """`losses.ifvd.intra_class_difference` by a loop over all classes, with maps of the centres."""
    similarities = []
    for feature in (student, teacher):
        centres = feature.clone()
        for k in range(num_classes):
            mask = (labels == k)[:, None].to(feature.dtype)  # (B, 1, h, w)
            centre = (feature * mask).sum((2, 3), keepdim=True) / (mask.sum((2, 3), keepdim=True) + 1e-6)
            centres = centres * (1 - mask) + centre * mask
        similarities.append(F.cosine_similarity(feature, centres, dim=1))  # 1 where ignored, in both
    return F.mse_loss(*similarities)


def divergences(logits: Tensor) -> Tensor:
    """`losses.icsd.divergences`, one pair of classes after the other."""
    log_p = logits.flatten(2).log_softmax(-1)
    rows = [
        torch.stack([F.kl_div(other, own, reduction="none", log_target=True).sum(-1) for other in log_p.unbind(1)], -1) for own in log_p.unbind(1)
    ]
    return torch.stack(rows, 1)  # (B, K, K)


def released_similarity(logits: Tensor, size=None) -> Tensor:
    """`losses.icsd.released_similarity`, one pair of classes after the other."""
    p, count = icsd.upsampled(logits, size).softmax(2), logits.shape[1]
    entries = {
        (k, m): F.kl_div(p[:, k], p[:, m], reduction="sum") / len(logits) for k in range(count) for m in range(k, count)
    }
    matrix = torch.stack([entries[min(k, m), max(k, m)] for k in range(count) for m in range(count)]).view(count, count)
    return F.normalize(matrix, dim=1)


def pairwise(student: Tensor, teacher: Tensor, form: str = "cirkd") -> Tensor:
    """`losses.skd.pairwise` on two maps of all pairs of positions."""
    kernel = (2, 2) if form == "cirkd" else tuple(max(1, side // 2) for side in student.shape[-2:])
    maps = []
    for feature in (student, teacher):
        pooled = F.max_pool2d(feature, kernel, kernel, ceil_mode=True)
        norm = pooled.norm(dim=1, keepdim=True)
        vectors = (pooled / ((norm if form == "cirkd" else norm.detach()) + 1e-8)).flatten(2)
        maps.append(torch.einsum("icm,icn->imn", vectors, vectors))
    return (maps[0] - maps[1]).square().mean()


def convolve(layer, x: Tensor) -> Tensor:
    """`losses.projection.convolve` by the layer itself."""
    return layer(x)


def mimicking(generated: Tensor, teacher: Tensor, mean: bool = False) -> Tensor:
    """`losses.projection.mimicking` of whole maps in float32."""
    loss = F.mse_loss(widen(generated), widen(teacher), reduction="mean" if mean else "sum")
    return loss if mean else loss / len(generated)


def generate(align, projector, feature: Tensor, mask: Tensor | None) -> Tensor:
    """`losses.projection.generate`: alignment, mask, projector, one after the other."""
    return projector.rest(projection.plain_front(align, projector.first, feature, mask))


def contrast(generated: Tensor, teacher: Tensor, *settings) -> Tensor:
    """`losses.contrast.contrast` in its plain form, whichever `settings` ask for."""
    return omni.contrast(generated, teacher, *settings[:7], form="plain")


def labels_at(logits: Tensor, size) -> Tensor:
    """`utils.metrics.labels_at` from all upsampled scores."""
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=True).argmax(1)


def confusion(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """`utils.metrics.confusion` of the labelled pixels, picked by a mask."""
    labelled = target != IGNORE
    cells = target[labelled].long() * num_classes + prediction[labelled]
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def training_sample(item: FilePair, drawn: Draw) -> tuple[np.ndarray, np.ndarray]:
    """`FilePair.read` and `dataset.transforms.apply` as the CIRKD line loads: Pillow alone, label ids replaced one by one, the whole
    picture scaled before the crop. Image (3, h, w) float32 minus PAD_COLOUR and train ids (h, w) int64: what it sends to the device."""
    image, raw = (np.array(picture) for picture in (Image.open(item.image).convert("RGB"), Image.open(item.label)))
    label = raw.copy()
    for value in np.flatnonzero(item.label_map.table != np.arange(256)):
        if not item.label_map.refused[value]:
            label[raw == value] = item.label_map.table[value]
    image = cv2.resize(image, None, fx=drawn.scale, fy=drawn.scale, interpolation=cv2.INTER_LINEAR).astype(np.float32) - np.float32(PAD_COLOUR)
    label = cv2.resize(label, None, fx=drawn.scale, fy=drawn.scale, interpolation=cv2.INTER_NEAREST)
    below, beside = (max(0, crop - length) for crop, length in zip(drawn.crop, label.shape, strict=True))
    image = cv2.copyMakeBorder(image, 0, below, 0, beside, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    label = cv2.copyMakeBorder(label, 0, below, 0, beside, cv2.BORDER_CONSTANT, value=IGNORE)
    box = np.s_[drawn.top: drawn.top + drawn.crop[0], drawn.left: drawn.left + drawn.crop[1]]
    turn = -1 if drawn.flip else 1
    return image[box].transpose(2, 0, 1)[:, :, ::turn].copy(), label[box][:, ::turn].astype(np.int64)


METHODS = ("afdcd", "aicsd", "cirkd", "cirkdv2", "icsd", "ifvd", "mgd", "skd")  # that have a plain form of their own


@contextmanager
def forms():
    """Inside, every method and the task loss compute by the plain forms."""
    places = {
        "losses.task": ["cross_entropy"], "losses.cirkd": ["similarity_kl", "minibatch_relation", "class_pixels", "class_means"],
        "losses.cirkdv2": ["similarity_kl", "minibatch_relation"], "losses.memory.Queue": ["enqueue"],
        "losses.ifvd": ["intra_class_difference"], "losses.icsd": ["divergences", "released_similarity"], "losses.skd": ["pairwise"],
        "losses.afdcd": ["generate", "contrast", "mimicking"], "losses.mgd": ["generate", "mimicking"], "losses.projection": ["convolve"],
    }  # fmt: skip
    with ExitStack() as stack:
        for place, names in places.items():
            for name in names:
                stack.enter_context(patch(f"{place}.{name}", globals()[name]))
        yield
