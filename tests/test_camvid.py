"""Every method on real pictures: twenty steps of train_kd.py on CamVid, on one process and on two."""

import json
import math

import pytest

from dataset.specs import Spec
from losses import METHODS
from tests.paths import SHARED
from tests.workers import script

STEPS = 20
CAMVID = ("--dataset", "camvid", "--data", str(SHARED / "camvid"), "--workers", "0")


def few_to_evaluate() -> None:
    """The first 3 pictures of val and test in place of 334, which take a minute; training keeps its 367."""
    find = Spec.find

    def shortened(spec, root, split):
        items, problems = find(spec, root, split)
        return (items if split == "train" else items[:3]), problems

    Spec.find = shortened


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a DeepLabV3-ResNet18 that has seen CamVid for a few steps, as the teacher."""
    if not (SHARED / "camvid").is_dir():
        pytest.skip(f"no {SHARED / 'camvid'}")
    folder = tmp_path_factory.mktemp("camvid")
    arguments = ("--backbone", "resnet18", "--head-width", "32", "--max-iterations", "5", "--val-interval", "1000", "--save-dir", "teacher")
    teacher = script(folder, "train_baseline.py", *CAMVID, *arguments, "--crop-size", "64", "--batch-size", "4", change=few_to_evaluate)
    assert teacher.wait() == [0], teacher.text
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_twenty_steps_of_every_method(folder, world):
    for name, method in METHODS.items():
        started = script(
            folder, "train_kd.py", *CAMVID, "--method", name, "--teacher-checkpoint", "teacher/student_best.pth",
            "--student-model", "pspnet", "--student-backbone", "resnet18", "--student-head-width", "16", "--crop-size", "64",
            "--batch-size", "4", "--max-iterations", STEPS, "--val-interval", "1000", "--log-interval", "1",
            "--dist-timeout", "120", "--save-dir", f"{name}-{world}",
            world=world, change=few_to_evaluate, console=f"{name}-{world}.txt",
        )  # fmt: skip
        assert started.wait() == [0] * world, f"{name}:\n{started.text}"
        rows = [json.loads(line) for line in (folder / f"{name}-{world}" / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if "loss" in row]
        assert [row["step"] for row in steps] == list(range(1, STEPS + 1)), name
        options = json.loads((folder / f"{name}-{world}" / "args.json").read_text())["options"]["methods"][name]
        active = {f"{name}/{term}" for term in method.terms() if options[method.weight_field(term)]}
        for row in steps:
            terms = {key: value for key, value in row.items() if "/" in key or key in ("loss", "gradient_norm")}
            assert {key for key in terms if key.startswith(f"{name}/")} == active, name
            assert all(math.isfinite(value) for value in terms.values()), (name, row)
        assert steps[0]["task/ce"] != steps[-1]["task/ce"]
