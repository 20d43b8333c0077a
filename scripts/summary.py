"""Compare finished runs: tables of scores, cost and classes, and a sheet of pictures with every run's predictions.

    python -m scripts.summary teacher=runs/teacher student=runs/student "student + KD=runs/kd" --output runs

Writes summary.md, summary.png to --output and prints the tables. The scores come from each run's report.json: of the best checkpoint on
the selection split and of the last one, on the split that the data set reports. Parameters, GMACs and the time per picture are taken
here, one picture at a time.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from dataset import build_dataset, get_spec
from models import count_macs, count_parameters
from models.weights import model_from_checkpoint
from utils.files import read_json
from utils.log import harmless
from utils.metrics import Inference, Timed
from utils.visualize import overlay, sheet


def summarize(runs: dict[str, Path], data: str | None, rows: int, device: torch.device) -> tuple[str, object]:
    """(tables in Markdown, sheet as a PIL image) of the runs {title: folder}.

    Raises:
        ValueError: a run is not finished, or the runs are of different data sets or report on different pictures.
    """
    reports, places, selections, names = {}, {}, {}, set()
    for title, folder in runs.items():
        path = folder / "report.json"
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; give the folder of a finished run")
        if not path.is_file():
            raise ValueError(f"{folder}: no report.json; the training is not finished: resume it with --resume")
        reports[title], arguments = read_json(path), read_json(folder / "args.json")
        if not isinstance(reports[title], dict) or "classes" not in reports[title] or not isinstance(arguments, dict) or "options" not in arguments:
            raise ValueError(f"{folder}: its report.json or args.json is of no training; give the folder of a finished run")
        used = arguments["options"]
        names.add(used["dataset"])
        places[title] = (reports[title]["split"], used.get("holdout", 0.0))
        share = used.get("select_holdout", 0.0)
        selections[title] = reports[title]["selected_on"] + (f", a share of {share:g}" if share else "")
    if len(names) > 1:
        raise ValueError(f"the runs are of different data sets: {', '.join(sorted(names))}; compare runs of one")
    (split, holdout), *others = dict.fromkeys(places.values())
    if others:
        shown = ", ".join(f"{title} on {name}" + (f" (a share of {share:g})" if share else "") for title, (name, share) in places.items())
        raise ValueError(f"the runs report on different pictures: {shown}; compare runs that report on the same")
    spec = get_spec(names.pop(), data)
    for title, report in reports.items():
        if report["classes"] != list(spec.classes):
            raise ValueError(f"run {title!r} was trained on other classes than {spec.name} has; give the --data that it was trained on")
    pictures = build_dataset(spec.hold_out(holdout) if holdout else spec, data, split)
    chosen = np.linspace(0, len(pictures) - 1, min(rows, len(pictures))).round().astype(int)  # evenly spaced, not picked for their looks
    samples = [pictures[int(index)] for index in chosen]
    palette = spec.palette()
    columns = {"input": [s.image for s in samples], "label": [overlay(s.image, s.target, palette) for s in samples]}
    several = len(set(selections.values())) > 1
    selected = "of the selection" if several else next(iter(selections.values()))
    lines = [f"| run | mIoU {selected} | mIoU {split} | last, {split} | parameters | GMAC | ms per picture | minutes of training |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for title, folder in runs.items():
        model, _ = model_from_checkpoint(folder / "student_best.pth")
        model = model.eval().to(device=device, memory_format=torch.channels_last)
        timed = Timed(Inference(), device)
        predictions = []
        with torch.no_grad():
            for sample in [samples[0], *samples]:  # the first one warms up
                image = torch.from_numpy(sample.image).permute(2, 0, 1)[None].to(device)
                predictions.append(timed(model, image)[0].cpu().numpy().astype(np.uint8))
        columns[title] = [overlay(s.image, p, palette) for s, p in zip(samples, predictions[1:], strict=True)]
        height, width = samples[0].target.shape
        cost = f"{count_parameters(model) / 1e6:.2f} M | {count_macs(model, height, width) / 1e9:.2f} | {timed.median_ms:.1f}"
        report = reports[title]
        where = f" ({selections[title]})" if several else ""
        scores = f"{report['selection_miou']:.2f}{where} | {report['best']['miou']:.2f} | {report['last']['miou']:.2f}"
        lines.append(f"| {title} | {scores} | {cost} | {report['seconds'] / 60:.1f} |")
    lines += ["", f"IoU per class on {split}, of the best on {'its selection' if several else selected}:", ""]
    lines += [f"| class | {' | '.join(reports)} |", "|---" * (1 + len(reports)) + "|"]
    for number, name in enumerate(spec.classes):
        values = [report["best"]["iou"][number] for report in reports.values()]
        row = ["-" if value is None else f"{value:.2f}" for value in values]  # absent from the labels and from the predictions
        lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join(lines), sheet(columns, spec.classes, spec.colours)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.summary", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="TITLE=FOLDER", help="a finished run and what to call it")
    parser.add_argument("--data", help="folder of the data set; none is needed for shapes")
    parser.add_argument("--rows", type=int, default=5, help="pictures on the sheet (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of summary.md and summary.png (default: here)")
    options = parser.parse_args()
    if options.rows < 1:
        parser.error(f"--rows {options.rows}: must be at least 1")
    runs = {}
    for text in options.runs:
        title, equals, folder = text.partition("=")
        if not equals:
            parser.error(f"{text!r}: give TITLE=FOLDER")
        if title in (*runs, "input", "label"):
            parser.error(f"{text!r}: {title!r} is the title of another column; give every run its own")
        runs[title] = Path(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        table, page = summarize(runs, options.data, options.rows, device)
    except ValueError as error:
        parser.error(harmless(str(error)))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "summary.md").write_text(table + "\n", encoding="utf-8")
    page.save(options.output / "summary.png")
    print(f"{table}\n\npictures: {options.output / 'summary.png'}")


if __name__ == "__main__":
    main()
