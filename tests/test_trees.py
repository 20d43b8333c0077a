"""Every data set in its real layout, from the files to the report of eval.py."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
from dataset import build_dataset, get_spec
from tests.trees import TREES, build
from tests.workers import save_model
from utils.options import eval_options


@pytest.fixture(autouse=True)
def without_counting(monkeypatch):
    """Counting multiply-adds takes most of the time of so small an evaluation, and has tests of its own."""
    monkeypatch.setattr(evaluation, "count_macs", lambda model, height, width: 0)


def evaluate(folder, root, name, *arguments):
    save_model(folder / "student.pth", num_classes=get_spec(name, root).num_classes, dataset=name)
    options = eval_options(["--checkpoint", str(folder / "student.pth"), "--data", str(root), "--output", str(folder / "out"), "--workers", "0",
                            "--device", "cpu", "--save-predictions", *arguments], description="")  # fmt: skip
    evaluation.main(options, torch.device("cpu"))
    return json.loads((folder / "out/report.json").read_text())


@pytest.mark.parametrize("tree", TREES)
def test_labels_mean_what_the_release_says_and_eval_counts_them(tree, tmp_path):
    """The confusion matrix, pixel by pixel from the raw values that were written and the saved predictions."""
    name, targets = build(tree, tmp_path / "my data")
    spec = get_spec(name, tmp_path / "my data")
    report = evaluate(tmp_path, tmp_path / "my data", name, "--split", split := "test" if name == "camvid" else "val")
    pictures = build_dataset(spec, tmp_path / "my data", split)
    assert len(pictures) == len(targets) == report["images"]
    expected = np.zeros((spec.num_classes, spec.num_classes), int)
    for item, target, (image, found) in zip(pictures.items, targets, map(pictures.read, range(len(pictures))), strict=True):
        np.testing.assert_array_equal(found, target)
        assert image.shape == (*target.shape, 3)
        with Image.open(tmp_path / f"out/predictions/{item.name}.png") as saved:
            prediction = np.array(saved)
        for label, predicted in zip(target.flat, prediction.flat, strict=True):
            if label != 255:
                expected[label, predicted] += 1
    assert report["matrix"] == expected.tolist() and report["classes"] == list(spec.classes) and 0 < expected.sum()
    assert report["dataset"] == name and report["split"] == split


def test_splits_without_public_labels_are_told_from_scores(tmp_path):
    for name, image in (("citys", "leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png"), ("voc", "JPEGImages/2008_000006.jpg")):
        path = tmp_path / name / image
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((4, 6, 3), 7, np.uint8)).save(path)
    (tmp_path / "voc/ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "voc/ImageSets/Segmentation/test.txt").write_text("2008_000006\n")
    dummy = tmp_path / "citys/gtFine/test/berlin/berlin_000000_000019_gtFine_labelIds.png"  # Cityscapes ships such files
    dummy.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(dummy)
    for name in ("citys", "voc"):
        sample = build_dataset(name, tmp_path / name, "test")[0]
        assert sample.image.shape == (4, 6, 3) and (sample.target == 255).all() and sample.target.shape == (4, 6)
        with pytest.raises(ValueError, match=f"--split test: {name} has no labels there to compare with; python -m scripts.submit"):
            evaluate(tmp_path, tmp_path / name, name, "--split", "test", "--no-save-predictions")
    assert not (tmp_path / "out").exists()
    assert get_spec("citys").splits["val"].labelled and not get_spec("citys").splits["test"].labelled
    (tmp_path / "voc/ImageSets/Segmentation/test.txt").write_text("2008_000006 JPEGImages/2008_000006.jpg\n")
    with pytest.raises(ValueError, match="test.txt:1: 2 words found, a line is an id; correct the line"):
        build_dataset("voc", tmp_path / "voc", "test")
