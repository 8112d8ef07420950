"""The kernels of matching and sampling where their tiles, lists and architectures begin and end."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_on_cpu import ARCHS, Emulator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rcnn import boxes as geometry
from rcnn.kernels import _launch, anchors, cell_anchors, match, match_anchors, match_proposals, matching
from rcnn.structures import AnchorSamples, Proposals, Samples, Targets

pytestmark = pytest.mark.emulated

#: On either side of a warp's word, of a lane's boxes (4 x 32) and of a block's (128 x 4).
COUNTS = (1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1000, 1025)
LOW_QUALITY: dict[str, Any] = {"high_threshold": 0.7, "low_threshold": 0.3, "allow_low_quality_matches": True}
EPS = torch.finfo(torch.float32).eps


def random_boxes(count: int, seed: int, size: int = 120) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(count, 2, generator=generator) * size
    return torch.cat((first, first + 2 + torch.rand(count, 2, generator=generator) * size / 3), dim=1)


def make_targets(counts: list[int], seed: int = 0) -> Targets:
    total = sum(counts)
    labels = torch.randint(1, 5, (total,), generator=torch.Generator().manual_seed(seed))
    labels[::7] = -1
    return Targets(
        boxes=random_boxes(total, seed + 1),
        labels=labels,
        offsets=torch.tensor([0, *counts]).cumsum(0),
        image_sizes=torch.tensor([[120.0, 140.0]] * len(counts)),
        image_ids=torch.arange(len(counts)) * 5 + 2,
    )


def make_proposals(images: int, capacity: int, seed: int = 3) -> Proposals:
    boxes = random_boxes(images * capacity, seed).view(images, capacity, 4)
    count = torch.tensor([max(0, capacity - 3 * image) for image in range(images)])
    boxes[torch.arange(capacity) >= count[:, None]] = 0
    return Proposals(boxes, torch.zeros(images, capacity), count)


def truth(targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    return targets.boxes, targets.labels, targets.offsets


def check(emulated: AnchorSamples | Samples, on_cpu: AnchorSamples | Samples) -> None:
    """Equal in every bit but those of the deltas, which take a logarithm."""
    for name, value in vars(emulated).items():
        expected = getattr(on_cpu, name)
        assert value.dtype == expected.dtype
        if name == "deltas":
            # An ulp of the logarithm, times the weight of 5.
            torch.testing.assert_close(value, expected, rtol=4 * EPS, atol=5 * 4 * EPS)
        else:
            assert torch.equal(value, expected), name


class Both:
    """An op through its CPU body, then through the emulated kernels."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator

    def __call__(self, op: Any, *args: Any, **options: Any) -> tuple[Any, Any]:
        uses_kernels = _launch.uses_kernels
        _launch.uses_kernels = lambda x: False
        try:
            on_cpu = op(*args, **options)
        finally:
            _launch.uses_kernels = uses_kernels
        return op(*args, **options), on_cpu


@pytest.fixture
def both(emulator: Emulator) -> Both:
    return Both(emulator)


@pytest.mark.parametrize("count", COUNTS)
def test_every_count_of_boxes(both: Both, count: int) -> None:
    targets = make_targets([5, 0, 40], seed=count)
    boxes = random_boxes(count, 9)
    for shape in (boxes, random_boxes(3 * count, 10).view(3, count, 4)):
        emulated, on_cpu = both(match, shape, *truth(targets), **LOW_QUALITY)
        assert torch.equal(emulated[0], on_cpu[0])
        assert torch.equal(emulated[1], on_cpu[1])
    options = {"seed": 1, "step": torch.tensor(3), "batch_size_per_image": 64}
    check(*both(match_anchors, boxes, targets, **options, allowed_border=4.0))
    check(*both(match_proposals, make_proposals(3, count), targets, **options))


@pytest.mark.parametrize("count", (0, 1, 31, 32, 33, 63, 64, 65, 1000))
def test_every_count_of_ground_truth(both: Both, count: int) -> None:
    targets, boxes = make_targets([count, 3], seed=count), random_boxes(300, 4)
    emulated, on_cpu = both(match, boxes, *truth(targets), **LOW_QUALITY)
    assert torch.equal(emulated[0], on_cpu[0])
    assert torch.equal(emulated[1], on_cpu[1])
    check(*both(match_proposals, make_proposals(2, 70), targets, seed=1, step=torch.tensor(3)))


def test_five_thousand_boxes_in_one_image(both: Both) -> None:
    targets = make_targets([5000, 2])
    emulated, on_cpu = both(match, random_boxes(700, 5), *truth(targets), **LOW_QUALITY)
    assert torch.equal(emulated[0], on_cpu[0])
    assert torch.equal(emulated[1], on_cpu[1])
    check(*both(match_anchors, random_boxes(700, 5), targets, seed=1, step=torch.tensor(3)))
    check(*both(match_proposals, make_proposals(2, 100), targets, seed=1, step=torch.tensor(3)))


@pytest.mark.parametrize("size", (1, 7, 8, 9, 31, 32, 33, 256, 512, 2000))
def test_every_size_of_the_draw(both: Both, size: int) -> None:
    targets, boxes = make_targets([30, 4]), random_boxes(3000, 6)
    for fraction in (0.0, 0.5, 1.0):
        options = {"seed": 7, "step": torch.tensor(2), "batch_size_per_image": size, "positive_fraction": fraction}
        check(*both(match_anchors, boxes, targets, **options))
        check(*both(match_proposals, make_proposals(2, 500), targets, **options))


def test_lists_that_overflow_or_fall_short_are_mended(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit on keys is a guess that chance alone never fails; here it is made to, both ways."""
    targets, boxes = make_targets([30, 4]), random_boxes(3000, 6)
    options = {"seed": 7, "step": torch.tensor(2), "batch_size_per_image": 64}
    for expected, places in ((3, 200), (2000, 70), (64, 64)):
        monkeypatch.setattr(matching, "list_sizes", lambda size, e=expected, p=places: (e, p))
        check(*both(match_anchors, boxes, targets, **options))
        check(*both(match_proposals, make_proposals(2, 1500), targets, **options))


def test_any_order_of_threads_gives_the_same(both: Both) -> None:
    targets, boxes = make_targets([40, 0, 9]), random_boxes(700, 8)
    options = {"seed": 1, "step": torch.tensor(3), "batch_size_per_image": 64}
    found = make_proposals(3, 90)
    first = match_anchors(boxes, targets, **options), match_proposals(found, targets, **options)
    for seed in range(1, 21):
        with both.emulator.order(seed):
            again = match_anchors(boxes, targets, **options), match_proposals(found, targets, **options)
        for one, other in zip(first, again, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


def pyramid(height: int, width: int) -> Tensor:
    """Anchors of five levels, the coarsest larger than the image."""
    cells = torch.stack([cell_anchors([8.0 * 2**level], [0.5, 1.0, 2.0]) for level in range(5)])
    shapes = [(-(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32, 64)]
    return anchors(cells, shapes, [4, 8, 16, 32, 64])


@pytest.mark.parametrize("seed", range(2))
def test_tiles_that_skip_rows(both: Both, seed: int) -> None:
    """Anchors that lie as in training, and objects from far smaller to larger than any: most tiles need few of them."""
    targets, boxes = make_targets([50, 0, 8], seed), pyramid(80, 100)
    generator = torch.Generator().manual_seed(seed)
    extent = 2 * 80 ** torch.rand(58, 1, generator=generator) * 2 ** (torch.rand(58, 2, generator=generator) - 0.5)
    corner = torch.rand(58, 2, generator=generator) * torch.tensor([100.0, 80.0])
    targets = replace(targets, boxes=torch.cat((corner - extent / 2, corner + extent / 2), dim=1))
    for high, low in ((0.7, 0.3), (0.5, 0.5), (0.2, 0.1)):
        options = {"high_threshold": high, "low_threshold": low}
        for low_quality in (False, True):
            emulated, on_cpu = both(match, boxes, *truth(targets), **options, allow_low_quality_matches=low_quality)
            assert torch.equal(emulated[0], on_cpu[0])
            assert torch.equal(emulated[1], on_cpu[1])
        for border in (None, 0.0):
            draw = {"seed": 1, "step": torch.tensor(3), "batch_size_per_image": 64, "allowed_border": border}
            check(*both(match_anchors, boxes, targets, **options, **draw))


@pytest.mark.parametrize("scale", (3e-24, 1e-22, 1e-20, 1e-18, 1e-12, 1e17, 2e17, 4e17))
def test_areas_at_both_ends_of_float32(both: Both, scale: float) -> None:
    """Areas that lose bits, sums of areas that overflow, and areas that do."""
    targets, boxes = make_targets([40, 0, 9]), random_boxes(600, 8) * scale
    targets = replace(targets, boxes=targets.boxes * scale)
    emulated, on_cpu = both(match, boxes, *truth(targets), **LOW_QUALITY)
    assert torch.equal(emulated[0], on_cpu[0])
    assert torch.equal(emulated[1], on_cpu[1])


def test_an_iou_on_the_threshold(both: Both) -> None:
    """The quick test in front of the division never hides one that is at least the threshold, to the last bit."""
    first = random_boxes(120, 12)
    second = first + 8 * torch.rand(120, 4, generator=torch.Generator().manual_seed(13))
    one = torch.ones(1, dtype=torch.int64)
    for box, row in zip(first.split(1), second.split(1), strict=True):
        iou = float(geometry.iou(box, row).squeeze())
        if iou == 0.0:
            continue
        for threshold, label in ((iou, 1), (float(np.nextafter(np.float32(iou), np.float32(1))), 0)):
            options = {"high_threshold": threshold, "low_threshold": threshold}
            assert match(box, row, one, torch.tensor([0, 1]), **options)[0].tolist() == [[label]]


@pytest.mark.parametrize("ulps", (0, 1, 3, 100))
def test_boxes_that_nearly_tie(both: Both, ulps: int) -> None:
    """IoUs that differ in the last bits or not at all: the largest is found among them, and all that equal it."""
    targets = make_targets([9])
    targets = replace(targets, labels=targets.labels.abs())
    step = torch.randint(-ulps, ulps + 1, (9, 70, 4), generator=torch.Generator().manual_seed(ulps), dtype=torch.int32)
    near = targets.boxes + torch.tensor([3.0, -2.0, 5.0, 1.0])
    boxes = (near[:, None].view(torch.int32) + step).view(torch.float32).reshape(-1, 4)
    emulated, on_cpu = both(match, boxes, *truth(targets), **LOW_QUALITY)
    assert torch.equal(emulated[0], on_cpu[0])
    assert torch.equal(emulated[1], on_cpu[1])


def test_raised_boxes_below_the_low_threshold_keep_their_best_row(both: Both) -> None:
    """A box is the best of a row by 10 / 400, while it has 50 / 250 with rows that another box reaches nearly whole."""
    far = 1000.0 * torch.arange(12)[:, None] * torch.tensor([0.0, 1.0, 0.0, 1.0])
    boxes = torch.tensor([5e4, 5e4, 5e4 + 9, 5e4 + 9]).repeat(512, 1)
    places = torch.arange(12) * 41  # in several lanes, slots and warps
    boxes[places] = far + torch.tensor([0.0, 0.0, 10.0, 10.0])
    boxes[places + 1] = far + torch.tensor([6.0, 0.0, 25.0, 10.0])
    raising, better = far + torch.tensor([-30.0, 0.0, 1.0, 10.0]), far + torch.tensor([5.0, 0.0, 25.0, 10.0])
    worse = far + torch.tensor([8.0, 0.0, 28.0, 10.0])
    ignored = far + torch.tensor([0.0, 0.0, 10.0, 10.0])
    rows = torch.cat((raising, worse, ignored, better, better))  # the lowest of the better ones: 36 on
    labels = torch.ones(60, dtype=torch.int64)
    labels[24:36] = -1
    emulated, on_cpu = both(match, boxes, rows, labels, torch.tensor([0, 60]), **LOW_QUALITY)
    assert emulated[0][0, places].tolist() == [1] * 12
    assert emulated[1][0, places].tolist() == list(range(36, 48))
    assert torch.equal(emulated[0], on_cpu[0])
    assert torch.equal(emulated[1], on_cpu[1])


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture(both: Both, arch: int) -> None:
    targets, boxes = make_targets([40, 0, 9]), random_boxes(700, 8)
    with both.emulator.arch(arch):
        emulated, on_cpu = both(match, boxes, *truth(targets), **LOW_QUALITY)
        assert torch.equal(emulated[0], on_cpu[0])
        assert torch.equal(emulated[1], on_cpu[1])


def test_equal_boxes_and_boxes_on_the_border(both: Both) -> None:
    """All anchors tie for every box, and all keys still differ; anchors touch the border from either side."""
    targets = make_targets([6, 6])
    same = torch.tensor([[0.0, 0.0, 140.0, 120.0]]).repeat(600, 1)
    border = torch.tensor([[-4.0, 0, 10, 10], [-4.1, 0, 10, 10], [100, 100, 144, 124], [100, 100, 144.1, 124]])
    for boxes in (same, border):
        for allowed in (None, 0.0, 4.0):
            options = {"seed": 1, "step": torch.tensor(3), "batch_size_per_image": 64, "allowed_border": allowed}
            check(*both(match_anchors, boxes, targets, **options))


@pytest.mark.parametrize("offsets", [(0, 3, 100), (0, 9, 12), (-2, 2, 8), (0, 2**32, 2**32 + 3)])
def test_offsets_end_with_the_rows(both: Both, offsets: tuple[int, ...]) -> None:
    """Rows that lie before and behind them in memory would match; before and behind a copy lies nothing to read."""
    boxes, found, targets = random_boxes(200, 8), make_proposals(2, 70), make_targets([45, 0])
    options = {"seed": 1, "step": torch.tensor(3), "batch_size_per_image": 64}
    part = replace(targets, boxes=targets.boxes[20:25], labels=targets.labels[20:25], offsets=torch.tensor(offsets))
    copy = replace(part, boxes=part.boxes.clone(), labels=part.labels.clone())
    clamped = replace(copy, offsets=part.offsets.clamp(0, 5))
    for rows in (part, copy):
        for op in (
            lambda x: match(boxes, *truth(x), high_threshold=0.7, low_threshold=0.3),
            lambda x: vars(match_proposals(found, x, **options)).values(),
            lambda x: match(boxes, *truth(x), **LOW_QUALITY),
            lambda x: vars(match_anchors(boxes, x, **options)).values(),
        ):
            for found_rows, found_clamped in zip(both(op, rows), both(op, clamped), strict=True):
                assert all(map(torch.equal, found_rows, found_clamped))


def test_strided_inputs_are_read_right_and_left_alone(both: Both) -> None:
    targets, wide = make_targets([30, 4]), random_boxes(400, 6).repeat(1, 2)
    strided = Targets(
        boxes=targets.boxes.repeat(1, 2)[:, 4:],
        labels=torch.stack((targets.labels, targets.labels), dim=1)[:, 1],
        offsets=targets.offsets.repeat_interleave(2)[::2],
        image_sizes=targets.image_sizes.t().contiguous().t(),
        image_ids=targets.image_ids.repeat_interleave(2)[::2],
    )
    assert not any(value.is_contiguous() for value in vars(strided).values())
    found = make_proposals(2, 60)
    found = Proposals(found.boxes.transpose(0, 1).contiguous().transpose(0, 1), found.scores, found.count)
    before = [value.clone() for value in (*vars(strided).values(), wide, found.boxes)]
    options = {"seed": 1, "step": torch.tensor(3), "batch_size_per_image": 64}
    strided_anchors = wide[:, 4:]
    check(
        match_anchors(strided_anchors, strided, **options, allowed_border=0.0),
        match_anchors(strided_anchors.contiguous(), targets, **options, allowed_border=0.0),
    )
    check(*both(match_proposals, found, strided, **options))
    for value, kept in zip((*vars(strided).values(), wide, found.boxes), before, strict=True):
        assert torch.equal(value, kept)


class _Allocated(TorchDispatchMode):
    """Bytes of every new tensor."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in known:
            self.total += result.numel() * result.element_size()
        return result


def test_extra_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch 8, 268,569 anchors, 5,000 boxes in each image: the launchers alone, which allocate all there is."""
    monkeypatch.setattr(_launch, "uses_kernels", lambda x: True)
    monkeypatch.setattr(_launch, "launch", lambda *args, **options: None)
    targets, boxes = make_targets([5000] * 8), random_boxes(268569, 1)
    with _Allocated() as anchors:
        match_anchors(boxes, targets, seed=1, step=torch.tensor(3))
    with _Allocated() as proposals:
        match_proposals(make_proposals(8, 2000), targets, seed=1, step=torch.tensor(3))
    assert 8 * 268569 * 4 < anchors.total < 16 << 20
    assert 0 < proposals.total < 16 << 20
