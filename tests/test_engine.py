"""The training loop and the folder of a run: what stops it, what it leaves behind, what it refuses to touch."""

import csv
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from dataset import Batch, EndlessSampler
from dataset.shapes import DrawnItem
from losses import METHODS, Method, Setup, build_methods, option, resolve, term_weight
from losses.task import TaskLoss
from models import SegOutput, build_model
from models.fold import fold_batchnorm
from scripts.watch import Watch
from tests.workers import RUN, TINY, TINY_STUDENT, distil, on_ranks, save_model, train
from utils import checkpoint, engine, session
from utils.distill import Distiller, Teacher
from utils.engine import NonFiniteError, Training
from utils.log import logger
from utils.metrics import Scores
from utils.optim import Budget, build_optimizers, poly_lr
from utils.options import train_options
from utils.run import Run, StopSignal

CPU = torch.device("cpu")


def fit(*arguments) -> bool:
    """engine.fit, stopped by the signals of this process."""
    with StopSignal() as stop:
        return engine.fit(*arguments, stop)


class Tiny(nn.Module):
    """The smallest network with a head: 1x1 convolutions, whose steps take a millisecond."""

    config = {"model": "tiny", "backbone": "none", "in_channels": 3}
    channels = {"logits": 3, "c4": 4}

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.backbone, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, image, needs=("logits",)):
        c4 = self.backbone(image.float() / 255)
        return SegOutput(logits=self.head(c4), c4=c4)


class Clock:
    """Time that passes only when it is told to."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("utils.optim.time.monotonic", clock)
    return clock


def batches(step=0, seconds=0.0, clock=None):
    """Endless micro-batches of two pictures, a function of the step; each may take time."""
    while True:
        generator = torch.Generator().manual_seed(step)
        image = torch.randint(0, 256, (2, 3, 8, 8), generator=generator, dtype=torch.uint8)
        if clock:
            clock.now += seconds
        yield Batch(image, (image[:, 0] // 86), [f"picture {2 * step}", f"picture {2 * step + 1}"])
        step += 1


def prepared(folder, *arguments, methods=None, student=None):
    """(training, teacher, run) of a tiny network, as `utils.session.train` builds them."""
    length = [] if "--max-minutes" in arguments else ["--max-iterations", "10", "--val-interval", "100"]
    given = ["--save-dir", str(folder), "--batch-size", "2", "--device", "cpu", *length, *arguments]
    options = train_options(given, distil=False, description="")
    distiller = Distiller(student or Tiny(), TaskLoss(0.0), methods or {})
    run = Run(options, ["loss", *distiller.term_names, "gradient_norm", "lr", "seconds", "images_per_second", "val/mIoU", "val/aAcc", "val/mAcc"])
    state = run.start(Tiny.config, None, ["picture"])
    training = Training(distiller, build_optimizers(distiller, options), options, CPU)
    if state:
        training.restore(state)
    return training, Teacher(Tiny(1), distiller.teacher_needs) if methods else None, run


def scores(model, stop):
    return Scores.of(torch.eye(8, dtype=torch.int64), 1)


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------ schedule, budget


@pytest.mark.parametrize(("flags", "instructions", "student", "teacher"), [
    ((), "AVX512", "NHWC", "NHWC"), ((), "AVX2", "NCHW", "NHWC"), (("--amp", "bf16"), "AVX2", "NHWC", "NHWC"),
    (("--channels-last",), "AVX2", "NHWC", "NHWC"), (("--no-channels-last",), "AVX512", "NCHW", "NCHW"),
])  # fmt: skip
def test_memory_formats_of_a_training(tmp_path, monkeypatch, flags, instructions, student, teacher):
    """Of what the networks compute, not only of their weights."""
    save_model(tmp_path / "teacher.pth")
    given = ["--method", "kd", "--teacher-checkpoint", str(tmp_path / "teacher.pth"), *TINY_STUDENT, *RUN, "--max-iterations", "1", "--workers", "0"]
    seen, forward = [], METHODS["kd"].forward

    class Enough(Exception):
        pass

    def look(self, *outputs_and_batch):
        seen.extend("NCHW" if output.logits.is_contiguous() else "NHWC" for output in outputs_and_batch[:2])
        forward(self, *outputs_and_batch)
        raise Enough

    monkeypatch.setattr(METHODS["kd"], "forward", look)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    with pytest.raises(Enough):
        session.train(train_options([*given, *flags, "--save-dir", str(tmp_path / "run")], distil=True, description=""), torch.device("cpu"))
    assert seen == [student, teacher]


@pytest.mark.parametrize("where,expected", [("off", (False, False)), ("convolutions", (True, False)), ("all", (True, True))])
def test_what_a_gpu_computes_in_tf32(where, expected):
    """The switches that torch has for it; on a GPU it was not run."""
    options = train_options(["--tf32", where, *SMALL[2:], "--save-dir", "unused"], distil=False, description="")
    default = train_options([*SMALL[2:], "--save-dir", "unused"], distil=False, description="")
    try:
        session.set_tf32(options, torch.device("cuda"))
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == expected
    finally:
        session.set_tf32(default, CPU)
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (True, False), "torch's own"
    with pytest.raises(ValueError, match=f"--tf32 {where}: is for GPUs, and this runs on the cpu; drop the flag"):
        session.set_tf32(options, CPU)


def test_scripts_set_what_a_gpu_computes_in_tf32(monkeypatch):
    seen = []
    monkeypatch.setattr(session, "set_tf32", lambda options, device: seen.append((options.tf32, device)))
    options = train_options([*SMALL[2:], "--device", "cpu", "--save-dir", "unused"], distil=False, description="")
    with pytest.raises(SystemExit):
        session.run_script(lambda options, device: None, options)
    assert seen == [("convolutions", CPU)]


@pytest.mark.parametrize("accumulate,method,lines", [
    ("1", ["sp"], []), ("2", ["kd"], []),
    ("2", ["sp", "dist"], ["sp: of the images of one micro-batch on all ranks, not of the whole step: sp; with another --accumulate",
                           "dist: of the images of one rank and micro-batch, not of the whole step: logits, aux; with another number of ranks or "
                           "another --accumulate"]),
])  # fmt: skip
def test_the_log_names_terms_that_are_no_mean_over_images(accumulate, method, lines):
    options = train_options(["--method", *method, *SMALL, "--batch-size", "4", "--accumulate", accumulate, "--save-dir", "unused"], distil=True,
                            description="")  # fmt: skip
    student, teacher = networks()
    setup = Setup(student.channels, teacher.channels, 5, (64, 64), 4 // int(accumulate), "shapes", teacher_norms=teacher.norms)
    distiller = Distiller(student, TaskLoss(0.4), build_methods(options.methods, setup))
    text = session.describe(distiller, teacher, {"macs": 0, "teacher_macs": 0, "extra_parameters": 0}, options, CPU)
    assert [line for line in text.splitlines() if "another loss" in line] == [f"{line} it is another loss" for line in lines]


@pytest.mark.parametrize("amp,dtype", [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_and_compile_reach_both_networks(tmp_path, monkeypatch, amp, dtype):
    """With a compiler that does nothing but count: one pass of each network per step, none of them in a validation."""
    save_model(tmp_path / "teacher.pth")
    given = ["--method", "kd", "--teacher-checkpoint", str(tmp_path / "teacher.pth"), *TINY_STUDENT, *RUN, "--max-iterations", "2", "--workers", "0"]
    modes, passes, teachers, marks, build = [], [], [], [], session.frozen_teacher

    def compile(function, **options):
        modes.append(options)
        return lambda *arguments: (passes.append(function.__self__), function(*arguments))[1]

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(session, "check_compile", lambda *given: modes.append(given[0]))
    monkeypatch.setattr(session, "frozen_teacher", lambda *given: teachers.append(build(*given)) or teachers[0])
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    options = train_options([*given, "--amp", amp, "--compile", "default", "--save-dir", str(tmp_path / "run")], distil=True, description="")
    session.train(options, CPU)
    assert modes == ["default", *2 * [{"options": {"layout_optimization": False}, "dynamic": False}]] and len(marks) == 2
    (teacher,) = teachers
    assert passes[0] is passes[2] is teacher.model and passes[1] is passes[3] is not teacher.model and len(passes) == 4
    modules = [*teacher.model.modules()]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in modules)
    assert {module.weight.dtype for module in modules if isinstance(module, nn.Conv2d)} == {dtype}


@pytest.mark.parametrize("flags", [(), ("--optimizer", "adamw")])
def test_optimizers_are_fused(tmp_path, flags):
    training, _, _ = prepared(tmp_path, *flags)
    assert [group["fused"] for group in training.optimizers["student"].param_groups] == [True]


def test_batches_are_copied_without_waiting(tmp_path, monkeypatch):
    seen, to = [], Batch.to
    monkeypatch.setattr(Batch, "to", lambda self, device, non_blocking=False: seen.append(non_blocking) or to(self, device, non_blocking))
    training, teacher, run = prepared(tmp_path)
    assert fit(training, teacher, batches(), run, scores)
    assert seen == 10 * [True]


def test_the_moving_average_is_torchs_and_copies_nothing_to_the_device():
    """Weights and statistics as torch's own; its count of steps stays on the host."""
    student, decay = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), 0.9
    ours, torchs = engine.MovingAverage(student, decay), AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for step in range(3):
        student(torch.full((2, 3, 4, 4), float(step + 1)))
        with torch.no_grad():
            student[0].weight.add_(0.1)
        ours.update_parameters(student)
        torchs.update_parameters(student)
        for (name, a), b in zip(ours.module.state_dict().items(), torchs.module.state_dict().values(), strict=True):
            assert torch.equal(a, b if a.is_floating_point() else student.state_dict()[name])
    assert ours.state_dict().keys() == torchs.state_dict().keys() and ours.n_averaged == 3

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert "_to_copy" not in str(function), "a copy from the host"
            return function(*args, **(kwargs or {}))

    far = student.to("meta")
    for average, copies in ((engine.MovingAverage(far, decay), False), (AveragedModel(far, multi_avg_fn=get_ema_multi_avg_fn(decay)), True)):
        average.n_averaged += 1
        with Copies(), pytest.raises(AssertionError, match="from the host") if copies else nullcontext():
            average.update_parameters(far)


def test_what_was_validated_is_not_evaluated_again(tmp_path, monkeypatch):
    """Where one split is selected and reported on; a best student of an earlier step is."""
    evaluated, evaluate = [], session.Split.evaluate
    monkeypatch.setattr(session.Split, "evaluate", lambda self, *given, **kept: evaluated.append(evaluate(self, *given, **kept)) or evaluated[-1])
    options = train_options([*TINY, *RUN, "--max-iterations", "4", "--val-interval", "2", "--workers", "0", "--save-dir", str(tmp_path / "run")],
                            distil=False, description="")  # fmt: skip
    options.spec = replace(options.spec, report_split=options.spec.select_split)
    session.train(options, CPU)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len(evaluated) == 2 + (report["steps"]["best"] == 2)
    assert report["last"]["matrix"] == evaluated[1].plain()["matrix"]


def test_poly_lr():
    assert poly_lr(0.02, 0) == 0.02 and poly_lr(0.02, 1) == 0
    assert poly_lr(0.02, 0.5) == pytest.approx(0.02 * 0.5**0.9)
    assert poly_lr(0.02, 1.5) == 0 and poly_lr(0.02, 0.99, floor=1e-3) == 1e-3


def test_the_learning_rate_rises_first(tmp_path):
    training, teacher, run = prepared(tmp_path, "--log-interval", "1", "--lr", "0.5", "--warmup-iterations", "4")
    assert fit(training, teacher, batches(), run, scores)
    logged = [row["lr"] for row in rows(tmp_path) if "lr" in row]
    assert logged == pytest.approx([0.5 * (1 - step / 10) ** 0.9 * min(1, (step + 1) / 4) for step in range(10)])


@pytest.mark.parametrize("flags", [(), ("--optimizer", "adamw")])
def test_heads_have_their_own_learning_rate(tmp_path, flags):
    """The first step moves the head and the method's layer by ten times as much as without the factor, and the backbone by as much."""
    moved = []
    for factor in ("1", "10"):
        given = ["--lr", "1e-3", "--weight-decay", "0", "--head-lr-factor", factor, *flags]
        training, teacher, _ = prepared(tmp_path / factor, *given, methods=adapter())
        before = {name: p.detach().clone() for name, p in training.distiller.named_parameters()}
        engine.train_step(training, training.distiller, teacher, [next(batches())], training.record)
        moved.append({name: (p - before[name]).norm().item() for name, p in training.distiller.named_parameters()})
    assert {name.split(".")[1] for name in moved[0]} == {"backbone", "head", "feature"} and all(value > 0 for value in moved[0].values())
    for name, value in moved[1].items():
        assert value == pytest.approx((1 if name.startswith("student.backbone.") else 10) * moved[0][name], rel=1e-3), name


def adapter() -> dict:
    """`feature`, which has a layer of its own, between two networks like Tiny."""
    options, _ = resolve(METHODS["feature"], "shapes", {})
    return build_methods({"feature": options}, Setup(Tiny.channels, Tiny.channels, 3, (8, 8), 2))


def test_every_step_has_its_learning_rate(tmp_path):
    training, teacher, run = prepared(tmp_path, "--log-interval", "1", "--lr", "0.5")
    assert fit(training, teacher, batches(), run, scores)
    logged = [row["lr"] for row in rows(tmp_path) if "lr" in row]
    assert logged == pytest.approx([0.5 * (1 - step / 10) ** 0.9 for step in range(10)])


def test_a_budget_of_minutes_ends_near_its_time_with_a_learning_rate_near_zero(tmp_path, clock):
    """2 seconds per batch and 100 per validation: 3 minutes are 90 steps, however many validations there are, behind the 5 that warm up."""
    def slow_validation(model, stop):
        clock.now += 100
        return scores(model, stop)

    training, teacher, run = prepared(tmp_path, "--max-minutes", "3", "--val-interval", "20", "--log-interval", "1", "--lr", "0.5")
    assert fit(training, teacher, batches(seconds=2, clock=clock), run, slow_validation)
    assert training.step == 95 and training.budget.elapsed() == 180 and training.budget.steps == 90
    logged = [row for row in rows(tmp_path) if "lr" in row]
    assert [row["lr"] for row in logged[:5]] == [0.5] * 5
    assert [row["lr"] for row in logged[5:]] == pytest.approx([0.5 * (1 - (2 * step + 2) / 180) ** 0.9 for step in range(90)], abs=0.01)
    assert logged[-1]["lr"] < 0.02 * 0.5 and logged[0]["lr"] > 0.48
    assert [row["step"] for row in rows(tmp_path) if "val/mIoU" in row] == [20, 40, 60, 80, 95]
    assert logged[-1]["images_per_second"] == pytest.approx(1.0)


def test_the_seconds_of_a_budget_are_resumed(tmp_path, clock):
    arguments = ("--max-minutes", "1", "--val-interval", "1000", "--log-interval", "1")
    training, teacher, run = prepared(tmp_path, *arguments)

    def stopping():
        for number, batch in enumerate(batches(seconds=5, clock=clock)):
            if number == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    assert not fit(training, teacher, stopping(), run, scores)
    assert training.budget.elapsed() == 25
    clock.now += 1e6
    training, teacher, run = prepared(tmp_path, *arguments, "--resume")
    assert training.budget.elapsed() == 25 and training.step == 10
    assert fit(training, teacher, batches(10, seconds=5, clock=clock), run, scores)
    assert training.step == 22 and [row["step"] for row in rows(tmp_path) if "lr" in row] == [*range(1, 23)]
    speeds = [row["images_per_second"] for row in rows(tmp_path) if "lr" in row]
    assert speeds[:5] == speeds[10:15] == [None] * 5, "no clock runs while a process warms up"
    assert speeds[5:10] + speeds[15:] == pytest.approx([0.4] * 12), "time before the stop counts once"


def test_a_budget_of_minutes_validates_every_tenth(tmp_path, clock):
    """2 seconds per batch: 100 timed steps, a tenth every 10. Interrupted in between, no validation is left out or made twice."""
    arguments = ("--max-minutes", f"{200 / 60}", "--log-interval", "50")
    training, teacher, run = prepared(tmp_path, *arguments)

    def stopping():
        for number, batch in enumerate(batches(seconds=2, clock=clock)):
            if number == 41:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    assert not fit(training, teacher, stopping(), run, scores)
    training, teacher, run = prepared(tmp_path, *arguments, "--resume")
    assert fit(training, teacher, batches(42, seconds=2, clock=clock), run, scores)
    assert [row["step"] for row in rows(tmp_path) if "val/mIoU" in row] == [15, 25, 35, *range(50, 111, 10)]


def test_a_log_line_that_spans_the_warm_up_counts_the_timed_steps_alone(tmp_path, clock):
    training, teacher, run = prepared(tmp_path, "--max-iterations", "20", "--val-interval", "100", "--log-interval", "10")
    assert fit(training, teacher, batches(seconds=4, clock=clock), run, scores)
    assert [row["images_per_second"] for row in rows(tmp_path) if "lr" in row] == pytest.approx([0.5, 0.5])
    assert training.budget.seconds == 60 and training.budget.steps == 15 and training.budget.left(17) == pytest.approx(12)


def test_budget_of_steps():
    assert [Budget(iterations=4).progress(step) for step in (0, 1, 4)] == [0, 0.25, 1]
    assert Budget(minutes=1, seconds=90).progress(7) == 1
    assert Budget(minutes=1, seconds=30).progress(7, agree=lambda value: 15.0) == 0.25, "rank 0's clock decides"


# --------------------------------------------------------------------------------------------------------------- not finite


class Poison(Method):
    """A term that is NaN for one picture."""

    name = "poison"

    @dataclass(frozen=True)
    class Options:
        weight: float = term_weight(1.0)
        picture: str = option("none", "where the term is NaN")

    def forward(self, student, teacher, batch):
        bad = float("nan") if self.options.picture in batch.names else 1.0
        return {"poison": bad * student.logits.mean()}


SETUP = Setup(Tiny.channels, Tiny.channels, 3, (8, 8), 2)


def test_nan_stops_one_rank(tmp_path):
    methods = {"poison": Poison(Poison.Options(picture="picture 9"), SETUP)}
    training, teacher, run = prepared(tmp_path, "--save-interval", "1", "--log-interval", "3", methods=methods)
    with pytest.raises(NonFiniteError) as error:
        fit(training, teacher, batches(), run, scores)
    assert str(error.value) == (
        "step 5: not finite: rank 0: total, poison/poison, gradient norm on picture 8, picture 9; last.pth holds earlier, finite weights; "
        "lower --lr, or look at these files"
    )
    last = checkpoint.load(tmp_path / "last.pth")
    assert last["step"] == 4 and all(value.isfinite().all() for value in last["student"].values())
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [3]


class Kink(Poison):
    """A term of 0 whose gradient is NaN in step 3."""

    def forward(self, student, teacher, batch):
        mean = student.logits.mean()
        return {"poison": (mean * 0).abs().sqrt() if batch.step == 2 else mean}


def test_a_gradient_that_is_nan_stops_though_every_term_is_finite(tmp_path):
    training, teacher, run = prepared(tmp_path, methods={"poison": Kink(Poison.Options(), SETUP)})
    with pytest.raises(NonFiniteError, match="^step 3: not finite: the gradients, with every term finite; last.pth holds earlier, finite"):
        fit(training, teacher, batches(), run, scores)


def add_poison():
    METHODS["poison"] = Poison


def poisoned_pictures():
    """The pictures of step 6 of a training with batch 2 and seed 0, rank by rank."""
    order = [next(batch for number, batch in enumerate(EndlessSampler(512, 2, rank=rank, world=2)) if number == 5) for rank in (0, 1)]
    return [f"train_{index:04d}" for ((index, _),) in order]


def test_nan_on_one_of_two_ranks_stops_both(tmp_path):
    here, there = poisoned_pictures()
    started = distil(tmp_path, "--method", "poison", "--poison-picture", there, "--max-iterations", "20", "--val-interval", "100",
                     "--save-interval", "2", "--workers", "0", "--save-dir", "run", world=2, change=add_poison)  # fmt: skip
    assert started.wait() == [2, 2], started.text
    errors = [line for line in started.text.splitlines() if "error:" in line]
    expected = (f"error: step 6: not finite: rank 1: total, poison/poison, gradient norm on {there}; last.pth holds earlier, finite weights; "
                "lower --lr, or look at these files")  # fmt: skip
    assert errors[0] == expected and "Traceback" not in started.text
    assert here not in started.text
    last = checkpoint.load(tmp_path / "run" / "last.pth")
    assert last["step"] == 4 and all(value.isfinite().all() for value in last["student"].values() if value.is_floating_point())
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4, 5]


def test_a_killed_rank_ends_the_other(tmp_path):
    started = train(tmp_path, "--max-iterations", "1000", "--workers", "0", "--save-dir", "run", world=2)
    started.until("step 2/1000")
    started.stop(signal.SIGKILL, rank=1)
    assert started.wait(35) == [2, -signal.SIGKILL]
    assert re.search(r"^error: another rank stopped or hangs; its own message says why \(.+\)$", started.text, re.M), started.text
    assert "Traceback" not in started.text


# ----------------------------------------------------------------------------------------------- methods with own optimizers


class Critic(Method):
    """A toy: an adapter that the student's optimizer trains under a clip, and a critic with its own Adam."""

    name, needs = "critic", ("logits", "c4")

    @dataclass(frozen=True)
    class Options:
        weight: float = term_weight(1.0)

    def __init__(self, options, setup):
        super().__init__(options, setup)
        self.align, self.judge = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 1, 1, bias=False)
        self.grad_clip = 1e-3
        self.register_buffer("seen", torch.zeros(()))

    def own_optimizer(self):
        return torch.optim.Adam(self.judge.parameters(), lr=0.01)

    def forward(self, student, teacher, batch):
        self.seen += len(batch)
        return {"critic": 100 * (self.judge(self.align(student.c4)) - self.judge(teacher.c4)).square().mean()}


def critic():
    torch.manual_seed(5)
    return {"critic": Critic(Critic.Options(), SETUP)}


PLAIN = ("--lr", "0.5", "--momentum", "0", "--weight-decay", "0")


def test_own_optimizer_and_clip(tmp_path):
    methods = critic()
    before = {name: value.clone() for name, value in methods["critic"].state_dict().items()}
    training, teacher, run = prepared(tmp_path, *PLAIN, "--max-iterations", "1", methods=methods)
    assert set(training.optimizers) == {"student", "critic"}
    count = sum(p.numel() for group in training.optimizers["student"].param_groups for p in group["params"])
    assert count == sum(p.numel() for p in [*training.distiller.student.parameters(), *methods["critic"].align.parameters()])
    assert fit(training, teacher, batches(), run, scores)
    moved = {name: value - before[name] for name, value in methods["critic"].state_dict().items()}
    # Adam's first step is its learning rate in every coordinate whatever the gradient's size; 0.5 x the clipped gradient is far less
    torch.testing.assert_close(moved["judge.weight"].abs(), torch.full((1, 4, 1, 1), 0.01), rtol=1e-2, atol=0)
    assert 0 < moved["align.weight"].norm() <= 0.5 * 1e-3 * 1.0001
    assert moved["seen"] == 2


def test_the_clip_is_of_the_method_alone(tmp_path):
    """Without a clip its step is far larger; the student's step does not change with the clip."""
    found = {}
    for clip in (1e-3, None):
        methods = critic()
        methods["critic"].grad_clip = clip
        before = methods["critic"].align.weight.clone()
        training, teacher, run = prepared(tmp_path / str(clip), *PLAIN, "--max-iterations", "1", methods=methods)
        assert fit(training, teacher, batches(), run, scores)
        found[clip] = (methods["critic"].align.weight - before).norm(), training.distiller.student.state_dict()
    assert found[None][0] > 100 * found[1e-3][0]
    assert all(torch.equal(a, b) for a, b in zip(found[None][1].values(), found[1e-3][1].values(), strict=True))


def stop_at(step, source):
    for number, batch in enumerate(source):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch


def equal(a, b) -> bool:
    """Whether two nested states are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_own_optimizer_and_buffers_are_resumed(tmp_path):
    whole, teacher, run = prepared(tmp_path / "whole", methods=critic())
    assert fit(whole, teacher, batches(), run, scores)
    first, teacher, run = prepared(tmp_path / "parts", methods=critic())
    assert not fit(first, teacher, stop_at(3, batches()), run, scores)
    assert first.step == 4, "the step in which the signal came is finished and saved"
    second, teacher, run = prepared(tmp_path / "parts", "--resume", methods=critic())
    assert second.optimizers["critic"].state_dict()["state"][0]["step"] == 4
    assert fit(second, teacher, batches(4), run, scores)
    a, b = whole.snapshot(), second.snapshot()
    for key in a.keys() - {"spent"}:
        assert equal(a[key], b[key]), key
    assert b["methods"]["critic.seen"] == 20


def test_a_second_ctrl_c_stops_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in its background
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------------------------------------------------- run folders


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run of 2 steps."""
    folder = tmp_path_factory.mktemp("finished")
    started = train(folder, "--max-iterations", "2", "--workers", "0", "--save-dir", "run")
    assert started.wait() == [0], started.text
    return folder


def test_what_a_run_leaves(finished):
    names = {p.name for p in (finished / "run").iterdir()}
    assert names == {"args.json", "log.txt", "metrics.jsonl", "metrics.csv", "last.pth", "last.previous.pth", "best.pth", "student_best.pth",
                     "report.json", "DONE", ".lock"}  # fmt: skip
    table = list(csv.DictReader((finished / "run" / "metrics.csv").read_text().splitlines()))
    assert list(table[0]) == ["step", "loss", "task/ce", "gradient_norm", "lr", "seconds", "images_per_second", "val/mIoU", "val/aAcc", "val/mAcc"]
    assert [(row["step"], bool(row["loss"]), bool(row["val/mIoU"])) for row in table] == [
        ("1", True, False), ("1", False, True), ("2", True, False), ("2", False, True)]  # fmt: skip
    for row, written in zip(table, rows(finished / "run"), strict=True):
        known = {key: pytest.approx(value) for key, value in written.items() if value is not None and not key.startswith("val_iou/")}
        assert {key: float(value) for key, value in row.items() if value} == known
    arguments = json.loads((finished / "run" / "args.json").read_text())
    assert arguments["options"]["max_iterations"] == 2 and arguments["sources"]["max_iterations"] == "command line"
    assert arguments["environment"]["ranks"] == 1 and "--max-iterations 2" in arguments["command"]
    report = json.loads((finished / "run" / "report.json").read_text())
    assert report["split"] == "test" and report["selected_on"] == "val" and report["last"]["images"] == 5
    best = checkpoint.load(finished / "run" / "student_best.pth")
    assert best["config"]["dataset"] == "shapes" and set(best) == {"format", "student", "step", "metrics", "config", "environment"}


def test_the_log_begins_with_what_was_said_before_the_folder_was_made(tmp_path):
    """How the teacher was loaded, and what is left out of the loss: the teacher has no auxiliary head."""
    started = distil(tmp_path, "--method", "dist", "--max-iterations", "1", "--workers", "0", "--save-dir", "run")
    assert started.wait() == [0], started.text
    said = (tmp_path / "run" / "log.txt").read_text()
    loaded = next(line for line in started.text.splitlines() if line.startswith("teacher: ") and "tensors loaded" in line)
    assert said.count(loaded) == 1 and said.index(loaded) < said.index("\nloss: 1 task/ce + 1 dist/logits\n")
    assert "\ndist/aux is left out: student and teacher without auxiliary head\n" in said


def test_a_finished_run_is_done(finished):
    before = {p.name: p.read_bytes() for p in (finished / "run").iterdir() if p.name not in ("log.txt", ".lock")}
    again = train(finished, "--max-iterations", "2", "--workers", "0", "--save-dir", "run", "--resume", console="again.txt")
    assert again.wait() == [0] and "run: done already" in again.text and (finished / "run" / "DONE").read_text().strip() in again.text
    assert "step 1/" not in again.text
    assert before == {p.name: p.read_bytes() for p in (finished / "run").iterdir() if p.name not in ("log.txt", ".lock")}


FOLDERS = {
    "existing": ([], "--save-dir run: holds a run already; pass --resume to go on with it, or choose another folder"),
    "other settings": (["--resume", "--lr", "0.5", "--seed", "3"],
                       "--save-dir run: holds another run (--lr is 0.5, was 0.02; --seed is 3, was 0); choose another folder, or the same settings"),
    "a file": (["--save-dir", "file"], "--save-dir file: is a file; give a folder"),
    "below a file": (["--save-dir", "file/run"], "--save-dir file/run: cannot be written (Not a directory); choose another folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_are_refused(case, finished):
    arguments, message = FOLDERS[case]
    (finished / "file").touch()
    before = {p: p.stat().st_mtime_ns for p in (finished / "run").iterdir() if p.name not in ("log.txt", ".lock")}
    started = train(finished, "--max-iterations", "2", "--workers", "0", "--save-dir", "run", *arguments, console="refused.txt")
    assert started.wait() == [2]
    assert started.text == f"error: {message}\n"
    assert before == {p: p.stat().st_mtime_ns for p in (finished / "run").iterdir() if p.name not in ("log.txt", ".lock")}
    assert not (finished / "new" / "args.json").exists(), "the folder can be used with a mended command"


def test_a_model_or_teacher_that_changed_is_refused(tmp_path):
    training, _, run = prepared(tmp_path / "run")
    training.step = 1
    run.save_last(training.snapshot())
    options, columns = run.options, run.columns[1:]
    options.resume = True
    run = Run(options, columns)
    with pytest.raises(ValueError, match="the model is .*'tiny'.*, was .*; choose another folder") as error:
        run.start({**Tiny.config, "width": 9}, None)
    assert "\n" not in str(error.value)
    run = Run(options, columns)
    with pytest.raises(ValueError, match=r"the teacher is \{'file': 't.pth', 'sha256': 'ab'\}, was None"):
        run.start(Tiny.config, {"file": "t.pth", "sha256": "ab"})


def try_folder(folder) -> str:
    """The message of a run of a user without rights."""
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        prepared(folder)
    except ValueError as error:
        return str(error)
    return "started"


@pytest.mark.parametrize("where", ["read-only", "read-only/new", "locked/run"])
def test_a_folder_without_rights_is_refused(where, tmp_path):
    with tempfile.TemporaryDirectory() as top:  # pytest's own folders are closed to other users
        os.chmod(top, 0o755)
        for name, mode in (("read-only", 0o555), ("locked", 0o000)):
            os.mkdir(f"{top}/{name}")
            os.chmod(f"{top}/{name}", mode)
        (message,) = on_ranks(partial(try_folder, f"{top}/{where}"), 1, tmp_path / "console.txt")
        assert message == f"--save-dir {top}/{where}: cannot be written (Permission denied); choose another folder"
        os.chmod(f"{top}/locked", 0o755)


def test_two_ranks_refuse_a_batch_that_cannot_be_divided(tmp_path):
    started = train(tmp_path, "--batch-size", "3", "--max-iterations", "2", "--workers", "0", "--save-dir", "run", world=2)
    assert started.wait() == [2, 2]
    assert started.text.splitlines()[0] == (
        "error: batch size 3 (all ranks together) is not divisible by 2 ranks x 1 accumulated micro batches; use a multiple of 2")  # fmt: skip
    assert "Traceback" not in started.text and not (tmp_path / "run" / "args.json").exists()


def limit_files():
    """No file of the process may grow beyond 1 MB; a checkpoint has 15."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def test_a_full_disk_stops_with_one_line(tmp_path):
    started = train(tmp_path, "--max-iterations", "2", "--workers", "0", "--save-dir", "run", change=limit_files)
    assert started.wait() == [2]
    assert started.text.splitlines()[-1] == "error: cannot write run/last.pth: File too large; free space or choose another --save-dir"
    assert "Traceback" not in started.text and not list((tmp_path / "run").glob(".*.tmp"))


def test_what_a_killed_save_left_is_removed(tmp_path):
    prepared(tmp_path / "run")
    leftover = tmp_path / "run" / ".last.pth.123.tmp"
    leftover.write_bytes(b"half")
    prepared(tmp_path / "run", "--resume")
    assert not leftover.exists()


def test_rows_after_the_checkpoint_and_cut_lines_are_dropped(tmp_path):
    training, _, run = prepared(tmp_path)
    for step in range(1, 6):
        run.record(step, {"loss": step, "extra": 1})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    training.step = 3
    run.save_last(training.snapshot())
    prepared(tmp_path, "--resume")
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3] and rows(tmp_path)[0]["extra"] == 1
    table = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in table] == ["1", "2", "3"] and "extra" not in table[0]


def test_a_damaged_last_checkpoint_is_told_and_the_previous_one_used(tmp_path, caplog):
    training, _, run = prepared(tmp_path)
    for training.step in (3, 5):
        run.record(training.step, {"loss": 1})
        run.save_last(training.snapshot())
    data = (tmp_path / "last.pth").read_bytes()
    (tmp_path / "last.pth").unlink()
    (tmp_path / "last.pth").write_bytes(data[:-100])
    with caplog.at_level("WARNING", "segkd"):
        logger.propagate = True
        training, _, _ = prepared(tmp_path, "--resume")
    assert training.step == 3 and [row["step"] for row in rows(tmp_path)] == [3]
    assert "no checksum at its end" in caplog.text and "going on from last.previous.pth" in caplog.text


def stop_when_read(index):
    """SIGTERM to this process when a validation picture is read for the first time."""
    read = DrawnItem.read

    def reading(self):
        if (self.split, self.index) == ("val", index) and not Path("stopped").exists():
            Path("stopped").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self)

    DrawnItem.read = reading


def test_interrupted_holds_a_command_that_goes_on(tmp_path):
    """The real scripts in a path with a space, stopped during the validation, and continued by what INTERRUPTED says."""
    folder = tmp_path / "with space"
    folder.mkdir()
    length = ("--max-iterations", "4", "--val-interval", "2")
    started = train(folder, *length, "--workers", "0", "--save-dir", "my run", change=partial(stop_when_read, 0))
    assert started.wait() == [128 + signal.SIGTERM], started.text
    text = (folder / "my run" / "INTERRUPTED").read_text()
    command = text.splitlines()[1]
    assert text.startswith("stopped after step 2; go on with:\n") and command in started.text
    path = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    again = subprocess.run(command, shell=True, cwd=folder, env=path, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "going on from step 2" in again.stdout and "step 4/4" in again.stdout and "step 2/4" not in again.stdout
    assert (folder / "my run" / "DONE").exists() and not (folder / "my run" / "INTERRUPTED").exists()
    assert shlex.split(command)[-1] == "--resume"
    assert [row["step"] for row in rows(folder / "my run")] == [1, 2, 2, 3, 4, 4]


NODES = "go on with the same launcher and arguments on every node, and --resume; the training's part:"


@pytest.mark.parametrize("variables, how, before", [
    ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, NODES, ""),
    ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}, NODES, ""),
    ({"WORLD_SIZE": "2"}, NODES, ""),  # started by something that does not say how many are here
    ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, "go on with:", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 torchrun --nproc-per-node=4 "),
    ({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, "go on with:",
     "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=90 torchrun --nproc-per-node=1 "),
])  # fmt: skip
@pytest.mark.parametrize("given", [[], ["--resume"]])
def test_interrupted_on_several_ranks(variables, how, before, given, tmp_path, monkeypatch, caplog):
    """No command that would start a part of the ranks: on several nodes it says what to start on each."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["/my code/train_kd.py", "--method", "kd", *given])
    with caplog.at_level("INFO"):
        Run.interrupted(SimpleNamespace(folder=tmp_path), 5)
    again = f"{before}'/my code/train_kd.py' --method kd --resume"
    assert (tmp_path / "INTERRUPTED").read_text() == f"stopped after step 5; {how}\n{again}\n"
    assert f"stopped after step 5, saved; {how}\n  {again}" in caplog.text


def test_a_damaged_checkpoint_does_not_replace_the_one_before(tmp_path):
    """Going on from last.previous.pth, the next save must not move the damaged last.pth over it: it may fail or be damaged too."""
    training, _, run = prepared(tmp_path)
    for step in (1, 2):
        training.step = step
        run.save_last(training.snapshot())
    last = tmp_path / "last.pth"
    last.write_bytes(last.read_bytes()[:-100])
    training, _, run = prepared(tmp_path, "--resume")
    assert training.step == 1
    training.step = 5
    run.save_last(training.snapshot())
    assert checkpoint.load(last)["step"] == 5 and checkpoint.load(checkpoint.previous(last))["step"] == 1
    training.step = 6
    run.save_last(training.snapshot())
    assert checkpoint.load(last)["step"] == 6 and checkpoint.load(checkpoint.previous(last))["step"] == 5


# ------------------------------------------------------------------------------------------------------------ what a step costs


SMALL = ("--student-backbone", "mobilenetv3_small", "--dataset", "shapes", "--crop-size", "64", "--batch-size", "2", "--max-iterations", "9")


@cache
def networks():
    student, teacher = (build_model("deeplabv3", backbone, 5, aux=True) for backbone in ("mobilenetv3_small", "resnet18_vanilla"))
    return student, fold_batchnorm(teacher, tuple(teacher.channels))[0]


def a_step(name, device=CPU, *flags):
    """() -> the step's row of the record: one step of a training with the method, on the device."""
    options = train_options(["--method", name, *SMALL, *flags, "--save-dir", "unused"], distil=True, description="")
    student, teacher = map(deepcopy, networks())
    setup = Setup(student.channels, teacher.channels, 5, (64, 64), 2, "shapes", teacher_norms=teacher.norms)
    distiller = Distiller(student, TaskLoss(0.4, kind=options.task_loss), build_methods(options.methods, setup), options.compile).to(device)
    frozen = Teacher(teacher.to(device), distiller.teacher_needs, dtype=engine.AMP[options.amp], compile=options.compile)
    training = Training(distiller, build_optimizers(distiller, options), options, device)
    images = torch.randint(0, 256, (5, 2, 3, 64, 64), dtype=torch.uint8)
    batches = cycle([Batch(image, image[:, 0] // 64, ["a", "b"]).to(device) for image in images])

    def step():
        engine.train_step(training, distiller, frozen, [next(batches)], training.record)
        return training.record.rows[-1]

    return step


class Graphs:
    """What CUDA graphs do to memory, on a CPU: outputs of a network are gone where the next step begins, and no gradient may be left then."""

    def __init__(self):
        self.networks, self.outputs, self.steps = [], [], 0

    def compile(self, forward, options, dynamic):
        assert options["triton.cudagraphs"] and not dynamic
        self.networks.append(forward.__self__)

        def run(*arguments):
            output = forward(*arguments)
            self.outputs += [x.detach() for x in vars(output).values() if x is not None]
            return output

        return run

    def begin_step(self):
        assert all(parameter.grad is None for network in self.networks for parameter in network.parameters())
        for output in self.outputs:
            output.fill_(float("nan"))
        self.outputs, self.steps = [], self.steps + 1


@pytest.mark.parametrize("name", METHODS)
def test_what_cuda_graphs_overwrite_is_read_by_nobody(name, monkeypatch):
    """`--compile reduce-overhead`, as far as that can be seen without a GPU."""
    found = []
    for flags in ((), ("--compile", "reduce-overhead")):
        graphs = Graphs()
        monkeypatch.setattr(torch, "compile", graphs.compile)
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", graphs.begin_step)
        torch.manual_seed(0)
        step = a_step(name, CPU, *flags)
        found.append([step() for _ in range(3)])
    assert graphs.steps == 3 and len(graphs.networks) == 2
    assert all(map(torch.equal, *found)) and not torch.equal(found[0][0], found[0][2])


def test_a_network_output_that_outlives_its_step_is_seen(monkeypatch):
    kept, forward = [], METHODS["kd"].forward

    def late(self, student, teacher, batch):
        kept.append(teacher)
        return forward(self, student, kept[max(0, len(kept) - 2)], batch)

    monkeypatch.setattr(METHODS["kd"], "forward", late)
    graphs = Graphs()
    monkeypatch.setattr(torch, "compile", graphs.compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", graphs.begin_step)
    step = a_step("kd", CPU, "--compile", "reduce-overhead")
    assert [bool(step().isfinite().all()) for _ in range(2)] == [True, False]


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_read_back_between_log_lines(name):
    """Not in any line of the project: a read stops the host until the GPU has caught up. Reads that a CPU alone makes do not count."""
    step = a_step(name)
    # count visible positions and the pairs that matter, to choose what costs least there
    on_a_cpu_alone = {"losses/projection.py:front_costs", "losses/contrast.py:plain_tile", "losses/contrast.py:pull_pairs"}
    with Watch() as watch:
        step()
    assert set(watch.blocks) <= on_a_cpu_alone and watch.operations > 100


@pytest.mark.parametrize("flags", [("--amp", "bf16"), ("--task-loss", "ohem"), ("--optimizer", "adamw")], ids=" ".join)
def test_nothing_is_read_back_whatever_the_options(flags):
    step = a_step("kd", CPU, *flags)
    step()  # a teacher in bfloat16 reads its agreement with float32 once
    with Watch() as watch:
        step()
    assert watch.blocks == [] and watch.operations > 100


def test_a_read_in_a_step_is_seen(monkeypatch):
    def read(self, student, batch):
        value = student.logits.mean().item()
        return dict.fromkeys(self.weights, value * student.logits[student.logits > 0].sum())

    monkeypatch.setattr(TaskLoss, "forward", read)
    step = a_step("kd")
    with Watch() as watch:
        step()
    assert watch.blocks == ["tests/test_engine.py:read"] * 2


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("mode", ["off", "reduce-overhead"])
def test_a_gpu_is_never_waited_for(name, mode):
    torch.compiler.reset()  # networks share their code, of which a process keeps eight compiled forms
    step = a_step(name, torch.device("cuda"), "--compile", mode)
    for _ in range(3):  # tuning, compiling and recording graphs may wait
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", METHODS)
def test_cuda_graphs_compute_the_same(name, monkeypatch):
    for module in networks()[0].modules():
        if isinstance(module, nn.Dropout):
            monkeypatch.setattr(module, "p", 0.0)  # its masks are others when compiled
    found = []
    torch.compiler.reset()
    for mode in ("off", "reduce-overhead"):
        torch.manual_seed(0)
        step = a_step(name, torch.device("cuda"), "--compile", mode, "--lr", "1e-6")
        found.append(torch.stack([step() for _ in range(5)])[:, :-1])
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-3)  # convolutions are in TF32
