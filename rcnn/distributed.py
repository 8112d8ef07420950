"""A thin use of torch.distributed: processes started by torchrun work on one model, each on its own device.

Everything here works without torchrun, too, as the one process of a world of one. What brings processes together must
be called by every one of them, in the same order.
"""

import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_T = TypeVar("_T")

#: How long a process waits for the others: the first one evaluates alone while they wait.
TIMEOUT = timedelta(minutes=60)


def init(device: torch.device) -> torch.device:
    """Join the other processes if torchrun started this one (environment: RANK, WORLD_SIZE, LOCAL_RANK).

    Tensors on a GPU travel by NCCL; those on the CPU, and objects, by gloo.

    Args:
        device: the kind of device to work on, ``cpu`` or ``cuda``.

    Returns:
        The device of this process: ``cuda:LOCAL_RANK`` for ``cuda`` under torchrun, else ``device``.

    Raises:
        ValueError: torchrun started more processes than there are GPUs, or the environment is incomplete.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return device
    try:
        local = int(os.environ["LOCAL_RANK"])
    except (KeyError, ValueError):
        got = os.environ.get("LOCAL_RANK")
        raise ValueError(
            f"LOCAL_RANK must be a number beside RANK and WORLD_SIZE (start by torchrun), got {got}"
        ) from None
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(
                f"--nproc_per_node must be at most the number of GPUs here ({gpus}), got {local + 1} or more"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return device


def shutdown() -> None:
    """Leave the others; without them nothing happens."""
    if _together():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, 0 for the first."""
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _together() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if _together():
        dist.barrier()


def broadcast(value: _T) -> _T:
    """The first process's ``value``, on every process.

    Args:
        value: anything that can be pickled; counts on the first process alone.
    """
    if not _together():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_objects(value: _T) -> list[_T] | None:
    """Bring every process's ``value`` to the first one.

    Args:
        value: anything that can be pickled.

    Returns:
        The values in the order of the ranks on the first process, None on the others.
    """
    if not _together():
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values, dst=0)
    return values


def mean(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean over the processes, each of the same weight.

    Args:
        values: name -> ``()`` float, the same names in the same order on every process, on its device.

    Returns:
        Name -> ``()`` float32 without gradient.
    """
    if not _together() or not values:
        return {name: value.detach() for name, value in values.items()}
    together = torch.stack([value.detach().float() for value in values.values()])
    dist.all_reduce(together)
    return dict(zip(values, together / world_size(), strict=True))


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of the first process.

    Args:
        tensors: the same number and shapes on every process, on its device.
    """
    if _together():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is true on any process; the same answer on all of them."""
    if not _together():
        return flag
    # On the CPU: nobody waits for a GPU's queue.
    seen = torch.tensor(int(flag))
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    return bool(seen)


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
