"""The teacher, and the one module that is trained: a student with its task loss and its distillation methods."""

import copy

import torch
from torch import Tensor, nn

from losses.lad import CONSISTENCY_WEIGHT, consistency, teaching_image, training_image
from utils.log import logger


class Teacher:
    """A frozen model: evaluation mode, no gradients, and only the outputs in `needs` are computed.

    A label-assisted teacher (`losses/lad.py`) is fed the labels too. Not a child of the Distiller: a teacher has no place in DDP, in
    the optimizer or in checkpoints.

    Args:
        model: changed in place: pass a copy where it is needed as it is.
        needs: names of SegOutput's fields.
        seed: of the noise on labels.
        dtype: of autocast, None for none. Weights of convolutions and linear layers are kept in it, which autocast would convert in
            every step; the first batch tells in the log how far the classes agree with float32.
        compile: see `compiled`.
    """

    def __init__(self, model: nn.Module, needs, seed: int = 0, dtype: torch.dtype | None = None, compile: str = "off"):
        self.model = model.eval().requires_grad_(False)
        self.needs, self.seed, self.dtype = tuple(needs), seed, dtype
        self.exact = copy.deepcopy(model) if dtype else None  # in float32, for the first batch
        if dtype:
            for module in model.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.to(dtype)
        self.run = compiled(model, compile)

    @torch.no_grad()
    def __call__(self, batch):
        image = model_input(self.model, batch, self.seed)
        if self.exact is not None:
            self.tell_agreement(image)
        return self.run(image, self.needs)

    def tell_agreement(self, image: Tensor) -> None:
        """Compare the classes with those of float32, once: that copy is then dropped."""
        classes = self.model(image, ("logits",)).logits.argmax(1)
        with torch.autocast(image.device.type, enabled=False):
            equal = classes == self.exact(image, ("logits",)).logits.argmax(1)
        self.exact = None
        name = str(self.dtype).removeprefix("torch.")
        logger.info("teacher in %s: %.2f %% of the positions of the first batch have the class of float32", name, 100 * equal.double().mean().item())


def compiled(model: nn.Module, mode: str):
    """The model's forward pass by torch.compile, for crops of one size; the model itself for mode "off".

    The module stays as it is: evaluation, on pictures of many sizes, runs it uncompiled, and its state has the same names. Its memory format is
    kept: left to itself, the compiler puts every convolution of a CPU into NHWC, which made a KD step 1.2 times as long where a student trains
    in NCHW.
    """
    if mode == "off":
        return model
    from torch._inductor import list_mode_options  # here: it takes two seconds that only --compile should cost

    return torch.compile(model.forward, options=list_mode_options(mode) | {"layout_optimization": False}, dynamic=False)


def check_compile(mode: str, device: torch.device, accumulate: int) -> None:
    """ValueError where `--compile` cannot do what it says on this machine."""
    if mode == "off":
        return
    graphs = mode in ("reduce-overhead", "max-autotune")
    if mode == "reduce-overhead" and device.type != "cuda":
        raise ValueError(f"--compile {mode}: records CUDA graphs, which {device.type} has not; pass --compile default")
    if graphs and accumulate > 1 and device.type == "cuda":
        raise ValueError(f"--compile {mode}: a CUDA graph's gradients do not outlive the next micro-batch; pass --compile default, "
                         f"or drop --accumulate {accumulate}")  # fmt: skip
    try:
        torch.compile(lambda x: (2 * x).sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # the compiler's own, of many kinds
        lines = [line for line in str(error).splitlines() if line.strip()]
        needed = "Triton" if device.type == "cuda" else "a C++ compiler (g++)"
        raise ValueError(f"--compile {mode}: torch.compile does not work here ({lines[0] if lines else type(error).__name__}); "
                         f"install {needed}, or pass --compile off") from None  # fmt: skip


def model_input(model: nn.Module, batch, seed: int = 0) -> Tensor:
    """What a network is fed when it teaches or is evaluated: the pictures, and the coded labels where it has an input for them."""
    return teaching_image(batch, model.num_classes, seed) if is_label_assisted(model) else batch.image


def is_label_assisted(model: nn.Module) -> bool:
    return model.config["in_channels"] == 4


class Distiller(nn.Module):
    """Student, task loss and methods: the one module under DDP. A baseline is a Distiller without methods.

    `forward(batch, teacher)` returns (total, terms): the scalar to differentiate, and every unweighted term, detached, under
    "task/..." and "METHOD/...". `compile`: see `compiled`.
    """

    def __init__(self, student: nn.Module, task: nn.Module, methods: dict[str, nn.Module], compile: str = "off"):
        super().__init__()
        self.student, self.task, self.methods = student, task, nn.ModuleDict(methods)
        self.teacher_needs = ordered(need for method in methods.values() for need in method.needs)
        self.needs = ordered([*task.needs, *self.teacher_needs])
        self.compiled = None if compile == "off" else compiled(student, compile)  # the module itself must not be registered twice

    def arrange(self, layout: torch.memory_format) -> None:
        """Put the weights into the memory format of a training: the student's into `layout`. Those of methods stay in NCHW: in NHWC Af-DCD's
        loss of one CamVid picture takes a tenth longer and 103 MiB more in float32, in bfloat16 the same time and 46 MiB more (one AMX core)."""
        self.student.to(memory_format=layout)

    def run_student(self, image: Tensor):
        """The student's SegOutput of what methods and task loss read."""
        return (self.compiled or self.student)(image, self.needs)

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"task": self.task, **self.methods}

    @property
    def term_names(self) -> list[str]:
        return [f"{name}/{term}" for name, part in self.parts.items() for term in part.weights]

    def forward(self, batch, teacher=None) -> tuple[Tensor, dict[str, Tensor]]:
        student = self.run_student(batch.image)
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

    def __init__(self, student: nn.Module, task: nn.Module, seed: int, compile: str = "off"):
        super().__init__(student, task, {}, compile)
        self.seed = seed

    @property
    def term_names(self) -> list[str]:
        return [*super().term_names, "lad/consistency"]

    def term_factors(self, progress: float) -> dict[str, float]:
        return {**super().term_factors(progress), "lad/consistency": CONSISTENCY_WEIGHT}

    def forward(self, batch, teacher=None) -> tuple[Tensor, dict[str, Tensor]]:
        images = [training_image(batch, self.student.num_classes, self.seed, path) for path in (1, 2)]
        outputs = [self.run_student(image) for image in images]
        first, second = (self.task(output, batch) for output in outputs)
        terms = {f"task/{name}": first[name] + second[name] for name in first}
        terms["lad/consistency"] = consistency(outputs[0].logits, outputs[1].logits)
        scale = self.term_factors(batch.progress)
        return sum(scale[name] * value for name, value in terms.items()), {name: value.detach() for name, value in terms.items()}


def ordered(names) -> tuple[str, ...]:
    """The distinct names, sorted: a fixed order on every rank."""
    return tuple(sorted(set(names)))
