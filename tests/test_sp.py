"""SP: its definition pair by pair, and images that are spread over ranks."""

import numpy as np
import pytest
import torch
from torch import nn

from losses.sp import similarity_difference
from tests import reference
from tests.workers import on_ranks
from utils import distributed

IMAGES = 4


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loop(student, teacher):
    """Image by image."""
    total = 0.0
    for i in range(len(student)):
        rows = []
        for features in (student, teacher):
            row = torch.stack([(features[i] * other).sum() for other in features])
            rows.append(row / row.square().sum().sqrt())
        total = total + (rows[0] - rows[1]).square().sum()
    return total / len(student) ** 2


def test_against_brute_force():
    student, teacher = random(3, 4, 5, 6, seed=1).requires_grad_(), random(3, 7, 2, 3, seed=2)
    ours, theirs = similarity_difference(student, teacher), by_loop(student, teacher)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)), rtol=1e-8, atol=1e-14)


def test_nearer_to_the_teacher_loses_less():
    teacher, noise = random(4, 6, 4, 4, seed=1), random(4, 6, 4, 4, seed=2)
    losses = [similarity_difference(teacher + step * noise, teacher).item() for step in (0.0, 0.3, 1.0, 3.0)]
    assert losses[0] == 0 and losses == sorted(losses) and losses[1] > 0


class Trained(nn.Module):
    """A student of one convolution, with the method: what DDP wraps."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Conv2d(3, 5, 3).double()
        self.method = reference.build("sp", student={"head": 5}, teacher={"head": 6}, global_batch=IMAGES, **options)

    def forward(self, images, teacher):
        return self.method(reference.outputs({"head": self.student(images)}), reference.outputs({"head": teacher}), None)["sp"]


def value_and_gradient(**options):
    """Of this rank's share of four images; the gradient is averaged over the ranks."""
    model = Trained(**options)
    share = slice(distributed.rank() * IMAGES // distributed.world(), (distributed.rank() + 1) * IMAGES // distributed.world())
    wrapped = distributed.wrap(model, torch.device("cpu"))
    loss = wrapped(random(IMAGES, 3, 6, 6, seed=1)[share], random(IMAGES, 6, 4, 4, seed=2)[share])
    loss.backward()
    return loss.item(), [p.grad.tolist() for p in model.student.parameters()]


def gathered_and_local():
    return value_and_gradient(), value_and_gradient(gather=False)


def test_two_ranks_are_one_rank_with_all_images(tmp_path):
    value, gradients = value_and_gradient()
    for (found, found_gradients), (local, _) in on_ranks(gathered_and_local, 2, tmp_path / "console.txt"):
        assert found == pytest.approx(value, rel=1e-12) and local != pytest.approx(value, rel=1e-3)
        for ours, theirs in zip(found_gradients, gradients, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-15)


def test_one_image_alone_is_refused():
    with pytest.raises(ValueError, match="--batch-size 1 is too small, it needs at least 2"):
        reference.build("sp", student={}, teacher={}, global_batch=1)
