"""Drawn data, no files: scenes of eight classes, in pairs that share a colour and differ in outline or texture.

A picture is a pure function of (split, index). Made so that a network learns something within a minute (the colour of a pair) and a
larger one learns more (disc from ring, square from checker, triangle from star): noisy textured grounds, objects of 7 to 24 pixels
radius in any turn, colours that vary and fade, overlaps, thin wires.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from dataset.layout import Item
from dataset.reading import IGNORE

SIZE = 96  # pixels, height and width of a picture
COUNTS = {"train": 512, "val": 64, "test": 128}  # pictures per split
CLASSES = ("background", "disc", "ring", "square", "checker", "triangle", "star", "wire")
COLOURS = ((0, 0, 0), (230, 60, 60), (250, 170, 40), (70, 130, 230), (150, 80, 220), (60, 180, 90), (240, 230, 60), (90, 220, 220))
FREQUENCY = (0.22, 0.10, 0.20, 0.14, 0.16, 0.10, 0.08)  # of the seven object classes: uneven, as street scenes are
DISC, RING, SQUARE, CHECKER, TRIANGLE, STAR, WIRE = range(1, 8)
HUES = {  # what the filling of a kind varies around, RGB; shared within a pair
    DISC: (200, 80, 80), RING: (200, 80, 80), SQUARE: (80, 110, 200), CHECKER: (80, 110, 200),
    TRIANGLE: (80, 180, 100), STAR: (80, 180, 100), WIRE: (210, 200, 90),
}  # fmt: skip
SEED = 20240
_SPLIT = {split: number for number, split in enumerate(COUNTS)}


def _cloud(rng: np.random.Generator, height: int, width: int, cells: int, strength: float) -> np.ndarray:
    """Smooth noise (height, width, 3) int16 of about -strength..strength, with `cells` blobs along a side."""
    grid = rng.uniform(-strength, strength, (cells, cells, 3)).astype(np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)


def _polygon(rng: np.random.Generator, kind: int, centre: np.ndarray, radius: float) -> np.ndarray:
    """Corners (n, 1, 2) int32 of a square, triangle or star in a random turn."""
    corners = {TRIANGLE: 3, STAR: 10}.get(kind, 4)
    angle = rng.uniform(0, 2 * np.pi) + np.arange(corners) * (2 * np.pi / corners)
    reach = np.where(np.arange(corners) % 2 == 0, radius, 0.45 * radius) if kind == STAR else np.full(corners, radius)
    points = centre + reach[:, None] * np.stack((np.cos(angle), np.sin(angle)), 1)
    return np.rint(points).astype(np.int32)[:, None]


def _stamp(rng: np.random.Generator, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks (SIZE, SIZE) uint8 of a new object and of its border of one pixel, which is not labelled."""
    centre = rng.uniform(4, SIZE - 4, 2)
    radius = float(rng.uniform(7, 24))
    inside, border = np.zeros((2, SIZE, SIZE), np.uint8)
    if kind in (DISC, RING):
        middle = tuple(int(c) for c in centre)
        thickness = -1 if kind == DISC else max(2, int(0.35 * radius))
        cv2.circle(inside, middle, int(radius), 1, thickness)
    elif kind == WIRE:
        bends = np.rint(rng.uniform(-8, SIZE + 8, (3, 2))).astype(np.int32)[:, None]
        cv2.polylines(inside, [bends], False, 1, int(rng.integers(1, 4)))
        return inside, border  # one to three pixels wide: a border would be as large as the wire
    else:
        cv2.fillPoly(inside, [_polygon(rng, kind, centre, radius)], 1)
    outline, _ = cv2.findContours(inside, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(border, outline, -1, 1, 1)
    return inside, border


def _checkers(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A turned checkerboard (height, width, 1) int16 of -1 and 1, in cells of 3 to 6 pixels."""
    angle, cell = rng.uniform(0, np.pi / 2), rng.uniform(3, 6)
    y, x = np.arange(height)[:, None] / cell, np.arange(width)[None] / cell
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return ((np.floor(u) + np.floor(v)) % 2 * 2 - 1).astype(np.int16)[:, :, None]


def draw_scene(split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (SIZE, SIZE, 3) uint8 RGB and label (SIZE, SIZE) uint8 of picture `index` of a split; takes 1 to 2 milliseconds."""
    rng = np.random.default_rng([SEED, _SPLIT[split], index])
    image = rng.integers(80, 176, dtype=np.int16) + rng.integers(-20, 21, 3, dtype=np.int16)
    image = image + _cloud(rng, SIZE, SIZE, 4, 45) + _cloud(rng, SIZE, SIZE, 16, 25)  # (SIZE, SIZE, 3)
    label = np.zeros((SIZE, SIZE), np.uint8)
    if rng.random() < 0.5:  # a checkered ground: the texture alone does not make a checker
        image += _checkers(rng, SIZE, SIZE) * 12
    for _ in range(rng.integers(5, 12)):
        kind = 1 + int(rng.choice(len(FREQUENCY), p=FREQUENCY))
        inside, border = _stamp(rng, kind)
        x, y, width, height = cv2.boundingRect(inside)
        box = np.s_[y: y + height, x: x + width]
        filling = np.int16(HUES[kind]) + rng.integers(-45, 46, 3, dtype=np.int16) + _cloud(rng, height, width, 3, 25)
        if kind == CHECKER:
            filling += _checkers(rng, height, width) * 28
        cv2.copyTo(filling, inside[box], image[box])
        label[box][inside[box] == 1] = kind
        label[border == 1] = IGNORE
    image += rng.integers(-18, 19, image.shape, dtype=np.int16)
    return np.clip(image, 0, 255).astype(np.uint8), label


@dataclass(frozen=True, slots=True)
class DrawnItem:
    """One scene, drawn when it is read."""

    name: str
    split: str
    index: int

    def files(self) -> tuple[str, ...]:
        """None: it is drawn."""
        return ()

    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return SIZE, SIZE

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Image (SIZE, SIZE, 3) uint8 RGB and train ids (SIZE, SIZE) uint8."""
        return draw_scene(self.split, self.index)


@dataclass(frozen=True)
class Drawn:
    """A split that is drawn instead of read."""

    split: str
    labelled = True

    def find(self, root: Path | None) -> tuple[list[Item], list[str]]:
        return [DrawnItem(f"{self.split}_{index:04d}", self.split, index) for index in range(COUNTS[self.split])], []
