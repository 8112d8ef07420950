"""Prediction in batches: what runs while what else does, the order of results, bad files, and 16 bits."""

import threading
from contextlib import closing

import numpy as np
import pytest
import torch
from test_models import small
from test_no_sync import no_waiting

from rcnn import images as pictures
from rcnn.models import predicting
from rcnn.structures import Detections

#: Seconds after which something that should have happened long ago is taken for missing; nothing waits for it else.
LOST = 60.0


class Staged:
    """A model whose pictures are numbers, and which finds their number in them."""

    def __init__(self, monkeypatch, broken=()):
        self.log, self.lock = [], threading.Lock()
        self.begun = {number: threading.Event() for number in range(100)}
        self.model = small("tiny").eval()
        self.batches = 0

        def read(number):
            self.begun[number].set()
            self.note(f"read {number}")
            if number in broken:
                raise pictures.ImageError(f"{number} is torn")
            return np.full((64, 96, 3), number, np.uint8)

        monkeypatch.setattr(pictures, "to_array", read)
        monkeypatch.setattr(self.model, "detect", self.detect)

    def note(self, word):
        with self.lock:
            self.log.append(word)

    def detect(self, images, image_sizes):
        self.batches += 1
        self.note(f"compute {self.batches}")
        numbers = images[:, 0, 0, 0].long()
        count, one = len(images), torch.ones(len(images), 1)
        boxes = (numbers[:, None, None] + torch.tensor([0.0, 0.0, 1.0, 1.0])).clone()
        return Detections(boxes, one, one.long(), torch.ones(count, dtype=torch.int64))

    def numbers(self, count, size):
        found = self.model.predict_each(range(count), batch_size=size)
        return [str(one) if isinstance(one, ValueError) else int(one[1]["boxes"][0, 0]) for one in found]


def test_the_next_batch_is_being_read_while_this_one_is_computed(monkeypatch):
    staged = Staged(monkeypatch)
    waited = []

    def detect(images, image_sizes):
        following = 3 * (staged.batches + 1)
        if following < 9:
            waited.append(staged.begun[following].wait(LOST))  # the computation does not end before that
        return staged.detect(images, image_sizes)

    monkeypatch.setattr(staged.model, "detect", detect)
    assert staged.numbers(9, 3) == list(range(9))
    assert waited == [True, True]


def test_no_more_than_two_batches_are_read_ahead(monkeypatch):
    staged = Staged(monkeypatch)
    taken = []

    def numbers():
        for number in range(12):
            taken.append(number)
            yield number

    with closing(staged.model.predict_each(numbers(), batch_size=2)) as found:
        assert next(found)[0].max() == 0
        assert staged.batches == 2 and len(taken) <= 6
    assert not any(staged.begun[number].is_set() for number in range(6, 12))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_results_and_errors_come_in_the_order_of_the_pictures(monkeypatch, size):
    staged = Staged(monkeypatch, broken=(1, 4, 5))
    expected = [0, "1 is torn", 2, 3, "4 is torn", "5 is torn", 6]
    assert staged.numbers(7, size) == expected


def test_a_bad_picture_ends_predict_with_its_sentence(monkeypatch):
    staged = Staged(monkeypatch, broken=(3,))
    with pytest.raises(pictures.ImageError, match="3 is torn"):
        staged.model.predict(list(range(6)), batch_size=2)


def test_each_batch_is_unpadded_once(monkeypatch):
    staged = Staged(monkeypatch)
    calls = []
    unpad = Detections.unpad
    monkeypatch.setattr(Detections, "unpad", lambda self: calls.append(len(self.count)) or unpad(self))
    assert staged.numbers(7, 3) == list(range(7))
    assert calls == [3, 3, 1]


def test_half_computes_the_layers_in_16_bits(monkeypatch):
    torch.manual_seed(0)
    model = small("tiny")
    seen = []
    pool = model.roi_heads.pool
    monkeypatch.setattr(model.roi_heads, "pool", lambda maps, rois: seen.append(maps[0].dtype) or pool(maps, rois))
    array = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    for half in (False, True):
        found = model.predict(array, score_threshold=0.0, half=half)
        assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert seen == [torch.float32, predicting.HALF["cpu"]] and model.training
    assert torch.is_autocast_enabled("cpu") is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU there is nothing to wait for")
@pytest.mark.parametrize("half", [False, True])
def test_on_a_gpu_a_batch_is_queued_without_waiting(half):
    torch.manual_seed(0)
    model = small("tiny").to("cuda").eval()
    arrays = [np.random.default_rng(i).integers(0, 256, (60, 90 + i, 3), dtype=np.uint8) for i in range(3)]
    (read,) = predicting._read_ahead(model, iter(arrays), 3)
    assert read.images.is_pinned() and read.image_sizes.is_pinned()
    predicting._queue(model, read, half)  # kernels are compiled, anchors are made
    with no_waiting():
        queued = predicting._queue(model, read, half)
    results = list(predicting._results(model, queued, 0.0))
    assert [array.shape for array, _ in results] == [array.shape for array in arrays]
    assert all(found["boxes"].device.type == "cpu" and len(found["boxes"]) for _, found in results)
