"""Optimizer, learning rate schedule and training budget."""

import time
from dataclasses import dataclass

import torch
from torch import nn


def build_optimizers(distiller: nn.Module, options) -> dict[str, torch.optim.Optimizer]:
    """{"student": one optimizer, one group, for the student and the methods' own parameters} and, under the method's name, the
    optimizer a method builds itself; its parameters are then not in the first."""
    own = {name: optimizer for name, method in distiller.methods.items() if (optimizer := method.own_optimizer()) is not None}
    taken = {id(p) for optimizer in own.values() for group in optimizer.param_groups for p in group["params"]}
    parameters = [p for p in distiller.parameters() if p.requires_grad and id(p) not in taken]
    fused = all(p.is_cuda for p in parameters)
    if options.optimizer == "adamw":
        main = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay, fused=fused)
    else:
        main = torch.optim.SGD(
            parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay, fused=fused
        )
    return {"student": main, **own}


def poly_lr(base: float, progress: float, power: float = 0.9, floor: float = 0.0) -> float:
    """base * (1 - progress)^power, at least `floor`; progress in [0, 1]."""
    return max(floor, base * (1 - min(progress, 1.0)) ** power)


@dataclass
class Budget:
    """How long to train: `iterations` steps, or `minutes` of training time, without validation and checkpoints.

    `progress(step)` runs from 0 to 1 and drives the schedule, so that a slow method under a budget of minutes anneals to zero too.
    The seconds spent are part of the checkpoint. With minutes, ranks must agree: pass `agree` (rank 0's clock decides).
    """

    iterations: int | None = None
    minutes: float | None = None
    seconds: float = 0.0
    started: float | None = None
    logged: float = 0.0  # elapsed seconds at the last log line

    def start(self) -> None:
        """Let the clock run, if it does not; `pause` stops it."""
        if self.started is None:
            self.started = time.monotonic()

    def pause(self) -> None:
        if self.started is not None:
            self.seconds += time.monotonic() - self.started
            self.started = None

    def elapsed(self) -> float:
        """Seconds of training so far."""
        return self.seconds + (time.monotonic() - self.started if self.started is not None else 0.0)

    def progress(self, step: int, agree=lambda value: value) -> float:
        return step / self.iterations if self.minutes is None else min(1.0, agree(self.elapsed()) / (60 * self.minutes))
