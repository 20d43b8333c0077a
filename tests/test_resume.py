"""Stopped and resumed equals never stopped, bit for bit: the real scripts, real signals, other numbers of workers."""

import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from dataset import shapes
from dataset.shapes import DrawnItem
from losses import METHODS
from tests.workers import RUN, TINY_STUDENT, distil, save_model, train
from utils import checkpoint, session
from utils.options import train_options

STEPS = 8
LENGTH = ("--max-iterations", str(STEPS), "--val-interval", "4", "--save-interval", "3", "--save-dir", "run")
CASES = {  # how it is started, and its settings
    "baseline": (train, ()),
    "afdcd": (distil, ("--method", "afdcd")),
    "average": (train, ("--ema", "0.9", "--accumulate", "2", "--optimizer", "adamw", "--lr", "1e-3")),
}
CLOCK = {"seconds", "images_per_second"}  # columns that no two runs share


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The never stopped run of a case: its folder; each is made once."""
    made = {}

    def make(case, change=None):
        if (case, change) not in made:
            folder = tmp_path_factory.mktemp("whole")
            start, arguments = CASES[case]
            started = start(folder, *arguments, *LENGTH, "--workers", "0", change=change)
            assert started.wait() == [0], started.text
            made[case, change] = folder
        return made[case, change]

    return make


def differences(a: Path, b: Path) -> list[str]:
    """What differs in the last checkpoints, the best students and the metrics of two runs."""
    found = []

    def compare(x, y, path):
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            if x.dtype != y.dtype or not torch.equal(x, y):
                found.append(path)
        elif isinstance(x, dict) and isinstance(y, dict) and x.keys() == y.keys():
            for key in x:
                compare(x[key], y[key], f"{path}.{key}")
        elif isinstance(x, list | tuple) and isinstance(y, list | tuple) and len(x) == len(y):
            for number, pair in enumerate(zip(x, y, strict=True)):
                compare(*pair, f"{path}.{number}")
        elif x != y:
            found.append(path)

    for name in ("last.pth", "student_best.pth"):
        states = [checkpoint.load(folder / "run" / name) for folder in (a, b)]
        for state in states:
            assert len(state["student"]) > 300
            for key in ("spent", "config", "environment"):
                state.pop(key, None)
        compare(*states, name)
    compare(*(metrics(folder) for folder in (a, b)), "metrics")
    return found


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]


def stopped_after(folder: Path) -> int:
    return int((folder / "run" / "INTERRUPTED").read_text().split(";")[0].split()[-1])


def stop_and_resume(folder, case, steps, workers, change=None, number=signal.SIGTERM):
    """Run a case, stopped by a signal when the console shows each of the steps; `workers` of each start."""
    start, arguments = CASES[case]
    before = 0
    for part, (step, count) in enumerate(zip([*steps, None], workers, strict=True)):
        console = f"part {part}.txt"
        started = start(folder, *arguments, *LENGTH, "--workers", count, *(["--resume"] if part else []), console=console, change=change)
        if step is not None:
            started.until(f"step {step}/{STEPS}")
            started.stop(number)
        assert started.wait() == [0 if step is None else 128 + number], started.text
        if part:
            assert f"going on from step {before}" in started.text
        if step is not None:
            before = stopped_after(folder)
            assert step <= before <= step + 1, "saved within one step"
            assert checkpoint.load(folder / "run" / "last.pth")["step"] == before
            assert f"stopped after step {before}, saved; go on with:" in started.text and "--resume" in started.text


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_is_never_stopped(case, whole, tmp_path):
    stop_and_resume(tmp_path, case, [2, 5], [2, 0, 1])
    assert differences(whole(case), tmp_path) == []
    table = metrics(tmp_path)
    assert [row["step"] for row in table if "loss" in row] == [*range(1, STEPS + 1)]
    assert [row["step"] for row in table if "val/mIoU" in row] == [4, 8]
    csv_steps = [line.split(",")[0] for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    assert csv_steps == ["step", *(str(row["step"]) for row in table)]
    assert (tmp_path / "run" / "DONE").read_text() == (whole(case) / "run" / "DONE").read_text()


def stop_in_validation(index):
    """SIGTERM to this process, once, when a validation picture is read."""
    read = DrawnItem.read

    def reading(self):
        if (self.split, self.index) == ("val", index) and not Path("stopped").exists():
            Path("stopped").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self)

    DrawnItem.read = reading


def test_stopped_during_a_validation(whole, tmp_path):
    """The validation of step 4 is cut off after its first picture, and made again as a whole after the resume."""
    change = partial(stop_in_validation, 0)
    for part in ([], ["--resume"]):
        started = train(tmp_path, *LENGTH, "--workers", "0", *part, change=change)
        assert started.wait() == [0 if part else 128 + signal.SIGTERM], started.text
        if not part:
            assert stopped_after(tmp_path) == 4 and "validation" not in started.text
            assert not (tmp_path / "run" / "best.pth").exists()
            assert checkpoint.load(tmp_path / "run" / "last.pth")["validated"] == 0
    assert (tmp_path / "stopped").exists()
    assert differences(whole("baseline"), tmp_path) == []


def seed_only_at_the_start():
    """Dropout from the global generator alone, as in codebases that seed once and restore weights on a resume."""
    import utils.engine

    class Torch:
        manual_seed = staticmethod(lambda seed: None)

        def __getattr__(self, name):
            return getattr(torch, name)

    utils.engine.torch = Torch()


def test_the_comparison_sees_one_wrong_draw(whole, tmp_path):
    """The negative control: where dropout is no function of the step, the resumed run draws other masks, and everything differs."""
    stop_and_resume(tmp_path, "baseline", [2], [0, 0], change=seed_only_at_the_start)
    found = differences(whole("baseline", seed_only_at_the_start), tmp_path)
    assert any(path.startswith("last.pth.student.head") for path in found) and "metrics" in found[-1]


def test_killed_and_resumed_is_never_stopped(whole, tmp_path):
    """kill -9 in step 5 or 6: goes on from the save after the validation of step 4, writes the rows after it once; the loader's
    workers do not stay."""
    _, arguments = CASES["afdcd"]
    started = distil(tmp_path, *arguments, *LENGTH, "--workers", "2")
    started.until(f"step 5/{STEPS}")
    (main,) = started.processes
    workers = Path(f"/proc/{main.pid}/task/{main.pid}/children")
    orphans = [Path("/proc", pid) for pid in workers.read_text().split()] if workers.exists() else []  # Linux alone
    started.stop(signal.SIGKILL)
    assert started.wait() == [-signal.SIGKILL]
    assert max(row["step"] for row in metrics(tmp_path)) >= 5
    resumed = distil(tmp_path, *arguments, *LENGTH, "--workers", "0", "--resume")
    assert resumed.wait() == [0] and "going on from step 4" in resumed.text, resumed.text
    assert differences(whole("afdcd"), tmp_path) == []
    limit = time.monotonic() + 60
    while any(path.exists() for path in orphans):
        assert time.monotonic() < limit, f"{len(orphans)} loader processes outlive their training"
        time.sleep(0.1)


def test_a_damaged_last_checkpoint_costs_steps_and_nothing_else(whole, tmp_path):
    shutil.copytree(whole("baseline"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "run" / "DONE").unlink()
    last = tmp_path / "run" / "last.pth"
    damaged = bytearray(last.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    last.unlink()
    last.write_bytes(damaged)
    started = train(tmp_path, *LENGTH, "--workers", "0", "--resume")
    assert started.wait() == [0], started.text
    assert "run/last.pth: damaged, its content does not match its checksum" in started.text and "going on from step 6" in started.text
    assert differences(whole("baseline"), tmp_path) == []


def test_two_ranks_stop_and_resume(tmp_path):
    """SIGTERM to one rank alone stops both after the same step; the end is that of two ranks that were never stopped."""
    folders = [tmp_path / "whole", tmp_path / "parts"]
    for folder in folders:
        folder.mkdir()
    assert train(folders[0], *LENGTH, "--workers", "0", world=2).wait() == [0, 0]
    started = train(folders[1], *LENGTH, "--workers", "1", world=2)
    started.until(f"step 3/{STEPS}")
    started.stop(rank=1)
    assert started.wait() == [128 + signal.SIGTERM] * 2, started.text
    assert 3 <= stopped_after(folders[1]) <= 5
    started = train(folders[1], *LENGTH, "--workers", "0", "--resume", world=2)
    assert started.wait() == [0, 0], started.text
    assert differences(*folders) == []


QUICK = {"cirkd", "skd"}  # methods with class queues and with an optimizer of their own; the others under --slow


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS])
def test_every_method_resumes(name, tmp_path, monkeypatch):
    """Three steps of 4 pictures, and the same with a stop after the second: every parameter, queue and optimizer state."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "COUNTS", {"train": 40, "val": 2, "test": 2})
    save_model(tmp_path / "teacher.pth", 1)
    arguments = ["--method", name, "--teacher-checkpoint", "teacher.pth", *TINY_STUDENT, *RUN, "--batch-size", "4", "--max-iterations", "3",
                 "--val-interval", "100", "--workers", "0"]  # fmt: skip

    def run(folder, *more):
        options = train_options([*arguments, "--save-dir", f"{folder}/run", *more], distil=True, description="")
        session.train(options, torch.device("cpu"))
        return metrics(Path(folder))

    table = run("whole")
    names = {f"{name}/{term}" for term in METHODS[name].terms()}
    assert [row["step"] for row in table if "loss" in row] == [1, 2, 3] and names & set(table[0])
    read, count = DrawnItem.read, []

    def reading(self):
        count.append(self.split)
        if len(count) == 5:  # the first picture of the second step
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self)

    monkeypatch.setattr(DrawnItem, "read", reading)
    assert [row["step"] for row in run("parts")] == [1, 2] and (tmp_path / "parts" / "run" / "INTERRUPTED").exists()
    run("parts", "--resume")
    assert differences(tmp_path / "whole", tmp_path / "parts") == []
    before, after = (checkpoint.load(tmp_path / "parts" / "run" / f)["methods"] for f in ("last.previous.pth", "last.pth"))
    assert before.keys() == after.keys()
    assert not before or any(not torch.equal(before[key], after[key]) for key in before), "what the method trains or remembers moves"


# ------------------------------------------------------------------------------------------------------------------------ slow


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS))
@pytest.mark.parametrize("case", CASES)
def test_every_stop_is_exact(case, step, whole, tmp_path):
    stop_and_resume(tmp_path, case, [step], [step % 3, (step + 1) % 3])
    assert differences(whole(case), tmp_path) == []
