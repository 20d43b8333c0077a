"""What a training step costs on this machine, part by part, beside the plain form of each part (`scripts/plain.py`).

    python -m scripts.benchmark                                     # hours on one CPU core
    python -m scripts.benchmark --amp off bf16 --step-repeats 1     # in both precisions, with one repeat of what takes longest
    python -m scripts.benchmark --quick --methods kd cirkd          # seconds: small shapes, one repeat
    python -m scripts.benchmark --parts step --shapes camvid --amp bf16 --step-repeats 1 --methods kd afdcd afdcd:afdcd-projector=bottleneck
    python -m scripts.benchmark --parts step --compile off default --methods kd

Parts: of every method the loss, forward and backward, and the whole step (DeepLabV3-ResNet101 -> DeepLabV3-ResNet18); Af-DCD's contrast
and the front of its projector alone; then the task loss, the teacher, the metric and the loader. Both forms run interleaved on the same
fresh inputs after a warm-up; times are medians: process CPU time on one thread, or a GPU's own clock. Their results are compared in the
same run. Ours gets maps, weights and pictures in the memory formats of a training, the plain form in NCHW, as published trainings have
them. Under --amp bf16 both run in autocast; --compile compiles the networks of our form only. A method without a plain form in a `loss` row is
computed as its formula is written; its `step` row shows what the rest of the step gains.

Writes table.md and rows.json to --output after every row. A command that was interrupted, or another one with the same --output, goes on
with the rows that are there; all have to be of one machine and one commit.

Peaks are bytes of tensors made inside and alive at once (a GPU: of its allocator); on a CPU scratch memory within an operation is not seen.
Operations are those that torch's dispatcher computes, on a GPU about one kernel each; blocks are waits of the host for the device. Both and
the peak are of a run of its own, in which nothing is compiled: Af-DCD's contrast makes the same tensors and 4 MiB more then on a CPU. The
floor is what the products, each at its own precision, and the bytes of the inputs of a loss or a piece and of the weights of a step or a
teacher take at the best rates that a few 3x3 convolutions and a sum reached on this machine at the start, the larger of the two. `of KD` is
the time relative to plain KD's in the same part, shape, precision and --compile mode. Errors are relative, in the L2 norm: of the result, and
of all gradients (a step's: of the first step, at which both forms have the same weights).
"""

import argparse
import copy
import json
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import Batch, Cache, build_dataset
from dataset.reading import read_image, read_label
from dataset.transforms import PAD_COLOUR, Augment, draw, image_region
from losses import METHODS, Setup, build_methods, projection
from losses import contrast as omni
from losses.task import TaskLoss, cross_entropy
from models import SegOutput, build_model
from models.backbones import on_meta
from models.fold import fold_batchnorm
from scripts import plain
from scripts.compare import METHOD_FLAGS, Arm, parse_arm
from scripts.watch import Watch, watched
from utils import engine, metrics
from utils.distill import Distiller, Teacher, check_compile
from utils.optim import build_optimizers
from utils.options import COMPILE, train_options
from utils.run import commit, write_text, writing
from utils.session import explain


@dataclass(frozen=True)
class Shape:
    """A data set whose options are taken, the crop and batch of a step, the size of a picture on disk, and the two networks' backbones."""

    dataset: str
    classes: int
    crop: tuple[int, int]
    batch: int
    picture: tuple[int, int]
    student: str = "resnet18"
    teacher: str = "resnet101"


FORMS = ("ours", "plain")
PARTS = ("task", "teacher", "metric", "loader", "piece", "loss", "step")
SHAPES = (Shape("camvid", 11, (360, 360), 4, (360, 480)), Shape("citys", 19, (512, 1024), 2, (1024, 2048)))
QUICK = (Shape("shapes", 5, (64, 64), 2, (64, 96), "mobilenetv3_small", "resnet18_vanilla"),)


IN_A_ROW = 8  # samples of one measurement of the loader
KD, COMPILED = parse_arm("kd"), ", --compile "


@dataclass
class Row:
    """One measurement; None where it does not apply. Times in ms, memory in MiB."""

    part: str
    name: str
    shape: str
    amp: str  # "off": float32
    repeats: int
    ms: float
    plain_ms: float | None = None
    peak: float | None = None
    plain_peak: float | None = None
    value_error: float | None = None  # relative, of the results
    gradient_error: float | None = None  # relative, L2; labels and counts: share that differs
    operations: int | None = None
    blocks: int | None = None
    floor_ms: float | None = None


class Machine:
    """The device, its clock and its measured rates."""

    def __init__(self, device: torch.device, quick: bool):
        self.device = device
        side, numbers = (16, 1 << 22) if quick else (128 if device.type == "cuda" else 64, 1 << 26)
        numbers = torch.randn(numbers, device=device)
        self.flops = {dtype: self.products(side, dtype) for dtype in (torch.float32, torch.bfloat16)}  # per second
        self.bandwidth = 8 * len(numbers) / self.least(lambda: numbers.add_(1))  # bytes per second: read and written

    def products(self, side: int, dtype: torch.dtype) -> float:
        """Operations per second of 3x3 convolutions, the best of three widths: on some CPUs a product of matrices reaches half of it."""
        rates = []
        for channels, size in ((128, 2 * side), (256, side), (512, side // 2)):
            x = torch.randn(1, channels, size, size, device=self.device, dtype=dtype)
            weight = torch.randn(channels, channels, 3, 3, device=self.device, dtype=dtype)
            for layout in (torch.contiguous_format, torch.channels_last):
                a, b = x.to(memory_format=layout), weight.to(memory_format=layout)
                rates.append(2 * x.numel() * weight[0].numel() / self.least(lambda a=a, b=b: F.conv2d(a, b, padding=1)))
        return max(rates)

    def seconds(self, function: Callable) -> tuple[float, object]:
        """(the time that it took, its result)."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            result = function()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1000, result
        start = time.process_time()
        result = function()
        return time.process_time() - start, result

    def least(self, function: Callable, repeats: int = 5) -> float:
        return min(self.seconds(function)[0] for _ in range(repeats + 1))

    def watched(self, function: Callable) -> Watch:
        return watched(function, self.device)

    def floor(self, flops: dict[torch.dtype, int], size: int) -> float:
        """Milliseconds that the products of each precision, or `size` bytes, take at the measured rates, whichever is more."""
        products = sum(count / self.flops.get(dtype, self.flops[torch.float32]) for dtype, count in flops.items())
        return 1000 * max(products, size / self.bandwidth)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else cpu_name()

    def plain(self) -> dict:
        """What rows have to share to stand in one table, and the rates."""
        same = {"device": self.name, "threads": torch.get_num_threads(), "torch": str(torch.__version__), "commit": commit()}
        return same | {"gflops": {name_of(dtype): rate / 1e9 for dtype, rate in self.flops.items()}, "gb_per_s": self.bandwidth / 1e9}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cpu_name() -> str:
    """The processor and the widest instructions that torch uses on it: virtual machines give many processors one name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor() or platform.machine())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def compare(machine: Machine, row: dict, forms: dict[str, Callable], inputs: Callable, repeats: int, error: Callable, size=lambda given: 0,
            sums: int = 0, warm_up: int = 1) -> Row:
    """Measure the forms "ours" and, if there is one, "plain", each called with what `inputs(number)` returns.

    error: (ours, plain) -> (value error, gradient error) of their results; size: bytes that have to be read and written; sums: operations in
    float32 that are no product, and therefore not counted by themselves.
    """
    times, errors = {name: [] for name in forms}, []
    for number in range(warm_up + repeats):
        given, results = inputs(number), {}
        for name in list(forms)[:: 1 if number % 2 else -1]:
            seconds, results[name] = machine.seconds(lambda run=forms[name], given=given: run(*given))
            if number >= warm_up:
                times[name].append(1000 * seconds)
        if "plain" in forms:
            errors.append(error(results["ours"], results["plain"]))
        del results
    given = inputs(warm_up + repeats)
    watches = {name: machine.watched(lambda run=run: run(*given)) for name, run in forms.items()}
    ours, other = watches["ours"], watches.get("plain")
    return Row(
        **row, repeats=repeats, ms=statistics.median(times["ours"]), plain_ms=statistics.median(times["plain"]) if other else None,
        peak=ours.peak / 2**20, plain_peak=other.peak / 2**20 if other else None,
        value_error=max(e[0] for e in errors) if other else None, gradient_error=max(e[1] for e in errors) if other else None,
        operations=ours.operations, blocks=len(ours.blocks), floor_ms=machine.floor(ours.flops + Counter({torch.float32: sums}), size(given)) or None,
    )  # fmt: skip


def relative(ours: Tensor, other: Tensor) -> float:
    """||ours - other|| / ||other||, 0 where both are 0."""
    difference, norm = (ours.double() - other.double()).norm().item(), other.double().norm().item()
    return difference / norm if difference else 0.0


def differ(ours: Tensor, other: Tensor) -> tuple[float, float]:
    """For counts and labels: (0, share that differs)."""
    return 0.0, (ours.long() != other.long()).double().mean().item()


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Bench:
    """The rows of one shape."""

    def __init__(self, shape: Shape, machine: Machine, repeats: int, step_repeats: int, amp: str):
        self.shape, self.machine, self.repeats, self.step_repeats, self.amp = shape, machine, repeats, step_repeats, amp
        self.device = machine.device
        torch.manual_seed(0)
        # an auxiliary head, since methods read it
        self.student, self.teacher = (build_model("deeplabv3", name, shape.classes, aux=True) for name in (shape.student, shape.teacher))
        # as trained networks have it: random ones whose BatchNorms do not fit end in huge maps, on which losses take other paths
        self.teacher.train()
        with torch.no_grad():
            for norm in (module for module in self.teacher.modules() if isinstance(module, torch.nn.BatchNorm2d)):
                norm.momentum = 1.0
            self.teacher(torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8), self.teacher.channels)
        self.teacher.eval()
        for module in self.student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # its mask depends on the layout, and the two forms shall compute the same
        seen = on_meta(self.teacher, torch.zeros(1, 3, *shape.crop, device="meta"), needs=self.teacher.channels)
        self.sizes = {name: getattr(seen, name).shape[-2:] for name in self.teacher.channels}
        networks = {"student": self.student, "teacher": self.teacher}
        self.formats = {form: {who: self.formats_of(model, self.layout(form, who)) for who, model in networks.items()} for form in FORMS}

    def layout(self, form: str, who: str) -> torch.memory_format:
        """Memory format of the student's or the teacher's weights: ours as `train_kd.py` arranges them, the plain form's NCHW."""
        if form == "plain":
            return torch.contiguous_format
        return engine.memory_format(SimpleNamespace(channels_last=None, amp=self.amp), self.device, trained=who == "student")

    @torch.no_grad()
    def formats_of(self, model, layout: torch.memory_format) -> dict[str, tuple[torch.dtype, torch.memory_format]]:
        """Type and memory format of every output of a network whose weights are in a layout, as they are seen in a pass."""
        model = copy.deepcopy(model).eval().to(device=self.device, memory_format=layout)
        image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=self.device)
        with self.autocast():
            output = model(image, model.channels)
        outputs = {name: getattr(output, name) for name in model.channels}
        return {name: (x.dtype, torch.contiguous_format if x.is_contiguous() else torch.channels_last) for name, x in outputs.items()}

    def autocast(self, dtype: torch.dtype | None = None):
        """Of `dtype`, None: of the steps."""
        dtype = dtype or engine.AMP[self.amp]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    @property
    def shape_name(self) -> str:
        height, width = self.shape.crop
        return f"{self.shape.dataset} {self.shape.batch}x{height}x{width}"

    def row(self, part: str, name: str, amp: str = "off") -> dict:
        return {"part": part, "name": name, "shape": self.shape_name, "amp": amp}

    def options(self, arm: Arm):
        height, width = map(str, self.shape.crop)
        data = [] if self.shape.dataset == "shapes" else ["--data", "unused"]
        given = ["--method", *arm.methods, "--dataset", self.shape.dataset, *data, "--crop-size", height, width, "--save-dir", "unused"]
        given += ["--batch-size", str(self.shape.batch), "--amp", self.amp, "--max-iterations", "100"]
        given += ["--lr", "1e-6"]  # the student stays what it is, and all repeats measure the same
        given += [text for flag, value in arm.flags.items() for text in (f"--{flag}", *value.split())]
        return train_options(given, distil=True, description="")

    def methods(self, options):
        setup = Setup(self.student.channels, self.teacher.channels, self.shape.classes, self.shape.crop, self.shape.batch, self.shape.dataset,
                      teacher_norms=self.teacher.norms)  # fmt: skip
        return build_methods(options.methods, setup)

    def batch(self, number: int) -> Batch:
        """Pictures of noise with labels in blobs, one in ten pixels ignored."""
        shape, generator = self.shape, torch.Generator().manual_seed(number)
        scores = torch.randn(shape.batch, shape.classes, 8, 8, generator=generator)
        target = F.interpolate(scores, size=shape.crop, mode="bilinear").argmax(1).to(torch.uint8)
        target[torch.rand(target.shape, generator=generator) < 0.1] = 255
        image = torch.randint(0, 256, (shape.batch, 3, *shape.crop), generator=generator, dtype=torch.uint8)
        image = image.contiguous(memory_format=torch.channels_last)  # as `collate` stacks them
        batch = Batch(image, target, [str(k) for k in range(shape.batch)]).to(self.device)
        batch.step, batch.progress, batch.offset, batch.global_size = number, number / 100, 0, shape.batch
        batch.valid = (batch.target != 255).sum().double().clamp(min=1)
        return batch

    def maps(self, number: int, needs, who: str, form: str) -> dict[str, Tensor]:
        """Random outputs of a network, positive where a ReLU ends them, in type and memory format of the form's training."""
        generator, channels = torch.Generator().manual_seed(number), getattr(self, who).channels
        maps = {}
        for name in needs:
            dtype, layout = self.formats[form][who][name]
            x = torch.randn(self.shape.batch, channels[name], *self.sizes[name], generator=generator)
            x = x.relu() if name[0] in "hc" else 3 * x if name in ("logits", "aux") else x
            maps[name] = x.to(device=self.device, dtype=dtype, memory_format=layout)
        return maps

    def loss(self, arm: Arm) -> Row:
        """A method alone on random outputs of both networks, forward and backward."""
        (name,) = arm.methods
        method = self.methods(self.options(arm))[name].to(device=self.device)
        methods = {"ours": method, "plain": copy.deepcopy(method)}  # class queues change with every batch

        def prepared(form, number):
            method, context, batch = methods[form], plain.forms if form == "plain" else nullcontext, self.batch(number)
            student = {key: x.requires_grad_() for key, x in self.maps(number, method.needs, "student", form).items()}
            teacher = self.maps(1000 + number, method.needs, "teacher", form)
            leaves = [*student.values(), *(p for p in method.parameters() if p.requires_grad)]

            def run():
                with context(), self.autocast():
                    terms = method(SegOutput(**student), SegOutput(**teacher), batch)
                    total = sum(method.weights[term] * value for term, value in terms.items())
                return total.detach(), torch.autograd.grad(total, leaves, allow_unused=True)

            return run

        def error(ours, theirs):
            pairs = [(a, b) for a, b in zip(ours[1], theirs[1], strict=True) if a is not None and b is not None]
            flat = [torch.cat([pair[side].flatten().float() for pair in pairs]) for side in (0, 1)]
            return relative(ours[0], theirs[0]), relative(*flat)

        names = ["ours", *(["plain"] if name in plain.METHODS else [])]
        forms = {form: lambda given, form=form: given[form]() for form in names}
        student, teacher = (self.maps(0, method.needs, who, "ours").values() for who in ("student", "teacher"))
        size = bytes_of(teacher) + 2 * bytes_of(student)
        return compare(self.machine, self.row("loss", arm.name, self.amp), forms,
                       lambda number: ({form: prepared(form, number) for form in names},), self.repeats, error, lambda given: size)  # fmt: skip

    def step(self, arm: Arm, mode: str = "off") -> Row:
        """A whole step of `train_step` under `--compile mode`; its plain form has the teacher as it was trained, NCHW, and every plain form."""
        options, trainings, first = self.options(arm), {}, {form: {} for form in FORMS}
        torch.compiler.reset()  # networks share their code, of which a process keeps eight compiled forms: the ninth would run uncompiled
        for form in FORMS:
            torch.manual_seed(0)
            options.compile = mode if form == "ours" else "off"
            distiller = Distiller(copy.deepcopy(self.student), TaskLoss(0.4), self.methods(options), options.compile).to(self.device)
            distiller.arrange(self.layout(form, "student"))
            teacher = fold_batchnorm(self.teacher, distiller.teacher_needs)[0] if form == "ours" else copy.deepcopy(self.teacher)
            teacher = Teacher(teacher.to(device=self.device, memory_format=self.layout(form, "teacher")), distiller.teacher_needs,
                              dtype=engine.AMP[self.amp] if form == "ours" else None, compile=options.compile)  # fmt: skip
            optimizers = build_optimizers(distiller, options)
            trainings[form] = engine.Training(distiller, optimizers, copy.copy(options), self.device), distiller, teacher

        def run(form, context):
            training, distiller, teacher = trainings[form]

            def step(batches):
                hooks = [] if first[form] else [
                    p.register_post_accumulate_grad_hook(lambda p, name=name: first[form].update({name: p.grad.clone()}))
                    for name, p in distiller.named_parameters() if p.requires_grad
                ]  # fmt: skip
                with context():
                    engine.train_step(training, distiller, teacher, [batches[form]], training.record)
                for hook in hooks:
                    hook.remove()
                return training.record.rows[-1]

            return step

        def inputs(number):
            batch = self.batch(number)
            return ({"ours": batch, "plain": replace(batch, image=batch.image.contiguous())},)

        def error(ours, theirs):  # the first step alone begins with equal weights
            assert first["ours"].keys() == first["plain"].keys()  # though not in the same order
            value, other = (trainings[form][0].record.rows[0][0] for form in FORMS)
            return relative(value, other), relative(*(torch.cat([first[form][name].flatten() for name in first["ours"]]) for form in FORMS))

        forms = {"ours": run("ours", nullcontext), "plain": run("plain", plain.forms)}
        _, distiller, teacher = trainings["ours"]
        # weights of the teacher; of what is trained, weights and momentum read and written and gradients written and read
        size = bytes_of(teacher.model.parameters()) + 6 * bytes_of(p for p in distiller.parameters() if p.requires_grad)
        warm_up = 1 if mode in ("off", "default") else 3  # a CUDA graph is recorded in the second step
        return compare(self.machine, self.row("step", step_name(arm, mode), self.amp), forms, inputs, self.step_repeats, error, lambda given: size,
                       warm_up=warm_up)  # fmt: skip

    def task(self) -> list[Row]:
        """Cross-entropy with the upsampling, forward and backward."""

        def run(function, logits, batch):
            logits = logits.detach().requires_grad_()
            value = function(logits, batch.target, batch.valid)
            return value.detach(), torch.autograd.grad(value, logits)[0]

        def inputs(number):
            return {form: self.maps(number, ["logits"], "student", form)["logits"].float() for form in FORMS}, self.batch(number)

        forms = {
            "ours": lambda logits, batch: run(cross_entropy, logits["ours"], batch),
            "plain": lambda logits, batch: run(plain.cross_entropy, logits["plain"], batch),
        }
        return [compare(
            self.machine, self.row("task", "cross-entropy"), forms, inputs, self.repeats, lambda a, b: (relative(a[0], b[0]), relative(a[1], b[1])),
            lambda given: 2 * bytes_of([given[0]["ours"]]) + given[1].target.numel(),
        )]  # fmt: skip

    def teacher_forms(self) -> list[Row]:
        """The frozen teacher, exact and in bfloat16, against the network as it was trained; the gradient error is the share of classes
        that differ."""
        needs, rows = ("logits", "head"), []
        folded = fold_batchnorm(self.teacher, needs)[0]
        other = copy.deepcopy(self.teacher).to(self.device)
        for name, dtype in (("exact", None), ("bf16", torch.bfloat16)):
            ours = Teacher(copy.deepcopy(folded).to(device=self.device, memory_format=self.layout("ours", "teacher")), needs, dtype=dtype)

            def run(batch, ours=ours, dtype=dtype):
                with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                    return ours(batch).logits

            def as_trained(batch):
                with torch.no_grad():
                    return other(batch.image, needs).logits

            forms = {"ours": run, "plain": as_trained}
            rows.append(compare(
                self.machine, self.row("teacher", name, "bf16" if dtype else "off"), forms, lambda number: (self.batch(number),), self.step_repeats,
                lambda a, b: (relative(a, b), differ(a.argmax(1), b.argmax(1))[1]), lambda given, ours=ours: bytes_of(ours.model.parameters()),
            ))  # fmt: skip
        return rows

    def metric(self) -> list[Row]:
        """Classes and counts of upsampled scores, and of the network's, of one picture; the gradient error is the share that differs."""
        classes, size = self.shape.classes, self.shape.crop

        def inputs(number):
            logits = {form: self.maps(number, ["logits"], "student", form)["logits"][:1].float() for form in FORMS}
            return logits, metrics.upsampled(logits["plain"], size), self.batch(number).target[:1]

        forms = {
            "counts": (lambda _, scores, target: metrics.confusion(metrics.class_of(scores), target, classes),
                       lambda _, scores, target: plain.confusion(scores.argmax(1), target, classes)),
            "counts and upsampling": (lambda logits, _, target: metrics.confusion(metrics.labels_at(logits["ours"], size), target, classes),
                                      lambda logits, _, target: plain.confusion(plain.labels_at(logits["plain"], size), target, classes)),
        }  # fmt: skip
        return [
            compare(self.machine, self.row("metric", name), {"ours": ours, "plain": other}, inputs, self.repeats, differ,
                    lambda given, name=name: bytes_of([given[0]["ours"] if "and" in name else given[1], given[2]]))
            for name, (ours, other) in forms.items()
        ]  # fmt: skip

    def piece(self) -> list[Row]:
        """Af-DCD's contrast, and alignment and first convolution of its projector under each mask, forward and backward, on maps of `c4`."""
        chosen = self.options(parse_arm("afdcd"))
        options, method = chosen.methods["afdcd"], self.methods(chosen)["afdcd"].to(device=self.device)
        settings = (options.pool, options.patch, options.groups, options.tau, options.negatives, options.distance)
        layers = method.align, method.projector.first

        def run(function, leaves, direction=None):
            with self.autocast():
                result = function()
                total = result if direction is None else (result.float() * direction).sum()
            return total.detach(), torch.autograd.grad(total, leaves)

        def contrast(name, form):
            def of(maps, _):
                generated = maps[name][1].detach().requires_grad_()
                return run(lambda: form(generated, maps[name][2], *settings), [generated])

            return of

        def front(name, form):
            def of(maps, direction):
                feature = maps[name][0].detach().requires_grad_()
                return run(lambda: form(*layers, feature), [feature, *(p for layer in layers for p in layer.parameters())], direction)

            return of

        def inputs(number):
            maps = {form: (self.maps(number, ["c4"], "student", form)["c4"], *(self.maps(number + k, ["c4"], "teacher", form)["c4"] for k in (1, 2)))
                    for form in FORMS}  # fmt: skip
            for form, (feature, generated, teacher) in maps.items():  # what the projector returns
                maps[form] = feature, projection.as_convolved(generated), teacher
            return maps, torch.randn(maps["plain"][1].shape, generator=torch.Generator().manual_seed(number)).to(self.device)

        def error(ours, theirs):
            return relative(ours[0], theirs[0]), max(relative(a, b) for a, b in zip(ours[1], theirs[1], strict=True))

        forms = {"contrast": (contrast("ours", omni.contrast), contrast("plain", plain.contrast))}
        side = self.sizes["c4"]
        noise = torch.rand(self.shape.batch, 1, *side, generator=torch.Generator().manual_seed(0)).to(self.device)
        for kind, mask in (("centre", projection.centre_mask(*side, self.device)), ("random", projection.random_mask(noise, 0.75))):
            forms[f"front, {kind} mask"] = (
                front("ours", partial(projection.front, mask=mask)), front("plain", partial(projection.plain_front, mask=mask)),
            )
        rows, columns = (length // max(options.pool, 1) // options.patch for length in side)
        numbers = self.teacher.channels["c4"] * options.groups * options.patch**4  # differences of the cells of a patch
        sums = 2 * self.shape.batch * rows * columns * numbers
        return [
            compare(self.machine, self.row("piece", name, self.amp), {"ours": ours, "plain": other}, inputs, self.step_repeats, error,
                    lambda given: 3 * bytes_of([given[0]["ours"][1]]), sums if name == "contrast" else 0)
            for name, (ours, other) in forms.items()
        ]  # fmt: skip

    def loader(self) -> list[Row]:
        """A training sample from a PNG of the data set's size to the arrays that are sent to the device, on the host, and from decoded
        pictures; then what bounds each, decoding and scaling alone. Timed over IN_A_ROW samples, one after the other as a loader makes
        them. The gradient error is the share of labels that differ, the value error that of the picture."""
        rows, augment = [], Augment(self.shape.crop)
        with tempfile.TemporaryDirectory() as folder:
            for kind in ("train", "trainannot"):
                Path(folder, kind).mkdir()
            for number in range(4):
                paint(Path(folder, "train", f"{number}.png"), Path(folder, "trainannot", f"{number}.png"), self.shape.picture, number)
            pictures = build_dataset("camvid", folder, "train", augment=augment)
            kept = build_dataset("camvid", folder, "train", augment=augment)
            kept.keep(Cache("ram", tell=lambda line: None))

            def load(dataset):
                return lambda index, position: dataset[index, position]

            def as_published(index, position):
                height, width = self.shape.picture
                return plain.training_sample(pictures.items[index], draw(np.random.default_rng([0, position]), height, width, augment))

            def decode(index, position):
                image, label = pictures.items[index].files()
                return read_image(image), read_label(label)

            def scale(index, position):
                image, _ = arrays[index]
                height, width = image.shape[:2]
                drawn = draw(np.random.default_rng([0, position]), height, width, augment)
                return image_region(image, drawn.scale, *drawn.box(height, width))

            arrays = [decode(index, 0) for index in range(len(pictures.items))]

            def in_a_row(form):
                return lambda first: [form(number % 4, number) for number in range(first, first + IN_A_ROW)]

            def error(ours, theirs):
                errors = [error_of(*pair) for pair in zip(ours, theirs, strict=True)]
                return max(error[0] for error in errors), max(error[1] for error in errors)

            def error_of(ours, theirs):
                picture = ours.image.astype(np.float32) - np.float32(PAD_COLOUR)
                picture, target, other, labels = map(torch.from_numpy, (picture.transpose(2, 0, 1), ours.target, *theirs))
                return relative(picture, other), differ(target, labels)[1]

            host = copy.copy(self.machine)
            host.device = torch.device("cpu")
            for name, form in (("sample", load(pictures)), ("sample, cached", load(kept)), ("decoding alone", decode), ("scaling alone", scale)):
                forms = {"ours": in_a_row(form)} | ({"plain": in_a_row(as_published)} if name.startswith("sample") else {})
                row = compare(host, self.row("loader", name), forms, lambda number: (IN_A_ROW * number,), self.repeats, error)
                row.ms, row.plain_ms = row.ms / IN_A_ROW, row.plain_ms and row.plain_ms / IN_A_ROW
                row.peak = row.plain_peak = row.operations = row.blocks = None  # arrays, of which torch knows nothing
                rows.append(row)
        return rows


def step_name(arm: Arm, mode: str) -> str:
    """Of its row, under `--compile mode`."""
    return arm.name if mode == "off" else f"{arm.name}{COMPILED}{mode}"


def paint(image: Path, label: Path, size: tuple[int, int], seed: int) -> None:
    """A picture with the detail of a street, as PNG, and labels in blobs."""
    random = np.random.default_rng(seed)
    coarse = cv2.resize(random.integers(0, 256, (16, 32, 3), dtype=np.uint8), size[::-1], interpolation=cv2.INTER_CUBIC)
    noise = random.integers(-6, 7, (*size, 3), dtype=np.int16)
    cv2.imwrite(str(image), np.clip(coarse.astype(np.int16) + noise, 0, 255).astype(np.uint8))
    cv2.imwrite(str(label), cv2.resize(random.integers(0, 12, (16, 32), dtype=np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST))


def table(rows: list[Row]) -> str:
    """A markdown table. `of KD` is the time relative to plain KD's in the same part, shape, precision and --compile mode; `from fp32` the plain
    form's time in float32 relative to ours in half precision, where the table has both."""
    head = ["part", "name", "shape", "amp", "repeats", "ms", "plain ms", "ratio", "from fp32", "peak MiB", "plain", "ratio", "from fp32", "of KD",
            "value error", "gradient error", "operations", "blocks", "floor ms"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    known = {(row.part, row.name, row.shape, row.amp): row for row in rows}
    for row in rows:
        kd = known.get((row.part, step_name(KD, row.name.partition(COMPILED)[2] or "off"), row.shape, row.amp))
        full = known.get((row.part, row.name, row.shape, "off")) if row.amp != "off" else None
        cells = [
            row.part, row.name, row.shape, row.amp, str(row.repeats), shown(row.ms, ".1f"), shown(row.plain_ms, ".1f"),
            ratio(row.plain_ms, row.ms), ratio(full and full.plain_ms, row.ms), shown(row.peak, ".1f"), shown(row.plain_peak, ".1f"),
            ratio(row.plain_peak, row.peak), ratio(full and full.plain_peak, row.peak), ratio(row.ms, kd and kd.ms),
            shown(row.value_error, ".0e"), shown(row.gradient_error, ".0e"), shown(row.operations, "d"), shown(row.blocks, "d"),
            shown(row.floor_ms, ".1f"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(value, form: str) -> str:
    return "-" if value is None else format(value, form)


def ratio(above: float | None, below: float | None) -> str:
    return f"{above / below:.2f}" if above is not None and below else "-"


class Results:
    """The rows in a folder, written after each one; those of an interrupted run, and of other commands, are gone on with.

    Raises:
        ValueError: the folder cannot be made, or its rows were made on another machine or with other code.
    """

    def __init__(self, folder: str | None, machine: Machine, command: str):
        self.folder, self.about = folder and Path(folder), machine.plain()
        self.rows: list[Row] = []
        if self.folder is None:
            return
        file = self.folder / "rows.json"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if file.exists():
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                self.rows = [Row(**row) for row in content.pop("rows")]
                commands = [*content["commands"]]
                flops = {dtype: 1e9 * content["gflops"][name_of(dtype)] for dtype in machine.flops}
                bandwidth = 1e9 * content["gb_per_s"]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ValueError(f"{file} is not a file of this benchmark; choose another --output") from None
            for key in ("device", "threads", "torch", "commit"):
                if content.get(key) != self.about[key]:
                    raise ValueError(f"{file} has rows of {key} {content.get(key)}, this is {self.about[key]}; choose another --output")
            if not same_code(self.about["commit"]):
                raise ValueError(f"{file} has rows of files that differ from their commit ({self.about['commit']}): it cannot be told whether they "
                                 f"are still the same; choose another --output, or commit")  # fmt: skip
            self.about = content
            machine.flops, machine.bandwidth = flops, bandwidth
            self.about["commands"] = [*commands, *([command] if command not in commands else [])]
        else:
            self.about["commands"] = [command]

    def has(self, part: str, name: str | None, shape: str, amp: str | None) -> bool:
        """Whether a row is there; with None for the name and the precision, any of the part and the shape."""
        return any((row.part, row.shape) == (part, shape) and name in (None, row.name) and amp in (None, row.amp) for row in self.rows)

    def add(self, *new: Row) -> None:
        self.rows.extend(new)
        if self.folder is not None:
            write_text(self.folder / "rows.json", json.dumps(self.about | {"rows": [asdict(row) for row in self.rows]}, indent=1) + "\n")
            write_text(self.folder / "table.md", self.text)

    @property
    def text(self) -> str:
        about = self.about
        rates = ", ".join(f"{rate:.0f} GFLOP/s in {name}" for name, rate in about["gflops"].items())
        head = f"{about['device']}, {about['threads']} thread, torch {about['torch']}, commit {about['commit']}; measured {rates} and " \
               f"{about['gb_per_s']:.0f} GB/s"  # fmt: skip
        commands = "".join(f"    {command}\n" for command in about.get("commands", ()))
        return f"{head}\n\n{commands}\n{table(self.rows)}\n"


def same_code(commit: str) -> bool:
    """Whether a commit says what code ran."""
    return commit != "unknown" and not commit.endswith("-dirty")


def parse(argv=None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m scripts.benchmark", description=__doc__, formatter_class=raw, allow_abbrev=False)
    names = tuple(shape.dataset for shape in SHAPES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes, one repeat")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--shapes", nargs="+", choices=names, help="crop and batch of these data sets (default: all)")
    parser.add_argument("--methods", nargs="+", metavar="METHOD[:flag=value,...]", help="some methods alone, with flags of train_kd.py, a switch "
                        "as in icsd:icsd-upsample= (default: all); kd comes with them")  # fmt: skip
    parser.add_argument("--amp", nargs="+", choices=("off", "bf16"), default=("off",), help="of losses, pieces and steps, in both forms, one after "
                        "the other (default: off)")  # fmt: skip
    parser.add_argument("--compile", nargs="+", choices=COMPILE, default=("off",), help="of the networks of our form of a step, one after the other "
                        "(default: off)")  # fmt: skip
    parser.add_argument("--repeats", type=int, help="after the warm-up (default: 9)")
    parser.add_argument("--step-repeats", type=int, help="of steps, pieces and teachers (default: a third of --repeats)")
    parser.add_argument("--output", help="folder of table.md and rows.json (default: results/bench_MACHINE; with --quick none)")
    options = parser.parse_args(argv)
    try:
        check(options)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    return options


def check(options: argparse.Namespace) -> None:
    """Fill in what depends on other options; ValueError where they do not fit."""
    for flag in ("shapes", "repeats", "step_repeats"):
        if options.quick and getattr(options, flag) is not None:
            raise ValueError(f"--{flag.replace('_', '-')}: --quick has its own; drop one of them")
    if options.methods and not {"loss", "step"} & set(options.parts):
        raise ValueError(f"--methods: --parts {' '.join(options.parts)} has no method in it; drop it, or add loss or step")
    readers_of = {"--amp": ("piece", "loss", "step"), "--step-repeats": ("piece", "step", "teacher"), "--compile": ("step",)}
    for (flag, readers), given in zip(readers_of.items(), ("bf16" in options.amp, options.step_repeats, {*options.compile} - {"off"}), strict=True):
        if given and not {*readers} & set(options.parts):
            raise ValueError(f"{flag}: --parts {' '.join(options.parts)} does not read it; drop it, or add {' or '.join(readers)}")
    options.repeats = 1 if options.quick else 9 if options.repeats is None else options.repeats
    options.step_repeats = max(1, options.repeats // 3) if options.step_repeats is None else options.step_repeats
    for flag in ("repeats", "step_repeats"):
        if getattr(options, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(options, flag)}: must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU is visible to torch; pass --device cpu")
    for mode in options.compile:
        check_compile(mode, torch.device(options.device), 1)
    arms = [parse_arm(token) for token in options.methods or METHODS]
    for arm in arms:
        if len(arm.methods) != 1 or arm.seed_offset:
            raise ValueError(f"--methods {arm.name}: one method at a time, METHOD[:flag=value,...]")
        for flag in arm.flags:
            if METHOD_FLAGS.get(f"--{flag.removeprefix('no-')}") != arm.methods[0]:
                raise ValueError(f"--methods {arm.name}: {flag} is no option of {arm.methods[0]}; losses/README.md lists them")
    if not any(arm.name == "kd" for arm in arms):
        arms.insert(0, parse_arm("kd"))
    options.arms = list({arm.name: arm for arm in arms}.values())
    options.shapes = QUICK if options.quick else [shape for shape in SHAPES if shape.dataset in (options.shapes or [shape.dataset])]


def main(argv=None) -> None:
    options = parse(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    machine = Machine(torch.device(options.device), options.quick)
    folder = options.output
    if folder is None and not options.quick:
        folder = Path(metrics.__file__).parent.parent / "results" / ("bench_" + re.sub(r"\W+", "_", machine.name).strip("_").lower())
    try:
        results = Results(folder, machine, shlex.join(["python", "-m", "scripts.benchmark", *(sys.argv[1:] if argv is None else argv)]))
        measure(options, machine, results)
    except ValueError as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(2)
    print(f"\n{results.text}")


def measure(options: argparse.Namespace, machine: Machine, results: Results) -> None:
    """Every row that is asked for and not there."""
    start = time.monotonic()
    of_methods = [part for part in PARTS if part in options.parts and part in ("loss", "step")]
    others = [part for part in PARTS if part in options.parts and part not in of_methods]
    in_precisions = [part for part in others if part == "piece"]
    amps = [amp for amp in ("off", "bf16") if amp in options.amp]
    once = len(others) - len(in_precisions)
    modes = {"loss": ("off",), "step": [mode for mode in COMPILE if mode in options.compile]}
    of_arms = len(options.arms) * sum(len(modes[part]) for part in of_methods)
    total = len(options.shapes) * (once + len(amps) * (len(in_precisions) + of_arms))
    done = 0

    def measured(bench, part, arm=None, mode="off"):
        """The rows of a part, of a method where there is one, unless they are there; a line of how far it is."""
        nonlocal done
        done += 1
        name = step_name(arm, mode) if arm else None
        there = results.has(part, name, bench.shape_name, bench.amp if arm or part in in_precisions else None)
        if not there:
            measure = getattr(bench, {"teacher": "teacher_forms"}.get(part, part))
            new = [measure(arm, mode) if part == "step" else measure(arm)] if arm else measure()
            results.add(*new)
            print("\n".join(table(results.rows).splitlines()[-len(new):]), flush=True)
        seconds = int(time.monotonic() - start)
        print(f"{done} of {total}: {part}{f' {name}' if arm else ''}, {bench.shape_name}, {'there already' if there else 'done'} after "
              f"{seconds // 60}:{seconds % 60:02d}", file=sys.stderr, flush=True)  # fmt: skip

    print(table([]))
    for shape in options.shapes:
        exact = Bench(shape, machine, options.repeats, options.step_repeats, "off")
        for part in others:
            if part not in in_precisions:
                measured(exact, part)
        for amp in amps:
            bench = exact if amp == "off" else Bench(shape, machine, options.repeats, options.step_repeats, amp)
            for part in in_precisions:
                measured(bench, part)
            for part in of_methods:
                for arm in options.arms:
                    for mode in modes[part]:
                        measured(bench, part, arm, mode)


if __name__ == "__main__":
    main()
