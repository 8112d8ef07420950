"""Convolutions with what follows them in one pass over the activations."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Storage types for which cuDNN has such kernels; for float32 it has them in TF32 only.
_FUSED = (torch.bfloat16, torch.float16)
#: Convolutions that it refused, by GPU, type and geometry.
_refused: set[tuple[Any, ...]] = set()


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
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    key = x.get_device(), dtype, weight.shape, stride, padding, residual is None
    fits = x.is_cuda and dtype in _FUSED and x.is_contiguous(memory_format=torch.channels_last)
    if fits and key not in _refused and not torch.compiler.is_compiling():
        added = None if residual is None else residual.to(dtype)
        try:
            result: Tensor = _ConvReLU.apply(x.to(dtype), weight.to(dtype), bias.to(dtype), added, stride, padding)
            return result
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:
            _refused.add(key)
    out = F.conv2d(x, weight, bias, stride, padding)
    return F.relu_(out if residual is None else out.add_(residual))


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
