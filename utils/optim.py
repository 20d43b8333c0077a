"""Optimizer, learning rate schedule and training budget."""

import time
from dataclasses import dataclass

import torch
from torch import nn


def build_optimizers(distiller: nn.Module, options) -> dict[str, torch.optim.Optimizer]:
    """{"student": one optimizer for the student and the methods' own parameters} and, under the method's name, the optimizer a method
    builds itself; its parameters are then not in the first. That has one group, or with `--head-lr-factor` a second one: all but the
    student's backbone. Each group's `factor` multiplies its learning rate.

    Fused: one pass over the weights, on a CPU too (ResNet-18, one core: SGD 5 ms instead of 11, AdamW 7 instead of 26), and Adam's count
    of steps is not read back.
    """
    own = {name: optimizer for name, method in distiller.methods.items() if (optimizer := method.own_optimizer()) is not None}
    taken = {id(p) for optimizer in own.values() for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: p for name, p in distiller.named_parameters() if p.requires_grad and id(p) not in taken}
    factor = options.head_lr_factor
    heads = {name for name in parameters if factor != 1 and not name.startswith("student.backbone.")}
    groups = [{"params": [p for name, p in parameters.items() if name not in heads], "factor": 1.0}]
    if heads:
        groups.append({"params": [parameters[name] for name in parameters if name in heads], "factor": factor, "lr": factor * options.lr})
    if options.optimizer == "adamw":
        main = torch.optim.AdamW(groups, lr=options.lr, weight_decay=options.weight_decay, fused=True)
    else:
        main = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay, fused=True)
    return {"student": main, **own}


def learning_rate(options, step: int, progress: float) -> float:
    """Of the finished steps `step` and the progress in [0, 1]: `poly_lr`, in the first `--warmup-iterations` N steps times (step + 1) / N."""
    rate = poly_lr(options.lr, progress, options.lr_power, options.lr_floor)
    return rate * min(1.0, (step + 1) / options.warmup_iterations) if options.warmup_iterations else rate


def poly_lr(base: float, progress: float, power: float = 0.9, floor: float = 0.0) -> float:
    """base * (1 - progress)^power, at least `floor`; progress in [0, 1]."""
    return max(floor, base * (1 - min(progress, 1.0)) ** power)


WARM_UP = 5  # steps of a process that its clock leaves out: kernels are chosen, graphs compiled and loaders started in them


@dataclass
class Budget:
    """How long to train: `iterations` steps, or `minutes` of training time, without validation, checkpoints and WARM_UP.

    `progress(step)` runs from 0 to 1 and drives the schedule, so that a slow method under a budget of minutes anneals to zero too.
    The seconds spent are part of the checkpoint. With minutes, ranks must agree: pass `agree` (rank 0's clock decides).
    """

    iterations: int | None = None
    minutes: float | None = None
    seconds: float = 0.0
    steps: int = 0  # that took these seconds
    started: float | None = None
    logged: tuple[float, int] = (0.0, 0)  # elapsed seconds and steps at the last log line
    begun: int = 0  # steps of this process

    def start(self) -> None:
        """Called before every step. Lets the clock run after WARM_UP steps, if it does not; `pause` stops it."""
        self.begun += 1
        if self.begun > WARM_UP:
            self.steps += 1
            if self.started is None:
                self.started = time.monotonic()

    def pause(self) -> None:
        if self.started is not None:
            self.seconds += time.monotonic() - self.started
            self.started = None

    def elapsed(self) -> float:
        """Seconds of training so far."""
        return self.seconds + (time.monotonic() - self.started if self.started is not None else 0.0)

    def left(self, step: int) -> float | None:
        """Seconds to go after this step; None as long as none was timed."""
        if self.minutes is not None:
            return max(0.0, 60 * self.minutes - self.elapsed())
        return self.elapsed() / self.steps * (self.iterations - step) if self.steps else None

    def progress(self, step: int, agree=lambda value: value) -> float:
        return step / self.iterations if self.minutes is None else min(1.0, agree(self.elapsed()) / (60 * self.minutes))
