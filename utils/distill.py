"""The teacher, and the one module that is trained: a student with its task loss and its distillation methods."""

import torch
from torch import Tensor, nn

from losses.lad import CONSISTENCY_WEIGHT, consistency, teaching_image, training_image


class Teacher:
    """A frozen model: evaluation mode, no gradients, and only the outputs in `needs` are computed.

    A label-assisted teacher (`losses/lad.py`) is fed the labels too. Not a child of the Distiller: a teacher has no place in DDP, in
    the optimizer or in checkpoints.
    """

    def __init__(self, model: nn.Module, needs, seed: int = 0):
        self.model = model.eval().requires_grad_(False)
        self.needs, self.seed = tuple(needs), seed

    @torch.no_grad()
    def __call__(self, batch):
        return self.model(model_input(self.model, batch, self.seed), self.needs)


def model_input(model: nn.Module, batch, seed: int = 0) -> Tensor:
    """What a network is fed when it teaches or is evaluated: the pictures, and the coded labels where it has an input for them."""
    return teaching_image(batch, model.num_classes, seed) if is_label_assisted(model) else batch.image


def is_label_assisted(model: nn.Module) -> bool:
    return model.config["in_channels"] == 4


class Distiller(nn.Module):
    """Student, task loss and methods: the one module under DDP. A baseline is a Distiller without methods.

    `forward(batch, teacher)` returns (total, terms): the scalar to differentiate, and every unweighted term, detached, under
    "task/..." and "METHOD/...".
    """

    def __init__(self, student: nn.Module, task: nn.Module, methods: dict[str, nn.Module]):
        super().__init__()
        self.student, self.task, self.methods = student, task, nn.ModuleDict(methods)
        self.teacher_needs = ordered(need for method in methods.values() for need in method.needs)
        self.needs = ordered([*task.needs, *self.teacher_needs])

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"task": self.task, **self.methods}

    @property
    def term_names(self) -> list[str]:
        return [f"{name}/{term}" for name, part in self.parts.items() for term in part.weights]

    def forward(self, batch, teacher=None) -> tuple[Tensor, dict[str, Tensor]]:
        student = self.student(batch.image, self.needs)
        values = {"task": self.task(student, batch)}
        for name, method in self.methods.items():
            values[name] = method(student, teacher, batch)
            if values[name].keys() != method.weights.keys():
                raise ValueError(
                    f"losses/{name}.py returned the terms {sorted(values[name])}, its active weights are {sorted(method.weights)}; "
                    f"every term needs a weight of its name, and a term of weight 0 must not be returned"
                )
        scale = self.term_factors(batch.progress)
        total = sum(scale[f"{name}/{term}"] * value for name, part in values.items() for term, value in part.items())
        return total, {f"{name}/{term}": value.detach() for name, part in values.items() for term, value in part.items()}

    def term_factors(self, progress: float) -> dict[str, float]:
        """What each term is multiplied by at this point of the training: its weight times the methods' factors."""
        factors = {name: method.factors(progress) for name, method in self.methods.items()}
        task = 1.0
        for method_factors in factors.values():
            task *= method_factors.get("task", 1.0)
        scale = {f"task/{term}": task * weight for term, weight in self.task.weights.items()}
        for name, method in self.methods.items():
            scale |= {f"{name}/{term}": factors[name].get(term, 1.0) * weight for term, weight in method.weights.items()}
        return scale


class LabelAssisted(Distiller):
    """Trains a label-assisted teacher: two passes with independent random codes of the labels, the task loss of both, and their
    consistency."""

    def __init__(self, student: nn.Module, task: nn.Module, seed: int):
        super().__init__(student, task, {})
        self.seed = seed

    @property
    def term_names(self) -> list[str]:
        return [*super().term_names, "lad/consistency"]

    def term_factors(self, progress: float) -> dict[str, float]:
        return {**super().term_factors(progress), "lad/consistency": CONSISTENCY_WEIGHT}

    def forward(self, batch, teacher=None) -> tuple[Tensor, dict[str, Tensor]]:
        images = [training_image(batch, self.student.num_classes, self.seed, path) for path in (1, 2)]
        outputs = [self.student(image, self.needs) for image in images]
        first, second = (self.task(output, batch) for output in outputs)
        terms = {f"task/{name}": first[name] + second[name] for name in first}
        terms["lad/consistency"] = consistency(outputs[0].logits, outputs[1].logits)
        scale = self.term_factors(batch.progress)
        return sum(scale[name] * value for name, value in terms.items()), {name: value.detach() for name, value in terms.items()}


def ordered(names) -> tuple[str, ...]:
    """The distinct names, sorted: a fixed order on every rank."""
    return tuple(sorted(set(names)))
