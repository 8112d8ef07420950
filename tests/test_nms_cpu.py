"""What the CPU body of NMS does for other ops: the best of each image, from as few candidates as decide it."""

import pytest
import reference
import torch
from torch import Tensor

from rcnn import boxes as geometry
from rcnn.kernels.nms_cpu import _overlaps, _table, best_kept, lay_out


def test_iou_is_that_of_boxes_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(200, 2, generator=generator) * 300
    boxes = torch.cat((corner, corner + torch.rand(200, 2, generator=generator) * 200), dim=1)
    iou = geometry.iou(boxes[:, None], boxes[None])
    table = _table(boxes)
    for threshold in iou[iou > 0][::1009].tolist():
        assert torch.equal(_overlaps(table, table, threshold), iou > threshold)


def greedy(boxes: Tensor, usable: Tensor, problem: Tensor, rows: list[int], most: int) -> list[int]:
    """The first rows of one image that the oracle keeps in any of its problems."""
    found: list[int] = []
    for which in set(problem[rows].tolist()):
        own = [row for row in rows if problem[row] == which and usable[row]]
        found += [own[place] for place in reference.thin(boxes[own].tolist(), 0.4)]
    return sorted(found)[:most]


@pytest.mark.parametrize("most", [1, 3, 10, 200])
def test_the_best_of_each_image(most: int) -> None:
    # Few boxes of the second image are kept, the third has none of use, the fourth none.
    sizes, side = [300, 150, 90, 0, 40], torch.tensor([400.0, 12.0, 50.0, 50.0, 400.0])
    image = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes))
    generator = torch.Generator().manual_seed(most)
    corner = (torch.rand(len(image), 2, generator=generator) * side[image, None]).round()
    boxes = torch.cat((corner, corner + 30), dim=1)
    problem = image * 3 + torch.randint(0, 3, image.shape, generator=generator)
    usable = (torch.rand(image.shape, generator=generator) < 0.8) & (image != 2)
    boxes[~usable] = torch.nan
    asked = []

    def decode(chosen: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(torch.bincount(image[chosen], minlength=5).tolist())
        return boxes[chosen], usable[chosen]

    kept, found, place, count = best_kept(decode, problem, image, 5, 0.4, most)

    rows_of = [(image == i).nonzero().flatten().tolist() for i in range(5)]
    expected = [greedy(boxes, usable, problem, rows, most) for rows in rows_of]
    assert kept.tolist() == sum(expected, [])
    assert torch.equal(found, boxes[kept])
    assert count.tolist() == [len(rows) for rows in expected]
    assert place.tolist() == [i * most + slot for i, rows in enumerate(expected) for slot in range(len(rows))]
    # Of more than four times as many as can be reported the best, twice as many; then, where these leave too few of an
    # image, what they leave and all others.
    best = [rows[: 2 * most] if len(rows) > 4 * most else rows for rows in rows_of]
    assert asked[0] == [len(rows) for rows in best]
    left = [len(greedy(boxes, usable, problem, rows, len(rows))) for rows in best]
    rest = [(n < most) * (len(rows) - len(some)) for n, rows, some in zip(left, rows_of, best, strict=True)]
    assert asked[1:] == ([[n + more for n, more in zip(left, rest, strict=True)]] if any(rest) else [])
    assert any(rest) == (most < 200)


@pytest.mark.parametrize("count", [1, 12, 13])
def test_the_last_candidate_counts(count: int) -> None:
    """It alone is of use; up to four times as many as can be reported are looked at together."""
    usable = torch.arange(count) == count - 1
    boxes = torch.tensor([[0.0, 0, 5, 5]]).expand(count, 4)
    zeros = torch.zeros(count, dtype=torch.int64)
    asked = []

    def decode(chosen: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(chosen.tolist())
        return boxes[chosen], usable[chosen]

    kept, _, place, found = best_kept(decode, zeros, zeros, 1, 0.5, 3)
    assert (kept.tolist(), place.tolist(), found.tolist()) == ([count - 1], [0], [1])
    assert asked == ([list(range(count))] if count < 13 else [list(range(6)), list(range(6, 13))])


def test_no_candidates() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    kept, found, place, count = best_kept(lambda _: (torch.zeros(0, 4), none > 0), none, none, 2, 0.5, 3)
    assert len(kept) == len(found) == len(place) == 0
    assert count.tolist() == [0, 0]
    assert lay_out(found, place, 2, 3).tolist() == torch.zeros(2, 3, 4).tolist()


def test_rows_lie_in_their_places() -> None:
    laid = lay_out(torch.tensor([5, 6, 7]), torch.tensor([0, 1, 4]), 2, 3)
    assert laid.tolist() == [[5, 6, 0], [0, 7, 0]]
