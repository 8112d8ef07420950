"""Detections of pictures: the next batch is read while the network is busy with this one."""

import os
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rcnn import images as pictures
from rcnn.config import given
from rcnn.images import ImageError
from rcnn.precision import computing
from rcnn.structures import Detections

if TYPE_CHECKING:
    from rcnn.models.faster_rcnn import FasterRCNN

#: Threads that decode and resize, at most; both leave Python free meanwhile.
READERS = 8
#: What layers compute in with ``half``: the 16 bits that a GPU of any age is quick in, and the ones that CPUs know.
HALF = {"cuda": torch.float16, "cpu": torch.bfloat16}


@dataclass(frozen=True)
class _Read:
    """A batch of pictures as read.

    Attributes:
        arrays: of each picture its pixels, or why there are none.
        images: ``(n, 3, H, W)`` uint8 of those that could be read, n of them; page-locked for a GPU.
        image_sizes: ``(n, 2)`` float32, height and width of each inside the padded batch, pixels.
    """

    arrays: list[np.ndarray | ImageError]
    images: Tensor
    image_sizes: Tensor


@dataclass(frozen=True)
class _Queued:
    """A batch whose detections may still be on their way to the host."""

    read: _Read
    found: Detections | None
    arrived: torch.cuda.Event | None


def predictions(
    model: "FasterRCNN", inputs: Iterable[Any], score_threshold: float, batch_size: int, half: bool
) -> Generator[tuple[np.ndarray, dict[str, Any]] | ImageError, None, None]:
    """Of each picture its pixels and what :meth:`rcnn.FasterRCNN.predict` gives, or why it cannot be read; in order.

    On a GPU the host queues a batch before it asks for the detections of the one before, and waits for each batch once.

    Args:
        model: on its device.
        inputs: pictures; they are taken up to two batches ahead.
        score_threshold: detections with a lower score are left out.
        batch_size: pictures per pass through the network.
        half: compute in 16 bits.
    """
    before: _Queued | None = None
    for read in _read_ahead(model, iter(inputs), batch_size):
        queued = _queue(model, read, half)
        if before is not None:
            yield from _results(model, before, score_threshold)
        before = queued
    if before is not None:
        yield from _results(model, before, score_threshold)


def _read_ahead(model: "FasterRCNN", inputs: Iterator[Any], batch_size: int) -> Iterator[_Read]:
    """Batches, of which the next is being read whenever one is given."""
    short, long = given(model.config.min_size), given(model.config.max_size)
    pin = model.mean.is_cuda
    # One thread of torch's in each: teams of their own would fight with the network's for a CPU's cores.
    readers = ThreadPoolExecutor(min(READERS, os.cpu_count() or 1), initializer=torch.set_num_threads, initargs=(1,))
    batcher = ThreadPoolExecutor(1)  # of its own: it waits for the readers

    def read(picture: Any) -> tuple[np.ndarray, np.ndarray] | ImageError:
        try:
            array = pictures.to_array(picture)
            return array, pictures.resize(array, *pictures.target_size(array.shape[0], array.shape[1], short, long))
        except ImageError as error:
            return error

    def batch(some: list[Any]) -> _Read:
        pairs = list(readers.map(read, some))
        resized = [pair[1] for pair in pairs if not isinstance(pair, ImageError)]
        images, sizes = pictures.stack(resized) if resized else (torch.empty(0), torch.empty(0))
        arrays = [pair if isinstance(pair, ImageError) else pair[0] for pair in pairs]
        return _Read(arrays, *((images.pin_memory(), sizes.pin_memory()) if pin else (images, sizes)))

    try:
        ahead: Future[_Read] | None = None
        while some := list(islice(inputs, batch_size)):
            following = batcher.submit(batch, some)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()
    finally:
        batcher.shutdown(cancel_futures=True)
        readers.shutdown()
        torch.set_num_threads(torch.get_num_threads())  # threads that start later take the number that was set last


def _queue(model: "FasterRCNN", read: _Read, half: bool) -> _Queued:
    """Detect, and send what is found on its way."""
    if not len(read.images):
        return _Queued(read, None, None)
    training, device = model.training, model.mean.device
    model.eval()
    try:
        with computing("tf32", device), torch.autocast(device.type, HALF[device.type], enabled=half):
            found = model.detect(
                read.images.to(device, non_blocking=True), read.image_sizes.to(device, non_blocking=True)
            )
    finally:
        model.train(training)
    if device.type != "cuda":
        return _Queued(read, found, None)
    moved: dict[str, Tensor] = {}
    for field in fields(found):
        tensor: Tensor = getattr(found, field.name)
        moved[field.name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        moved[field.name].copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return _Queued(read, Detections(**moved), arrived)


def _results(
    model: "FasterRCNN", queued: _Queued, score_threshold: float
) -> Iterator[tuple[np.ndarray, dict[str, Any]] | ImageError]:
    if queued.arrived is not None:
        queued.arrived.synchronize()
    found = iter([] if queued.found is None else queued.found.unpad())
    sizes = iter(queued.read.image_sizes)
    for array in queued.read.arrays:
        if isinstance(array, ImageError):
            yield array
            continue
        one, (height, width) = next(found), next(sizes).tolist()
        keep = one["scores"] >= score_threshold
        labels = one["labels"][keep]
        scale = torch.tensor([array.shape[1] / width, array.shape[0] / height]).repeat(2)
        yield (
            array,
            {
                "boxes": one["boxes"][keep] * scale,
                "labels": labels,
                "scores": one["scores"][keep],
                "names": [model.classes[k - 1] for k in labels.tolist()],
            },
        )
