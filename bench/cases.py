"""What a benchmark is made of: a case has rivals, a comparison that must hold, and a count of its work."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from bench.timing import measure, peak_memory

#: Name of ours among the rivals.
OURS = "rcnn"
PEERS = ("torchvision", "torch")


@dataclass(frozen=True)
class Case:
    """One op on one input.

    Attributes:
        name: shape and kind of the input, for a reader.
        rivals: functions without arguments that do the same work, ``OURS`` first.
        gate: raises ``AssertionError`` if the rivals do not agree with each other and with the oracle.
        bytes: that must be read and written at least: each input and output once.
        operations: arithmetic operations on numbers of the storage type that the textbook way needs.
        dtype: storage type.
        grad: whether the rivals run a backward pass.
    """

    name: str
    rivals: dict[str, Callable[[], Any]]
    gate: Callable[[], None]
    bytes: int
    operations: int
    dtype: torch.dtype = torch.float32
    grad: bool = False


class OpSet(Protocol):
    """A file of this folder: ``cases(device, peers)``."""

    def cases(self, device: torch.device, peers: set[str]) -> Iterator[Case]:
        """The cases for a device, with those rivals of ``PEERS`` that are asked for."""


def run(op: str, case: Case, device: torch.device, peak: float, repeats: int, seconds: float) -> list[dict[str, Any]]:
    """Gate a case, then measure it.

    Args:
        op: name of the op-set.
        case: what to run.
        device: where.
        peak: the machine's copy bandwidth, bytes per second.
        repeats: timed calls of each rival.
        seconds: that the timing of the case should take at most, as far as 3 calls of each allow.

    Returns:
        One row per rival; ``speedup`` is against torchvision, or plain torch where torchvision is none of them.

    Raises:
        AssertionError: the gate does not hold.
    """
    with torch.set_grad_enabled(case.grad):
        case.gate()
        timings = measure(case.rivals, repeats, warmup=1, seconds=seconds, device=device, ahead=True)
        memory = {name: peak_memory(function, device) for name, function in case.rivals.items()}
    against = timings.get("torchvision") or timings.get("torch")
    return [
        {
            "op": op,
            "case": case.name,
            "dtype": str(case.dtype).removeprefix("torch."),
            "with": name,
            **asdict(timing),
            "bytes": case.bytes,
            "operations": case.operations,
            "bandwidth_share": case.bytes / timing.median / peak,
            "gigaoperations_per_second": case.operations / timing.median / 1e9,
            "peak_memory": memory[name],
            "speedup": None if against is None else against.median / timing.median,
        }
        for name, timing in timings.items()
    ]


def chosen(peers: set[str], **rivals: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """Ours and those of the others that are asked for."""
    return {name: function for name, function in rivals.items() if name == OURS or name in peers}
