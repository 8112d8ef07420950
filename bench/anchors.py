"""Anchors of a pyramid. A step of training finds the last grid kept, so both are timed: made anew, and found.

Counted: 16 bytes written per anchor, 4 sums for each.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.cases import Case, chosen
from rcnn.kernels.anchors import anchors, cell_anchors
from tests import reference

STRIDES, SCALES, RATIOS = (4, 8, 16, 32, 64), (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)
HEIGHT, WIDTH = 800, 1344


def cases(device: torch.device, peers: set[str]) -> Iterator[Case]:
    """See the module."""
    shapes = [(-(-HEIGHT // stride), -(-WIDTH // stride)) for stride in STRIDES]
    cells = torch.stack([cell_anchors([scale], RATIOS) for scale in SCALES]).to(device)
    count = 3 * sum(h * w for h, w in shapes)
    maps = [torch.empty(1, 1, *shape, device=device) for shape in shapes]

    def anew() -> Tensor:
        return anchors(cells.clone(), shapes, STRIDES)  # a tensor that no kept grid was made of

    def found() -> Tensor:
        return anchors(cells, shapes, STRIDES)

    def torchvision() -> Tensor:
        from torchvision.models.detection.anchor_utils import AnchorGenerator

        generator = AnchorGenerator(tuple((scale,) for scale in SCALES), (RATIOS,) * len(SCALES))
        generator.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(s, device=device)] * 2 for s in STRIDES]
        return torch.cat(generator.grid_anchors([list(x.shape[2:]) for x in maps], strides))

    def gate() -> None:
        small = [(3, 5), (2, 3)]
        expected = reference.anchors(cells[:2].tolist(), small, STRIDES[:2])
        assert anchors(cells[:2], small, STRIDES[:2]).tolist() == [list(each) for each in expected]
        assert torch.equal(anew(), found())
        if "torchvision" in peers:
            assert torch.equal(anew(), torchvision())

    name = f"{count:,} anchors of {HEIGHT} x {WIDTH}"
    case = partial(Case, gate=gate, bytes=16 * count, operations=4 * count)
    yield case(f"anew, {name}", chosen(peers, rcnn=anew, torchvision=torchvision))
    yield case(f"kept, {name}", chosen(peers, rcnn=found, torchvision=torchvision))
