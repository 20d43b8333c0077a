"""The parity table: what the tests that compare with recorded values of the published code found, written by `pytest --parity FILE`."""

import os
from pathlib import Path

import torch
import torchvision

COLUMNS = {
    "losses": ("entry", "term", "reference", "ours", "relative error", "worst relative error of a gradient's norm", "test"),
    "models": ("checkpoint", "output", "reference mean", "ours", "relative error", "worst relative error of a recorded value", "test"),
}
ROWS: dict[str, list[tuple]] = {table: [] for table in COLUMNS}


def record(table: str, entry: str, what: str, reference: float, ours: float, worst: float | None) -> None:
    """One row; `worst`: the largest relative error of what was compared besides the value itself."""
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0].removeprefix("tests/")
    ROWS[table].append((entry, what, f"{reference:.7g}", f"{ours:.7g}", _error(abs(ours - reference) / abs(reference)), _error(worst), test))


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def write(path: Path) -> None:
    lines = [
        "# Parity with the published code",
        "",
        "Written by `python -m pytest tests --parity results/parity.md`: the reference values are what the authors' published code gives on "
        "the CPU in float32 (tests/golden/README.md), ours are what this code gives on the same inputs. Entries `a/` and `b/` are two sets of "
        "shapes. Values are compared with rtol 2e-4, gradients with 1e-3, outputs of models with 1e-4. Methods without a recorded value are "
        "compared with independent loops in float64 in their tests. "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, one thread.",
    ]
    for table, columns in COLUMNS.items():
        lines += ["", f"## {table.capitalize()}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in sorted(set(ROWS[table]))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
