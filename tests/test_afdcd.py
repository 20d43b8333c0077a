"""Af-DCD: the published values, and a brute-force loop over anchors for every variant."""

import math

import pytest
import torch

from losses.afdcd import centre_mask, contrast, random_mask
from tests import reference


@pytest.mark.parametrize("name", reference.names("afdcd/"))
def test_released_values(name):
    spec, terms = reference.LOSSES[name]["spec"], reference.LOSSES[name]["terms"]
    given = reference.inputs(spec)
    method = reference.build(
        "afdcd", student={"c4": spec["student_channels"]}, teacher={"c4": spec["teacher_channels"]}, dataset="citys", kd_weight=0.0,
        groups=spec["channel_groups"], pool=spec["pool_size"], tau=spec["tau"], mask_ratio=spec["mask_ratio"],
        mask="random" if spec["rand_mask"] else "centre", projector="enhanced" if spec["enhanced_projector"] else "plain",
    )  # fmt: skip
    reference.fill(method)
    method.uniform = lambda batch, *shape: given.noise
    batch = reference.batch_of(torch.zeros(spec["B"], 8 * spec["H"], 8 * spec["W"], dtype=torch.uint8))
    ours = method(reference.outputs({"c4": given.student_feature}), reference.outputs({"c4": given.teacher_feature}), batch)
    assert ours.keys() == {"fd", "contrast"}
    tensors = [given.student_feature, *method.parameters()]
    reference.check(ours["fd"], terms["fd"], tensors)
    reference.check(ours["contrast"], terms["contrast" if "contrast" in terms else "ctr"], tensors)


def brute_force(generated, teacher, patch, groups, tau, negatives, distance):
    """One anchor at a time, straight from the description of the loss."""
    batch, channels, height, width = generated.shape
    if negatives == "spatial":
        groups = 1
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
    return torch.stack(losses).mean() * groups


@pytest.mark.parametrize("negatives", ["released", "omni", "channel", "spatial"])
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_contrast_against_brute_force(negatives, distance):
    generator = torch.Generator().manual_seed(4)
    generated = torch.randn(2, 6, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)  # not whole patches: 5 -> 4, 7 -> 6
    teacher = torch.randn(2, 6, 5, 7, generator=generator, dtype=torch.float64)
    ours = contrast(generated, teacher, pool=0, patch=2, groups=3, tau=0.5, negatives=negatives, distance=distance)
    theirs = brute_force(generated, teacher, 2, 3, 0.5, negatives, distance)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, generated)[0] for loss in (ours, theirs)), rtol=1e-8, atol=1e-12)


def test_mean_form_is_the_released_form_divided():
    x, t = torch.randn(2, 32, 16, 16), torch.randn(2, 32, 16, 16)
    assert contrast(x, t, mean=True).item() * 16 == pytest.approx(contrast(x, t).item(), rel=1e-6)


def test_mean_weights_equal_the_published_ones_at_the_published_size():
    """2048 channels at stride 8 of the released crop; 16 groups."""
    crops = {"citys": (512, 1024), "voc": (512, 512), "camvid": (360, 360), "ade20k": (512, 512), "coco_stuff_164k": (512, 512)}
    for dataset, (height, width) in crops.items():
        sums, means = ({
            term: reference.build("afdcd", student={"c4": 16}, teacher={"c4": 32}, dataset=dataset, normalise=form).weights[term]
            for term in ("fd", "contrast")
        } for form in ("released", "mean"))  # fmt: skip
        assert means["fd"] == pytest.approx(sums["fd"] * 2048 * (height // 8) * (width // 8), rel=4e-3), dataset
        assert means["contrast"] == pytest.approx(sums["contrast"] * 16), dataset


def test_closer_to_the_teacher_loses_less():
    teacher = torch.randn(1, 32, 8, 8)
    noise = torch.randn(1, 32, 8, 8)
    losses = [contrast(teacher + step * noise, teacher, pool=0, groups=4).item() for step in (0.0, 0.3, 1.0, 3.0)]
    assert losses == sorted(losses) and losses[0] < losses[-1]


def test_masks():
    hole = centre_mask(45, 64)[0, 0]
    assert hole[15:30, 21:42].sum() == 0 and hole.sum() == 45 * 64 - 15 * 21
    noise = torch.rand(1, 1, 200, 200, generator=torch.Generator().manual_seed(0))
    kept = random_mask(noise, 0.75)
    assert set(kept.unique().tolist()) == {0.0, 1.0} and kept.mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(kept.bool(), noise <= 0.25)


def test_hidden_positions_do_not_reach_the_loss():
    """With a projector that sees 3x3 neighbours twice, a hidden position may matter to nothing but through its mask."""
    method = reference.build("afdcd", student={"c4": 16, "logits": 5}, teacher={"c4": 32, "logits": 5}, kd_weight=0.0, mask="centre")
    feature = torch.randn(1, 16, 12, 12, requires_grad=True)
    batch = reference.batch_of(torch.zeros(1, 96, 96, dtype=torch.uint8))
    sum(method(reference.outputs({"c4": feature}), reference.outputs({"c4": torch.randn(1, 32, 12, 12)}), batch).values()).backward()
    assert feature.grad[..., 4:8, 4:8].abs().max() == 0 and feature.grad[..., :4, :].abs().max() > 0


def test_same_noise_on_any_number_of_ranks():
    method = reference.build("afdcd", student={"c4": 16, "logits": 5}, teacher={"c4": 32, "logits": 5}, global_batch=4)
    target = torch.zeros(4, 64, 64, dtype=torch.uint8)
    whole = method.uniform(reference.batch_of(target), 1, 8, 8)
    halves = [method.uniform(reference.batch_of(target[:2], offset=offset, global_size=4), 1, 8, 8) for offset in (0, 2)]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, method.uniform(reference.batch_of(target, step=4), 1, 8, 8))


def test_equal_widths_need_no_alignment():
    method = reference.build("afdcd", student={"c4": 32, "logits": 5}, teacher={"c4": 32, "logits": 5})
    assert isinstance(method.align, torch.nn.Identity)


def test_refusals():
    with pytest.raises(ValueError, match="--afdcd-groups 16: must divide the teacher's 40 channels"):
        reference.build("afdcd", student={"c4": 16}, teacher={"c4": 40})
    with pytest.raises(ValueError, match="smaller than a 4x4 patch"):
        contrast(torch.randn(1, 32, 12, 12), torch.randn(1, 32, 12, 12))
    with pytest.raises(ValueError, match="mask-ratio 1.0"):
        reference.build("afdcd", student={"c4": 16}, teacher={"c4": 32}, mask_ratio=1.0)


def test_contrast_is_computed_in_float32_under_autocast():
    x, t = torch.randn(1, 64, 8, 8) * 3, torch.randn(1, 64, 8, 8) * 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrast(x, t, pool=0)
    assert loss.dtype == torch.float32 and loss.item() == contrast(x, t, pool=0).item() and math.isfinite(loss.item())
