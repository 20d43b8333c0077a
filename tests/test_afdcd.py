"""Af-DCD: the published values in every form of its parts, weights, masks and refusals."""

import pytest
import torch

from losses import projection
from losses.projection import centre_mask, random_mask
from tests import reference


@pytest.mark.parametrize("form,front", [
    ("plain", "plain"), ("auto", "folded"), ("auto", "visible"), pytest.param("fused", "folded", marks=pytest.mark.slow),  # compiled
])  # fmt: skip
@pytest.mark.parametrize("name", reference.names("afdcd/"))
def test_released_values(monkeypatch, name, form, front):
    monkeypatch.setattr(projection, "front_costs", lambda *arguments: {front: 0})
    spec, terms = reference.LOSSES[name]["spec"], reference.LOSSES[name]["terms"]
    given = reference.inputs(spec)
    method = reference.build(
        "afdcd", student={"c4": spec["student_channels"]}, teacher={"c4": spec["teacher_channels"]}, dataset="citys", kd_weight=0.0,
        groups=spec["channel_groups"], pool=spec["pool_size"], tau=spec["tau"],
        **({"mask": "random", "mask_ratio": spec["mask_ratio"]} if spec["rand_mask"] else {"mask": "centre"}),
        projector="enhanced" if spec["enhanced_projector"] else "plain", contrast=form,
    )  # fmt: skip
    reference.fill(method)
    method.uniform = lambda batch, *shape: given.noise
    batch = reference.batch_of(torch.zeros(spec["B"], 8 * spec["H"], 8 * spec["W"], dtype=torch.uint8))
    ours = method(reference.outputs({"c4": given.student_feature}), reference.outputs({"c4": given.teacher_feature}), batch)
    assert ours.keys() == {"fd", "contrast"}
    tensors = [given.student_feature, *method.parameters()]
    reference.check(ours["fd"], terms["fd"], tensors)
    reference.check(ours["contrast"], terms["contrast" if "contrast" in terms else "ctr"], tensors)


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
    with pytest.raises(ValueError, match="mask-ratio 1.0"):
        reference.build("afdcd", student={"c4": 16}, teacher={"c4": 32}, mask_ratio=1.0)
