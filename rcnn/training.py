"""A training run: epochs of steps, evaluations between them, checkpoints, and how it ends before its time."""

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.nn.parallel import DistributedDataParallel

from rcnn import checkpoint, distributed, engine, replay, run_folder, stopping
from rcnn.config import TrainConfig, given, images_per_batch
from rcnn.data.batch import Batch
from rcnn.data.dataset import DetectionDataset
from rcnn.detector import config_to
from rcnn.engine import Evaluation, Step, StepResult, loader_for
from rcnn.files import write_text
from rcnn.graph import GraphedStep
from rcnn.models.faster_rcnn import FasterRCNN
from rcnn.optim import Ema, load_named_state, lr_factor, make_optimizer, named_state, scaled_lr, set_lr
from rcnn.precision import OVERFLOWS, LossScaler
from rcnn.stopping import Interrupted, Reason
from rcnn.tracking import Tracker

#: Where an epoch can be shorter than the saving of its state, and how many times as long as the last saving took must
#: have passed before the end of an epoch is saved there.
SHORT_EPOCHS, SAVINGS_APART = ("cuda",), 10
#: Starts torch's message when the CPU's allocator fails; a GPU's has a class of its own.
_CPU_MEMORY = "DefaultCPUAllocator"


class DivergedError(ValueError):
    """More losses or gradients were not finite than the run may skip."""


class OutOfMemory(ValueError):
    """A batch did not fit in memory; the message says what to lower."""


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
    resumed run begins with that evaluation. On a GPU an epoch that ends too soon after the last saving is left out, so
    that no more than a tenth of the time goes by with it: what fails then loses that tenfold of a saving's time. It is
    saved every ``save_interval`` steps as well, when a signal, Ctrl-C or ``max_time`` asks to stop, and at the end.

    Args:
        config: resolved, with the batch size as a number.
        model: on its device.
        train_set: trains.
        val_set: is evaluated every ``config.val_interval`` epochs and after the last.
        folder: the run folder, which exists and is locked; only the first rank writes to it, but for bad batches.
        tracker: told of each step and epoch.

    Raises:
        Interrupted: asked to stop; a checkpoint was written first.
        DivergedError: a loss or gradient is not finite, once more than may be skipped; the batch was saved.
        OutOfMemory: a batch does not fit; a single process has written a checkpoint first.
        ValueError: the state to resume from is of other classes, another model or another optimiser.
    """
    run = _Run(config, model, train_set, val_set, folder, tracker)
    with stopping.requests(config.max_time) as asked:
        run.asked = asked
        while run.at.epoch < given(config.epochs):
            if config.patience and run.at.stale >= config.patience:
                tracker.message(f"stopped early: {run.at.stale} evaluations without a better AP")
                break
            run.epoch()
        run.save()
    if run.unreadable:
        tracker.message(f"images that could not be read: {len(run.unreadable)}")


@dataclass
class _Position:
    """Where a run stands.

    Attributes:
        epoch: epochs finished.
        batch: batches taken in the next one.
        step: steps of the optimiser in all, those skipped included.
        forwards: batches in all, which number the sampling.
        counted: steps of this epoch that were not skipped.
        skipped: steps skipped in all.
        best: best AP.
        stale: evaluations since then.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    forwards: int = 0
    counted: int = 0
    skipped: int = 0
    best: float = -1.0
    stale: int = 0


@dataclass
class _Taken:
    """A step whose result may still be on its way from the device."""

    result: StepResult
    batches: list[Batch]
    before: dict[str, Any]
    epoch: int
    step: int
    lr: float
    last: bool
    data_time: float
    seconds: float = 0.0


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
        self.batches_per_epoch = len(self.loader)
        self.steps_per_epoch = -(-self.batches_per_epoch // config.optim.accumulate)
        self.steps = given(config.epochs) * self.steps_per_epoch
        self.lr, _ = scaled_lr(config.optim, images_per_batch(config.loader), self.world)
        if config.sync_bn:
            distributed.synchronize_norms(model)
        self.optimizer = make_optimizer(model, config.optim, self.lr)
        self.ema = Ema(model, config.optim.ema) if config.optim.ema else None
        self.guarded = [b for b in model.buffers() if b.is_floating_point()] if config.max_bad_steps else []
        self.scaler = LossScaler(self.device) if config.precision == "fp16" else None
        self.overflows = 0  # in a row
        self.at = _Position()
        self.totals: dict[str, float] = {}  # of the losses in this epoch
        self.unreadable: dict[str, None] = {}  # a sentence for each image that was skipped
        self.unsaid: list[str] = []
        self.pending: _Taken | None = None
        self.saved = 0  # step of the newest state
        self.saved_at, self.saving = time.perf_counter(), 0.0  # when that was, and how long it took
        self.asked: Callable[[], Reason] = lambda: Reason.NONE
        _seed(config.seed + self.rank)  # dropout differs between processes
        if config.resume:
            self.restore()
        if self.rank == 0:
            # Without its own place, for the folder may move, and the file may start another run.
            settings = asdict(replace(config, out="", resume=False))
            settings["loader"]["scale"] = list(settings["loader"]["scale"])
            write_text(folder / run_folder.CONFIG, yaml.safe_dump(settings, sort_keys=False))
        self.network: torch.nn.Module = model
        if self.world > 1:
            model.normaliser = distributed.mean_count
            parallel = DistributedDataParallel(
                model,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                static_graph=config.optim.accumulate == 1,
            )
            # The evaluation takes those of the first process, and nothing else reads them. torch 2.13 warns of the
            # argument of this name.
            parallel.broadcast_buffers = False
            self.network = parallel
        clip = given(config.optim.clip_norm)
        self.one_step = Step(self.network, self.optimizer, clip, self.guarded, config.precision, self.scaler)
        self.take: Callable[[list[Batch]], torch.Tensor] = self.one_step.on_device
        if config.cuda_graph and self.graph_allowed():
            self.take = GraphedStep(self.one_step.on_device, self.optimizer, self.device, tracker.message)
        tracker.epochs, tracker.total_steps, tracker.resume_step = given(config.epochs), self.steps, self.at.step
        tracker.resume_evaluated = self.at.step > 0 and self.at.batch == 0  # a state from after an evaluation

    def graph_allowed(self) -> bool:
        """Whether the step may be recorded at all; says why not."""
        reason = f"the steps run on {self.device}" if self.device.type != "cuda" else ""
        if self.world > 1:
            reason = "gradients cross between processes, which needs a recording of its own"
        if reason:
            self.tracker.message(f"cuda_graph: {reason}, so all steps run as usual")
        return not reason

    def epoch(self) -> None:
        """The steps that are left of an epoch, then its evaluation."""
        at, config = self.at, self.config
        self.model.train()
        self.loader.set_epoch(at.epoch, at.batch)
        try:
            self.steps_of_epoch()
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError) or _CPU_MEMORY in str(error):
                raise self.out_of_memory() from error
            if isinstance(told := self.loader.explained(error), ValueError):
                raise told from error
            raise
        except MemoryError as error:
            raise self.out_of_memory() from error
        if self.due():
            self.save()
        found = None
        if (at.epoch + 1) % config.val_interval == 0 or at.epoch + 1 == config.epochs:
            try:
                with self.averaged():
                    found = engine.evaluate(
                        self.model, self.val_loader, self.val_set, self.leave_evaluation, config.precision
                    )
            except Interrupted:
                self.save()
                raise
            self.unsaid += [f"{s}; evaluated as if nothing were found" for s in found.skipped] if found else []
        self.tell_unreadable()
        metrics = _metrics({name: total / max(at.counted, 1) for name, total in self.totals.items()}, found)
        at.epoch, at.batch, at.counted, self.totals = at.epoch + 1, 0, 0, {}
        if found is not None:
            at.stale += 1
            if found.coco["AP"] > at.best:
                at.best, at.stale = found.coco["AP"], 0
                self.save_weights(checkpoint.MODEL_BEST, metrics)
        at.best, at.stale = distributed.broadcast((at.best, at.stale))
        self.tracker.epoch(at.epoch, metrics)
        if at.epoch < given(config.epochs):
            self.stop_if_asked()

    def due(self) -> bool:
        """Whether the end of an epoch's steps is to be saved; the same for every process."""
        apart = time.perf_counter() - self.saved_at >= SAVINGS_APART * self.saving
        last = self.at.epoch + 1 == self.config.epochs
        return distributed.broadcast(apart or last or self.device.type not in SHORT_EPOCHS)

    def steps_of_epoch(self) -> None:
        """Take each step, and save on the way; returns when all results are in."""
        at, config = self.at, self.config
        group: list[Batch] = []
        start = time.perf_counter()
        for batch in self.loader:
            group.append(batch)
            last = at.batch + len(group) == self.batches_per_epoch
            if len(group) < config.optim.accumulate and not last:
                continue
            self.step(group, start, last)
            if config.save_interval and at.step % config.save_interval == 0 and not last:
                self.save()
            self.stop_if_asked()
            group, start = [], time.perf_counter()
        self.settle()

    def step(self, group: list[Batch], start: float, last: bool) -> None:
        """One step of the optimiser; ``start`` is when its first batch was asked for."""
        at, optim = self.at, self.config.optim
        data_time = time.perf_counter() - start
        self.unsaid += [f"{sentence}; image skipped" for batch in group for sentence in batch.skipped]
        rate = self.lr * lr_factor(optim, at.step, self.steps, self.steps_per_epoch)
        set_lr(self.optimizer, rate)
        before = {"forwards": at.forwards, "random": _random_state(self.device)}
        values = self.take(group)
        result = StepResult(self.one_step.names, values)
        at.step += 1
        at.batch += len(group)
        at.forwards += len(group)
        if self.ema is not None:
            self.ema.update(self.model, at.step)
        taken = _Taken(result, group, before, at.epoch, at.step, rate, last, data_time)
        if self.device.type == "cuda":
            self.settle()  # of the step before, while the device is busy with this one
        taken.seconds = time.perf_counter() - start
        self.pending = taken
        if self.device.type != "cuda":
            self.settle()

    def settle(self) -> None:
        """Read the result of the step that is still out, and act on it."""
        taken, self.pending = self.pending, None
        if taken is None:
            return
        losses, means, norm = taken.result.read()
        finite = bool(np.isfinite([*means.values(), norm]).all())
        if finite:
            del means[engine.TARGET]
            self.totals = {name: self.totals.get(name, 0.0) + value for name, value in means.items()}
            self.at.counted += 1
        logged = finite and (taken.step % self.config.log_interval == 0 or taken.last)
        images = sum(len(batch.indices) for batch in taken.batches) * self.world
        values = means if logged else {}
        self.tracker.step(taken.epoch, taken.step, values, taken.lr, images, taken.data_time, taken.seconds)
        # Finite losses with a gradient that is not, in float16: the scale was too large, and has halved by itself.
        overflow = self.scaler is not None and not finite and bool(np.isfinite(list(means.values())).all())
        self.overflows = self.overflows + 1 if overflow else 0
        if not finite and not 0 < self.overflows <= OVERFLOWS:
            self.bad_step(taken, losses, means, norm)

    def bad_step(self, taken: _Taken, losses: dict[str, float], means: dict[str, float], norm: float) -> None:
        """Name what is not finite, save its batch for a replay, and skip the step or end the run."""
        names = [name for name, loss in losses.items() if not np.isfinite(loss)]
        told = None
        if names or np.isfinite(list(means.values())).all():  # else another process is to blame
            files = ", ".join(str(self.train_set.records[i].path) for batch in taken.batches for i in batch.indices)
            file = self.folder / run_folder.BAD_STEP.format(taken.step, self.rank)
            del losses[engine.TARGET]
            facts = {"step": taken.step, "lr": taken.lr, "losses": losses, "norm": norm, "files": files}
            replay.save(file, self.model, taken.batches, self.config.seed, {**facts, **taken.before})
            told = (
                f"{', '.join(names) or 'the gradient'} is not finite at step {taken.step} (learning rate "
                f"{taken.lr:g}, gradient norm {norm:g}, images {files}); to see it again: rcnn train --replay {file}"
            )
        shares = distributed.gather_objects(told)
        text = distributed.broadcast("; ".join(filter(None, shares or [])))
        self.at.skipped += 1
        most = self.config.max_bad_steps
        if self.at.skipped > most:
            advice = "lower optim.lr or set optim.clip_norm" + ("" if most else ", or skip some with max_bad_steps")
            raise DivergedError(f"{text}; {advice}")
        self.tracker.message(f"{text}; step skipped, {self.at.skipped} of at most {most}")

    def out_of_memory(self) -> OutOfMemory:
        """The error that says what to lower, after a checkpoint where this process may write one alone."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        kept = "the last checkpoint is as it was"
        if self.world == 1:
            self.save()
            kept = f"the checkpoint of step {self.at.step} is in {self.folder}"
        config, model = self.config, self.model.config
        return OutOfMemory(
            f"out of memory on {self.device} after step {self.at.step}: lower loader.batch_size (now "
            f"{config.loader.batch_size}; optim.accumulate makes up for it), model.max_size (now {model.max_size}), or "
            f"model.rpn.post_nms_top_n_train (now {model.rpn.post_nms_top_n_train}); {kept}, and --resume goes on"
        )

    def tell_unreadable(self) -> None:
        """Name each image that any process had to skip, once."""
        for sentence in [one for share in distributed.gather_objects(self.unsaid) or [] for one in share]:
            if sentence not in self.unreadable:
                self.tracker.message(sentence)
                self.unreadable[sentence] = None
        self.unsaid = []

    def stop_if_asked(self) -> None:
        """Leave, all processes together, if any was asked to."""
        reason = Reason(distributed.maximum(self.asked())[0])
        if not reason:
            return
        self.save()
        self.tell_unreadable()
        distributed.barrier()  # the first process has saved
        raise self.interrupted(reason)

    def leave_evaluation(self) -> None:
        """Leave at once if asked to. Several processes end the evaluation first."""
        if self.world == 1 and (reason := self.asked()):
            raise self.interrupted(reason)

    def interrupted(self, reason: Reason) -> Interrupted:
        """What tells the caller that the run was asked to stop."""
        step = f"stopped by {reason} after step {self.at.step}"
        return Interrupted(f"{step}; rcnn train --resume --out {self.folder} goes on from there", reason)

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the model has its averaged weights, if the run keeps an average."""
        return nullcontext() if self.ema is None else self.ema.applied(self.model)

    def save_weights(self, name: str, metrics: dict[str, float]) -> None:
        """Write the model's weights into the run folder."""
        extra = {"epoch": self.at.epoch, "step": self.at.step, "metrics": metrics}
        model = self.model
        with self.averaged():
            checkpoint.save(self.folder / name, model.state_dict(), config_to(model), model.classes, extra)

    def save(self) -> None:
        """Write the state and the last weights, unless they are; called by every process, written by the first."""
        self.settle()
        if self.saved == self.at.step:
            return
        self.saved, start = self.at.step, time.perf_counter()
        states = distributed.gather_objects(_random_state(self.device))
        if self.rank != 0:
            return
        state = {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.average,
            "optimizer": named_state(self.model, self.optimizer),
            "optimizer_name": self.config.optim.name,
            "scaler": None if self.scaler is None else self.scaler.state(),
            "position": asdict(self.at),
            "totals": self.totals,
            "images": images_per_batch(self.config.loader) * self.world,
            "classes": self.model.classes,
            "random": states,
        }
        run_folder.save_state(self.folder, self.at.step, state, self.config.keep)
        self.save_weights(checkpoint.MODEL_LAST, {})
        self.saved_at = time.perf_counter()
        self.saving = self.saved_at - start

    def restore(self) -> None:
        """Take up the newest whole state of the run folder; settings stay those of the configuration."""
        newest = run_folder.newest_state(self.folder, self.tracker.message) if self.rank == 0 else None
        file = distributed.broadcast(newest)
        assert file is not None
        state = checkpoint.read_state(file)
        images = images_per_batch(self.config.loader) * self.world
        for what, saved, own in (
            ("classes", state.get("classes"), self.model.classes),
            ("optimizer", state.get("optimizer_name"), self.config.optim.name),
        ):
            if saved != own:
                raise ValueError(f"{file} is of the {what} {saved}, this run has {own}")
        try:
            checkpoint.load_into(self.model, state["model"], file)
            load_named_state(self.model, self.optimizer, state["optimizer"])
            self.at = _Position(**state["position"])
            self.totals = state["totals"]
            if self.ema is not None:
                averages = state["ema"] or state["model"]
                self.ema.average = {name: averages[name].to(self.device) for name in self.ema.average}
            if self.scaler is not None and state["scaler"] is not None:
                self.scaler.load(state["scaler"])
            if state["images"] != images:  # another number of processes or batch size: the same share of the epoch
                self.at.batch = self.at.batch * state["images"] // images
            self.model.step.fill_(self.at.forwards)
            self.saved = self.at.step
            if len(state["random"]) == self.world:
                _set_random_state(state["random"][self.rank], self.device)
            self.tracker.message(f"going on after step {self.at.step}, from {file}")
        except (KeyError, TypeError) as error:
            problem = f"{file} is no training state of this version: {error!r} is amiss"
            raise checkpoint.CheckpointError(problem) from None


def _seed(seed: int) -> None:
    """Set every generator that a process may use; this package's own data and sampling use none of them."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _random_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator that a process may use, in plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    np.random.set_state(tuple(state["numpy"]))
    random.setstate(state["python"])


def _metrics(losses: dict[str, float], found: Evaluation | None) -> dict[str, float]:
    values = {"loss": sum(losses.values()), **losses}
    if found is not None:
        values["val_loss"] = sum(found.losses.values())
        values |= {f"val_{name}": loss for name, loss in found.losses.items()}
        values |= {"AP": found.coco["AP"], "AP50": found.coco["AP50"], "VOC_AP": found.voc["map_area"]}
    return values
