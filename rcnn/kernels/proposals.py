"""Proposals: the best boxes of the region proposal network, decoded, clipped, filtered and thinned per level."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rcnn import boxes as box
from rcnn.kernels import _launch
from rcnn.kernels.checks import check_floating, check_real, check_sequence, check_tensors, check_whole
from rcnn.kernels.nms import nms_padded
from rcnn.kernels.nms_cpu import best_kept, lay_out
from rcnn.kernels.sorting import sort_rows
from rcnn.structures import Proposals

#: Threads of a block, and anchors of one level that a block looks at.
THREADS, TILE = 512, 4096
#: Levels that the kernels take, whose ends are arguments: a table in memory would have to be sent to the device.
LEVELS = 8
#: A float32 key has three digits of 11 bits; 16-bit types are settled by two of 10. The last has 1,024 values.
DIGITS = {torch.float32: (3, 2048), torch.bfloat16: (2, 1024), torch.float16: (2, 1024)}
LAST_BINS = 1024
SOURCE = _launch.CudaSource("proposals", dtypes=tuple(DIGITS), THREADS=THREADS, TILE=TILE, LEVELS=LEVELS)


@torch.no_grad()
def proposals(
    objectness: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    image_sizes: Tensor,
    level_sizes: Sequence[int],
    *,
    pre_nms_top_n: int,
    post_nms_top_n: int,
    iou_threshold: float = 0.7,
    min_size: float = 1e-3,
) -> Proposals:
    """Turn the outputs of the region proposal network into proposals.

    On each level the ``pre_nms_top_n`` anchors of highest objectness are decoded, clipped to their image, dropped when
    a side is shorter than ``min_size``, and thinned by NMS; the levels are then merged by falling objectness, of which
    ``post_nms_top_n`` remain. At equal objectness the lower anchor index comes first, everywhere. An anchor whose
    objectness is NaN or infinite is never selected; a box that decodes to NaN or infinity is dropped.
    Arithmetic is float32. Nothing here has a gradient.

    Args:
        objectness: ``(B, N)`` float32, bfloat16 or float16, logits.
        deltas: ``(B, N, 4)`` of the same types, dx, dy, dw, dh.
        anchors: ``(N, 4)`` float32, pixels, levels one after another.
        image_sizes: ``(B, 2)`` float32, height and width of each image, pixels.
        level_sizes: anchors of each level; they add up to N.
        pre_nms_top_n: anchors kept per level and image before NMS.
        post_nms_top_n: proposals kept per image, the capacity P.
        iou_threshold: a box that overlaps a better one of its level by more than this is dropped.
        min_size: shortest side of a proposal, pixels.

    Returns:
        Proposals with P = ``post_nms_top_n`` rows per image; scores are logits.

    Raises:
        TypeError: an argument is not a tensor, or not a number, where one is needed.
        ValueError: an argument has another shape or dtype, a capacity is less than 1, or ``min_size`` is negative.

    Source:
        Ren et al., Faster R-CNN (2015), section 3.3; torchvision, ``RegionProposalNetwork.filter_proposals``, which
        leaves ties unordered and offsets coordinates to separate the levels.
    """
    images, count = _check(objectness, deltas, anchors, image_sizes, level_sizes)
    check_whole("pre_nms_top_n", pre_nms_top_n, 1)
    check_whole("post_nms_top_n", post_nms_top_n, 1)
    check_real("iou_threshold", iou_threshold, 0, 1)
    check_real("min_size", min_size, 0)
    if count == 0 or images == 0:
        return Proposals(
            boxes=anchors.new_zeros(images, post_nms_top_n, 4),
            scores=anchors.new_zeros(images, post_nms_top_n),
            count=torch.zeros(images, dtype=torch.int64, device=anchors.device),
        )
    body = _cuda if _launch.uses_kernels(objectness) else _cpu
    return body(
        objectness, deltas, anchors, image_sizes, level_sizes, pre_nms_top_n, post_nms_top_n, iou_threshold, min_size
    )


def _check(
    objectness: Tensor, deltas: Tensor, anchors: Tensor, image_sizes: Tensor, level_sizes: Sequence[int]
) -> tuple[int, int]:
    check_tensors({"objectness": objectness, "deltas": deltas, "anchors": anchors, "image_sizes": image_sizes})
    if objectness.dim() != 2:
        raise ValueError(f"objectness must have shape (B, N), got {tuple(objectness.shape)}")
    images, count = objectness.shape
    expected = (
        ("deltas", deltas, (images, count, 4)),
        ("anchors", anchors, (count, 4)),
        ("image_sizes", image_sizes, (images, 2)),
    )
    for name, tensor, shape in expected:
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    check_floating("objectness", objectness, torch.float64)
    if deltas.dtype != objectness.dtype:
        raise ValueError(f"deltas must have the dtype of objectness, {objectness.dtype}, got {deltas.dtype}")
    for name, tensor in (("anchors", anchors), ("image_sizes", image_sizes)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be torch.float32, got {tensor.dtype}")
    check_sequence("level_sizes", level_sizes)
    for level, size in enumerate(level_sizes):
        check_whole(f"level_sizes[{level}]", size, 0)
    if sum(level_sizes) != count:
        raise ValueError(f"level_sizes must add up to {count} anchors, got {tuple(level_sizes)}")
    return images, count


def _cpu(
    objectness: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    image_sizes: Tensor,
    level_sizes: Sequence[int],
    pre_nms_top_n: int,
    post_nms_top_n: int,
    iou_threshold: float,
    min_size: float,
) -> Proposals:
    images = objectness.shape[0]
    selected = _select(objectness, level_sizes, pre_nms_top_n)
    levels, width = len(selected), max(index.shape[1] for index in selected)
    # (B, L, M), each level padded by -1.
    index = torch.stack([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=-1) for part in selected], 1)
    index = index.reshape(images, -1)
    scores = objectness.gather(1, index.clamp(min=0)).to(torch.float32)
    usable = (index >= 0) & scores.isfinite()
    # By falling score; what is dropped comes last. The levels stand in the order of the anchors, so do equal scores.
    order = torch.where(usable, scores, -math.inf).sort(dim=1, descending=True, stable=True).indices
    used = torch.arange(levels * width, device=order.device) < usable.sum(dim=1, keepdim=True)
    source = (order + torch.arange(images, device=order.device)[:, None] * (levels * width))[used]
    image, problem = (torch.div(source, rows, rounding_mode="floor") for rows in (levels * width, width))
    index, scores = index.flatten().index_select(0, source), scores.flatten().index_select(0, source)

    def decode(chosen: Tensor) -> tuple[Tensor, Tensor]:
        row, at = index.index_select(0, chosen), image.index_select(0, chosen)
        picked = deltas.reshape(-1, 4).index_select(0, at * objectness.shape[1] + row).to(torch.float32)
        references, sizes = anchors.index_select(0, row), image_sizes.index_select(0, at)
        return box.decode_inside(picked, references, sizes, min_size=min_size)

    kept, boxes, place, count = best_kept(decode, problem, image, images, iou_threshold, post_nms_top_n)
    boxes, scores = (lay_out(x, place, images, post_nms_top_n) for x in (boxes, scores.index_select(0, kept)))
    return Proposals(boxes, scores, count)


def _select(objectness: Tensor, level_sizes: Sequence[int], pre_nms_top_n: int) -> list[Tensor]:
    """Anchor indices ``(B, at most pre_nms_top_n)`` of each level that has anchors, best first."""
    selected, start = [], 0
    for size in level_sizes:
        if size:
            scores = objectness[:, start : start + size].to(torch.float32)
            # One integer orders by (score, lower index): the float's bits made monotone, above the complement of the
            # index. Adding 0 makes -0 equal to 0.
            bits = torch.where(scores.isfinite(), scores + 0.0, float("-inf")).view(torch.int32)
            bits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
            key = (bits << 32) | torch.arange(size - 1, -1, -1, device=bits.device)
            key = key.topk(min(pre_nms_top_n, size), dim=1).values
            selected.append(start + size - 1 - (key & 0xFFFFFFFF))
        start += size
    return selected


def _cuda(
    objectness: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    image_sizes: Tensor,
    level_sizes: Sequence[int],
    pre_nms_top_n: int,
    post_nms_top_n: int,
    iou_threshold: float,
    min_size: float,
) -> Proposals:
    images, count = objectness.shape
    sizes = [size for size in level_sizes if size]
    levels, dtype, device = len(sizes), objectness.dtype, objectness.device
    if dtype not in DIGITS:
        raise ValueError(f"objectness must be torch.float32, bfloat16 or float16 on a GPU, got {dtype}")
    if levels > LEVELS:
        raise ValueError(f"level_sizes must have at most {LEVELS} levels with anchors on a GPU, got {levels}")
    ends = np.cumsum(sizes + [0] * (LEVELS - levels), dtype=np.int32)
    objectness, deltas = _launch.dense(objectness), _launch.dense(deltas)
    anchors, image_sizes = _launch.dense(anchors), _launch.dense(image_sizes)
    segments, capacity = images * levels, min(pre_nms_top_n, max(sizes))
    digits, bins = DIGITS[dtype]

    # One fill: the number of selected anchors of each segment, int64, then its histograms, int32.
    zeros = torch.zeros(segments * (1 + digits * bins // 2), dtype=torch.int64, device=device)
    selected, histograms = zeros[:segments], zeros[segments:].view(torch.int32)
    tiles = (sum(-(-size // TILE) for size in sizes), images)
    ties = torch.empty(images, tiles[0], LAST_BINS, dtype=torch.int32, device=device)
    keys = torch.empty(segments, capacity, dtype=torch.int64, device=device)
    layout = (np.int32(count), np.int32(levels), *ends)
    for digit in range(digits):
        args = (objectness, histograms, ties, np.int32(digit), np.int32(capacity), *layout)
        _launch.launch(SOURCE, "count_digits", tiles, THREADS, args, dtype=dtype)
    selection = (objectness, histograms, ties, keys, selected, np.int32(capacity), *layout)
    _launch.launch(SOURCE, "collect_anchors", tiles, THREADS, selection, dtype=dtype)
    keys = sort_rows(keys, selected)

    boxes, scores = anchors.new_empty(segments, capacity, 4), anchors.new_empty(segments, capacity)
    geometry = (objectness, deltas, anchors, image_sizes, keys, selected, boxes, scores)
    numbers = (np.int32(capacity), np.int32(count), np.int32(levels), np.float32(min_size))
    grid = (segments, -(-capacity // THREADS))
    _launch.launch(SOURCE, "decode_anchors", grid, THREADS, (*geometry, *numbers), dtype=dtype)
    rows = min(capacity, post_nms_top_n)
    keep, kept = nms_padded(boxes, selected, iou_threshold, rows)

    result = Proposals(
        boxes=anchors.new_empty(images, post_nms_top_n, 4),
        scores=anchors.new_empty(images, post_nms_top_n),
        count=torch.empty(images, dtype=torch.int64, device=device),
    )
    lists = (boxes, scores, keep, kept, result.boxes, result.scores, result.count)
    extents = (np.int32(capacity), np.int32(rows), np.int32(levels), np.int32(post_nms_top_n))
    grid = (-(-max(levels * rows, post_nms_top_n) // THREADS), images)
    _launch.launch(SOURCE, "merge_levels", grid, THREADS, (*lists, *extents), dtype=dtype)
    return result
