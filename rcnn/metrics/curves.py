"""Precision and recall of each class, by VOC's rules of what a hit is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rcnn.data.dataset import DetectionDataset

#: Detections of one image: "boxes" (n, 4), "labels" (n,), "scores" (n,).
Result = Mapping[str, np.ndarray]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Detections of one class over a whole data set, by falling score; row i is about the first i + 1 of them.

    Attributes:
        scores: ``(M,)`` float64, score of each detection that counts (those on ignored objects do not).
        hits: ``(M,)`` int64, how many of the first i + 1 detections hit an object.
        gt: objects of the class that count.
    """

    scores: Floats
    hits: NDArray[np.int64]
    gt: int

    @property
    def precision(self) -> Floats:
        """``(M,)`` float64, hits / detections."""
        return self.hits / np.arange(1, len(self.hits) + 1)

    @property
    def recall(self) -> Floats:
        """``(M,)`` float64, hits / objects; NaN where there is no object."""
        return self.hits / self.gt if self.gt else np.full(len(self.hits), np.nan)


def precision_recall(
    dataset: DetectionDataset, results: Sequence[Result], iou_threshold: float = 0.5, *, count_difficult: bool = False
) -> dict[str, tuple[Floats, Floats]]:
    """The precision-recall curve of each class that has objects; arguments and errors of :func:`match_detections`.

    Returns:
        Class name -> (recall, precision), each ``(M,)`` float64 in 0..1, a point for each detection that counts.
    """
    curves = match_detections(dataset, results, iou_threshold, count_difficult=count_difficult)
    return {name: (curve.recall, curve.precision) for name, curve in curves.items() if curve.gt}


def match_detections(
    dataset: DetectionDataset, results: Sequence[Result], iou_threshold: float = 0.5, *, count_difficult: bool = False
) -> dict[str, Curve]:
    """Match detections to objects by the rules of the VOC devkit.

    By falling score over all images (at equal scores in the data set's order), each detection goes to the object of
    its class and image with which its IoU is highest (at equal IoU the first). IoU below the threshold: a false
    positive. An ignored object (VOC difficult, COCO crowd): the detection counts neither way. An object that an earlier
    detection hit: a false positive. Else a hit.

    Args:
        dataset: ground truth; ``boxes, labels, ignore`` of its records.
        results: one per record, in the same order: ``"boxes"`` ``(n, 4)``, pixels of the original image; ``"labels"``
            ``(n,)``, 1..K; ``"scores"`` ``(n,)``.
        iou_threshold: IoU from which a detection hits.
        count_difficult: treat ignored objects as all others.

    Returns:
        Class name -> its curve, in the order of the labels.

    Raises:
        ValueError: not one result per record, or a label outside 1..K.

    Source:
        VOCevaldet.m of the VOC 2012 devkit. Boxes are continuous here, where the devkit adds 1 to each width and height
        because its corners are pixels that belong to the box.
    """
    if len(results) != len(dataset.records):
        raise ValueError(f"results must have one entry per image ({len(dataset.records)}), got {len(results)}")
    classes = len(dataset.classes)
    owners: list[NDArray[np.int64]] = []
    overlaps: list[Floats] = []
    first = 0
    for record, result in zip(dataset.records, results, strict=True):
        overlap, owner = _best(result, record.boxes, record.labels)
        overlaps.append(overlap)
        owners.append(owner + first)
        first += len(record.labels)
    overlap, owner = _join(overlaps, np.float64), _join(owners, np.int64)
    labels = _join([np.asarray(result["labels"]) for result in results], np.int64)
    scores = _join([np.asarray(result["scores"]) for result in results], np.float64)
    if len(labels) and not 1 <= labels.min() <= labels.max() <= classes:
        raise ValueError(f"labels must be 1..{classes}, got {labels.min()}..{labels.max()}")
    ignored = _join([record.ignore for record in dataset.records], np.bool_)
    gt_labels = _join([record.labels for record in dataset.records], np.int64)
    if count_difficult:
        ignored = np.zeros_like(ignored)
    gt = np.bincount(gt_labels[~ignored], minlength=classes + 1)

    order = np.argsort(-scores, kind="stable")
    curves = {}
    for label, name in enumerate(dataset.classes, start=1):
        mine = order[labels[order] == label]
        reached = overlap[mine] >= iou_threshold
        on_ignored = np.zeros(len(mine), np.bool_)
        on_ignored[reached] = ignored[owner[mine[reached]]]
        counted = mine[~on_ignored]
        candidates = np.flatnonzero(reached[~on_ignored])
        hit = np.zeros(len(counted), np.int64)
        hit[candidates[np.unique(owner[counted[candidates]], return_index=True)[1]]] = 1
        curves[name] = Curve(scores[counted], np.cumsum(hit), int(gt[label]))
    return curves


def _best(result: Result, gt_boxes: np.ndarray, gt_labels: np.ndarray) -> tuple[Floats, NDArray[np.int64]]:
    """IoU and row of the object of the same class that each detection overlaps most; -1 and 0 where there is none."""
    boxes, labels = np.asarray(result["boxes"], np.float64).reshape(-1, 4), np.asarray(result["labels"])
    if not len(gt_labels) or not len(boxes):
        return np.full(len(boxes), -1.0), np.zeros(len(boxes), np.int64)
    gt_boxes = gt_boxes.astype(np.float64)
    sides = np.minimum(boxes[:, None, 2:], gt_boxes[:, 2:]) - np.maximum(boxes[:, None, :2], gt_boxes[:, :2])
    intersection = sides.clip(min=0).prod(-1)
    area, gt_area = (boxes[:, 2:] - boxes[:, :2]).prod(-1), (gt_boxes[:, 2:] - gt_boxes[:, :2]).prod(-1)
    union = area[:, None] + gt_area - intersection
    iou = np.divide(intersection, union, out=np.zeros_like(union), where=intersection > 0)
    iou[labels[:, None] != gt_labels] = -1
    owner = iou.argmax(1)
    return iou[np.arange(len(boxes)), owner], owner


def _join(arrays: list[np.ndarray], dtype: type[np.generic]) -> NDArray:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)
