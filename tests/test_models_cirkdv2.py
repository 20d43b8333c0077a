"""The networks that CIRKDv2 adds: MobileNetV3, UPerNet, SegFormer."""

import math

import pytest
import torch
from torch import nn

from models import build_model, count_macs, count_parameters
from models.backbones import build_backbone
from models.segformer import Attention, MixFFN


def image(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


# ------------------------------------------------------------------------------------------------------------------ MobileNetV3


@pytest.mark.parametrize(
    ("name", "stride", "expected"),
    [
        ("mobilenetv3_small", 8, [1] * 3 + [2] * 5 + [4] * 3),
        ("mobilenetv3_small", 16, [1] * 8 + [2] * 3),
        ("mobilenetv3_large", 8, [1] * 6 + [2] * 6 + [4] * 3),
    ],
)
def test_dilations_of_mobilenetv3(name, stride, expected):
    """Of the depthwise convolutions; the one that lost its stride has its stage's dilation already."""
    with torch.device("meta"):
        backbone = build_backbone(name, stride)
    depthwise = [module for module in backbone.modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    assert [conv.dilation[0] for conv in depthwise] == expected
    assert all(conv.padding[0] == conv.dilation[0] * (conv.kernel_size[0] // 2) for conv in depthwise)


# ---------------------------------------------------------------------------------------------------------------------- UPerNet


def test_upernet_has_no_dropout_before_its_classifier():
    model = build_model("upernet_lite", "mobilenetv3_small", 5).train()
    output = model(image(2, 3, 64, 64), ("head", "logits"))
    assert torch.equal(model.head.classifier(output.head), output.logits)


@pytest.mark.parametrize("output_stride", [8, 32])
def test_logits_of_upernet_have_twice_the_stride_of_c1(output_stride):
    model = build_model("upernet_lite", "mobilenetv3_small", 5, output_stride=output_stride).eval()
    with torch.no_grad():
        assert model(image(1, 3, 65, 97)).logits.shape == (1, 5, 9, 13) and model.stride == 8


def test_every_stage_reaches_upernets_logits():
    torch.manual_seed(0)
    model = build_model("upernet_lite", "resnet18", 5).eval()
    with torch.no_grad():
        stages = list(model.backbone(model.normalize(image(1, 3, 64, 64))))
        whole = model.head(stages)["logits"]
        for number in range(4):
            without = [torch.zeros_like(stage) if i == number else stage for i, stage in enumerate(stages)]
            assert not torch.allclose(model.head(without)["logits"], whole)


# -------------------------------------------------------------------------------------------------------------------- SegFormer


@pytest.mark.parametrize("reduction", [1, 2])
def test_attention_by_loops(reduction):
    torch.manual_seed(1)
    width, heads = 6, 3
    layer = Attention(width, heads, reduction).double()
    x = torch.randn(2, 4, 6, width, dtype=torch.float64)
    result = layer(x)
    for b in range(2):
        keys = x[b].reshape(-1, width)
        if reduction > 1:
            squares = []
            for i in range(0, 4, 2):
                for j in range(0, 6, 2):
                    patch = x[b, i : i + 2, j : j + 2].permute(2, 0, 1)  # (C, 2, 2)
                    y = (layer.sr.weight * patch).sum((1, 2, 3)) + layer.sr.bias
                    squares.append((y - y.mean()) / (y.var(correction=0) + 1e-5).sqrt())
            keys = torch.stack(squares)
        pairs = keys @ layer.kv.weight.T + layer.kv.bias
        for i in range(4):
            for j in range(6):
                q = layer.q.weight @ x[b, i, j] + layer.q.bias
                mixed = []
                for head in range(heads):
                    own = slice(2 * head, 2 * head + 2)
                    scores = torch.stack([q[own] @ pair[:width][own] for pair in pairs]) / math.sqrt(2)
                    mixed.append(sum(p * pair[width:][own] for p, pair in zip(scores.softmax(0), pairs, strict=True)))
                expected = layer.proj.weight @ torch.cat(mixed) + layer.proj.bias
                torch.testing.assert_close(result[b, i, j], expected)


def test_mix_ffn_by_hand():
    """A depthwise kernel of a single 1 at the upper left shifts the map by one position, with zeros at the border."""
    torch.manual_seed(1)
    layer = MixFFN(3).double()
    with torch.no_grad():
        layer.dwconv.weight.zero_()
        layer.dwconv.weight[:, :, 0, 0] = 1
        layer.dwconv.bias.zero_()
    x = torch.randn(1, 3, 4, 3, dtype=torch.float64)
    shifted = torch.zeros(1, 3, 4, 12, dtype=torch.float64)
    shifted[:, 1:, 1:] = layer.fc1(x)[:, :-1, :-1]
    gelu = 0.5 * shifted * (1 + torch.erf(shifted / math.sqrt(2)))
    torch.testing.assert_close(layer(x), layer.fc2(gelu))


def test_whole_paths_are_dropped_in_training():
    model = build_model("segformer", "mit_b0", 5)
    rates = [block.drop_path.p for stage in model.backbone.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i / 7 for i in range(8)])
    block = model.backbone.stages[3].blocks[1]
    x = torch.randn(400, 1, 1, 256)
    torch.manual_seed(0)
    with torch.no_grad():
        attention = block.train().attn(block.norm1(x))
        block.mlp = nn.Identity()
        block.norm2 = nn.Identity()
        block.drop_path.p = 0.25
        path = block(x)
        # x + a drop(attention), then the same map again as the second path: each factor is 0 or 1 / 0.75, per picture
        factors = {round((path[i] / x[i]).mean().item(), 2) for i in range(400) if torch.allclose(path[i] / x[i], (path[i] / x[i]).mean(), atol=1e-3)}
        block.eval()
        assert torch.equal(block(x), 2 * (x + attention))
    assert factors == {1.0, round(1 + 1 / 0.75, 2)}  # where attention was dropped: its path alone is left


PUBLISHED = [  # table 1 of the paper: parameters in M and multiply-adds in G of one 3x512x512 image, ADE20K's 150 classes
    ("mit_b0", 3.8, 8.4),
    ("mit_b1", 13.7, 15.9),
    pytest.param("mit_b2", 27.5, 62.4, marks=pytest.mark.slow),
    pytest.param("mit_b3", 47.3, 79.0, marks=pytest.mark.slow),
    pytest.param("mit_b4", 64.1, 95.7, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("backbone", "parameters", "gmac"), PUBLISHED)
def test_costs_of_segformer(backbone, parameters, gmac):
    with torch.device("meta"):
        model = build_model("segformer", backbone, 150)
    assert round(count_parameters(model) / 1e6, 1) == parameters
    assert count_macs(model, 512, 512) / 1e9 == pytest.approx(gmac, rel=3e-3)


def test_cost_of_segformer_as_in_the_cirkd_line():
    """3.72 M, 6.8 G with 19 classes: without the products of queries, keys and values."""
    with torch.device("meta"):
        model = build_model("segformer", "mit_b0", 19)
    sizes = [(128, 16, 32, 2), (64, 16, 64, 2), (32, 16, 160, 2), (16, 16, 256, 2)]  # queries' side, keys' side, channels, blocks
    products = sum(2 * (n * m) ** 2 * channels * blocks for n, m, channels, blocks in sizes)
    assert f"{count_parameters(model) / 1e6:.2f}" == "3.72"
    assert f"{(count_macs(model, 512, 512) - products) / 1e9:.1f}" == "6.8"


def test_segformer_runs_channels_last_and_in_bfloat16():
    torch.manual_seed(0)
    model, pixels = build_model("segformer", "mit_b0", 5).eval(), image(2, 3, 65, 97)
    with torch.no_grad():
        plain = model(pixels, ("logits", "c3"))
        other = model.to(memory_format=torch.channels_last)(pixels.contiguous(memory_format=torch.channels_last), ("logits", "c3"))
        torch.testing.assert_close(other.logits, plain.logits)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(pixels, ("logits", "c3"))
    assert low.logits.dtype == low.c3.dtype == torch.bfloat16
    assert (low.logits - plain.logits).abs().max() < 0.05 * plain.logits.abs().max()


@pytest.mark.slow
def test_segformer_compiles_into_one_graph():
    model, pixels = build_model("segformer", "mit_b0", 5).eval(), image(1, 3, 33, 49)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(pixels)
        assert torch.equal(compiled.logits, model(pixels).logits)


def test_segformer_has_one_stride():
    with pytest.raises(ValueError, match="output stride 8 is not possible with mit_b0; choose one of 32"):
        build_model("segformer", "mit_b0", 5, output_stride=8)
    with pytest.raises(ValueError, match="segformer is not built on resnet18; possible: mit_b0, mit_b1"):
        build_model("segformer", "resnet18", 5)
    with pytest.raises(ValueError, match="pspnet is not built on mit_b0"):
        build_model("pspnet", "mit_b0", 5)
