"""Reading pictures and labels from files: nothing is misread silently, every refusal names the file and the remedy.

Pillow decodes both. OpenCV decodes a truncated JPEG without a word, turns palette labels into luminance (class 1 becomes
38) and rotates by EXIF, which labels never carry; Pillow raises, keeps indices and ignores EXIF. OpenCV is 1.4x as fast on PNGs,
though, whose chunks carry checksums: RGB pictures that agree with theirs are left to it, pixel for pixel the same.
"""

import hashlib
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

IGNORE = 255  # the one "no label" value inside the project

# Grey PNGs of 2 and 4 bits: Pillow stretches samples to 0..255, a label means the sample itself.
_STRETCH = {"L;2": 85, "L;4": 17}
_LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
_PLAIN_CHUNKS = (b"IHDR", b"IDAT", b"IEND", b"pHYs", b"tEXt", b"zTXt", b"iTXt", b"tIME")  # nothing that turns or recolours
# All that is opened, whatever a file is called. Of the others Pillow (13.0) hands EPS to Ghostscript, a program for a language.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
_LOSSY = ("JPEG", "MPO", "WEBP")  # MPO: a JPEG with several pictures
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class DataError(ValueError):
    """A file or folder that cannot be used; the message is one line: what, found, allowed, remedy."""


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _open(path: str | Path, what: str) -> Image.Image:
    try:
        picture = Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise DataError(f"{path}: {what} is missing; restore it from the data set's archive") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: {what} cannot be read (damaged, or none of {', '.join(FORMATS)}); replace the file") from None
    except Exception as error:  # noqa: BLE001 - on damaged files Pillow raises anything from SyntaxError to struct.error
        raise DataError(f"{path}: {what} cannot be read ({_reason(error)}); replace the file") from None
    if picture.format == "TIFF" and (turned := picture.tag_v2.get(ExifTags.Base.Orientation, 1)) != 1:
        # Pillow (13.0) turns TIFFs as they say, and no other format
        raise DataError(f"{path}: {what} is a TIFF that says how to turn it (orientation {turned}), which is ignored elsewhere; save it as PNG")
    return picture


def _decode(picture: Image.Image, path: str | Path, what: str, mode: str | None = None) -> np.ndarray:
    try:
        return np.array(picture if mode is None else picture.convert(mode))
    except Exception as error:  # noqa: BLE001 - as above
        raise DataError(f"{path}: {what} is damaged ({_reason(error)}); replace the file") from None


def _is_sound_png(data: bytes) -> bool:
    """Whether this is an 8-bit RGB PNG that every decoder reads alike, complete and with the checksum of every chunk right.

    Not one so large that Pillow suspects it to fill the memory: OpenCV (5.0) takes twelve times as many pixels, 3 GB of them.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or data[24:29] != b"\x08\x02\0\0\0":  # 8 bits, RGB, not interlaced
        return False
    width, height = struct.unpack_from(">II", data, 16)
    if width * height > Image.MAX_IMAGE_PIXELS:
        return False
    at, view = 8, memoryview(data)
    while len(data) - at >= 12:
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind not in _PLAIN_CHUNKS or len(data) - at - 12 < length:
            return False
        if zlib.crc32(view[at + 4: at + 8 + length]) != struct.unpack_from(">I", data, at + 8 + length)[0]:
            return False
        if kind == b"IEND":
            return True
        at += 12 + length
    return False


def _read_sound_png(path: str | Path) -> np.ndarray | None:
    """A PNG that OpenCV may decode, (H, W, 3) uint8 RGB; None for everything that Pillow has to look at, or to refuse."""
    if not str(path).lower().endswith(".png"):
        return None
    try:
        data = Path(path).read_bytes()
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if _is_sound_png(data) else None
    except (OSError, cv2.error):  # missing, or larger than OpenCV's limit
        return None
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def read_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of a picture as its header says, without decoding it; DataError where the file is missing or no picture."""
    with _open(path, "picture") as picture:
        return picture.height, picture.width


def read_image(path: str | Path) -> np.ndarray:
    """Read a picture as (H, W, 3) uint8 RGB.

    Grey, palette, 1-bit and CMYK pictures are converted, alpha is dropped, EXIF rotation is ignored (labels are not rotated).
    Raises DataError for a missing, damaged, 16-bit grey or floating-point file.
    """
    if (image := _read_sound_png(path)) is not None:
        return image
    with _open(path, "picture") as picture:
        return _rgb(picture, path)


def read_upright(path: str | Path) -> tuple[np.ndarray, int]:
    """(what `read_image` reads, turned as viewers show it, and its EXIF mark: 1 where it is stored upright, up to 8)."""
    if (image := _read_sound_png(path)) is not None:  # has no mark
        return image, 1
    with _open(path, "picture") as picture:
        image = _rgb(picture, path)
        try:
            mark = picture.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # noqa: BLE001 - as above; viewers pass over a damaged mark
            mark = 1
    turn = _TURNS.get(mark)
    return (image, 1) if turn is None else (np.ascontiguousarray(turn(image)), mark)


_TURNS = {  # EXIF mark -> what makes the picture upright
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image[::-1].swapaxes(0, 1),  # by 90 degrees clockwise
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image[:, ::-1].swapaxes(0, 1),
}


def _rgb(picture: Image.Image, path: str | Path) -> np.ndarray:
    if picture.mode in _DEEP_MODES:
        raise DataError(f"{path}: picture has mode {picture.mode}, 8 bits per channel are needed; convert it to 8-bit RGB")
    if picture.mode == "P":  # by way of RGBA: a palette with transparency makes Pillow warn otherwise
        return np.ascontiguousarray(_decode(picture, path, "picture", "RGBA")[:, :, :3])
    return _decode(picture, path, "picture", None if picture.mode == "RGB" else "RGB")


def read_label(path: str | Path, colours: bool = False) -> np.ndarray:
    """Read a label's raw values as (H, W) uint8; index and palette files give the same array, 1-bit files give 0 and 1.

    With `colours`, files in RGB are read, too, as (H, W, 3) uint8; transparent pixels have no colour and are refused.

    Raises DataError for a missing or damaged file, for colours, for JPEG (lossy) and for values above 255.
    """
    with _open(path, "label") as picture:
        if picture.format in _LOSSY:
            raise DataError(f"{path}: label is a {picture.format}, whose compression changes class values; save labels as PNG")
        if colours and picture.mode in ("RGB", "RGBA"):
            raw = _decode(picture, path, "label")
            if raw.shape[2] == 4 and raw[:, :, 3].min() < 255:
                raise DataError(f"{path}: label has transparent pixels, whose colour means nothing; save it as RGB without transparency")
            return raw[:, :, :3]
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

    `table` (256,) uint8 maps raw values to train ids, `refused` (256,) uint8 is 1 where a raw value is not in the table. With
    `colours` {(red, green, blue): train id or IGNORE}, labels in RGB are understood as well, each file by its mode; a palette file is
    one of values, and refused where its palette says otherwise.
    """

    def __init__(self, values: dict[int, int], colours: dict[tuple[int, int, int], int] | None = None):
        self.table = np.full(256, IGNORE, np.uint8)
        self.colours = dict(sorted((colours or {}).items()))
        self.refused = np.ones(256, np.uint8)
        for raw, train_id in values.items():
            self.table[raw], self.refused[raw] = train_id, 0

    @classmethod
    def plain(cls, num_classes: int, ignored: tuple[int, ...] = (IGNORE,), offset: int = 0) -> "LabelMap":
        """Train id k is stored as k + offset; the `ignored` raw values carry no label."""
        return cls({k + offset: k for k in range(num_classes)} | dict.fromkeys(ignored, IGNORE))

    def fingerprint(self) -> str:
        """A name for this meaning of the values: equal maps have equal ones."""
        meaning = self.table.tobytes() + self.refused.tobytes() + repr(self.colours).encode()
        return hashlib.sha256(meaning).hexdigest()[:16]

    def allowed(self) -> str:
        """The raw values in the table as text, e.g. "0-20, 255"."""
        values = np.flatnonzero(self.refused == 0)
        runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
        return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)

    def read(self, path: str | Path) -> np.ndarray:
        """Train ids (H, W) uint8 of a label file; DataError as of `read_label`, and for what is not in the table."""
        raw = read_label(path, bool(self.colours))
        if raw.ndim == 3:
            return self.decode(raw, path)
        target = self.apply(raw, path)
        if self.colours:
            self._check_palette(raw, path)
        return target

    def _check_palette(self, raw: np.ndarray, path: str | Path) -> None:
        """DataError where a palette file's own colours are all classes', and one is not of the class that its value means: a program that
        stores RGB labels as a palette numbers the colours its own way."""
        with _open(path, "label") as picture:
            kind, colours = picture.palette.getdata() if picture.mode == "P" and picture.palette else (None, b"")
        if kind != "RGB":
            return
        shown = {value: self.colours.get(tuple(colours[3 * value: 3 * value + 3])) for value in np.flatnonzero(np.bincount(raw.ravel())).tolist()}
        wrong = [value for value, train_id in shown.items() if train_id not in (None, IGNORE, self.table[value])]
        if wrong and None not in shown.values():
            raise DataError(f"{path}: label value {wrong[0]} has the colour of class {shown[wrong[0]]} in the file's palette; save it as RGB, or "
                            "without a palette if the values are right")

    def decode(self, raw: np.ndarray, path: str | Path) -> np.ndarray:
        """Colours (H, W, 3) uint8 to train ids (H, W) uint8; DataError names `path` and the colours outside the table."""
        red, green, blue = (raw[:, :, channel].astype(np.uint32) for channel in range(3))
        codes = red << 16 | green << 8 | blue  # (H, W); sorted as the colours are
        known = np.array([r << 16 | g << 8 | b for r, g, b in self.colours], np.uint32)
        place = np.minimum(np.searchsorted(known, codes), len(known) - 1)
        wrong = np.unique(codes[known[place] != codes])
        if len(wrong):
            listed = ", ".join(f"{code >> 16} {code >> 8 & 255} {code & 255}" for code in wrong[:5].tolist()) + (", ..." if len(wrong) > 5 else "")
            raise DataError(f"{path}: label colour{'s' if len(wrong) > 1 else ''} {listed} found, which no class has; give the class its "
                            "colour, or replace the file")
        return np.array(list(self.colours.values()), np.uint8)[place]

    def apply(self, raw: np.ndarray, path: str | Path) -> np.ndarray:
        """Raw values (H, W) uint8 to train ids (H, W) uint8; DataError names `path` and the values outside the table."""
        if cv2.LUT(raw, self.refused).any():
            values = np.unique(raw)
            wrong = values[self.refused[values] == 1]
            listed = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
            raise DataError(f"{path}: label value{'s' if len(wrong) > 1 else ''} {listed} found, allowed are {self.allowed()}; "
                            "replace the file or convert its values")
        return cv2.LUT(raw, self.table)
