"""APD: every term against loops over pixels and classes, absent classes, who trains what."""

import pytest
import torch

from losses.apd import centroid_distance, class_centroids, similarities
from losses.functional import pixel_kl
from tests import reference

CLASSES = 5


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels():
    """Class 3 is absent, a tenth is ignored."""
    y = torch.randint(0, 4, (2, 4, 5), generator=torch.Generator().manual_seed(9))
    y[y == 3] = 4
    y[0, 0, :2] = 255
    return y.to(torch.uint8)


def brute_force(student, teacher, y, scale):
    """{"similarity", "centroid", "adaptor"} from adapted features, one pixel at a time."""
    pixels = [(b, v, u) for b in range(2) for v in range(4) for u in range(5)]
    present = sorted({int(y[p]) for p in pixels} - {255})
    means = []
    for features in (student, teacher):
        members = {k: [features[b, :, v, u] for b, v, u in pixels if y[b, v, u] == k] for k in present}
        means.append([sum(members[k]) / len(members[k]) for k in present])

    def cosine(a, b):
        return (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()

    similarity, entropy, labelled = 0.0, 0.0, 0
    for b, v, u in pixels:
        networks = zip((student, teacher), means, strict=True)
        exponents = [torch.stack([scale * cosine(features[b, :, v, u], m) for m in mean]) for features, mean in networks]
        p_student, p_teacher = (e.exp() / e.exp().sum() for e in exponents)
        similarity = similarity + (p_teacher * (p_teacher / p_student).log()).sum() / len(pixels)
        if y[b, v, u] != 255:
            entropy, labelled = entropy - p_teacher[present.index(int(y[b, v, u]))].log(), labelled + 1
    centroid = sum(0.5 * (1 - cosine(a, b)) for a, b in zip(*means, strict=True)) / len(present)
    return {"similarity": similarity, "centroid": centroid, "adaptor": entropy / labelled}


def test_terms_against_brute_force():
    torch.manual_seed(0)
    method = reference.build("apd", student={"head": 6}, teacher={"head": 8}, kd_weight=0.0, scale=4.0).double()
    student, teacher, y = normal(0, 2, 6, 4, 5).requires_grad_(), normal(1, 2, 8, 4, 5), labels()
    ours = method(reference.outputs({"head": student}), reference.outputs({"head": teacher}), reference.batch_of(y))
    theirs = brute_force(method.student_adaptor(student), method.teacher_adaptor(teacher), y, 4.0)
    assert ours.keys() == theirs.keys()
    for term, value in theirs.items():
        torch.testing.assert_close(ours[term], value, rtol=1e-9, atol=0)
    for term in ("similarity", "centroid"):
        gradients = [torch.autograd.grad(loss[term], student, retain_graph=True)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)


def test_who_trains_what():
    """The teacher's adaptor learns from `adaptor` alone, and with its own optimizer; the student from the other terms alone."""
    method = reference.build("apd", student={"head": 6}, teacher={"head": 8}, kd_weight=0.0).double()
    student, y = normal(0, 2, 6, 4, 5).requires_grad_(), labels()
    terms = method(reference.outputs({"head": student}), reference.outputs({"head": normal(1, 2, 8, 4, 5)}), reference.batch_of(y))
    for term, value in terms.items():
        value.backward(retain_graph=True)
        touched = {name.split(".")[0] for name, p in method.named_parameters() if p.grad is not None}
        assert touched == ({"teacher_adaptor"} if term == "adaptor" else {"student_adaptor"}), term
        assert (student.grad is not None) == (term != "adaptor")
        method.zero_grad()
        student.grad = None
    optimizer = method.own_optimizer()
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["lr"] == 1e-5
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in method.teacher_adaptor.parameters()}


def test_without_the_adaptor_the_teacher_is_used_as_it_is():
    method = reference.build("apd", student={"head": 6}, teacher={"head": 8}, kd_weight=0.0, adaptor_weight=0.0).double()
    student, teacher, y = normal(0, 2, 6, 4, 5), normal(1, 2, 8, 4, 5), labels()
    ours = method(reference.outputs({"head": student}), reference.outputs({"head": teacher}), reference.batch_of(y))
    assert method.own_optimizer() is None
    torch.testing.assert_close(ours["similarity"], brute_force(method.student_adaptor(student), teacher, y, 10.0)["similarity"])


def test_kd_weight_is_the_published_one_over_the_classes():
    classes = {"shapes": 8, "camvid": 11, "citys": 19, "voc": 21, "ade20k": 150, "coco_stuff_164k": 171, "coco_stuff_182": 182}
    for dataset, count in classes.items():
        weights = reference.build("apd", student={"head": 6}, teacher={"head": 8}, dataset=dataset).weights
        assert weights["kd"] == pytest.approx(10 / count, rel=0.01), dataset
        assert (weights["similarity"], weights["centroid"]) == (10, 10)


def test_no_label_at_all():
    x, y = normal(0, 1, 6, 4, 5).requires_grad_(), torch.full((1, 4, 5), 255)
    centroids, present = class_centroids(x, y, CLASSES)
    value = pixel_kl(similarities(x, centroids, present, 10.0), similarities(x.detach() + 1, centroids.detach(), present, 10.0))
    value = value + centroid_distance(centroids, centroids.detach(), present)
    value.backward()
    assert not present.any() and value.item() == 0 and x.grad.abs().max() == 0


def test_closer_to_the_teacher_loses_less():
    teacher, noise, y = normal(2, 2, 6, 4, 5), normal(3, 2, 6, 4, 5), labels()
    centres, present = class_centroids(teacher, y, CLASSES)
    target, losses = similarities(teacher, centres, present, 10.0), []
    for step in (0.0, 0.3, 1.0, 2.0):
        own, _ = class_centroids(teacher + step * noise, y, CLASSES)
        similarity = similarities(teacher + step * noise, own, present, 10.0)
        losses.append((pixel_kl(similarity, target), centroid_distance(own, centres, present)))
    for values in zip(*losses, strict=True):
        assert list(values) == sorted(values) and values[0].item() == pytest.approx(0, abs=1e-12)
