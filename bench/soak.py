"""``python -m bench.soak``: does a long run keep its memory, its file handles and its threads?

Trains the tiny model on small generated pictures the way ``rcnn train`` does: loading processes, log, evaluations and
checkpoints included. Looks every few steps at the process and its children, and after a warm-up fits a line to the
lows of memory. Exits with 1 if that rises by 1 MB or more in 1,000 steps, or if there are ever more handles or threads.
"""

import argparse
import contextlib
import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.options import check_out
from bench.timing import machine
from rcnn import detector, training
from rcnn.config import LoaderConfig, ModelConfig, TrainConfig, resolve
from rcnn.data import flowers, open_dataset
from rcnn.files import write_json
from rcnn.tracking import Tracker

#: Pictures of the data set, 5 in 7 of which train, and how many make a step: 50 steps an epoch.
IMAGES, BATCH = 140, 2
#: MB that memory may rise by in 1,000 steps.
LIMIT = 1.0
#: Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
#: Lines of ``/proc/PID/status`` that count.
_KINDS = "RssAnon", "RssShmem", "VmSwap"
#: Rows of the table that is printed.
_ROWS = 20


@dataclass(frozen=True)
class Sample:
    """What a process and its children hold at a moment.

    Attributes:
        step: steps taken.
        memory: resident memory of each, summed, MB (of 1e6 bytes): anonymous and shared, what is swapped out included.
            A page that several of them share since the fork counts in each, so that a write to it, which gives the
            writer a copy, changes nothing. Pages of files, as of libraries, do not count: the system takes them back
            at will, and other programs share them.
        files: open file handles.
        threads: of all of them.
        processes: how many they are.
    """

    step: int
    memory: float
    files: int
    threads: int
    processes: int


class Watch(Tracker):
    """A tracker that takes a :class:`Sample` every few steps.

    Args:
        run_dir: the run folder.
        every: steps from one sample to the next.
        console: where the log goes.
    """

    def __init__(self, run_dir: Path, every: int, console: Console) -> None:
        super().__init__(run_dir, console=console)
        self.every = every
        self.samples: list[Sample] = []

    def step(self, epoch: int, step: int, *values: Any) -> None:
        """Count the step, and look."""
        super().step(epoch, step, *values)
        if step % self.every == 0:
            self.samples.append(sample(step))


def sample(step: int) -> Sample:
    """Look at this process and its children, by Linux's ``/proc``."""
    memory, files, threads, processes = 0.0, 0, 0, 0
    for process in _family(Path("/proc/self").resolve()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            lines = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            if _KINDS[0] not in lines:  # it has ended, and nobody has asked for its exit code yet
                continue
            memory += sum(int(lines[kind].split()[0]) for kind in _KINDS) * 1024 / 1e6
            files += len(os.listdir(process / "fd"))
            threads += len(os.listdir(process / "task"))
            processes += 1
    return Sample(step, round(memory, 3), files, threads, processes)


def _family(process: Path) -> list[Path]:
    children: list[str] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in (process / "task").iterdir():
            children += (thread / "children").read_text().split()
    return [process, *(one for child in children for one in _family(process.parent / child))]


def give_back_large_blocks() -> None:
    """Make the allocator give each block of 128 KiB or more back to the system when it is freed.

    glibc raises that size as a program goes on, and then keeps tens of megabytes of freed blocks, now more, now less: a
    noise in which a small leak would hide. Other allocators are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(parameter, 128 << 10)


def slope(samples: Sequence[Sample], window: int) -> float:
    """MB that memory rises by in 1,000 steps: the line of least squares through the lowest sample of each window.

    Checkpoints and evaluations come and go, and the allocator keeps what they took for a while. What is lost for good
    lifts the lows.

    Args:
        samples: of at least two windows.
        window: steps.
    """
    lows: dict[int, Sample] = {}
    for one in samples:
        number = (one.step - 1) // window
        lows[number] = min(one, lows.get(number, one), key=lambda found: found.memory)
    line = np.polyfit([one.step for one in lows.values()], [one.memory for one in lows.values()], 1)
    return float(line[0]) * 1000


def amiss(samples: Sequence[Sample], window: int) -> list[str]:
    """A sentence for each thing that grows.

    Memory grows by its :func:`slope`. Handles and threads grow if the second half of the samples ever has more of them
    than the first half had.

    Args:
        samples: after the warm-up, of at least two windows.
        window: steps.
    """
    found = []
    if (rise := slope(samples, window)) >= LIMIT:
        found.append(f"memory rises by {rise:.2f} MB in 1,000 steps; the limit is {LIMIT:g}")
    half = len(samples) // 2
    for name in ("files", "threads"):
        before, after = (max(getattr(one, name) for one in part) for part in (samples[:half], samples[half:]))
        if after > before:
            found.append(f"{name} grow from {before} to {after}")
    return found


def run(steps: int, every: int, workers: int, folder: Path) -> list[Sample]:
    """Train for ``steps`` steps, rounded up to whole epochs.

    Args:
        steps: of the optimiser.
        every: steps from one sample to the next.
        workers: loading processes.
        folder: for the data and the run.
    """
    data = flowers.write(folder / "flowers", IMAGES)
    train_set = open_dataset(str(data), "train")
    val_set = open_dataset(str(data), "val", classes=train_set.classes)
    config = resolve(
        TrainConfig(
            epochs=-(-steps // -(-len(train_set) // BATCH)),
            save_interval=25,
            max_bad_steps=1,
            model=ModelConfig(min_size=64, max_size=96),
            loader=LoaderConfig(batch_size=BATCH, workers=workers),
        )
    )
    config.optim.ema = 0.999
    torch.manual_seed(config.seed)
    model = detector.build(config.model, train_set.classes, config.seed)
    out = folder / "run"
    out.mkdir()
    with open(folder / "log.txt", "w", encoding="utf-8") as log, Watch(out, every, Console(file=log)) as watch:
        training.train(config, model, train_set, val_set, out, watch)
    return watch.samples


def main(arguments: list[str] | None = None) -> None:
    """Parse, run, print, write, judge."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=2000, help="of the optimiser (default: 2000)")
    parser.add_argument("--every", type=int, default=10, help="steps between two samples (default: 10)")
    parser.add_argument("--warmup", type=int, default=500, help="steps before the line begins (default: 500)")
    parser.add_argument(
        "--window", type=int, default=100, help="steps of which the lowest sample counts (default: 100)"
    )
    parser.add_argument("--workers", type=int, default=2, help="loading processes (default: 2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    options = parser.parse_args(arguments)
    for name in ("warmup", "workers"):
        if (given := getattr(options, name)) < 0:
            parser.error(f"--{name} must not be negative, got {given}")
    if not 1 <= options.every <= options.window:
        parser.error(f"--every must be between 1 and --window ({options.window}), got {options.every}")
    if options.warmup + 2 * options.window > options.steps:
        parser.error(f"--steps must leave two windows after the warm-up, got {options.steps}")
    if not Path("/proc/self/status").exists():
        parser.exit(1, "python -m bench.soak reads /proc/PID/status, which only Linux has\n")
    check_out(parser, options.out)
    give_back_large_blocks()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        samples = run(options.steps, options.every, options.workers, Path(folder))
    seconds = time.perf_counter() - start
    judged = [one for one in samples if one.step > options.warmup]
    rise, problems = slope(judged, options.window), amiss(judged, options.window)
    table = Table("step", "memory, MB", "file handles", "threads", "processes", title="soak")
    for one in samples[:: -(-len(samples) // _ROWS)]:
        table.add_row(str(one.step), f"{one.memory:.1f}", str(one.files), str(one.threads), str(one.processes))
    Console(width=None if sys.stdout and sys.stdout.isatty() else 100).print(table)
    print(f"{samples[-1].step} steps in {seconds:.0f} s; after {options.warmup}: {rise:+.3f} MB in 1,000 steps")
    print("\n".join(problems) or "memory, file handles and threads stay as they are")
    if options.out is not None:
        settings = {key: getattr(options, key) for key in ("steps", "every", "warmup", "window", "workers")}
        result = {"machine": machine(), **settings, "seconds": seconds, "slope": rise, "amiss": problems}
        write_json(options.out, {**result, "samples": [asdict(one) for one in samples]})
        print(f"written: {options.out}")
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    main()
