"""Distillation losses. `METHODS` maps every method's name, which is its file's, to its class."""

import importlib
import pkgutil
from zlib import crc32

import torch

from losses.base import IGNORE, Method, Setup, option, resolve, term_weight

__all__ = ["IGNORE", "METHODS", "Method", "Setup", "build_methods", "option", "resolve", "term_weight"]


def _methods() -> dict[str, type[Method]]:
    """Every module of this package that defines a Method, by the module's name."""
    found = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda i: i.name):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{__name__}.{info.name}")
        classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Method) and c.__module__ == module.__name__]
        if len(classes) > 1:
            names = ", ".join(c.__name__ for c in classes)
            raise ImportError(f"losses/{info.name}.py defines {len(classes)} methods ({names}); one file is one method")
        for cls in classes:
            cls.name = info.name
            found[info.name] = cls
    return found


METHODS: dict[str, type[Method]] = {name: cls for name, cls in _methods().items() if name != "base"}


def build_methods(options: dict[str, object], setup: Setup) -> dict[str, Method]:
    """The selected methods: {name: Options} -> {name: Method}, with the term "kd" (plain pixel-wise KD) in one of them at most."""
    methods = {}
    for name, method_options in options.items():
        torch.manual_seed(crc32(f"{setup.seed}/{name}".encode()))  # a method's initial weights depend on no other method
        methods[name] = METHODS[name](method_options, setup)
    with_kd = [name for name, method in methods.items() if method.active("kd")]
    if len(with_kd) > 1:
        flags = " or ".join(f"{METHODS[name].flag(METHODS[name].weight_field('kd'))} 0" for name in with_kd)
        raise ValueError(f"{' and '.join(with_kd)} both contain plain KD, which would count twice; pass {flags}, or drop one from --method")
    return methods
