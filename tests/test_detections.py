"""Detections against the oracle: threshold, decoding per class, NMS per class, the best of all."""

import math
from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from rcnn.kernels.detections import detections
from rcnn.structures import Detections, Proposals

EPS = torch.finfo(torch.float32).eps
SIZES = torch.tensor([[48.0, 64.0], [40.0, 50.0], [48.0, 64.0]])
WEIGHTS = (8.0, 8.0, 4.0, 4.0)


def inputs(
    images: int = 3, capacity: int = 30, classes: int = 4, seed: int = 0, kinds: int = 0
) -> tuple[Tensor, Tensor, Proposals]:
    """Logits (rows drawn from ``kinds`` rows, if given), deltas that keep boxes exact, proposals."""
    generator = torch.Generator().manual_seed(seed)
    rows = images * capacity
    logits = 2 * torch.randn(rows, classes + 1, generator=generator)
    if kinds:
        logits = logits[torch.randint(0, kinds, (rows,), generator=generator)]
    deltas = torch.randint(-2, 3, (rows, classes + 1, 4), generator=generator).float()
    deltas[..., 2:] = 0
    first = torch.randint(0, 5, (images, capacity, 2), generator=generator) * 8
    extent = torch.randint(1, 4, (images, capacity, 2), generator=generator) * 8
    count = torch.tensor([capacity, 0, capacity - 7])[:images]
    boxes = torch.cat((first, first + extent), dim=2).float()
    boxes[torch.arange(capacity) >= count[:, None]] = 0
    return logits, deltas.reshape(rows, -1), Proposals(boxes, torch.zeros(images, capacity), count)


def run(logits: Tensor, deltas: Tensor, found: Proposals, **options: Any) -> Detections:
    return detections(logits, deltas, found, SIZES[: len(found.count)], box_weights=WEIGHTS, **options)


def check(
    result: Detections, logits: Tensor, deltas: Tensor, found: Proposals, score: float, iou: float, most: int
) -> None:
    images, capacity = found.boxes.shape[:2]
    # The oracle starts from the float32 scores: their order and ties are the matter here.
    scores = logits.float().softmax(dim=1).reshape(images, capacity, -1)
    assert result.boxes.shape == (images, most, 4)
    for b, count in enumerate(found.count.tolist()):
        wanted = reference.detections(
            scores[b, :count].tolist(),
            deltas.reshape(images, capacity, -1)[b, :count].tolist(),
            found.boxes[b, :count].tolist(),
            SIZES[b].tolist(),
            torch.tensor(score).item(),
            iou,
            most,
            WEIGHTS,
        )
        rows = len(wanted)
        assert int(result.count[b]) == rows
        assert result.boxes[b, :rows].tolist() == [list(boxed) for boxed, _, _ in wanted]
        assert result.scores[b, :rows].tolist() == [value for _, value, _ in wanted]
        assert result.labels[b, :rows].tolist() == [label for _, _, label in wanted]
        for padding in (result.boxes[b, rows:], result.scores[b, rows:], result.labels[b, rows:]):
            assert not padding.any()


@pytest.mark.parametrize("kinds", [0, 2])
@pytest.mark.parametrize(("score", "iou", "most"), [(0.05, 0.5, 100), (0.05, 0.3, 5), (0.4, 0.5, 1), (0.0, 0.9, 500)])
def test_equals_the_oracle(kinds: int, score: float, iou: float, most: int) -> None:
    given = inputs(seed=most, kinds=kinds)
    result = run(*given, score_threshold=score, iou_threshold=iou, detections_per_image=most)
    check(result, *given, score, iou, most)


def test_many_classes_of_uneven_size() -> None:
    logits, deltas, found = inputs(images=1, capacity=200, classes=12)
    logits[:, 3] += 3
    check(run(logits, deltas, found), logits, deltas, found, 0.05, 0.5, 100)


def test_all_equal_scores_keep_the_order_of_proposals_then_classes() -> None:
    logits, deltas, found = inputs()
    logits.zero_()
    check(run(logits, deltas, found, detections_per_image=17), logits, deltas, found, 0.05, 0.5, 17)


def test_scores_are_the_softmax() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    found = Proposals(torch.tensor([[[0.0, 0.0, 9.0, 9.0]]]), torch.zeros(1, 1), torch.tensor([1]))
    result = run(logits, torch.zeros(1, 12), found)
    total = 1 + math.exp(2) + math.exp(1)
    # The exponentials, a sum of 3, a division.
    expected = torch.tensor([math.exp(2) / total, math.exp(1) / total])
    torch.testing.assert_close(result.scores[0, :2], expected, rtol=5 * EPS, atol=0)
    assert result.labels[0, :2].tolist() == [1, 2]
    assert result.count.tolist() == [2]


def test_the_threshold_is_open() -> None:
    found = Proposals(torch.tensor([[[0.0, 0.0, 9.0, 9.0]]]), torch.zeros(1, 1), torch.tensor([1]))
    for threshold, count in ((0.5, 0), (0.4999, 1)):
        assert run(torch.zeros(1, 2), torch.zeros(1, 8), found, score_threshold=threshold).count.tolist() == [count]


def test_each_class_has_its_own_deltas() -> None:
    found = Proposals(torch.tensor([[[16.0, 16.0, 24.0, 24.0]]]), torch.zeros(1, 1), torch.tensor([1]))
    deltas = torch.tensor([[9.0, 9, 9, 9, 8, 0, 0, 0, 0, -8, 0, 0]])
    result = run(torch.tensor([[0.0, 1.0, 0.5]]), deltas, found)
    assert result.boxes[0, :2].tolist() == [[24.0, 16.0, 32.0, 24.0], [16.0, 8.0, 24.0, 16.0]]


def test_boxes_shorter_than_a_hundredth_are_dropped() -> None:
    wide = torch.tensor([[0.0, 0.0, 0.02, 9.0], [20.0, 0.0, 20.005, 9.0], [63.995, 0.0, 80.0, 9.0]])
    found = Proposals(wide[None], torch.zeros(1, 3), torch.tensor([3]))
    result = run(torch.zeros(3, 2), torch.zeros(3, 8), found)
    assert result.count.tolist() == [1]
    assert result.boxes[0, 0, 2].item() < 0.1


def test_values_that_are_not_finite_are_dropped() -> None:
    logits, deltas, found = inputs()
    for place, value in enumerate((math.nan, math.inf, -math.inf)):
        logits[place, 1] = value
        deltas[4 + 3 * place : 8 + 3 * place].reshape(4, -1, 4)[torch.arange(4), 1, torch.arange(4)] = value
    check(run(logits, deltas, found), logits, deltas, found, 0.05, 0.5, 100)


def test_padding_never_detects() -> None:
    logits, deltas, found = inputs(images=1)
    boxes = found.boxes.clone()
    boxes[0, 3:] = torch.tensor([0.0, 0.0, 20.0, 20.0])
    found = Proposals(boxes, found.scores, torch.tensor([3]))
    check(run(logits, deltas, found), logits, deltas, found, 0.05, 0.5, 100)
    assert run(logits, deltas, Proposals(boxes, found.scores, torch.tensor([0]))).count.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, deltas, found = inputs()
    result = run(logits.to(dtype), deltas.to(dtype), found)
    assert result.boxes.dtype == result.scores.dtype == torch.float32
    check(result, logits.to(dtype), deltas, found, 0.05, 0.5, 100)


def test_no_proposals_no_gradient() -> None:
    none = Proposals(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64))
    assert run(torch.zeros(0, 3), torch.zeros(0, 12), none).count.tolist() == [0, 0]
    logits, deltas, found = inputs()
    result = run(logits.requires_grad_(), deltas.requires_grad_(), found)
    assert not any(value.requires_grad for value in vars(result).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(89, 5)}, r"logits must have shape \(90, K \+ 1\), got \(89, 5\)"),
        ({"logits": torch.zeros(90, 1)}, r"logits must have shape \(90, K \+ 1\), got \(90, 1\)"),
        ({"deltas": torch.zeros(90, 4)}, r"deltas must have shape \(90, 20\), got \(90, 4\)"),
        ({"image_sizes": torch.zeros(2, 2)}, r"image_sizes must have shape \(3, 2\), got \(2, 2\)"),
        ({"detections_per_image": 0}, "detections_per_image must be at least 1, got 0"),
        ({"box_weights": (1.0, 1.0)}, r"box_weights must be 4 numbers, got \(1.0, 1.0\)"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    logits, deltas, found = inputs()
    arguments = {"logits": logits, "deltas": deltas, "proposals": found, "image_sizes": SIZES}
    with pytest.raises(ValueError, match=message):
        detections(**{**arguments, **change})
