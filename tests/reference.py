"""Oracles: textbook loops over Python floats, which import nothing of the package."""

import math

# Anchors, matching, sampling, proposals, detections: boxes are tuples of Python floats.


def cell_anchors(sizes, ratios):
    """Corners of a cell's anchors, rounded half to even; ratio-major."""
    result = []
    for ratio in ratios:
        for size in sizes:
            width, height = size / math.sqrt(ratio), size * math.sqrt(ratio)
            result.append((round(-width / 2), round(-height / 2), round(width / 2), round(height / 2)))
    return result


def anchors(cells, shapes, strides):
    """Every anchor by level, row, column, anchor of the cell."""
    result = []
    for cell, (height, width), stride in zip(cells, shapes, strides, strict=True):
        for y in range(height):
            for x in range(width):
                for x1, y1, x2, y2 in cell:
                    result.append((x1 + x * stride, y1 + y * stride, x2 + x * stride, y2 + y * stride))
    return result


def box_area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def shared_area(a, b):
    """Area of the intersection; 0 for a box that is empty, reversed or not finite."""
    if not all(math.isfinite(v) for v in (*a, *b)):
        return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def box_iou(a, b):
    shared = shared_area(a, b)
    return shared / (box_area(a) + box_area(b) - shared) if shared > 0 else 0.0


def encode(box, target, weights=(1.0, 1.0, 1.0, 1.0)):
    """The four deltas of equation 2 of Faster R-CNN."""
    width, height = box[2] - box[0], box[3] - box[1]
    target_width, target_height = target[2] - target[0], target[3] - target[1]
    return (
        weights[0] * ((target[0] + target[2]) / 2 - (box[0] + box[2]) / 2) / width,
        weights[1] * ((target[1] + target[3]) / 2 - (box[1] + box[3]) / 2) / height,
        weights[2] * math.log(target_width / width),
        weights[3] * math.log(target_height / height),
    )


def decode(delta, box, weights=(1.0, 1.0, 1.0, 1.0)):
    """The inverse of :func:`encode`; a side grows by at most 1000 / 16. None if a delta is not finite."""
    if not all(math.isfinite(v) for v in delta):
        return None
    width, height = box[2] - box[0], box[3] - box[1]
    x = (box[0] + box[2]) / 2 + delta[0] / weights[0] * width
    y = (box[1] + box[3]) / 2 + delta[1] / weights[1] * height
    half_width = width * math.exp(min(delta[2] / weights[2], math.log(1000 / 16))) / 2
    half_height = height * math.exp(min(delta[3] / weights[3], math.log(1000 / 16))) / 2
    return (x - half_width, y - half_height, x + half_width, y + half_height)


def clip(box, size):
    """Corners moved into an image of ``size`` = (height, width)."""
    height, width = size
    return (
        min(max(box[0], 0.0), width),
        min(max(box[1], 0.0), height),
        min(max(box[2], 0.0), width),
        min(max(box[3], 0.0), height),
    )


def match(boxes, gt_boxes, gt_labels, rows, high, low, low_quality):
    """Labels and matched rows of the boxes of one image whose ground truth are ``rows``."""
    valid = [row for row in rows if gt_labels[row] > 0]
    table = [[box_iou(box, gt_boxes[row]) for row in valid] for box in boxes]
    labels, matched = [], []
    for line in table:
        best = max(line, default=0.0)
        labels.append(1 if best >= high else 0 if best < low else -1)
        matched.append(valid[line.index(best)] if best > 0 else -1)
    if low_quality:
        for column in range(len(valid)):
            best = max((line[column] for line in table), default=0.0)
            for index, line in enumerate(table):
                if best > 0 and line[column] == best:
                    labels[index] = 1
    for index, box in enumerate(boxes):
        for row in rows:
            shared = shared_area(box, gt_boxes[row]) if gt_labels[row] < 0 else 0.0
            if labels[index] == 0 and shared > 0 and shared >= 0.5 * box_area(box):
                labels[index] = -1
    return labels, [row if label == 1 else -1 for label, row in zip(labels, matched, strict=True)]


def mix(value):
    """The finaliser of splitmix64."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return value ^ (value >> 31)


def sampling_key(stream, seed, step, image_id, index):
    """The key of one index; ``stream`` is 8 ASCII letters read as a big-endian number."""
    start = mix(int.from_bytes(stream, "big") ^ seed % 2**64)
    start = mix((mix((start + step) % 2**64) + image_id) % 2**64)
    return mix((start + index * 0x9E3779B97F4A7C15) % 2**64)


def sample(labels, keys, size, fraction):
    """(index, label) of the rows drawn from one image: positives, negatives, padding as (0, -1)."""
    by_key = sorted(range(len(labels)), key=lambda index: keys[index])
    positive = [(index, 1) for index in by_key if labels[index] == 1][: int(size * fraction)]
    negative = [(index, 0) for index in by_key if labels[index] == 0][: size - len(positive)]
    drawn = positive + negative
    return drawn + [(0, -1)] * (size - len(drawn))


def thin(boxes, iou_threshold):
    """Positions kept by greedy NMS of boxes that stand by falling score."""
    kept = []
    for index, box in enumerate(boxes):
        if all(box_iou(box, boxes[other]) <= iou_threshold for other in kept):
            kept.append(index)
    return kept


def proposals(objectness, deltas, anchors, size, level_sizes, pre_nms, post_nms, iou_threshold, min_size):
    """(box, score) of the proposals of one image."""
    found, start = [], 0
    for level in level_sizes:
        order = [index for index in range(start, start + level) if math.isfinite(objectness[index])]
        order.sort(key=lambda index: (-objectness[index], index))
        candidates = []
        for index in order[:pre_nms]:
            box = decode(deltas[index], anchors[index])
            if box is not None:
                box = clip(box, size)
                if box[2] - box[0] >= min_size and box[3] - box[1] >= min_size:
                    candidates.append((-objectness[index], index, box))
        found += [candidates[i] for i in thin([box for _, _, box in candidates], iou_threshold)]
        start += level
    return [(box, -score) for score, _, box in sorted(found)[:post_nms]]


def detections(probabilities, deltas, boxes, size, score_threshold, iou_threshold, most, weights):
    """(box, score, label) of the detections of one image, from given class probabilities."""
    found = []
    for label in range(1, len(probabilities[0]) if probabilities else 1):
        candidates = []
        for row, box in enumerate(boxes):
            score = probabilities[row][label]
            moved = decode(deltas[row][4 * label : 4 * label + 4], box, weights)
            if score > score_threshold and moved is not None:
                moved = clip(moved, size)
                if moved[2] - moved[0] >= 1e-2 and moved[3] - moved[1] >= 1e-2:
                    candidates.append((-score, row, label, moved))
        candidates.sort()
        found += [candidates[i] for i in thin([c[3] for c in candidates], iou_threshold)]
    return [(box, -score, label) for score, _, label, box in sorted(found)[:most]]


# NMS of unsorted boxes, RoI Align and RoI pooling; a map is ``map[channel][y][x]``, a region ``x1, y1, x2, y2``.


def nms(boxes, scores, groups, iou_threshold):
    """Positions kept by falling score, lower position first; boxes of different groups never meet."""
    order = [i for i in range(len(boxes)) if all(math.isfinite(v) for v in boxes[i])]
    order.sort(key=lambda i: (-scores[i], i))
    kept = []
    for i in order:
        if all(groups[i] != groups[j] or box_iou(boxes[i], boxes[j]) <= iou_threshold for j in kept):
            kept.append(i)
    return kept


def bilinear(plane, y, x):
    """Value between four cells; 0 more than one cell outside, the border value up to there."""
    height, width = len(plane), len(plane[0])
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = plane[top][left] * (1 - dx) + plane[top][right] * dx
    lower = plane[bottom][left] * (1 - dx) + plane[bottom][right] * dx
    return upper * (1 - dy) + lower * dy


def roi_align(planes, region, size, scale, sampling_ratio, aligned):
    """Average of the samples of each bin, ``[channel][i][j]``."""
    x1, y1, x2, y2 = (v * scale - (0.5 if aligned else 0.0) for v in region)
    width, height = x2 - x1, y2 - y1
    if not aligned:
        width, height = max(width, 1.0), max(height, 1.0)
    bin_height, bin_width = height / size[0], width / size[1]
    rows = sampling_ratio if sampling_ratio > 0 else max(0, math.ceil(bin_height))
    columns = sampling_ratio if sampling_ratio > 0 else max(0, math.ceil(bin_width))
    result = []
    for plane in planes:
        result.append([[0.0] * size[1] for _ in range(size[0])])
        for i in range(size[0]):
            for j in range(size[1]):
                for k in range(rows):
                    for n in range(columns):
                        y = y1 + i * bin_height + (k + 0.5) * bin_height / rows
                        x = x1 + j * bin_width + (n + 0.5) * bin_width / columns
                        result[-1][i][j] += bilinear(plane, y, x) / (rows * columns)
    return result


def pyramid_level(region, finest, coarsest, canonical_scale=224, canonical_level=4):
    """Level of a region of positive area."""
    side = math.sqrt((region[2] - region[0]) * (region[3] - region[1]))
    level = math.floor(canonical_level + math.log2(side / canonical_scale) + 1e-6)
    return min(max(level, finest), coarsest)


def roi_pool(planes, region, size, scale):
    """Maximum of each bin and the cell ``(y, x)`` it came from or None, both ``[channel][i][j]``."""
    x1, y1, x2, y2 = (int(math.floor(abs(v * scale) + 0.5) * (1 if v > 0 else -1)) for v in region)
    height, width = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
    values, cells = [], []
    for plane in planes:
        values.append([[0.0] * size[1] for _ in range(size[0])])
        cells.append([[None] * size[1] for _ in range(size[0])])
        for i in range(size[0]):
            for j in range(size[1]):
                top, bottom = y1 + i * height // size[0], y1 - (-(i + 1) * height // size[0])
                left, right = x1 + j * width // size[1], x1 - (-(j + 1) * width // size[1])
                for y in range(max(top, 0), min(bottom, len(plane))):
                    for x in range(max(left, 0), min(right, len(plane[0]))):
                        if cells[-1][i][j] is None or plane[y][x] > values[-1][i][j]:
                            values[-1][i][j], cells[-1][i][j] = plane[y][x], (y, x)
    return values, cells
