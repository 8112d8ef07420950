"""Number formats of a step: what the layers compute in, and the scale that keeps float16 gradients from vanishing."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rcnn.config import Precision

#: Storage of activations under autocast; the other two compute in float32.
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}

#: torch's GradScaler: first scale, steps without an overflow after which it doubles.
FIRST_SCALE, INTERVAL = 2.0**16, 2000
#: Overflows in a row that a scale on its way down may cause; it is then at 2**-8, and something else is wrong.
OVERFLOWS = 24


@contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """Within it, forward passes compute in this precision.

    ``fp32`` is IEEE float32 throughout. ``tf32`` lets the tensor cores of a GPU round the factors of convolutions and
    matrix products to 10 bits of fraction; on a CPU it is fp32. ``bf16`` and ``fp16`` are torch's autocast: layers in
    16 bits, the rest as torch lists it. Detection ops take features and head outputs as they come and compute in
    float32; losses are float32.

    Args:
        precision: which.
        device: of the model.
    """
    dtype = DTYPES.get(precision)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    try:
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class LossScaler:
    """The factor on the loss in float16, whose gradients would else fall below the smallest number.

    It halves after a step whose gradients are not finite, and doubles after :data:`INTERVAL` good ones. Everything is
    decided on the device: nobody waits, and a captured step carries its scaler along. (torch's GradScaler would decide
    by itself whether the optimiser steps; here that is also for losses of other processes and guarded buffers to say.)

    Args:
        device: of the model.

    Attributes:
        scale: ``()`` float32.
        good: ``()`` int64, steps since the scale last changed or overflowed.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), FIRST_SCALE, device=device)
        self.good = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def unscale(self, gradients: Iterable[Tensor]) -> None:
        """Divide gradients by the scale, in place."""
        torch._foreach_mul_(list(gradients), self.scale.reciprocal())

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Take in whether the gradients of a step were finite, ``()`` bool on the device."""
        good = torch.where(finite, self.good + 1, 0)
        grow = good == INTERVAL
        factor = torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.scale.mul_(factor)
        self.good.copy_(torch.where(grow, 0, good))

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "good": self.good}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what :meth:`state` gave."""
        self.scale.copy_(state["scale"])
        self.good.copy_(state["good"])
