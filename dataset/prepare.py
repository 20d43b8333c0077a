"""Checks a data set on disk before a run depends on it: layout, every pair, every label value, sizes, pixels per class.

    python -m dataset.prepare camvid --data DIR        # 701 pictures: about 2 seconds on one core
    python -m dataset.prepare coco_stuff_10k --data DIR --convert
    python -m dataset.prepare voc --data DIR --convert --sbd SBD_DIR
    python -m dataset.prepare citys --data DIR --manifest citys.json        # and on another machine: --verify citys.json

Exit code 0 if training can start, 1 with one line per problem (file, reason, remedy). A check or conversion that was stopped goes on
when it is started again.
"""

import argparse
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dataset.convert import LabelFile
from dataset.layout import Item
from dataset.manifest import check_place, compare, read_manifest, write_manifest
from dataset.parallel import cores, in_processes
from dataset.reading import IGNORE, DataError
from dataset.specs import ALIASES, SPECS, Spec, get_spec
from dataset.verified import Verified
from utils.log import escape_names, harmless

FOLDER = ".segkd-prepare"  # in the data's folder


@dataclass
class SplitReport:
    """What a split holds: pictures that could be read, their sizes (width, height), pixels per train id (256,), problems.

    `known` of the pictures were verified by an earlier check and have not been read again.
    """

    split: str
    pictures: int = 0
    known: int = 0
    sizes: Counter = field(default_factory=Counter)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    problems: list[str] = field(default_factory=list)

    def shares(self, num_classes: int) -> np.ndarray:
        """Percent of the labelled pixels per class, (K,); nan where no pixel is labelled."""
        labelled = self.pixels[:num_classes]
        return 100 * labelled / labelled.sum() if labelled.any() else np.full(num_classes, np.nan)


def _check_item(item: Item) -> tuple[tuple[int, int], np.ndarray] | str:
    """((width, height), pixels per train id (256,)) of one picture, or its problem."""
    try:
        _, target = item.read()
    except DataError as error:
        return str(error)
    return target.shape[::-1], np.bincount(target.ravel(), minlength=256)


def check_split(spec: Spec, root: str | None, split: str, workers: int = 1, verified: Verified | None = None) -> SplitReport:
    """Read every picture and label of a split with `workers` processes, but for those that are `verified` already.

    DataError where `root` or the split does not exist.
    """
    verified = verified or Verified(None, None)
    items, problems = spec.find(root, split)
    report = SplitReport(split, problems=problems)
    keys = [verified.key(item) for item in items]
    found = {index: known for index, key in enumerate(keys) if (known := verified.find(key)) is not None}
    report.known = len(found)
    unknown = [index for index in range(len(items)) if index not in found]
    for index, result in zip(unknown, in_processes(_check_item, [items[index] for index in unknown], workers, split), strict=True):
        if isinstance(result, str):
            report.problems.append(result)
        else:
            verified.add(keys[index], *result)
            found[index] = result
    for size, pixels in found.values():
        report.pictures += 1
        report.sizes[size] += 1
        report.pixels += pixels
    return report


def _sizes(sizes: Counter) -> str:
    if len(sizes) <= 3:
        return ", ".join(f"{width}x{height}" for width, height in sorted(sizes)) or "-"
    widths, heights = zip(*sizes, strict=True)
    return f"{min(widths)}-{max(widths)}x{min(heights)}-{max(heights)} ({len(sizes)} sizes)"


def table(spec: Spec, reports: list[SplitReport]) -> str:
    """Pictures, sizes and ignored pixels per split; then the share of each class in the labelled pixels, in percent."""
    lines = [f"{'split':10}{'pictures':>10}{'ignored %':>11}  sizes"]
    for report in reports:
        ignored = 100 * report.pixels[IGNORE] / max(report.pixels.sum(), 1)
        lines.append(f"{report.split:10}{report.pictures:>10}{ignored:>11.2f}  {_sizes(report.sizes)}")
    width = max(map(len, spec.classes)) + 7
    lines += ["", f"{'class':{width}}" + "".join(f"{report.split + ' %':>10}" for report in reports)]
    shares = [report.shares(spec.num_classes) for report in reports]
    for train_id, name in enumerate(spec.classes):
        lines.append(f"{train_id:>3}  {name:{width - 5}}" + "".join(f"{share[train_id]:>10.3f}" for share in shares))
    return "\n".join(lines)


def notes(spec: Spec, report: SplitReport) -> list[str]:
    """What is unusual but no error: a split smaller than its release, scored classes without a pixel."""
    lines = []
    complete = spec.pictures.get(report.split, report.pictures)
    if report.pictures != complete:
        lines.append(f"{report.split} has {report.pictures} readable pictures, the complete release has {complete}")
    scored = range(spec.num_classes) if spec.scored is None else spec.scored
    absent = [spec.classes[train_id] for train_id in scored if not report.pixels[train_id]]
    if not spec.splits[report.split].labelled:
        lines.append(f"{report.split} has no public labels: its pictures alone were checked")
    elif absent and report.pictures:
        lines.append(f"{report.split} has no pixel of {len(absent)} classes: {', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}")
    return lines


def convert(spec: Spec, root: str | None, sbd: str | None, workers: int) -> list[str]:
    """Make the label files that the data set needs from those it comes with; returns one line for every problem."""
    if spec.conversion is None:
        raise DataError(f"{spec.name} needs no conversion; drop --convert")
    if root is None or not Path(root).is_dir():
        raise DataError(f"--data {root}: no such folder; it is the one that holds {spec.title}")
    conversion = spec.conversion(spec, Path(root), None if sbd is None else Path(sbd))
    pending = conversion.pending()
    problems = [problem for problem in in_processes(_make, pending, workers, "labels", "label") if problem is not None]
    if not problems:
        conversion.write_lists()
    print(f"{spec.name}: {len(pending) - len(problems)} labels made, {len(conversion.labels) - len(pending)} were there")
    return problems


def _make(label: LabelFile) -> str | None:
    try:
        label.make()
    except DataError as error:
        return str(error)


def _listed(spec: Spec) -> str:
    """A data set and its source, for --help."""
    joint = ": " if spec.completion else ", from " if spec.source else ""
    return f"{spec.name}: {spec.title}{joint}{spec.source}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset.prepare", allow_abbrev=False,
        description="Check a data set: layout, every pair, every label value, sizes; count the pixels per class. Pictures and labels are not "
                    "changed; --convert adds the labels that come in another form.",
        epilog="data sets: " + "; ".join(map(_listed, SPECS.values())).replace("%", "%%"))
    add = parser.add_argument
    add("name", help=f"one of {', '.join(SPECS)} (also: {', '.join(ALIASES)})")
    add("--data", metavar="DIR", help="folder that holds the data set (shapes needs none)")
    add("--split", nargs="+", metavar="SPLIT", help="splits to check (default: those that training and its report use)")
    add("--workers", type=int, default=cores(), metavar="N", help="processes that read (default: one per core, here %(default)s)")
    add("--state", type=Path, metavar="FILE", help=f"where to keep what is verified, so that a stopped check goes on (default: DIR/{FOLDER}/)")
    add("--fresh", action="store_true", help="read every picture again, also those that an earlier check has verified")
    add("--convert", action="store_true", help="first make the labels that come in another form: coco_stuff_10k (.mat), voc (needs --sbd)")
    add("--sbd", metavar="SBD_DIR", help="folder of SBD with cls/, train.txt and val.txt, for voc --convert")
    add("--manifest", type=Path, metavar="FILE", help="write size and SHA-256 of every file and the pixels per class, where all is sound")
    add("--verify", type=Path, metavar="FILE", help="compare the files with a manifest instead of checking them")
    options = parser.parse_args(arguments)
    escape_names()
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: must be at least 1")
    if options.sbd and not options.convert:
        parser.error("--sbd: belongs to --convert; add it")
    unused = [flag for flag in ("convert", "manifest", "state", "fresh") if options.verify and getattr(options, flag)]
    if unused:
        parser.error(f"--{unused[0]}: is not used by --verify, which compares files alone; drop one of the two")
    try:
        spec = get_spec(options.name, options.data)
        if options.verify:
            return verify(spec, options)
        return check(spec, options)
    except DataError as error:
        print(harmless(str(error)))
        return 1
    except ValueError as error:
        parser.error(harmless(str(error)))
    except KeyboardInterrupt:
        print(f"{options.name}: stopped before every file was read")
        return 130


def check(spec: Spec, options: argparse.Namespace) -> int:
    """Convert if asked to, check the splits, print the tables and problems, write the manifest; returns the exit code."""
    if options.manifest:
        check_place(options.manifest)
    problems = convert(spec, options.data, options.sbd, options.workers) if options.convert else []
    if not problems:
        splits = options.split or dict.fromkeys(("train", spec.select_split, spec.report_split))
        verified = open_verified(spec, options)
        try:
            reports = [check_split(spec, options.data, split, options.workers, verified) for split in splits]
        finally:
            verified.close()
        problems = [problem for report in reports for problem in report.problems]
        show(spec, options.data, reports)
    for problem in problems:
        print(harmless(f"problem: {problem}"))
    if problems:
        print(f"{spec.name}: {len(problems)} problems" + ("; no manifest was written" if options.manifest else ""))
        return 1
    print(f"{spec.name}: {sum(report.pictures for report in reports)} pictures, every pair and every label value is right")
    if options.manifest:
        pixels = {report.split: report.pixels for report in reports}
        print(f"{options.manifest}: {write_manifest(options.manifest, spec, options.data, pixels, options.workers)} files")
    return 0


def open_verified(spec: Spec, options: argparse.Namespace) -> Verified:
    """Where what is verified is kept: --state, or a hidden folder of the data's; nowhere if that is not to be written."""
    if not spec.source or options.data is None or not Path(options.data).is_dir():
        return Verified(None, None)
    path = options.state
    # root may write everywhere: the folder's own permissions say whether it is meant to be
    if path is None and os.access(options.data, os.W_OK) and os.stat(options.data).st_mode & 0o222:
        path = Path(options.data, FOLDER, f"{spec.name}.jsonl")
    return Verified(path, options.data, options.fresh)


def show(spec: Spec, root: str | None, reports: list[SplitReport]) -> None:
    """Print the tables and what is unusual."""
    if any(report.pictures for report in reports):
        print(f"{spec.title}{': ' + root if root else ''}\n\n{table(spec, reports)}\n")
        for report in reports:
            for note in notes(spec, report):
                print(f"note: {note}")
    known = sum(report.known for report in reports)
    if known:
        print(f"{known} pictures have not changed since an earlier check; --fresh reads them again")


def verify(spec: Spec, options: argparse.Namespace) -> int:
    """Compare the files with a manifest; returns the exit code."""
    manifest = read_manifest(options.verify, spec)
    total, problems = compare(manifest, spec, options.data, options.split or list(manifest["splits"]), options.workers)
    for problem in problems:
        print(harmless(f"problem: {problem}"))
    print(f"{spec.name}: {len(problems)} differences from {options.verify}" if problems else
          f"{spec.name}: {total} files are those of {options.verify}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
