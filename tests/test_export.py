"""scripts/export.py and models/deploy.py: labels of every kind of file against the checkpoint's network, at sizes that were never shown
to the exporter; what the file says of itself; refusals."""

import copy
import importlib
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from dataset import shapes
from models import MODELS, backbones_of, build_model
from models.deploy import Exportable, Labeller, average, deployable
from models.normalization import NORMALIZATIONS
from models.weights import model_from_checkpoint
from scripts import export
from tests.paths import REPOSITORY
from tests.workers import save_model
from utils import checkpoint
from utils.metrics import Inference
from utils.options import EXPORTS, export_options

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated")
SIZES = ((1, 64, 64), (1, 33, 130), (3, 71, 50), (1, 32, 32))  # batch, height, width


def needs_onnx():
    for name in export.PACKAGES:
        pytest.importorskip(name)


def run(folder, *arguments, name="student.pth", output="out.pt"):
    return export.main(export_options(["--checkpoint", str(folder / name), "--output", str(folder / output), *arguments], description=""), None)


def pictures(*shape, seed=0):
    return torch.randint(0, 256, (shape[0], 3, *shape[1:]), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def trained(model: nn.Module) -> nn.Module:
    """With statistics of BatchNorm that are not those it starts from."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_(0, 0.1, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, whose pyramid pools to sizes that exporters do not like."""
    folder = tmp_path_factory.mktemp("export")
    save_model(folder / "student.pth", classes=list(shapes.CLASSES), colours=[[k, 2 * k, 3 * k] for k in range(8)])
    return folder


@pytest.fixture(scope="module")
def exported(folder):
    """kind of file -> its path, each made once."""
    paths = {}

    def make(kind):
        if kind == "onnx":
            needs_onnx()
        if kind not in paths:
            assert run(folder, "--format", kind, "--scores", output=f"student{EXPORTS[kind]}") == 0
            paths[kind] = folder / f"student{EXPORTS[kind]}"
        return paths[kind]

    return make


def load(kind, path):
    return export.runner(export_options(["--checkpoint", "unread", "--output", str(path), "--format", kind], description=""))


@pytest.mark.parametrize("kind", EXPORTS)
def test_labels_and_scores_at_sizes_never_shown(folder, exported, kind):
    model = model_from_checkpoint(folder / "student.pth")[0].eval()
    function = load(kind, exported(kind))
    for size in SIZES:
        image = pictures(*size)
        labels, scores = function(image)
        with torch.no_grad():
            wanted, logits = Inference()(model, image), model(image).logits
        assert labels.dtype == torch.uint8 and labels.shape == wanted.shape and len(wanted.unique()) > 1
        assert (labels == wanted).double().mean() > 0.999
        torch.testing.assert_close(scores, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", EXPORTS)
def test_the_file_says_what_it_is(folder, exported, kind):
    path = exported(kind)
    files = {export.METADATA: ""}
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        files = session.get_modelmeta().custom_metadata_map
        assert [(value.name, value.shape) for value in session.get_inputs()] == [("image", ["batch", 3, "height", "width"])]
        assert [value.name for value in session.get_outputs()] == ["labels", "scores"]
    elif kind == "torchscript":
        torch.jit.load(path, _extra_files=files)
    else:
        torch.export.load(path, extra_files=files)
    found, beside = json.loads(files[export.METADATA]), json.loads(path.with_name(path.name + ".json").read_text())
    assert found["classes"] == list(shapes.CLASSES) and found["colours"][3] == [3, 6, 9]
    assert found["checkpoint"] == {"file": "student.pth", "sha256": checkpoint.fingerprint(folder / "student.pth")}
    assert found["input"]["image"]["meaning"] == "RGB, 0..255, not normalised; at least 32x32 pixels"
    assert found["normalization"]["mean"] == pytest.approx([123.675, 116.28, 103.53]) and found["normalization"]["inside"]
    assert found == {name: beside[name] for name in found} and beside["sha256"] == checkpoint.fingerprint(path)
    assert beside["bytes"] == path.stat().st_size < 1.1 * (folder / "student.pth").stat().st_size, "weights once, and the graph"
    if kind != "torchscript":
        assert str(REPOSITORY).encode() not in path.read_bytes(), "no paths of this machine"


def test_int8(folder, exported):
    """One scale per output channel, weights in int8, the metadata kept; the range of the first activation is that of the calibration's
    pictures, and scores are nearer to those in float32 where these are of the kind that is predicted."""
    content = exported("onnx").read_bytes()
    import onnx

    shown = [pictures(1, 64, 80, seed=seed).numpy() // 2 + 40 * seed for seed in range(3)]
    small = export.quantized(content, shown, {"quantization": {"kind": "int8"}})
    proto = onnx.load_from_string(small)
    assert json.loads(proto.metadata_props[0].value) == {"quantization": {"kind": "int8"}}
    values = {value.name: onnx.numpy_helper.to_array(value) for value in proto.graph.initializer}
    weights = [value for value in values.values() if value.dtype == np.int8 and value.ndim == 4]
    convolutions = [node for node in proto.graph.node if node.op_type == "Conv"]
    assert len(weights) == len(convolutions) > 50 and len(small) < len(content) / 2
    assert all(np.abs(weight.astype(int)).max() <= 64 for weight in weights), "2 x 255 x 65 exceeds 16 bits"
    scales = {values[node.input[1]].shape for node in proto.graph.node if node.op_type == "DequantizeLinear" and node.input[1] in values}
    assert {(weight.shape[0],) for weight in weights} <= scales
    made = {output: node for node in proto.graph.node for output in node.output}
    scale, zero = (values[name] for name in made[convolutions[0].input[0]].input[1:])
    mean, std = (np.array(numbers).reshape(3, 1, 1) for numbers in NORMALIZATIONS["imagenet"][1:])
    normalised = (np.concatenate(shown) - mean) / std
    assert scale == pytest.approx((normalised.max() - normalised.min()) / 255, rel=1e-4) and zero.dtype == np.uint8
    assert abs(zero + normalised.min() / scale) <= 0.51, "the smallest value is 0"
    (folder / "int8.onnx").write_bytes(small)
    (folder / "dark.onnx").write_bytes(export.quantized(content, [np.zeros_like(shown[0])], {}))  # the ranges of another kind of picture
    image = pictures(1, 72, 90, seed=9) // 2 + 40
    _, wanted = load("onnx", exported("onnx"))(image)
    errors = {name: ((load("onnx", folder / f"{name}.onnx")(image)[1] - wanted).std() / wanted.std()).item() for name in ("int8", "dark")}
    assert 0 < errors["int8"] < errors["dark"], errors


def test_check_reports_and_fails(folder, monkeypatch):
    """Against a file that is right, and one that calls a tenth of the pixels otherwise."""
    flags = ("--format", "torchscript", "--check", "--split", "val", "--limit", "3")
    assert run(folder, *flags, "--scores", output="right.pt") == 0
    report = json.loads((folder / "right.pt.json").read_text())["check"]
    assert report["label_agreement"] > 0.999 and report["pictures"] == 3 and report["pixels"] == 3 * 96 * 96
    assert report["part"] == "whole" and report["cpu"]
    assert report["crops"]["pixels"] == 3 * (67 * 43 + 2 * 49 * 77) and report["crops"]["label_agreement"] > 0.999
    assert 0 <= report["largest_score_difference"] < 1e-3
    assert report["miou"]["pytorch"] == pytest.approx(report["miou"]["exported"], abs=0.1) and report["milliseconds_per_image"]["exported"] > 0
    right = export.runner

    def wrong(options):
        function = right(options)

        def shifted(image):
            labels = function(image)[0].clone()
            labels[..., : labels.shape[-1] // 10] = (labels[..., : labels.shape[-1] // 10] + 1) % 8
            return (labels,)

        return shifted

    monkeypatch.setattr(export, "runner", wrong)
    assert run(folder, *flags, output="wrong.pt") == 1
    report = json.loads((folder / "wrong.pt.json").read_text())["check"]
    assert report["label_agreement"] == pytest.approx(1 - 9 / 96, abs=1e-3) and report["largest_score_difference"] is None


@pytest.mark.parametrize("wrong", ["shifted", "nan", "infinite"])
def test_check_judges_scores(folder, monkeypatch, wrong):
    """Labels that are right do not excuse scores that are not: all of one picture off by a hundredth of the largest, or one without value."""
    right, lines = export.runner, []

    def runner(options):
        function, calls = right(options), []

        def spoiled(image):
            labels, scores = function(image)
            scores = scores.clone()
            if len(calls) == 1:  # of the first picture, behind the pass that allocates
                if wrong == "shifted":
                    scores += 0.01 * scores.abs().max()
                else:
                    scores[0, 0, 0, 0] = {"nan": np.nan, "infinite": np.inf}[wrong]
            calls.append(image)
            return labels, scores

        return spoiled

    monkeypatch.setattr(export, "runner", runner)
    monkeypatch.setattr(export.logger, "error", lambda text, *values: lines.append(text % values))
    assert run(folder, "--format", "torchscript", "--check", "--limit", "2", "--scores", output=f"{wrong}.pt") == 1
    assert len(lines) == 1 and "a score differs from PyTorch's by" in lines[0]
    found = json.loads((folder / f"{wrong}.pt.json").read_text())["check"]
    assert found["label_agreement"] > 0.999 and found["crops"]["largest_score_difference"] < 1e-3 * found["largest_score"]
    share = found["largest_score_difference"] / found["largest_score"]
    assert 0.005 < share < 0.011 if wrong == "shifted" else share == float("inf")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_segformer_at_the_smallest_size():
    """Its attention pads maps of smaller pictures, which the trace of a larger one leaves out."""
    model = trained(build_model("segformer", "mit_b0", 3, head_width=8))
    labeller = Labeller(deployable(model)[0], False)
    traced = torch.jit.trace(labeller, (pictures(*export.EXAMPLE[::2], export.EXAMPLE[3]),), check_trace=False)
    image = pictures(1, export.SMALLEST, export.SMALLEST)
    assert (traced(image) == Inference()(model, image)).double().mean() > 0.999
    with pytest.raises(RuntimeError, match="Kernel size"):
        traced(pictures(1, 28, 28))


def test_pictures_smaller_than_the_file_takes():
    class Item:
        name, size = "tiny.png", staticmethod(lambda: (31, 40))

    with pytest.raises(ValueError, match="^picture tiny.png has 31 40, the file takes at least 32 32; use larger pictures$"):
        export.check_sizes([Item], None)


@pytest.mark.slow
def test_fixed_size(folder):
    """The file takes that size alone, at any batch, and says it; --check takes parts of the pictures."""
    assert run(folder, "--format", "torch.export", "--size", "64", "80", "--check", "--limit", "1", output="fixed.pt2") == 0
    report = json.loads((folder / "fixed.pt2.json").read_text())
    assert report["size"] == [64, 80] and report["input"]["image"]["shape"] == ["B", 3, 64, 80] and report["check"]["pixels"] == 64 * 80
    assert report["check"]["part"] == "upper left"
    function = load("torch.export", folder / "fixed.pt2")
    assert function(pictures(3, 64, 80))[0].shape == (3, 64, 80)
    with pytest.raises(Exception, match="size"):
        function(pictures(1, 64, 64))


def test_a_checkpoint_of_torchvision(tmp_path):
    """It names no classes; --dataset does. An auxiliary head is left out of the file."""
    torch.manual_seed(0)
    net = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21, aux_loss=True).eval()
    torch.save(net.state_dict(), tmp_path / "theirs.pth")
    assert run(tmp_path, "--format", "torchscript", "--scores", name="theirs.pth") == 0
    found = json.loads((tmp_path / "out.pt.json").read_text())
    assert (found["model"], found["classes"], found["dataset"]) == ("deeplabv3", None, None)
    image = pictures(2, 65, 97)
    mean, std = (torch.tensor(found["normalization"][name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        wanted = net.backbone((image - mean) / std)["out"]
        wanted = net.classifier(wanted)
    torch.testing.assert_close(load("torchscript", tmp_path / "out.pt")(image)[1], wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    assert not [name for name, _ in torch.jit.load(tmp_path / "out.pt").named_parameters() if "aux" in name]
    options = export_options(["--checkpoint", str(tmp_path / "theirs.pth"), "--output", "unread", "--dataset", "voc"], description="")
    assert export.describe(model_from_checkpoint(tmp_path / "theirs.pth")[0], options)["classes"][15] == "person"


@pytest.mark.parametrize("config", [{"classes": ["a", "b", "c"]}, {"classes": list("abcdefgh"), "colours": [[1, 2, 3]]}, {"classes": "abcdefgh"}])
def test_a_file_does_not_name_other_classes_than_it_has(tmp_path, config):
    save_model(tmp_path / "student.pth", **config)
    with pytest.raises(ValueError, match="student.pth: its config has (3 classes|1 colours|no list of classes), the network 8; use another copy"):
        run(tmp_path, "--format", "torchscript")
    assert [path.name for path in tmp_path.iterdir()] == ["student.pth"]


def test_no_file_but_its_own_is_replaced(tmp_path, monkeypatch):
    """One whose check was interrupted is its own too."""
    save_model(tmp_path / "student.pth")
    save_model(tmp_path / "other.pth")
    before = (tmp_path / "other.pth").read_bytes()
    with pytest.raises(ValueError, match=r"other.pth: exists, and was not written by scripts.export \(other.pth.json is missing\); choose another"):
        run(tmp_path, "--format", "torchscript", output="other.pth")
    assert (tmp_path / "other.pth").read_bytes() == before

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(export, "check", interrupted)
        run(tmp_path, "--format", "torchscript", "--check")
    assert "check" not in json.loads((tmp_path / "out.pt.json").read_text())
    assert run(tmp_path, "--format", "torchscript", "--scores") == 0
    assert "scores" in json.loads((tmp_path / "out.pt.json").read_text())["outputs"]


def test_errors_of_runtimes_are_one_line(tmp_path, monkeypatch):
    for kind in ("torchscript", "torch.export"):
        (tmp_path / "broken").write_text("no such thing")
        with pytest.raises(ValueError, match=r"broken does not load \(.+\); do not ship it, and choose another --format$"):
            load(kind, tmp_path / "broken")

    def fails(image):
        raise RuntimeError("\nno such operation\nsecond line")

    monkeypatch.setattr(torch.jit, "load", lambda path, map_location: fails)
    with pytest.raises(ValueError, match=r"out.pt does not run on a picture of 40x50 \(no such operation\); do not ship it, and choose another"):
        load("torchscript", tmp_path / "out.pt")(pictures(1, 40, 50))


def test_errors_of_onnx_are_one_line(tmp_path, monkeypatch):
    needs_onnx()
    import onnx
    from onnxruntime import quantization

    (tmp_path / "broken.onnx").write_text("no such thing")
    with pytest.raises(ValueError, match=r"broken.onnx does not load \(.+\); do not ship it"):
        load("onnx", tmp_path / "broken.onnx")

    def fails(*arguments, **options):
        raise RuntimeError("no such operation")

    monkeypatch.setattr(onnx, "load_from_string", lambda content: None)
    monkeypatch.setattr(quantization, "quantize_static", fails)
    with pytest.raises(ValueError, match=r"^the file cannot be quantized \(no such operation\); export it without --quantize$"):
        export.quantized(b"", [], {})


def test_one_process(folder, monkeypatch):
    monkeypatch.setattr(export.distributed, "world", lambda: 2)
    with pytest.raises(ValueError, match="^a file is exported by one process, 2 were started; start it without torchrun$"):
        run(folder, "--format", "torchscript", output="ranks.pt")
    assert not (folder / "ranks.pt").exists()


def test_refusals(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--output .*: is a folder; give the name of the file"):
        run(folder, "--format", "torchscript", output=".")
    with pytest.raises(ValueError, match="student.pth: is the checkpoint itself; choose another name"):
        run(folder, "--format", "torchscript", output="student.pth")
    with pytest.raises(ValueError, match="--size 100 80: picture .* has 96 96; choose at most that"):
        run(folder, "--format", "torch.export", "--size", "100", "80", "--check", output="out.pt2")
    with pytest.raises(ValueError, match="student.pth has 8 classes, camvid has 11"):
        run(folder, "--format", "torchscript", "--dataset", "camvid")
    torch.manual_seed(0)
    teacher = build_model("lraspp", "mobilenetv3_small", 8, in_channels=4)
    config = {"model": teacher.config, "teacher": None, "dataset": "shapes", "options": {}}
    checkpoint.save(tmp_path / "teacher.pth", {"student": teacher.state_dict(), "step": 0, "metrics": {}, "config": config})
    with pytest.raises(ValueError, match="teacher.pth: a label-assisted teacher needs the labels that it would predict; give a student$"):
        run(tmp_path, "--format", "torchscript", name="teacher.pth")

    def fails(*arguments, **options):
        raise RuntimeError("\nno such operation\nsecond line")

    monkeypatch.setattr(torch.jit, "trace", fails)
    monkeypatch.setattr(torch.export, "export", fails)
    for kind, remedy in (("torchscript", "choose another --format"), ("torch.export", "choose another --format, or fix the size with --size HEIGHT")):
        with pytest.raises(ValueError, match=rf"^pspnet on mobilenetv2 cannot be exported to {kind} \(no such operation\); {remedy}"):
            run(folder, "--format", kind, output="none")
    assert not (folder / "none").exists()


@pytest.mark.parametrize("flags", [(), ("--check",), ("--quantize", "int8")])
@pytest.mark.parametrize("name", export.PACKAGES)
def test_a_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch, name, flags):
    for package in export.PACKAGES:
        monkeypatch.setitem(sys.modules, package, copy) if package != name else monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        importlib.import_module(name)
    message = f"^--format onnx needs {name}; pip install onnx onnxscript, or choose --format torch.export$"
    if flags:
        what = "--format onnx with --check or --quantize" if name == "onnxruntime" else "--format onnx"
        message = f"^{what} needs {name}; pip install onnx onnxscript onnxruntime, or choose --format torch.export$"
    elif name == "onnxruntime":
        message = "missing.pth: no such file"  # it is not needed
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "--dataset", "shapes", *flags, name="missing.pth", output="student.onnx")


WRONG = {
    "split": (("--split", "val"), "--split val is read by --check alone"),
    "limit": (("--quantize", "int8", "--limit", "3"), "--limit 3 is read by --check alone"),
    "data": (("--data", "somewhere"), "--data somewhere is read by --check, --quantize int8 or --dataset folder alone"),
    "calibration": (("--check", "--calibration", "5"), "--calibration 5 is read by --quantize int8 alone"),
    "quantize": (("--quantize", "int8", "--format", "torchscript"), "--quantize int8 makes files of --format onnx, --format is torchscript"),
    "size": (("--size", "64", "--format", "torchscript"), "--size: a file of torchscript takes pictures of any size"),
    "three": (("--size", "64", "64", "64"), "--size 64 64 64: give one number, or height and width"),
    "folder": (("--check", "--dataset", "camvid"), "--data is missing: the folder of camvid"),
    "drawn": (("--check", "--data", "somewhere"), "--data somewhere: shapes has no files"),
    "ending": (("--format", "torchscript"), "--output out.onnx: ends like a file of --format onnx, --format is torchscript; change one"),
    "nowhere": (("--format", "tflite"), "invalid choice: 'tflite'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_flags_that_nobody_reads(folder, case, capsys):
    flags, message = WRONG[case]
    with pytest.raises(SystemExit) as end:
        output = "out.onnx" if case == "ending" else "out"
        export_options(["--checkpoint", str(folder / "student.pth"), "--output", output, *flags], description="")
    assert end.value.code == 2 and message in (text := capsys.readouterr().err) and text.count("\n") == 1


def test_classes_of_a_folder_of_ones_own(tmp_path):
    """--dataset folder takes them from classes.txt, without a check."""
    (tmp_path / "classes.txt").write_text("road\ncar\nsky\n")
    given = ["--checkpoint", "unread", "--output", "unread", "--dataset", "folder", "--data", str(tmp_path)]
    assert export_options(given, description="").spec.classes == ("road", "car", "sky")


# ------------------------------------------------------------------------------------------------------------ models/deploy.py


def test_averages_equal_adaptive_pooling():
    """At every size up to 40, also below the number of regions, where regions overlap."""
    for height in range(1, 41, 3):
        for width in (1, 2, 5, 6, 7, 12, 40):
            x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height), dtype=torch.float64)
            for size in (1, 2, 3, 6, (2, 5)):
                torch.testing.assert_close(average(x, size), F.adaptive_avg_pool2d(x, size), rtol=0, atol=1e-12)


class Recorder(TorchFunctionMode):
    """The dimensions of the queries of every attention that is computed."""

    def __init__(self):
        super().__init__()
        self.dimensions = []

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function is F.scaled_dot_product_attention:
            self.dimensions.append(arguments[0].dim())
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("mask", ["none", "left out", "of all", "of each", "named"])
def test_attention_of_three_dimensions_gets_a_fourth(mask):
    """And has the same values, with every kind of mask."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, 8, generator=generator, dtype=torch.float64) for length in (9, 5, 5))
    shown = torch.rand(2, 9, 5, generator=generator) < 0.7
    shown[..., 0] = True
    given = {"none": (None, 0.0), "left out": (), "of all": (shown[0],), "of each": (shown,), "named": ()}[mask]
    named = {"attn_mask": shown} if mask == "named" else {"scale": 0.3}
    wanted = F.scaled_dot_product_attention(q, k, v, *given, **named)
    with Recorder() as recorder, Exportable():
        found = F.scaled_dot_product_attention(q, k, v, *given, **named)
        F.scaled_dot_product_attention(q[None], k[None], v[None])
    assert recorder.dimensions == [4, 4]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [("pspnet", "resnet18"), ("ocrnet", "resnet18"), ("stdc", "stdc1")])
def test_a_network_as_shipped(name):
    """The same logits without the heads that they do not depend on, and without BatchNorms; the network itself is left as it is."""
    model = trained(build_model(*name, 5, head_width=16 if name[0] != "stdc" else None))
    image, parts = pictures(2, 72, 50), set(model.state_dict())
    shipped, folded = deployable(model)
    assert folded > 20 and not any(isinstance(module, nn.BatchNorm2d) for module in shipped.modules()) and set(model.state_dict()) == parts
    assert not [key for key in shipped.state_dict() if key.startswith(("aux_head", "aux2_head", "detail_head")) or "running" in key]
    assert ("aux" in shipped.channels) == (name[0] == "ocrnet") and "detail" not in shipped.channels
    with torch.no_grad():
        wanted = model(image).logits
        torch.testing.assert_close(shipped(image).logits, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
        labels, scores = Labeller(shipped, scores=True)(image)
        torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
        assert (labels == Inference()(model, image)).double().mean() > 0.999
    plain, none = deployable(model, fold=False)
    assert none == 0 and any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())


NARROW = {"stdc", "ddrnet", "lraspp"}  # other heads are narrowed to save time


@pytest.mark.slow
@pytest.mark.parametrize("name", [(model, backbones_of(model)[-1 if model in ("fcn", "lraspp", "ocrnet") else 0]) for model in MODELS])
def test_every_model_becomes_onnx(tmp_path, name):
    """At sizes on either side of that of the example, one of them smaller than DDRNet's deepest stride."""
    needs_onnx()
    model = trained(build_model(*name, 5, head_width=None if name[0] in NARROW else 16))
    config = {"model": model.config, "teacher": None, "dataset": "shapes", "options": {}}
    checkpoint.save(tmp_path / "student.pth", {"student": model.state_dict(), "step": 0, "metrics": {}, "config": config})
    assert run(tmp_path, "--scores", output="student.onnx") == 0
    function = load("onnx", tmp_path / "student.onnx")
    for size in (*SIZES, (1, 200, 150)):
        image = pictures(*size)
        labels, scores = function(image)
        with torch.no_grad():
            wanted = model(image).logits
            torch.testing.assert_close(scores, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
            assert (labels == Inference()(model, image)).double().mean() > 0.999
