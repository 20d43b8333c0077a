"""What a training step costs on this machine, part by part, beside the plain form of each part (`scripts/plain.py`).

    python -m scripts.benchmark --output results/bench_MACHINE      # hours on one CPU core, minutes on a GPU
    python -m scripts.benchmark --quick --methods kd cirkd          # seconds: small shapes, one repeat

For every method the loss, forward and backward, and the whole step (DeepLabV3-ResNet101 -> DeepLabV3-ResNet18); then the task loss, the
teacher, the metric and the loader. Both forms run interleaved on the same fresh inputs after a warm-up; times are medians: process CPU time
on one thread, or a GPU's own clock. Their results are compared in the same run. Prints the tables; writes table.md and rows.json to --output.

Peaks are bytes of tensors made inside and alive at once (a GPU: of its allocator); on a CPU scratch memory within an operation is not seen.
Operations are those that torch's dispatcher computes, on a GPU about one kernel each; blocks are waits of the host for the device. The floor
is what the operations' products and the bytes of inputs and gradients take at this machine's own measured rates, the larger of the two.
"""

import argparse
import copy
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import Batch, Cache, build_dataset
from dataset.reading import read_image, read_label
from dataset.transforms import PAD_COLOUR, Augment, draw
from losses import METHODS, Setup, build_methods
from losses.task import TaskLoss, cross_entropy
from models import SegOutput, build_model
from models.backbones import on_meta
from models.fold import fold_batchnorm
from scripts import plain
from scripts.watch import Watch
from utils import engine, metrics
from utils.distill import Distiller, Teacher
from utils.optim import build_optimizers
from utils.options import train_options


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


SHAPES = (Shape("camvid", 11, (360, 360), 4, (360, 480)), Shape("citys", 19, (512, 1024), 2, (1024, 2048)))
QUICK = (Shape("shapes", 5, (64, 64), 2, (64, 96), "mobilenetv3_small", "resnet18_vanilla"),)


@dataclass
class Row:
    """One measurement; None where it does not apply. Times in ms, memory in MiB."""

    part: str
    name: str
    shape: str
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
        side, numbers = (32, 1 << 22) if quick else (128 if device.type == "cuda" else 64, 1 << 26)
        a, b = torch.randn(1, 256, side, side, device=device), torch.randn(numbers, device=device)
        weight = torch.randn(256, 256, 3, 3, device=device)
        # a convolution, since on some CPUs a product of matrices reaches half of its rate
        self.flops = 2 * a.numel() * weight[:, 0].numel() / self.median(lambda: F.conv2d(a, weight, padding=1))  # per second
        self.bandwidth = 8 * numbers / self.median(lambda: b.add_(1))  # bytes per second: read and written

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

    def median(self, function: Callable, repeats: int = 5) -> float:
        return statistics.median(self.seconds(function)[0] for _ in range(repeats + 1))

    def watched(self, function: Callable) -> Watch:
        """What it does, in a run of its own; on a GPU `peak` is the allocator's."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with Watch() as watch:
            function()
        if self.device.type == "cuda":
            watch.peak = torch.cuda.max_memory_allocated() - before
        return watch

    def floor(self, flops: int, size: int) -> float:
        """Milliseconds that the products, or `size` bytes, take at the measured rates."""
        return 1000 * max(flops / self.flops, size / self.bandwidth)

    def plain(self) -> dict:
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else cpu_name()
        rates = {"gflops": self.flops / 1e9, "gb_per_s": self.bandwidth / 1e9}
        return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__} | rates


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def compare(machine: Machine, row: dict, forms: dict[str, Callable], inputs: Callable, repeats: int, error: Callable, size=lambda given: 0) -> Row:
    """Measure the forms "ours" and, if there is one, "plain", each called with what `inputs(number)` returns.

    error: (ours, plain) -> (value error, gradient error) of their results; size: bytes that have to be read and written.
    """
    times, errors = {name: [] for name in forms}, []
    for number in range(repeats + 1):  # the first one warms up
        given, results = inputs(number), {}
        for name in list(forms)[:: 1 if number % 2 else -1]:
            seconds, results[name] = machine.seconds(lambda run=forms[name], given=given: run(*given))
            if number:
                times[name].append(1000 * seconds)
        if "plain" in forms:
            errors.append(error(results["ours"], results["plain"]))
        del results
    given = inputs(repeats + 1)
    watches = {name: machine.watched(lambda run=run: run(*given)) for name, run in forms.items()}
    ours, other = watches["ours"], watches.get("plain")
    return Row(
        **row, ms=statistics.median(times["ours"]), plain_ms=statistics.median(times["plain"]) if other else None,
        peak=ours.peak / 2**20, plain_peak=other.peak / 2**20 if other else None,
        value_error=max(e[0] for e in errors) if other else None, gradient_error=max(e[1] for e in errors) if other else None,
        operations=ours.operations, blocks=len(ours.blocks), floor_ms=machine.floor(ours.flops, size(given)) or None,
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

    def __init__(self, shape: Shape, machine: Machine, repeats: int, amp: str):
        self.shape, self.machine, self.repeats, self.amp = shape, machine, repeats, amp
        self.device = machine.device
        torch.manual_seed(0)
        # an auxiliary head, since methods read it
        self.student, self.teacher = (build_model("deeplabv3", name, shape.classes, aux=True) for name in (shape.student, shape.teacher))
        self.teacher.eval()
        for module in self.student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # its mask depends on the layout, and the two forms shall compute the same
        seen = on_meta(self.teacher, torch.zeros(1, 3, *shape.crop, device="meta"), needs=self.teacher.channels)
        self.sizes = {name: getattr(seen, name).shape[-2:] for name in self.teacher.channels}

    def row(self, part: str, name: str) -> dict:
        height, width = self.shape.crop
        return {"part": part, "name": name, "shape": f"{self.shape.dataset} {self.shape.batch}x{height}x{width}"}

    def options(self, name: str):
        height, width = map(str, self.shape.crop)
        data = [] if self.shape.dataset == "shapes" else ["--data", "unused"]
        given = ["--method", name, "--dataset", self.shape.dataset, *data, "--crop-size", height, width, "--save-dir", "unused"]
        given += ["--batch-size", str(self.shape.batch), "--amp", self.amp, "--max-iterations", "100"]
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
        batch = Batch(image, target, [str(k) for k in range(shape.batch)]).to(self.device)
        batch.step, batch.progress, batch.offset, batch.global_size = number, number / 100, 0, shape.batch
        batch.valid = (batch.target != 255).sum().double().clamp(min=1)
        return batch

    def maps(self, number: int, needs, model) -> dict[str, Tensor]:
        """Random outputs of a network, positive where a ReLU ends them."""
        generator = torch.Generator().manual_seed(number)
        maps = {}
        for name in needs:
            x = torch.randn(self.shape.batch, model.channels[name], *self.sizes[name], generator=generator)
            maps[name] = (x.relu() if name[0] in "hc" else 3 * x if name in ("logits", "aux") else x).to(self.device)
        return maps

    def loss(self, name: str) -> Row:
        """A method alone on random outputs of both networks, forward and backward."""
        method = self.methods(self.options(name))[name].to(self.device)
        other = copy.deepcopy(method)  # class queues change with every batch

        def run(method, context, number):
            batch = self.batch(number)
            student = {key: x.requires_grad_() for key, x in self.maps(number, method.needs, self.student).items()}
            teacher = self.maps(1000 + number, method.needs, self.teacher)
            leaves = [*student.values(), *(p for p in method.parameters() if p.requires_grad)]

            def step():
                with context():
                    terms = method(SegOutput(**student), SegOutput(**teacher), batch)
                    total = sum(method.weights[term] * value for term, value in terms.items())
                    return total.detach(), torch.autograd.grad(total, leaves, allow_unused=True)

            return step

        def inputs(number):
            return run(method, nullcontext, number), run(other, plain.forms, number)

        def error(ours, theirs):
            pairs = [(a, b) for a, b in zip(ours[1], theirs[1], strict=True) if a is not None and b is not None]
            flat = [torch.cat([pair[side].flatten().float() for pair in pairs]) for side in (0, 1)]
            return relative(ours[0], theirs[0]), relative(*flat)

        forms = {"ours": lambda step, _: step()} | ({"plain": lambda _, step: step()} if name in plain.METHODS else {})
        size = bytes_of(self.maps(0, method.needs, self.teacher).values()) + 2 * bytes_of(self.maps(0, method.needs, self.student).values())
        return compare(self.machine, self.row("loss", name), forms, inputs, self.repeats, error, lambda given: size)

    def step(self, name: str) -> Row:
        """A whole step of `train_step`; its plain form has the teacher as it was trained, NCHW, and every plain form."""
        options, trainings = self.options(name), {}
        for form in ("ours", "plain"):
            layout = torch.channels_last if form == "ours" else torch.contiguous_format
            torch.manual_seed(0)
            distiller = Distiller(copy.deepcopy(self.student), TaskLoss(0.4), self.methods(options)).to(device=self.device, memory_format=layout)
            teacher = fold_batchnorm(self.teacher, distiller.teacher_needs)[0] if form == "ours" else copy.deepcopy(self.teacher)
            teacher = Teacher(teacher.to(device=self.device, memory_format=layout), distiller.teacher_needs,
                              dtype=engine.AMP[self.amp] if form == "ours" else None)  # fmt: skip
            trainings[form] = engine.Training(distiller, build_optimizers(distiller, options), options, self.device), distiller, teacher

        def run(form, context):
            training, distiller, teacher = trainings[form]

            def step(batch):
                with context():
                    engine.train_step(training, distiller, teacher, [batch], training.record)
                return training.record.rows[-1]

            return step

        def error(ours, theirs):  # the first step alone begins with equal weights
            first = [trainings[form][0].record.rows[0] for form in ("ours", "plain")]
            return relative(first[0][0], first[1][0]), relative(first[0][-1], first[1][-1])

        forms = {"ours": run("ours", nullcontext), "plain": run("plain", plain.forms)}
        return compare(self.machine, self.row("step", name), forms, lambda number: (self.batch(number),), max(1, self.repeats // 3), error)

    def task(self) -> Row:
        """Cross-entropy with the upsampling, forward and backward."""

        def run(function, logits, batch):
            logits = logits.detach().requires_grad_()
            value = function(logits, batch.target, batch.valid)
            return value.detach(), torch.autograd.grad(value, logits)[0]

        def inputs(number):
            return self.maps(number, ["logits"], self.student)["logits"], self.batch(number)

        forms = {"ours": lambda *given: run(cross_entropy, *given), "plain": lambda *given: run(plain.cross_entropy, *given)}
        return compare(
            self.machine, self.row("part", "cross-entropy"), forms, inputs, self.repeats,
            lambda a, b: (relative(a[0], b[0]), relative(a[1], b[1])), lambda given: 2 * bytes_of([given[0]]) + given[1].target.numel(),
        )  # fmt: skip

    def teachers(self) -> list[Row]:
        """The frozen teacher, exact and in bfloat16, against the network as it was trained; the gradient error is the share of classes
        that differ."""
        needs, rows = ("logits", "head"), []
        folded = fold_batchnorm(self.teacher, needs)[0]
        other = copy.deepcopy(self.teacher).to(self.device)
        for name, dtype in (("teacher", None), ("teacher bf16", torch.bfloat16)):
            ours = Teacher(copy.deepcopy(folded).to(device=self.device, memory_format=torch.channels_last), needs, dtype=dtype)

            def run(batch, ours=ours, dtype=dtype):
                with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                    return ours(batch).logits

            def as_trained(batch):
                with torch.no_grad():
                    return other(batch.image, needs).logits

            forms, repeats = {"ours": run, "plain": as_trained}, max(1, self.repeats // 3)
            rows.append(compare(
                self.machine, self.row("part", name), forms, lambda number: (self.batch(number),), repeats,
                lambda a, b: (relative(a, b), differ(a.argmax(1), b.argmax(1))[1]),
            ))  # fmt: skip
        return rows

    def metric(self) -> list[Row]:
        """Classes and counts of upsampled scores, and of the network's, of one picture; the gradient error is the share that differs."""
        classes, size = self.shape.classes, self.shape.crop

        def inputs(number):
            logits, target = self.maps(number, ["logits"], self.student)["logits"][:1], self.batch(number).target[:1]
            return logits, metrics.upsampled(logits, size), target

        forms = {
            "metric": (lambda _, scores, target: metrics.confusion(metrics.class_of(scores), target, classes),
                       lambda _, scores, target: plain.confusion(scores.argmax(1), target, classes)),
            "metric and upsampling": (lambda logits, _, target: metrics.confusion(metrics.labels_at(logits, size), target, classes),
                                      lambda logits, _, target: plain.confusion(plain.labels_at(logits, size), target, classes)),
        }  # fmt: skip
        return [
            compare(self.machine, self.row("part", name), {"ours": ours, "plain": other}, inputs, self.repeats, differ,
                    lambda given, name=name: bytes_of([given["and" not in name], given[2]]))
            for name, (ours, other) in forms.items()
        ]  # fmt: skip

    def loaders(self) -> list[Row]:
        """A training sample from a PNG of the data set's size to the arrays that are sent to the device, on the host; and decoding alone,
        and from decoded pictures. The gradient error is the share of labels that differ, the value error that of the picture."""
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

            def error(ours, theirs):
                picture = ours.image.astype(np.float32) - np.float32(PAD_COLOUR)
                picture, target, other, labels = map(torch.from_numpy, (picture.transpose(2, 0, 1), ours.target, *theirs))
                return relative(picture, other), differ(target, labels)[1]

            host = copy.copy(self.machine)
            host.device = torch.device("cpu")
            for name, form in (("sample", load(pictures)), ("sample, cached", load(kept)), ("decoding alone", decode)):
                forms = {"ours": form} | ({"plain": as_published} if form is not decode else {})
                repeats = 4 * self.repeats
                row = compare(host, self.row("part", name), forms, lambda number: (number % 4, number), repeats, error)
                row.peak = row.plain_peak = row.operations = row.blocks = None  # arrays, of which torch knows nothing
                rows.append(row)
        return rows


def paint(image: Path, label: Path, size: tuple[int, int], seed: int) -> None:
    """A picture with the detail of a street, as PNG, and labels in blobs."""
    random = np.random.default_rng(seed)
    coarse = cv2.resize(random.integers(0, 256, (16, 32, 3), dtype=np.uint8), size[::-1], interpolation=cv2.INTER_CUBIC)
    noise = random.integers(-6, 7, (*size, 3), dtype=np.int16)
    cv2.imwrite(str(image), np.clip(coarse.astype(np.int16) + noise, 0, 255).astype(np.uint8))
    cv2.imwrite(str(label), cv2.resize(random.integers(0, 12, (16, 32), dtype=np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST))


def table(rows: list[Row]) -> str:
    """A markdown table; `of KD` is the time relative to that of plain KD in the same part and shape."""
    head = ["part", "name", "shape", "ms", "plain ms", "ratio", "peak MiB", "plain", "value error", "gradient error",
            "operations", "blocks", "floor ms", "of KD"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    of_kd = {(row.part, row.shape): row.ms for row in rows if row.name == "kd"}
    for row in rows:
        base = of_kd.get((row.part, row.shape)) if row.part != "part" else None
        cells = [
            row.part, row.name, row.shape, shown(row.ms, ".1f"), shown(row.plain_ms, ".1f"), shown(row.plain_ms and row.plain_ms / row.ms, ".2f"),
            shown(row.peak, ".1f"), shown(row.plain_peak, ".1f"), shown(row.value_error, ".0e"), shown(row.gradient_error, ".0e"),
            shown(row.operations, "d"), shown(row.blocks, "d"), shown(row.floor_ms, ".1f"), shown(base and row.ms / base, ".2f"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(value, form: str) -> str:
    return "-" if value is None else format(value, form)


def parse(argv=None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m scripts.benchmark", description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes, one repeat")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="some methods alone (default: all); kd comes with them")
    parser.add_argument("--parts", nargs="+", choices=("loss", "step", "part"), default=("loss", "step", "part"), help="what to measure")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off", help="of the steps, in both forms")
    parser.add_argument("--repeats", type=int, default=9, help="of a loss; a step has a third (default: 9)")
    parser.add_argument("--output", help="folder for table.md and rows.json")
    options = parser.parse_args(argv)
    for name in options.methods or ():
        if name not in METHODS:
            parser.exit(2, f"error: --methods {name}: there is no such method; possible: {', '.join(METHODS)}\n")
    if options.repeats < 1:
        parser.exit(2, f"error: --repeats {options.repeats}: must be at least 1\n")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "error: --device cuda: no GPU is visible to torch; pass --device cpu\n")
    return options


def main(argv=None) -> None:
    options = parse(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    machine = Machine(torch.device(options.device), options.quick)
    names = [name for name in METHODS if not options.methods or name in (*options.methods, "kd")]
    rows: list[Row] = []

    def add(*new: Row) -> None:
        rows.extend(new)
        for row in new:
            print(table([row]).splitlines()[-1], flush=True)

    print("\n".join(table([]).splitlines()))
    for shape in QUICK if options.quick else SHAPES:
        bench = Bench(shape, machine, 1 if options.quick else options.repeats, options.amp)
        if "part" in options.parts:
            add(bench.task())
            add(*bench.teachers())
            add(*bench.metric())
            add(*bench.loaders())
        for part in ("loss", "step"):
            for name in names if part in options.parts else ():
                add(getattr(bench, part)(name))
    about = machine.plain() | {"amp": options.amp}
    text = f"{about['device']}, {about['threads']} thread, torch {about['torch']}, amp {about['amp']}; measured " \
           f"{about['gflops']:.0f} GFLOP/s and {about['gb_per_s']:.0f} GB/s in float32\n\n{table(rows)}\n"  # fmt: skip
    print(f"\n{text}")
    if options.output:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(text, encoding="utf-8")
        (folder / "rows.json").write_text(json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
