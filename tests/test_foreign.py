"""Teachers that are built elsewhere: a function of the user's, layers by name."""

import json
import math
import sys
from functools import partial

import pytest
import torch
from torch import nn

from models import build_model
from models.fold import fold_batchnorm
from models.foreign import Foreign, build_foreign, proportional
from tests.test_pairs import CLASSES, failures
from tests.workers import RUN, TINY_STUDENT, script
from utils import session
from utils.checkpoint import fingerprint_tensors
from utils.options import train_options

SOURCE = '''
"""Somebody's network and the ways to build it."""

import torch
import torch.nn.functional as F
from torch import nn

print("imported")


def block(inputs, outputs, stride):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Net(nn.Module):
    def __init__(self, classes=8):
        super().__init__()
        self.backbone = nn.ModuleDict({"stem": block(3, 8, 4), "deep": block(8, 16, 2)})
        self.classifier = nn.Sequential(block(16, 10, 1), nn.Conv2d(10, classes, 1))
        self.unused = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        scores = self.classifier(self.backbone["deep"](self.backbone["stem"](x)))
        return {"out": F.interpolate(scores, x.shape[2:], mode="bilinear", align_corners=False)}


class First(Net):
    def forward(self, x):
        return (super().forward(x)["out"], "more")


def build(classes=8):
    torch.manual_seed(7)
    return Net(classes)


def wrong():
    return build(5)


def text():
    return "a network"
'''
LAYERS = ("c4=backbone.deep", "head=classifier.0", "logits=classifier")


@pytest.fixture
def somebodys(tmp_path, monkeypatch):
    """The module `somebody.nets`, on python's path."""
    (tmp_path / "somebody").mkdir()
    (tmp_path / "somebody" / "nets.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    import somebody.nets

    yield somebody.nets
    for name in ("somebody.nets", "somebody"):
        del sys.modules[name]


def teacher_of(net, *layers, normalization="imagenet"):
    return Foreign(net, "somebody.nets:build", dict(layer.split("=") for layer in layers), (64, 64), normalization)


def options_of(*arguments):
    given = ["--dataset", "shapes", *TINY_STUDENT, "--device", "cpu", "--crop-size", "64", "--batch-size", "2", "--dry-run", *arguments]
    return train_options(given, distil=True, description="")


# ------------------------------------------------------------------------------------------------------------------------ outputs


def test_fields_are_the_outputs_of_the_layers(somebodys):
    net = somebodys.build()
    teacher = teacher_of(net, *LAYERS)
    assert dict(teacher.channels) == {"logits": 8, "head": 10, "c4": 16} and teacher.num_classes == 8
    image = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        c4 = net.backbone["deep"](net.backbone["stem"]((image / 255 - mean) / std))
        head = net.classifier[0](c4)
        output = teacher(image, ("logits", "head", "c4"))
    torch.testing.assert_close(output.c4, c4)
    torch.testing.assert_close(output.head, head)
    torch.testing.assert_close(output.logits, net.classifier[1](head))
    assert teacher(image, ("c4",)).computed == ("c4",)
    assert not any(module._forward_hooks for module in teacher.modules())


@pytest.mark.parametrize("kind", ["mapping", "tuple", "tensor"])
def test_logits_are_what_the_network_returns(kind, somebodys):
    net = {"mapping": somebodys.Net, "tuple": somebodys.First, "tensor": lambda: somebodys.Net().classifier[0]}[kind]()
    if kind == "tensor":
        net[0] = nn.Conv2d(3, 10, 3, padding=1)
    teacher = teacher_of(net.eval())
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = net(teacher.normalize(image))
        expected = {"mapping": lambda: expected["out"], "tuple": lambda: expected[0], "tensor": lambda: expected}[kind]()
        assert torch.equal(teacher(image).logits, expected)


def test_a_layer_before_an_inplace_relu_keeps_its_values(somebodys):
    net = somebodys.build()
    teacher = teacher_of(net, "p4=backbone.deep.1", "c4=backbone.deep")
    with torch.no_grad():
        output = teacher(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), ("p4", "c4"))
    assert output.p4.min() < 0 and torch.equal(output.p4.relu(), output.c4)


def test_a_network_that_insists_on_float32_keeps_its_batchnorms(somebodys):
    """Folding is verified in double precision; other networks lose theirs."""

    class Casts(somebodys.Net):
        def forward(self, x):
            return super().forward(x.float())

    assert fold_batchnorm(teacher_of(somebodys.build()), ("logits",))[1] == 3
    teacher = teacher_of(Casts())
    same, folded = fold_batchnorm(teacher, ("logits",))
    assert same is teacher and folded == 0


def test_normalisation(somebodys):
    seen = []
    net = somebodys.build()
    net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = torch.tensor([255, 0, 100], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    for name, expected in [("none", [255, 0, 100]), ("caffe-bgr", [100 - 104.00698793, 0 - 116.66876762, 255 - 122.67891434])]:
        teacher_of(net, normalization=name)(image)
        torch.testing.assert_close(seen[-1][0, :, 0, 0].tolist(), [float(value) for value in expected], rtol=1e-5, atol=1e-5)


def test_multiply_adds(somebodys):
    """8 channels at stride 4, 16, 10 and 8 at stride 8."""
    expected = 16 * 16 * 9 * 3 * 8 + 8 * 8 * (9 * 8 * 16 + 9 * 16 * 10 + 10 * 8)
    assert teacher_of(somebodys.build()).macs == expected


def test_every_method_works_with_such_a_teacher(somebodys):
    """Its logits have the size of the picture, unlike those of this project's models."""
    stages = {f"{kind}{number}": f"backbone.{'deep' if number > 1 else 'stem'}" for kind in "cp" for number in (1, 2, 3, 4)}
    teacher = Foreign(somebodys.build(CLASSES), "x:y", {**stages, "head": "classifier.0", "aux": "classifier"}, (64, 64))
    torch.manual_seed(0)
    assert failures(build_model("pspnet", "resnet18", CLASSES, head_width=8).train(), teacher) == {}


# -------------------------------------------------------------------------------------------------------------------------- files


def test_weights_from_a_file(somebodys, tmp_path):
    state = {key: torch.full_like(value, 3) for key, value in somebodys.build().state_dict().items()}
    torch.save({"epoch": 1, "state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "theirs.pth")
    teacher, report = build_foreign("somebody.nets:build", tmp_path / "theirs.pth", (), (64, 64), None)
    assert all(torch.equal(teacher.net.state_dict()[key], value) for key, value in state.items())
    assert f"{len(state)} of {len(state)} tensors loaded from" in report
    state.pop("unused.bias")
    torch.save({**state, "more": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError) as error:
        build_foreign("somebody.nets:build", tmp_path / "other.pth", (), (64, 64), None)
    first, header, *rows = str(error.value).splitlines()
    assert "2 tensors differ" in first and [row.split()[:2] for row in rows] == [["missing", "unused.bias"], ["unexpected", "more"]]


def test_a_teacher_in_no_file_is_known_by_its_weights(somebodys):
    state = somebodys.build().state_dict()
    again, other = somebodys.build().state_dict(), {**state, "unused.bias": state["unused.bias"] + 1e-6}
    assert fingerprint_tensors(state) == fingerprint_tensors(again) != fingerprint_tensors(other)
    _, identity = session.build_teacher(options_of("--method", "kd", "--teacher-model", "somebody.nets:build"))
    assert identity == {"file": "somebody.nets:build", "sha256": fingerprint_tensors(state)}


# ------------------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["c4=backbone.dep"], "c4=backbone.dep: somebody.nets:build has no layer 'backbone.dep'; near it: backbone.deep"),
        (["c4=zzz"], "has no layer 'zzz'; near it: backbone, classifier, unused"),
        (["c5=backbone.deep"], "no field is called 'c5'; possible: logits, head, c4"),
        (["c4"], "--teacher-layers c4: give FIELD=LAYER"),
        (["c4=", "head=classifier"], "--teacher-layers c4=: give FIELD=LAYER"),
        (["c4=backbone.deep", "c4=classifier"], "--teacher-layers c4=classifier: give FIELD=LAYER, every field once"),
        (["c4=unused"], "layer unused gives nothing for 'c4', not (B, C, h, w); give another --teacher-layers c4=LAYER"),
    ],
)
def test_bad_layers(layers, message, somebodys):
    with pytest.raises(ValueError) as error:
        session.build_teacher(options_of("--method", "kd", "--teacher-model", "somebody.nets:build", "--teacher-layers", *layers))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert session.explain(error.value) == str(error.value)


class Turned(nn.Module):
    """Channels last inside, as in many networks from elsewhere; what it returns is turned back, or not."""

    def __init__(self, back: bool):
        super().__init__()
        self.back, self.scores, self.last = back, nn.Conv2d(3, 8, 3, 8, 1), nn.Identity()

    def forward(self, x):
        found = self.last(self.scores(x).permute(0, 2, 3, 1))
        return found.permute(0, 3, 1, 2) if self.back else found


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (65, 97), (360, 480)], ids=str)
def test_maps_with_the_channels_last_are_refused(size):
    """Their height would be taken for the number of channels."""
    rows, columns = (-(-side // 8) for side in size)
    told = rf"gives \(1, {rows}, {columns}, 8\) for '{{}}' from a picture of {size[0]}x{size[1]}: \(B, h, w, C\), not \(B, C, h, w\); "
    if (rows, columns) != (8, 8):  # then nothing tells them apart
        with pytest.raises(ValueError, match="x:y: the network " + told.format("logits") + r"return permute\(0, 3, 1, 2\) of it"):
            Foreign(Turned(False), "x:y", {}, size)
        with pytest.raises(ValueError, match="x:y: layer last " + told.format("c4") + "give a layer that comes before or after"):
            Foreign(Turned(True), "x:y", {"c4": "last"}, size)
    assert Foreign(Turned(True), "x:y", {"c4": "scores"}, size).channels == {"c4": 8, "logits": 8}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_that_gives_no_numbers_is_refused(value):
    net = Turned(True)
    torch.nn.init.constant_(net.scores.bias, value)
    with pytest.raises(ValueError, match="x:y: the network gives NaN or infinite values for 'logits' from a black picture; mend its weights"):
        Foreign(net, "x:y", {}, (64, 64))


@pytest.mark.parametrize("stride", [1, 2, 4, 7, 16, 32, 1000])
@pytest.mark.parametrize("size", [(64, 64), (65, 97), (360, 480), (512, 1024), (1024, 512)])
def test_maps_of_any_stride_are_taken(stride, size):
    """Sides rounded up, down or to the next, and padded."""
    for rounded in (math.ceil, math.floor, round, lambda side: side // 1 + 1):
        rows, columns = (max(1, rounded(side / stride)) for side in size)
        assert proportional((rows, columns), size)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nobody.nets:build", "--teacher-model nobody.nets:build: there is no module 'nobody'; put the folder that holds it on PYTHONPATH"),
        ("somebody.net:build", "there is no module 'somebody.net'"),
        (":build", "--teacher-model :build: give PACKAGE.MODULE:FUNCTION"),
        (".nets:build", "--teacher-model .nets:build: give PACKAGE.MODULE:FUNCTION"),
        ("somebody.nets:", "--teacher-model somebody.nets:: give PACKAGE.MODULE:FUNCTION"),
        ("somebody.nets:bild", "somebody.nets has no function 'bild' (did you mean build?)"),
        ("somebody.nets:text", "returned a str; it must return a torch.nn.Module"),
        ("somebody.nets:wrong", "teacher somebody.nets:wrong has 5 classes, shapes has 8"),
    ],
)
def test_bad_functions(model, message, somebodys):
    with pytest.raises(ValueError) as error:
        session.build_teacher(options_of("--method", "kd", "--teacher-model", model))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_module_that_lacks_another_one_says_which(somebodys, tmp_path):
    (tmp_path / "somebody" / "broken.py").write_text("import not_installed_here\n")
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        build_foreign("somebody.broken:build", None, (), (64, 64), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "sp"), "--method sp reads head of the teacher, which has none; add head=LAYER to --teacher-layers"),
        (("--method", "cwd", "--cwd-head-weight", "1"), "'head' of the teacher is read, but no layer is named for it; add head=LAYER"),
        (("--method", "kd", "--teacher-backbone", "resnet18"), "--teacher-backbone resnet18: somebody.nets:build builds the whole network; drop"),
    ],
)
def test_what_a_method_needs(arguments, message, somebodys):
    with pytest.raises(ValueError) as error:
        session.train(options_of("--teacher-model", "somebody.nets:build", *arguments), torch.device("cpu"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_layers_belong_to_such_a_teacher():
    with pytest.raises(ValueError, match="--teacher-layers names layers of --teacher-model PACKAGE.MODULE:FUNCTION; drop it"):
        session.build_teacher(options_of("--method", "kd", "--teacher-model", "pspnet", "--teacher-layers", *LAYERS))


def test_dry_run_reads_no_checkpoint(somebodys):
    arguments = ("--method", "kd", "cwd", "--cwd-head-weight", "50", "--teacher-model", "somebody.nets:build", "--teacher-layers", *LAYERS)
    session.train(options_of(*arguments, "--teacher-checkpoint", "no such file.pth"), torch.device("cpu"))


# -------------------------------------------------------------------------------------------------------------------- a whole run


def on_python_path(folder) -> None:
    sys.path.insert(0, str(folder))


def test_distillation(somebodys, tmp_path):
    """Three steps with a logit and a feature method: the teacher's outputs reach the losses, and the run says whose they are."""
    torch.save(somebodys.build().state_dict(), tmp_path / "theirs.pth")
    teacher = ("--teacher-model", "somebody.nets:build", "--teacher-checkpoint", "theirs.pth", "--teacher-layers", *LAYERS)
    arguments = ("--method", "kd", "cwd", "--cwd-head-weight", "50", *teacher, *TINY_STUDENT, *RUN, "--max-iterations", "3", "--workers", "0")
    started = script(tmp_path, "train_kd.py", *arguments, "--save-dir", "run", change=partial(on_python_path, tmp_path))
    assert started.wait() == [0], started.text
    assert "imported" in started.text and "teacher: somebody.nets:build, 0.00 M parameters" in started.text
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "cwd/head" in row]
    assert [row["step"] for row in losses] == [1, 2, 3] and all(row["kd/kd"] > 0 and row["cwd/head"] > 0 for row in losses)
    teacher = json.loads((tmp_path / "run" / "args.json").read_text())["teacher"]
    assert teacher["file"] == "theirs.pth" and len(teacher["sha256"]) == 64
