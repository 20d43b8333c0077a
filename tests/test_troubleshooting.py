"""Every message of docs/troubleshooting.md is provoked, here or by a test that is named here, and it is what the page says."""

import inspect
import re
import time
import urllib.error
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset.prepare
from models import build_model
from models.weights import load_backbone, load_into, read_state
from scripts import plot
from tests.paths import REPOSITORY
from tests.test_scripts import bash
from tests.workers import RUN, TINY, TINY_STUDENT, save_model
from utils import distributed, session
from utils.options import train_options

PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^\| `([^`]+)`", PAGE.split("## No message")[0], re.M)


def start(*arguments, distil=False) -> None:
    """A training in this process, from its command line."""
    network = (*TINY_STUDENT, "--method", "kd") if distil else TINY
    options = train_options([*network, *RUN, "--workers", "0", "--save-dir", "run", *arguments], distil=distil, description="")
    session.train(options, torch.device("cpu"))


def folder(value=0, turned=False, ending=".png") -> None:
    """The checker, on a data set of one's own with one picture per split."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            Path("mine", kind, split).mkdir(parents=True)
        Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(f"mine/images/{split}/a{ending}")
        Image.fromarray(np.full((24, 32)[:: -1 if turned else 1], value, np.uint8)).save(f"mine/labels/{split}/a.png")
    Path("mine/classes.txt").write_text("".join(f"class{k}\n" for k in range(11)))
    assert dataset.prepare.main(["folder", "--data", "mine", "--workers", "1"]) == 1


def teacher(number, arguments=(), **config) -> None:
    save_model(Path("teacher.pth"), num_classes=number, **config)
    start("--teacher-checkpoint", "teacher.pth", *arguments, distil=True)


def no_network(patch) -> None:
    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")

    patch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    load_backbone(build_model("pspnet", "mobilenetv2", 8), "imagenet")


def pickled() -> None:
    torch.save({"state_dict": {}, "date": datetime.now()}, "old.pth")
    read_state("old.pth")


def endless() -> None:
    value = 1
    for _ in range(45):
        value = [value, value]
    torch.save({"state_dict": {"w": torch.zeros(1)}, "step": value}, "endless.pth")
    read_state("endless.pth")


def damaged() -> None:
    Path("run").mkdir()
    for name in ("args.json", "metrics.jsonl"):
        Path("run", name).write_text("{")
    plot.main(["run", "--output", "page.html"])


def another_width() -> None:
    save_model(Path("narrow.pth"))
    load_into(build_model("pspnet", "mobilenetv2", 8, head_width=16), "narrow.pth")


def unread() -> None:
    train_options(["--method", "cwd", "--cwd-head-temperature", "2", "--save-dir", "run"], distil=True, description="")


def two_ranks(patch) -> None:
    patch.setattr(distributed, "world", lambda: 2)
    patch.setattr(distributed, "check_equal", lambda *_: None)  # asks the other rank
    start("--batch-size", "3")


def autocast(amp: str, slow: torch.dtype, patch) -> None:
    """Look whether the precision of --amp is slow, on a CPU that takes five times as long in the precision `slow`."""

    def conv2d(image, *_, **__):
        end = time.process_time() + (0.05 if image.dtype == slow else 0.01)
        while time.process_time() < end:
            pass

    patch.setattr(torch.nn.functional, "conv2d", conv2d)
    session.warn_of_slow_autocast(amp, torch.device("cpu"))


def node() -> None:
    done = bash(REPOSITORY / "scripts/train_baseline.sh", cwd=".", PYTHON="true", GPUS="1", NNODES="2", MASTER_ADDR="a")
    print(done.stderr)


PROVOKED = {  # the message's beginning -> what makes it; monkeypatch is passed where it is asked for
    "--data is missing": lambda: start("--dataset", "camvid"),
    "folder is missing, it holds": lambda: dataset.prepare.main(["camvid", "--data", "."]),
    "label value 11": lambda: folder(11),
    "label is 24x32": lambda: folder(turned=True),
    "pictures with the ending .bmp": lambda: folder(ending=".bmp"),
    "teacher checkpoint ... has 8 classes": lambda: teacher(8, ("--dataset", "camvid", "--data", ".")),
    "calls class 0": lambda: teacher(8, classes=["road"] * 8),
    "torchvision has no ImageNet weights for": lambda: load_backbone(build_model("pspnet", "resnet101", 8), "imagenet"),
    "no ImageNet weights for": no_network,
    "holds more than tensors": pickled,
    "it is damaged, or no checkpoint of torch": lambda: (Path("page.pth").write_text("<!DOCTYPE html>"), read_state("page.pth")),
    "holds more than 2,097,152 values": endless,
    "args.json: damaged": damaged,
    "does not fit the model": another_width,
    "unknown option --epochs": lambda: start("--epochs", "3"),
    "--cwd-head-temperature": unread,
    "--cwd-logits-weight": lambda: start("--cwd-logits-weight", "3", distil=True),
    "--amp bf16": lambda patch: autocast("bf16", torch.bfloat16, patch),
    "batch size 3": two_ranks,
    "--device cuda": lambda patch: (patch.setattr(torch.cuda, "is_available", lambda: False), distributed.init("cuda")),
    "set NODE_RANK": node,
}  # fmt: skip
ELSEWHERE = {  # -> the test that makes it
    "holds a run already": "test_engine.test_folders_that_are_refused",
    "holds another run": "test_engine.test_folders_that_are_refused",
    "report.json is of another evaluation": "test_eval.test_another_evaluation_does_not_replace_a_report",
    "another process trains here": "test_faults_run.test_two_processes_cannot_train_in_one_folder",
    "not finite": "test_engine.test_nan_stops_one_rank",
    "another rank stopped": "test_engine.test_a_killed_rank_ends_the_other",
    "cannot write": "test_faults_run.test_no_space_for_a_row",
    "stopped after step": "test_resume.test_stopped_and_resumed_is_never_stopped",
    "Unable to shutdown process": "test_scale.test_a_save_longer_than_torchrun_waits",
}


def beginning(message: str, table: dict) -> str | None:
    return next((start for start in table if message.startswith(start)), None)


@pytest.mark.parametrize("message", MESSAGES)
def test_message(message, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    if found := beginning(message, ELSEWHERE):
        assert_test_looks_for(message, ELSEWHERE[found])
        return
    provoke = PROVOKED[beginning(message, PROVOKED)]
    text = ""
    try:
        provoke(*[monkeypatch] * len(inspect.signature(provoke).parameters))
    except (ValueError, SystemExit) as error:
        text = str(error)
    printed = capsys.readouterr()
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    text += printed.out + printed.err + caplog.text
    assert re.search(pattern, text), text


def assert_test_looks_for(message: str, name: str) -> None:
    """The test exists, and the words between the dots are in its file as it expects them."""
    module, function = name.split(".")
    source = (REPOSITORY / "tests" / f"{module}.py").read_text(encoding="utf-8").replace("\\", "")
    assert f"def {function}(" in source
    words = max(re.split(r"\.\.\.|\(", message), key=len).strip(" ,;()")
    assert words in source or words in re.sub(r'"\n\s+f?"', "", source), words


def test_every_cause_is_used():
    assert {beginning(message, PROVOKED) or beginning(message, ELSEWHERE) for message in MESSAGES} == {*PROVOKED, *ELSEWHERE}


@pytest.mark.parametrize(("amp", "slow"), [("bf16", torch.float16), ("fp16", torch.bfloat16), ("off", torch.float32)])
def test_an_autocast_that_is_no_slower_is_not_warned_of(amp, slow, monkeypatch, caplog):
    autocast(amp, slow, monkeypatch)
    assert not caplog.text
