"""Each op as one writes it in plain torch when there is no kernel for it: a peer, and an answer to compare with.

Nothing here is shared with the ops but the box geometry. Greedy NMS visits one kept box after the other, matching makes
the whole matrix of IoUs, RoI Align gathers four cells per sample, RoI pooling goes from region to region.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rcnn import boxes as box


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Kept boxes by falling score."""
    order, kept = scores.argsort(descending=True, stable=True), []
    while len(order):
        first, order = order[0], order[1:]
        kept.append(first)
        order = order[box.iou(boxes[first], boxes[order]) <= iou_threshold]
    return torch.stack(kept) if kept else order


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """:func:`nms` of one class after the other."""
    keep = torch.zeros_like(idxs, dtype=torch.bool)
    for each in idxs.unique():
        rows = (idxs == each).nonzero().squeeze(1)
        keep[rows[nms(boxes[rows], scores[rows], iou_threshold)]] = True
    kept = keep.nonzero().squeeze(1)
    return kept[scores[kept].argsort(descending=True, stable=True)]


def roi_align(x: Tensor, rois: Tensor, size: int, scale: float, ratio: int) -> Tensor:
    """Mean of ``ratio ** 2`` bilinear samples in each of ``size ** 2`` bins."""
    image, low, high = rois[:, 0].long(), rois[:, 1:3] * scale, rois[:, 3:] * scale
    extent = (high - low).clamp(min=1)
    place = (torch.arange(size * ratio, device=x.device) + 0.5) / (size * ratio)
    corners = []
    for axis, limit in ((1, x.shape[2]), (0, x.shape[3])):
        at = low[:, axis, None] + place * extent[:, axis, None]
        inside = ((at >= -1) & (at <= limit)).to(x.dtype)
        at = at.clamp(0, limit - 1)
        before = at.long()
        corners.append((before, (before + 1).clamp(max=limit - 1), (at - before).to(x.dtype), inside))
    (top, bottom, down, in_y), (left, right, across, in_x) = corners
    down, across, image = down[:, :, None, None], across[:, None, :, None], image[:, None, None]
    upper = (
        x[image, :, top[:, :, None], left[:, None]] * (1 - across)
        + x[image, :, top[:, :, None], right[:, None]] * across
    )
    lower = (
        x[image, :, bottom[:, :, None], left[:, None]] * (1 - across)
        + x[image, :, bottom[:, :, None], right[:, None]] * across
    )
    values = (upper * (1 - down) + lower * down) * (in_y[:, :, None] * in_x[:, None])[..., None]
    return values.view(len(rois), size, ratio, size, ratio, -1).mean(dim=(2, 4)).permute(0, 3, 1, 2)


def roi_pool(x: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    """Largest value of each bin, of regions whose first corner is on the map."""
    pad = 3  # a region may end at the border of the image, one past the last cell, and its last bin one past that
    x = F.pad(x, (0, pad, 0, pad), value=float("-inf"))
    rois = rois.cpu()  # a GPU divides by multiplying with the reciprocal
    cells = torch.floor(rois[:, 1:] * scale + 0.5).long()
    extent = (cells[:, 2:] - cells[:, :2]).clamp(min=0)[..., None] + 1
    # The op and torchvision divide in float32, where a border may be rounded to the next cell.
    number = torch.arange(size + 1)
    step = extent / size
    start, end = torch.floor(number[:-1] * step).long(), torch.ceil(number[1:] * step).long()
    rounded = (start != number[:-1] * extent // size) | (end != -(-number[1:] * extent // size))
    borders = torch.stack((start, end), dim=-1) + cells[:, :2, None, None]
    pooled = []
    rows = zip(rois[:, 0].long().tolist(), cells.tolist(), rounded.flatten(1).any(dim=1).tolist(), borders, strict=True)
    for image, (left, top, right, bottom), by_hand, bins in rows:
        if by_hand:
            across, down = bins.tolist()
            parts = [F.max_pool2d(x[image, :, a:b, c:d], (b - a, d - c)) for a, b in down for c, d in across]
            pooled.append(torch.stack(parts, dim=1).view(-1, size, size))
        else:
            crop = x[image, :, top : max(bottom, top) + 1, left : max(right, left) + 1]
            pooled.append(F.adaptive_max_pool2d(crop, size))
    output = torch.stack(pooled)
    return torch.where(output == float("-inf"), 0, output)


def match(boxes: Tensor, truth: Tensor, high: float, low: float, low_quality: bool) -> tuple[Tensor, Tensor]:
    """Label and row of the ground truth (-1 for none) of each box of one image."""
    iou = box.iou(truth[:, None], boxes[None])
    best, row = iou.max(dim=0)
    label = torch.where(best >= high, 1, torch.where(best < low, 0, -1))
    if low_quality:
        most = iou.amax(dim=1, keepdim=True)
        label[((iou == most) & (most > 0)).any(dim=0)] = 1
    return label, torch.where(label == 1, row, -1)


def match_anchors(
    anchors: Tensor, truth: Sequence[Tensor], high: float, low: float, size: int, fraction: float
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Drawn anchors of each image, their labels and targets; the draw is by ``randperm``."""
    drawn = []
    for each in truth:
        label, row = match(anchors, each, high, low, True)
        positive, negative = (label == 1).nonzero().squeeze(1), (label == 0).nonzero().squeeze(1)
        positive = positive[torch.randperm(len(positive), device=anchors.device)[: int(size * fraction)]]
        negative = negative[torch.randperm(len(negative), device=anchors.device)[: size - len(positive)]]
        deltas = anchors.new_zeros(len(positive) + len(negative), 4)
        deltas[: len(positive)] = box.encode(anchors[positive], each[row[positive]])
        index = torch.cat((positive, negative))
        drawn.append((index, label[index], deltas))
    return drawn


def proposals(
    objectness: Tensor, deltas: Tensor, anchors: Tensor, sizes: Tensor, levels: Sequence[int], pre: int, post: int
) -> list[tuple[Tensor, Tensor]]:
    """Boxes and scores of each image."""
    found = []
    level = torch.arange(len(levels), device=anchors.device).repeat_interleave(
        torch.tensor(levels, device=anchors.device)
    )
    for logits, moves, size in zip(objectness, deltas, sizes, strict=True):
        rows, start = [], 0
        for count in levels:
            rows.append(start + logits[start : start + count].topk(min(pre, count)).indices)
            start += count
        row = torch.cat(rows)
        boxes = box.clip(box.decode(moves[row], anchors[row])[None], size[None])[0]
        keep = ((boxes[:, 2:] - boxes[:, :2]) >= 1e-3).all(dim=1)
        boxes, row = boxes[keep], row[keep]
        kept = batched_nms(boxes, logits[row], level[row], 0.7)[:post]
        found.append((boxes[kept], logits[row[kept]]))
    return found


def detections(
    logits: Tensor,
    deltas: Tensor,
    proposals: Tensor,
    sizes: Tensor,
    threshold: float,
    most: int,
    weights: Sequence[float],
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Boxes, scores and labels of each image."""
    images, count = proposals.shape[:2]
    found = []
    parts = zip(logits.view(images, count, -1), deltas.view(images, count, -1, 4), proposals, sizes, strict=True)
    for scores, moves, boxes, size in parts:
        scores = scores.softmax(dim=1)
        decoded = box.clip(box.decode(moves, boxes[:, None], weights)[None], size[None])[0]
        row, label = (scores[:, 1:] > threshold).nonzero(as_tuple=True)
        boxes, scores = decoded[row, label + 1], scores[row, label + 1]
        keep = ((boxes[:, 2:] - boxes[:, :2]) >= 1e-2).all(dim=1)
        boxes, scores, label = boxes[keep], scores[keep], label[keep] + 1
        kept = batched_nms(boxes, scores, label, 0.5)[:most]
        found.append((boxes[kept], scores[kept], label[kept]))
    return found
