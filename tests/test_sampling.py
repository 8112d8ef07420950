"""The draw of anchors and proposals for the losses: keys, counts, order, targets."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from rcnn.kernels import matching, sampling
from rcnn.kernels.anchors import anchors, cell_anchors
from rcnn.kernels.matching import match, match_anchors, match_proposals
from rcnn.structures import AnchorSamples, Proposals, Samples, Targets

pytestmark = pytest.mark.usefixtures("on_device")

EPS = torch.finfo(torch.float32).eps
SEED, STEP = 12345, 7


def here(x: Tensor) -> Tensor:
    """On the device of the test; random numbers are drawn on the CPU, so that they are the same everywhere."""
    return x.to(torch.empty(0).device)


def make_targets(counts: list[int], seed: int = 0, ignored: bool = True) -> Targets:
    """Boxes in images of 64 x 96 pixels; about a quarter are ignore regions."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    first = torch.randint(0, 48, (total, 2), generator=generator, device="cpu")
    extent = torch.randint(4, 40, (total, 2), generator=generator, device="cpu")
    labels = torch.randint(1, 5, (total,), generator=generator, device="cpu")
    if ignored:
        labels[torch.rand(total, generator=generator, device="cpu") < 0.25] = -1
    return Targets(
        boxes=here(torch.cat((first, first + extent), dim=1).float()),
        labels=here(labels),
        offsets=torch.tensor([0, *counts]).cumsum(0),
        image_sizes=torch.tensor([[64.0, 96.0]] * len(counts)),
        image_ids=torch.arange(len(counts)) * 17 + 3,
    )


def image_of(targets: Targets, image: int) -> Targets:
    """One image of a batch."""
    rows = slice(int(targets.offsets[image]), int(targets.offsets[image + 1]))
    return Targets(
        targets.boxes[rows],
        targets.labels[rows],
        targets.offsets[image : image + 2] - targets.offsets[image],
        targets.image_sizes[image : image + 1],
        targets.image_ids[image : image + 1],
    )


def grid() -> Tensor:
    cells = torch.stack([cell_anchors([16, 32], [0.5, 1.0, 2.0]), cell_anchors([32, 48], [0.5, 1.0, 2.0])])
    return anchors(cells, [(8, 12), (4, 6)], [8, 16])


def make_proposals(images: int, capacity: int = 60, seed: int = 1) -> Proposals:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, 48, (images, capacity, 2), generator=generator, device="cpu")
    extent = torch.randint(4, 40, (images, capacity, 2), generator=generator, device="cpu")
    boxes = here(torch.cat((first, first + extent), dim=2).float())
    count = torch.tensor([capacity - 9 * image for image in range(images)])
    boxes[torch.arange(capacity) >= count[:, None]] = 0
    return Proposals(boxes, torch.zeros(images, capacity), count)


def keys(stream: bytes, image_id: int, count: int, seed: int = SEED, step: int = 7) -> list[int]:
    return [reference.sampling_key(stream, seed, step, image_id, index) for index in range(count)]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, 2**70 + 5])
@pytest.mark.parametrize(("step", "image_id"), [(0, 0), (7, 3), (2**40, 2**62), (2**63 - 1, 2**63 - 1)])
def test_keys_are_splitmix64_in_integers(seed: int, step: int, image_id: int) -> None:
    starts = sampling.image_keys(sampling.ANCHORS, seed, torch.tensor(step), torch.tensor([image_id, image_id - 1]))
    labels = torch.zeros(2, 40, dtype=torch.int64)
    index, drawn = sampling.sample(labels, starts, 40, 0)
    assert not drawn.any()
    for row, identity in zip(index.tolist(), (image_id, image_id - 1), strict=True):
        key = keys(b"anchors!", identity % 2**64, 40, seed, step)
        assert row == sorted(range(40), key=lambda place: key[place])


def test_one_key_by_hand() -> None:
    # splitmix64 seeded with 0 gives 0xE220A8397B1DCDAF first, which is the finaliser of the golden ratio.
    first = sampling.mix(torch.tensor(sampling._signed(0x9E3779B97F4A7C15)))
    assert int(first) % 2**64 == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("size", [4, 32, 256, 2000])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_anchor_draw_equals_the_oracle(size: int, fraction: float) -> None:
    targets, boxes = make_targets([5, 0, 9]), grid()
    labels, _ = match(
        boxes,
        targets.boxes,
        targets.labels,
        targets.offsets,
        high_threshold=0.7,
        low_threshold=0.3,
        allow_low_quality_matches=True,
    )
    samples = match_anchors(
        boxes, targets, seed=SEED, step=torch.tensor(STEP), batch_size_per_image=size, positive_fraction=fraction
    )
    assert samples.index.shape == samples.labels.shape == (3, size)
    assert samples.deltas.shape == (3, size, 4)
    for image, image_id in enumerate(targets.image_ids.tolist()):
        key = keys(b"anchors!", image_id, len(boxes))
        drawn = list(zip(samples.index[image].tolist(), samples.labels[image].tolist(), strict=True))
        assert drawn == reference.sample(labels[image].tolist(), key, size, fraction)


def test_anchor_deltas() -> None:
    targets, boxes = make_targets([5, 0, 9]), grid()
    samples = match_anchors(boxes, targets, seed=SEED, step=torch.tensor(STEP))
    _, matched = match(
        boxes,
        targets.boxes,
        targets.labels,
        targets.offsets,
        high_threshold=0.7,
        low_threshold=0.3,
        allow_low_quality_matches=True,
    )
    positive = samples.labels == 1
    assert positive.sum(dim=1).tolist()[1] == 0 < int(positive.sum())
    assert not samples.deltas[~positive].any()
    image, slot = positive.nonzero(as_tuple=True)
    index = samples.index[image, slot]
    expected = [
        reference.encode(a, b)
        for a, b in zip(boxes[index].tolist(), targets.boxes[matched[image, index]].tolist(), strict=True)
    ]
    # Subtract, divide, logarithm and its argument: half-integer centres are exact.
    torch.testing.assert_close(samples.deltas[positive], torch.tensor(expected), rtol=4 * EPS, atol=4 * EPS)


def same(first: AnchorSamples | Samples, second: AnchorSamples | Samples) -> bool:
    return all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def test_anchor_draw_does_not_depend_on_the_place_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, boxes = make_targets([5, 0, 9, 2]), grid()
    together = match_anchors(boxes, targets, seed=SEED, step=torch.tensor(STEP), batch_size_per_image=64)
    for image in range(4):
        alone = match_anchors(
            boxes, image_of(targets, image), seed=SEED, step=torch.tensor(STEP), batch_size_per_image=64
        )
        assert same(alone, AnchorSamples(*(value[image : image + 1] for value in vars(together).values())))
    # Large images go one at a time.
    monkeypatch.setattr(matching, "_LABELS", 1)
    assert same(together, match_anchors(boxes, targets, seed=SEED, step=torch.tensor(STEP), batch_size_per_image=64))


def test_proposal_draw_does_not_depend_on_the_place_in_the_batch() -> None:
    targets, found = make_targets([5, 0, 9]), make_proposals(3)
    together = match_proposals(found, targets, seed=SEED, step=torch.tensor(STEP), batch_size_per_image=32)
    for image in range(3):
        part = Proposals(*(value[image : image + 1] for value in vars(found).values()))
        alone = match_proposals(
            part, image_of(targets, image), seed=SEED, step=torch.tensor(STEP), batch_size_per_image=32
        )
        expected = {name: value[32 * image : 32 * (image + 1)].clone() for name, value in vars(together).items()}
        expected["rois"][:, 0] = 0
        assert same(alone, Samples(**expected))


def test_seed_step_and_image_change_the_draw() -> None:
    targets, boxes = make_targets([0, 0]), grid()
    arguments: dict[str, Any] = {"seed": SEED, "step": torch.tensor(STEP), "batch_size_per_image": 32}
    base = match_anchors(boxes, targets, **arguments)
    assert same(base, match_anchors(boxes, targets, **arguments))
    assert not torch.equal(base.index[0], base.index[1])
    for each in (5, -5):
        of_numpy, of_python = (
            match_anchors(boxes, targets, **{**arguments, "seed": x}) for x in (np.int64(each), each)
        )
        assert same(of_numpy, of_python)
    for change in ({"seed": SEED + 1}, {"step": torch.tensor(STEP + 1)}):
        assert not torch.equal(base.index, match_anchors(boxes, targets, **{**arguments, **change}).index)


def test_the_draw_is_uniform() -> None:
    targets, boxes = make_targets([0]), grid()[:40]
    counts = torch.zeros(40)
    for step in range(400):
        counts[match_anchors(boxes, targets, seed=3, step=torch.tensor(step), batch_size_per_image=10).index[0]] += 1
    # 100 draws expected of each; the deviation of a binomial is sqrt(400 * 0.25 * 0.75) = 8.7, and 5 of them are 43.
    assert (counts - 100).abs().max() < 43


def test_anchors_beyond_the_border_take_no_part() -> None:
    boxes = torch.tensor(
        [[-1.0, 0.0, 9.0, 10.0], [0.0, 0.0, 10.0, 10.0], [86.0, 54.0, 96.0, 64.0], [90.0, 0.0, 99.0, 9]]
    )
    targets = Targets(
        torch.tensor([[-1.0, 0.0, 9.0, 10.0]]),
        torch.tensor([1]),
        torch.tensor([0, 1]),
        torch.tensor([[64.0, 96.0]]),
        torch.tensor([0]),
    )
    arguments: dict[str, Any] = {
        "seed": 0,
        "step": torch.tensor(STEP),
        "batch_size_per_image": 4,
        "positive_fraction": 1.0,
    }
    for border, positive, negative in (
        (None, {0, 1}, {2, 3}),
        (0.0, {1}, {2}),
        (1.0, {0, 1}, {2}),
        (3.0, {0, 1}, {2, 3}),
    ):
        samples = match_anchors(boxes, targets, allowed_border=border, **arguments)
        for label, expected in ((1, positive), (0, negative)):
            assert set(samples.index[samples.labels == label].tolist()) == expected
        assert int((samples.labels == -1).sum()) == 4 - len(positive | negative)


@pytest.mark.parametrize("options", [{}, {"box_weights": (10.0, 8.0, 5.0, 4.0)}])
@pytest.mark.parametrize("size", [8, 48, 300])
def test_proposal_samples_equal_the_oracle(size: int, options: dict[str, Any]) -> None:
    targets, found = make_targets([6, 0, 9]), make_proposals(3)
    weights = options.get("box_weights", (10.0, 10.0, 5.0, 5.0))
    samples = match_proposals(found, targets, seed=SEED, step=torch.tensor(STEP), batch_size_per_image=size, **options)
    offsets = targets.offsets.tolist()
    gt_boxes, gt_labels = targets.boxes.tolist(), targets.labels.tolist()
    for image, image_id in enumerate(targets.image_ids.tolist()):
        rows = range(offsets[image], offsets[image + 1])
        candidates = found.boxes[image].tolist() + [gt_boxes[row] for row in rows]
        labels, matched = reference.match(candidates, gt_boxes, gt_labels, rows, 0.5, 0.5, False)
        for index in range(60 + len(rows)):
            if (index >= 60 and gt_labels[rows[index - 60]] < 0) or int(found.count[image]) <= index < 60:
                labels[index] = -1
        drawn = reference.sample(labels, keys(b"proposal", image_id, len(labels)), size, 0.25)
        place = slice(image * size, (image + 1) * size)
        positive = [matched[index] if label == 1 else -1 for index, label in drawn]
        assert samples.rois[place].tolist() == [
            [image, *(candidates[index] if label >= 0 else [0.0] * 4)] for index, label in drawn
        ]
        assert samples.labels[place].tolist() == [
            gt_labels[row] if row >= 0 else label for (_, label), row in zip(drawn, positive, strict=True)
        ]
        assert samples.weights[place].tolist() == [float(label >= 0) for _, label in drawn]
        assert samples.matched_boxes[place].tolist() == [gt_boxes[row] if row >= 0 else [0.0] * 4 for row in positive]
        deltas = [
            reference.encode(candidates[index], gt_boxes[row], weights) if row >= 0 else [0.0] * 4
            for (index, _), row in zip(drawn, positive, strict=True)
        ]
        # Subtract, weigh, divide, logarithm and its argument; an absolute error of the logarithm is weighed by 5.
        torch.testing.assert_close(samples.deltas[place], torch.tensor(deltas), rtol=5 * EPS, atol=5 * 5 * EPS)


def test_ground_truth_joins_as_candidates() -> None:
    targets = make_targets([3], ignored=False)
    none = Proposals(torch.zeros(1, 5, 4), torch.zeros(1, 5), torch.tensor([0]))
    samples = match_proposals(none, targets, seed=SEED, step=torch.tensor(STEP), batch_size_per_image=16)
    drawn = samples.weights > 0
    assert sorted(samples.rois[drawn, 1:].tolist()) == sorted(targets.boxes.tolist())
    assert torch.equal(samples.rois[drawn, 1:], samples.matched_boxes[drawn])
    assert not samples.deltas.any()


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ((0.0, 0.0, 10.0, 9.0), -1),  # an ignore region, with an IoU of 0.9 with the row that joins
        ((30.0, 30.0, 30.0, 40.0), 1),
        ((30.0, 30.0, 40.0, 30.0), 1),
        ((0.0, 0.0, 1e20, 1e20), 1),  # its area overflows
    ],
)
def test_ground_truth_that_does_not_join(row: tuple[float, ...], label: int) -> None:
    targets = Targets(
        torch.tensor([row, (0.0, 0.0, 10.0, 10.0)]),
        torch.tensor([label, 2]),
        torch.tensor([0, 2]),
        torch.tensor([[64.0, 96.0]]),
        torch.tensor([0]),
    )
    none = Proposals(torch.zeros(1, 5, 4), torch.zeros(1, 5), torch.tensor([0]))
    samples = match_proposals(none, targets, seed=SEED, step=torch.tensor(STEP), batch_size_per_image=16)
    assert samples.labels.tolist() == [2] + [-1] * 15
    assert samples.rois[0].tolist() == [0.0, 0.0, 0.0, 10.0, 10.0]


def test_degenerate_ground_truth_gives_finite_samples() -> None:
    boxes = torch.tensor([[4.0, 4.0, 4.0, 30.0], [9.0, 9.0, 3.0, 3.0], [0.0, 0.0, 20.0, 20.0], [float("nan")] * 4])
    targets = Targets(
        boxes, torch.ones(4, dtype=torch.int64), torch.tensor([0, 4]), torch.tensor([[64.0, 96.0]]), torch.tensor([0])
    )
    drawn = match_anchors(grid(), targets, seed=SEED, step=torch.tensor(STEP))
    assert drawn.deltas.isfinite().all()
    samples = match_proposals(make_proposals(1), targets, seed=SEED, step=torch.tensor(STEP))
    assert all(value.isfinite().all() for value in vars(samples).values())
    assert set(samples.matched_boxes[samples.labels == 1].unique(dim=0).flatten().tolist()) == {0.0, 20.0}
    assert int((samples.weights > 0).sum()) == 61  # 60 proposals and the one sound box


def test_no_candidates() -> None:
    targets = make_targets([0, 0])
    none = Proposals(torch.ones(2, 4, 4), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
    samples = match_proposals(none, targets, seed=0, step=torch.tensor(STEP), batch_size_per_image=3)
    assert samples.rois.tolist() == [[image, 0.0, 0.0, 0.0, 0.0] for image in (0, 0, 0, 1, 1, 1)]
    assert samples.labels.tolist() == [-1] * 6


def test_samples_have_no_gradient() -> None:
    found = make_proposals(1)
    found = Proposals(found.boxes.requires_grad_(), found.scores, found.count)
    samples = match_proposals(found, make_targets([3]), seed=0, step=torch.tensor(STEP))
    assert not samples.rois.requires_grad
    assert not samples.deltas.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchors": torch.zeros(3, 5)}, r"anchors must have shape \(N, 4\) with N at least 1, got \(3, 5\)"),
        ({"step": torch.tensor([3])}, r"step must be an int64 tensor of shape \(\), got torch.int64 of \(1,\)"),
        ({"batch_size_per_image": 0}, "batch_size_per_image must be an integer in 1.*, got 0"),
        ({"positive_fraction": 1.5}, r"positive_fraction must lie in 0..1, got 1.5"),
    ],
)
def test_anchor_errors(change: dict[str, Any], message: str) -> None:
    arguments = {"anchors": grid(), "targets": make_targets([1]), "seed": 0, "step": torch.tensor(STEP)}
    change = {name: here(x) if isinstance(x, Tensor) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        match_anchors(**{**arguments, **change})


def test_proposal_errors() -> None:
    targets = make_targets([1, 2])
    with pytest.raises(ValueError, match=r"shape \(2, P, 4\) with P at least 1, got \(1, 60, 4\)"):
        match_proposals(make_proposals(1), targets, seed=0, step=torch.tensor(STEP))
    with pytest.raises(ValueError, match=r"box_weights must be 4 numbers above 0, got \(1.0,\)"):
        match_proposals(make_proposals(2), targets, seed=0, step=torch.tensor(STEP), box_weights=(1.0,))
    broken = dataclasses.replace(targets, image_ids=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"targets.image_ids must have shape \(2,\), got \(3,\)"):
        match_anchors(grid(), broken, seed=0, step=torch.tensor(STEP))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boxes_of_16_bits_are_computed_with_in_float32(dtype: torch.dtype) -> None:
    """Whole coordinates below 256 are exact in either type, an IoU of them is not."""
    targets, found, options = make_targets([6, 4]), make_proposals(2), {"seed": SEED, "step": torch.tensor(STEP)}
    narrow = dataclasses.replace(targets, boxes=targets.boxes.to(dtype), image_sizes=targets.image_sizes.to(dtype))
    found = dataclasses.replace(found, boxes=found.boxes.round())
    narrow_found = dataclasses.replace(found, boxes=found.boxes.to(dtype))
    labels = targets.labels, targets.offsets
    thresholds = {"high_threshold": 0.5, "low_threshold": 0.3}
    pairs = [
        (
            match(grid().to(dtype), narrow.boxes, *labels, **thresholds),
            match(grid(), targets.boxes, *labels, **thresholds),
        ),
        *[
            (vars(a).values(), vars(b).values())
            for a, b in (
                (match_anchors(grid().to(dtype), narrow, **options), match_anchors(grid(), targets, **options)),
                (match_proposals(narrow_found, narrow, **options), match_proposals(found, targets, **options)),
            )
        ],
    ]
    for one, other in pairs:
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
