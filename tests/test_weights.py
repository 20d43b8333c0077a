"""Checkpoints of this and other codebases: recorded outputs, refusals, reports."""

import json
import pickle
import sys
import urllib.error
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from models import build_model, count_parameters
from models.layouts import translate_keys
from models.weights import infer_config, load_backbone, load_into, model_from_checkpoint, read_state
from tests import parity
from tests.paths import GOLDEN, shared
from utils import checkpoint
from utils.options import train_options
from utils.session import build_student

RECORDED = json.loads((GOLDEN / "models.json").read_text())["models"]
# what the published models return, in their order
ORDERS = {4: ("logits", "aux", "c4", "head"), 3: ("logits", "aux", "head"), 2: ("logits", "head"), 1: ("logits",)}


def recorded_value(key, shape):
    """The recorded models' weights, a function of name and shape."""
    x = np.asarray(np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape), dtype=np.float32)
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if key.endswith("running_var"):
        x = 1 + 0.1 * np.abs(x)
    elif key.endswith("running_mean") or (len(shape) == 1 and key.endswith("bias")):
        x = 0.1 * x
    elif len(shape) == 1:
        x = 1 + 0.1 * x
    else:
        x = 0.7 * x / np.sqrt(np.float32(np.prod(shape[1:])))
    return torch.from_numpy(x)


def recorded_state(name):
    return {key: recorded_value(key, tuple(shape)) for key, shape in RECORDED[name]["state_dict"]}


def save(path, content):
    """As other codebases write files; this project's own format with its checksum."""
    if "format" in content:
        checkpoint.save(path, content)
    else:
        torch.save(content, path)
    return path


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# ----------------------------------------------------------------------------------------------------------- published checkpoints


@pytest.mark.parametrize("name", RECORDED)
def test_published_checkpoints_give_the_recorded_outputs(name, tmp_path):
    state = recorded_state(name)
    path = save(tmp_path / "published.pth", {f"module.{key}": value for key, value in state.items()})
    model, report = model_from_checkpoint(path, normalization="none")
    assert f"{len(state)} of {len(state)} tensors loaded" in report and "inferred" in report
    assert count_parameters(model) == RECORDED[name]["parameters"]

    recorded = RECORDED[name]["input"]
    image = torch.from_numpy(np.random.RandomState(recorded["seed"]).standard_normal(recorded["shape"]).astype(np.float32))
    with torch.no_grad():
        output = model.eval()(image, model.channels)
    fields = ("logits", "c4", "head") if "mobilenetv2" in name else ORDERS[len(RECORDED[name]["outputs"])]
    for field, expected in zip(fields, RECORDED[name]["outputs"], strict=True):
        tensor = getattr(output, field)
        if name.startswith("aicsd/"):  # whose network upsamples its logits itself
            tensor = F.interpolate(tensor, image.shape[2:], mode="bilinear", align_corners=True)
        assert list(tensor.shape) == expected["shape"], field
        values = torch.stack([tensor.mean(), tensor.std(), *tensor.flatten()[:6], *tensor.flatten()[-6:]])
        wanted = torch.tensor([expected["mean"], expected["std"], *expected["head"], *expected["tail"]])
        torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-6)
        errors = (values - wanted)[wanted != 0] / wanted[wanted != 0]
        parity.record("models", name, field, expected["mean"], tensor.mean().item(), errors.abs().max().item())


def test_the_carried_figures_are_the_recorded_ones():
    original = json.loads(shared("golden/models.json").read_text())
    for name, carried in RECORDED.items():
        assert carried == {key: original[name][key] for key in carried}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("afdcd/deeplabv3_resnet18", ("deeplabv3", "resnet18", 19, 128, True)),
        ("cirkdv2/deeplabv3_resnet18", ("deeplabv3", "resnet18", 19, 512, True)),
        ("cirkdv2/deeplabv3_resnet18_vanilla", ("deeplabv3", "resnet18_vanilla", 19, 512, True)),
        ("afdcd/pspnet_resnet18", ("pspnet", "resnet18", 11, 128, True)),
        ("afdcd/deeplabv3_mobilenetv2", ("deeplabv3", "mobilenetv2", 19, 128, False)),
        ("cirkdv2/deeplabv3_mobilenetv3_small", ("deeplabv3", "mobilenetv3_small", 19, 128, False)),
        ("cirkdv2/pspnet_mobilenetv3_small", ("pspnet", "mobilenetv3_small", 19, 128, False)),
        ("cirkdv2/segformer_b0", ("segformer", "mit_b0", 19, 256, False)),
        ("cirkdv2/upernet_lite_resnet18", ("upernet_lite", "resnet18", 19, 128, True)),
        ("aicsd/deeplabv3plus_resnet18", ("deeplabv3plus", "resnet18_vanilla", 21, 256, False)),
    ],
)
def test_inferred_config(name, expected):
    state = recorded_state(name)
    config = infer_config(state)
    assert tuple(config[key] for key in ("model", "backbone", "num_classes", "head_width", "aux")) == expected
    assert config["normalization"] == ("imagenet" if name.startswith("aicsd/") else "caffe-bgr") and config["in_channels"] == 3
    assert translate_keys(translate_keys(state)).keys() == translate_keys(state).keys()


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet50_vanilla", "mobilenetv2"])
@pytest.mark.parametrize("model", ["deeplabv3", "pspnet"])
def test_config_is_inferred_back_from_every_architecture(model, name):
    with torch.device("meta"):
        built = build_model(model, name, 21, in_channels=4)
    assert infer_config(built.state_dict()).items() <= built.config.items()


def test_number_of_classes_must_be_the_data_sets(tmp_path):
    path = save(tmp_path / "pspnet.pth", recorded_state("afdcd/pspnet_resnet18"))
    with pytest.raises(ValueError, match="pspnet.pth has 11 classes, the data set has 19; give a checkpoint trained on it") as error:
        model_from_checkpoint(path, num_classes=19)
    one_line(error)
    model, _ = model_from_checkpoint(path, num_classes=11)
    assert model.config["normalization"] == "caffe-bgr"


def test_a_published_file_with_faults_gives_the_table(tmp_path):
    """Every tensor that differs is named, rather than the file called unknown."""
    state = recorded_state("afdcd/pspnet_resnet18")
    missing, misshapen = "pretrained.layer2.0.conv1.weight", "head.psp.conv2.0.weight"
    del state[missing]
    state[misshapen] = torch.zeros(7, 512, 1, 1)
    state["pretrained.extra.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match="does not fit the model: 3 tensors differ") as error:
        model_from_checkpoint(save(tmp_path / "faulty.pth", state))
    table = str(error.value)
    assert len(table.splitlines()) == 5  # the message, the header, three rows
    assert all(key in table for key in ("backbone.layer2.0.conv1.weight", "head.pyramid.1.0.weight", "backbone.extra.weight"))


def test_models_that_are_not_here(tmp_path):
    path = save(tmp_path / "segformer.pth", {"patch_embed1.proj.weight": torch.zeros(32, 3, 7, 7)})
    with pytest.raises(ValueError, match="segformer.pth: the weights fit no known model .*first key: patch_embed1.proj.weight") as error:
        model_from_checkpoint(path)
    one_line(error)


# ------------------------------------------------------------------------------------------------------- this project's checkpoints


def own_checkpoint(model):
    return {"format": "segkd/1", "step": 3, "student": model.state_dict(), "config": {"model": model.config, "dataset": "shapes"}}


def test_own_checkpoint(tmp_path):
    model = build_model("pspnet", "mobilenetv2", 5, head_width=64, output_stride=16).eval()
    path = save(tmp_path / "best.pth", own_checkpoint(model))
    again, _ = model_from_checkpoint(path)
    assert again.config == model.config
    image = torch.randint(0, 256, (1, 3, 65, 97), dtype=torch.uint8)
    assert torch.equal(again.eval()(image).logits, model(image).logits)
    assert read_state(path)[1]["config"]["dataset"] == "shapes"

    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # one bit of some weight: torch.load itself would not notice
    path.write_bytes(data)
    with pytest.raises(ValueError, match="best.pth: damaged"):
        model_from_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"depth": 3}, "describes no model of this version"), ({"model": "unet"}, "there is no model 'unet'")],
)
def test_config_of_another_version(change, message, tmp_path):
    content = own_checkpoint(build_model("pspnet", "mobilenetv2", 5))
    content["config"]["model"] = {**content["config"]["model"], **change}
    with pytest.raises(ValueError, match=message) as error:
        model_from_checkpoint(save(tmp_path / "best.pth", content))
    assert "best.pth" in one_line(error)


def test_checkpoint_that_lacks_tensors_is_refused(tmp_path):
    content = own_checkpoint(build_model("pspnet", "mobilenetv2", 5))
    del content["student"]["head.fuse.0.weight"]
    with pytest.raises(ValueError, match=r"1 tensors differ, the first is head\.fuse\.0\.weight \(missing"):
        model_from_checkpoint(save(tmp_path / "best.pth", content))


# ---------------------------------------------------------------------------------------------------------------- unreadable files


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda gift: gift,
        lambda gift: {"state_dict": {"a": torch.zeros(1)}, "args": gift},
        lambda gift: {"format": "segkd/1", "config": gift},
    ],
)
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_no_file_runs_code(wrap, writer, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker, path = tmp_path / "marker", tmp_path / "gift.pth"
    if writer == "torch":
        torch.save(wrap(Malicious(marker)), path)
    else:
        path.write_bytes(pickle.dumps(wrap(Malicious(marker)), protocol=2))
    with pytest.raises(ValueError, match="gift.pth: not loaded: .* could run code .*; take out its weights") as error:
        read_state(path)
    one_line(error)
    assert not marker.exists()


def test_unreadable_files(tmp_path):
    whole = save(tmp_path / "whole.pth", recorded_state("afdcd/pspnet_resnet18")).read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path = tmp_path / "cut.pth"
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.pth: (not loaded|cannot be read).* damaged") as error:
            read_state(path)
        one_line(error)
    for path, message in [(tmp_path / "none.pth", "no such file"), (tmp_path, "a folder")]:
        with pytest.raises(ValueError, match=message):
            read_state(path)


def test_safetensors(tmp_path, monkeypatch):
    save_file = pytest.importorskip("safetensors.torch", reason="pip install safetensors").save_file
    state = recorded_state("afdcd/pspnet_resnet18")
    save_file({f"module.{key}": value for key, value in state.items()}, path := tmp_path / "weights.safetensors")
    found, info = read_state(path)
    assert found.keys() == state.keys() and all(torch.equal(found[key], value) for key, value in state.items())
    assert info == {"format": "state_dict", "config": None} and model_from_checkpoint(path)[0].config["backbone"] == "resnet18"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="weights.safetensors: not loaded .*; it is damaged, fetch it again"):
        read_state(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="weights.safetensors: needs the package safetensors: pip install safetensors"):
        read_state(path)


@pytest.mark.parametrize("content,said", [
    (b"<!DOCTYPE html><html>" * 50, "it is damaged, or no checkpoint of torch (UnpicklingError); fetch it again"),
    (b"PK\x03\x04" + bytes(400), "it is damaged, fetch it again"),
    (b"", "it is damaged, or no checkpoint of torch (EOFError); fetch it again"),
    (pickle.dumps({"date": Path("x")}, protocol=2), "it holds more than tensors and plain values, which could run code (pathlib."),
], ids=["a page", "cut", "empty", "objects"])  # fmt: skip
def test_no_advice_to_run_a_files_code(content, said, tmp_path):
    """torch's own text ends in how to switch the protection off."""
    (tmp_path / "given.pth").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_state(tmp_path / "given.pth")
    assert said in str(error.value) and "weights_only" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_a_torchscript_file_is_called_so(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "student.pt")
    with pytest.raises(ValueError, match="student.pt: not loaded: it is a file of TorchScript, which holds code; give the checkpoint"):
        read_state(tmp_path / "student.pt")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({}, "a dict with no keys"),
        ([torch.zeros(1)], "list"),
        ({"epoch": 3, "loss": 0.5}, "a dict with epoch, loss"),
        ({"state_dict": 7}, "int"),
        ({3: torch.zeros(1)}, "a dict with 3"),
        ({"format": "segkd/1", "config": {"model": {}}}, "NoneType"),
        ({"format": "segkd/1", "student": {"a": torch.zeros(1)}}, "without the model's config"),
    ],
)
def test_files_without_weights(content, found, tmp_path):
    with pytest.raises(ValueError, match=found) as error:
        read_state(save(tmp_path / "odd.pth", content))
    assert "odd.pth" in one_line(error)


# ------------------------------------------------------------------------------------------------------- into an existing model


def test_another_architecture_gives_a_table(tmp_path):
    path = save(tmp_path / "v2.pth", recorded_state("cirkdv2/deeplabv3_resnet18"))
    model = build_model("deeplabv3", "resnet18", 19)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_into(model, path)
    summary, header, *rows = str(error.value).splitlines()
    assert summary.startswith(f"{path} does not fit the model: 36 tensors differ, the first is head.classifier.weight (wrong shape; model ")
    assert header.split() == ["problem", "key", "model", "file"]
    assert len(rows) == 36 and all(row.startswith("wrong shape  head.") for row in rows)
    assert any(row.split() == "wrong shape head.classifier.weight (19, 128, 1, 1) (19, 512, 1, 1)".split() for row in rows)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_classifier_of_another_data_set(tmp_path):
    path = save(tmp_path / "camvid.pth", {"epoch": 3, "state_dict": recorded_state("afdcd/pspnet_resnet18")})
    model = build_model("pspnet", "resnet18", 19)
    with pytest.raises(ValueError, match="4 tensors differ"):
        load_into(model, path)
    report = load_into(model, path, allow_classifier_mismatch=True)
    assert "174 of 178 tensors loaded" in report and "aux_head.classifier.bias" in report and "head.classifier.weight" in report
    assert "note: these weights expect normalization caffe-bgr, the model has imagenet" in report
    assert torch.equal(model.head.fuse[0].weight, recorded_value("head.block.0.weight", (128, 1024, 3, 3)))
    assert "note" not in load_into(build_model("pspnet", "resnet18", 11, normalization="caffe-bgr"), path)


def test_a_students_normalisation_follows_its_file(tmp_path):
    """One that it was not trained with is nothing that a loss curve shows. A flag overrides it."""
    path = save(tmp_path / "camvid.pth", recorded_state("afdcd/pspnet_resnet18"))

    def student(*flags):
        options = train_options(["--dataset", "shapes", "--model", "pspnet", "--dry-run", *flags], distil=False, description="")
        with torch.device("meta"):
            return build_student(options).config["normalization"], options.student_normalization, options.sources["student_normalization"]

    assert student("--pretrained", str(path)) == ("caffe-bgr", "caffe-bgr", "the pretrained file")
    assert student("--pretrained", str(path), "--normalization", "imagenet") == ("imagenet", "imagenet", "command line")
    assert student("--pretrained", "no such file.pth") == student() == ("imagenet", "imagenet", "default")
    own = save(tmp_path / "own.pth", own_checkpoint(build_model("pspnet", "mobilenetv2", 5, normalization="none")))
    assert student("--pretrained", str(own))[0] == "none"


def test_auxiliary_head_on_one_side(tmp_path):
    with_aux, without = (build_model("pspnet", "resnet18", 5, aux=aux) for aux in (True, False))
    report = load_into(without, save(tmp_path / "with.pth", with_aux.state_dict()))
    assert "unexpected" in report and "aux_head.classifier.weight" in report
    report = load_into(with_aux, save(tmp_path / "without.pth", own_checkpoint(without)))
    assert "missing" in report and "aux_head.fuse.0.weight" in report


# ------------------------------------------------------------------------------------------------------------------ ImageNet weights


@pytest.mark.parametrize(("name", "published"), [("resnet18_vanilla", "resnet18"), ("mobilenetv2", "mobilenet_v2")])
def test_imagenet_weights_are_torchvisions(name, published, monkeypatch):
    net = getattr(torchvision.models, published)(weights=None)
    calls = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: calls.append((url, options)) or net.state_dict())
    model = build_model("pspnet", name, 5)
    report = load_backbone(model, "imagenet")
    (url, options), own, published_state = calls[0], model.backbone.state_dict(), net.state_dict()
    assert url.startswith(f"https://download.pytorch.org/models/{published}")
    assert options["weights_only"] is True and options["check_hash"] is True
    assert all(torch.equal(value, published_state[key]) for key, value in own.items())
    assert "fc.weight" in report or "classifier.1.weight" in report
    assert "note" not in report
    assert "expect normalization imagenet" in load_backbone(build_model("pspnet", name, 5, normalization="caffe-bgr"), "imagenet")


def test_imagenet_weights_without_a_network(monkeypatch, tmp_path):
    def offline(url, **options):
        raise urllib.error.URLError("[Errno -3] Temporary failure in name resolution")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError) as error:
        load_backbone(build_model("pspnet", "resnet18_vanilla", 5), "imagenet")
    message = one_line(error)
    assert "https://download.pytorch.org/models/resnet18" in message and "name resolution" in message
    assert f"put that file at {tmp_path}/hub/checkpoints/resnet18-" in message


def test_the_deep_stem_has_no_torchvision_weights():
    with pytest.raises(ValueError) as error:
        load_backbone(build_model("pspnet", "resnet18", 5), "imagenet")
    assert "use resnet18_vanilla, which has its stem, or give a file, such as resnet18-imagenet.pth" in one_line(error)


def published_backbone(name, prefix):
    return {key.removeprefix(prefix): value for key, value in recorded_state(name).items() if key.startswith(prefix)}


@pytest.mark.parametrize(
    ("name", "prefix", "backbone", "extra", "note"),
    [
        ("afdcd/pspnet_resnet18", "pretrained.", "resnet18", "fc.weight", True),
        ("cirkdv2/deeplabv3_resnet18_vanilla", "pretrained.", "resnet18_vanilla", "fc.bias", False),
        ("afdcd/deeplabv3_mobilenetv2", "pretrained.net.", "mobilenetv2", "classifier.1.weight", False),
    ],
)
def test_backbone_files(name, prefix, backbone, extra, note, tmp_path):
    state = published_backbone(name, prefix)
    # old files lack the batch counters
    file = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")} | {extra: torch.zeros(1000)}
    model = build_model("pspnet", backbone, 5)
    report = load_backbone(model, save(tmp_path / "imagenet.pth", file))
    assert f"{len(file) - 1} of {len(file)} tensors loaded" in report and f"unexpected  {extra}" in report
    assert ("note: these weights expect normalization caffe-bgr" in report) == note
    own = model.backbone.state_dict()
    assert all(torch.equal(own[key], value) for key, value in translate_keys(state).items())


def test_backbone_file_of_another_network(tmp_path):
    path = save(tmp_path / "resnet18-imagenet.pth", published_backbone("afdcd/pspnet_resnet18", "pretrained."))
    with pytest.raises(ValueError, match="resnet18-imagenet.pth does not fit the model"):
        load_backbone(build_model("pspnet", "resnet34", 5), path)
    model = build_model("pspnet", "resnet18", 5)
    before = model.backbone.conv1.weight.clone()
    assert load_backbone(model, "none") == "random weights" and torch.equal(before, model.backbone.conv1.weight)
