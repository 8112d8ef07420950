"""What a run tells its reader: progress bar or plain lines, metrics.jsonl, results.csv and TensorBoard events."""

import csv
import io
import json
import math
import numbers
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from rcnn.files import write_text

#: The files in the run folder.
METRICS, RESULTS, EVENTS = "metrics.jsonl", "results.csv", "tensorboard"
#: Points of a precision-recall curve in TensorBoard; its format has no room for more.
THRESHOLDS = 127


def tags(losses: Mapping[str, float], total: str, prefix: str = "") -> dict[str, float]:
    """The TensorBoard tags of the original documentation from the losses' own names.

    ``rpn_loss = loss_objectness + loss_rpn_box_reg``, ``cross_entropy = loss_classifier``, ``loss_box = loss_box_reg``.

    Args:
        losses: loss name -> value; other names count only in the total.
        total: tag of the sum of all losses.
        prefix: put before each of the other tags.

    Returns:
        Tag -> value, for those tags whose losses are all given.
    """
    parts = {
        "rpn_loss": ("loss_objectness", "loss_rpn_box_reg"),
        "cross_entropy": ("loss_classifier",),
        "loss_box": ("loss_box_reg",),
    }
    values = {total: sum(losses.values())} if losses else {}
    for tag, names in parts.items():
        if all(name in losses for name in names):
            values[prefix + tag] = sum(losses[name] for name in names)
    return values


class Events:
    """TensorBoard events, written at once.

    tensorboardX's own ``SummaryWriter`` hands them to a thread, which dies if the disk fills up or the clock jumps; the
    run would then wait for it for ever.

    Args:
        folder: made if need be.
        begin: a step from which on readers drop what earlier files of the folder hold; None: nothing is dropped.
        suffix: of the file's name.

    Raises:
        OSError: the file cannot be written; so do the methods.
    """

    def __init__(self, folder: str | os.PathLike[str], begin: int | None = None, suffix: str = "") -> None:
        # Here, so that no other use of the package pays for the import.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._make, self._event = summary, Event
        os.makedirs(folder, exist_ok=True)
        self._writer = EventsWriter(os.path.join(folder, "events"), suffix)
        if begin is not None:
            for mark in ({"file_version": "brain.Event:2"}, {"session_log": SessionLog(status=SessionLog.START)}):
                self._writer.write_event(Event(wall_time=time.time(), step=begin, **mark))

    def add_scalar(self, tag: str, value: float, step: int, wall_time: float | None = None) -> None:
        """Write a value; ``wall_time`` None is now."""
        self._add(self._make.scalar(tag, value), step, wall_time)

    def add_image(self, tag: str, array: np.ndarray, step: int) -> None:
        """Write a picture, ``(H, W, 3)`` uint8, RGB."""
        self._add(self._make.image(tag, array, dataformats="HWC"), step, None)

    def add_curve(self, tag: str, rows: Sequence[np.ndarray], step: int) -> None:
        """Write a precision-recall curve.

        Args:
            tag: its name.
            rows: true and false positives, true and false negatives, precision and recall, each ``(THRESHOLDS,)``.
            step: optimiser steps finished.
        """
        self._add(self._make.pr_curve_raw(tag, *rows, THRESHOLDS, None), step, None)

    def _add(self, summary: Any, step: int, wall_time: float | None) -> None:
        now = time.time() if wall_time is None else wall_time
        self._writer.write_event(self._event(summary=summary, step=step, wall_time=now))

    def flush(self) -> None:
        """Bring everything to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Bring everything to the disk, and write no more."""
        self._writer.close()


class Tracker:
    """Writes down the steps and epochs of one run, and shows them.

    On a terminal there is a progress bar with the latest values under it, elsewhere one plain line for each call of
    :meth:`step` that brings losses. Nothing is opened before the first step or epoch: ``epochs``, ``total_steps``,
    ``resume_step`` and ``resume_evaluated`` may be set until then.

    Args:
        run_dir: the run folder; made if need be. None: a process that neither writes nor shows anything.
        total_steps: optimiser steps of the whole run; 0: not known.
        epochs: of the whole run; 0: not known.
        resume_step: steps that the run being continued had finished; what the folder's files hold beyond it is dropped,
            so that nothing is there twice. 0 begins anew. The row of an epoch that ends there goes, too, unless
            ``resume_evaluated`` is set: a state is saved before its evaluation, as a rule, and that is made again.
        console: where to show; None: standard output.
    """

    def __init__(
        self,
        run_dir: Path | None,
        total_steps: int = 0,
        *,
        epochs: int = 0,
        resume_step: int = 0,
        console: Console | None = None,
    ) -> None:
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.epochs, self.total_steps, self.resume_step = epochs, total_steps, resume_step
        self.resume_evaluated = False
        self._console = console or Console()
        self._jsonl: IO[str] | None = None
        self._events: Events | None = None
        self._bar: _Bar | None = None
        self._rows: list[dict[str, Any]] = []
        self._before = 0.0
        self._start = time.perf_counter()
        self._step, self._lr = resume_step, math.nan
        self._images, self._data_time, self._step_time = 0, 0.0, 0.0

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen and close the files; a later step opens nothing again."""
        if self._bar is not None:
            self._bar.stop()
        if self._jsonl is not None:
            self._jsonl.close()
        if self._events is not None:
            self._events.close()
        self.run_dir = None

    def step(
        self,
        epoch: int,
        step: int,
        losses: Mapping[str, float],
        lr: float,
        images: int,
        data_time: float,
        step_time: float,
    ) -> None:
        """Count a finished step; with losses, also write and show a row.

        Args:
            epoch: epochs finished before this step; rows count from 1.
            step: optimiser steps finished, this one included.
            losses: loss name -> value. Empty: the step counts only towards the speed of the next row, and nobody has to
                wait for the device.
            lr: learning rate of this step.
            images: in this step, over all processes.
            data_time: seconds that this step waited for its batch.
            step_time: seconds from the end of the step before to the end of this one, ``data_time`` included.
        """
        if self.run_dir is None:
            return
        self._open()
        self._step, self._lr = step, lr
        self._images += images
        self._data_time += data_time
        self._step_time += step_time
        if losses:
            self._log(epoch, losses)
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0], completed=step, description=self._of("epoch", epoch + 1, self.epochs)
            )

    def epoch(self, epoch: int, values: Mapping[str, Any]) -> None:
        """Write and show the row of a finished epoch.

        Args:
            epoch: epochs finished, this one included.
            values: name -> number or text: the epoch's mean losses under their own names, those of the validation with
                ``val_`` before, ``AP``, ``AP50`` and others. Rows may differ in their names.
        """
        if self.run_dir is None:
            return
        self._open()
        row = {"epoch": epoch, "step": self._step, "seconds": round(self._seconds(), 1), "lr": self._lr, **values}
        self._write_line({"kind": "epoch", **row})
        self._rows.append({name: _plain(value) for name, value in row.items()})
        write_text(self.run_dir / RESULTS, _to_csv(self._rows))
        validation = {name.removeprefix("val_"): v for name, v in values.items() if name.startswith("val_loss_")}
        self._scalars(tags(validation, "val_loss", "val_") | {k: values[k] for k in ("AP", "AP50") if k in values})
        shown = (f"{name} {value:.4f}" for name, value in values.items() if isinstance(value, float))
        self.message("  ".join([f"{self._of('epoch', epoch, self.epochs)} done", *shown]))

    def message(self, text: str) -> None:
        """Show a line of text, above the bar if there is one."""
        if self.run_dir is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def image(self, tag: str, array: np.ndarray, step: int | None = None) -> None:
        """Add a picture to the TensorBoard events.

        Args:
            tag: name of the picture.
            array: ``(H, W, 3)`` uint8, RGB.
            step: optimiser steps finished; None: those of the last row.
        """
        if self.run_dir is None:
            return
        self._open()
        if self._events is not None:
            self._events.add_image(tag, array, self._step if step is None else step)

    def precision_recall(
        self, tag: str, scores: np.ndarray, hits: np.ndarray, objects: int, step: int | None = None
    ) -> None:
        """Add a precision-recall curve to the TensorBoard events, by thresholds of the score.

        Where no detection reaches a threshold the precision is 1. Detection knows no true negatives; their count is 0.

        Args:
            tag: name of the curve.
            scores: ``(M,)`` float, falling, 0..1.
            hits: ``(M,)`` int, how many of the first i + 1 detections hit an object.
            objects: that are to be found, at least 1.
            step: optimiser steps finished; None: those of the last row.
        """
        if self.run_dir is None:
            return
        self._open()
        taken = np.searchsorted(-scores, -np.linspace(0, 1, THRESHOLDS), side="right")
        found = np.concatenate(([0], hits))[taken]
        precision = np.where(taken > 0, found / np.maximum(taken, 1), 1.0)
        counts = found, taken - found, np.zeros(THRESHOLDS), objects - found
        if self._events is not None:
            at = self._step if step is None else step
            self._events.add_curve(tag, [*counts, precision, found / objects], at)

    def _open(self) -> None:
        if self._jsonl is not None or self.run_dir is None:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._keep_until(self.run_dir, self.resume_step)
        self._jsonl = open(self.run_dir / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        self._events = Events(self.run_dir / EVENTS, self.resume_step + 1, f".{self.resume_step}")
        self._step = self.resume_step
        self._start = time.perf_counter()
        if self._console.is_terminal:
            self._bar = _Bar(
                TextColumn("{task.description}"),
                BarColumn(None),
                MofNCompleteColumn(),
                console=self._console,
                expand=True,
            )
            self._bar.add_task("", total=self.total_steps or None, completed=self.resume_step)
            self._bar.start()

    def _keep_until(self, folder: Path, step: int) -> None:
        # A run that was killed may have torn its last line: what does not parse goes, too.
        lines = []
        if step and (folder / METRICS).is_file():
            for line in (folder / METRICS).read_text("utf-8", errors="replace").splitlines():
                try:
                    row = json.loads(line)
                    kept = row["step"] < step + (row["kind"] == "step" or self.resume_evaluated)
                except (ValueError, KeyError, TypeError):
                    kept = False
                if kept:
                    lines.append(line + "\n")
                    self._lr = row.get("lr", math.nan)
        if step and (folder / RESULTS).is_file():
            text = (folder / RESULTS).read_text("utf-8", errors="replace")
            for row in csv.DictReader(io.StringIO(text)):
                if (row.get("step") or "").isdigit() and int(row["step"]) < step + self.resume_evaluated:
                    self._rows.append({name: value for name, value in row.items() if value})
                    self._before = _number(row.get("seconds"))
        write_text(folder / METRICS, "".join(lines))
        write_text(folder / RESULTS, _to_csv(self._rows))

    def _log(self, epoch: int, losses: Mapping[str, float]) -> None:
        seconds = max(self._step_time, 1e-9)
        speed, waiting = self._images / seconds, self._data_time / seconds
        memory, eta = _peak_memory(), self._eta()
        self._images, self._data_time, self._step_time = 0, 0.0, 0.0
        values = {name: float(value) for name, value in losses.items()}
        total = sum(values.values())
        row: dict[str, Any] = {"kind": "step", "epoch": epoch + 1, "step": self._step, "loss": total, **values}
        row |= {
            "lr": self._lr,
            "images_per_second": speed,
            "data_share": waiting,
            "memory_mb": memory,
            "eta_seconds": eta,
        }
        self._write_line(row)
        self._scalars(tags(values, "train_loss") | {"lr": self._lr})
        parts = [f"loss {total:.4f}", *(f"{name} {value:.4f}" for name, value in values.items())]
        parts += [f"lr {self._lr:.3g}", f"{speed:.1f} img/s", f"data {100 * waiting:.0f}%"]
        parts += [] if memory is None else [f"mem {memory:.0f} MB"]
        parts += [] if eta is None else [f"eta {_clock(eta)}"]
        if self._bar is not None:
            self._bar.status = "  ".join(parts)
        else:
            where = [self._of("epoch", epoch + 1, self.epochs), self._of("step", self._step, self.total_steps)]
            self.message("  ".join(where + parts))

    def _write_line(self, row: Mapping[str, Any]) -> None:
        if self._jsonl is not None:
            self._jsonl.write(json.dumps({k: _plain(v) for k, v in row.items()}, allow_nan=False) + "\n")
            self._jsonl.flush()

    def _scalars(self, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            if self._events is not None and math.isfinite(value):
                self._events.add_scalar(tag, value, self._step)
        if self._events is not None:
            self._events.flush()

    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    def _eta(self) -> float | None:
        done = self._step - self.resume_step
        if not self.total_steps or done <= 0:
            return None
        return (time.perf_counter() - self._start) / done * max(self.total_steps - self._step, 0)

    @staticmethod
    def _of(what: str, number: int, total: int) -> str:
        return f"{what} {number}/{total}" if total else f"{what} {number}"


class _Bar(Progress):
    """A progress bar with a line of text under it."""

    status = ""

    def get_renderables(self) -> Any:
        yield from super().get_renderables()
        status: RenderableType = Text(self.status, overflow="fold")
        yield status


def _plain(value: Any) -> Any:
    # JSON has no word for what is not finite.
    if isinstance(value, torch.Tensor | np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, numbers.Real) and not math.isfinite(value):
        return None
    return value


def _to_csv(rows: list[dict[str, Any]]) -> str:
    # Columns in order of first appearance; a row without a value leaves its cell empty.
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    if names:
        writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def _peak_memory() -> float | None:
    """The most memory in use so far, megabytes: of the GPU once this process uses one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
