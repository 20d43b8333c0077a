"""The task loss beyond cross-entropy: hard pixels, boundaries, further heads."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses.detail import boundaries, detail_loss
from losses.task import TaskLoss, cross_entropy, hard_cross_entropy
from models import SegOutput
from tests import reference
from utils.options import train_options
from utils.session import build_student


def labels(seed, *shape, classes=4, block=1, ignored=0.1):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, shape, generator=generator, dtype=torch.uint8)
    target[torch.rand(shape, generator=generator) < ignored] = 255
    return target.repeat_interleave(block, 1).repeat_interleave(block, 2)


# ------------------------------------------------------------------------------------------------------------------ hard pixels


def hard_by_hand(logits, target, threshold, least):
    """Sort, then look: the losses of labelled pixels from the largest on, as long as they are hard or too few."""
    logits = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=True).double()
    losses = []
    for b in range(len(target)):
        for y in range(target.shape[1]):
            for x in range(target.shape[2]):
                if target[b, y, x] != 255:
                    losses.append(-logits[b, :, y, x].log_softmax(0)[target[b, y, x].long()].item())
    kept = []
    for loss in sorted(losses, reverse=True):
        if loss > -math.log(threshold) or len(kept) < least:
            kept.append(loss)
    return sum(kept) / max(1, len(kept)), len(kept)


@pytest.mark.parametrize(
    ("scale", "threshold", "fewest", "ignored"),
    [(1.0, 0.7, 1 / 16, 0.1), (6.0, 0.7, 1 / 64, 0.1), (6.0, 0.7, 1 / 2, 0.1), (6.0, 0.05, 1 / 4, 0.9), (1.0, 0.7, 1 / 16, 2.0)],
)
def test_hard_cross_entropy(scale, threshold, fewest, ignored):
    """Mostly hard pixels; few; fewer than the least number; fewer labelled ones than that; none at all."""
    target = labels(1, 2, 12, 20, ignored=ignored)
    one_hot = F.one_hot(target.long().clamp(max=3), 4).permute(0, 3, 1, 2).float()
    noise = torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(2))
    logits = ((one_hot + 0.4 * noise) * scale).requires_grad_()
    expected, kept = hard_by_hand(logits.detach(), target, threshold, int(480 * fewest))
    loss = hard_cross_entropy(logits, target, threshold, fewest)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-9)
    loss.backward()
    assert logits.grad.isfinite().all() and ((logits.grad != 0).any(1).sum() == kept)


def test_hard_cross_entropy_of_hard_pixels_alone_is_cross_entropy():
    target, logits = labels(1, 2, 16, 16), torch.randn(2, 4, 4, 4)
    valid = (target != 255).sum()
    assert hard_cross_entropy(logits, target, threshold=1.0).item() == pytest.approx(cross_entropy(logits, target, valid).item(), rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert hard_cross_entropy(logits.bfloat16(), target).dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------- the detail head


def boundaries_by_hand(target):
    """8 x class number less those of the neighbours, where ignored and missing neighbours are left out."""
    images, height, width = target.shape
    result = torch.zeros(images, 1, height, width)
    for b in range(images):
        levels = []
        for stride in (1, 2, 4):
            rows, columns = -(-height // stride), -(-width // stride)
            level = torch.zeros(rows, columns)
            for i in range(rows):
                for j in range(columns):
                    y, x = i * stride, j * stride
                    if target[b, y, x] == 255:
                        continue
                    total = 0
                    for v in range(max(0, y - 1), min(height, y + 2)):
                        for u in range(max(0, x - 1), min(width, x + 2)):
                            if target[b, v, u] != 255:
                                total += int(target[b, y, x]) - int(target[b, v, u])
                    level[i, j] = total > 0.1
            levels.append(level)
        for y in range(height):
            for x in range(width):
                seen = [level[y * level.shape[0] // height, x * level.shape[1] // width] for level in levels]
                result[b, 0, y, x] = float(6 * seen[0] + 3 * seen[1] + seen[2] > 1)
    return result


@pytest.mark.parametrize("size", [(8, 12), (5, 7)])
def test_boundaries_by_hand(size):
    target = labels(3, 2, *size, block=2)
    edges = boundaries(target)
    assert edges.shape == (2, 1, 2 * size[0], 2 * size[1]) and 0.1 < edges.mean() < 0.9
    assert torch.equal(edges, boundaries_by_hand(target))


def test_what_makes_no_boundary():
    """Neither ignored pixels, in which the released code sees class 255, nor the picture's edge, beyond which it sees class 0."""
    target = torch.full((1, 16, 16), 7, dtype=torch.uint8)
    target[:, 4:9, 3:12] = 255
    assert not boundaries(target).any() and not boundaries(torch.full((1, 8, 8), 255, dtype=torch.uint8)).any()
    target[:, 10:, :] = 9
    edges = boundaries(target)[0, 0]
    assert edges[10].all() and not edges[:10].any() and not edges[12:].any()  # row 11 is the second half of a level's row


def test_boundaries_follow_the_released_form_inside():
    """Without ignored pixels and away from the edge: the Laplacian as a convolution, thresholds at 0.1, weights 0.6, 0.3, 0.1."""
    target = labels(5, 1, 8, 8, classes=9, block=4, ignored=0)
    kernel = torch.tensor([[-1.0, -1, -1], [-1, 8, -1], [-1, -1, -1]]).view(1, 1, 3, 3)
    fused = 0
    for stride, weight in ((1, 0.6), (2, 0.3), (4, 0.1)):
        level = (F.conv2d(target[:, None].float(), kernel, stride=stride, padding=1) > 0.1).float()
        fused = fused + weight * F.interpolate(level, (32, 32))
    assert torch.equal(boundaries(target)[..., 4:-4, 4:-4], (fused > 0.1 + 1e-6).float()[..., 4:-4, 4:-4])


def test_detail_loss_by_hand():
    target = labels(3, 2, 8, 12, block=2)
    target[1, :, :16] = 255
    logits = torch.randn(2, 1, 8, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = detail_loss(logits, target, (target != 255).sum())
    edges = boundaries_by_hand(target)
    wide = F.interpolate(logits.detach(), (16, 24), mode="bilinear", align_corners=True).double()
    total, counted, dice = 0.0, 0, 0.0
    for b in range(2):
        overlap = size = 0.0
        for y in range(16):
            for x in range(24):
                if target[b, y, x] != 255:
                    p, edge = 1 / (1 + math.exp(-wide[b, 0, y, x])), edges[b, 0, y, x].item()
                    total -= edge * math.log(p) + (1 - edge) * math.log(1 - p)
                    overlap, size, counted = overlap + p * edge, size + p + edge, counted + 1
        dice += 1 - (2 * overlap + 1) / (size + 1)
    assert loss.item() == pytest.approx(total / counted + dice / 2, rel=1e-5)
    perfect = 40 * (2 * edges - 1)
    whole = labels(3, 2, 8, 12, block=2, ignored=0)
    assert detail_loss(40 * (2 * boundaries(whole) - 1), whole, torch.tensor(whole.numel())).item() < 1e-3
    assert detail_loss(-perfect, target, torch.tensor(counted)).item() > 10
    empty = torch.full_like(target, 255)
    nothing = detail_loss(logits, empty, torch.tensor(1))
    nothing.backward()
    assert nothing.item() == 0 and not logits.grad.any()


# ------------------------------------------------------------------------------------------------------------------- the task loss


def outputs(**channels):
    generator = torch.Generator().manual_seed(0)
    return SegOutput(**{name: torch.randn(2, count, 4, 6, generator=generator, requires_grad=True) for name, count in channels.items()})


def test_terms_and_weights():
    batch = reference.batch_of(labels(3, 2, 16, 24, block=2))
    student = outputs(logits=4, aux=4, aux2=4, detail=1)
    task = TaskLoss(0.4, 0.3, 1.0)
    assert task.weights == {"ce": 1.0, "aux": 0.4, "aux2": 0.3, "detail": 1.0} and task.needs == ("logits", "aux", "aux2", "detail")
    terms = task(student, batch)
    for name, scores in (("ce", student.logits), ("aux", student.aux), ("aux2", student.aux2)):
        assert terms[name].item() == cross_entropy(scores, batch.target, batch.valid).item()
    assert terms["detail"].item() == detail_loss(student.detail, batch.target, batch.valid).item()
    assert TaskLoss(0.0).needs == ("logits",) and TaskLoss(0.4, 0.0, 2.0).weights == {"ce": 1.0, "aux": 0.4, "detail": 2.0}


def test_hard_pixels_of_every_head():
    batch = reference.batch_of(labels(3, 2, 16, 24, block=2))
    student = outputs(logits=4, aux=4)
    terms = TaskLoss(0.4, kind="ohem")(student, batch)
    assert list(terms) == ["ohem", "aux"]
    assert terms["ohem"].item() == hard_cross_entropy(student.logits, batch.target).item()
    assert terms["aux"].item() == hard_cross_entropy(student.aux, batch.target).item()


BASELINE = ["--dataset", "shapes", "--dry-run"]


def student_of(*flags):
    options = train_options([*BASELINE, *flags], distil=False, description="")
    with torch.device("meta"):
        return build_student(options)


def test_detail_weight_of_models_without_a_detail_head():
    assert "detail" in student_of("--model", "stdc", "--backbone", "stdc1").channels
    assert "detail" not in student_of("--model", "stdc", "--backbone", "stdc1", "--detail-weight", "0").channels
    with pytest.raises(ValueError, match="^--detail-weight 2: pspnet has no detail head; drop the flag$"):
        student_of("--model", "pspnet", "--backbone", "mobilenetv2", "--detail-weight", "2")
    assert set(student_of("--model", "stdc", "--backbone", "stdc1", "--aux-weight", "0").auxiliary) == {"detail"}


def test_options_of_parts_that_a_model_does_not_have():
    assert "aux" in student_of("--backbone", "resnet18", "--aux-weight", "0.2").channels
    assert "aux" in student_of("--backbone", "mobilenetv2", "--aux", "--aux-weight", "0.2").channels
    with pytest.raises(ValueError, match="^--aux-weight 0.2: deeplabv3 has no auxiliary head; ask for one with --aux"):
        student_of("--backbone", "mobilenetv2", "--aux-weight", "0.2")
    assert student_of("--head-after-dropout").head.head_after_dropout
    with pytest.raises(ValueError, match="^--student-head-after-dropout: lraspp has no dropout in front of its classifier; drop the flag$"):
        student_of("--model", "lraspp", "--backbone", "mobilenetv3_large", "--head-after-dropout")
