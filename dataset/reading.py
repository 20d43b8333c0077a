"""Reading pictures and labels from files: nothing is misread silently, every refusal names the file and the remedy.

Pillow decodes both. OpenCV decodes a truncated JPEG without a word, turns palette labels into luminance (class 1 becomes
38) and rotates by EXIF, which labels never carry; Pillow raises, keeps indices and ignores EXIF.
"""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

IGNORE = 255  # the one "no label" value inside the project

# Grey PNGs of 2 and 4 bits: Pillow stretches samples to 0..255, a label means the sample itself.
_STRETCH = {"L;2": 85, "L;4": 17}
_LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class DataError(ValueError):
    """A file or folder that cannot be used; the message is one line: what, found, allowed, remedy."""


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _open(path: str | Path, what: str) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise DataError(f"{path}: {what} is missing; restore it from the data set's archive") from None
    except Exception as error:  # noqa: BLE001 - on damaged files Pillow raises anything from SyntaxError to struct.error
        raise DataError(f"{path}: {what} cannot be read ({_reason(error)}); replace the file") from None


def _decode(picture: Image.Image, path: str | Path, what: str, mode: str | None = None) -> np.ndarray:
    try:
        return np.array(picture if mode is None else picture.convert(mode))
    except Exception as error:  # noqa: BLE001 - as above
        raise DataError(f"{path}: {what} is damaged ({_reason(error)}); replace the file") from None


def read_image(path: str | Path) -> np.ndarray:
    """Read a picture as (H, W, 3) uint8 RGB.

    Grey, palette, 1-bit and CMYK pictures are converted, alpha is dropped, EXIF rotation is ignored (labels are not rotated).
    Raises DataError for a missing, damaged, 16-bit grey or floating-point file.
    """
    with _open(path, "picture") as picture:
        if picture.mode in _DEEP_MODES:
            raise DataError(f"{path}: picture has mode {picture.mode}, 8 bits per channel are needed; convert it to 8-bit RGB")
        if picture.mode == "P":  # by way of RGBA: a palette with transparency makes Pillow warn otherwise
            return np.ascontiguousarray(_decode(picture, path, "picture", "RGBA")[:, :, :3])
        return _decode(picture, path, "picture", None if picture.mode == "RGB" else "RGB")


def read_label(path: str | Path) -> np.ndarray:
    """Read a label's raw values as (H, W) uint8; index and palette files give the same array, 1-bit files give 0 and 1.

    Raises DataError for a missing or damaged file, for colours, for JPEG (lossy) and for values above 255.
    """
    with _open(path, "label") as picture:
        if picture.format == "JPEG":
            raise DataError(f"{path}: label is a JPEG, whose compression changes class values; save labels as PNG")
        if picture.mode not in _LABEL_MODES:
            raise DataError(f"{path}: label has colours (mode {picture.mode}), one class value per pixel is needed; "
                            "save it as an 8-bit index or palette PNG")
        stretch = _STRETCH.get(picture.tile[0][3], 1) if picture.tile else 1
        raw = _decode(picture, path, "label")
    if raw.dtype != np.uint8:
        if raw.min() < 0 or raw.max() > 255:
            value = raw.max() if raw.max() > 255 else raw.min()
            raise DataError(f"{path}: label value {value} found, 0-255 are possible; save it as an 8-bit index PNG")
        raw = raw.astype(np.uint8)
    return raw // stretch if stretch > 1 else raw


class LabelMap:
    """What the raw values of a label file mean: raw value -> train id, or IGNORE; a value that is not named is an error.

    `table` (256,) uint8 maps raw values to train ids, `refused` (256,) uint8 is 1 where a raw value is not in the table.
    """

    def __init__(self, values: dict[int, int]):
        self.table = np.full(256, IGNORE, np.uint8)
        self.refused = np.ones(256, np.uint8)
        for raw, train_id in values.items():
            self.table[raw], self.refused[raw] = train_id, 0

    @classmethod
    def plain(cls, num_classes: int, ignored: tuple[int, ...] = (IGNORE,), offset: int = 0) -> "LabelMap":
        """Train id k is stored as k + offset; the `ignored` raw values carry no label."""
        return cls({k + offset: k for k in range(num_classes)} | dict.fromkeys(ignored, IGNORE))

    def allowed(self) -> str:
        """The raw values in the table as text, e.g. "0-20, 255"."""
        values = np.flatnonzero(self.refused == 0)
        runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
        return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)

    def apply(self, raw: np.ndarray, path: str | Path) -> np.ndarray:
        """Raw values (H, W) uint8 to train ids (H, W) uint8; DataError names `path` and the values outside the table."""
        if cv2.LUT(raw, self.refused).any():
            values = np.unique(raw)
            wrong = values[self.refused[values] == 1]
            listed = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
            raise DataError(f"{path}: label value{'s' if len(wrong) > 1 else ''} {listed} found, allowed are {self.allowed()}; "
                            "replace the file or convert its values")
        return cv2.LUT(raw, self.table)
