"""Plain KD: the published values, the loop it stands for, masking."""

import pytest
import torch

from losses.functional import pixel_kl
from tests import reference


@pytest.mark.parametrize("name", reference.names("kd_"))
def test_released_values(name):
    spec, terms = reference.LOSSES[name]["spec"], reference.LOSSES[name]["terms"]
    given = reference.inputs(spec)
    method = reference.build("kd", student={}, teacher={}, temperature=spec["temperature"])
    ours = method(reference.outputs({"logits": given.student_logits}), reference.outputs({"logits": given.teacher_logits}), None)
    reference.check(ours["kd"], terms["kd"], [given.student_logits])


def test_ignored_pixels_can_be_left_out():
    student, teacher = torch.randn(2, 5, 6, 6, dtype=torch.float64), torch.randn(2, 5, 6, 6, dtype=torch.float64)
    valid = torch.rand(2, 6, 6) < 0.5
    total = 0.0
    for b, y, x in valid.nonzero().tolist():
        p, q = teacher[b, :, y, x].softmax(0), student[b, :, y, x].softmax(0)
        total += (p * (p / q).log()).sum()
    torch.testing.assert_close(pixel_kl(student, teacher, valid=valid), total / valid.sum())
    assert pixel_kl(student.requires_grad_(), teacher, valid=torch.zeros(2, 6, 6, dtype=torch.bool)).item() == 0


def test_zero_at_the_teacher_and_smaller_nearer_to_it():
    teacher, noise = torch.randn(1, 5, 8, 8), torch.randn(1, 5, 8, 8)
    losses = [pixel_kl(teacher + step * noise, teacher).item() for step in (0.0, 0.5, 1.0, 2.0)]
    assert losses[0] == pytest.approx(0, abs=1e-6) and losses == sorted(losses)


def test_teacher_of_another_stride_is_resized_to_the_student():
    method = reference.build("kd", student={}, teacher={})
    student = torch.randn(1, 5, 8, 8, requires_grad=True)
    value = method(reference.outputs({"logits": student}), reference.outputs({"logits": torch.randn(1, 5, 16, 16)}), None)["kd"]
    assert torch.autograd.grad(value, student)[0].shape == student.shape
