"""Detections against the oracle: threshold, decoding per class, NMS per class, the best of all."""

import math
from typing import Any

import pytest
import reference
import torch
from cuda_on_cpu import Emulator
from torch import Tensor

from rcnn.kernels.detections import THREADS, detections
from rcnn.kernels.sorting import RUN
from rcnn.structures import Detections, Proposals

EPS = torch.finfo(torch.float32).eps
SIZES = torch.tensor([[48.0, 64.0], [40.0, 50.0], [48.0, 64.0]])
WEIGHTS = (8.0, 8.0, 4.0, 4.0)


def inputs(
    device: torch.device | str = "cpu",
    images: int = 3,
    capacity: int = 30,
    classes: int = 4,
    seed: int = 0,
    kinds: int = 0,
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
    found = Proposals(boxes, torch.zeros(images, capacity), count)
    return logits.to(device), deltas.reshape(rows, -1).to(device), found.to(device)


def run(logits: Tensor, deltas: Tensor, found: Proposals, **options: Any) -> Detections:
    sizes = SIZES[: len(found.count)].to(logits.device)
    return detections(logits, deltas, found, sizes, box_weights=WEIGHTS, **options)


def one(box: list[float], device: torch.device) -> Proposals:
    found = Proposals(torch.tensor([[box]]), torch.zeros(1, 1), torch.tensor([1]))
    return found.to(device)


def rounding(columns: int) -> float:
    """How far the softmax of two libraries may lie apart, relative to the score.

    On both sides an exponential is up to 2 units in the last place off, above and below the line: 8. The additions are
    made in another order, half a unit each, and the division rounds: one per column.
    """
    return (8 + columns) * EPS


def settled(scores: Tensor, threshold: float) -> bool:
    """Whether rounding can change neither the order of two scores of an image nor the side of the threshold of one.

    Scores that are equal come from the same logits, and are equal in every library. ``scores (rows, columns)``.
    """
    apart = 2 * rounding(scores.shape[1])
    values = scores[:, 1:][scores[:, 1:] > threshold * (1 - apart)]
    values = torch.cat((values, torch.tensor([threshold]))).unique()
    return bool((values[1:] - values[:-1] > apart * values[1:]).all())


def check(
    result: Detections, logits: Tensor, deltas: Tensor, found: Proposals, score: float, iou: float, most: int
) -> None:
    images, capacity = found.boxes.shape[:2]
    result, logits, deltas, found = (part.to("cpu") for part in (result, logits, deltas, found))
    # The oracle starts from the float32 scores of torch: their order and ties are the matter here.
    scores = logits.float().softmax(dim=1).reshape(images, capacity, -1)
    assert result.boxes.shape == (images, most, 4)
    for b, count in enumerate(found.count.tolist()):
        assert settled(scores[b, :count], score)
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
        assert result.labels[b, :rows].tolist() == [label for _, _, label in wanted]
        values = torch.tensor([value for _, value, _ in wanted])
        torch.testing.assert_close(result.scores[b, :rows], values, rtol=rounding(logits.shape[1]), atol=0)
        for padding in (result.boxes[b, rows:], result.scores[b, rows:], result.labels[b, rows:]):
            assert not padding.any()


@pytest.mark.parametrize("kinds", [0, 2])
@pytest.mark.parametrize(("score", "iou", "most"), [(0.05, 0.5, 100), (0.05, 0.3, 5), (0.4, 0.5, 1), (0.0, 0.9, 500)])
def test_equals_the_oracle(device: torch.device, kinds: int, score: float, iou: float, most: int) -> None:
    given = inputs(device, seed=most, kinds=kinds)
    result = run(*given, score_threshold=score, iou_threshold=iou, detections_per_image=most)
    check(result, *given, score, iou, most)


def test_many_classes_of_uneven_size(device: torch.device) -> None:
    logits, deltas, found = inputs(device, images=1, capacity=100, classes=12)
    logits[:, 3] += 3
    check(run(logits, deltas, found), logits, deltas, found, 0.05, 0.5, 100)


def test_all_equal_scores_keep_the_order_of_proposals_then_classes(device: torch.device) -> None:
    logits, deltas, found = inputs(device)
    logits.zero_()
    check(run(logits, deltas, found, detections_per_image=17), logits, deltas, found, 0.05, 0.5, 17)


def test_scores_are_the_softmax(device: torch.device) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]], device=device)
    result = run(logits, logits.new_zeros(1, 12), one([0.0, 0.0, 9.0, 9.0], device)).to("cpu")
    total = 1 + math.exp(2) + math.exp(1)
    expected = torch.tensor([math.exp(2) / total, math.exp(1) / total])
    torch.testing.assert_close(result.scores[0, :2], expected, rtol=rounding(3), atol=0)
    assert result.labels[0, :2].tolist() == [1, 2]
    assert result.count.tolist() == [2]


@pytest.mark.parametrize("classes", [1, 30, 31, 32, 62, 63, 64, 90, 1000])
def test_any_number_of_classes(device: torch.device, classes: int) -> None:
    logits = torch.zeros(1, classes + 1, device=device)
    logits[0, classes] = 3.0
    deltas = logits.new_zeros(1, 4 * (classes + 1))
    result = run(logits, deltas, one([0.0, 0.0, 9.0, 9.0], device), score_threshold=0.01).to("cpu")
    score = math.exp(3) / (math.exp(3) + classes)
    torch.testing.assert_close(result.scores[0, :1], torch.tensor([score]), rtol=rounding(classes + 1), atol=0)
    # Every other class has a score of 1 / (exp(3) + classes), which is above 0.01 up to 79 classes.
    labels = [classes, *range(1, classes)] if classes < 80 else [classes]
    assert result.labels[0, : int(result.count)].tolist() == labels


def test_the_threshold_is_open(device: torch.device) -> None:
    found = one([0.0, 0.0, 9.0, 9.0], device)
    for threshold, count in ((0.5, 0), (0.4999, 1)):
        logits = torch.zeros(1, 2, device=device)
        assert run(logits, logits.new_zeros(1, 8), found, score_threshold=threshold).count.tolist() == [count]


def test_each_class_has_its_own_deltas(device: torch.device) -> None:
    deltas = torch.tensor([[9.0, 9, 9, 9, 8, 0, 0, 0, 0, -8, 0, 0]], device=device)
    logits = torch.tensor([[0.0, 1.0, 0.5]], device=device)
    result = run(logits, deltas, one([16.0, 16.0, 24.0, 24.0], device))
    assert result.boxes[0, :2].tolist() == [[24.0, 16.0, 32.0, 24.0], [16.0, 8.0, 24.0, 16.0]]


def test_each_delta_has_its_own_weight(device: torch.device) -> None:
    delta, weights = [8.0, 1.0, 3.0, -1.5], (8.0, 4.0, 5.0, 2.0)
    boxed = [16.0, 16.0, 24.0, 24.0]
    logits, deltas = torch.zeros(1, 2, device=device), torch.tensor([[0.0] * 4 + delta], device=device)
    result = detections(logits, deltas, one(boxed, device), SIZES[:1].to(device), box_weights=weights)
    expected = torch.tensor(reference.decode(delta, boxed, weights))
    # Four eps of the largest coordinate, 35.3: an exponential, two products and a sum.
    torch.testing.assert_close(result.boxes[0, 0].cpu(), expected, rtol=0, atol=4 * EPS * 35.3)


@pytest.mark.parametrize("side", [0, 1])
def test_a_side_of_a_hundredth_is_kept(side: int, device: torch.device) -> None:
    least = torch.tensor(0.01)
    for extent, count in ((least, 1), (least.nextafter(torch.tensor(0.0)), 0)):
        boxed = [0.0, 0.0, 9.0, 9.0]
        boxed[2 + side] = extent.item()
        result = run(torch.zeros(1, 2, device=device), torch.zeros(1, 8, device=device), one(boxed, device))
        assert result.count.tolist() == [count]


def test_boxes_shorter_than_a_hundredth_are_dropped(device: torch.device) -> None:
    wide = torch.tensor([[0.0, 0.0, 0.02, 9.0], [20.0, 0.0, 20.005, 9.0], [63.995, 0.0, 80.0, 9.0]])
    found = Proposals(wide[None], torch.zeros(1, 3), torch.tensor([3])).to(device)
    result = run(torch.zeros(3, 2, device=device), torch.zeros(3, 8, device=device), found)
    assert result.count.tolist() == [1]
    assert result.boxes[0, 0, 2].item() < 0.1


def test_values_that_are_not_finite_are_dropped(device: torch.device) -> None:
    logits, deltas, found = inputs(device)
    for place, value in enumerate((math.nan, math.inf, -math.inf)):
        logits[place, 1] = value
        deltas[4 + 3 * place : 8 + 3 * place].reshape(4, -1, 4)[torch.arange(4), 1, torch.arange(4)] = value
    check(run(logits, deltas, found), logits, deltas, found, 0.05, 0.5, 100)


@pytest.mark.parametrize(("height", "dw", "count"), [(1.0, 16.0, 0), (1e38, 0.0, 0), (1.0, 0.0, 1)])
def test_a_box_that_grows_to_infinity_is_dropped(height: float, dw: float, count: int, device: torch.device) -> None:
    """Half of 1e38 * exp(16 / 4) is beyond float32, as is the area of 1e38 squared; clipping would make a box of the
    whole image of it."""
    deltas = torch.tensor([[0.0] * 4 + [0.0, 0.0, dw, 0.0]], device=device)
    result = run(torch.zeros(1, 2, device=device), deltas, one([0.0, 0.0, 1e38, height], device))
    assert result.count.tolist() == [count]


def test_a_size_that_is_not_a_number_leaves_nothing(device: torch.device) -> None:
    sizes = torch.tensor([[math.nan, 64.0]], device=device)
    given = torch.zeros(1, 2, device=device), torch.zeros(1, 8, device=device), one([-4.0, -4.0, 8.0, 8.0], device)
    assert detections(*given, sizes).count.tolist() == [0]


def test_padding_never_detects(device: torch.device) -> None:
    logits, deltas, found = inputs(device, images=1)
    boxes = found.boxes.clone()
    boxes[0, 3:] = torch.tensor([0.0, 0.0, 20.0, 20.0])
    for count in (3, 0):
        found = Proposals(boxes, found.scores, torch.tensor([count], device=device))
        check(run(logits, deltas, found), logits, deltas, found, 0.05, 0.5, 100)


@pytest.mark.parametrize("count", [-2, 0, 29, 30, 33])
def test_counts_outside_the_rows_are_clamped(count: int, device: torch.device) -> None:
    # Each of the last rows would be detected, and is told apart by its place.
    logits, deltas, found = inputs("cpu", images=2)
    logits[[28, 29, 58, 59]] = torch.tensor([0.0, 9, 0, 0, 0])
    found.boxes[:, 28:] = torch.tensor([[0.0, 24, 16, 40], [24, 24, 40, 40]])
    found.count[:] = torch.tensor([30, count])
    clamped = Proposals(found.boxes, found.scores, found.count.clamp(0, 30))
    result = run(logits.to(device), deltas.to(device), found.to(device))
    check(result, logits.to(device), deltas.to(device), clamped.to(device), 0.05, 0.5, 100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(device: torch.device, dtype: torch.dtype) -> None:
    logits, deltas, found = inputs(device)
    result = run(logits.to(dtype), deltas.to(dtype), found)
    assert result.boxes.dtype == result.scores.dtype == torch.float32
    check(result, logits.to(dtype), deltas, found, 0.05, 0.5, 100)


def test_every_pair_is_a_candidate(device: torch.device) -> None:
    """No capacity loses one: 2,700 detections of an image, all of one score, more than one block sorts."""
    logits, deltas, found = inputs(device, images=2, capacity=90, classes=30)
    logits.zero_()
    result = run(logits, deltas, found, score_threshold=0.0, iou_threshold=1.0, detections_per_image=3000)
    assert int(result.count[0]) > RUN
    check(result, logits, deltas, found, 0.0, 1.0, 3000)


def test_more_proposals_than_one_block_sorts(device: torch.device) -> None:
    logits, deltas, found = inputs(device, images=1, capacity=RUN + 52, classes=1, kinds=7)
    result = run(logits, deltas, found, score_threshold=0.0, detections_per_image=THREADS + 1)
    check(result, logits, deltas, found, 0.0, 0.5, THREADS + 1)


@pytest.mark.emulated
def test_any_order_of_threads_gives_the_same(emulator: Emulator) -> None:
    given = inputs(kinds=3)
    first = run(*given)
    for seed in range(1, 21):
        with emulator.order(seed):
            again = run(*given)
        assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(again).values(), strict=True))


def test_strided_inputs_are_read_and_left_alone(device: torch.device) -> None:
    logits, deltas, found = inputs(device)
    wanted = run(logits, deltas, found)
    boxes = found.boxes.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    count = torch.stack((found.count, found.count), dim=1)[:, 0]
    strided = Proposals(boxes, found.scores, count)
    given = [logits.T.contiguous().T, deltas.T.contiguous().T, boxes, count]
    before = [part.clone() for part in given]
    result = run(given[0], given[1], strided)
    assert all(torch.equal(a, b) for a, b in zip(vars(result).values(), vars(wanted).values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_no_proposals_no_gradient(device: torch.device) -> None:
    none = Proposals(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64)).to(device)
    empty = torch.zeros(0, 3, device=device)
    result = run(empty, empty.new_zeros(0, 12), none)
    assert result.count.tolist() == [0, 0]
    assert not result.boxes.any()
    assert not result.labels.any()
    logits, deltas, found = inputs(device)
    result = run(logits.requires_grad_(), deltas.requires_grad_(), found)
    assert not any(value.requires_grad for value in vars(result).values())


def test_no_images(device: torch.device) -> None:
    none = Proposals(torch.zeros(0, 5, 4), torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).to(device)
    empty = torch.zeros(0, 3, device=device)
    assert run(empty, empty.new_zeros(0, 12), none).boxes.shape == (0, 100, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(89, 5)}, r"logits must have shape \(90, K \+ 1\), got \(89, 5\)"),
        ({"logits": torch.zeros(90, 1)}, r"logits must have shape \(90, K \+ 1\), got \(90, 1\)"),
        ({"deltas": torch.zeros(90, 4)}, r"deltas must have shape \(90, 20\), got \(90, 4\)"),
        (
            {"deltas": torch.zeros(90, 20).half()},
            "deltas must have the dtype of logits, .*32, got .*16",
        ),
        ({"image_sizes": torch.zeros(2, 2)}, r"image_sizes must have shape \(3, 2\), got \(2, 2\)"),
        ({"image_sizes": torch.zeros(3, 2).double()}, "image_sizes must be torch.float32, got torch.float64"),
        ({"score_threshold": math.nan}, r"score_threshold must lie in 0..1, got nan"),
        ({"score_threshold": -0.1}, r"score_threshold must lie in 0..1, got -0.1"),
        ({"iou_threshold": math.nan}, r"iou_threshold must lie in 0..1, got nan"),
        ({"detections_per_image": 0}, "detections_per_image must be an integer in 1.*, got 0"),
        ({"box_weights": (1.0, 1.0)}, r"box_weights must be 4 numbers above 0, got \(1.0, 1.0\)"),
    ],
)
def test_errors(device: torch.device, change: dict[str, Any], message: str) -> None:
    logits, deltas, found = inputs()
    arguments = {"logits": logits, "deltas": deltas, "proposals": found, "image_sizes": SIZES, **change}
    tensors = (Tensor, Proposals)
    arguments = {name: x.to(device) if isinstance(x, tensors) else x for name, x in arguments.items()}
    with pytest.raises(ValueError, match=message):
        detections(**arguments)


@pytest.mark.emulated
def test_float64_is_for_the_cpu(emulator: Emulator) -> None:
    logits, deltas, found = inputs()
    message = "detections: dtype must be one of float32, bfloat16, float16 on a GPU, got torch.float64"
    with pytest.raises(ValueError, match=message):
        run(logits.double(), deltas.double(), found)
