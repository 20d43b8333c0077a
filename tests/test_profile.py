"""scripts/profile.py: turns and percentiles with a clock that is known, figures against their own definitions, refusals."""

import json

import pytest
import torch

from models import build_model, count_macs
from models.deploy import deployable
from scripts import profile
from tests.workers import save_model
from utils.options import profile_options

TINY = "lraspp:mobilenetv3_small:8"


def run(*arguments):
    profile.main(profile_options(["--device", "cpu", *arguments], description=""), torch.device("cpu"))


def test_networks_take_turns():
    order = []
    passes = {name: lambda name=name: order.append(name) for name in "abc"}
    clock = iter(range(100))

    def tick(function):
        function()
        return next(clock)

    times = profile.interleaved(passes, 4, 1, tick)
    assert "".join(order) == "cba" + "abc" + "cba" + "abc" + "cba"
    assert times == {"a": [3, 8, 9, 14], "b": [4, 7, 10, 13], "c": [5, 6, 11, 12]}, "without the warm-up"


def test_figures(tmp_path, monkeypatch):
    """Percentiles of 101 known times; the rest from the network itself, as it is shipped."""
    save_model(tmp_path / "student.pth", num_classes=8)
    count = iter(range(10**6))

    def known(function, device):  # 0, 1, ... for both networks, without running them
        return float(next(count) // 2)

    monkeypatch.setattr(profile, "milliseconds", known)
    given = ("--models", TINY, "--checkpoints", str(tmp_path / "student.pth"), "--num-classes", "5", "--warmup", "0", "--repeats", "101")
    run(*given, "--sizes", "64x96", "--output", str(tmp_path / "one"))
    run(*given, "--sizes", "64x96", "64x64", "--batch-size", "2", "--output", str(tmp_path / "two"))
    one, two = (json.loads((tmp_path / name / "profile.json").read_text()) for name in ("one", "two"))
    tiny, student = one["rows"]
    assert [tiny["network"], student["network"]] == [TINY, str(tmp_path / "student.pth")]
    assert [tiny[f"p{percentile}_ms"] for percentile in (50, 90, 99)] == [50, 90, 99]
    model = build_model("lraspp", "mobilenetv3_small", 5, head_width=8)
    shipped = deployable(model)[0]
    assert tiny["parameters"] == sum(parameter.numel() for parameter in shipped.parameters()) < sum(p.numel() for p in model.parameters())
    assert tiny["macs"] == count_macs(model, 64, 96)
    assert 4 * tiny["parameters"] < tiny["file_bytes"] < 4.5 * tiny["parameters"]
    assert len(two["rows"]) == 4 and [row["width"] for row in two["rows"]] == [96, 96, 64, 64]
    for row, other in zip(one["rows"], two["rows"], strict=False):
        assert other["macs"] == row["macs"] and other["peak_mib"] == pytest.approx(2 * row["peak_mib"], rel=0.02)
    # the widest two neighbours of the network at 64x96, in float32: 16 channels at half the size, before and behind an activation
    assert tiny["peak_mib"] > 2 * 4 * 16 * 32 * 48 / 2**20
    text = (tmp_path / "two/profile.md").read_text()
    assert "2 pictures to labels" in text and "threads" in text and two["machine"]["device"] in text
    assert [line.count("|") for line in text.splitlines() if "|" in line] == [10] * 6 and f"| {TINY}" in text


def test_it_runs_what_it_times(tmp_path):
    """To logits and to labels, BatchNorms as trained: times above 0, parameters those of the network without its auxiliary head."""
    given = ("--models", "deeplabv3:resnet18:8", "--num-classes", "3", "--sizes", "32x64", "--repeats", "2", "--warmup", "0")
    run(*given, "--no-fold", "--until", "logits", "--output", str(tmp_path))
    row, = json.loads((tmp_path / "profile.json").read_text())["rows"]
    assert row["p99_ms"] >= row["p50_ms"] > 0
    model = build_model("deeplabv3", "resnet18", 3, head_width=8, aux=False)
    assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())


WRONG = {
    "nothing": ((), "nothing to profile: give --models MODEL:BACKBONE ..., or --checkpoints FILE ..."),
    "name": (("--models", "deeplabv3"), "--models deeplabv3: give MODEL:BACKBONE"),
    "width": (("--models", "deeplabv3:resnet18:wide"), "--models deeplabv3:resnet18:wide: give MODEL:BACKBONE"),
    "size": (("--models", TINY, "--sizes", "512"), "--sizes 512: give HEIGHTxWIDTH, both at least 32"),
    "small": (("--models", TINY, "--sizes", "8x64"), "--sizes 8x64: give HEIGHTxWIDTH, both at least 32"),
    "twice": (("--models", TINY, TINY), "names one twice"),
    "classes": (("--checkpoints", "a.pth", "--num-classes", "5"), "--num-classes 5 is read by --models alone"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_flags(case, capsys):
    flags, message = WRONG[case]
    with pytest.raises(SystemExit) as end:
        profile_options(list(flags), description="")
    assert end.value.code == 2 and message in (text := capsys.readouterr().err) and text.count("\n") == 1


def test_one_process(monkeypatch):
    monkeypatch.setattr(profile.distributed, "world", lambda: 2)
    with pytest.raises(ValueError, match="^networks are profiled by one process, 2 were started; start it without torchrun$"):
        run("--models", TINY, "--sizes", "32x32")


def test_wrong_networks_and_folders(tmp_path):
    with pytest.raises(ValueError, match="there is no backbone 'resnet19'"):
        run("--models", "deeplabv3:resnet19", "--sizes", "32x32")
    with pytest.raises(ValueError, match="no such file"):
        run("--checkpoints", str(tmp_path / "missing.pth"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--output .*file: is a file; give a folder"):
        run("--models", TINY, "--output", str(tmp_path / "file"))
