"""cwd, hwd, dist, dkd, icsd, aicsd, ickd, bpkd: the published values, the loops they stand for, and what each is easily got wrong in."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from losses import bpkd, cwd, dist, dkd, hwd, ickd, icsd
from losses.functional import channel_kl, pixel_kl
from scripts.watch import Watch
from tests import reference

CHANNELS = {"logits": 5, "aux": 5, "head": 6, "c4": 6, "c3": 4}


def double(*shape, seed=0, requires_grad=False):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_(requires_grad)


def assert_same(ours, theirs, *tensors, rtol=1e-9):
    """Equal values and equal gradients."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-13)
    for ours_gradient, theirs_gradient in zip(*(torch.autograd.grad(loss, tensors, retain_graph=True) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(ours_gradient, theirs_gradient, rtol=100 * rtol, atol=rtol * theirs_gradient.norm().item())


def released(prefix, *, method, term, factor=1.0, student="logits", **options):
    """Every reference entry of a name, with the term times `factor` as the published value."""
    for name in (f"a/{prefix}", f"b/{prefix}"):
        spec, terms = reference.LOSSES[name]["spec"], reference.LOSSES[name]["terms"]
        given = reference.inputs(spec)
        setup = {"logits": spec["num_classes"], "aux": spec["num_classes"]}
        built = reference.build(
            method, student={**setup, "head": spec["student_channels"]}, teacher={**setup, "head": spec["teacher_channels"]},
            num_classes=spec["num_classes"], **options,
        )  # fmt: skip
        reference.fill(built)
        tensors = {"logits": given.student_logits, "head": given.student_feature}
        ours = built(
            reference.outputs({field: tensors[field] for field in built.needs}),
            reference.outputs({"logits": given.teacher_logits, "head": given.teacher_feature}), reference.batch_of(given.target),
        )  # fmt: skip
        assert ours.keys() == {term}
        (expected,) = terms.values()
        scale = factor(spec) if callable(factor) else factor
        leaves = [tensors[student], *built.parameters()]
        if len(expected["grad_norms"]) > len(leaves):  # some entries have a feature that gets no gradient before the logits
            assert expected["grad_norms"][0] is None
            leaves.insert(0, None)
        reference.check(scale * ours[term], expected, leaves)


def test_released_values_of_cwd():
    released("cwd_logit", method="cwd", term="logits")
    released("cwd_feature", method="cwd", term="head", student="head", logits_weight=0.0, head_weight=50.0)


def test_released_values_of_dist():
    released("dist", method="dist", term="logits", aux_weight=0.0)


@pytest.mark.parametrize("method", ["icsd", "aicsd"])
def test_released_values_of_the_aicsd_line(method):
    released("aicsd_ics", method=method, term="ics", form="released", kd_weight=0.0)
    released("aicsd_pixelwise", method=method, term="kd", ics_weight=0.0, factor=lambda spec: 1 / spec["num_classes"])


def test_released_values_of_ickd():
    released("aicsd_ickd_interchannel", method="ickd", term="logits")


# --- the loops -------------------------------------------------------------------------------------------------------------


def kl(p, q):
    return (p * (p / q).log()).sum()


def test_channel_wise_loop():
    student, teacher = double(2, 3, 4, 5, seed=1, requires_grad=True), double(2, 3, 4, 5, seed=2)
    total = sum(kl((teacher[b, c] / 2).flatten().softmax(0), (student[b, c] / 2).flatten().softmax(0)) for b, c in product(range(2), range(3)))
    assert_same(cwd.channel_wise(student, teacher, 2.0), 4 * total / 6, student)


def test_channel_kl_survives_probabilities_that_underflow():
    student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([[[[300.0, 0.0]]]])
    assert channel_kl(student, teacher).item() == pytest.approx(math.log(2))
    assert channel_kl(teacher, student).item() == pytest.approx(150 - math.log(2))


def test_divisor_of_cwd_on_features():
    """Released: the sum over the teacher's 6 channels is divided by the student's 3; alike, without a projection, at equal widths."""
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4)
    values = {}
    for divisor in ("student", "teacher"):
        method = reference.build("cwd", student={"head": 3}, teacher={"head": 6}, logits_weight=0.0, head_weight=1.0, head_divisor=divisor)
        reference.fill(method)
        values[divisor] = method(reference.outputs({"head": student}), reference.outputs({"head": teacher}), None)["head"].item()
    assert values["student"] == pytest.approx(2 * values["teacher"])
    assert not list(reference.build("cwd", student=CHANNELS, teacher=CHANNELS, head_weight=50.0).parameters())
    assert not list(reference.build("cwd", student={"head": 3}, teacher={"head": 6}).parameters())


def test_dist_loop():
    student, teacher = double(2, 3, 4, 5, seed=1, requires_grad=True), double(2, 3, 4, 5, seed=2)
    p, q = student.softmax(1), teacher.softmax(1)

    def rho(a, b):
        return torch.corrcoef(torch.stack([a, b]))[0, 1]

    inter = sum(rho(p[b, :, y, x], q[b, :, y, x]) for b, y, x in product(range(2), range(4), range(5))) / 40
    intra = sum(rho(p[:, k].flatten(), q[:, k].flatten()) for k in range(3)) / 3
    # 1e-8 beside norms near 1 is all that differs
    assert_same(dist.correlation_loss(student, teacher, 2.0, 3.0), 2 * (1 - inter) + 3 * (1 - intra), student, rtol=1e-6)


def test_dist_without_auxiliary_heads():
    without = {"logits": 5}
    for student, teacher, who in ((without, CHANNELS, "student"), (CHANNELS, without, "teacher"), (without, without, "student and teacher")):
        method = reference.build("dist", student=student, teacher=teacher)
        assert method.weights == {"logits": 1.0} and method.needs == ("logits",)
        assert method.left_out == {"aux": f"{who} without auxiliary head"}
    with pytest.raises(ValueError, match="student without auxiliary head, so no term is left; give --dist-logits-weight"):
        reference.build("dist", student=without, teacher=CHANNELS, logits_weight=0.0)
    method = reference.build("dist", student=CHANNELS, teacher=CHANNELS)
    assert method.weights == {"logits": 1.0, "aux": 0.4}
    given = [torch.randn(1, 5, 4, 4) for _ in range(4)]
    terms = method(*(reference.outputs(dict(zip(("logits", "aux"), given[i : i + 2], strict=True))) for i in (0, 2)), None)
    assert terms["aux"].item() == dist.correlation_loss(given[1], given[3]).item()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_loop(temperature):
    student, teacher = double(2, 4, 3, 5, seed=1, requires_grad=True), double(2, 4, 3, 5, seed=2)
    target = torch.randint(0, 4, (2, 3, 5), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    target[0, 1] = 255
    two, rest, plain, pixels = 0, 0, 0, 0
    for b, y, x in product(range(2), range(3), range(5)):
        if (label := target[b, y, x].item()) == 255:
            continue
        p, q = (teacher[b, :, y, x] / temperature).softmax(0), (student[b, :, y, x] / temperature).softmax(0)
        others = [k for k in range(4) if k != label]
        pixel_two = kl(torch.stack([p[label], 1 - p[label]]), torch.stack([q[label], 1 - q[label]]))
        pixel_rest = kl(p[others] / p[others].sum(), q[others] / q[others].sum())
        two, rest, pixels = two + pixel_two, rest + pixel_rest, pixels + 1
        plain += pixel_two + (1 - p[label]) * pixel_rest
    ours = dkd.decoupled(student, teacher, target, temperature)
    for value, expected in zip(ours, (two, rest), strict=True):
        assert_same(value, temperature**2 * expected / pixels, student)
    torch.testing.assert_close(plain * temperature**2 / pixels, pixel_kl(student, teacher, temperature, target != 255))


def test_dkd_of_a_teacher_that_is_sure():
    """At float32 p[label] = 1: from 1 - p, the share of the rest would be 0 and its logarithm -inf."""
    teacher = torch.tensor([60.0, 1.0, 0.0]).view(1, 3, 1, 1)
    student = torch.tensor([50.0, 0.0, 1.0]).view(1, 3, 1, 1).requires_grad_()
    terms = dkd.decoupled(student, teacher, torch.zeros(1, 1, 1, dtype=torch.uint8))
    expected = [term.item() for term in dkd.decoupled(student.double(), teacher.double(), torch.zeros(1, 1, 1, dtype=torch.uint8))]
    assert [term.item() for term in terms] == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert terms[1].item() == pytest.approx((math.e - 1) / (math.e + 1), rel=1e-5)  # of (e, 1) / (e + 1) against (1, e) / (e + 1)
    assert all(torch.autograd.grad(sum(terms), student)[0].isfinite().flatten())


def test_ics_loop():
    student, teacher = double(2, 3, 4, 5, seed=1, requires_grad=True), double(2, 3, 4, 5, seed=2)

    def matrix(logits, b):
        p = logits[b].flatten(1).softmax(1)
        return torch.stack([kl(p[k], p[m]) for k, m in product(range(3), range(3))])

    loop = sum((matrix(student, b) - matrix(teacher, b)).square().sum() for b in range(2)) / 18
    assert_same(icsd.divergence_loss(student, teacher), loop, student)


def test_released_ics_loop():
    """Entry by entry as described: the softmax over the height alone, the pair (k, l) with k <= l filling (l, k) too."""
    student, teacher = double(2, 3, 4, 5, seed=1, requires_grad=True), double(2, 3, 4, 5, seed=2)

    def matrix(logits):
        p = logits.softmax(2)
        entry = {(k, m): (p[:, m] * (p[:, m].log() - p[:, k])).sum() / 2 for k in range(3) for m in range(k, 3)}
        rows = torch.stack([entry[min(k, m), max(k, m)] for k, m in product(range(3), range(3))]).view(3, 3)
        return rows / rows.norm(dim=1, keepdim=True)

    assert_same(icsd.released_loss(student, teacher), (matrix(student) - matrix(teacher)).square().mean() / 2, student)


@pytest.mark.parametrize("loss", [icsd.divergence_loss, icsd.released_loss])
def test_ics_keeps_its_digits_at_full_size(loss):
    """262144 positions, a student near its teacher: float32 is within 2e-4 of float64 in value (1.1e-4 on CPUs
    with AVX2, whose sums have fewer lanes) and 1e-3 in gradient."""
    generator = torch.Generator().manual_seed(1)
    teacher = F.interpolate(4 * torch.randn(1, 3, 16, 16, generator=generator), size=(512, 512), mode="bilinear")
    student = (teacher + 0.3 * F.interpolate(torch.randn(1, 3, 16, 16, generator=generator), size=(512, 512), mode="bilinear")).requires_grad_()
    values, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        values.append(loss(student.to(dtype), teacher.to(dtype)))
        gradients.append(torch.autograd.grad(values[-1], student)[0])
    assert values[0].item() == pytest.approx(values[1].item(), rel=2e-4)
    assert ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item() < 1e-3


@pytest.mark.parametrize("loss", [icsd.divergence_loss, icsd.released_loss])
def test_ics_at_another_size(loss):
    student, teacher = double(2, 3, 4, 5, seed=1, requires_grad=True), double(2, 3, 4, 5, seed=2)
    large = (F.interpolate(x, size=(9, 13), mode="bilinear", align_corners=True) for x in (student, teacher))
    assert_same(loss(student, teacher, (9, 13)), loss(*large), student)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_released_ics_is_three_maps_and_sixty_operations(layout):
    student, teacher = (torch.randn(2, 5, 8, 8).to(memory_format=layout) for _ in range(2))
    student.requires_grad_()
    with Watch() as watch:
        torch.autograd.grad(icsd.released_loss(student, teacher, (128, 128)), student)
    assert 3 <= watch.peak / (4 * 2 * 5 * 128 * 128) < 3.1 and watch.operations <= 60


def test_the_gradient_of_released_ics_is_in_float32_under_autocast():
    student, teacher = torch.randn(2, 5, 8, 8, requires_grad=True), torch.randn(2, 5, 8, 8)
    (expected,) = torch.autograd.grad(icsd.released_loss(student, teacher), student)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(icsd.released_loss(student, teacher), student)
    assert torch.equal(found, expected)


def test_upsampled_comparison():
    """`upsample` equals giving logits of the labels' size."""
    student, teacher = torch.randn(1, 5, 6, 6), torch.randn(1, 5, 6, 6)
    batch = reference.batch_of(torch.zeros(1, 48, 48, dtype=torch.uint8))
    large = [F.interpolate(x, size=(48, 48), mode="bilinear", align_corners=True) for x in (student, teacher)]
    values = []
    for pair, upsample in (((student, teacher), True), (large, False), ((student, teacher), False)):
        method = reference.build("icsd", student=CHANNELS, teacher=CHANNELS, upsample=upsample)
        values.append([term.item() for term in method(*(reference.outputs({"logits": x}) for x in pair), batch).values()])
    assert values[0] == pytest.approx(values[1], rel=1e-5) and values[0] != pytest.approx(values[2], rel=1e-2)


def test_adaptive_loss_weighting():
    """total = alpha * (task + w_ics * ics) + (1 - alpha) * w_kd * kd, through the module that is trained."""
    from losses.task import TaskLoss
    from utils.distill import Distiller

    built = reference.build("aicsd", student=CHANNELS, teacher=CHANNELS, dataset="voc")
    distiller = Distiller(nn.Identity(), TaskLoss(0.4), {"aicsd": built})
    for alpha in (0.0, 0.25, 1.0):
        scale = distiller.term_factors(alpha)
        assert scale == pytest.approx({
            "task/ce": alpha, "task/aux": 0.4 * alpha, "aicsd/ics": alpha * built.weights["ics"], "aicsd/kd": (1 - alpha) * 10 / 21,
        }, rel=1e-3)  # fmt: skip
    plain = reference.build("icsd", student=CHANNELS, teacher=CHANNELS, dataset="voc")
    assert plain.factors(0.25) == {} and plain.weights == built.weights
    assert reference.build("aicsd", student=CHANNELS, teacher=CHANNELS, form="released").weights["ics"] == 9500


def test_ickd_loop_and_embedding():
    student, teacher = double(2, 3, 4, 5, seed=1, requires_grad=True), double(2, 3, 4, 5, seed=2)

    def matrix(x, b):
        rows = torch.stack([(x[b, k] * x[b, m]).sum() for k, m in product(range(3), range(3))]).view(3, 3)
        return rows / rows.norm(dim=1, keepdim=True)

    loop = sum((matrix(student, b) - matrix(teacher, b)).square().sum() for b in range(2)) / 6
    assert_same(ickd.correlation_distance(student, teacher), loop, student)

    method = reference.build("ickd", student={"c4": 3}, teacher={"c4": 7}, logits_weight=0.0, feature_weight=2.0)
    assert [tuple(p.shape) for p in method.parameters()] == [(7, 3, 1, 1), (7,), (7,)] and method.needs == ("c4",)
    x, t = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 4, 5)
    ours = method(reference.outputs({"c4": x}), reference.outputs({"c4": t}), None)["feature"]
    embedded = F.batch_norm(F.conv2d(x, method.embed[0].weight), None, None, training=True)
    assert ours.item() == pytest.approx(ickd.correlation_distance(embedded, t).item(), rel=1e-5)


def test_hwd_weights():
    """By hand for three classes; equal distances weigh 1; base 1 is CWD; the weights carry no gradient."""
    distances = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]], dtype=torch.float64)
    spread = math.sqrt((4 + 1 + 9) / 3)
    squashed = [1 / (1 + 0.1 ** (centred / spread)) for centred in (-2, -1, 3)]
    total = sum(map(math.exp, squashed))
    weights = hwd.class_weights(distances, 0.1)
    assert weights[0].tolist() == pytest.approx([3 * math.exp(s) / total for s in squashed], rel=1e-5)
    assert weights[1].tolist() == pytest.approx([1, 1, 1])

    student, teacher = torch.randn(2, 5, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4)

    def value(name, **options):
        method = reference.build(name, student=CHANNELS, teacher=CHANNELS, **options)
        (term,) = method(reference.outputs({"logits": student}), reference.outputs({"logits": teacher}), None).values()
        return term

    torch.testing.assert_close(value("hwd", base=1.0), value("cwd"))
    d = channel_kl(student, teacher, 4.0)
    fixed = torch.autograd.grad((hwd.class_weights(d).detach() * d).mean(), student)[0]
    torch.testing.assert_close(torch.autograd.grad(value("hwd"), student)[0], fixed)
    assert value("hwd") > value("cwd")  # it dwells on the largest
    with pytest.raises(ValueError, match="--hwd-base 2.0"):
        value("hwd", base=2.0)


@pytest.mark.parametrize("size", [(27, 33), (9, 11), (7, 5)])
def test_edges_loop(size):
    """Dilation minus erosion of every class over the whole label, then the nearest pixel of each position, as labels_like takes it."""
    target = torch.randint(0, 3, (2, 9, 11), generator=torch.Generator().manual_seed(2)).repeat_interleave(3, 1).repeat_interleave(3, 2)
    target = target.to(torch.uint8)
    target[0, :5, :5] = 255
    loop = torch.zeros(2, 4, 27, 33)
    for b, y, x in product(range(2), range(27), range(33)):
        window = target[b, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        for k in range(4):
            loop[b, k, y, x] = float(bool((window == k).any()) and not bool((window == k).all()))
    ours = bpkd.edges(target, torch.zeros(2, 4, *size), 3)
    assert torch.equal(ours.float(), F.interpolate(loop, size=size, mode="nearest")) and 0.1 < ours.float().mean() < 0.6


def test_bpkd_loop():
    student, teacher = double(2, 3, 4, 5, seed=1, requires_grad=True), double(2, 3, 4, 5, seed=2)
    target = torch.ones(2, 4, 5, dtype=torch.uint8)
    target[0, :, :2], target[1, 0, 0] = 0, 255
    method = reference.build("bpkd", student=CHANNELS, teacher=CHANNELS, kernel=3, temperature=2.0)
    batch = reference.batch_of(target)
    ours = method(reference.outputs({"logits": student}), reference.outputs({"logits": teacher}), batch)

    edge = bpkd.edges(target, student, 3).double()
    assert edge[0, 0].sum() == edge[0, 1].sum() == 8 and edge[0, 2].sum() == 0 and edge[1].sum() == 4
    body, on_edge = 0, 0
    for b, k in product(range(2), range(3)):
        p, q = ((x[b, k] * (1 - edge[b, k]) / 2).flatten().softmax(0) for x in (teacher, student))
        body += kl(p, q)
        pixels = [(y, x) for y, x in product(range(4), range(5)) if edge[b, k, y, x]]
        for y, x in pixels:
            p, q = ((z[b, :, y, x] * edge[b, :, y, x] / 2).softmax(0) for z in (teacher, student))
            on_edge += kl(p, q) / len(pixels)
    assert_same(ours["body"], 4 * body / 6, student)
    assert_same(ours["edge"], 4 * on_edge / 6, student)
    with pytest.raises(ValueError, match="--bpkd-kernel 4: must be odd"):
        reference.build("bpkd", student=CHANNELS, teacher=CHANNELS, kernel=4)


def test_bpkd_without_an_edge_is_cwd():
    """One class in the whole picture, whose border is none."""
    student, teacher = torch.randn(1, 5, 6, 6, requires_grad=True), torch.randn(1, 5, 6, 6)
    method = reference.build("bpkd", student=CHANNELS, teacher=CHANNELS)
    terms = method(
        reference.outputs({"logits": student}), reference.outputs({"logits": teacher}), reference.batch_of(torch.ones(1, 48, 48, dtype=torch.uint8))
    )
    assert terms["edge"].item() == 0 and torch.autograd.grad(terms["edge"], student)[0].abs().max() == 0
    torch.testing.assert_close(terms["body"], channel_kl(student, teacher).mean())


# --- every term ------------------------------------------------------------------------------------------------------------

CASES = [
    ("cwd", {}), ("cwd", {"logits_weight": 0.0, "head_weight": 1.0}), ("hwd", {}), ("dist", {}), ("dkd", {}), ("icsd", {}),
    ("icsd", {"form": "released"}), ("aicsd", {}), ("ickd", {}), ("bpkd", {}),
]  # fmt: skip


@pytest.mark.parametrize("name,options", CASES)
def test_zero_at_the_teacher_and_smaller_nearer_to_it(name, options):
    method = reference.build(name, student=CHANNELS, teacher=CHANNELS, **options)
    teacher = {need: double(2, CHANNELS[need], 8, 8, seed=1) for need in method.needs}
    step = {need: double(2, CHANNELS[need], 8, 8, seed=2) for need in method.needs}
    target = torch.randint(0, 5, (2, 4, 4), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    batch = reference.batch_of(target.repeat_interleave(16, 1).repeat_interleave(16, 2))
    found = []
    for size in (0.0, 0.1, 0.3, 0.6):
        student = reference.outputs({need: teacher[need] + size * step[need] for need in method.needs})
        found.append(method(student, reference.outputs(teacher), batch))
    for term in method.weights:
        losses = [terms[term].item() for terms in found]
        assert losses[0] == pytest.approx(0, abs=1e-6) and losses == sorted(losses) and losses[1] > 10 * abs(losses[0]), term


@pytest.mark.parametrize("name,options", [*CASES, ("ickd", {"logits_weight": 0.0, "feature_weight": 1.0})])
def test_teacher_of_another_stride_is_resized_to_the_student(name, options):
    wide = {**CHANNELS, "head": 8, "c4": 8}
    method = reference.build(name, student=CHANNELS, teacher=wide, **options)
    student = {need: torch.randn(2, CHANNELS[need], 8, 8, requires_grad=True) for need in method.needs}
    teacher = {need: torch.randn(2, wide[need], 16, 16) for need in method.needs}
    small = {need: F.interpolate(x, size=(8, 8), mode="bilinear", align_corners=False) for need, x in teacher.items()}
    batch = reference.batch_of(torch.randint(0, 5, (2, 64, 64)).to(torch.uint8))
    terms, same = (method(reference.outputs(student), reference.outputs(t), batch) for t in (teacher, small))
    assert {term: value.item() for term, value in terms.items()} == pytest.approx({term: value.item() for term, value in same.items()})
