"""Evaluation: the same integers for any number of ranks, and eval.py from a checkpoint to its report and pictures."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import eval as main
from dataset import Batch, EvalSampler, build_loader, get_spec
from dataset.batch import Sample
from dataset.segmentation import SegDataset
from models import SegOutput
from models.weights import model_from_checkpoint
from tests.workers import on_ranks, save_model, script
from utils import distributed
from utils.metrics import Inference, Stopped, confusion, evaluate

COUNTS, RANKS, CLASSES = (1, 2, 3, 5, 9, 21, 101), (1, 2, 3, 4), 4


class Noise(Dataset):
    """Pictures of different sizes whose labels are their red channel modulo 6: 4 classes, 4 as 0, and 5 not labelled."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        draw = np.random.default_rng(index)
        image = draw.integers(0, 256, (3 + index % 5, 4 + index % 7, 3), dtype=np.uint8)
        target = image[:, :, 0] % 6
        target[target == 4], target[target == 5] = 0, 255
        return Sample(image, target, f"picture {index}")


class ByGreen(nn.Module):
    """Calls a pixel by its red channel where green is above 100, else class 1."""

    config = {"in_channels": 3}

    def forward(self, image):
        label = torch.where(image[:, 1] > 100, image[:, 0] % 4, 1).long()
        return SegOutput(logits=nn.functional.one_hot(label, CLASSES).permute(0, 3, 1, 2).float())


SPEC = SimpleNamespace(num_classes=CLASSES, scored=None)


def evaluate_noise(count, stop=None):
    loader = build_loader(Noise(count), EvalSampler(count, distributed.rank(), distributed.world()))
    return evaluate(ByGreen(), loader, count, SPEC, torch.device("cpu"), stop=stop)


def evaluate_all() -> dict:
    """Scores for every number of pictures; and after how many turns a stop that only the last rank asks for ends all ranks."""
    found = {count: vars(evaluate_noise(count)) for count in COUNTS}
    turns = []

    def stop():
        turns.append(1)
        return distributed.rank() == distributed.world() - 1 and len(turns) == 3

    try:
        evaluate_noise(60, stop)
        found["stopped"] = 0
    except Stopped:
        found["stopped"] = len(turns)
    return found


@pytest.fixture(scope="module")
def one_rank():
    return evaluate_all()


@pytest.mark.parametrize("world", RANKS[1:])
def test_scores_do_not_depend_on_the_number_of_ranks(world, one_rank, tmp_path):
    for result in on_ranks(evaluate_all, world, tmp_path / "console.txt"):
        assert json.dumps(result) == json.dumps(one_rank)  # as text: nan is not equal to itself


def test_one_rank_counts_every_pixel_once(one_rank):
    for count in COUNTS:
        expected = np.zeros((CLASSES, CLASSES), np.int64)
        for index in range(count):
            sample = Noise(count)[index]
            for label, red, green in zip(sample.target.flat, sample.image[..., 0].flat, sample.image[..., 1].flat, strict=True):
                if label != 255:
                    expected[label, red % 4 if green > 100 else 1] += 1
        assert one_rank[count]["matrix"] == expected.tolist() and one_rank[count]["images"] == count
    assert one_rank["stopped"] == 3


def test_a_repeated_or_lost_picture_is_noticed():
    """What torch's DistributedSampler does - a picture twice, to give every rank equally many - is an error, not a score."""
    batches = [*build_loader(Noise(4), EvalSampler(4))]
    for given in (batches[:3], [*batches, batches[0]][1:][:3]):
        with pytest.raises(RuntimeError, match="3 pictures were evaluated, 4 expected"):
            evaluate(ByGreen(), given, 4, SPEC, torch.device("cpu"))
    pair = Batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 4, 4, dtype=torch.uint8), ["a", "a"])
    with pytest.raises(RuntimeError, match="5 pictures were evaluated, 4 expected"):
        evaluate(ByGreen(), [pair, *batches[:3]], 4, SPEC, torch.device("cpu"))


# -------------------------------------------------------------------------------------------------------------------- eval.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """5 CamVid pictures of two sizes, among them names that differ behind a dot or in their folder, and a network of 11 classes."""
    folder = tmp_path_factory.mktemp("eval")
    draw = np.random.default_rng(0)
    for number, name in enumerate(("a.1", "a.2", "one/b", "two/b", "c")):
        size = (40, 48) if number % 2 else (32, 56)
        for place, shape, values in (("test", (*size, 3), 256), ("testannot", size, 12)):
            path = folder / "data" / place / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, values, shape, dtype=np.uint8)).save(path)
    save_model(folder / "student.pth", num_classes=11, dataset="camvid")
    return folder


def run(folder, *arguments, world=1, output="out"):
    started = script(folder, "eval.py", "--checkpoint", "student.pth", "--data", "data", "--device", "cpu", "--output", output,
                     "--workers", "0", "--dist-timeout", "30", *arguments, world=world, console=f"{output}.txt")  # fmt: skip
    codes = started.wait()
    assert codes == [0] * world, started.text
    return json.loads((folder / output / "report.json").read_text())


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saved_predictions_give_the_reported_scores_again(folder):
    report = run(folder, "--save-predictions", "--save-overlays", "3")
    pictures = SegDataset(get_spec("camvid"), folder / "data", "test")
    matrix, palette = 0, get_spec("camvid").palette()
    for item in pictures.items:
        with Image.open(folder / "out" / "predictions" / f"{item.name}.png") as saved:
            prediction = np.array(saved)
            assert saved.mode == "P" and np.array_equal(np.array(saved.convert("RGB")), palette[prediction])
        matrix = matrix + confusion(torch.from_numpy(prediction), torch.from_numpy(item.read()[1]), 11)
    assert report["matrix"] == matrix.tolist() and report["images"] == len(pictures) == 5
    assert 0 < report["miou"] < 100 and report["miou"] == pytest.approx(np.nanmean(report["iou"]))
    assert report["split"] == "test" and report["dataset"] == "camvid" and len(report["classes"]) == 11
    assert len(contents(folder / "out" / "predictions")) == 5 and len(contents(folder / "out" / "overlays")) == 3


def test_ranks_and_workers_do_not_change_the_report(folder):
    one = run(folder, "--save-predictions", "--save-overlays", "3", output="one")
    two = run(folder, "--save-predictions", "--save-overlays", "3", "--workers", "1", world=2, output="two")
    assert two["matrix"] == one["matrix"] and two["miou"] == one["miou"] and two["images"] == 5
    for kind in ("predictions", "overlays"):
        assert contents(folder / "two" / kind) == contents(folder / "one" / kind)


def test_modes(folder):
    whole = run(folder)
    slide = ("--mode", "slide", "--window")
    assert run(folder, *slide, "64", output="slide")["matrix"] == whole["matrix"], "a window as large as the picture is the picture"
    assert run(folder, *slide, "24", "32", output="small")["matrix"] != whole["matrix"]
    assert run(folder, "--flip", "--scales", "0.75", "1.25", output="scales")["matrix"] != whole["matrix"]
    limited = run(folder, "--limit", "2", output="limited")
    assert limited["images"] == 2 and np.array(limited["matrix"]).sum() < np.array(whole["matrix"]).sum()


def test_evaluating_twice_gives_the_same_pixels_as_inference_by_hand(folder):
    report = run(folder)
    model, _ = model_from_checkpoint(folder / "student.pth")
    model.eval()
    matrix = 0
    for item in SegDataset(get_spec("camvid"), folder / "data", "test").items:
        image, target = item.read()
        with torch.no_grad():
            prediction = Inference()(model, torch.from_numpy(image).permute(2, 0, 1)[None])
        matrix = matrix + confusion(prediction[0], torch.from_numpy(target), 11)
    assert report["matrix"] == matrix.tolist()


def test_another_evaluation_does_not_replace_a_report(folder, monkeypatch):
    """The same one may be repeated, from elsewhere too, on more processes, with more pictures."""
    given = {"checkpoint": "student.pth", "dataset": "camvid", "data": str(folder / "data"), "split": None, "output": str(folder / "kept"),
             "mode": "whole", "window": (360, 360), "stride": None, "scales": (0.75, 1.0), "flip": False, "limit": None, "amp": "off",
             "normalization": None}  # fmt: skip
    first = run(folder, "--scales", "0.75", "1", output="kept")
    assert run(folder, "--scales", "0.75", "1", "--workers", "1", "--save-overlays", "1", output="kept")["matrix"] == first["matrix"]
    before = (folder / "kept" / "report.json").read_bytes()
    with pytest.raises(AssertionError, match="kept/report.json is of another evaluation: --scales is 1.0, was 0.75 1.0; give another --output"):
        run(folder, output="kept")
    assert (folder / "kept" / "report.json").read_bytes() == before

    (folder / "other").mkdir()
    save_model(folder / "other" / "student.pth", seed=5, num_classes=11, dataset="camvid")
    monkeypatch.chdir(folder / "other")

    def again(split="test", dataset="camvid", **changes):
        options = SimpleNamespace(**given | {"checkpoint": "../student.pth"} | changes)
        main.check_output(folder / "kept", main.evaluation(options, dataset, split))

    again(window=(24, 24))  # it is of --mode slide
    for changes, message in (
        ({"split": "val"}, "--split is val, was test"), ({"dataset": "citys"}, "--dataset is citys, was camvid"), ({"flip": True}, "--flip is True,"),
        ({"data": "data"}, "--data is .*/other/data, was .*/data"),
        ({"checkpoint": "student.pth"}, r"--checkpoint is student.pth \(\w+\), was student.pth \("), ({"mode": "slide"}, "--mode is slide, was "),
        ({"limit": 3}, "--limit is 3, was None"), ({"output": None}, "--checkpoint is None, was"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"kept/report.json is of another evaluation: {message}"):
            again(**changes)
    for content in ("[]", '{"miou": 3}'):
        (folder / "kept" / "report.json").write_text(content)
        with pytest.raises(ValueError, match="kept/report.json does not say what it is of; give another --output, or remove that folder"):
            again()


REFUSED = {
    "no checkpoint": (["--checkpoint", "gone.pth"], "gone.pth: no such file; give the path of a checkpoint file"),
    "damaged": (["--checkpoint", "damaged.pth"], "damaged.pth: "),
    "classes": (["--dataset", "citys"], "checkpoint student.pth has 11 classes, citys has 19; pass --dataset"),
    "split": (["--split", "tset"], "camvid has no split 'tset'; possible: train, val, test"),
    "data": (["--data", "nowhere"], "nowhere: folder is missing, --data is the folder that holds CamVid"),
    "window": (["--window", "16", "24"], "--window 16 24: belongs to --mode slide, --mode is whole; add it, or drop the flag"),
    "stride": (["--mode", "slide", "--window", "16", "--stride", "20"], "--stride 20 20: must be at most the window, 16 16, or pixels are left out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line(case, folder):
    data = (folder / "student.pth").read_bytes()
    (folder / "damaged.pth").write_bytes(data[: len(data) // 2] + b"?" + data[len(data) // 2 + 1 :])
    arguments, message = REFUSED[case]
    defaults = {"--checkpoint": "student.pth", "--data": "data", "--output": f"refused {case}"}
    given = [word for flag, value in defaults.items() if flag not in arguments for word in (flag, value)]
    started = script(folder, "eval.py", *given, *arguments, "--device", "cpu", "--workers", "0", console="refused.txt")
    assert started.wait() == [2], started.text
    lines = started.text.splitlines()
    assert len(lines) == 1 and message in lines[0], started.text
    assert not (folder / f"refused {case}").exists(), "nothing is written"


def test_two_ranks_refuse_once(folder):
    started = script(folder, "eval.py", "--checkpoint", "student.pth", "--data", "nowhere", "--device", "cpu", world=2)
    assert started.wait() == [2, 2]
    assert started.text.splitlines()[0].startswith("error: nowhere: folder is missing")
    assert "Traceback" not in started.text
