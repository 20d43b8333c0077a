"""Masked generation: every form of its first layers against the layers as written, which form is chosen, and the projectors."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from losses import projection
from losses.projection import (
    FRONTS,
    PROJECTORS,
    BottleneckProjector,
    Projector,
    centre_mask,
    folded_front,
    front_costs,
    generate,
    mimicking,
    plain_front,
    random_mask,
    visible_front,
)
from scripts.watch import Watch
from tests import reference


def noise(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


MASKS = {  # for maps (B, C, 7, 5)
    "random": lambda batch: random_mask(noise(batch, 1, 7, 5), 0.75),
    "centre": lambda batch: centre_mask(7, 5),
    "all hidden": lambda batch: torch.zeros(batch, 1, 7, 5),
    "all visible": lambda batch: torch.ones(batch, 1, 7, 5),
    "none": lambda batch: None,
}


def test_memory_format():
    """A network in NHWC changes nothing, and on a CPU the wide convolutions of float32 stay in NCHW, where their gradients are faster."""
    align, projector = nn.Conv2d(48, 96, 1), Projector(96)
    feature, mask = torch.randn(2, 48, 9, 9), random_mask(noise(2, 1, 9, 9), 0.75)
    outputs = [generate(align, projector, x, m) for x in (feature, feature.to(memory_format=torch.channels_last)) for m in (mask, None)]
    torch.testing.assert_close(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[1], outputs[3])
    assert all(output.is_contiguous() for output in outputs)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_half_precision_gradients_are_stored_as_the_weights_are(kind):
    """Those of the layers as autocast runs them, without a float32 copy more: autograd would convert, then arrange."""
    torch.manual_seed(0)
    projector, x = PROJECTORS[kind](64), torch.randn(2, 64, 9, 9).to(memory_format=torch.channels_last)
    layers = [layer for layer in projector.modules() if isinstance(layer, nn.Conv2d) and layer is not projector.first]
    with torch.no_grad():
        x = projector.first(x).bfloat16().to(memory_format=torch.channels_last)

    def run(convolve):
        projector.zero_grad()
        with patch("losses.projection.convolve", convolve), torch.autocast("cpu", torch.bfloat16):
            total = projector.rest(x).float().square().sum()
        with Watch() as watch:
            total.backward()
        return [layer.weight.grad for layer in layers], watch.peak

    (ours, peak), (plain, other) = run(projection.convolve), run(lambda layer, x: layer(x))
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == torch.float32 and a.is_contiguous() and torch.equal(a, b)
    if kind != "bottleneck":  # whose last weights are small beside its maps
        assert peak <= other - 0.45 * layers[-1].weight.nbytes  # two of four bytes


def test_half_precision_gradients_of_folded_kernels_come_in_blocks():
    """One and a part of one block of output channels: those of all kernels at once, whose half precision gradient is never whole."""
    torch.manual_seed(0)
    kernels, matrix = torch.randn(300, 64, 3, 3, requires_grad=True), torch.randn(64, 8, requires_grad=True)
    product = projection._Product.apply(kernels, matrix, torch.bfloat16)
    direction = torch.randn_like(product)
    with Watch() as watch:
        found = torch.autograd.grad(product, (kernels, matrix), direction)
    plain = torch.einsum("oikl,ij->ojkl", kernels.bfloat16().float(), matrix.bfloat16().float())
    for ours, exact in zip(found, torch.autograd.grad(plain, (kernels, matrix), direction.float()), strict=True):
        assert ours.dtype == torch.float32 and (ours - exact).norm() < 3e-2 * exact.norm()  # 2e-2 on CPUs without bfloat16
    assert kernels.nbytes < watch.peak < 1.5 * kernels.nbytes


def test_mimicking_of_half_precision_maps_keeps_no_wide_copies():
    for mean in (False, True):
        maps = [torch.randn(8, 64, 16, 16).bfloat16().requires_grad_() for _ in range(2)]
        with Watch() as watch:
            ours = mimicking(*maps, mean)
            found = torch.autograd.grad(ours, maps)
        plain = F.mse_loss(*map(torch.Tensor.float, maps), reduction="mean" if mean else "sum") / (1 if mean else 8)
        assert ours.dtype == torch.float32 and ours.item() == pytest.approx(plain.item(), rel=1e-6)
        for a, b in zip(found, torch.autograd.grad(plain, maps), strict=True):
            torch.testing.assert_close(a, b)
        gradients = 2 * maps[0].nbytes
        assert gradients < watch.peak < gradients + maps[0].nbytes  # a wide copy is twice the size


def gradients(front, align, first, feature, mask):
    """The output and the gradients with respect to input, alignment (weight, bias) and first convolution (weight, bias)."""
    feature = feature.detach().requires_grad_()
    output = front(align, first, feature, mask)
    direction = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    return [output, *torch.autograd.grad(output, [feature, *align.parameters(), *first.parameters()], direction, materialize_grads=True)]


def check_same(ours, theirs, tolerance):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch,widths,kernel", [(1, (6, 10), 3), (2, (7, 16), 3), (2, (6, 10), 1), (2, (8, 8), 3)])
def test_outputs_and_gradients(batch, widths, kernel, mask):
    own, wide = widths
    align = nn.Identity() if own == wide else nn.Conv2d(own, wide, 1).double()
    first = nn.Conv2d(wide, 12, kernel, padding=kernel // 2).double()
    feature, mask = torch.randn(batch, own, 7, 5, dtype=torch.float64), MASKS[mask](batch)
    expected = gradients(plain_front, align, first, feature, mask)
    assert expected[0].norm() > 0
    if own != wide:
        check_same(gradients(folded_front, align, first, feature, mask), expected, 1e-13)
    if mask is not None:
        check_same(gradients(visible_front, align, first, feature, mask), expected, 1e-13)


def test_gradients_in_float32():
    align, first = nn.Conv2d(128, 512, 1), nn.Conv2d(512, 512, 3, padding=1)
    feature, mask = torch.randn(2, 128, 15, 15), random_mask(noise(2, 1, 15, 15), 0.75)
    expected = gradients(plain_front, align, first, feature, mask)
    for front in (folded_front, visible_front):
        check_same(gradients(front, align, first, feature, mask), expected, 2e-6)


@pytest.mark.parametrize("front", FRONTS)
def test_autocast_stays_near_float32(front):
    align, first = nn.Conv2d(48, 96, 1), nn.Conv2d(96, 96, 3, padding=1)
    feature, mask = torch.randn(2, 48, 9, 9), random_mask(noise(2, 1, 9, 9), 0.75)
    expected = gradients(plain_front, align, first, feature, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradients(FRONTS[front], align, first, feature.bfloat16(), mask)
    assert ours[0].dtype == ours[1].dtype == torch.bfloat16 and ours[2].dtype == ours[4].dtype == torch.float32
    for a, b in zip(ours, expected, strict=True):
        assert 1e-6 * b.norm() < (a - b).norm() < 3e-2 * b.norm()  # 1e-2 on CPUs that have bfloat16


@pytest.mark.parametrize("between", [nn.BatchNorm2d(10), nn.ReLU()])
def test_a_norm_or_an_activation_behind_the_alignment_is_not_folded(monkeypatch, between):
    """Folding is right because nothing stands between the two convolutions: with a layer there it is wrong, and is not chosen."""
    torch.manual_seed(0)
    pointwise, projector = nn.Conv2d(6, 10, 1), Projector(10)
    align, feature, mask = nn.Sequential(pointwise, between), torch.randn(2, 6, 40, 40), random_mask(noise(2, 1, 40, 40), 0.75)
    expected = projector(align(feature) * mask)
    assert list(front_costs(align, projector.first, feature, mask)) == ["plain"]
    torch.testing.assert_close(generate(align, projector, feature, mask), expected)
    for front in (folded_front, visible_front):
        wrong = projector.rest(front(pointwise, projector.first, feature, mask))
        assert (wrong - expected).norm() > 1e-2 * expected.norm()
    assert len(front_costs(pointwise, projector.first, feature, mask)) == 3


def chosen(own, wide, batch, height, width, visible=None, cuda=False, projector=Projector):
    """The form for these shapes, without their memory."""
    with torch.device("meta"):
        align = nn.Identity() if own == wide else nn.Conv2d(own, wide, 1)
        first = projector(wide).first
        feature = torch.empty(batch, own, height, width)
    if cuda:
        feature = SimpleNamespace(shape=feature.shape, is_cuda=True)
    mask = None if visible is None else (torch.arange(batch * height * width) < visible * batch * height * width).view(batch, 1, height, width)
    costs = front_costs(align, first, feature, mask)
    return min(costs, key=costs.get)


def test_the_cheapest_form_is_chosen():
    assert chosen(512, 2048, 4, 45, 45, 0.25) == chosen(320, 512, 8, 16, 16, 0.25) == "visible"
    assert chosen(512, 2048, 4, 45, 45) == chosen(512, 2048, 4, 45, 45, 8 / 9) == "folded"
    assert chosen(512, 2048, 1, 8, 8, 0.25) == "plain"  # fewer positions than it takes to multiply the weights
    assert chosen(512, 512, 2, 45, 45, 0.25) == "visible" and chosen(512, 512, 2, 45, 45, 8 / 9) == chosen(512, 512, 2, 45, 45) == "plain"
    assert chosen(512, 2048, 16, 45, 45, 0.25, cuda=True) == "folded"  # no count of positions, which would block a GPU
    assert chosen(512, 2048, 4, 45, 45, 0.25, projector=BottleneckProjector) == "visible"


@pytest.mark.parametrize("own,wide", [(64, 256), (64, 64)])
def test_costs_are_the_products_that_are_computed(own, wide):
    align = nn.Identity() if own == wide else nn.Conv2d(own, wide, 1)
    first, feature, mask = nn.Conv2d(wide, 96, 3, padding=1), torch.randn(2, own, 12, 11), random_mask(noise(2, 1, 12, 11), 0.75)
    costs = front_costs(align, first, feature, mask)
    fold = 0 if own == wide else first.weight.numel() * own
    costs["visible"] = (costs["visible"] - fold) // 2 + fold  # they count twice
    assert len(costs) == (2 if own == wide else 3)
    for form, cost in costs.items():
        with FlopCounterMode(display=False) as counter:
            FRONTS[form](align, first, feature, mask)
        # the mask's channel, and zeros up to a multiple of 8, come on top where something is folded
        assert cost <= counter.get_total_flops() / 2 <= cost * (1 if form == "plain" or own == wide else (own + 8) / own)


@pytest.mark.parametrize("name", PROJECTORS)
def test_generate_is_alignment_mask_projector(monkeypatch, name):
    torch.manual_seed(0)
    align, projector = nn.Conv2d(12, 32, 1), PROJECTORS[name](32)
    feature, mask = torch.randn(2, 12, 9, 8), random_mask(noise(2, 1, 9, 8), 0.75)
    aligned = align(feature) * mask
    if name == "enhanced":
        first = projector.first(aligned).relu()
        expected = (projector.from_first(first) + projector.from_second(projector.second(first).relu())) / 2
    else:
        expected = projector(aligned)
    for form in FRONTS:
        monkeypatch.setattr(projection, "front_costs", lambda *arguments, form=form: {form: 0})
        torch.testing.assert_close(generate(align, projector, feature, mask), expected)


def test_names_of_the_parameters_are_those_of_older_checkpoints():
    method = reference.build("afdcd", student={"c4": 16, "logits": 5}, teacher={"c4": 32, "logits": 5})
    names = ["align.weight", "align.bias", "projector.0.weight", "projector.0.bias", "projector.2.weight", "projector.2.bias"]
    assert list(method.state_dict()) == names
    method = reference.build("afdcd", student={"c4": 16, "logits": 5}, teacher={"c4": 32, "logits": 5}, projector="enhanced")
    parts = ["projector.first", "projector.second", "projector.from_first", "projector.from_second"]
    assert list(method.state_dict()) == names[:2] + [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]


def test_bottleneck_sees_what_the_plain_projector_sees_for_a_fraction_of_its_products():
    with torch.device("meta"):
        plain, bottleneck = Projector(2048), BottleneckProjector(2048)
    weights = [sum(p.numel() for p in projector.parameters() if p.ndim == 4) for projector in (plain, bottleneck)]
    assert weights[0] / weights[1] == pytest.approx(34, abs=0.5)
    for projector in (Projector(128), BottleneckProjector(128)):
        x = torch.randn(1, 128, 11, 11, requires_grad=True)
        projector(x)[0, :, 5, 5].sum().backward()
        reached = x.grad[0].abs().sum(0) > 0
        assert reached[3:8, 3:8].all() and reached.sum() == 25
