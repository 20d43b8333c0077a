"""Faults of data: every broken or wrong file is refused by its name, and the decoders that this project does not use are shown to fail."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dataset import IGNORE, Augment, DataError, EndlessSampler, EvalSampler, build_dataset, build_loader
from dataset.prepare import main as prepare
from models import SegOutput
from tests.faults import camvid, children, corrupted, encoded, wait_for
from tests.paths import REPOSITORY
from tests.workers import RUN, TINY, script
from utils import log
from utils.metrics import Inference, Scores, confusion

SIZE = (60, 80)


def smooth():
    return np.linspace(0, 255, SIZE[0] * SIZE[1] * 3).reshape(*SIZE, 3).astype(np.uint8)


def read_through_a_worker(root) -> tuple[int, list[str]]:
    """(pictures that came in their own size, refusals) of a split, read by a loader process; a decoder that crashes would end it."""
    data = build_dataset("camvid", root, "val")
    sound, refused, next_one = 0, [], 0
    while next_one < len(data):
        sampler = EvalSampler(len(data))
        sampler.indices = range(next_one, len(data))
        try:
            for batch in build_loader(data, sampler, workers=1):
                next_one += 1
                sound += 1
                assert batch.image.shape == (1, 3, *SIZE) and batch.target.shape == (1, *SIZE)
                assert set(np.unique(batch.target)) <= {*range(11), IGNORE}
        except DataError as error:
            assert data.items[next_one].name in str(error) and "\n" not in str(error) and ";" in str(error)
            refused.append(str(error))
            next_one += 1
    return sound, refused


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_corrupt_files_through_a_worker(count, tmp_path):
    """JPEG and PNG pictures and PNG labels, truncated, with a flipped bit, a zeroed block or garbage."""
    rng = np.random.default_rng(count)
    label = (smooth()[:, :, 0] // 22).astype(np.uint8)
    files = {"val/{}.jpg": encoded(smooth(), "JPEG"), "val/{}.png": encoded(smooth(), "PNG"), "valannot/{}.png": encoded(label, "PNG")}
    for folder in ("val", "valannot"):
        (tmp_path / folder).mkdir()
    for number in range(count):
        damaged = list(files)[number % 3]
        picture = damaged if damaged.startswith("val/") else "val/{}.png"
        for place in (picture, "valannot/{}.png"):
            content = corrupted(files[place], rng) if place == damaged else files[place]
            (tmp_path / place.format(f"{number:04d}")).write_bytes(content)
    sound, refused = read_through_a_worker(tmp_path)
    assert sound + len(refused) == count and len(refused) > count / 3


def test_what_opencv_would_have_read(tmp_path):
    """The negative control, with OpenCV 4 and 5: half a JPEG is a picture, a palette label is its luminance, 16 bits become 0, and
    EXIF turns pictures whose labels are not turned."""
    data = encoded(smooth(), "JPEG", quality=95)
    path = tmp_path / "a.jpg"
    path.write_bytes(data[: len(data) // 2])
    assert cv2.imread(str(path)).shape == (*SIZE, 3)
    palette = Image.fromarray(np.ones(SIZE, np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    palette.save(tmp_path / "label.png")
    assert (cv2.imread(str(tmp_path / "label.png"), cv2.IMREAD_GRAYSCALE) == 38).all()
    Image.fromarray(np.full(SIZE, 7, np.uint16)).save(tmp_path / "deep.png")
    assert not cv2.imread(str(tmp_path / "deep.png"), cv2.IMREAD_GRAYSCALE).any()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth()).save(tmp_path / "turned.jpg", exif=exif)
    assert cv2.imread(str(tmp_path / "turned.jpg")).shape == (*SIZE[::-1], 3)


# ------------------------------------------------------------------------------------------------------------ wrong labels


def wrong_labels(rng):
    """Endless (what is found, what is allowed or to be done, label file, format) of labels for 24x32 pictures of 11 classes."""
    while True:
        plain = rng.integers(0, 12, (24, 32), dtype=np.uint8)
        value = int(rng.integers(12, 256))
        with_value = plain.copy()
        with_value[int(rng.integers(24)), int(rng.integers(32))] = value
        yield f"label value {value} found", "allowed are 0-11", with_value, "PNG"
        yield "colours (mode RGB)", "palette PNG", rng.integers(0, 256, (24, 32, 3), dtype=np.uint8), "PNG"
        yield "colours (mode RGBA)", "palette PNG", rng.integers(0, 256, (24, 32, 4), dtype=np.uint8), "PNG"
        yield "colours (mode LA)", "palette PNG", np.stack([plain, plain], 2), "PNG"
        deep = plain.astype(np.uint16)
        deep[0, 0] = int(rng.integers(256, 65536))
        yield f"label value {deep[0, 0]} found", "0-255 are possible", deep, "PNG"
        height, width = (int(rng.choice([n for n in range(1, 64) if n not in (24, 32)])) for _ in range(2))
        yield f"label is {width}x{height}", "both must have one size", np.zeros((height, width), np.uint8), "PNG"
        yield "label is 24x32", "EXIF rotation is ignored", np.zeros((32, 24), np.uint8), "PNG"
        yield "JPEG", "save labels as PNG", plain, "JPEG"
        shades = Image.fromarray(rng.integers(12, 256, (24, 32), dtype=np.uint8), mode="P")  # another data set's palette indices
        shades.putpalette(list(range(256)) * 3)
        yield "found, allowed are 0-11", "replace the file or convert its values", shades, "PNG"
        yield "cannot be read", "replace the file", b"<html>not found</html>", None


def test_100_wrong_labels_have_100_verdicts(tmp_path):
    camvid(tmp_path, "val", 100)
    rng = np.random.default_rng(3)
    verdicts = []
    for number, (found, remedy, label, kind) in enumerate(islice(wrong_labels(rng), 100)):
        path = tmp_path / "valannot" / f"{number:04d}.png"
        path.write_bytes(label if kind is None else save(label, kind))
        verdicts.append((path, found, remedy))
    data = build_dataset("camvid", tmp_path, "val")
    for number, (path, found, remedy) in enumerate(verdicts):
        with pytest.raises(DataError) as error:
            data.read(number)
        told = str(error.value)
        assert told.startswith(f"{path}: ") and found in told and remedy in told and "\n" not in told, told


def save(label, kind) -> bytes:
    if isinstance(label, np.ndarray):
        return encoded(label, kind)
    buffer = io.BytesIO()
    label.save(buffer, kind)
    return buffer.getvalue()


def test_labels_of_one_bit_and_swapped_folders(tmp_path):
    camvid(tmp_path, "val", 2)
    Image.fromarray(np.eye(24, 32, dtype=bool)).save(tmp_path / "valannot" / "0000.png")
    target = build_dataset("camvid", tmp_path, "val").read(0)[1]
    assert np.array_equal(target, np.eye(24, 32)), "a mask of one bit is class 0 and 1, not 0 and 255"
    (tmp_path / "val").rename(tmp_path / "x")
    (tmp_path / "valannot").rename(tmp_path / "val")
    (tmp_path / "x").rename(tmp_path / "valannot")
    with pytest.raises(DataError, match="valannot/0001.png: label has colours"):
        build_dataset("camvid", tmp_path, "val").read(1)


# --------------------------------------------------------------------------------------------------------- unusual pictures


def unusual(root, name: str, array: np.ndarray, mode: str | None = None, ending: str = "png") -> None:
    picture = Image.fromarray(array)
    picture = picture.convert(mode) if mode else picture
    picture.save(root / "train" / f"{name}.{ending}")
    Image.fromarray(np.zeros(array.shape[:2], np.uint8)).save(root / "trainannot" / f"{name}.png")


def test_unusual_pictures_train(tmp_path):
    """Smaller than the crop, one pixel, a line, grey, palette, RGBA, CMYK: the script trains on them and validates."""
    root = tmp_path / "data"
    for split in ("train", "val", "test"):
        camvid(root, split, 2)
    for name, size in (("small", (9, 13)), ("one", (1, 1)), ("line", (1, 200))):
        unusual(root, name, np.full((*size, 3), 90, np.uint8))
    noise = np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    for mode, ending in (("L", "png"), ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("1", "png"), ("CMYK", "jpg")):
        unusual(root, mode, noise, mode, ending)
    arguments = ["--dataset", "camvid", "--data", "data", "--batch-size", "6", "--max-iterations", "2", "--workers", "0", "--save-dir", "run"]
    started = script(tmp_path, "train_baseline.py", *TINY, *RUN, *arguments)
    assert started.wait() == [0], started.text
    assert "step 2/2" in started.text and (tmp_path / "run" / "DONE").exists()


def test_a_picture_of_16_bits_ends_a_training_in_one_line(tmp_path):
    for split in ("train", "val", "test"):
        camvid(tmp_path / "data", split, 2)
    Image.fromarray(np.full((24, 32), 999, np.uint16)).save(tmp_path / "data" / "train" / "0001.png")
    arguments = ["--dataset", "camvid", "--data", "data", "--max-iterations", "2", "--workers", "1", "--save-dir", "run"]
    started = script(tmp_path, "train_baseline.py", *TINY, *RUN, *arguments)
    assert started.wait() == [2]
    assert started.text.splitlines()[-1] == (
        "error: data/train/0001.png: picture has mode I;16, 8 bits per channel are needed; convert it to 8-bit RGB")  # fmt: skip
    assert "Traceback" not in started.text


# -------------------------------------------------------------------------------------------------------------- scores


def test_scores_do_not_depend_on_the_scale_of_logits():
    """A bug of the field: logits that are cast to integers before the arg-max. With small logits every pixel becomes class 0."""
    class Fixed(torch.nn.Module):
        def forward(self, image):
            return SegOutput(logits=self.logits)

    model, target = Fixed(), torch.randint(0, 5, (1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    logits = torch.randn(1, 5, 16, 16, generator=torch.Generator().manual_seed(1))
    found, cast = {}, {}
    for scale in (1.0, 0.01, 100.0):
        model.logits = logits * scale
        image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
        found[scale] = Scores.of(confusion(Inference()(model, image), target, 5), 1).miou
        naive = np.argmax(model.logits.numpy().astype(np.uint8), 1)
        cast[scale] = Scores.of(confusion(torch.from_numpy(naive), target, 5), 1).miou
    assert found[1.0] == found[0.01] == found[100.0]
    assert len(set(cast.values())) == 3 and cast[0.01] != found[0.01]


# --------------------------------------------------------------------------------------------------------- random streams


class Noisy(torch.nn.Module):
    """A network whose dropout draws from the global generator, as everybody's does."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self):
        return torch.nn.functional.dropout(self.weight, 0.5).square().sum()


@pytest.mark.parametrize("fault", ["none", "one draw", "a plain loader", "this project's loader"])
def test_one_extra_draw_breaks_a_resume_that_restores_the_generator(fault):
    """The textbook resume: weights and generator state, put back at step 3 of 6. Creating the iterator of a plain DataLoader draws once
    from the global generator (torch 2.15, `_BaseDataLoaderIter.__init__`), which is why every loader here has its own."""
    data = build_dataset("shapes", None, "train", augment=Augment((16, 16)))

    def steps(model, count):
        for _ in range(count):
            loss = model()
            (gradient,) = torch.autograd.grad(loss, model.parameters())
            model.weight.data -= 0.01 * gradient

    torch.manual_seed(0)
    whole = Noisy()
    steps(whole, 6)
    torch.manual_seed(0)
    parts = Noisy()
    steps(parts, 3)
    saved = parts.state_dict()["weight"].clone(), torch.get_rng_state()
    resumed = Noisy()
    resumed.weight.data.copy_(saved[0])
    torch.manual_seed(12345)
    torch.set_rng_state(saved[1])
    if fault == "one draw":
        torch.rand(1)
    elif fault == "a plain loader":
        iter(torch.utils.data.DataLoader([1, 2, 3]))
    elif fault == "this project's loader":
        next(iter(build_loader(data, EndlessSampler(len(data), 2))))
    steps(resumed, 3)
    assert torch.equal(resumed.weight, whole.weight) == (fault in ("none", "this project's loader"))


# ----------------------------------------------------------------------------------------------------------------- names

NAMES = [b"two\nlines", b"com,ma", "\u00fcml\u00e4ut".encode(), b"latin\xff1", b"tab\t x", b" lead", b"{id}", b"%s", b"a\"b'c", b"x" * 200,
         b"dot.", b"a.b.c", b"*?[x]", b"-rf", b"$HOME"]  # fmt: skip


@pytest.fixture
def named(tmp_path):
    """A split with pictures of every name that a file can have."""
    camvid(tmp_path, "val", 1)
    for name in NAMES:
        for folder in ("val", "valannot"):
            shutil.copyfile(tmp_path / folder / "0000.png", os.fsencode(tmp_path / folder) + b"/" + name + b".png")
    return tmp_path


def test_names_may_be_any_bytes(named):
    data = build_dataset("camvid", named, "val")
    assert {os.fsencode(item.name) for item in data.items} == {b"0000", *NAMES}
    seen = [name for batch in build_loader(data, EvalSampler(len(data)), workers=0) for name in batch.names]
    assert sorted(map(os.fsencode, seen)) == sorted([b"0000", *NAMES])
    for folder in ("val", "valannot"):
        os.rename(named / folder / "0000.png", named / folder / "\x1b[2J\x07.png")
    for name in (*NAMES, b"\x1b[2J\x07"):
        os.truncate(os.fsencode(named / "valannot") + b"/" + name + b".png", 20)
    code = f"import sys; from dataset.prepare import main; sys.exit(main(['camvid', '--data', {str(named)!r}, '--split', 'val', '--workers', '1']))"
    variables = {**os.environ, "PYTHONIOENCODING": "utf-8:strict", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True)
    output = done.stdout.decode()
    assert done.returncode == 1 and output.count("problem: ") == len(NAMES) + 1 and not done.stderr, done.stderr
    assert "\\x1b[2J\\x07.png: label" in output and "\x1b" not in output
    assert "latin\\udcff1.png: label cannot be read" in output or "latin\\udcff1.png: label is damaged" in output


def test_a_log_shows_any_name(tmp_path, monkeypatch):
    """An error of one handler would be a traceback, and the line lost; a name may also hold what clears a terminal or changes its title."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    try:
        log.setup(tmp_path)
        log.logger.info("look at %s", os.fsdecode(b"latin\xff1.png"))
        log.logger.error("and at %s", "\x1b[2J\x1b]0;title\x07\r\x9b.png")
    finally:
        monkeypatch.undo()
        log.setup()
    stream.flush()
    written = (tmp_path / "log.txt").read_text()
    assert stream.buffer.getvalue() == b"look at latin\\udcff1.png\nand at \\x1b[2J\\x1b]0;title\\x07\\x0d\\x9b.png\n"
    assert "latin\\udcff1.png" in written and "\\x1b[2J" in written and "\x1b" not in written


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_linked_folders_are_read_and_loops_are_not(tmp_path):
    """A link to the folder that it lies in showed every picture 41 times (Linux follows 40 links)."""
    data = camvid(tmp_path / "disk", "val", 3)
    for folder in ("val", "valannot"):
        (data / folder / "more").mkdir()
        shutil.copyfile(data / folder / "0000.png", data / folder / "more" / "a.png")
    whole = {item.name for item in build_dataset("camvid", data, "val").items}
    assert whole == {"0000", "0001", "0002", "more/a"}
    for folder in ("val", "valannot"):
        (data / folder / "loop").symlink_to(data / folder)
        (data / folder / "more" / "up").symlink_to("..")
        (data / folder / "broken").symlink_to(data / "nowhere")
    linked = tmp_path / "linked"
    linked.mkdir()
    for folder in ("val", "valannot"):
        (linked / folder).symlink_to(data / folder)
    for root in (data, linked):
        assert {item.name for item in build_dataset("camvid", root, "val").items} == whole
    for folder, other in (("val", "pictures"), ("valannot", "labels")):  # a link to another disk is followed
        (tmp_path / other).mkdir()
        shutil.copyfile(data / folder / "0000.png", tmp_path / other / "b.png")
        (data / folder / "elsewhere").symlink_to(tmp_path / other)
    assert {item.name for item in build_dataset("camvid", data, "val").items} == whole | {"elsewhere/b"}


# ------------------------------------------------------------------------------------------------------------------ slow


@pytest.mark.slow
def test_the_checker_finds_20_faults_among_1000_files(tmp_path, capsys):
    camvid(tmp_path, "train", 500)
    for split in ("val", "test"):
        camvid(tmp_path, split, 2)
    rng = np.random.default_rng(8)
    places = [int(n) for n in rng.choice(500, 20, replace=False)]
    for number, (_, _, label, kind) in zip(places, wrong_labels(rng), strict=False):
        (tmp_path / "trainannot" / f"{number:04d}.png").write_bytes(label if kind is None else save(label, kind))
    start = time.monotonic()
    assert prepare(["camvid", "--data", str(tmp_path), "--workers", "2"]) == 1
    assert time.monotonic() - start < 60
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 20
    for number in places:
        assert sum(f"/{number:04d}.png" in problem for problem in problems) == 1
    shutil.rmtree(tmp_path / "train")
    shutil.rmtree(tmp_path / "trainannot")
    camvid(tmp_path, "train", 500)
    assert prepare(["camvid", "--data", str(tmp_path), "--workers", "2"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(5))
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_scan_ends_with_its_processes(number, moment, tmp_path):
    """A signal to the checker alone, while it reads: it ends within 30 s and leaves no process behind."""
    camvid(tmp_path, "train", 120, size=(240, 320))
    command = [sys.executable, "-m", "dataset.prepare", "camvid", "--data", str(tmp_path), "--split", "train", "--workers", "2"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert wait_for(lambda: len(children(process.pid)) >= 2 or process.poll() is not None)
    workers = children(process.pid)
    time.sleep(0.05 * moment)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0 or "every pair" in output
    assert "Traceback" not in output, output
    assert wait_for(lambda: not any(os.path.exists(f"/proc/{worker}") for worker in workers), 30), "processes were left behind"
