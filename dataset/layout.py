"""How a split lies on disk: folders matched by name, or a list file. Each gives pairs to read and problems to report."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dataset.reading import DataError, LabelMap, read_image, read_label

PICTURES = (".png", ".jpg", ".jpeg")


class Item(Protocol):
    """One picture with its label, wherever it comes from."""

    name: str

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) uint8 RGB and train ids (H, W) uint8."""


class Layout(Protocol):
    """One split of a data set."""

    def find(self, root: Path | None) -> tuple[list[Item], list[str]]:
        """Items in a fixed order, and one line for everything that is missing or does not match."""


@dataclass(frozen=True, slots=True)
class FilePair:
    """A picture and a label on disk (paths as strings: COCO has 118287 of them in every worker)."""

    name: str
    image: str
    label: str
    label_map: LabelMap

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) uint8 RGB and train ids (H, W) uint8; DataError for anything that cannot be trained on."""
        image = read_image(self.image)
        raw = read_label(self.label)
        if image.shape[:2] != raw.shape:
            raise DataError(f"{self.label}: label is {raw.shape[1]}x{raw.shape[0]}, its picture {self.image} is "
                            f"{image.shape[1]}x{image.shape[0]} (EXIF rotation is ignored); both must have one size, replace one of them")
        return image, self.label_map.apply(raw, self.label)


def _files(root: Path, folder: str, endings: tuple[str, ...]) -> dict[str, list[tuple[str, str]]]:
    """Files below root/folder by key, the path below the folder without its ending: {key: [(ending, path), ...]}.

    A file belongs to the first ending that fits; the found endings of a key are in the order of `endings`.
    """
    top = os.path.join(root, folder)
    found: dict[str, list[tuple[str, str]]] = {}
    for parent, _, names in os.walk(top, followlinks=True):
        for name in names:
            ending = next((e for e in endings if name.lower().endswith(e.lower())), None)
            if ending is not None and not name.startswith("."):
                path = os.path.join(parent, name)
                key = os.path.relpath(path, top)[: -len(ending)].replace(os.sep, "/")
                found.setdefault(key, []).append((ending, path))
    for files in found.values():
        files.sort(key=lambda file: endings.index(file[0]))
    return found


@dataclass(frozen=True)
class Folders:
    """Pictures in one folder, labels in another, matched by their path below it without its ending.

    `labels` maps a label file's ending to the meaning of its values; where a picture has several labels the first wins.
    """

    image_folder: str
    label_folder: str
    labels: Mapping[str, LabelMap]
    image_endings: tuple[str, ...] = PICTURES

    def find(self, root: Path | None) -> tuple[list[Item], list[str]]:
        wanted = {self.image_folder: self.image_endings, self.label_folder: tuple(self.labels)}
        missing = [f"{Path(root, folder)}: folder is missing, it holds *{' *'.join(endings)}"
                   for folder, endings in wanted.items() if not os.path.isdir(Path(root, folder))]
        if missing:
            return [], missing
        images = _files(root, self.image_folder, self.image_endings)
        labels = _files(root, self.label_folder, tuple(self.labels))
        items: list[Item] = []
        problems = []
        for key in sorted(images):
            image = images[key][0][1]
            if len(images[key]) > 1:
                problems.append(f"{image}: {os.path.basename(images[key][1][1])} has the same name; remove one of the two")
            elif key not in labels:
                problems.append(f"{image}: picture has no label {self.label_folder}/{key}{list(self.labels)[-1]}; add the label or "
                                "remove the picture")
            else:
                ending, label = labels[key][0]
                items.append(FilePair(key, image, label, self.labels[ending]))
        problems += [f"{labels[key][0][1]}: label has no picture {self.image_folder}/{key}{self.image_endings[0]}; add the picture or "
                     "remove the label" for key in sorted(labels.keys() - images.keys())]
        return items, problems


@dataclass(frozen=True)
class Lists:
    """A text file names the pictures, one per line: an id, or "picture label" as two paths below the root.

    `lists` are the names the file goes by, the first that exists is read; `{id}` in `image` and `label` is the id of a line.
    """

    lists: tuple[str, ...]
    image: str
    label: str
    label_map: LabelMap

    def find(self, root: Path | None) -> tuple[list[Item], list[str]]:
        path = next((p for p in (Path(root, name) for name in self.lists) if p.is_file()), None)
        if path is None:
            return [], [f"{Path(root, self.lists[0])}: list file is missing (also tried: {', '.join(self.lists[1:]) or 'nothing else'})"]
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            return [], [f"{path}: list cannot be read ({error}); it is a text file with one picture per line"]
        items: list[Item] = []
        problems = []
        first_line: dict[str, int] = {}
        for number, line in enumerate(lines, start=1):
            words = line.split()
            where = f"{path}:{number}"
            if not words:
                continue
            if len(words) > 2:
                problems.append(f"{where}: {len(words)} words found, a line is an id or a picture and a label; correct the line")
                continue
            image, label = words if len(words) == 2 else (self.image.format(id=words[0]), self.label.format(id=words[0]))
            image, label = image.lstrip("/"), label.lstrip("/")
            absent = next((p for p in (image, label) if ".." in Path(p).parts or not os.path.isfile(os.path.join(root, p))), None)
            if absent is not None:
                problems.append(f"{where}: {absent!r} is not a file below {root}; correct the line or restore the file")
            elif image in first_line:
                problems.append(f"{where}: {image!r} is already in line {first_line[image]}; remove one of the two")
            else:
                first_line[image] = number
                items.append(FilePair(Path(image).stem, os.path.join(root, image), os.path.join(root, label), self.label_map))
        return items, problems
