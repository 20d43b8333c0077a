"""The contract of a distillation method.

One file in `losses/` is one method: a class that derives from `Method`, with a nested `Options` dataclass, `needs` and a
`forward` that returns named, unweighted terms. The file's name is the method's name. From that follow, with no other edit:
`--method NAME`, one flag per option (`--NAME-temperature`) and per term weight (`--NAME-logits-weight`), help and documentation
with live defaults, log columns `NAME/term`, optimizer membership, DDP, checkpoints and exact resume, and the contract tests.

Shape letters used in every file: B images on this process, K classes, C channels, H W input size, h w feature size, N = h*w.
"""

import dataclasses
import math
import operator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar
from zlib import crc32

import torch
from torch import Tensor, nn

IGNORE = 255  # label value of pixels that count nowhere


BOUNDS = {  # keyword of `option` -> what an error says, and the test
    "minimum": ("at least", operator.ge), "above": ("above", operator.gt), "maximum": ("at most", operator.le), "below": ("below", operator.lt),
}  # fmt: skip


def option(default, help, *, choices=None, minimum=None, above=None, maximum=None, below=None, when=None, terms=(), only=None, **per_dataset):
    """One setting of a method, and its command line flag.

    Args:
        default: value on data sets that are not named in `per_dataset`; its type is the flag's type (a tuple: several values).
        help: one line for `--help` and the generated documentation.
        choices: allowed values.
        minimum, maximum: smallest and largest number allowed.
        above, below: bounds that are not themselves allowed. Numbers are finite, whatever the bounds.
        when: `(other_option, value, {"default": ..., dataset: ...})`: other defaults when another option of the method has
            that value.
        terms: the terms that read it, those that a derived method adds among them; all unless given. With none of them active the
            flag would do nothing, and is refused.
        only: `(other_option, value, ...)`: it is read only when another option of the method has one of these values; otherwise the
            flag is refused.
        per_dataset: defaults per data set, by its name in `dataset/specs.py`.
    """
    given = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    bounds = {name: number for name, number in given.items() if number is not None}
    return field(default=default, metadata={
        "help": help, "choices": choices, "bounds": bounds, "when": when, "terms": terms, "only": only, "per_dataset": per_dataset,
    })  # fmt: skip


def term_weight(default, help="", *, when=None, **per_dataset):
    """The weight of one term of the loss, which names the term: field `logits_weight` weighs `terms["logits"]`; a field that is
    called `weight` weighs the term that is called like the method. A weight of 0 switches the term off: it is not computed, and
    what it alone needs should not be built (`self.active(term)`)."""
    return option(float(default), help, minimum=0, when=when, **{name: float(value) for name, value in per_dataset.items()})


@dataclass(frozen=True)
class Setup:
    """What a method may know when it is built.

    `student` and `teacher` map the names of `SegOutput`'s fields to channel counts, `crop` is (H, W) in pixels, `global_batch`
    counts the images of one micro-batch on all ranks together, `seed` is the run's. `teacher_norms` has weight and bias of the
    teacher's last BatchNorm in front of p1..p4, by those names; {} where there is none.
    """

    student: dict[str, int]
    teacher: dict[str, int]
    num_classes: int
    crop: tuple[int, int]
    global_batch: int
    dataset: str = "shapes"
    seed: int = 0
    teacher_norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Method(nn.Module):
    """A distillation loss: `forward(student, teacher, batch) -> {term: scalar}`, unweighted, around pure functions.

    Class attributes:
        title, paper, url: for the documentation.
        needs: the fields of `SegOutput` that `forward` reads of student and teacher. A method whose needs depend on its options
            sets `self.needs` in `__init__`.
        grad_clip: largest L2 norm of the gradient of this method's own parameters, None for no clipping.
        min_batch: fewest images, of all ranks together, among which the method has something to compare; fewer are refused.
        over_batch: the terms that are no mean over images (pairs of images, correlations, counts of labelled pixels), each with whose
            images one value is computed from: "rank", a micro-batch on one rank, or "ranks", the same on all ranks. With another
            number of ranks or micro-batches such a term is another loss. A method in which it depends on the options sets
            `self.over_batch` in `__init__`.

    `forward` gets the student's and the teacher's `SegOutput` (the teacher's tensors carry no gradient) and the `Batch` (target
    (B, H, W) uint8 with 255 = ignore, progress of the training in [0, 1]). It returns every active term, each a finite scalar
    in float32, also under autocast (decorate the maths with `losses.functional.full_precision`), whose gradient reaches the student.
    A term whose weight is 0 is not returned (`self.active(term)`), and nothing is built for it.
    """

    name: ClassVar[str]  # the file's name, set by losses/__init__.py
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    url: ClassVar[str] = ""
    needs: tuple[str, ...] = ("logits",)
    grad_clip: float | None = None
    min_batch: int = 1
    over_batch: dict[str, str] = MappingProxyType({})

    @dataclass(frozen=True)
    class Options:
        pass

    def __init__(self, options, setup: Setup):
        super().__init__()
        self.options = options
        self.setup = setup
        self.weights = {term: value for term in self.terms() if (value := getattr(options, self.weight_field(term))) != 0}
        self.left_out: dict[str, str] = {}
        if not self.weights:
            raise ValueError(f"every weight of {self.name} is 0; drop it from --method or give one of {', '.join(self.terms())} a weight")
        if setup.global_batch < self.min_batch:
            raise ValueError(f"{self.name} compares images: --batch-size {setup.global_batch} is too small, it needs at least {self.min_batch}")

    @classmethod
    def terms(cls) -> tuple[str, ...]:
        """The names of all terms, in the order of their weights in `Options`."""
        names = [f.name for f in dataclasses.fields(cls.Options)]
        return tuple(cls.name if n == "weight" else n.removesuffix("_weight") for n in names if n == "weight" or n.endswith("_weight"))

    @classmethod
    def weight_field(cls, term: str) -> str:
        """The name of the term's weight in `Options`."""
        return "weight" if term == cls.name else f"{term}_weight"

    @classmethod
    def flag(cls, field: str) -> str:
        """The command line flag of a field of `Options`."""
        return f"--{cls.name}-{field}".replace("_", "-")

    def active(self, term: str) -> bool:
        """Whether the term has a weight other than 0."""
        return term in self.weights

    def divided(self, ranks: int, micro_batches: int) -> list[str]:
        """The active terms that are another loss than with a whole step's images on one rank, see `over_batch`."""
        parts = {"rank": ranks * micro_batches, "ranks": micro_batches}
        return [term for term, images in self.over_batch.items() if self.active(term) and parts[images] > 1]

    def leave_out(self, term: str, why: str) -> None:
        """Leave out a term that these networks cannot have, whatever its weight; the log says so.

        Raises:
            ValueError: no term is left.
        """
        del self.weights[term]
        self.left_out[term] = why
        if not self.weights:
            other = next(name for name in self.terms() if name != term)
            raise ValueError(f"{self.name}: {why}, so no term is left; give {self.flag(self.weight_field(other))} a value other than 0")

    def factors(self, progress: float) -> dict[str, float]:
        """Factors on the weights that change during training; `progress` runs from 0 to 1. The key "task" scales the task loss."""
        return {}

    def own_optimizer(self) -> torch.optim.Optimizer | None:
        """An optimizer for parameters of this method that must not be trained by the student's (an adversarial critic's Adam).
        Fused: what is not reads its count of steps back."""
        return None

    def uniform(self, batch, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1) of shape (B, *shape), see `random_rows`; two calls in one step begin with the same numbers."""
        return random_rows(torch.rand, self.name, self.setup.seed, batch, *shape)


def random_rows(draw, name: str, seed: int, batch, *shape: int) -> Tensor:
    """Random numbers (B, *shape) from `draw` (torch.rand or torch.randn) that depend on the name, the run's seed, the step and the
    image's place in the global batch alone: equal for any number of ranks, after a resume, and whatever else draws numbers."""
    device = batch.image.device
    generator = torch.Generator(device)
    generator.manual_seed(crc32(f"{name}/{seed}/{batch.step}".encode()))
    rows = draw(batch.global_size, *shape, generator=generator, device=device)
    return rows[batch.offset : batch.offset + len(batch)]


def resolve(method: type[Method], dataset: str, given: dict) -> tuple[object, dict[str, str]]:
    """The method's options for a data set: (Options, source of each value). `given` are the values of the command line.

    Precedence: command line, then the data set's value, then the default; `when` chooses the table they are taken from.

    Raises:
        ValueError: a value is out of its option's bounds, or given and not read.
    """
    values, sources = {}, {}
    fields = {f.name: f for f in dataclasses.fields(method.Options)}
    # an option that others depend on must be known before them
    for name in sorted(fields, key=lambda n: fields[n].metadata["when"] is not None):
        meta = fields[name].metadata
        table = {"default": fields[name].default, **meta["per_dataset"]}
        if meta["when"] and values[meta["when"][0]] == meta["when"][1]:
            table = meta["when"][2]
        if name in given:
            values[name], sources[name] = given[name], "command line"
        elif dataset in table:
            values[name], sources[name] = table[dataset], f"data set {dataset}"
        else:
            values[name], sources[name] = table["default"], "default"
        check_bounds(method.flag(name), values[name], meta["bounds"])
    for name in given:
        _check_read(method, name, values)
    return method.Options(**values), sources


def _check_read(method: type[Method], name: str, values: dict) -> None:
    """ValueError where an option was given that nothing reads, see `option`."""
    meta = next(f.metadata for f in dataclasses.fields(method.Options) if f.name == name)
    value, shown = values[name], method.flag(name)
    if isinstance(value, bool):
        shown = shown if value else shown.replace("--", "--no-")
    else:
        shown += f" {value:g}" if isinstance(value, float) else f" {value}"
    weights = [method.weight_field(term) for term in meta["terms"] if term in method.terms()]
    if weights and not any(values[weight] for weight in weights):
        off = " and ".join(f"{method.flag(weight)} 0" for weight in weights)
        raise ValueError(f"{shown}: nothing reads it with {off}; give {'that' if len(weights) == 1 else 'one'} another value, or drop the flag")
    other, *wanted = meta["only"] or (None,)
    if other and values[other] not in wanted:
        flag = method.flag(other)
        raise ValueError(f"{shown}: belongs to {flag} {' or '.join(wanted)}, {flag} is {values[other]}; add it, or drop the flag")


def check_bounds(flag: str, value, bounds: dict[str, float]) -> None:
    """ValueError where a number, or one of several, is not finite or out of `bounds`, named as in BOUNDS."""
    for number in value if isinstance(value, (list, tuple)) else [value]:
        finite = not isinstance(number, float) or math.isfinite(number)
        if not finite or not all(BOUNDS[name][1](number, bound) for name, bound in bounds.items()):
            wanted = [f"{BOUNDS[name][0]} {bound:g}" if isinstance(bound, float) else f"{BOUNDS[name][0]} {bound}" for name, bound in bounds.items()]
            wanted += ["finite"] * (not finite)
            raise ValueError(f"{flag} {number}: must be {' and '.join(wanted)}")
