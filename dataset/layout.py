"""How a split lies on disk: folders matched by name, or a list file. Each gives pairs to read and problems to report."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from dataset.reading import IGNORE, DataError, LabelMap, read_image, read_size

PICTURES = (".png", ".jpg", ".jpeg")
_UNREAD = (".avif", ".bmp", ".gif", ".heic", ".jp2", ".pgm", ".ppm", ".tif", ".tiff", ".webp")  # pictures to report, not to pass over
_HOLD_OUT = 314  # seed of the pictures that are held out


class Item(Protocol):
    """One picture with its label, wherever it comes from."""

    name: str

    def files(self) -> tuple[str, ...]:
        """The files that it is read from; none where it is drawn."""

    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, without decoding it."""

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) uint8 RGB and train ids (H, W) uint8."""


class Layout(Protocol):
    """One split of a data set; `labelled` is False where its labels are not public."""

    labelled: bool

    def find(self, root: Path | None) -> tuple[list[Item], list[str]]:
        """Items in a fixed order, and one line for everything that is missing or does not match."""


@dataclass(frozen=True, slots=True)
class FilePair:
    """A picture and a label on disk (paths as strings: COCO has 118287 of them in every worker); a label of None is not public."""

    name: str
    image: str
    label: str | None
    label_map: LabelMap | None

    def files(self) -> tuple[str, ...]:
        """The paths of picture and label."""
        return (self.image,) if self.label is None else (self.image, self.label)

    def size(self) -> tuple[int, int]:
        """(height, width) as the picture's header says; DataError where the file is missing or no picture."""
        return read_size(self.image)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) uint8 RGB and train ids (H, W) uint8; DataError for anything that cannot be trained on."""
        image = read_image(self.image)
        if self.label is None:
            return image, np.full(image.shape[:2], IGNORE, np.uint8)
        target = self.label_map.read(self.label)
        if image.shape[:2] != target.shape:
            raise DataError(f"{self.label}: label is {target.shape[1]}x{target.shape[0]}, its picture {self.image} is "
                            f"{image.shape[1]}x{image.shape[0]} (EXIF rotation is ignored); both must have one size, replace one of them")
        return image, target


def find_files(root: Path, folder: str, endings: tuple[str, ...]) -> dict[str, list[tuple[str, str]]]:
    """Files below root/folder by key, the path below the folder without its ending: {key: [(ending, path), ...]}.

    Folders that are links are followed, hidden files passed over. A file belongs to the first ending that fits; the found
    endings of a key are in the order of `endings`, equal ones (they differ in case) in that of their paths.
    """
    top = os.path.join(root, folder)
    found: dict[str, list[tuple[str, str]]] = {}
    for parent, folders, names in os.walk(top, followlinks=True):
        here = os.path.realpath(parent)
        # a link to a folder that it lies in would show every file 40 times, which is where Linux gives up
        folders[:] = [name for name in folders if not f"{here}/".startswith(f"{os.path.realpath(os.path.join(parent, name))}/")]
        for name in names:
            ending = next((e for e in endings if name.lower().endswith(e.lower())), None)
            if ending is not None and not name.startswith("."):
                path = os.path.join(parent, name)
                key = os.path.relpath(path, top)[: -len(ending)].replace(os.sep, "/")
                found.setdefault(key, []).append((ending, path))
    for files in found.values():
        files.sort(key=lambda file: (endings.index(file[0]), file[1]))
    return found


@dataclass(frozen=True)
class Folders:
    """Pictures in one folder, labels in another, matched by their path below it without its ending.

    `labels` maps a label file's ending to the meaning of its values; where a picture has several labels the first wins. Without a
    `label_folder` the pictures stand alone.
    """

    image_folder: str
    label_folder: str | None = None
    labels: Mapping[str, LabelMap] = field(default_factory=dict)
    image_endings: tuple[str, ...] = PICTURES

    @property
    def labelled(self) -> bool:
        return self.label_folder is not None

    def find(self, root: Path | None) -> tuple[list[Item], list[str]]:
        wanted = {self.image_folder: self.image_endings} | ({self.label_folder: tuple(self.labels)} if self.labelled else {})
        missing = [f"{Path(root, folder)}: folder is missing, it holds *{' *'.join(endings)}"
                   for folder, endings in wanted.items() if not os.path.isdir(Path(root, folder))]
        if missing:
            return [], missing
        images = find_files(root, self.image_folder, (*self.image_endings, *_UNREAD))
        labels = find_files(root, self.label_folder, tuple(self.labels)) if self.labelled else {}
        items: list[Item] = []
        problems = []
        for key in sorted(images):
            (ending, image), *others = images[key]
            twin = next((path for other, path in others if other not in _UNREAD), None)
            if ending in _UNREAD:
                problems.append(f"{image}: pictures with the ending {ending} are not read, those with {' '.join(self.image_endings)} are; "
                                "convert or remove it")
            elif twin is not None:
                problems.append(f"{image}: {os.path.basename(twin)} has the same name; remove one of the two")
            elif not self.labelled:
                items.append(FilePair(key, image, None, None))
            elif key not in labels:
                problems.append(f"{image}: picture has no label {self.label_folder}/{key}{list(self.labels)[-1]}; add the label or "
                                "remove the picture")
            else:
                (ending, label), *others = labels[key]
                if others and others[0][0] == ending:
                    problems.append(f"{label}: {os.path.basename(others[0][1])} has the same name; remove one of the two")
                else:
                    items.append(FilePair(key, image, label, self.labels[ending]))
        problems += [f"{labels[key][0][1]}: label has no picture {self.image_folder}/{key}{self.image_endings[0]}; add the picture or "
                     "remove the label" for key in sorted(labels.keys() - images.keys())]
        return items, problems


@dataclass(frozen=True)
class Lists:
    """A text file names the pictures, one per line: an id, or "picture label" as two paths below the root.

    `lists` are the names the file goes by, the first that exists is read; `{id}` in `image` and `label` is the id of a line. Without a
    `label` a line is an id. `remedy` says what to do about a file that is not there. A picture's name is that of its file without the
    ending, with its folders where several files share one.
    """

    lists: tuple[str, ...]
    image: str
    label: str | None = None
    label_map: LabelMap | None = None
    remedy: str = "correct the line or restore the file"

    @property
    def labelled(self) -> bool:
        return self.label is not None

    def find(self, root: Path | None) -> tuple[list[Item], list[str]]:
        path = next((p for p in (Path(root, name) for name in self.lists) if p.is_file()), None)
        if path is None:
            return [], [f"{Path(root, self.lists[0])}: list file is missing (also tried: {', '.join(self.lists[1:]) or 'nothing else'})"]
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            return [], [f"{path}: list cannot be read ({error}); it is a text file with one picture per line"]
        pairs: dict[str, tuple[str, str | None]] = {}  # by the picture's path without its ending
        problems = []
        first_line: dict[str, int] = {}
        for number, line in enumerate(lines, start=1):
            words = line.split()
            where = f"{path}:{number}"
            if not words:
                continue
            if len(words) > 1 + self.labelled:
                form = "an id or a picture and a label" if self.labelled else "an id"
                problems.append(f"{where}: {len(words)} words found, a line is {form}; correct the line")
                continue
            paths = words if len(words) == 2 else [path.format(id=words[0]) for path in (self.image, self.label) if path is not None]
            paths = [path.lstrip("/") for path in paths]
            absent = next((p for p in paths if ".." in Path(p).parts or not os.path.isfile(os.path.join(root, p))), None)
            if absent is not None:
                problems.append(f"{where}: {absent!r} is not a file below {root}; {self.remedy}")
                continue
            key = Path(paths[0]).with_suffix("").as_posix()
            if key in first_line:
                problems.append(f"{where}: {key!r} is already in line {first_line[key]}; remove one of the two")
            else:
                first_line[key] = number
                pairs[key] = (*(os.path.join(root, path) for path in paths), None)[:2]
        stems = {key: key.rpartition("/")[2] for key in pairs}
        count = Counter(stems.values())
        return [FilePair(stem if count[stem] == 1 else key, *pairs[key], self.label_map) for key, stem in stems.items()], problems


@dataclass(frozen=True)
class Part:
    """A share of another split's pictures (`held`), or the rest of them, in the split's order.

    Drawn with a seed of its own: the same pictures whatever is trained, and neighbouring frames of a video fall on both sides.
    """

    whole: Layout
    share: float  # above 0, below 1; at least one picture is on either side
    held: bool
    labelled = True

    def find(self, root: Path | None) -> tuple[list[Item], list[str]]:
        items, problems = self.whole.find(root)
        if len(items) < 2:
            return [], problems or [f"{root}: {len(items)} training pictures, none can be held out of them"]
        count = min(max(1, round(self.share * len(items))), len(items) - 1)
        order = np.random.default_rng(_HOLD_OUT).permutation(len(items))
        return [items[index] for index in sorted(order[:count] if self.held else order[count:])], problems
