"""SKD: the published values of its pair-wise term, in both forms, and of the hinge losses; the critic."""

import copy

import pytest
import torch
from torch import nn

from losses import skd
from losses.adversarial import Adversary, Critic, SelfAttention, generator_loss, gradient_penalty, hinge_loss, wasserstein_loss
from losses.skd import pairwise, similarity_difference, similarity_difference_by_channels
from losses.task import TaskLoss
from tests import reference
from utils.distill import Distiller
from utils.optim import build_optimizers


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------------- pair-wise


@pytest.mark.parametrize("name", [*reference.names("skd_pairwise"), *reference.names("aicsd_pairwise")])
def test_pairwise_released_values(name):
    """AICSD's codebase runs the original form."""
    expected = next(iter(reference.LOSSES[name]["terms"].values()))
    given = reference.inputs(reference.LOSSES[name]["spec"])
    form = "original" if "aicsd" in name else "cirkd"
    method = reference.build("skd", student={}, teacher={}, kd_weight=0.0, adversarial_weight=0.0, critic_weight=0.0, form=form)
    assert method.weights == {"pairwise": 0.5 if form == "original" else 10.0} and method.needs == ("head",)
    ours = method(reference.outputs({"head": given.student_feature}), reference.outputs({"head": given.teacher_feature}), None)["pairwise"]
    reference.check(ours, expected, [given.student_feature, None][: len(expected["grad_norms"])])


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_both_ways_to_compare_positions_agree(offset):
    student, teacher = (random(2, 5, 12, seed=1) + offset).requires_grad_(), random(2, 7, 12, seed=2) + offset
    values = [way(student, teacher) for way in (similarity_difference, similarity_difference_by_channels)]
    torch.testing.assert_close(*values, rtol=1e-10, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in values), rtol=1e-9, atol=1e-12)


def test_channels_keep_their_digits_near_the_teacher():
    """Features after a ReLU, the loss near 0: the plain identity has 2 digits left in float32."""
    teacher = nn.functional.normalize(random(1, 64, 400, seed=1).abs(), dim=1)
    student = nn.functional.normalize(teacher + 1e-3 * random(1, 64, 400, seed=2).abs(), dim=1)
    exact = similarity_difference(student, teacher).item()
    assert similarity_difference_by_channels(student.float(), teacher.float()).item() == pytest.approx(exact, rel=5e-4)


@pytest.mark.parametrize("channels,side,way", [((4, 8), 16, "similarity_difference_by_channels"), ((32, 64), 8, "similarity_difference")])
def test_the_cheaper_way_is_taken(monkeypatch, channels, side, way):
    monkeypatch.setattr(skd, way, lambda student, teacher: way)
    assert pairwise(random(1, channels[0], side, side), random(1, channels[1], side, side)) == way


@pytest.mark.parametrize("form", ["cirkd", "original"])
def test_nearer_to_the_teacher_loses_less(form):
    teacher, noise = random(1, 6, 9, 9, seed=1), random(1, 6, 9, 9, seed=2)
    losses = [pairwise(teacher + step * noise, teacher, form).item() for step in (0.0, 0.3, 1.0, 3.0)]
    assert losses[0] == pytest.approx(0, abs=1e-12) and losses == sorted(losses) and losses[1] > 1e-6


# ------------------------------------------------------------------------------------------------------------- adversarial


@pytest.mark.parametrize("name", reference.names("skd_holistic"))
def test_hinge_released_values(name):
    terms = reference.LOSSES[name]["terms"]
    given = reference.inputs(reference.LOSSES[name]["spec"])
    reference.check(generator_loss(given.student_score), terms["generator"], [given.student_score])
    reference.check(hinge_loss(given.student_score, given.teacher_score), terms["discriminator"], [given.student_score])


def prepared(critic):
    """A critic in float64 whose attention does something."""
    for name, parameter in critic.named_parameters():
        if name.endswith("gamma"):
            parameter.data += 0.7
    return critic.double()


@pytest.mark.parametrize("objective", ["hinge", "wgan-gp"])
def test_one_backward_trains_both(objective):
    """Gradients of the weighted sum equal those of the published two passes: the student's alone, then the critic's alone."""
    torch.manual_seed(0)
    adversary = Adversary(5, ("adversarial", "critic"), objective, penalty=10.0)
    prepared(adversary.critic)
    critic = copy.deepcopy(adversary.critic)
    student, teacher, mix = random(2, 5, 16, 16, seed=1).requires_grad_(), random(2, 5, 16, 16, seed=2), torch.tensor([0.2, 0.7]).view(2, 1, 1, 1)
    terms = adversary(student, teacher, mix)
    (0.001 * terms["adversarial"] + 0.1 * terms["critic"]).backward()

    expected = torch.autograd.grad(-0.001 * critic(student).mean(), student)[0]
    torch.testing.assert_close(student.grad, expected, rtol=1e-9, atol=1e-16)
    assert expected.abs().max() > 0
    real, fake = critic(teacher), critic(student.detach())
    if objective == "hinge":
        loss = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    else:
        points = (mix * teacher + (1 - mix) * student).detach().requires_grad_()
        slope = torch.autograd.grad(critic(points).sum(), points, create_graph=True)[0]
        loss = fake.mean() - real.mean() + 10 * (slope.square().sum((1, 2, 3)).sqrt() - 1).square().mean()
    (0.1 * loss).backward()
    for (name, ours), theirs in zip(adversary.critic.named_parameters(), critic.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-15, msg=name)
    torch.testing.assert_close(terms["critic"], loss)


@pytest.mark.parametrize("size", [(45, 45), (13, 17), (8, 8), (1, 3), (64, 128)])
def test_critic_takes_any_size(size):
    critic = Critic(5)
    logits = torch.randn(2, 5, *size, requires_grad=True)
    scores = critic(logits)
    assert scores.shape == (2, 1, *((1, 5) if size == (64, 128) else (1, 1)))  # four halvings, then a 4x4 kernel without padding
    (gradient,) = torch.autograd.grad(scores.square().sum(), logits)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_padding_changes_nothing_where_the_released_critic_works():
    critic = prepared(Critic(5)).eval()  # no power iteration between the two passes
    logits = random(1, 5, 64, 80, seed=1)
    x = nn.functional.batch_norm(logits, None, None, critic.normalise.weight, critic.normalise.bias, True)
    for layer, attention in zip(critic.convolutions, critic.attentions, strict=True):
        x = attention(nn.functional.leaky_relu(nn.functional.conv2d(x, layer.weight, layer.bias, 2, 1), 0.1))
    torch.testing.assert_close(critic(logits), nn.functional.conv2d(x, critic.last.weight, critic.last.bias))


def test_convolutions_have_spectral_norm():
    critic = Critic(5)
    for _ in range(30):
        critic(torch.randn(2, 5, 16, 16))
    for layer in critic.convolutions:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, rel=0.02)


def test_self_attention_by_loop():
    layer = SelfAttention(16).double()
    x = random(1, 16, 2, 3, seed=1)
    assert torch.equal(layer(x), x)  # gamma is 0
    layer.gamma.data.fill_(0.5)
    query, key, value = (f(x).flatten(2)[0] for f in (layer.query, layer.key, layer.value))
    expected = x.clone().flatten(2)
    for i in range(6):
        attention = torch.stack([query[:, i] @ key[:, j] for j in range(6)]).softmax(0)
        expected[0, :, i] += 0.5 * sum(attention[j] * value[:, j] for j in range(6))
    torch.testing.assert_close(layer(x), expected.view_as(x))


def test_wasserstein_with_gradient_penalty():
    """A linear critic has the same slope everywhere."""
    student, teacher, weight = random(2, 1, 3, 5, seed=1), random(2, 1, 3, 5, seed=2), random(4, 3, 3, seed=3)
    assert wasserstein_loss(student, teacher) == student.mean() - teacher.mean()
    penalty = gradient_penalty(lambda x: (x * weight).sum((1, 2, 3)), random(2, 4, 3, 3, seed=4))
    torch.testing.assert_close(penalty, (weight.norm() - 1) ** 2)


def test_the_critic_has_an_optimizer_of_its_own():
    method = reference.build("skd", student={"logits": 5}, teacher={"logits": 5})
    distiller = Distiller(nn.Conv2d(3, 5, 1), TaskLoss(0.0), {"skd": method})
    options = type("Options", (), {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "head_lr_factor": 1.0})
    optimizers = build_optimizers(distiller, options)
    (group,) = optimizers["skd"].param_groups
    assert (type(optimizers["skd"]), group["lr"], group["betas"]) == (torch.optim.Adam, 4e-4, (0.9, 0.99))
    assert {id(p) for p in group["params"]} == {id(p) for p in method.parameters()}
    assert len(optimizers["student"].param_groups[0]["params"]) == 2


def test_an_untrained_critic_has_no_parameters_and_the_same_state():
    trained, untrained = (reference.build(name, student={}, teacher={}, **given)
                          for name, given in (("skd", {}), ("ifvd", {"critic_weight": 0.0})))  # fmt: skip
    assert not list(untrained.parameters()) and untrained.own_optimizer() is None
    assert trained.state_dict().keys() == untrained.state_dict().keys()
    untrained.load_state_dict(trained.state_dict())


def test_points_of_the_gradient_penalty_depend_on_seed_and_step_alone():
    """One draw per image, from the method's own generator: nothing else that draws numbers moves it."""
    method = reference.build("skd", student={}, teacher={}, kd_weight=0.0, pairwise_weight=0.0, adversarial_weight=0.0, objective="wgan-gp")
    student, teacher = (reference.outputs({"logits": torch.randn(2, 5, 16, 16)}) for _ in range(2))
    batch = reference.batch_of(torch.zeros(2, 128, 128, dtype=torch.uint8))
    again = copy.deepcopy(method)  # a pass moves the spectral norm's vectors
    value = method(student, teacher, batch)["critic"]
    torch.rand(7)
    assert torch.equal(again(student, teacher, batch)["critic"], value)
    value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
