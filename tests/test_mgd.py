"""MGD: the published values, the mask, what the student's hidden positions may do."""

import pytest
import torch

from losses import projection
from losses.projection import FRONTS
from tests import reference


def build(**given):
    return reference.build("mgd", student={"c4": 16}, teacher={"c4": 32}, **given)


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("name", reference.names("mgd"))
def test_released_values(monkeypatch, name, front):
    monkeypatch.setattr(projection, "front_costs", lambda *arguments: {front: 0})
    spec, terms = reference.LOSSES[name]["spec"], reference.LOSSES[name]["terms"]
    given = reference.inputs(spec)
    method = reference.build(
        "mgd", student={"c4": spec["student_channels"]}, teacher={"c4": spec["teacher_channels"]}, mask_ratio=spec["mask_ratio"]
    )
    assert method.weights == {"mgd": spec["alpha"]}
    reference.fill(method)
    method.uniform = lambda batch, *shape: given.noise
    ours = method(reference.outputs({"c4": given.student_feature}), reference.outputs({"c4": given.teacher_feature}), None)
    # the published term holds its weight
    reference.check(spec["alpha"] * ours["mgd"], terms["mgd"], [given.student_feature, *method.parameters()])


def test_hidden_positions_get_no_gradient_and_every_position_counts():
    method, batch = build(), reference.batch_of(torch.zeros(2, 96, 96, dtype=torch.uint8))
    feature, teacher = torch.randn(2, 16, 12, 12, requires_grad=True), torch.randn(2, 32, 12, 12, requires_grad=True)
    method(reference.outputs({"c4": feature}), reference.outputs({"c4": teacher}), batch)["mgd"].backward()
    visible = method.uniform(batch, 1, 12, 12) <= 0.25
    assert torch.equal((feature.grad != 0).any(1, keepdim=True), visible) and 0.15 < visible.float().mean() < 0.35
    assert (teacher.grad != 0).any(1).all()  # also where the student is hidden


def test_an_untrained_projector_learns_the_teacher():
    """Gradient steps on alignment and projector alone lower the loss."""
    torch.manual_seed(0)
    method, batch = build(), reference.batch_of(torch.zeros(2, 64, 64, dtype=torch.uint8))
    student = reference.outputs({"c4": torch.randn(2, 16, 8, 8)})
    teacher = reference.outputs({"c4": torch.randn(2, 32, 8, 8).relu()})
    optimizer = torch.optim.SGD(method.parameters(), lr=1e-4)
    losses = []
    for _ in range(10):
        loss = method(student, teacher, batch)["mgd"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_a_mask_ratio_of_one_is_refused():
    with pytest.raises(ValueError, match="mgd-mask-ratio 1.0"):
        build(mask_ratio=1.0)
