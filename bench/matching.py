"""Target assignment: match, draw, encode, for the anchors of an image or a batch and for proposals.

Counted: 16 bytes per box, per ground-truth box and per target, 8 per drawn index and label; the 13 operations of an IoU
(see ``bench/nms.py``) for each pair of a box and a ground-truth box.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench import textbook
from bench.anchors import HEIGHT, RATIOS, SCALES, STRIDES, WIDTH
from bench.cases import Case, chosen
from bench.inputs import around, generator, objects
from rcnn import boxes as box
from rcnn.kernels import match, match_anchors, match_proposals
from rcnn.kernels.anchors import anchors, cell_anchors
from rcnn.structures import Proposals, Samples, Targets
from tests import reference

#: Images and ground-truth boxes of each, for the anchors of 800 x 1344 and for those of ``tiny``.
ANCHORS = {
    "cpu": (("large", 1, 50), ("large", 1, 500), ("tiny", 8, 6)),
    "cuda": (("large", 8, 10), ("large", 8, 50), ("large", 8, 500), ("large", 1, 5000), ("tiny", 8, 6)),
}
#: Images, proposals and ground-truth boxes of each.
PROPOSALS = {"cpu": ((2, 2000, 50), (8, 300, 6)), "cuda": ((8, 2000, 50), (8, 300, 6))}
SIZES = {
    "large": (HEIGHT, WIDTH, STRIDES, SCALES),
    "tiny": (256, 320, (8, 16, 32, 64), (24, 48, 96, 192)),
}
DRAWN, FRACTION = 256, 0.5


def grid(size: str, device: torch.device) -> tuple[Tensor, list[int]]:
    """Anchors of an image, and how many each level has."""
    height, width, strides, scales = SIZES[size]
    shapes = [(-(-height // stride), -(-width // stride)) for stride in strides]
    cells = torch.stack([cell_anchors([scale], RATIOS) for scale in scales]).to(device)
    return anchors(cells, shapes, strides), [3 * h * w for h, w in shapes]


def ground_truth(images: int, count: int, height: int, width: int, device: torch.device) -> Targets:
    """Made objects."""
    return Targets(
        boxes=torch.cat([objects(count, height, width, generator(b)) for b in range(images)]),
        labels=torch.randint(1, 91, (images * count,), generator=generator()),
        offsets=torch.arange(images + 1) * count,
        image_sizes=torch.tensor([[float(height), float(width)]]).repeat(images, 1),
        image_ids=torch.arange(images),
    ).to(device)


def cases(device: torch.device, peers: set[str]) -> Iterator[Case]:
    """See the module."""
    for size, images, count in ANCHORS[device.type]:
        # The whole matrix of so many boxes takes more than 5 GB for each of its temporaries.
        yield _anchors(size, images, count, device, peers if count <= 500 else set())
    for images, capacity, count in PROPOSALS[device.type]:
        yield _proposals(images, capacity, count, device, peers)


@cache
def _rpn() -> Any:
    from torchvision.models.detection.rpn import RegionProposalNetwork

    none = {"training": 0, "testing": 0}
    return RegionProposalNetwork(None, None, 0.7, 0.3, DRAWN, FRACTION, none, none, 0.7)


@cache
def _heads(most: int, fraction: float) -> Any:
    from torchvision.models.detection.roi_heads import RoIHeads

    return RoIHeads(None, None, None, 0.5, 0.5, most, fraction, None, 0.05, 0.5, 100)


def _anchors(size: str, images: int, count: int, device: torch.device, peers: set[str]) -> Case:
    boxes, _ = grid(size, device)
    targets = ground_truth(images, count, *SIZES[size][:2], device)
    truth = list(targets.boxes.split(count))
    step = torch.zeros((), dtype=torch.int64, device=device)

    def ours() -> object:
        return match_anchors(boxes, targets, seed=0, step=step, batch_size_per_image=DRAWN, positive_fraction=FRACTION)

    def torchvision() -> object:
        rpn = _rpn()
        labels, matched = rpn.assign_targets_to_anchors([boxes] * images, [{"boxes": each} for each in truth])
        deltas = rpn.box_coder.encode(matched, [boxes] * images)
        return labels, rpn.fg_bg_sampler(labels), deltas

    def gate() -> None:
        labels, matched = match(
            boxes, targets.boxes, targets.labels, targets.offsets,
            high_threshold=0.7, low_threshold=0.3, allow_low_quality_matches=True,
        )  # fmt: skip
        for b in range(images):
            label, row = textbook.match(boxes, truth[b], 0.7, 0.3, True)
            assert torch.equal(labels[b], label)
            assert torch.equal(matched[b], torch.where(row < 0, -1, row + b * count))
        if "torchvision" in peers:
            assert torch.equal(labels.float(), torch.stack(torchvision()[0]))
        drawn = ours()
        picked = drawn.labels >= 0
        assert torch.equal(labels.gather(1, drawn.index)[picked], drawn.labels[picked])
        image = int(len(truth) - 1)
        keys = [reference.sampling_key(b"anchors!", 0, 0, image, index) for index in range(len(boxes))]
        expected = reference.sample(labels[image].tolist(), keys, DRAWN, FRACTION)
        assert list(zip(drawn.index[image].tolist(), drawn.labels[image].tolist(), strict=True)) == expected

    work = 16 * len(boxes) + images * (16 * count + DRAWN * (8 + 8 + 16))
    name = f"{len(boxes):,} anchors, {images} images of {count:,} objects"
    rivals = chosen(
        peers,
        rcnn=ours,
        torchvision=torchvision,
        torch=lambda: textbook.match_anchors(boxes, truth, 0.7, 0.3, DRAWN, FRACTION),
    )
    return Case(name, rivals, gate, work, 13 * images * len(boxes) * count)


def _proposals(images: int, capacity: int, count: int, device: torch.device, peers: set[str]) -> Case:
    targets = ground_truth(images, count, HEIGHT, WIDTH, device)
    truth = list(targets.boxes.split(count))
    found = torch.stack([around(each.cpu(), capacity, HEIGHT, WIDTH, generator(b)) for b, each in enumerate(truth)])
    proposals = Proposals(found, torch.zeros(images, capacity), torch.full((images,), capacity)).to(device)
    step = torch.zeros((), dtype=torch.int64, device=device)
    most, fraction = 512, 0.25

    def ours() -> Samples:
        return match_proposals(
            proposals, targets, seed=0, step=step, batch_size_per_image=most, positive_fraction=fraction
        )

    def torchvision() -> object:
        each = [{"boxes": b, "labels": labels} for b, labels in zip(truth, targets.labels.split(count), strict=True)]
        return _heads(most, fraction).select_training_samples(list(proposals.boxes), each)

    def gate() -> None:
        samples = ours()
        rois, labels = samples.rois.view(images, -1, 5), samples.labels.view(images, -1)
        for b in range(images):
            rows = labels[b] >= 0
            label, row = textbook.match(rois[b, rows, 1:], truth[b], 0.5, 0.5, False)
            expected = torch.where(label == 1, targets.labels[row + b * count], 0)
            assert torch.equal(labels[b, rows], expected)
            positive = label == 1
            deltas = box.encode(rois[b, rows, 1:][positive], truth[b][row[positive]], (10.0, 10.0, 5.0, 5.0))
            # A difference of centres of up to 1344 pixels is rounded, and divided by a side of a pixel or more.
            bound = 4 * 10 * WIDTH * torch.finfo(torch.float32).eps
            torch.testing.assert_close(
                samples.deltas.view(images, -1, 4)[b, rows][positive], deltas, rtol=0, atol=bound
            )

    candidates = images * (capacity + count)
    work = 16 * candidates + images * (16 * count + most * (20 + 8 + 16 + 16 + 4))
    name = f"{capacity:,} proposals, {images} images of {count} objects"
    return Case(name, chosen(peers, rcnn=ours, torchvision=torchvision), gate, work, 13 * candidates * count)
