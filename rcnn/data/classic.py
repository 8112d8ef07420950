"""The data half of the classic API (:mod:`rcnn.classic`): data sets that give blobs, endless batches, read ahead."""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rcnn import images
from rcnn.data.coco import COCODataset
from rcnn.data.dataset import DataError, DetectionDataset
from rcnn.data.transforms import scale_boxes
from rcnn.data.voc import VOCDataset

BACKGROUND = "__background__"

#: ImageNet's mean and deviation of red, green and blue in 0..1.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

#: A picture for the network: ``tensor``, ``im_info``, ``im_name``, and from a data set ``boxes`` and ``gt_classes``.
Blob = dict[str, Any]


def make_blob(pixels: np.ndarray, name: str, min_size: int, max_size: int) -> Blob:
    """A picture resized and normalised.

    Args:
        pixels: ``(H, W, 3)`` uint8 RGB.
        name: of the file.
        min_size: what its shorter side becomes, pixels, unless the longer one would exceed ``max_size``.
        max_size: what its longer side may become at most, pixels.

    Returns:
        ``tensor`` ``(1, 3, H', W')`` float32, ``im_info`` ``(1, 3)`` float32 (height, width, scale) and ``im_name``.
    """
    height, width = images.target_size(pixels.shape[0], pixels.shape[1], min_size, max_size)
    resized = torch.from_numpy(images.resize(pixels, height, width)).permute(2, 0, 1)
    info = np.array([[height, width, height / pixels.shape[0]]], np.float32)
    return {"tensor": ((resized / 255 - MEAN) / STD)[None], "im_info": info, "im_name": name}


class _Pictures(Dataset[Blob]):
    """A data set of this package that gives blobs.

    Attributes:
        classes: names, the background first.
        dataset: the data set underneath; its ``problems`` name all that was skipped.
        SCALES: what the shorter side of a picture becomes, pixels, unless the longer one would exceed ``MAX_SIZE``.
        MAX_SIZE: what the longer side of a picture may become at most, pixels.
    """

    SCALES = (600,)
    MAX_SIZE = 1000

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset, self.classes = dataset, [BACKGROUND, *dataset.classes]
        if dataset.problems:
            warnings.warn(f"{len(dataset.problems)} problem(s) in {dataset.name}: {dataset.problems[0]}", stacklevel=3)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Blob:
        """A blob; ``boxes`` ``(n, 4)`` in pixels of the tensor, ``gt_classes`` ``(n,)``, -1 for what is ignored."""
        record = self.dataset.records[index]
        blob = make_blob(self.dataset.read(index), record.path.name, self.SCALES[0], self.MAX_SIZE)
        height, width = blob["tensor"].shape[2:]
        scaled = scale_boxes(record.boxes, height / record.height, width / record.width)
        return {**blob, "boxes": scaled, "gt_classes": np.where(record.ignore, -1, record.labels)}


class VOCDetection(_Pictures):
    """A folder in VOC layout; the classes are those of its ``pascal_label_map.pbtxt``, the background before them.

    Args:
        root: the folder that holds ``VOC2007``, or ``Annotations``, ``ImageSets`` and ``JPEGImages`` themselves.
        image_set: ``train``, ``val`` or another file of ``ImageSets/Main``.

    Raises:
        DataError: as :class:`rcnn.data.voc.VOCDataset`.
    """

    def __init__(self, root: str | PathLike[str], image_set: str) -> None:
        super().__init__(VOCDataset(Path(root), image_set))


class CocoData(_Pictures):
    """A data set in COCO layout.

    Args:
        root: folder of the pictures, ``DATA/images/train2014``.
        annFile: ``DATA/annotations/instances_train2014.json``.

    Raises:
        DataError: as :class:`rcnn.data.coco.COCODataset`, or the pictures that it finds are not those in ``root``.
    """

    def __init__(self, root: str | PathLike[str], annFile: str | PathLike[str]) -> None:  # noqa: N803
        file = Path(annFile)
        super().__init__(COCODataset(file.parent.parent, file.stem.removeprefix("instances_")))
        first = self.dataset.records[0].path
        if Path(root).resolve() not in first.resolve().parents:
            raise DataError(f"root must be the folder of the pictures, {first.parent}, got {root}")


class _Stream:
    """Batches, lists of blobs, by ``next(stream)`` or, as in Python 2, by ``stream.next()``."""

    def __init__(self, source: Iterator[list[Blob]]) -> None:
        self._source = source

    def __iter__(self) -> "_Stream":
        return self

    def __next__(self) -> list[Blob]:
        return next(self._source)

    next = __next__


class CocoGenerator(_Stream):
    """Batches of a data set without end, epoch after epoch; the last of an epoch may be smaller.

    Args:
        data: a :class:`VOCDetection` or :class:`CocoData`.
        batch_size: pictures in a batch.
        shuffle: a new order in each epoch.
        seed: of the order; None draws one from torch's generator.
    """

    def __init__(self, data: _Pictures, batch_size: int = 1, shuffle: bool = False, seed: int | None = None) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.data, self.batch_size, self.shuffle = data, batch_size, shuffle
        self.seed = int(torch.randint(2**31, ())) if seed is None else seed
        self.batches = _Batches(data)
        super().__init__(map(self.batches.__getitem__, self.order()))

    def order(self) -> Iterator[list[int]]:
        """Rows of the data set for one batch after another, from the first epoch on."""
        epoch, count = 0, len(self.data)
        while True:
            rows = list(range(count))
            if self.shuffle:
                rows = np.random.default_rng((self.seed, epoch)).permutation(count).tolist()
            yield from (rows[i : i + self.batch_size] for i in range(0, count, self.batch_size))
            epoch += 1


class _Batches(Dataset[list[Blob]]):
    """Blobs of a list of rows; a picture that cannot be read is left out, and told."""

    def __init__(self, data: _Pictures) -> None:
        self.data = data

    def __getitem__(self, rows: list[int]) -> list[Blob]:
        blobs = []
        for row in rows:
            try:
                blobs.append(self.data[row])
            except images.ImageError as error:
                warnings.warn(f"{error}; image skipped", stacklevel=2)
        return blobs


class Enqueuer:
    """Reads the batches of a generator ahead of their use, from the generator's first one and in its order.

    Args:
        generator: which batches.
        use_multiprocessing: read in processes (a torch ``DataLoader``) instead of threads.
    """

    def __init__(self, generator: CocoGenerator, use_multiprocessing: bool = False) -> None:
        self._generator, self._use_multiprocessing = generator, use_multiprocessing
        self._pool: ThreadPoolExecutor | None = None
        self._source: Iterator[list[Blob]] | None = None

    def start(self, workers: int = 3, max_queue_size: int = 10) -> None:
        """Begin to read with ``workers`` threads or processes, about ``max_queue_size`` batches ahead."""
        self.stop()
        order, batches = self._generator.order(), self._generator.batches
        if self._use_multiprocessing:
            ahead = max(1, max_queue_size // workers)
            self._source = iter(
                DataLoader(
                    batches,
                    None,
                    sampler=order,
                    num_workers=workers,
                    prefetch_factor=ahead,
                    collate_fn=list,
                )
            )
        else:
            self._pool = ThreadPoolExecutor(workers)
            self._source = _ahead(self._pool, batches.__getitem__, order, max_queue_size)

    def get(self) -> _Stream:
        """The batches, without end.

        Raises:
            ValueError: :meth:`start` was not called.
        """
        if self._source is None:
            raise ValueError("the queue must be started first: call start()")
        return _Stream(self._source)

    def stop(self) -> None:
        """Stop reading and let the workers go."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = self._source = None


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[list[int]], list[Blob]], order: Iterator[list[int]], most: int
) -> Iterator[list[Blob]]:
    waiting = deque(pool.submit(read, next(order)) for _ in range(max(1, most)))
    while True:
        batch = waiting.popleft().result()
        waiting.append(pool.submit(read, next(order)))
        yield batch


def convert_data(blobs: Sequence[Blob]) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """One batch of the blobs of B pictures.

    Returns:
        batch_tensor: ``(B, 3, H, W)`` float32, zeros (the mean colour) to the right and below of smaller pictures.
        im_info: ``(B, 3)`` float32, height, width and scale of each picture.
        batch_boxes: ``(G, 5)`` float32, x1, y1, x2, y2 in pixels of the batch, and the class.
        batch_boxes_index: ``(G,)`` int64, the picture of each box.

    Raises:
        ValueError: there is no blob.
    """
    if not blobs:
        raise ValueError("a batch needs at least one blob, got none")
    height, width = (max(blob["tensor"].shape[side] for blob in blobs) for side in (2, 3))
    batch_tensor = torch.zeros(len(blobs), 3, height, width)
    for one, blob in zip(batch_tensor, blobs, strict=True):
        one[:, : blob["tensor"].shape[2], : blob["tensor"].shape[3]] = blob["tensor"][0]
    gt = [np.column_stack((blob["boxes"], blob["gt_classes"])).astype(np.float32) for blob in blobs]
    index = np.repeat(np.arange(len(blobs)), [len(one) for one in gt])
    return batch_tensor, np.concatenate([blob["im_info"] for blob in blobs]), np.concatenate(gt), index
