"""Options of methods have bounds: every one, refused in one line on the command line and in code."""

import dataclasses

import pytest

from losses import METHODS, Method, option, resolve
from losses.base import BOUNDS
from tests.workers import script

INSIDE = {"minimum": 0, "above": 1, "maximum": 0, "below": -1}  # what to add to a bound to be just inside, for whole numbers
NUMBERS = [
    (name, field) for name, method in METHODS.items() for field in dataclasses.fields(method.Options)
    if isinstance(field.default, (int, float)) and not isinstance(field.default, bool)
]  # fmt: skip


def ids(value):
    return value if isinstance(value, str) else value.name


@pytest.mark.parametrize("name,field", NUMBERS, ids=ids)
def test_every_number_has_bounds_and_keeps_them(name, field):
    """The defaults of every data set are inside; beyond a bound, an exclusive bound itself, nan and infinity are refused with the flag."""
    bounds = field.metadata["bounds"]
    assert bounds, f"losses/{name}.py: {field.name} has no bounds; give option() a minimum, or above="
    for dataset in ("shapes", *field.metadata["per_dataset"]):
        resolve(METHODS[name], dataset, {})
    kind, flag = type(field.default), f"--{name}-{field.name}".replace("_", "-")
    for bound, number in bounds.items():
        outside = number + {"minimum": -1, "above": 0, "maximum": 1, "below": 0}[bound]
        with pytest.raises(ValueError, match=f"^{flag} {kind(outside)}: must be .*{BOUNDS[bound][0]} {number:g}") as error:
            resolve(METHODS[name], "shapes", {field.name: kind(outside)})
        assert "\n" not in str(error.value)
        if kind is int:
            options, _ = resolve(METHODS[name], "shapes", {field.name: number + INSIDE[bound]})
            assert getattr(options, field.name) == number + INSIDE[bound]
    if kind is float:
        for wrong in ("nan", "inf"):
            with pytest.raises(ValueError, match=f"^{flag} {wrong}: must be .*finite$"):
                resolve(METHODS[name], "shapes", {field.name: float(wrong)})


def test_bounds_of_every_kind():
    class Bounded(Method):
        name = "bounded"

        @dataclasses.dataclass(frozen=True)
        class Options:
            share: float = option(0.5, "", minimum=0, below=1)
            base: float = option(0.5, "", above=0, maximum=1)
            several: tuple = option((1, 2), "", minimum=1)

    for given in ({"share": 0.0}, {"share": 0.999}, {"base": 1.0}, {"base": 1e-9}, {"several": (1,)}):
        resolve(Bounded, "shapes", given)
    for given, told in (({"share": 1.0}, "--bounded-share 1.0: must be at least 0 and below 1"),
                        ({"base": 0.0}, "--bounded-base 0.0: must be above 0 and at most 1"),
                        ({"several": (3, 0)}, "--bounded-several 0: must be at least 1")):  # fmt: skip
        with pytest.raises(ValueError) as error:
            resolve(Bounded, "shapes", given)
        assert str(error.value) == told


def test_the_command_line_refuses_before_anything_is_read(tmp_path):
    started = script(tmp_path, "train_kd.py", "--method", "kd", "--kd-temperature", "0", "--teacher-checkpoint", "gone.pth", "--save-dir", "run")
    assert started.wait() == [2]
    assert started.text == "train_kd.py: error: --kd-temperature 0.0: must be above 0\n"
    assert not (tmp_path / "run").exists()
