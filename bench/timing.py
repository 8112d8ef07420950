"""Timing of rival functions in turn, the memory that they take, and the machine they ran on."""

import json
import math
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: Bytes written between two timed calls on a GPU: more than the largest second-level cache.
FLUSH = 256 << 20
#: So often at most, to hide what the host needs for a call: a few milliseconds. One that itself waits cannot be hidden.
FILLS = 100
#: Bytes of the buffer whose copy gives the machine's bandwidth: GPU, CPU (far more than the caches hold).
COPIED = {"cuda": 1 << 30, "cpu": 256 << 20}


@dataclass(frozen=True)
class Timing:
    """Seconds that one function takes: by CUDA events on a GPU, else by the clock on the wall.

    Attributes:
        median: of all repetitions.
        p20: a fifth of the repetitions were quicker.
        p80: a fifth of the repetitions were slower.
        best: the quickest repetition, the least disturbed by whatever else the machine did.
        processor: on a CPU, median of the processor time of all threads, which other programs disturb less; on a GPU,
            median of the host's time until the call returns: what launches cost, checks included.
        repeats: repetitions.
    """

    median: float
    p20: float
    p80: float
    best: float
    processor: float
    repeats: int


def measure(
    rivals: dict[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 2,
    seconds: float = float("inf"),
    device: torch.device | str = "cpu",
    ahead: bool = False,
) -> dict[str, Timing]:
    """Time each function ``repeats`` times, in turn, so that a disturbance meets them all alike.

    On a GPU each call finds the second-level cache full of something else.

    Args:
        rivals: functions without arguments by name.
        repeats: timed calls of each.
        warmup: calls of each before that.
        seconds: fewer calls, though at least 3 of each, where all together would take longer.
        device: where they work.
        ahead: a GPU is kept busy until the host has queued the call, so that what the host needs is no part of the
            call's seconds, other than in waits of its own. Without it gaps count, as they do in a step of training.
    """
    once = _on_gpu(torch.device(device), ahead) if torch.device(device).type == "cuda" else _on_cpu
    start = time.perf_counter()
    for function in rivals.values():
        for _ in range(warmup):
            once(function)
    turn = (time.perf_counter() - start) / max(1, warmup)
    if warmup:
        repeats = int(max(min(repeats, 3), min(repeats, seconds / max(turn, 1e-9))))
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, function in rivals.items():
            taken[name].append(once(function))
    timings = {}
    for name, pairs in taken.items():
        clock, processor = np.array(pairs).T
        p20, median, p80 = (float(np.percentile(clock, q)) for q in (20, 50, 80))
        timings[name] = Timing(median, p20, p80, float(clock.min()), float(np.median(processor)), repeats)
    return timings


def _on_cpu(function: Callable[[], Any]) -> tuple[float, float]:
    start, spent = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - spent


def _on_gpu(device: torch.device, ahead: bool) -> Callable[[Callable[[], Any]], tuple[float, float]]:
    buffer = torch.empty(FLUSH, dtype=torch.uint8, device=device)

    def seconds(function: Callable[[], Any], fills: int) -> float:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(fills):
            buffer.zero_()
        first.record()
        function()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    fill = min(seconds(buffer.zero_, 3) for _ in range(5))

    def once(function: Callable[[], Any]) -> tuple[float, float]:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        host = time.perf_counter() - start
        torch.cuda.synchronize(device)
        # The host runs ahead while the buffer is written: half as long again as it needed a moment ago.
        fills = 1 + min(FILLS, math.ceil(1.5 * host / fill)) if ahead else 1
        return seconds(function, fills), host

    return once


def peak_memory(function: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Most bytes that a call holds at a time beyond what was there before it, its result included.

    On a GPU by the counters of torch's allocator; on a CPU by the record that torch's profiler keeps of every
    allocation, those inside compiled operators included.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    changes.sort(key=lambda event: event["ts"])
    return int(np.cumsum([0, *(event["args"]["Bytes"] for event in changes)]).max())


def bandwidth(device: torch.device | str) -> float:
    """Bytes per second, read and written, of a large copy: what the machine's memory gives at best."""
    kind = torch.device(device).type
    source = torch.zeros(COPIED[kind], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    timing = measure({"copy": lambda: target.copy_(source)}, 20, device=device)["copy"]
    return 2 * COPIED[kind] / timing.median


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a reader needs to place the figures: processor, GPU and driver, versions, commit."""
    info: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "commit": _commit(),
    }
    if torch.device(device).type == "cuda":
        name, driver = (
            torch.cuda.get_device_name(device),
            _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        )
        cupy = next((found for major in (13, 12) if (found := _version(f"cupy-cuda{major}x"))), _version("cupy"))
        info |= {"gpu": name, "driver": driver and driver.splitlines()[0], "cuda": torch.version.cuda, "cupy": cupy}
    return info


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    return _run("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12")


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
