"""Holistic (adversarial) distillation: a critic that tells the teacher's class scores from the student's, and its losses.

No method of its own: `skd`, `ifvd` and others hold an `Adversary` for their terms `adversarial` (the student's) and `critic`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from losses.functional import widen


class Adversary(nn.Module):
    """The critic and the two terms that it is there for; both in one backward pass of their weighted sum.

    `adversarial` is -mean D(z_student), and its gradient reaches the student alone; `critic` trains D on constant scores, real = the
    teacher's, fake = the student's, and its gradient reaches D alone. D has an optimizer of its own (`optimizer`), Adam as published;
    the gradient that it sees is that of the weighted term.

    Args:
        terms: the active terms of the method. Without `critic` D keeps its random initial weights, as buffers: parameters that never
            get a gradient make DDP raise.
        objective: "hinge" or "wgan-gp" of the critic's term.
        penalty: weight of the gradient penalty of "wgan-gp".
    """

    def __init__(self, num_classes: int, terms, objective: str = "hinge", penalty: float = 10.0):
        super().__init__()
        self.terms = [term for term in ("adversarial", "critic") if term in terms]
        self.objective, self.penalty = objective, penalty
        self.critic = Critic(num_classes)
        if "critic" not in terms:
            to_buffers(self.critic)

    def forward(self, student: Tensor, teacher: Tensor, mix: Tensor | None = None) -> dict[str, Tensor]:
        """Logits (B, K, h, w), equal in size -> the active terms. `mix`: (B, 1, 1, 1) uniform in [0, 1], for "wgan-gp" alone."""
        student, teacher = widen(student), widen(teacher)
        terms = {}
        if "adversarial" in self.terms:
            constant = {name: parameter.detach() for name, parameter in self.critic.named_parameters()}
            terms["adversarial"] = generator_loss(functional_call(self.critic, constant, (student,)))
        if "critic" in self.terms:
            fake = student.detach()
            teacher_scores, student_scores = self.critic(teacher), self.critic(fake)
            if self.objective == "hinge":
                terms["critic"] = hinge_loss(student_scores, teacher_scores)
            else:
                terms["critic"] = wasserstein_loss(student_scores, teacher_scores)
                terms["critic"] = terms["critic"] + self.penalty * gradient_penalty(self.critic, mix * teacher + (1 - mix) * fake)
        return terms

    def optimizer(self) -> torch.optim.Optimizer | None:
        """The published Adam; None for a critic that is not trained."""
        parameters = list(self.critic.parameters())
        return torch.optim.Adam(parameters, lr=4e-4, betas=(0.9, 0.99), fused=True) if parameters else None


def generator_loss(student_scores: Tensor) -> Tensor:
    """-mean of the critic's scores of the student."""
    return -student_scores.mean()


def hinge_loss(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """mean relu(1 - D(teacher)) + mean relu(1 + D(student)), the critic's loss."""
    return F.relu(1 - teacher_scores).mean() + F.relu(1 + student_scores).mean()


def wasserstein_loss(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """mean D(student) - mean D(teacher), the critic's loss without its gradient penalty."""
    return student_scores.mean() - teacher_scores.mean()


def gradient_penalty(critic, points: Tensor) -> Tensor:
    """Mean over images of (||gradient of D at the image's point|| - 1)^2; points (B, K, h, w) between real and fake."""
    points = points.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


class Critic(nn.Module):
    """Class scores (B, K, h, w) -> map of scores (B, 1, h', w'), in float32 whatever autocast says.

    Normalisation over the batch, four 4x4 convolutions of stride 2 with spectral norm (64, 128, 256, 512 channels) and LeakyReLU 0.1,
    self-attention after the third and the fourth, a last 4x4 convolution.

    Differs from the released code: maps that have become smaller than a kernel are padded with zeros, where the released critic fails
    (45x45 input); where it does not, this one is the same function.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.normalise = BatchStatistics(num_classes)
        widths = (num_classes, 64, 128, 256, 512)
        self.convolutions = nn.ModuleList(
            spectral_norm(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)) for inputs, outputs in zip(widths, widths[1:], strict=False)
        )
        self.attentions = nn.ModuleList([nn.Identity(), nn.Identity(), SelfAttention(256), SelfAttention(512)])
        self.last = nn.Conv2d(512, 1, 4)

    def forward(self, logits: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            x = self.normalise(logits)
            for convolution, attention in zip(self.convolutions, self.attentions, strict=True):
                x = attention(F.leaky_relu(convolution(pad_to(x, 2)), 0.1))
            return self.last(pad_to(x, 4))


class BatchStatistics(nn.Module):
    """BatchNorm that always normalises with this process's batch, as the released critic, which is never in evaluation mode.

    Not nn.BatchNorm2d: that would become SyncBatchNorm on several GPUs, which has no second derivative for the gradient penalty.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


class SelfAttention(nn.Module):
    """x + gamma * v A^T, A = softmax(q^T k) over the keys, not scaled by the width; gamma starts at 0. (B, C, h, w) -> same."""

    def __init__(self, channels: int):
        super().__init__()
        self.query, self.key = nn.Conv2d(channels, channels // 8, 1), nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (projection(x).flatten(2) for projection in (self.query, self.key, self.value))  # (B, C or C/8, N)
        attention = (query.mT @ key).softmax(-1)  # (B, N queries, N keys)
        return x + self.gamma * (value @ attention.mT).view_as(x)


def pad_to(x: Tensor, size: int) -> Tensor:
    """x (B, C, h, w) with zeros around it until both sides are at least `size`."""
    rows, columns = (max(0, size - side) for side in x.shape[-2:])
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)) if rows or columns else x


def to_buffers(module: nn.Module) -> None:
    """Turn every parameter into a buffer of the same name: still saved and moved, never trained."""
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            delattr(child, name)
            child.register_buffer(name, parameter.detach())
