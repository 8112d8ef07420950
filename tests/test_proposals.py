"""Proposals against the oracle: selection, ties, decoding, filters, merging."""

import math
from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from rcnn import boxes as box
from rcnn.kernels.anchors import anchors, cell_anchors
from rcnn.kernels.proposals import proposals
from rcnn.structures import Proposals

SHAPES, STRIDES = [(6, 8), (3, 4), (2, 2)], [8, 16, 32]
LEVELS = [144, 36, 12]
SIZES = torch.tensor([[48.0, 64.0], [40.0, 50.0]])


def grid() -> Tensor:
    cells = torch.stack([cell_anchors([size], [0.5, 1.0, 2.0]) for size in (16, 32, 48)])
    return anchors(cells, SHAPES, STRIDES)


def outputs(images: int = 2, seed: int = 0, kinds: int = 0) -> tuple[Tensor, Tensor]:
    """Objectness, of ``kinds`` values if given, and deltas that move by whole eighths, so that boxes are exact."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(LEVELS)
    objectness = torch.randn(images, count, generator=generator)
    if kinds:
        objectness = torch.randint(-kinds, kinds, (images, count), generator=generator) / kinds
    deltas = torch.randint(-4, 5, (images, count, 4), generator=generator) / 8
    deltas[..., 2:] = 0
    return objectness, deltas


def expected(objectness: Tensor, deltas: Tensor, *options: float) -> list[list[Any]]:
    boxes = grid().tolist()
    images = zip(objectness.tolist(), deltas.tolist(), SIZES.tolist(), strict=True)
    return [reference.proposals(score, delta, boxes, size, LEVELS, *options) for score, delta, size in images]


def check(result: Proposals, wanted: list[list[Any]], capacity: int) -> None:
    assert result.boxes.shape == (len(wanted), capacity, 4)
    assert result.scores.shape == (len(wanted), capacity)
    assert result.count.tolist() == [len(rows) for rows in wanted]
    for b, rows in enumerate(wanted):
        assert result.boxes[b, : len(rows)].tolist() == [list(boxed) for boxed, _ in rows]
        assert result.scores[b, : len(rows)].tolist() == [score for _, score in rows]
        assert not result.boxes[b, len(rows) :].any()
        assert not result.scores[b, len(rows) :].any()


def run(
    objectness: Tensor, deltas: Tensor, pre: int = 50, post: int = 40, iou: float = 0.7, least: float = 1e-3
) -> Proposals:
    return proposals(
        objectness,
        deltas,
        grid(),
        SIZES[: len(objectness)],
        LEVELS,
        pre_nms_top_n=pre,
        post_nms_top_n=post,
        iou_threshold=iou,
        min_size=least,
    )


@pytest.mark.parametrize("kinds", [0, 3])
@pytest.mark.parametrize(("pre", "post"), [(50, 40), (500, 500), (7, 4), (1, 1), (30, 1000)])
@pytest.mark.parametrize(("iou", "least"), [(0.7, 1e-3), (0.3, 6.0)])
def test_equals_the_oracle(kinds: int, pre: int, post: int, iou: float, least: float) -> None:
    objectness, deltas = outputs(seed=pre, kinds=kinds)
    check(run(objectness, deltas, pre, post, iou, least), expected(objectness, deltas, pre, post, iou, least), post)


def test_all_equal_scores_keep_the_order_of_the_anchors() -> None:
    objectness, deltas = outputs()
    objectness.fill_(0.25)
    check(run(objectness, deltas, 20, 30), expected(objectness, deltas, 20, 30, 0.7, 1e-3), 30)


def test_minus_zero_ties_with_zero() -> None:
    objectness, deltas = outputs()
    objectness.fill_(0.0)
    objectness[:, ::2] = -0.0
    check(run(objectness, deltas, 20, 30), expected(objectness, deltas, 20, 30, 0.7, 1e-3), 30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    objectness, deltas = (part.to(dtype) for part in outputs())
    result = run(objectness, deltas)
    check(result, expected(objectness.float(), deltas.float(), 50, 40, 0.7, 1e-3), 40)
    assert result.boxes.dtype == result.scores.dtype == torch.float32


def test_values_that_are_not_finite_are_dropped() -> None:
    objectness, deltas = outputs()
    objectness[0, :9] = torch.tensor([math.nan, math.inf, -math.inf] * 3)
    objectness[1, 150:160] = 1e30
    for place, value in enumerate((math.nan, math.inf, -math.inf, math.nan)):
        deltas[0, 20 + place, place] = value
        deltas[1, 150 + place, place] = value
    deltas[1, 154:158, 0] = torch.tensor([math.inf, -math.inf, math.nan, 1e38])
    check(run(objectness, deltas, 1000, 100), expected(objectness, deltas, 1000, 100, 0.7, 1e-3), 100)


def test_nothing_finite() -> None:
    objectness, deltas = outputs()
    result = run(objectness.fill_(math.nan), deltas)
    assert result.count.tolist() == [0, 0]
    assert not result.boxes.any()
    assert not result.scores.any()


def test_decodes_and_clips_to_the_size_of_its_own_image() -> None:
    objectness, _ = outputs(seed=3)
    deltas = torch.randn(2, sum(LEVELS), 4, generator=torch.Generator().manual_seed(4)) * 0.5
    result = run(objectness, deltas, 50, 100)
    everything = box.clip(box.decode(deltas, grid()), SIZES)
    for b, count in enumerate(result.count.tolist()):
        score, found = result.scores[b, :count], result.boxes[b, :count]
        assert (score[1:] <= score[:-1]).all()
        place = (objectness[b] == score[:, None]).to(torch.int64).argmax(dim=1)
        # exp may differ in its last bit between vector and scalar code; then a product and a sum, up to 64 pixels.
        torch.testing.assert_close(found, everything[b, place], rtol=0, atol=3 * 2**-23 * 64)
        assert (found[:, 2] <= SIZES[b, 1]).all()
        assert (found[:, 3] <= SIZES[b, 0]).all()


def test_shortest_side_is_inclusive() -> None:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 9.0], [10.0, 0.0, 13.5, 9.0], [20.0, 0.0, 29.0, 4.0], [30.0, 0.0, 39.0, 3.0]])
    result = proposals(
        torch.zeros(1, 4), torch.zeros(1, 4, 4), boxes, SIZES[:1], [4], pre_nms_top_n=4, post_nms_top_n=4, min_size=4.0
    )
    assert result.boxes[0, : int(result.count)].tolist() == boxes[[0, 2]].tolist()


def test_levels_do_not_suppress_each_other() -> None:
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 8.0]])
    objectness = torch.tensor([[1.0, 2.0, 3.0]])
    arguments: dict[str, Any] = {"pre_nms_top_n": 3, "post_nms_top_n": 3}
    result = proposals(objectness, torch.zeros(1, 3, 4), boxes, SIZES[:1], [2, 1], **arguments)
    assert result.scores.tolist() == [[3.0, 2.0, 0.0]]
    result = proposals(objectness, torch.zeros(1, 3, 4), boxes, SIZES[:1], [3], **arguments)
    assert result.scores.tolist() == [[3.0, 0.0, 0.0]]
    result = proposals(objectness, torch.zeros(1, 3, 4), boxes, SIZES[:1], [0, 1, 0, 2], **arguments)
    assert result.scores.tolist() == [[3.0, 1.0, 0.0]]


def test_an_image_alone_equals_the_image_in_a_batch() -> None:
    objectness, deltas = outputs(seed=5)
    together = run(objectness, deltas)
    alone = run(objectness[:1], deltas[:1])
    assert all(torch.equal(a[:1], b) for a, b in zip(vars(together).values(), vars(alone).values(), strict=True))


def test_no_anchors_or_no_images() -> None:
    arguments: dict[str, Any] = {"pre_nms_top_n": 3, "post_nms_top_n": 5}
    result = proposals(torch.zeros(2, 0), torch.zeros(2, 0, 4), torch.zeros(0, 4), SIZES, [0], **arguments)
    assert result.boxes.shape == (2, 5, 4)
    assert result.count.tolist() == [0, 0]
    result = proposals(torch.zeros(0, 3), torch.zeros(0, 3, 4), torch.zeros(3, 4), SIZES[:0], [3], **arguments)
    assert result.boxes.shape == (0, 5, 4)


def test_no_gradient() -> None:
    objectness, deltas = (part.requires_grad_() for part in outputs())
    assert not any(value.requires_grad for value in vars(run(objectness, deltas)).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectness": torch.zeros(2, 3, 1)}, r"objectness must have shape \(B, N\), got \(2, 3, 1\)"),
        ({"deltas": torch.zeros(2, 192, 5)}, r"deltas must have shape \(2, 192, 4\), got \(2, 192, 5\)"),
        ({"anchors": torch.zeros(191, 4)}, r"anchors must have shape \(192, 4\), got \(191, 4\)"),
        ({"image_sizes": torch.zeros(3, 2)}, r"image_sizes must have shape \(2, 2\), got \(3, 2\)"),
        ({"level_sizes": [100, 91]}, r"level_sizes must add up to 192 anchors, got \(100, 91\)"),
        ({"pre_nms_top_n": 0}, "pre_nms_top_n must be at least 1, got 0"),
        ({"post_nms_top_n": 0}, "post_nms_top_n must be at least 1, got 0"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    objectness, deltas = outputs()
    arguments = {"objectness": objectness, "deltas": deltas, "anchors": grid(), "image_sizes": SIZES}
    arguments.update({"level_sizes": LEVELS, "pre_nms_top_n": 5, "post_nms_top_n": 5})
    with pytest.raises(ValueError, match=message):
        proposals(**{**arguments, **change})
