"""Train and evaluate: the loops between the data and the model. No argument parsing and no printing here."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rcnn import checkpoint, distributed
from rcnn.config import LoaderConfig, OptimConfig, TrainConfig, given
from rcnn.data.dataset import DetectionDataset
from rcnn.data.loader import Batch, Loader, make_loader
from rcnn.detector import config_to
from rcnn.metrics.coco import coco_ap
from rcnn.metrics.voc import voc_ap
from rcnn.models.faster_rcnn import FasterRCNN
from rcnn.tracking import Tracker


class Interrupted(Exception):
    """Training was asked to stop; a checkpoint of the moment lies in the run folder."""


class DivergedError(ValueError):
    """A loss is not finite any more."""


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


def make_optimizer(model: nn.Module, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW over the parameters that train."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = given(config.weight_decay)
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr, config.momentum, weight_decay=decay, fused=True)
    return torch.optim.AdamW(parameters, lr, weight_decay=decay, fused=True)


def scaled_lr(config: OptimConfig, images_per_step: int) -> tuple[float, str]:
    """The learning rate for a step of so many images, and the arithmetic as a sentence."""
    lr, base = given(config.lr), given(config.base_batch_size)
    if not base:
        return lr, f"learning rate {lr:g}, not scaled"
    scaled = lr * images_per_step / base
    return scaled, f"learning rate {scaled:g} = {lr:g} x {images_per_step} images per step / {base}"


def lr_factor(config: OptimConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """The learning rate of a step as a share of its peak.

    A linear warm-up over the first ``warmup`` of all steps times the schedule: half a cosine to zero from there on;
    ``gamma`` at each of ``milestones``; or ``gamma`` every ``step_size`` epochs.

    Args:
        config: the schedule.
        step: from 0.
        steps: of the whole run.
        steps_per_epoch: of one epoch.
    """
    warm_steps = round(given(config.warmup) * steps)
    warm = min(1.0, (step + 1) / warm_steps) if warm_steps else 1.0
    gamma = given(config.gamma)
    if config.schedule == "cosine":
        done = max(0, step - warm_steps) / max(1, steps - warm_steps)
        return warm * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "multistep":
        return warm * gamma ** sum(step >= milestone * steps for milestone in config.milestones)
    return warm * gamma ** (step // (steps_per_epoch * config.step_size))


def train_step(
    model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, clip_norm: float = 0.0
) -> dict[str, Tensor]:
    """One step of the optimiser.

    Args:
        model: a :class:`~rcnn.models.faster_rcnn.FasterRCNN` in training mode, or one wrapped for data parallelism.
        batch: on the model's device.
        optimizer: over the model's parameters.
        clip_norm: the gradient's norm is cut to this; 0 never cuts.

    Returns:
        The four losses, ``()`` float32 without gradient, still on the device.
    """
    losses = model(batch.images, batch.targets)
    optimizer.zero_grad(set_to_none=True)
    torch.stack(list(losses.values())).sum().backward()
    if clip_norm:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}


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
        pin_memory=model.mean.is_cuda,
    )


def evaluate(model: FasterRCNN, loader: Loader, dataset: DetectionDataset) -> Evaluation | None:
    """Losses, detections and AP of a data set; every rank takes its share.

    Args:
        model: on its device; left in the mode it was in.
        loader: of ``dataset``, made with ``train=False``.
        dataset: where the ground truth comes from.

    Returns:
        The evaluation on the first rank, None on the others.
    """
    training, device = model.training, model.mean.device
    model.eval()
    # In training each process gathers batch statistics of its own; all must judge the model that is saved.
    distributed.copy_from_first(model.buffers())
    found: dict[int, dict[str, np.ndarray]] = {}
    totals: dict[str, float] = {}
    skipped: list[str] = []
    images = 0
    for batch in loader:
        skipped += batch.skipped
        losses, detections = model.validate(batch.images.to(device), batch.targets.to(device))
        for index, scale, one in zip(batch.indices, batch.scales, detections.to("cpu").unpad(), strict=True):
            boxes = one["boxes"].numpy() * scale.numpy()[[1, 0, 1, 0]]
            found[index] = {"boxes": boxes, "labels": one["labels"].numpy(), "scores": one["scores"].numpy()}
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0.0) + loss.item() * len(batch.indices)
        images += len(batch.indices)
    model.train(training)
    shares = distributed.gather_objects((found, totals, images, skipped))
    if shares is None:
        return None
    found = {index: one for share in shares for index, one in share[0].items()}
    images = sum(share[2] for share in shares)
    empty: dict[str, np.ndarray] = {
        "boxes": np.zeros((0, 4), np.float32),
        "labels": np.zeros(0, np.int64),
        "scores": np.zeros(0, np.float32),
    }
    results = [found.get(index, empty) for index in range(len(dataset))]
    names = dict.fromkeys(name for share in shares for name in share[1])
    return Evaluation(
        results=results,
        losses={name: sum(share[1].get(name, 0.0) for share in shares) / max(images, 1) for name in names},
        voc=voc_ap(dataset, results),
        coco=coco_ap(dataset, results),
        skipped=[sentence for share in shares for sentence in share[3]],
    )


@dataclass
class _Position:
    """Where a run stands: epoch, steps taken within it and in all, best AP so far."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best: float = -1.0


@contextmanager
def _stop_flag() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that is asked between steps; the second one interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def handler(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def _save(
    run: Path, model: FasterRCNN, optimizer: torch.optim.Optimizer, at: _Position, metrics: dict[str, Any]
) -> None:
    weights = model.state_dict()
    extra = {"epoch": at.epoch, "step": at.step, "metrics": metrics}
    checkpoint.save(run / checkpoint.MODEL_LAST, weights, config_to(model), model.classes, extra)
    state = {
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "position": vars(at).copy(),
        "classes": model.classes,
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    checkpoint.save_state(run / checkpoint.STATE_LAST, state)


def _restore(run: Path, model: FasterRCNN, optimizer: torch.optim.Optimizer) -> _Position:
    file = run / checkpoint.STATE_LAST
    state = checkpoint.read_state(file)
    if state.get("classes") != model.classes:
        raise ValueError(f"{file} is of the classes {state.get('classes')}, the data has {model.classes}")
    try:
        checkpoint.load_into(model, state["model"], file)
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        at = _Position(**state["position"])
    except (KeyError, TypeError) as error:
        raise checkpoint.CheckpointError(f"{file} is no training state of this version: {error!r} is amiss") from None
    if torch.cuda.is_available() and len(state["random_cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["random_cuda"])
    model.step.fill_(at.step)
    return at


def train(
    config: TrainConfig,
    model: FasterRCNN,
    train_set: DetectionDataset,
    val_set: DetectionDataset,
    run: Path,
    tracker: Tracker,
) -> None:
    """Train to the end, evaluating on the way; the run folder then holds the best and the last weights.

    Args:
        config: resolved.
        model: on its device.
        train_set: trains.
        val_set: is evaluated every ``config.val_interval`` epochs and after the last.
        run: the run folder; only the first rank writes to it.
        tracker: told of each step and epoch.

    Raises:
        Interrupted: Ctrl-C; a checkpoint was written first.
        DivergedError: a loss is not finite; the last checkpoint is as it was.
    """
    rank, world = distributed.rank(), distributed.world_size()
    device, epochs = model.mean.device, given(config.epochs)
    loader = loader_for(model, train_set, config.loader, train=True, seed=config.seed)
    val_loader = loader_for(model, val_set, config.loader, train=False)
    lr, _ = scaled_lr(config.optim, given(config.loader.batch_size) * world)
    optimizer = make_optimizer(model, config.optim, lr)
    at = _restore(run, model, optimizer) if config.resume else _Position()
    network: nn.Module = model
    if world > 1:
        network = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    steps_per_epoch = len(loader)
    steps = epochs * steps_per_epoch
    tracker.epochs, tracker.total_steps, tracker.resume_step = epochs, steps, at.step
    told: set[str] = set()  # what was skipped, each file once
    model.train()
    with _stop_flag() as stopping:
        while at.epoch < epochs:
            loader.set_epoch(at.epoch, at.step_in_epoch)
            totals: dict[str, Tensor] = {}
            taken, end = 0, time.perf_counter()
            for batch in loader:
                data_time = time.perf_counter() - end
                for sentence in batch.skipped:
                    if sentence not in told:
                        tracker.message(f"{sentence}; image skipped")
                        told.add(sentence)
                rate = lr * lr_factor(config.optim, at.step, steps, steps_per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                losses = train_step(network, batch.to(device), optimizer, given(config.optim.clip_norm))
                taken += 1
                at.step += 1
                at.step_in_epoch += 1
                totals = {name: totals.get(name, 0) + loss for name, loss in losses.items()}
                values = {}
                if at.step % config.log_interval == 0 or at.step_in_epoch == steps_per_epoch:
                    values = {name: loss.item() for name, loss in losses.items()}
                    _check_finite(values, at, rate, batch, train_set)
                images = len(batch.indices) * world
                tracker.step(at.epoch, at.step, values, rate, images, data_time, time.perf_counter() - end)
                if distributed.any_rank(stopping()):
                    if rank == 0:
                        _save(run, model, optimizer, at, {})
                    raise Interrupted(
                        f"stopped in epoch {at.epoch + 1}, step {at.step}; --resume true goes on from there"
                    )
                end = time.perf_counter()
            at.epoch, at.step_in_epoch = at.epoch + 1, 0
            means = distributed.mean({name: total / max(taken, 1) for name, total in totals.items()})
            values = {name: loss.item() for name, loss in means.items()}
            found = None
            if at.epoch % config.val_interval == 0 or at.epoch == epochs:
                found = evaluate(model, val_loader, val_set)
            if rank == 0:
                metrics = _metrics(values, found)
                if found is not None and found.coco["AP"] > at.best:
                    at.best = found.coco["AP"]
                    extra = {"epoch": at.epoch, "step": at.step, "metrics": metrics}
                    best = run / checkpoint.MODEL_BEST
                    checkpoint.save(best, model.state_dict(), config_to(model), model.classes, extra)
                tracker.epoch(at.epoch, metrics)
                _save(run, model, optimizer, at, metrics)


def _metrics(losses: dict[str, float], found: Evaluation | None) -> dict[str, float]:
    values = {"loss": sum(losses.values()), **losses}
    if found is not None:
        values["val_loss"] = sum(found.losses.values())
        values |= {f"val_{name}": loss for name, loss in found.losses.items()}
        values |= {"AP": found.coco["AP"], "AP50": found.coco["AP50"], "VOC_AP": found.voc["map_area"]}
    return values


def _check_finite(losses: dict[str, float], at: _Position, lr: float, batch: Batch, dataset: DetectionDataset) -> None:
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        files = ", ".join(str(dataset.records[index].path) for index in batch.indices)
        raise DivergedError(
            f"{', '.join(bad)} is not finite at step {at.step} (learning rate {lr:g}, images {files}); "
            f"lower optim.lr or set optim.clip_norm"
        )
