"""Processes for tests: the scripts as a shell runs them, and functions on several ranks.

A fork server imports the project once; a process then starts in milliseconds instead of the seconds that importing torch takes.
"""

import atexit
import io
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import utils.session  # noqa: F401 - imported once, in the fork server
from dataset import shapes
from models import build_model
from tests.paths import REPOSITORY
from utils import checkpoint, distributed

TIMEOUT = 300.0  # seconds after which a test gives a process up: a hundred times what it takes on a free machine
TINY = ("--backbone", "mobilenetv2", "--head-width", "8")  # the smallest network, of train_baseline.py
TINY_STUDENT = ("--student-backbone", "mobilenetv2", "--student-head-width", "8")
RUN = ("--device", "cpu", "--crop-size", "64", "--batch-size", "2", "--log-interval", "1", "--dist-timeout", "30")

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.workers"])


@dataclass
class Started:
    """One process per rank; `console` is the file that all of them write to."""

    processes: list
    connections: list
    console: Path

    @property
    def text(self) -> str:
        return self.console.read_text(encoding="utf-8")

    def until(self, words: str, timeout: float = TIMEOUT) -> None:
        """Wait until the console shows the words."""
        limit = time.monotonic() + timeout
        while words not in self.text:
            assert any(p.is_alive() for p in self.processes) or words in self.text, f"ended without {words!r}:\n{self.text}"
            assert time.monotonic() < limit, f"no {words!r} after {timeout} s:\n{self.text}"
            time.sleep(0.005)

    def stop(self, number: int = signal.SIGTERM, rank: int | None = None) -> None:
        """Send a signal to one rank or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            os.kill(process.pid, number)

    def wait(self, timeout: float = TIMEOUT) -> list[int]:
        """The exit codes, rank by rank; what does not end in time is killed, and the test fails."""
        limit = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, limit - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in hanging:
            self.processes[rank].kill()
            self.processes[rank].join()
        assert not hanging, f"ranks {hanging} did not end in {timeout} s:\n{self.text}"
        return [process.exitcode for process in self.processes]


def start(function, console: Path, *, world: int = 1) -> Started:
    """Start `function()` (picklable) on `world` ranks, with the variables that torchrun sets where there are several."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    console.write_text("")
    processes, connections = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=_process, args=(function, rank, world, port, console, theirs)))
        processes[-1].start()
        theirs.close()
        connections.append(ours)
    return Started(processes, connections, console)


def _process(function, rank, world, port, console, connection):
    if world > 1:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in here.items()}, MASTER_ADDR="127.0.0.1")
    file = os.open(console, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # a loader's workers start as in a script: the fork server forces its own way
    code = 1
    try:
        buffer = io.BytesIO()
        torch.save(function(), buffer)  # multiprocessing would send tensors as handles of this process, which ends
        connection.send_bytes(buffer.getvalue())
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()  # as at the end of a script; a forked process skips them
        os._exit(code)


def on_ranks(function, world: int, console: Path, timeout: float = TIMEOUT) -> list:
    """What `function()` returns on every rank of a gloo group: tensors and plain values."""
    started = start(partial(_in_group, function), console, world=world)
    results = []
    for connection in started.connections:  # before joining: a large result fills the pipe
        if connection.poll(timeout):
            try:
                results.append(torch.load(io.BytesIO(connection.recv_bytes()), weights_only=True))
            except EOFError:
                pass
    codes = started.wait(timeout)
    assert codes == [0] * world and len(results) == world, f"exit codes {codes}:\n{started.text}"
    return results


def _in_group(function):
    distributed.init("cpu", timeout=30)
    result = function()
    distributed.shutdown()
    return result


# --------------------------------------------------------------------------------------------------------------- scripts


def script(folder: Path, name: str, *arguments, world: int = 1, change=None, console: str = "console.txt") -> Started:
    """Start one of the scripts in `folder`, with 5 pictures in the drawn validation and test splits (96 take 3 s each).

    `change`: a picklable function that is called first, to break something.
    """
    return start(partial(_script, folder, name, [str(a) for a in arguments], change), folder / console, world=world)


def _script(folder, name, arguments, change):
    os.chdir(folder)
    shapes.COUNTS.update(val=5, test=5)
    if change:
        change()
    sys.argv = [str(REPOSITORY / name), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def train(folder: Path, *arguments, **options) -> Started:
    """train_baseline.py on the smallest network."""
    return script(folder, "train_baseline.py", *TINY, *RUN, *arguments, **options)


def distil(folder: Path, *arguments, **options) -> Started:
    """train_kd.py with the smallest networks; the teacher is `teacher.pth` in the folder."""
    save_model(folder / "teacher.pth", 1)
    return script(folder, "train_kd.py", "--teacher-checkpoint", "teacher.pth", *TINY_STUDENT, *RUN, *arguments, **options)


def save_model(path: Path, seed: int = 0, num_classes: int = 8, dataset: str = "shapes", pictures: torch.Tensor | None = None, **config) -> None:
    """A checkpoint as a training of this project leaves one: random weights, with statistics that make it predict several classes on
    pictures (B, 3, H, W) uint8 like those given, or of noise."""
    torch.manual_seed(seed)
    model = build_model("pspnet", "mobilenetv2", num_classes, head_width=8)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8) if pictures is None else pictures)
    config = {"model": model.config, "teacher": None, "dataset": dataset, "options": {}, **config}
    checkpoint.save(path, {"student": model.state_dict(), "step": 0, "metrics": {}, "config": config})
