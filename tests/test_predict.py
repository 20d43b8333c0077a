"""scripts/predict.py: the labels that eval.py saves, for pictures, folders and videos; legend, shares, EXIF marks, and what is refused."""

import functools
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import eval as evaluation
from dataset import SPECS, get_spec
from dataset.classes import read_classes
from dataset.layout import FilePair
from dataset.reading import read_upright
from models import build_model
from models.weights import model_from_checkpoint
from scripts import predict
from tests.paths import shared
from tests.test_reading import TURNED, chunk, png
from tests.trees import save
from tests.workers import save_model, script
from utils import checkpoint
from utils.metrics import Inference
from utils.options import eval_options, predict_options
from utils.run import writing
from utils.visualize import legend, overlay

PALETTE = get_spec("camvid").palette()
SIZES = {"a.1": (40, 48), "a.2": (32, 56), "one/b": (40, 48), "two/b": (40, 48), "c": (1, 1), "d": (32, 56)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six CamVid pictures of three sizes, among them names that differ behind a dot or in their folder, and a network of 11 classes."""
    folder = tmp_path_factory.mktemp("predict")
    draw = np.random.default_rng(0)
    for name, size in SIZES.items():
        save(draw.integers(0, 256, (*size, 3), dtype=np.uint8), folder / f"data/test/{name}.png")
        save(draw.integers(0, 11, size, dtype=np.uint8), folder / f"data/testannot/{name}.png")
    save_model(folder / "student.pth", num_classes=11, dataset="camvid")
    return folder


def run(folder, output, *arguments, source="data/test", checkpoint="student.pth", status=None):
    arguments = ["--checkpoint", str(folder / checkpoint), "--input", str(folder / source), "--output", str(output), "--device", "cpu", *arguments]
    assert predict.main(predict_options(arguments, description=""), torch.device("cpu")) == status
    return json.loads((output / "report.json").read_text())


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def labels_of(path):
    with Image.open(path) as picture:
        assert picture.mode == "P"
        return np.array(picture)


def agreement(one, two):
    """Share of the pixels with one label. Batches and memory formats sum in another order, which may turn near-ties of two classes."""
    assert one.shape == two.shape
    return (one == two).mean()


ALIKE = 0.998  # three pixels of the smallest pictures


@functools.cache
def network(path):
    return model_from_checkpoint(path)[0].eval().to(memory_format=torch.channels_last)


def by_hand(folder, image, inference=Inference()):  # noqa: B008
    model = network(folder / "student.pth")
    with torch.no_grad():
        return inference(model, torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None])[0].numpy()


MODES = {
    "whole": (), "slide": ("--mode", "slide", "--window", "24", "32", "--stride", "9", "13"),
    "scales": ("--scales", "0.75", "1.25", "--flip"), "bf16": ("--amp", "bf16", "--no-channels-last"),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_label_pictures_are_those_of_eval(folder, tmp_path, mode):
    given = ["--checkpoint", str(folder / "student.pth"), "--data", str(folder / "data"), "--output", str(tmp_path / "eval"), "--save-predictions",
             "--save-overlays", "9", "--workers", "0", "--device", "cpu", *MODES[mode]]  # fmt: skip
    evaluation.main(eval_options(given, description=""), torch.device("cpu"))
    run(folder, tmp_path / "out", *MODES[mode])
    wanted, overlays = contents(tmp_path / "eval/predictions"), contents(tmp_path / "eval/overlays")
    assert contents(tmp_path / "out/labels") == wanted and wanted.keys() == {f"{name}.png" for name in SIZES}
    assert contents(tmp_path / "out/overlays") == overlays and len(overlays) == 6
    assert len(np.unique(np.concatenate([labels_of(path).ravel() for path in (tmp_path / "out/labels").rglob("*.png")]))) > 2
    if mode != "whole":
        run(folder, tmp_path / "whole")
        assert contents(tmp_path / "whole/labels") != wanted, "the flags change something"


def test_batches_and_threads_change_nothing(folder, tmp_path, monkeypatch):
    one, seen = run(folder, tmp_path / "one", "--workers", "0"), []
    infer = Inference.__call__
    monkeypatch.setattr(Inference, "__call__", lambda self, model, image: seen.append(tuple(image.shape)) or infer(self, model, image))
    two = run(folder, tmp_path / "two", "--batch-size", "2", "--workers", "3", "--no-overlays")
    assert sorted(seen) == [(1, 3, 1, 1), (1, 3, 40, 48), (2, 3, 32, 56), (2, 3, 40, 48)]
    single, batched = ({name: labels_of(tmp_path / f"{output}/labels/{name}.png") for name in SIZES} for output in ("one", "two"))
    for name in SIZES:
        assert agreement(single[name], batched[name]) > ALIKE
        for other in SIZES.keys() - {name, "c"}:
            assert SIZES[other] != SIZES[name] or agreement(single[name], batched[other]) < 0.9, "another picture would be noticed"
    assert contents(tmp_path / "two/labels").keys() == contents(tmp_path / "one/labels").keys()
    for row, alone in zip(two["pictures"], one["pictures"], strict=True):
        shares = [[picture["share"].get(name, 0) for name in one["classes"]] for picture in (row, alone)]
        assert row["file"] == alone["file"] and shares[0] == pytest.approx(shares[1], abs=1 - ALIKE)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"labels", "legend.png", "classes.txt", "report.json"}


def test_two_ranks_write_what_one_does(folder, tmp_path):
    """Also that the script starts from a shell, and that a damaged picture of the second rank ends both with status 1."""
    (tmp_path / "data").symlink_to(folder / "data")
    save(np.zeros((4, 4, 3), np.uint8), tmp_path / "pictures/a.png")
    (tmp_path / "pictures/b.jpg").write_bytes(b"no picture")
    (tmp_path / "student.pth").symlink_to(folder / "student.pth")
    started = script(tmp_path, "scripts/predict.py", "--checkpoint", "student.pth", "--input", "data/test", "--output", "two", "--device", "cpu",
                     "--workers", "1", world=2)  # fmt: skip
    assert started.wait() == [0, 0], started.text
    run(tmp_path, tmp_path / "one")
    reports = [json.loads((tmp_path / output / "report.json").read_text()) for output in ("two", "one")]
    assert reports[0]["environment"]["ranks"] == 2 and reports[0]["share"] == reports[1]["share"]
    for report in reports:
        assert [row["file"] for row in report["pictures"]] == sorted(f"{name}.png" for name in SIZES)
    for kind in ("labels", "overlays"):
        assert contents(tmp_path / "two" / kind) == contents(tmp_path / "one" / kind)
    started = script(tmp_path, "scripts/predict.py", "--checkpoint", "student.pth", "--input", "pictures", "--output", "damaged", "--device", "cpu",
                     world=2)  # fmt: skip
    assert started.wait() == [1, 1] and "[rank 1] pictures/b.jpg: picture cannot be read" in started.text
    assert len(json.loads((tmp_path / "damaged/report.json").read_text())["problems"]) == 1


def test_the_report_counts_what_the_label_pictures_hold(folder, tmp_path):
    report = run(folder, tmp_path / "out")
    total = np.zeros(11, np.int64)
    for row in report["pictures"]:
        labels = labels_of(tmp_path / "out" / row["labels"])
        counts = np.bincount(labels.ravel(), minlength=11)
        total += counts
        assert labels.shape == (row["height"], row["width"]) == SIZES[row["file"].removesuffix(".png")] and row["milliseconds"] > 0
        assert sum(row["share"].values()) == pytest.approx(1, abs=1e-12) and min(row["share"].values()) > 0
        assert row["share"] == {name: count / labels.size for name, count in zip(report["classes"], counts, strict=True) if count}
    assert list(report["share"]) == report["classes"] and sum(report["share"].values()) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(list(report["share"].values()), total / total.sum(), rtol=1e-12)
    assert report["milliseconds_per_picture"] == np.median([row["milliseconds"] for row in report["pictures"]])
    assert report["checkpoint"]["sha256"] == checkpoint.fingerprint(folder / "student.pth") and report["options"]["mode"] == "whole"
    assert report["predicted"] == 6 and report["problems"] == [] and report["dataset"] == "camvid" and report["model"]["backbone"] == "mobilenetv2"


# ---------------------------------------------------------------------------------------------------------------- names and colours


@pytest.mark.parametrize("name", ["shapes", "citys", "coco_stuff_182"])
def test_classes_txt_is_that_of_a_folder(name, tmp_path):
    """What is written is read back as the same classes, and the legend has their colours in their places, with ink beside each."""
    spec = SPECS[name]
    save_model(tmp_path / "student.pth", num_classes=spec.num_classes, dataset=name)
    save(np.zeros((8, 8, 3), np.uint8), tmp_path / "a.png")
    run(tmp_path, tmp_path / "out", source="a.png", checkpoint="student.pth")
    assert read_classes(tmp_path / "out/classes.txt")[:2] == (spec.classes, spec.colours)
    page = np.array(Image.open(tmp_path / "out/legend.png"))
    framed = (page == 0).all(2).astype(np.uint8)  # swatches are framed in black: boxes whose four sides are wholly black
    boxes = [(x, y) for y, x in np.argwhere(framed) if page.shape[0] - y >= 18 and page.shape[1] - x >= 34
             and framed[y, x : x + 34].all() and framed[y + 17, x : x + 34].all() and framed[y : y + 18, x].all() and framed[y : y + 18, x + 33].all()
             and (page[y + 9, x + 1 : x + 33] == page[y + 1, x + 1]).all()]  # fmt: skip
    boxes = sorted(set(boxes))  # down the columns
    assert len(boxes) == spec.num_classes and len({y for _, y in boxes}) <= 32
    words = set()
    for (x, y), colour in zip(boxes, spec.colours, strict=True):
        assert (page[y + 1 : y + 17, x + 1 : x + 33] == colour).all()
        right = min([other for other, _ in boxes if other > x] + [page.shape[1] + 4]) - 4
        text = page[y - 3 : y + 21, x + 36 : right]
        assert (text < 128).any() and (text[:, -3:] == 255).all(), "a name, and not cut off"
        words.add(text.tobytes())
    assert len(words) == spec.num_classes, "every name is another picture"


def test_a_name_of_the_legend_stands_beside_its_colour():
    page = np.array(legend(("I", "WWWWWW", "I"), ((255, 0, 0), (0, 255, 0), (0, 0, 255))).convert("L"))
    ink = [(page[8 + 26 * row : 26 + 26 * row, 46:] < 128).sum() for row in range(3)]
    assert ink[1] > 3 * max(ink[0], ink[2])


def test_colours_of_ones_own_come_from_the_checkpoint(folder, tmp_path):
    """Those of a folder data set are in no table; a checkpoint without colours has Pascal VOC's, as classes.txt without colours."""
    save(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8), tmp_path / "a.png")
    colours = [[9 * k + 1, 255 - k, k] for k in range(11)]
    names = [f"thing {k}" for k in range(11)]
    save_model(tmp_path / "own.pth", num_classes=11, dataset="folder", classes=names, colours=colours)
    report = run(tmp_path, tmp_path / "own", source="a.png", checkpoint="own.pth")
    with Image.open(tmp_path / "own/labels/a.png") as picture:
        np.testing.assert_array_equal(np.array(picture.convert("RGB")), np.array(colours, np.uint8)[np.array(picture)])
    assert report["classes"] == names and read_classes(tmp_path / "own/classes.txt")[:2] == (tuple(names), tuple(map(tuple, colours)))
    save_model(tmp_path / "plain.pth", num_classes=11, dataset="folder", classes=names)
    run(tmp_path, tmp_path / "plain", source="a.png", checkpoint="plain.pth")
    assert read_classes(tmp_path / "plain/classes.txt").colours[1] == (128, 0, 0)
    with pytest.raises(ValueError, match="calls class 0 'thing 0', camvid calls it 'sky'"):
        run(tmp_path, tmp_path / "other", "--dataset", "camvid", source="a.png", checkpoint="own.pth")


def test_a_published_file_needs_the_data_set(folder, tmp_path, capsys):
    torch.save(model_from_checkpoint(folder / "student.pth")[0].state_dict(), tmp_path / "published.pth")
    save(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8), tmp_path / "a.png")
    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path / "out", source="a.png", checkpoint="published.pth")
    assert "--dataset is missing: " in capsys.readouterr().err and not (tmp_path / "out").exists()
    run(tmp_path, tmp_path / "out", "--dataset", "camvid", source="a.png", checkpoint="published.pth")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/classes.txt").write_text("".join(f"c{k}\n" for k in range(11)))
    report = run(tmp_path, tmp_path / "mine/out", "--dataset", "folder", "--data", str(tmp_path / "mine"), source="a.png", checkpoint="published.pth")
    assert report["classes"] == [f"c{k}" for k in range(11)]
    assert (labels_of(tmp_path / "mine/out/labels/a.png") == labels_of(tmp_path / "out/labels/a.png")).all()


# -------------------------------------------------------------------------------------------------------------------------- EXIF


def test_photos_are_predicted_upright(folder, tmp_path):
    """Every EXIF mark as Pillow's own turns it; 0 is none of the eight. Batches hold pictures that are turned and others."""
    for mark in range(9):
        exif = Image.Exif()
        exif[0x0112] = mark
        image = cv2.resize(np.random.default_rng(mark).integers(0, 256, (5, 7, 3), dtype=np.uint8), (56, 40))
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"in/{mark}.jpg", exif=exif)
    report = run(folder, tmp_path / "out", "--batch-size", "4", source=tmp_path / "in")
    for mark, row in enumerate(report["pictures"]):
        with Image.open(tmp_path / f"in/{mark}.jpg") as picture:
            upright = np.array(ImageOps.exif_transpose(picture))
        labels = labels_of(tmp_path / f"out/labels/{mark}.png")
        assert agreement(labels, by_hand(folder, upright)) > ALIKE
        for wrong in (upright[::-1], upright[:, ::-1], upright[::-1, ::-1]):
            assert agreement(labels, by_hand(folder, wrong)) < 0.98, "another turn would be noticed"
        with Image.open(tmp_path / f"out/overlays/{mark}.jpg") as shown:
            assert shown.size == upright.shape[1::-1] == ((40, 56) if mark > 4 else (56, 40)) and not shown.getexif()
            assert np.abs(np.array(shown).astype(int) - overlay(upright, labels, PALETTE)).mean() < 8
        assert row["file"] == f"{mark}.jpg" and row.get("turned_from_exif") == (mark if mark > 1 else None)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_marks_of_pngs_and_damaged_marks(tmp_path):
    (tmp_path / "turned.png").write_bytes(png(chunk(b"eXIf", TURNED)))
    (tmp_path / "damaged.png").write_bytes(png(chunk(b"eXIf", TURNED[:11])))
    stored = read_upright(tmp_path / "damaged.png")
    turned = read_upright(tmp_path / "turned.png")
    assert stored[1] == 1 and turned[1] == 6
    np.testing.assert_array_equal(turned[0], np.rot90(stored[0], -1))


# ------------------------------------------------------------------------------------------------------------------------- videos


def write_video(path, frames, codec="FFV1", rate=12.5):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), rate, frames[0].shape[1::-1])
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame)
    writer.release()


def read_video(path):
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    return frames, capture.get(cv2.CAP_PROP_FPS)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Seven frames of 64x48 in a lossless codec."""
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("video") / "drive.mkv"
    write_video(path, [cv2.resize(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8), (64, 48)) for _ in range(7)])
    return path


@pytest.mark.parametrize("flags", [(), ("--batch-size", "3"), ("--workers", "0", "--batch-size", "7")])
def test_frames_are_predicted_as_pictures(folder, video, tmp_path, flags):
    report = run(folder, tmp_path / "out", *flags, source=video)
    frames, rate = read_video(video)
    for number, frame in enumerate(frames):
        save(frame, tmp_path / f"frames/{number:06d}.png")
    run(folder, tmp_path / "pictures", source=tmp_path / "frames")
    folders = tmp_path / "out/labels/drive", tmp_path / "pictures/labels"
    of_video, of_pictures = ([labels_of(path) for path in sorted(folder.iterdir())] for folder in folders)
    same = np.array([[agreement(one, two) for two in of_pictures] for one in of_video])
    assert len(frames) == 7 and same.shape == (7, 7) and same.diagonal().min() > ALIKE and same[~np.eye(7, dtype=bool)].max() < 0.99, same
    assert contents(folders[0]).keys() == contents(folders[1]).keys()
    assert [row["frame"] for row in report["pictures"]] == list(range(7)) and report["video"]["frames"] == report["video"]["announced"] == 7
    shown, shown_rate = read_video(tmp_path / "out/overlays/drive.mp4")
    assert len(shown) == 7 and shown_rate == pytest.approx(rate) == 12.5
    assert [path.name for path in (tmp_path / "out/overlays").iterdir()] == ["drive.mp4"]
    for number in range(7):  # smooth pictures lose little in a lossy codec, and another frame's would be far
        errors = [np.abs(shown[number].astype(int) - overlay(other, labels_of(tmp_path / f"out/labels/drive/{at:06d}.png"), PALETTE)).mean()
                  for at, other in enumerate(frames)]  # fmt: skip
        assert np.argmin(errors) == number and errors[number] < 15, errors


def test_odd_sizes_keep_every_pixel(folder, tmp_path):
    """MPEG-4 takes even sizes: the overlays' last row and column are doubled, the labels are as they are."""
    capture = [np.random.default_rng(k).integers(0, 256, (31, 47, 3), dtype=np.uint8) for k in range(3)]

    class Odd:
        def read(self):
            return (True, capture.pop()) if capture else (False, None)

    source = tmp_path / "a.avi"
    write_video(source, [np.zeros((32, 48, 3), np.uint8)] * 3)
    video = predict.Video(source)
    video.capture = Odd()
    writer = predict.VideoPictures(tmp_path / "out", get_spec("camvid"), True, video)
    with writer:
        for [frame] in video.read(1, 0):
            writer(frame, np.zeros((31, 47), np.uint8))
    shown, _ = read_video(tmp_path / "out/overlays/a.mp4")
    assert [frame.shape for frame in shown] == [(32, 48, 3)] * 3
    assert labels_of(tmp_path / "out/labels/a/000002.png").shape == (31, 47)


@pytest.mark.parametrize("flags", [("--workers", "0"), ("--batch-size", "4")])
def test_a_stream_that_changes_its_size(flags, folder, tmp_path, monkeypatch):
    """The overlays are scaled to the first frame's size, in their order although batches have one size; the labels keep their own."""
    sizes = [(33, 48), (33, 48), (64, 96), (33, 48), (24, 20)]
    frames = [np.full((*size, 3), 40 * number, np.uint8) for number, size in enumerate(sizes)]
    source, left = tmp_path / "a.avi", list(frames)
    write_video(source, [np.zeros((32, 48, 3), np.uint8)] * 5)
    monkeypatch.setattr(predict.Video, "next", lambda self: left.pop(0) if left else None)
    report = run(folder, tmp_path / "out", *flags, source=source)
    assert [(row["frame"], row["height"], row["width"]) for row in report["pictures"]] == [(k, *size) for k, size in enumerate(sizes)]
    shown, _ = read_video(tmp_path / "out/overlays/a.mp4")
    assert [frame.shape for frame in shown] == [(34, 48, 3)] * 5 and report["problems"] == []
    for number, (frame, size) in enumerate(zip(frames, sizes, strict=True)):
        labels = labels_of(tmp_path / f"out/labels/a/{number:06d}.png")
        assert labels.shape == size
        assert shown[number].mean() == pytest.approx(overlay(frame, labels, PALETTE).mean(), abs=6)


def test_an_overlay_video_that_lacks_frames_is_a_problem_of_the_report(folder, video, tmp_path, monkeypatch):
    """OpenCV's writer drops what it cannot write without a word."""

    class Dropping:
        def __init__(self, *arguments):
            self.writer, self.given = writer(*arguments), 0

        def __getattr__(self, name):
            return getattr(self.writer, name)

        def write(self, frame):
            self.given += 1
            if self.given <= 5:
                self.writer.write(frame)

    writer = cv2.VideoWriter
    monkeypatch.setattr(cv2, "VideoWriter", Dropping)
    report = run(folder, tmp_path / "out", source=video, status=1)
    [problem] = report["problems"]
    assert problem.startswith(f"{tmp_path / 'out/overlays/drive.mp4'}: holds 5 of 7 frames, the others could not be written, as on a full disk; ")
    assert report["predicted"] == 7 == len(list((tmp_path / "out/labels/drive").iterdir()))


def test_a_video_is_decoded_as_it_is_used():
    """Reading ahead is bounded: a film would not fit into memory."""
    taken, given = [], []
    for item in predict.ahead(lambda n: taken.append(n) or n, range(50), 3):
        given.append(item)
        assert len(taken) - len(given) <= 6
    assert given == list(range(50))


def test_a_video_that_ends_early(folder, tmp_path):
    source = tmp_path / "long.avi"
    write_video(source, [np.random.default_rng(k).integers(0, 256, (32, 48, 3), dtype=np.uint8) for k in range(40)])
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    report = run(folder, tmp_path / "out", source=source, status=1)
    frames = len(read_video(tmp_path / "out/overlays/long.mp4")[0])
    assert 10 < frames < 30 and report["predicted"] == frames == len(list((tmp_path / "out/labels/long").iterdir()))
    assert report["problems"] == [f"{source}: {frames} frames could be decoded, the file announces 40; it is damaged, restore it"]


def test_an_interrupted_video_can_be_played(folder, video, tmp_path, monkeypatch):
    """Ctrl-C at the fifth frame: the overlays up to there are a whole video file."""
    place = predict.Pictures.__call__

    def interrupted(self, frame, labels):
        if frame.about["frame"] == 4:
            raise KeyboardInterrupt
        return place(self, frame, labels)

    monkeypatch.setattr(predict.Pictures, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", source=video)
    assert len(read_video(tmp_path / "out/overlays/drive.mp4")[0]) == 4


# ----------------------------------------------------------------------------------------------------------------------- mistakes


def test_what_cannot_be_read_is_named_and_the_rest_predicted(folder, tmp_path):
    source = tmp_path / "in"
    draw = np.random.default_rng(0)
    for name in ("good.jpg", "sub/good.png", "cut.jpg", "twice.png", "twice.jpg"):
        save(draw.integers(0, 256, (40, 48, 3), dtype=np.uint8), source / name)
    save(np.zeros((8, 8), np.uint16), source / "deep.png")
    (source / "cut.jpg").write_bytes((source / "cut.jpg").read_bytes()[:900])
    for name in ("empty.png", "old.bmp", "sub/film.MP4", "notes.txt", ".hidden.png", "sub/._film.MP4", "../elsewhere/b.mov"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"")
    (source / "link").symlink_to(tmp_path / "elsewhere")
    report = run(folder, tmp_path / "out", "--batch-size", "4", source=source, status=1)
    assert [row["file"] for row in report["pictures"]] == ["good.jpg", "sub/good.png"] and report["predicted"] == 2
    named = {line.removeprefix(f"{source}/").split(": ")[0] for line in report["problems"]}
    assert named == {"cut.jpg", "deep.png", "empty.png", "old.bmp", "sub/film.MP4", "twice.png", "link/b.mov"} and len(report["problems"]) == 7
    assert contents(tmp_path / "out/labels").keys() == {"good.png", "sub/good.png"}


def test_a_lone_damaged_picture(folder, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    report = run(folder, tmp_path / "out", source=tmp_path / "a.jpg", status=1)
    assert report["predicted"] == 0 and report["share"] is None and report["milliseconds_per_picture"] is None and len(report["problems"]) == 1


REFUSED = {
    "nothing": ("gone", (), "gone: no such file or folder; give a picture, a folder of pictures, or a video"),
    "empty": ("empty", (), r"empty: no picture to predict \(.png .jpg .jpeg\)$"),
    "unread": ("films", (), "films: no picture to predict .*; .*a.mp4: a video in a folder is not predicted; give it as --input"),
    "ending": ("a.gif", (), "a.gif: .gif is not read; possible are pictures"),
    "no video": ("films/a.mp4", (), "a.mp4: cannot be read as a video; it is damaged or of an unknown kind, convert it to mp4"),
    "full": ("a.png", ("--output", "films"), "--output films: is not an empty folder; choose another one, so that two predictions are not mixed"),
    "file": ("a.png", ("--output", "a.png"), "--output a.png: is not an empty folder"),
    "inside": ("pictures", ("--output", "pictures/sub/out"), "--output pictures/sub/out: lies in --input pictures, where its overlays"),
    "around": ("films/sub", ("--output", "films"), "--output films: is not an empty folder"),
    "classes": ("a.png", ("--dataset", "voc"), "has 11 classes, voc has 21; pass --dataset"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_write_nothing(case, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "pictures/a.png", "films/sub/a.png" if case == "around" else "pictures/b.png"):
        save(np.zeros((8, 8, 3), np.uint8), tmp_path / name)
    for name in ("empty", "films"):
        (tmp_path / name).mkdir(exist_ok=True)
    for name in ("films/a.mp4", "a.gif"):
        (tmp_path / name).write_bytes(b"nothing")
    source, arguments, message = REFUSED[case]
    before = contents(tmp_path)
    given = ["--checkpoint", str(folder / "student.pth"), "--input", source, "--device", "cpu"]
    if "--output" not in arguments:
        given += ["--output", "out"]
    with pytest.raises(ValueError, match=message) as refusal:
        predict.main(predict_options([*given, *arguments], description=""), torch.device("cpu"))
    assert "\n" not in str(refusal.value)
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


FLAGS = {
    "window": (("--window", "8"), "--window 8: belongs to --mode slide, --mode is whole"),
    "data": (("--data", "d"), "--data d: belongs to --dataset folder, whose classes.txt it holds"),
    "other data": (("--dataset", "voc", "--data", "d"), "--data d: belongs to --dataset folder"),
    "own": (("--dataset", "folder"), "folder lies in files, give their folder with --data"),
    "batch": (("--batch-size", "0"), "--batch-size 0: must be at least 1"),
    "spelling": (("--overlay",), "unknown option --overlay; did you mean --overlays?"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_that_nobody_reads(case, folder, capsys):
    arguments, message = FLAGS[case]
    with pytest.raises(SystemExit) as end:
        predict_options(["--checkpoint", str(folder / "student.pth"), "--input", "i", "--output", "o", *arguments], description="")
    shown = capsys.readouterr().err
    assert end.value.code == 2 and shown.startswith(f"python -m scripts.predict: error: {message}") and shown.count("\n") == 1, shown


MALFORMED = {
    "beyond a byte": ({"colours": [[1, 2, 300]] * 11}, "colours"),
    "below a byte": ({"colours": [[1, 2, -1]] * 11}, "colours"),
    "two parts": ({"colours": [[1, 2]] * 11}, "colours"),
    "too few": ({"colours": [[1, 2, 3]] * 10}, "colours"),
    "numbers": ({"colours": [1] * 11}, "colours"),
    "lists in a colour": ({"colours": [[1, 2, [3]]] * 11}, "colours"),
    "fractions": ({"colours": [[1, 2, 0.5]] * 11}, "colours"),
    "one number": ({"classes": 5}, "classes"),
    "a text": ({"classes": "sky"}, "classes"),
    "classes of numbers": ({"classes": [*range(11)]}, "classes"),
    "a list": ({"dataset": ["camvid"]}, "data set"),
}
MEANT = {
    "colours": "the colours in its config are not red green blue for every class", "classes": "the classes in its config are not a list of names",
    "data set": "the data set in its config is not a name",
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_the_config_of_a_checkpoint_is_looked_at(case, tmp_path, capsys):
    """Also where --dataset is given: its classes are compared with the checkpoint's."""
    wrong, kind = MALFORMED[case]
    save_model(tmp_path / "wrong.pth", num_classes=11, **{"dataset": "camvid", "classes": [f"c{k}" for k in range(11)], **wrong})
    given = ["--checkpoint", str(tmp_path / "wrong.pth"), "--input", "i", "--output", "o"]
    with pytest.raises(SystemExit):
        predict_options(given, description="")
    shown = capsys.readouterr().err
    assert f"wrong.pth: {MEANT[kind]}; use another copy" in shown and shown.count("\n") == 1
    save(np.zeros((8, 8, 3), np.uint8), tmp_path / "a.png")
    with pytest.raises(ValueError, match=MEANT[kind]):
        run(tmp_path, tmp_path / "out", "--dataset", "camvid", source="a.png", checkpoint="wrong.pth")


def test_a_config_without_a_data_set(tmp_path, capsys):
    save_model(tmp_path / "own.pth", num_classes=11, dataset=None)
    save(np.zeros((8, 8, 3), np.uint8), tmp_path / "a.png")
    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path / "out", source="a.png", checkpoint="own.pth")
    assert "error: --dataset is missing: " in capsys.readouterr().err
    assert run(tmp_path, tmp_path / "out", "--dataset", "camvid", source="a.png", checkpoint="own.pth")["predicted"] == 1


def test_a_video_on_two_ranks_and_a_label_assisted_teacher(video, tmp_path):
    save_model(tmp_path / "student.pth", num_classes=11, dataset="camvid")
    started = script(tmp_path, "scripts/predict.py", "--checkpoint", "student.pth", "--input", video, "--output", "out", "--device", "cpu", world=2)
    assert started.wait() == [2, 2]
    assert started.text.splitlines()[0] == f"error: --input {video}: a video is decoded by one process, 2 were started; start it without torchrun"
    model = build_model("pspnet", "mobilenetv2", 11, head_width=8, in_channels=4)
    checkpoint.save(tmp_path / "lad.pth", {"student": model.state_dict(), "step": 0, "metrics": {}, "config": {"model": model.config,
                                           "teacher": None, "dataset": "camvid", "options": {}}})  # fmt: skip
    with pytest.raises(ValueError, match="a label-assisted teacher needs the labels that it would predict; give a student"):
        run(tmp_path, tmp_path / "out", source=video, checkpoint="lad.pth")


def test_a_full_disk_is_one_line(folder, tmp_path, monkeypatch):
    def full(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ValueError, match=r"cannot write .*out: No space left on device; free space or choose another folder"):
        run(folder, tmp_path / "out")


def test_an_overlay_beyond_jpeg_is_a_png(tmp_path):
    draw = np.random.default_rng(0)
    for name, width in (("within.1", 65500), ("beyond.1", 65501)):
        frame = predict.Frame(name, draw.integers(0, 256, (1, width, 3), dtype=np.uint8), {})
        labels = draw.integers(0, 11, (1, width), dtype=np.uint8)
        predict.Pictures(tmp_path, get_spec("camvid"), True)(frame, labels)
    assert {path.name for path in (tmp_path / "overlays").iterdir()} == {"within.1.jpg", "beyond.1.png"}
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "overlays/beyond.1.png")), overlay(frame.image, labels, PALETTE))
    with Image.open(tmp_path / "overlays/within.1.jpg") as picture:
        assert picture.size == (65500, 1)


def test_what_is_no_error_of_the_system_says_its_reason():
    with pytest.raises(ValueError, match="^cannot write a.jpg: encoder error -2; free space"), writing(Path("a.jpg")):
        raise OSError("encoder error -2")


def test_real_pictures_of_several_data_sets(tmp_path):
    """Sizes 640x426, 500x366 and 683x512 or so, in colours of a phone and of a camera: labels at each picture's own size."""
    names = ("000000025394.jpg", "2007_000033.jpg", "ADE_val_00000053.jpg")
    sizes = {}
    for name in names:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(shared(f"samples/{name}").read_bytes())
        with Image.open(io.BytesIO((tmp_path / "in" / name).read_bytes())) as picture:
            sizes[name] = picture.size
    image = np.array(Image.open(tmp_path / "in/2007_000033.jpg").convert("RGB"))
    save_model(tmp_path / "student.pth", num_classes=11, dataset="camvid", pictures=torch.from_numpy(image).permute(2, 0, 1)[None])
    report = run(tmp_path, tmp_path / "out", "--mode", "slide", "--window", "256", "--stride", "256", source=tmp_path / "in")
    assert {row["file"]: (row["width"], row["height"]) for row in report["pictures"]} == sizes
    wanted = by_hand(tmp_path, image, Inference("slide", (256, 256), (256, 256)))
    assert agreement(wanted, by_hand(tmp_path, image)) < 0.98, "the mode changes something"
    assert agreement(labels_of(tmp_path / "out/labels/2007_000033.png"), wanted) > ALIKE
    assert predict.plan([FilePair(name, str(tmp_path / "in" / name), None, None) for name in names * 2], 2) == [[0, 3], [1, 4], [2, 5]]
