"""Training augmentation: one draw of scale, crop and flip for image and label, applied region first.

Only the slice of the picture under the crop box is resized. The result is the one of resizing the whole picture with
`cv2.resize(picture, None, fx=scale, fy=scale)` and cropping afterwards: labels (nearest) bit for bit, images (bilinear,
half-pixel centres) within one grey level.
"""

from dataclasses import dataclass
from fractions import Fraction

import cv2
import numpy as np

from dataset.reading import IGNORE

PAD_COLOUR = (124, 116, 104)  # ImageNet's mean colour 255 * (0.485, 0.456, 0.406), rounded: zero after normalisation
SCALES = tuple(tenths / 10 for tenths in range(5, 21))  # 0.5, 0.6, ..., 2.0: the CIRKD line


@dataclass(frozen=True)
class Augment:
    """What training may do to a picture: crop (height, width) in pixels, the scales to draw from, flip with p 0.5.

    Scales are fractions with a denominator of at most 100, so that a slice can start on the sampling grid of the whole.
    """

    crop: tuple[int, int]
    scales: tuple[float, ...] = SCALES
    flip: bool = True

    def __post_init__(self) -> None:
        if len(self.crop) != 2 or min(self.crop) < 1:
            raise ValueError(f"crop is (height, width) of at least 1 pixel, got {self.crop}")
        for scale in self.scales:
            if scale <= 0 or abs(float(_fraction(scale)) - scale) > 1e-12:
                raise ValueError(f"a scale is positive and has at most two decimals, got {scale}")


@dataclass(frozen=True)
class Draw:
    """One draw: scale, the crop box's top left corner in the scaled picture (pixels), its size, and flip."""

    scale: float
    top: int
    left: int
    crop: tuple[int, int]
    flip: bool

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, bottom, left, right) of what the crop box holds of a picture of height x width pixels, in pixels of the scaled one."""
        bottom = min(self.top + self.crop[0], scaled_length(height, self.scale))
        right = min(self.left + self.crop[1], scaled_length(width, self.scale))
        return self.top, bottom, self.left, right


def _fraction(scale: float) -> Fraction:
    return Fraction(scale).limit_denominator(100)


def scaled_length(length: int, scale: float) -> int:
    """Pixels of a scaled side: rounded half to even as cv2.resize does, at least 1."""
    return max(1, round(length * scale))


def draw(rng: np.random.Generator, height: int, width: int, augment: Augment) -> Draw:
    """Draw scale, crop and flip for a picture of height x width pixels. Always four numbers of `rng`."""
    scale = augment.scales[rng.integers(len(augment.scales))]
    top, left = (int(rng.integers(max(scaled_length(length, scale) - crop, 0) + 1))
                 for length, crop in zip((height, width), augment.crop, strict=True))
    flip = bool(rng.integers(2)) and augment.flip
    return Draw(scale, top, left, augment.crop, flip)


def apply(drawn: Draw, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) uint8 and label (H, W) uint8 to the drawn crop: (h, w, 3) and (h, w), contiguous.

    Where the scaled picture is smaller than the crop, bottom and right are padded with PAD_COLOUR and IGNORE, before the flip.
    """
    height, width = drawn.crop
    box = drawn.box(*image.shape[:2])
    region = image_region(image, drawn.scale, *box)
    target = label_region(label, drawn.scale, *box)
    below, beside = height - region.shape[0], width - region.shape[1]
    if below or beside:
        region = cv2.copyMakeBorder(region, 0, below, 0, beside, cv2.BORDER_CONSTANT, value=PAD_COLOUR)
        target = cv2.copyMakeBorder(target, 0, below, 0, beside, cv2.BORDER_CONSTANT, value=IGNORE)
    if drawn.flip:
        return cv2.flip(region, 1), cv2.flip(target, 1)
    return np.ascontiguousarray(region), np.ascontiguousarray(target)


def label_region(label: np.ndarray, scale: float, top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """Rows top..bottom and columns left..right of the label scaled by nearest neighbour (cv2.INTER_NEAREST)."""
    if scale == 1:
        return label[top:bottom, left:right]
    # The same floating-point expression as OpenCV's: floor(x * (1 / scale)), where an integer division differs at some x.
    rows, columns = (np.minimum(np.floor(np.arange(start, stop) * (1 / scale)).astype(np.intp), length - 1)
                     for start, stop, length in ((top, bottom, label.shape[0]), (left, right, label.shape[1])))
    # Each take copies whole rows, of the transposed label the first time: 4x faster than label[rows][:, columns].
    part = label[rows[0]: rows[-1] + 1, columns[0]: columns[-1] + 1]
    return cv2.transpose(cv2.transpose(part).take(columns - columns[0], 0)).take(rows - rows[0], 0)


def image_region(image: np.ndarray, scale: float, top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """Rows top..bottom and columns left..right of the image scaled bilinearly (cv2.INTER_LINEAR)."""
    if scale == 1:
        return image[top:bottom, left:right]
    # With scale = p/q, every p scaled pixels begin where q source pixels do. A slice that starts on such a block has the
    # sampling phase of the whole; one block more on each side holds the neighbours that the interpolation reads.
    ratio = _fraction(scale)
    p, q = ratio.numerator, ratio.denominator
    first_row, first_column = max(top // p - 1, 0), max(left // p - 1, 0)
    last_row, last_column = -(-bottom // p) + 1, -(-right // p) + 1
    part = image[first_row * q: last_row * q, first_column * q: last_column * q]
    # Repeating the edge is what cv2.resize does outside the picture; whole blocks keep its own rounding of sizes out of it.
    below = (last_row - first_row) * q - part.shape[0]
    beside = (last_column - first_column) * q - part.shape[1]
    if below or beside:
        part = cv2.copyMakeBorder(part, 0, below, 0, beside, cv2.BORDER_REPLICATE)
    part = cv2.resize(part, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    return part[top - first_row * p: bottom - first_row * p, left - first_column * p: right - first_column * p]
