"""What the tests of faults share: torchrun with its ranks, pictures that are broken in every way, a file system that fills up."""

import io
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.paths import REPOSITORY
from tests.workers import TIMEOUT


class Torchrun:
    """A script under torchrun with two ranks, in its own process group; `lines` is what it has printed so far."""

    def __init__(self, folder: Path, script: str, *arguments: str, restarts: int = 0):
        # torchrun hands restarted ranks the dead attempt's addresses without the variable (torch 2.15, pytorch issues 135712 and 167288);
        # scripts/environment.sh sets it for the launchers
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
        self.console = folder / f"torchrun {time.monotonic_ns()}.txt"
        with open(self.console, "w") as file:
            self.process = subprocess.Popen(
                [*command, str(REPOSITORY / script), *arguments], cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    @property
    def text(self) -> str:
        return self.console.read_text(encoding="utf-8")

    def until(self, words: str, count: int = 1, timeout: float = TIMEOUT) -> None:
        """Wait until the words were printed `count` times."""
        limit = time.monotonic() + timeout
        while self.text.count(words) < count:
            assert self.process.poll() is None or self.text.count(words) >= count, f"ended without {words!r}:\n{self.text}"
            if time.monotonic() > limit:
                self.give_up(f"no {words!r} after {timeout} s")
            time.sleep(0.01)

    def wait_for_lines(self, words: str, count: int) -> None:
        """Wait until the words were printed `count` times or it has ended."""
        wait_for(lambda: self.text.count(words) >= count or self.process.poll() is not None, TIMEOUT)

    def ranks(self) -> dict[int, int]:
        """{rank: process id} of the processes that torchrun started and that live."""
        found = {}
        for process in children(self.process.pid):
            try:
                variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            except OSError:
                continue  # gone meanwhile
            number = [int(variable[5:]) for variable in variables if variable.startswith(b"RANK=")]
            if number:
                found[number[0]] = process
        return found

    def kill_rank(self, rank: int) -> None:
        os.kill(self.ranks()[rank], signal.SIGKILL)

    def wait(self, timeout: float = TIMEOUT) -> int:
        """The exit code; what does not end in time is killed with its ranks."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.give_up(f"torchrun did not end in {timeout} s")

    def give_up(self, reason: str) -> None:
        """End torchrun with its ranks, which would go on for ever, and fail."""
        for process in [*self.ranks().values(), self.process.pid]:
            os.kill(process, signal.SIGKILL)
        self.process.wait()
        pytest.fail(f"{reason}:\n{self.text}")


def children(process: int) -> list[int]:
    """The processes that a process has started and that live (Linux)."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += [int(word) for word in task.read_text().split()]
        except OSError:
            continue
    return found


def wait_for(condition, timeout: float = 60) -> bool:
    """Whether the condition holds at some time within `timeout` seconds."""
    limit = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------------- files


def encoded(array: np.ndarray, kind: str, **options) -> bytes:
    """An array as the content of a PNG or JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def corrupted(data: bytes, rng: np.random.Generator) -> bytes:
    """The data truncated, with one bit flipped, with a block of zeros, or with garbage in the middle."""
    kind, at = rng.integers(4), int(rng.integers(len(data)))
    if kind == 0:
        return data[:at]
    block = bytearray(data)
    if kind == 1:
        block[at] ^= 1 << int(rng.integers(8))
    else:
        length = min(64, len(data) - at)
        block[at : at + length] = bytes(length) if kind == 2 else rng.bytes(length)
    return bytes(block)


def camvid(root: Path, split: str, count: int, size=(24, 32), seed: int = 0) -> Path:
    """A split of CamVid with `count` pictures of noise."""
    rng = np.random.default_rng(seed)
    for folder, shape, values in ((split, (*size, 3), 256), (f"{split}annot", size, 12)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, values, shape, dtype=np.uint8)).save(root / folder / f"{number:04d}.png")
    return root


@contextmanager
def small_disk(folder: Path, kibibytes: int):
    """The folder as a file system of this size; skips the test where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def read_only(folder: Path):
    """The folder and all below cannot be written, by root neither; skips the test where a mount would be needed and is not allowed."""
    if os.geteuid():
        modes = {path: path.stat().st_mode for path in [folder, *folder.rglob("*")]}
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
        try:
            yield
        finally:
            for path, mode in modes.items():
                path.chmod(mode)
        return
    if subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True).returncode:
        pytest.skip("root writes everywhere, and nothing can be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
