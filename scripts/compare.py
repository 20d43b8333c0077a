"""Compare distillation methods at equal budget, equal tuning and equal seeds.

    python -m scripts.compare --dataset shapes --teacher-checkpoint runs/teacher/student_best.pth --methods none kd cwd cirkd afdcd \\
        --seeds 0 1 2 --budget iterations:200 --output runs/compare -- --student-backbone mobilenetv2 --lr 0.002 --optimizer adamw

Every arm trains with every seed on the same pictures in the same order, from the same initial student. Flags after `--` go to every
training, a method's flags to the arms with that method. The same command goes on with an interrupted comparison, and may add arms and
seeds. Writes report.md, report.html, results.csv and results.json to --output; runs are in its folder runs, trials in tuning.

An arm is METHOD[+METHOD ...][:flag=value,...]; `none` is the student alone:  kd+cwd   cwd:cwd-logits-weight=5   none:lr=0.001
`seed-offset=100` gives an arm other seeds than the rest. A teacher that a function of yours builds is compared with, too:
--teacher-checkpoint FILE before --, --teacher-model PACKAGE.MODULE:FUNCTION and --teacher-layers after it.

With --tune every arm, the student alone too, first gets --trials trainings with settings around its recipe's, scored on training
pictures that are held out; the arm's best settings are those of its final trainings.

Nothing is ever selected on the reported split: where a data set selects and reports on one (Cityscapes, VOC), every training holds out a
twentieth of its pictures for the selection. --select-holdout 0 after -- selects as published code does, and the report says so.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import fcntl
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from dataset import get_spec
from dataset.parallel import cores
from losses import METHODS
from scripts.compare_report import write_report
from utils import checkpoint, distributed
from utils.files import read_json
from utils.log import harmless
from utils.options import train_options
from utils.run import StopSignal, write_text
from utils.session import build_student

ROOT = Path(__file__).resolve().parent.parent
RANGES = {"lr": 4.0, "weight-decay": 10.0, "weight": 8.0}  # a trial's value is the recipe's times a factor in [1/range, range]
TUNING_SEED = 1000  # of the trials: none of the final runs' own
TUNING_SHARE = 0.2  # of the training pictures, held out for the trials
SELECT_SHARE = 0.05  # of the training pictures, held out for the best checkpoint of a data set that has no split for it
METHOD_FLAGS = {method.flag(field.name): name for name, method in METHODS.items() for field in dataclasses.fields(method.Options)}
TUNING = {"trials": 12, "search": "random", "tune_budget": None}  # defaults of the options that belong to --tune
ARMS = ["none", "kd", "cwd", "cirkd", "afdcd"]
TEACHER = "runs/{}/deeplabv3-resnet18/student_best.pth"  # what scripts/train_baseline.sh trains by default
OWNED = (  # what a comparison sets itself, the same for all arms
    "seed", "save-dir", "resume", "method", "dataset", "data", "holdout", "teacher-checkpoint", "max-iterations", "max-minutes", "dry-run",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------------ arms


@dataclass(frozen=True)
class Arm:
    """One row of the comparison: the methods, () for the student alone, and flags of its own {"lr": "0.01"}."""

    name: str
    methods: tuple[str, ...]
    flags: dict[str, str] = field(default_factory=dict)
    seed_offset: int = 0

    @property
    def folder(self) -> str:
        """A file name."""
        return re.sub(r"[^\w.+=-]", "_", self.name)


def parse_arm(token: str) -> Arm:
    """METHOD[+METHOD ...][:flag=value,...]

    Raises:
        ValueError: a method is unknown, or a flag has no value.
    """
    names, _, settings = token.partition(":")
    methods = () if names == "none" else tuple(names.split("+"))
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"--methods {token}: there is no method {name!r}; possible: none, {', '.join(METHODS)}")
    flags = {}
    for setting in filter(None, settings.split(",")):
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--methods {token}: {setting!r} has no value; write {names}:flag=value, for a switch {names}:flag=")
        name = name.strip().lstrip("-").replace("_", "-")
        if name.startswith("teacher-") and name not in OWNED:
            raise ValueError(f"--methods {token}: {name} is the same for all arms; give it after --")
        if name in OWNED:
            raise ValueError(f"--methods {token}: {name} is the comparison's to set, the same for all arms; drop it")
        flags[name] = value.strip()
    offset = flags.pop("seed-offset", "0")
    if not offset.isdigit():
        raise ValueError(f"--methods {token}: seed-offset {offset!r} is no number; give for example 100")
    return Arm(token, methods, flags, int(offset))


@dataclass(frozen=True)
class Budget:
    """What every training may spend: `iterations`, `minutes` of training, or `gpu-seconds`, the same times the number of processes."""

    kind: str
    amount: float

    @classmethod
    def parse(cls, text: str) -> "Budget":
        kind, colon, amount = text.partition(":")
        try:
            value = float(amount)
        except ValueError:
            value = math.nan
        if kind not in ("iterations", "minutes", "gpu-seconds") or not colon or not 0 < value < math.inf:
            raise ValueError(f"budget {text!r}: give iterations:N, minutes:M or gpu-seconds:S")
        return cls(kind, value)

    def __str__(self) -> str:
        return f"{self.kind}:{self.amount:g}"

    def __mul__(self, factor: float) -> "Budget":
        return replace(self, amount=self.amount * factor)

    def flags(self, processes: int) -> list[str]:
        """Options of a training on this many processes."""
        if self.kind == "iterations":
            return ["--max-iterations", str(max(1, round(self.amount)))]
        minutes = self.amount if self.kind == "minutes" else self.amount / 60 / processes
        return ["--max-minutes", f"{minutes:.6g}"]


# ------------------------------------------------------------------------------------------------------------------------ plan


@dataclass(frozen=True)
class Plan:
    """A comparison: everything that its figures depend on. Kept as plan.json."""

    dataset: str
    data: str | None
    teacher: dict | None  # {"path", "sha256"}
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    budget: Budget
    flags: tuple[str, ...]  # for every training
    processes: int  # per training
    tune: tuple[str, ...] = ()
    trials: int = 0
    search: str = "random"
    tune_budget: Budget | None = None

    @property
    def ranges(self) -> dict[str, float]:
        return {name: RANGES[name] for name in self.tune}

    def plain(self) -> dict:
        return {
            "dataset": self.dataset, "data": self.data, "teacher": self.teacher, "methods": [arm.name for arm in self.arms],
            "seeds": list(self.seeds), "budget": str(self.budget), "flags": list(self.flags), "processes": self.processes,
            "tune": list(self.tune), "trials": self.trials, "search": self.search, "tune_budget": str(self.tune_budget or self.budget),
        }  # fmt: skip

    @classmethod
    def of(cls, plain: dict) -> "Plan":
        return cls(
            plain["dataset"], plain["data"], plain["teacher"], tuple(map(parse_arm, plain["methods"])), tuple(plain["seeds"]),
            Budget.parse(plain["budget"]), tuple(plain["flags"]), plain["processes"], tuple(plain["tune"]), plain["trials"],
            plain["search"], Budget.parse(plain["tune_budget"]),
        )  # fmt: skip


def keep(plan: Plan, folder: Path) -> Plan:
    """Write plan.json, or go on with the one in the folder: arms and seeds may be added, all else must be as it was.

    Returns the plan with the arms and seeds of both.

    Raises:
        ValueError: the folder holds another comparison.
    """
    path = folder / "plan.json"
    new = plan.plain()
    if path.exists():
        old = read_json(path)
        if not isinstance(old, dict) or not old.keys() >= new.keys():
            raise ValueError(f"{path}: no plan of a comparison; choose another --output")
        new["teacher"], old["teacher"] = (new["teacher"] or old["teacher"], old["teacher"] or new["teacher"])  # `none` needs none
        ours, theirs = ({**p, "teacher": (p["teacher"] or {}).get("sha256"), "data": None} for p in (new, old))
        differences = [f"{key} is {ours[key]}, was {theirs.get(key)}" for key in ours
                       if key not in ("methods", "seeds") and ours[key] != theirs.get(key)]  # fmt: skip
        if differences:
            raise ValueError(f"--output {folder}: holds another comparison ({'; '.join(differences)}); choose another folder")
        for key in ("methods", "seeds"):
            new[key] = old[key] + [value for value in new[key] if value not in old[key]]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(new, indent=1) + "\n")
    return Plan.of(new)


# ------------------------------------------------------------------------------------------------------------------------ jobs


OWN_ERROR = re.compile(r"(\[rank \d+\] |train_\w+\.py: )?error: ")  # as utils.session and utils.options write it
START = "---- a training starts here\n"  # in a console log, before each attempt


@dataclass(frozen=True)
class Job:
    """One training: its folder and its command line behind the interpreter."""

    name: str
    folder: Path
    arguments: tuple[str, ...]

    @property
    def done(self) -> bool:
        return (self.folder / "DONE").exists() and (self.folder / "report.json").exists()

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".console.txt")

    @property
    def busy(self) -> bool:
        """Whether a training of a comparison that was killed is still saving here."""
        return (self.folder / ".lock").exists() and locked(self.folder / ".lock")

    def report(self) -> dict:
        return read_json(self.folder / "report.json")

    def failure(self) -> str:
        """Why the last attempt has not ended well: the error that it wrote, else its last line."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        lines = text.rpartition(START)[2].strip().splitlines()
        nothing = "wrote nothing" if text else "never started"
        ours = [number for number, line in enumerate(lines) if OWN_ERROR.match(line)]
        causes = [number for number in ours if "another rank stopped" not in lines[number]]  # torchrun's report of the failure comes last
        if not causes and not ours:
            return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else nothing)
        number = (causes or ours)[-1]
        if lines[number].endswith("Traceback (most recent call last):"):  # the exception is below its frames, which are indented
            return next((line for line in lines[number + 1 :] if re.match(r"[A-Za-z_][\w.]*(: |$)", line)), lines[number])
        return lines[number]


def job(plan: Plan, arm: Arm, seed: int, folder: Path, budget: Budget, extra: dict[str, str] | None = None) -> Job:
    """The training of an arm with a seed. Flags: the plan's, then the arm's own, then `extra`; the last one given counts."""
    own = {**arm.flags, **(extra or {})}
    arguments = ["train_kd.py", "--method", *arm.methods, "--teacher-checkpoint", plan.teacher["path"]] if arm.methods else ["train_baseline.py"]
    arguments += ["--dataset", plan.dataset, *(["--data", plan.data] if plan.data else []), *budget.flags(plan.processes)]
    for flag, *values in grouped(plan.flags):
        if flag == "--select-holdout" and "holdout" in own:
            continue  # a trial selects on what it reports on
        method = METHOD_FLAGS.get(flag) or METHOD_FLAGS.get(flag.replace("--no-", "--", 1))
        fits = method in arm.methods if method else arm.methods or not flag.startswith("--teacher-")
        if fits and flag.removeprefix("--") not in own:
            arguments += [flag, *values]
    for name, value in own.items():
        arguments += [f"--{name}", *value.split()]
    arguments += ["--seed", str(seed + arm.seed_offset), "--save-dir", str(folder), "--resume"]
    return Job(f"{arm.name}, seed {seed}", folder, tuple(arguments))


def grouped(flags) -> list[list[str]]:
    """["--lr", "1", "--ema=0.9"] -> [["--lr", "1"], ["--ema", "0.9"]]"""
    groups: list[list[str]] = []
    for token in flags:
        if token.startswith("--"):
            name, equals, value = token.partition("=")
            groups.append([name.replace("_", "-"), value] if equals else [name.replace("_", "-")])
        elif groups:
            groups[-1].append(token)
        else:
            raise ValueError(f"{token!r} after --: give options of train_kd.py there, such as --lr 0.01")
    return groups


def check(jobs: list[Job]) -> None:
    """Parse every command line and build its student as the training would, before anything starts.

    Raises:
        ValueError: the training's own line of refusal.
    """
    seen = set()
    for candidate in jobs:
        script, *arguments = candidate.arguments
        key = tuple(arguments[: arguments.index("--seed")])
        if key not in seen:
            seen.add(key)
            refusal = io.StringIO()
            try:
                with contextlib.redirect_stderr(refusal), torch.device("meta"):  # of the network its shapes alone
                    build_student(train_options(arguments, distil=script == "train_kd.py", description=""))
            except (SystemExit, ValueError) as error:
                why = refusal.getvalue().strip().partition("error: ")[2] or str(error)
                raise ValueError(f"{candidate.name}: {why}; a flag for some arms stands in them, ARM:flag=value") from error


def run_jobs(jobs: list[Job], slots: int, processes: int, stop: StopSignal) -> list[Job]:
    """Run what is not done, `slots` trainings at a time, each on its own GPUs; returns those that failed.

    On a signal every training is told to save and stop.
    """
    waiting = deque(candidate for candidate in jobs if not candidate.done)
    if len(waiting) < len(jobs):
        print(f"{len(jobs) - len(waiting)} of {len(jobs)} trainings are done already", flush=True)
    free, running, failed, finished = list(range(slots)), {}, [], len(jobs) - len(waiting)
    told = False
    while running or (waiting and not stop.received):
        for candidate in [candidate for candidate in waiting if free and not stop.received and not candidate.busy][: len(free)]:
            waiting.remove(candidate)
            slot = free.pop(0)
            running[start(candidate, slot, slots, processes)] = (candidate, slot, time.monotonic())
        if stop.received and not told:
            told = True
            print(f"stopping: {len(running)} trainings save what they have", flush=True)
            for process in running:
                process.terminate()
        for process in [process for process in running if process.poll() is not None]:
            candidate, slot, since = running.pop(process)
            free.append(slot)
            if candidate.done:
                finished += 1
                score = candidate.report()["last"]["miou"]
                print(f"[{finished}/{len(jobs)}] {candidate.name}: mIoU {score:.2f} in {time.monotonic() - since:.0f} s", flush=True)
            elif not stop.received:
                failed.append(candidate)
                if process.returncode < 0:  # it could not say so itself
                    killed = process.returncode == -signal.SIGKILL
                    why = "SIGKILL; of a lack of memory if nobody sent it" if killed else f"signal {-process.returncode}"
                    with open(candidate.log, "a", encoding="utf-8") as log:
                        log.write(f"\nerror: ended by {why}\n")  # it may have been killed in the middle of a line
                print(f"{candidate.name}: failed: {candidate.failure()}; its output: {candidate.log}", flush=True)
        time.sleep(0.1)
    return failed


def start(candidate: Job, slot: int, slots: int, processes: int) -> subprocess.Popen:
    """The training as a child that is told to stop when this process dies, with its share of the machine."""
    candidate.folder.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    name, seconds = distributed.GRACE
    environment[name] = environment.get(name) or seconds
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[slot * processes: (slot + 1) * processes])
    else:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // (slots * processes))))
    script, *arguments = candidate.arguments
    with open(candidate.log, "a", encoding="utf-8") as log:
        log.write(START)
        log.flush()
        return subprocess.Popen(
            [*interpreter(processes), str(ROOT / script), *arguments], cwd=Path.cwd(), env=environment, stdin=subprocess.DEVNULL,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_end_with_parent,
        )  # fmt: skip


def interpreter(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def _end_with_parent() -> None:
    """In the child: SIGTERM when the process that started it is gone (Linux), so that a killed comparison leaves no training behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


# ---------------------------------------------------------------------------------------------------------------------- tuning


def draws(plan: Plan) -> list[dict[str, float]]:
    """The factors of every trial, the same for all arms: the recipe itself first, then log-uniform ones."""
    random = np.random.default_rng(TUNING_SEED)
    trials = [dict.fromkeys(plan.tune, 1.0)]
    for _ in range(plan.trials - 1):
        trials.append({name: RANGES[name] ** random.uniform(-1, 1) for name in plan.tune})
    return trials


def settings(plan: Plan, arm: Arm, factors: dict[str, float]) -> dict[str, str]:
    """The flags of an arm's trial: the values that it would train with, times the factors."""
    script, *arguments = job(plan, arm, 0, Path("unused"), plan.budget).arguments
    options = train_options(arguments, distil=script == "train_kd.py", description="")
    flags = {}
    for name, factor in factors.items():
        if factor == 1:
            continue  # the recipe to the last digit
        if name == "weight":
            for method in arm.methods:
                for term in METHODS[method].terms():
                    attribute = METHODS[method].weight_field(term)
                    if value := getattr(options.methods[method], attribute):
                        flags[METHODS[method].flag(attribute).removeprefix("--")] = f"{value * factor:.4g}"
        else:
            flags[name] = f"{getattr(options, name.replace('-', '_')) * factor:.4g}"
            if name == "lr" and float(flags[name]) < options.lr_floor:
                flags[name] = str(options.lr_floor)
    return flags


def rungs(plan: Plan) -> list[tuple[int, Budget]]:
    """(trials that take part, budget of each) of every round: one with all for random search; for successive halving, each with half
    the trials of the one before and twice its budget, the last with the whole."""
    budget = plan.tune_budget or plan.budget
    if plan.search == "random":
        return [(plan.trials, budget)]
    rounds = max(1, plan.trials.bit_length() - 1)
    return [(max(1, plan.trials >> number), budget * 0.5 ** (rounds - 1 - number)) for number in range(rounds)]


def tune(plan: Plan, folder: Path, slots: int, stop: StopSignal) -> tuple[dict[str, dict[str, str]], list[dict], list[Job]]:
    """({arm: flags of its best trial}, rows of trials.csv, failed trainings). Every arm gets the same number of trials, scored on the
    pictures that are held out of the training split."""
    alive = {arm.name: list(range(plan.trials)) for arm in plan.arms}
    factors, rows, failed = draws(plan), [], []
    for number, (count, budget) in enumerate(rungs(plan)):
        trials = []
        for arm in plan.arms:
            for trial in alive[arm.name][:count]:
                flags = settings(plan, arm, factors[trial]) | {"holdout": f"{TUNING_SHARE:g}"}
                place = folder / "tuning" / arm.folder / f"trial{trial}-round{number}"
                trials.append((arm, trial, flags, job(plan, arm, TUNING_SEED, place, budget, flags)))
        check([candidate for *_, candidate in trials])
        failed += run_jobs([candidate for *_, candidate in trials], slots, plan.processes, stop)
        if stop.received:
            break
        scores: dict[str, dict[int, float]] = {}
        for arm, trial, flags, candidate in trials:
            score = candidate.report()["last"]["miou"] if candidate.done else -math.inf  # a diverged trial is a bad one
            scores.setdefault(arm.name, {})[trial] = score
            rows.append({"arm": arm.name, "trial": trial, "round": number, "budget": str(budget), **factors[trial],
                         "miou": score if candidate.done else None, "flags": " ".join(f"--{name} {value}" for name, value in flags.items()),
                         "failure": "" if candidate.done else candidate.failure()})  # fmt: skip
        for arm, found in scores.items():
            alive[arm] = sorted(found, key=lambda trial: (-found[trial], trial))
    return {arm.name: settings(plan, arm, factors[alive[arm.name][0]]) for arm in plan.arms}, rows, failed


def shortest_trial(plan: Plan, arm: Arm, folder: Path) -> Job:
    """The first trial of an arm with the smallest budget, for a look at its flags."""
    budget = rungs(plan)[0][1]
    trial = job(plan, arm, TUNING_SEED, folder, budget, settings(plan, arm, draws(plan)[0]) | {"holdout": f"{TUNING_SHARE:g}"})
    return replace(trial, name=f"{arm.name}, trials of {budget}")


# ------------------------------------------------------------------------------------------------------------------------ main


def final_jobs(plan: Plan, folder: Path, tuned: dict[str, dict[str, str]]) -> list[tuple[Arm, int, Job]]:
    """Every (arm, seed, training), seed by seed: an interrupted comparison has all arms of the first seeds."""
    return [(arm, seed, job(plan, arm, seed, folder / "runs" / arm.folder / f"seed{seed}", plan.budget, tuned.get(arm.name)))
            for seed in plan.seeds for arm in plan.arms]  # fmt: skip


def evaluate_teacher(plan: Plan, folder: Path) -> dict | None:
    """The teacher's report by eval.py, which scores as the trainings do; None where there is no teacher, or a foreign one, which eval.py
    does not build.

    Raises:
        ValueError: eval.py's line of refusal.
    """
    if plan.teacher is None:
        return None
    foreign = [value for flag, *values in grouped(plan.flags) for value in values if flag == "--teacher-model" and ":" in value]
    if foreign:
        print(f"the teacher is not scored: {foreign[-1]} builds it, and eval.py scores networks of this project", flush=True)
        return None
    path = folder / "teacher" / "report.json"
    if not path.exists():
        command = [*interpreter(1), str(ROOT / "eval.py"), "--checkpoint", plan.teacher["path"], "--dataset", plan.dataset,
                   *(["--data", plan.data] if plan.data else []), "--output", str(path.parent)]  # fmt: skip
        for flag, *values in grouped(plan.flags):
            if flag in ("--device", "--workers", "--amp", "--teacher-normalization"):
                command += [flag.replace("--teacher-", "--"), *values]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode:
            said = (found.stdout + found.stderr).strip().splitlines() or [f"eval.py ended with status {found.returncode}"]
            raise ValueError(f"the teacher cannot be evaluated: {said[-1]}")
    return read_json(path)


def submit(jobs: list[Job], folder: Path, processes: int) -> None:
    """Write what is not done as a SLURM array, one task per training, and submit it.

    Raises:
        ValueError: there is no sbatch, or it refuses.
    """
    waiting = [candidate for candidate in jobs if not candidate.done]
    content = [{"name": candidate.name, "folder": str(candidate.folder), "arguments": list(candidate.arguments)} for candidate in waiting]
    write_text(folder / "jobs.json", json.dumps({"cwd": str(Path.cwd()), "jobs": content}, indent=1) + "\n")
    command = shlex.join([sys.executable, "-m", "scripts.compare", "--output", str(folder)])
    write_text(folder / "slurm.sh", f"""#!/usr/bin/env bash
#SBATCH --job-name=compare
#SBATCH --array=0-{len(waiting) - 1}
#SBATCH --gpus={processes}
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output={folder}/slurm-%a.txt
# Partition, account and time limit are the site's: SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_TIMELIMIT set them from outside.
cd {shlex.quote(str(ROOT))} || exit 1
exec {command} --run-job "$SLURM_ARRAY_TASK_ID"
""")  # fmt: skip
    try:
        found = subprocess.run(["sbatch", str(folder / "slurm.sh")], capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(f"--launcher slurm: there is no sbatch on this machine; submit {folder / 'slurm.sh'} where there is one") from None
    if found.returncode:
        raise ValueError(f"--launcher slurm: sbatch refused {folder / 'slurm.sh'}: {found.stderr.strip()}")
    print(f"{found.stdout.strip()}\n{len(waiting)} trainings submitted; run this command again when they are done")


def run_submitted(folder: Path, number: int) -> int:
    """One task of the array: the training's exit status."""
    try:
        content = read_json(folder / "jobs.json")
        chosen = content["jobs"][number]
        plan = Plan.of(read_json(folder / "plan.json"))
    except (OSError, IndexError) as error:
        raise ValueError(f"--run-job {number}: {folder / 'jobs.json'} has no such job; submit the comparison again") from error
    os.chdir(content["cwd"])
    candidate = Job(chosen["name"], Path(chosen["folder"]), tuple(chosen["arguments"]))
    with StopSignal() as stop:
        failed = run_jobs([candidate], 1, plan.processes, stop)
    return stop.status if stop.received else int(bool(failed))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--dataset", default="shapes", help="data set (default: shapes)")
    add("--data", help="its folder; none is needed for shapes")
    add("--teacher-checkpoint", help=f"the teacher of all arms; not needed for none alone (default: {TEACHER.format('DATASET')})")
    add("--methods", nargs="+", metavar="ARM", default=ARMS, help=f"arms (default: {' '.join(ARMS)})")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="seeds of every arm (default: 0 1 2)")
    add("--budget", default="iterations:4000", help="iterations:N, minutes:M or gpu-seconds:S of every training (default: iterations:4000)")
    add("--output", type=Path, help="folder of the comparison (default: runs/DATASET/compare)")
    add("--tune", nargs="+", choices=list(RANGES), default=[], help="what to tune, for the baseline and every method alike")
    add("--trials", type=int, metavar="N", help="trials of every arm, the first with the recipe's own values (default: 12)")
    add("--search", choices=("random", "halving"), help="all trials in full, or successive halving (default: random)")
    add("--tune-budget", help="budget of a trial (default: that of the final trainings)")
    add("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default: 1)")
    add("--gpus-per-job", type=int, default=1, metavar="N", help="processes of one training, under torchrun when several (default: 1)")
    add("--launcher", choices=("local", "slurm"), default="local", help="run here, or as a SLURM array (default: local)")
    add("--published", action="store_true", help="show published results of the same networks and data set beside the measured ones")
    add("--run-job", type=int, help=argparse.SUPPRESS)
    return parser


def plan_of(options, flags: list[str]) -> Plan:
    """The plan that the command line asks for.

    Raises:
        ValueError: see `parse_arm`, `Budget.parse`; or something is missing or impossible.
    """
    arms = tuple(map(parse_arm, options.methods))
    for name, values in (("methods", options.methods), ("seeds", options.seeds)):
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} {' '.join(map(str, values))}: names one twice")
    given = [name for name in TUNING if getattr(options, name) is not None]
    if given and not options.tune:
        name = given[0]
        raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: belongs to --tune; add it, or drop the flag")
    tuning = {name: default if getattr(options, name) is None else getattr(options, name) for name, default in TUNING.items()}
    teacher = None
    if any(arm.methods for arm in arms):
        path = Path(options.teacher_checkpoint or TEACHER.format(options.dataset))
        if options.teacher_checkpoint is None and not path.is_file():
            raise ValueError(f"--teacher-checkpoint is missing: the methods distil from it; give one, or train {path} with scripts/train_baseline.sh")
        if not path.is_file():
            raise ValueError(f"--teacher-checkpoint {path}: no such file; give the path of a checkpoint")
        teacher = {"path": str(path.resolve()), "sha256": checkpoint.fingerprint(path)}
    for name, value in (("jobs", options.jobs), ("gpus_per_job", options.gpus_per_job), ("trials", tuning["trials"])):
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    gpus = torch.cuda.device_count()
    if options.launcher == "local" and gpus and options.jobs * options.gpus_per_job > gpus:
        raise ValueError(f"--jobs {options.jobs} of {options.gpus_per_job} GPUs each: {gpus} are visible")
    if options.launcher == "slurm" and options.tune:
        raise ValueError("--launcher slurm: --tune chooses later trainings by earlier ones; tune with --launcher local, drop --tune, and give "
                         "the arms the flags that it found")  # fmt: skip
    if min(options.seeds) < 0:
        raise ValueError(f"--seeds {min(options.seeds)}: must be at least 0")
    owned = [flag for flag, *_ in grouped(flags) if flag.removeprefix("--").removeprefix("no-") in OWNED]
    if owned:
        raise ValueError(f"{', '.join(owned)} after --: the comparison sets it itself; see --help for the option to use before --")
    budget = Budget.parse(options.budget)
    spec = get_spec(options.dataset, options.data)
    if spec.select_split == spec.report_split and "--select-holdout" not in (flag for flag, *_ in grouped(flags)):
        flags = [*flags, "--select-holdout", str(SELECT_SHARE)]
    return Plan(
        options.dataset, str(Path(options.data).resolve()) if options.data else None, teacher, arms, tuple(options.seeds), budget,
        tuple(flags), options.gpus_per_job, tuple(options.tune), tuning["trials"] if options.tune else 0, tuning["search"],
        Budget.parse(tuning["tune_budget"]) if tuning["tune_budget"] else budget,
    )  # fmt: skip


def compare(options, flags: list[str]) -> int:
    """The command; returns the exit status."""
    folder, slots = (options.output or Path("runs") / options.dataset / "compare").resolve(), options.jobs
    if options.run_job is not None:
        return run_submitted(folder, options.run_job)
    plan = plan_of(options, flags)
    check([candidate for _, _, candidate in final_jobs(plan, folder, {})])
    if plan.tune:
        check([shortest_trial(plan, arm, folder) for arm in plan.arms])
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        return work(keep(plan, folder), folder, slots, options.launcher, options.published)


def work(plan: Plan, folder: Path, slots: int, launcher: str, published: bool) -> int:
    """Tune, train and report; returns the exit status."""
    command = shlex.join(["python", "-m", "scripts.compare", *sys.argv[1:]])
    tuned, trials, failed = {}, [], []
    with StopSignal() as stop:
        teacher = evaluate_teacher(plan, folder)  # first: if it cannot be used, nothing is lost
        if plan.tune and not stop.received:
            tuned, trials, failed = tune(plan, folder, slots, stop)
        jobs = final_jobs(plan, folder, tuned)
        trainings = [candidate for *_, candidate in jobs]
        submitted = launcher == "slurm" and not all(candidate.done for candidate in trainings)
        if submitted:
            submit(trainings, folder, plan.processes)
        elif not stop.received:
            failed += run_jobs(trainings, slots, plan.processes, stop)
        if stop.received:
            print(f"stopped, every training saved what it had; go on with:\n  {command}")
            return stop.status
    if not any(candidate.done for candidate in trainings):
        print("no training is done yet: there is nothing to report" if submitted else "every training failed: there is nothing to report")
        return 0 if submitted else 1
    write_report(plan, folder, jobs, teacher, tuned, trials, published=published, command=command)
    print((folder / "report.md").read_text(encoding="utf-8"))
    if failed:
        print(f"{len(failed)} trainings failed: {', '.join(candidate.name for candidate in failed)}; the same command tries them again")
    return 1 if failed else 0


@contextlib.contextmanager
def alone(folder: Path):
    """Keep other comparisons out of the folder; ValueError where one is at work."""
    path = folder / ".lock"
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"--output {folder}: another comparison is at work here; wait until it ends, or choose another folder") from None
        yield


def locked(path: Path) -> bool:
    """Whether another process holds the record lock of a file."""
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
    return False


def main() -> None:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = build_parser()
    options = parser.parse_args(arguments[:split])
    try:
        sys.exit(compare(options, arguments[split + 1 :]))
    except ValueError as error:
        parser.exit(2, harmless(f"{parser.prog}: error: {error}\n"))
    except KeyboardInterrupt:  # the second one
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
