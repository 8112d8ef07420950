"""Augmentation: boxes follow the pixels, and the same seed gives the same picture."""

import numpy as np
import pytest

from rcnn.data.transforms import Augment, generator, jitter_color, scale_boxes

RNG = np.random.default_rng(0)


def marked(height, width, box):
    """A black image with a white box, and the box."""
    image = np.zeros((height, width, 3), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = 255
    return image, np.array([box], np.float32)


def bounds(image):
    """Corners of what is brighter than half."""
    ys, xs = np.nonzero(image[..., 0] > 127)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def apply(augment, image, boxes, seed=0, size=(48, 64)):
    return augment(image, boxes, min_size=size[0], max_size=size[1], rng=generator(0, 0, seed))


def test_nothing_to_do_changes_nothing():
    image, boxes = marked(48, 64, (10, 20, 30, 40))
    result, moved = apply(Augment(), image, boxes)
    np.testing.assert_array_equal(result, image)
    np.testing.assert_array_equal(moved, boxes)


@pytest.mark.parametrize(
    ("augment", "expected"),
    [
        (Augment(flip=1.0), [34, 20, 54, 40]),  # x: 64 - 30, 64 - 10
        (Augment(vertical_flip=1.0), [10, 8, 30, 28]),  # y: 48 - 40, 48 - 20
        (Augment(flip=1.0, vertical_flip=1.0), [34, 8, 54, 28]),
        (Augment(scale=(2.0, 2.0)), [20, 40, 60, 80]),
        (Augment(scale=(0.5, 0.5)), [5, 10, 15, 20]),
    ],
)
def test_boxes_follow(augment, expected):
    result, moved = apply(augment, *marked(48, 64, (10, 20, 30, 40)))
    assert moved.tolist() == [expected] and moved.dtype == np.float32
    assert bounds(result) == expected
    assert result.flags.c_contiguous


def test_each_axis_has_its_own_factor():
    # 100 x 333 with the shorter side 60 and the longer at most 150: 45 x 150, not 45.045 x 150
    image, boxes = np.zeros((100, 333, 3), np.uint8), np.array([[0, 0, 333, 100]], np.float32)
    result, moved = apply(Augment(), image, boxes, size=(60, 150))
    assert result.shape == (45, 150, 3) and moved.tolist() == [[0, 0, 150, 45]]
    assert scale_boxes(boxes, 0.5, 2.0).tolist() == [[0, 0, 666, 50]]


def test_no_boxes():
    _, moved = apply(Augment(0.5, 0.5, 0.4, (0.5, 2.0)), np.zeros((48, 64, 3), np.uint8), np.zeros((0, 4), np.float32))
    assert moved.shape == (0, 4)


def test_the_input_stays_as_it_is():
    image, boxes = marked(48, 64, (10, 20, 30, 40))
    image.flags.writeable = boxes.flags.writeable = False
    apply(Augment(1.0, 1.0, 0.9, (0.5, 2.0)), image, boxes)


def test_color_is_the_formula():
    image = RNG.integers(0, 256, (32, 40, 3), dtype=np.uint8)
    grey = image @ np.array([0.299, 0.587, 0.114])
    mean = grey[::4, ::4].mean()
    for brightness, contrast, saturation in [(1, 1, 1), (1.3, 1, 1), (1, 0.5, 1), (1, 1, 0), (0.7, 1.4, 1.2)]:
        value = brightness * (saturation * image + (1 - saturation) * grey[..., None])
        value = np.clip(contrast * value + (1 - contrast) * brightness * mean, 0, 255)
        result = jitter_color(image, brightness, contrast, saturation)
        # rounded to integers from float32 sums: at most half and a float's error off
        assert np.abs(result - value).max() <= 0.5 + 8 * 255 * np.finfo(np.float32).eps
    np.testing.assert_array_equal(jitter_color(image, 1, 1, 1), image)


def test_the_same_seed_gives_the_same_and_others_do_not():
    image = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    boxes = np.array([[10, 20, 30, 40]], np.float32)
    augment = Augment(0.5, 0.5, 0.4, (0.8, 1.2))
    results = {}
    for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0)]:
        first, second = (augment(image, boxes, min_size=48, max_size=64, rng=generator(*key)) for _ in range(2))
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])
        results[first[0].tobytes()] = key
    assert len(results) == 5


def test_one_setting_does_not_change_the_draws_of_another():
    image, boxes = marked(48, 64, (10, 20, 30, 40))
    for seed in range(20):
        _, plain = apply(Augment(flip=0.5), image, boxes, seed)
        _, colored = apply(Augment(flip=0.5, color=0.5), image, boxes, seed)
        np.testing.assert_array_equal(plain, colored)


def test_probabilities_and_range():
    image, boxes = marked(48, 64, (10, 20, 30, 40))
    augment = Augment(flip=0.25, vertical_flip=0.75, scale=(0.5, 1.5))
    flips, flops, widths = 0, 0, []
    count = 400
    for seed in range(count):
        result, ((x1, y1, _, _),) = apply(augment, image, boxes, seed)
        height, width = result.shape[:2]
        flips += x1 / width > 20 / 64
        flops += y1 / height < 15 / 48
        widths.append(width)
    # 5 standard deviations of a binomial count
    sigma = np.sqrt(count * 0.25 * 0.75)
    assert abs(flips - count * 0.25) < 5 * sigma and abs(flops - count * 0.75) < 5 * sigma
    assert min(widths) >= 32 and max(widths) <= 96 and len(set(widths)) > 40
