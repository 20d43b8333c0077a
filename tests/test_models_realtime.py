"""HRNet, OCRNet, STDC and DDRNet: the outputs of mmsegmentation's networks, brute force, and what they promise to distillation."""

import functools
import json

import numpy as np
import pytest
import torch
from torch import nn

from models import build_model
from models.ddrnet import PyramidPooling
from models.hrnet import join
from models.layers import PooledBatchNorm2d
from models.ocrnet import region_means
from models.weights import load_into
from tests.paths import GOLDEN
from tests.test_weights import recorded_value, save

RECORDED = json.loads((GOLDEN / "mmsegmentation.json").read_text())
POOLED = RECORDED.pop("dappm")
PAIRS = [("fcn", "hrnet_w18"), ("ocrnet", "hrnet_w18"), ("ocrnet", "resnet18_vanilla"), ("stdc", "stdc1"), ("stdc", "stdc2"),
         ("ddrnet", "ddrnet23_slim")]  # fmt: skip


@functools.cache
def network(name, backbone):
    """For tests that leave it as it is; HRNet takes a second to build."""
    torch.manual_seed(0)
    return build_model(name, backbone, 5).eval()


def image(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def normal(seed, shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("name", RECORDED)
def test_outputs_are_mmsegmentations(name):
    """With weights that follow from names and shapes. Its DDRNet has no bias in the first two convolutions."""
    entry = RECORDED[name]
    model = build_model(entry["model"], entry["backbone"], 19, normalization="none").eval()
    state = {key: recorded_value(key, tuple(value.shape)) for key, value in model.state_dict().items()}
    stem = {key: torch.zeros_like(value) for key, value in state.items() if name.startswith("ddrnet") and key.startswith("backbone.conv1")}
    model.load_state_dict(state | {key: value for key, value in stem.items() if key.endswith(("0.bias", "3.bias"))})
    with torch.no_grad():
        if "stages" in entry:  # its ResNet-18 is dilated by another rule: the head alone
            stages = [normal(seed, shape).abs() for seed, shape in zip(entry["stages"]["seeds"], entry["stages"]["shapes"], strict=True)]
            fields = model.head(model.head.extend(tuple(stages)))
            counted = model.head
        else:
            output = model(normal(entry["input"]["seed"], entry["input"]["shape"]), tuple(entry["outputs"]))
            fields = vars(output)
            counted = model
    # its detail head has a second class, which its loss does not need; its stem no bias
    extra = {"stdc1": 64 + 1, "stdc2": 64 + 1, "ddrnet_23_slim": -64}.get(name, 0)
    assert sum(p.numel() for p in counted.parameters()) == entry["parameters"] - extra
    for field, expected in entry["outputs"].items():
        compare(fields[field], expected)


def compare(tensor, expected):
    assert list(tensor.shape) == expected["shape"]
    values = torch.stack([tensor.mean(), tensor.std(), *tensor.flatten()[:6], *tensor.flatten()[-6:]])
    wanted = torch.tensor([expected["mean"], expected["std"], *expected["head"], *expected["tail"]])
    torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-5 * expected["std"])


# ---------------------------------------------------------------------------------------------------------------- HRNet, OCRNet


def test_join_brings_every_branch_to_stride_4():
    torch.manual_seed(0)
    branches = tuple(torch.randn(1, width, 17 // 2**n + 1, 8 // 2**n) for n, width in enumerate((2, 3, 4, 5)))
    joined = join(branches)
    assert joined.shape == (1, 14, 18, 8) and torch.equal(joined[:, :2], branches[0])
    for row, column in ((0, 0), (7, 3), (17, 7)):  # bilinear, centres of pixels, by hand for the second branch
        y, x = ((i + 0.5) * n / m - 0.5 for i, n, m in ((row, 9, 18), (column, 4, 8)))
        expected = torch.zeros(3)
        for i in range(9):
            for j in range(4):
                weight = max(0, 1 - abs(i - min(max(y, 0), 8))) * max(0, 1 - abs(j - min(max(x, 0), 3)))
                expected += weight * branches[1][0, :, i, j]
        torch.testing.assert_close(joined[0, 2:5, row, column], expected)


@pytest.mark.parametrize("name", ["fcn", "ocrnet"])
def test_every_branch_of_hrnet_reaches_the_logits(name):
    model = network(name, "hrnet_w18")
    torch.manual_seed(0)
    stages = [torch.rand(1, width, 16 >> n, 24 >> n) for n, width in enumerate(model.backbone.channels)]
    with torch.no_grad():
        whole = model.head(model.head.extend(tuple(stages)))["logits"]
        for number in range(4):
            changed = [stage + (n == number) * torch.rand_like(stage) for n, stage in enumerate(stages)]
            assert not torch.allclose(model.head(model.head.extend(tuple(changed)))["logits"], whole, atol=1e-4), number


def test_region_means_by_hand():
    torch.manual_seed(0)
    pixels, scores = torch.randn(2, 3, 2, 4), torch.randn(2, 5, 2, 4)
    means = region_means(pixels, scores)
    assert means.shape == (2, 3, 5, 1)
    for image_, region in ((0, 0), (1, 3)):
        weights = [torch.exp(scores[image_, region, y, x]) for y in range(2) for x in range(4)]
        positions = [pixels[image_, :, y, x] for y in range(2) for x in range(4)]
        expected = sum(w * p for w, p in zip(weights, positions, strict=True)) / sum(weights)
        torch.testing.assert_close(means[image_, :, region, 0], expected)


@pytest.mark.parametrize("output_stride", [8, 32])
def test_ocrnets_logits_depend_on_its_auxiliary_head(output_stride):
    torch.manual_seed(0)
    model = build_model("ocrnet", "resnet18", 5, output_stride=output_stride).eval()
    pixels = image(1, 3, 64, 96)
    with torch.no_grad():
        before = model(pixels).logits
        model.head.regions.classifier.weight.mul_(30)
        after = model(pixels).logits
    assert before.shape == (1, 5, 64 // output_stride, 96 // output_stride)
    assert not torch.allclose(before, after, atol=1e-4)
    assert model.aux_head is None and model.channels["aux"] == 5


# ----------------------------------------------------------------------------------------------------------------- STDC, DDRNet


@pytest.mark.parametrize(("name", "backbone", "heads"), [("stdc", "stdc1", {"aux", "aux2", "detail"}), ("ddrnet", "ddrnet23_slim", {"aux"})])
def test_auxiliary_heads_are_for_training_alone(name, backbone, heads):
    """Neither run nor needed for the logits: a network without them predicts the same."""
    model = build_model(name, backbone, 5).eval()
    assert set(model.auxiliary) == heads
    ran = []
    for field, head in model.auxiliary.items():
        head.register_forward_hook(lambda *_, field=field: ran.append(field))
    pixels = image(1, 3, 64, 96)
    with torch.no_grad():
        logits = model(pixels).logits
        assert not ran
        model(pixels, ("logits", *heads))
    assert set(ran) == heads and len(ran) == len(heads)
    bare = build_model(name, backbone, 5, aux=False, detail=False).eval()
    bare.head.load_state_dict(model.head.state_dict())
    bare.backbone.load_state_dict(model.backbone.state_dict())
    assert not bare.auxiliary and not {"aux", "aux2", "detail"} & set(bare.channels)
    with torch.no_grad():
        assert torch.equal(bare(pixels).logits, logits)


def test_auxiliary_heads_may_be_on_one_side_of_a_checkpoint(tmp_path):
    whole, bare = build_model("stdc", "stdc1", 5), build_model("stdc", "stdc1", 5, aux=False, detail=False)
    report = load_into(bare, save(tmp_path / "whole.pth", whole.state_dict()))
    assert all(f"unexpected  {name}_head.classifier.weight" in report for name in ("aux", "aux2", "detail"))
    assert "missing" in load_into(whole, save(tmp_path / "bare.pth", bare.state_dict()))


def test_detail_heads_where_there_are_none():
    with pytest.raises(ValueError, match="^pspnet has no detail head; possible with: stdc$"):
        build_model("pspnet", "resnet18", 5, detail=True)
    model = build_model("stdc", "stdc1", 5, detail=False)
    assert "detail" not in model.channels and model.config["detail"] is False
    with pytest.raises(ValueError, match="'detail' was asked for, but this model has no detail head; build it with detail=True"):
        model(image(1, 3, 32, 32), ("detail",))


def test_pyramid_of_ddrnet_on_a_map_that_all_windows_fit_in():
    """At the sizes of the other tests the three windows give one average alike."""
    pyramid = PyramidPooling().eval()
    pyramid.load_state_dict({key: recorded_value(key, tuple(value.shape)) for key, value in pyramid.state_dict().items()})
    with torch.no_grad():
        compare(pyramid(normal(POOLED["input"]["seed"], POOLED["input"]["shape"])), POOLED["outputs"]["pooled"])


def test_ddrnet_pools_what_has_one_position():
    """At 64x64 its deepest maps are 1x1, where a batch of one has no variance."""
    model = build_model("ddrnet", "ddrnet23_slim", 5).train()
    output = model(image(1, 3, 64, 64), ("logits", "aux"))
    (output.logits.square().mean() + output.aux.square().mean()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    deep = [module for module in model.backbone.layer5.modules() if isinstance(module, PooledBatchNorm2d)]
    assert len(deep) == 4


# ----------------------------------------------------------------------------------------------------------- what all four promise


@pytest.mark.parametrize(("name", "backbone"), PAIRS)
def test_stages_before_their_relu(name, backbone):
    model = network(name, backbone)
    stages = [f"{kind}{n}" for kind in "cp" for n in (1, 2, 3, 4)]
    with torch.no_grad():
        output = model(image(2, 3, 64, 64), stages)
    for n in (1, 2, 3, 4):
        after, before = getattr(output, f"c{n}"), getattr(output, f"p{n}")
        assert torch.equal(before.relu(), after)
        assert (before.min() < 0) == (name != "stdc"), "STDC's stages concatenate ReLUs, which is what p1..p4 are there"
    assert (model.norms == {}) == (not backbone.startswith("resnet"))


@pytest.mark.parametrize(("name", "backbone"), [pair for pair in PAIRS if not pair[1].startswith("resnet")])
def test_geometry_is_fixed(name, backbone):
    with pytest.raises(ValueError, match=f"output stride 8 is not possible with {backbone}; choose one of 32"):
        build_model(name, backbone, 5, output_stride=8)
    with pytest.raises(ValueError, match=f"deeplabv3 is not built on {backbone}; possible: resnet18, "):
        build_model("deeplabv3", backbone, 5)


@pytest.mark.parametrize(("name", "backbone"), [PAIRS[0], PAIRS[2], PAIRS[3], PAIRS[5]])
def test_bfloat16_channels_last_and_four_planes(name, backbone):
    """All at once, on an odd size: near the logits in float32, and every parameter gets a finite gradient in training."""
    torch.manual_seed(0)
    model = build_model(name, backbone, 5, in_channels=4).eval()
    needs = [field for field in ("logits", "aux", "aux2", "detail") if field in model.channels]
    pixels = image(2, 4, 65, 97)
    with torch.no_grad():
        reference = model(pixels, needs)
    model, pixels = model.to(memory_format=torch.channels_last), pixels.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            output = model(pixels, needs)
        trained = model.train()(pixels, needs)
    for field in needs:
        expected, scores = getattr(reference, field), getattr(output, field)
        assert scores.dtype == torch.bfloat16 and scores.shape == expected.shape
        assert (scores.float() - expected).norm() < 0.05 * expected.norm(), field
    sum(getattr(trained, field).float().square().mean() for field in needs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow  # tracing takes a minute for HRNet
@pytest.mark.parametrize(("name", "backbone"), [pair for pair in PAIRS if pair[1] != "stdc2"])
def test_compiled_whole(name, backbone):
    model = network(name, backbone)
    pixels = image(1, 3, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(pixels, ("logits", "c4"))
        plain = model(pixels, ("logits", "c4"))
    assert torch.equal(compiled.logits, plain.logits) and torch.equal(compiled.c4, plain.c4)


@pytest.mark.parametrize(("name", "backbone"), [pair for pair in PAIRS if pair[1] != "stdc2"])
def test_dropout_is_where_the_docstring_says(name, backbone):
    has = isinstance(network(name, backbone).head.dropout, nn.Dropout)
    assert has == (name == "stdc" or backbone == "resnet18_vanilla")
