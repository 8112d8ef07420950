"""Detections: softmax, a box per class, threshold, NMS per class and the best of all classes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rcnn import boxes as box
from rcnn.kernels import _launch
from rcnn.kernels.checks import check_floating, check_kind, check_real, check_tensors, check_weights, check_whole
from rcnn.kernels.nms import nms_padded
from rcnn.kernels.nms_cpu import best_kept, lay_out
from rcnn.kernels.sorting import sort_rows
from rcnn.structures import Detections, Proposals

#: Shortest side of a detection, pixels (torchvision's).
_MIN_SIZE = 1e-2
#: Threads of a block; a warp scores a proposal.
THREADS = 256
SOURCE = _launch.CudaSource("detections", dtypes=(torch.float32, torch.bfloat16, torch.float16), THREADS=THREADS)


@torch.no_grad()
def detections(
    logits: Tensor,
    deltas: Tensor,
    proposals: Proposals,
    image_sizes: Tensor,
    *,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    detections_per_image: int = 100,
    box_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
) -> Detections:
    """Turn the outputs of the RoI head into detections.

    Every pair of a proposal in use and a foreground class whose softmax score is above ``score_threshold`` is a
    candidate: its box is decoded by the deltas of that class, clipped to the image and dropped when a side is shorter
    than 0.01 pixels. NMS thins each class by itself, then the ``detections_per_image`` best of all classes remain. At
    equal score the lower proposal comes first, then the lower class. A candidate with NaN or infinity in its score or
    box is dropped. Arithmetic is float32. Nothing here has a gradient.

    Args:
        logits: ``(B * P, K + 1)`` float32, bfloat16 or float16; column 0 is background.
        deltas: ``(B * P, (K + 1) * 4)`` of the same types, four per class.
        proposals: P rows for each of B images; padding rows detect nothing.
        image_sizes: ``(B, 2)`` float32, height and width of each image, pixels.
        score_threshold: 0..1; a score must be above it.
        iou_threshold: a box that overlaps a better one of its class by more than this is dropped.
        detections_per_image: detections kept per image, the capacity D.
        box_weights: factors of dx, dy, dw, dh, those of the training targets.

    Returns:
        Detections with D rows per image.

    Raises:
        TypeError: an argument is not a tensor, or not a number, where one is needed.
        ValueError: an argument has another shape or dtype, the threshold is not in 0..1, or the capacity is below 1.

    Source:
        torchvision, ``RoIHeads.postprocess_detections``, which decodes the boxes of all classes first.
    """
    check_kind("proposals", proposals, Proposals)
    check_tensors(
        {
            "logits": logits,
            "deltas": deltas,
            "proposals.boxes": proposals.boxes,
            "proposals.count": proposals.count,
            "image_sizes": image_sizes,
        }
    )
    if proposals.boxes.dim() != 3 or proposals.boxes.shape[2] != 4:
        raise ValueError(f"proposals.boxes must have shape (B, P, 4), got {tuple(proposals.boxes.shape)}")
    images, capacity = proposals.boxes.shape[:2]
    if logits.dim() != 2 or logits.shape[0] != images * capacity or logits.shape[1] < 2:
        raise ValueError(f"logits must have shape ({images * capacity}, K + 1), got {tuple(logits.shape)}")
    for name, tensor, shape in (
        ("deltas", deltas, (images * capacity, logits.shape[1] * 4)),
        ("proposals.count", proposals.count, (images,)),
        ("image_sizes", image_sizes, (images, 2)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    check_floating("logits", logits, torch.float64)
    if deltas.dtype != logits.dtype:
        raise ValueError(f"deltas must have the dtype of logits, {logits.dtype}, got {deltas.dtype}")
    for name, tensor, dtype in (
        ("proposals.boxes", proposals.boxes, torch.float32),
        ("proposals.count", proposals.count, torch.int64),
        ("image_sizes", image_sizes, torch.float32),
    ):
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    check_real("score_threshold", score_threshold, 0, 1)
    check_real("iou_threshold", iou_threshold, 0, 1)
    check_whole("detections_per_image", detections_per_image, 1)
    check_weights(box_weights)
    body = _cuda if _launch.uses_kernels(logits) else _cpu
    return body(
        logits, deltas, proposals, image_sizes, score_threshold, iou_threshold, detections_per_image, box_weights
    )


def _cpu(
    logits: Tensor,
    deltas: Tensor,
    proposals: Proposals,
    image_sizes: Tensor,
    score_threshold: float,
    iou_threshold: float,
    detections_per_image: int,
    box_weights: Sequence[float],
) -> Detections:
    images, capacity = proposals.boxes.shape[:2]
    classes = logits.shape[1]
    probabilities = logits.to(torch.float32).softmax(dim=1)
    likely = probabilities > score_threshold
    likely[:, 0] = False
    for i, used in enumerate(proposals.count.tolist()):
        if used < capacity:
            likely[i * capacity + max(used, 0) : (i + 1) * capacity] = False
    # By image and falling score: the bits of a float that is not negative rise with it. Candidates come by (proposal,
    # class), and so they stand at equal scores, because the sort is stable.
    entry = likely.flatten().nonzero().squeeze(1)
    scores = probabilities.flatten().index_select(0, entry)
    image = torch.div(entry, capacity * classes, rounding_mode="floor")
    order = ((image << 32) - scores.view(torch.int32)).sort(stable=True).indices
    entry, scores = entry.index_select(0, order), scores.index_select(0, order)
    label = entry % classes

    def decode(chosen: Tensor) -> tuple[Tensor, Tensor]:
        source = entry.index_select(0, chosen)
        row = torch.div(source, classes, rounding_mode="floor")
        picked = deltas.reshape(-1, 4).index_select(0, source).to(torch.float32)
        references = proposals.boxes.reshape(-1, 4).index_select(0, row)
        sizes = image_sizes.index_select(0, image.index_select(0, chosen))
        return box.decode_inside(picked, references, sizes, min_size=_MIN_SIZE, weights=box_weights)

    problem = image * classes + label
    kept, boxes, place, count = best_kept(decode, problem, image, images, iou_threshold, detections_per_image)
    boxes, scores, label = (
        lay_out(x, place, images, detections_per_image)
        for x in (boxes, scores.index_select(0, kept), label.index_select(0, kept))
    )
    return Detections(boxes, scores, label, count)


def _cuda(
    logits: Tensor,
    deltas: Tensor,
    proposals: Proposals,
    image_sizes: Tensor,
    score_threshold: float,
    iou_threshold: float,
    detections_per_image: int,
    box_weights: Sequence[float],
) -> Detections:
    images, capacity = proposals.boxes.shape[:2]
    classes, dtype, device = logits.shape[1], logits.dtype, logits.device
    segments = images * (classes - 1)
    logits, deltas, image_sizes = (_launch.dense(x) for x in (logits, deltas, image_sizes))
    rois, used = _launch.dense(proposals.boxes), _launch.dense(proposals.count)

    # One fill: the candidates of every segment, and the survivors of every image.
    counts = torch.zeros(segments + images, dtype=torch.int64, device=device)
    candidates, totals = counts[:segments], counts[segments:]
    keys = torch.empty(segments, capacity, dtype=torch.int64, device=device)
    extents = (np.int32(capacity), np.int32(classes))
    _launch.launch(
        SOURCE,
        "score_classes",
        -(-images * capacity // (THREADS // 32)),
        THREADS,
        (logits, used, keys, candidates, np.int32(images * capacity), *extents, np.float32(score_threshold)),
        dtype=dtype,
    )
    keys = sort_rows(keys, candidates)

    head = (deltas, rois, image_sizes)
    weights = tuple(np.float32(weight) for weight in box_weights)
    boxes = rois.new_empty(segments, capacity, 4)
    _launch.launch(
        SOURCE,
        "decode_candidates",
        (segments, -(-capacity // THREADS)),
        THREADS,
        (*head, keys, candidates, boxes, *extents, *weights, np.float32(_MIN_SIZE)),
        dtype=dtype,
    )
    rows = min(capacity, detections_per_image)
    keep, kept = nms_padded(boxes, candidates, iou_threshold, rows)

    gathered = torch.empty(images, (classes - 1) * rows, dtype=torch.int64, device=device)
    _launch.launch(
        SOURCE,
        "gather_kept",
        (segments, -(-rows // THREADS)),
        THREADS,
        (keys, keep, kept, gathered, totals, np.int32(capacity), np.int32(rows), np.int32(classes - 1)),
        dtype=dtype,
    )
    gathered = sort_rows(gathered, totals)
    result = Detections(
        boxes=rois.new_empty(images, detections_per_image, 4),
        scores=rois.new_empty(images, detections_per_image),
        labels=torch.empty(images, detections_per_image, dtype=torch.int64, device=device),
        count=torch.empty(images, dtype=torch.int64, device=device),
    )
    outputs = (result.boxes, result.scores, result.labels, result.count)
    limits = (np.int32(gathered.shape[1]), np.int32(detections_per_image))
    _launch.launch(
        SOURCE,
        "emit_detections",
        (-(-detections_per_image // THREADS), images),
        THREADS,
        (*head, gathered, totals, *outputs, *extents, *weights, *limits),
        dtype=dtype,
    )
    return result
