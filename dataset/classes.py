"""classes.txt of a folder of one's own: one class per line, its name and then, if it has one, its colour.

    # name, then "red green blue" or "#rrggbb"
    road 128 64 128
    traffic light #faaa1e
    sky
    ignore 0 0 0

The order of the lines is the order of the train ids; a line with a colour does not begin with a number. A class without a colour gets the
one that Pascal VOC gives its id. A line that is called `ignore` (or `Ignore`) is no class: its colour marks pixels without a label in RGB
labels (white does, unless it is a class's colour; value 255 of index labels is refused then).
"""

import re
from pathlib import Path
from typing import NamedTuple

from dataset.reading import IGNORE, DataError

Colour = tuple[int, int, int]
FORM = 'a line is a name and then a colour or none, as in "road 128 64 128", "road #804080" or "road"'
WHITE = (255, 255, 255)
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


class ClassList(NamedTuple):
    """Names and RGB colours in the order of train ids, and the colours of pixels without a label."""

    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    ignored: tuple[Colour, ...]


def voc_colour(value: int) -> Colour:
    """The colour of a label value in Pascal VOC's map: three bits of the value per bit of the colours, highest first."""
    return tuple(sum((value >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3))


def read_classes(path: str | Path) -> ClassList:
    """Read a class list.

    Raises:
        DataError: one line with file and line number: no such file, no text, a line of another form, a name or a colour twice, a colour
            outside 0-255, fewer than 2 or more than 255 classes.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: class list is missing; write one class per line: {FORM}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: class list cannot be read ({error}); it is a text file, one class per line: {FORM}") from None
    names: dict[str, int] = {}  # name -> its line
    colours: dict[Colour, int] = {}
    classes: list[Colour] = []
    ignored: list[Colour] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{path}:{number}"
        name, colour = _parse(line, where)
        if name.lower() == "ignore":
            if colour is None:
                raise DataError(f"{where}: `ignore` has no colour; give the one that marks pixels without a label in RGB labels")
            ignored.append(colour)
        else:
            if name in names:
                raise DataError(f"{where}: class {name!r} is already in line {names[name]}; every class needs a name of its own")
            if len(classes) == IGNORE:
                raise DataError(f"{where}: more than {IGNORE} classes, label value {IGNORE} means no label; merge some")
            names[name] = number
            colour = colour or voc_colour(len(classes))
            classes.append(colour)
        if colour in colours:
            raise DataError(f"{where}: colour {_shown(colour)} of {name!r} is already that of line {colours[colour]}; give it another one")
        colours[colour] = number
    if len(classes) < 2:
        raise DataError(f"{path}: {len(classes)} classes found, at least two are needed (the background is one); add them, {FORM}")
    if not ignored and WHITE not in colours:
        ignored.append(WHITE)
    return ClassList(tuple(names), tuple(classes), tuple(ignored))


def _parse(line: str, where: str) -> tuple[str, Colour | None]:
    """(name, colour or None) of a line."""
    words = line.split()
    numbers = next((n for n, word in enumerate(reversed(words)) if not _NUMBER.fullmatch(word)), len(words))
    colour = None
    if words[-1].startswith("#"):
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", words[-1]):
            raise DataError(f"{where}: {words[-1]!r} is no colour, it has six hexadecimal digits; correct it: {FORM}")
        *words, code = words
        colour = tuple(bytes.fromhex(code[1:]))
    elif numbers >= 3:
        *words, red, green, blue = words
        if not all(value.isdecimal() and int(value) <= 255 for value in (red, green, blue)):
            raise DataError(f"{where}: {red} {green} {blue} is no colour, its three values are 0-255; correct it: {FORM}")
        colour = int(red), int(green), int(blue)
    elif numbers == 2:  # one number may belong to the name ("lane 2"), two are a colour that lacks one
        raise DataError(f"{where}: {' '.join(words[-2:])} is no colour, it has three values; correct it: {FORM}")
    name = " ".join(words)
    if not name or re.search(r"[#,;|]", name):
        raise DataError(f"{where}: {line.strip()[:80]!r} is not understood; {FORM}, separated by spaces, a comment is a line of its own")
    if colour is not None and _NUMBER.fullmatch(words[0]):
        raise DataError(f"{where}: {words[0]} before the name is not understood, train ids are the order of the lines; drop it: {FORM}")
    return name, colour


def _shown(colour: Colour) -> str:
    return " ".join(map(str, colour))
