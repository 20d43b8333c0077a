"""Label files that a data set needs and that come in another form: MATLAB files to index PNGs, SBD's labels merged into Pascal VOC's."""

import io
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.matfile import read_matrix
from dataset.reading import DataError, LabelMap
from utils.files import replace_file


@dataclass(frozen=True, slots=True)
class LabelFile:
    """One label to make: `target`, an index PNG, from `source`: a PNG, which is copied, or the matrix `names` of a .mat file."""

    source: str
    target: str
    names: tuple[str, ...]
    label_map: LabelMap

    def make(self) -> None:
        """Write the target as a whole or not at all; DataError where the source is missing, damaged or has values outside the table."""
        content = self._png()
        try:
            replace_file(self.target, content)
        except OSError as error:
            raise _not_written(self.target, error) from None

    def _png(self) -> bytes:
        """The target's content."""
        if self.source.endswith(".mat"):
            buffer = io.BytesIO()
            Image.fromarray(self._read()).save(buffer, "PNG")
            return buffer.getvalue()
        try:
            return Path(self.source).read_bytes()
        except FileNotFoundError:
            raise DataError(f"{self.source}: label is missing; restore it from the data set's archive") from None
        except OSError as error:
            raise DataError(f"{self.source}: label cannot be read ({error.strerror}); restore it from the data set's archive") from None

    def _read(self) -> np.ndarray:
        """The matrix as raw label values (H, W) uint8."""
        raw = read_matrix(self.source, *self.names)
        if raw.ndim != 2 or not raw.size or not 0 <= raw.min() <= raw.max() <= 255 or (raw % 1).any():  # nan compares false
            raise DataError(f"{self.source}: {'.'.join(self.names)} is no picture of whole numbers 0-255; replace the file")
        raw = np.ascontiguousarray(raw, np.uint8)
        self.label_map.apply(raw, self.source)
        return raw


@dataclass(frozen=True)
class Conversion:
    """Labels to make, and text files {path: lines} to write when all of them are there."""

    labels: list[LabelFile]
    lists: dict[str, list[str]] = field(default_factory=dict)

    def pending(self) -> list[LabelFile]:
        """The labels that are not there yet: each is written as a whole, so what is there was finished by an earlier conversion."""
        return [label for label in self.labels if not os.path.isfile(label.target)]

    def write_lists(self) -> None:
        """Write the text files, each as a whole."""
        for path, lines in self.lists.items():
            try:
                replace_file(path, "".join(f"{line}\n" for line in lines))
            except OSError as error:
                raise _not_written(path, error) from None


def coco_stuff_10k(spec, root: Path, sbd: Path | None) -> Conversion:
    """annotations/*.mat (matrix S) to annotations/*.png with the same values.

    Raises:
        DataError: `sbd` is given, or there are no such files.
    """
    if sbd is not None:
        raise DataError(f"--sbd {sbd}: belongs to voc; {spec.name} is converted from its own annotations/*.mat, drop the flag")
    sources = sorted((root / "annotations").glob("*.mat"))
    if not sources:
        raise DataError(f"{root / 'annotations'}: no .mat files to convert; {spec.origin}")
    label_map = spec.splits["train"].label_map
    return Conversion([LabelFile(str(path), str(path.with_suffix(".png")), ("S",), label_map) for path in sources])


def voc_with_sbd(spec, root: Path, sbd: Path | None) -> Conversion:
    """SegmentationClassAug and trainaug.txt: VOC's training pictures and SBD's (train and val) without VOC's validation pictures.

    VOC's own label is taken where there is one, SBD's (cls/*.mat, GTcls.Segmentation) elsewhere: 1464 and 9118 of 10582 pictures. SBD
    labels whole objects, where VOC leaves a border without label.

    Raises:
        DataError: no `sbd`, a list is missing, or there is a trainaug.txt of other pictures.
    """
    if sbd is None:
        raise DataError("--sbd is missing: the folder with cls/*.mat, train.txt and val.txt of SBD (benchmark_RELEASE/dataset of "
                        "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz)")
    lists = root / "ImageSets/Segmentation"
    own, held_out = _ids(lists / "train.txt"), _ids(lists / "val.txt")
    ids = sorted((own | _ids(sbd / "train.txt") | _ids(sbd / "val.txt")) - held_out)
    made = lists / "trainaug.txt"
    if made.exists() and _words(made) != ids:
        raise DataError(f"{made}: is there already and has another content than --convert writes ({len(ids)} ids in alphabetical order); "
                        "move it away, or drop --convert if it is the list that you want")
    target, label_map = root / "SegmentationClassAug", spec.splits["train"].label_map
    try:
        target.mkdir(exist_ok=True)
    except OSError as error:
        raise _not_written(target, error) from None
    labels = []
    for name in ids:
        png = root / f"SegmentationClass/{name}.png"
        source = png if name in own or png.is_file() else sbd / f"cls/{name}.mat"
        labels.append(LabelFile(str(source), str(target / f"{name}.png"), ("GTcls", "Segmentation"), label_map))
    return Conversion(labels, {str(made): ids})


def _not_written(path: str | Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be written ({error.strerror}); free space, or make the folder writable")


def _ids(path: Path) -> set[str]:
    return set(_words(path))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: list cannot be read ({error}); restore it from its archive") from None
