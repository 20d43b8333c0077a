"""MasKD and FreeKD: masks, wavelet and distances against loops and closed forms; what trains the tokens, and when."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch

from losses.freekd import band_distance, inverse_wavelet, wavelet
from losses.functional import label_entropy
from losses.tokens import masked_mean, overlap, token_masks
from tests import reference

LOGITS = {"logits": 5, "aux": 5, "c4": 6}
WIDE = {"logits": 5, "aux": 5, "c4": 8}


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape):
    y = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(9), dtype=torch.uint8)
    y[:, 0] = 255
    return y


def outputs(seed, channels, size, **kwargs):
    maps = {name: normal(seed + n, 2, width, *size) for n, (name, width) in enumerate(channels.items())}
    return reference.outputs({name: x.requires_grad_(**kwargs) for name, x in maps.items()})


def brute_masks(tokens, x):
    """masks[b][m] as an array (h, w)."""
    return [[1 / (1 + np.exp(-np.einsum("c,chw->hw", token, image))) for token in tokens] for image in x.detach().numpy()]


def brute_overlap(masks):
    pairs = [pair for image in masks for pair in permutations(image, 2)]
    return sum(2 * (a * b).sum() / ((a * a).sum() + (b * b).sum()) for a, b in pairs) / len(pairs)


def brute_masked(masks, errors):
    """errors[b] (h, w)."""
    values = [(mask * error).sum() / mask.sum() for image, error in zip(masks, errors, strict=True) for mask in image]
    return sum(values) / len(values)


# ------------------------------------------------------------------------------------------------------------------------ maskd


def test_maskd_against_brute_force():
    torch.manual_seed(0)
    method = reference.build("maskd", student=LOGITS, teacher=WIDE, tokens=3).double()
    student, teacher, y = outputs(0, LOGITS, (4, 5)), outputs(10, WIDE, (4, 5)), labels(2, 4, 5)
    ours = method(student, teacher, reference.batch_of(y))
    assert ours.keys() == {"logits", "aux", "mask", "diversity"}

    masks = brute_masks(method.tokens.detach().numpy(), teacher.logits)
    for term, s, t in (("logits", student.logits, teacher.logits), ("aux", student.aux, teacher.aux)):
        errors = ((s - t).detach().numpy() ** 2).mean(1)
        assert ours[term].item() == pytest.approx(0.5 * brute_masked(masks, errors), rel=1e-12)
    assert ours["diversity"].item() == pytest.approx(brute_overlap(masks), rel=1e-12)
    entropies = []
    for b, v, u in np.ndindex(2, 4, 5):
        if y[b, v, u] != 255:
            z = sum(mask[v, u] for mask in masks[b]) * teacher.logits.detach().numpy()[b, :, v, u]
            entropies.append(math.log(np.exp(z).sum()) - z[y[b, v, u]])
    assert ours["mask"].item() == pytest.approx(np.mean(entropies), rel=1e-12)


def test_maskd_gradient_is_that_of_the_weighted_squares():
    off = {"aux_weight": 0.0, "mask_weight": 0.0, "diversity_weight": 0.0}
    method = reference.build("maskd", student=LOGITS, teacher=WIDE, tokens=3, **off).double()
    student, teacher = outputs(0, LOGITS, (4, 5), requires_grad=True), outputs(10, WIDE, (4, 5), requires_grad=False)
    method(student, teacher, reference.batch_of(labels(2, 4, 5)))["logits"].backward()
    masks = token_masks(method.tokens, teacher.logits)  # a buffer: nothing trains it
    shares = (masks / masks.sum((2, 3), keepdim=True)).mean(1, keepdim=True) / 2  # of a position, over masks and images
    torch.testing.assert_close(student.logits.grad, shares * (student.logits.detach() - teacher.logits) / 5, rtol=1e-10, atol=1e-14)
    assert not list(method.parameters()) and "tokens" in method.state_dict() and method.own_optimizer() is None


def test_maskd_without_auxiliary_heads():
    plain = {"logits": 5}
    for student, teacher in ((plain, LOGITS), (LOGITS, plain)):
        method = reference.build("maskd", student=student, teacher=teacher)
        assert method.needs == ("logits",) and "aux" not in method.weights
    with pytest.raises(ValueError, match="student without auxiliary head, so no term is left"):
        reference.build("maskd", student=plain, teacher=LOGITS, logits_weight=0.0, mask_weight=0.0, diversity_weight=0.0)


# ----------------------------------------------------------------------------------------------------------------------- freekd


def haar_matrix(n):
    """Orthonormal one-level Haar transform of n numbers: n/2 averages, then n/2 differences."""
    matrix = np.zeros((n, n))
    for i in range(n // 2):
        matrix[i, 2 * i : 2 * i + 2] = 1 / math.sqrt(2)
        matrix[n // 2 + i, 2 * i : 2 * i + 2] = 1 / math.sqrt(2), -1 / math.sqrt(2)
    return matrix


def brute_wavelet(plane, levels):
    """The last low band and [[columns, rows, both], ...] of one plane, by matrix products."""
    high = []
    for _ in range(levels):
        h, w = plane.shape
        bands = haar_matrix(h) @ plane @ haar_matrix(w).T
        high.append([bands[: h // 2, w // 2 :], bands[h // 2 :, : w // 2], bands[h // 2 :, w // 2 :]])
        plane = bands[: h // 2, : w // 2]
    return plane, high


def test_wavelet_against_matrices():
    x = normal(0, 2, 3, 8, 16)
    low, high = wavelet(x, 3)
    for b, c in np.ndindex(2, 3):
        expected_low, expected_high = brute_wavelet(x[b, c].numpy(), 3)
        np.testing.assert_allclose(low[b, c], expected_low, rtol=1e-12, atol=1e-13)
        for ours, bands in zip(high, expected_high, strict=True):
            np.testing.assert_allclose(ours[b, :, c], np.stack(bands), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [(8, 16), (13, 17), (1, 3)])
def test_wavelet_keeps_energy_and_inverts(size):
    x = normal(1, 2, 3, *size)
    low, high = wavelet(x, 3)
    assert low.shape[-2:] == tuple(-(-n // 8) for n in size)
    padded = inverse_wavelet(low, high)
    torch.testing.assert_close(padded[..., : size[0], : size[1]], x, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(padded[..., -1, : size[1]], x[..., -1, :])  # filled up with the last row
    energy = low.square().sum() + sum(bands.square().sum() for bands in high)
    torch.testing.assert_close(energy, padded.square().sum())


def test_smooth_maps_have_no_high_frequencies():
    _, high = wavelet(torch.ones(1, 2, 13, 17, dtype=torch.float64), 3)
    assert all(bands.abs().max() == 0 for bands in high)


def test_freekd_against_brute_force():
    torch.manual_seed(0)
    method = reference.build("freekd", student=LOGITS, teacher=WIDE, tokens=3, levels=2).double()
    student, teacher, y = outputs(0, LOGITS, (4, 8), requires_grad=True), outputs(10, WIDE, (4, 8), requires_grad=False), labels(2, 4, 8)
    ours = method(student, teacher, reference.batch_of(y))
    assert ours.keys() == {"bands", "prompt", "diversity"}

    tokens = method.tokens.detach().numpy()
    aligned, target = method.align(student.c4).detach().numpy(), teacher.c4.numpy()
    distances, overlaps, rebuilt = [], [], np.zeros((2, 8, 4, 8))
    for b in range(2):
        planes = [[brute_wavelet(plane, 2) for plane in maps[b]] for maps in (aligned, target)]
        gated = []
        for level in range(2):
            gated.append([])
            for band in range(3):
                s, t = (np.stack([plane[1][level][band] for plane in network]) for network in planes)  # (C, h', w')
                masks = brute_masks(tokens, torch.from_numpy(t)[None])
                distances.append((level, brute_masked(masks, [np.abs(s - t).mean(0)])))
                overlaps.append((level, brute_overlap(masks)))
                gated[level].append(t * sum(masks[0]))
        for c in range(8):
            plane = planes[1][c][0]
            for level in (1, 0):
                columns, rows, both = (gated[level][band][c] for band in range(3))
                bands = np.block([[plane, columns], [rows, both]])
                plane = haar_matrix(bands.shape[0]).T @ bands @ haar_matrix(bands.shape[1])
            rebuilt[b, c] = plane
    for term, values in (("bands", distances), ("diversity", overlaps)):
        expected = np.mean([np.mean([value for level, value in values if level == wanted]) for wanted in (0, 1)])
        assert ours[term].item() == pytest.approx(expected, rel=1e-10), term
    logits = method.classifier(torch.from_numpy(rebuilt)).log_softmax(1)
    entropies = [-logits[b, int(y[b, v, u]), v, u].item() for b, v, u in np.ndindex(2, 4, 8) if y[b, v, u] != 255]
    assert ours["prompt"].item() == pytest.approx(np.mean(entropies), rel=1e-10)

    # the gradient of the student, by finite differences along a random direction
    gradient, direction = torch.autograd.grad(ours["bands"], student.c4)[0], normal(5, *student.c4.shape)

    def value(step):
        moved = reference.outputs({"c4": student.c4.detach() + step * direction})
        return method(moved, teacher, reference.batch_of(y))["bands"].item()

    assert (gradient * direction).sum().item() == pytest.approx((value(1e-7) - value(-1e-7)) / 2e-7, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------------ what they share


@pytest.mark.parametrize(("name", "training"), [("maskd", {"mask", "diversity"}), ("freekd", {"prompt", "diversity"})])
def test_tokens_learn_from_their_terms_alone(name, training):
    method = reference.build(name, student=LOGITS, teacher=WIDE).double()
    student, teacher = outputs(0, LOGITS, (8, 8), requires_grad=True), outputs(10, WIDE, (8, 8), requires_grad=False)
    for term, value in method(student, teacher, reference.batch_of(labels(2, 8, 8))).items():
        value.backward(retain_graph=True)
        reached = [x for x in (student.logits, student.aux, student.c4) if x.grad is not None]
        assert (method.tokens.grad is not None) == (term in training), term
        assert bool(reached) == (term not in training), term
        method.zero_grad()
        for x in reached:
            x.grad = None
    owned = {id(p) for group in method.own_optimizer().param_groups for p in group["params"]}
    assert owned == {id(p) for key, p in method.named_parameters() if not key.startswith("align")}


@pytest.mark.parametrize(("name", "training"), [("maskd", ("mask", "diversity")), ("freekd", ("prompt", "diversity"))])
def test_tokens_learn_in_the_first_quarter(name, training):
    method = reference.build(name, student=LOGITS, teacher=WIDE)
    assert method.factors(0.0) == method.factors(0.2499) == dict.fromkeys(training, 1.0)
    assert method.factors(0.25) == method.factors(1.0) == dict.fromkeys(training, 0.0)
    assert reference.build(name, student=LOGITS, teacher=WIDE, pretrain=0.0).factors(0.0) == dict.fromkeys(training, 0.0)


@pytest.mark.parametrize("name", ["maskd", "freekd"])
def test_training_the_tokens_drives_the_masks_apart(name):
    torch.manual_seed(0)
    method = reference.build(name, student=LOGITS, teacher=WIDE, tokens_lr=0.05)
    student, teacher = (reference.outputs({key: x.float() for key, x in vars(outputs(seed, c, (8, 8), requires_grad=False)).items()})
                        for seed, c in ((0, LOGITS), (10, WIDE)))  # fmt: skip
    optimizer, history = method.own_optimizer(), []
    for _ in range(30):
        terms = method(student, teacher, reference.batch_of(labels(2, 8, 8)))
        loss = sum(value for term, value in terms.items() if term in method.factors(0.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((terms["diversity"].item(), loss.item()))
    assert all(last < 0.9 * first for first, last in zip(history[0], history[-1], strict=True)), history


def test_overlap_of_equal_and_disjoint_masks():
    mask = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    assert overlap(mask.expand(2, 3, 4, 4)).item() == pytest.approx(1)
    halves = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 2, 1)
    assert overlap(halves).item() == 0
    assert overlap(torch.zeros(1, 2, 4, 4)).item() == 0


def test_small_masks_count_like_large_ones():
    error = torch.tensor([[1.0, 3.0], [5.0, 7.0]])[None]
    masks = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])[None]
    assert masked_mean(error, masks).item() == pytest.approx((1 + 4) / 2)
    assert masked_mean(error, torch.zeros(1, 2, 2, 2)).item() == 0


def test_entropy_without_labels_is_a_connected_zero():
    logits = normal(0, 1, 5, 3, 3).requires_grad_()
    value = label_entropy(logits, torch.full((1, 3, 3), 255, dtype=torch.uint8))
    value.backward()
    assert value.item() == 0 and logits.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("given", "message"), [({"tokens": 1}, "tokens 1: must be at least 2"), ({"pretrain": 1.5}, "pretrain 1.5: must be at least 0 and at most 1")]
)
@pytest.mark.parametrize("name", ["maskd", "freekd"])
def test_refusals(name, given, message):
    with pytest.raises(ValueError, match=f"--{name}-{message}"):
        reference.build(name, student=LOGITS, teacher=WIDE, **given)


def test_closer_to_the_teacher_loses_less():
    teacher, noise = normal(3, 1, 4, 8, 8), normal(4, 1, 4, 8, 8)
    _, target = wavelet(teacher, 2)
    masks = [token_masks(normal(5, 3, 4), bands.flatten(0, 1)) for bands in target]
    losses = []
    for step in (0.0, 0.5, 1.0, 2.0):
        _, bands = wavelet(teacher + step * noise, 2)
        losses.append(sum(band_distance(*level).item() for level in zip(bands, target, masks, strict=True)))
    assert losses == sorted(losses) and losses[0] == 0 and losses[1] > 0


@pytest.mark.parametrize("name", ["mgd", "ofd", "attnfd", "apd", "maskd", "freekd"])
def test_teacher_of_another_stride_is_resized_to_the_student(name):
    """Every method that compares maps directly; masks and random draws are of the student's size."""
    torch.manual_seed(0)
    fields = dict.fromkeys(("c4", "head", "p1", "p2", "p3", "p4"), 6) | {"logits": 5, "aux": 5}
    method = reference.build(name, student=fields, teacher=fields).double()
    student, teacher = outputs(0, fields, (8, 8), requires_grad=False), outputs(20, fields, (16, 16), requires_grad=False)
    resized = {key: torch.nn.functional.interpolate(x, (8, 8), mode="bilinear", align_corners=False) for key, x in vars(teacher).items()}
    batch = reference.batch_of(labels(2, 64, 64))
    ours, same = method(student, teacher, batch), method(student, reference.outputs(resized), batch)
    for term, value in ours.items():
        assert value.item() == pytest.approx(same[term].item(), rel=1e-12), term
