"""Proposals: from the outputs of the region proposal network to the best boxes of each image.

Counted: 4 bytes per logit, 32 per selected anchor (its deltas and itself), 20 per proposal; 20 operations to decode and
clip a selected anchor and 13 for each pair of those of a level (see ``bench/nms.py``).
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench import textbook
from bench.cases import Case, chosen
from bench.inputs import generator, objects
from bench.matching import SIZES, grid
from rcnn import boxes as box
from rcnn.kernels import proposals
from tests import reference

#: Anchors of which image, images, boxes before and after NMS: a ResNet-50 FPN and ``tiny``, training and detection.
CASES = {
    "cpu": (
        ("large", 1, 2000, 2000), ("large", 1, 1000, 1000), ("large", 2, 2000, 2000),
        ("tiny", 8, 300, 300), ("tiny", 1, 300, 300),
    ),
    "cuda": (
        ("large", 8, 2000, 2000), ("large", 8, 1000, 1000), ("large", 1, 1000, 1000), ("tiny", 8, 300, 300),
    ),
}  # fmt: skip


def _outputs(size: str, images: int, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Logits that are high on objects, no two alike, and moves by eighths of a side, of which sums are exact."""
    height, width = SIZES[size][:2]
    logits, deltas = [], []
    for b in range(images):
        random = generator(b)
        truth = objects(20, height, width, random)
        iou = torch.zeros(len(anchors))
        for each in truth:
            iou = torch.maximum(iou, box.iou(each, anchors))
        order = (iou + 0.1 * torch.randn(len(anchors), generator=random)).argsort().argsort()
        logits.append(order / len(anchors) * 8 - 4)
        moves = (2 * torch.randn(len(anchors), 4, generator=random)).round() / 8
        moves[:, 2:] = 0
        deltas.append(moves)
    return torch.stack(logits), torch.stack(deltas)


def cases(device: torch.device, peers: set[str]) -> Iterator[Case]:
    """See the module."""
    for size, images, before, after in CASES[device.type]:
        yield _case(size, images, before, after, device, peers)


@cache
def _peer(before: int, after: int) -> Any:
    from torchvision.models.detection.rpn import RegionProposalNetwork

    pre, post = {"training": before, "testing": before}, {"training": after, "testing": after}
    return RegionProposalNetwork(None, None, 0.7, 0.3, 256, 0.5, pre, post, 0.7)


def _case(size: str, images: int, before: int, after: int, device: torch.device, peers: set[str]) -> Case:
    anchors, levels = grid(size, device)
    objectness, deltas = (x.to(device) for x in _outputs(size, images, anchors.cpu()))
    sizes = torch.tensor([[float(side) for side in SIZES[size][:2]]] * images, device=device)

    def ours(rows: int = before, kept: int = after) -> object:
        return proposals(objectness, deltas, anchors, sizes, levels, pre_nms_top_n=rows, post_nms_top_n=kept)

    def torchvision() -> tuple[list[Tensor], list[Tensor]]:
        rpn = _peer(before, after)
        decoded = rpn.box_coder.decode(deltas.view(-1, 4), [anchors] * images).view(images, -1, 4)
        return rpn.filter_proposals(decoded, objectness, [tuple(map(int, each)) for each in sizes.tolist()], levels)

    def plain(on: torch.device = device) -> list[tuple[Tensor, Tensor]]:
        inputs = (x.to(on) for x in (objectness, deltas, anchors, sizes))
        return textbook.proposals(*inputs, levels, before, after)

    def gate() -> None:
        found = ours()
        for b, (boxes, scores) in enumerate(plain(torch.device("cpu"))):
            rows = int(found.count[b])
            assert torch.equal(found.boxes[b, :rows].cpu(), boxes)
            assert torch.equal(found.scores[b, :rows].cpu(), scores)
        if "torchvision" in peers:
            for b, boxes in enumerate(torchvision()[0]):
                assert torch.equal(found.boxes[b, : int(found.count[b])], boxes)
        few = ours(60, 100)
        expected = reference.proposals(
            objectness[0].tolist(), deltas[0].tolist(), anchors.tolist(), sizes[0].tolist(), levels, 60, 100, 0.7, 1e-3
        )
        rows = int(few.count[0])
        assert few.scores[0, :rows].tolist() == [score for _, score in expected]
        assert few.boxes[0, :rows].tolist() == [list(each) for each, _ in expected]

    selected = [min(count, before) for count in levels]
    work = images * (4 * sum(levels) + 32 * sum(selected) + 20 * after)
    pairs = images * sum(count**2 // 2 for count in selected)
    name = f"{images} images of {sum(levels):,} anchors, {before:,} per level, {after:,} kept"
    rivals = chosen(peers, rcnn=ours, torchvision=torchvision, torch=plain)
    return Case(name, rivals, gate, work, 20 * images * sum(selected) + 13 * pairs)
