"""A thin use of torch.distributed: processes started by torchrun work on one model, each on its own device.

Everything here works without torchrun, too, as the one process of a world of one. What brings processes together must
be called by every one of them, in the same order.
"""

import os
import time
import uuid
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

_T = TypeVar("_T")

#: How long a process waits for the others: the first one evaluates alone while they wait.
TIMEOUT = timedelta(minutes=60)
#: Seconds that the threads of torch get to let go of their last tensors.
LINGER = 0.2


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
    store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    own = dist.PrefixStore(_agree_on_name(store, rank, world), store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=TIMEOUT)
    return device


def _agree_on_name(store: dist.Store, rank: int, world: int) -> str:
    """A name that the processes of this start share, and no process of an earlier start had.

    torchrun keeps its store when it restarts the processes, and with it the addresses of the dead, which a quick
    process would read before its new partner has replaced them. Nor is torchrun's number of the restart the same on
    every node. So each process asks under a name of its own, and the first answers until all have told it so.

    Raises:
        TimeoutError: not all processes came within :data:`TIMEOUT`.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"ask/{rank}", own)
        name = store.get(f"answer/{own}").decode()
        store.set(f"{name}/{rank}", "here")
        return name
    end = time.monotonic() + TIMEOUT.total_seconds()
    for other in range(1, world):
        while not store.check([f"{own}/{other}"]):
            if time.monotonic() > end:
                raise TimeoutError(f"rank {other} of {world} has not come within {TIMEOUT}")
            if store.check([f"ask/{other}"]):  # by this process, or by one that is dead
                store.set(f"answer/{store.get(f'ask/{other}').decode()}", own)
            time.sleep(0.01)
    return own


def shutdown() -> None:
    """Leave the others; without them nothing happens.

    gloo's threads outlive this where a model was wrapped for data parallelism. One that lets go of a tensor when the
    interpreter has begun to end would abort the process (pytorch #190489), so they get a moment to do that before.
    """
    if _together():
        dist.destroy_process_group()
        time.sleep(LINGER)


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


def maximum(*values: int) -> list[int]:
    """The largest of each value over the processes; the same answer on all of them."""
    if not _together():
        return list(values)
    # On the CPU: nobody waits for a GPU's queue.
    largest = torch.tensor(values)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def mean_count(count: Tensor) -> Tensor:
    """Mean of a count over the processes, for a loss that each of them divides by it.

    The mean of such losses, and so of their gradients, is the whole batch's: ``sum(s / (n / R)) / R = sum(s) / n``.

    Args:
        count: ``()``, on this process's device.

    Returns:
        ``()`` float32; in a world of one, ``count`` itself.
    """
    if not _together():
        return count
    total = count.float()
    dist.all_reduce(total)
    return total / world_size()


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d with the statistics of all processes' batches, on the CPU; torch's own has a body for GPUs only.

    ``(x - mean) / sqrt(variance + eps) * weight + bias``; the running variance takes in the unbiased one. Every process
    must have at least one value.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, H, W)`` float activations."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        count = x.new_tensor(float(x.numel() // x.shape[1]))
        dist.all_reduce(count)
        mean = _sum(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = _sum(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum or 0.0)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum or 0.0)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]


def synchronize_norms(model: nn.Module) -> None:
    """Replace each BatchNorm2d by one whose statistics are those of all processes; names and values stay.

    Without other processes nothing happens.
    """
    if not _together():
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is not nn.BatchNorm2d:
                continue
            if child.weight.is_cuda:
                setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
            else:
                child.__class__ = SyncBatchNorm  # the same fields, another forward


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sum(x: Tensor) -> Tensor:
    return _SumOverRanks.apply(x)


class _SumOverRanks(torch.autograd.Function):
    """Sum over the processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total
