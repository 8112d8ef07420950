"""Average precision by the rules of PASCAL VOC: the area of 2010 and later, the 11 points of 2007."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rcnn.data.dataset import DetectionDataset
from rcnn.metrics.curves import Curve, Result, match_detections


def voc_ap(
    dataset: DetectionDataset, results: Sequence[Result], iou_threshold: float = 0.5, *, count_difficult: bool = False
) -> dict[str, Any]:
    """Average precision of each class and its mean over the classes that have objects.

    What a hit is: :func:`rcnn.metrics.curves.match_detections`. Boxes are continuous: no 1 is added to a width as in
    the VOC devkit, whose corners are pixels that belong to the box.

    Args:
        dataset: ground truth.
        results: one per image of the data set, in its order: ``"boxes"`` ``(n, 4)``, pixels of the original image;
            ``"labels"`` ``(n,)``, 1..K; ``"scores"`` ``(n,)``.
        iou_threshold: IoU from which a detection hits.
        count_difficult: treat ignored objects (VOC difficult, COCO crowd) as all others.

    Returns:
        ``{"map_area", "map_11point", "per_class": {name: {"ap_area", "ap_11point", "gt", "detections"}}}``: AP in 0..1,
        NaN for a class without objects and for the mean of no class; objects and detections that count.

    Raises:
        ValueError: not one result per image, or a label outside 1..K.

    Source:
        VOCevaldet.m of the VOC 2007 and 2012 devkits, but for the continuous boxes.
    """
    curves = match_detections(dataset, results, iou_threshold, count_difficult=count_difficult)
    per_class = {
        name: {
            "ap_area": area(curve),
            "ap_11point": eleven_points(curve),
            "gt": curve.gt,
            "detections": len(curve.scores),
        }
        for name, curve in curves.items()
    }
    return {
        "map_area": _mean([row["ap_area"] for row in per_class.values()]),
        "map_11point": _mean([row["ap_11point"] for row in per_class.values()]),
        "per_class": per_class,
    }


def area(curve: Curve) -> float:
    """Area under the curve after each precision was raised to the highest one at any higher recall.

    Returns:
        0..1; NaN without objects.
    """
    if not curve.gt:
        return math.nan
    envelope = np.maximum.accumulate(curve.precision[::-1])[::-1]
    return float((np.diff(curve.recall, prepend=0.0) * envelope).sum())


def eleven_points(curve: Curve) -> float:
    """Mean over the recalls 0, 0.1, ..., 1 of the highest precision at that recall or a higher one, 0 if there is none.

    Recall is compared in whole numbers (``10 * hits >= k * gt``): 3 of 10 objects do reach the recall 0.3.

    Returns:
        0..1; NaN without objects.
    """
    if not curve.gt:
        return math.nan
    precision = curve.precision
    return float(np.mean([precision[10 * curve.hits >= k * curve.gt].max(initial=0.0) for k in range(11)]))


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
