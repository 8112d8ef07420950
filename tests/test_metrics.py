import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rcnn.data.dataset import DetectionDataset, Record
from rcnn.metrics import coco, curves, voc
from rcnn.metrics.coco import coco_ap
from rcnn.metrics.curves import match_detections, precision_recall
from rcnn.metrics.voc import voc_ap

EPS = np.finfo(np.float64).eps


def dataset(images, classes=("a", "b"), **kwargs):
    """Each image is a list of (box, label) or (box, label, ignored)."""
    records = []
    for number, objects in enumerate(images):
        boxes = np.array([o[0] for o in objects], np.float32).reshape(-1, 4)
        labels = np.array([o[1] for o in objects], np.int64)
        ignore = np.array([len(o) > 2 and o[2] for o in objects], bool)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        records.append(Record(Path(f"{number}.jpg"), f"{number:06d}", 640, 480, boxes, labels, ignore, areas))
    return DetectionDataset("test", classes, records, **kwargs)


def results(*images):
    """Each image is a list of (box, label, score)."""
    return [
        {
            "boxes": np.array([d[0] for d in image], np.float32).reshape(-1, 4),
            "labels": np.array([d[1] for d in image], np.int64),
            "scores": np.array([d[2] for d in image], np.float32),
        }
        for image in images
    ]


A, B, FAR = (0, 0, 10, 10), (20, 0, 30, 10), (50, 50, 60, 60)


def test_voc_by_hand():
    data = dataset([[(A, 1), (B, 1)], [(A, 1)]], ["a"])
    found = results(
        [((20, 0, 30, 5), 1, 0.5), (A, 1, 0.9), ((0, 0, 10, 9), 1, 0.8)],
        [(A, 1, 0.7), (FAR, 1, 0.6)],
    )
    # score      0.9   0.8                    0.7   0.6       0.5
    # IoU        1     0.9, but A was hit     1     0         50 / 100 = 0.5, which reaches the threshold
    # hits       1     1                      2     2         3
    # precision  1     1/2                    2/3   1/2       3/5
    # recall     1/3   1/3                    2/3   2/3       1
    curve = match_detections(data, found)["a"]
    assert np.array_equal(curve.scores, np.float32([0.9, 0.8, 0.7, 0.6, 0.5]))
    assert curve.hits.tolist() == [1, 1, 2, 2, 3] and curve.gt == 3
    assert curve.precision.tolist() == [1, 1 / 2, 2 / 3, 1 / 2, 3 / 5]
    assert curve.recall.tolist() == [1 / 3, 1 / 3, 2 / 3, 2 / 3, 1]
    # area: envelope 1, 2/3, 2/3, 3/5, 3/5: (1 + 2/3 + 3/5) / 3 = 34/45
    # 11 points: recall 0..0.3 -> 1, 0.4..0.6 -> 2/3, 0.7..1 -> 3/5: (4 + 2 + 2.4) / 11
    got = voc_ap(data, found)
    assert got["per_class"]["a"]["gt"] == 3 and got["per_class"]["a"]["detections"] == 5
    assert got["map_area"] == got["per_class"]["a"]["ap_area"] == pytest.approx(34 / 45, rel=5 * EPS)  # 5 terms
    assert got["map_11point"] == got["per_class"]["a"]["ap_11point"] == pytest.approx(8.4 / 11, rel=11 * EPS)
    # With the threshold just above 0.5 the last one is a miss: (1 + 2/3) / 3.
    assert voc_ap(data, found, 0.5000001)["map_area"] == pytest.approx(5 / 9, rel=5 * EPS)


def test_eleven_points_on_the_boundary():
    # 3 of 10 objects found, all right: recall reaches 0, 0.1, 0.2 and 0.3 (3 / 10 < 3 * 0.1 in binary fractions).
    data = dataset([[(A, 1)]] * 10, ["a"])
    found = results(*[[(A, 1, 0.9)]] * 3, *[[]] * 7)
    assert voc_ap(data, found)["map_11point"] == 4 / 11
    assert voc_ap(data, found)["map_area"] == pytest.approx(0.3, rel=3 * EPS)


def test_a_detection_goes_to_the_object_it_overlaps_most():
    # (0, 2, 10, 12) is free, and the second detection overlaps it with 85 / 115 = 0.74; but A with 95 / 105 = 0.90.
    data = dataset([[(A, 1), ((0, 2, 10, 12), 1)]], ["a"])
    found = results([(A, 1, 0.9), ((0, 0.5, 10, 10.5), 1, 0.8)])
    assert match_detections(data, found)["a"].hits.tolist() == [1, 1]


def test_difficult_objects():
    hard = (0, 2, 10, 12)
    data = dataset([[(A, 1), (hard, 1, True), (FAR, 1, True)]], ["a"])
    found = results([(FAR, 1, 0.9), (FAR, 1, 0.8), ((0, 1.5, 10, 11.5), 1, 0.7), ((100, 100, 110, 110), 1, 0.6)])
    # The third overlaps A with 85 / 115, but the difficult one with 95 / 105: it counts neither way, A stays unfound.
    curve = match_detections(data, found)["a"]
    assert curve.gt == 1 and curve.hits.tolist() == [0] and np.array_equal(curve.scores, np.float32([0.6]))
    assert voc_ap(data, found)["per_class"]["a"] == {"ap_area": 0, "ap_11point": 0, "gt": 1, "detections": 1}
    curve = match_detections(data, found, count_difficult=True)["a"]
    assert curve.gt == 3 and curve.hits.tolist() == [1, 1, 2, 2]


def test_equal_scores_keep_their_order():
    data = dataset([[(A, 1)]], ["a"])
    assert match_detections(data, results([(A, 1, 0.5), (FAR, 1, 0.5)]))["a"].hits.tolist() == [1, 1]
    assert match_detections(data, results([(FAR, 1, 0.5), (A, 1, 0.5)]))["a"].hits.tolist() == [0, 1]


def test_classes_without_objects_and_images_without_anything():
    data = dataset([[(A, 1)], [], [(FAR, 3, True)]], ["a", "b", "c"])
    found = results([(A, 1, 0.9), (A, 2, 0.9)], [(A, 2, 0.8)], [])
    got = voc_ap(data, found)
    assert got["map_area"] == got["map_11point"] == 1  # a alone has objects
    assert math.isnan(got["per_class"]["b"]["ap_area"]) and math.isnan(got["per_class"]["b"]["ap_11point"])
    assert got["per_class"]["b"]["gt"] == 0 and got["per_class"]["b"]["detections"] == 2
    assert math.isnan(got["per_class"]["c"]["ap_area"])
    assert np.isnan(match_detections(data, found)["b"].recall).all()
    assert match_detections(data, found)["b"].precision.tolist() == [0, 0]
    lines = precision_recall(data, found)
    assert {name: (r.tolist(), p.tolist()) for name, (r, p) in lines.items()} == {"a": ([1], [1])}
    got = coco_ap(data, found)
    assert got["AP"] == pytest.approx(1, rel=1010 * EPS)  # the mean of 10 thresholds x 101 points
    assert math.isnan(got["per_class"]["b"]["AP"]) and math.isnan(got["per_class"]["c"]["AP50"])


@pytest.mark.parametrize("images", [[], [[], []]])
def test_nothing_to_find(images):
    data, found = dataset(images), results(*[[] for _ in images])
    assert math.isnan(voc_ap(data, found)["map_area"]) and math.isnan(voc_ap(data, found)["map_11point"])
    assert math.isnan(coco_ap(data, found)["AP"]) and math.isnan(coco_ap(data, found)["AR100"])


def test_nothing_found():
    data, found = dataset([[(A, 1)], [(B, 2)]]), results([], [])
    assert voc_ap(data, found)["map_area"] == voc_ap(data, found)["map_11point"] == 0
    got = coco_ap(data, found)
    assert got["AP"] == got["AP50"] == got["AR100"] == got["per_class"]["b"]["AP"] == 0


@pytest.mark.parametrize("metric", [voc_ap, coco_ap])
def test_bad_results(metric):
    data = dataset([[(A, 1)], []])
    with pytest.raises(ValueError, match=r"one entry per image \(2\), got 1"):
        metric(data, results([]))
    for label in (0, 3):
        with pytest.raises(ValueError, match=rf"labels must be 1..2, got {label}"):
            metric(data, results([(A, label, 0.5)], []))


def devkit(objects, detections, threshold):
    """VOCevaldet.m for one class without its + 1; objects (image, box, ignored), detections (image, box, score)."""
    wanted = sum(not ignored for _, _, ignored in objects)
    taken, tp, fp, precision, recall = set(), 0, 0, [], []
    for image, box, _ in sorted(detections, key=lambda d: -d[2]):
        best, best_row = -math.inf, -1
        for row, (gt_image, gt, _) in enumerate(objects):
            width = min(box[2], gt[2]) - max(box[0], gt[0])
            height = min(box[3], gt[3]) - max(box[1], gt[1])
            if gt_image == image and width > 0 and height > 0:
                union = (box[2] - box[0]) * (box[3] - box[1]) + (gt[2] - gt[0]) * (gt[3] - gt[1]) - width * height
                if width * height / union > best:
                    best, best_row = width * height / union, row
        if best >= threshold:
            if objects[best_row][2]:
                continue
            tp, fp = (tp, fp + 1) if best_row in taken else (tp + 1, fp)
            taken.add(best_row)
        else:
            fp += 1
        precision.append(tp / (tp + fp))
        recall.append(tp / wanted)
    points = [max([p for p, r in zip(precision, recall, strict=True) if r >= k / 10], default=0) for k in range(11)]
    total = 0.0
    for i, r in enumerate(recall):
        total += (r - (recall[i - 1] if i else 0)) * max(precision[i:])
    return total, sum(points) / 11


def test_voc_is_the_devkit_loop():
    random = np.random.default_rng(3)

    def boxes(count):
        corner = random.integers(0, 24, (count, 2))
        return np.concatenate((corner, corner + random.integers(6, 20, (count, 2))), 1)

    images, found = [], []
    for _ in range(30):
        images.append([(b, random.integers(1, 3), random.random() < 0.2) for b in boxes(random.integers(0, 6))])
        near = [(b + random.integers(-2, 3, 4), n, random.random()) for b, n, _ in images[-1] for _ in range(2)]
        found.append([*near, *((b, random.integers(1, 3), random.random()) for b in boxes(random.integers(0, 6)))])
    data = dataset(images)
    for threshold in (0.3, 0.5):
        got = voc_ap(data, results(*found), threshold)["per_class"]
        for label, name in ((1, "a"), (2, "b")):
            objects = [(i, b.tolist(), g) for i, image in enumerate(images) for b, n, g in image if n == label]
            detections = [(i, b.tolist(), s) for i, image in enumerate(found) for b, n, s in image if n == label]
            total, points = devkit(objects, detections, threshold)
            assert 0.05 < total < 0.95
            assert got[name]["ap_area"] == pytest.approx(total, rel=len(detections) * EPS)  # a sum over the detections
            assert got[name]["ap_11point"] == pytest.approx(points, rel=11 * EPS)


def test_coco_by_hand():
    # IoU 0.82 reaches 0.5, 0.55, ... 0.8: 7 of the 10 thresholds. Area 10000 is large.
    data = dataset([[((0, 0, 100, 100), 1)]], ["a"])
    got = coco_ap(data, results([((0, 0, 100, 82), 1, 0.9)]))
    for name in ("AP", "APl", "AR1", "AR10", "AR100"):
        assert got[name] == pytest.approx(0.7, rel=1010 * EPS)
    assert got["AP50"] == got["AP75"] == got["per_class"]["a"]["AP50"] == pytest.approx(1, rel=101 * EPS)
    assert got["per_class"]["a"]["AP"] == pytest.approx(0.7, rel=1010 * EPS)
    assert math.isnan(got["APs"]) and math.isnan(got["APm"])
    # Hit, miss, hit: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1. The 51 recalls 0, 0.01 ... 0.5 -> 1, the others 2/3.
    data = dataset([[(A, 1), (B, 1)]], ["a"])
    got = coco_ap(data, results([(A, 1, 0.9), (FAR, 1, 0.8), (B, 1, 0.7)]))
    assert got["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101, rel=1010 * EPS)
    assert got["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101, rel=101 * EPS)
    assert got["AR1"] == 0.5 and got["AR10"] == 1


def test_coco_crowd_counts_neither_way():
    crowd = (100, 100, 200, 200)
    inside = [((120, 120, 140, 140), 1, 0.9), ((150, 150, 170, 170), 1, 0.8)]
    data = dataset([[(crowd, 1, True), (A, 1)]], ["a"])
    assert coco_ap(data, results([*inside, (A, 1, 0.5)]))["AP"] == pytest.approx(1, rel=1010 * EPS)
    # Without the crowd both are misses that come first: precision 1/3 at every recall.
    assert coco_ap(dataset([[(A, 1)]], ["a"]), results([*inside, (A, 1, 0.5)]))["AP"] == pytest.approx(
        1 / 3, rel=1010 * EPS
    )


def test_coco_category_ids_in_any_order(capsys):
    data = dataset([[(A, 1), (B, 2)], [(A, 1)]], ["dog", "car"], categories={1: 18, 2: 3})
    got = coco_ap(data, results([(A, 1, 0.9)], [(A, 1, 0.8)]))
    assert list(got["per_class"]) == ["dog", "car"]
    assert got["per_class"]["dog"]["AP"] == pytest.approx(1, rel=1010 * EPS) and got["per_class"]["car"]["AP"] == 0
    assert got["AP"] == pytest.approx(0.5, rel=2020 * EPS)
    assert capsys.readouterr().out == ""


def test_thousands_of_images():
    random = np.random.default_rng(0)
    corner = random.uniform(0, 400, (5000, 8, 2))
    boxes = np.concatenate((corner, corner + random.uniform(10, 100, (5000, 8, 2))), 2)
    labels = random.integers(1, 21, (5000, 8))
    data = dataset(
        [list(zip(b, n, strict=True)) for b, n in zip(boxes, labels, strict=True)], [f"c{i}" for i in range(20)]
    )
    scores = random.random(8)
    found = [{"boxes": b, "labels": n, "scores": scores} for b, n in zip(boxes, labels, strict=True)]
    assert voc_ap(data, found)["map_area"] == pytest.approx(1, rel=5000 * EPS)


def test_import_is_lazy():
    code = "import sys, rcnn.metrics.coco; print('pycocotools' in sys.modules)"
    root = Path(curves.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert coco.__name__ == "rcnn.metrics.coco" and voc.__name__ == "rcnn.metrics.voc"
