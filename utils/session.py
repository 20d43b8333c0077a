"""Wiring: from options to a finished training. Both training scripts are this one function with other options."""

import hashlib
import json
import math
import os
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch

from dataset import Cache, EndlessSampler, EvalSampler, Spec, build_dataset, build_loader
from dataset.parallel import cores
from losses import Setup, build_methods, lad
from losses.task import TaskLoss
from models import ALIASES, build_model, count_macs, count_parameters
from models.fold import fold_batchnorm
from models.foreign import Foreign, build_foreign
from models.weights import expected_normalization, load_backbone, load_into, model_from_checkpoint, read_state
from utils import checkpoint, distributed, log
from utils.board import require_tensorboard
from utils.distill import Distiller, LabelAssisted, Teacher, check_compile
from utils.engine import AMP, NonFiniteError, Training, fit, memory_format
from utils.log import logger
from utils.metrics import Inference, Stopped, evaluate
from utils.optim import build_optimizers
from utils.options import Options, config_of, option_table
from utils.run import Run, StopSignal, write_text


def run_script(function, options: Options) -> None:
    """Run a script's function on this process's device and exit with the status it returns (None: 0); what a user can mend ends in
    one line and status 2."""
    try:
        device = distributed.init(options.device, options.dist_timeout)
        log.setup()
        if hasattr(options, "amp"):  # exports have no precision to choose
            set_tf32(options, device)
            warn_of_slow_autocast(options.amp, device)
        status = function(options, device)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)
    except Exception as error:
        if not distributed.is_main():
            time.sleep(3)  # where rank 0 has the same to say, torchrun ends the others before they repeat it
        logger.error("error: %s", explain(error))
        sys.stdout.flush()
        os._exit(2)  # at once: a rank that waits for this one in a collective must see it go
    distributed.shutdown()
    sys.exit(status)


def set_tf32(options: Options, device: torch.device) -> None:
    """See --tf32; ValueError where it would do nothing."""
    if device.type != "cuda" and options.sources.get("tf32") == "command line":
        raise ValueError(f"--tf32 {options.tf32}: is for GPUs, and this runs on the {device.type}; drop the flag")
    torch.backends.cudnn.allow_tf32 = options.tf32 != "off"
    torch.backends.cuda.matmul.allow_tf32 = options.tf32 == "all"


def warn_of_slow_autocast(amp: str, device: torch.device) -> None:
    """One line where a CPU computes the precision of --amp in software: without its instructions a training takes many times as long."""
    if amp == "off" or device.type != "cpu" or not distributed.is_main():
        return
    seconds = {}
    for dtype in (torch.float32, AMP[amp]):
        image = torch.ones(1, 128, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)
        weight = torch.ones(128, 128, 3, 3, dtype=dtype)
        for _ in range(3):
            start = time.process_time()  # of the wall's clock other processes take their share
            torch.nn.functional.conv2d(image, weight, padding=1)
            seconds[dtype] = min(time.process_time() - start, seconds.get(dtype, math.inf))
    times = seconds[AMP[amp]] / seconds[torch.float32]
    if times > 2:
        logger.warning("--amp %s: a convolution takes this CPU %.0f times as long as in float32; leave --amp off here", amp, times)


def explain(error: Exception) -> str:
    """One line for what this project refuses and what another rank caused; the traceback for everything else."""
    text = str(error).strip()
    if distributed.lost_peer(error):
        return f"another rank stopped or hangs; its own message says why ({text.splitlines()[0]})"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    here = Path(frame.filename).is_relative_to(Path(__file__).parent.parent) and "site-packages" not in frame.filename
    # raised on purpose, not by an unpacking or a conversion that went wrong
    ours = isinstance(error, (ValueError, NonFiniteError)) and here and (frame.line or "").startswith("raise")
    return text if ours else "".join(traceback.format_exception(error)).strip()


def train(options: Options, device: torch.device) -> int | None:
    """Train a network, alone or with a teacher and distillation methods, in `options.save_dir`; the exit status if interrupted."""
    if options.tensorboard:
        require_tensorboard()
    set_deterministic(options)
    check_compile(options.compile, device, options.accumulate)
    torch.manual_seed(options.seed)
    student = build_student(options)
    teacher_model, teacher_id = build_teacher(options)
    distributed.check_equal("the teacher", teacher_id["sha256"][:16] if teacher_id else "none", "give all nodes the same file")
    setup = Setup(
        student=student.channels, teacher=teacher_model.channels if teacher_model else {}, num_classes=student.num_classes,
        crop=options.crop_size, global_batch=options.batch_size // options.accumulate,
        dataset=options.dataset, seed=options.seed,
        teacher_norms=teacher_model.norms if teacher_model else {},
    )  # fmt: skip
    methods = build_methods(options.methods, setup)
    check_needs(methods, student, teacher_model)
    weights = {"aux": options.aux_weight, "aux2": options.aux_weight, "detail": options.detail_weight}
    task = TaskLoss(*(weight if name in student.channels else 0.0 for name, weight in weights.items()), options.task_loss)
    if options.label_assisted:
        distiller = LabelAssisted(student, task, options.seed, options.compile)
    else:
        distiller = Distiller(student, task, methods, options.compile)
    sizes = {"parameters": count_parameters(student), "extra_parameters": extra_parameters(distiller), "macs": macs(student, options),
             "teacher_macs": macs(teacher_model, options) if teacher_model else 0}  # fmt: skip
    if options.dry_run:
        logger.info("%s\n%s", option_table(options), describe(distiller, teacher_model, sizes, options, device))
        return

    selection = Split(options, options.spec.select_split, device)
    reported = selection if options.spec.report_split == options.spec.select_split else Split(options, options.spec.report_split, device)
    spec = options.spec
    pictures = build_dataset(spec, options.data, spec.train_split, augment=spec.augment(options.crop_size), seed=options.seed)
    for part in (pictures, selection.pictures, reported.pictures):
        names = hashlib.sha256("\n".join(item.name for item in part.items).encode(errors="surrogateescape")).hexdigest()[:8]
        distributed.check_equal(f"the pictures of {part.split}", f"{len(part)} ({names})", "give all nodes the same data")
    sampler = EndlessSampler(
        len(pictures), options.batch_size, rank=distributed.rank(), world=distributed.world(), seed=options.seed, accumulate=options.accumulate
    )
    run = Run(options, [*["loss", *distiller.term_names, "gradient_norm", "lr", "seconds", "images_per_second"],
                        "val/mIoU", "val/aAcc", "val/mAcc"])  # fmt: skip
    log.setup(run.folder)
    if run.done:
        run.check_same(student.config, teacher_id)
        logger.info("%s: done already\n%s", run.folder, (run.folder / "DONE").read_text(encoding="utf-8").strip())
        return
    if run.state is None:
        load_pretrained(student, options)
    resumed = run.start(student.config, teacher_id, selection.names)
    logger.debug("%s", option_table(options))
    logger.info("%s", describe(distiller, teacher_model, sizes, options, device))

    distiller.to(device)
    distiller.arrange(memory_format(options, device, trained=True))
    teacher = frozen_teacher(teacher_model, distiller.teacher_needs, options, device) if methods else None
    training = Training(distiller, build_optimizers(distiller, options), options, device)
    if resumed:
        training.restore(resumed)
        logger.info("going on from step %d", training.step)
    del resumed  # a second copy of everything that is trained
    sampler.start_step = training.step
    cache = decoded_cache(options)
    pictures.keep(cache)
    selection.pictures.keep(cache)  # read at every validation; the reported split once
    loader = build_loader(pictures, sampler, workers=options.workers, device=device)
    with StopSignal() as stop:
        try:
            if fit(training, teacher, loader, run, partial(selection.evaluate, visit=run.board), stop):
                report(training, run, selection, reported, sizes, lambda: stop.received)
                return None
        except Stopped:
            run.interrupted(training.step)
    return stop.status


def build_student(options: Options):
    """The network to train, with random weights."""
    follow_pretrained(options)
    aux = options.student_aux
    if aux and not options.aux_weight:
        raise ValueError("--aux-weight 0 leaves the auxiliary head untrained; drop the flag that asks for the head, or give it a weight")
    student = build_model(
        options.student_model, options.student_backbone, options.spec.num_classes, head_width=options.student_head_width,
        aux=False if not options.aux_weight else aux, normalization=options.student_normalization,
        detail=None if options.detail_weight else False, head_after_dropout=options.student_head_after_dropout,
        in_channels=4 if options.label_assisted else 3,
    )  # fmt: skip
    if options.aux_weight and options.sources["aux_weight"] == "command line" and not {"aux", "aux2"} & student.channels.keys():
        raise ValueError(f"--aux-weight {options.aux_weight:g}: {options.student_model} has no auxiliary head; "
                         "ask for one with --aux (train_kd.py: --student-aux), or drop the flag")  # fmt: skip
    if options.student_head_after_dropout and not isinstance(student.head.dropout, torch.nn.Dropout):
        raise ValueError(f"--student-head-after-dropout: {options.student_model} has no dropout in front of its classifier; drop the flag")
    if options.detail_weight and options.sources["detail_weight"] == "command line" and "detail" not in student.channels:
        raise ValueError(f"--detail-weight {options.detail_weight:g}: {options.student_model} has no detail head; drop the flag")
    dropout = lad.DROPOUT if options.student_dropout is None and options.label_assisted else options.student_dropout
    if dropout is not None:
        layers = [module for module in student.modules() if isinstance(module, torch.nn.Dropout)]
        if not layers and options.student_dropout is not None:
            raise ValueError(f"--student-dropout {dropout:g}: {options.student_model} has no dropout layer; drop the flag")
        for layer in layers:
            layer.p = dropout
    return student


def follow_pretrained(options: Options) -> None:
    """The input normalisation is that of --student-pretrained, unless a flag says another."""
    path = options.student_pretrained
    if path and options.sources["student_normalization"] == "default" and Path(path).is_file():
        expected = expected_normalization(*read_state(path))
        if expected:
            options.student_normalization, options.sources["student_normalization"] = expected, "the pretrained file"


def load_pretrained(student, options: Options) -> None:
    """The weights that a new run starts from, where files are given; one that is resumed has its own."""
    if options.student_pretrained_base != "none":
        logger.info("backbone: %s", load_backbone(student, options.student_pretrained_base))
    if options.student_pretrained:
        logger.info("%s", load_into(student, options.student_pretrained, allow_classifier_mismatch=True))


def build_teacher(options: Options):
    """(model, {"file", "sha256"}) of the teacher, (None, None) when nothing is distilled.

    Raises:
        ValueError: no checkpoint, one of another model than the flags say, or of another number of classes.
    """
    if not options.methods:
        return None, None
    if ":" in (options.teacher_model or ""):
        return build_foreign_teacher(options)
    if options.teacher_layers:
        raise ValueError("--teacher-layers names layers of --teacher-model PACKAGE.MODULE:FUNCTION; drop it, or name that function")
    num_classes, path = options.spec.num_classes, options.teacher_checkpoint
    if options.dry_run and options.teacher_model and options.teacher_backbone:
        return build_model(options.teacher_model, options.teacher_backbone, num_classes), None
    if path is None:
        raise ValueError("--teacher-checkpoint is missing: train a teacher with train_baseline.py, or give a published file")
    before = checkpoint.stamp(path)
    model, found = model_from_checkpoint(path, normalization=options.teacher_normalization)
    check_classes(model, path, options.spec, who="teacher checkpoint", remedy=f"pass a --teacher-checkpoint trained on {options.dataset}")
    for flag in ("model", "backbone"):
        asked = getattr(options, f"teacher_{flag}")
        if asked and ALIASES.get(asked, asked) != model.config[flag]:
            raise ValueError(f"--teacher-{flag} {asked}: {path} is a {model.config[flag]}; drop the flag, or give the checkpoint you mean")
    logger.info("teacher: %s", found)
    return model, {"file": os.path.basename(path), "sha256": identity_of(path, before)}


def identity_of(path: str, before: tuple | None) -> str:
    """SHA-256 of the file that was just read; ValueError where it was replaced since its stamp `before`, and so may be another one."""
    identity = checkpoint.fingerprint(path)
    if checkpoint.stamp(path) != before:
        raise ValueError(f"{path}: was replaced while it was read; start again when it is complete")
    return identity


def build_foreign_teacher(options: Options):
    """As `build_teacher`, for a network that a function of the user's builds (`models/foreign.py`)."""
    name, path = options.teacher_model, None if options.dry_run else options.teacher_checkpoint
    if options.teacher_backbone:
        raise ValueError(f"--teacher-backbone {options.teacher_backbone}: {name} builds the whole network; drop the flag")
    before = checkpoint.stamp(path) if path else None
    model, found = build_foreign(name, path, options.teacher_layers or (), options.crop_size, options.teacher_normalization)
    if model.num_classes != options.spec.num_classes:
        raise ValueError(f"teacher {name} has {model.num_classes} classes, {options.dataset} has {options.spec.num_classes}; "
                         f"have the function build one trained on {options.dataset}")  # fmt: skip
    logger.info("teacher: %s", found)
    identity = identity_of(path, before) if path else checkpoint.fingerprint_tensors(model.net.state_dict())
    return model, {"file": os.path.basename(path or name), "sha256": identity}


def frozen_teacher(model, needs, options: Options, device: torch.device) -> Teacher:
    """The teacher as it runs: BatchNorms folded into convolutions, in the format and the precision of the training."""
    model, folded = fold_batchnorm(model, needs, options.crop_size if isinstance(model, Foreign) else (64, 64))
    logger.info("teacher: %d BatchNorms folded into convolutions", folded)
    model.to(device=device, memory_format=memory_format(options, device))
    return Teacher(model, needs, options.seed, AMP[options.amp], options.compile)


def check_needs(methods: dict, student, teacher) -> None:
    """ValueError where a method reads what one of the networks does not have."""
    for name, method in methods.items():
        for who, model in (("student", student), ("teacher", teacher)):
            lacking = [field for field in method.needs if field not in model.channels]
            if lacking:
                layers = " ".join(f"{field}=LAYER" for field in lacking)
                remedy = f"add {layers} to --teacher-layers" if isinstance(model, Foreign) else f"choose another {who}, or another method"
                raise ValueError(f"--method {name} reads {', '.join(lacking)} of the {who}, which has none; {remedy}")


def check_classes(model, path: str, spec: Spec, *, who: str = "checkpoint", remedy: str = "pass --dataset, or --data, of its training") -> None:
    """ValueError where the model of a checkpoint has other classes than the data set: another number, or, if the file names them, others."""
    if model.num_classes != spec.num_classes:
        raise ValueError(f"{who} {path} has {model.num_classes} classes, {spec.name} has {spec.num_classes}; {remedy}")
    config = config_of(path)
    for number, (theirs, ours) in enumerate(zip(config.get("classes") or spec.classes, spec.classes, strict=False)):
        if theirs != ours:
            raise ValueError(f"{who} {path} calls class {number} {theirs!r}, {spec.name} calls it {ours!r}; {remedy}")


def decoded_cache(options: Options) -> Cache:
    """What --cache asks for; on several ranks the first of each node builds it, while the others wait for it beyond --dist-timeout."""
    gather = distributed.patient_gather() if options.cache != "none" else distributed.gather_text
    return Cache(options.cache, options.cache_dir, workers=cores() if options.workers else 0, rank=distributed.rank(),
                 leader=distributed.leader(), gather=gather, tell=logger.info)  # fmt: skip


class Split:
    """A split of the data set, to evaluate models on: whole pictures, one scale."""

    def __init__(self, options: Options, name: str, device: torch.device):
        self.name, self.device, self.amp = name, device, AMP[options.amp]
        self.spec = options.spec
        self.pictures = build_dataset(options.spec, options.data, name)
        sampler = EvalSampler(len(self.pictures), distributed.rank(), distributed.world())
        self.names = [self.pictures.items[index].name for index in sampler]  # of this rank's share
        self.loader = build_loader(self.pictures, sampler, workers=options.workers, device=device)

    def evaluate(self, model, stop=None, visit=None):
        """Scores; raises Stopped when `stop()` says so. `visit`: called with (batch, prediction) of every batch of this rank."""
        return evaluate(model, self.loader, len(self.pictures), self.spec, self.device, Inference(), self.amp, stop, visit)


def report(training: Training, run: Run, selection: Split, reported: Split, sizes: dict, stop) -> None:
    """Scores of the last and of the best student on the split that the field reports, once, at the end, and what the training has
    cost: report.json and DONE. `sizes`: of the networks, for the report. What was just validated is not evaluated again.

    The best was chosen on the selection split; where that is the reported one (Cityscapes, VOC), the table says so.
    """
    spec, rows = training.options.spec, {}
    validated = reported is selection and training.scores is not None and training.validated == training.step
    rows["last"] = rows["best"] = training.scores if validated else reported.evaluate(training.student, stop)
    best = checkpoint.load(run.folder / "student_best.pth")
    if best["step"] != training.step:
        training.student.load_state_dict(best["student"])
        rows["best"] = reported.evaluate(training.student, stop)
    chosen = f"best on {selection.name}" + (", which is the reported split itself" if reported is selection else "")
    last, best_miou = rows["last"].miou, rows["best"].miou
    text = f"{reported.name}: last (step {training.step}): mIoU {last:.2f}; {chosen} (step {best['step']}): mIoU {best_miou:.2f}"
    logger.info("%s\n%s", text, rows["best"].table(spec.classes))
    content = {
        "split": reported.name, "selected_on": selection.name, "selection_miou": training.best,
        "holdout": training.options.holdout, "classes": list(spec.classes), "seconds": training.budget.seconds,
        "cost": sizes | cost(training),
        "steps": {"last": training.step, "best": best["step"]}, **{name: scores.plain() for name, scores in rows.items()},
    }  # fmt: skip
    if distributed.is_main():
        write_text(run.folder / "report.json", json.dumps(content, indent=1) + "\n")
    run.finish(text)


def cost(training: Training) -> dict:
    """What the steps have cost, on the rank with the largest need of memory; seconds per step None where no step was timed."""
    budget, on_gpu = training.budget, training.device.type == "cuda"
    peak = -int(distributed.minimum(torch.tensor(-training.peak_memory)))
    return {
        "seconds_per_step": budget.seconds / budget.steps if budget.steps else None, "timed_steps": budget.steps, "ranks": distributed.world(),
        "peak_memory": peak, "peak_memory_of": "tensors on one GPU (max_memory_allocated)" if on_gpu else "one process (ru_maxrss)",
    }  # fmt: skip


def extra_parameters(distiller: Distiller) -> int:
    """Weights of the methods' own, which are trained along with the student and thrown away."""
    return sum(p.numel() for method in distiller.methods.values() for p in method.parameters())


def macs(model, options: Options) -> int:
    """Multiply-adds of the forward pass of one crop."""
    return model.macs if isinstance(model, Foreign) else count_macs(model, *options.crop_size)


def describe(distiller: Distiller, teacher, sizes: dict, options: Options, device: torch.device) -> str:
    """What is trained, in a few lines: networks with their size, terms with their weights, the ranks. `sizes`: as in report.json."""
    height, width = options.crop_size

    def line(who, model, arithmetic):
        name = "-".join(filter(None, (model.config["model"], model.config["backbone"])))
        return f"{who}: {name}, {count_parameters(model) / 1e6:.2f} M parameters, {arithmetic / 1e9:.2f} GMAC per {height}x{width} crop"

    lines = [line("student" if teacher else "network", distiller.student, sizes["macs"])]
    if teacher is not None:
        lines.append(line("teacher", teacher, sizes["teacher_macs"]))
    extra = sizes["extra_parameters"]
    lines.append("loss: " + " + ".join(f"{value:g} {name}" for name, value in distiller.term_factors(0.0).items()))
    lines += [f"{name}/{term} is left out: {why}" for name, method in distiller.methods.items() for term, why in method.left_out.items()]
    if extra:
        lines.append(f"the methods add {extra / 1e6:.2f} M parameters during training")
    world = distributed.world()
    lines.append(f"{options.batch_size} images per step" + (f" on {world} ranks" if world > 1 else ""))
    for name, method in distiller.methods.items():
        for whose, changes in (("rank", "with another number of ranks or another --accumulate"), ("ranks", "with another --accumulate")):
            if divided := [term for term in method.divided(world, options.accumulate) if method.over_batch[term] == whose]:
                images = "one rank and micro-batch" if whose == "rank" else "one micro-batch on all ranks"
                lines.append(f"{name}: of the images of {images}, not of the whole step: {', '.join(divided)}; {changes} it is another loss")
    if world > 1 and device.type == "cpu":
        lines.append("BatchNorm normalises per rank: SyncBatchNorm exists on GPUs only")
    return "\n".join(lines)


def set_deterministic(options: Options) -> None:
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    else:
        torch.backends.cudnn.benchmark = True  # crops have one size
