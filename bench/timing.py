"""Timing of rival functions in turn, and the machine they ran on."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Seconds that one function takes, by the clock on the wall unless said otherwise.

    Attributes:
        median: of all repetitions.
        p20: a fifth of the repetitions were quicker.
        p80: a fifth of the repetitions were slower.
        best: the quickest repetition, the least disturbed by whatever else the machine did.
        processor: median of the processor time of all threads, which other programs disturb less.
        repeats: repetitions.
    """

    median: float
    p20: float
    p80: float
    best: float
    processor: float
    repeats: int


def measure(rivals: dict[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> dict[str, Timing]:
    """Time each function ``repeats`` times, in turn, so that a disturbance meets them all alike.

    Args:
        rivals: functions without arguments by name.
        repeats: timed calls of each.
        warmup: calls of each before that.
    """
    for function in rivals.values():
        for _ in range(warmup):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    busy: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, function in rivals.items():
            start, spent = time.perf_counter(), time.process_time()
            function()
            seconds[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - spent)
    return {
        name: Timing(
            *(float(np.percentile(values, q)) for q in (50, 20, 80)), min(values), float(np.median(busy[name])), repeats
        )
        for name, values in seconds.items()
    }


def machine() -> dict[str, Any]:
    """What a reader needs to place the figures: processor, threads, versions, commit."""
    info: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }
    try:
        import torchvision

        info["torchvision"] = torchvision.__version__
    except ImportError:
        info["torchvision"] = None
    return info


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
