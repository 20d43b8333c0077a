"""Wiring: from options to a finished training. Both training scripts are this one function with other options."""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from dataset import EndlessSampler, EvalSampler, build_dataset, build_loader
from losses import Setup, build_methods, lad
from losses.task import TaskLoss
from models import ALIASES, build_model, count_macs, count_parameters
from models.weights import load_backbone, load_into, model_from_checkpoint
from utils import checkpoint, distributed, log
from utils.distill import Distiller, LabelAssisted, Teacher
from utils.engine import AMP, NonFiniteError, Training, fit
from utils.log import logger
from utils.metrics import Inference, Stopped, evaluate
from utils.optim import build_optimizers
from utils.options import Options, option_table
from utils.run import Run, StopSignal, write_text


def run_script(function, options: Options) -> None:
    """Run a script's function on this process's device and exit with the status it returns (None: 0); what a user can mend ends in
    one line and status 2."""
    try:
        device = distributed.init(options.device, options.dist_timeout)
        log.setup()
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
    set_deterministic(options)
    torch.manual_seed(options.seed)
    student = build_student(options)
    teacher_model, teacher_id = build_teacher(options)
    setup = Setup(
        student=student.channels, teacher=teacher_model.channels if teacher_model else {}, num_classes=student.num_classes,
        crop=options.crop_size, global_batch=options.batch_size // options.accumulate,
        dataset=options.dataset, seed=options.seed,
        teacher_norms=teacher_model.norms if teacher_model else {},
    )  # fmt: skip
    methods = build_methods(options.methods, setup)
    task = TaskLoss(options.aux_weight if "aux" in student.channels else 0.0)
    distiller = LabelAssisted(student, task, options.seed) if options.label_assisted else Distiller(student, task, methods)
    if options.dry_run:
        logger.info("%s\n%s", option_table(options), describe(distiller, teacher_model, options, device))
        return

    selection = Split(options, options.spec.select_split, device)
    reported = selection if options.spec.report_split == options.spec.select_split else Split(options, options.spec.report_split, device)
    pictures = build_dataset(options.spec, options.data, "train", augment=options.spec.augment(options.crop_size), seed=options.seed)
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
    resumed = run.start(student.config, teacher_id)
    logger.debug("%s", option_table(options))
    logger.info("%s", describe(distiller, teacher_model, options, device))

    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    distiller.to(device=device, memory_format=layout)
    teacher = Teacher(teacher_model.to(device=device, memory_format=layout), distiller.teacher_needs, options.seed) if methods else None
    training = Training(distiller, build_optimizers(distiller, options), options, device)
    if resumed:
        training.restore(resumed)
        logger.info("going on from step %d", training.step)
    sampler.start_step = training.step
    loader = build_loader(pictures, sampler, workers=options.workers, device=device)
    with StopSignal() as stop:
        try:
            if fit(training, teacher, loader, run, selection.evaluate, stop):
                report(training, run, selection, reported, lambda: stop.received)
                return None
        except Stopped:
            run.interrupted(training.step)
    return stop.status


def build_student(options: Options):
    """The network to train, with the weights it starts from."""
    aux = options.student_aux
    if aux and not options.aux_weight:
        raise ValueError("--aux-weight 0 leaves the auxiliary head untrained; drop the flag that asks for the head, or give it a weight")
    student = build_model(
        options.student_model, options.student_backbone, options.spec.num_classes, head_width=options.student_head_width,
        aux=False if not options.aux_weight else aux, normalization=options.student_normalization,
        head_after_dropout=options.student_head_after_dropout, in_channels=4 if options.label_assisted else 3,
    )  # fmt: skip
    if options.label_assisted:
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = lad.DROPOUT
    if options.student_pretrained_base != "none" and not options.dry_run:
        logger.info("backbone: %s", load_backbone(student, options.student_pretrained_base))
    if options.student_pretrained and not options.dry_run:
        logger.info("%s", load_into(student, options.student_pretrained, allow_classifier_mismatch=True))
    return student


def build_teacher(options: Options):
    """(model, {"file", "sha256"}) of the teacher, (None, None) when nothing is distilled.

    Raises:
        ValueError: no checkpoint, one of another model than the flags say, or of another number of classes.
    """
    if not options.methods:
        return None, None
    num_classes, path = options.spec.num_classes, options.teacher_checkpoint
    if options.dry_run and options.teacher_model and options.teacher_backbone:
        return build_model(options.teacher_model, options.teacher_backbone, num_classes), None
    if path is None:
        raise ValueError("--teacher-checkpoint is missing: train a teacher with train_baseline.py, or give a published file")
    model, found = model_from_checkpoint(path, normalization=options.teacher_normalization)
    if model.num_classes != num_classes:
        raise ValueError(f"teacher checkpoint {path} has {model.num_classes} classes, {options.dataset} has {num_classes}; "
                         f"pass a --teacher-checkpoint trained on {options.dataset}")  # fmt: skip
    for flag in ("model", "backbone"):
        asked = getattr(options, f"teacher_{flag}")
        if asked and ALIASES.get(asked, asked) != model.config[flag]:
            raise ValueError(f"--teacher-{flag} {asked}: {path} is a {model.config[flag]}; drop the flag, or give the checkpoint you mean")
    logger.info("teacher: %s", found)
    return model, {"file": os.path.basename(path), "sha256": checkpoint.fingerprint(path)}


class Split:
    """A split of the data set, to evaluate models on: whole pictures, one scale."""

    def __init__(self, options: Options, name: str, device: torch.device):
        self.name, self.device, self.amp = name, device, AMP[options.amp]
        self.spec = options.spec
        self.pictures = build_dataset(options.spec, options.data, name)
        sampler = EvalSampler(len(self.pictures), distributed.rank(), distributed.world())
        self.loader = build_loader(self.pictures, sampler, workers=options.workers, device=device)

    def evaluate(self, model, stop=None):
        """Scores; raises Stopped when `stop()` says so."""
        return evaluate(model, self.loader, len(self.pictures), self.spec, self.device, Inference(), self.amp, stop)


def report(training: Training, run: Run, selection: Split, reported: Split, stop) -> None:
    """Scores of the last and of the best student on the split that the field reports, once, at the end: report.json and DONE.

    The best was chosen on the selection split; where that is the reported one (Cityscapes, VOC), the table says so.
    """
    spec, rows = training.options.spec, {}
    rows["last"] = rows["best"] = reported.evaluate(training.student, stop)
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
        "classes": list(spec.classes), "seconds": training.budget.seconds,
        "steps": {"last": training.step, "best": best["step"]}, **{name: scores.plain() for name, scores in rows.items()},
    }  # fmt: skip
    if distributed.is_main():
        write_text(run.folder / "report.json", json.dumps(content, indent=1) + "\n")
    run.finish(text)


def describe(distiller: Distiller, teacher, options: Options, device: torch.device) -> str:
    """What is trained, in a few lines: networks with their size, terms with their weights, the ranks."""
    height, width = options.crop_size

    def line(who, model):
        name = f"{model.config['model']}-{model.config['backbone']}"
        parameters, macs = count_parameters(model) / 1e6, count_macs(model, height, width) / 1e9
        return f"{who}: {name}, {parameters:.2f} M parameters, {macs:.2f} GMAC per {height}x{width} crop"

    lines = [line("student" if teacher else "network", distiller.student)]
    if teacher is not None:
        lines.append(line("teacher", teacher))
    extra = sum(p.numel() for method in distiller.methods.values() for p in method.parameters())
    lines.append("loss: " + " + ".join(f"{value:g} {name}" for name, value in distiller.term_factors(0.0).items()))
    if extra:
        lines.append(f"the methods add {extra / 1e6:.2f} M parameters during training")
    world = distributed.world()
    lines.append(f"{options.batch_size} images per step" + (f" on {world} ranks" if world > 1 else ""))
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
