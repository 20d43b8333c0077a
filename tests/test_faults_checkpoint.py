"""The negative control of tests/test_checkpoint.py's kills: a checkpoint that is written over the one before."""

import random
import signal
import time
from functools import partial
from pathlib import Path

import torch

from tests.test_checkpoint import content
from tests.workers import start


def overwrite_for_ever(folder: Path) -> None:
    """As most codebases save: torch.save over the only file."""
    state = content(0, 2_000_000)
    for number in range(10**9):
        torch.save(state, folder / "last.pth")
        print(number, flush=True)


def test_a_kill_while_writing_in_place_loses_the_only_file(tmp_path):
    """Of 20 kills at random moments most leave a file that torch cannot read."""
    draw, unreadable = random.Random(0), 0
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = start(partial(overwrite_for_ever, folder), tmp_path / "console.txt")
        process.until("\n")
        time.sleep(draw.uniform(0, 0.02))
        process.stop(signal.SIGKILL)
        process.wait()
        try:
            torch.load(folder / "last.pth", weights_only=True)
        except Exception:  # noqa: BLE001 - torch raises almost anything on half a file
            unreadable += 1
    assert unreadable >= 3
