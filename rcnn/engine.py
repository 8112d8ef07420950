"""One step of training, and the evaluation of a data set: what lies between the data and the model.

No argument parsing and no printing here.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rcnn import distributed
from rcnn.config import LoaderConfig, OptimConfig, Precision, given
from rcnn.data.batch import Batch
from rcnn.data.dataset import DetectionDataset
from rcnn.data.loader import DIVISOR, Loader, make_loader
from rcnn.metrics.coco import coco_ap
from rcnn.metrics.voc import voc_ap
from rcnn.models import convolution
from rcnn.models.faster_rcnn import FasterRCNN
from rcnn.optim import make_optimizer
from rcnn.precision import LossScaler, computing
from rcnn.structures import Targets

#: Ground-truth boxes per image with which a batch size is tried out, and the share of the GPU's memory it may take.
TRIAL_BOXES, TRIAL_SHARE = 50, 0.9

#: What a target that is not finite is called among the losses of a step. Matching leaves such a box out, so that the
#: losses alone would not tell.
TARGET = "a target box"


@dataclass
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        results: ``{"boxes", "labels", "scores"}`` arrays of each image in the data set's order; boxes in its pixels.
        losses: mean of each loss over the images.
        voc: result of :func:`rcnn.metrics.voc.voc_ap`.
        coco: result of :func:`rcnn.metrics.coco.coco_ap`.
        skipped: one sentence for each image that could not be read.
    """

    results: list[dict[str, np.ndarray]]
    losses: dict[str, float]
    voc: dict[str, Any]
    coco: dict[str, Any]
    skipped: list[str] = field(default_factory=list)


def choose_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means here.

    Raises:
        ValueError: the name is none of these, or CUDA is asked for and this torch has no working one.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch {torch.__version__} finds no GPU that it can use")
    return device


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Within it, with ``on``, torch takes only algorithms that give the same bits each time, or raises."""
    if not on:
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before[2]
        torch.utils.deterministic.fill_uninitialized_memory = before[3]  # type: ignore[attr-defined]


class StepResult:
    """What a step found, on its way to the host; asking for it waits for the step, and for nothing after it.

    Args:
        names: of the N losses; the last one is ``TARGET``, zero or NaN.
        values: ``(2 * N + 1,)`` float; losses of this process, their means over all processes, and the norm of the
            gradient before it was cut, over all parameters.
    """

    def __init__(self, names: Sequence[str], values: Tensor) -> None:
        self.names = list(names)
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values

    def read(self) -> tuple[dict[str, float], dict[str, float], float]:
        """Losses of this process and their means over all of them, by name, and the gradient's norm."""
        if self._event is not None:
            self._event.synchronize()
        *values, norm = self._values.tolist()
        own, means = values[: len(self.names)], values[len(self.names) :]
        return dict(zip(self.names, own, strict=True)), dict(zip(self.names, means, strict=True)), norm


class Step:
    """One step of the optimiser, over the mean gradient of one batch or more.

    If a loss of any process, a target or the gradient is not finite, the weights and the optimiser's state stay as they
    are; that is decided on the device, which nobody waits for.

    Args:
        model: a :class:`~rcnn.models.faster_rcnn.FasterRCNN` in training mode, or one wrapped for data parallelism.
        optimizer: of :func:`rcnn.optim.make_optimizer`.
        clip_norm: the gradient's norm is cut to this; 0 never cuts.
        guarded: buffers that the step changes, and that shall stay as they are as well if it is not finite.
        precision: of the forward pass; the backward pass follows it.
        scaler: of the loss; None leaves it as it is.

    Attributes:
        names: of the losses; known after the first step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip_norm: float = 0.0,
        guarded: Sequence[Tensor] = (),
        precision: Precision = "fp32",
        scaler: LossScaler | None = None,
    ) -> None:
        self.model, self.optimizer, self.clip_norm, self.guarded = model, optimizer, clip_norm, guarded
        self.precision, self.scaler = precision, scaler
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.names: list[str] = []

    def __call__(self, batches: Sequence[Batch]) -> StepResult:
        """Take the step; the batches may be on any device."""
        return StepResult(self.names, self.on_device(batches))

    def on_device(self, batches: Sequence[Batch]) -> Tensor:
        """Take the step; gives the values of a :class:`StepResult`. All of it can be recorded in a CUDA graph."""
        model, device, scaler = self.model, self.parameters[0].device, self.scaler
        before = [buffer.clone() for buffer in self.guarded]
        self.optimizer.zero_grad(set_to_none=True)
        losses: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            last = number + 1 == len(batches)
            together = isinstance(model, DistributedDataParallel)
            with nullcontext() if last or not together else model.no_sync():  # type: ignore[operator]
                batch = batch.to(device, non_blocking=True)
                with computing(self.precision, device):
                    found = {name: loss / len(batches) for name, loss in model(batch.images, batch.targets).items()}
                total = torch.stack(list(found.values())).sum()
                (total if scaler is None else total * scaler.scale).backward()
            found[TARGET] = 0 * batch.targets.boxes.sum()  # zero, or NaN
            losses = {name: losses.get(name, 0) + loss.detach() for name, loss in found.items()}
        self.names[:] = losses
        means = torch.stack(list(distributed.mean(losses).values()))
        if scaler is not None:
            scaler.unscale(p.grad for p in self.parameters if p.grad is not None)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm or math.inf)
        finite = means.isfinite().all() & norm.isfinite()
        # The fused optimisers' own way to skip a step.
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if scaler is not None:
            scaler.update(finite)
        for buffer, value in zip(self.guarded, before, strict=True):
            buffer.copy_(torch.where(finite, buffer, value))
        return torch.cat((torch.stack(list(losses.values())), means, norm[None]))


def largest_batch(fits: Callable[[int], bool], most: int) -> int:
    """The largest number in 1..most that fits, if whatever is smaller than one that fits does, too; 0: none.

    Doubles until one does not fit, then halves the gap.
    """
    good, bad = 0, most + 1
    size = 1
    while bad - good > 1:
        if fits(size):
            good = size
        else:
            bad = size
        size = min(2 * size, most) if bad > most else (good + bad) // 2
    return good


def find_batch_size(model: FasterRCNN, config: OptimConfig, most: int, precision: Precision = "tf32") -> int:
    """The most images per batch that fit on the model's GPU, found by training a copy on the largest images.

    Args:
        model: on its device, which is left as it was.
        config: resolved; its optimiser's state takes memory, too.
        most: images in the training set.
        precision: of the forward pass.

    Raises:
        ValueError: the device is a CPU, or not even one image fits.
    """
    device = model.mean.device
    if device.type != "cuda":
        raise ValueError(f"loader.batch_size auto fills a GPU's memory, and this run is on {device}; give a number")
    short, long = given(model.config.min_size), given(model.config.max_size)
    limit = TRIAL_SHARE * torch.cuda.get_device_properties(device).total_memory

    def fits(size: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            trial = copy.deepcopy(model).train()
            step = Step(trial, make_optimizer(trial, config, 0.0), precision=precision)
            for _ in range(2):  # the optimiser's state exists from the second step on
                for shape in ((short, long), (long, short)):
                    step([_trial_batch(size, *shape)])
            torch.cuda.synchronize(device)
        except torch.cuda.OutOfMemoryError:
            return False
        return torch.cuda.max_memory_allocated(device) <= limit

    with torch.random.fork_rng(devices=[device]):
        size = largest_batch(fits, most)
    torch.cuda.empty_cache()
    convolution.refused.clear()
    if not size:
        raise ValueError(f"not even one image of {long} x {short} pixels fits on {device}; lower model.max_size")
    return size


def _trial_batch(size: int, height: int, width: int) -> Batch:
    """A batch of the largest shape, with many boxes."""
    height, width = -(-height // DIVISOR) * DIVISOR, -(-width // DIVISOR) * DIVISOR
    corner = torch.rand(size * TRIAL_BOXES, 2) * torch.tensor([width, height]) / 2
    targets = Targets(
        boxes=torch.cat((corner, corner + torch.tensor([width, height]) / 4), 1),
        labels=torch.ones(size * TRIAL_BOXES, dtype=torch.int64),
        offsets=torch.arange(size + 1) * TRIAL_BOXES,
        image_sizes=torch.tensor([[height, width]]).repeat(size, 1).float(),
        image_ids=torch.arange(size),
    )
    images = torch.randint(0, 256, (size, 3, height, width), dtype=torch.uint8)
    return Batch(images, targets, list(range(size)), torch.ones(size, 2), [])


def loader_for(
    model: FasterRCNN, dataset: DetectionDataset, config: LoaderConfig, *, train: bool, seed: int = 0
) -> Loader:
    """This process's share of a data set at the size that the model sees."""
    return make_loader(
        dataset,
        config,
        min_size=given(model.config.min_size),
        max_size=given(model.config.max_size),
        train=train,
        seed=seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        device=model.mean.device,
    )


def evaluate(
    model: FasterRCNN,
    loader: Loader,
    dataset: DetectionDataset,
    between: Callable[[], None] = lambda: None,
    precision: Precision = "tf32",
) -> Evaluation | None:
    """Losses, detections and AP of a data set; every rank takes its share.

    Args:
        model: on its device; left in the mode it was in.
        loader: of ``dataset``, made with ``train=False``.
        dataset: where the ground truth comes from.
        between: called before each batch; what it raises ends the evaluation.
        precision: of the forward pass.

    Returns:
        The evaluation on the first rank, None on the others.
    """
    training, device = model.training, model.mean.device
    model.eval()
    # In training each process gathers batch statistics of its own; all must judge the model that is saved.
    distributed.copy_from_first(model.buffers())
    found: dict[int, dict[str, np.ndarray]] = {}
    losses_of: list[tuple[dict[str, Tensor], int]] = []
    skipped: list[str] = []
    for batch in loader:
        between()
        skipped += batch.skipped
        batch = batch.to(device, non_blocking=True)
        with computing(precision, device):
            losses, detections = model.validate(batch.images, batch.targets)
        for index, scale, one in zip(batch.indices, batch.scales.cpu(), detections.to("cpu").unpad(), strict=True):
            boxes = one["boxes"].numpy() * scale.numpy()[[1, 0, 1, 0]]
            found[index] = {"boxes": boxes, "labels": one["labels"].numpy(), "scores": one["scores"].numpy()}
        losses_of.append((losses, len(batch.indices)))  # read at the end: the device goes on
    model.train(training)
    totals: dict[str, float] = {}
    for losses, count in losses_of:
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0.0) + loss.item() * count
    images = sum(count for _, count in losses_of)
    shares = distributed.gather_objects((found, totals, images, skipped))
    if shares is None:
        return None
    found = {index: one for share in shares for index, one in share[0].items()}
    images = sum(share[2] for share in shares)
    if len(found) != len(dataset):
        raise ValueError(f"an evaluation must cover all {len(dataset)} images of {dataset.name}, got {len(found)}")
    results = [found[index] for index in range(len(dataset))]
    names = dict.fromkeys(name for share in shares for name in share[1])
    return Evaluation(
        results=results,
        losses={name: sum(share[1].get(name, 0.0) for share in shares) / max(images, 1) for name in names},
        voc=voc_ap(dataset, results),
        coco=coco_ap(dataset, results),
        skipped=[sentence for share in shares for sentence in share[3]],
    )
