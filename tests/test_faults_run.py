"""Faults of a training and its folder: two processes in one folder, full disks, weights that overflow, a start that failed.

What is stopped and goes on is tests/test_resume.py, the checkpoint file tests/test_checkpoint.py; all of it is listed in reliability.md.
"""

import errno
import fcntl
import importlib
import json
import os
import platform
import pty
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import eval as evaluation
from dataset import build_dataset, shapes
from dataset.shapes import DrawnItem
from scripts import compare, compare_report
from tests.faults import alive, children, read_only, small_disk, wait_for
from tests.paths import REPOSITORY
from tests.test_checkpoint import content, payloads, write_payload
from tests.test_engine import SETUP, Poison, batches, fit, prepared, rows, scores, stop_at
from tests.test_resume import differences
from tests.workers import RUN, TINY, on_ranks, save_model, script, start, train
from utils import checkpoint, log, session
from utils.engine import NonFiniteError
from utils.log import logger
from utils.metrics import Stopped
from utils.options import eval_options, train_options
from utils.run import write_text

# ------------------------------------------------------------------------------------------------------- two in one folder


def hold_the_folder(folder: Path) -> None:
    """Train in the folder, with a loader process that outlives this one's end, as after kill -9."""
    _, _, run = prepared(folder / "run")
    other = open(folder / "flock", "w")  # noqa: SIM115 - the negative control: the lock that forked processes share
    fcntl.flock(other, fcntl.LOCK_EX)
    orphan = os.fork()
    if not orphan:
        time.sleep(600)
        os._exit(0)
    print("held", orphan, flush=True)
    time.sleep(600)
    del run


def try_folder(folder: Path, *arguments: str) -> str:
    try:
        prepared(folder, *arguments)
    except ValueError as error:
        return str(error)
    return "started"


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    """The second is told which one is first; after kill -9 of the first the folder is free at once, though a loader process lives on."""
    first = start(partial(hold_the_folder, tmp_path), tmp_path / "first.txt")
    first.until("held")
    (orphan,) = (int(word) for word in first.text.split()[1:])
    (process,) = first.processes
    for arguments in ((), ("--resume",)):
        (told,) = on_ranks(partial(try_folder, tmp_path / "run", *arguments), 1, tmp_path / "second.txt")
        assert told == (f"--save-dir {tmp_path / 'run'}: another process trains here (process {process.pid} on {platform.node()}); "
                        "wait until it ends or stop it, or choose another folder")  # fmt: skip
    first.stop(signal.SIGKILL)
    assert first.wait() == [-signal.SIGKILL] and alive(orphan)
    (told,) = on_ranks(partial(try_folder, tmp_path / "run", "--resume"), 1, tmp_path / "third.txt")
    assert told == "started"
    with open(tmp_path / "flock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a lock of this kind would keep the folder closed
    os.kill(orphan, signal.SIGKILL)


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level("WARNING", "segkd"):
        prepared(tmp_path)
    assert "cannot be locked (No locks available); see that nothing else trains there" in caplog.text


# --------------------------------------------------------------------------------------------------- starts that failed


def fail_in_the_first_step(folder: Path) -> None:
    methods = {"poison": Poison(Poison.Options(picture="picture 0"), SETUP)}
    training, teacher, run = prepared(folder, "--lr", "0.5", methods=methods)
    with pytest.raises(NonFiniteError, match="^step 1: "):
        fit(training, teacher, batches(), run, scores)


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_run_that_failed_in_its_first_step_is_started_anew(resume, tmp_path):
    """With or without --resume, and with a mended setting; nothing of the failed start is fallen back to."""
    fail_in_the_first_step(tmp_path)
    assert checkpoint.load(tmp_path / "last.pth")["step"] == 0 and not rows(tmp_path)
    training, _, run = prepared(tmp_path, "--lr", "0.1", *resume)
    assert training.step == 0 and json.loads((tmp_path / "args.json").read_text())["options"]["lr"] == 0.1
    assert not (tmp_path / "last.pth").exists()
    training.step = 1
    run.save_last(training.snapshot())
    assert not checkpoint.previous(tmp_path / "last.pth").exists()
    with pytest.raises(ValueError, match="holds a run already; pass --resume"):
        prepared(tmp_path, "--lr", "0.1")
    with pytest.raises(ValueError, match="--lr is 0.2, was 0.1"):
        prepared(tmp_path, "--lr", "0.2", "--resume")


@pytest.mark.parametrize("left", ["a row", "best.pth", "a damaged last.pth"])
def test_whatever_shows_a_finished_step_is_kept(left, tmp_path):
    fail_in_the_first_step(tmp_path)
    path = {"a row": "metrics.jsonl", "best.pth": "best.pth", "a damaged last.pth": "last.pth"}[left]
    (tmp_path / path).write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="holds a run already; pass --resume"):
        prepared(tmp_path)
    assert (tmp_path / path).read_text() == '{"step": 1}\n'


def test_a_run_that_lost_its_last_checkpoint_is_not_started_over(tmp_path):
    training, teacher, run = prepared(tmp_path, "--max-iterations", "2", "--log-interval", "1")
    fit(training, teacher, batches(), run, scores)
    for name in ("last.pth", "last.previous.pth"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="holds a run without its last.pth; put that file back, or choose another folder"):
        prepared(tmp_path, "--resume")
    assert (tmp_path / "best.pth").exists()


# -------------------------------------------------------------------------------------------------------- what is saved


def test_weights_that_overflow_are_never_saved(tmp_path):
    """Loss and gradient of step 2 are finite; the learning rate makes the weights infinite, just before a save."""
    def blow_up():
        for number, batch in enumerate(batches()):
            if number == 1:
                training.options.lr = 3e38
                training.optimizers["student"].param_groups[0]["momentum"] = 0.0
            yield batch

    training, teacher, run = prepared(tmp_path, "--save-interval", "1", "--lr", "0.1", "--max-iterations", "9")
    for parameter in training.distiller.parameters():
        parameter.data *= 30  # gradients above 1.2, times 3e38
    with pytest.raises(NonFiniteError) as error:
        fit(training, teacher, blow_up(), run, scores)
    weights = [value for value in training.distiller.state_dict().values()]
    assert not all(value.isfinite().all() for value in weights), "the fault was there"
    assert str(error.value).startswith("step 2: not finite: student.") and "last.pth holds earlier, finite weights; lower --lr" in str(error.value)
    last = checkpoint.load(tmp_path / "last.pth")
    assert last["step"] == 1 and all(value.isfinite().all() for value in last["student"].values())


def test_an_infinite_momentum_is_not_saved(tmp_path):
    training, teacher, run = prepared(tmp_path, "--max-iterations", "2")
    fit(training, teacher, batches(), run, scores)
    state = training.optimizers["student"].state_dict()["state"]
    state[0]["momentum_buffer"].view(-1)[0] = float("inf")
    with pytest.raises(NonFiniteError, match="step 2: not finite: optimizers.student.state.0.momentum_buffer; last.pth"):
        training.snapshot()


def test_the_rows_of_the_log_do_not_know_of_a_stop(tmp_path):
    """Means over 4 steps, stopped after the 6th: the row of step 8 is that of a training that was never stopped."""
    clock = {"seconds", "images_per_second"}

    def table(folder):
        return [{key: value for key, value in row.items() if key not in clock} for row in rows(folder)]

    arguments = ("--log-interval", "4")
    training, teacher, run = prepared(tmp_path / "whole", *arguments)
    assert fit(training, teacher, batches(), run, scores)
    training, teacher, run = prepared(tmp_path / "parts", *arguments)
    assert not fit(training, teacher, stop_at(5, batches()), run, scores)
    assert checkpoint.load(tmp_path / "parts" / "last.pth")["rows"].shape == (1, 2, 3)
    training, teacher, run = prepared(tmp_path / "parts", *arguments, "--resume")
    assert len(training.record.rows) == 2
    assert fit(training, teacher, batches(6), run, scores)
    assert table(tmp_path / "parts") == table(tmp_path / "whole")
    assert [row["step"] for row in table(tmp_path / "whole") if "loss" in row] == [4, 8]


def test_the_best_is_never_newer_than_the_last(tmp_path):
    """A kill between two saves of last.pth: the validation before it has saved both."""
    class Killed(Exception):
        pass

    def killed():
        for number, batch in enumerate(batches()):
            if number == 3:
                raise Killed
            yield batch

    training, teacher, run = prepared(tmp_path, "--val-interval", "2", "--save-interval", "100")
    with pytest.raises(Killed):
        fit(training, teacher, killed(), run, scores)
    steps = {name: checkpoint.load(tmp_path / name)["step"] for name in ("best.pth", "student_best.pth", "last.pth")}
    assert steps == {"best.pth": 2, "student_best.pth": 2, "last.pth": 2}
    training, *_ = prepared(tmp_path, "--val-interval", "2", "--save-interval", "100", "--resume")
    assert training.validated == 2, "the validation is not made again"


def test_a_validation_appears_once_after_a_stop_and_a_death(tmp_path):
    """Stopped in the validation of step 2, gone on with, and killed between the row of that validation and the save after it: the next
    resume is from step 2 again, and its validation takes the place of that row, in both tables."""
    class Killed(Exception):
        pass

    def kill(_):
        raise Killed

    def stopped(*_):
        raise Stopped

    length = ("--max-iterations", "4", "--val-interval", "2", "--log-interval", "1")
    training, teacher, run = prepared(tmp_path, *length)
    assert not fit(training, teacher, batches(), run, stopped)
    training, teacher, run = prepared(tmp_path, *length, "--resume")
    assert (training.step, training.validated) == (2, 0)
    run.save_last = kill
    with pytest.raises(Killed):
        fit(training, teacher, batches(2), run, scores)
    assert [row["step"] for row in rows(tmp_path) if "val/mIoU" in row] == [2], "the row is there before the death"
    training, teacher, run = prepared(tmp_path, *length, "--resume")
    assert (training.step, training.validated) == (2, 0)
    assert fit(training, teacher, batches(2), run, scores)
    assert [(row["step"], "val/mIoU" in row) for row in rows(tmp_path)] == [
        (1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]  # fmt: skip
    assert [line.split(",")[0] for line in (tmp_path / "metrics.csv").read_text().splitlines()] == ["step", "1", "2", "2", "3", "4", "4"]


def test_a_resume_needs_no_file_of_initial_weights(tmp_path, monkeypatch):
    """The student starts from a file; that file is gone when the training goes on, and the end is the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "COUNTS", {"train": 40, "val": 2, "test": 2})
    save_model(tmp_path / "start.pth", 3)
    given = ["--model", "pspnet", *TINY, *RUN, "--max-iterations", "3", "--val-interval", "100", "--workers", "0", "--pretrained", "start.pth"]

    def run(folder, *more):
        session.train(train_options([*given, "--save-dir", f"{folder}/run", *more], distil=False, description=""), torch.device("cpu"))

    run("whole")
    read, count = DrawnItem.read, []

    def reading(self):
        count.append(self.split)
        if len(count) == 3:  # the first picture of the second step
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self)

    monkeypatch.setattr(DrawnItem, "read", reading)
    run("parts")
    (tmp_path / "start.pth").unlink()
    run("parts", "--resume")
    assert differences(tmp_path / "whole", tmp_path / "parts") == []
    run("parts", "--resume")  # done already: no file is asked for either
    with pytest.raises(ValueError, match="start.pth: no such file"):
        run("new")
    assert not (tmp_path / "new" / "run" / "args.json").exists()


@pytest.mark.parametrize("garbage", [b"\xff\xfe\n", b"5\n", b'"step"\n', b'{"loss": 1}\n', b'{"step": "x"}\n', b"\0" * 500 + b"\n",
                                     b"[" * 100_000 + b"\n", b'{"step": 3, "lo'], ids=lambda value: repr(value[:12]))  # fmt: skip
def test_metrics_that_are_damaged_cost_those_rows(garbage, tmp_path):
    """What a loss of power or an editor has left among them; the sound rows stay."""
    training, teacher, run = prepared(tmp_path, "--log-interval", "1")
    assert not fit(training, teacher, stop_at(3, batches()), run, scores)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join([lines[0], garbage, b"\n", *lines[1:], garbage]))
    (tmp_path / "args.json").write_bytes(garbage)  # written anew, never read
    training, teacher, run = prepared(tmp_path, "--log-interval", "1", "--resume")
    assert path.read_bytes() == b"".join(lines) and training.step == 4
    assert fit(training, teacher, batches(4), run, scores)
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [*range(1, 11)]
    assert json.loads((tmp_path / "args.json").read_text())["options"]["log_interval"] == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The files that tools read of a finished run, and of a comparison around it."""
    folder = tmp_path_factory.mktemp("finished")
    run = folder / "run"
    run.mkdir()
    (run / "args.json").write_text(json.dumps({"options": {"dataset": "shapes", "seed": 0}, "model": {}, "teacher": None, "environment": {}}))
    (run / "report.json").write_text(json.dumps({"classes": [], "split": "val", "selected_on": "val"}))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n')
    (run / "DONE").touch()
    (folder / "plan.json").write_text("{}")
    return folder


def read_by_tool(tool: str, folder: Path) -> None:
    if tool == "plan":
        return compare.keep(SimpleNamespace(plain=lambda: {"methods": []}), folder)
    if tool == "comparison":
        job = compare.Job("kd", folder / "run", ())
        return compare_report.read_run(SimpleNamespace(name="kd", seed_offset=0), 0, job)
    with patch.object(sys, "argv", [tool, f"x={folder / 'run'}", "--output", str(folder / "page.html")]):
        importlib.import_module(f"scripts.{tool}").main()


@pytest.mark.parametrize("content", [b"", b'{"options": {', b"[" * 200_000, b"\xff\xfe", b"[]"], ids=["empty", "cut", "deep", "bytes", "shape"])
@pytest.mark.parametrize("tool,name", [
    ("plot", "run/args.json"), ("plot", "run/metrics.jsonl"), ("summary", "run/args.json"), ("summary", "run/report.json"),
    ("comparison", "run/args.json"), ("comparison", "run/report.json"), ("comparison", "run/metrics.jsonl"), ("plan", "plan.json"),
])  # fmt: skip
def test_a_damaged_json_file_is_one_line(tool, name, content, finished, tmp_path, capsys):
    """Also one that is nested too deeply, for which Python raises something else, and one of another shape."""
    if (tool, content) == ("comparison", b"[]") or (name, content) == ("run/metrics.jsonl", b""):
        pytest.skip("a comparison writes these itself; a run without rows is no damage")
    folder = tmp_path / "folder"
    shutil.copytree(finished, folder)
    more = b'\n{"step": 3, "loss": 1.0}' if name == "run/metrics.jsonl" else b""  # plot leaves out a last row that is being written
    (folder / name).write_bytes(content + more)
    with pytest.raises((SystemExit, ValueError)) as error:
        read_by_tool(tool, folder)
    told = capsys.readouterr().err.strip().splitlines()[-1] if isinstance(error.value, SystemExit) else str(error.value)
    assert Path(name).name in told and len(told.splitlines()) == 1 and re.search("; (restore|remove|give|choose) ", told), told


# --------------------------------------------------------------------------------------------------------------- teachers


def teacher_options(folder: Path):
    given = ["--method", "kd", "--teacher-checkpoint", folder / "teacher.pth", "--dataset", "shapes", "--max-iterations", "1", "--save-dir", "run"]
    return train_options([str(word) for word in given], distil=True, description="")


@pytest.mark.parametrize("how", ["replaced", "written to"])
def test_a_teacher_that_changes_while_it_is_read_is_refused(how, tmp_path, monkeypatch):
    """Its hash would be that of another network than the one that teaches."""
    save_model(tmp_path / "teacher.pth", 1)
    save_model(tmp_path / "other.pth", 2)
    read = session.model_from_checkpoint

    def and_change(path, **options):
        found = read(path, **options)
        if how == "replaced":
            os.replace(tmp_path / "other.pth", path)
        else:
            Path(path).write_bytes((tmp_path / "other.pth").read_bytes())
        return found

    _, before = session.build_teacher(teacher_options(tmp_path))
    assert before == {"file": "teacher.pth", "sha256": checkpoint.fingerprint(tmp_path / "teacher.pth")}
    monkeypatch.setattr(session, "model_from_checkpoint", and_change)
    with pytest.raises(ValueError, match="teacher.pth: was replaced while it was read; start again when it is complete"):
        session.build_teacher(teacher_options(tmp_path))


# ------------------------------------------------------------------------------------------------------------ full disks


def test_dev_full_while_a_checkpoint_is_written(tmp_path):
    path = tmp_path / "last.pth"
    checkpoint.save(path, content(1))
    (tmp_path / f".last.pth.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(checkpoint.CheckpointError, match="last.pth: No space left on device; the previous checkpoint is intact; free space"):
        checkpoint.save(path, content(2))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"] and checkpoint.load(path)["step"] == 1


def test_a_disk_that_fills_up(tmp_path):
    """A real file system of 300 KiB: the second checkpoint of 200 kB does not fit, the first stays."""
    with small_disk(tmp_path / "disk", 300) as folder:
        path = folder / "last.pth"
        checkpoint.save(path, content(1, 50_000))
        with pytest.raises(checkpoint.CheckpointError, match="No space left on device; the previous checkpoint is intact"):
            checkpoint.save(path, content(2, 50_000), keep_previous=True)
        assert [p.name for p in folder.iterdir()] == ["last.pth"] and checkpoint.load(path)["step"] == 1
        with pytest.raises(ValueError, match="cannot write .*report.json: No space left on device; free space"):
            write_text(folder / "report.json", "x" * 300_000)
        assert [p.name for p in folder.iterdir()] == ["last.pth"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.csv"])
def test_no_space_for_a_row(name, tmp_path):
    training, teacher, run = prepared(tmp_path, "--log-interval", "1")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(ValueError, match=f"cannot write {tmp_path / name}: No space left on device; free space or choose another folder"):
        fit(training, teacher, batches(), run, scores)
    assert checkpoint.load(tmp_path / "last.pth")["step"] == 0


@pytest.mark.parametrize("place", ["a file", "below a file", "a full disk"])
def test_an_evaluation_that_cannot_write_its_pictures_is_one_line(place, tmp_path, monkeypatch):
    save_model(tmp_path / "student.pth")
    monkeypatch.setattr(shapes, "COUNTS", {"train": 4, "val": 2, "test": 2})
    (tmp_path / "file").touch()
    output = tmp_path / {"a file": "file", "below a file": "file/out", "a full disk": "out"}[place]
    if place == "a full disk":
        (output / "predictions").mkdir(parents=True)
        for name in build_dataset("shapes", None, "test").items:
            (output / "predictions" / f"{name.name}.png").symlink_to("/dev/full")
    given = ["--checkpoint", tmp_path / "student.pth", "--output", output, "--device", "cpu", "--workers", "0", "--limit", "1", "--save-predictions"]
    options = eval_options([str(word) for word in given], description="")
    with pytest.raises(ValueError, match=f"cannot write {output}.*(File exists|Not a directory|No space left).*; free space or choose"):
        evaluation.main(options, torch.device("cpu"))


def test_no_space_for_the_log_does_not_end_a_training(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    try:
        log.setup(tmp_path)
        for number in range(3):
            logger.info("line %d", number)
    finally:
        log.setup()
    found = capsys.readouterr()
    assert found.out.count("cannot be written ([Errno 28] No space left on device); going on without it") == 1
    assert "line 2" in found.out and "Traceback" not in found.err


# ------------------------------------------------------------------------------------------------------- nobody gets in


def set_the_override():
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"


ENTRANCES = {  # everything that a user gives a checkpoint to
    "eval": ("eval.py", ["--checkpoint", "evil.pth", "--dataset", "shapes", "--device", "cpu"]),
    "teacher": ("train_kd.py", ["--method", "kd", "--teacher-checkpoint", "evil.pth", *RUN, "--save-dir", "run"]),
    "student": ("train_baseline.py", [*TINY, *RUN, "--pretrained", "evil.pth", "--save-dir", "run"]),
    "backbone": ("train_baseline.py", [*TINY, *RUN, "--pretrained-base", "evil.pth", "--save-dir", "run"]),
    "resume": ("train_baseline.py", [*TINY, *RUN, "--resume", "--save-dir", "run"]),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_no_entrance_runs_a_file(entrance, tmp_path):
    """A malicious file with a right checksum, and the variable that undoes torch's own care: refused in one line, nothing is run."""
    marker = tmp_path / "marker"
    payload, zipped = payloads(marker)["hidden among weights"]
    path = tmp_path / ("run/last.pth" if entrance == "resume" else "evil.pth")
    path.parent.mkdir(exist_ok=True)
    write_payload(path, payload, zipped)
    name, arguments = ENTRANCES[entrance]
    started = script(tmp_path, name, *arguments, change=set_the_override)
    assert started.wait() == [2], started.text
    last = started.text.splitlines()[-1]
    assert path.name in last and "more than tensors and plain values" in last and "Traceback" not in started.text
    assert not marker.exists()


# ------------------------------------------------------------------------------------------------------------------ slow


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_in_use_is_refused_to_the_script(workers, tmp_path):
    """The real script twice; after kill -9 the second one goes on, while the orphaned loader processes end by themselves."""
    arguments = ["--max-iterations", "1000", "--val-interval", "1000", "--save-interval", "2", "--workers", workers, "--save-dir", "run", "--resume"]
    first = train(tmp_path, *arguments)
    first.until("step 3/1000")
    first.stop(signal.SIGSTOP)  # or it may be done before the second has started
    second = train(tmp_path, *arguments, console="second.txt")
    try:
        assert second.wait() == [2]
        # on one core torch warns of the number of loader processes before
        assert second.text.splitlines()[-1].startswith("error: --save-dir run: another process trains here (process"), second.text
        assert "Traceback" not in second.text
    finally:
        first.stop(signal.SIGKILL)
    assert first.wait() == [-signal.SIGKILL]
    third = train(tmp_path, *arguments, console="third.txt")
    third.until("going on from step")
    third.until("\nstep ")  # the first may have got far before it was held
    third.stop()
    assert third.wait() == [128 + signal.SIGTERM] and wait_for(lambda: not list((tmp_path / "run").glob("*.tmp")))


@pytest.mark.slow
def test_the_quickstart_of_a_source_that_cannot_be_written(tmp_path):
    """A clone that belongs to somebody else: everything goes to OUTPUT."""
    source, output = tmp_path / "the source", tmp_path / "my output"
    shutil.copytree(REPOSITORY, source, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache"))
    variables = {**os.environ, "PYTHON": sys.executable, "OUTPUT": str(output), "TEACHER_STEPS": "2", "STUDENT_STEPS": "1",
                 "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"}  # fmt: skip
    with read_only(source):
        with pytest.raises(OSError):
            (source / "x").touch()
        done = subprocess.run(["bash", str(source / "scripts/quickstart.sh")], cwd="/", env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| student + Af-DCD" in (output / "summary.md").read_text()


def on_a_terminal(folder: Path, name: str) -> None:
    """A training whose session has this terminal."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, also in what the tests start
    terminal = os.open(name, os.O_RDWR)  # the first terminal that the leader of a session opens is the session's
    for descriptor in (1, 2):
        os.dup2(terminal, descriptor)
    os.chdir(folder)
    arguments = [*TINY, *RUN, "--max-iterations", "1000", "--val-interval", "1000", "--workers", "2", "--save-dir", "run"]
    sys.argv = [str(REPOSITORY / "train_baseline.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.mark.slow
def test_a_closed_terminal_stops_a_training_with_a_save(tmp_path):
    """SIGHUP comes to the training and, from the shell, to its loader's processes; every write to the terminal is an error from then on
    (which tqdm takes as a reason to stop drawing)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # without columns there is no bar
    started = start(partial(on_a_terminal, tmp_path, os.ttyname(theirs)), tmp_path / "console.txt")
    os.set_blocking(ours, False)
    shown = b""

    def seen():
        nonlocal shown
        with suppress(BlockingIOError):
            shown += os.read(ours, 1 << 16)
        return b"step 3/1000" in shown

    assert wait_for(seen, 300), shown
    assert b"%|" in shown, "a progress bar was shown"
    (main,) = started.processes
    workers = children(main.pid)
    assert len(workers) >= 2
    for process in workers:
        os.kill(process, signal.SIGHUP)
    time.sleep(0.5)
    os.close(theirs)
    os.close(ours)
    started.wait()
    step = int((tmp_path / "run" / "INTERRUPTED").read_text().split(";")[0].split()[-1])
    assert step >= 3 and checkpoint.load(tmp_path / "run" / "last.pth")["step"] == step
