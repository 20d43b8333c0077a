"""Weights of the networks that CIRKDv2 adds, in the layouts of CIRKDv2, SegFormer's authors and torchvision."""

import numpy as np
import pytest
import torch
import torchvision

from models import build_model
from models.weights import infer_config, load_backbone, load_into, model_from_checkpoint
from tests.test_weights import RECORDED, one_line, recorded_state, recorded_value, save

SEGFORMER = "cirkdv2/segformer_b0"
MOBILENET = "cirkdv2/deeplabv3_mobilenetv3_small"


def forward(model, shape=(1, 3, 64, 96)):
    """Logits of the recorded input."""
    x = torch.from_numpy(np.random.RandomState(5).standard_normal(shape).astype(np.float32))
    with torch.no_grad():
        return model.eval()(x).logits


def encoder(state):
    return {key: value for key, value in state.items() if key.startswith(("patch_embed", "block", "norm"))}


# -------------------------------------------------------------------------------------------------------------------- SegFormer


def test_segformer_to_the_last_recorded_digits(tmp_path):
    """LayerNorm has two epsilons: 1e-6 in blocks, 1e-5 behind patches. With one for both the logits differ by more than 2e-5."""
    model, report = model_from_checkpoint(save(tmp_path / "segformer.pth", recorded_state(SEGFORMER)), normalization="none")
    recorded = RECORDED[SEGFORMER]["outputs"][0]
    logits = forward(model)
    values = torch.stack([logits.mean(), logits.std(), *logits.flatten()[:6], *logits.flatten()[-6:]])
    expected = torch.tensor([recorded["mean"], recorded["std"], *recorded["head"], *recorded["tail"]])
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-8)
    assert "segformer mit_b0, 19 classes, head width 256" in report


def official(state):
    """A CIRKDv2 file as SegFormer's authors would have saved it: no bias in the fusion, an unused classifier, other names."""
    renamed = {f"backbone.{key}": value for key, value in encoder(state).items()}
    for key, value in state.items():
        if key.startswith("linear_fuse.0"):
            renamed |= {"decode_head.linear_fuse.conv.weight": value} if key.endswith("weight") else {}
        elif key.startswith("linear"):
            renamed["decode_head." + key.replace("fuse.1.", "fuse.bn.")] = value
    renamed |= {"decode_head.conv_seg.weight": torch.zeros(19, 128, 1, 1), "decode_head.conv_seg.bias": torch.zeros(19)}
    return renamed


def test_official_segformer(tmp_path):
    state = recorded_state(SEGFORMER)
    state["linear_fuse.0.bias"].zero_()
    expected = forward(model_from_checkpoint(save(tmp_path / "cirkd.pth", state), normalization="none")[0])
    file = save(tmp_path / "official.pth", {"meta": {"epoch": 1}, "state_dict": official(state)})
    model, report = model_from_checkpoint(file)
    assert model.config["normalization"] == "imagenet" and "193 of 195 tensors loaded" in report
    assert "unexpected  decode_head.conv_seg.weight" in report and "unexpected  decode_head.conv_seg.bias" in report
    assert "unexpected  decode_head.conv_seg.weight" in load_into(build_model("segformer", "mit_b0", 19), file)
    model, _ = model_from_checkpoint(file, normalization="none")
    assert torch.equal(forward(model), expected)


def test_an_official_segformer_that_lacks_tensors(tmp_path):
    file = save(tmp_path / "part.pth", {"decode_head.linear_pred.weight": torch.zeros(19, 256, 1, 1)})
    with pytest.raises(ValueError, match="part.pth: the weights fit no known model"):
        model_from_checkpoint(file)


def test_mit_files(tmp_path):
    state = encoder(recorded_state(SEGFORMER))
    file = save(tmp_path / "mit_b0.pth", state | {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)})
    model = build_model("segformer", "mit_b0", 5, normalization="caffe-bgr")
    report = load_backbone(model, file)
    assert f"{len(state)} of {len(state) + 2} tensors loaded" in report and "unexpected  head.bias" in report
    assert "note: these weights expect normalization imagenet" in report
    whole = model_from_checkpoint(save(tmp_path / "whole.pth", recorded_state(SEGFORMER)))[0]
    own, expected = model.backbone.state_dict(), whole.backbone.state_dict()
    assert own.keys() == expected.keys() and all(torch.equal(own[key], value) for key, value in expected.items())
    assert torch.equal(own["stages.2.blocks.1.mlp.dwconv.bias"], recorded_value("block3.1.mlp.dwconv.dwconv.bias", (640,)))
    student = build_model("segformer", "mit_b0", 5, normalization="caffe-bgr")  # --student-pretrained takes them, too
    report = load_into(student, file, allow_classifier_mismatch=True)
    assert report.startswith("a backbone alone: ") and "note: these weights expect normalization imagenet" in report
    assert all(torch.equal(student.backbone.state_dict()[key], value) for key, value in expected.items())
    with pytest.raises(ValueError, match="mit_b0.pth does not fit the model"):
        load_backbone(build_model("segformer", "mit_b1", 5), file)
    with pytest.raises(ValueError) as error:
        load_backbone(model, "imagenet")
    assert "torchvision has no ImageNet weights for mit_b0; give a file, such as mit_b0.pth, or 'none'" in one_line(error)


# ------------------------------------------------------------------------------------------------------------------ MobileNetV3


@pytest.mark.parametrize("source", ["imagenet", "file"])
@pytest.mark.parametrize("size", ["small", "large"])
def test_torchvisions_mobilenetv3_computes_the_same(size, source, tmp_path, monkeypatch):
    """Though its BatchNorm has another epsilon, which here is as large as the variances."""
    torch.manual_seed(0)
    net = getattr(torchvision.models, f"mobilenet_v3_{size}")(weights=None).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(1e-3, 1)
    model = build_model("pspnet", f"mobilenetv3_{size}", 5, normalization="none", output_stride=32)
    if source == "imagenet":
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: net.state_dict())
    else:
        source = save(tmp_path / "mobilenet_v3.pth", net.state_dict())
    report = load_backbone(model, source)
    assert "classifier.3.weight" in report and "missing" not in report
    image = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        c4 = model.double().eval()(image, ("c4",)).c4
        torch.testing.assert_close(c4, net.double().features(image), rtol=1e-4, atol=1e-5)


def test_cirkds_mobilenetv3_file(tmp_path):
    state = {key.removeprefix("pretrained."): value for key, value in recorded_state(MOBILENET).items() if key.startswith("pretrained.")}
    model = build_model("pspnet", "mobilenetv3_small", 5)
    report = load_backbone(model, save(tmp_path / "mobilenet_v3_small-47085aa1.pth", state | {"classifier.0.weight": torch.zeros(1280, 576)}))
    assert f"{len(state)} of {len(state) + 1} tensors loaded" in report
    own = model.backbone.state_dict()
    for ours, theirs in [
        ("features.1.block.2.0.weight", "layer1.linear_conv.conv.weight"),  # no expansion
        ("features.2.block.2.1.bias", "layer2.linear_conv.bn.bias"),  # no squeeze and excitation
        ("features.4.block.2.fc2.bias", "layer4.se.conv2.conv.bias"),
        ("features.4.block.3.0.weight", "layer4.linear_conv.conv.weight"),
        ("features.12.1.running_var", "layer12.bn.running_var"),  # as it is: the epsilon is theirs
    ]:
        assert torch.equal(own[ours], state[theirs]), ours


# ----------------------------------------------------------------------------------------------------------------- recognition


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("segformer", "mit_b0"),
        ("segformer", "mit_b1"),
        *(pytest.param("segformer", f"mit_b{size}", marks=pytest.mark.slow) for size in range(2, 6)),
        ("upernet", "resnet18"),
        ("upernet", "mobilenetv3_large"),
        ("upernet_lite", "resnet18"),
        ("upernet_lite", "mobilenetv3_small"),
        ("deeplabv3", "mobilenetv3_small"),
        ("pspnet", "mobilenetv3_large"),
    ],
)
def test_architectures_are_recognised(name, backbone):
    with torch.device("meta"):
        built = build_model(name, backbone, 21, in_channels=4)
    assert infer_config(built.state_dict()).items() <= built.config.items()


@pytest.mark.parametrize("name", [SEGFORMER, MOBILENET])
def test_label_assisted_stems(name, tmp_path):
    """A fourth input plane of zeros changes nothing; without one, a student of four planes draws it."""
    state = recorded_state(name)
    plain = model_from_checkpoint(save(tmp_path / "three.pth", state), normalization="none")[0]
    stem = next(iter(state))
    wide = {**state, stem: torch.cat([state[stem], torch.zeros_like(state[stem][:, :1])], 1)}
    model, _ = model_from_checkpoint(save(tmp_path / "four.pth", wide), normalization="none")
    assert model.config["in_channels"] == 4
    torch.testing.assert_close(forward(model), forward(plain))
    own = build_model(**{**plain.config, "in_channels": 4})
    load_into(own, tmp_path / "three.pth")
    assert own(torch.zeros(2, 4, 64, 64)).logits.isfinite().all()
