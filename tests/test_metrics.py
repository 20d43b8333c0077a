"""Scores against a slow reference written out pixel by pixel; inference against what it must equal."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataset import Batch
from models import SegOutput
from utils.metrics import Inference, Scores, confusion, evaluate, starts


def slow_scores(pairs, num_classes, scored):
    """mIoU, aAcc and mAcc in percent of [(label, prediction), ...], from the definitions alone."""
    pairs = [(label, prediction) for label, prediction in pairs if label != 255]
    ious, accuracies = [], []
    for k in scored:
        both = sum(1 for label, prediction in pairs if label == k and prediction == k)
        either = sum(1 for label, prediction in pairs if label == k or prediction == k)
        labelled = sum(1 for label, _ in pairs if label == k)
        if either:
            ious.append(both / either)
        if labelled:
            accuracies.append(both / labelled)
    right = sum(1 for label, prediction in pairs if label == prediction)
    means = [sum(values) / len(values) if values else math.nan for values in (ious, [right / len(pairs)] if pairs else [], accuracies)]
    return [100 * value for value in means], [100 * sum(ious) / num_classes]


@pytest.mark.parametrize("scored", [False, True])
def test_scores_are_those_of_a_slow_reference(scored):
    """100 random cases each: 1 to 7 classes, of which some are absent from labels, predictions or both, and 0 to 100 % ignored."""
    draw = random.Random(scored)
    seen = {"absent": 0, "all ignored": 0, "predicted only": 0}
    for _ in range(100):
        num_classes = draw.randint(1, 7)
        labels = draw.sample(range(num_classes), draw.randint(1, num_classes))
        predictions = draw.sample(range(num_classes), draw.randint(1, num_classes))
        ignored = draw.choice([0, 0.1, 0.5, 0.95, 1])
        pixels = draw.randint(1, 60)
        pairs = [(255 if draw.random() < ignored else draw.choice(labels), draw.choice(predictions)) for _ in range(pixels)]
        which = sorted(draw.sample(range(num_classes), draw.randint(1, num_classes))) if scored else range(num_classes)
        target, prediction = (torch.tensor(column) for column in zip(*pairs, strict=True))
        matrix = confusion(prediction, target.to(torch.uint8), num_classes)
        assert matrix.dtype == torch.int64 and matrix.sum() == sum(label != 255 for label, _ in pairs)
        scores = Scores.of(matrix, 1, tuple(which) if scored else None)
        means, of_all = slow_scores(pairs, num_classes, which)
        np.testing.assert_allclose([scores.miou, scores.aacc, scores.macc], means, rtol=0, atol=1e-12)
        np.testing.assert_allclose([scores.miou_all], of_all, rtol=0, atol=1e-12)
        present = {label for label, _ in pairs} - {255}
        seen["absent"] += len(present) < num_classes
        seen["all ignored"] += not present
        seen["predicted only"] += any(prediction not in present for label, prediction in pairs if label != 255)
    assert all(count > 5 for count in seen.values()), f"the cases are too tame: {seen}"


def test_unscored_classes_count_against_the_scored_ones():
    """Class 1 is not scored: where class 0 is taken for it, class 0 loses a pixel; its own IoU is nan."""
    matrix = torch.tensor([[3, 1], [2, 4]])
    scores = Scores.of(matrix, 1, (0,))
    assert scores.miou == scores.iou[0] == pytest.approx(100 * 3 / 6) and scores.macc == pytest.approx(75)
    assert math.isnan(scores.iou[1]) and math.isnan(scores.accuracy[1])
    assert scores.aacc == pytest.approx(70), "aAcc is over all labelled pixels"


def test_confusion_rows_are_labels():
    matrix = confusion(torch.tensor([[1, 1, 0]]), torch.tensor([[0, 0, 255]], dtype=torch.uint8), 3)
    assert matrix.tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 0]]


def test_table_names_every_class():
    text = Scores.of(torch.tensor([[3, 1], [0, 0]]), 7).table(("road", "a long class name"))
    assert "road" in text and "a long class name" in text and " 75.00" in text and "7 images" in text
    assert len({len(line.split("   (")[0].rstrip()) for line in text.splitlines()[:4]}) == 1, "columns are aligned"


# ------------------------------------------------------------------------------------------------------------------ inference


class Pixelwise(torch.nn.Module):
    """A 1x1 convolution: what a pixel is called depends on nothing else, so windows and mirrors change nothing."""

    def __init__(self, kernel=1, seed=0, stride=1):
        super().__init__()
        self.weight = torch.randn(4, 3, kernel, kernel, generator=torch.Generator().manual_seed(seed))
        self.stride, self.sizes = stride, []

    def forward(self, image):
        self.sizes.append(tuple(image.shape[-2:]))
        padding = self.weight.shape[-1] // 2
        return SegOutput(logits=F.conv2d(image.float() / 255, self.weight, padding=padding, stride=self.stride))


def picture(height=37, width=52, seed=1):
    return torch.randint(0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("length", range(1, 40))
def test_windows_cover_everything(length):
    for window in range(1, length + 1):
        for stride in range(1, window + 1):
            found = starts(length, window, stride)
            assert {p for start in found for p in range(start, start + window)} == set(range(length)), "every pixel, none beyond"
            assert len(set(found)) == len(found), "no window twice"
            assert all(b - a <= stride for a, b in zip(found, found[1:], strict=False))


def test_one_window_is_the_whole_picture():
    model, image = Pixelwise(kernel=5, stride=4), picture()
    whole = Inference().logits(model, image)
    for window in ((37, 52), (64, 64), (37, 512)):
        model.sizes.clear()
        assert torch.equal(Inference("slide", window).logits(model, image), whole)
        assert model.sizes == [(37, 52)]
    assert not torch.equal(Inference("slide", (16, 16)).logits(model, image), whole), "smaller windows see less context"


@pytest.mark.parametrize("window,stride", [((16, 16), None), ((16, 20), (16, 20)), ((7, 9), (3, 8)), ((1, 1), (1, 1)), ((40, 16), (40, 5))])
def test_windows_of_a_pixelwise_model_change_nothing(window, stride):
    image = picture()
    sliding, whole = Inference("slide", window, stride).logits(Pixelwise(), image), Inference().logits(Pixelwise(), image)
    torch.testing.assert_close(sliding, whole, rtol=1e-5, atol=1e-5)


def test_default_stride_is_two_thirds():
    model = Pixelwise()
    Inference("slide", (16, 52)).logits(model, picture())
    assert len(model.sizes) == len(starts(37, 16, 10)) == 4


def test_flip():
    """Of a symmetric model flipping changes nothing; of any model the prediction of the mirrored picture is the mirrored one."""
    image = picture()
    assert torch.equal(Inference(flip=True)(Pixelwise(), image), Inference()(Pixelwise(), image))
    model = Pixelwise(kernel=5)
    both = Inference(flip=True)(model, image)
    assert torch.equal(Inference(flip=True)(model, image.flip(-1)), both.flip(-1))
    assert not torch.equal(both, Inference()(model, image)), "an asymmetric model is not mirrored twice by chance"


def test_scales_average_probabilities():
    model, image = Pixelwise(kernel=3), picture()
    model.sizes.clear()
    found = Inference(scales=(0.5, 1.0, 1.25))(model, image)
    assert model.sizes == [(round(37 * s), round(52 * s)) for s in (0.5, 1.0, 1.25)]
    total = 0
    for size in model.sizes[:3]:
        small = image.float() if size == (37, 52) else F.interpolate(image.float(), size=size, mode="bilinear", align_corners=False)
        logits = F.interpolate(model(small).logits, size=(37, 52), mode="bilinear", align_corners=True)
        total = total + logits.softmax(1)
    assert torch.equal(found, total.argmax(1))
    assert not torch.equal(found, Inference()(model, image))


def test_evaluation_is_in_eval_mode_and_puts_the_mode_back():
    model = torch.nn.Sequential(Pixelwise(), torch.nn.Identity())
    model.config = {"in_channels": 3}
    modes = []

    def inference(model, image):
        modes.append(model.training)
        return torch.zeros(1, 37, 52, dtype=torch.int64)

    loader = [Batch(picture(), torch.zeros(1, 37, 52, dtype=torch.uint8), ["a"])]
    spec = SimpleNamespace(num_classes=4, scored=None)
    for mode in (True, False):
        scores = evaluate(model.train(mode), loader, 1, spec, torch.device("cpu"), inference)
        assert model.training == mode and scores.matrix[0][0] == 37 * 52
    assert modes == [False, False]
    with pytest.raises(RuntimeError, match="1 pictures were evaluated, 2 expected"):
        evaluate(model, loader, 2, spec, torch.device("cpu"), inference)
