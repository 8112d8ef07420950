"""Matching: which ground-truth box each anchor or proposal belongs to, and which of them enter the losses."""

import math
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from rcnn import boxes as box
from rcnn.kernels import _launch
from rcnn.kernels.checks import check_floating, check_kind, check_real, check_tensors, check_weights, check_whole
from rcnn.kernels.matching_cpu import match_cpu
from rcnn.kernels.sampling import ANCHORS, PROPOSALS, image_keys, list_sizes, sample
from rcnn.structures import AnchorSamples, Proposals, Samples, Targets

#: Threads of a block, boxes for each lane of a warp that matches anchors, and lanes that find a candidate's place.
THREADS, EACH, RANKERS = 128, 4, 8
SOURCE = _launch.CudaSource("matching", THREADS=THREADS, EACH=EACH, RANKERS=RANKERS)

#: Labels that the CPU body of :func:`match_anchors` holds at once.
_LABELS = 1 << 19


def match(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    *,
    high_threshold: float,
    low_threshold: float,
    allow_low_quality_matches: bool = False,
) -> tuple[Tensor, Tensor]:
    """Assign each box the ground-truth box of its image that it overlaps most.

    With ``best`` the largest IoU of a box with the ground truth of its image: ``best >= high_threshold`` is positive,
    ``best < low_threshold`` is negative, anything between is ignored. At equal IoU the lowest row wins. The low-quality
    rule makes the boxes that a ground-truth box overlaps most (all of them, when tied) positive as well, if that IoU is
    above 0; such a box keeps its own best ground-truth box. An ignore region (label -1) is never matched: a box that
    would be negative is ignored when at least half of its area lies inside one region.
    A box, or ground truth, that is empty, reversed or not finite overlaps nothing.

    Args:
        boxes: ``(N, 4)`` for all images or ``(B, N, 4)`` float, pixels.
        gt_boxes: ``(G, 4)`` float, pixels.
        gt_labels: ``(G,)`` int64, 1..K, or -1 for an ignore region.
        gt_offsets: ``(B + 1,)`` int64, the rows of image b are ``gt_offsets[b]:gt_offsets[b + 1]``; rows from
            ``gt_offsets[B]`` on are padding.
        high_threshold: lowest IoU of a positive box.
        low_threshold: IoU below which a box is negative; above 0 and at most ``high_threshold``.
        allow_low_quality_matches: apply the low-quality rule.

    Returns:
        labels: ``(B, N)`` int64, 1 positive, 0 negative, -1 ignored.
        matched: ``(B, N)`` int64, row in ``gt_boxes`` where the label is 1, else -1.

    Raises:
        TypeError: an argument is not a tensor, or not a number, where one is needed.
        ValueError: an argument has another shape, or the thresholds are out of order.

    Source:
        torchvision, ``Matcher``; there a ground-truth box that overlaps nothing makes every box positive, an image
        without ground truth is refused, and ignore regions do not exist.
    """
    check_tensors({"boxes": boxes, "gt_boxes": gt_boxes, "gt_labels": gt_labels, "gt_offsets": gt_offsets})
    images = _check_ground_truth(gt_boxes, gt_labels, gt_offsets)
    _check_thresholds(high_threshold, low_threshold)
    if boxes.dim() not in (2, 3) or boxes.shape[-1] != 4 or (boxes.dim() == 3 and boxes.shape[0] != images):
        raise ValueError(f"boxes must have shape (N, 4) or ({images}, N, 4), got {tuple(boxes.shape)}")
    check_floating("boxes", boxes)
    body = _match_cuda if _launch.uses_kernels(boxes) else match_cpu
    return body(
        boxes.detach().float(),
        gt_boxes.detach().float(),
        gt_labels,
        gt_offsets,
        high_threshold,
        low_threshold,
        allow_low_quality_matches,
    )


@torch.no_grad()
def match_anchors(
    anchors: Tensor,
    targets: Targets,
    *,
    seed: int,
    step: Tensor,
    high_threshold: float = 0.7,
    low_threshold: float = 0.3,
    batch_size_per_image: int = 256,
    positive_fraction: float = 0.5,
    allowed_border: float | None = None,
) -> AnchorSamples:
    """Match anchors to ground truth with the low-quality rule, and draw those that enter the loss.

    Per image, up to ``int(batch_size_per_image * positive_fraction)`` positives are drawn without replacement, then
    negatives until the batch is full. The draw takes the smallest keys, a hash of (seed, step, image id, anchor index):
    it depends on neither the device, nor the image's place in the batch, nor the order of threads. Rows stand by rising
    key, positives first.

    Args:
        anchors: ``(N, 4)`` float32, pixels.
        targets: ground truth of B images.
        seed: any integer; its low 64 bits count.
        step: ``()`` int64 tensor, number of the training step.
        high_threshold: lowest IoU of a positive anchor.
        low_threshold: IoU below which an anchor is negative.
        batch_size_per_image: rows S per image.
        positive_fraction: largest part of the rows that may be positive, 0..1.
        allowed_border: anchors that reach further than this beyond the border of their image, pixels, take no part
            (they are not compared with the ground truth either); None lets all take part.

    Returns:
        S rows for each image; deltas are ``encode(anchor, matched ground truth)`` with unit weights. A positive anchor
        has IoU > 0 with its ground truth, so neither is empty and deltas are finite.

    Raises:
        TypeError: an argument is not a tensor, or not a number, where one is needed.
        ValueError: an argument has another shape or range.

    Source:
        Ren et al., Faster R-CNN (2015), section 3.1.2; torchvision, ``RegionProposalNetwork``, which draws by
        ``randperm``.
    """
    check_kind("targets", targets, Targets)
    check_tensors({"anchors": anchors, "step": step} | _named(targets))
    _check_targets(targets)
    _check_thresholds(high_threshold, low_threshold)
    _check_sampling(seed, step, batch_size_per_image, positive_fraction)
    if anchors.dim() != 2 or anchors.shape[0] < 1 or anchors.shape[1] != 4:
        raise ValueError(f"anchors must have shape (N, 4) with N at least 1, got {tuple(anchors.shape)}")
    check_floating("anchors", anchors)
    if allowed_border is not None:
        check_real("allowed_border", allowed_border)
    body = _match_anchors_cuda if _launch.uses_kernels(anchors) else _match_anchors_cpu
    positives = int(batch_size_per_image * positive_fraction)
    thresholds = high_threshold, low_threshold
    targets = _in_float32(targets)
    return body(anchors.float(), targets, int(seed), step, thresholds, batch_size_per_image, positives, allowed_border)


@torch.no_grad()
def match_proposals(
    proposals: Proposals,
    targets: Targets,
    *,
    seed: int,
    step: Tensor,
    high_threshold: float = 0.5,
    low_threshold: float = 0.5,
    batch_size_per_image: int = 512,
    positive_fraction: float = 0.25,
    box_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
) -> Samples:
    """Match proposals to ground truth, and draw those that enter the loss of the RoI head.

    Ground truth joins the proposals of its image as candidates, so that there is something positive from the first
    step on: row g of image b has the index ``P + g - offsets[b]``. Ignore regions and empty boxes do not join. The draw
    is that of :func:`match_anchors`, with keys of its own.

    Args:
        proposals: P rows for each of B images.
        targets: ground truth of the same images.
        seed: any integer; its low 64 bits count.
        step: ``()`` int64 tensor, number of the training step.
        high_threshold: lowest IoU of a positive proposal.
        low_threshold: IoU below which a proposal is negative.
        batch_size_per_image: rows S per image.
        positive_fraction: largest part of the rows that may be positive, 0..1.
        box_weights: factors of dx, dy, dw, dh.

    Returns:
        S rows for each image: positives, negatives, padding, the first two by rising key.

    Raises:
        TypeError: an argument is not a tensor, or not a number, where one is needed.
        ValueError: an argument has another shape or range.

    Source:
        torchvision, ``RoIHeads.select_training_samples``.
    """
    check_kind("proposals", proposals, Proposals)
    check_kind("targets", targets, Targets)
    check_tensors(
        {"proposals.boxes": proposals.boxes, "proposals.count": proposals.count, "step": step} | _named(targets)
    )
    images = _check_targets(targets)
    _check_thresholds(high_threshold, low_threshold)
    _check_sampling(seed, step, batch_size_per_image, positive_fraction)
    shape = tuple(proposals.boxes.shape)
    if len(shape) != 3 or shape[0] != images or shape[1] < 1 or shape[2] != 4:
        raise ValueError(f"proposals.boxes must have shape ({images}, P, 4) with P at least 1, got {shape}")
    check_floating("proposals.boxes", proposals.boxes)
    _check_int64("proposals.count", proposals.count, (images,))
    check_weights(box_weights)
    body = _match_proposals_cuda if _launch.uses_kernels(proposals.boxes) else _match_proposals_cpu
    positives = int(batch_size_per_image * positive_fraction)
    thresholds = high_threshold, low_threshold
    proposals, targets = replace(proposals, boxes=proposals.boxes.float()), _in_float32(targets)
    return body(proposals, targets, int(seed), step, thresholds, batch_size_per_image, positives, box_weights)


def _check_ground_truth(gt_boxes: Tensor, gt_labels: Tensor, gt_offsets: Tensor, prefix: str = "gt_") -> int:
    if gt_boxes.dim() != 2 or gt_boxes.shape[1] != 4:
        raise ValueError(f"{prefix}boxes must have shape (G, 4), got {tuple(gt_boxes.shape)}")
    if gt_offsets.dim() != 1 or gt_offsets.shape[0] < 2:
        raise ValueError(f"{prefix}offsets must have shape (B + 1,) with B at least 1, got {tuple(gt_offsets.shape)}")
    check_floating(f"{prefix}boxes", gt_boxes)
    _check_int64(f"{prefix}labels", gt_labels, gt_boxes.shape[:1])
    _check_int64(f"{prefix}offsets", gt_offsets, gt_offsets.shape)
    return gt_offsets.shape[0] - 1


def _check_int64(name: str, x: Tensor, shape: Sequence[int]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.dtype != torch.int64:
        raise ValueError(f"{name} must be torch.int64, got {x.dtype}")


def _named(targets: Targets) -> dict[str, Tensor]:
    return {f"targets.{name}": value for name, value in vars(targets).items()}


def _in_float32(targets: Targets) -> Targets:
    return replace(targets, boxes=targets.boxes.float(), image_sizes=targets.image_sizes.float())


def _check_targets(targets: Targets) -> int:
    images = _check_ground_truth(targets.boxes, targets.labels, targets.offsets, "targets.")
    _check_int64("targets.image_ids", targets.image_ids, (images,))
    if targets.image_sizes.shape != (images, 2):
        raise ValueError(f"targets.image_sizes must have shape ({images}, 2), got {tuple(targets.image_sizes.shape)}")
    check_floating("targets.image_sizes", targets.image_sizes)
    return images


def _check_thresholds(high_threshold: float, low_threshold: float) -> None:
    check_real("high_threshold", high_threshold)
    check_real("low_threshold", low_threshold)
    if not 0 < low_threshold <= high_threshold:
        raise ValueError(
            f"thresholds must satisfy 0 < low_threshold <= high_threshold, got {low_threshold} and {high_threshold}"
        )


def _check_sampling(seed: int, step: Tensor, batch_size_per_image: int, positive_fraction: float) -> None:
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if step.dim() != 0 or step.dtype != torch.int64:
        raise ValueError(f"step must be an int64 tensor of shape (), got {step.dtype} of {tuple(step.shape)}")
    check_whole("batch_size_per_image", batch_size_per_image, 1)
    check_real("positive_fraction", positive_fraction, 0, 1)


def _match_anchors_cpu(
    anchors: Tensor,
    targets: Targets,
    seed: int,
    step: Tensor,
    thresholds: tuple[float, float],
    size: int,
    positives: int,
    allowed_border: float | None,
) -> AnchorSamples:
    images = targets.image_ids.shape[0]
    keys = image_keys(ANCHORS, seed, step, targets.image_ids)
    # A group of images at a time: small images pay the overhead once, large ones need the memory of one.
    group = max(1, _LABELS // anchors.shape[0])
    parts = []
    for start in range(0, images, group):
        stop = min(start + group, images)
        outside = None if allowed_border is None else _outside(anchors, targets.image_sizes[start:stop], allowed_border)
        labels, matched = match_cpu(
            anchors if outside is None else anchors.masked_fill(outside[..., None], 0.0),
            targets.boxes,
            targets.labels,
            targets.offsets[start : stop + 1],
            *thresholds,
            True,
        )
        if outside is not None:
            labels = labels.masked_fill(outside, -1)
        index, drawn = sample(labels, keys[start:stop], size, positives)
        parts.append((index, drawn, matched.gather(1, index)))
    index, drawn, matched = (torch.cat(part) for part in zip(*parts, strict=True))
    deltas, _ = _encode(anchors[index], targets.boxes, torch.where(drawn > 0, matched, -1), (1.0, 1.0, 1.0, 1.0))
    return AnchorSamples(index=index, labels=drawn, deltas=deltas)


def _match_proposals_cpu(
    proposals: Proposals,
    targets: Targets,
    seed: int,
    step: Tensor,
    thresholds: tuple[float, float],
    size: int,
    positives: int,
    box_weights: Sequence[float],
) -> Samples:
    images = targets.image_ids.shape[0]
    candidates, in_use = _with_ground_truth(proposals, targets)
    labels, matched = match_cpu(candidates, targets.boxes, targets.labels, targets.offsets, *thresholds, False)
    labels = torch.where(in_use, labels, -1)
    keys = image_keys(PROPOSALS, seed, step, targets.image_ids)
    index, drawn = sample(labels, keys, size, positives)
    matched = torch.where(drawn > 0, matched.gather(1, index), -1)
    rois = candidates.gather(1, index[..., None].expand(-1, -1, 4)).masked_fill((drawn < 0)[..., None], 0.0)
    deltas, matched_boxes = _encode(rois, targets.boxes, matched, box_weights)
    gt_labels = torch.cat((targets.labels, targets.labels.new_zeros(1)))
    image = torch.arange(images, device=rois.device, dtype=rois.dtype)[:, None, None].expand(-1, rois.shape[1], 1)
    return Samples(
        rois=torch.cat((image, rois), dim=2).reshape(-1, 5),
        labels=torch.where(drawn > 0, gt_labels[matched], drawn).reshape(-1),
        matched_boxes=matched_boxes.reshape(-1, 4),
        deltas=deltas.reshape(-1, 4),
        weights=(drawn >= 0).to(torch.float32).reshape(-1),
    )


def _outside(anchors: Tensor, image_sizes: Tensor, border: float) -> Tensor:
    """``(B, N)`` bool, anchors that reach more than ``border`` pixels beyond their image."""
    height, width = image_sizes[:, :1], image_sizes[:, 1:]
    before = (anchors[:, 0] < -border) | (anchors[:, 1] < -border)
    return before | (anchors[:, 2] > width + border) | (anchors[:, 3] > height + border)


def _with_ground_truth(proposals: Proposals, targets: Targets) -> tuple[Tensor, Tensor]:
    """Candidates ``(B, P + most ground truth of an image, 4)``, and which of them are in use."""
    images, capacity = proposals.boxes.shape[:2]
    offsets = targets.offsets.clamp(0, len(targets.boxes))[:, None]
    first, last = offsets[:-1], offsets[1:]
    most = int((last - first).max())
    rows = first + torch.arange(most, device=first.device)
    truth = torch.cat((targets.boxes, targets.boxes.new_zeros(1, 4)))
    labels = torch.cat((targets.labels, targets.labels.new_full((1,), -1)))
    rows = torch.where(rows < last, rows, truth.shape[0] - 1)
    joined = truth[rows]
    extent = torch.minimum(joined[..., 2] - joined[..., 0], joined[..., 3] - joined[..., 1])
    valid = (labels[rows] > 0) & (extent > 0) & box.area(joined).isfinite()
    boxes = torch.cat((proposals.boxes.detach(), joined), dim=1)
    used = torch.arange(capacity, device=first.device) < proposals.count[:, None]
    return boxes, torch.cat((used, valid), dim=1)


def _encode(rois: Tensor, gt_boxes: Tensor, matched: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Deltas and ground truth of the rows with ``matched >= 0``; zeros elsewhere."""
    unit = gt_boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
    positive = (matched >= 0)[..., None]
    # Unmatched rows encode the unit box against itself, which is exactly 0.
    truth = torch.cat((gt_boxes, unit[None]))[matched]
    deltas = box.encode(torch.where(positive, rois, unit), truth, weights)
    return deltas, torch.where(positive, truth, 0.0)


def _match_cuda(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    high_threshold: float,
    low_threshold: float,
    low_quality: bool,
) -> tuple[Tensor, Tensor]:
    truth = _truth(gt_boxes, gt_labels, gt_offsets)
    reach = gt_boxes.new_zeros(gt_boxes.shape[0], dtype=torch.int32) if low_quality else None
    thresholds = high_threshold, low_threshold
    state = _assign(_launch.dense(boxes), None, math.inf, truth, thresholds, reach, None).to(torch.int64)
    return (state + 1).clamp_(max=1), state.clamp_(min=-1)


def _match_anchors_cuda(
    anchors: Tensor,
    targets: Targets,
    seed: int,
    step: Tensor,
    thresholds: tuple[float, float],
    size: int,
    positives: int,
    allowed_border: float | None,
) -> AnchorSamples:
    images, anchors = targets.image_ids.shape[0], _launch.dense(anchors)
    truth = _truth(targets.boxes, targets.labels, targets.offsets)
    sizes = None if allowed_border is None else _launch.dense(targets.image_sizes)
    border = math.inf if allowed_border is None else allowed_border
    tally, found, reach = _counters(targets, targets.boxes.shape[0])
    state = _assign(anchors, sizes, border, truth, thresholds, reach, tally)
    draw = _gather(ANCHORS, state, tally, found, seed, step, targets, size, positives)
    index, labels = (state.new_empty(images, size, dtype=torch.int64) for _ in range(2))
    deltas = anchors.new_empty(images, size, 4)
    _draw("match_draw_anchors", draw, (anchors, truth[0], index, labels, deltas))
    return AnchorSamples(index=index, labels=labels, deltas=deltas)


def _match_proposals_cuda(
    proposals: Proposals,
    targets: Targets,
    seed: int,
    step: Tensor,
    thresholds: tuple[float, float],
    size: int,
    positives: int,
    box_weights: Sequence[float],
) -> Samples:
    boxes = _launch.dense(proposals.boxes)
    truth = _truth(targets.boxes, targets.labels, targets.offsets)
    (images, capacity), rows = boxes.shape[:2], targets.boxes.shape[0]
    tally, found, _ = _counters(targets, 0)
    # Ground truth joins in the kernels: an image could own all rows, so there is room for them.
    count = capacity + rows
    state = tally.new_empty(images, count)
    candidates = boxes, _launch.dense(proposals.count), np.int32(capacity), np.int32(count)
    high, low = (np.float32(threshold) for threshold in thresholds)
    grid = -(-count // THREADS), images
    _launch.launch(SOURCE, "match_assign_proposals", grid, THREADS, (*candidates, *truth, high, low, state, tally))
    draw = _gather(PROPOSALS, state, tally, found, seed, step, targets, size, positives)
    samples = Samples(
        rois=boxes.new_empty(images * size, 5),
        labels=state.new_empty(images * size, dtype=torch.int64),
        matched_boxes=boxes.new_empty(images * size, 4),
        deltas=boxes.new_empty(images * size, 4),
        weights=boxes.new_empty(images * size),
    )
    weights = (np.float32(weight) for weight in box_weights)
    _draw("match_draw_proposals", draw, (boxes, np.int32(capacity), *truth, *weights, *vars(samples).values()))
    return samples


def _counters(targets: Targets, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros, from one fill: positives and negatives of each image, what their lists hold, the reach of each row."""
    lists = 2 * targets.image_ids.shape[0]
    zeros = torch.zeros(2 * lists + rows, dtype=torch.int32, device=targets.boxes.device)
    return zeros[:lists], zeros[lists : 2 * lists], zeros[2 * lists :]


def _assign(
    boxes: Tensor,
    sizes: Tensor | None,
    border: float,
    truth: tuple[Tensor, Tensor, Tensor, np.int32],
    thresholds: tuple[float, float],
    reach: Tensor | None,
    tally: Tensor | None,
) -> Tensor:
    """``(B, N)`` int32: the ground-truth row of a positive box, -1 for a negative and -2 for an ignored one."""
    count, images = boxes.shape[-2], truth[2].shape[0] - 1
    state = boxes.new_empty(images, count, dtype=torch.int32)
    stride = np.int32(count if boxes.dim() == 3 else 0)
    inputs = boxes, stride, np.int32(count), sizes, np.float32(border), *truth
    grid = -(-count // (THREADS * EACH)), images
    if reach is not None:
        _launch.launch(SOURCE, "match_reach", grid, THREADS, (*inputs, reach))
    high, low = (np.float32(threshold) for threshold in thresholds)
    _launch.launch(SOURCE, "match_assign", grid, THREADS, (*inputs, reach, high, low, state, tally))
    return state


def _gather(
    stream: int,
    state: Tensor,
    tally: Tensor,
    found: Tensor,
    seed: int,
    step: Tensor,
    targets: Targets,
    size: int,
    positives: int,
) -> tuple[Tensor | np.generic, ...]:
    """Lists of small keys; gives what a draw reads, in the order of its parameters."""
    images, count = state.shape
    expected, capacity = list_sizes(size)
    capacity = min(capacity, count)
    keys = state.new_empty(2 * images, capacity, dtype=torch.int64)
    index = state.new_empty(2 * images, capacity)
    source = np.uint64((seed ^ stream) % (1 << 64)), step, targets.image_ids.contiguous()
    inputs = state, np.int32(count), tally, np.float32(expected), np.int32(capacity), *source
    grid = -(-count // (THREADS * EACH)), images
    _launch.launch(SOURCE, "match_gather", grid, THREADS, (*inputs, found, keys, index))
    sizes = np.int32(size), np.int32(positives)
    return state, np.int32(count), tally, *sizes, found, np.int32(capacity), *source, keys, index


def _draw(kernel: str, draw: tuple[Tensor | np.generic, ...], rest: tuple[Tensor | np.generic, ...]) -> None:
    keys = draw[-1]
    assert isinstance(keys, Tensor)
    lists, capacity = keys.shape
    grid = -(-capacity * RANKERS // THREADS), 2, lists // 2
    _launch.launch(SOURCE, kernel, grid, THREADS, (*draw, *rest))


def _truth(gt_boxes: Tensor, gt_labels: Tensor, gt_offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, np.int32]:
    rows = np.int32(gt_boxes.shape[0])
    return _launch.dense(gt_boxes), gt_labels.contiguous(), gt_offsets.contiguous(), rows
