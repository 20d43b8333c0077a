"""AttnFD: attention and distance against loops, bounds, scale."""

import pytest
import torch

from losses.attnfd import CBAM, normalised_distance
from tests import reference


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def brute_force(attention: CBAM, x):
    """CBAM one channel and one position at a time."""
    batch, channels, height, width = x.shape
    squeeze, expand = attention.squeeze.weight[:, :, 0, 0], attention.expand.weight[:, :, 0, 0]
    result = torch.zeros_like(x)
    for b in range(batch):
        average = torch.stack([x[b, c].sum() / (height * width) for c in range(channels)])
        maximum = torch.stack([x[b, c].flatten().sort().values[-1] for c in range(channels)])
        gate = sigmoid(expand @ (squeeze @ average).clamp(min=0) + expand @ (squeeze @ maximum).clamp(min=0))
        scaled = [[[gate[c] * x[b, c, y, u] for u in range(width)] for y in range(height)] for c in range(channels)]
        for y in range(height):
            for u in range(width):
                score = attention.spatial.bias[0]
                for v in range(max(0, y - 3), min(height, y + 4)):
                    for w in range(max(0, u - 3), min(width, u + 4)):
                        column = torch.stack([scaled[c][v][w] for c in range(channels)])
                        kernel = attention.spatial.weight[0, :, v - y + 3, w - u + 3]
                        score = score + kernel[0] * column.mean() + kernel[1] * column.max()
                for c in range(channels):
                    result[b, c, y, u] = scaled[c][y][u] * sigmoid(score)
    return result


def test_attention_against_brute_force():
    torch.manual_seed(0)
    attention = CBAM(32, 8).double()
    x = normal(0, 2, 32, 4, 5)
    torch.testing.assert_close(attention(x), brute_force(attention, x), rtol=1e-10, atol=1e-12)


def test_distance_against_its_closed_form():
    """|a - b|^2 = 2 - 2 cos for unit vectors, over all images of the process together."""
    student, teacher = normal(1, 3, 4, 5, 6).requires_grad_(), normal(2, 3, 4, 5, 6)
    cosine = (student * teacher).sum() / (student.square().sum().sqrt() * teacher.square().sum().sqrt())
    ours, theirs = normalised_distance(student, teacher), (2 - 2 * cosine) / 3
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)), rtol=1e-9, atol=1e-14)
    assert normalised_distance(-teacher, teacher).item() == pytest.approx(4 / 3)


def test_method_refines_then_projects_the_student():
    torch.manual_seed(0)
    method = reference.build("attnfd", student={"head": 16}, teacher={"head": 32}).double()
    student, teacher = normal(3, 2, 16, 5, 6).relu(), normal(4, 2, 32, 5, 6).relu()
    x = torch.einsum("dc,bchw->bdhw", method.align[0].weight[:, :, 0, 0], brute_force(method.student_attention, student))
    x = (x - x.mean((0, 2, 3), True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    t = brute_force(method.teacher_attention, teacher)
    expected = (x / x.square().sum().sqrt() - t / t.square().sum().sqrt()).square().sum() / 2
    ours = method(reference.outputs({"head": student}), reference.outputs({"head": teacher}), None)["attnfd"]
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)
    assert method.weights == {"attnfd": 2.0}


def test_other_feature():
    method = reference.build("attnfd", student={"c4": 16}, teacher={"c4": 32}, feature="c4")
    assert method.needs == ("c4",)


def test_closer_to_the_teacher_loses_less():
    teacher, noise = normal(5, 2, 4, 6, 6), normal(6, 2, 4, 6, 6)
    losses = [normalised_distance(teacher + step * noise, teacher).item() for step in (0.0, 0.5, 1.0, 2.0)]
    assert losses == sorted(losses) and losses[0] == pytest.approx(0, abs=1e-12)
