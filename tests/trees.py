"""Small data sets on disk in the real layouts, with crops of real pictures where there are any, and drawn ones elsewhere."""

from pathlib import Path

import numpy as np
from PIL import Image

from dataset.reading import IGNORE
from tests.paths import SHARED

HEIGHT, WIDTH = 64, 96  # pixels of every picture
CITYS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
COCO_ABSENT = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
COCO = {raw: raw - sum(absent < raw for absent in COCO_ABSENT) for raw in range(182) if raw not in COCO_ABSENT}
SAMPLES = {  # picture, label and where to crop them: there is something to see
    "citys": ("frankfurt_000000_000576_leftImg8bit.png", "frankfurt_000000_000576_gtFine_labelIds.png", (400, 700)),
    "voc": ("2007_000033.jpg", "2007_000033.png", (150, 100)),
    "ade20k": ("ADE_val_00000053.jpg", None, (100, 100)),
    "coco": ("000000025394.jpg", None, (100, 100)),
}
FOLDER = ("road", "traffic light", "sky")  # the classes of the folder trees, in the colours below
COLOURS = ((128, 64, 128), (250, 170, 30), (70, 130, 180))

# tree -> (data set, raw value -> train id, sample, picture's path, label's path, list file's path); {} is the number of the picture
_VOC = {**{k: k for k in range(21)}, 255: IGNORE}
_COCO_PATHS = ("images/val2017/{:012d}.jpg", "annotations/val2017/{:012d}.png", None)
TREES = {
    "camvid": ("camvid", {**{k: k for k in range(11)}, 11: IGNORE}, None, "test/{}.png", "testannot/{}.png", None),
    "citys": ("citys", {**dict.fromkeys(range(34), IGNORE), **CITYS}, "citys",
              "leftImg8bit/val/frankfurt/frankfurt_{:06d}_000576_leftImg8bit.png",
              "gtFine/val/frankfurt/frankfurt_{:06d}_000576_gtFine_labelIds.png", None),
    "citys, train ids": ("citys", {**{k: k for k in range(19)}, 255: IGNORE}, "citys",
                         "leftImg8bit/val/munster/munster_{:06d}_000019_leftImg8bit.png",
                         "gtFine/val/munster/munster_{:06d}_000019_gtFine_labelTrainIds.png", None),
    "voc, index": ("voc", _VOC, "voc", "JPEGImages/2007_{:06d}.jpg", "SegmentationClass/2007_{:06d}.png", "ImageSets/Segmentation/val.txt"),
    "voc, palette": ("voc", _VOC, "voc", "JPEGImages/2007_{:06d}.jpg", "SegmentationClass/2007_{:06d}.png", "ImageSets/Segmentation/val.txt"),
    "ade20k": ("ade20k", {raw: (raw - 1) % 256 for raw in range(151)}, "ade20k",
               "images/validation/ADE_val_{:08d}.jpg", "annotations/validation/ADE_val_{:08d}.png", None),
    "coco_stuff_164k": ("coco_stuff_164k", {**COCO, 255: IGNORE}, "coco", *_COCO_PATHS),
    "coco_stuff_182": ("coco_stuff_182", {**{k: k for k in range(182)}, 255: IGNORE}, "coco", *_COCO_PATHS),
    "coco_stuff_10k": ("coco_stuff_10k", {0: IGNORE, **{raw + 1: k for raw, k in COCO.items()}}, "coco",
                       "images/COCO_train2014_{:012d}.jpg", "annotations/COCO_train2014_{:012d}.png", "imageLists/test.txt"),
    "folder, index": ("folder", {0: 0, 1: 1, 2: 2, 255: IGNORE}, None, "images/val/{}.png", "labels/val/{}.png", None),
    "folder, colours": ("folder", {0: 0, 1: 1, 2: 2, 255: IGNORE}, None, "images/val/{}.png", "labels/val/{}.png", None),
}  # fmt: skip


def draw(values, sample: str | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture (HEIGHT, WIDTH, 3) and raw label values of it; the picture is a crop of the sample where there is one, as is its label."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    blocks = rng.choice(list(values), (HEIGHT // 8, WIDTH // 8)).astype(np.uint8)
    raw = np.repeat(np.repeat(blocks, 8, 0), 8, 1)
    if sample is None or not (SHARED / "samples").is_dir():
        return image, raw
    picture, label, (top, left) = SAMPLES[sample]
    box = (left + 8 * seed, top, left + 8 * seed + WIDTH, top + HEIGHT)
    with Image.open(SHARED / "samples" / picture) as opened:
        image = np.array(opened.crop(box).convert("RGB"))
    if label is not None:
        with Image.open(SHARED / "samples" / label) as opened:
            raw = np.array(opened.crop(box))
    return image, raw


def save(array: np.ndarray, path: Path, palette: bool = False, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    if palette:
        picture = Image.fromarray(array, "P")
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    picture.save(path, **options)
    return path


def build(tree: str, root: Path, count: int = 2) -> tuple[str, list[np.ndarray]]:
    """Build a tree; returns the data set's name and the train ids of its pictures, by name, worked out here."""
    name, values, sample, image_path, label_path, list_path = TREES[tree]
    meaning = np.full(256, -1)
    meaning[list(values)] = list(values.values())
    targets, stems = [], []
    for number in range(count):
        image, raw = draw(values, sample, number)
        if tree == "citys, train ids" and sample and (SHARED / "samples").is_dir():
            raw = np.vectorize(lambda value: CITYS.get(value, 255))(raw).astype(np.uint8)
        save(image, root / image_path.format(number))
        targets.append(meaning[raw].astype(np.uint8))
        assert meaning[raw].min() >= 0, "the tree draws a value that means nothing"
        if tree == "folder, colours":
            raw = np.array([*COLOURS, *[(255, 255, 255)] * 253], np.uint8)[raw]
        save(raw, root / label_path.format(number), palette=tree.endswith("palette"))
        stems.append(Path(image_path.format(number)).stem)
    if list_path:
        (root / list_path).parent.mkdir(parents=True, exist_ok=True)
        (root / list_path).write_text("\n".join(stems) + "\n")
    if name == "folder":
        lines = [f"{name} {' '.join(map(str, colour))}" for name, colour in zip(FOLDER, COLOURS, strict=True)]
        (root / "classes.txt").write_text("# mine\n\n" + "\n".join(lines) + "\n")
    return name, targets
