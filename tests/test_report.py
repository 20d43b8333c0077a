"""The report of a comparison, from hand-made run folders: every figure by hand, and the page in a real browser."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import get_spec
from scripts import compare_report
from scripts.charts import html_table
from scripts.compare import Budget, Job, Plan, parse_arm
from scripts.compare_report import bars, markdown_table, words, write_report
from tests.browser import check_page
from tests.workers import save_model

CLASSES = get_spec("shapes").classes
TEACHER = {"miou": 40.0, "split": "test", "parameters": 7, "model": {"model": "deeplabv3", "backbone": "resnet101"}}


def plan(*methods, seeds=(0, 1, 2), dataset="shapes", budget="iterations:10", **others) -> Plan:
    who = {"path": "/somewhere/teacher.pth", "sha256": "ab" * 32}
    return Plan(dataset, None, who, tuple(map(parse_arm, methods)), tuple(seeds), Budget.parse(budget), (), 1, **others)


def run_folder(folder: Path, last: float, best: float, seconds=20.0, classes=CLASSES, split="test", selected="val", iou=None, **options) -> None:
    """What a finished training leaves, as far as the report reads it."""
    folder.mkdir(parents=True)
    scores = {"miou": last, "iou": iou or [last] * len(classes), "images": 128}
    cost = {"seconds_per_step": seconds / 5, "timed_steps": 5, "ranks": 1, "peak_memory": 300 << 20, "peak_memory_of": "one process (ru_maxrss)",
            "parameters": 1_000_000, "extra_parameters": 250_000, "macs": 2_000_000_000, "teacher_macs": 500_000_000}  # fmt: skip
    report = {"split": split, "selected_on": selected, "selection_miou": best + 1, "classes": list(classes), "seconds": seconds, "cost": cost,
              "steps": {"last": 10, "best": 5}, "last": scores, "best": scores | {"miou": best}, "holdout": 0.0}  # fmt: skip
    setting = {"crop_size": [64, 64], "batch_size": 8, "max_iterations": 10, "max_minutes": None, "optimizer": "sgd", "lr": 0.02,
               "weight_decay": 1e-4, "amp": "off", "student_pretrained_base": "none", "student_pretrained": None}  # fmt: skip
    arguments = {"options": setting | options, "model": {"model": "deeplabv3", "backbone": "resnet18"},
                 "environment": {"torch": "2.0", "device": "cpu", "commit": "0123456789ab", "ranks": 1, "threads": 2}}  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "args.json").write_text(json.dumps(arguments))
    rows = [{"step": 5, "loss": 1.0}, {"step": 5, "val/mIoU": last - 2}, {"step": 10, "val/mIoU": best}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "DONE").touch()


def jobs_of(made: Plan, folder: Path) -> list:
    return [(arm, seed, Job(f"{arm.name}, seed {seed}", folder / "runs" / arm.folder / f"seed{seed}", ()))
            for seed in made.seeds for arm in made.arms]  # fmt: skip


def report(made: Plan, folder: Path, scores: dict[str, dict[int, float]], *, tuned=None, trials=(), published=False, **others) -> str:
    """report.md of runs with these mIoUs of the last student; the best one's are 1 higher. What is in no row has failed."""
    jobs = jobs_of(made, folder)
    for arm, seed, job in jobs:
        if seed in scores[arm.name]:
            run_folder(job.folder, scores[arm.name][seed], scores[arm.name][seed] + 1, **others)
        else:
            job.folder.parent.mkdir(parents=True, exist_ok=True)
            job.log.write_text("step 1\nerror: step 4: not finite: total\n")
    write_report(made, folder, jobs, TEACHER, tuned or {}, list(trials), published=published, command="python -m scripts.compare <this>")
    return (folder / "report.md").read_text()


SCORES = {"none": {0: 30.0, 1: 32.0, 2: 31.0}, "kd": {0: 30.5, 1: 31.5, 2: 31.9}, "cwd": {0: 33.0, 1: 35.2, 2: 33.8}}


def test_figures_by_hand(tmp_path):
    """cwd - none: 3.0 3.2 2.8, mean 3, sd 0.2, so 3 +- 4.30265 * 0.2 / sqrt(3) and t = 25.98; p = 0.00148 of three comparisons: 0.0044."""
    text = report(plan("none", "kd", "cwd"), tmp_path, SCORES)
    assert "- cwd > none: +3.00 [+2.50, +3.50], n=3, p=0.0044" in text
    assert "- kd vs none: undecided (+0.30 [" in text and "- cwd > kd: " not in text and "- cwd vs kd: undecided (+2.70 [" in text
    assert ("| cwd | 3 | 34.00 | 1.11 | 35.00 | 1.11 | +3.00 | [+2.50, +3.50] | 0.0044 | 10 | 0.3 | 4000.0 | 300 | 0.25 | 2.50 |") in text
    assert "| none | 3 | 31.00 | 1.00 | 32.00 | 1.00 | - | - | - |" in text and "| teacher | - | 40.00 |" in text
    assert "| wire | +0.30 | +3.00 |" in text
    for told in ("`" + "ab" * 32 + "`", "python -m scripts.compare <this>", "torch 2.0, cpu, 1 rank(s), 2 thread(s), commit 0123456789ab",
                 "mIoU 40.00 on test", "iterations:10 on 1 process", "Nothing was tuned",
                 "one process (ru_maxrss)", "over 8 classes on test, 128 pictures"):  # fmt: skip
        assert told in text
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(row["arm"], row["seed"], float(row["last_miou"])) for row in rows[:3]] == [("none", "0", 30), ("kd", "0", 30.5), ("cwd", "0", 33)]
    assert float(rows[2]["best_miou"]) == 34 and float(rows[2]["gmacs"]) == 2 and float(rows[2]["peak_memory_mib"]) == 300
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["arms"][2]["last"] == pytest.approx(34) and content["verdicts"][1]["p"] == pytest.approx(0.00148, rel=0.01)


def test_one_seed_gives_no_verdict(tmp_path):
    text = report(plan("none", "cwd", seeds=(0,)), tmp_path, SCORES)
    assert "**One seed: there is no verdict.**" in text and "cwd vs none: +3.00 with one seed" in text
    assert "cwd >" not in text and "| cwd | 1 | 33.00 | - | 34.00 | - | +3.00 | - | - |" in text


def test_a_failed_run_is_shown_and_pairs_with_nothing(tmp_path):
    text = report(plan("none", "cwd"), tmp_path, {"none": SCORES["none"], "cwd": {0: 33.0, 1: 35.0}})
    assert "- cwd, seed 2: error: step 4: not finite: total" in text and "| cwd | 2 | 34.00 |" in text and "n=2" in text
    assert "cwd,2,failed,,,,,,,,,,,,error: step 4: not finite: total" in (tmp_path / "results.csv").read_text()


def test_without_the_baseline_the_first_arm_is_it(tmp_path):
    text = report(plan("kd", "cwd"), tmp_path, SCORES)
    assert "last - kd" in text and "- cwd > kd: +2.70" in text and "none" not in text.split("##")[0]


def test_what_the_arms_of_a_seed_share_is_said(tmp_path):
    """With other seeds in an arm, also a failed one, the pictures are not the same, and the pairing means less."""
    same = "Same pictures in the same order and same initial student for all arms of a seed"
    text = report(plan("none", "kd"), tmp_path / "same", SCORES)
    assert f"{same}. Seconds" in text and "seed-offset" not in text and "nominal" not in text
    arms, offset = ("none", "kd:seed-offset=100", "cwd", "cwd:seed-offset=7"), "kd:seed-offset=100, cwd:seed-offset=7"
    scores = {arm: SCORES[arm.split(":")[0]] for arm in arms} | {arms[3]: {}}
    text = report(plan(*arms), tmp_path / "other", scores)
    assert f"{same} with the same seed-offset. Seconds" in text and f"{same}. " not in text
    assert f"Arms with other seeds (seed-offset): {offset}. Differences from arms of another offset are paired by nominal seed alone" in text
    assert "valid where the two arms share no seed, as independent samples may be paired in any order" in text
    assert f"(seed-offset): {offset}. " in (tmp_path / "other" / "report.html").read_text()
    text = report(plan(*arms[:2], seeds=(0,)), tmp_path / "one", scores)
    assert "(seed-offset): kd:seed-offset=100. " in text and "Intervals and p values" not in text, "one seed has none"


def test_a_selection_on_the_reported_split_is_said(tmp_path):
    assert "**The best checkpoint was selected on val, the reported split itself**" in report(
        plan("none", "kd"), tmp_path / "a", SCORES, split="val", selected="val")  # fmt: skip
    assert "the reported split itself" not in report(plan("none", "kd"), tmp_path / "b", SCORES)


def test_coco_stuff_says_how_many_classes_count(tmp_path):
    for name, told in (("coco_stuff_164k", "over 171 classes on val"), ("coco_stuff_182", "over 171 classes (of a head with 182) on val")):
        made = plan("none", "kd", dataset=name)
        jobs = jobs_of(made, tmp_path / name)
        for _, _, job in jobs:
            run_folder(job.folder, 30.0, 31.0, classes=get_spec(name).classes, split="val")
        content = compare_report.collect(made, jobs, TEACHER)
        assert told in compare_report.notes(content)[0]


def test_tuning_is_told(tmp_path):
    trials = [{"arm": "kd", "trial": 0, "round": 0, "budget": "iterations:10", "lr": 1.0, "miou": 30.0, "flags": "--holdout 0.2", "failure": ""}]
    trials.append({**trials[0], "trial": 1, "miou": None, "failure": "error: step 4: not finite: total"})
    made = plan("none", "kd", tune=("lr",), trials=12, tune_budget=Budget("iterations", 10))
    text = report(made, tmp_path, SCORES, tuned={"none": {}, "kd": {"lr": "0.04"}}, trials=trials)
    assert "| kd | --lr 0.04 |" in text and "| none | the recipe's own values |" in text
    assert "12 trials over lr (the recipe's times 1/4 to 4) (random search" in text and "(trials.csv); 1 failed." in text
    assert list(csv.DictReader((tmp_path / "trials.csv").open()))[0]["miou"] == "30.0"


def test_published_rows_are_those_of_the_networks_and_say_what_differs(tmp_path):
    made = plan("none", "kd", dataset="citys", seeds=(0, 1))
    jobs = jobs_of(made, tmp_path)
    for _, _, job in jobs:
        run_folder(job.folder, 30.0, 31.0, classes=get_spec("citys").classes, split="val", batch_size=16)
    rows = compare_report.published_results(compare_report.collect(made, jobs, TEACHER))
    assert rows and {(row["dataset"], row["student"], row["teacher"]) for row in rows} == {("Cityscapes", "DeepLabV3-R18", "DeepLabV3-R101")}
    row = next(row for row in rows if row["paper"].startswith("CIRKD (CVPR") and row["method"] == "CWD")
    assert row["distilled_miou"] == "75.55" and row["student_baseline_miou"] == "74.21"
    assert row["differs"] == "crop 512x1024 (here 64x64); iterations 40000 (here 10); code CIRKD v1", "batch, lr and split are the same"
    assert "There are none on this data set" in report(plan("none", "kd"), tmp_path / "shapes", SCORES, published=True)
    assert "Published" not in report(plan("none", "kd"), tmp_path / "without", SCORES)


def test_published_rows_of_other_networks_say_so(tmp_path):
    """No row has this teacher: those of the student; none has this student either: those of the data set."""
    made = plan("none", "kd", dataset="camvid", seeds=(0,))
    jobs = jobs_of(made, tmp_path)
    for _, _, job in jobs:
        run_folder(job.folder, 30.0, 31.0, classes=get_spec("camvid").classes)
    content = compare_report.collect(made, jobs, TEACHER | {"model": {"model": "deeplabv3", "backbone": "resnet18"}})
    rows = compare_report.published_results(content)
    assert {row["student"] for row in rows} == {"DeepLabV3-R18"}
    assert all(row["differs"].startswith("teacher DeepLabV3-R101 (here DeepLabV3-R18); crop ") for row in rows)
    content["networks"]["student"] = {"model": "lraspp", "backbone": "mobilenetv2"}
    rows = compare_report.published_results(content)
    assert {"DeepLabV3-R18", "PSPNet-R18"} <= {row["student"] for row in rows}
    assert all(row["differs"].startswith(f"student {row['student']} (here lraspp-MBV2); teacher ") for row in rows)


def test_pictures_are_those_that_the_arms_differ_on(tmp_path, monkeypatch):
    """Two students that agree but on picture 7: it leads the sheet."""
    made = plan("none", "kd", seeds=(0,))
    jobs = jobs_of(made, tmp_path)
    for number, (_, _, job) in enumerate(jobs):
        run_folder(job.folder, 30.0, 31.0)
        save_model(job.folder / "last.pth", number)
    seen, pictures = [], get_spec("shapes").find(None, "test")[0]

    def predict(model, sample, device):
        arm = seen.index(id(model)) if id(model) in seen else seen.append(id(model)) or len(seen) - 1
        target = np.where(sample.target == 255, 0, sample.target)
        return torch.from_numpy(target if sample.name != pictures[7].name or arm else 0 * target)

    monkeypatch.setattr(compare_report, "predict", predict)
    monkeypatch.setattr(compare_report, "PICTURES", 200)
    shown = {}
    monkeypatch.setattr(compare_report, "sheet", lambda columns, *_: shown.update(columns))
    _, told = compare_report.disagreements(made, jobs)
    assert np.array_equal(shown["input"][0], pictures[7].read()[0]) and list(shown) == ["input", "label", "none", "kd"]
    assert "The 5 of 128 pictures of test" in told
    (jobs[0][2].folder / "last.pth").unlink()
    assert compare_report.disagreements(made, jobs) == (None, "No pictures: none has no last.pth any more.")


def test_bars_show_the_classes_that_change_most():
    gains = {"kd": [0.1 * k for k in range(20)], "cwd": [None] * 19 + [-5.0]}
    drawn = bars({"class_gains": gains, "classes": [f"class{k}" for k in range(20)]}, {"kd": "#111", "cwd": "#222"})
    assert re.findall(r">(class\d+)</text>", drawn) == [f"class{k}" for k in range(8, 20)]
    assert drawn.count("<rect") == 12 + 1 and "cwd, class19: -5.00" in drawn


def test_text_is_escaped():
    assert words("a < b: **c** `d`") == "a &lt; b: <strong>c</strong> <code>d</code>"
    assert "&lt;script&gt;" in html_table(["<script>"], [["1"]]) and markdown_table(["a|b"], [])[0] == "| a\\|b |"


# --------------------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """report.html of three arms, with pictures."""
    folder = tmp_path_factory.mktemp("page")
    made = plan("none", "kd", "cwd")
    patch = pytest.MonkeyPatch()
    patch.setattr(compare_report, "PICTURES", 3)
    folders = jobs_of(made, folder)
    for arm, seed, job in folders:
        run_folder(job.folder, SCORES[arm.name][seed], SCORES[arm.name][seed] + 1, seconds=20.0 + 5 * len(arm.methods))
        save_model(job.folder / "last.pth", seed)
    write_report(made, folder, folders, TEACHER, {}, [], published=False, command="python -m scripts.compare <this>")
    patch.undo()
    return folder / "report.html"


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert not re.findall(r"https?://|@import|url\(", text)
    sources = re.findall(r'(?:src|href)="(.{5})', text)
    assert set(sources) == {"data:"} and "<this>" not in text and "&lt;this&gt;" in text


def test_the_page_in_a_browser(page, window):
    """Sorted by a click, pictures loaded, nothing wider than a phone, no error on the console."""
    window.get(page.as_uri())
    head = "document.querySelectorAll('table')[0].tHead.rows[0].cells"
    column = "return [...document.querySelectorAll('table')[0].tBodies[0].rows].map(row => row.cells[{}].textContent)"
    assert window.execute_script(column.format(0)) == ["none", "kd", "cwd", "teacher"]
    for expected, order in ((["none", "kd", "cwd", "teacher"], "ascending"), (["teacher", "cwd", "kd", "none"], "descending")):
        window.execute_script(f"{head}[2].firstChild.click()")
        assert window.execute_script(column.format(0)) == expected
        assert window.execute_script(f"return {head}[2].getAttribute('aria-sort')") == order
    window.execute_script(f"{head}[3].firstChild.click()")
    assert window.execute_script(column.format(3)) == ["0.72", "1.00", "1.11", "-"], "numbers by value, what is missing last"
    assert window.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth > 1000)") == [True]
    assert window.execute_script("return document.querySelectorAll('svg').length") == 3
    check_page(window)
