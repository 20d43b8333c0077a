"""The contrast: a brute-force loop over anchors, the fused forms against the plain one, memory, and Triton's interpreter."""

import logging
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from losses import contrast as module
from losses.contrast import contrast, excluded_cells, fused_contrast, plain_contrast, to_cells
from tests.paths import REPOSITORY

VARIANTS = [(negatives, distance) for negatives in ("released", "omni", "channel", "spatial") for distance in ("l1", "l2")]


def maps(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    generated, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return generated.requires_grad_(), teacher


def fused(*arguments, **given):
    return fused_contrast(*arguments, **{"compiled": False, **given})


def brute_force(generated, teacher, patch, groups, tau, negatives, distance):
    """One anchor at a time, straight from the description of the loss."""
    batch, channels, height, width = generated.shape
    size, losses = channels // groups, []
    for b in range(batch):
        for top in range(0, height - patch + 1, patch):
            for left in range(0, width - patch + 1, patch):
                cells = [(top + i, left + j, k) for i in range(patch) for j in range(patch) for k in range(groups)]
                for y, x, k in cells:
                    anchor = generated[b, k * size : (k + 1) * size, y, x]
                    positive, others = None, []
                    for v, u, m in cells:
                        difference = anchor - teacher[b, m * size : (m + 1) * size, v, u]
                        s = -(difference.abs().sum() if distance == "l1" else difference.square().sum().sqrt()) / tau
                        same_pixel, same_group = (v, u) == (y, x), m == k
                        if same_pixel and same_group:
                            positive = s
                        elif {"released": not same_group, "omni": True, "channel": same_pixel, "spatial": True}[negatives]:
                            others.append(s)
                    losses.append(torch.stack([positive, *others]).logsumexp(0) - positive)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("negatives,distance", VARIANTS)
def test_brute_force(negatives, distance):
    generated, teacher = maps(2, 6, 5, 3, seed=4)  # not whole patches: 5 -> 4, 3 -> 2
    settings = (2, 1 if negatives == "spatial" else 3, 0.5, negatives, distance)
    expected = brute_force(generated, teacher, *settings)
    (expected_gradient,) = torch.autograd.grad(expected, generated)
    assert expected_gradient[..., 4:, :].abs().max() == expected_gradient[..., 2:].abs().max() == 0
    for form in (plain_contrast, fused):
        loss = form(generated, teacher, *settings)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, generated)[0], expected_gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("tau", [1e-4, 20.0])
@pytest.mark.parametrize("negatives,distance", VARIANTS)
def test_fused_is_plain(monkeypatch, negatives, distance, tau):
    """A low temperature leaves two of 96 cells in an anchor's gradient, a high one all: each has its own way of summing them up."""
    monkeypatch.setattr(module, "pull" if tau < 1 and negatives in ("released", "omni") else "pull_pairs", None)
    generated, teacher = maps(1, 192, 13, 9)
    with torch.no_grad():
        generated[0, :, 1, 1] = teacher[0, :, 1, 1]  # distance 0: the gradient of l2 must not divide by it
    settings = (4, 1 if negatives == "spatial" else 6, tau, negatives, distance)
    losses = plain_contrast(generated, teacher, *settings), fused(generated, teacher, *settings)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-14)
    plain, ours = (torch.autograd.grad(loss, generated)[0] for loss in losses)
    assert plain.norm() > 0 and (ours - plain).norm() <= 1e-10 * plain.norm()


@pytest.mark.parametrize("most,parts", [(1, 6), (8 * 3 * 6 * 2, 3), (8 * 3 * 6 * 4, 2), (1 << 40, 1)])
@pytest.mark.parametrize("l1", [True, False])
def test_plain_distances_in_parts(monkeypatch, l1, most, parts):
    """Six patches of eight student cells by six of the teacher's, of three channels: the same bits and gradients however they are cut."""
    generated, teacher = torch.randn(6, 8, 3, requires_grad=True), torch.randn(6, 6, 3)
    whole = torch.cdist(generated, teacher, p=1 if l1 else 2, compute_mode="donot_use_mm_for_euclid_dist")
    sizes, cdist = [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda x, y, **given: sizes.append(x.numel() * y.shape[1]) or cdist(x, y, **given))
    cut = module.plain_distances(generated, teacher, l1, most)
    assert len(sizes) == parts and max(sizes) <= max(most, 8 * 3 * 6)
    assert torch.equal(cut, whole)
    weights = torch.randn(6, 8, 6)
    assert torch.equal(*(torch.autograd.grad((weights * found).sum(), generated)[0] for found in (cut, whole)))


def test_float32_is_as_near_to_float64_as_the_plain_form():
    exact, teacher = maps(2, 512, 12, 12)
    settings = (4, 16, 0.07, "released", "l1")
    reference = plain_contrast(exact, teacher, *settings)
    (reference_gradient,) = torch.autograd.grad(reference, exact)
    single = exact.detach().float().requires_grad_()
    errors = []
    for form in (plain_contrast, fused):
        loss = form(single, teacher.float(), *settings)
        (gradient,) = torch.autograd.grad(loss, single)
        errors.append((gradient - reference_gradient).norm().item() / reference_gradient.norm().item())
        assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    assert errors[1] < 2e-5 and errors[1] < 2 * errors[0]


def test_mean_form_is_the_released_form_divided():
    x, t = torch.randn(2, 32, 16, 16), torch.randn(2, 32, 16, 16)
    assert contrast(x, t, mean=True).item() * 16 == pytest.approx(contrast(x, t).item(), rel=1e-6)


def test_closer_to_the_teacher_loses_less():
    teacher = torch.randn(1, 32, 8, 8)
    noise = torch.randn(1, 32, 8, 8)
    losses = [contrast(teacher + step * noise, teacher, pool=0, groups=4).item() for step in (0.0, 0.3, 1.0, 3.0)]
    assert losses == sorted(losses) and losses[0] < losses[-1]


def test_a_map_smaller_than_a_patch_is_refused():
    message = "12x12 unpooled, has no 4x4 patch; pass a larger --crop-size or a smaller --afdcd-pool than 4 or --afdcd-patch than 4"
    with pytest.raises(ValueError, match=message):
        contrast(torch.randn(1, 32, 12, 12), torch.randn(1, 32, 12, 12))
    with pytest.raises(ValueError, match="has no 13x13 patch; pass a larger --crop-size or a smaller --afdcd-patch than 13"):
        contrast(torch.randn(1, 32, 12, 12), torch.randn(1, 32, 12, 12), pool=0, patch=13)
    with pytest.raises(ValueError, match="a smaller --afdcd-pool than 100"):  # larger than the map
        contrast(torch.randn(1, 32, 12, 12), torch.randn(1, 32, 12, 12), pool=100)


@pytest.mark.parametrize("form", ["plain", "auto"])
@pytest.mark.parametrize("tau", [0.07, 20.0])
def test_half_precision_maps_and_autocast(form, tau):
    """Computed in float32 from what the maps hold; the gradient comes in the map's type."""
    generated, teacher = maps(2, 64, 8, 8, dtype=torch.bfloat16)
    wide = generated.detach().float().requires_grad_()
    expected = contrast(wide, teacher.float(), 0, tau=tau, form=form)
    (expected_gradient,) = torch.autograd.grad(expected, wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrast(generated, teacher, 0, tau=tau, form=form)
        same = contrast(wide, teacher.float(), 0, tau=tau, form=form)
    assert loss.dtype == torch.float32 and loss.item() == same.item() == expected.item() and math.isfinite(loss.item())
    assert torch.equal(torch.autograd.grad(same, wide)[0], expected_gradient)
    (gradient,) = torch.autograd.grad(loss, generated)
    assert gradient.dtype == torch.bfloat16
    assert (gradient.float() - expected_gradient).norm() < 4e-3 * expected_gradient.norm()


def test_float16_keeps_small_gradients_under_a_loss_scale():
    """Divided by the number of anchors before the loss scale is applied, they would be below what float16 can hold."""
    generated, teacher = maps(1, 32, 32, 32, dtype=torch.float16)
    wide = generated.detach().float().requires_grad_()
    scale = 2.0**16
    (gradient,) = torch.autograd.grad(contrast(generated, teacher, 0, tau=20.0, mean=True) * scale, generated)
    (expected,) = torch.autograd.grad(contrast(wide, teacher.float(), 0, tau=20.0, mean=True) * scale, wide)
    assert (expected / scale).abs().max() < torch.finfo(torch.float16).tiny
    assert (gradient.float() - expected).norm() < 2e-3 * expected.norm()


def test_two_backward_passes_give_the_same():
    generated, teacher = maps(1, 32, 8, 8)
    loss = contrast(generated, teacher, 0)
    first, second = (torch.autograd.grad(loss, generated, torch.tensor(factor).double(), retain_graph=True)[0] for factor in (1.0, 3.0))
    torch.testing.assert_close(second, 3 * first)


def test_a_teacher_that_wants_a_gradient_gets_it_in_the_plain_form_alone():
    generated, teacher = maps(1, 32, 8, 8)
    teacher.requires_grad_()
    assert torch.autograd.grad(contrast(generated, teacher, 0, form="plain"), teacher)[0].norm() > 0
    with pytest.raises(AssertionError, match="no gradient for the teacher"):
        contrast(generated, teacher, 0)


class Largest(TorchDispatchMode):
    """The most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


@pytest.mark.parametrize("tau", [0.07, 20.0])
def test_nothing_larger_than_the_maps_is_allocated(tau):
    """4 patches of 256 cells, 128 channels each: 262144 distances, 34 million differences; a block of a CPU has a million."""
    found = {}
    for form in ("plain", "auto"):
        generated, teacher = maps(1, 2048, 8, 8, dtype=torch.float32)
        with Largest() as largest:
            contrast(generated, teacher, 0, tau=tau, form=form).backward()
        found[form] = largest.elements
    assert found["auto"] <= 1 << 20
    generated, teacher = maps(1, 64, 32, 64, dtype=torch.float32)  # 128 patches, 8 million distances
    for form in ("plain", "auto"):
        with Largest() as largest:
            contrast(generated, teacher, 0, tau=tau, form=form).backward()
        found[form] = largest.elements
    assert found["plain"] == 128 * 256**2 and found["auto"] <= 1 << 20


@pytest.fixture
def warnings():
    """What the log says, also where another test has cut the logger off from pytest's."""
    lines, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    module.logger.addHandler(handler)
    module.compiled_distances.cache_clear()
    yield lines
    module.logger.removeHandler(handler)
    module.compiled_distances.cache_clear()


def test_without_a_compiler_one_warning_and_the_same_result(monkeypatch, warnings):
    def no_compiler(function, **options):
        def fail(*arguments):
            raise RuntimeError("No working C++ compiler found\nand much more")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    generated, teacher = maps(1, 32, 8, 8)
    losses = [contrast(generated, teacher, 0, form=form).item() for form in ("fused", "fused", "auto")]
    assert losses[0] == losses[1] == losses[2]
    (line,) = warnings
    assert "not compiled" in line and "No working C++ compiler found" in line and "\n" not in line


def test_auto_compiles_large_maps_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "compiled_distances", lambda *shape: asked.append(shape))
    monkeypatch.setattr(module, "distances", lambda student, teacher, l1: student.new_zeros(*student.shape[:2], teacher.shape[1]))
    for shape in ((8, 512, 16, 16), (4, 2048, 45, 45)):
        assert asked == []
        with torch.no_grad():
            contrast(*(torch.zeros(1).expand(shape) for _ in range(2)), 0)
    assert set(asked) == {(11, 256, 128, True, torch.float32)}


@pytest.mark.slow
def test_compiled_is_plain(warnings):
    for distance in ("l1", "l2"):
        generated, teacher = maps(1, 128, 9, 8, dtype=torch.float32)
        losses = [contrast(generated, teacher, 0, distance=distance, form=form) for form in ("plain", "fused")]
        if warnings:
            pytest.skip(warnings[0])
        with FlopCounterMode(display=False):  # a dispatch mode, in which nothing is compiled
            counted = contrast(generated, teacher, 0, distance=distance, form="fused")
        plain, ours = (torch.autograd.grad(loss, generated)[0] for loss in losses)
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5) == counted.item()
        assert (ours - plain).norm() < 1e-4 * plain.norm()


@pytest.mark.parametrize("fails", ["import", "start", ""])
def test_a_kernel_that_fails_is_not_used(monkeypatch, warnings, fails):
    """A fake GPU: tensors are made on the CPU, and the kernel's module is a fake, too."""
    def tile(*arguments):
        if fails == "start":
            raise RuntimeError("ptxas fatal: no kernel for sm_999\nand much more")

    def load(name):
        if fails == "import":
            raise ImportError("libtriton.so: undefined symbol")
        return SimpleNamespace(tile=tile)

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(module.importlib, "import_module", load)
    monkeypatch.setattr(module, "excluded_cells", lambda *given: None)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    found = module.triton_tile.__wrapped__(torch.device("cuda"))
    assert found is (None if fails else tile) and module.triton_tile.__wrapped__(torch.device("cpu")) is None
    why = {"import": "ImportError: libtriton.so: undefined symbol", "start": "RuntimeError: ptxas fatal: no kernel for sm_999"}
    assert warnings == [f"Af-DCD's contrast runs without its Triton kernel and takes longer ({why[fails]})" for _ in fails[:1]]


INTERPRETED = """
import torch
from losses import _contrast_triton, contrast as module
module.triton_tile = lambda device: _contrast_triton.tile
torch.manual_seed(0)
for negatives in ("released", "omni", "channel", "spatial"):
    for distance in ("l1", "l2"):
        generated, teacher = torch.randn(1, 6, 5, 4, requires_grad=True), torch.randn(1, 6, 5, 4)  # 12 cells: not a power of 2
        with torch.no_grad():
            generated[0, :, 0, 0] = teacher[0, :, 0, 0]
        losses = [module.contrast(generated, teacher, 0, 2, 3, 0.3, negatives, distance, form=form) for form in ("plain", "fused")]
        plain, ours = (torch.autograd.grad(loss, generated)[0] for loss in losses)
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
        assert plain.norm() > 0 and (ours - plain).norm() < 2e-6 * plain.norm(), (negatives, distance)
with torch.no_grad():
    torch.testing.assert_close(module.contrast(generated, teacher, 0, 2, 3, form="fused"), module.contrast(generated, teacher, 0, 2, 3, form="plain"))
generated, teacher = torch.randn(1, 128, 4, 4, requires_grad=True), torch.randn(1, 128, 4, 4)  # a patch as published: 256 cells in 8 programs
plain, ours = (torch.autograd.grad(module.contrast(generated, teacher, 0, tau=5.0, form=form), generated)[0] for form in ("plain", "fused"))
assert (ours - plain).norm() < 2e-6 * plain.norm()
generated, teacher = torch.randn(1, 6, 5, 4, requires_grad=True), torch.randn(1, 6, 5, 4)
_contrast_triton.DISTANCES = 32  # several programs per patch, the last one with fewer anchors
losses, gradient = _contrast_triton.tile(*(x.flatten(2).mT.detach() for x in (generated, teacher)), None, 0.3, True, True)
whole = module.plain_tile(*(x.flatten(2).mT.detach() for x in (generated, teacher)), None, 0.3, True, True, module.distances)
torch.testing.assert_close(losses, whole[0]), torch.testing.assert_close(gradient, whole[1])
print("same")
"""


def test_triton_kernel_in_the_interpreter():
    """The GPU's kernel, run by Triton's interpreter on a CPU, is the plain form."""
    pytest.importorskip("triton", reason="Triton comes with the CUDA builds of PyTorch")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, cwd=REPOSITORY, check=False,
        env={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    assert done.stdout == "same\n", done.stderr


def test_cells_are_ordered_by_pixel_then_group():
    x = torch.arange(2 * 4 * 5 * 4).view(2, 4, 5, 4)
    cells = to_cells(x, 2, 2)
    assert cells.shape == (8, 8, 2)
    # second image, lower right patch, its pixel (1, 0), group 1
    assert torch.equal(cells[7, 2 * 2 + 1], x[1, 2:4, 3, 2])
    excluded = excluded_cells(4, 2, "released")
    assert excluded.sum() == 8 * 3 and not excluded.diagonal().any()
