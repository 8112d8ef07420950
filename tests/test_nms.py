"""NMS against the oracle, by hand on the threshold, on ties and on boxes that are not finite."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from cuda_on_cpu import Emulator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rcnn import boxes as geometry
from rcnn.kernels import nms as exported
from rcnn.kernels.nms import KERNEL_CHUNK, SMALL, batched_nms, nms, nms_padded
from rcnn.kernels.nms_cpu import nms_cpu, nms_padded_cpu

#: Not the ratio of small whole numbers, so no IoU of the random boxes lies on a threshold.
THRESHOLDS = (0.0, 1 / math.pi, 1 / math.sqrt(2), 1.0)


def random_boxes(count: int, seed: int, side: int = 60) -> Tensor:
    """Whole-number corners: areas are exact in float32. About a tenth of the boxes has no area."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, side, (count, 2), generator=generator)
    extent = torch.randint(0, side // 2, (count, 2), generator=generator)
    return torch.cat((first, first + extent), dim=1).float()


def random_scores(count: int, seed: int) -> Tensor:
    """Scores in steps of 1/16, so that many are equal."""
    return torch.randint(0, 16, (count,), generator=torch.Generator().manual_seed(seed)).float() / 16


@pytest.mark.parametrize("iou_threshold", THRESHOLDS)
@pytest.mark.parametrize("count", [0, 1, 2, 31, 32, 33, 63, 64, 65, 128, 129, 300])
def test_agrees_with_the_oracle(count: int, iou_threshold: float, device: torch.device) -> None:
    for seed in range(3):
        boxes, scores = random_boxes(count, seed), random_scores(count, seed)
        boxes[seed::37, seed] = (math.nan, math.inf, -math.inf)[seed]
        groups = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(seed)) * 1000 - 1007
        plain = reference.nms(boxes.tolist(), scores.tolist(), [0] * count, iou_threshold)
        by_group = reference.nms(boxes.tolist(), scores.tolist(), groups.tolist(), iou_threshold)
        boxes, scores, groups = boxes.to(device), scores.to(device), groups.to(device)
        assert nms(boxes, scores, iou_threshold).tolist() == plain
        assert batched_nms(boxes, scores, groups, iou_threshold).tolist() == by_group


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(dtype: torch.dtype, device: torch.device) -> None:
    boxes, scores = random_boxes(200, 1).to(device, dtype), random_scores(200, 1).to(device, dtype)
    assert torch.equal(nms(boxes, scores, 0.4), nms(boxes.float(), scores.float(), 0.4))


def test_double_precision_is_for_the_cpu() -> None:
    boxes, scores = random_boxes(150, 2), random_scores(150, 2)
    assert torch.equal(nms(boxes.double(), scores, 0.4), nms(boxes, scores, 0.4))
    # Areas 4 and 2, IoU 0.5 exactly. Below the spacing of float32 the threshold rounds to 0.5; in float64 it does not.
    boxes, below = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 2]]), math.nextafter(0.5, 0)
    assert nms(boxes, torch.ones(2), below).tolist() == [0, 1]
    assert nms(boxes.double(), torch.ones(2), below).tolist() == [0]


def test_only_a_greater_iou_suppresses(device: torch.device) -> None:
    # Areas 4 and 2, all of the second inside the first: IoU 0.5 exactly.
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 2]], device=device)
    scores = torch.tensor([0.9, 0.8], device=device)
    assert nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert nms(boxes, scores, 0.5 - 2**-25).tolist() == [0]
    assert nms(boxes, scores, math.nextafter(0.5, 0)).tolist() == [0, 1]  # float32 rounds it to 0.5


def test_equal_scores_keep_the_lower_index(device: torch.device) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]], device=device).repeat(100, 1)
    assert nms(boxes, torch.zeros(100, device=device), 0.5).tolist() == [0]
    assert nms(boxes, torch.tensor([-0.0, 0.0] * 50, device=device), 0.5).tolist() == [0]
    assert nms(boxes, torch.tensor([0.0] * 40 + [1.0] * 60, device=device), 0.5).tolist() == [40]
    apart = torch.arange(100.0, device=device)[:, None] * 20 + boxes
    assert nms(apart, torch.ones(100, device=device), 0.5).tolist() == list(range(100))


def test_a_suppressed_box_suppresses_nothing(device: torch.device) -> None:
    # IoU of neighbours is 8 / 12 = 0.667, of next but one 6 / 14 = 0.429.
    boxes = torch.tensor([[2.0 * i, 0, 2 * i + 10, 1] for i in range(200)], device=device)
    assert nms(boxes, torch.arange(200, 0, -1, device=device).float(), 0.5).tolist() == list(range(0, 200, 2))


def test_boxes_that_are_not_finite_neither_survive_nor_suppress(device: torch.device) -> None:
    boxes = torch.tensor([[0.0, 0, 10, math.inf], [0, 0, 10, 10], [math.nan, 0, 10, 10], [-math.inf, 0, math.inf, 9]])
    boxes, scores = boxes.to(device), torch.tensor([4.0, 1, 3, 2], device=device)
    assert nms(boxes, scores, 0.1).tolist() == [1]
    assert batched_nms(boxes, scores, torch.zeros(4, dtype=torch.int64, device=device), 0.1).tolist() == [1]
    assert nms(boxes[2:], scores[2:], 0.1).tolist() == []


def test_boxes_without_overlap_stay_whatever_their_extent(device: torch.device) -> None:
    # Reversed, empty and so large that the area overflows: every IoU is 0 or not a number.
    boxes = torch.tensor([[9.0, 9, 1, 1], [9, 9, 1, 1], [5, 5, 5, 5], [5, 5, 5, 5], [-1e30, -1e30, 1e30, 1e30]])
    boxes = torch.cat((boxes, boxes[4:], torch.tensor([[0.0, 0, 1e-30, 1e-30]])))
    assert nms(boxes.to(device), torch.ones(7, device=device), 0.0).tolist() == list(range(7))


@pytest.mark.parametrize("scale", [1.0, 2e-15, 3e-19, 1e15, 1.8e19])
@pytest.mark.parametrize("between", [0, 63, 200, KERNEL_CHUNK - 1])
def test_pairs_on_the_threshold(between: int, scale: float, device: torch.device) -> None:
    # A box and its copy moved by d have IoU (w - d) / (w + d); its part has that of their areas; some ulp more or less
    # put it on either side. The boxes between them leave the second in the first's group, or put it into a later one,
    # or into a word that knows only its bounds, or into the next chunk. The smallest areas are 2e-38, near the end of
    # the normal numbers; at 4e-30 some limits are kept and some are not; the largest 3e38, and the sum of two
    # overflows. Either may come first.
    problems, filler = {0: (1500, 0.0), 63: (60, 0.0), 200: (30, 0.0), KERNEL_CHUNK - 1: (6, math.nan)}[between]
    generator = torch.Generator().manual_seed(between)
    sides = set()
    for threshold in (0.5, 0.7, 1 / 3, 0.05, 1e-3):
        corner = torch.rand(problems, 2, generator=generator) * 2 * scale
        extent = (0.5 + torch.rand(problems, 2, generator=generator) / 2) * scale
        first = torch.cat((corner, corner + extent), dim=1)
        second = first.clone()
        second[::2, ::2] += (extent[::2, 0] * (1 - threshold) / (1 + threshold))[:, None]
        second[1::2, 2] -= extent[1::2, 0] * (1 - threshold)
        ulp = torch.randint(-2, 3, (problems, 4), generator=generator, dtype=torch.int32)
        second = (second.view(torch.int32) + ulp).view(torch.float32)
        swap = torch.arange(problems)[:, None] % 4 < 2
        first, second = torch.where(swap, second, first), torch.where(swap, first, second)
        expected = geometry.iou(first, second) > threshold
        fillers = torch.full((problems, between, 4), filler)
        boxes = torch.cat((first[:, None], fillers, second[:, None]), dim=1).to(device)
        count = torch.full((problems,), between + 2, device=device)
        keep, kept = nms_padded(boxes, count, threshold, between + 2)
        last = keep.gather(1, kept[:, None] - 1).squeeze(1).cpu()
        assert torch.equal(last != between + 1, expected)
        sides |= set(expected.tolist())
    assert sides == {False, True}


def test_a_box_just_not_struck_by_one_is_struck_by_another(device: torch.device) -> None:
    # On a line: the first spans 1..4, the second 0..2, the last 0..4. IoU of last and first 3 / 4, of last and second
    # 2 / 4 exactly, of first and second 1 / 4. Empty boxes put the last behind the first word.
    line = torch.tensor([[1.0, 0, 4, 1], [0, 0, 2, 1], *([[0.0, 0, 0, 0]] * 70), [0, 0, 4, 1]], device=device)
    assert nms(line, torch.ones(73, device=device), 0.5).tolist() == list(range(72))
    assert nms(line[1:], torch.ones(72, device=device), 0.5).tolist() == list(range(72))
    line[:2] = line[[1, 0]]
    for between in (70, 200):
        boxes = torch.cat((line[:2], line[2:3].repeat(between, 1), line[-1:]))
        assert nms(boxes, torch.ones(between + 3, device=device), 0.5).tolist() == list(range(between + 2))


@pytest.mark.parametrize("count", [1000, KERNEL_CHUNK - 1, KERNEL_CHUNK, KERNEL_CHUNK + 1, 2 * KERNEL_CHUNK + 1])
def test_large_problems(count: int, device: torch.device) -> None:
    # About a third is kept on the small field, nearly all on the large one.
    for side in (2 * math.isqrt(count), 100 * math.isqrt(count)):
        boxes, scores = random_boxes(count, side, side), random_scores(count, side)
        boxes[:, 2:] = boxes[:, :2] + (boxes[:, 2:] - boxes[:, :2]) % 40
        boxes[7::501, 2] = math.nan
        expected = nms_cpu(boxes, scores, None, THRESHOLDS[1])
        assert torch.equal(nms(boxes.to(device), scores.to(device), THRESHOLDS[1]).cpu(), expected)


def apart_and_alike(kind: str) -> Tensor:
    """Boxes for the words of a block, which are of like size and place: 32 a word, in 16 octaves of 8 by 8 cells."""
    generator = torch.Generator().manual_seed(len(kind))
    unit = torch.rand(1100, 4, generator=generator)
    if kind == "one bucket":
        return torch.tensor([300.0, 300, 340, 340]) + 6 * unit
    # Centres on the borders of cells of 64, areas on those of octaves, 1.5 * 2 ** n, and 32 or 33 of a kind.
    place = torch.randint(1, 8, (1100, 2), generator=generator) * 64.0
    half = 2.0 ** torch.randint(-2, 6, (1100, 1), generator=generator) * torch.tensor([1.5, 0.5])
    if kind == "on borders":
        return torch.cat((place - half, place + half), dim=1).clamp(0, 512)
    if kind == "words of 32":
        each = torch.tensor([32, 33, 31, 1]).repeat(11).repeat_interleave(torch.tensor([32, 33, 31, 1]).repeat(11))
        corner = torch.arange(44).repeat_interleave(torch.tensor([32, 33, 31, 1]).repeat(11))[:, None] * 90.0
        return torch.cat((corner, corner, corner + each[:, None], corner + 40), dim=1)[:1067] + 9 * unit[:1067]
    boxes = torch.cat((place - half * (1 + unit[:, :2]), place + half * (1 + unit[:, 2:])), dim=1)
    if kind == "half reversed":
        boxes[::2] = boxes[::2][:, [2, 1, 0, 3]]
        boxes[1::8] = boxes[1::8][:, [2, 3, 0, 1]]
    elif kind == "of all sizes":
        boxes *= 4.0 ** torch.randint(-20, 28, (1100, 1), generator=generator)
    elif kind == "huge beside small":
        boxes[::50] *= 1e17
        boxes[7::50] *= 1e-18
    elif kind == "few objects":
        boxes = boxes[torch.randint(30, (1100,), generator=generator)] + unit
    elif kind == "one solid":
        boxes[:777, 2:], boxes[778:, 2:] = boxes[:777, :2], boxes[778:, :2]
    return boxes


KINDS = ("one bucket", "on borders", "words of 32", "half reversed", "of all sizes", "huge beside small", "few objects")


@pytest.mark.parametrize("kind", [*KINDS, "one solid", "mixed"])
def test_words_of_boxes_alike_in_size_and_place(kind: str, device: torch.device) -> None:
    boxes = apart_and_alike(kind)
    for threshold in (0.0, 1e-20, 1e-3, 0.4, 0.7, 1.0):
        scores = random_scores(len(boxes), 1)
        expected = nms_cpu(boxes, scores, None, threshold)
        assert torch.equal(nms(boxes.to(device), scores.to(device), threshold).cpu(), expected)


def test_blocks_of_few_warps_settle_large_problems(device: torch.device) -> None:
    """So many problems that a block has two warps, most of them small."""
    boxes = torch.stack([random_boxes(SMALL + 40, 5), random_boxes(SMALL + 40, 6)]).repeat(900, 1, 1)
    count = torch.arange(1800) % 3
    count[::300], count[1::300] = SMALL + 1, SMALL
    expected = nms_padded_cpu(boxes, count, 0.4, 100)
    found = nms_padded(boxes.to(device), count.to(device), 0.4, 100)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def test_large_problems_in_a_batch(device: torch.device) -> None:
    rows = 2 * KERNEL_CHUNK + 70
    boxes = torch.stack([random_boxes(rows, seed, 300) for seed in range(5)])
    boxes[..., 2:] = boxes[..., :2] + (boxes[..., 2:] - boxes[..., :2]) % 30
    count = torch.tensor([0, KERNEL_CHUNK, rows, 2 * KERNEL_CHUNK + 1, 100])
    boxes[2, KERNEL_CHUNK : 2 * KERNEL_CHUNK] = math.nan
    # The capacity is reached in the first chunk, in a later one, on the last box, or not at all.
    whole = int(nms_padded_cpu(boxes, count, THRESHOLDS[1], rows)[1][3])
    for most in (1, 65, whole - 1, whole, rows):
        expected = nms_padded_cpu(boxes, count, THRESHOLDS[1], most)
        found = nms_padded(boxes.to(device), count.to(device), THRESHOLDS[1], most)
        assert torch.equal(found[0].cpu(), expected[0])
        assert torch.equal(found[1].cpu(), expected[1])


def of_every_size(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Classes of sizes on either side of what gets a warp, a block, and several launches."""
    sizes = [1, 2, 31, 32, 33, 64, 65, SMALL, SMALL + 1, KERNEL_CHUNK, KERNEL_CHUNK + 1]
    names = torch.tensor([-(2**63), -5, -1, 0, 1, 2**63 - 1, 2**40, 7, 90, 3, 4])
    groups = names.repeat_interleave(torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(2))]
    boxes, scores = random_boxes(len(groups), 3, side), random_scores(len(groups), 3)
    boxes[5::301, 0] = math.inf
    return boxes, scores, groups


def test_classes_of_every_size_and_name(device: torch.device) -> None:
    boxes, scores, groups = of_every_size(side=150)
    expected = nms_cpu(boxes, scores, groups, THRESHOLDS[1])
    found = batched_nms(boxes.to(device), scores.to(device), groups.to(device), THRESHOLDS[1])
    assert torch.equal(found.cpu(), expected)
    # Classes of one box each keep all that is finite.
    alone = batched_nms(boxes.to(device), scores.to(device), torch.arange(len(boxes), device=device) - 9, 0.0)
    assert len(alone) == int(boxes.isfinite().all(dim=1).sum())


@pytest.mark.parametrize("most", [SMALL, KERNEL_CHUNK])
@pytest.mark.parametrize("classes", [1, 2])
def test_classes_that_fill_a_list(classes: int, most: int, device: torch.device) -> None:
    """Nothing but classes as large as a list takes them: there is no room for them in the list of larger ones."""
    boxes, scores = random_boxes(classes * most, 5, 300), random_scores(classes * most, 5)
    groups = torch.arange(classes * most) % classes
    expected = nms_cpu(boxes, scores, groups, THRESHOLDS[1])
    found = batched_nms(boxes.to(device), scores.to(device), groups.to(device), THRESHOLDS[1])
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_classes_of_every_integer_type(dtype: torch.dtype, device: torch.device) -> None:
    boxes, scores = random_boxes(90, 4).to(device), random_scores(90, 4).to(device)
    groups = torch.arange(90, device=device) % 3
    assert torch.equal(batched_nms(boxes, scores, groups.to(dtype), 0.3), batched_nms(boxes, scores, groups, 0.3))


def test_scores_that_are_not_a_number_come_first(device: torch.device) -> None:
    scores = torch.tensor([1.0, math.nan, math.inf, -math.nan, 2.0, -math.inf]).repeat(400)
    boxes = torch.arange(2400.0)[:, None] * 20 + torch.tensor([0.0, 0, 9, 9])
    expected = [i for places in ((1, 3), (2,), (4,), (0,), (5,)) for i in range(2400) if i % 6 in places]
    assert nms(boxes.to(device), scores.to(device), 0.5).tolist() == expected


def test_any_strides_and_inputs_unmodified(device: torch.device) -> None:
    boxes, scores = random_boxes(400, 6).to(device), random_scores(400, 6).to(device)
    groups = torch.arange(400, device=device) % 3
    padded, count = boxes.view(4, 100, 4), torch.tensor([0, 99, 100, 64], device=device)
    expected = nms(boxes, scores, 0.3), batched_nms(boxes, scores, groups, 0.3), *nms_padded(padded, count, 0.3, 70)

    def strided(x: Tensor) -> Tensor:
        return torch.stack((x, x.flip(0)), dim=-1)[..., 0]

    inputs = [strided(x) for x in (boxes, scores, groups, padded, count)]
    before = [x.clone() for x in inputs]
    assert not any(x.is_contiguous() for x in inputs)
    found = (
        nms(inputs[0], inputs[1], 0.3),
        batched_nms(inputs[0], inputs[1], inputs[2], 0.3),
        *nms_padded(inputs[3], inputs[4], 0.3, 70),
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.emulated
def test_any_order_of_threads_and_blocks_gives_the_same(emulator: Emulator) -> None:
    boxes, scores, groups = of_every_size(side=50)
    padded = random_boxes(6 * 150, 7).view(6, 150, 4)
    count = torch.tensor([150, 0, 64, 65, 149, 1])
    # Three groups of 64 boxes, each with its twins behind it and half as large as the one before: the warp that gathers
    # has the largest ones, so nothing to do from the second group on, while others strike the twins.
    row = torch.arange(384.0)
    corner, side = 100 * torch.stack((row % 64, row // 128), dim=1), 64 * 0.5 ** (row // 128)[:, None]
    twins = torch.cat((corner, corner + side), dim=1)
    expected = (
        nms_cpu(boxes, scores, groups, THRESHOLDS[1]),
        *nms_padded_cpu(padded, count, THRESHOLDS[1], 50),
        (row % 128 < 64).nonzero().squeeze(1),
    )
    for seed in range(20):
        with emulator.order(seed):
            found = (
                batched_nms(boxes, scores, groups, THRESHOLDS[1]),
                *nms_padded(padded, count, THRESHOLDS[1], 50),
                nms(twins, -row, THRESHOLDS[1]),
            )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class _Watch(TorchDispatchMode):
    """Counts the operations for which a GPU would make the host wait; the most elements that one returns."""

    waits, largest = 0, 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]  # type: ignore[attr-defined]
        self.waits += name in ("_local_scalar_dense", "equal", "masked_select", "nonzero", "unique_consecutive")
        if name in ("index", "index_put_"):
            self.waits += any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            self.largest = max(self.largest, value.numel() if isinstance(value, Tensor) else 0)
        return result


@pytest.mark.emulated
def test_kernels_wait_once_for_a_ragged_result_never_for_a_padded_one(emulator: Emulator) -> None:
    rows = 2 * KERNEL_CHUNK
    boxes, scores = random_boxes(rows, 5, 200), random_scores(rows, 5)
    groups, count = torch.arange(rows) % 7, torch.tensor([rows])
    for waits, call in (
        (1, lambda: nms(boxes, scores, 0.5)),
        (1, lambda: batched_nms(boxes, scores, groups, 0.5)),
        (0, lambda: nms_padded(boxes[None], count, 0.5, 1000)),
    ):
        with _Watch() as watch:
            call()
        assert watch.waits == waits
        # Nothing is made for each pair: the boxes, and the ranges of the classes, are the largest.
        assert watch.largest <= 6 * rows


@pytest.mark.emulated
def test_double_precision_is_refused_by_the_kernels(emulator: Emulator) -> None:
    boxes, zeros = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3)
    message = "boxes must be float32, bfloat16 or float16 on a GPU, got torch.float64"
    for call in (
        lambda: nms(boxes, zeros, 0.5),
        lambda: batched_nms(boxes, zeros, zeros.long(), 0.5),
        lambda: nms_padded(boxes[None], torch.tensor([3]), 0.5, 3),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_refuses_tensors_on_two_devices() -> None:
    boxes, zeros = torch.zeros(3, 4), torch.zeros(3)
    with pytest.raises(ValueError, match="scores must be on cpu, where boxes is, got meta"):
        nms(boxes, zeros.to("meta"), 0.5)
    with pytest.raises(ValueError, match="idxs must be on cpu, where boxes is, got meta"):
        batched_nms(boxes, zeros, zeros.long().to("meta"), 0.5)
    with pytest.raises(ValueError, match="count must be on cpu, where boxes is, got meta"):
        nms_padded(boxes[None], torch.zeros(1).long().to("meta"), 0.5, 3)


@pytest.mark.parametrize("rows", [1, 20, 64, 90])
def test_padded_problems_are_independent(rows: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(rows)
    count = torch.randint(0, rows + 1, (30,), generator=generator)
    count[:2] = torch.tensor([0, rows])
    boxes = torch.stack([random_boxes(rows, 100 + q, 40) for q in range(30)])
    boxes[5::3, 0, 1] = math.nan
    for most in (0, 1, 7, rows, rows + 5):
        keep, kept = nms_padded(boxes.to(device), count.to(device), THRESHOLDS[1], most)
        assert keep.shape == (30, most)
        assert keep.dtype == kept.dtype == torch.int64
        for q in range(30):
            used = boxes[q, : count[q]].tolist()
            expected = reference.nms(used, [0] * len(used), [0] * len(used), THRESHOLDS[1])[:most]
            assert keep[q, : kept[q]].tolist() == expected
            assert not keep[q, kept[q] :].any()


def test_rows_beyond_the_count_change_nothing(device: torch.device) -> None:
    boxes = random_boxes(40, 5).view(2, 20, 4).to(device)
    count = torch.tensor([7, 12], device=device)
    expected = nms_padded(boxes, count, 0.3, 20)
    for value in (math.nan, 0.0, 50.0):
        other = boxes.clone()
        other[0, 7:], other[1, 12:] = value, value
        assert all(torch.equal(a, b) for a, b in zip(nms_padded(other, count, 0.3, 20), expected, strict=True))


def test_counts_outside_the_rows_are_clamped(device: torch.device) -> None:
    counts = [-1, 5 - 2**32, 25, 2**40, 7]  # the low 32 bits of two of them are counts, too
    boxes = torch.stack([random_boxes(20, 200 + q, 40) for q in range(5)])
    keep, kept = nms_padded(boxes.to(device), torch.tensor(counts, device=device), THRESHOLDS[1], 20)
    for q, used in enumerate((0, 0, 20, 20, 7)):
        expected = reference.nms(boxes[q, :used].tolist(), [0] * used, [0] * used, THRESHOLDS[1])
        assert keep[q, : kept[q]].tolist() == expected


def test_no_problem_and_no_row(device: torch.device) -> None:
    for shape in ((0, 5, 4), (3, 0, 4)):
        keep, kept = nms_padded(
            torch.zeros(shape, device=device), torch.zeros(shape[0], dtype=torch.int64, device=device), 0.5, 6
        )
        assert keep.shape == (shape[0], 6)
        assert not keep.any()
        assert kept.tolist() == [0] * shape[0]


def test_many_classes_of_very_different_size(device: torch.device) -> None:
    boxes, scores = random_boxes(700, 8), random_scores(700, 8)
    groups = torch.cat((torch.zeros(400, dtype=torch.int64), torch.arange(300) // 3 + 1))
    expected = reference.nms(boxes.tolist(), scores.tolist(), groups.tolist(), THRESHOLDS[1])
    assert batched_nms(boxes.to(device), scores.to(device), groups.to(device), THRESHOLDS[1]).tolist() == expected


def test_needs_no_gradient(device: torch.device) -> None:
    boxes = random_boxes(5, 1).to(device).requires_grad_()
    scores = random_scores(5, 1).to(device).requires_grad_()
    assert not nms(boxes, scores, 0.5).requires_grad


def test_the_function_is_exported() -> None:
    assert exported is nms


@pytest.mark.parametrize(
    ("boxes", "scores", "iou_threshold", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(3), 0.5, r"boxes must have shape \(N, 4\), got \(3, 5\)"),
        (torch.zeros(3, 4), torch.zeros(2), 0.5, r"scores must have shape \(3,\), got \(2,\)"),
        (torch.zeros(3, 4).long(), torch.zeros(3), 0.5, "boxes must be float32, bfloat16 or float16, got torch.int64"),
        (torch.zeros(3, 4), torch.zeros(3).long(), 0.5, "scores must be float32, bfloat16 or float16, got torch.int64"),
        (torch.zeros(3, 4), torch.zeros(3), -0.1, r"iou_threshold must lie in 0\.\.1, got -0.1"),
        (torch.zeros(3, 4), torch.zeros(3), 1.1, r"iou_threshold must lie in 0\.\.1, got 1.1"),
        (torch.zeros(3, 4), torch.zeros(3), math.nan, r"iou_threshold must lie in 0\.\.1, got nan"),
    ],
)
def test_refuses(boxes: Tensor, scores: Tensor, iou_threshold: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nms(boxes, scores, iou_threshold)
    with pytest.raises(ValueError, match=message):
        batched_nms(boxes, scores, torch.zeros(len(scores), dtype=torch.int64), iou_threshold)


def test_refuses_wrong_groups() -> None:
    with pytest.raises(ValueError, match=r"idxs must have shape \(3,\), got \(2,\)"):
        batched_nms(torch.zeros(3, 4), torch.zeros(3), torch.zeros(2).long(), 0.5)
    with pytest.raises(ValueError, match="idxs must have an integer dtype, got torch.float32"):
        batched_nms(torch.zeros(3, 4), torch.zeros(3), torch.zeros(3), 0.5)


@pytest.mark.parametrize(
    ("shape", "count", "most", "message"),
    [
        ((2, 3), torch.zeros(2).long(), 1, r"boxes must have shape \(Q, M, 4\), got \(2, 3\)"),
        ((2, 3, 4), torch.zeros(3).long(), 1, r"count must have shape \(2,\), got \(3,\)"),
        ((2, 3, 4), torch.zeros(2), 1, "count must be torch.int64, got torch.float32"),
        ((2, 3, 4), torch.zeros(2).long(), -1, "max_output must be an integer in 0.*, got -1"),
    ],
)
def test_refuses_wrong_padding(shape: tuple[int, ...], count: Tensor, most: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nms_padded(torch.zeros(shape), count, 0.5, most)
