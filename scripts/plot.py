"""Curves of trainings, finished or not, in one page: validation mIoU, losses, learning rate.

    python -m scripts.plot runs/student runs/kd runs/afdcd --output curves.html
    python -m scripts.plot "plain=runs/student" runs/kd/seed0 runs/kd/seed1 runs/kd/seed2 --output curves.html

Reads metrics.jsonl and args.json of every run folder. Runs that differ by their seed alone are one line, the mean over the seeds, in a
band from the lowest to the highest.
"""

import argparse
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scripts.charts import COLOURS, Axes, document, figure, html_table, legend
from utils.files import read_json
from utils.log import harmless
from utils.options import COSMETIC
from utils.run import flatten, write_text

POINTS = 500  # of a line; more rows are averaged, or a page of long trainings would have megabytes
OTHERS = {"step", "gradient_norm", "lr", "seconds", "images_per_second", "memory_mib"}  # columns of the log that are no losses


@dataclass
class Curves:
    """A run as it is drawn: `lines` {column: [(step, value), ...]}; `setting` is all of its settings but the seed, as text."""

    title: str
    setting: str
    seed: int
    lines: dict[str, list[tuple[float, float]]]


@dataclass
class Group:
    """Runs that differ by their seed alone."""

    title: str
    runs: list[Curves]

    @property
    def end(self) -> float:
        """The last step of any of the runs."""
        return max(line[-1][0] for run in self.runs for line in run.lines.values())

    def line(self, column: str) -> tuple[list, list, list]:
        """(mean, lowest, highest) over the runs, at the steps that all of them have."""
        values = [dict(run.lines.get(column, ())) for run in self.runs]
        steps = sorted(set.intersection(*map(set, values)))
        table = [[run[step] for run in values] for step in steps]
        return tuple([(step, function(row)) for step, row in zip(steps, table, strict=True)] for function in (lambda r: sum(r) / len(r), min, max))


def read_run(title: str, folder: Path) -> Curves:
    """The rows of a run.

    Raises:
        ValueError: no run folder, or no rows yet.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'is a file' if folder.exists() else 'no such folder'}; give the folder of a run, its --save-dir")
    lines: dict[str, list[tuple[float, float]]] = {}
    try:
        arguments = read_json(folder / "args.json")
        texts = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
        options = flatten(arguments["options"])
        setting = {key: value for key, value in options.items() if key not in COSMETIC | {"seed"}}
        teacher = (arguments["teacher"] or {}).get("sha256")
        seed, same = options["seed"], json.dumps([setting, arguments["model"], teacher], sort_keys=True)
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}; give the folder of a run, its --save-dir") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: its args.json is of no training ({error}); give another run") from error
    for number, text in enumerate(texts, 1):
        try:
            row = json.loads(text)
            values = [(column, row["step"], value) for column, value in row.items() if value is not None and np.isfinite(value + row["step"])]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if number == len(texts):
                continue  # a training that goes on is writing it
            raise ValueError(f"{folder / 'metrics.jsonl'}, line {number}: no row of a table ({error}); give another run") from error
        for column, step, value in values:
            lines.setdefault(column, []).append((step, value))
    if not lines:
        raise ValueError(f"{folder}: has no rows yet; wait for the first log line")
    return Curves(title, same, seed, lines)


def grouped(runs: list[Curves]) -> list[Group]:
    """Runs of one setting together, in the order given; runs that repeat a seed are left apart."""
    settings: dict[str, list[Curves]] = {}
    for run in runs:
        settings.setdefault(run.setting, []).append(run)
    groups = []
    for same in settings.values():
        if len({run.seed for run in same}) < len(same):
            groups += [Group(run.title, [run]) for run in same]
        elif len(same) == 1:
            groups.append(Group(same[0].title, same))
        else:
            common = re.sub(r"[\W_]*(seed)?[\W_]*$", "", os.path.commonprefix([run.title for run in same]))
            groups.append(Group(f"{common or ', '.join(run.title for run in same)} ({len(same)} seeds)", same))
    return groups


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS + 1 points: means of neighbours, and the last one as it is."""
    every = -(-len(points) // POINTS)
    if every <= 1:
        return points
    return [tuple(np.mean(points[start : start + every], axis=0).tolist()) for start in range(0, len(points) - 1, every)] + points[-1:]


def chart(groups: list[Group], column: str, name: str, colours: dict[str, str]) -> str:
    """A line per group that has the column, a band around the mean of several runs."""
    found = [(group, *map(thinned, group.line(column))) for group in groups]
    found = [(group, mean, low, high) for group, mean, low, high in found if mean]
    heights = [y for _, _, low, high in found for _, y in (*low, *high)]
    axes, marks = Axes([0.0, max(group.end for group in groups)], heights, "steps", name), []
    for group, mean, low, high in found:
        if len(group.runs) > 1:
            marks.append(axes.band(low, high, colours[group.title]))
        marks.append(axes.line(mean, colours[group.title], group.title, dots=len(mean) <= 40))
    return axes.svg(marks)


def page(runs: list[Curves]) -> str:
    """All charts of the runs as one html file."""
    groups = grouped(runs)
    titles = [group.title for group in groups]
    if len(set(titles)) < len(titles):
        twice = next(title for title in titles if titles.count(title) > 1)
        raise ValueError(f"two runs are called {twice!r}; give TITLE=FOLDER to tell them apart")
    colours = {group.title: COLOURS[place % len(COLOURS)] for place, group in enumerate(groups)}
    columns = dict.fromkeys(column for run in runs for column in run.lines if column not in OTHERS and not column.startswith("val"))
    charts = [("val/mIoU", "mIoU", "mIoU of the validations"), ("loss", "loss", "loss, all terms with their weights"),
              *((column, column, f"{column}, without its weight") for column in columns if column != "loss"),
              ("lr", "lr", "learning rate")]  # fmt: skip
    shown = [figure(chart(groups, column, name, colours), caption) for column, name, caption in charts
             if any(group.line(column)[0] for group in groups)]  # fmt: skip
    several = any(len(group.runs) > 1 for group in groups)
    note = "<p>Of several seeds: the mean, in a band from the lowest to the highest, at the steps that all of them have.</p>" if several else ""
    return document("Curves", ["<h1>Curves</h1>", legend(colours), note, f'<div class="charts">{"".join(shown)}</div>',
                               html_table(*table(groups), sort=True)])  # fmt: skip


def table(groups: list[Group]) -> tuple[list[str], list[list[str]]]:
    """Where every line ends."""
    rows = []
    for group in groups:
        miou, loss = group.line("val/mIoU")[0], group.line("loss")[0]
        best = max(miou, key=lambda point: point[1], default=None)
        rows.append([
            group.title, str(group.end),
            *([f"{miou[-1][1]:.2f}", f"{best[1]:.2f}", str(best[0])] if miou else ["-"] * 3), f"{loss[-1][1]:.4g}" if loss else "-",
        ])  # fmt: skip
    return ["run", "steps", "last mIoU", "best mIoU", "at step", "last loss"], rows


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run; TITLE=FOLDER says what to call it")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the page, FILE.html")
    options = parser.parse_args(argv)
    try:
        if options.output.suffix != ".html" or options.output.is_dir():
            raise ValueError(f"--output {options.output}: is a page; give a file that ends in .html")
        runs, folders = [], set()
        for text in options.runs:
            title, equals, folder = ("", "", text) if Path(text).exists() or "=" not in text else text.partition("=")
            if Path(folder).resolve() in folders:
                raise ValueError(f"{folder}: is given twice; drop one")
            folders.add(Path(folder).resolve())
            runs.append(read_run(title or folder.rstrip("/"), Path(folder)))
        write_text(options.output, page(runs))
    except ValueError as error:
        parser.exit(2, harmless(f"{parser.prog}: error: {error}\n"))
    print(f"{len(runs)} runs: {options.output}")


if __name__ == "__main__":
    main()
