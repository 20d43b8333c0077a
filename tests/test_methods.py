"""The contract, for every method because it exists: a new file in losses/ is tested here without an edit."""

import dataclasses
import re
import shutil
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from losses import METHODS, Method, Setup, build_methods, resolve
from losses.__main__ import over_batch, switches
from losses.task import TaskLoss, cross_entropy
from models import FIELDS, MODELS, backbones_of, build_model
from tests import reference
from tests.paths import REPOSITORY
from utils.distill import Distiller, Teacher

CLASSES = 5
CHANNELS = {"logits": CLASSES, "aux": CLASSES, "head": 16, "c4": 16, "c3": 12, "c2": 8, "c1": 8, "p4": 16, "p3": 12, "p2": 8, "p1": 8}
WIDE = {"logits": CLASSES, "aux": CLASSES, "head": 32, "c4": 32, "c3": 24, "c2": 16, "c1": 16, "p4": 32, "p3": 24, "p2": 16, "p1": 16}
CASES = {  # batch, student's and teacher's channels, map size
    "plain": (2, CHANNELS, WIDE, (16, 16)),
    "odd size": (2, CHANNELS, WIDE, (13, 17)),
    "one image": (1, CHANNELS, WIDE, (16, 16)),
    "equal widths": (2, WIDE, WIDE, (16, 16)),
}


def make(name, student, teacher, batch, size, **given) -> Method:
    return reference.build(name, student=student, teacher=teacher, num_classes=CLASSES, crop=(8 * size[0], 8 * size[1]), global_batch=batch, **given)


def tensors(channels, batch, size, needs, seed, requires_grad=False):
    """Random outputs of a model; stages 1 and 2 are larger, as in a network of stride 8."""
    generator = torch.Generator().manual_seed(seed)
    scale = {"c1": 2, "p1": 2}
    fields = {}
    for need in needs:
        factor = scale.get(need, 1)
        x = torch.randn(batch, channels[need], size[0] * factor, size[1] * factor, generator=generator)
        fields[need] = (x.relu() if need[0] in "hc" else x).requires_grad_(requires_grad)
    return fields


def labels(batch, size, ignored=0.1):
    generator = torch.Generator().manual_seed(7)
    target = torch.randint(0, CLASSES, (batch, size[0], size[1]), generator=generator, dtype=torch.uint8)
    target[torch.rand(target.shape, generator=generator) < ignored] = 255
    return target.repeat_interleave(8, 1).repeat_interleave(8, 2)


def run(method, student, teacher, target):
    terms = method(reference.outputs(student), reference.outputs(teacher), reference.batch_of(target))
    return terms, sum(method.weights[name] * value for name, value in terms.items())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_terms_and_gradients(name, case):
    """Named terms are the active weights, finite scalars; something of the student gets a gradient, and every parameter of the
    method (DDP raises on parameters without one). Only declared outputs are given, so reading another one fails."""
    batch, student_channels, teacher_channels, size = CASES[case]
    if batch < METHODS[name].min_batch:
        with pytest.raises(ValueError, match="is too small, it needs at least"):
            make(name, student_channels, teacher_channels, batch, size)
        return
    method = make(name, student_channels, teacher_channels, batch, size)
    assert set(method.needs) <= set(FIELDS)
    student = tensors(student_channels, batch, size, method.needs, 1, requires_grad=True)
    teacher = tensors(teacher_channels, batch, size, method.needs, 2)
    terms, total = run(method, student, teacher, labels(batch, size))
    assert terms.keys() == method.weights.keys()
    for term, value in terms.items():
        assert value.shape == () and value.isfinite(), term
    total.backward()
    gradients = [t.grad for t in student.values() if t.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)
    for parameter_name, parameter in method.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", METHODS)
def test_every_pixel_ignored(name):
    method = make(name, CHANNELS, WIDE, 2, (16, 16))
    student = tensors(CHANNELS, 2, (16, 16), method.needs, 1, requires_grad=True)
    terms, total = run(method, student, tensors(WIDE, 2, (16, 16), method.needs, 2), labels(2, (16, 16), ignored=2))
    assert all(value.isfinite() for value in terms.values())
    total.backward()
    assert all(t.grad.isfinite().all() for t in student.values() if t.grad is not None)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("name,term", [(name, term) for name, method in METHODS.items() for term in method.terms() if len(method.terms()) > 1])
def test_single_terms(name, term):
    """With every other weight 0 the term is returned alone, and nothing that it does not need is built."""
    zero = {METHODS[name].weight_field(other): 0.0 for other in METHODS[name].terms() if other != term}
    one = {METHODS[name].weight_field(term): 1.0}
    method = make(name, CHANNELS, WIDE, 2, (16, 16), **zero, **one)
    student = tensors(CHANNELS, 2, (16, 16), method.needs, 1, requires_grad=True)
    terms, total = run(method, student, tensors(WIDE, 2, (16, 16), method.needs, 2), labels(2, (16, 16)))
    assert set(terms) == {term}
    total.backward()
    assert all(p.grad is not None for p in method.parameters())


def change_by_halves(method) -> float:
    """Relative change of the gradients of a method on four images when it gets two and two of them."""
    for module in method.double().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # on CPUs it normalises per rank, whatever the loss does
    maps = [{key: x.detach().double() for key, x in tensors(channels, 4, (16, 16), method.needs, seed).items()}
            for channels, seed in ((CHANNELS, 1), (WIDE, 2))]  # fmt: skip
    gradients = []
    for parts in (1, 2):
        divided = deepcopy(method)  # with the queues that it starts from
        student = {key: x.clone().requires_grad_() for key, x in maps[0].items()}
        for part in range(parts):
            own = slice(part * 4 // parts, (part + 1) * 4 // parts)
            batch = reference.batch_of(labels(4, (16, 16))[own])
            batch.offset, batch.global_size = own.start, 4
            outputs = [reference.outputs({key: x[own] for key, x in given.items()}) for given in (student, maps[1])]
            (sum(divided(*outputs, batch).values()) / parts).backward()
        leaves = [*student.values(), *divided.parameters()]
        gradients.append(torch.cat([torch.zeros_like(x).flatten() if x.grad is None else x.grad.flatten() for x in leaves]))
    whole, halves = gradients
    assert whole.norm() > 0
    return ((halves - whole).norm() / whole.norm()).item()


@pytest.mark.parametrize("name,term", [(name, term) for name, method in METHODS.items() for term in method.terms()])
def test_images_that_are_computed_together_are_declared(name, term):
    """Halves of a batch have the gradient of the whole exactly where `over_batch` does not name the term."""
    zero = {METHODS[name].weight_field(other): 0.0 for other in METHODS[name].terms() if other != term}
    method = make(name, CHANNELS, WIDE, 4, (16, 16), **zero, **{METHODS[name].weight_field(term): 1.0})
    change = change_by_halves(method)
    assert change > 1e-4 if term in method.over_batch else change < 1e-6


@pytest.mark.parametrize("name,field,value", [(name, *switch) for name in METHODS for switch in switches(name)])
def test_images_that_an_option_makes_a_loss_compute_together_are_declared(name, field, value):
    try:
        method = make(name, CHANNELS, WIDE, 4, (16, 16), **{field: value})
    except ValueError as error:
        pytest.skip(str(error))
    assert (change_by_halves(method) > 1e-4) == any(method.active(term) for term in method.over_batch)


def test_the_page_marks_terms_that_are_no_mean_over_images():
    assert over_batch("cirkd") == "`minibatch_pixel`, `memory_pixel`, `memory_region`" and over_batch("sp") == "`sp`" and over_batch("cwd") == ""
    assert over_batch("icsd") == "`ics` with `--icsd-form released`" and over_batch("kd") == "`kd` with `--kd-mask-ignored`"


def test_ofd_has_margins_of_the_teachers_norms():
    norms = {stage: (torch.rand(WIDE[stage]) + 0.5, torch.rand(WIDE[stage])) for stage in ("p1", "p2", "p3", "p4")}
    options, _ = resolve(METHODS["ofd"], "shapes", {})
    for given, terms in ((norms, {}), ({"p4": norms["p4"]}, {"ofd": "rank"})):
        method = METHODS["ofd"](options, Setup(CHANNELS, WIDE, CLASSES, (128, 128), 4, teacher_norms=given))
        assert dict(method.over_batch) == terms and (change_by_halves(method) > 1e-4) == bool(terms)


def test_what_a_division_changes():
    """Pairs of the images of all ranks are those of one rank, but not of two micro-batches."""
    method = make("cirkd", CHANNELS, WIDE, 4, (16, 16), gather=True, memory_region_weight=0.0)
    assert method.divided(1, 1) == [] and method.divided(2, 1) == ["memory_pixel"] and method.divided(1, 2) == ["minibatch_pixel", "memory_pixel"]
    assert make("cirkd", CHANNELS, WIDE, 4, (16, 16)).divided(2, 1) == ["minibatch_pixel", "memory_pixel", "memory_region"]
    assert make("kd", CHANNELS, WIDE, 4, (16, 16)).divided(2, 2) == []


@pytest.mark.parametrize("name", METHODS)
def test_autocast(name):
    """Under bfloat16 autocast, with bfloat16 inputs, the terms stay near those in float32 and come in float32."""
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        method = make(name, CHANNELS, WIDE, 2, (16, 16))
        student = {k: v.to(dtype) for k, v in tensors(CHANNELS, 2, (16, 16), method.needs, 1).items()}
        teacher = {k: v.to(dtype) for k, v in tensors(WIDE, 2, (16, 16), method.needs, 2).items()}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            values.append(run(method, student, teacher, labels(2, (16, 16)))[0])
    for term, value in values[0].items():
        assert values[1][term].dtype == torch.float32, term
        assert values[1][term].item() == pytest.approx(value.item(), rel=0.1, abs=1e-3), term


@pytest.mark.parametrize("name", METHODS)
def test_teacher_gets_no_gradient(name):
    torch.manual_seed(0)
    student, teacher = build_model("deeplabv3", "mobilenetv2", CLASSES, aux=True), build_model("pspnet", "resnet18", CLASSES)
    setup = Setup(student.channels, teacher.channels, CLASSES, (128, 128), 2)
    method = build_methods({name: resolve(METHODS[name], "shapes", {})[0]}, setup)
    distiller = Distiller(student, TaskLoss(0.4), method)
    batch = reference.batch_of(labels(2, (16, 16)))
    batch.image = torch.randint(0, 256, batch.image.shape, dtype=torch.uint8)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    total, terms = distiller(batch, Teacher(teacher, distiller.teacher_needs)(batch))
    total.backward()
    assert list(terms) == distiller.term_names
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items()), "running statistics of the teacher moved"
    unused = [n for n, p in distiller.named_parameters() if p.grad is None]
    assert not unused, f"DDP would raise on {unused}"


class Operations(TorchDispatchMode):
    """Those that raise on a GPU under `torch.use_deterministic_algorithms` (its docstring; a summed NLL, but not one per element)."""

    RAISE = ("adaptive_avg_pool2d_backward", "adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward", "reflection_pad", "histc", "median",
             "grid_sampler", "ctc_loss", "max_unpool", "fractional_max_pool", "put_.default", "avg_pool3d_backward")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        summed = name.startswith("nll_loss") and "backward" not in name and args[3] != 0
        if summed or any(part in name for part in self.RAISE) and "index_put" not in name:
            self.found.add(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("stride", [8, 4])
@pytest.mark.parametrize("name", METHODS)
def test_no_method_raises_where_determinism_is_asked_for(name, stride, deterministic):
    """As far as that can be seen without a GPU: none of the operations is used that have no deterministic form on one."""
    size = (96 // stride, 160 // stride)
    method = make(name, CHANNELS, WIDE, 2, (12, 20))
    student, teacher = tensors(CHANNELS, 2, size, method.needs, 1, requires_grad=True), tensors(WIDE, 2, size, method.needs, 2)
    with Operations() as seen:
        run(method, student, teacher, labels(2, (12, 20)))[1].backward()
    assert not seen.found


@pytest.mark.parametrize("model", MODELS)
def test_no_network_raises_where_determinism_is_asked_for(model, deterministic):
    network, image = build_model(model, backbones_of(model)[0], CLASSES, head_width=8 if model != "segformer" else None), torch.zeros(2, 3, 64, 96)
    with Operations() as seen:
        output = network(image, network.channels)
        sum(getattr(output, name).sum() for name in network.channels).backward()
    assert not seen.found


def test_operations_without_a_deterministic_form_are_seen():
    """What the two tests above look for, where it is not asked for."""
    x = torch.randn(1, 5, 6, 6, requires_grad=True)
    with Operations() as seen:
        (F.adaptive_avg_pool2d(x, 4).sum() + F.cross_entropy(x, torch.zeros(1, 6, 6, dtype=torch.long), reduction="sum")).backward()
    assert len(seen.found) == 2


@pytest.mark.parametrize("name", METHODS)
def test_documented(name):
    method = METHODS[name]
    assert method.title and method.paper and method.url.startswith("https://") and method.__doc__
    for field in dataclasses.fields(method.Options):
        assert field.metadata["help"], field.name
    assert method.terms()


@pytest.mark.parametrize("name", METHODS)
def test_all_weights_zero_is_refused(name):
    zero = {METHODS[name].weight_field(term): 0.0 for term in METHODS[name].terms()}
    with pytest.raises(ValueError, match="every weight"):
        make(name, CHANNELS, WIDE, 2, (16, 16), **zero)


SETTINGS = [(name, field.name) for name, method in METHODS.items() for field in dataclasses.fields(method.Options)
            if field.name not in map(method.weight_field, method.terms()) and (name, field.name) != ("afdcd", "contrast")]  # fmt: skip
SILENT = {"adaptor_lr", "tokens_lr", "pretrain", "gather", "memory_limit_mib", "grad_clip"}  # show in no loss of one process


def others(field, value) -> list:
    """Values that are not this one."""
    if field.metadata["choices"]:
        return [choice for choice in field.metadata["choices"] if choice != value]
    return [not value] if isinstance(value, bool) else [1, 2, 3, value + 2, 2 * value + 1] if isinstance(value, int) else [value / 2]


def outcome(cls, options) -> tuple | None:
    """All that a method's options may change: what it reads, its terms, its parameters, every gradient; None where they are refused."""
    torch.manual_seed(0)
    try:
        method = cls(options, Setup(CHANNELS, WIDE, CLASSES, (128, 128), 2))
    except ValueError:
        return None
    student = tensors(CHANNELS, 2, (16, 16), method.needs, 1, requires_grad=True)
    values, total = run(method, student, tensors(WIDE, 2, (16, 16), method.needs, 2), labels(2, (16, 16)))
    total.backward()
    gradients = [x.grad for x in (*student.values(), *method.parameters())]
    return method.needs, list(values), [[] if x is None else x.tolist() for x in (*values.values(), *gradients)]


@pytest.mark.parametrize("name,option", SETTINGS)
def test_what_an_option_says_of_what_reads_it_is_true(name, option):
    """With every term alone: it changes something exactly where it says so, and is refused elsewhere."""
    cls = METHODS[name]
    field = next(field for field in dataclasses.fields(cls.Options) if field.name == option)
    readers = set(field.metadata["terms"] or cls.terms()) & set(cls.terms())
    assert readers
    other, *wanted = field.metadata["only"] or (None,)
    choices = next((f.metadata["choices"] for f in dataclasses.fields(cls.Options) if f.name == other), (None,))
    assert set(wanted) <= set(choices)
    for term in cls.terms():
        for choice in choices:
            alone = {cls.weight_field(each): float(each == term) for each in cls.terms()}
            fixed = {other: choice} if other else {}
            default = dataclasses.replace(resolve(cls, "shapes", alone)[0], **fixed)
            reads = term in readers and (other is None or choice in wanted)
            try:
                resolve(cls, "shapes", alone | fixed | {option: getattr(default, option)})
            except ValueError as error:
                flags = [f"--{switch}{name}-{each}".replace("_", "-") for switch in ("", "no-") for each in (option, *fixed)]
                assert not reads and str(error).startswith(tuple(flags))
            else:
                assert reads
            changed = [dataclasses.replace(default, **{option: value}) for value in others(field, getattr(default, option))]
            found = [result for result in (outcome(cls, options) for options in changed) if result]
            assert any(result != outcome(cls, default) for result in found) == (reads and option not in SILENT), (term, choice)


def test_plain_kd_counts_once():
    setup = Setup(CHANNELS, WIDE, CLASSES, (128, 128), 2)
    both = {name: resolve(METHODS[name], "shapes", {})[0] for name in ("kd", "afdcd")}
    with pytest.raises(ValueError, match="kd and afdcd both contain plain KD.*--kd-weight 0 or --afdcd-kd-weight 0"):
        build_methods(both, setup)
    both["afdcd"] = resolve(METHODS["afdcd"], "shapes", {"kd_weight": 0.0})[0]
    assert list(build_methods(both, setup)) == ["kd", "afdcd"]


def test_initial_weights_do_not_depend_on_other_methods():
    setup = Setup(CHANNELS, WIDE, CLASSES, (128, 128), 2)
    alone = build_methods({"afdcd": resolve(METHODS["afdcd"], "shapes", {"kd_weight": 0.0})[0]}, setup)["afdcd"]
    together = build_methods({"kd": resolve(METHODS["kd"], "shapes", {})[0], "afdcd": alone.options}, setup)["afdcd"]
    for a, b in zip(alone.parameters(), together.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_wrong_term_is_named():
    class Wrong(nn.Module):
        weights, needs, grad_clip = {"one": 1.0}, ("logits",), None

        def forward(self, student, teacher, batch):
            return {"two": student.logits.sum()}

        def factors(self, progress):
            return {}

    student = build_model("deeplabv3", "mobilenetv2", CLASSES)
    distiller = Distiller(student, TaskLoss(0.0), {"wrong": Wrong()})
    with pytest.raises(ValueError, match=r"losses/wrong.py returned the terms \['two'\], its active weights are \['one'\]"):
        distiller(reference.batch_of(labels(2, (8, 8))), None)


def test_task_loss_without_a_labelled_pixel_is_a_connected_zero():
    logits = torch.randn(1, CLASSES, 4, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 32, 32), 255, dtype=torch.uint8), torch.tensor(1.0))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0


def test_copying_a_file_makes_a_method(tmp_path):
    """losses/kd.py under another name is a method: flags, help, training, checkpoint and resume, with no other edit."""
    for name in ("models", "losses", "dataset", "utils", "train_baseline.py", "train_kd.py"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    text = (tmp_path / "losses" / "kd.py").read_text()
    (tmp_path / "losses" / "my_loss.py").write_text(text.replace("class KD(", "class MyLoss(").replace("temperature", "warmth"))

    def call(script, *arguments):
        command = [sys.executable, str(tmp_path / script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    common = ["--dataset", "shapes", "--crop-size", "64", "--batch-size", "2", "--max-iterations", "4", "--val-interval", "1000", "--workers", "0"]
    model = ["--model", "pspnet", "--backbone", "mobilenetv2"]
    teacher = call("train_baseline.py", *common, *model, "--max-iterations", "1", "--save-dir", "teacher")
    assert teacher.returncode == 0, teacher.stdout + teacher.stderr
    flags = ["--method", "my_loss", "--my-loss-warmth", "2", "--teacher-checkpoint", "teacher/student_best.pth", "--save-dir", "run"]
    student = ["--student-model", "pspnet", "--student-backbone", "mobilenetv2"]
    result = call("train_kd.py", *flags, *student, *common, "--log-interval", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 my_loss/my_loss" in result.stdout
    assert re.search(r"my_loss.warmth +2 +command line", (tmp_path / "run" / "log.txt").read_text())
    assert "my_loss/my_loss" in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert "--my-loss-warmth" in call("train_kd.py", "--method", "my_loss", "--help").stdout
    again = call("train_kd.py", *flags, *student, *common, "--resume")
    assert again.returncode == 0 and "done already" in again.stdout
    refused = call("train_kd.py", "--method", "kd", "--my-loss-warmth", "2")
    assert refused.returncode == 2 and "--my-loss-warmth belongs to my_loss" in refused.stderr
