"""Detections: from the outputs of the RoI head to the best boxes of all classes of each image.

Counted: 4 bytes per logit, 16 per proposal and per candidate's deltas, 28 per detection; 3 operations per logit
(softmax), 20 to decode and clip a candidate, 13 for each pair of those of a class (see ``bench/nms.py``).
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench import textbook
from bench.cases import Case, chosen
from bench.inputs import around, generator, objects
from rcnn.kernels import detections
from rcnn.structures import Detections, Proposals
from tests import reference

#: Images, proposals of each, columns (classes and background), score threshold: COCO, VOC and ``tiny``.
CASES = {
    "cpu": ((1, 1000, 91, 0.05), (8, 1000, 91, 0.05), (1, 300, 21, 0.05), (8, 300, 3, 0.01), (1, 300, 3, 0.01)),
    "cuda": ((8, 1000, 91, 0.05), (1, 1000, 91, 0.05), (1, 300, 21, 0.05), (8, 300, 3, 0.01)),
}
HEIGHT, WIDTH, MOST = 800, 1344, 100
WEIGHTS = (8.0, 8.0, 4.0, 4.0)  # powers of two: with whole deltas every box is exact


def cases(device: torch.device, peers: set[str]) -> Iterator[Case]:
    """See the module."""
    for images, count, columns, threshold in CASES[device.type]:
        yield _case(images, count, columns, threshold, device, peers)


@cache
def _peer(threshold: float) -> Any:
    from torchvision.models.detection.roi_heads import RoIHeads

    return RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, WEIGHTS, threshold, 0.5, MOST)


def _case(images: int, count: int, columns: int, threshold: float, device: torch.device, peers: set[str]) -> Case:
    random = generator()
    truth = [objects(20, HEIGHT, WIDTH, random) for _ in range(images)]
    boxes = torch.stack([(around(each, count, HEIGHT, WIDTH, random) / 8).round() * 8 for each in truth])
    # The classes that a trained head gives weight to: the background, a class or two of the object, and noise.
    logits = torch.randn(images * count, columns, generator=random)
    logits[:, 0] += 3
    for _ in range(2):
        likely = torch.randint(1, columns, (images * count, 1), generator=random)
        logits.scatter_add_(1, likely, 4 * torch.rand(images * count, 1, generator=random))
    logits = torch.cat([_apart(each, threshold) for each in logits.split(count)])
    deltas = torch.randint(-2, 3, (images * count, columns, 4), generator=random).to(torch.float32)
    deltas[..., 2:] = 0
    logits, deltas, boxes = logits.to(device), deltas.flatten(1).to(device), boxes.to(device)
    sizes = torch.tensor([[float(HEIGHT), float(WIDTH)]] * images, device=device)
    found = Proposals(boxes, torch.zeros(images, count, device=device), torch.full((images,), count, device=device))

    def ours() -> Detections:
        return detections(
            logits, deltas, found, sizes,
            score_threshold=threshold, detections_per_image=MOST, box_weights=WEIGHTS,
        )  # fmt: skip

    def torchvision() -> tuple[list[Tensor], ...]:
        return _peer(threshold).postprocess_detections(logits, deltas, list(boxes), [(HEIGHT, WIDTH)] * images)

    def plain(on: torch.device = device) -> list[tuple[Tensor, Tensor, Tensor]]:
        inputs = (x.to(on) for x in (logits, deltas, boxes, sizes))
        return textbook.detections(*inputs, threshold, MOST, WEIGHTS)

    def gate() -> None:
        result = ours().unpad()
        answers = [plain(torch.device("cpu"))]
        if "torchvision" in peers:
            answers.append(list(zip(*torchvision(), strict=True)))
        for answer in answers:
            for each, (best, scores, labels) in zip(result, answer, strict=True):
                assert torch.equal(each["boxes"].cpu(), best.cpu())
                assert torch.equal(each["labels"].cpu(), labels.cpu())
                # The last bits of exp and of a sum hang on the device.
                torch.testing.assert_close(each["scores"].cpu(), scores.cpu(), rtol=2 * _rounding(columns), atol=0)
        some = 40
        count_of_some = torch.full_like(found.count[:1], some)
        first = detections(
            logits[:some], deltas[:some], Proposals(boxes[:1, :some], found.scores[:1, :some], count_of_some),
            sizes[:1], score_threshold=threshold, detections_per_image=MOST, box_weights=WEIGHTS,
        ).unpad()[0]  # fmt: skip
        expected = reference.detections(
            logits[:some].softmax(dim=1).tolist(), deltas[:some].tolist(), boxes[0, :some].tolist(),
            sizes[0].tolist(), threshold, 0.5, MOST, WEIGHTS,
        )  # fmt: skip
        assert first["boxes"].tolist() == [list(each) for each, _, _ in expected]
        assert first["labels"].tolist() == [label for _, _, label in expected]

    probabilities = logits.softmax(dim=1)[:, 1:] > threshold
    per_class = probabilities.view(images, count, -1).sum(dim=1)
    candidates, pairs = int(per_class.sum()), int((per_class**2).sum()) // 2
    work = 4 * logits.numel() + 16 * (images * count + candidates) + 28 * images * MOST
    name = f"{images} images of {count:,} proposals, {columns} classes, {candidates:,} candidates"
    rivals = chosen(peers, rcnn=ours, torchvision=torchvision, torch=plain)
    return Case(name, rivals, gate, work, 3 * logits.numel() + 20 * candidates + 13 * pairs)


def _rounding(columns: int) -> float:
    """Relative error of a float32 softmax score above 0.01: a difference of up to 5 in the exponent, exp to 2 units in
    the last place, a sum of ``columns`` terms that are as wrong, a quotient."""
    return (16 + columns) * torch.finfo(torch.float32).eps


def _apart(logits: Tensor, threshold: float) -> Tensor:
    """Nearly the same logits of an image, of which no two candidates' scores, nor one and the threshold, are as near as
    two softmaxes may differ: then all must choose and order alike.

    Scores too near are raised one after the other, by a ten-thousandth at most where they crowd, and the background
    takes the difference.
    """
    scores, gap = logits.double().softmax(dim=1), 4 * _rounding(logits.shape[1])
    candidates = scores[:, 1:] > threshold * (1 - gap)
    logarithms, order = scores[:, 1:][candidates].log().clamp(min=math.log(threshold) + gap).sort()
    places = gap * torch.arange(len(order))
    raised = (logarithms - places).cummax(dim=0).values + places
    scores[:, 1:][candidates] = torch.empty_like(raised).scatter_(0, order, raised).exp()
    scores[:, 0] = 1 - scores[:, 1:].sum(dim=1)
    assert (scores[:, 0] > 0).all(), "too many candidates in a row to be set apart"
    return scores.log().float()
