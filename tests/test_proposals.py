"""Proposals against the oracle: selection, ties, decoding, filters, merging; and the steps of the CUDA body."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from cuda_on_cpu import Emulator
from torch import Tensor

from rcnn import boxes as box
from rcnn.kernels.anchors import anchors, cell_anchors
from rcnn.kernels.proposals import LEVELS as MAX_LEVELS
from rcnn.kernels.proposals import THREADS, TILE, proposals
from rcnn.kernels.sorting import RUN
from rcnn.structures import Proposals

SHAPES, STRIDES = [(6, 8), (3, 4), (2, 2)], [8, 16, 32]
LEVELS = [144, 36, 12]
SIZES = torch.tensor([[48.0, 64.0], [40.0, 50.0]])


def grid(device: torch.device | str = "cpu") -> Tensor:
    cells = torch.stack([cell_anchors([size], [0.5, 1.0, 2.0]) for size in (16, 32, 48)])
    return anchors(cells.to(device), SHAPES, STRIDES)


def outputs(
    device: torch.device | str = "cpu", images: int = 2, seed: int = 0, kinds: int = 0
) -> tuple[Tensor, Tensor]:
    """Objectness, of ``kinds`` values if given, and deltas that move by whole eighths, so that boxes are exact."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(LEVELS)
    objectness = torch.randn(images, count, generator=generator)
    if kinds:
        objectness = torch.randint(-kinds, kinds, (images, count), generator=generator) / kinds
    deltas = torch.randint(-4, 5, (images, count, 4), generator=generator) / 8
    deltas[..., 2:] = 0
    return objectness.to(device), deltas.to(device)


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
        grid(objectness.device),
        SIZES[: len(objectness)].to(objectness.device),
        LEVELS,
        pre_nms_top_n=pre,
        post_nms_top_n=post,
        iou_threshold=iou,
        min_size=least,
    )


@pytest.mark.parametrize("kinds", [0, 3])
@pytest.mark.parametrize(("pre", "post"), [(50, 40), (500, 500), (7, 4), (1, 1), (30, 1000)])
@pytest.mark.parametrize(("iou", "least"), [(0.7, 1e-3), (0.3, 6.0)])
def test_equals_the_oracle(device: torch.device, kinds: int, pre: int, post: int, iou: float, least: float) -> None:
    objectness, deltas = outputs(device, seed=pre, kinds=kinds)
    check(run(objectness, deltas, pre, post, iou, least), expected(objectness, deltas, pre, post, iou, least), post)


def test_all_equal_scores_keep_the_order_of_the_anchors(device: torch.device) -> None:
    objectness, deltas = outputs(device)
    objectness.fill_(0.25)
    check(run(objectness, deltas, 20, 30), expected(objectness, deltas, 20, 30, 0.7, 1e-3), 30)


def test_minus_zero_ties_with_zero(device: torch.device) -> None:
    objectness, deltas = outputs(device)
    objectness.fill_(0.0)
    objectness[:, ::2] = -0.0
    check(run(objectness, deltas, 20, 30), expected(objectness, deltas, 20, 30, 0.7, 1e-3), 30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(device: torch.device, dtype: torch.dtype) -> None:
    objectness, deltas = (part.to(dtype) for part in outputs(device))
    result = run(objectness, deltas)
    check(result, expected(objectness.float(), deltas.float(), 50, 40, 0.7, 1e-3), 40)
    assert result.boxes.dtype == result.scores.dtype == torch.float32


def test_values_that_are_not_finite_are_dropped(device: torch.device) -> None:
    objectness, deltas = outputs(device)
    objectness[0, :9] = torch.tensor([math.nan, math.inf, -math.inf] * 3)
    objectness[1, 150:160] = 1e30
    for place, value in enumerate((math.nan, math.inf, -math.inf, math.nan)):
        deltas[0, 20 + place, place] = value
        deltas[1, 150 + place, place] = value
    deltas[1, 154:158, 0] = torch.tensor([math.inf, -math.inf, math.nan, 1e38])
    check(run(objectness, deltas, 1000, 100), expected(objectness, deltas, 1000, 100, 0.7, 1e-3), 100)


@pytest.mark.parametrize(("height", "dw"), [(8.0, 4.0), (1e38, 0.0)])
def test_a_box_that_grows_to_infinity_is_dropped(height: float, dw: float, device: torch.device) -> None:
    """Half of 1e38 * exp(4) is beyond float32, as is the area of 1e38 squared; clipping would make a box of the whole
    image of it."""
    anchors = torch.tensor([[0.0, 0.0, 1e38, height], [0.0, 0.0, 8.0, 8.0]])
    deltas = torch.tensor([[[0.0, 0.0, dw, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    given = (part.to(device) for part in (torch.zeros(1, 2), deltas, anchors, SIZES[:1]))
    result = proposals(*given, [2], pre_nms_top_n=2, post_nms_top_n=2)
    assert result.boxes[0].tolist() == [[0.0, 0.0, 8.0, 8.0], [0.0] * 4]


def test_a_size_that_is_not_a_number_leaves_nothing(device: torch.device) -> None:
    sizes = torch.tensor([[math.nan, 64.0], [48.0, math.nan]], device=device)
    anchors = torch.tensor([[-8.0, -8.0, 8.0, 8.0], [0.0, 0.0, 8.0, 8.0]], device=device)
    given = torch.zeros(2, 2, device=device), torch.zeros(2, 2, 4, device=device), anchors, sizes
    assert proposals(*given, [2], pre_nms_top_n=2, post_nms_top_n=2).count.tolist() == [0, 0]


def test_nothing_finite(device: torch.device) -> None:
    objectness, deltas = outputs(device)
    result = run(objectness.fill_(math.nan), deltas)
    assert result.count.tolist() == [0, 0]
    assert not result.boxes.any()
    assert not result.scores.any()


def test_decodes_and_clips_to_the_size_of_its_own_image(device: torch.device) -> None:
    objectness, _ = outputs(seed=3)
    deltas = torch.randn(2, sum(LEVELS), 4, generator=torch.Generator().manual_seed(4)) * 0.5
    result = run(objectness.to(device), deltas.to(device), 50, 100).to("cpu")
    decoded = box.decode(deltas, grid())
    everything = box.clip(decoded, SIZES)
    # A corner is a center and half a side. The exponentials of two libraries are 2 units in the last place apart, the
    # product with the side may round apart by one more, and so may the sum.
    half = (decoded[..., 2:] - decoded[..., :2]).max().item() / 2
    for b, count in enumerate(result.count.tolist()):
        score, found = result.scores[b, :count], result.boxes[b, :count]
        assert (score[1:] <= score[:-1]).all()
        place = (objectness[b] == score[:, None]).to(torch.int64).argmax(dim=1)
        torch.testing.assert_close(found, everything[b, place], rtol=0, atol=4 * 2**-23 * half)
        assert (found[:, 2] <= SIZES[b, 1]).all()
        assert (found[:, 3] <= SIZES[b, 0]).all()


def test_shortest_side_is_inclusive(device: torch.device) -> None:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 9.0], [10.0, 0.0, 13.5, 9.0], [20.0, 0.0, 29.0, 4.0], [30.0, 0.0, 39.0, 3.0]])
    given = (part.to(device) for part in (torch.zeros(1, 4), torch.zeros(1, 4, 4), boxes, SIZES[:1]))
    result = proposals(*given, [4], pre_nms_top_n=4, post_nms_top_n=4, min_size=4.0)
    assert result.boxes[0, : int(result.count)].tolist() == boxes[[0, 2]].tolist()


def test_levels_do_not_suppress_each_other(device: torch.device) -> None:
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 8.0]])
    objectness = torch.tensor([[1.0, 2.0, 3.0]])
    given = [part.to(device) for part in (objectness, torch.zeros(1, 3, 4), boxes, SIZES[:1])]
    for levels, scores in (([2, 1], [3.0, 2.0, 0.0]), ([3], [3.0, 0.0, 0.0]), ([0, 1, 0, 2], [3.0, 1.0, 0.0])):
        result = proposals(*given, levels, pre_nms_top_n=3, post_nms_top_n=3)
        assert result.scores.tolist() == [scores]


def test_an_image_alone_equals_the_image_in_a_batch(device: torch.device) -> None:
    objectness, deltas = outputs(device, seed=5)
    together = run(objectness, deltas)
    alone = run(objectness[:1], deltas[:1])
    assert all(torch.equal(a[:1], b) for a, b in zip(vars(together).values(), vars(alone).values(), strict=True))


@pytest.mark.parametrize(("images", "levels"), [(2, [0]), (0, [3]), (2, [])])
def test_no_anchors_or_no_images(device: torch.device, images: int, levels: list[int]) -> None:
    count = sum(levels)
    shapes = ((images, count), (images, count, 4), (count, 4), (images, 2))
    given = [torch.zeros(shape, device=device) for shape in shapes]
    result = proposals(*given, levels, pre_nms_top_n=3, post_nms_top_n=5)
    assert result.boxes.shape == (images, 5, 4)
    assert result.count.tolist() == [0] * images


def test_no_gradient(device: torch.device) -> None:
    objectness, deltas = (part.requires_grad_() for part in outputs(device))
    assert not any(value.requires_grad for value in vars(run(objectness, deltas)).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectness": torch.zeros(2, 3, 1)}, r"objectness must have shape \(B, N\), got \(2, 3, 1\)"),
        ({"deltas": torch.zeros(2, 192, 5)}, r"deltas must have shape \(2, 192, 4\), got \(2, 192, 5\)"),
        ({"anchors": torch.zeros(191, 4)}, r"anchors must have shape \(192, 4\), got \(191, 4\)"),
        ({"image_sizes": torch.zeros(3, 2)}, r"image_sizes must have shape \(2, 2\), got \(3, 2\)"),
        ({"level_sizes": [100, 91]}, r"level_sizes must add up to 192 anchors, got \(100, 91\)"),
        ({"level_sizes": [193, -1]}, r"level_sizes\[1\] must be an integer in 0.*, got -1"),
        (
            {"deltas": torch.zeros(2, 192, 4).half()},
            "deltas must have the dtype of objectness, .*32, got",
        ),
        ({"anchors": torch.zeros(192, 4).double()}, "anchors must be torch.float32, got torch.float64"),
        ({"image_sizes": torch.zeros(2, 2).long()}, "image_sizes must be torch.float32, got torch.int64"),
        ({"min_size": math.nan}, "min_size must be at least 0, got nan"),
        ({"iou_threshold": -0.1}, r"iou_threshold must lie in 0..1, got -0.1"),
        ({"pre_nms_top_n": 0}, "pre_nms_top_n must be an integer in 1.*, got 0"),
        ({"post_nms_top_n": 0}, "post_nms_top_n must be an integer in 1.*, got 0"),
    ],
)
def test_errors(device: torch.device, change: dict[str, Any], message: str) -> None:
    objectness, deltas = outputs()
    arguments = {"objectness": objectness, "deltas": deltas, "anchors": grid(), "image_sizes": SIZES}
    arguments.update({"level_sizes": LEVELS, "pre_nms_top_n": 5, "post_nms_top_n": 5})
    arguments = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in {**arguments, **change}.items()}
    with pytest.raises(ValueError, match=message):
        proposals(**arguments)


@pytest.mark.emulated
def test_errors_of_the_kernels_alone(emulator: Emulator) -> None:
    objectness, deltas = outputs()
    message = "objectness must be torch.float32, bfloat16 or float16 on a GPU, got torch.float64"
    with pytest.raises(ValueError, match=message):
        run(objectness.double(), deltas.double())
    with pytest.raises(ValueError, match=f"at most {MAX_LEVELS} levels with anchors on a GPU, got {MAX_LEVELS + 1}"):
        select(torch.zeros(1, MAX_LEVELS + 1), [1] * (MAX_LEVELS + 1), 1)


def select(objectness: Tensor, levels: list[int], most: int, capacity: int | None = None) -> Proposals:
    """Proposals that show the selection alone: the box of anchor i is a pixel whose corner tells i, none overlap."""
    images, count = objectness.shape
    index = torch.arange(count, device=objectness.device)
    corner = torch.stack((index % 128, index // 128), dim=1).float()
    return proposals(
        objectness,
        objectness.new_zeros(images, count, 4),
        torch.cat((corner, corner + 1), dim=1),
        torch.full((images, 2), 1e4, device=objectness.device),
        levels,
        pre_nms_top_n=most,
        post_nms_top_n=capacity or most * len(levels),
    )


def selected(objectness: Tensor, levels: list[int], most: int) -> list[list[int]]:
    """The anchors of each image by falling score, at equal score by index, the best of each level alone."""
    found = []
    for scores in objectness.tolist():
        chosen, start = [], 0
        for level in levels:
            finite = [index for index in range(start, start + level) if math.isfinite(scores[index])]
            chosen += sorted(finite, key=lambda index: -scores[index])[:most]
            start += level
        found.append(sorted(sorted(chosen), key=lambda index: -scores[index]))
    return found


def check_selection(result: Proposals, objectness: Tensor, levels: list[int], most: int) -> None:
    wanted = selected(objectness, levels, most)
    assert result.count.tolist() == [min(len(rows), result.scores.shape[1]) for rows in wanted]
    index = (result.boxes[..., 0] + 128 * result.boxes[..., 1]).long()
    for b, count in enumerate(result.count.tolist()):
        assert index[b, :count].tolist() == wanted[b][:count]
        assert result.scores[b, :count].tolist() == objectness[b, wanted[b][:count]].float().tolist()
        assert not result.boxes[b, count:].any()
        assert not result.scores[b, count:].any()


def normal(images: int, count: int) -> Tensor:
    return torch.randn(images, count, generator=torch.Generator().manual_seed(count))


def last_bits(images: int, count: int) -> Tensor:
    """Numbers that differ in their last 13 bits only, below zero in every other image."""
    steps = torch.randint(0, 1 << 13, (images, count), generator=torch.Generator().manual_seed(count))
    return (1 + steps * 2.0**-23) * torch.tensor([1.0, -1.0]).repeat(images)[:images, None]


def two_values(images: int, count: int) -> Tensor:
    return torch.where(normal(images, count) > 1, 0.5, -3.0)


def tiny(images: int, count: int) -> Tensor:
    """Numbers below the smallest normal one, zeros of both signs among them."""
    steps = torch.randint(-20, 20, (images, count), generator=torch.Generator().manual_seed(count))
    return steps * 2.0**-149 * torch.tensor([1.0, -1.0]).repeat(images)[:images, None]


def half_finite(images: int, count: int) -> Tensor:
    scores = normal(images, count)
    for remainder, value in ((0, math.nan), (1, math.inf), (2, -math.inf)):
        scores[:, remainder::6] = value
    return scores


@pytest.mark.parametrize("scores", [normal, last_bits, two_values, tiny, half_finite, torch.zeros])
@pytest.mark.parametrize("most", [1, 33, 2000])
def test_selects_from_levels_of_every_size(
    device: torch.device, scores: Callable[[int, int], Tensor], most: int
) -> None:
    levels = [1, 31, 32, 33, 63, 64, 65, 1000]
    objectness = scores(3, sum(levels)).to(device)
    check_selection(select(objectness, levels, most), objectness, levels, most)


@pytest.mark.parametrize("scores", [normal, two_values, last_bits])
@pytest.mark.parametrize(
    ("levels", "most"),
    [
        ([TILE - 1, TILE + 1], 100),
        ([TILE, 2 * TILE + 1], THREADS + 1),
        ([2 * TILE], RUN - 1),
        ([2 * TILE], RUN),
        ([2 * TILE], RUN + 1),
    ],
)
def test_selects_across_tiles(
    device: torch.device, scores: Callable[[int, int], Tensor], levels: list[int], most: int
) -> None:
    objectness = scores(1, sum(levels)).to(device)
    check_selection(select(objectness, levels, most), objectness, levels, most)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scores", [normal, two_values, half_finite])
def test_selects_among_the_ties_of_half_precision(
    device: torch.device, scores: Callable[[int, int], Tensor], dtype: torch.dtype
) -> None:
    levels = [TILE + 3, 700]
    objectness = scores(2, sum(levels)).to(device, dtype)
    check_selection(select(objectness, levels, 300), objectness, levels, 300)


@pytest.mark.parametrize("capacity", [1, THREADS - 1, THREADS, THREADS + 1, 3000])
def test_merges_into_any_capacity(device: torch.device, capacity: int) -> None:
    levels = [900, 0, 600]
    objectness = two_values(2, 1500).to(device)
    check_selection(select(objectness, levels, 800, capacity), objectness, levels, 800)


def test_one_level_of_twelve_thousand(device: torch.device) -> None:
    objectness = (normal(1, 13000) * 64).round().to(device) / 64
    result = select(objectness, [13000], 12000, 12000)
    check_selection(result, objectness, [13000], 12000)


@pytest.mark.emulated
def test_any_order_of_threads_gives_the_same(emulator: Emulator) -> None:
    objectness, deltas = outputs(seed=8, kinds=2)
    first = run(objectness, deltas)
    tied = two_values(1, TILE + 600)
    chosen = select(tied, [TILE + 100, 500], 700)
    for seed in range(1, 21):
        with emulator.order(seed):
            again, anew = run(objectness, deltas), select(tied, [TILE + 100, 500], 700)
        for a, b in ((first, again), (chosen, anew)):
            assert all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_strided_inputs_are_read_and_left_alone(device: torch.device) -> None:
    objectness, deltas = outputs(device)
    wanted = run(objectness, deltas)
    given = [
        objectness.T.contiguous().T,
        deltas.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.cat((grid(device), grid(device)), dim=1)[:, :4],
        SIZES.to(device).T.contiguous().T,
    ]
    before = [part.clone() for part in given]
    result = proposals(*given, LEVELS, pre_nms_top_n=50, post_nms_top_n=40, min_size=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(vars(result).values(), vars(wanted).values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
