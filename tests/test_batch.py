"""The way of a batch to a GPU, and the few sizes that batches are padded to."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_loader import dataset, equal, loader
from test_models import scene, small

from rcnn.config import LoaderConfig
from rcnn.data import Record, make_loader
from rcnn.data.batch import Batch, Packed, uploaded
from rcnn.data.buckets import ROWS, Buckets, pad_targets
from rcnn.images import PADDING, ImageError, read_image
from rcnn.structures import Targets


def arrays():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((5, 9), (8, 4), (3, 3), (8, 16))]


def targets(rows=3):
    return Targets(
        boxes=torch.arange(4.0 * rows).view(rows, 4),
        labels=torch.arange(rows) + 1,
        offsets=torch.tensor([0, rows, rows, rows, rows]),
        image_sizes=torch.tensor([[5.0, 9.0], [8, 4], [3, 3], [8, 16]]),
        image_ids=torch.tensor([4, 5, 6, 7]),
    )


def packed():
    rest = Batch(torch.empty(0, dtype=torch.uint8), targets(), [4, 5, 6, 7], torch.ones(4, 2), ["one was bad"])
    flips = [(False, False), (True, False), (False, True), (True, True)]
    return Packed.of(arrays(), flips, (8, 16), rest), flips


def test_unpacking_flips_and_pads():
    pack, flips = packed()
    batch = pack.unpack()
    assert batch.images.shape == (4, 3, 8, 16) and batch.images.dtype == torch.uint8
    for image, array, (mirrored, upside_down) in zip(batch.images, arrays(), flips, strict=True):
        height, width = array.shape[:2]
        expected = array[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
        np.testing.assert_array_equal(image[:, :height, :width].permute(1, 2, 0).numpy(), expected)
        rest = image.permute(1, 2, 0).clone()
        rest[:height, :width] = torch.tensor(PADDING, dtype=torch.uint8)
        assert (rest == torch.tensor(PADDING, dtype=torch.uint8)).all()
    assert batch.indices == [4, 5, 6, 7] and batch.skipped == ["one was bad"]
    assert batch.targets.boxes.tolist() == targets().boxes.tolist()


class Streams:
    """Stands in for ``torch.cuda``'s streams and writes down what happens."""

    def __init__(self, monkeypatch):
        self.log = []
        self.current = "consumer"
        streams = self

        class Stream:
            def __init__(self, device=None, name="side"):
                self.name = name

            def wait_stream(self, other):
                streams.log.append(f"{self.name} waits for {other.name}")

            def __enter__(self):
                self.before, streams.current = streams.current, self.name
                return self

            def __exit__(self, *_):
                streams.current = self.before

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(name=self.current))
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, stream: self.log.append(f"kept for {stream.name}")
        )


def test_an_upload_runs_on_a_stream_of_its_own_and_the_step_waits_for_it(monkeypatch):
    streams = Streams(monkeypatch)
    unpack, (pack, _) = Packed.unpack, packed()
    expected = unpack(pack)

    def told(self, device="cpu"):
        streams.log.append(f"sent on {streams.current}")
        return unpack(self, device)

    monkeypatch.setattr(Packed, "unpack", told)
    error = ImageError("bad")
    batches = uploaded(iter([pack, error, pack]), torch.device("cpu"))
    assert equal(next(batches), expected)
    # Images, five fields of the targets, scales.
    one = ["sent on side", "consumer waits for side", *["kept for consumer"] * 7]
    assert streams.log == one and streams.current == "consumer"
    assert next(batches) is error and streams.log == one
    next(batches)
    assert streams.log == 2 * one
    assert list(batches) == []


def test_the_longer_sides_are_those_of_cameras():
    buckets = Buckets(800, 1333, 32)
    assert buckets.short == 800 and buckets.longs == [800, 1088, 1216, 1344]  # 800, 1066.7, 1200 and 1333 pixels
    assert Buckets(240, 320, 32).longs == [256, 320]


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((800, 800), (800, 800)),
        ((800, 801), (800, 1088)),
        ((500, 1088), (800, 1088)),
        ((750, 1333), (800, 1344)),
        ((801, 800), (1088, 800)),
        ((1333, 10), (1344, 800)),
        ((801, 801), (1344, 1344)),  # wide and tall ones together
    ],
)
def test_the_smallest_bucket_that_holds_the_batch(size, shape):
    assert Buckets(800, 1333, 32).shape(*size) == shape


def test_every_possible_image_has_a_bucket():
    buckets = Buckets(600, 1000, 32)
    sizes = np.array([(h, w) for h in (1, 7, 300, 480, 1000, 4000) for w in (1, 9, 333, 640, 1200, 3000)])
    kinds = buckets.kinds(sizes)
    for (height, width), kind in zip(sizes, kinds, strict=True):
        assert (kind < 0) == (height > width and kind != 0)
        assert 0 <= abs(kind) < len(buckets.longs)


def test_buckets_only_add_padding(tmp_path):
    data = dataset(tmp_path, [(48, 64), (64, 48), (48, 48), (40, 64), (30, 64), (64, 40), (48, 64)])
    config = LoaderConfig(batch_size=2, workers=0, flip=0.5, color=0.0, scale=(0.5, 1.0), buckets=True)
    bucketed = make_loader(data, config, min_size=48, max_size=96, train=True)
    alone = make_loader(data, LoaderConfig(1, 0, 0.5, 0.0, 0.0, (0.5, 1.0)), min_size=48, max_size=96, train=True)
    plain = {batch.indices[0]: batch for batch in alone}
    shapes = set()
    for batch in bucketed:
        shapes.add(batch.images.shape[2:])
        assert batch.targets.boxes.shape == (ROWS, 4) and batch.targets.labels.shape == (ROWS,)
        for i, index in enumerate(batch.indices):
            height, width = (int(side) for side in batch.targets.image_sizes[i])
            one = plain[index]
            assert one.targets.image_sizes[0].tolist() == [height, width]
            assert torch.equal(batch.images[i, :, :height, :width], one.images[0, :, :height, :width])
            rows = slice(*batch.targets.offsets[i : i + 2].tolist())
            assert torch.equal(batch.targets.boxes[rows], one.targets.boxes)
            assert torch.equal(batch.targets.labels[rows], one.targets.labels)
    short, longs = 64, (64, 96)
    assert shapes <= {(short, long) for long in longs} | {(long, short) for long in longs} | {(96, 96)}


def test_buckets_put_like_shapes_together(tmp_path):
    data = dataset(tmp_path, [(48, 48), (48, 96), (48, 64)] * 4)
    config = LoaderConfig(batch_size=4, workers=0, color=0.0, scale=(1.0, 1.0), buckets=True)
    batches = list(make_loader(data, config, min_size=48, max_size=96, train=False))
    assert [batch.indices for batch in batches] == [[0, 2, 3, 5], [6, 8, 9, 11], [1, 4, 7, 10]]  # 64, 64, 96


@pytest.mark.parametrize(("rows", "capacity"), [(0, 64), (1, 64), (64, 64), (65, 128), (129, 256)])
def test_ground_truth_has_few_capacities(rows, capacity):
    given = targets(rows)
    padded = pad_targets(given)
    assert padded.boxes.shape == (capacity, 4) and padded.labels.shape == (capacity,)
    assert torch.equal(padded.boxes[:rows], given.boxes) and torch.equal(padded.offsets, given.offsets)


@pytest.mark.emulated
def test_the_kernels_losses_do_not_depend_on_the_capacity(emulator):
    model = small("tiny").eval()  # evaluation: batch statistics stay as they are
    images, _, _, truth = scene()
    with torch.no_grad():
        plain, padded = model(images, truth), model(images, pad_targets(truth))
    for name, loss in plain.items():
        assert padded[name].item() == pytest.approx(loss.item(), rel=1e-6)


def jpeg(path, height, width, **settings):
    """A smooth picture, which every decoder and filter renders nearly alike."""
    y, x = np.mgrid[:height, :width]
    array = np.stack((255 * x / width, 255 * y / height, 128 + 100 * np.sin(x / width * 6)), 2).astype(np.uint8)
    Image.fromarray(array).save(path, quality=95, **settings)
    return array


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size(tmp_path):
    array = jpeg(tmp_path / "a.jpg", 401, 600)
    assert read_image(tmp_path / "a.jpg").shape == (401, 600, 3)
    for enough, shape in (
        ((401, 600), (401, 600)),
        ((200, 300), (201, 300)),
        ((201, 300), (401, 600)),  # 401 // 201 = 1
        ((100, 150), (101, 150)),
        ((50, 75), (51, 75)),
        ((1, 1), (51, 75)),
        ((900, 1200), (401, 600)),
    ):
        assert read_image(tmp_path / "a.jpg", enough).shape[:2] == shape
    small = read_image(tmp_path / "a.jpg", (100, 150)).astype(int)
    middle = array[2::4, 2::4][:100].astype(int)
    assert abs(small[:100] - middle).max() < 8  # a cell averages 4 pixels, over which the picture rises by less


def test_a_turned_jpeg_and_other_formats(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    jpeg(tmp_path / "turned.jpg", 400, 600, exif=exif)
    assert read_image(tmp_path / "turned.jpg", (300, 200)).shape == (300, 200, 3)
    Image.new("RGB", (600, 400)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", (100, 100)).shape == (400, 600, 3)
    Image.new("L", (600, 400)).save(tmp_path / "grey.jpg")
    assert read_image(tmp_path / "grey.jpg", (100, 100)).shape == (100, 150, 3)


def test_training_decodes_what_it_needs_and_evaluation_everything(tmp_path, monkeypatch):
    data = dataset(tmp_path, [(48, 64)])
    path = tmp_path / "large.jpg"
    jpeg(path, 384, 512)
    boxes = np.array([[64, 128, 256, 320]], np.float32)
    data.records[0] = Record(path, "0", 512, 384, boxes, np.ones(1, np.int64), np.zeros(1, bool), np.ones(1))
    read, seen = type(data).read, []

    def told(self, index, at_least=None):
        array = read(self, index, at_least)
        seen.append(array.shape[:2])
        return array

    monkeypatch.setattr(type(data), "read", told)
    (train,), (whole,) = loader(data, augmented=False), loader(data, train=False)
    assert seen == [(48, 64), (384, 512)]
    assert train.targets.boxes.tolist() == whole.targets.boxes.tolist() == [[8, 16, 32, 40]]
    assert train.scales.tolist() == [[8, 8]]
    difference = (train.images.int() - whole.images.int()).abs()
    assert difference.float().mean() < 2


def test_a_jpeg_that_changed_is_noticed_in_training(tmp_path):
    data = dataset(tmp_path, [(48, 64)] * 2)
    jpeg(data.records[0].path, 96, 132)
    with pytest.raises(ImageError, match="expected 64 x 48 pixels as when the data set was opened"):
        data.read(0, (48, 64))
