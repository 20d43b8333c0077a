"""scripts/summary.py: what stands in its columns is of one split and the same pictures."""

import json
import sys
from unittest.mock import patch

import pytest
from PIL import Image

from dataset import get_spec
from scripts import summary
from tests.workers import save_model

CLASSES = list(get_spec("shapes").classes)


@pytest.fixture
def run(tmp_path):
    """(name, split, selected on, options) -> "name=folder" of a finished run."""

    def make(name, split="test", selected="val", **options):
        folder = tmp_path / name
        folder.mkdir()
        save_model(folder / "student_best.pth", num_classes=len(CLASSES))
        scores = {"miou": 40.0, "iou": [40.0] * (len(CLASSES) - 1) + [None]}
        report = {"split": split, "selected_on": selected, "selection_miou": 41.0, "classes": CLASSES, "seconds": 60.0, "last": scores,
                  "best": scores}  # fmt: skip
        (folder / "report.json").write_text(json.dumps(report))
        (folder / "args.json").write_text(json.dumps({"options": {"dataset": "shapes"} | options}))
        return f"{name}={folder}"

    return make


def summarize(folder, *arguments) -> list[str]:
    """The rows of summary.md; SystemExit with the message on standard error."""
    with patch.object(sys, "argv", ["summary", *arguments, "--output", str(folder / "out")]):
        summary.main()
    return (folder / "out" / "summary.md").read_text().splitlines()


def test_the_table_and_the_sheet(run, tmp_path):
    rows = summarize(tmp_path, run("a"), run("b"), "--rows", "2")
    assert rows[0].startswith("| run | mIoU val | mIoU test | last, test | parameters |")
    assert [row.split(" | ")[:4] for row in rows[2:4]] == [["| a", "41.00", "40.00", "40.00"], ["| b", "41.00", "40.00", "40.00"]]
    assert rows[5] == "IoU per class on test, of the best on val:" and rows[-1] == f"| {CLASSES[-1]} | - | - |" and len(rows) == 9 + len(CLASSES)
    with Image.open(tmp_path / "out" / "summary.png") as page:
        assert page.width == 4 * 246 + 6
        height = page.height
    summarize(tmp_path, f"a={tmp_path / 'a'}", "--rows", "3")
    with Image.open(tmp_path / "out" / "summary.png") as page:
        assert page.height > height


def test_runs_of_held_out_pictures(run, tmp_path, capsys):
    """They report on training pictures: beside runs that report on test they are refused, alone they show the pictures they scored."""
    held = run("held", "train-held-out", "train-held-out", holdout=0.2)
    assert summarize(tmp_path, held, "--rows", "1")[0].startswith("| run | mIoU train-held-out | mIoU train-held-out |")
    for second in (run("other", "train-held-out", "train-held-out", holdout=0.5), run("plain")):
        with pytest.raises(SystemExit):
            summarize(tmp_path, held, second)
        assert "the runs report on different pictures: held on train-held-out (a share of 0.2), " in capsys.readouterr().err


def test_runs_of_other_selections_say_so_in_every_row(run, tmp_path):
    rows = summarize(tmp_path, run("a"), run("b", selected="train-held-out", select_holdout=0.1), "--rows", "1")
    assert rows[0].startswith("| run | mIoU of the selection | mIoU test |")
    assert [row.split(" | ")[1] for row in rows[2:4]] == ["41.00 (val)", "41.00 (train-held-out, a share of 0.1)"]
    again = run("c", selected="train-held-out", select_holdout=0.2)
    rows = summarize(tmp_path, f"b={tmp_path / 'b'}", again, "--rows", "1")
    assert rows[0].startswith("| run | mIoU of the selection | ")


@pytest.mark.parametrize("arguments,message", [
    (["a={0}/a", "a={0}/b"], "'a' is the title of another column; give every run its own"),
    (["label={0}/a"], "'label' is the title of another column"),
    (["a={0}/a", "--rows", "0"], "--rows 0: must be at least 1"),
    (["a={0}/gone"], "gone: no such folder; give the folder of a finished run"),
    (["{0}/a"], "give TITLE=FOLDER"),
    (["a={0}/a", "--data", "x"], "--data x: shapes has no files"),
])  # fmt: skip
def test_refusals(arguments, message, run, tmp_path, capsys):
    run("a"), run("b")
    with pytest.raises(SystemExit) as end:
        summarize(tmp_path, *(argument.format(tmp_path) for argument in arguments))
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
