"""The folder of one training: settings, log, metrics, checkpoints, and whether it is done.

    args.json              every option with its source, versions, commit, command
    log.txt                what the console showed, with times
    metrics.jsonl, .csv    one row per log step and validation; a resume continues them without duplicate steps
    last.pth               all that a resume needs (last.previous.pth: the save before)
    best.pth               the same at the best validation
    student_best.pth       weights and settings of the best student alone, for eval.py
    tensorboard/           the same rows and pictures for TensorBoard, with --tensorboard (utils/board.py)
    DONE | INTERRUPTED     how it ended; INTERRUPTED says how to go on, on one node with the command
    .lock                  held by the process that trains here; says which one

Every validation is followed by a save of last.pth, so best.pth is never newer, but for a kill between the two saves: the resumed
training then makes that validation again.
"""

import csv
import errno
import fcntl
import functools
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import torch
import torchvision

from utils import checkpoint, distributed
from utils.board import Board
from utils.files import replace_file
from utils.log import logger
from utils.options import COSMETIC, Options


class Run:
    """A training's folder. Only rank 0 writes; every rank reads.

    `state` is the checkpoint to go on from, until `start` hands it over; None for a new run. A run that failed before a step was
    finished has nothing to lose: it is started anew, with or without --resume, and with any settings.

    Raises:
        ValueError: the folder holds another run, or one that is there already without --resume, cannot be written, or is in use by
            another process.
    """

    def __init__(self, options: Options, columns: list[str]):
        self.folder = Path(options.save_dir)
        self.options = options
        self.columns = ["step", *columns]
        self._last_is_damaged = False
        self.board = None
        self._check_folder()
        self._lock()  # nobody goes on before everybody has looked
        self.state = self._find_state()

    def _check_folder(self) -> None:
        """Refuse what could not be written, before any work is done."""
        folder = self.folder
        try:
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"--save-dir {folder}: is a file; give a folder")
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe.{os.getpid()}.tmp"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(f"--save-dir {folder}: cannot be written ({error.strerror}); choose another folder") from error

    def _lock(self) -> None:
        """Keep other processes out of the folder while this one lives.

        The kernel lets go of a record lock when its process ends, however it ends, so that none is ever stale. Forked processes do
        not inherit it, unlike flock's, with which the orphaned loader of a killed training would lock its successor out.
        """
        failure = ""
        if distributed.is_main():
            self._lock_file = open(self.folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held until the process ends
            try:
                fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    self._lock_file.seek(0)
                    failure = (f"--save-dir {self.folder}: another process trains here ({self._lock_file.read().strip()}); "
                               f"wait until it ends or stop it, or choose another folder")  # fmt: skip
                else:
                    logger.warning("--save-dir %s: cannot be locked (%s); see that nothing else trains there", self.folder, error.strerror)
            else:
                self._lock_file.truncate(0)
                print(f"process {os.getpid()} on {platform.node()}", file=self._lock_file, flush=True)
        failure = distributed.gather_text(failure)[0]
        if failure:
            raise ValueError(failure)

    def _find_state(self) -> dict | None:
        """The checkpoint to go on from, None for a run that begins."""
        last = self.folder / "last.pth"
        if not (last.exists() or (self.folder / "args.json").exists()) or not self._has_steps():
            return None
        if not self.options.resume:
            raise ValueError(f"--save-dir {self.folder}: holds a run already; pass --resume to go on with it, or choose another folder")
        if self.done:
            return None
        state = checkpoint.load_last(last, logger.warning)
        if state is None:
            raise ValueError(f"--save-dir {self.folder}: holds a run without its last.pth; put that file back, or choose another folder")
        return state

    def _has_steps(self) -> bool:
        """Whether a step of the run in the folder was finished, by all that is left of it."""
        metrics = self.folder / "metrics.jsonl"
        if self.done or (self.folder / "best.pth").exists() or metrics.exists() and metrics.stat().st_size:
            return True
        last = self.folder / "last.pth"
        try:
            return any(path.exists() and checkpoint.load(path)["step"] > 0 for path in (last, checkpoint.previous(last)))
        except checkpoint.CheckpointError:
            return True  # damaged: nobody can say what it was

    @property
    def done(self) -> bool:
        return (self.folder / "DONE").exists()

    def start(self, model: dict, teacher: dict | None, names: list[str] | tuple = ()) -> dict | None:
        """Begin or go on: writes args.json, and returns the state to resume from, None for a new run.

        Args:
            model: the student's config; teacher: {"file": its name, "sha256": its content}.
            names: of the pictures that this rank predicts in a validation, for the board.

        Raises:
            ValueError: the run in the folder has other settings, or was distilled from another teacher.
        """
        self._configure(model, teacher)
        state, self.state = self.state, None  # as large as the training itself: to be held no longer than needed
        if state is not None:
            self._check_same_run(state["config"])
            self._compare_machines(state["environment"])
        steps = distributed.gather_text(str(state["step"] if state else 0))
        if len(set(steps)) > 1:
            raise ValueError(f"--save-dir {self.folder}: ranks find different checkpoints there (steps {', '.join(steps)}); "
                             f"all nodes need the same shared folder")  # fmt: skip
        if distributed.is_main():
            last = self.folder / "last.pth"
            self._last_is_damaged = last.exists() and not checkpoint.intact(last)
            # how it ended before, what a kill in the middle of a save has left, and what a run left that never finished a step
            useless = [self.folder / "DONE", self.folder / "INTERRUPTED", *self.folder.glob(".*.tmp")]
            if state is None:
                useless += [last, checkpoint.previous(last)]
            for path in useless:
                path.unlink(missing_ok=True)
            self._write_arguments()
            step, validated = (state["step"], state["validated"]) if state else (0, 0)
            self._truncate_metrics(step, validated)
            if self.options.tensorboard:
                self.board = Board(self.folder / "tensorboard", step, validated, self.options.spec, names)
        return state

    def _compare_machines(self, old: dict) -> None:
        """Warn where a resume cannot be bit for bit."""
        now = environment()
        for key in ("ranks", "threads", "torch", "device"):
            if now[key] != old.get(key):
                logger.warning("resumed with %s %s, was %s: the result will differ in its last digits", key, now[key], old.get(key))

    def check_same(self, model: dict, teacher: dict | None) -> None:
        """Raise when a finished run has other settings than asked for now."""
        self._configure(model, teacher)
        self._check_same_run(checkpoint.load(self.folder / "student_best.pth")["config"])

    def _configure(self, model: dict, teacher: dict | None) -> None:
        spec = self.options.spec
        self.config = {
            "model": model, "teacher": teacher, "dataset": spec.name, "classes": list(spec.classes),
            "colours": [list(colour) for colour in spec.colours], "options": self.options.plain(),
        }  # fmt: skip

    def _check_same_run(self, old: dict) -> None:
        differences = []
        if old["model"] != self.config["model"]:
            differences.append(f"the model is {self.config['model']}, was {old['model']}")
        if (old["teacher"] or {}).get("sha256") != (self.config["teacher"] or {}).get("sha256"):
            differences.append(f"the teacher is {self.config['teacher']}, was {old['teacher']}")
        for key, what in (("classes", "class"), ("colours", "colour of class")):  # of the data set `folder` they are the user's
            was, now = old.get(key) or [], self.config[key]
            changed = next((k for k, (old_one, new_one) in enumerate(zip_longest(was, now)) if old_one != new_one), None)
            if changed is not None:
                old_one, new_one = (values[changed] if changed < len(values) else None for values in (was, now))
                differences.append(f"{what} {changed} is {new_one}, was {old_one}")
        # through json, where tuples and lists are one
        now, was = (flatten(json.loads(json.dumps(options))) for options in (self.config["options"], old["options"]))
        for key in sorted(set(now) | set(was)):
            if key not in COSMETIC and now.get(key) != was.get(key):
                differences.append(f"--{key.replace('_', '-').replace('.', '-')} is {now.get(key)}, was {was.get(key)}")
        if differences:
            raise ValueError(f"--save-dir {self.folder}: holds another run ({'; '.join(differences)}); choose another folder, or the same settings")

    def _write_arguments(self) -> None:
        arguments = {
            "command": command(),
            "options": self.config["options"],
            "sources": self.options.sources,
            "model": self.config["model"],
            "teacher": self.config["teacher"],
            "environment": environment(),
        }
        write_text(self.folder / "args.json", json.dumps(arguments, indent=2) + "\n")

    def _truncate_metrics(self, step: int, validated: int) -> None:
        """Drop the rows that the resumed run writes again, after `step` and of validations after `validated`, and rebuild the table.

        `validated` may be smaller than a row's step although `step` is not: a run that was stopped before the validation of its last
        step has saved that step, makes the validation after its resume, and may die before it has saved that.
        """
        path = self.folder / "metrics.jsonl"
        rows = []
        for line in path.read_bytes().split(b"\n") if path.exists() else []:
            try:
                row = json.loads(line)
                kept = row["step"] <= (validated if "val/mIoU" in row else step)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # cut off by a kill, or what a loss of power has left
            if kept:
                rows.append(row)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        table = self.folder / "metrics.csv"
        with writing(table), open(table, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def record(self, step: int, values: dict) -> None:
        """Append a row to metrics.jsonl, the board and metrics.csv; columns that the table does not have are left out there alone."""
        if not distributed.is_main():
            return
        row = {"step": step, **values}
        lines, table = self.folder / "metrics.jsonl", self.folder / "metrics.csv"
        with writing(lines), open(lines, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        with writing(table), open(table, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, extrasaction="ignore").writerow(row)
        if self.board:
            self.board.add(step, values)

    def save_last(self, state: dict) -> None:
        # a damaged file must not take the place of the good one before it, which this run went on from
        self._save("last.pth", state, keep_previous=not self._last_is_damaged)
        self._last_is_damaged = False

    def save_best(self, state: dict, weights: dict) -> None:
        """`state`: as for `save_last`; `weights`: the state dict to deploy (the moving average where there is one)."""
        self._save("best.pth", state)
        self._save("student_best.pth", {"student": weights, **{key: state[key] for key in ("step", "metrics")}})

    def _save(self, name: str, content: dict, keep_previous: bool = False) -> None:
        """On rank 0, while the others wait; a failure there stops them all."""
        failure = ""
        if distributed.is_main():
            try:
                checkpoint.save(self.folder / name, {**content, "config": self.config, "environment": environment()}, keep_previous)
            except checkpoint.CheckpointError as error:
                failure = str(error)
        failure = distributed.gather_text(failure)[0]
        if failure:
            raise checkpoint.CheckpointError(failure)

    def finish(self, summary: str) -> None:
        if distributed.is_main():
            write_text(self.folder / "DONE", summary + "\n")

    def interrupted(self, step: int) -> None:
        """Say how to go on."""
        if distributed.is_main():
            again = command() + ("" if "--resume" in sys.argv else " --resume")
            how = "go on with:"
            if distributed.several_nodes():
                how = "go on with the same launcher and arguments on every node, and --resume; the training's part:"
            elif distributed.launched():
                name, default = distributed.GRACE
                again = f"{name}={os.environ.get(name) or default} {again}"
            write_text(self.folder / "INTERRUPTED", f"stopped after step {step}; {how}\n{again}\n")
            logger.info("stopped after step %d, saved; %s\n  %s", step, how, again)


class StopSignal:
    """Turns the first SIGTERM, SIGINT or SIGHUP (a closed terminal) into a flag; a second SIGINT stops at once, as usual. What is set
    to be ignored stays so, as under nohup.

    `status` is what the process should exit with then: 128 + the signal's number, as a shell expects of an interrupted command.
    """

    def __init__(self):
        self.received = False
        self.status = 128 + signal.SIGTERM  # of a rank that stops because another one was told to

    def __enter__(self):
        numbers = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number, _frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received, self.status = True, 128 + number


def command() -> str:
    """The command line of this process, for pasting; under torchrun with its number of processes. On several nodes the script's part alone:
    every node has a command of its own."""
    if distributed.several_nodes():
        return shlex.join(sys.argv)
    program = [sys.executable] if not distributed.launched() else ["torchrun", f"--nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"]
    return shlex.join([*program, *sys.argv])


def environment() -> dict:
    """Versions, machine and commit, as plain values."""
    return {
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": distributed.device_name(),
        "ranks": distributed.world(),
        "commit": commit(),
    }


def flatten(options: dict) -> dict:
    """The methods' options beside the others, under "method.option"."""
    methods = options.get("methods", {})
    plain = {key: value for key, value in options.items() if key != "methods"}
    return plain | {f"{method}.{key}": value for method, values in methods.items() for key, value in values.items()}


@functools.cache  # of the code that runs, whatever happens to the files later
def commit() -> str:
    """The commit of this code, with "-dirty" when files differ from it; "unknown" outside a git clone."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return "unknown"
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_text(path: Path, text: str) -> None:
    """Replace a small file as a whole, durably; what the system says against it is one line (`writing`)."""
    with writing(path):
        replace_file(path, text)


@contextmanager
def writing(path: Path):
    """Turns what the system says against writing a file into one line.

    Raises:
        ValueError: no space, no rights, too large.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}; free space or choose another folder") from error
