"""One draw for image and label; region first equals whole picture first."""

import cv2
import numpy as np
import pytest
from PIL import Image

from dataset.layout import FilePair
from dataset.reading import IGNORE, LabelMap
from dataset.transforms import PAD_COLOUR, SCALES, Augment, Draw, apply, draw, scaled_length
from scripts import plain


def random_pair(rng, height, width):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), rng.integers(0, 256, (height, width), dtype=np.uint8)


def whole_first(drawn: Draw, image, label):
    """The plain way: resize everything, pad bottom and right, crop, flip."""
    image = cv2.resize(image, None, fx=drawn.scale, fy=drawn.scale, interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, None, fx=drawn.scale, fy=drawn.scale, interpolation=cv2.INTER_NEAREST)
    below, beside = (max(crop - length, 0) for crop, length in zip(drawn.crop, label.shape, strict=True))
    image = cv2.copyMakeBorder(image, 0, below, 0, beside, cv2.BORDER_CONSTANT, value=PAD_COLOUR)
    label = cv2.copyMakeBorder(label, 0, below, 0, beside, cv2.BORDER_CONSTANT, value=IGNORE)
    box = np.s_[drawn.top: drawn.top + drawn.crop[0], drawn.left: drawn.left + drawn.crop[1]]
    image, label = image[box], label[box]
    return (image[:, ::-1], label[:, ::-1]) if drawn.flip else (image, label)


def assert_equal_to_whole(drawn, image, label):
    expected_image, expected_label = whole_first(drawn, image, label)
    found_image, found_label = apply(drawn, image, label)
    assert found_image.shape == (*drawn.crop, 3) and found_label.shape == drawn.crop
    assert found_image.flags.c_contiguous and found_label.flags.c_contiguous
    np.testing.assert_array_equal(found_label, expected_label, err_msg=str(drawn))
    assert np.abs(found_image.astype(int) - expected_image).max() <= 1, drawn


def test_region_first_is_whole_first_for_random_pictures():
    rng = np.random.default_rng(0)
    for _ in range(600):  # noise: one pixel of shift or a wrong phase shows as tens of grey levels
        height, width = (int(n) for n in rng.integers(8, 260, 2))  # below 6 pixels OpenCV copies where the size stays the same
        augment = Augment(tuple(int(n) for n in rng.integers(1, 180, 2)))
        assert_equal_to_whole(draw(rng, height, width, augment), *random_pair(rng, height, width))


@pytest.mark.parametrize("scale", SCALES)
def test_region_first_is_whole_first_at_every_corner(scale):
    rng = np.random.default_rng(1)
    for height, width in ((360, 480), (333, 500), (37, 61)):
        image, label = random_pair(rng, height, width)
        for crop in ((64, 48), (200, 200)):
            last_top, last_left = (max(scaled_length(n, scale) - c, 0) for n, c in zip((height, width), crop, strict=True))
            for top in {0, last_top}:
                for left in {0, last_left}:
                    assert_equal_to_whole(Draw(scale, top, left, crop, flip=False), image, label)


def test_draw_covers_every_scale_offset_and_flip():
    rng = np.random.default_rng(2)
    draws = [draw(rng, 12, 10, Augment((10, 10), scales=(0.5, 1.0))) for _ in range(400)]
    assert {d.scale for d in draws} == {0.5, 1.0} and {d.flip for d in draws} == {False, True}
    assert {d.top for d in draws if d.scale == 1} == {0, 1, 2} and {d.left for d in draws} == {0}
    assert 120 < sum(d.flip for d in draws) < 280
    assert not any(draw(rng, 12, 10, Augment((10, 10), flip=False)).flip for _ in range(50))


def test_default_scales_are_those_of_the_cirkd_line():
    assert SCALES == (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0)


def test_padding_is_below_and_right_and_ignored_and_moves_with_the_flip():
    image, label = np.full((4, 6, 3), 9, np.uint8), np.full((4, 6), 3, np.uint8)
    found_image, found_label = apply(Draw(0.5, 0, 0, (5, 5), flip=False), image, label)
    expected = np.full((5, 5), IGNORE)
    expected[:2, :3] = 3
    np.testing.assert_array_equal(found_label, expected)
    assert (found_image[expected == 3] == 9).all() and (found_image[expected == IGNORE] == PAD_COLOUR).all()
    flipped_image, flipped_label = apply(Draw(0.5, 0, 0, (5, 5), flip=True), image, label)
    np.testing.assert_array_equal(flipped_label, expected[:, ::-1])
    np.testing.assert_array_equal(flipped_image, found_image[:, ::-1])


def test_image_and_label_stay_together():
    # The label is drawn into the image: wherever four equal label pixels meet, the resized image must show their colour.
    label = cv2.resize(np.random.default_rng(3).integers(0, 8, (15, 20), dtype=np.uint8), (320, 240), interpolation=cv2.INTER_NEAREST)
    image = np.repeat(label[:, :, None] * 30, 3, axis=2)
    rng = np.random.default_rng(4)
    for _ in range(100):
        found_image, found_label = apply(draw(rng, 240, 320, Augment((100, 120))), image, label)
        inner = (cv2.erode(found_label, np.ones((5, 5))) == cv2.dilate(found_label, np.ones((5, 5)))) & (found_label != IGNORE)
        inner[:2], inner[-2:], inner[:, :2], inner[:, -2:] = False, False, False, False  # their neighbours are outside the crop
        assert inner.any() and (found_image[inner, 0] == found_label[inner] * 30).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (2, 3)])
def test_tiny_pictures_fill_a_crop(size):
    image, label = np.full((*size, 3), 50, np.uint8), np.full(size, 2, np.uint8)
    for scale in SCALES:
        found_image, found_label = apply(Draw(scale, 0, 0, (16, 16), flip=False), image, label)
        height, width = (scaled_length(n, scale) for n in size)
        assert (found_label[:height, :width] == 2).all() and (found_image[:height, :width] == 50).all()
        assert (found_label == IGNORE).sum() == 256 - height * width


@pytest.mark.parametrize("arguments", [{"crop": (0, 8)}, {"crop": (8, 8), "scales": (0.333,)}, {"crop": (8, 8), "scales": (-1.0,)}])
def test_impossible_augmentation_is_refused(arguments):
    with pytest.raises(ValueError, match="got"):
        Augment(**arguments)


def test_the_plain_form_gives_the_same_sample(tmp_path):
    """Labels bit for bit, images within one grey level, in five times the bytes."""
    rng = np.random.default_rng(5)
    label_map = LabelMap({0: IGNORE, 3: 0, 7: 1, 8: 2})
    item = FilePair("a", str(tmp_path / "a.png"), str(tmp_path / "l.png"), label_map)
    Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(item.image)
    Image.fromarray(rng.choice(np.array([0, 3, 7, 8], np.uint8), (50, 70))).save(item.label)
    for _ in range(40):
        drawn = draw(rng, 50, 70, Augment((45, 52)))
        image, target = apply(drawn, *item.read())
        plain_image, plain_target = plain.training_sample(item, drawn)
        np.testing.assert_array_equal(plain_target, target)
        assert np.abs(plain_image.transpose(1, 2, 0) + np.float32(PAD_COLOUR) - image).max() <= 1.001
        assert plain_image.nbytes + plain_target.nbytes == 5 * (image.nbytes + target.nbytes)
