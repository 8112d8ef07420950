"""Matching against the oracle, by hand on the boundaries, and the draw of samples."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rcnn import boxes as box
from rcnn.kernels import matching_cpu
from rcnn.kernels.matching import match

pytestmark = pytest.mark.usefixtures("on_device")

EPS = torch.finfo(torch.float32).eps


def random_boxes(count: int, seed: int, size: int = 32) -> Tensor:
    """Integer corners below 1.5 * size, so that areas are exact and only equal ratios give an equal IoU in float32."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, size, (count, 2), generator=generator, device="cpu")
    extent = torch.randint(1, size // 2, (count, 2), generator=generator, device="cpu")
    return here(torch.cat((first, first + extent), dim=1).float())


def here(x: Tensor) -> Tensor:
    """On the device of the test; random numbers are drawn on the CPU, so that they are the same everywhere."""
    return x.to(torch.empty(0).device)


def random_truth(counts: list[int], seed: int, ignored: bool = True, padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, labels (about a third of them ignore regions) and offsets."""
    total = sum(counts) + padding
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(1, 5, (total,), generator=generator, device="cpu")
    if ignored:
        labels[torch.rand(total, generator=generator, device="cpu") < 0.3] = -1
    return random_boxes(total, seed + 1), here(labels), torch.tensor([0, *counts]).cumsum(0)


def expected_match(
    boxes: Tensor, truth: tuple[Tensor, Tensor, Tensor], high: float, low: float, low_quality: bool
) -> tuple[list[list[int]], list[list[int]]]:
    gt_boxes, gt_labels, offsets = (part.tolist() for part in truth)
    images = len(offsets) - 1
    per_image = boxes.expand(images, -1, 4).tolist() if boxes.dim() == 2 else boxes.tolist()
    results = [
        reference.match(per_image[b], gt_boxes, gt_labels, range(offsets[b], offsets[b + 1]), high, low, low_quality)
        for b in range(images)
    ]
    return [labels for labels, _ in results], [matched for _, matched in results]


def check(boxes: Tensor, truth: tuple[Tensor, Tensor, Tensor], high: float, low: float, low_quality: bool) -> None:
    labels, matched = match(
        boxes, *truth, high_threshold=high, low_threshold=low, allow_low_quality_matches=low_quality
    )
    expected = expected_match(boxes, truth, high, low, low_quality)
    assert labels.dtype == matched.dtype == torch.int64
    assert (labels.tolist(), matched.tolist()) == expected


def one(gt: list[tuple[float, ...]], labels: list[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Ground truth of a single image."""
    values = torch.tensor(labels or [1] * len(gt), dtype=torch.int64)
    return torch.tensor(gt, dtype=torch.float32).reshape(-1, 4), values, torch.tensor([0, len(gt)])


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize(("high", "low"), [(0.7, 0.3), (0.5, 0.5), (0.5, 0.1)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("counts", [[6], [3, 0, 9], [0, 0], [1, 25]])
def test_random_equals_the_oracle(counts: list[int], shared: bool, high: float, low: float, low_quality: bool) -> None:
    boxes = random_boxes(150 * len(counts), 5)
    boxes = boxes[:150] if shared else boxes.reshape(len(counts), 150, 4)
    check(boxes, random_truth(counts, 11), high, low, low_quality)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shared", [True, False])
def test_many_tiles_and_slabs_equal_the_oracle(monkeypatch: pytest.MonkeyPatch, shared: bool, seed: int) -> None:
    monkeypatch.setattr(matching_cpu, "TILE", 8)
    monkeypatch.setattr(matching_cpu, "_PAIRS", 64)
    boxes = random_boxes(3 * 101, seed)
    boxes = boxes[:101] if shared else boxes.reshape(3, 101, 4)
    check(boxes, random_truth([7, 0, 20], seed + 50, padding=3), 0.5, 0.3, True)


def test_more_than_one_tile_of_full_size() -> None:
    boxes = random_boxes(2 * matching_cpu.TILE + 1, 3)
    check(boxes, random_truth([4, 5], 8), 0.7, 0.3, True)


@pytest.mark.parametrize(
    ("boxed", "expected"),
    [
        ((0.0, 0.0, 10.0, 7.0), 1),  # IoU 70 / 100, on the high threshold
        ((0.0, 0.0, 10.0, 6.0), -1),  # 0.6
        ((0.0, 0.0, 10.0, 3.0), -1),  # 0.3, on the low threshold
        ((0.0, 0.0, 10.0, 2.0), 0),  # 0.2
        ((10.0, 0.0, 20.0, 10.0), 0),  # touches: 0
    ],
)
def test_thresholds_are_closed_below(boxed: tuple[float, ...], expected: int) -> None:
    labels, matched = match(
        torch.tensor([boxed]), *one([(0.0, 0.0, 10.0, 10.0)]), high_threshold=0.7, low_threshold=0.3
    )
    assert labels.tolist() == [[expected]]
    assert matched.tolist() == [[0 if expected == 1 else -1]]


def test_boxes_without_area_match_nothing() -> None:
    truth = one([(7.0, 7.0, 7.0, 9.0), (2.0, 2.0, 2.0, 2.0)])
    boxes = torch.tensor([[2.0, 2.0, 2.0, 2.0], [7.0, 7.0, 7.0, 9.0], [0.0, 0.0, 10.0, 10.0]])
    labels, matched = match(boxes, *truth, high_threshold=0.7, low_threshold=0.3, allow_low_quality_matches=True)
    assert (labels.tolist(), matched.tolist()) == ([[0, 0, 0]], [[-1, -1, -1]])


def test_the_lowest_row_wins_a_tie() -> None:
    truth = one([(50.0, 50.0, 60.0, 60.0), (0.0, 0.0, 10.0, 8.0), (0.0, 2.0, 10.0, 10.0), (0.0, 0.0, 10.0, 8.0)])
    labels, matched = match(torch.tensor([[0.0, 0.0, 10.0, 10.0]]), *truth, high_threshold=0.7, low_threshold=0.3)
    assert (labels.tolist(), matched.tolist()) == ([[1]], [[1]])  # rows 1, 2 and 3 all have IoU 0.8


def test_low_quality_takes_all_ties_and_keeps_their_own_best() -> None:
    # Row 0 overlaps boxes 0 and 1 by 25 / 175 each; box 2 by less. Box 1's own best is row 1 (IoU 0.5).
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [15.0, 0.0, 25.0, 10.0], [0.0, 0.0, 10.0, 1.0]])
    truth = one([(7.5, 0.0, 17.5, 10.0), (15.0, 0.0, 25.0, 5.0)])
    assert box.iou(boxes[:2], truth[0][:1]).unique().numel() == 1
    arguments = {"high_threshold": 0.7, "low_threshold": 0.3}
    labels, matched = match(boxes, *truth, **arguments, allow_low_quality_matches=True)
    assert (labels.tolist(), matched.tolist()) == ([[1, 1, 0]], [[0, 1, -1]])
    labels, matched = match(boxes, *truth, **arguments)
    assert (labels.tolist(), matched.tolist()) == ([[0, -1, 0]], [[-1, -1, -1]])


def test_low_quality_needs_an_overlap() -> None:
    boxes = random_boxes(300, 0)
    labels, _ = match(
        boxes,
        *one([(500.0, 500.0, 510.0, 510.0)]),
        high_threshold=0.7,
        low_threshold=0.3,
        allow_low_quality_matches=True,
    )
    assert not labels.any()


def test_low_quality_needs_an_iou_above_0_in_float32() -> None:
    """An area of 4e-38 is a normal number of float32, and 4e-38 / 1e38 is 0."""
    labels, matched = match(
        torch.tensor([[0.0, 0.0, 1e19, 1e19]]),
        *one([(0.0, 0.0, 2e-19, 2e-19)]),
        high_threshold=0.7,
        low_threshold=0.3,
        allow_low_quality_matches=True,
    )
    assert (labels.tolist(), matched.tolist()) == ([[0]], [[-1]])


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        ((0.0, 0.0, 10.0, 5.0), -1),  # exactly half of the box
        ((0.0, 0.0, 10.0, 4.0), 0),
        ((-90.0, -90.0, 90.0, 90.0), -1),  # a crowd far larger than the box
        ((10.0, 0.0, 20.0, 10.0), 0),
    ],
)
def test_ignore_regions(region: tuple[float, ...], expected: int) -> None:
    labels, matched = match(
        torch.tensor([[0.0, 0.0, 10.0, 10.0]]), *one([region], [-1]), high_threshold=0.7, low_threshold=0.3
    )
    assert (labels.tolist(), matched.tolist()) == ([[expected]], [[-1]])


def test_two_ignore_regions_do_not_add_up_and_positives_stay() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
    truth = one([(0.0, 0.0, 10.0, 4.0), (0.0, 6.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0), (20.0, 0.0, 30.0, 9.0)])
    truth[1].copy_(torch.tensor([-1, -1, -1, 3]))
    labels, matched = match(boxes, *truth, high_threshold=0.7, low_threshold=0.3)
    assert (labels.tolist(), matched.tolist()) == ([[0, 1]], [[-1, 3]])


def test_no_ground_truth_and_no_boxes() -> None:
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    arguments: dict[str, Any] = {"high_threshold": 0.7, "low_threshold": 0.3, "allow_low_quality_matches": True}
    labels, matched = match(random_boxes(300, 1), *none, **arguments)
    assert labels.shape == (2, 300)
    assert not labels.any()
    assert (matched == -1).all()
    labels, matched = match(torch.zeros(0, 4), *random_truth([2, 3], 1), **arguments)
    assert labels.shape == matched.shape == (2, 0)


def test_padding_rows_of_the_ground_truth_are_not_read() -> None:
    boxes, truth = random_boxes(300, 1), random_truth([3, 4], 2)
    padded = (
        torch.cat((truth[0], torch.full((5, 4), math.nan), boxes[:5])),
        torch.cat((truth[1], torch.tensor([1, -1] * 5))),
        truth[2],
    )
    arguments: dict[str, Any] = {"high_threshold": 0.5, "low_threshold": 0.3, "allow_low_quality_matches": True}
    for plain, other in zip(match(boxes, *truth, **arguments), match(boxes, *padded, **arguments), strict=True):
        assert torch.equal(plain, other)


def test_boxes_that_are_not_finite_or_empty_overlap_nothing_and_disturb_nobody() -> None:
    boxes = random_boxes(300, 1)
    for place, value in ((5, math.nan), (40, math.inf), (41, -math.inf)):
        boxes[place, place % 4] = value
    boxes[70] = torch.tensor([4.0, 4.0, 4.0, 9.0])
    boxes[71] = torch.tensor([9.0, 9.0, 1.0, 1.0])
    boxes[72] = torch.tensor([-3e38, -3e38, 3e38, 3e38])
    truth = random_truth([20], 9)
    truth[0][3] = torch.tensor([0.0, 0.0, math.inf, math.inf])
    truth[0][4] = math.nan
    truth[0][5] = torch.tensor([5.0, 5.0, 5.0, 5.0])
    usable = boxes.clone()
    usable[72] = 0
    arguments: dict[str, Any] = {"high_threshold": 0.5, "low_threshold": 0.3, "allow_low_quality_matches": True}
    labels, matched = match(boxes, *truth, **arguments)
    assert (labels.tolist(), matched.tolist()) == expected_match(usable, truth, 0.5, 0.3, True)
    assert labels[0, [5, 40, 41, 70, 71, 72]].tolist() == [0] * 6


def test_one_pixel_boxes() -> None:
    x, y = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="xy")
    boxes = torch.stack((x, y, x + 1, y + 1), dim=2).reshape(-1, 4)
    truth = boxes[::7], torch.ones(58, dtype=torch.int64), torch.tensor([0, 58])
    labels, matched = match(boxes, *truth, high_threshold=0.7, low_threshold=0.3, allow_low_quality_matches=True)
    assert labels[0].nonzero().squeeze(1).tolist() == list(range(0, 400, 7))
    assert matched[0, ::7].tolist() == list(range(58))


class _Largest(TorchDispatchMode):
    """The largest number of elements in any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_the_matrix_is_never_built() -> None:
    count, truth = 4_096, random_truth([5_000], 4, ignored=True)
    boxes = random_boxes(count, 6)
    with _Largest() as largest:
        labels, matched = match(boxes, *truth, high_threshold=0.9, low_threshold=0.3, allow_low_quality_matches=True)
    # One tile against all 5,000 rows is the least that the CPU body can take at once.
    assert largest.elements <= 5_000 * matching_cpu.TILE < count * 5_000 / 10
    assert ((labels == 1) == (matched >= 0)).all()


@pytest.mark.parametrize("count", [1, 255, 257, 700])
@pytest.mark.parametrize("own", [False, True])
def test_all_pairs_or_those_that_meet(own: bool, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = random_truth([0, 9, 40], 8, ignored=True)
    boxes = torch.stack([random_boxes(count, seed) for seed in range(3)]) if own else random_boxes(count, 9)
    results = []
    for pairs in (1 << 18, 1):
        monkeypatch.setattr(matching_cpu, "_PAIRS", pairs)
        results.append(match(boxes, *truth, high_threshold=0.5, low_threshold=0.3, allow_low_quality_matches=True))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(3, 5)}, r"boxes must have shape \(N, 4\) or \(2, N, 4\), got \(3, 5\)"),
        ({"boxes": torch.zeros(3, 7, 4)}, r"boxes must have shape \(N, 4\) or \(2, N, 4\), got \(3, 7, 4\)"),
        ({"gt_boxes": torch.zeros(5)}, r"gt_boxes must have shape \(G, 4\), got \(5,\)"),
        ({"gt_labels": torch.zeros(4)}, r"gt_labels must have shape \(5,\), got \(4,\)"),
        ({"gt_offsets": torch.zeros(1)}, r"gt_offsets must have shape \(B \+ 1,\) with B at least 1, got \(1,\)"),
        ({"low_threshold": 0.8}, "0 < low_threshold <= high_threshold, got 0.8 and 0.7"),
        ({"low_threshold": 0.0}, "0 < low_threshold <= high_threshold, got 0.0 and 0.7"),
    ],
)
def test_match_errors(change: dict[str, Any], message: str) -> None:
    gt_boxes, gt_labels, gt_offsets = random_truth([2, 3], 0)
    arguments = {"boxes": torch.zeros(3, 4), "gt_boxes": gt_boxes, "gt_labels": gt_labels, "gt_offsets": gt_offsets}
    change = {name: here(x) if isinstance(x, Tensor) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        match(**{**arguments, "high_threshold": 0.7, "low_threshold": 0.3, **change})
