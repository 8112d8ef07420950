"""Memory that the launchers take beside their inputs, at the sizes of real training.

What a launcher allocates depends on shapes alone, so that it is measured here with kernels that do nothing: the largest
sum of live allocations during the call, its result included.
"""

import pytest
import torch

from bench.timing import peak_memory
from rcnn import kernels
from rcnn.kernels import _launch
from rcnn.structures import Proposals, Targets

MB = 1_000_000
BATCH = 8
#: Strides and anchors of a cell; batches of 800 x 1344 pixels, and 608 x 1024 for vgg16.
PYRAMID = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
VGG = [(38, 64)]


@pytest.fixture
def idle(monkeypatch):
    """The launchers run, their kernels do not."""
    monkeypatch.setattr(_launch, "uses_kernels", lambda x: True)
    monkeypatch.setattr(_launch, "launch", lambda *args, **settings: None)


def crowd(rows, images):
    """Ground truth with so many boxes in each of the first of 8 images."""
    return Targets(
        boxes=torch.zeros(rows * images, 4),
        labels=torch.ones(rows * images, dtype=torch.int64),
        offsets=torch.arange(BATCH + 1).clamp(max=images) * rows,
        image_sizes=torch.tensor([[800.0, 1344.0]]).repeat(BATCH, 1),
        image_ids=torch.arange(BATCH),
    )


def sizes(shapes, per_cell):
    return [height * width * per_cell for height, width in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shapes", "per_cell", "pre", "post"), [(PYRAMID, 3, 2000, 2000), (VGG, 12, 12000, 2000), (VGG, 12, 6000, 300)]
)
def test_proposals(idle, dtype, shapes, per_cell, pre, post):
    levels = sizes(shapes, per_cell)
    objectness, deltas = torch.zeros(BATCH, sum(levels), dtype=dtype), torch.zeros(BATCH, sum(levels), 4, dtype=dtype)
    anchors, image_sizes = torch.zeros(sum(levels), 4), torch.zeros(BATCH, 2)
    taken = peak_memory(
        lambda: kernels.proposals(
            objectness, deltas, anchors, image_sizes, levels, pre_nms_top_n=pre, post_nms_top_n=post
        )
    )
    print(f"{taken / MB:.1f} MB")
    assert 0 < taken <= 16 * MB, f"{taken / MB:.1f} MB"


@pytest.mark.parametrize("images", [1, BATCH])
@pytest.mark.parametrize("border", [None, 0.0])
def test_matching_of_anchors(idle, border, images):
    anchors, targets, step = (
        torch.zeros(sum(sizes(PYRAMID, 3)), 4),
        crowd(5000, images),
        torch.zeros((), dtype=torch.int64),
    )
    taken = peak_memory(lambda: kernels.match_anchors(anchors, targets, seed=0, step=step, allowed_border=border))
    print(f"{taken / MB:.1f} MB")
    assert 0 < taken <= 16 * MB, f"{taken / MB:.1f} MB"


@pytest.mark.parametrize("images", [1, BATCH])
def test_matching_of_proposals(idle, images):
    targets, step = crowd(5000, images), torch.zeros((), dtype=torch.int64)
    count = torch.full((BATCH,), 2000)
    proposals = Proposals(torch.zeros(BATCH, 2000, 4), torch.zeros(BATCH, 2000), count)
    taken = peak_memory(lambda: kernels.match_proposals(proposals, targets, seed=0, step=step))
    print(f"{taken / MB:.1f} MB")
    assert 0 < taken <= 16 * MB, f"{taken / MB:.1f} MB"
