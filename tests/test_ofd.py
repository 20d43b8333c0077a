"""OFD: margins against an integral, the distance against a loop, features before the ReLU from the models."""

import pytest
import torch

from losses import METHODS, Setup, resolve
from losses.ofd import STAGES, expected_negative, mean_negative, partial_distance
from models import build_model
from tests import reference
from utils import session
from utils.options import train_options

WIDTHS = {"p1": 3, "p2": 4, "p3": 5, "p4": 6}


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_margin_is_the_mean_of_a_normal_below_zero():
    weight, bias = torch.tensor([1.0, -0.5, 2.0, 0.3, 0.1, 1.0]), torch.tensor([0.0, 0.7, -1.0, 1.2, -5.0, 6.0])
    for w, b, margin in zip(weight.double(), bias.double(), expected_negative(weight, bias), strict=True):
        x = torch.linspace(float(b - 12 * w.abs()), 0, 400_001, dtype=torch.float64)
        density = (-((x - b) / w).square() / 2).exp()
        assert margin.item() == pytest.approx(float(torch.trapezoid(x * density, x) / torch.trapezoid(density, x)), rel=1e-5)


def test_margin_of_extreme_channels_is_finite_and_negative_or_zero():
    margin = expected_negative(torch.tensor([0.0, 0.0, 1e-3, 1e-3]), torch.tensor([-2.0, 2.0, 40.0, -40.0]))
    torch.testing.assert_close(margin, torch.tensor([-2.0, 0.0, 0.0, -40.0]), rtol=1e-6, atol=1e-6)
    assert (margin <= 0).all()


def test_distance_against_brute_force():
    student, teacher, margin = normal(0, 2, 3, 4, 5).requires_grad_(), normal(1, 2, 3, 4, 5), -normal(2, 3).abs()
    total = 0.0
    for b in range(2):
        for c in range(3):
            for y in range(4):
                for x in range(5):
                    s, t = student[b, c, y, x], max(teacher[b, c, y, x], margin[c])
                    if s > t or t > 0:
                        total = total + (s - t) ** 2 / 2
    ours = partial_distance(student, teacher, margin)
    torch.testing.assert_close(ours, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (ours, total)), rtol=1e-12, atol=1e-14)


def test_below_the_margin_costs_nothing():
    margin, teacher = torch.tensor([-0.5]), torch.tensor([-3.0, -0.2, 1.0]).view(1, 1, 1, 3)
    student = torch.tensor([-0.6, -0.3, 0.5]).view(1, 1, 1, 3)  # below the margin; below a negative teacher; short of a positive one
    assert partial_distance(student, teacher, margin).item() == pytest.approx(0.25)
    assert partial_distance(-student, teacher, margin).item() == pytest.approx(1.1**2 + 0.5**2 + 1.5**2)


def test_stages_are_divided_by_8_4_2_1_and_projected():
    student, teacher = ({stage: normal(n, 2, WIDTHS[stage] + extra, 4, 4).float() for n, stage in enumerate(WIDTHS)} for extra in (0, 2))
    widths = [{stage: x.shape[1] for stage, x in maps.items()} for maps in (student, teacher)]
    method = reference.build("ofd", student=widths[0], teacher=widths[1])
    for n, stage in enumerate(WIDTHS):
        setattr(method, f"margin_{stage}", torch.full((widths[1][stage],), -0.1 * n))
    expected = 0.0
    for n, (stage, divider) in enumerate(zip(WIDTHS, (8, 4, 2, 1), strict=True)):
        x = torch.einsum("dc,bchw->bdhw", method.connectors[stage][0].weight[:, :, 0, 0], student[stage])
        x = (x - x.mean((0, 2, 3), True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        t = teacher[stage].clamp(min=-0.1 * n)
        expected = expected + ((x - t) ** 2 * ((x > t) | (t > 0))).sum() / 2 / divider
    torch.testing.assert_close(method(reference.outputs(student), reference.outputs(teacher), None)["ofd"], expected, rtol=1e-5, atol=0)


def test_margin_without_norms_is_the_mean_of_the_negative_values():
    x = torch.tensor([[-1.0, -3.0, 5.0], [1.0, 2.0, 0.0]]).view(1, 2, 1, 3)
    assert mean_negative(x).tolist() == [-2.0, 0.0]


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50_vanilla", "mobilenetv2"])
def test_models_offer_stages_before_their_relu(backbone):
    """relu(p) = c where a stage ends in a ReLU, with negative values in p; gradients of both; plain outputs unchanged by asking."""
    model = build_model("pspnet", backbone, 5).eval()
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    fields = [f"{kind}{n}" for n in (1, 2, 3, 4) for kind in "cp"]
    output, plain = model(image, [*fields, "logits"]), model(image)
    assert torch.equal(output.logits, plain.logits)
    ends_in_relu = backbone.startswith("resnet")
    for n in (1, 2, 3, 4):
        before, after = getattr(output, f"p{n}"), getattr(output, f"c{n}")
        assert torch.equal(before.relu() if ends_in_relu else before, after) and before.min() < 0
    output.p2.square().sum().backward()
    stage = model.backbone.layer2[-1].bn2 if ends_in_relu else model.backbone.features[6]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in stage.parameters())
    hooked = [name for name, module in model.named_modules() if module._forward_pre_hooks]
    assert not hooked, f"hooks left on {hooked}"


def test_margins_come_from_the_teachers_last_batchnorms():
    teacher = build_model("pspnet", "resnet50", 5)
    for n, layer in enumerate((teacher.backbone.layer1, teacher.backbone.layer2, teacher.backbone.layer3, teacher.backbone.layer4)):
        torch.nn.init.constant_(layer[-1].bn3.weight, 0.5)
        torch.nn.init.constant_(layer[-1].bn3.bias, 0.1 * n)
    setup = Setup(WIDTHS, teacher.channels, 5, (64, 64), 2, teacher_norms=teacher.norms)
    method = METHODS["ofd"](resolve(METHODS["ofd"], "shapes", {})[0], setup)
    for n, stage in enumerate(WIDTHS):
        margin = getattr(method, f"margin_{stage}")
        expected = expected_negative(torch.tensor([0.5]), torch.tensor([0.1 * n]))
        assert margin.shape == (teacher.channels[stage],) and torch.equal(margin, expected.expand_as(margin))
    assert not any("margin" in key for key in method.state_dict())
    assert build_model("pspnet", "mobilenetv2", 5).norms == {}


def test_training_hands_the_teachers_norms_over(monkeypatch):
    setups = []
    monkeypatch.setattr(session, "build_methods", lambda options, setup: setups.append(setup) or {})
    arguments = "--method ofd --dataset shapes --teacher-model pspnet --teacher-backbone resnet18 --student-backbone mobilenetv2 --dry-run"
    session.train(train_options(arguments.split(), distil=True, description=""), torch.device("cpu"))
    assert [tuple(weight.shape) for weight, _ in setups[0].teacher_norms.values()] == [(64,), (128,), (256,), (512,)]


def test_closer_to_the_teacher_loses_less():
    teacher, noise = normal(3, 2, 4, 6, 6), normal(4, 2, 4, 6, 6)
    losses = [partial_distance(teacher + step * noise, teacher, torch.full((4,), -0.8)).item() for step in (0.0, 0.5, 1.0, 2.0)]
    assert losses == sorted(losses) and list(STAGES) == list(WIDTHS)
