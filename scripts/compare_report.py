"""What a comparison found: report.md, report.html, results.csv, results.json and, of a tuned one, trials.csv.

Every figure comes from the run folders. The page is one file without network or libraries: charts are SVG drawn here, the pictures
are inside.
"""

import base64
import csv
import io
import json
import math
import statistics
from datetime import date
from html import escape
from pathlib import Path

import numpy as np
import torch

from dataset import build_dataset, get_spec
from models.weights import model_from_checkpoint
from scripts.charts import COLOURS, GAP, WIDTH, Axes, document, figure, html_table, legend, text_width, ticks
from scripts.evidence import LEVEL, Difference, holm, paired, verdict
from utils.files import read_json
from utils.metrics import Inference, Scores, confusion
from utils.run import write_text
from utils.visualize import overlay, sheet

PUBLISHED = Path(__file__).with_name("published_results.csv")
PUBLISHED_NAMES = {  # name in dataset/specs.py -> names in that table
    "citys": ("Cityscapes",), "camvid": ("CamVid-11", "CamVid"), "voc": ("VOC2012-aug", "VOC2012+SBD"), "ade20k": ("ADE20K",),
    "coco_stuff_182": ("COCO-Stuff-164K (182-way head)",),
}  # fmt: skip
PUBLISHED_MODELS = {"deeplabv3": "DeepLabV3", "deeplabv3plus": "DeepLabV3+", "pspnet": "PSPNet", "segformer": "SegFormer", "upernet": "UPerNet"}
PUBLISHED_BACKBONES = {
    "resnet18": "R18", "resnet50": "R50", "resnet101": "R101", "mobilenetv2": "MBV2", "mobilenetv3_small": "MNv3-Small",
    "mobilenetv3_large": "MNv3-Large", "mit_b0": "B0", "mit_b1": "B1", "mit_b2": "B2", "mit_b4": "B4",
}  # fmt: skip
PICTURES = 60  # of the reported split, evenly spaced, among which those for the sheet are chosen
ROWS = 5  # pictures on the sheet
CLASSES = 12  # in the chart of classes


def write_report(plan, folder: Path, jobs, teacher: dict | None, tuned: dict, trials: list[dict], *, published: bool, command: str) -> None:
    """Write the report of the (arm, seed, training) in `jobs`, of which at least one is done.

    Args:
        teacher: eval.py's report of it. tuned: {arm: its best flags}; trials: the rows of trials.csv; both empty without tuning.
        published: with the published results of the same data set and networks.
    """
    content = collect(plan, jobs, teacher) | {"command": command, "date": date.today().isoformat(), "tuned": tuned, "trials": trials}
    content["published"] = published_results(content) if published else None
    write_text(folder / "results.json", json.dumps(content, indent=1) + "\n")
    write_text(folder / "results.csv", table_text([row_of(run) for run in content["runs"]]))
    if trials:
        write_text(folder / "trials.csv", table_text(trials))
    write_text(folder / "report.md", markdown(content))
    pictures, told = disagreements(plan, jobs)
    write_text(folder / "report.html", page(content, pictures, told))


# --------------------------------------------------------------------------------------------------------------------- figures


def collect(plan, jobs, teacher: dict | None) -> dict:
    """All figures of the report, as plain values."""
    runs = [read_run(arm, seed, job) for arm, seed, job in jobs]
    done = [run for run in runs if run["done"]]
    first, names = done[0], [arm.name for arm in plan.arms]
    baseline = "none" if "none" in names else names[0]
    references = [baseline, *(["kd"] if "kd" in names and baseline != "kd" else [])]
    spec = get_spec(plan.dataset, plan.data)
    same_split = first["selected_on"] == first["split"]
    scores = {name: {run["seed"]: run["last"] for run in done if run["arm"] == name} for name in names}
    differences = {}
    for place, other in enumerate(references):
        for name in names:
            if name not in references[: place + 1]:
                differences[name, other] = paired(scores[name], scores[other])
    adjusted = holm({pair: d.p for pair, d in differences.items() if d is not None})
    verdicts = []
    for (name, other), difference in differences.items():
        p = adjusted.get((name, other), math.nan)
        verdicts.append({"arm": name, "other": other, "text": verdict(name, other, difference, p), **plain(difference, p)})
    arms = [summary(name, [run for run in done if run["arm"] == name], plan.seeds) for name in names]
    options = first["options"]
    return {
        "dataset": plan.dataset, "title": spec.title, "classes": first["classes"], "scored": len(spec.scored or spec.classes),
        "split": first["split"], "selected_on": first["selected_on"], "selected_on_reported": same_split,
        "budget": str(plan.budget), "processes": plan.processes, "seeds": list(plan.seeds), "flags": list(plan.flags),
        "search": {"tune": plan.ranges, "trials": plan.trials, "search": plan.search, "budget": str(plan.tune_budget)} if plan.tune else None,
        "baseline": baseline, "arms": arms, "verdicts": verdicts, "class_gains": class_gains(names, baseline, done), "runs": runs,
        "teacher": plan.teacher and plan.teacher | {key: teacher[key] for key in ("miou", "split", "parameters") if teacher and key in teacher},
        "networks": {"student": first["model"], "teacher": (teacher or {}).get("model")},
        "setting": {key: options.get(key) for key in ("crop_size", "batch_size", "max_iterations", "max_minutes", "optimizer", "lr",
                                                      "weight_decay", "amp", "student_pretrained_base", "student_pretrained")},
        "environments": [dict(pairs) for pairs in sorted({tuple(sorted(run["environment"].items())) for run in done})],
    }  # fmt: skip


def read_run(arm, seed: int, job) -> dict:
    """What one training left in its folder."""
    run = {"arm": arm.name, "seed": seed, "run_seed": seed + arm.seed_offset, "done": job.done, "failure": "" if job.done else job.failure()}
    if not job.done:
        return run
    report, arguments = job.report(), read_json(job.folder / "args.json")
    metrics = job.folder / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{metrics}: damaged ({error}); remove its folder, and the training is made again") from error
    environment = {key: str(arguments["environment"].get(key)) for key in ("torch", "device", "commit", "ranks", "threads")}
    return run | {
        "last": report["last"]["miou"], "best": report["best"]["miou"], "selection": report["selection_miou"], "iou": report["last"]["iou"],
        "steps": report["steps"]["last"], "best_step": report["steps"]["best"], "seconds": report["seconds"], "cost": report["cost"],
        "split": report["split"], "selected_on": report["selected_on"], "classes": report["classes"], "images": report["last"]["images"],
        "curve": [[row["step"], row["val/mIoU"]] for row in rows if "val/mIoU" in row],
        "model": arguments["model"], "options": arguments["options"], "environment": environment,
    }  # fmt: skip


def summary(name: str, runs: list[dict], seeds) -> dict:
    """Means and standard deviations (None of one run) over the seeds, medians of the costs."""
    found = {"arm": name, "n": len(runs), "missing": [seed for seed in seeds if seed not in {run["seed"] for run in runs}]}
    for key in ("last", "best"):
        values = [run[key] for run in runs]
        found[key] = statistics.mean(values) if values else None
        found[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    for key in ("steps", "seconds"):
        found[key] = statistics.median(run[key] for run in runs) if runs else None
    for key in ("seconds_per_step", "peak_memory", "parameters", "extra_parameters", "macs", "teacher_macs"):
        values = [run["cost"][key] for run in runs if run["cost"][key] is not None]
        found[key] = statistics.median(values) if values else None
    return found


def plain(difference: Difference | None, adjusted: float) -> dict:
    """Without nan, which json does not know."""
    if difference is None:
        return {"mean": None, "low": None, "high": None, "p": None, "adjusted": None, "seeds": 0}
    return {key: None if math.isnan(value) else value for key, value in (vars(difference) | {"adjusted": adjusted}).items()}


def class_gains(names: list[str], baseline: str, done: list[dict]) -> dict[str, list[float | None]]:
    """{arm: gain in IoU of every class over the baseline, the mean over the seeds that both have}; None where a class is absent."""
    iou = {name: {run["seed"]: np.array(run["iou"], dtype=float) for run in done if run["arm"] == name} for name in names}  # None -> nan
    gains = {}
    for name in names:
        common = iou[name].keys() & iou[baseline].keys()
        if name != baseline and common:
            mean = np.mean([iou[name][seed] - iou[baseline][seed] for seed in common], axis=0)
            gains[name] = [None if np.isnan(value) else float(value) for value in mean]
    return gains


def row_of(run: dict) -> dict:
    """A line of results.csv."""
    cost, unfinished = run.get("cost", {}), "failed" if "error" in run["failure"].lower() else "not finished"
    megas = {"peak_memory_mib": ("peak_memory", 1 << 20), "extra_parameters": ("extra_parameters", 1), "gmacs": ("macs", 1e9),
             "teacher_gmacs": ("teacher_macs", 1e9)}  # fmt: skip
    return {
        "arm": run["arm"], "seed": run["seed"], "status": "done" if run["done"] else unfinished,
        **{f"{key}_miou": run.get(key) for key in ("last", "best", "selection")},
        **{key: run.get(key) for key in ("steps", "best_step", "seconds")}, "seconds_per_step": cost.get("seconds_per_step"),
        **{name: cost[key] / unit if key in cost else None for name, (key, unit) in megas.items()}, "failure": run["failure"],
    }  # fmt: skip


def table_text(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def published_results(content: dict) -> list[dict]:
    """Rows of the table of published results on the same data set with the same networks; where there are none with the same student,
    where there are none of that with any. Each has `differs`: how its setting is another one than the setting here."""
    def name(model):
        model = model or {}
        parts = PUBLISHED_MODELS.get(model.get("model"), model.get("model")), PUBLISHED_BACKBONES.get(model.get("backbone"), model.get("backbone"))
        return "-".join(map(str, parts))

    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] in PUBLISHED_NAMES.get(content["dataset"], ())]
    setting, networks = content["setting"], {who: name(model) for who, model in content["networks"].items()}
    crop = "x".join(map(str, setting["crop_size"]))
    here = networks | {"crop": crop, "batch": str(setting["batch_size"]), "lr": f"{setting['lr']:g}", "split": content["split"],
                       "iterations": str(setting["max_iterations"] or f"by time, {content['budget']}")}  # fmt: skip
    for row in rows:
        theirs = {**row, "lr": row["lr"].split()[0] if row["lr"] else "", "split": row["split"].split()[0]}
        differs = [f"{key} {row[key] or 'not stated'} (here {value})" for key, value in here.items() if theirs[key].lower() != value.lower()]
        row["differs"] = "; ".join([*differs, *([f"code {row['codebase']}"] if row["codebase"] else [])])
    for alike in (("student", "teacher"), ("student",)):
        found = [row for row in rows if all(row[who].lower() == networks[who].lower() for who in alike)]
        if found:
            return found
    return rows


@torch.no_grad()
def disagreements(plan, jobs):
    """(sheet as a PIL image or None, a sentence about it): the pictures whose mIoU varies most between the arms' last students of the
    first seed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = {arm.name: job for arm, seed, job in jobs if seed == plan.seeds[0] and job.done}
    if len(chosen) < 2:
        return None, f"No pictures: fewer than two arms are done with seed {plan.seeds[0]}."
    missing = [name for name, job in chosen.items() if not (job.folder / "last.pth").exists()]
    if missing:
        return None, f"No pictures: {', '.join(missing)} has no last.pth any more."
    spec = get_spec(plan.dataset, plan.data)
    pictures = build_dataset(spec, plan.data, next(iter(chosen.values())).report()["split"])
    indices = np.unique(np.linspace(0, len(pictures) - 1, min(PICTURES, len(pictures))).round().astype(int))
    scores = np.full((len(chosen), len(indices)), np.nan)
    models = []
    for row, job in enumerate(chosen.values()):
        model = model_from_checkpoint(job.folder / "last.pth")[0].eval().to(device=device, memory_format=torch.channels_last)
        models.append(model)
        for column, index in enumerate(indices):
            sample = pictures[int(index)]
            counts = confusion(predict(model, sample, device), torch.from_numpy(sample.target), spec.num_classes)
            if int(counts.sum()):
                scores[row, column] = Scores.of(counts, 1, spec.scored).miou
    spread = np.nan_to_num(scores.var(0), nan=-1.0)
    samples = [pictures[int(indices[column])] for column in np.argsort(-spread, kind="stable")[:ROWS]]
    palette = spec.palette()
    columns = {"input": [s.image for s in samples], "label": [overlay(s.image, s.target, palette) for s in samples]}
    for name, model in zip(chosen, models, strict=True):
        columns[name] = [overlay(s.image, predict(model, s, device).numpy().astype(np.uint8), palette) for s in samples]
    text = (f"The {len(samples)} of {len(indices)} pictures of {pictures.split} whose mIoU varies most between the arms (last student, seed "
            f"{plan.seeds[0]}): chosen for their disagreement, so they say nothing about the average.")  # fmt: skip
    return sheet(columns, spec.classes, spec.colours), text


def predict(model, sample, device) -> torch.Tensor:
    """(H, W) labels on the CPU."""
    image = torch.from_numpy(np.ascontiguousarray(sample.image)).permute(2, 0, 1)[None].to(device)
    return Inference()(model, image)[0].cpu()


# ---------------------------------------------------------------------------------------------------------------------- tables


def number(value, form: str = ".2f", unit: float = 1) -> str:
    return "-" if value is None else format(value / unit, form)


def results_table(content: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the main table."""
    baseline = content["baseline"]
    against = {row["arm"]: row for row in content["verdicts"] if row["other"] == baseline}
    head = ["arm", "seeds", "mIoU, last", "sd", "mIoU, best", "sd", f"last - {baseline}", "95 % interval", "p (Holm)", "steps", "minutes",
            "ms per step", "peak MiB", "extra M", "GMAC"]  # fmt: skip
    rows = []
    for arm in content["arms"]:
        found = against.get(arm["arm"], {})
        interval = f"[{found['low']:+.2f}, {found['high']:+.2f}]" if found.get("low") is not None else "-"
        macs = None if arm["macs"] is None else arm["macs"] + arm["teacher_macs"]
        rows.append([
            arm["arm"], str(arm["n"]), number(arm["last"]), number(arm["last_sd"]), number(arm["best"]), number(arm["best_sd"]),
            number(found.get("mean"), "+.2f"), interval, number(found.get("adjusted"), ".2g"), number(arm["steps"], ".0f"),
            number(arm["seconds"], ".1f", 60), number(arm["seconds_per_step"], ".1f", 1e-3), number(arm["peak_memory"], ".0f", 1 << 20),
            number(arm["extra_parameters"], ".2f", 1e6), number(macs, ".2f", 1e9),
        ])  # fmt: skip
    if content["teacher"] and "miou" in content["teacher"]:
        rows.append(["teacher", "-", number(content["teacher"]["miou"]), *["-"] * (len(head) - 3)])
    return head, rows


def notes(content: dict) -> list[str]:
    """What has to be known to read the main table."""
    done = next(run for run in content["runs"] if run["done"])
    classes, heads = content["scored"], len(content["classes"])
    others = ", ".join(dict.fromkeys(run["arm"] for run in content["runs"] if run["run_seed"] != run["seed"]))
    lines = [
        f"mIoU in percent over {classes} classes{f' (of a head with {heads})' if classes != heads else ''} on {content['split']}, "
        f"{done['images']} pictures. Last: the student after the last step, nothing selected; every verdict is about it. Best: the "
        f"checkpoint with the highest mIoU on {content['selected_on']}.",
        f"Budget of every training: {content['budget']} on {content['processes']} process{'es' if content['processes'] > 1 else ''}. Same "
        f"pictures in the same order and same initial student for all arms of a seed{' with the same seed-offset' if others else ''}. Seconds "
        f"are of training alone, without validation, checkpoints and the first five steps of a process; cost: median over the seeds.",
        f"Memory: {done['cost']['peak_memory_of']}. Extra M: millions of weights that a method adds during the training. GMAC: forward pass of "
        f"student and teacher, one crop, without the method's own arithmetic.",
    ]
    if content["selected_on_reported"]:
        lines.append(f"**The best checkpoint was selected on {content['split']}, the reported split itself**: that column is optimistic.")
    if len(content["seeds"]) == 1:
        lines.append("**One seed: there is no verdict.** Nothing is known about how much another seed would change.")
    else:
        lines.append(f"Differences are paired by seed, with a {LEVEL:.0%} interval of Student's t. p values are adjusted after Holm over all "
                     f"comparisons of this report ({len(content['verdicts'])}); the intervals are not: one without 0 may be undecided.")  # fmt: skip
    if others:
        lines.append(f"Arms with other seeds (seed-offset): {others}. Differences from arms of another offset are paired by nominal seed alone, "
                     "which gains nothing: the order of the pictures, their crops and the initial student differ."
                     + (" Intervals and p values are valid where the two arms share no seed, as independent samples may be paired in any order."
                        if len(content["seeds"]) > 1 else ""))  # fmt: skip
    if content["search"]:
        s = content["search"]
        ranges = ", ".join(f"{name} (the recipe's times 1/{reach:g} to {reach:g})" for name, reach in s["tune"].items())
        failed = sum(row["miou"] is None for row in content["trials"])
        lines.append(f"Every arm was tuned alike: {s['trials']} trials over {ranges} ({s['search']} search, {s['budget']} each at most), the "
                     f"first with the recipe's own values, scored on held-out training pictures (trials.csv); {failed} failed.")  # fmt: skip
    else:
        lines.append("Nothing was tuned: every arm has its default settings, and the flags below.")
    return lines


def provenance(content: dict) -> list[str]:
    teacher, networks = content["teacher"], content["networks"]
    setting = ", ".join(f"{key.replace('_', '-')} {value}" for key, value in content["setting"].items() if value not in (None, "none"))
    lines = [f"command: `{content['command']}`", f"date: {content['date']}", f"data set: {content['title']}",
             f"student: {networks['student']['model']}-{networks['student']['backbone']}"]  # fmt: skip
    if teacher:
        lines.append(f"teacher: `{Path(teacher['path']).name}`, sha256 `{teacher['sha256']}`"
                     + (f", mIoU {teacher['miou']:.2f} on {teacher['split']}" if "miou" in teacher else ""))  # fmt: skip
    lines.append(f"setting of the first training: {setting}")
    for found in content["environments"]:
        lines.append(f"torch {found['torch']}, {found['device']}, {found['ranks']} rank(s), {found['threads']} thread(s), commit {found['commit']}")
    return lines


def failures(content: dict) -> list[str]:
    return [f"{run['arm']}, seed {run['seed']}: {run['failure']}" for run in content["runs"] if not run["done"]]


def class_table(content: dict) -> tuple[list[str], list[list[str]]]:
    gains = content["class_gains"]
    rows = [[name, *(number(values[k], "+.2f") for values in gains.values())] for k, name in enumerate(content["classes"])]
    return ["class", *gains], rows


def published_table(content: dict) -> tuple[list[str], list[list[str]]]:
    rows = [[row["paper"], row["method"], row["student_baseline_miou"], row["distilled_miou"], row["teacher_miou"], row["differs"], row["source"]]
            for row in content["published"]]  # fmt: skip
    return ["paper", "method", "student alone", "distilled", "teacher", "differs from here", "source"], rows


def tuned_table(content: dict) -> tuple[list[str], list[list[str]]]:
    return ["arm", "flags of the best trial"], [[arm, " ".join(f"--{k} {v}" for k, v in flags.items()) or "the recipe's own values"]
                                                for arm, flags in content["tuned"].items()]  # fmt: skip


def sections(content: dict) -> list[tuple[str, tuple[list[str], list[list[str]]] | list[str]]]:
    """(title, table or lines) of the report below its main table, in order."""
    parts = []
    if content["class_gains"]:
        parts.append((f"IoU per class, last student, gain over {content['baseline']}", class_table(content)))
    if content["tuned"]:
        parts.append(("Tuning", tuned_table(content)))
    if content["published"]:
        parts.append(("Published results on this data set", published_table(content)))
    elif content["published"] is not None:
        parts.append(("Published results", ["There are none on this data set in published_results.csv."]))
    if failures(content):
        parts.append(("Failed or not finished", failures(content)))
    parts.append(("How this was made", provenance(content)))
    return parts


def markdown(content: dict) -> str:
    lines = [f"# {content['title']}: {len(content['arms'])} arms, {len(content['seeds'])} seeds, {content['budget']}", ""]
    lines += [f"- {row['text']}" for row in content["verdicts"]]
    lines += ["", *markdown_table(*results_table(content)), "", *(f"{line}\n" for line in notes(content))]
    for title, part in sections(content):
        lines += [f"## {title}", "", *(markdown_table(*part) if isinstance(part, tuple) else [f"- {line}" for line in part]), ""]
    return "\n".join(lines)


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    cell = [[str(value).replace("|", "\\|") for value in row] for row in [head, *rows]]
    return [f"| {' | '.join(cell[0])} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in cell[1:])]


# ------------------------------------------------------------------------------------------------------------------------ page


def page(content: dict, pictures, told: str) -> str:
    """The report as one html file; `pictures`: the sheet or None, `told`: a sentence about it."""
    names = [arm["arm"] for arm in content["arms"]]
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    title = f"{content['title']}: {len(names)} arms, {len(content['seeds'])} seeds, {content['budget']}"
    parts = [
        f"<h1>{escape(title)}</h1>", bullets([row["text"] for row in content["verdicts"]]), html_table(*results_table(content), sort=True),
        *(f"<p>{words(line)}</p>" for line in notes(content)), legend(colours), '<div class="charts">',
        figure(scatter(content["arms"], colours), "mIoU of the last student (mean, standard deviation) against the time of a step"),
        figure(curves(content["runs"], colours), f"mIoU on {content['selected_on']} over the training, every run"), "</div>",
    ]  # fmt: skip
    if content["class_gains"]:
        shown = f", the {CLASSES} that change most" if len(content["classes"]) > CLASSES else ""
        parts.append(figure(bars(content, colours), f"IoU per class, gain over {content['baseline']}{shown}"))
    parts.append("<h2>Pictures on which the arms differ most</h2>")
    if pictures is not None:
        file = io.BytesIO()
        pictures.save(file, "JPEG", quality=88)
        data = base64.b64encode(file.getvalue()).decode()
        parts.append(f'<div class="wide"><img alt="input, label and prediction of every arm" src="data:image/jpeg;base64,{data}"></div>')
    parts.append(f"<p>{escape(told)}</p>")
    for heading, part in sections(content):
        body = html_table(*part, sort=True) if isinstance(part, tuple) else bullets(part)
        parts.append(f"<h2>{escape(heading)}</h2>{body}")
    return document(title, parts)


def words(text: str) -> str:
    """A line of report.md as html: **bold** and `code`."""
    text = escape(text)
    for mark, tag in (("**", "strong"), ("`", "code")):
        text = "".join(f"<{tag}>{piece}</{tag}>" if place % 2 else piece for place, piece in enumerate(text.split(mark)))
    return text


def bullets(lines: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{words(line)}</li>' for line in lines)}</ul>"


# ---------------------------------------------------------------------------------------------------------------------- charts


def scatter(arms: list[dict], colours: dict[str, str]) -> str:
    """mIoU against milliseconds per step, a point with its standard deviation per arm."""
    known = [arm for arm in arms if arm["last"] is not None and arm["seconds_per_step"] is not None]
    heights = [arm["last"] + sign * (arm["last_sd"] or 0) for arm in known for sign in (-1, 1)]
    axes = Axes([1000 * arm["seconds_per_step"] for arm in known], heights, "milliseconds per step", "mIoU")
    marks = []
    for arm in known:
        x, colour, sd = axes.x(1000 * arm["seconds_per_step"]), colours[arm["arm"]], arm["last_sd"] or 0
        marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{axes.y(arm["last"] - sd):.1f}" y2="{axes.y(arm["last"] + sd):.1f}" stroke="{colour}" '
                     f'stroke-width="2"/><circle cx="{x:.1f}" cy="{axes.y(arm["last"]):.1f}" r="6" fill="{colour}"><title>{escape(arm["arm"])}: '
                     f'{arm["last"]:.2f}</title></circle>')  # fmt: skip
    return axes.svg(marks)


def curves(runs: list[dict], colours: dict[str, str]) -> str:
    """A line per run: its validations over the share of its steps."""
    lines = [(run, [(100 * step / run["steps"], miou) for step, miou in run["curve"]]) for run in runs if run["done"]]
    points = [point for _, line in lines for point in line]
    axes = Axes([0.0, 100.0], [y for _, y in points], "percent of the steps", "mIoU")
    return axes.svg([axes.line(line, colours[run["arm"]], f"{run['arm']}, seed {run['seed']}", dots=True) for run, line in lines])


def bars(content: dict, colours: dict[str, str]) -> str:
    """A bar per arm and class, of those that change most."""
    gains, classes = content["class_gains"], content["classes"]
    size = [max((abs(values[k]) for values in gains.values() if values[k] is not None), default=-1.0) for k in range(len(classes))]
    shown = sorted(sorted(range(len(classes)), key=lambda k: -size[k])[:CLASSES])
    known = [values[k] for values in gains.values() for k in shown if values[k] is not None]
    low, high = Axes.limits([0.0, *known])
    row, band = 9, 9 * len(gains) + 9
    left = max(120, 6 + max(text_width(classes[k][:16]) for k in shown))

    def x(value):
        return left + (value - low) / (high - low) * (WIDTH - GAP - left)

    height = band * len(shown) + 24
    marks = [f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="0" y2="{height - 20}" stroke="{"currentColor" if not value else "#8884"}"/>'
             f'<text x="{x(value):.1f}" y="{height - 5}" text-anchor="middle">{value:g}</text>' for value in ticks(low, high)]  # fmt: skip
    for place, k in enumerate(shown):
        top = place * band + 4
        marks.append(f'<text x="{left - 6}" y="{top + band / 2}" text-anchor="end">{escape(classes[k][:16])}</text>')
        for number_, (name, values) in enumerate(gains.items()):
            if values[k] is not None:
                start, end = sorted((x(0), x(values[k])))
                marks.append(f'<rect x="{start:.1f}" y="{top + row * number_}" width="{max(end - start, 0.5):.1f}" height="{row - 1}" '
                             f'fill="{colours[name]}"><title>{escape(name)}, {escape(classes[k])}: {values[k]:+.2f}</title></rect>')  # fmt: skip
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(marks)}</svg>'
