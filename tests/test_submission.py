"""scripts/submit.py: label ids, names, sizes and archives as the test servers take them, and what is refused before it is packed."""

import dataclasses
import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import SPECS, build_dataset, get_spec
from models.weights import model_from_checkpoint
from scripts import submit
from tests.trees import CITYS, TREES, draw, save
from tests.workers import save_model, script
from utils.metrics import Inference
from utils.options import submit_options

SIZE = 64, 96  # of tests.trees


@pytest.fixture
def citys(tmp_path, monkeypatch):
    """Three test pictures of two cities in a small Cityscapes, whose server takes the pictures' size."""
    spec = get_spec("citys")
    small = dataclasses.replace(spec, pictures={"test": 3}, submission=dataclasses.replace(spec.submission, size=SIZE))
    monkeypatch.setitem(SPECS, "citys", small)
    for number, name in enumerate(("berlin/berlin_000000_000019", "berlin/berlin_000001_000019", "mainz/mainz_000000_000019")):
        save(draw(TREES["citys"][1], "citys", number)[0], tmp_path / f"data/leftImg8bit/test/{name}_leftImg8bit.png")
    save_model(tmp_path / "student.pth", num_classes=19, dataset="citys")
    return tmp_path


@pytest.fixture
def voc(tmp_path, monkeypatch):
    """Two VOC test pictures of two sizes."""
    monkeypatch.setitem(SPECS, "voc", dataclasses.replace(get_spec("voc"), pictures={"test": 2}))
    image, _ = draw(TREES["voc, index"][1], "voc", 0)
    save(image, tmp_path / "data/JPEGImages/2008_000006.jpg")
    save(np.ascontiguousarray(image[:50, :40]), tmp_path / "data/JPEGImages/2008_000011.jpg")
    (tmp_path / "data/ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "data/ImageSets/Segmentation/test.txt").write_text("2008_000011\n2008_000006\n")
    save_model(tmp_path / "student.pth", num_classes=21, dataset="voc")
    return tmp_path


def run(folder, *arguments, output="out"):
    arguments = ["--checkpoint", str(folder / "student.pth"), "--data", str(folder / "data"), "--output", str(folder / output), "--workers", "0",
                 "--device", "cpu", *arguments]  # fmt: skip
    submit.main(submit_options(arguments, description=""), torch.device("cpu"))
    return folder / output


def predictions(folder, name, inference=Inference()):  # noqa: B008
    """Train ids of the pictures by hand, by name."""
    model = model_from_checkpoint(folder / "student.pth")[0].eval()
    found = {}
    for item in build_dataset(name, folder / "data", "test").items:
        image = torch.from_numpy(item.read()[0]).permute(2, 0, 1)[None]
        with torch.no_grad():
            found[item.name] = inference(model, image)[0].numpy()
    return found


def test_cityscapes(citys):
    """Label ids, not train ids, in grey PNGs named after city, sequence and frame, flat in a zip file."""
    with zipfile.ZipFile(run(citys) / "citys_test.zip") as packed:
        assert packed.testzip() is None
        files = {name: packed.read(name) for name in packed.namelist()}
    to_label_id = {train_id: label_id for label_id, train_id in CITYS.items()}
    wanted = {f"{name.split('/')[1]}_pred.png": labels for name, labels in predictions(citys, "citys").items()}
    assert files.keys() == wanted.keys() == {f"{name}_pred.png" for name in ("berlin_000000_000019", "berlin_000001_000019", "mainz_000000_000019")}
    for name, content in files.items():
        picture = Image.open(io.BytesIO(content))
        assert (picture.format, picture.mode, picture.size) == ("PNG", "L", SIZE[::-1])
        np.testing.assert_array_equal(np.array(picture), np.vectorize(to_label_id.get)(wanted[name]))
    assert len(np.unique(np.stack(list(wanted.values())))) > 2, "a network that predicts one class proves little"


def test_voc(voc):
    """Palette PNGs of the pictures' sizes below results/VOC2012, in a tar.gz; the options of eval.py are obeyed."""
    flags = ("--mode", "slide", "--window", "32", "--flip", "--scales", "1", "1.5")
    with tarfile.open(run(voc, *flags) / "voc_test.tar.gz") as packed:
        files = {member.name: packed.extractfile(member).read() for member in packed.getmembers() if member.isfile()}
    folder = "results/VOC2012/Segmentation/comp6_test_cls"
    wanted = predictions(voc, "voc", Inference("slide", (32, 32), None, (1.0, 1.5), True))
    assert files.keys() == {f"{folder}/{name}.png" for name in wanted} == {f"{folder}/2008_000006.png", f"{folder}/2008_000011.png"}
    for name, labels in wanted.items():
        picture = Image.open(io.BytesIO(files[f"{folder}/{name}.png"]))
        np.testing.assert_array_equal(np.array(picture), labels)
        assert picture.mode == "P" and picture.getpalette()[3 * 15: 3 * 16] == [192, 128, 128], "a person has VOC's colour"


def test_two_ranks_pack_one_archive(citys):
    """Also that the script starts from a shell; the real Cityscapes wants 1525 pictures."""
    started = script(citys, "scripts/submit.py", "--checkpoint", "student.pth", "--data", "data", "--output", "out", "--device", "cpu",
                     "--workers", "0", change=smaller, world=2)  # fmt: skip
    assert started.wait() == [0, 0], started.text
    assert "3 files checked and packed: out/citys_test.zip; send it to https://www.cityscapes-dataset.com" in started.text
    run(citys, output="alone")
    with zipfile.ZipFile(citys / "out/citys_test.zip") as two, zipfile.ZipFile(citys / "alone/citys_test.zip") as one:
        assert {name: two.read(name) for name in two.namelist()} == {name: one.read(name) for name in one.namelist()}
    started = script(citys, "scripts/submit.py", "--checkpoint", "student.pth", "--data", "data", "--output", "more", "--device", "cpu")
    assert started.wait() == [2] and started.text == "error: data: 3 pictures in split test, the server scores 1525; complete the data set\n"
    assert not (citys / "more").exists()


def test_a_stride_needs_a_window(citys, capsys):
    with pytest.raises(SystemExit):
        run(citys, "--stride", "8")
    assert capsys.readouterr().err.endswith(" error: --stride 8: belongs to --mode slide, --mode is whole; add it, or drop the flag\n")


def smaller():
    spec = SPECS["citys"]
    SPECS["citys"] = dataclasses.replace(spec, pictures={"test": 3}, submission=dataclasses.replace(spec.submission, size=SIZE))


def test_refusals(citys, monkeypatch):
    (citys / "full").mkdir()
    (citys / "full/old_pred.png").write_bytes(b"")
    with pytest.raises(ValueError, match="--output .*full: is not an empty folder; choose another one"):
        run(citys, output="full")
    save_model(citys / "student.pth", num_classes=19, dataset="camvid")
    with pytest.raises(ValueError, match="has 19 classes, camvid has 11"):
        monkeypatch.setitem(SPECS, "camvid", dataclasses.replace(SPECS["camvid"], submission=SPECS["citys"].submission))
        run(citys)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="camvid has no test server that this project knows; eval.py --save-predictions"):
        run(citys)
    assert not (citys / "out").exists()


def test_a_split_that_no_server_scores_is_counted_as_released(citys, monkeypatch):
    monkeypatch.setitem(SPECS, "citys", dataclasses.replace(SPECS["citys"], pictures={"test": 3, "val": 500}))
    for folder, name in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
        save(np.zeros((4, 6, 3) if folder == "leftImg8bit" else (4, 6), np.uint8), citys / f"data/{folder}/val/ulm/ulm_000000_000019_{name}.png")
    with pytest.raises(ValueError, match="data: 1 pictures in split val, the complete release has 500; complete the data set"):
        run(citys, "--split", "val")


@pytest.mark.parametrize("name", ["citys", "voc"])
def test_a_full_disk_is_told_in_one_line(name, request, monkeypatch):
    folder = request.getfixturevalue(name)

    def full(self, path, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ValueError, match=r"^cannot write .*(_pred|2008_0000\d\d).png: No space left on device; free space or choose"):
        run(folder)


def test_pictures_of_another_size_are_refused_before_any_is_predicted(citys):
    path = citys / "data/leftImg8bit/test/mainz/mainz_000000_000019_leftImg8bit.png"
    save(np.zeros((32, 48, 3), np.uint8), path)
    with pytest.raises(ValueError, match=f"{path}: is 48x32, the server takes 96x64; give the original files"):
        run(citys)
    assert not (citys / "out").exists()


def test_pictures_of_one_name_are_refused(citys):
    (citys / "data/leftImg8bit/test/mainz/mainz_000000_000019_leftImg8bit.png").rename(
        citys / "data/leftImg8bit/test/mainz/berlin_000000_000019_leftImg8bit.png")
    with pytest.raises(ValueError, match="pictures of the same name in two folders of split test"):
        run(citys)


FAULTS = {
    "missing": (lambda path: path.unlink(), "b_pred.png: is missing; predict again"),
    "too many": (lambda path: save(np.full((1024, 2048), 7, np.uint8), path.with_name("c_pred.png")), "c_pred.png: does not belong"),
    "train ids": (lambda path: save(np.zeros((1024, 2048), np.uint8), path), r"has the label 0, the server knows \[7, 8, 11,"),
    "no label": (lambda path: save(np.full((1024, 2048), 255, np.uint8), path), "has the label 255"),
    "one pixel": (lambda path: save(np.pad(np.full((1023, 2048), 7, np.uint8), ((0, 1), (0, 0)), constant_values=9), path), "has the label 9"),
    "size": (lambda path: save(np.full((512, 1024), 7, np.uint8), path), "is 1024x512, the server takes 2048x1024; predict the pictures"),
    "colours": (lambda path: save(np.full((1024, 2048, 3), 7, np.uint8), path), "is a PNG of mode RGB, the server takes PNG of mode L"),
    "palette": (lambda path: save(np.full((1024, 2048), 7, np.uint8), path, palette=True), "is a PNG of mode P, the server takes PNG of mode L"),
    "deep": (lambda path: save(np.full((1024, 2048), 7, np.uint16), path), "the server takes PNG of mode L"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_server_would_refuse_is_found_before(tmp_path, fault):
    form, sizes = get_spec("citys").submission, {f"{name}_pred.png": (1024, 2048) for name in "ab"}
    for name in sizes:
        save(np.full((1024, 2048), 7, np.uint8), tmp_path / name)
    submit.check_files(tmp_path, sizes, form, None)
    change, message = FAULTS[fault]
    change(tmp_path / "b_pred.png")
    with pytest.raises(ValueError, match=message):
        submit.check_files(tmp_path, sizes, form, None)


def test_voc_files_need_its_palette(tmp_path):
    form, palette = get_spec("voc").submission, get_spec("voc").palette()
    save(np.full((4, 6), 20, np.uint8), tmp_path / "a.png", palette=True)
    with pytest.raises(ValueError, match="has another palette than"):
        submit.check_files(tmp_path, {"a.png": (4, 6)}, form, palette)
    save(np.full((4, 6), 20, np.uint8), tmp_path / "a.png")
    with pytest.raises(ValueError, match="mode L, the server takes PNG of mode P"):
        submit.check_files(tmp_path, {"a.png": (4, 6)}, form, palette)


def test_the_forms_are_complete():
    """The servers' rules: cityscapesScripts knows label ids and 1525 pictures, VOC's development kit comp6 and 1456."""
    citys, voc = get_spec("citys"), get_spec("voc")
    assert citys.submission.label_ids == tuple(CITYS) and citys.submission.size == (1024, 2048) and citys.pictures["test"] == 1525
    assert voc.submission.label_ids == tuple(range(21)) and voc.pictures["test"] == 1456
    assert {name for name, spec in SPECS.items() if spec.submission} == {"citys", "voc"}


def test_an_archive_appears_as_a_whole(tmp_path, monkeypatch):
    form = get_spec("citys").submission
    save(np.full((4, 6), 7, np.uint8), tmp_path / "a_pred.png")

    def full(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "write", full)
    with pytest.raises(ValueError, match=r"citys_test.zip: cannot be written \(No space left on device\)"):
        submit.pack(tmp_path, ["a_pred.png"], tmp_path / "citys_test.zip", form)
    assert [path.name for path in tmp_path.iterdir()] == ["a_pred.png"]
