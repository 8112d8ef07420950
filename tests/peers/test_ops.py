"""NMS, RoI Align and RoI pooling against torchvision's compiled ops, over random and adversarial cases.

The CPU bodies meet a few thousand cases each, the kernels, through the emulator, a tenth of them.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

torchvision = pytest.importorskip("torchvision")

from torchvision.ops.boxes import _batched_nms_vanilla  # noqa: E402

from rcnn import kernels  # noqa: E402
from rcnn.kernels import _launch, batched_nms, multiscale_roi_align, nms, roi_align, roi_pool  # noqa: E402

pytestmark = pytest.mark.usefixtures("device")

EPS = torch.finfo(torch.float32).eps


def share(cases: int) -> int:
    """All cases on a CPU body, a tenth where each thread of a kernel is emulated."""
    return cases // 10 if _launch.uses_kernels(torch.empty(0)) else cases


def random_boxes(count: int, kind: int, generator: torch.Generator) -> Tensor:
    """Scattered, clustered, on a coarse grid with equal boxes and no area, or reversed boxes."""
    corner = torch.rand(count, 2, generator=generator) * 100
    boxes = torch.cat((corner, corner + torch.rand(count, 2, generator=generator) * 60), dim=1)
    if kind == 1:
        boxes = boxes[torch.randint(0, max(count // 10, 1), (count,), generator=generator)] if count else boxes
        boxes = boxes + torch.randn(count, 4, generator=generator)
    elif kind == 2:
        boxes = (boxes / 20).round() * 20
    elif kind == 3:
        boxes = torch.rand(count, 4, generator=generator) * 100
    return boxes


@pytest.mark.parametrize("kind", range(4))
def test_nms(kind: int) -> None:
    generator = torch.Generator().manual_seed(kind)
    for case in range(share(600)):
        count = int(torch.randint(0, 200, (1,), generator=generator))
        boxes = random_boxes(count, kind, generator)
        scores = torch.rand(count, generator=generator)
        if case % 2:
            scores = (scores * 8).round() / 8
        # Thresholds that float32 holds exactly, so that torchvision's comparison in double is ours.
        threshold = (0.0, 0.25, 0.5, 0.6875, 1.0)[case % 5]
        assert torch.equal(nms(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold))
        groups = torch.randint(0, 6, (count,), generator=generator)
        # torchvision's final sort is not stable: the set of kept boxes is compared, ours by score and then by index.
        found = batched_nms(boxes, scores, groups, threshold)
        assert torch.equal(found.sort().values, _batched_nms_vanilla(boxes, scores, groups, threshold).sort().values)
        kept = found.sort().values
        assert torch.equal(found, kept[scores[kept].argsort(descending=True, stable=True)])


def random_case(kind: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A map (of one cell now and then) and regions in, across and off it; ``kind`` 2 gives reversed ones too."""
    images, height, width = (int(torch.randint(1, high, (1,), generator=generator)) for high in (4, 20, 20))
    if kind == 3:
        height = width = 1
    maps = torch.randn(images, 3, height, width, generator=generator)
    if kind % 2:
        maps = maps.to(memory_format=torch.channels_last)
    count = int(torch.randint(0, 12, (1,), generator=generator))
    corner = torch.randn(count, 2, generator=generator) * 20 + 10
    extent = torch.rand(count, 2, generator=generator) ** 2 * 60
    if kind == 2:
        extent = extent - 10
    index = torch.randint(0, images, (count, 1), generator=generator)
    return maps, torch.cat((index, corner, corner + extent), dim=1)


@pytest.mark.parametrize("kind", range(4))
def test_roi_align(kind: int) -> None:
    generator = torch.Generator().manual_seed(kind)
    for case in range(share(150)):
        maps, rois = random_case(kind, generator)
        for ratio in (-1, 1, 2, 3):
            aligned = bool((case + ratio) % 2)
            if kind == 2 and aligned and ratio < 0:
                continue  # torchvision asks for a negative amount of memory here
            ours, theirs = maps.clone().requires_grad_(), maps.clone().requires_grad_()
            found = roi_align(ours, rois, (3, 5), 0.5, ratio, aligned)
            expected = torchvision.ops.roi_align(theirs, rois, (3, 5), 0.5, ratio, aligned)
            # A bin sums at most 4 * 20 * 20 products of which the weights sum to 1, on both sides.
            samples = ratio if ratio > 0 else 20
            bound = 2 * 4 * samples**2 * EPS
            torch.testing.assert_close(found, expected, rtol=0, atol=bound * maps.abs().max().item())
            grad = torch.randn(found.shape, generator=generator)
            found.backward(grad)
            expected.backward(grad)
            assert ours.grad is not None
            # A cell sums at most that many products of each of the 15 bins of each region, of weight up to 1.
            largest = grad.abs().max().item() if len(rois) else 0.0
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=15 * len(rois) * bound * largest)


def test_pyramid() -> None:
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(2, 3, 64 // 2**k, 96 // 2**k, generator=generator) for k in range(4)]
    corner = torch.rand(200, 2, generator=generator) * 300
    boxes = torch.cat((corner, corner + torch.rand(200, 2, generator=generator) ** 2 * 600), dim=1)
    rois = torch.cat((torch.arange(2.0).repeat_interleave(100)[:, None], boxes), dim=1)
    pooler = torchvision.ops.MultiScaleRoIAlign([str(k) for k in range(4)], 7, 2)
    named = {str(k): x for k, x in enumerate(maps)}
    expected = pooler(named, list(boxes.split(100)), [(256, 384)] * 2)
    found = multiscale_roi_align(maps, rois, 7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 2)
    # 16 products on both sides, and four roundings of a position of up to 256 cells on both.
    bound = 2 * (16 + 8 * 256) * EPS * max(x.abs().max().item() for x in maps)
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("kind", range(4))
def test_roi_pool(kind: int) -> None:
    generator = torch.Generator().manual_seed(kind)
    for case in range(share(600)):
        maps, rois = random_case(kind, generator)
        if case % 2:
            maps, rois = maps.round(), rois.round()
        ours, theirs = maps.clone().requires_grad_(), maps.clone().requires_grad_()
        found, expected = roi_pool(ours, rois, (3, 5), 0.5), torchvision.ops.roi_pool(theirs, rois, (3, 5), 0.5)
        assert torch.equal(found, expected)
        # Whole numbers: the sums are exact in any order.
        grad = torch.randint(-8, 9, found.shape, generator=generator).float()
        found.backward(grad)
        expected.backward(grad)
        assert ours.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


NAN = float("nan")
#: Calls that ``docs/differences.md`` names: an error of ours, and none of torchvision's.
REFUSED: list[tuple[str, str, Callable[..., object]]] = [
    *(("nms", "iou_threshold", lambda op, x, t=t: op(x.boxes, x.scores, t)) for t in (-0.5, 1.5, NAN)),
    *(("batched_nms", "iou_threshold", lambda op, x, t=t: op(x.boxes, x.scores, x.idxs, t)) for t in (-0.5, 1.5, NAN)),
    ("batched_nms", "idxs", lambda op, x: op(x.boxes, x.scores, x.idxs.float(), 0.5)),
    *(
        (name, "spatial_scale", lambda op, x, s=s: op(x.map, x.rois, 2, s))
        for name in ("roi_align", "roi_pool")
        for s in (-1.0, 0.0)
    ),
    *((name, "map", lambda op, x: op(x.map[:, :, :0], x.rois, 2, 1.0)) for name in ("roi_align", "roi_pool")),
    *(
        (name, "gradient", lambda op, x: op(x.map, x.rois.clone().requires_grad_(), 2, 1.0))
        for name in ("roi_align", "roi_pool")
    ),
]


@pytest.mark.parametrize(("name", "word", "call"), REFUSED)
def test_what_is_refused_here_and_not_there_is_named(name: str, word: str, call: Callable[..., object]) -> None:
    x = SimpleNamespace(
        boxes=torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2]]),
        scores=torch.tensor([0.9, 0.8]),
        idxs=torch.tensor([0, 1]),
        map=torch.rand(1, 2, 8, 8),
        rois=torch.tensor([[0.0, 0, 0, 4, 4]]),
    )
    call(getattr(torchvision.ops, name), x)
    with pytest.raises(ValueError, match="H, W > 0" if word == "map" else word):
        call(getattr(kernels, name), x)
    page = Path(__file__).resolve().parents[2] / "docs" / "differences.md"
    rows = [line.split("|") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert any(word in row[1] and row[2].startswith(" an error") for row in rows)
