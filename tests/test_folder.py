"""A folder of one's own: classes.txt, labels as values or colours, splits, and that checkpoints keep the classes."""

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
from dataset import IGNORE, DataError, build_dataset, get_spec
from dataset.classes import ClassList, read_classes, voc_colour
from dataset.prepare import main as prepare
from losses import METHODS, resolve
from models.weights import model_from_checkpoint, read_state
from tests.trees import COLOURS, FOLDER, build, save
from tests.workers import save_model, script, train
from utils.metrics import Inference
from utils.options import eval_options, train_options


def classes(tmp_path, text) -> ClassList:
    (tmp_path / "classes.txt").write_text(text, encoding="utf-8")
    return read_classes(tmp_path / "classes.txt")


def refusal(function, *arguments) -> str:
    with pytest.raises(DataError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message and ";" in message
    return message


# ---------------------------------------------------------------------------------------------------------------- classes.txt


def test_every_form_of_a_line(tmp_path):
    text = "\ufeff# name, colour\r\n\r\nroad 128 64 128\n  traffic   light #FAaa1e \n\tsky\nlane 2\n# done\nlane 3 1 2 3\nZügel\nignore 0 0 0"
    found = classes(tmp_path, text)
    assert found.names == ("road", "traffic light", "sky", "lane 2", "lane 3", "Zügel")
    # a class without a colour gets that of its train id in Pascal VOC: 2 -> (0, 128, 0), 3 -> (128, 128, 0), 5 -> (128, 0, 128)
    assert found.colours == ((128, 64, 128), (250, 170, 30), (0, 128, 0), (128, 128, 0), (1, 2, 3), (128, 0, 128))
    assert found.ignored == ((0, 0, 0),)
    assert classes(tmp_path, "a\nb").ignored == ((255, 255, 255),) and classes(tmp_path, "a\nb 255 255 255").ignored == ()
    assert classes(tmp_path, "a\nb\nignore 1 1 1\nIgnore 2 2 2").ignored == ((1, 1, 1), (2, 2, 2))
    assert classes(tmp_path, "2 lanes\n3d box 1 2 3").names == ("2 lanes", "3d box")
    assert len(classes(tmp_path, "\n".join(f"class {k}" for k in range(255))).names) == 255


BAD = {
    "road": "1 classes found, at least two",
    "# nothing\n": "0 classes found, at least two",
    "road\nsky\nroad": ":3: class 'road' is already in line 1",
    "road 1 2 3\nsky 1 2 3": ":2: colour 1 2 3 of 'sky' is already that of line 1",
    "road\nsky 0 0 0": ":2: colour 0 0 0 of 'sky' is already that of line 1",
    "road 1 2 3\nignore 1 2 3\nsky": ":2: colour 1 2 3 of 'ignore' is already that of line 1",
    "road 256 0 0\nsky": ":1: 256 0 0 is no colour, its three values are 0-255",
    "road -1 0 0\nsky": ":1: -1 0 0 is no colour",
    "road 0.5 0.5 0.5\nsky": ":1: 0.5 0.5 0.5 is no colour",
    "road 128 64\nsky": ":1: 128 64 is no colour, it has three values",
    "road #12345\nsky": ":1: '#12345' is no colour, it has six hexadecimal digits",
    "road #12345g\nsky": ":1: '#12345g' is no colour",
    "128 64 128\nsky": ":1: '128 64 128' is not understood",
    "road,128,64,128\nsky": ":1: 'road,128,64,128' is not understood",
    "road; sky\nsky": ":1: 'road; sky' is not understood",
    "road 1 2 3 # grey\nsky": ":1: 'road 1 2 3 # grey' is not understood",
    "road\nsky\nignore": ":3: `ignore` has no colour",
    "road\nsky\nIGNORE": ":3: `ignore` has no colour",
    "0 road 128 64 128\n1 sky 1 2 3": ":1: 0 before the name is not understood, train ids are the order of the lines; drop it",
    "0 road #804080\n1 sky": ":1: 0 before the name is not understood",
    "\n".join(f"class{k}" for k in range(256)): ":256: more than 255 classes",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:20].encode("unicode_escape").decode())
def test_bad_lists_are_refused_with_their_line(tmp_path, text):
    message = refusal(classes, tmp_path, text)
    assert message.startswith(str(tmp_path / "classes.txt")) and BAD[text] in message and len(message) < 400, message


def test_lists_that_cannot_be_read(tmp_path):
    assert "classes.txt: class list is missing; write one class per line" in refusal(get_spec, "folder", tmp_path)
    (tmp_path / "classes.txt").write_bytes(b"\xff\xferoad\n")
    assert "cannot be read" in refusal(get_spec, "folder", tmp_path)
    assert "give their folder with --data; it holds images/train/*" in refusal(get_spec, "folder")
    assert "folder is missing, --data is the folder that holds your own pictures" in refusal(get_spec, "folder", tmp_path / "gone")


# --------------------------------------------------------------------------------------------------------------------- labels


@pytest.fixture
def folder(tmp_path):
    """Three classes, two validation pictures with index labels; the same as training pictures."""
    root = tmp_path / "my data"
    build("folder, index", root)
    for kind in ("images", "labels"):
        for path in (root / kind / "val").iterdir():
            (root / kind / "train").mkdir(exist_ok=True)
            (root / kind / "train" / path.name).write_bytes(path.read_bytes())
    return root


def test_each_file_is_read_by_its_mode(folder):
    values = np.array([[0, 1, 2, 255]], np.uint8)
    colours = np.array([[*COLOURS, (255, 255, 255)]], np.uint8)
    opaque = np.concatenate((colours, np.full((1, 4, 1), 255, np.uint8)), 2)
    labels = {"index": (values, {}), "palette": (values, {"palette": True}), "colours": (colours, {}), "opaque": (opaque, {})}
    for name, (array, options) in labels.items():
        save(np.zeros((1, 4, 3), np.uint8), folder / f"images/val/{name}.jpg")
        save(array, folder / f"labels/val/{name}.png", **options)
    data = build_dataset("folder", folder, "val")
    found = {item.name: item.read()[1].tolist() for item in data.items}
    assert {name: found[name] for name in labels} == dict.fromkeys(labels, [[0, 1, 2, IGNORE]])


def test_colours_are_decoded_exactly(tmp_path):
    """Against a loop over the pixels, with 40 classes and a colour of its own for what is not labelled."""
    rng = np.random.default_rng(3)
    colours = [tuple(map(int, colour)) for colour in np.unique(rng.integers(0, 256, (41, 3)), axis=0)]
    rng.shuffle(colours)
    (tmp_path / "classes.txt").write_text("\n".join(f"c{k} {' '.join(map(str, colour))}" for k, colour in enumerate(colours[:40]))
                                          + f"\nignore {' '.join(map(str, colours[40]))}\n")
    drawn = rng.integers(0, 41, (30, 40))
    save(np.zeros((30, 40, 3), np.uint8), tmp_path / "images/val/a.png")
    label = save(np.array(colours, np.uint8)[drawn], tmp_path / "labels/val/a.png")
    data = build_dataset("folder", tmp_path, "val")
    np.testing.assert_array_equal(data.read(0)[1], np.where(drawn == 40, IGNORE, drawn))
    wrong = np.array(colours, np.uint8)[drawn]
    wrong[29, 39] = colours[0][0], colours[0][1], colours[0][2] ^ 1  # one pixel, one grey level off
    save(wrong, label)
    red, green, blue = wrong[29, 39]
    assert refusal(data.read, 0).startswith(f"{label}: label colour {red} {green} {blue} found, which no class has; give the class")
    save(np.array([[[*colours[0], 255], [*colours[0], 254]]], np.uint8), label)
    assert "transparent" in refusal(data.read, 0)
    save(wrong, tmp_path / "valannot/a.png")
    save(wrong, tmp_path / "val/a.png")
    assert "label has colours" in refusal(build_dataset("camvid", tmp_path, "val").read, 0)  # whose labels are values alone


def test_values_outside_the_classes_are_refused(folder):
    label = save(np.array([[0, 3]], np.uint8), folder / "labels/val/0.png")
    save(np.zeros((1, 2, 3), np.uint8), folder / "images/val/0.png")
    assert refusal(build_dataset("folder", folder, "val").read, 0).startswith(f"{label}: label value 3 found, allowed are 0-2, 255;")
    (folder / "labels/train/1.png").unlink()
    assert "picture has no label labels/train/1.png" in refusal(build_dataset, "folder", folder, "train")


def test_a_mask_of_0_and_255_is_not_read_as_no_label(tmp_path):
    """Where white is a class, 255 in a grey file is most likely that class."""
    (tmp_path / "classes.txt").write_text("background 0 0 0\nroad #ffffff\n")
    mask = np.array([[0, 255]], np.uint8)
    label = save(mask, tmp_path / "labels/val/a.png")
    save(np.zeros((1, 2, 3), np.uint8), tmp_path / "images/val/a.png")
    data = build_dataset("folder", tmp_path, "val")
    assert refusal(data.read, 0).startswith(f"{label}: label value 255 found, allowed are 0-1;")
    for array in (mask // 255, np.repeat(mask[:, :, None], 3, 2)):
        save(array, label)
        assert data.read(0)[1].tolist() == [[0, 1]]


def test_a_palette_that_contradicts_the_values_is_refused(folder):
    """RGB labels that a program has stored as a palette PNG: its numbers are not the train ids. VOC's colours for the right values are read."""
    label = folder / "labels/val/a.png"
    save(np.zeros((1, 3, 3), np.uint8), folder / "images/val/a.jpg")

    def stored(values, colours):
        picture = Image.fromarray(np.array([values], np.uint8), "P")
        picture.putpalette(np.array(colours, np.uint8).tobytes())
        picture.save(label)
        return build_dataset("folder", folder, "val").items[-1].read

    message = refusal(stored([0, 1, 1], [COLOURS[1], COLOURS[0]]))
    assert message.startswith(f"{label}: label value 0 has the colour of class 1 in the file's palette; save it as RGB, or without")
    assert "label value 2 has the colour of class 0" in refusal(stored([0, 1, 2], [(255, 255, 255), COLOURS[1], COLOURS[0]]))
    voc = [voc_colour(k) for k in range(3)]
    for colours in (COLOURS, voc, [COLOURS[1], *voc[1:]], [*COLOURS[:2], (255, 255, 255)]):
        assert stored([0, 1, 2], colours)()[1].tolist() == [[0, 1, 2]], colours


def test_splits(folder, capsys):
    spec = get_spec("folder", folder)
    assert spec.classes == FOLDER and spec.colours == COLOURS and spec.crop == (512, 512)
    assert set(spec.splits) == {"train", "val"} and (spec.select_split, spec.report_split) == ("val", "val")
    assert prepare(["folder", "--data", str(folder)]) == 0
    assert "4 pictures, every pair and every label value is right" in capsys.readouterr().out
    save(np.zeros((1, 2, 3), np.uint8), folder / "images/test/x.png")  # pictures to predict
    assert get_spec("folder", folder).report_split == "val" and not get_spec("folder", folder).splits["test"].labelled
    save(np.zeros((1, 2), np.uint8), folder / "labels/test/x.png")
    spec = get_spec("folder", folder)
    assert (spec.select_split, spec.report_split) == ("val", "test") and spec.splits["test"].labelled
    with pytest.raises(DataError, match="possible: train, val, test"):
        spec.find(folder, "holdout")


def test_pictures_without_labels_are_predicted_and_not_scored(folder, tmp_path, monkeypatch):
    """images/test alone: eval.py writes what the network says of them, and no report; without a flag that writes, it says so."""
    spec = get_spec("folder", folder)
    for name in ("x", "below/y"):
        save(np.random.default_rng(len(name)).integers(0, 256, (40, 48, 3), dtype=np.uint8), folder / f"images/test/{name}.png")
    save_model(tmp_path / "student.pth", num_classes=3, dataset="folder", classes=list(FOLDER))
    told = []
    monkeypatch.setattr(evaluation.logger, "info", lambda text, *values: told.append(text % values))

    def evaluate(*flags):
        given = ["--checkpoint", str(tmp_path / "student.pth"), "--data", str(folder), "--split", "test", "--output", str(tmp_path / "out"), *flags]
        evaluation.main(eval_options([*given, "--workers", "0", "--device", "cpu"], description=""), torch.device("cpu"))

    with pytest.raises(ValueError, match="^--split test: folder has no labels there to compare with; choose another split, or add --save-predic"):
        evaluate()
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="student.pth: a label-assisted teacher needs the labels that it would"):
        patch.setattr(evaluation, "is_label_assisted", lambda model: True)
        evaluate("--save-predictions")
    assert not (tmp_path / "out").exists() and not told
    evaluate("--save-predictions", "--save-overlays", "1")
    assert told[-1] == f"{tmp_path / 'out'}: pictures alone, no scores and no report: test of folder has no labels"
    assert "mIoU" not in "".join(told)
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {"predictions/x.png", "predictions/below/y.png", "overlays/below/y.jpg"}
    model = model_from_checkpoint(tmp_path / "student.pth")[0].eval()
    for item in build_dataset("folder", folder, "test").items:
        with torch.no_grad():
            expected = Inference()(model, torch.from_numpy(item.read()[0]).permute(2, 0, 1)[None])[0].numpy()
        with Image.open(tmp_path / f"out/predictions/{item.name}.png") as picture:
            np.testing.assert_array_equal(np.array(picture), expected)
            assert picture.getpalette()[:9] == np.ravel(spec.colours).tolist()


def test_pictures_that_are_not_read_and_labels_of_one_name_are_told(folder):
    """A picture of another format is passed over nowhere, with a label or without; of labels that differ in case none is picked by chance."""
    (folder / "images/test").mkdir()
    for name in ("train/2.bmp", "test/3.TIF", "train/0.webp"):  # 0.png is there, so its copy may lie beside it
        save(np.zeros((4, 4, 3), np.uint8), folder / f"images/{name}")
    save(np.zeros((4, 4), np.uint8), folder / "labels/train/2.png")
    save(np.zeros((4, 4), np.uint8), folder / "labels/val/1.PNG", format="PNG")
    spec = get_spec("folder", folder)
    found = {split: spec.find(folder, split) for split in ("train", "val", "test")}
    assert {split: [item.name for item in items] for split, (items, _) in found.items()} == {"train": ["0", "1"], "val": ["0"], "test": []}
    for split, start in (("train", f"{folder}/images/train/2.bmp: pictures with the ending .bmp are not read, those with .png .jpg .jpeg are; conv"),
                         ("test", f"{folder}/images/test/3.TIF: pictures with the ending .tif are not read"),
                         ("val", f"{folder}/labels/val/1.PNG: 1.png has the same name; remove one of the two")):  # fmt: skip
        (problem,) = found[split][1]
        assert problem.startswith(start), problem


def test_small_pictures_are_padded_to_the_crop(folder):
    spec = get_spec("folder", folder)
    sample = build_dataset(spec, folder, "train", augment=spec.augment(), seed=0)[0, 0]
    assert sample.image.shape == (512, 512, 3) and (sample.target == IGNORE).mean() > 0.5 and (sample.target != IGNORE).any()


# ---------------------------------------------------------------------------------------------------------- options, training


def test_options_know_the_folder(folder, capsys):
    given = ["--dataset", "folder", "--data", str(folder), "--save-dir", "run"]
    options = train_options(given, distil=False, description="")
    assert options.spec.classes == FOLDER and options.crop_size == (512, 512)
    assert train_options([*given, "--crop-size", "64"], distil=False, description="").crop_size == (64, 64)
    assert eval_options(["--checkpoint", "c", *given[:4]], description="").spec.num_classes == 3
    with pytest.raises(SystemExit):
        train_options(given[:2], distil=False, description="")
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "folder lies in files, give their folder with --data" in message


def test_every_method_has_defaults_for_any_crop():
    """Af-DCD's published weights go with the published crops, of which a folder of one's own has none."""
    for name, method in METHODS.items():
        assert resolve(method, "folder", {}) and resolve(method, "coco_stuff_10k", {}), name
    options, sources = resolve(METHODS["afdcd"], "folder", {})
    assert options.normalise == "mean" and sources["normalise"] == "data set folder"
    assert (options.fd_weight, options.contrast_weight, options.kd_weight) == (8.4, 0.08, 1.0)
    for name in ("afdcd", "apd", "icsd"):
        small, large = (vars(resolve(METHODS[name], dataset, {})[0]) for dataset in ("coco_stuff_10k", "coco_stuff_164k"))
        assert small == large, name


def test_training_keeps_the_classes_and_a_resume_wants_the_same(folder, tmp_path):
    """Checkpoints hold names and colours as plain values; a class that is renamed or recoloured ends the resume in one line."""
    arguments = ("--dataset", "folder", "--data", folder, "--save-dir", "run", "--max-iterations", "2", "--workers", "0")
    started = train(tmp_path, *arguments)
    assert started.wait() == [0], started.text
    for name in ("student_best.pth", "last.pth"):
        config = read_state(tmp_path / "run" / name)[1]["config"]
        assert config["classes"] == list(FOLDER) and config["colours"] == [list(colour) for colour in COLOURS]
    content = (folder / "classes.txt").read_text()
    (folder / "classes.txt").write_text(content.replace("sky 70 130 180", "water 70 130 181"))
    again = train(tmp_path, *arguments, "--resume", console="again.txt")
    assert again.wait() == [2] and again.text.count("\n") == 1, again.text
    assert "holds another run (class 2 is water, was sky; colour of class 2 is [70, 130, 181], was [70, 130, 180]); choose" in again.text


def test_a_checkpoint_of_other_classes_is_refused(folder, tmp_path):
    """The same number of classes in another order would be scored without a word."""
    train_ids = ("--dataset", "folder", "--data", folder, "--device", "cpu", "--workers", "0")
    save_model(tmp_path / "other.pth", num_classes=3, dataset="folder", classes=["sky", "road", "traffic light"])
    started = script(tmp_path, "eval.py", "--checkpoint", "other.pth", *train_ids)
    assert started.wait() == [2] and started.text.count("\n") == 1
    assert "error: checkpoint other.pth calls class 0 'sky', folder calls it 'road'; pass --dataset, or --data" in started.text
    started = script(tmp_path, "train_kd.py", "--method", "kd", "--teacher-checkpoint", "other.pth", "--save-dir", "run", *train_ids)
    assert started.wait() == [2] and "error: teacher checkpoint other.pth calls class 0 'sky', folder calls it 'road'; pass a" in started.text
    assert not (tmp_path / "run").exists() and not (tmp_path / "eval").exists()
