"""The training loop: `fit`, and the state it carries from step to step."""

import resource
import sys
from dataclasses import dataclass, field
from zlib import crc32

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from losses.base import IGNORE
from utils import distributed
from utils.distill import Distiller, Teacher
from utils.log import duration, logger, progress_bar
from utils.metrics import Scores, Stopped
from utils.optim import Budget, learning_rate
from utils.run import Run, StopSignal

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def memory_format(options, device: torch.device, trained: bool = False) -> torch.memory_format:
    """In which a network's weights and activations are stored: by --channels-last, or in the faster one. With AVX2 oneDNN computes the
    gradients of 3x3 kernels in NHWC at 14 to 50 GFLOP/s, in NCHW at 36 to 63 (one Zen 3 core); whole forward passes are faster in NHWC there, too."""
    last = options.channels_last
    if last is None:
        slow = trained and options.amp == "off" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
        last = not slow
    return torch.channels_last if last else torch.contiguous_format


class NonFiniteError(RuntimeError):
    """A loss or a gradient became infinite or NaN."""


@dataclass
class Training:
    """Everything that changes during a training, and how to save and restore it."""

    distiller: Distiller
    optimizers: dict[str, torch.optim.Optimizer]
    options: object
    device: torch.device
    step: int = 0  # finished steps
    validated: int = 0  # the last step that was validated
    best: float = -1.0  # the highest mIoU so far
    metrics: dict[str, float] = field(default_factory=dict)  # of the last validation
    tenth: int = 0  # of the budget, at the last validation
    peak_memory: int = 0  # bytes, see `peak_memory`
    scores: Scores | None = None  # of the last validation, if this process has made one

    def __post_init__(self):
        options = self.options
        self.budget = Budget(options.max_iterations, options.max_minutes)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        self.record = Record([*self.distiller.term_names], check_gradients=not self.scaler.is_enabled())
        self.average = None
        if options.ema:
            self.average = MovingAverage(self.distiller.student, options.ema)

    @property
    def student(self):
        """The network to evaluate and to deploy: the moving average where there is one."""
        return self.average.module if self.average else self.distiller.student

    @property
    def progress(self) -> float:
        """From 0 to 1; rank 0's clock decides when the budget is in minutes."""
        return self.budget.progress(self.step, distributed.from_main)

    def due(self, progress: float) -> bool:
        """Whether to validate at this step: every --val-interval steps, or as a tenth of a budget of minutes is spent."""
        interval = self.options.val_interval
        return self.step % interval == 0 if interval else int(10 * progress) > self.tenth

    def pause(self) -> None:
        """Stop the clock, and look how much memory was needed before anything but training needs some."""
        self.budget.pause()
        if not (self.device.type == "cpu" and self.scores):  # the peak of a process cannot be reset: it may now be that of whole pictures
            self.peak_memory = max(self.peak_memory, peak_memory(self.device))

    def snapshot(self) -> dict:
        """The content of a checkpoint: tensors and plain values. Random numbers and the data position are functions of the seed
        and the step, so the step is all that has to be kept of them. Called on every rank.

        Raises:
            NonFiniteError: a finite gradient times a huge learning rate has made a weight infinite.
        """
        state = {
            "step": self.step, "validated": self.validated, "best": self.best, "metrics": self.metrics,
            "scaler": self.scaler.state_dict(),
            "spent": {"seconds": self.budget.elapsed(), "steps": self.budget.steps, "logged": list(self.budget.logged),
                      "peak_memory": self.peak_memory},
            "student": self.distiller.student.state_dict(), "methods": self.distiller.methods.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "rows": self.record.all_rows(), "tenth": self.tenth,
        }  # fmt: skip
        bad = [path for key in ("student", "methods", "average", "optimizers") for path in not_finite(state[key], key)]
        if distributed.any_rank(bool(bad)):
            told = ", ".join(bad[:3]) + f" and {len(bad) - 3} more" * (len(bad) > 3) or "weights of another rank"
            raise NonFiniteError(f"step {self.step}: not finite: {told}; last.pth holds earlier, finite weights; lower --lr")
        return state

    def restore(self, state: dict) -> None:
        self.step, self.validated, self.best, self.metrics = (state[key] for key in ("step", "validated", "best", "metrics"))
        spent, self.tenth = state["spent"], state["tenth"]
        self.budget.seconds, self.budget.steps, self.budget.logged = spent["seconds"], spent["steps"], tuple(spent["logged"])
        self.peak_memory = spent["peak_memory"]
        self.record.restore(state.get("rows"), self.device)
        self.scaler.load_state_dict(state["scaler"])
        self.distiller.student.load_state_dict(state["student"])
        self.distiller.methods.load_state_dict(state["methods"])
        if self.average:
            self.average.load_state_dict(state["average"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])


class MovingAverage(AveragedModel):
    """torch's average of weights and buffers with a decay, from the first step's on.

    Its own update (2.14) sends its count of steps to the GPU in every step, for which the host waits; this one does not.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: torch.nn.Module) -> None:
        ours, new = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        weight = 1 - self.decay if self.n_averaged else 1.0
        for dtype in {x.dtype for x in ours}:
            pairs = [pair for pair in zip(ours, new, strict=True) if pair[0].dtype == dtype]
            if dtype.is_floating_point:
                torch._foreach_lerp_(*map(list, zip(*pairs, strict=True)), weight)
            else:
                torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))  # counts
        self.n_averaged += 1


def not_finite(state, path: str) -> list[str]:
    """The paths of the tensors in a nested state that hold an infinite or NaN value."""
    if isinstance(state, Tensor):
        return [] if not state.is_floating_point() or state.isfinite().all() else [path]
    if isinstance(state, dict):
        return [bad for key, value in state.items() for bad in not_finite(value, f"{path}.{key}")]
    return []


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on the GPU since the last validation; on a CPU the most that the process ever had resident, asked
    before its first validation."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fit(training: Training, teacher: Teacher | None, loader, run: Run, validate, stop: StopSignal) -> bool:
    """Train until the budget is spent: True, or until a signal asks to stop: False, with everything saved.

    Args:
        loader: endless micro-batches of this rank, from `training.step` on.
        stop: what the signals set.
        validate: (student, stop) -> Scores on the selection split; raises `Stopped` when `stop()` says so.

    Raises:
        NonFiniteError: naming step, ranks, terms and files; last.pth holds the last checked, finite weights.
    """
    options, device, distiller = training.options, training.device, training.distiller
    model = distributed.wrap(distiller, device)
    record = training.record
    batches = iter(loader)
    complete = False
    with progress_bar(options.max_iterations, training.step) as bar:
        while not distributed.any_rank(stop.received):
            progress = training.progress
            complete = progress >= 1
            due = (complete or training.due(progress)) and training.validated != training.step
            if due:
                training.pause()
                record.check()
                try:
                    finish_validation(training, run, validate(training.student, lambda: stop.received))
                except Stopped:
                    complete = False
                    break
            if complete:
                break
            if due or training.step % options.save_interval == 0:  # a validation is not made twice, and best.pth is never newer
                training.pause()
                record.check()
                run.save_last(training.snapshot())
            training.budget.start()
            micro = [next(batches).to(device, non_blocking=True) for _ in range(options.accumulate)]
            train_step(training, model, teacher, micro, record)
            bar.update()
            if training.step % options.log_interval == 0:
                log_step(training, run, record)
            elif device.type == "cpu":
                record.check()  # nothing to wait for: the values are there
        training.pause()
        record.check()
        run.save_last(training.snapshot())
    if not complete:
        run.interrupted(training.step)
    return complete


def train_step(training: Training, model, teacher: Teacher | None, micro: list, record: "Record") -> None:
    """One optimizer step on this rank's micro-batches; `model` is the Distiller, under DDP when there are several ranks."""
    options, step, progress = training.options, training.step, training.progress
    # dropout and drop-path become a function of seed, step and rank: a resume needs no generator states
    torch.manual_seed(crc32(f"{options.seed}/{step}/{distributed.rank()}".encode()))
    prepare(micro, step, progress, options)
    rows = []
    for number, batch in enumerate(micro, 1):
        if options.compile != "off":
            torch.compiler.cudagraph_mark_step_begin()  # outputs of a recorded graph may be overwritten from here on
        with distributed.accumulating(model, more=number < len(micro)):
            with torch.autocast(training.device.type, dtype=AMP[options.amp], enabled=options.amp != "off"):
                total, terms = model(batch, teacher(batch) if teacher else None)
            training.scaler.scale(total / len(micro)).backward()
        rows.append(torch.stack([total.detach().float(), *(terms[name].float() for name in record.terms)]))
    for optimizer in training.optimizers.values():
        training.scaler.unscale_(optimizer)
    for method in training.distiller.methods.values():
        if method.grad_clip:
            torch.nn.utils.clip_grad_norm_(method.parameters(), method.grad_clip)
    gradients = [p.grad for p in training.distiller.parameters() if p.grad is not None]
    record.add(step, torch.stack(rows).mean(0), torch.nn.utils.get_total_norm(gradients), [name for batch in micro for name in batch.names])
    for group in training.optimizers["student"].param_groups:
        group["lr"] = group.get("factor", 1.0) * learning_rate(options, step, progress)
    for optimizer in training.optimizers.values():
        training.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    training.scaler.update()
    distributed.average_buffers(training.distiller)
    if training.average:
        training.average.update_parameters(training.distiller.student)
    training.step += 1


def prepare(micro: list, step: int, progress: float, options) -> None:
    """Tell every micro-batch where in the training and in the global batch it stands, and what its cross-entropy is divided by.

    With `--loss-norm global`, `valid` is the number of labelled pixels of the whole step divided by the number of micro-batches
    of all ranks: what DDP and accumulation average is then the mean over all labelled pixels.
    """
    counts = [(batch.target != IGNORE).sum().double() for batch in micro]
    if options.loss_norm == "global":
        mean = distributed.total(sum(counts)) / (distributed.world() * len(micro))
        counts = [mean] * len(micro)
    offset = distributed.rank() * sum(map(len, micro))
    for batch, count in zip(micro, counts, strict=True):
        batch.step, batch.progress, batch.offset, batch.global_size = step, progress, offset, options.batch_size
        batch.valid = count.clamp(min=1)
        offset += len(batch)


class Record:
    """The terms of the steps since the last log line, on the device; reads them only when asked, with one transfer.

    `terms`: names of the columns. `check_gradients` False lets gradients overflow (float16's scaler skips such steps).
    """

    def __init__(self, terms: list[str], check_gradients: bool):
        self.terms = terms
        self.check_gradients = check_gradients
        self.rows: list[Tensor] = []
        self.unchecked: list[tuple[int, list[str]]] = []  # step and files of the rows that `check` has not seen

    def add(self, step: int, terms: Tensor, gradient_norm: Tensor, files: list[str]) -> None:
        """`terms`: (1 + number of terms,), the total first."""
        self.rows.append(torch.cat([terms, gradient_norm.float().view(1)]))
        self.unchecked.append((step, files))

    def check(self) -> None:
        """Raise on every rank when a value since the last check is not finite on any."""
        if not self.unchecked:
            return
        names = ["total", *self.terms, "gradient norm"]
        rows = torch.stack(self.rows[-len(self.unchecked) :]).cpu()
        bad = ~rows.isfinite()
        bad[:, -1] &= self.check_gradients
        steps = torch.tensor([step for step, _ in self.unchecked])
        never = 1 << 62
        first = int(distributed.minimum(torch.where(bad.any(1), steps, never).min()))
        if first != never:
            row = next((i for i, (step, _) in enumerate(self.unchecked) if step == first), None)
            text = ""
            if row is not None and bad[row, :-1].any():
                terms = ", ".join(name for name, wrong in zip(names, bad[row], strict=True) if wrong)
                text = f"rank {distributed.rank()}: {terms} on {', '.join(self.unchecked[row][1])}"
            told = [line for line in distributed.gather_text(text) if line] or ["the gradients, with every term finite"]
            raise NonFiniteError(
                f"step {first + 1}: not finite: {'; '.join(told)}; last.pth holds earlier, finite weights; lower --lr, or look at these files"
            )
        self.unchecked = []

    def all_rows(self) -> Tensor:
        """What is not logged yet, of every rank: (ranks, steps, 2 + number of terms), for a checkpoint."""
        rows = torch.stack(self.rows).cpu() if self.rows else torch.zeros(0, 2 + len(self.terms))
        return distributed.gather(rows[None])

    def restore(self, rows: Tensor | None, device: torch.device) -> None:
        """Go on from `all_rows` of a checkpoint; on another number of ranks with their mean."""
        if rows is not None:
            mine = rows[distributed.rank()] if len(rows) == distributed.world() else rows.mean(0)
            self.rows = [*mine.to(device)]

    def means(self) -> dict[str, float]:
        """The means since the last call over steps and ranks: {"loss": total, term: ..., "gradient_norm": ...}."""
        mean = torch.stack(self.rows).mean(0)
        self.rows = []
        values = (distributed.total(mean) / distributed.world()).tolist()
        return dict(zip(["loss", *self.terms, "gradient_norm"], values, strict=True))


def log_step(training: Training, run: Run, record: Record) -> None:
    """One line on the console and one row in the metrics: means since the last one."""
    record.check()
    values, budget = record.means(), training.budget
    seconds, steps = budget.elapsed(), budget.steps
    before, timed_before = budget.logged
    speed = training.options.batch_size * (steps - timed_before) / max(1e-9, seconds - before) if steps > timed_before else None
    budget.logged = (seconds, steps)
    lr = training.optimizers["student"].param_groups[0]["lr"]
    extra = {"memory_mib": torch.cuda.max_memory_allocated() >> 20} if training.device.type == "cuda" else {}
    run.record(training.step, {**values, "lr": lr, "seconds": seconds, "images_per_second": speed, **extra})
    terms = "  ".join(f"{name} {values[name]:.4g}" for name in ["loss", *record.terms])
    left = budget.left(training.step)
    pace = f"{speed:.1f} images/s  left {duration(left)}" if speed is not None and left is not None else "warming up"
    of = f"/{budget.iterations}" if budget.iterations else ""
    logger.info("step %d%s  %s  lr %.3g  %s", training.step, of, terms, lr, pace)


def finish_validation(training: Training, run: Run, scores: Scores) -> None:
    """Record a validation, keep the best."""
    training.validated, training.metrics, training.tenth = training.step, scores.summary(), int(10 * training.progress)
    training.scores = scores
    if training.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(training.device)
    classes = dict(zip(training.options.spec.classes, scores.plain()["iou"], strict=True))
    run.record(training.step, {f"val/{name}": value for name, value in training.metrics.items()}
               | {f"val_iou/{name}": value for name, value in classes.items()})  # fmt: skip
    better = scores.miou > training.best
    logger.info("step %d  validation on %s: %s%s", training.step, training.options.spec.select_split,
                "  ".join(f"{name} {value:.2f}" for name, value in training.metrics.items()), "  (best so far)" if better else "")  # fmt: skip
    if better:
        training.best = scores.miou
        run.save_best(training.snapshot(), training.student.state_dict())
