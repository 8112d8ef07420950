"""The CPU body of NMS: pairs of boxes compared many at once, and the same for other ops that thin their boxes.

A chunk of boxes is solved by iterating ``keep = ~any(keep & suppresses)`` to its fixed point, which is the greedy
answer because a box can only be struck by an earlier one.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

#: Boxes of one problem that are settled together.
_CHUNK = 128
#: Most boxes of a problem that is settled at once, together with others.
_WHOLE = 512
#: Problems of so many boxes at most are settled together, whatever their size.
_TINY = 16
#: Pairs compared at once over several problems: 1 MB of float32 per temporary, which stays in the cache.
_PAIRS = 1 << 18
#: Behind all problems.
_LAST = 2**63 - 1


def nms_cpu(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    """:func:`rcnn.kernels.nms`, or with ``idxs`` :func:`rcnn.kernels.batched_nms`, without the checks."""
    order = torch.sort(scores, descending=True, stable=True).indices
    order = order[torch.isfinite(boxes[order]).all(dim=1)]
    if idxs is None:
        table = _table(boxes[order])
        return order[_greedy(table, iou_threshold, len(order))]
    problem, by_problem = idxs[order].sort(stable=True)
    counts = torch.unique_consecutive(problem, return_counts=True)[1]
    table = _table(boxes[order[by_problem]])
    kept = _solve(table, counts, iou_threshold, len(order))
    return order[by_problem[kept].sort().values]


def best_kept(
    decode: Callable[[Tensor], tuple[Tensor, Tensor]],
    problem: Tensor,
    image: Tensor,
    images: int,
    iou_threshold: float,
    max_output: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best candidates of each image that NMS keeps within their problem: what the CPU bodies of other ops use.

    Args:
        decode: gives the boxes ``(n, 4)`` of candidates ``(n,)``, and ``(n,)`` bool, which of them to use; those are
            finite. Only better candidates decide whether one is kept: where an image has more than 4 * D, the best
            2 * D are decoded and thinned first, and the others if those leave too few.
        problem: ``(N,)`` int64, from 0 on, which problem of NMS a candidate belongs to; an image has problems of its
            own.
        image: ``(N,)`` int64, image of each candidate. Those of an image lie together, by falling score.
        images: how many images, B.
        iou_threshold: 0..1.
        max_output: most candidates of an image, D.

    Returns:
        ``(n,)`` int64, the kept candidates in rising order; ``(n, 4)``, their boxes; ``(n,)`` int64, their rows where
        each image has D; ``(B,)`` int64, how many an image has.
    """

    def thin(chosen: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        boxes, usable = decode(chosen)
        group, order = torch.where(usable, problem.index_select(0, chosen), _LAST).sort(stable=True)
        number = int(usable.sum())
        order, counts = order[:number], torch.bincount(group[:number])
        kept = _solve(_table(boxes.index_select(0, order)), counts, iou_threshold, max_output)
        kept = order.index_select(0, kept).sort().values
        chosen, boxes = chosen.index_select(0, kept), boxes.index_select(0, kept)
        return chosen, boxes, torch.bincount(image.index_select(0, chosen), minlength=images).tolist()

    total = torch.bincount(image, minlength=images).tolist()
    best = [2 * max_output if size > 4 * max_output else size for size in total]
    starts = _starts(total)
    kept, boxes, found = thin(_ranges(starts, best))
    rest = [t - b if f < max_output else 0 for t, b, f in zip(total, best, found, strict=True)]
    if any(rest):
        # What has been struck strikes nothing, so that no more than the others are looked at again.
        others = _ranges([start + b for start, b in zip(starts, best, strict=True)], rest)
        kept, boxes, found = thin(torch.cat((kept, others)).sort().values)
    count = [min(n, max_output) for n in found]
    first = _ranges(_starts(found), count)
    place = _ranges([i * max_output for i in range(images)], count)
    return kept.index_select(0, first), boxes.index_select(0, first), place, torch.tensor(count, dtype=torch.int64)


def _starts(sizes: list[int]) -> list[int]:
    return list(itertools.accumulate(sizes, initial=0))[:-1]


def _ranges(starts: list[int], sizes: list[int]) -> Tensor:
    """``start..start + size`` of each, one after the other, int64."""
    ranges = (torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True))
    return torch.cat([torch.arange(0), *ranges])


def lay_out(x: Tensor, place: Tensor, images: int, rows: int) -> Tensor:
    """``(images, rows, ...)``: rows ``(n, ...)`` of what :func:`best_kept` gives, in their places, 0 elsewhere."""
    laid = x.new_zeros(images * rows, *x.shape[1:]).index_copy_(0, place, x)
    return laid.view(images, rows, *x.shape[1:])


def nms_padded_cpu(boxes: Tensor, count: Tensor, iou_threshold: float, max_output: int) -> tuple[Tensor, Tensor]:
    """:func:`rcnn.kernels.nms_padded` without its checks."""
    problems, rows = boxes.shape[:2]
    keep = count.new_zeros((problems, max_output))
    kept_count = torch.zeros_like(count)
    if not problems or not rows or not max_output:
        return keep, kept_count
    used = torch.arange(rows, device=boxes.device) < count[:, None]
    used &= torch.isfinite(boxes).all(dim=2)
    source = used.flatten().nonzero().squeeze(1)
    counts = used.sum(dim=1)
    kept = _solve(_table(boxes.flatten(0, 1)[source]), counts, iou_threshold, max_output)
    kept = source[kept.sort().values]
    problem = torch.div(kept, rows, rounding_mode="floor")
    total = torch.bincount(problem, minlength=problems)
    rank = torch.arange(len(kept), device=boxes.device) - (total.cumsum(0) - total)[problem]
    first = rank < max_output
    keep[problem[first], rank[first]] = (kept - problem * rows)[first]
    return keep, total.clamp(max=max_output)


def _table(boxes: Tensor) -> Tensor:
    """``(5, N)`` rows x1, y1, x2, y2, area, of float32 (or float64).

    A box whose area is not positive and finite, which has an IoU of 0 or NaN with every box, becomes a point without
    area at the origin: 0 with all boxes but its like, and NaN, which is greater than nothing, with those.
    """
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    x1, y1, x2, y2 = boxes.unbind(1)
    area = (x2 - x1) * (y2 - y1)
    table = torch.stack((x1, y1, x2, y2, area))
    solid = (area > 0) & (area < math.inf)
    if not solid.all():
        table.masked_fill_(~solid, 0)
    return table


def _overlaps(left: Tensor, right: Tensor, iou_threshold: float | Tensor) -> Tensor:
    """``(..., I, J)``: 1 where the IoU of columns of two tables ``(5, ..., I)`` and ``(5, ..., J)`` exceeds the
    threshold, else 0, in the tables' dtype, which takes a fraction of the time that bool does.

    The same operations as ``boxes.iou``; where both extents are negative only one needs to be clamped, because then
    the product is not positive.
    """
    left, right = left.unsqueeze(-1), right.unsqueeze(-2)
    inter = torch.minimum(left[2], right[2]).sub_(torch.maximum(left[0], right[0])).clamp_(min=0)
    inter.mul_(torch.minimum(left[3], right[3]).sub_(torch.maximum(left[1], right[1])))
    union = (left[4] + right[4]).sub_(inter)
    return inter.div_(union).gt_(iou_threshold)


def _later(table: Tensor, iou_threshold: float) -> Tensor:
    """``(..., I, I)``: :func:`_overlaps` of a table with itself, 1 only where a column strikes a later one."""
    columns = table.shape[-1]
    limits = table.new_full((columns, columns), math.inf).tril_().clamp_(min=iou_threshold)
    return _overlaps(table, table, limits)


def _settle(suppresses: Tensor, alive: Tensor) -> Tensor:
    """Greedy answer of chunks, ``(G, I)`` bool; ``suppresses (G, I, I)`` is strictly upper triangular, ``alive (G, I)``
    of its dtype, both 0 or 1."""
    alive = keep = alive.unsqueeze(1)
    while True:
        # How many of the kept strike each box: a sum of ones is not 0, however it is rounded.
        settled = torch.bmm(keep, suppresses).eq_(0).mul_(alive)
        if torch.equal(settled, keep):
            return keep.squeeze(1) > 0
        keep = settled


def _greedy(table: Tensor, iou_threshold: float, max_output: int) -> Tensor:
    """Kept columns, in order, of one problem given as a table by falling score."""
    index = torch.arange(table.shape[1], device=table.device)
    parts: list[Tensor] = []
    found = 0
    while len(index) and found < max_output:
        head, table = table[:, :_CHUNK], table[:, _CHUNK:]
        alive = head.new_ones(1, head.shape[1])
        kept = _settle(_later(head, iou_threshold)[None], alive)[0]
        parts.append(index[:_CHUNK][kept])
        found += len(parts[-1])
        index = index[_CHUNK:]
        if len(index):
            stands = (_overlaps(head[:, kept], table, iou_threshold).sum(dim=0) == 0).nonzero().squeeze(1)
            table, index = table.index_select(1, stands), index[stands]
    return torch.cat(parts) if parts else index


def _solve(table: Tensor, counts: Tensor, iou_threshold: float, max_output: int) -> Tensor:
    """Kept columns, in no order, of problems that own ``counts`` columns of the table, one after the other.

    Problems of at most ``_WHOLE`` boxes are settled many at once, those of similar size together; a larger one takes
    the way of :func:`_greedy` on its own. At least the first ``max_output`` kept columns of a problem are given.
    """
    sizes, order = torch.sort(counts, stable=True)
    starts = (counts.cumsum(0) - counts).index_select(0, order)
    parts: list[Tensor] = []
    first, size_list = 0, sizes.tolist()
    while first < len(size_list):
        size = size_list[first]
        last = first + 1
        if size > _WHOLE:
            start = int(starts[first])
            parts.append(start + _greedy(table[:, start : start + size], iou_threshold, max_output))
        elif size:
            # Those of about the same size, or small, whose pairs stay in the cache.
            while last < len(size_list) and size_list[last] <= min(max(2 * size, _TINY), _WHOLE):
                if (last + 1 - first) * size_list[last] ** 2 > _PAIRS:
                    break
                last += 1
            width = size_list[last - 1]
            offset = torch.arange(width, device=table.device)
            alive = offset < sizes[first:last, None]
            column = starts[first:last, None] + torch.where(alive, offset, 0)
            group = table.index_select(1, column.flatten()).view(-1, *column.shape)
            parts.append(column[_settle(_later(group, iou_threshold), alive.to(table.dtype))])
        first = last
    return torch.cat(parts) if parts else starts[:0]
