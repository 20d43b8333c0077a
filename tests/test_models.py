"""Models: shapes, strides, costs, the output contract, normalisation."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import BACKBONES, FIELDS, MODELS, SegOutput, backbones_of, build_model, count_macs, count_parameters, list_models
from models.__main__ import row
from models.backbones import build_backbone, on_meta, output_strides
from models.segformer import Attention
from utils.metrics import Inference

PAIRS = list_models()
FIRST = {next(pair for pair in PAIRS if pair[0] == name) for name in MODELS}  # every backbone is tested alone
ALL = [pytest.param(*pair, marks=() if pair in FIRST else pytest.mark.slow) for pair in PAIRS]


def meta_model(*args, **kwargs):
    with torch.device("meta"):
        return build_model(*args, **kwargs)


def image(*shape, dtype=torch.uint8):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3)).to(dtype)


# ------------------------------------------------------------------------------------------------------------------- backbones


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_strides_and_channels(name, output_stride):
    if output_stride not in output_strides(name):
        with pytest.raises(ValueError, match=f"output stride {output_stride} is not possible with {name}; choose one of "):
            build_backbone(name, output_stride)
        return
    with torch.device("meta"):
        backbone = build_backbone(name, output_stride)
    stages = on_meta(backbone, torch.empty(1, 3, 128, 192, device="meta"))
    for stage, channels, stride in zip(stages[:4], backbone.channels, (4, 8, 16, 32), strict=True):
        stride = min(stride, output_stride)
        assert stage.shape == (1, channels, 128 // stride, 192 // stride)


def test_backbone_that_ignores_its_stride_is_caught(monkeypatch):
    monkeypatch.setitem(BACKBONES, "stubborn", lambda output_stride, in_channels: BACKBONES["resnet18"](32, in_channels))
    with pytest.raises(AssertionError, match="stubborn at stride 8"):
        build_backbone("stubborn", 8)


def test_dilations():
    """The convolution that lost its stride has half of its stage's dilation; no multi-grid."""
    with torch.device("meta"):
        basic, bottleneck, mobile = (build_backbone(name) for name in ("resnet18", "resnet50", "mobilenetv2"))

    def rates(*layers):
        convs = (module for layer in layers for module in layer.modules() if isinstance(module, nn.Conv2d))
        return [conv.dilation[0] for conv in convs if conv.kernel_size == (3, 3)]

    assert rates(basic.layer2, basic.layer3, basic.layer4) == [1, 1, 1, 1] + [1, 2, 2, 2] + [2, 4, 4, 4]
    assert rates(bottleneck.layer3, bottleneck.layer4) == [1, 2, 2, 2, 2, 2] + [2, 4, 4]
    assert rates(mobile.features[1:]) == [1] * 7 + [2] * 7 + [4] * 3


def test_impossible_stride():
    with pytest.raises(ValueError, match="output stride 12 is not possible with resnet18; choose one of 8, 16, 32"):
        build_model("pspnet", "resnet18", 19, output_stride=12)


# ------------------------------------------------------------------------------------------------------------------------ costs


PUBLISHED = [  # model, backbone, head width (None: the default), parameters M, GMAC of 3x512x512; 19 classes, auxiliary head included
    ("deeplabv3", "resnet101", None, "61.12", "257.9"),
    ("deeplabv3", "resnet18", None, "13.61", "64.7"),
    ("deeplabv3", "resnet101", 512, "79.08", "329.3"),
    ("deeplabv3", "resnet18", 512, "22.76", "101.4"),
    ("pspnet", "resnet18", None, "12.92", "61.1"),
    ("pspnet", "resnet101", None, "68.07", "271.4"),
    ("pspnet", "resnet101", 256, "58.63", "232.7"),
    ("deeplabv3", "mobilenetv2", None, "3.23", "13.3"),
    ("pspnet", "mobilenetv2", None, "2.65", "10.7"),
    ("deeplabv3", "mobilenetv3_small", None, "3.30", "11.3"),
    ("deeplabv3", "mobilenetv3_large", None, "6.77", "21.1"),
    ("pspnet", "mobilenetv3_small", None, "2.59", "7.4"),
    ("pspnet", "mobilenetv3_large", None, "6.11", "15.2"),
    ("upernet_lite", "resnet18", None, "16.57", "79.0"),
    ("upernet", "resnet18", None, "41.09", "206.9"),
]


@pytest.mark.parametrize(("name", "backbone", "width", "parameters", "gmac"), PUBLISHED)
def test_costs_are_the_published_ones(name, backbone, width, parameters, gmac):
    model = meta_model(name, backbone, 19, head_width=width)
    assert f"{count_parameters(model) / 1e6:.2f}" == parameters
    assert f"{count_macs(model, 512, 512, needs=model.channels) / 1e9:.1f}" == gmac


def test_costs_of_the_real_time_networks():
    """As their papers print them: DDRNet-23-slim 5.7 M and 36.3 G at 1024x2048 in deployment; the classification networks STDC1 8.4 M and
    813 M, STDC2 12.5 M and 1446 M at 224x224, of which the backbones here are the part before the last 1x1 convolution and the two
    linear layers. Their counts of operations are 0.9 and 0.6 % larger: ours has convolutions alone."""
    model = meta_model("ddrnet", "ddrnet23_slim", 19, aux=False)
    assert (f"{count_parameters(model) / 1e6:.1f}", f"{count_macs(model, 1024, 2048) / 1e9:.1f}") == ("5.7", "36.3")
    for name, parameters, operations in (("stdc1", "8.4", 813e6), ("stdc2", "12.5", 1446e6)):
        with torch.device("meta"):
            backbone, image = build_backbone(name, 32), torch.empty(1, 3, 224, 224)
        last, first_linear, second_linear = 1024 * 1024, 1024 * 1024, 1024 * 1000
        norms = 2 * (2 * 1024)  # behind the last convolution and the first linear layer
        assert f"{(count_parameters(backbone) + last + first_linear + second_linear + norms) / 1e6:.1f}" == parameters
        with FlopCounterMode(display=False) as counter:
            on_meta(backbone, image)
        counted = counter.get_total_flops() // 2 + 7 * 7 * last + first_linear + second_linear
        assert 0.99 * operations < counted < operations


def test_macs_of_a_full_image_without_the_auxiliary_head():
    model = meta_model("deeplabv3", "resnet18", 19)
    assert f"{count_macs(model, 1024, 2048, needs=model.channels) / 1e9:.1f}" == "517.5"
    aux = 128 * 256 * (256 * 64 * 9 + 64 * 19)  # 3x3 to a quarter of 256 channels, then 1x1
    assert count_macs(model, 1024, 2048) == count_macs(model, 1024, 2048, needs=model.channels) - aux


def test_counting_leaves_the_model_alone():
    model = build_model("pspnet", "mobilenetv2", 5)
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    count_macs(model, 65, 97)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state()) and model.training


def test_listing():
    """A line of models/README.md against what the listing said of the published network."""
    cells = [cell.strip() for cell in row("deeplabv3", "resnet18").strip("|").split("|")]
    assert cells[:-1] == ["resnet18", "8", "13.61", "64.7", "64.1", "aux", "128", "512", "256", "128", "64"]


# ----------------------------------------------------------------------------------------------------------------------- output


def test_output_has_names_and_no_positions():
    output = SegOutput(logits=torch.zeros(1, 5, 2, 3), head=torch.zeros(1, 8, 2, 3))
    with pytest.raises(TypeError):
        output[-1]
    with pytest.raises(TypeError):
        list(output)
    with pytest.raises(TypeError):
        _, _ = output
    with pytest.raises(AttributeError, match="immutable"):
        output.logits = torch.zeros(1)
    with pytest.raises(AttributeError, match="immutable"):
        del output.head
    with pytest.raises(TypeError, match="no field 'logit'; possible: logits"):
        SegOutput(logit=torch.zeros(1))
    assert copy.deepcopy(output).computed == ("logits", "head") and "logits=(1, 5, 2, 3)" in repr(output)


def test_reading_what_was_not_computed():
    output = SegOutput(head=torch.zeros(1), logits=torch.zeros(1))
    with pytest.raises(AttributeError) as error:
        _ = output.c4
    assert str(error.value) == "'c4' was not computed (computed: logits, head); a method lists what it reads in `needs`"
    assert not hasattr(output, "aux")


# where it is not c3's
AUX_STRIDES = {("ocrnet", "hrnet_w18"): 4, ("lraspp", "mobilenetv3_large_vanilla"): 8, ("stdc", "stdc1"): 8, ("ddrnet", "ddrnet23_slim"): 8}


SMALLEST = {"segformer": "mit_b0", "stdc": "stdc1", "ddrnet": "ddrnet23_slim"}


@pytest.mark.parametrize("name", MODELS)
def test_pictures_down_to_one_pixel_are_predicted(name):
    """Whole, as windows, and scaled down; below 29 pixels the released SegFormer has no key to attend to."""
    model = build_model(name, SMALLEST.get(name, "mobilenetv2"), 5, head_width=8).eval()
    for size in ((1, 1), (1, 40), (40, 3), (28, 28), (29, 28)):
        with torch.no_grad():
            assert torch.isfinite(model(torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)).logits).all(), size
    picture = torch.randint(0, 256, (1, 3, 40, 33), dtype=torch.uint8)
    with torch.no_grad():
        for inference in (Inference("slide", (16, 9)), Inference(scales=(0.1, 1.0), flip=True)):
            assert inference(model, picture).shape == (1, 40, 33)


def test_a_small_map_of_segformer_is_padded_as_by_hand():
    """A map of 5x9 reduced by 8: one row of one key, of the map with zeros below and beside it; maps that need none are not touched."""
    attention = Attention(8, 2, 8).eval()
    x = torch.randn(2, 5, 9, 8)
    whole = torch.zeros(2, 8, 9, 8)
    whole[:, :5] = x
    kernel, bias = attention.sr.weight, attention.sr.bias  # (8, 8, 8, 8): the ninth column is out of reach
    key = attention.norm(torch.einsum("bhwc,dchw->bd", whole[:, :, :8], kernel) + bias)
    value = attention.kv(key)[:, 8:]  # one key: attention is its value, whatever asks
    torch.testing.assert_close(attention(x), attention.proj(value)[:, None, None].expand(2, 5, 9, 8))
    assert attention.padded(large := torch.randn(1, 8, 8, 8)) is large


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("deeplabv3", "resnet18"),
        ("pspnet", "resnet18_vanilla"),
        ("pspnet", "mobilenetv2"),
        ("upernet_lite", "mobilenetv3_small"),
        ("segformer", "mit_b0"),
        ("deeplabv3plus", "resnet18_vanilla"),
        ("lraspp", "mobilenetv3_large_vanilla"),
        ("fcn", "mobilenetv2"),
        ("fcn", "hrnet_w18"),
        ("ocrnet", "resnet18_vanilla"),
        ("ocrnet", "hrnet_w18"),
        ("stdc", "stdc1"),
        ("ddrnet", "ddrnet23_slim"),
    ],
)
@pytest.mark.parametrize("aux", [True, False])
def test_every_field_has_the_declared_shape(name, backbone, aux):
    if name == "ocrnet" and not aux:
        with pytest.raises(ValueError, match="ocrnet reads its auxiliary head to predict; it cannot be built with aux=False"):
            build_model(name, backbone, 5, aux=aux)
        return
    model = build_model(name, backbone, 5, aux=aux).eval()
    own = {"aux2": aux and name == "stdc", "detail": name == "stdc", "aux": aux}
    needs = [field for field in FIELDS if own.get(field, True)]
    assert sorted(needs) == sorted(model.channels)
    strides = {"aux": 16, "aux2": 16, "detail": 8}
    if (name, backbone) in AUX_STRIDES:
        strides["aux"] = AUX_STRIDES[name, backbone]
    with torch.no_grad():
        output = model(image(2, 3, 65, 97), needs)
    assert output.computed == tuple(needs)
    for field in needs:
        deepest = model.config["output_stride"]
        stride = min(2 << int(field[1]), deepest) if field[0] in "cp" else min(strides.get(field, model.stride), deepest)
        assert getattr(output, field).shape == (2, model.channels[field], -(-65 // stride), -(-97 // stride)), field


@pytest.mark.parametrize(("name", "backbone"), ALL)
def test_a_cityscapes_picture(name, backbone):
    """1024x2048, without arithmetic: the declared channels, stages at strides 4, 8, 16, 32 but none above the output stride, logits at the
    declared stride, `head` as large as they."""
    model = meta_model(name, backbone, 19).eval()
    output = on_meta(model, torch.empty(1, 3, 1024, 2048, dtype=torch.uint8, device="meta"), needs=model.channels)
    assert model.stride in (4, 8, 16) and set(output.computed) == set(model.channels)
    strides = {f"{kind}{n}": min(2 << n, model.config["output_stride"]) for kind in "cp" for n in (1, 2, 3, 4)}
    strides |= {"logits": model.stride, "head": model.stride}
    for field, stride in strides.items():
        assert getattr(output, field).shape == (1, model.channels[field], 1024 // stride, 2048 // stride), field
    for field in set(output.computed) - set(strides):  # of auxiliary heads
        height, width = getattr(output, field).shape[2:]
        assert width == 2 * height and height in (256, 128, 64), field


def test_only_what_is_needed_is_computed():
    model = build_model("deeplabv3", "resnet18", 5).eval()
    ran = []
    model.head.register_forward_hook(lambda *_: ran.append("head"))
    model.aux_head.register_forward_hook(lambda *_: ran.append("aux"))
    pixels = image(1, 3, 32, 32)
    for needs, expected in [(("c4",), []), (("logits",), ["head"]), (("head", "c1"), ["head"]), (("aux",), ["aux"])]:
        ran.clear()
        assert set(model(pixels, needs).computed) == set(needs) and ran == expected


def test_refused_needs():
    model = build_model("pspnet", "mobilenetv2", 5)
    with pytest.raises(ValueError, match="no auxiliary head; build it with aux=True"):
        model(image(1, 3, 32, 32), ("aux",))
    with pytest.raises(ValueError, match="no output is called 'c5'; possible: logits, head"):
        model(image(1, 3, 32, 32), ("logits", "c5"))


def test_compiled_model_returns_the_same():
    model = build_model("deeplabv3", "mobilenetv2", 5).eval()
    pixels = image(2, 3, 32, 32)
    output = torch.compile(model, backend="eager")(pixels, ("logits", "c4"))
    assert output.computed == ("logits", "c4")
    assert torch.equal(output.logits, model(pixels).logits)
    with pytest.raises(TypeError):
        output[-1]


# --------------------------------------------------------------------------------------------------------- heads, batches of one


def test_head_before_and_after_dropout():
    models = [build_model("pspnet", "resnet18", 5, head_after_dropout=after) for after in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    pixels = image(2, 3, 64, 64)
    outputs = []
    for model in models:
        torch.manual_seed(0)
        outputs.append(model.train()(pixels, ("head", "logits")))
    before, after = outputs
    assert torch.equal(before.logits, after.logits)  # the classifier always reads behind the dropout
    kept = after.head != 0
    torch.testing.assert_close(after.head[kept], before.head[kept] / 0.9)
    assert 0.05 < (after.head[before.head != 0] == 0).float().mean() < 0.15
    models[1].load_state_dict(models[0].state_dict())  # each has trained its running statistics
    before, after = (model.eval()(pixels, ("head",)).head for model in models)
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_one_trains(name):
    """Maps pooled to 1x1 have one value per channel then, on which torch's BatchNorm raises; running statistics learn nothing of it."""
    model = build_model(name, backbones_of(name)[0], 5).train()
    pooled = set()
    hooks = [
        module.register_forward_pre_hook(lambda norm, args: pooled.add(norm) if torch.allclose(args[0], args[0][:1, :, :1, :1], atol=1e-5) else None)
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    needs = [field for field in ("logits", "aux", "aux2", "detail") if field in model.channels]
    output = model(image(1, 3, 33, 49), needs)
    sum(getattr(output, field).square().mean() for field in needs).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean)) for norm in pooled)
    if name in ("deeplabv3", "pspnet", "upernet"):
        assert len(pooled) == 1
    model(image(2, 3, 33, 49))
    assert not any(torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean)) for norm in pooled)


# ---------------------------------------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalisation_by_hand(dtype):
    pixel = torch.tensor([255, 0, 100], dtype=dtype).view(1, 3, 1, 1)  # R, G, B
    expected = {
        "imagenet": [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (100 / 255 - 0.406) / 0.225],
        "caffe-bgr": [100 - 104.00698793, 0 - 116.66876762, 255 - 122.67891434],
        "none": [255, 0, 100],
    }
    for name, values in expected.items():
        model = build_model("pspnet", "mobilenetv2", 5, normalization=name)
        torch.testing.assert_close(model.normalize(pixel).flatten().tolist(), [float(v) for v in values], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    model = build_model("deeplabv3", "mobilenetv2", 5).to(dtype).eval()
    for pixels in (image(1, 3, 33, 33), image(1, 3, 33, 33, dtype=torch.float32)):
        assert model(pixels).logits.dtype == dtype
    model = model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.normalize(image(1, 3, 33, 33)).dtype == torch.float32  # 0..255 minus a mean loses digits in bfloat16
        assert model(image(1, 3, 33, 33)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(("normalization", "in_channels"), [("imagenet", 3), ("caffe-bgr", 3), ("caffe-bgr", 4)])
def test_activations_have_the_memory_format_of_the_weights(normalization, in_channels):
    """Pictures come from the loader in NHWC, which convolutions would pass on, whatever the weights are in."""
    model = build_model("pspnet", "mobilenetv2", 5, normalization=normalization, in_channels=in_channels).eval()
    for weights in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=weights)
        for pixels in (torch.contiguous_format, torch.channels_last):
            pixels = image(2, in_channels, 32, 32).contiguous(memory_format=pixels)
            output = model(pixels, ("c1", "c4"))
            assert all(x.is_contiguous(memory_format=weights) for x in (model.normalize(pixels), output.c1, output.c4))


def test_fourth_channel():
    model = build_model("pspnet", "resnet18", 5, normalization="caffe-bgr", in_channels=4).eval()
    pixels = image(1, 4, 33, 33)
    normalized = model.normalize(pixels)
    assert torch.equal(normalized[:, 3], pixels[:, 3].float()), "as the published networks get it"
    without = model.normalize(pixels[:, :3])
    assert torch.equal(without[:, :3], normalized[:, :3]) and not without[:, 3].any()
    assert model(pixels[:, :3]).logits.shape == (1, 5, 5, 5)
    with pytest.raises(ValueError, match=r"image has shape \(1, 5, 8, 8\); this model takes \(B, 3 or 4, H, W\)"):
        model(image(1, 5, 8, 8))
    with pytest.raises(ValueError, match=r"this model takes \(B, 3, H, W\)"):
        build_model("pspnet", "resnet18", 5)(image(1, 4, 8, 8))


# ---------------------------------------------------------------------------------------------------------------------- by name


@pytest.mark.parametrize(("name", "backbone"), ALL)
def test_config_rebuilds_the_same_model(name, backbone):
    model = meta_model(name, backbone, 7)
    again = meta_model(**model.config)
    assert again.config == model.config and again.channels == model.channels
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, again)]
    assert shapes[0] == shapes[1]


def test_config_keeps_every_choice():
    choices = {
        "head_width": 96,
        "aux": True,
        "detail": False,
        "normalization": "caffe-bgr",
        "in_channels": 4,
        "head_after_dropout": True,
        "output_stride": 16,
    }
    model = meta_model("psp_mobile", "mobilenetv2", 7, **choices)
    assert model.config == {"model": "pspnet", "backbone": "mobilenetv2", "num_classes": 7, **choices}
    assert (model.stride, model.num_classes, model.channels["head"]) == (16, 7, 96)
    assert model.head.head_after_dropout and model.backbone.features[0][0].in_channels == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("deeplab3", "resnet18", 5), "there is no model 'deeplab3' (did you mean deeplabv3?); possible: deeplabv3, "),
        (("pspnet", "resnet81", 5), "there is no backbone 'resnet81' (did you mean resnet18?); possible: resnet18, "),
        (("pspnet", "zzz", 5), "there is no backbone 'zzz'; possible: resnet18, "),
    ],
)
def test_unknown_names(arguments, message):
    with pytest.raises(ValueError) as error:
        build_model(*arguments)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
