"""Box geometry against Python floats and by hand."""

import math

import pytest
import reference
import torch

from rcnn import boxes as box

EPS = torch.finfo(torch.float32).eps


def random_boxes(count: int, seed: int, size: int = 32) -> torch.Tensor:
    """Integer corners, so that areas and IoU are exact ratios in float32 and in Python alike."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, size, (count, 2), generator=generator)
    extent = torch.randint(1, size, (count, 2), generator=generator)
    return torch.cat((first, first + extent), dim=1).float()


def test_area_has_no_plus_one() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 2.0, 4.0, 8.0], [3.0, 3.0, 3.0, 9.0], [4.0, 0.0, 0.0, 2.0]])
    assert box.area(boxes).tolist() == [1.0, 18.0, 0.0, -8.0]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ((0.0, 0.0, 4.0, 4.0), 1.0),
        ((2.0, 0.0, 6.0, 4.0), 8 / 24),  # half shared
        ((0.0, 0.0, 2.0, 2.0), 4 / 16),  # inside
        ((4.0, 0.0, 8.0, 4.0), 0.0),  # a shared edge has no area
        ((5.0, 5.0, 9.0, 9.0), 0.0),  # apart on both axes: the product of two negative extents is not an overlap
        ((2.0, 2.0, 2.0, 2.0), 0.0),  # a point inside
        ((3.0, 3.0, 1.0, 1.0), 0.0),  # reversed
    ],
)
def test_iou_by_hand(other: tuple[float, ...], expected: float) -> None:
    pair = box.iou(torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([other]))
    assert pair.tolist() == [torch.tensor(expected).item()]


def test_iou_of_two_empty_boxes_is_zero() -> None:
    empty = torch.zeros(1, 4)
    assert box.iou(empty, empty).tolist() == [0.0]


def test_iou_of_all_pairs_equals_the_oracle() -> None:
    first, second = random_boxes(40, 0), random_boxes(30, 1)
    result = box.iou(first[:, None], second[None])
    expected = [[reference.box_iou(a, b) for b in second.tolist()] for a in first.tolist()]
    assert torch.equal(result, torch.tensor(expected))


def test_clip_uses_the_size_of_each_image() -> None:
    boxes = torch.tensor([[[-5.0, -1.0, 50.0, 60.0], [1.0, 2.0, 3.0, 4.0]]]).expand(2, 2, 4)
    clipped = box.clip(boxes, torch.tensor([[20.0, 30.0], [100.0, 10.0]]))
    assert clipped.tolist() == [
        [[0.0, 0.0, 30.0, 20.0], [1.0, 2.0, 3.0, 4.0]],
        [[0.0, 0.0, 10.0, 60.0], [1.0, 2.0, 3.0, 4.0]],
    ]


def test_clip_of_one_box_per_image() -> None:
    clipped = box.clip(torch.tensor([[-1.0, 0.0, 9.0, 9.0]] * 2), torch.tensor([[4.0, 5.0], [6.0, 7.0]]))
    assert clipped.tolist() == [[0.0, 0.0, 5.0, 4.0], [0.0, 0.0, 7.0, 6.0]]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_encode_and_decode_equal_the_oracle(weights: tuple[float, ...]) -> None:
    boxes, targets = random_boxes(200, 2), random_boxes(200, 3)
    deltas = box.encode(boxes, targets, weights)
    expected = [reference.encode(a, b, weights) for a, b in zip(boxes.tolist(), targets.tolist(), strict=True)]
    # Five roundings (two centres are exact here): halve, subtract, weigh, divide, and the logarithm's own last bit.
    torch.testing.assert_close(deltas, torch.tensor(expected), rtol=5 * EPS, atol=5 * EPS)
    moved = box.decode(deltas, boxes, weights)
    # The deltas carry 5 eps, times extents of up to 64 pixels; six more roundings of coordinates up to 64.
    torch.testing.assert_close(moved, targets, rtol=0, atol=11 * EPS * 64)
    expected = [reference.decode(d, b, weights) for d, b in zip(deltas.tolist(), boxes.tolist(), strict=True)]
    # Weigh, exponentiate (its argument's rounding counts again), multiply, add: values up to 128 pixels.
    torch.testing.assert_close(moved, torch.tensor(expected), rtol=0, atol=6 * EPS * 128)


def test_decode_by_hand() -> None:
    boxes = torch.tensor([[10.0, 20.0, 14.0, 28.0]])
    assert box.decode(torch.zeros(1, 4), boxes).tolist() == boxes.tolist()
    assert box.decode(torch.tensor([[0.5, -0.25, 0.0, 0.0]]), boxes).tolist() == [[12.0, 18.0, 16.0, 26.0]]


def test_decode_bounds_the_growth() -> None:
    wide = box.decode(torch.tensor([[0.0, 0.0, 100.0, math.inf]]), torch.tensor([[0.0, 0.0, 16.0, 16.0]]))
    extent = wide[0, 2:] - wide[0, :2]
    # exp(log(62.5)) is off by the bound's own rounding, log(62.5) = 4.1 times eps, and the function's.
    torch.testing.assert_close(extent, torch.full((2,), 1000.0), rtol=8 * EPS, atol=0)


def test_no_boxes() -> None:
    none = torch.zeros(0, 4)
    assert box.area(none).shape == (0,)
    assert box.iou(none[:, None], torch.zeros(3, 4)).shape == (0, 3)
    assert box.encode(none, none).shape == box.decode(none, none).shape == (0, 4)
