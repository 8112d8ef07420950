"""Train and evaluate: the loops between the data and the model. No argument parsing and no printing here."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rcnn import checkpoint, distributed
from rcnn.config import LoaderConfig, OptimConfig, TrainConfig, given
from rcnn.data.dataset import DetectionDataset
from rcnn.data.loader import Batch, Loader, make_loader
from rcnn.detector import config_to
from rcnn.files import write_text
from rcnn.metrics.coco import coco_ap
from rcnn.metrics.voc import voc_ap
from rcnn.models.faster_rcnn import FasterRCNN
from rcnn.tracking import Tracker

#: The settings of a run, every field filled in.
CONFIG = "config.yaml"


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
        batch = batch.to(device, non_blocking=True)
        losses, detections = model.validate(batch.images, batch.targets)
        for index, scale, one in zip(batch.indices, batch.scales.cpu(), detections.to("cpu").unpad(), strict=True):
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


@dataclass
class _Position:
    """Where a run stands: epochs finished, steps taken in the next one and in all, best AP so far."""

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


def train(
    config: TrainConfig,
    model: FasterRCNN,
    train_set: DetectionDataset,
    val_set: DetectionDataset,
    folder: Path,
    tracker: Tracker,
) -> None:
    """Train to the end, evaluating on the way; the run folder then holds the best and the last weights.

    The state is saved when the steps of an epoch are done, before its evaluation: what fails there loses nothing, and a
    resumed run begins with that evaluation.

    Args:
        config: resolved.
        model: on its device.
        train_set: trains.
        val_set: is evaluated every ``config.val_interval`` epochs and after the last.
        folder: the run folder, which exists; only the first rank writes to it.
        tracker: told of each step and epoch.

    Raises:
        Interrupted: Ctrl-C; a checkpoint was written first.
        DivergedError: a loss is not finite; the last checkpoint is as it was.
        ValueError: the state to resume from is of other classes, another model or another optimiser.
    """
    run = _Run(config, model, train_set, val_set, folder, tracker)
    with _stop_flag() as stopping:
        while run.at.epoch < given(config.epochs):
            run.epoch(stopping)
    if run.unreadable:
        tracker.message(f"images that could not be read: {len(run.unreadable)}")


class _Run:
    """What a training run holds between two steps."""

    def __init__(
        self,
        config: TrainConfig,
        model: FasterRCNN,
        train_set: DetectionDataset,
        val_set: DetectionDataset,
        folder: Path,
        tracker: Tracker,
    ) -> None:
        self.config, self.model, self.folder, self.tracker = config, model, folder, tracker
        self.train_set, self.val_set = train_set, val_set
        self.rank, self.world, self.device = distributed.rank(), distributed.world_size(), model.mean.device
        self.loader = loader_for(model, train_set, config.loader, train=True, seed=config.seed)
        self.val_loader = loader_for(model, val_set, config.loader, train=False)
        self.steps_per_epoch = len(self.loader)
        self.steps = given(config.epochs) * self.steps_per_epoch
        self.lr, _ = scaled_lr(config.optim, given(config.loader.batch_size) * self.world)
        self.optimizer = make_optimizer(model, config.optim, self.lr)
        self.at = _Position()
        self.totals: dict[str, Tensor] = {}  # of the losses in this epoch
        self.unreadable: dict[str, None] = {}  # a sentence for each image that was skipped
        self.unsaid: list[str] = []
        self.recent: dict[int, tuple[dict[str, Tensor], float, list[int]]] = {}
        self.first_bad = torch.full((), -1, device=self.device)
        torch.manual_seed(config.seed + self.rank)  # dropout differs between processes
        if config.resume:
            self.restore()
        if self.rank == 0:
            # Without its own place, for the folder may move, and the file may start another run.
            settings = asdict(replace(config, out="", resume=False))
            settings["loader"]["scale"] = list(settings["loader"]["scale"])
            write_text(folder / CONFIG, yaml.safe_dump(settings, sort_keys=False))
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        self.network = DistributedDataParallel(model, device_ids=device_ids) if self.world > 1 else model
        tracker.epochs, tracker.total_steps, tracker.resume_step = given(config.epochs), self.steps, self.at.step

    def epoch(self, stopping: Callable[[], bool]) -> None:
        """The steps that are left of an epoch, then its evaluation."""
        at = self.at
        self.model.train()
        self.loader.set_epoch(at.epoch, at.step_in_epoch)
        first, end = at.step, time.perf_counter()
        for batch in self.loader:
            self.step(batch, end)
            end = time.perf_counter()
            if distributed.any_rank(stopping()):
                self.save()
                self.stop()
        if at.step > first:  # else resumed at the end of the steps
            self.save()
        found = None
        if (at.epoch + 1) % self.config.val_interval == 0 or at.epoch + 1 == self.config.epochs:
            found = evaluate(self.model, self.val_loader, self.val_set)
            self.unsaid += [f"{s}; evaluated as if nothing were found" for s in found.skipped] if found else []
        self.tell_unreadable()
        taken = max(at.step_in_epoch, 1)
        means = distributed.mean({name: total / taken for name, total in self.totals.items()})
        metrics = _metrics({name: loss.item() for name, loss in means.items()}, found)
        at.epoch, at.step_in_epoch, self.totals = at.epoch + 1, 0, {}
        if self.rank == 0 and found is not None and found.coco["AP"] > at.best:
            at.best = found.coco["AP"]
            self.save_weights(checkpoint.MODEL_BEST, metrics)
        self.tracker.epoch(at.epoch, metrics)
        if distributed.any_rank(stopping()):
            self.stop()

    def step(self, batch: Batch, start: float) -> None:
        """One step of the optimiser; ``start`` is when the batch was asked for."""
        at, config = self.at, self.config
        data_time = time.perf_counter() - start
        self.unsaid += [f"{sentence}; image skipped" for sentence in batch.skipped]
        rate = self.lr * lr_factor(config.optim, at.step, self.steps, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = batch.to(self.device, non_blocking=True)
        losses = train_step(self.network, batch, self.optimizer, given(config.optim.clip_norm))
        at.step += 1
        at.step_in_epoch += 1
        self.totals = {name: self.totals.get(name, 0) + loss for name, loss in losses.items()}
        finite = torch.stack(list(losses.values())).isfinite().all()
        self.first_bad = torch.where(finite | (self.first_bad >= 0), self.first_bad, at.step)
        self.recent[at.step] = losses, rate, batch.indices
        values = {}
        if at.step % config.log_interval == 0 or at.step_in_epoch == self.steps_per_epoch:
            values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
            self.check_finite()
        images = len(batch.indices) * self.world
        self.tracker.step(at.epoch, at.step, values, rate, images, data_time, time.perf_counter() - start)

    def check_finite(self) -> None:
        """Stop if a loss since the last check was not finite."""
        bad = int(self.first_bad)
        if bad < 0:
            self.recent.clear()
            return
        losses, rate, indices = self.recent[bad]
        names = ", ".join(name for name, loss in losses.items() if not loss.isfinite())
        files = ", ".join(str(self.train_set.records[index].path) for index in indices)
        raise DivergedError(
            f"{names} is not finite at step {bad} (learning rate {rate:g}, images {files}); "
            f"lower optim.lr or set optim.clip_norm"
        )

    def tell_unreadable(self) -> None:
        """Name each image that any process had to skip, once."""
        for sentence in [one for share in distributed.gather_objects(self.unsaid) or [] for one in share]:
            if sentence not in self.unreadable:
                self.tracker.message(sentence)
                self.unreadable[sentence] = None
        self.unsaid = []

    def stop(self) -> None:
        """Leave after Ctrl-C, all processes together."""
        self.tell_unreadable()
        distributed.barrier()  # the first process has saved
        raise Interrupted(f"stopped after step {self.at.step}; train --resume --out {self.folder} goes on from there")

    def save_weights(self, name: str, metrics: dict[str, float]) -> None:
        """Write the model's weights into the run folder."""
        extra = {"epoch": self.at.epoch, "step": self.at.step, "metrics": metrics}
        model = self.model
        checkpoint.save(self.folder / name, model.state_dict(), config_to(model), model.classes, extra)

    def save(self) -> None:
        """Write the last weights and the state; called by every process, written by the first."""
        self.check_finite()
        random = distributed.gather_objects(torch.get_rng_state())
        random_cuda = distributed.gather_objects(torch.cuda.get_rng_state()) if self.device.type == "cuda" else []
        if self.rank != 0:
            return
        self.save_weights(checkpoint.MODEL_LAST, {})
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_name": self.config.optim.name,
            "position": vars(self.at).copy(),
            "totals": self.totals,
            "classes": self.model.classes,
            "random": random,
            "random_cuda": random_cuda,
        }
        checkpoint.save_state(self.folder / checkpoint.STATE_LAST, state)

    def restore(self) -> None:
        """Take up the state of the run folder; settings of the optimiser stay those of the configuration."""
        file = self.folder / checkpoint.STATE_LAST
        state = checkpoint.read_state(file)
        for what, saved, own in (
            ("classes", state.get("classes"), self.model.classes),
            ("optimizer", state.get("optimizer_name"), self.config.optim.name),
        ):
            if saved != own:
                raise ValueError(f"{file} is of the {what} {saved}, this run has {own}")
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            checkpoint.load_into(self.model, state["model"], file)
            self.optimizer.load_state_dict(state["optimizer"])
            self.at = _Position(**state["position"])
            self.totals = {name: total.to(self.device) for name, total in state["totals"].items()}
            random, random_cuda = state["random"], state["random_cuda"]
        except (KeyError, TypeError) as error:
            problem = f"{file} is no training state of this version: {error!r} is amiss"
            raise checkpoint.CheckpointError(problem) from None
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        self.model.step.fill_(self.at.step)
        if len(random) == self.world:
            torch.set_rng_state(random[self.rank])
        if self.device.type == "cuda" and len(random_cuda) == self.world:
            torch.cuda.set_rng_state(random_cuda[self.rank])


def _metrics(losses: dict[str, float], found: Evaluation | None) -> dict[str, float]:
    values = {"loss": sum(losses.values()), **losses}
    if found is not None:
        values["val_loss"] = sum(found.losses.values())
        values |= {f"val_{name}": loss for name, loss in found.losses.items()}
        values |= {"AP": found.coco["AP"], "AP50": found.coco["AP50"], "VOC_AP": found.voc["map_area"]}
    return values
