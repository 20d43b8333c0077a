"""Writes MATLAB level-5 files, element by element as the format's description has them, for the tests of the reader."""

import struct
import zlib
from pathlib import Path

import numpy as np

TYPES = {"i1": 1, "u1": 2, "i2": 3, "u2": 4, "i4": 5, "u4": 6, "f4": 7, "f8": 9, "i8": 12, "u8": 13}
CLASSES = {"f8": 6, "f4": 7, "i1": 8, "u1": 9, "i2": 10, "u2": 11, "i4": 12, "u4": 13, "i8": 14, "u8": 15}


def element(kind: int, data: bytes, order: str = "<", small: bool = True) -> bytes:
    """Tag and data; up to 4 bytes are a small element, as MATLAB writes them, unless `small` is off."""
    if small and 0 < len(data) <= 4:
        return struct.pack(f"{order}I", len(data) << 16 | kind) + data.ljust(4, b"\0")
    return struct.pack(f"{order}II", kind, len(data)) + data + bytes(-len(data) % 8)


def head(kind: int, shape, name: str, order: str, flags: int = 0) -> bytes:
    numbers = np.array([kind | flags << 8, 0], f"{order}u4").tobytes()
    return element(6, numbers, order) + element(5, np.array(shape, f"{order}i4").tobytes(), order) + element(1, name.encode(), order)


def matrix(name: str, values: np.ndarray, order: str = "<", stored: str | None = None, **options) -> bytes:
    """A numeric matrix; `stored`: the smaller type that its numbers are kept in."""
    kind = values.dtype.str[1:]
    stored = stored or kind
    data = element(TYPES[stored], values.astype(order + stored).tobytes(order="F"), order, **options)
    return element(14, head(CLASSES[kind], values.shape, name, order) + data, order)


def cell(name: str, *parts: bytes, order: str = "<") -> bytes:
    return element(14, head(1, (len(parts), 1), name, order) + b"".join(parts), order)


def sparse(name: str, order: str = "<") -> bytes:
    """A sparse logical 5x4 matrix with two ones, as SBD keeps its boundaries."""
    body = b"".join(element(kind, np.array(values, order + number).tobytes(), order)
                    for kind, number, values in ((5, "i4", (1, 3)), (5, "i4", (0, 1, 1, 2, 2)), (2, "u1", (1, 1))))  # fmt: skip
    return element(14, head(5, (5, 4), name, order, flags=2) + body, order)


def structure(name: str, fields: dict[str, bytes], order: str = "<", shape=(1, 1)) -> bytes:
    """A struct of fields that are matrices without a name."""
    length = max(map(len, fields)) + 1
    names = b"".join(field.encode().ljust(length, b"\0") for field in fields)
    body = element(5, struct.pack(f"{order}i", length), order) + element(1, names, order) + b"".join(fields.values())
    return element(14, head(2, shape, name, order) + body, order)


def packed(variable: bytes, order: str = "<") -> bytes:
    """A variable as -v7 writes it; compressed elements are not padded."""
    data = zlib.compress(variable)
    return struct.pack(f"{order}II", 15, len(data)) + data


def write(path: Path, *variables: bytes, order: str = "<", version: int = 0x0100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = b"MATLAB 5.0 MAT-file, by hand".ljust(116) + bytes(8) + struct.pack(f"{order}H", version) + {"<": b"IM", ">": b"MI"}[order]
    path.write_bytes(header + b"".join(variables))
    return path


def sbd(path: Path, labels: np.ndarray) -> Path:
    """A label of SBD: struct GTcls with cells of sparse boundaries before the field Segmentation."""
    fields = {
        "Boundaries": cell("", *[sparse("")] * 20),
        "Segmentation": matrix("", labels),
        "CategoriesPresent": matrix("", np.array([[15]], np.uint8)),
    }
    return write(path, packed(structure("GTcls", fields)))
