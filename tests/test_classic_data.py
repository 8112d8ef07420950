"""The classic API's data half, its meter, its writer of scalars and its pictures; the networks are in test_classic."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rcnn import classic
from rcnn.classic import (
    AverageMeter,
    CocoData,
    CocoGenerator,
    CrayonClient,
    Enqueuer,
    VOCDetection,
    convert_data,
    imshow,
    result_show,
)
from rcnn.data import flowers, open_dataset, to_coco


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    flowers.write(folder, count=14, seed=1)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (VOCDetection, CocoData):
        monkeypatch.setattr(kind, "SCALES", (96,))


def test_classes_follow_the_label_map(root: Path, tmp_path: Path) -> None:
    (tmp_path / "VOC2007").symlink_to(root / "VOC2007", target_is_directory=True)
    (tmp_path / "pascal_label_map.pbtxt").write_text(
        "item { id: 1 name: 'tulip' } item { id: 2 name: 'daisy' }", encoding="utf-8"
    )
    assert VOCDetection(tmp_path, "train").classes == ["__background__", "tulip", "daisy"]


def test_a_blob_is_the_picture_and_its_boxes_at_the_network_s_size(root: Path) -> None:
    ds = VOCDetection(root, "train")
    record, blob = ds.dataset.records[0], ds[0]
    height, width = blob["tensor"].shape[2:]
    assert blob["tensor"].shape == (1, 3, height, width) and min(height, width) == 96
    assert blob["im_info"].tolist() == [[height, width, np.float32(height / record.height)]]
    assert blob["im_name"] == record.path.name
    expected = record.boxes * np.array([width / record.width, height / record.height] * 2)
    np.testing.assert_allclose(blob["boxes"], expected, rtol=2 * np.finfo(np.float32).eps)
    assert blob["gt_classes"].tolist() == np.where(record.ignore, -1, record.labels).tolist()


def test_what_the_reader_skips_is_told(root: Path, tmp_path: Path) -> None:
    flowers.write(tmp_path, count=14, seed=1)
    name = (tmp_path / "VOC2007" / "ImageSets" / "Main" / "train.txt").read_text("utf-8").split()[0]
    (tmp_path / "VOC2007" / "JPEGImages" / f"{name}.jpg").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 problem\(s\) .*zero bytes"):
        assert len(VOCDetection(tmp_path, "train")) == 9


def test_coco_data_takes_the_documented_folder(root: Path, tmp_path: Path) -> None:
    source = open_dataset(root, "train")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train2014").symlink_to(root / "VOC2007" / "JPEGImages", target_is_directory=True)
    file = tmp_path / "annotations" / "instances_train2014.json"
    file.write_text(json.dumps(to_coco(source)), encoding="utf-8")
    ds = CocoData(root=tmp_path / "images" / "train2014", annFile=file)
    assert ds.classes == ["__background__", "daisy", "tulip"] and len(ds) == 10
    np.testing.assert_array_equal(ds[0]["boxes"], VOCDetection(root, "train")[0]["boxes"])
    with pytest.raises(ValueError, match=r"root must be the folder of the pictures, .*train2014, got"):
        CocoData(root=tmp_path / "annotations", annFile=file)


class Rows:
    """In place of a data set: its blobs are the rows themselves."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> int:
        if row == 99:
            raise classic.images.ImageError("row 99 is torn")
        return row


def test_a_generator_goes_on_epoch_after_epoch() -> None:
    generator = CocoGenerator(data=Rows(5), batch_size=2)  # type: ignore[arg-type]
    assert [next(generator) for _ in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]
    assert generator.next() == [2, 3]


def test_shuffling_follows_the_seed() -> None:
    def epochs(seed: int | None) -> list[list[int]]:
        generator = CocoGenerator(data=Rows(20), batch_size=20, shuffle=True, seed=seed)  # type: ignore[arg-type]
        return [generator.next() for _ in range(2)]  # type: ignore[misc]

    first, second = epochs(2)
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    assert epochs(2) == [first, second] and epochs(3) != [first, second]
    torch.manual_seed(5)
    drawn = epochs(None)
    torch.manual_seed(5)
    assert epochs(None) == drawn


@pytest.mark.parametrize("use_multiprocessing", [False, True])
def test_a_queue_keeps_the_order(use_multiprocessing: bool) -> None:
    generator = CocoGenerator(data=Rows(7), batch_size=2)  # type: ignore[arg-type]
    queue = Enqueuer(generator=generator, use_multiprocessing=use_multiprocessing)
    with pytest.raises(ValueError, match="start"):
        queue.get()
    queue.start(workers=2, max_queue_size=4)
    stream = queue.get()
    assert [next(stream), stream.next(), next(iter(stream)), next(stream)] == [[0, 1], [2, 3], [4, 5], [6]]
    assert next(stream) == [0, 1]
    queue.stop()
    with pytest.raises(ValueError, match="start"):
        queue.get()


def test_a_picture_that_cannot_be_read_is_left_out_and_told() -> None:
    batches = CocoGenerator(data=Rows(100), batch_size=100)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="row 99 is torn; image skipped"):
        assert next(batches) == list(range(99))


def test_convert_data_pads_with_zeros() -> None:
    def blob(height: int, width: int, count: int) -> dict[str, object]:
        rows = np.arange(4 * count, dtype=np.float32).reshape(count, 4)
        info = np.array([[height, width, 0.5]], np.float32)
        gt = np.arange(1, count + 1)
        return {"tensor": torch.ones(1, 3, height, width), "boxes": rows, "gt_classes": gt, "im_info": info}

    tensor, info, gt, index = convert_data([blob(4, 6, 2), blob(5, 3, 0), blob(2, 2, 1)])
    assert tensor.shape == (3, 3, 5, 6)
    assert [int(one.sum()) for one in tensor] == [3 * 24, 3 * 15, 3 * 4]
    assert tensor[1, 0, :5, :3].sum() == 15
    assert info.tolist() == [[4, 6, 0.5], [5, 3, 0.5], [2, 2, 0.5]]
    assert gt.tolist() == [[0, 1, 2, 3, 1], [4, 5, 6, 7, 2], [0, 1, 2, 3, 1]]
    assert index.tolist() == [0, 0, 2]
    with pytest.raises(ValueError, match="at least one blob"):
        convert_data([])


def test_average_meter() -> None:
    meter = AverageMeter()
    meter.update(2.0)
    meter.update(5.0, n=2)
    assert (meter.val, meter.sum, meter.count, meter.avg) == (5.0, 12.0, 3, 4.0)
    meter.reset()
    assert (meter.val, meter.sum, meter.count, meter.avg) == (0.0, 0.0, 0, 0.0)


def test_crayon_writes_tensorboard_events(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    experiment = CrayonClient(hostname="crayon", port=8889, folder=tmp_path).create_experiment("one")
    experiment.add_scalar_value("train_loss", 2.5, step=10)
    experiment.add_scalar_value("train_loss", 2.0)
    experiment.add_scalar_value("other", 1.0, wall_time=12.0)
    del experiment  # closes the file
    (file,) = (tmp_path / "one").iterdir()
    events = [event for event in loader.EventFileLoader(str(file)).Load() if event.summary.value]
    found = [(e.summary.value[0].tag, e.step, e.summary.value[0].tensor.float_val[0]) for e in events]
    assert found == [("train_loss", 10, 2.5), ("train_loss", 11, 2.0), ("other", 0, 1.0)]
    assert events[2].wall_time == 12.0


def test_imshow_undoes_the_normalisation(root: Path) -> None:
    ds = VOCDetection(root, "train")
    blob = ds[0]
    shown = np.asarray(imshow(blob["tensor"][0]))
    plain = classic.images.resize(ds.dataset.read(0), *shown.shape[:2])
    np.testing.assert_array_equal(shown, plain)
    boxed = np.asarray(imshow(blob["tensor"][0], gt_boxes=blob["boxes"], predict_boxes=blob["boxes"], random=True))
    assert boxed.shape == shown.shape and (boxed != shown).any()
    named = result_show(blob["tensor"][0], [[2, 2, 40, 40]], [2], [0.9], mapping_name={2: "tulip"})
    assert (np.asarray(named) != shown).any()
