"""Average precision and recall by the rules of COCO, counted by pycocotools."""

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rcnn.data.coco import to_coco
from rcnn.data.dataset import DetectionDataset
from rcnn.metrics.curves import Result

# Places in COCOeval's arrays: IoU thresholds 0.50:0.05:0.95; areas all, small (< 32^2), medium, large (> 96^2); at most
# 1, 10 or 100 detections of an image and class.
_ALL = slice(None)
_AP = {"AP": (_ALL, 0), "AP50": (0, 0), "AP75": (5, 0), "APs": (_ALL, 1), "APm": (_ALL, 2), "APl": (_ALL, 3)}
_AR = {"AR1": 0, "AR10": 1, "AR100": 2}


def coco_ap(dataset: DetectionDataset, results: Sequence[Result]) -> dict[str, Any]:
    """COCO's table of average precision and recall, and AP of each class.

    Ignore regions (COCO crowd, VOC difficult) are COCO's crowd: a detection counts neither way if at least the IoU
    threshold's share of its area lies in one and it matches no other object. Prints nothing.

    Args:
        dataset: ground truth.
        results: one per image of the data set, in its order: ``"boxes"`` ``(n, 4)``, pixels of the original image;
            ``"labels"`` ``(n,)``, 1..K; ``"scores"`` ``(n,)``. The 100 best of an image and class count.

    Returns:
        ``{"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "per_class": {name: {"AP", "AP50"}}}``,
        each in 0..1; NaN where there is no object to find (COCO writes -1).

    Raises:
        ValueError: not one result per image, or a label outside 1..K.

    Source:
        COCOeval of pycocotools with its standard parameters.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    ground_truth = to_coco(dataset)
    found = {**ground_truth, "annotations": _annotations(ground_truth, results)}
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for content in (ground_truth, found):
            side = COCO()
            side.dataset = content
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    places = {category: place for place, category in enumerate(evaluation.params.catIds)}  # COCOeval sorts them
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    values: dict[str, Any] = {
        name: _mean(precision[threshold, :, :, size, -1]) for name, (threshold, size) in _AP.items()
    }
    values |= {name: _mean(recall[:, :, 0, place]) for name, place in _AR.items()}
    values["per_class"] = {
        name: {
            "AP": _mean(precision[:, :, places[category["id"]], 0, -1]),
            "AP50": _mean(precision[0, :, places[category["id"]], 0, -1]),
        }
        for name, category in zip(dataset.classes, ground_truth["categories"], strict=True)
    }
    return values


def _annotations(ground_truth: dict[str, Any], results: Sequence[Result]) -> list[dict[str, Any]]:
    images, categories = ground_truth["images"], ground_truth["categories"]
    if len(results) != len(images):
        raise ValueError(f"results must have one entry per image ({len(images)}), got {len(results)}")
    annotations: list[dict[str, Any]] = []
    for image, result in zip(images, results, strict=True):
        boxes = np.asarray(result["boxes"], np.float64).reshape(-1, 4)
        labels, scores = np.asarray(result["labels"]).tolist(), np.asarray(result["scores"]).tolist()
        for (x1, y1, x2, y2), label, score in zip(boxes.tolist(), labels, scores, strict=True):
            if not 1 <= label <= len(categories):
                raise ValueError(f"labels must be 1..{len(categories)}, got {label}")
            annotations.append(
                {
                    "id": len(annotations) + 1,  # 0 means "no match" to COCOeval
                    "image_id": image["id"],
                    "category_id": categories[label - 1]["id"],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "score": score,
                    "iscrowd": 0,
                }
            )
    return annotations


def _mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else math.nan
