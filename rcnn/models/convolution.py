"""Convolutions with what follows them in one pass over the activations."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Storage types for which cuDNN has such kernels; for float32 it has them in TF32 only.
_FUSED = (torch.bfloat16, torch.float16)
#: Convolutions that it refused, by GPU, type and geometry. Whoever tries out how much memory there is clears it: a
#: refusal for want of workspace looks like any other.
refused: set[tuple[Any, ...]] = set()


def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    residual: Tensor | None = None,
) -> Tensor:
    """``relu(conv2d(x, weight, bias) + residual)``.

    On a GPU in 16 bits and channels-last cuDNN adds and clips as it writes; torch would go over the result for each.
    Not so under torch.compile, and where only deterministic algorithms are allowed.

    Args:
        x: ``(B, C, H, W)`` float.
        weight: ``(C', C, h, w)`` float.
        bias: ``(C',)`` float.
        stride: of the windows, cells.
        padding: cells of zeros at each border.
        residual: of the result's shape; None adds nothing.

    Returns:
        ``(B, C', H', W')``, of autocast's type where that is on.
    """
    dtype = _computed(x)
    key = x.get_device(), dtype, weight.shape, stride, padding, residual is None
    fused = _fits(x, x) and key not in refused
    if fused:
        added = None if residual is None else residual.to(dtype)
        try:
            result: Tensor = _ConvReLU.apply(x.to(dtype), weight.to(dtype), bias.to(dtype), added, stride, padding)
            return result
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:
            pass
    out = F.conv2d(x, weight, bias, stride, padding)
    if fused:
        refused.add(key)  # and not what is wrong in itself, which has raised by now
    return F.relu_(out if residual is None else out.add_(residual))


def _computed(x: Tensor) -> torch.dtype:
    """What a convolution of it computes in."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def _fits(x: Tensor, ordered: Tensor) -> bool:
    """Whether a convolution of ``x`` is one for cuDNN's fused kernels; ``ordered`` tells the order that maps have."""
    quick = x.is_cuda and _computed(x) in _FUSED and ordered.is_contiguous(memory_format=torch.channels_last)
    # torch passes neither of these on to the fused kernels; torch.compile fuses in its own way.
    exact = torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
    return quick and not exact and torch.backends.cudnn.enabled and not torch.compiler.is_compiling()


def stem_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``relu(conv2d(x, weight, bias, stride=2, padding=3))`` of a 7x7 convolution over a picture.

    On a GPU in 16 bits the four pixels under each output become channels: a 4x4 convolution with stride 1 over 16
    channels, which tensor cores compute in a fraction of the time that 3 channels take.

    Args:
        x: ``(B, 3, H, W)`` float.
        weight: ``(C, 3, 7, 7)`` float.
        bias: ``(C,)`` float.

    Returns:
        ``(B, C, ceil(H / 2), ceil(W / 2))``, of autocast's type where that is on.
    """
    if _fits(x, weight) and not x.shape[2] % 2 and not x.shape[3] % 2:
        return conv_relu(*_rearranged(x, weight), bias)
    if _fits(x, weight):
        x = x.contiguous(memory_format=torch.channels_last)
    return conv_relu(x, weight, bias, (2, 2), (3, 3))


def _rearranged(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Input, padded, and weight of the 4x4 convolution, channels-last.

    Rows 2y - 3 .. 2y + 3 of a picture are the last 7 of the 8 in its row pairs y - 2 .. y + 1, so the weight gets a row
    of zeros in front; columns alike. Channel ``6 * dy + 3 * dx + c``, and four of zeros.
    """
    count, channels, height, width = x.shape
    pairs = x.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3)
    rows, columns = height // 2, width // 2
    out = torch.zeros(count, rows + 3, columns + 3, 16, device=x.device, dtype=_computed(x))
    out[:, 2:-1, 2:-1, : 4 * channels].unflatten(3, (2, 2, channels)).copy_(pairs)
    # (C, c, ky, dy, kx, dx)
    parts = F.pad(weight, (1, 0, 1, 0)).unflatten(3, (4, 2)).unflatten(2, (4, 2))
    flat = F.pad(parts.permute(0, 3, 5, 1, 2, 4).flatten(1, 3), (0, 0, 0, 0, 0, 16 - 4 * channels))
    return out.permute(0, 3, 1, 2), flat.contiguous(memory_format=torch.channels_last)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, (1, 1), 1)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, (1, 1), 1)


class _ConvReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        out = _forward(x, weight, bias, residual, stride, padding)
        ctx.save_for_backward(x, weight, out)
        ctx.geometry = stride, padding
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        stride, padding = ctx.geometry
        wanted = ctx.needs_input_grad
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
        found: list[Tensor | None] = [None, None, None]
        if any(wanted[:3]):
            found = list(
                torch.ops.aten.convolution_backward(
                    grad, x, weight, [len(weight)], stride, padding, (1, 1), False, (0, 0), 1, wanted[:3]
                )
            )
        return *found, grad if wanted[3] else None, None, None
