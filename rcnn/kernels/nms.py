"""Non-maximum suppression: one problem, one problem per class, and many padded problems at once.

A problem is a list of boxes by falling score. The first box is kept and strikes every later box whose IoU with it
is greater than the threshold; the next box that stands is kept, and so on. The bodies settle a chunk of boxes at once,
strike the remaining ones by those that are kept, and go on with what still stands: see ``nms_cpu.py`` and ``nms.cu``.
"""

import numpy as np
import torch
from torch import Tensor

from rcnn.kernels import _launch
from rcnn.kernels.checks import check_floating, check_real, check_tensors, check_whole
from rcnn.kernels.nms_cpu import nms_cpu, nms_padded_cpu

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
    return nms_cpu(boxes.detach(), scores.detach(), None, iou_threshold)


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
    return nms_cpu(boxes.detach(), scores.detach(), idxs, iou_threshold)


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
    body = _nms_padded_cuda if _launch.uses_kernels(boxes) else nms_padded_cpu
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
