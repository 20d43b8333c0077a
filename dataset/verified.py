"""What earlier checks of a data set found sound, so that an interrupted check goes on where it stopped."""

import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from dataset.layout import FilePair, Item
from dataset.reading import DataError


class Verified:
    """A file with one line of JSON per sound picture, appended as the check goes; `path` None keeps nothing.

    A picture is known by the path below `root`, size and time of change of its files and by the meaning of its label values; a
    line that a kill has cut off is not. `fresh` forgets what is there. DataError where the file cannot be written.
    """

    def __init__(self, path: Path | None, root: Path | None, fresh: bool = False):
        self.root, self._known, self._file = root, {}, None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "w+b" if fresh else "a+b")
        except OSError as error:
            raise DataError(f"{path}: what was verified cannot be kept there ({error.strerror}); give a file that can be written "
                            "with --state") from None
        self._file.seek(0)
        content = self._file.read()
        for line in content.split(b"\n"):
            try:
                record = json.loads(line)
                width, height = record["size"]
                pixels = np.zeros(256, np.int64)
                for value, count in record["pixels"].items():
                    pixels[int(value)] = count
                self._known[json.dumps(record["key"])] = (width, height), pixels
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError):
                continue  # cut off or damaged: the picture is read again
        if content and not content.endswith(b"\n"):
            self._file.write(b"\n")

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # which `add` has told already
                self._file.close()

    def key(self, item: Item) -> list | None:
        """What a picture is known by; to be asked for before it is read, so that one that changes meanwhile is not taken for sound."""
        return None if self._file is None else picture_key(item, self.root)

    def find(self, key: list | None) -> tuple[tuple[int, int], np.ndarray] | None:
        """((width, height), pixels per train id (256,)) of a picture that was sound and has not changed since."""
        return None if key is None else self._known.get(json.dumps(key))

    def add(self, key: list | None, size: tuple[int, int], pixels: np.ndarray) -> None:
        """Remember a sound picture."""
        if key is None:
            return
        counts = {int(value): int(pixels[value]) for value in np.flatnonzero(pixels)}
        try:
            self._file.write(json.dumps({"key": key, "size": size, "pixels": counts}).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise DataError(f"{self._file.name}: what was verified cannot be kept there ({error.strerror}); free space, or give another "
                            "file with --state") from None


def picture_key(item: Item, root: Path | None) -> list | None:
    """What a picture and its label depend on, as plain values: paths below `root`, sizes, times of change, meaning of the label values.

    None for what lies in no files, or in files that are not there.
    """
    if not isinstance(item, FilePair):
        return None
    try:
        states = [(os.path.relpath(path, root), os.stat(path)) for path in item.files()]
    except OSError:
        return None
    meaning = None if item.label_map is None else item.label_map.fingerprint()
    return [*([path, state.st_size, state.st_mtime_ns] for path, state in states), meaning]
