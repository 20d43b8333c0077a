"""One numeric matrix out of a MATLAB level-5 file (.mat, `save -v6` and `-v7`), by its name and the fields of structs on the way.

The format: MathWorks, "MAT-File Format", Level 5. A file is 128 bytes of header and then elements; an element is a tag (type, number
of bytes) and its data, padded to 8 bytes. Only what lies on the way is read: other variables, cells, sparse and text fields are
stepped over by their size, and nothing in the file can choose what is run.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataset.reading import DataError

COMPRESSED, MATRIX = 15, 14  # types of elements
INT32, UINT32 = 5, 6
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", INT32: "i4", UINT32: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}  # type -> numpy's name
STRUCT, OBJECT = 2, 3  # classes of matrices
CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}  # class -> numpy's name
COMPLEX = 0x08  # flag of a matrix
LARGEST = 1 << 28  # bytes of a variable after decompression: a label of 16384x16384, not an archive that expands for ever


class _Damaged(Exception):
    """What is wrong, for the one line of `read_matrix`."""


def read_matrix(path: str | Path, *names: str) -> np.ndarray:
    """The numeric matrix of a file: the variable `names[0]`, or its field `names[1]`, and so on; in MATLAB's shape and type.

    Raises:
        DataError: one line; the file is missing, damaged, not of level 5 (version 7.3 is HDF5), or has no such real matrix.
    """
    wanted = ".".join(names)
    try:
        data = memoryview(Path(path).read_bytes())
        found = _find(data, names)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore it from the data set's archive") from None
    except (_Damaged, zlib.error, struct.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a sound MATLAB level-5 file ({error}); replace it, or save it again with -v7") from None
    if found is None:
        raise DataError(f"{path}: no matrix {wanted!r} in it; replace the file, this is another one")
    return found


def _find(data: memoryview, names: tuple[str, ...]) -> np.ndarray | None:
    order = {b"IM": "<", b"MI": ">"}.get(bytes(data[126:128]))
    if order is None or struct.unpack(f"{order}H", data[124:126])[0] != 0x0100:
        raise _Damaged("version 7.3, which is HDF5" if bytes(data[:10]) == b"MATLAB 7.3" else "its header is of no such file")
    for kind, body in _elements(data[128:], order):
        if kind == COMPRESSED:
            unpacking = zlib.decompressobj()
            content = unpacking.decompress(body, LARGEST)
            if not unpacking.eof:
                raise _Damaged(f"a compressed variable is cut off, or larger than {LARGEST >> 20} MiB")
            kind, body = next(_elements(memoryview(content), order), (None, None))
        if kind == MATRIX and (found := _matrix(body, order, names, own_name=True)) is not None:
            return found
    return None


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """(type, data) of the elements one after the other."""
    at = 0
    while at < len(data):
        if at + 8 > len(data):
            raise _Damaged("it ends within a tag")
        kind, size = struct.unpack(f"{order}II", data[at : at + 8])
        if kind >> 16:  # a small element: size and type in the first four bytes, the data in the other four
            kind, size, start, stop = kind & 0xFFFF, kind >> 16, at + 4, at + 8
            if size > 4:
                raise _Damaged(f"a small element of {size} bytes")
        else:
            start = at + 8
            stop = start + size if kind == COMPRESSED else start + -(-size // 8) * 8
        if start + size > len(data):
            raise _Damaged(f"it ends {start + size - len(data)} bytes too early")
        yield kind, data[start : start + size]
        at = stop


def _next(parts: Iterator[tuple[int, memoryview]], order: str, what: str) -> np.ndarray:
    """The next element as an array of numbers."""
    kind, data = next(parts, (None, None))
    if kind not in NUMBERS:
        raise _Damaged(f"no {what} where it belongs")
    number = np.dtype(order + NUMBERS[kind])
    if len(data) % number.itemsize:
        raise _Damaged(f"{what} of {len(data)} bytes")
    return np.frombuffer(data, number)


def _matrix(body: memoryview, order: str, names: tuple[str, ...], own_name: bool = False) -> np.ndarray | None:
    """The matrix called names[0], or what lies at names[1:] within it; None where it has no such field or is no matrix of numbers.

    A variable has its `own_name`, and is None where that is another one; a struct's fields are called by the struct.
    """
    parts = _elements(body, order)
    flags, shape = _next(parts, order, "array flags"), _next(parts, order, "dimensions")
    if len(flags) != 2 or flags.dtype.str[1:] != "u4" or not 2 <= len(shape) <= 32 or shape.dtype.str[1:] != "i4" or shape.min() < 0:
        raise _Damaged("a matrix with impossible flags or dimensions")
    name = _next(parts, order, "name").tobytes().decode("ascii")
    kind, size = int(flags[0]) & 0xFF, math.prod(shape.tolist())
    if own_name and name != names[0]:
        return None
    if kind in (STRUCT, OBJECT) and len(names) > 1:
        if kind == OBJECT:
            _next(parts, order, "class name")
        length = _next(parts, order, "length of field names")
        text = _next(parts, order, "field names").tobytes()
        if len(length) != 1 or length.dtype.kind == "f" or not 0 < length[0] <= 256 or len(text) % int(length[0]):
            raise _Damaged("a struct with impossible field names")
        step = int(length[0])
        fields = [text[at : at + step].split(b"\0")[0].decode("ascii") for at in range(0, len(text), step)]
        if size != 1:
            raise _Damaged(f"{names[0]} is an array of {size} structs, one is expected")
        for field in fields:
            kind, body = next(parts, (None, None))
            if kind != MATRIX:
                raise _Damaged(f"no matrix in the field {field!r}")
            if field == names[1]:
                return _matrix(body, order, names[1:])
        return None
    if kind not in CLASSES or len(names) > 1 or int(flags[0]) >> 8 & COMPLEX:
        return None
    values = _next(parts, order, "numbers")  # stored in the smallest type that holds them
    if len(values) != size:
        raise _Damaged(f"{len(values)} numbers for a matrix of {' x '.join(map(str, shape.tolist()))}")
    return values.astype(CLASSES[kind]).reshape(shape.tolist(), order="F")
