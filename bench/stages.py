"""Where the time of a step goes: marks at the borders of its stages, set from outside and taken away again.

Each function that makes up a stage is wrapped while a step is looked at. A stage inside another one interrupts it, so
that every moment belongs to exactly one, and what belongs to none is the rest.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from rcnn import kernels
from rcnn.models import roi_heads, rpn
from rcnn.models.faster_rcnn import FasterRCNN

#: In the order of a step. ``input`` is normalisation, for torchvision its whole transform.
STAGES = (
    "input", "trunk", "RPN head", "proposals", "matching", "RoI", "heads", "losses", "detections", "backward",
    "optimiser", "rest",
)  # fmt: skip

#: Owner and name of a function, and the stage that it is.
Part = tuple[Any, str, str]


def step_parts(optimizer: torch.optim.Optimizer) -> list[Part]:
    """What :class:`rcnn.engine.Step` does after the forward pass."""
    return [
        (Tensor, "backward", "backward"),
        (nn.utils, "clip_grad_norm_", "optimiser"),
        (optimizer, "step", "optimiser"),
    ]


def our_parts(model: FasterRCNN) -> list[Part]:
    """The stages of this package's detector."""
    heads = model.roi_heads
    return [
        (model, "_features", "input"),
        (model.backbone, "forward", "trunk"),
        (model.rpn.head, "forward", "RPN head"),
        (kernels, "anchors", "proposals"),
        (kernels, "proposals", "proposals"),
        (kernels, "match_anchors", "matching"),
        (kernels, "match_proposals", "matching"),
        (heads, "pool", "RoI"),
        (heads.box_head, "forward", "heads"),
        (heads.box_predictor, "forward", "heads"),
        (rpn, "rpn_losses", "losses"),
        (roi_heads, "roi_losses", "losses"),
        (kernels, "detections", "detections"),
    ]


def their_parts(net: nn.Module) -> list[Part]:
    """The stages of a detector of torchvision's parts."""
    from torchvision.models.detection import roi_heads
    from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

    rpn: Any = net.rpn
    heads: Any = net.roi_heads
    return [
        *([(net.transform, "forward", "input")] if hasattr(net, "transform") else []),
        (net.backbone, "forward", "trunk"),
        (rpn.head, "forward", "RPN head"),
        (rpn.anchor_generator, "forward", "proposals"),
        (rpn.box_coder, "decode", "proposals"),
        (rpn, "filter_proposals", "proposals"),
        (rpn, "assign_targets_to_anchors", "matching"),
        (rpn.box_coder, "encode", "matching"),
        (BalancedPositiveNegativeSampler, "__call__", "matching"),
        (rpn, "compute_loss", "losses"),
        (heads, "select_training_samples", "matching"),
        (heads.box_roi_pool, "forward", "RoI"),
        (heads.box_head, "forward", "heads"),
        (heads.box_predictor, "forward", "heads"),
        (roi_heads, "fastrcnn_loss", "losses"),
        (heads, "postprocess_detections", "detections"),
    ]


class _Marks:
    """The stage that is entered at each moment: of the stream on a GPU, by the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.within, self.marks = device, ["rest"], list[tuple[str, Any]]()

    def mark(self) -> None:
        moment: Any = time.perf_counter()
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.marks.append((self.within[-1], moment))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.within.append(name)
        self.mark()
        try:
            yield
        finally:
            self.within.pop()
            self.mark()

    def seconds(self) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        taken = dict.fromkeys(STAGES, 0.0)
        for (name, start), (_, stop) in zip(self.marks, self.marks[1:], strict=False):
            taken[name] += start.elapsed_time(stop) / 1e3 if self.device.type == "cuda" else stop - start
        return taken


def stages(function: Callable[[], Any], parts: list[Part], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each stage of a call; those that take none are left out.

    On a GPU, whose events are marks on the stream, a stage has its gaps between kernels in it: see :func:`idle`.

    Args:
        function: the call.
        parts: its stages.
        repeats: calls.
        device: where it works.
    """
    rounds = []
    with ExitStack() as wrapped:
        marks = _Marks(device)

        def wrap(inner: Callable[..., Any], name: str) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                with marks.stage(name):
                    return inner(*args, **kwargs)

            return call

        for owner, attribute, name in parts:
            wrapped.enter_context(patch.object(owner, attribute, wrap(getattr(owner, attribute), name)))
        for _ in range(repeats):
            marks.marks.clear()
            marks.mark()
            function()
            marks.mark()
            rounds.append(marks.seconds())
    medians = {name: float(np.median([each[name] for each in rounds])) for name in STAGES}
    return {name: seconds for name, seconds in medians.items() if seconds}


def idle(function: Callable[[], Any], seconds: float, device: torch.device) -> float | None:
    """Share of a call's time in which a GPU does nothing; None on a CPU.

    Args:
        function: the call.
        seconds: that it takes while nobody looks; the profiler gives the time at work, which it does not change.
        device: where it works.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return max(0.0, 1 - busy(events) / seconds)


def busy(events: list[dict[str, Any]]) -> float:
    """Seconds in which at least one kernel, copy or fill of a profiler's trace was at work."""
    work = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    total, end = 0.0, -float("inf")
    for start, stop in work:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e6
