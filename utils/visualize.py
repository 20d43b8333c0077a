"""Label maps as pictures: palette files, overlays, legends and sheets.

`palette` is (256, 3) uint8, `Spec.palette()`; a label map in colours is `palette[labels]`, a look-up (2 ms where drawing class by
class takes 195 for 150 classes).
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LONGEST = 65500  # pixels a side of a JPEG, by its library


def save_palette(path: Path, labels: np.ndarray, palette: np.ndarray) -> None:
    """(H, W) uint8 labels as an indexed PNG: reads back as the labels themselves, looks like their colours."""
    picture = Image.fromarray(np.ascontiguousarray(labels.astype(np.uint8)), mode="P")
    picture.putpalette(palette.tobytes())
    picture.save(path)


def overlay(image: np.ndarray, labels: np.ndarray, palette: np.ndarray, strength: float = 0.55) -> np.ndarray:
    """(H, W, 3) uint8 picture with the labels' colours laid over it; ignored pixels (255) stay as they are."""
    mixed = (1 - strength) * image + strength * palette[labels]
    return np.where((labels == 255)[..., None], image, mixed).astype(np.uint8)


def save_overlay(path: Path, mixed: np.ndarray) -> None:
    """(H, W, 3) uint8 as JPEG; as PNG, with its ending, where a side is longer than JPEG can say."""
    if max(mixed.shape) > LONGEST:
        Image.fromarray(mixed).save(path.with_suffix(".png"))
    else:
        Image.fromarray(mixed).save(path, quality=92)


def legend(classes, colours, rows: int = 32) -> Image.Image:
    """The classes' colours with their numbers and names, down the columns, at most `rows` in each."""
    font, swatch, gap = ImageFont.load_default(15), (34, 18), 8
    names = [f"{number}  {name}" for number, name in enumerate(classes)]
    line, column = swatch[1] + gap, swatch[0] + 3 * gap + math.ceil(max(font.getlength(name) for name in names))
    columns = -(-len(names) // rows)
    rows = -(-len(names) // columns)  # columns of one length
    page = Image.new("RGB", (columns * column + gap, rows * line + gap), "white")
    draw = ImageDraw.Draw(page)
    for number, (name, colour) in enumerate(zip(names, colours, strict=True)):
        x, y = gap + number // rows * column, gap + number % rows * line
        draw.rectangle((x, y, x + swatch[0] - 1, y + swatch[1] - 1), fill=tuple(int(c) for c in colour), outline="black")
        draw.text((x + swatch[0] + gap, y + swatch[1] // 2), name, fill="black", font=font, anchor="lm")
    return page


def sheet(columns: dict[str, list[np.ndarray]], classes=(), colours=(), width: int = 240, notes=()) -> Image.Image:
    """A contact sheet: one titled column per entry, one row per picture, a legend of the classes below.

    Args:
        columns: title -> pictures (H, W, 3) uint8; all columns equally long.
        width: of a picture on the sheet, in pixels.
        notes: a line of text below every row, none if empty.
    """
    rows = [[Image.fromarray(p) for p in row] for row in zip(*columns.values(), strict=True)]
    heights = [max(round(p.height * width / p.width) for p in row) for row in rows]
    gap, title, line = 6, 22, 20
    notes = notes or [""] * len(rows)
    below = [line * bool(note) for note in notes]
    per_line = max(1, len(columns) * (width + gap) // 130)
    legend = -(-len(classes) // per_line) * line
    page = Image.new("RGB", (len(columns) * (width + gap) + gap, title + sum(heights) + sum(below) + gap * (len(rows) + 1) + legend), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for column, name in enumerate(columns):
        draw.text((gap + column * (width + gap), 4), name, fill="black", font=font)
    top = title
    for row, height, note, extra in zip(rows, heights, notes, below, strict=True):
        for column, picture in enumerate(row):
            sampling = Image.Resampling.NEAREST if picture.width < width else Image.Resampling.BOX
            page.paste(picture.resize((width, height), sampling), (gap + column * (width + gap), top))
        draw.text((gap, top + height + 1), note, fill="black", font=font)
        top += height + extra + gap
    for number, (name, colour) in enumerate(zip(classes, colours, strict=True)):
        x, y = gap + number % per_line * 130, top + gap + number // per_line * line
        draw.rectangle((x, y, x + 13, y + 13), fill=tuple(int(c) for c in colour), outline="black")
        draw.text((x + 18, y - 1), name[:16], fill="black", font=font)
    return page
