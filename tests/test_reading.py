"""Which PNGs OpenCV may decode: sound ones that it reads as Pillow does, and no others."""

import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

from dataset import DataError
from dataset.reading import _is_sound_png, _read_sound_png, read_image, read_label, read_size
from tests.paths import shared

PIXELS = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*extra: bytes, rows=PIXELS, cut: int | None = None, header=(8, 2, 0, 0, 0)) -> bytes:
    """PIXELS as a PNG, by hand: with extra chunks, of other rows, or with its compressed stream cut off under a checksum that is right."""
    stream = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))[:cut]
    first = chunk(b"IHDR", struct.pack(">IIBBBBB", 17, 13, *header))
    return b"\x89PNG\r\n\x1a\n" + first + b"".join(extra) + chunk(b"IDAT", stream) + chunk(b"IEND", b"")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "picture.png"


@pytest.mark.parametrize("extra", [(), (chunk(b"tEXt", b"Software\0x"), chunk(b"pHYs", bytes(9)))])
def test_a_sound_png_is_left_to_opencv(path, monkeypatch, extra):
    path.write_bytes(png(*extra))
    with Image.open(path) as picture:
        np.testing.assert_array_equal(np.array(picture), PIXELS)
    monkeypatch.setattr(Image, "open", None)
    found = read_image(path)
    np.testing.assert_array_equal(found, PIXELS)
    assert found.dtype == np.uint8 and found.flags.c_contiguous and found.flags.writeable


def test_what_pillow_writes_is_read_alike(path):
    for options in ({"compress_level": 0}, {"optimize": True}, {"dpi": (72, 72)}):
        Image.fromarray(PIXELS).save(path, **options)
        np.testing.assert_array_equal(_read_sound_png(path), PIXELS)


def test_a_street_picture_is_read_alike():
    real = shared("samples/frankfurt_000000_000576_leftImg8bit.png")
    with Image.open(real) as picture:
        np.testing.assert_array_equal(_read_sound_png(real), np.array(picture))
        assert read_size(real) == (picture.height, picture.width) == (1024, 2048)


TURNED = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # EXIF: by 90 degrees


@pytest.mark.parametrize("extra", [
    chunk(b"tRNS", bytes(6)), chunk(b"gAMA", struct.pack(">I", 22727)), chunk(b"eXIf", TURNED),
    chunk(b"acTL", struct.pack(">II", 1, 0)), chunk(b"sBIT", b"\5\5\5"), chunk(b"abCd", b"unknown"),
], ids=["transparent", "gamma", "turned", "animated", "few bits", "unknown"])  # fmt: skip
def test_what_may_turn_or_recolour_is_left_to_pillow(path, extra):
    path.write_bytes(png(extra))
    assert not _is_sound_png(path.read_bytes())
    np.testing.assert_array_equal(read_image(path), PIXELS)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "I;16"])
def test_other_kinds_are_left_to_pillow(path, mode):
    picture = Image.fromarray(PIXELS[:, :, 0].astype(np.uint16)) if mode == "I;16" else Image.fromarray(PIXELS).convert(mode)
    picture.save(path, pnginfo=PngImagePlugin.PngInfo())
    assert _read_sound_png(path) is None


def test_no_flipped_bit_and_no_truncation_reaches_opencv():
    whole = png(chunk(b"tEXt", b"Software\0x"))
    assert _is_sound_png(whole) and _is_sound_png(whole + b"behind the end")
    for at in range(len(whole)):
        assert not _is_sound_png(whole[:at]), f"cut off at {at}"
        for bit in range(8):
            assert not _is_sound_png(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1:]), f"bit {bit} of byte {at}"


@pytest.mark.parametrize("damage", [{"rows": PIXELS[:5]}, {"cut": 300}, {"header": (8, 2, 0, 0, 1)}],
                         ids=["few rows", "cut stream", "not interlaced"])  # fmt: skip
def test_a_wrong_stream_under_right_checksums_is_left_to_pillow(path, damage):
    path.write_bytes(png(**damage))
    assert _read_sound_png(path) is None


def test_missing_and_damaged_pngs_are_refused_as_ever(path):
    for content in (None, b"", png()[:200], png(cut=300)):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=f"{path}: picture (is|cannot)"):
            read_image(path)
    path.write_bytes(b"text")
    with pytest.raises(DataError, match="picture cannot be read"):
        read_size(path)


def test_a_png_that_fills_the_memory_is_left_to_pillow(path, monkeypatch):
    """Which refuses it by its header; OpenCV's own limit is 3 GB."""
    path.write_bytes(png())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PIXELS[:, :, 0].size)
    assert _read_sound_png(path) is not None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="picture.png: picture cannot be read .*exceeds limit of 200 pixels"):
        read_image(path)


# --------------------------------------------------------------------------------------------- whatever a file is called


def test_no_picture_starts_a_program(path, monkeypatch):
    """Pillow alone hands an EPS file of any name to Ghostscript, whose language can do more than draw."""
    marker, program = path.with_name("marker"), path.with_name("gs")
    program.write_text(f"#!/bin/sh\ntouch '{marker}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looks for it again
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 20\n%%EndComments\nshowpage\n%%EOF\n")
    for read, what in ((read_image, "picture"), (read_label, "label"), (read_size, "picture")):
        with pytest.raises(DataError, match=rf"picture.png: {what} cannot be read \(damaged, or none of PNG, JPEG, BMP, GIF, WEBP, TIFF\)"):
            read(path)
    assert not marker.exists()
    with Image.open(path) as picture, pytest.raises(OSError):
        picture.load()
    assert marker.exists(), "the negative control"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 6])  # upside down, on its side
def test_nothing_is_turned(kind, orientation, path):
    """By what its EXIF data say, wherever they are: labels carry none, and half a turn shows in no size."""
    ramp = np.broadcast_to(np.arange(0, 240, 8, dtype=np.uint8)[None, :, None], (20, 30, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(ramp)).save(path, kind, exif=exif)
    if kind == "TIFF":
        with Image.open(path) as picture:  # the negative control
            found = np.array(picture)
        assert found.shape != ramp.shape or np.abs(found.astype(int) - ramp).max() > 100
        for read in (read_image, read_label, read_size):
            with pytest.raises(DataError, match=rf"is a TIFF that says how to turn it \(orientation {orientation}\)"):
                read(path)
    else:
        found = read_image(path)
        assert found.shape == ramp.shape and np.abs(found.astype(int) - ramp).max() < 10 and read_size(path) == (20, 30)


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "WEBP"])
def test_labels_that_a_compression_has_changed(kind, path):
    label = Image.fromarray(np.arange(0, 250, dtype=np.uint8).reshape(10, 25))
    label.save(path, kind, **({"save_all": True, "append_images": [label]} if kind == "MPO" else {}))
    with pytest.raises(DataError, match=f"picture.png: label is a {kind}, whose compression changes class values; save labels as PNG"):
        read_label(path)
