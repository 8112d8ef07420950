"""A training step as a CUDA graph: recorded once for each shape of batch, then replayed by one launch.

Recording asks three things of a step, which this package's keeps: fixed shapes, no wait for the host, and everything
that changes from step to step in tensors on the device: batch, learning rate, number of the step, loss scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rcnn.data.batch import Batch
from rcnn.kernels.anchors import kept
from rcnn.structures import Targets

#: Steps of a shape that run as usual before it is recorded: they choose algorithms, compile kernels, make states.
WARMUP = 3
#: Shapes that are recorded; others run as usual.
MOST = 16


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: list[Batch]
    output: Tensor
    held: list[Tensor]  # memory of elsewhere that the graph reads


class GraphedStep:
    """A step that is recorded and replayed where it can be, and runs as usual where not.

    All steps are real ones: the first of each shape run as usual, then one is recorded, which does nothing yet, and
    replayed. The graphs share one pool of memory, since they never run at the same time. A step that cannot be recorded
    is told in a sentence once, and all later ones run as usual.

    Args:
        step: takes the batches of a step on the device; gives its results, a tensor on the device that is read before
            the next step.
        optimizer: whose learning rates become tensors on the device here; write them with ``fill_``.
        device: a CUDA device.
        tell: takes a sentence.
    """

    def __init__(
        self,
        step: Callable[[Sequence[Batch]], Tensor],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        tell: Callable[[str], None],
    ) -> None:
        self.step, self.optimizer, self.device, self.tell = step, optimizer, device, tell
        self.recorded: dict[tuple[torch.Size, ...], _Recorded] = {}
        self.seen: dict[tuple[torch.Size, ...], int] = {}
        self.broken = False
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        for group in optimizer.param_groups:
            group["lr"] = torch.full((), float(group["lr"]), device=device)
            if "capturable" in group:
                group["capturable"] = True

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        """Take a step."""
        if self.broken:
            return self.step(batches)
        key = tuple(tensor.shape for batch in batches for tensor in batch.tensors())
        recorded = self.recorded.get(key)
        if recorded is None:
            seen = self.seen[key] = self.seen.get(key, 0) + 1
            if seen <= WARMUP or len(self.recorded) == MOST:
                return self._as_usual(batches)
            recorded = self._record(batches)
            if recorded is None:
                return self.step(batches)
            self.recorded[key] = recorded
        for static, batch in zip(recorded.inputs, batches, strict=True):
            for target, source in zip(static.tensors(), batch.tensors(), strict=True):
                target.copy_(source, non_blocking=True)
        recorded.graph.replay()
        return recorded.output

    def _as_usual(self, batches: Sequence[Batch]) -> Tensor:
        """On the stream that records later, as torch asks for: autograd remembers streams."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            output = self.step(batches)
        current.wait_stream(self.stream)
        output.record_stream(current)
        return output

    def _record(self, batches: Sequence[Batch]) -> _Recorded | None:
        inputs = [_copy(batch) for batch in batches]
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        try:
            # The outer context gives the stream back even if ending a failed recording fails as well. Other threads may
            # use CUDA meanwhile: the loader's allocates page-locked memory.
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                output = self.step(inputs)
        except RuntimeError as error:
            self.broken = True
            reason = str(error).strip().splitlines()[0]
            self.tell(f"cuda_graph: the step cannot be recorded, so all steps run as usual ({reason})")
            return None
        finally:
            # Gradients lie in the graphs' pool: given back, so that the next recording takes the same memory for them.
            self.optimizer.zero_grad(set_to_none=True)
        return _Recorded(graph, inputs, output, kept())


def _copy(batch: Batch) -> Batch:
    targets = Targets(**{f.name: getattr(batch.targets, f.name).clone() for f in fields(batch.targets)})
    return Batch(batch.images.clone(), targets, batch.indices, batch.scales.clone(), [])
