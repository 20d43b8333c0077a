"""Checkpoints of torchvision's segmentation networks and of AICSD; FCN, LR-ASPP, DeepLabV3+."""

import pytest
import torch
import torchvision
from torch import nn

from models import build_model, count_macs, count_parameters
from models.backbones import build_backbone
from models.weights import find_backbone, infer_config, load_backbone, load_into, model_from_checkpoint, part
from tests.test_weights import recorded_state

SEGMENTATION = torchvision.models.segmentation


def torchvisions(name, **options):
    """A network of torchvision's with random weights, running statistics included."""
    torch.manual_seed(0)
    net = getattr(SEGMENTATION, name)(weights=None, weights_backbone=None, **options).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.1)
    return net


# name: (model, backbone, output stride, parameters that torchvision states for its files)
PUBLISHED = {
    "deeplabv3_mobilenet_v3_large": ("deeplabv3", "mobilenetv3_large_vanilla", 16, 11029328),
    "lraspp_mobilenet_v3_large": ("lraspp", "mobilenetv3_large_vanilla", 8, 3221538),
    "fcn_resnet50": ("fcn", "resnet50_vanilla", 8, 35322218),
    "deeplabv3_resnet50": ("deeplabv3", "resnet50_vanilla", 8, 42004074),
    "fcn_resnet101": ("fcn", "resnet101_vanilla", 8, 54314346),
    "deeplabv3_resnet101": ("deeplabv3", "resnet101_vanilla", 8, 60996202),
}
FAST = ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "fcn_resnet50")  # every layout
NAMES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in PUBLISHED]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_torchvisions(name, tmp_path):
    """Of every stage that torchvision reads, of the auxiliary head, and of the logits before it upsamples them."""
    expected, backbone, stride, parameters = PUBLISHED[name]
    net = torchvisions(name, num_classes=21, **({} if "lraspp" in name else {"aux_loss": True}))
    torch.save(net.state_dict(), tmp_path / "torchvision.pth")
    model, report = model_from_checkpoint(tmp_path / "torchvision.pth", num_classes=21)
    assert (model.config["model"], model.config["backbone"], model.stride) == (expected, backbone, stride)
    assert model.config["normalization"] == "imagenet" and f"{len(net.state_dict())} of {len(net.state_dict())} tensors loaded" in report
    weights = torchvision.models.get_model_weights(name).DEFAULT
    assert weights.meta["num_params"] == parameters == count_parameters(model)

    image = torch.randint(0, 256, (1, 3, 65, 97), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    needs = ("logits", "c4", "c2", *(["aux"] if "aux" in model.channels else []))
    with torch.no_grad():
        features = net.backbone((image / 255 - mean) / std)
        output = model.eval()(image, needs)
        wanted = {"logits": net.classifier(features if "lraspp" in name else features["out"])}
        wanted["c4"] = features["high" if "lraspp" in name else "out"]
        if "lraspp" in name:
            wanted["c2"] = features["low"]
        else:
            wanted["aux"] = net.aux_classifier(features["aux"])
    for field, tensor in wanted.items():
        torch.testing.assert_close(getattr(output, field), tensor, rtol=1e-5, atol=1e-5 * tensor.abs().max().item())


def test_a_student_starts_from_torchvisions_network(tmp_path):
    net = torchvisions("lraspp_mobilenet_v3_large", num_classes=21)
    torch.save(net.state_dict(), tmp_path / "lraspp.pth")
    student = build_model("lraspp", "mobilenetv3_large_vanilla", 5)
    report = load_into(student, tmp_path / "lraspp.pth", allow_classifier_mismatch=True)
    assert torch.equal(student.head.gate.weight, net.classifier.scale[1].weight) and "head.classifier.weight" in report


@pytest.mark.parametrize("size", ["small", "large"])
def test_imagenet_weights_into_torchvisions_mobilenetv3(size, monkeypatch):
    net = getattr(torchvision.models, f"mobilenet_v3_{size}")(weights=None, dilated=True).eval()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: net.state_dict())
    model = build_model("lraspp", f"mobilenetv3_{size}_vanilla", 5).eval()
    report = load_backbone(model, "imagenet")
    assert "classifier.3.weight" in report and "missing" not in report
    image = torch.rand(1, 3, 65, 65)
    with torch.no_grad():
        assert torch.equal(model.backbone(image)[3], net.features(image))


def test_torchvisions_mobilenetv3_is_told_apart_from_cirkds():
    """Equal shapes, other names: BatchNorm's epsilon and the stages differ, so one must not be taken for the other."""
    states = {name: build_backbone(name, 16).state_dict() for name in ("mobilenetv3_small", "mobilenetv3_small_vanilla")}
    shapes = [[tuple(value.shape) for value in state.values()] for state in states.values()]
    assert shapes[0] == shapes[1]
    assert all(find_backbone(part(state, "")) == (name, 3) for name, state in states.items())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_aicsds_file(prefix, tmp_path):
    state = {prefix + key: value for key, value in recorded_state("aicsd/deeplabv3plus_resnet18").items()}
    torch.save({"epoch": 3, "state_dict": state, "best_pred": 0.6, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "aicsd.pth")
    model, _ = model_from_checkpoint(tmp_path / "aicsd.pth", num_classes=21)
    assert (model.config["normalization"], model.config["output_stride"], model.stride) == ("imagenet", 16, 4)
    assert torch.equal(model.head.fuse[4].weight, state[f"{prefix}decoder.last_conv.4.weight"])


def test_aicsds_mobilenetv2_is_refused():
    """Its blocks pad before their first convolution, and it holds every tensor under two names."""
    with torch.device("meta"):
        state = build_model("deeplabv3plus", "mobilenetv2", 21).state_dict()
    state |= {key.replace("features.", "low_level_features."): value for key, value in state.items() if key.startswith("backbone.features.")}
    with pytest.raises(ValueError, match="the weights fit no known model"):
        infer_config(state)


@pytest.mark.parametrize(("backbone", "parameters"), [("resnet18_vanilla", "16.61"), ("resnet101_vanilla", "59.34"), ("mobilenetv2", "5.82")])
def test_parameters_of_aicsds_networks(backbone, parameters):
    with torch.device("meta"):
        assert f"{count_parameters(build_model('deeplabv3plus', backbone, 21)) / 1e6:.2f}" == parameters


def test_dilations_of_deeplabv3plus():
    """The blocks of layer4 are dilated from their first convolution on, in ResNet-101 by 1, 2, 4 times the stage's 2."""

    def rates(name, output_stride=16):
        with torch.device("meta"):
            model = build_model("deeplabv3plus", name, 21, output_stride=output_stride)
        convs = [module for module in model.backbone.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]
        assert all(conv.padding == conv.dilation for conv in convs)
        return [conv.dilation[0] for conv in convs], [branch[0].dilation[0] for branch in model.head.aspp]

    assert rates("resnet18_vanilla") == ([1] * 12 + [2] * 4, [1, 6, 12, 18])
    assert rates("resnet101_vanilla") == ([1] * 30 + [2, 4, 8], [1, 6, 12, 18])
    assert rates("resnet101_vanilla", 8) == ([1] * 7 + [2] * 23 + [4, 8, 16], [1, 12, 24, 36])
    assert rates("resnet101_vanilla", 32)[0] == [1] * 30 + [1, 2, 4]


def test_lads_fcn(tmp_path):
    """The CIRKD line's names, a 4-channel stem, torchvision's FCN head."""
    names = {"backbone.": "pretrained.", "head.fuse.": "head.block.", "head.classifier.": "head.block.4.", "aux_head.fuse.": "auxlayer.block.",
             "aux_head.classifier.": "auxlayer.block.4."}  # fmt: skip
    model = build_model("fcn", "resnet18", 21, in_channels=4, normalization="caffe-bgr")
    state = {}
    for key, value in model.state_dict().items():
        ours = next(ours for ours in names if key.startswith(ours))
        state[names[ours] + key.removeprefix(ours)] = value
    assert infer_config(state).items() <= model.config.items()


def test_fcn_is_a_convolution_on_c4():
    model = build_model("fcn", "mobilenetv2", 5).eval()
    image = torch.randint(0, 256, (1, 3, 33, 49), dtype=torch.uint8)
    with torch.no_grad():
        output = model(image, ("c4", "head", "logits"))
        conv, norm, _ = model.head.fuse
        assert (conv.in_channels, conv.out_channels, conv.kernel_size) == (320, 80, (3, 3))
        torch.testing.assert_close(output.head, norm(conv(output.c4)).relu())
        assert torch.equal(output.logits, model.head.classifier(output.head))


def test_lraspp_adds_the_scores_of_two_maps_without_dropout():
    model = build_model("lraspp", "mobilenetv3_small_vanilla", 5).train()
    output = model(torch.randint(0, 256, (2, 3, 65, 65), dtype=torch.uint8), ("head", "logits", "c2"))
    torch.testing.assert_close(output.logits, model.head.classifier(output.head) + model.head.low_classifier(output.c2))


def test_lraspp_costs():
    """torchvision states 2.086 GMAC for 520x520 pictures; ours are without its interpolation, and with the classifier for 21 classes."""
    with torch.device("meta"):
        model = build_model("lraspp", "mobilenetv3_large_vanilla", 21)
    stated = torchvision.models.get_model_weights("lraspp_mobilenet_v3_large").DEFAULT.meta["_ops"]
    assert count_macs(model, 520, 520) / 1e9 == pytest.approx(stated, rel=2e-3)


PAIRS = [("fcn", "resnet34"), ("fcn", "mobilenetv2"), ("lraspp", "mobilenetv3_small_vanilla"), ("deeplabv3plus", "resnet50")]


@pytest.mark.parametrize(("name", "backbone"), [*PAIRS, ("deeplabv3", "mobilenetv3_large_vanilla"), ("lraspp", "resnet18")])
def test_config_is_inferred_back(name, backbone):
    with torch.device("meta"):
        built = build_model(name, backbone, 21, in_channels=4)
    assert infer_config(built.state_dict()).items() <= built.config.items()


@pytest.mark.parametrize(("name", "backbone"), PAIRS)
def test_precision_and_layout(name, backbone):
    """bfloat16's autocast and channels-last activations give the same function."""
    torch.manual_seed(0)
    model = build_model(name, backbone, 5).eval()
    image = torch.randint(0, 256, (2, 3, 49, 65), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(image).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(image).logits
        last = model.to(memory_format=torch.channels_last)(image.contiguous(memory_format=torch.channels_last)).logits
    assert low.dtype == torch.bfloat16 and (low.float() - expected).abs().max() < 0.05 * expected.abs().max()
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
