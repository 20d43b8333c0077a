"""Inputs and parameters of the reference values in tests/golden/losses.json, rebuilt from seeds, and the comparison with them."""

import json
import zlib
from types import SimpleNamespace

import numpy as np
import torch

from dataset import Batch
from losses import METHODS, Setup, resolve
from models import SegOutput
from tests import parity
from tests.paths import GOLDEN

LOSSES = json.loads((GOLDEN / "losses.json").read_text())
VALUE_RTOL, GRADIENT_RTOL = 2e-4, 1e-3


def names(prefix: str) -> list[str]:
    """The entries whose name after "a/" or "b/" starts with a prefix."""
    return [name for name in LOSSES if name.split("/", 1)[1].startswith(prefix) or name.startswith(prefix)]


def recipe(seed, shape, scale=1.0, positive=False) -> torch.Tensor:
    """Standard normal numbers, float32."""
    x = np.random.RandomState(seed).standard_normal(shape).astype(np.float32) * np.float32(scale)
    return torch.from_numpy(np.abs(x) if positive else x)


def inputs(spec) -> SimpleNamespace:
    """All inputs that an entry may use, by what they are; student tensors are leaves that require gradients."""
    seed, size = spec["base_seed"], (spec["B"], spec["H"], spec["W"])
    channels = {key: spec.get(key) for key in ("num_classes", "student_channels", "teacher_channels")}

    def maps(offset, count, **kwargs):
        return recipe(seed + offset, (size[0], channels[count], *size[1:]), **kwargs) if channels[count] else None

    found = SimpleNamespace(
        student_logits=maps(1, "num_classes", scale=2), teacher_logits=maps(2, "num_classes", scale=2),
        student_feature=maps(3, "student_channels", positive=True), teacher_feature=maps(4, "teacher_channels", positive=True),
        student_wide=maps(5, "teacher_channels", positive=True), teacher_second=maps(7, "teacher_channels", positive=True),
        student_score=recipe(seed + 11, (size[0], 1, 3, 5)), teacher_score=recipe(seed + 12, (size[0], 1, 3, 5)),
        noise=torch.from_numpy(np.random.RandomState(seed + 13).rand(size[0], 1, *size[1:]).astype(np.float32)),
    )  # fmt: skip
    for name, tensor in vars(found).items():
        if name.startswith("student") and tensor is not None:
            tensor.requires_grad_()
    if channels["num_classes"]:
        random = np.random.RandomState(seed + 6)
        shape = (size[0], 8 * size[1], 8 * size[2])
        target = random.randint(0, channels["num_classes"], size=shape)
        target[random.rand(*shape) < 0.1] = 255  # the published code's -1
        found.target = torch.from_numpy(target.astype(np.uint8))
    return found


def fill(module: torch.nn.Module) -> None:
    """Give every parameter the values that follow from its shape. Not for BatchNorm, whose weight is 1 and bias 0."""
    norms = {id(p) for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for p in m.parameters()}
    for parameter in module.parameters():
        shape = tuple(parameter.shape)
        if id(parameter) not in norms:
            x = np.random.RandomState(zlib.crc32(repr(shape).encode())).standard_normal(shape).astype(np.float32)
            x = x / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else x / np.sqrt(shape[0]) * 0.1
            parameter.data = torch.from_numpy(x.astype(np.float32))


def check(value: torch.Tensor, expected: dict, tensors) -> None:
    """Compare a term and its gradients with respect to `tensors` (student's, then parameters; None skips one) with an entry."""
    assert value.item() == _close(expected["value"], VALUE_RTOL)
    entry, term = next((entry, term) for entry, content in LOSSES.items() for term, known in content["terms"].items() if known is expected)
    wanted = [(t, norm, head) for t, norm, head in zip(tensors, expected["grad_norms"], expected["grad_heads"], strict=True) if t is not None]
    gradients = torch.autograd.grad(value, [t for t, _, _ in wanted], retain_graph=True)
    worst = max((abs(gradient.norm().item() / norm - 1) for gradient, (_, norm, _) in zip(gradients, wanted, strict=True) if norm), default=None)
    parity.record("losses", entry, term, expected["value"], value.item(), worst)
    for gradient, (_, norm, head) in zip(gradients, wanted, strict=True):
        assert gradient.norm().item() == _close(norm, GRADIENT_RTOL)
        scale = norm / gradient.numel() ** 0.5  # single entries may be sums that cancel: compare on the gradient's own scale
        np.testing.assert_allclose(gradient.flatten()[:4].numpy(), head[: gradient.numel()], rtol=GRADIENT_RTOL, atol=GRADIENT_RTOL * scale)


def _close(value, rtol):
    import pytest

    return pytest.approx(value, rel=rtol)


def build(name: str, *, student: dict, teacher: dict, num_classes=5, dataset="shapes", crop=(128, 128), global_batch=2, **given):
    """A method with options as on the command line: build("kd", student={"logits": 5}, teacher={"logits": 5}, temperature=4.0)."""
    options, _ = resolve(METHODS[name], dataset, given)
    return METHODS[name](options, Setup(student, teacher, num_classes, crop, global_batch, dataset))


def batch_of(target: torch.Tensor, **fields) -> Batch:
    """A batch of black pictures with these labels (B, H, W) uint8, as the engine hands it to methods."""
    image = torch.zeros(len(target), 3, *target.shape[-2:], dtype=torch.uint8)
    valid = (target != 255).sum().double().clamp(min=1)
    defaults = {"valid": valid, "step": 3, "progress": 0.25, "offset": 0, "global_size": len(target)}
    return Batch(image, target, [f"picture{i}" for i in range(len(target))], **{**defaults, **fields})


def outputs(fields: dict[str, torch.Tensor]) -> SegOutput:
    return SegOutput(**fields)
