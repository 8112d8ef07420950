"""Non-maximum suppression: single problems of growing size, the problems of a batch of pyramids, classes of detections.

Counted: 16 bytes per box, 4 per score and 8 per kept index; 13 operations (4 comparisons, 4 differences and clamps, 2
products, a sum, a quotient, a comparison) for each pair of boxes of a problem.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench import textbook
from bench.cases import Case, chosen
from bench.inputs import around, generator, objects
from rcnn.kernels import batched_nms, nms, nms_padded
from tests import reference

HEIGHT, WIDTH = 800, 1344
SINGLE = {"cpu": (1_000, 2_000, 6_000, 12_000), "cuda": (1_000, 2_000, 6_000, 12_000, 100_000)}
#: Boxes and classes: levels of a pyramid before NMS, classes of a detector's candidates.
BATCHED = ((8_000, 5), (2_000, 90))
#: Problems of 2,000 boxes: images times levels of a batch of 8.
PADDED = {"cpu": 5, "cuda": 40}
ORACLE = 300


def _boxes(count: int) -> tuple[Tensor, Tensor]:
    random = generator(count)
    boxes = around(objects(50, HEIGHT, WIDTH, random), count, HEIGHT, WIDTH, random)
    return boxes, torch.randperm(count, generator=random) / count


def _work(boxes: int, problem: float) -> tuple[int, int]:
    """Bytes and operations of that many boxes in problems of one size."""
    return boxes * (16 + 4 + 8), int(13 * boxes * problem / 2)


def cases(device: torch.device, peers: set[str]) -> Iterator[Case]:
    """See the module."""
    for count in SINGLE[device.type]:
        # The textbook way takes seconds for more.
        yield _single(count, device, peers - ({"torch"} if count > 2_000 else set()))
    for count, classes in BATCHED:
        yield _batched(count, classes, device, peers)
    yield _padded(PADDED[device.type], device)


def _single(count: int, device: torch.device, peers: set[str]) -> Case:
    boxes, scores = (x.to(device) for x in _boxes(count))
    threshold = 0.6875  # float32 and float64 hold it alike, so that torchvision's comparison on the CPU is ours

    def ours() -> Tensor:
        return nms(boxes, scores, threshold)

    def torchvision() -> Tensor:
        from torchvision.ops import nms as peer

        return peer(boxes, scores, threshold)

    def gate() -> None:
        some = slice(0, ORACLE)
        expected = reference.nms(boxes[some].tolist(), scores[some].tolist(), [0] * len(boxes[some]), threshold)
        assert nms(boxes[some], scores[some], threshold).tolist() == expected
        if count <= 12_000:
            assert torch.equal(ours().cpu(), textbook.nms(boxes.cpu(), scores.cpu(), threshold))
        if "torchvision" in peers:
            assert torch.equal(ours(), torchvision())

    rivals = chosen(peers, rcnn=ours, torchvision=torchvision, torch=lambda: textbook.nms(boxes, scores, threshold))
    return Case(f"nms, {count:,} boxes", rivals, gate, *_work(count, count))


def _batched(count: int, classes: int, device: torch.device, peers: set[str]) -> Case:
    boxes, scores = (x.to(device) for x in _boxes(count))
    idxs = torch.randint(classes, (count,), generator=generator(1)).to(device)

    def ours() -> Tensor:
        return batched_nms(boxes, scores, idxs, 0.5)

    def torchvision() -> Tensor:
        from torchvision.ops import batched_nms as peer

        return peer(boxes, scores, idxs, 0.5)

    def gate() -> None:
        some = slice(0, ORACLE)
        expected = reference.nms(boxes[some].tolist(), scores[some].tolist(), idxs[some].tolist(), 0.5)
        assert batched_nms(boxes[some], scores[some], idxs[some], 0.5).tolist() == expected
        assert torch.equal(ours().cpu(), textbook.batched_nms(boxes.cpu(), scores.cpu(), idxs.cpu(), 0.5))
        if "torchvision" in peers:
            # Its way for many boxes is a loop over the classes; the other shifts coordinates and rounds them.
            from torchvision.ops.boxes import _batched_nms_vanilla

            assert torch.equal(ours(), _batched_nms_vanilla(boxes, scores, idxs, 0.5))

    rivals = chosen(
        peers, rcnn=ours, torchvision=torchvision, torch=lambda: textbook.batched_nms(boxes, scores, idxs, 0.5)
    )
    return Case(f"batched_nms, {count:,} boxes of {classes} classes", rivals, gate, *_work(count, count / classes))


def _padded(problems: int, device: torch.device) -> Case:
    rows = 2_000
    parts = [
        around(objects(50, HEIGHT, WIDTH, generator(q)), rows, HEIGHT, WIDTH, generator(q)) for q in range(problems)
    ]
    boxes = torch.stack(parts).to(device)
    count = torch.full((problems,), rows, device=device)

    def ours() -> tuple[Tensor, Tensor]:
        return nms_padded(boxes, count, 0.7, rows)

    def gate() -> None:
        keep, kept = (x.cpu() for x in ours())
        falling = -torch.arange(rows, dtype=torch.float32)
        for q, each in enumerate(boxes.cpu()):
            assert torch.equal(keep[q, : kept[q]], textbook.nms(each, falling, 0.7))
        some, most = boxes[:, :ORACLE].contiguous(), torch.full((problems,), ORACLE, device=device)
        keep, kept = (x.cpu() for x in nms_padded(some, most, 0.7, ORACLE))
        assert keep[0, : kept[0]].tolist() == reference.thin(some[0].tolist(), 0.7)

    return Case(
        f"nms_padded, {problems} problems of {rows:,} boxes", {"rcnn": ours}, gate, *_work(problems * rows, rows)
    )
