"""The reader of MATLAB files: every numeric type, both byte orders, structs, what it steps over, and what it refuses."""

import struct
import tracemalloc
import zlib
from itertools import count

import numpy as np
import pytest

from dataset import DataError
from dataset.matfile import read_matrix
from tests.matlab import CLASSES, cell, element, head, matrix, packed, sbd, sparse, structure, write

LABEL = np.random.default_rng(0).integers(0, 183, (37, 53)).astype(np.uint8)


def refusal(path, *names):
    with pytest.raises(DataError) as caught:
        read_matrix(path, *names)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and ";" in message
    return message


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("number", CLASSES)
def test_every_type_in_both_byte_orders(tmp_path, number, order):
    """Column by column, in the shape and type of MATLAB; plain, compressed, stored in fewer bytes, and small elements."""
    values = LABEL.astype(number) - (100 if number[0] in "if" and number != "i1" else 0) if number != "i1" else (LABEL % 100).astype("i1")
    variants = {"plain": matrix("S", values, order), "compressed": packed(matrix("S", values, order), order)}
    if number in ("f8", "u4"):
        values = LABEL.astype(number)
        variants = {"stored as bytes": matrix("S", values, order, stored="u1")} | {"plain": matrix("S", values, order)}
    for name, variable in variants.items():
        found = read_matrix(write(tmp_path / f"{name}.mat", variable, order=order), "S")
        assert found.dtype == np.dtype(number) and found.dtype.isnative, name
        np.testing.assert_array_equal(found, values, err_msg=name)


def test_small_elements_are_read_like_long_ones(tmp_path):
    values = np.array([[1, 2], [3, 4]], np.uint8)  # 4 bytes, and a name of 1
    for small in (True, False):
        np.testing.assert_array_equal(read_matrix(write(tmp_path / "a.mat", matrix("S", values, small=small)), "S"), values)


def test_other_variables_and_fields_are_stepped_over(tmp_path):
    other = matrix("captions", np.ones((3, 5)))
    text = element(14, head(4, (1, 3), "title", "<") + element(4, b"a\0b\0c\0"))
    nested = structure("info", {"S": matrix("", np.zeros((2, 2), np.uint8)), "more": structure("", {"x": matrix("", LABEL)})})
    for pack in (packed, bytes):
        path = write(tmp_path / "a.mat", *map(pack, (other, text, cell("names", text, other), sparse("mask"), nested, matrix("S", LABEL))))
        np.testing.assert_array_equal(read_matrix(path, "S"), LABEL)
        np.testing.assert_array_equal(read_matrix(path, "info", "more", "x"), LABEL)
        assert read_matrix(path, "info", "S").shape == (2, 2)
    np.testing.assert_array_equal(read_matrix(sbd(tmp_path / "b.mat", LABEL), "GTcls", "Segmentation"), LABEL)
    assert read_matrix(write(tmp_path / "c.mat", matrix("S", np.zeros((0, 4)))), "S").shape == (0, 4)


def test_what_is_not_there_or_no_matrix_is_refused(tmp_path):
    assert "archive" in refusal(tmp_path / "gone.mat", "S")
    path = write(tmp_path / "a.mat", packed(structure("GTcls", {"Boundaries": cell("", sparse(""))})), sparse("mask"), matrix("S", LABEL),
                 element(14, head(6, (1, 1), "z", "<", flags=8) + element(9, struct.pack("<d", 1)) * 2))  # fmt: skip
    for names in (("T",), ("GTcls",), ("GTcls", "Segmentation"), ("GTcls", "Boundaries"), ("mask",), ("S", "x"), ("z",)):
        assert f"no matrix {'.'.join(names)!r}" in refusal(path, *names)
    assert "no matrix 'S'" in refusal(write(tmp_path / "empty.mat", packed(b"")), "S")
    many = element(14, head(9, (1,) * 70, "S", "<") + element(2, b"\1"))
    assert "impossible flags or dimensions" in refusal(write(tmp_path / "many.mat", many), "S")
    array = structure("GTcls", {"Segmentation": matrix("", LABEL)}, shape=(2, 1))
    assert "array of 2 structs" in refusal(write(tmp_path / "b.mat", array), "GTcls", "Segmentation")
    (tmp_path / "v73.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + struct.pack("<H", 0x0200) + b"IM" + b"\x89HDF\r\n\x1a\n")
    assert "HDF5" in refusal(tmp_path / "v73.mat", "S")
    for content in (b"", b"MATLAB 5.0", bytes(200), np.random.default_rng(0).bytes(500)):
        (tmp_path / "c.mat").write_bytes(content)
        assert "header" in refusal(tmp_path / "c.mat", "S")


def test_damaged_files_are_refused_or_keep_their_shape(tmp_path):
    """Every cut of an -v7 file is refused, so is every flipped bit in compressed data; without a checksum (-v6) the shape is kept."""
    number = count()

    def read(content):
        path = tmp_path / f"{next(number)}.mat"  # a new file each time: some file systems flush one that is cut and written again
        path.write_bytes(content)
        try:
            return read_matrix(path, "GTcls", "Segmentation")
        except DataError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            return None

    def flipped(content, last):
        at = int(rng.integers(136, last))
        return content[:at] + bytes([content[at] ^ 1 << int(rng.integers(8))]) + content[at + 1 :]

    rng = np.random.default_rng(1)
    whole = sbd(tmp_path / "a.mat", LABEL).read_bytes()
    assert read(whole) is not None
    for length in [*range(140), *rng.integers(140, len(whole), 60)]:
        assert read(whole[:length]) is None, length
    for _ in range(200):
        assert read(flipped(whole, len(whole))) is None
    fields = {"a": cell("", sparse("")), "Segmentation": matrix("", LABEL)}
    plain = write(tmp_path / "b.mat", structure("GTcls", fields)).read_bytes()
    found = [read(flipped(plain, 136 + 400)) for _ in range(600)]
    assert all(labels is None or labels.size == LABEL.size and labels.ndim >= 2 for labels in found)
    assert 100 < sum(labels is None for labels in found) < 600


def test_a_file_that_expands_for_ever_is_refused_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.matfile.LARGEST", 1 << 20)
    compressor = zlib.compressobj()
    data = b"".join([compressor.compress(bytes(1 << 20)) for _ in range(64)]) + compressor.flush()
    path = write(tmp_path / "bomb.mat", struct.pack("<II", 15, len(data)) + data)
    tracemalloc.start()
    assert "larger than 1 MiB" in refusal(path, "S")
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_scipy_reads_and_writes_the_same(tmp_path):
    io = pytest.importorskip("scipy.io")
    boundaries = np.empty((2, 1), object)
    for number in range(2):
        boundaries[number, 0] = pytest.importorskip("scipy.sparse").csc_matrix(LABEL > 90 * number)
    content = {"S": LABEL.astype(np.uint16), "names": np.array([["a", "bc"]], object), "title": "text", "z": np.ones((2, 2)) * 1j,
               "GTcls": {"Boundaries": boundaries, "Segmentation": LABEL, "CategoriesPresent": np.array([[1, 2]], np.uint8)}}  # fmt: skip
    for compressed in (False, True):
        io.savemat(tmp_path / "scipy.mat", content, do_compression=compressed)
        found = read_matrix(tmp_path / "scipy.mat", "S")
        np.testing.assert_array_equal(found, content["S"])
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(read_matrix(tmp_path / "scipy.mat", "GTcls", "Segmentation"), LABEL)
    theirs = io.loadmat(sbd(tmp_path / "ours.mat", LABEL))
    np.testing.assert_array_equal(theirs["GTcls"]["Segmentation"][0, 0], LABEL)
    assert theirs["GTcls"]["Boundaries"][0, 0].shape == (20, 1), "the hand-made file is what others call one"
