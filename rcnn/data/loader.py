"""Batches: which images go together, and a torch ``DataLoader`` that reads them.

Images of like shape share a batch (landscape or square ones, and portrait ones), so that little padding is computed.
"""

import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from rcnn.config import LoaderConfig, images_per_batch
from rcnn.data.dataset import DetectionDataset
from rcnn.data.transforms import MIN_SIDE, Augment, generator
from rcnn.images import PADDING, ImageError, stack
from rcnn.structures import Targets

#: Height and width of a batch are multiples of this: the coarsest stride of the models.
DIVISOR = 32


class WorkerError(ValueError):
    """A loading process died; the message names the file that it was at."""


@dataclass(frozen=True)
class Batch:
    """What the network gets in one step.

    Attributes:
        images: ``(B, 3, H, W)`` uint8 RGB, padded at the right and bottom.
        targets: ground truth in pixels of ``images``; label -1 where the record says ignore.
        indices: B rows of ``dataset.records``.
        scales: ``(B, 2)`` float32, original height / resized height and the same of the widths: y and x times these
            are pixels of the original image (if nothing was flipped).
        skipped: one sentence for each image of the batch that could not be read, with its path. In training the next
            readable record takes its place; in evaluation a blank image of its size does, so that each record is
            still there exactly once.
    """

    images: Tensor
    targets: Targets
    indices: list[int]
    scales: Tensor
    skipped: list[str]

    def to(self, device: "torch.device | str", non_blocking: bool = False) -> "Batch":
        """The same batch with images, targets and scales on ``device``."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
            scales=self.scales.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to a GPU overlap with its work."""
        pinned: dict[str, Any] = {f.name: getattr(self.targets, f.name).pin_memory() for f in fields(self.targets)}
        return replace(
            self,
            images=self.images.pin_memory(),
            targets=Targets(**pinned),
            scales=self.scales.pin_memory(),
        )


class BatchPlan(Sampler[list[tuple[int, int]]]):
    """Which images form which batch, for one of ``world_size`` processes.

    Training: images are shuffled by (seed, epoch), batches of like shapes are cut and shuffled; what is left over of
    both shapes forms the last ones. Every image occurs, and every process gets the same number of batches of the same
    size; the gap that remains is filled with further images, none twice in a batch as far as the data set goes. Batches
    are no larger than the data set's share. Processes share out the batch that one process with
    ``world_size * batch_size`` would see.

    Evaluation: data-set order within each shape, every image exactly once over all processes, whose numbers of batches
    may differ by one.

    Args:
        sizes: ``(n, 2)`` int, height and width of each image, pixels.
        batch_size: images per batch and process.
        train: shuffle and fill up.
        seed: of the order.
        rank: number of this process, from 0.
        world_size: number of processes.

    Yields:
        One list of (epoch, image index) per batch.
    """

    def __init__(
        self, sizes: np.ndarray, batch_size: int, *, train: bool, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        if not len(sizes):
            raise ValueError("a data set must have at least one image to form batches, got none")
        self._tall = sizes[:, 0] > sizes[:, 1]
        self._batch_size = min(batch_size, -(-len(sizes) // world_size)) if train else batch_size
        self._train = train
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._epoch = 0
        self._first = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch that the next iteration goes through, from batch ``first_batch`` on."""
        self._epoch, self._first = epoch, first_batch

    def __len__(self) -> int:
        return max(0, self._batches() - self._first)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = self._train_batches() if self._train else self._eval_batches()
        for batch in batches[self._first :]:
            yield [(self._epoch, int(i)) for i in batch]

    def _batches(self) -> int:
        if self._train:
            return -(-len(self._tall) // (self._batch_size * self._world_size))
        total = sum(-(-int(n) // self._batch_size) for n in (self._tall.sum(), (~self._tall).sum()))
        return len(range(self._rank, total, self._world_size))

    def _train_batches(self) -> list[np.ndarray]:
        rng = np.random.default_rng((self._seed % 2**64, self._epoch))
        order = rng.permutation(len(self._tall))
        size = self._batch_size * self._world_size
        whole, rest = [], []
        for members in (order[~self._tall[order]], order[self._tall[order]]):
            cut = len(members) // size * size
            whole.append(members[:cut])
            rest.append(members[cut:])
        left = np.concatenate(rest)
        last = left[len(left) // size * size :]
        if len(last):
            others = order[~np.isin(order, last)]
            filling = np.resize(np.concatenate((others, last)), size - len(last))
            left = np.concatenate((left, filling))
        batches = np.concatenate((*whole, left)).reshape(-1, size)
        batches = batches[rng.permutation(len(batches))]
        return list(batches[:, self._rank * self._batch_size : (self._rank + 1) * self._batch_size])

    def _eval_batches(self) -> list[np.ndarray]:
        batches = []
        for members in (np.flatnonzero(~self._tall), np.flatnonzero(self._tall)):
            batches += [members[i : i + self._batch_size] for i in range(0, len(members), self._batch_size)]
        return batches[self._rank :: self._world_size]


class Loader(DataLoader[Batch]):
    """A torch ``DataLoader`` of :class:`Batch` with :meth:`set_epoch`; made by :func:`make_loader`."""

    plan: BatchPlan

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose order and augmentation of the next iteration; see :meth:`BatchPlan.set_epoch`."""
        self.plan.set_epoch(epoch, first_batch)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        try:
            # An error comes as a value: torch would bury its sentence in the worker's traceback.
            for item in super().__iter__():
                if isinstance(item, ImageError):
                    try:
                        raise item
                    finally:
                        del item  # a cycle of error, traceback and this frame would keep the workers waiting for 5 s
                yield item
        except RuntimeError as error:
            raise self.explained(error) from None

    def explained(self, error: RuntimeError) -> RuntimeError | WorkerError:
        """A worker's death as a sentence that names the file it was at; any other error as it is.

        torch reports a death by a signal handler, so that the error comes up wherever the main process happens to be.
        """
        how = re.search(r"DataLoader worker.*?(killed by signal: [\w ]+|exited unexpectedly)", str(error))
        if how is None:
            return error
        content: _Batches = self.dataset  # type: ignore[assignment]
        numbers = {int(number) for number in re.findall(r"\d+", how[0])}
        at = [index for process, index in content.reading.tolist() if process in numbers]
        files = ", ".join(str(content.dataset.records[index].path) for index in at) or "no file yet"
        return WorkerError(
            f"a loading process died ({how[1].strip()}) at {files}; if memory ran out, lower loader.workers or "
            f"loader.batch_size"
        )


def make_loader(
    dataset: DetectionDataset,
    config: LoaderConfig,
    *,
    min_size: int,
    max_size: int,
    train: bool,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Loader:
    """Batches of a data set.

    The content of each batch is fixed by (seed, epoch, its place), whatever the number of workers. Workers are started
    without touching CUDA, use one thread each, and leave Ctrl-C and the signals of pre-emption to the main process.

    Args:
        dataset: images and boxes; its ``strict`` decides whether an unreadable image raises or is replaced.
        config: batch size, workers and augmentation, filled in by :func:`rcnn.config.resolve`.
        min_size: shorter side of the images as the network sees them, pixels.
        max_size: longer side of them at most, pixels.
        train: shuffle and augment; otherwise every image once, only resized.
        seed: of order and augmentation.
        rank: number of this process, from 0.
        world_size: number of processes that share the data set.
        pin_memory: put batches into page-locked memory, for a GPU.

    Returns:
        An iterable of :class:`Batch`; iterating raises :class:`rcnn.images.ImageError` for an unreadable image if
        ``dataset.strict``, and if no image at all can be read, and :class:`WorkerError` if a loading process dies.

    Raises:
        ValueError: the data set is empty, or ``config`` is not filled in.
    """
    if config.batch_size is None or config.color is None or config.scale is None:
        raise ValueError("loader.batch_size, loader.color and loader.scale must be set; config.resolve fills them in")
    batch_size = images_per_batch(config)
    sizes = np.array([(r.height, r.width) for r in dataset.records]).reshape(-1, 2)
    plan = BatchPlan(sizes, batch_size, train=train, seed=seed, rank=rank, world_size=world_size)
    low, high = config.scale
    augment = Augment(config.flip, config.vertical_flip, config.color, (low, high)) if train else Augment()
    workers = min(_workers(config.workers), len(plan))
    loader = Loader(
        _Batches(dataset, augment, min_size, max_size, train, seed, workers),
        batch_size=None,
        sampler=plan,
        num_workers=workers,
        worker_init_fn=_start_worker,
        persistent_workers=train and workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),  # torch draws a number per epoch; keep the global stream untouched
    )
    loader.plan = plan
    return loader


class _Batches(Dataset[Any]):
    """Reads whole batches: the key is a list of (epoch, image index)."""

    def __init__(
        self,
        dataset: DetectionDataset,
        augment: Augment,
        min_size: int,
        max_size: int,
        train: bool,
        seed: int,
        workers: int,
    ) -> None:
        self.dataset = dataset
        self.augment = augment
        self.min_size = min_size
        self.max_size = max_size
        self.train = train
        self.seed = seed
        # Process and image that each worker is at, for whoever must say what killed it.
        self.reading = torch.full((workers, 2), -1, dtype=torch.int64).share_memory_()

    def __getitem__(self, keys: list[tuple[int, int]]) -> "Batch | ImageError":
        arrays, boxes, labels, indices, scales = [], [], [], [], []
        skipped: list[str] = []
        for epoch, wanted in keys:
            try:
                index, pixels = self._read(wanted, skipped)
            except ImageError as error:
                return error
            record = self.dataset.records[index]
            array, box = self.augment(
                pixels,
                record.boxes,
                min_size=self.min_size,
                max_size=self.max_size,
                rng=generator(self.seed, epoch, index),
            )
            keep = np.minimum(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]) >= MIN_SIDE
            arrays.append(array)
            boxes.append(box[keep])
            labels.append(np.where(record.ignore, -1, record.labels)[keep])
            indices.append(index)
            scales.append((record.height / array.shape[0], record.width / array.shape[1]))
        images, image_sizes = stack(arrays, DIVISOR)
        targets = Targets(
            boxes=torch.from_numpy(np.concatenate(boxes)),
            labels=torch.from_numpy(np.concatenate(labels)),
            offsets=torch.from_numpy(np.cumsum([0] + [len(b) for b in boxes])),
            image_sizes=image_sizes,
            image_ids=torch.tensor(indices),
        )
        return Batch(images, targets, indices, torch.tensor(scales, dtype=torch.float32), skipped)

    def _read(self, wanted: int, skipped: list[str]) -> tuple[int, np.ndarray]:
        """Index and pixels of image ``wanted``, or of what stands in for it if it cannot be read."""
        records = self.dataset.records
        for step in range(len(records)):
            index = (wanted + step) % len(records)
            if (worker := get_worker_info()) is not None:
                self.reading[worker.id] = torch.tensor((os.getpid(), index))
            try:
                return index, self.dataset.read(index)
            except ImageError as error:
                if self.dataset.strict:
                    raise
                skipped.append(str(error))
                if not self.train:
                    return index, np.full((records[index].height, records[index].width, 3), PADDING, np.uint8)
        raise ImageError(f"{self.dataset.name}: expected at least one readable image, the first one: {skipped[0]}")


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # A terminal or a scheduler signals every process of the job, and the main one decides; workers end when it does.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _workers(number: int) -> int:
    """Loading processes; -1: one for every two cores that this process may use, at most 8, shared among ranks."""
    if number >= 0:
        return number
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
