"""Batches: which images go together, and a torch ``DataLoader`` that reads them.

Images of like shape share a batch (landscape or square ones, and portrait ones; with buckets those of one bucket), so
that little padding is computed.
"""

import atexit
import os
import re
import signal
from collections.abc import Iterator
from multiprocessing import connection
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from rcnn.config import LoaderConfig, images_per_batch
from rcnn.data.batch import Batch, Packed, uploaded
from rcnn.data.buckets import Buckets, pad_targets
from rcnn.data.dataset import DetectionDataset
from rcnn.data.transforms import MIN_SIDE, Augment, generator
from rcnn.images import PADDING, ImageError, target_size
from rcnn.structures import Targets

#: Height and width of a batch are multiples of this: the coarsest stride of the models.
DIVISOR = 32
#: Seconds that a worker which broke off an answer has to end, before the error is taken for another.
DYING = 5.0


class WorkerError(ValueError):
    """A loading process died; the message names the file that it was at."""


class BatchPlan(Sampler[list[tuple[int, int]]]):
    """Which images form which batch, for one of ``world_size`` processes.

    Training: images are shuffled by (seed, epoch), batches of one kind are cut and shuffled; what is left over of all
    kinds, neighbours together, forms the last ones. Every image occurs, and every process gets the same number of
    batches of the same size; the gap that remains is filled with further images, none twice in a batch as far as the
    data set goes. Batches are no larger than the data set's share. Processes share out the batch that one process with
    ``world_size * batch_size`` would see.

    Evaluation: data-set order within each kind, every image exactly once over all processes, whose numbers of batches
    may differ by one.

    Args:
        kinds: ``(n,)`` int, what each image is; batches are of one kind as far as they can be.
        batch_size: images per batch and process.
        train: shuffle and fill up.
        seed: of the order.
        rank: number of this process, from 0.
        world_size: number of processes.

    Yields:
        One list of (epoch, image index) per batch.
    """

    def __init__(
        self, kinds: np.ndarray, batch_size: int, *, train: bool, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        if not len(kinds):
            raise ValueError("a data set must have at least one image to form batches, got none")
        self._kinds = kinds
        self._batch_size = min(batch_size, -(-len(kinds) // world_size)) if train else batch_size
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
            return -(-len(self._kinds) // (self._batch_size * self._world_size))
        total = sum(-(-int(n) // self._batch_size) for n in np.unique(self._kinds, return_counts=True)[1])
        return len(range(self._rank, total, self._world_size))

    def _train_batches(self) -> list[np.ndarray]:
        rng = np.random.default_rng((self._seed % 2**64, self._epoch))
        order = rng.permutation(len(self._kinds))
        size = self._batch_size * self._world_size
        whole, rest = [], []
        for kind in np.unique(self._kinds):
            members = order[self._kinds[order] == kind]
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
        for kind in np.unique(self._kinds):
            members = np.flatnonzero(self._kinds == kind)
            batches += [members[i : i + self._batch_size] for i in range(0, len(members), self._batch_size)]
        return batches[self._rank :: self._world_size]


class Loader(DataLoader[Batch]):
    """A torch ``DataLoader`` of :class:`Batch` with :meth:`set_epoch`; made by :func:`make_loader`."""

    plan: BatchPlan
    device: torch.device

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose order and augmentation of the next iteration; see :meth:`BatchPlan.set_epoch`."""
        self.plan.set_epoch(epoch, first_batch)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        try:
            yield from self._batches()
        except RuntimeError as error:
            raise self.explained(error) from None

    def _batches(self) -> Iterator[Batch]:
        items: Any = super().__iter__()
        if self.num_workers:
            _running.add(items)
        try:
            for item in uploaded(items, self.device) if self.device.type == "cuda" else items:
                # An error comes as a value: torch would bury its sentence in the worker's traceback.
                if isinstance(item, ImageError):
                    try:
                        raise item
                    finally:
                        del item  # a cycle of error, traceback and this frame would keep the workers waiting for 5 s
                yield item
        except (EOFError, OSError):
            if self.num_workers:
                self._await_death(items._workers)
            raise
        except RuntimeError as error:
            # On a GPU it is torch's thread for page-locked memory that finds a dying worker's batch gone, and ends.
            if "Pin memory thread exited" in str(error):
                self._await_death(items._workers)
            raise

    def _await_death(self, workers: list[Any]) -> None:
        """Raise torch's error of a dead worker, if one ends soon: a dying one does not hand over what it announced."""
        ended = connection.wait([worker.sentinel for worker in workers], DYING)
        for worker in workers:
            if worker.sentinel in ended:
                worker.join()  # in the main thread torch's handler of its last signal raises here, and not later
                raise RuntimeError(f"DataLoader worker (pid {worker.pid}) exited unexpectedly") from None

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


#: torch's iterators that have workers, for as long as anything holds them: the traceback of an error, for one.
_running: WeakSet[Any] = WeakSet()


@atexit.register  # after multiprocessing's own, and so called before it
def _end_workers() -> None:
    """At the end of the process: multiprocessing would send SIGTERM, which workers leave to it, and wait for ever."""
    for items in list(_running):
        items._shutdown_workers()
        for worker in items._workers:
            worker.kill()


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
    device: torch.device | str = "cpu",
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
        device: where the batches are. A GPU gets them through page-locked memory on a stream of its own, and flips and
            pads them; see :mod:`rcnn.data.batch`.

    Returns:
        An iterable of :class:`Batch`; iterating raises :class:`rcnn.images.ImageError` for an unreadable image if
        ``dataset.strict``, and if no image at all can be read, and :class:`WorkerError` if a loading process dies.

    Raises:
        ValueError: the data set is empty, or ``config`` is not filled in.
    """
    if config.batch_size is None or config.color is None or config.scale is None:
        raise ValueError("loader.batch_size, loader.color and loader.scale must be set; config.resolve fills them in")
    batch_size = images_per_batch(config)
    device = torch.device(device)
    sizes = np.array([(r.height, r.width) for r in dataset.records]).reshape(-1, 2)
    low, high = config.scale
    augment = Augment(config.flip, config.vertical_flip, config.color, (low, high)) if train else Augment()
    buckets = None
    if device.type == "cuda" if config.buckets is None else config.buckets:
        buckets = Buckets(*augment.sides(min_size, max_size), DIVISOR)
    kinds = sizes[:, 0] > sizes[:, 1] if buckets is None else buckets.kinds(sizes)
    plan = BatchPlan(kinds, batch_size, train=train, seed=seed, rank=rank, world_size=world_size)
    workers = min(_workers(config.workers), len(plan))
    loader = Loader(
        _Batches(dataset, augment, min_size, max_size, train, seed, workers, buckets, pack=device.type == "cuda"),
        batch_size=None,
        sampler=plan,
        num_workers=workers,
        worker_init_fn=_start_worker,
        persistent_workers=train and workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # torch draws a number per epoch; keep the global stream untouched
    )
    loader.plan, loader.device = plan, device
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
        buckets: Buckets | None,
        pack: bool,
    ) -> None:
        self.dataset = dataset
        self.augment = augment
        self.min_size = min_size
        self.max_size = max_size
        self.train = train
        self.seed = seed
        self.buckets = buckets
        self.pack = pack
        # Process and image that each worker is at, for whoever must say what killed it.
        self.reading = torch.full((workers, 2), -1, dtype=torch.int64).share_memory_()

    def __getitem__(self, keys: list[tuple[int, int]]) -> "Batch | Packed | ImageError":
        arrays, flips, boxes, labels, indices, scales = [], [], [], [], [], []
        skipped: list[str] = []
        for epoch, wanted in keys:
            try:
                index, pixels = self._read(wanted, skipped)
            except ImageError as error:
                return error
            record = self.dataset.records[index]
            array, box, flip = self.augment.unflipped(
                pixels,
                record.boxes,
                size=(record.height, record.width),
                min_size=self.min_size,
                max_size=self.max_size,
                rng=generator(self.seed, epoch, index),
            )
            keep = np.minimum(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]) >= MIN_SIDE
            arrays.append(array)
            flips.append(flip)
            boxes.append(box[keep])
            labels.append(np.where(record.ignore, -1, record.labels)[keep])
            indices.append(index)
            scales.append((record.height / array.shape[0], record.width / array.shape[1]))
        targets = Targets(
            boxes=torch.from_numpy(np.concatenate(boxes)),
            labels=torch.from_numpy(np.concatenate(labels)),
            offsets=torch.from_numpy(np.cumsum([0] + [len(b) for b in boxes])),
            image_sizes=torch.tensor([a.shape[:2] for a in arrays], dtype=torch.float32),
            image_ids=torch.tensor(indices),
        )
        height, width = max(a.shape[0] for a in arrays), max(a.shape[1] for a in arrays)
        if self.buckets is None:
            shape = -(-height // DIVISOR) * DIVISOR, -(-width // DIVISOR) * DIVISOR
        else:
            shape, targets = self.buckets.shape(height, width), pad_targets(targets)
        nothing = torch.empty(0, dtype=torch.uint8)
        rest = Batch(nothing, targets, indices, torch.tensor(scales, dtype=torch.float32), skipped)
        packed = Packed.of(arrays, flips, shape, rest)
        return packed if self.pack else packed.unpack()

    def _read(self, wanted: int, skipped: list[str]) -> tuple[int, np.ndarray]:
        """Index and pixels of image ``wanted``, or of what stands in for it if it cannot be read."""
        records = self.dataset.records
        for step in range(len(records)):
            index = (wanted + step) % len(records)
            if (worker := get_worker_info()) is not None:
                self.reading[worker.id] = torch.tensor((os.getpid(), index))
            try:
                return index, self.dataset.read(index, self._enough(index))
            except ImageError as error:
                if self.dataset.strict:
                    raise
                skipped.append(str(error))
                if not self.train:
                    return index, np.full((records[index].height, records[index].width, 3), PADDING, np.uint8)
        raise ImageError(f"{self.dataset.name}: expected at least one readable image, the first one: {skipped[0]}")

    def _enough(self, index: int) -> tuple[int, int] | None:
        """Size that is enough of an image in training. Evaluation decodes all pixels, as ``predict`` does."""
        record = self.dataset.records[index]
        sides = self.augment.sides(self.min_size, self.max_size)
        return target_size(record.height, record.width, *sides) if self.train else None


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
