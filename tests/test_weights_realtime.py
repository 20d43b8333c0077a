"""Weights of HRNet, OCRNet, STDC and DDRNet: names of the authors' files, what may be left over, architectures told by tensors."""

import pytest
import torch

from models import build_model
from models.weights import infer_config, load_backbone
from tests.test_models_realtime import network
from tests.test_weights import one_line, save

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
CONFIGS = [("fcn", "hrnet_w18", False), ("ocrnet", "hrnet_w18", True), ("ocrnet", "resnet18", True), ("ocrnet", "mobilenetv2", True),
          ("stdc", "stdc1", True), ("stdc", "stdc1", False), ("stdc", "stdc2", True), ("ddrnet", "ddrnet23_slim", True),
          ("ddrnet", "ddrnet23_slim", False)]  # model, backbone, auxiliary heads; fmt: skip


def conv_norm(conv, norm, bias=False):
    return [f"{conv}.weight", *[f"{conv}.bias"] * bias, *(f"{norm}.{name}" for name in NORM)]


def block(prefix, convs, downsample=False):
    names = [name for n in range(1, convs + 1) for name in conv_norm(f"{prefix}.conv{n}", f"{prefix}.bn{n}")]
    return names + (conv_norm(f"{prefix}.downsample.0", f"{prefix}.downsample.1") if downsample else [])


def hrnet_names():
    """`hrnetv2_w18_imagenet_pretrained.pth`, without what its classifier adds."""
    names = conv_norm("conv1", "bn1") + conv_norm("conv2", "bn2")
    for n in range(4):
        names += block(f"layer1.{n}", 3, downsample=n == 0)
    names += conv_norm("transition1.0.0", "transition1.0.1") + conv_norm("transition1.1.0.0", "transition1.1.0.1")
    for stage in (3, 4):
        names += conv_norm(f"transition{stage - 1}.{stage - 1}.0.0", f"transition{stage - 1}.{stage - 1}.0.1")
    for stage, modules in ((2, 1), (3, 4), (4, 3)):
        for module in range(modules):
            prefix = f"stage{stage}.{module}"
            for i in range(stage):
                for n in range(4):
                    names += block(f"{prefix}.branches.{i}.{n}", 2)
                for j in range(stage):
                    path = f"{prefix}.fuse_layers.{i}.{j}"
                    if j > i:
                        names += conv_norm(f"{path}.0", f"{path}.1")
                    for k in range(i - j):
                        names += conv_norm(f"{path}.{k}.0", f"{path}.{k}.1")
    return names


def stdc_names(depths):
    """`STDCNet813M_73.91.tar` and `STDCNet1446_76.47.tar`, without what their classifiers add."""
    names, index = [], 2
    for n in range(2):
        names += conv_norm(f"features.{n}.conv", f"features.{n}.bn")
    for depth in depths:
        for number in range(depth):
            prefix = f"features.{index}"
            for n in range(4):
                names += conv_norm(f"{prefix}.conv_list.{n}.conv", f"{prefix}.conv_list.{n}.bn")
            if number == 0:
                names += conv_norm(f"{prefix}.avd_layer.0", f"{prefix}.avd_layer.1")
            index += 1
    return names


def ddrnet_names():
    """`DDRNet23s_imagenet.pth`, without what its classifier adds."""
    names = conv_norm("conv1.0", "conv1.1", bias=True) + conv_norm("conv1.3", "conv1.4", bias=True)
    for layer, changes in (("layer1", False), ("layer2", True), ("layer3", True), ("layer4", True), ("layer3_", False), ("layer4_", False)):
        names += block(f"{layer}.0", 2, downsample=changes) + block(f"{layer}.1", 2)
    names += block("layer5.0", 3, downsample=True) + block("layer5_.0", 3, downsample=True)
    for layer in ("compression3", "compression4", "down3", "down4"):
        names += conv_norm(f"{layer}.0", f"{layer}.1")
    return names + conv_norm("down4.3", "down4.4")


FILES = {  # backbone: (a model on it, names of its file, names of the file's classifier)
    "hrnet_w18": ("fcn", hrnet_names(), ["incre_modules.0.0.conv1.weight", "downsamp_modules.0.0.weight", "final_layer.0.weight", "classifier.bias"]),
    "stdc1": ("stdc", stdc_names((2, 2, 2)), ["conv_last.conv.weight", "fc.weight", "bn.weight", "linear.weight"]),
    "stdc2": ("stdc", stdc_names((4, 5, 3)), ["conv_last.conv.weight", "fc.weight", "bn.weight", "linear.weight"]),
    "ddrnet23_slim": ("ddrnet", ddrnet_names(), ["linear.weight"]),
}


@pytest.mark.parametrize("backbone", FILES)
def test_the_authors_imagenet_files(backbone, tmp_path):
    """Every name of the file; one too many, or one too few, is refused."""
    name, names, classifier = FILES[backbone]
    model = network(name, backbone)
    own = model.backbone.state_dict()
    assert len(names) == len(set(names)) and set(names) == set(own)
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(own[key].shape, generator=generator) if own[key].dim() else own[key] for key in names}
    file = {**state, **{key: torch.zeros(3) for key in classifier}}
    fresh = build_model(name, backbone, 5, normalization="caffe-bgr")
    report = load_backbone(fresh, save(tmp_path / "imagenet.pth", {"state_dict": file}))
    assert f"{len(state)} of {len(file)} tensors loaded" in report and all(f"unexpected  {key}" in report for key in classifier)
    assert "these weights expect normalization imagenet" in report
    assert all(torch.equal(value, state[key]) for key, value in fresh.backbone.state_dict().items())
    for wrong in ({**file, "layer9.weight": torch.zeros(3)}, {key: value for key, value in file.items() if key != names[0]}):
        with pytest.raises(ValueError, match="does not fit the model: 1 tensors differ"):
            load_backbone(fresh, save(tmp_path / "wrong.pth", wrong))


@pytest.mark.parametrize(
    ("name", "backbone", "file"),
    [
        ("fcn", "hrnet_w18", "hrnetv2_w18_imagenet_pretrained.pth"),
        ("stdc", "stdc1", "STDCNet813M_73.91.tar"),
        ("stdc", "stdc2", "STDCNet1446_76.47.tar"),
        ("ddrnet", "ddrnet23_slim", "DDRNet23s_imagenet.pth"),
    ],
)
def test_torchvision_has_none_of_these(name, backbone, file):
    with pytest.raises(ValueError) as error:
        load_backbone(network(name, backbone), "imagenet")
    assert one_line(error) == f"torchvision has no ImageNet weights for {backbone}; give a file, such as {file}, or 'none'"


@pytest.mark.parametrize(("name", "backbone", "auxiliary"), CONFIGS)
def test_config_is_inferred_back(name, backbone, auxiliary):
    with torch.device("meta"):
        built = build_model(name, backbone, 21, in_channels=4, aux=auxiliary, detail=name == "stdc" and auxiliary)
    inferred = infer_config(built.state_dict())
    assert inferred.items() <= built.config.items()
    assert {"model", "backbone", "aux", "detail", "in_channels"} <= inferred.keys()
