"""The comparison: arms and budgets as they are written, what is refused, pairing, tuning, jobs that fail, stop and go on."""

import hashlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset import get_spec, shapes
from scripts import compare
from scripts.compare import Arm, Budget, Job, Plan, check, draws, grouped, job, keep, parse_arm, run_jobs, rungs, settings
from tests.paths import REPOSITORY
from tests.workers import TIMEOUT, save_model, start, train
from utils import engine, session
from utils.options import train_options
from utils.run import StopSignal

SMALL = ("--student-backbone", "mobilenetv2", "--student-head-width", "8", "--crop-size", "32", "--batch-size", "2", "--device", "cpu",
         "--workers", "0")  # fmt: skip


def plan(*methods, seeds=(0, 1), budget="iterations:10", teacher="teacher.pth", flags=SMALL, **others) -> Plan:
    who = {"path": str(teacher), "sha256": "a" * 64}
    return Plan("shapes", None, who, tuple(map(parse_arm, methods)), tuple(seeds), Budget.parse(budget), tuple(flags), 1, **others)


def options_of(candidate: Job):
    script, *arguments = candidate.arguments
    return train_options(arguments, distil=script == "train_kd.py", description="")


# ---------------------------------------------------------------------------------------------------------------- arms, budgets


def test_arms():
    assert parse_arm("none") == Arm("none", (), {}, 0)
    assert parse_arm("kd+cwd:lr=0.1,--cwd_logits_weight=5,seed-offset=100") == Arm(
        "kd+cwd:lr=0.1,--cwd_logits_weight=5,seed-offset=100", ("kd", "cwd"), {"lr": "0.1", "cwd-logits-weight": "5"}, 100
    )
    assert re.fullmatch(r"[\w.+=-]+", parse_arm("kd+cwd:crop-size=32 64,lr=1e-6").folder)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("nothing", "--methods nothing: there is no method 'nothing'; possible: none, "),
        ("kd+", "--methods kd+: there is no method ''"),
        ("kd:lr", "--methods kd:lr: 'lr' has no value; write kd:flag=value, for a switch kd:flag="),
        ("kd:teacher-model=a.b:c", "--methods kd:teacher-model=a.b:c: teacher-model is the same for all arms; give it after --"),
        ("kd:max-iterations=5", "--methods kd:max-iterations=5: max-iterations is the comparison's to set, the same for all arms"),
        ("none:seed-offset=x", "--methods none:seed-offset=x: seed-offset 'x' is no number"),
    ],
)
def test_arms_that_are_refused(token, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_arm(token)


def test_budgets():
    assert Budget.parse("iterations:40").flags(4) == ["--max-iterations", "40"]
    assert Budget.parse("minutes:1.5").flags(4) == ["--max-minutes", "1.5"]
    assert Budget.parse("gpu-seconds:240").flags(4) == ["--max-minutes", "1"], "240 seconds of 4 devices are a minute"
    assert str(Budget.parse("minutes:30") * 0.5) == "minutes:15"
    for text in ("40", "minutes", "hours:1", "minutes:0", "minutes:-1", "minutes:inf", "minutes:nan", "iterations:x"):
        with pytest.raises(ValueError, match="give iterations:N, minutes:M or gpu-seconds:S"):
            Budget.parse(text)


# ----------------------------------------------------------------------------------------------------------------------- flags


def test_flags_go_where_they_belong():
    flags = ("--lr", "0.5", "--kd-temperature=4", "--no-kd-mask-ignored", "--dist-timeout", "77", "--teacher-normalization", "imagenet")
    both = plan("none:lr=0.25", "kd", "cwd", flags=[*SMALL, *flags])
    none, kd, cwd = (options_of(job(both, arm, 3, Path("x"), both.budget)) for arm in both.arms)
    assert (none.lr, kd.lr, cwd.lr) == (0.25, 0.5, 0.5), "an arm's own flag wins"
    assert kd.methods["kd"].temperature == 4 and not kd.methods["kd"].mask_ignored and list(cwd.methods) == ["cwd"]
    assert none.dist_timeout == kd.dist_timeout == 77, "not a flag of the method dist"
    assert kd.teacher_normalization == "imagenet" and not hasattr(none, "teacher_normalization")
    assert none.seed == kd.seed == 3 and none.max_iterations == 10 and none.resume
    assert options_of(job(both, parse_arm("none:seed-offset=100"), 3, Path("x"), both.budget)).seed == 103


def test_grouped():
    assert grouped(["--lr", "1", "--ema=0.9", "--crop_size", "32", "64", "--resume"]) == [
        ["--lr", "1"], ["--ema", "0.9"], ["--crop-size", "32", "64"], ["--resume"]]  # fmt: skip
    with pytest.raises(ValueError, match="'lr' after --: give options of train_kd.py"):
        grouped(["lr", "1"])


@pytest.mark.parametrize(
    ("arm", "flags", "message"),
    [
        ("kd", ["--learnrate", "1"], "kd, seed 0: unknown option --learnrate; --method kd --help lists all"),
        ("none", ["--kd-temperature", "1", "--lr", "x"], "none, seed 0: argument --lr: invalid float value: 'x'"),
        ("kd:cwd-logits-weight=1", [], "kd:cwd-logits-weight=1, seed 0: --cwd-logits-weight belongs to cwd"),
        ("afdcd:afdcd-mask=none", ["--afdcd-mask-ratio", "0.5"], "afdcd:afdcd-mask=none, seed 0: --afdcd-mask-ratio 0.5: belongs to --afdcd-mask "
         "random, --afdcd-mask is none; add it, or drop the flag; a flag for some arms stands in them, ARM:flag=value"),
        ("none", ["--aux-weight", "0.1"], "none, seed 0: --aux-weight 0.1: deeplabv3 has no auxiliary head"),
    ],
)
def test_every_command_is_checked_before_anything_starts(arm, flags, message):
    refused = plan(arm, flags=[*SMALL, *flags])
    with pytest.raises(ValueError) as error:
        check([job(refused, refused.arms[0], 0, Path("x"), refused.budget)])
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "flags", "message"),
    [
        (["--methods", "kd", "--dataset", "voc"], [],
         "--teacher-checkpoint is missing: the methods distil from it; give one, or train runs/voc/deeplabv3-resnet18/student_best.pth with "),
        (["--methods", "kd", "--teacher-checkpoint", "no.pth"], [], "--teacher-checkpoint no.pth: no such file"),
        (["--methods", "none"], ["--seed", "1", "--no-resume"], "--seed, --no-resume after --: the comparison sets it itself"),
        (["--methods", "none", "--jobs", "0"], [], "--jobs 0: must be at least 1"),
        (["--methods", "none", "--seeds", "0", "-1"], [], "--seeds -1: must be at least 0"),
        (["--methods", "none", "--budget", "epochs:3"], [], "budget 'epochs:3'"),
        (["--methods", "none", "--seeds", "0", "1", "0"], [], "--seeds 0 1 0: names one twice"),
        (["--methods", "none", "none"], [], "--methods none none: names one twice"),
        (["--methods", "none", "--trials", "3"], [], "--trials 3: belongs to --tune; add it, or drop the flag"),
        (["--methods", "none", "--tune-budget", "iterations:3"], [], "--tune-budget iterations:3: belongs to --tune"),
        (["--methods", "none", "--search", "random"], [], "--search random: belongs to --tune"),
        (["--methods", "none", "--tune", "lr", "--trials", "0"], [], "--trials 0: must be at least 1"),
        (["--methods", "none", "--tune", "lr", "--launcher", "slurm"], [], "--launcher slurm: --tune chooses later trainings by earlier ones"),
    ],
)
def test_plans_that_are_refused(arguments, flags, message):
    options = compare.build_parser().parse_args([*arguments, "--output", "out"])
    with pytest.raises(ValueError, match=re.escape(message)):
        compare.plan_of(options, flags)


def test_a_trial_that_cannot_be_is_refused_before_anything_is_kept(tmp_path):
    """The shortest trials of successive halving have an eighth of the budget, less than the warm-up."""
    given = ["--methods", "none", "--tune", "lr", "--trials", "16", "--search", "halving", "--budget", "iterations:400",
             "--output", str(tmp_path / "out")]  # fmt: skip
    with pytest.raises(ValueError, match="none, trials of iterations:50: --warmup-iterations 150: must be at most --max-iterations, 50; "):
        compare.compare(compare.build_parser().parse_args(given), [*SMALL, "--warmup-iterations", "150"])
    assert not (tmp_path / "out").exists()


def test_defaults_are_the_paths_of_the_launchers(tmp_path, monkeypatch):
    """The command of the README needs neither --output nor --teacher-checkpoint after scripts/train_baseline.sh."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "teacher.pth", 1)
    place = tmp_path / "runs" / "shapes" / "deeplabv3-resnet18"
    place.mkdir(parents=True)
    (tmp_path / "teacher.pth").rename(place / "student_best.pth")
    seen = []
    monkeypatch.setattr(compare, "work", lambda plan, folder, *_: seen.append((plan, folder)) or 0)
    assert compare.compare(compare.build_parser().parse_args([]), [*SMALL]) == 0
    made, folder = seen[0]
    assert folder == tmp_path / "runs" / "shapes" / "compare" and made.teacher["path"] == str(place / "student_best.pth")
    assert [arm.name for arm in made.arms] == ["none", "kd", "cwd", "cirkd", "afdcd"] and made.seeds == (0, 1, 2)
    for launcher in ("train_baseline.sh", "compare.sh"):
        text = (REPOSITORY / "scripts" / launcher).read_text()
        assert "runs/$DATASET/deeplabv3-resnet18/student_best.pth" in text or "runs/$DATASET/$MODEL-$BACKBONE" in text


def test_selection_never_sees_the_reported_split():
    """Cityscapes selects and reports on val: training pictures are held out for the selection, in no trial twice."""
    def made(*arguments, flags=()):
        return compare.plan_of(compare.build_parser().parse_args(["--methods", "none", "--data", "/data", *arguments]), [*SMALL, *flags])

    citys = made("--dataset", "citys", "--tune", "lr")
    final = options_of(job(citys, citys.arms[0], 0, Path("x"), citys.budget))
    assert (final.spec.train_split, final.spec.select_split, final.spec.report_split) == ("train-kept", "train-held-out", "val")
    trial = options_of(job(citys, citys.arms[0], 0, Path("x"), citys.budget, {"holdout": "0.2"}))
    assert (trial.spec.train_split, trial.spec.select_split, trial.spec.report_split) == ("train-kept", "train-held-out", "train-held-out")
    assert trial.spec.splits["train-held-out"].share == 0.2
    asked = made("--dataset", "citys", flags=("--select-holdout", "0"))
    asked = options_of(job(asked, asked.arms[0], 0, Path("x"), asked.budget))
    assert (asked.spec.train_split, asked.spec.select_split, asked.spec.report_split) == ("train", "val", "val")
    camvid = options_of(job(made("--dataset", "camvid"), Arm("none", ()), 0, Path("x"), citys.budget))
    assert (camvid.spec.train_split, camvid.spec.select_split, camvid.spec.report_split) == ("train", "val", "test")


def test_a_plan_takes_more_arms_and_seeds_and_nothing_else(tmp_path):
    first = keep(plan("none", "kd"), tmp_path)
    assert Plan.of(json.loads((tmp_path / "plan.json").read_text())).plain() == first.plain()
    more = keep(plan("cwd", "none", seeds=(5, 0), teacher="moved/teacher.pth"), tmp_path)
    assert [arm.name for arm in more.arms] == ["none", "kd", "cwd"] and more.seeds == (0, 1, 5)
    for other in (plan("none", budget="iterations:11"), plan("none", flags=[*SMALL, "--lr", "1"]), plan("none", tune=("lr",), trials=2)):
        with pytest.raises(ValueError, match="holds another comparison .*choose another folder"):
            keep(other, tmp_path)
    stranger = Plan.of(plan("none").plain() | {"teacher": {"path": "teacher.pth", "sha256": "b" * 64}})
    with pytest.raises(ValueError, match=f"teacher is {'b' * 64}, was {'a' * 64}"):
        keep(stranger, tmp_path)


def test_a_baseline_alone_may_get_a_teacher_later(tmp_path):
    keep(Plan.of(plan("none").plain() | {"teacher": None}), tmp_path)
    assert keep(plan("none", "kd"), tmp_path).teacher["sha256"] == "a" * 64
    assert keep(Plan.of(plan("none").plain() | {"teacher": None}), tmp_path).teacher["sha256"] == "a" * 64


# --------------------------------------------------------------------------------------------------------------------- pairing


def digest(*tensors) -> str:
    return hashlib.sha256(b"".join(t.detach().contiguous().cpu().numpy().tobytes() for t in tensors)).hexdigest()


def test_arms_of_a_seed_begin_alike(tmp_path, monkeypatch):
    """Initial student and first batches by their hashes: equal for all arms of a seed, other ones with another seed."""
    save_model(tmp_path / "teacher.pth", 1)
    monkeypatch.setitem(shapes.COUNTS, "train", 12)
    seen = []

    def fit(training, teacher, loader, run, validate, stop):
        batches = iter(loader)
        parts = [tensor for _ in range(8) for batch in [next(batches)] for tensor in (batch.image, batch.target)]  # over an epoch's end
        seen.append((digest(*training.distiller.student.state_dict().values()), digest(*parts)))
        return False

    monkeypatch.setattr(session, "fit", fit)
    several = plan("none", "kd", "cirkd", "afdcd", "none:lr=0.5", teacher=tmp_path / "teacher.pth")
    for seed in (0, 1):
        for arm in several.arms:
            session.train(options_of(job(several, arm, seed, tmp_path / arm.folder / str(seed), several.budget)), torch.device("cpu"))
    assert len(set(seen[:5])) == len(set(seen[5:])) == 1 and not set(seen[0]) & set(seen[5])


# --------------------------------------------------------------------------------------------------------------------- holding out


def test_held_out_pictures(monkeypatch):
    whole = [item.name for item in get_spec("shapes").find(None, "train")[0]]
    spec = get_spec("shapes").hold_out(0.2)
    kept, held = ([item.name for item in spec.find(None, split)[0]] for split in (spec.train_split, spec.select_split))
    assert spec.select_split == spec.report_split and len(held) == round(0.2 * len(whole)) and sorted(kept + held) == whole
    assert kept == sorted(kept) and held == sorted(held), "in the list's order"
    assert held != whole[: len(held)] and held != whole[-len(held) :], "drawn, not cut off"
    assert [item.name for item in get_spec("shapes").hold_out(0.2).find(None, spec.select_split)[0]] == held
    assert [item.name for item in spec.find(None, "test")[0]] == [item.name for item in get_spec("shapes").find(None, "test")[0]]
    for share, count in ((1e-6, 1), (0.999999, len(whole) - 1)):
        assert len(get_spec("shapes").hold_out(share).find(None, "train-held-out")[0]) == count
    monkeypatch.setitem(shapes.COUNTS, "train", 1)
    assert "1 training pictures, none can be held out" in spec.find(None, "train-held-out")[1][0]


def few_pictures():
    shapes.COUNTS.update(train=10)


def test_a_training_reports_on_what_it_held_out(tmp_path):
    """And what it has cost."""
    started = train(tmp_path, "--save-dir", "run", "--max-iterations", "7", "--val-interval", "7", "--holdout", "0.3", "--workers", "0",
                    change=few_pictures)  # fmt: skip
    assert started.wait() == [0], started.text
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["split"], report["selected_on"], report["holdout"]) == ("train-held-out", "train-held-out", 0.3)
    assert report["last"]["images"] == 3 and "validation on train-held-out" in started.text
    cost = report["cost"]
    assert cost["timed_steps"] == 2 and cost["seconds_per_step"] == pytest.approx(report["seconds"] / 2)
    assert cost["extra_parameters"] == cost["teacher_macs"] == 0 and cost["parameters"] > 1e6 and cost["macs"] > 1e6
    assert cost["peak_memory"] > 100 << 20 and cost["peak_memory_of"] == "one process (ru_maxrss)"


def test_memory_on_a_cpu_is_that_of_the_steps(monkeypatch):
    """A validation on whole pictures may need more than any step, and the peak of a process cannot be reset; a GPU's can."""
    peaks = iter([5, 9, 9])
    monkeypatch.setattr(engine, "peak_memory", lambda device: next(peaks))
    training = SimpleNamespace(budget=SimpleNamespace(pause=lambda: None), device=torch.device("cpu"), scores=None, peak_memory=3)
    engine.Training.pause(training)
    training.scores = object()
    engine.Training.pause(training)
    assert training.peak_memory == 5
    training.device = torch.device("cuda")
    engine.Training.pause(training)
    assert training.peak_memory == 9


# ---------------------------------------------------------------------------------------------------------------------- tuning


def test_all_arms_get_the_same_draws():
    tuned = plan("none", "kd", tune=("lr", "weight-decay", "weight"), trials=200)
    factors = draws(tuned)
    assert factors == draws(plan("afdcd", tune=("lr", "weight-decay", "weight"), trials=200)) and len(factors) == 200
    assert factors[0] == {"lr": 1, "weight-decay": 1, "weight": 1}
    for name, reach in (("lr", 4), ("weight-decay", 10), ("weight", 8)):
        logs = np.log([f[name] for f in factors[1:]]) / np.log(reach)
        assert -1 <= logs.min() < -0.9 and 0.9 < logs.max() <= 1 and abs(logs.mean()) < 0.12, "log-uniform"


def test_settings_are_the_recipes_times_the_factors():
    tuned = plan("none", "cirkd", "kd:lr=0.4", flags=[*SMALL, "--kd-weight", "3"])
    none, cirkd, kd = tuned.arms
    assert settings(tuned, cirkd, {"lr": 1.0, "weight": 1.0}) == {}, "the first trial is the recipe itself"
    recipe = options_of(job(tuned, none, 0, Path("x"), tuned.budget))
    assert settings(tuned, none, {"lr": 2.0, "weight-decay": 0.5, "weight": 4.0}) == {
        "lr": f"{2 * recipe.lr:.4g}", "weight-decay": f"{recipe.weight_decay / 2:.4g}"}  # fmt: skip
    assert settings(tuned, kd, {"lr": 2.0, "weight": 2.0}) == {"lr": "0.8", "kd-weight": "6"}
    found = settings(tuned, cirkd, {"weight": 2.0})
    own = options_of(job(tuned, cirkd, 0, Path("x"), tuned.budget)).methods["cirkd"]
    assert len(found) > 1 and all(
        float(value) == pytest.approx(2 * getattr(own, name.removeprefix("cirkd-").replace("-", "_")), rel=1e-3) for name, value in found.items()
    )


def test_rounds_of_a_search():
    assert rungs(plan("none", tune=("lr",), trials=12)) == [(12, Budget("iterations", 10))]
    halving = rungs(plan("none", tune=("lr",), trials=12, search="halving", tune_budget=Budget("iterations", 400)))
    assert [(count, budget.amount) for count, budget in halving] == [(12, 100), (6, 200), (3, 400)]


@pytest.mark.parametrize("search", ["random", "halving"])
def test_the_best_held_out_trial_wins(tmp_path, monkeypatch, search):
    """A training is as good as its learning rate is near 0.01, and diverges above 0.03: every arm finds the nearest of its own draws."""
    def run(jobs, slots, processes, stop):
        for candidate in jobs:
            options = options_of(candidate)
            assert options.holdout == compare.TUNING_SHARE and options.seed == compare.TUNING_SEED
            candidate.folder.mkdir(parents=True, exist_ok=True)
            if options.lr < 0.03:
                (candidate.folder / "DONE").touch()
                score = -abs(np.log(options.lr / 0.01))
                (candidate.folder / "report.json").write_text(json.dumps({"last": {"miou": score}}))
        return [candidate for candidate in jobs if not candidate.done]

    monkeypatch.setattr(compare, "run_jobs", run)
    tuned = plan("none", "kd:lr=0.02", flags=[*SMALL, "--lr", "0.016"], tune=("lr", "weight"), trials=12, search=search)
    with StopSignal() as stop:
        best, rows, failed = compare.tune(tuned, tmp_path, 1, stop)
    for name, rate in (("none", 0.016), ("kd:lr=0.02", 0.02)):
        rates = [rate * factors["lr"] for factors in draws(tuned)]
        nearest = min(rates, key=lambda value: abs(np.log(value / 0.01)))
        assert float(best[name].get("lr", rate)) == pytest.approx(nearest, rel=1e-3)
        count = sum(number for number, _ in rungs(tuned))
        assert len([row for row in rows if row["arm"] == name]) == count, "as many trials for all"
    assert failed and all(row["miou"] is None and row["failure"] for row in rows if row["trial"] in (
        int(re.search(r"trial(\d+)", str(candidate.folder)).group(1)) for candidate in failed if candidate.name.startswith(row["arm"] + ",")))


# ------------------------------------------------------------------------------------------------------------------------ jobs


FAKE = """
import json, os, pathlib, signal, sys, time
folder, how = pathlib.Path(sys.argv[1]), sys.argv[2]
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "starts", "a") as file:
    file.write("start\\n")
def stop(number, frame):
    with open(folder / "signals", "a") as file:
        file.write(f"{number}\\n")
signal.signal(signal.SIGTERM, stop)
if how == "fail" and not (folder / "mended").exists():
    print("step 3  loss 2")
    print("error: step 4: not finite: total")
    print("bye")
    sys.exit(2)
if how == "kill":
    print("step 9  loss 2", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if how == "slow":
    (folder / "begun").touch()
    while not (folder / "signals").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    sys.exit(143)
(folder / "report.json").write_text(json.dumps({"last": {"miou": 50.0}}))
(folder / "DONE").touch()
"""


@pytest.fixture
def fake(tmp_path):
    """(name, how) -> Job of a training that does nothing."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    return lambda name, how="good": Job(name, tmp_path / "runs" / name, (str(script), str(tmp_path / "runs" / name), how))


def test_a_failure_is_shown_and_stops_nothing_else(fake, capfd):
    jobs = [fake("a"), fake("b", "fail"), fake("c"), fake("d")]
    with StopSignal() as stop:
        assert run_jobs(jobs, 2, 1, stop) == [jobs[1]]
        assert "b: failed: error: step 4: not finite: total" in capfd.readouterr().out
        assert [candidate.done for candidate in jobs] == [True, False, True, True]
        (jobs[1].folder / "mended").touch()
        assert run_jobs(jobs, 2, 1, stop) == []
    assert "3 of 4 trainings are done already" in capfd.readouterr().out
    assert [(candidate.folder / "starts").read_text().count("start") for candidate in jobs] == [1, 2, 1, 1]


def test_the_failure_of_several_processes_is_the_first_ones(tmp_path):
    """torchrun's own report comes last, and the other ranks say that one has gone."""
    failed = Job("a", tmp_path / "a", ())
    torchrun = "  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html\n====\n"
    lost = "[rank 1] error: another rank stopped or hangs; its own message says why (Connection reset)\n"
    for text, why in (
        (f"step 1\nerror: no data\n{lost}{torchrun}", "error: no data"), (f"{lost}[rank 2] error: no room\n{torchrun}", "[rank 2] error: no room"),
        (lost + torchrun, lost.strip()),
        (f"error: Traceback (most recent call last):\n  File\n    x = y\n    ~~^~~\ntorch.OutOfMemoryError: no room\n{torchrun}",
         "torch.OutOfMemoryError: no room"),
        (f"RuntimeError: odd\n{'x' * 9}\n", "RuntimeError: odd"),
        ("train_kd.py: error: no\n", "train_kd.py: error: no"),
        ("done\nbye\n", "bye"), ("", "wrote nothing"),
    ):  # fmt: skip
        failed.log.write_text(compare.START + text)
        assert failed.failure() == why


def test_a_killed_training_is_said_to_be_killed(fake, capfd):
    """Also where an attempt before it has written an error, which is not the reason any more."""
    killed = fake("a", "fail")
    with StopSignal() as stop:
        run_jobs([killed], 1, 1, stop)
        killed = Job(killed.name, killed.folder, (*killed.arguments[:2], "kill"))
        assert run_jobs([killed], 1, 1, stop) == [killed]
    assert "a: failed: error: ended by SIGKILL; of a lack of memory if nobody sent it" in capfd.readouterr().out
    assert killed.log.read_text().count("not finite: total") == 1 and "SIGKILL" in killed.failure()


def test_a_signal_stops_the_trainings_once_and_starts_no_more(fake):
    jobs = [fake("a", "slow"), fake("b", "slow"), fake("c")]

    def interrupt():
        while not all((candidate.folder / "begun").exists() for candidate in jobs[:2]):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    with StopSignal() as stop:
        thread.start()
        assert run_jobs(jobs, 2, 1, stop) == [], "stopped is not failed"
        thread.join()
        assert stop.received
    assert [(candidate.folder / "signals").read_text() for candidate in jobs[:2]] == [f"{int(signal.SIGTERM)}\n"] * 2
    assert not jobs[2].folder.exists()


def hold(path: Path, seconds: float) -> subprocess.Popen:
    """Another process that holds a file's lock for some time, once this returns."""
    code = ("import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); "
            "time.sleep(float(sys.argv[2]))")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", code, str(path), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_training_that_is_still_saving_is_waited_for(fake):
    orphaned, other = fake("a"), fake("b")
    process = hold(orphaned.folder / ".lock", 2)
    with StopSignal() as stop:
        assert run_jobs([orphaned, other], 1, 1, stop) == []
    assert process.poll() == 0 and orphaned.done
    assert (other.folder / "DONE").stat().st_mtime < (orphaned.folder / "DONE").stat().st_mtime


def test_one_comparison_per_folder(tmp_path):
    process = hold(tmp_path / ".lock", 60)
    with pytest.raises(ValueError, match="another comparison is at work here; wait until it ends, or choose another folder"), compare.alone(tmp_path):
        pass
    process.kill()
    process.wait()
    with compare.alone(tmp_path):
        pass


def test_processes_share_the_machine(fake, monkeypatch):
    asked = []
    monkeypatch.setattr(compare.subprocess, "Popen", lambda command, **others: asked.append((command, others["env"])))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    compare.start(fake("a"), 1, 2, 2)
    command, environment = asked[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    compare.start(fake("b"), 1, 2, 3)
    assert asked[1][1]["OMP_NUM_THREADS"] == "2", "12 cores that may be used, 2 trainings of 3 processes"
    assert environment["CUDA_VISIBLE_DEVICES"] == "6,7" and command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize("own", [None, "", "45"])
def test_trainings_have_the_launchers_time_for_a_save(own, fake, monkeypatch):
    name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    asked = []
    monkeypatch.setattr(compare.subprocess, "Popen", lambda command, **others: asked.append(others["env"]))
    monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(name, own)
    compare.start(fake("a"), 0, 1, 2)
    assert asked[0][name] == (own or "600") and os.environ.get(name) == own


def test_slurm_script(fake, tmp_path, monkeypatch, capsys):
    """One task per training that is not done, in the folder in which the comparison was asked for."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text('#!/bin/sh\necho "Submitted batch job 7"\n')
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    jobs = [fake("a"), fake("b", "fail"), fake("c")]
    with StopSignal() as stop:
        run_jobs(jobs[:1], 1, 1, stop)
    with pytest.raises(ValueError, match="there is no sbatch on this machine; submit .*slurm.sh"):
        monkeypatch.setenv("PATH", str(tmp_path))
        compare.submit(jobs, tmp_path, 2)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    compare.submit(jobs, tmp_path, 2)
    assert "Submitted batch job 7\n2 trainings submitted" in capsys.readouterr().out
    script = (tmp_path / "slurm.sh").read_text()
    assert "#SBATCH --array=0-1\n#SBATCH --gpus=2\n" in script and '--run-job "$SLURM_ARRAY_TASK_ID"' in script
    assert subprocess.run(["bash", "-n", str(tmp_path / "slurm.sh")]).returncode == 0
    keep(plan("none"), tmp_path)
    here = os.getcwd()
    try:
        assert compare.run_submitted(tmp_path, 0) == 1 and compare.run_submitted(tmp_path, 1) == 0
    finally:
        os.chdir(here)
    assert jobs[2].done and not jobs[1].done
    with pytest.raises(ValueError, match="--run-job 2: .*jobs.json has no such job"):
        compare.run_submitted(tmp_path, 2)


# -------------------------------------------------------------------------------------------------------------- the whole command


def test_launcher_of_the_shell(tmp_path):
    """scripts/compare.sh asks for what its variables say; flags of the caller follow, those of the trainings behind --."""
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    stub.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(stub), "METHODS": "none kd+cwd", "SEEDS": "4 5", "DATASET": "camvid", "DATA": "/data"}
    given = ["bash", str(REPOSITORY / "scripts" / "compare.sh"), "--jobs", "2", "--", "--amp", "bf16"]
    done = subprocess.run(given, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arguments = done.stdout.splitlines()
    assert arguments[:2] == ["-m", "scripts.compare"] and arguments[-3:] == ["--", "--amp", "bf16"]
    options = compare.build_parser().parse_args(arguments[2:-3])
    assert (options.methods, options.seeds, options.dataset, options.data, options.jobs) == (["none", "kd+cwd"], [4, 5], "camvid", "/data", 2)
    assert options.teacher_checkpoint == "runs/camvid/deeplabv3-resnet18/student_best.pth" and str(options.output) == "runs/camvid/compare"


TEACHER = ("--teacher-checkpoint", "teacher.pth")


class Forked:
    """A training in a fork of the comparison, with the face of subprocess.Popen: nothing is imported a second time."""

    def __init__(self, command, *, stdout, preexec_fn=lambda: None, **_):
        self.returncode = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(command[1:], stdout, preexec_fn)

    def _run(self, arguments, stdout, preexec_fn):
        code = 1
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            preexec_fn()
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def terminate(self):
        os.kill(self.pid, signal.SIGTERM)


def run_forked(command, **_) -> SimpleNamespace:
    """subprocess.run, as far as the evaluation of the teacher needs it."""
    with tempfile.TemporaryFile("w+") as console:
        process = Forked(command, stdout=console)
        while process.poll() is None:
            time.sleep(0.01)
        console.seek(0)
        return SimpleNamespace(returncode=process.returncode, stdout=console.read(), stderr="")


def run_comparison(folder: Path, arguments: list[str], pictures: dict[str, int]) -> None:
    """In a process of its own: the command, in `folder`, with so many pictures in the drawn splits."""
    os.chdir(folder)
    shapes.COUNTS.update(pictures)
    session.count_macs = lambda *_: 12  # a second of every training, for what other tests look at
    compare.subprocess = SimpleNamespace(Popen=Forked, run=run_forked, DEVNULL=None, STDOUT=None)
    sys.argv = ["compare", *arguments]
    compare.main()


def begin(folder: Path, *arguments, flags=SMALL, train=24, test=4):
    """Start the comparison in folder/out, with folder/teacher.pth."""
    if not (folder / "teacher.pth").exists():
        save_model(folder / "teacher.pth", 1)
    full = [*TEACHER, *arguments, "--output", "out", "--", *flags]
    return start(partial(run_comparison, folder, full, {"train": train, "val": 2, "test": test}), folder / "console.txt")


def figures(folder: Path) -> dict:
    """results.json without what no two comparisons share (time, memory, places), with every step's loss and the last weights' hash."""
    content = json.loads((folder / "out" / "results.json").read_text())
    for run in content["runs"]:
        place = folder / "out" / "runs" / run["arm"] / f"seed{run['seed']}"
        rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        run["losses"] = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        run["weights"] = digest(*torch.load(place / "last.pth", weights_only=True)["student"].values())
        del run["seconds"], run["cost"], run["environment"], run["options"]
    for arm in content["arms"]:
        del arm["seconds"], arm["seconds_per_step"], arm["peak_memory"]
    del content["command"], content["date"], content["environments"], content["teacher"]["path"]
    return content


def test_a_teacher_that_is_built_elsewhere(tmp_path, monkeypatch):
    """It teaches every arm; what is not known of it, its score, is left out."""
    source = "from models import build_model\n\ndef build():\n    return build_model('pspnet', 'mobilenetv2', 8, head_width=8)\n"
    (tmp_path / "somebodys.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)  # forked trainings have this process's path
    flags = [*SMALL, "--teacher-model", "somebodys:build", "--teacher-layers", "head=head.fuse", "logits=head.classifier"]
    started = begin(tmp_path, "--methods", "none", "kd", "sp", "--seeds", "0", "--budget", "iterations:1", flags=flags)
    assert started.wait() == [0], started.text
    assert "the teacher is not scored: somebodys:build builds it, and eval.py scores networks of this project" in started.text
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["done"] for run in content["runs"]] == [True] * 3 and content["teacher"].keys() == {"path", "sha256"}
    assert "| teacher |" not in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(("budget", "arms", "seeds"), [("iterations:2", compare.ARMS, "012"), ("minutes:0.002", ["none", "cwd"], "0")])
def test_the_command_in_small(tmp_path, budget, arms, seeds):
    """Five arms, three seeds: all is trained once, by one command, and reported; the budget is kept, in steps and in time."""
    arguments = ("--methods", *arms, "--seeds", *seeds, "--budget", budget)
    started = begin(tmp_path, *arguments)
    assert started.wait() == [0], started.text
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(run["arm"], run["seed"]) for run in content["runs"]] == [(arm, int(seed)) for seed in seeds for arm in arms]
    assert all(run["done"] and run["images"] == 4 and run["split"] == "test" and run["selected_on"] == "val" for run in content["runs"])
    assert len(content["verdicts"]) == len(arms) - 1 + (len(arms) - 2) * ("kd" in arms)
    assert content["teacher"]["miou"] > 0 and content["networks"]["teacher"]["model"] == "pspnet"
    assert all(run["steps"] == 2 if budget == "iterations:2" else run["seconds"] >= 0.12 and run["steps"] >= 1 for run in content["runs"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/jpeg;base64," in page and page.count("<svg") == 3 and len(page) < 1 << 20
    before = figures(tmp_path)
    again = begin(tmp_path, *arguments)
    assert again.wait() == [0] and figures(tmp_path) == before
    assert f"{len(content['runs'])} of {len(content['runs'])} trainings are done already" in again.text


def test_a_comparison_that_is_killed_ends_with_the_same_figures(tmp_path):
    """kill -9 of the comparison in its first training, then of its second training alone, which the third one does not mind."""
    arguments = ("--methods", "none", "kd", "cwd", "--seeds", "0", "--budget", "iterations:9")
    flags = (*SMALL, "--log-interval", "1", "--save-interval", "1")
    (tmp_path / "whole").mkdir()
    assert begin(tmp_path / "whole", *arguments, flags=flags).wait() == [0]

    def killed_in(place: str, kill_training: bool):
        started, run = begin(tmp_path, *arguments, flags=flags), tmp_path / "out" / "runs" / place
        table, limit = run / "metrics.jsonl", time.monotonic() + TIMEOUT
        while not (table.exists() and len(table.read_text().splitlines()) >= 3):
            assert started.processes[0].is_alive() and time.monotonic() < limit, started.text
            time.sleep(0.005)
        if kill_training:
            os.kill(int(re.search(r"process (\d+)", (run / ".lock").read_text()).group(1)), signal.SIGKILL)
        else:
            started.stop(signal.SIGKILL)
        return started.wait(), started.text

    assert killed_in("none/seed0", False)[0] == [-signal.SIGKILL] and not (tmp_path / "out" / "results.json").exists()
    status, text = killed_in("kd/seed0", True)
    assert status == [1] and "kd, seed 0: failed: error: ended by SIGKILL" in text
    failed = [run for run in json.loads((tmp_path / "out" / "results.json").read_text())["runs"] if not run["done"]]
    assert [(run["arm"], run["seed"]) for run in failed] == [("kd", 0)] and "kd, seed 0: error: ended by SIGKILL" in (
        tmp_path / "out" / "report.md").read_text()  # fmt: skip
    last = begin(tmp_path, *arguments, flags=flags)
    assert last.wait() == [0] and "2 of 3 trainings are done already" in last.text
    assert "going on from step" in (tmp_path / "out" / "runs" / "kd" / "seed0.console.txt").read_text()
    found = figures(tmp_path)
    assert found == figures(tmp_path / "whole")
    assert [[step for step, _ in run["losses"]] for run in found["runs"]] == [[*range(1, 10)]] * 3
    assert len({run["weights"] for run in found["runs"]}) == 3, "what is compared does tell trainings apart"


GO = """
import runpy, sys
from dataset import shapes
shapes.COUNTS.update(train=24, val=4, test=8)
if sys.argv[1:2] == ["compare"]:
    from scripts import compare
    compare.interpreter = lambda processes: [sys.executable, __file__]
    del sys.argv[1]
    compare.main()
else:
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
@pytest.fixture
def command(tmp_path):
    """(*arguments) -> the started comparison, with 24, 4 and 8 pictures in the drawn splits, in a session of its own."""
    (tmp_path / "go.py").write_text(GO)
    save_model(tmp_path / "teacher.pth", 1)

    def begin_anew(*arguments, flags=SMALL, **variables):
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | variables
        full = [sys.executable, "go.py", "compare", *TEACHER, *arguments, "--output", "out", "--", *flags]
        with open(tmp_path / "console.txt", "a") as console:
            return subprocess.Popen(full, cwd=tmp_path, env=environment, stdout=console, stderr=subprocess.STDOUT, start_new_session=True)

    return begin_anew


def scores(folder: Path) -> list[str]:
    """results.csv without what no two runs share."""
    return [",".join(line.split(",")[:8]) for line in (folder / "out" / "results.csv").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["iterations:10", "minutes:0.05"])
def test_the_whole_command(command, tmp_path, budget):
    """Five arms, three seeds: everything is trained, and nothing a second time."""
    arguments = ("--methods", "none", "kd", "cwd", "cirkd", "afdcd", "--seeds", "0", "1", "2", "--budget", budget, "--jobs", "2")
    assert command(*arguments).wait(6000) == 0, (tmp_path / "console.txt").read_text()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["runs"]) == 15 and all(run["done"] for run in results["runs"])
    assert len(results["verdicts"]) == 4 + 3 and results["teacher"]["miou"] > 0
    if budget == "iterations:10":
        assert {run["steps"] for run in results["runs"]} == {10}
    else:
        assert all(3 <= run["seconds"] < 3 + 10 * run["cost"]["seconds_per_step"] for run in results["runs"]), "and the step that ends them"
        assert len({run["steps"] for run in results["runs"]}) > 1, "whoever is slow makes fewer steps"
    before = scores(tmp_path)
    assert command(*arguments).wait(600) == 0
    assert scores(tmp_path) == before and "15 of 15 trainings are done already" in (tmp_path / "console.txt").read_text()


@pytest.mark.slow
def test_other_seeds_decide_nothing_and_a_planted_worse_arm_is_found(tmp_path):
    """The student alone against itself with other seeds, and against one that hardly learns."""
    flags = ("--student-model", "fcn", "--student-backbone", "resnet18", "--student-head-width", "8", "--crop-size", "64", "--batch-size", "4",
             *SMALL[8:], "--optimizer", "adamw", "--lr", "0.002", "--val-interval", "80")  # fmt: skip
    arms = ("none", "none:seed-offset=100", "none:lr=1e-6")
    seeds = ("--seeds", "0", "1", "2", "3")
    started = begin(tmp_path, "--methods", *arms, *seeds, "--budget", "iterations:80", flags=flags, train=128, test=64)
    assert started.wait(6000) == [0], started.text
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    verdicts = {row["arm"]: row["text"] for row in content["verdicts"] if row["other"] == "none"}
    print(*verdicts.values(), *(f"{arm['arm']}: {arm['last']:.2f} +- {arm['last_sd']:.2f}" for arm in content["arms"]), sep="\n")
    assert content["arms"][0]["last"] > 11, "more than background alone (8.5): there is something to be better or worse than"
    assert verdicts[arms[1]].startswith("none:seed-offset=100 vs none: undecided (")
    assert verdicts[arms[2]].startswith("none:lr=1e-6 < none: -"), verdicts


@pytest.mark.slow
def test_a_comparison_that_is_killed_again_and_again_ends_with_the_same_scores(command, tmp_path):
    arguments = ("--methods", "none", "kd", "--seeds", "0", "1", "--budget", "iterations:12")
    flags = (*SMALL, "--save-interval", "1")
    assert command(*arguments, flags=flags).wait(3000) == 0, (tmp_path / "console.txt").read_text()
    expected = scores(tmp_path)
    (tmp_path / "out").rename(tmp_path / "whole")
    random = np.random.default_rng(0)
    for _ in range(4):
        process = command(*arguments, flags=flags)
        time.sleep(random.uniform(10, 40))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert command(*arguments, flags=flags).wait(3000) == 0, (tmp_path / "console.txt").read_text()
    assert scores(tmp_path) == expected


@pytest.mark.slow
def test_slurm_from_end_to_end(command, tmp_path):
    """A stand-in for sbatch runs the tasks of the script one after the other; the command then writes the report."""
    (tmp_path / "sbatch").write_text('#!/bin/sh\nfor task in 0 1; do SLURM_ARRAY_TASK_ID=$task bash "$1" || exit; done\n')
    (tmp_path / "sbatch").chmod(0o755)
    arguments = ("--methods", "none", "--seeds", "0", "1", "--budget", "iterations:2", "--launcher", "slurm")
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert command(*arguments, PATH=path).wait(1500) == 0, (tmp_path / "console.txt").read_text()
    assert command(*arguments, PATH=path).wait(600) == 0
    assert len(scores(tmp_path)) == 3 and (tmp_path / "out" / "report.html").exists()
