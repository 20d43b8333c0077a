"""FitNet, feature KD, AT, DSD and IFVD: the published values, and loops straight from the descriptions."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from losses.at import attention_transfer
from losses.dsd import class_similarity_difference, residual_difference
from losses.feature import cosine_distance, mean_squared_error, standardised_error
from losses.ifvd import intra_class_difference
from tests import reference


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(ours, theirs, student):
    """Value and gradient with respect to the student."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)), rtol=1e-7, atol=1e-14)


# ------------------------------------------------------------------------------------------------------- published values


@pytest.mark.parametrize("name", reference.names("fitnet"))
def test_fitnet_released_values(name):
    spec, terms = reference.LOSSES[name]["spec"], reference.LOSSES[name]["terms"]
    given = reference.inputs(spec)
    method = reference.build("fitnet", student={"head": spec["student_channels"]}, teacher={"head": spec["teacher_channels"]}, kd_weight=0.0)
    reference.fill(method)
    ours = method(reference.outputs({"head": given.student_feature}), reference.outputs({"head": given.teacher_feature}), None)
    reference.check(ours["fitnet"], terms["fitnet"], [given.student_feature, *method.parameters()])


@pytest.mark.parametrize("name", reference.names("at"))
def test_at_released_values(name):
    given = reference.inputs(reference.LOSSES[name]["spec"])
    method = reference.build("at", student={}, teacher={}, kd_weight=0.0)
    ours = method(reference.outputs({"head": given.student_feature}), reference.outputs({"head": given.teacher_feature}), None)
    reference.check(ours["at"], reference.LOSSES[name]["terms"]["at"], [given.student_feature])


@pytest.mark.parametrize("name", reference.names("dsd"))
def test_dsd_released_values(name):
    terms = reference.LOSSES[name]["terms"]
    given = reference.inputs(reference.LOSSES[name]["spec"])
    levels = [given.student_feature, given.student_wide, given.student_logits]
    student = reference.outputs(dict(zip(("c3", "head", "logits"), levels, strict=True)))
    teacher = reference.outputs({"c3": given.teacher_feature, "head": given.teacher_second, "logits": given.teacher_logits})
    ours = reference.build("dsd", student={}, teacher={})(student, teacher, None)
    reference.check(ours["psd"], terms["psd"], levels)
    reference.check(ours["csd"], terms["csd"], [None, None, given.student_logits])


@pytest.mark.parametrize("name", reference.names("ifvd"))
def test_ifvd_released_values(name):
    spec, terms = reference.LOSSES[name]["spec"], reference.LOSSES[name]["terms"]
    given = reference.inputs(spec)
    alone = {"kd_weight": 0.0, "adversarial_weight": 0.0, "critic_weight": 0.0}
    method = reference.build("ifvd", student={}, teacher={}, num_classes=spec["num_classes"], **alone)
    student, teacher = reference.outputs({"head": given.student_wide}), reference.outputs({"head": given.teacher_feature})
    ours = method(student, teacher, reference.batch_of(given.target))
    reference.check(ours["ifvd"], terms["ifvd"], [given.student_wide])


# ------------------------------------------------------------------------------------------------------------ brute force


def ifvd_by_loop(student, teacher, labels):
    """Pixel by pixel."""
    total = 0.0
    for b, y, x in [(b, y, x) for b in range(len(labels)) for y in range(labels.shape[1]) for x in range(labels.shape[2])]:
        if (label := labels[b, y, x].item()) != 255:
            s, t = (cosine_similarity(f[b, :, y, x], centre(f[b], labels[b] == label), dim=0) for f in (student, teacher))
            total = total + (s - t) ** 2
    return total / labels.numel()


def centre(feature, members):
    return (feature * members).sum((1, 2)) / (members.sum() + 1e-6)


def test_ifvd_against_brute_force():
    """Widths that differ, a class that one image lacks, ignored pixels, an image without a labelled pixel."""
    student, teacher = random(3, 4, 5, 6, seed=1).requires_grad_(), random(3, 7, 5, 6, seed=2)
    labels = torch.randint(0, 4, (3, 5, 6), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    labels[0][labels[0] == 2] = 1
    labels[1, :2], labels[2] = 255, 255
    same(intra_class_difference(student, teacher, labels, 4), ifvd_by_loop(student, teacher, labels), student)


def test_ifvd_centres_carry_gradient():
    """The feature at one pixel moves the similarity of the others of its class, and of no others."""
    student, teacher = random(1, 4, 4, 4, seed=1).requires_grad_(), random(1, 4, 4, 4, seed=2)
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    labels[:, 2:] = 1

    def similarities(features):
        return [intra_class_difference(features, teacher, torch.where(here, labels, 255), 2) for here in (labels == 0, labels == 1)]

    for half, value in enumerate(similarities(student)):
        gradient = torch.autograd.grad(value, student)[0][0].abs().sum(0)
        assert (gradient[2 * half : 2 * half + 2] > 0).all() and gradient[2 - 2 * half : 4 - 2 * half].max() == 0
    moved = student.detach().clone()
    moved[0, :, 0, 0] += 1
    before, after = similarities(student.detach()), similarities(moved)
    assert before[1] == after[1] and before[0] != after[0]


def test_standardised_error_is_twice_one_minus_the_correlation():
    """Whatever scale and offset the channels have."""
    student, teacher = random(2, 3, 6, 7, seed=1), random(2, 3, 6, 7, seed=2)
    rows = [torch.stack([s, t]) for s, t in zip(student.transpose(0, 1).flatten(1), teacher.transpose(0, 1).flatten(1), strict=True)]
    expected = 2 - 2 * torch.stack([torch.corrcoef(pair)[0, 1] for pair in rows]).mean()
    scale = torch.tensor([1.0, 30.0, 100.0], dtype=torch.float64).view(3, 1, 1)  # 1e-5 is added to the variance
    torch.testing.assert_close(standardised_error(scale * 10 * student + 5, scale * 10 * teacher - 2), expected, rtol=1e-6, atol=0)


def test_cosine_and_mean_squared_error_by_loop():
    student, teacher = random(2, 3, 4, 5, seed=1), random(2, 3, 4, 5, seed=2)
    places = [(b, y, x) for b in range(2) for y in range(4) for x in range(5)]
    pairs = [(student[b, :, y, x], teacher[b, :, y, x]) for b, y, x in places]
    cosine = sum(1 - (s @ t) / (s.norm() * t.norm()) for s, t in pairs) / len(pairs)
    squares = sum(((s - t) ** 2).sum() for s, t in pairs) / student.numel()
    torch.testing.assert_close(cosine_distance(student, teacher), cosine)
    torch.testing.assert_close(mean_squared_error(student, teacher), squares)


# --------------------------------------------------------------------------------------------------------------- specifics


@pytest.mark.parametrize("loss", [mean_squared_error, cosine_distance, standardised_error, attention_transfer,
                                  lambda s, t: intra_class_difference(s, t, torch.arange(64).view(1, 8, 8) % 3, 3),
                                  lambda s, t: residual_difference(s, [s, s[:, :4], s[:, 2:]], [t, t[:, :4], t[:, 2:]]),
                                  class_similarity_difference],
                         ids=["mse", "cosine", "standardised", "at", "ifvd", "psd", "csd"])  # fmt: skip
def test_nearer_to_the_teacher_loses_less(loss):
    teacher, noise = random(1, 6, 8, 8, seed=1), random(1, 6, 8, 8, seed=2)
    losses = [loss(teacher + step * noise, teacher).item() for step in (0.0, 0.3, 1.0, 3.0)]
    assert losses[0] == pytest.approx(0, abs=1e-12) and losses == sorted(losses) and losses[1] > 1e-9


@pytest.mark.parametrize("loss", [cosine_distance, standardised_error, attention_transfer])
def test_the_scale_of_features_does_not_matter(loss):
    student, teacher = random(1, 6, 8, 8, seed=1), random(1, 6, 8, 8, seed=2)
    assert loss(100 * student, teacher).item() == pytest.approx(loss(student, teacher).item(), rel=1e-4)


def test_feature_projectors():
    channels = {"student": {"c4": 6, "head": 4}, "teacher": {"c4": 10, "head": 8}}
    student, teacher = random(1, 6, 4, 4, seed=1), random(1, 10, 4, 4, seed=2)
    for projector, layers in (("linear", 1), ("mlp", 2)):
        method = reference.build("feature", **channels, projector=projector).double()
        assert [tuple(p.shape[:2]) for p in method.parameters() if p.dim() == 4] == [(10, 6), (10, 10)][:layers]
        weights = [(p[:, :, 0, 0] if p.dim() == 4 else p) for p in method.parameters()]
        x = torch.einsum("oi,bihw->bohw", weights[0], student) + weights[1].view(-1, 1, 1)
        if layers == 2:
            x = torch.einsum("oi,bihw->bohw", weights[2], x.relu()) + weights[3].view(-1, 1, 1)
        ours = method(reference.outputs({"c4": student}), reference.outputs({"c4": teacher}), None)["feature"]
        torch.testing.assert_close(ours, (x - teacher).square().mean())
    assert reference.build("feature", **channels, feature="head").projector.weight.shape == (8, 4, 1, 1)


def test_psd_with_levels_of_three_sizes():
    """SegFormer: c3 at a quarter of the resolution of the class scores."""
    sizes = {"c3": (3, 4, 4), "head": (6, 16, 16), "logits": (5, 16, 16)}
    student = {name: random(1, *size, seed=i).requires_grad_() for i, (name, size) in enumerate(sizes.items())}
    teacher = {name: random(1, size[0], 8, 8, seed=9 + i) for i, (name, size) in enumerate(sizes.items())}
    terms = reference.build("dsd", student={}, teacher={})(reference.outputs(student), reference.outputs(teacher), None)
    gradients = torch.autograd.grad(sum(terms.values()), list(student.values()))
    assert all(math.isfinite(v.item()) and v.item() > 0 for v in terms.values()) and all(g.abs().max() > 0 for g in gradients)


def test_dsd_with_auxiliary_scores_reads_them():
    method = reference.build("dsd", student={}, teacher={}, level="aux")
    assert method.needs == ("aux", "head", "logits")
    assert reference.build("dsd", student={}, teacher={}, psd_weight=0.0).needs == ("logits",)
