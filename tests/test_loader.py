"""Batches: each image where it should be, the same whatever the number of workers and processes."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from rcnn.config import LoaderConfig
from rcnn.data import DetectionDataset, Record, make_loader
from rcnn.data.loader import BatchPlan
from rcnn.images import PADDING, ImageError

WIDE, TALL = (48, 64), (64, 48)


def dataset(folder, sizes, strict=False):
    """Images of random pixels; image i has i % 3 boxes of label 1, the second one to be ignored."""
    rng = np.random.default_rng(0)
    records = []
    for i, (height, width) in enumerate(sizes):
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        n = i % 3
        boxes = np.array([[4, 8, 24, 28], [10, 10, 20, 40]], np.float32)[:n]
        ignore = np.array([False, True])[:n]
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        records.append(Record(path, f"{i}", width, height, boxes, np.ones(n, np.int64), ignore, areas))
    return DetectionDataset("test", ["thing"], records, strict=strict)


def loader(data, *, train=True, batch_size=4, workers=0, augmented=True, **settings):
    config = LoaderConfig(batch_size=batch_size, workers=workers, color=0.0, scale=(1.0, 1.0), flip=0.0)
    if augmented:
        config = LoaderConfig(
            batch_size=batch_size, workers=workers, flip=0.5, vertical_flip=0.5, color=0.4, scale=(0.7, 1.3)
        )
    return make_loader(data, config, min_size=48, max_size=64, train=train, **settings)


def sizes_of(wide, tall):
    return [WIDE] * wide + [TALL] * tall


def tall(sizes):
    return np.array([height > width for height, width in sizes])


def plans(sizes, batch_size, *, train, world_size=1, epoch=0, seed=0):
    """The batches of each process."""
    result = []
    for rank in range(world_size):
        plan = BatchPlan(tall(sizes), batch_size, train=train, seed=seed, rank=rank, world_size=world_size)
        plan.set_epoch(epoch)
        batches = list(plan)
        assert len(batches) == len(plan) and all(e == epoch for b in batches for e, _ in b)
        result.append([[i for _, i in b] for b in batches])
    return result


@pytest.mark.parametrize(("wide", "tall"), [(1, 0), (2, 0), (7, 0), (8, 0), (13, 6), (8, 8), (3, 2), (1, 30)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_training_uses_every_image_and_fills_every_batch(wide, tall, world_size, batch_size):
    sizes = sizes_of(wide, tall)
    count = len(sizes)
    ranks = plans(sizes, batch_size, train=True, world_size=world_size)
    size = min(batch_size, -(-count // world_size))
    steps = -(-count // (size * world_size))
    assert [len(r) for r in ranks] == [steps] * world_size  # no process waits for another for ever
    assert {len(b) for r in ranks for b in r} == {size}
    used = [i for r in ranks for b in r for i in b]
    assert set(used) == set(range(count))
    for step in range(steps):
        together = [i for r in ranks for i in r[step]]
        assert len(set(together)) == min(len(together), count)


def test_shapes_share_batches_but_for_the_rest():
    sizes = np.array(sizes_of(21, 10))
    (batches,) = plans(sizes, 4, train=True)
    mixed = [b for b in batches if len({tuple(sizes[i]) for i in b}) > 1]
    assert len(batches) == 8 and len(mixed) == 1  # 5 of wide ones, 2 of tall ones, 1 + 2 + a filling


def test_training_order_depends_on_seed_and_epoch_alone():
    sizes = sizes_of(13, 6)
    first = plans(sizes, 4, train=True)
    assert first == plans(sizes, 4, train=True)
    assert first != plans(sizes, 4, train=True, epoch=1) and first != plans(sizes, 4, train=True, seed=1)
    # two processes of 2 images share out what one process of 4 sees
    ranks = plans(sizes, 2, train=True, world_size=2)
    assert [a + b for a, b in zip(*ranks, strict=True)] == first[0]


@pytest.mark.parametrize(("wide", "tall"), [(1, 0), (7, 0), (13, 6), (8, 8)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_uses_every_image_once(wide, tall, world_size):
    sizes = np.array(sizes_of(wide, tall))
    ranks = plans(sizes, 4, train=False, world_size=world_size)
    assert sorted(i for r in ranks for b in r for i in b) == list(range(wide + tall))
    assert all(len({tuple(sizes[i]) for i in b}) == 1 for r in ranks for b in r)
    lengths = [len(r) for r in ranks]
    assert max(lengths) - min(lengths) <= 1


def test_an_epoch_can_be_entered_in_its_middle():
    plan = BatchPlan(tall(sizes_of(20, 0)), 4, train=True)
    plan.set_epoch(3)
    whole = list(plan)
    plan.set_epoch(3, 2)
    assert len(plan) == 3 and list(plan) == whole[2:]


def test_bad_plans():
    kinds = tall([WIDE])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        BatchPlan(kinds, 0, train=True)
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.1, got 2"):
        BatchPlan(kinds, 1, train=True, rank=2, world_size=2)
    with pytest.raises(ValueError, match="at least one image"):
        BatchPlan(kinds[:0], 1, train=True)


def test_a_batch_in_evaluation(tmp_path):
    data = dataset(tmp_path, [(48, 64), (96, 128), (40, 64)])
    (batch,) = loader(data, train=False)
    assert batch.indices == [0, 1, 2] and batch.skipped == []
    assert batch.images.shape == (3, 3, 64, 64) and batch.images.dtype == torch.uint8
    np.testing.assert_array_equal(batch.images[0, :, :48].permute(1, 2, 0).numpy(), data.read(0))
    assert batch.images[0, :, 48:].permute(1, 2, 0).reshape(-1, 3).unique(dim=0).tolist() == [list(PADDING)]
    targets = batch.targets
    assert targets.image_sizes.tolist() == [[48, 64], [48, 64], [40, 64]]
    assert targets.image_ids.tolist() == [0, 1, 2]
    assert targets.offsets.tolist() == [0, 0, 1, 3]
    assert targets.labels.tolist() == [1, 1, -1]  # the last one is an ignore region
    assert targets.boxes.tolist() == [[2, 4, 12, 14], [4, 8, 24, 28], [10, 10, 20, 40]]
    assert batch.scales.tolist() == [[1, 1], [2, 2], [1, 1]]
    assert {t.dtype for t in (targets.boxes, targets.image_sizes, batch.scales)} == {torch.float32}
    assert {t.dtype for t in (targets.labels, targets.offsets, targets.image_ids)} == {torch.int64}


def test_scales_map_each_axis_back(tmp_path):
    data = dataset(tmp_path, [(100, 333)])
    (batch,) = loader(data, train=False)
    height, width = batch.targets.image_sizes[0].tolist()
    assert (height, width) == (19, 64)  # 100 * 64 / 333 = 19.2
    np.testing.assert_allclose(batch.scales[0].numpy(), [100 / 19, 333 / 64], rtol=np.finfo(np.float32).eps)


def test_a_batch_without_any_object(tmp_path):
    (batch,) = loader(dataset(tmp_path, [WIDE]), train=True)
    assert batch.targets.boxes.shape == (0, 4) and batch.targets.labels.shape == (0,)
    assert batch.targets.boxes.dtype == torch.float32 and batch.targets.labels.dtype == torch.int64
    assert batch.targets.offsets.tolist() == [0, 0]


def test_boxes_below_a_pixel_are_left_out(tmp_path):
    data = dataset(tmp_path, [(480, 640), WIDE])
    data.records[1].boxes[0] = [5, 5, 6, 20]
    data.records[0] = Record(
        data.records[0].path, "0", 640, 480, np.array([[0, 0, 9, 100], [0, 0, 10, 10]], np.float32),
        np.array([1, 1]), np.array([False, False]), np.ones(2, np.float32),
    )  # fmt: skip
    (batch,) = loader(data, train=False)  # ten times smaller: 0.9 x 10 goes, 1 x 1 stays
    assert batch.targets.boxes.tolist() == [[0, 0, 1, 1], [5, 5, 6, 20]]
    assert batch.targets.offsets.tolist() == [0, 1, 2]


def equal(first, second):
    return (
        first.indices == second.indices
        and first.skipped == second.skipped
        and torch.equal(first.images, second.images)
        and all(
            torch.equal(a, b) for a, b in zip(vars(first.targets).values(), vars(second.targets).values(), strict=True)
        )
        and torch.equal(first.scales, second.scales)
    )


def test_workers_epochs_and_resuming_change_nothing(tmp_path):
    data = dataset(tmp_path, sizes_of(9, 4))
    alone, helped = loader(data), loader(data, workers=2)
    seen = {}
    for epoch in (0, 1, 0):  # the workers live on from epoch to epoch
        alone.set_epoch(epoch)
        helped.set_epoch(epoch)
        batches = list(alone)
        assert len(batches) == len(alone) == 4
        assert all(equal(a, b) for a, b in itertools.zip_longest(batches, helped))
        if epoch in seen:
            assert all(equal(a, b) for a, b in zip(batches, seen[epoch], strict=True))
        seen[epoch] = batches
    assert not any(equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    resumed = loader(data, workers=1)
    resumed.set_epoch(1, 2)
    assert all(equal(a, b) for a, b in itertools.zip_longest(resumed, seen[1][2:]))


def test_an_image_is_changed_alike_in_any_batch(tmp_path):
    data = dataset(tmp_path, sizes_of(8, 0))
    found = {}
    for size in (1, 4):
        for batch in loader(data, batch_size=size):
            for i, index in enumerate(batch.indices):
                height, width = (int(v) for v in batch.targets.image_sizes[i])
                found.setdefault(index, []).append(batch.images[i, :, :height, :width])
    assert len(found) == 8 and all(torch.equal(a, b) for a, b in found.values())


def test_the_global_random_numbers_are_left_alone(tmp_path):
    data = dataset(tmp_path, sizes_of(4, 0))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(data))
    assert torch.equal(torch.get_rng_state(), before)


def damage(data, *indices):
    for i in indices:
        path = data.records[i].path
        path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_replaced_in_training(tmp_path, workers):
    data = dataset(tmp_path, sizes_of(8, 0))
    damage(data, 2, 3, 7)
    batches = list(loader(data, workers=workers))
    used = [i for b in batches for i in b.indices]
    assert len(used) == 8 and set(used) == {0, 1, 4, 5, 6}
    assert used.count(4) == 3 and used.count(0) == 2  # 2 and 3 -> 4, 7 -> 0
    assert all(b.targets.image_ids.tolist() == b.indices for b in batches)
    skipped = sorted({s for b in batches for s in b.skipped})
    assert len(skipped) == 3 and "2.png: the image is truncated or damaged" in skipped[0]


def test_a_bad_image_is_blank_in_evaluation(tmp_path):
    data = dataset(tmp_path, sizes_of(5, 0))
    damage(data, 1)
    first, second = loader(data, train=False)
    assert first.indices + second.indices == [0, 1, 2, 3, 4]
    assert first.images[1, :, :48].permute(1, 2, 0).reshape(-1, 3).unique(dim=0).tolist() == [list(PADDING)]
    assert first.targets.offsets.tolist() == [0, 0, 1, 3, 3]  # its objects count as missed
    assert len(first.skipped) == 1 and second.skipped == []


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("train", [True, False])
def test_strict_raises_the_one_sentence(tmp_path, workers, train):
    data = dataset(tmp_path, sizes_of(8, 0), strict=True)
    damage(data, 5)
    try:
        list(loader(data, workers=workers, train=train))
        message = "no error"
    except ImageError as error:  # pytest.raises would keep the frames, and so the workers, alive
        message = str(error)
    assert "5.png: the image is truncated or damaged" in message and "\n" not in message


def test_no_readable_image_at_all_raises(tmp_path):
    data = dataset(tmp_path, sizes_of(3, 0))
    damage(data, 0, 1, 2)
    with pytest.raises(ImageError, match="test: expected at least one readable image"):
        list(loader(data))


def test_a_file_that_changed_is_a_bad_image(tmp_path):
    data = dataset(tmp_path, sizes_of(2, 0))
    Image.new("RGB", (32, 32)).save(data.records[1].path)
    (batch,) = loader(data, train=False)
    assert "1.png: expected 64 x 48 pixels as when the data set was opened, got 32 x 32" in batch.skipped[0]


def test_without_workers_there_is_no_death_to_wait_for(tmp_path, monkeypatch):
    def read(*_):
        raise OSError("the disk is gone")

    def wait(*_):
        raise AssertionError("waited for a worker")

    data = dataset(tmp_path, sizes_of(4, 0))
    monkeypatch.setattr(DetectionDataset, "read", read)
    monkeypatch.setattr("multiprocessing.connection.wait", wait)
    with pytest.raises(OSError, match="the disk is gone"):
        list(loader(data))


def test_configuration_must_be_filled_in(tmp_path):
    data = dataset(tmp_path, sizes_of(1, 0))
    with pytest.raises(ValueError, match="config.resolve fills them in"):
        make_loader(data, LoaderConfig(), min_size=48, max_size=64, train=True)


def test_workers_by_cores(tmp_path, monkeypatch):
    data = dataset(tmp_path, sizes_of(40, 0))
    for cores, ranks, expected in [(2, 1, 1), (1, 1, 0), (64, 1, 8), (8, 2, 2)]:
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: range(cores), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert loader(data, workers=-1).num_workers == expected


def test_to_moves_everything(tmp_path):
    (batch,) = loader(dataset(tmp_path, [WIDE] * 2), train=False)
    moved = batch.to("meta")
    assert moved.images.is_meta and moved.targets.boxes.is_meta and moved.scales.is_meta
    assert moved.indices == batch.indices
