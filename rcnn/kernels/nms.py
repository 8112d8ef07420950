"""Non-maximum suppression: one problem, one problem per class, and many padded problems at once.

A problem is a list of boxes by falling score. The first box is kept and strikes every later box whose IoU with it
is greater than the threshold; the next box that stands is kept, and so on. The CPU body solves a chunk of boxes by
iterating ``keep = ~any(keep & suppresses)`` to its fixed point, which is the greedy answer because a box can only be
struck by an earlier one, strikes the remaining boxes by the kept ones, and goes on with those that still stand. The
CUDA body does the same with the words of a warp's ballots: see ``nms.cu``.
"""

import math

import numpy as np
import torch
from torch import Tensor

from rcnn.kernels import _launch
from rcnn.kernels.checks import check_floating, check_real, check_tensors, check_whole

#: Boxes of one problem that are settled together.
CHUNK = 128
#: Most boxes of a problem that is settled at once, together with others.
WHOLE = 512
#: Problems of so many boxes at most are settled together, whatever their size.
TINY = 16
#: Pairs compared at once over several problems: 1 MB of float32 per temporary, which stays in the cache.
PAIRS = 1 << 18
#: Boxes of one problem that a block of a kernel holds in shared memory, 20 bytes for each.
KERNEL_CHUNK = 2048
#: Most boxes of a problem that gets one warp.
SMALL = 128
#: Most threads of a block.
THREADS = 512
#: Blocks, and warps, that keep a large GPU busy: problems are cut into slices, or get fewer warps, to make so many.
BLOCKS, WARPS = 128, 4096

SOURCE = _launch.CudaSource("nms", CHUNK=KERNEL_CHUNK, GROUP=64, SMALL=SMALL, THREADS=THREADS)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Keep the boxes that no better kept box overlaps by more than a threshold.

    A kept box suppresses a later one where ``inter / ((area1 + area2) - inter) > iou_threshold``, both sides float32
    (both float64 for float64 boxes). At equal scores the lower index comes first. Boxes without area neither
    suppress nor are suppressed. A box with a NaN or infinite coordinate is never kept and suppresses nothing.

    Args:
        boxes: ``(N, 4)`` float, x1, y1, x2, y2 in pixels.
        scores: ``(N,)`` float, one score per box.
        iou_threshold: 0..1.

    Returns:
        ``(n,)`` int64, indices of the kept boxes by falling score.

    Raises:
        TypeError: an argument is not a tensor, or not a number, where one is needed.
        ValueError: a shape, dtype, device or threshold is wrong.

    Source:
        ``torchvision.ops.nms``; its CPU kernel compares with the threshold in double precision, which differs only
        for an IoU that equals the threshold rounded to float32.
    """
    _check(boxes, scores, iou_threshold)
    if _launch.uses_kernels(boxes):
        return _nms_cuda(boxes.detach(), scores.detach(), iou_threshold)
    return _nms_cpu(boxes.detach(), scores.detach(), None, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """:func:`nms` for each class on its own: boxes of different classes never suppress each other.

    Args:
        boxes: ``(N, 4)`` float, x1, y1, x2, y2 in pixels.
        scores: ``(N,)`` float, one score per box.
        idxs: ``(N,)`` integer, class (or level, or image) of each box.
        iou_threshold: 0..1.

    Returns:
        ``(n,)`` int64, indices of the kept boxes of all classes by falling score, at equal scores by index.

    Raises:
        TypeError: an argument is not a tensor, or not a number, where one is needed.
        ValueError: a shape, dtype, device or threshold is wrong.

    Source:
        The per-class loop of ``torchvision.ops.batched_nms``. No coordinate is shifted, so none loses precision.
    """
    _check(boxes, scores, iou_threshold)
    check_tensors({"boxes": boxes, "idxs": idxs})
    if idxs.shape != scores.shape:
        raise ValueError(f"idxs must have shape ({len(boxes)},), got {tuple(idxs.shape)}")
    if idxs.is_floating_point() or idxs.is_complex():
        raise ValueError(f"idxs must have an integer dtype, got {idxs.dtype}")
    if _launch.uses_kernels(boxes):
        return _batched_cuda(boxes.detach(), scores.detach(), idxs, iou_threshold)
    return _nms_cpu(boxes.detach(), scores.detach(), idxs, iou_threshold)


def nms_padded(boxes: Tensor, count: Tensor, iou_threshold: float, max_output: int) -> tuple[Tensor, Tensor]:
    """:func:`nms` of many independent problems whose boxes already lie by falling score.

    Args:
        boxes: ``(Q, M, 4)`` float, x1, y1, x2, y2 in pixels; problem q owns the first ``count[q]`` rows.
        count: ``(Q,)`` int64, rows in use, 0..M.
        iou_threshold: 0..1.
        max_output: rows of the output; only the first ``max_output`` kept boxes of a problem are reported.

    Returns:
        ``(Q, max_output)`` int64, rows of the kept boxes in rising order, 0 in padding, and ``(Q,)`` int64, how many
        of them are in use.

    Raises:
        TypeError: an argument is not a tensor, or not a number, where one is needed.
        ValueError: a shape, dtype, device, threshold or capacity is wrong.
    """
    check_tensors({"boxes": boxes, "count": count})
    if boxes.dim() != 3 or boxes.shape[2] != 4:
        raise ValueError(f"boxes must have shape (Q, M, 4), got {tuple(boxes.shape)}")
    if count.shape != boxes.shape[:1]:
        raise ValueError(f"count must have shape ({boxes.shape[0]},), got {tuple(count.shape)}")
    if count.dtype != torch.int64:
        raise ValueError(f"count must be torch.int64, got {count.dtype}")
    check_whole("max_output", max_output, 0)
    _check_boxes(boxes, iou_threshold)
    body = _nms_padded_cuda if _launch.uses_kernels(boxes) else _nms_padded_cpu
    return body(boxes.detach(), count, iou_threshold, max_output)


def _check(boxes: Tensor, scores: Tensor, iou_threshold: float) -> None:
    check_tensors({"boxes": boxes, "scores": scores})
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must have shape (N, 4), got {tuple(boxes.shape)}")
    if scores.shape != boxes.shape[:1]:
        raise ValueError(f"scores must have shape ({boxes.shape[0]},), got {tuple(scores.shape)}")
    check_floating("scores", scores, torch.float64)
    _check_boxes(boxes, iou_threshold)


def _check_boxes(boxes: Tensor, iou_threshold: float) -> None:
    check_floating("boxes", boxes, torch.float64)
    check_real("iou_threshold", iou_threshold, 0, 1)


def _nms_cpu(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    order = torch.sort(scores, descending=True, stable=True).indices
    order = order[torch.isfinite(boxes[order]).all(dim=1)]
    if idxs is None:
        table = _table(boxes[order])
        return order[_greedy(table, iou_threshold, len(order))]
    problem, by_problem = idxs[order].sort(stable=True)
    kept = thin(boxes[order[by_problem]], problem, iou_threshold, len(order))
    return order[by_problem[kept].sort().values]


def thin(boxes: Tensor, problem: Tensor, iou_threshold: float, max_output: int) -> Tensor:
    """Rows that NMS keeps within their problem, in no order: what the CPU bodies of other ops use.

    Args:
        boxes: ``(N, 4)`` finite float, problem after problem, those of a problem by falling score.
        problem: ``(N,)`` integer, which problem a box belongs to.
        iou_threshold: 0..1.
        max_output: at least so many kept boxes of a problem are given, if it has them.
    """
    _check_boxes(boxes, iou_threshold)
    counts = torch.unique_consecutive(problem, return_counts=True)[1]
    starts = torch.cumsum(counts, dim=0) - counts
    return _solve(_table(boxes), starts, counts, iou_threshold, max_output)


def _nms_padded_cpu(boxes: Tensor, count: Tensor, iou_threshold: float, max_output: int) -> tuple[Tensor, Tensor]:
    problems, rows = boxes.shape[:2]
    keep = count.new_zeros((problems, max_output))
    kept_count = torch.zeros_like(count)
    if not problems or not rows or not max_output:
        return keep, kept_count
    used = torch.arange(rows, device=boxes.device) < count[:, None]
    used &= torch.isfinite(boxes).all(dim=2)
    source = used.flatten().nonzero().squeeze(1)
    counts = used.sum(dim=1)
    starts = torch.cumsum(counts, dim=0) - counts
    kept = _solve(_table(boxes.flatten(0, 1)[source]), starts, counts, iou_threshold, max_output)
    kept = source[kept.sort().values]
    problem = torch.div(kept, rows, rounding_mode="floor")
    total = torch.bincount(problem, minlength=problems)
    rank = torch.arange(len(kept), device=boxes.device) - (torch.cumsum(total, dim=0) - total)[problem]
    first = rank < max_output
    keep[problem[first], rank[first]] = (kept - problem * rows)[first]
    return keep, total.clamp(max=max_output)


def _table(boxes: Tensor) -> Tensor:
    """``(5, N)`` rows x1, y1, x2, y2, area, of float32 (or float64); a box that cannot overlap any becomes a point.

    A box whose area is not positive and finite has an IoU of 0 or NaN with every box, so it gets an area of 1 at the
    origin and the comparison below needs no care for a union of zero.
    """
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    x1, y1, x2, y2 = boxes.unbind(1)
    area = (x2 - x1) * (y2 - y1)
    solid = (area > 0) & (area < math.inf)
    table = torch.where(solid, torch.stack((x1, y1, x2, y2, area)), 0)
    table[4] += (~solid).to(table.dtype)
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
        head, table = table[:, :CHUNK], table[:, CHUNK:]
        alive = head.new_ones(1, head.shape[1])
        kept = _settle(_later(head, iou_threshold)[None], alive)[0]
        parts.append(index[:CHUNK][kept])
        found += len(parts[-1])
        index = index[CHUNK:]
        if len(index):
            stands = (_overlaps(head[:, kept], table, iou_threshold).sum(dim=0) == 0).nonzero().squeeze(1)
            table, index = table.index_select(1, stands), index[stands]
    return torch.cat(parts) if parts else index


def _solve(table: Tensor, starts: Tensor, counts: Tensor, iou_threshold: float, max_output: int) -> Tensor:
    """Kept columns, in no order, of problems that own ``counts`` columns of the table from ``starts`` on.

    Problems of at most ``WHOLE`` boxes are settled many at once, those of similar size together; a larger one takes
    the way of :func:`_greedy` on its own. At least the first ``max_output`` kept columns of a problem are given.
    """
    sizes, order = torch.sort(counts, stable=True)
    starts = starts[order]
    parts: list[Tensor] = []
    first, size_list = 0, sizes.tolist()
    while first < len(size_list):
        size = size_list[first]
        last = first + 1
        if size > WHOLE:
            start = int(starts[first])
            parts.append(start + _greedy(table[:, start : start + size], iou_threshold, max_output))
        elif size:
            # Those of about the same size, or small, whose pairs stay in the cache.
            while last < len(size_list) and size_list[last] <= min(max(2 * size, TINY), WHOLE):
                if (last + 1 - first) * size_list[last] ** 2 > PAIRS:
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


def _nms_cuda(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    order = _by_score(scores)
    count = torch.full((1,), len(order), dtype=torch.int64, device=order.device)
    kept, found = _nms_padded_cuda(boxes[order][None], count, iou_threshold, len(order))
    return order[kept[0, : int(found)]]


def _batched_cuda(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Every class a range of one list that is sorted by class, then by score; short ranges get a warp each."""
    order = _by_score(scores)
    group, by_group = torch.sort(idxs[order].to(torch.int64), stable=True)
    rows = len(order)
    table = _float32(boxes[order[by_group]])
    ranges = torch.empty((3, rows, 2), dtype=torch.int32, device=boxes.device)
    slots = torch.zeros(3, dtype=torch.int32, device=boxes.device)
    _launch.launch(SOURCE, "nms_ranges", -(-rows // THREADS), THREADS, (group, np.int32(rows), ranges, slots))
    kept = torch.full_like(order, -1)
    # A list has as many places as there could be ranges of its size.
    for which, (least, longest) in enumerate(((1, SMALL), (SMALL + 1, KERNEL_CHUNK), (KERNEL_CHUNK + 1, rows))):
        inputs = (table, ranges[which], slots[which])
        _solve_cuda("nms_batched", inputs, rows // least, min(longest, rows), iou_threshold, kept)
    return order[by_group[kept[kept >= 0]].sort().values]


def _nms_padded_cuda(boxes: Tensor, count: Tensor, iou_threshold: float, max_output: int) -> tuple[Tensor, Tensor]:
    problems, rows = boxes.shape[:2]
    kept = count.new_zeros((problems, max_output))
    if not rows or not max_output:
        return kept, torch.zeros_like(count)
    inputs = (_float32(boxes), _launch.dense(count), np.int32(rows), np.int32(max_output))
    return kept, _solve_cuda("nms_padded", inputs, problems, rows, iou_threshold, kept)


def _solve_cuda(
    kernel: str,
    inputs: tuple[Tensor | np.int32, ...],
    problems: int,
    rows: int,
    iou_threshold: float,
    kept: Tensor,
) -> Tensor:
    """One launch per chunk of the longest possible problem; gives how many boxes each problem keeps."""
    found = kept.new_empty(problems)
    standing = arrived = None
    if rows > KERNEL_CHUNK:
        standing = torch.full((problems, KERNEL_CHUNK // 32), -1, dtype=torch.int32, device=kept.device)
        arrived = torch.zeros(problems, dtype=torch.int32, device=kept.device)
    capacity = min(rows, KERNEL_CHUNK)
    warps = 1 if capacity <= SMALL else max(2, min(THREADS // 32, capacity // 32, WARPS // max(1, problems)))
    for first in range(0, rows, KERNEL_CHUNK):
        numbers = (np.int32(first), np.int32(capacity), np.float32(iou_threshold))
        slices = max(1, BLOCKS // max(1, problems)) if first else 1
        arguments = (*inputs, *numbers, kept, found, standing, arrived)
        _launch.launch(SOURCE, kernel, (problems, slices), 32 * warps, arguments, shared=20 * capacity)
    return found


def _by_score(scores: Tensor) -> Tensor:
    """Order by falling score; a sum makes one value of 0 and -0, and one of all NaN, which a radix sort tells apart."""
    return torch.sort(scores + 0.0, descending=True, stable=True).indices


def _float32(boxes: Tensor) -> Tensor:
    if boxes.dtype == torch.float64:
        raise ValueError("boxes must be float32, bfloat16 or float16 on a GPU, got torch.float64")
    return _launch.dense(boxes.float())
