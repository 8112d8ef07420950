"""Checks that every op makes of its arguments."""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: What torch takes for a number; it would not know a Fraction.
_NUMBERS = int, float, np.integer, np.floating


def check_tensors(tensors: dict[str, Tensor]) -> None:
    """Refuse what is not a dense tensor, and tensors that do not lie together on a device that ops run on.

    Args:
        tensors: by the name of the argument; the first one says where.

    Raises:
        TypeError: an argument is not a tensor, or a sparse one.
        ValueError: a tensor is on another device than the first, or on none.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}")
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != reference.device:
            raise ValueError(f"{name} must be on {reference.device}, where {first} is, got {tensor.device}")
    if reference.is_meta:
        raise ValueError(f"{first} must hold data, got a tensor on the meta device")


def check_kind(name: str, value: Any, kind: type) -> None:
    """Refuse what is not of a class.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {kind.__module__}.{kind.__name__}, got {type(value).__name__}")


def check_sequence(name: str, value: Any) -> None:
    """Refuse what does not hold values in a row.

    Raises:
        TypeError: it does not.
    """
    row = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if not row and not (isinstance(value, np.ndarray) and value.ndim):
        raise TypeError(f"{name} must be a list or tuple, got {type(value).__name__}")


def check_floating(name: str, x: Tensor, *also: torch.dtype) -> None:
    """Refuse a tensor that is not of a type that kernels take, nor one of those in ``also``.

    Raises:
        ValueError: it is of another dtype.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, *also):
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")


def check_real(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuse what is not a finite number in ``low..high``.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.
    """
    if not isinstance(value, _NUMBERS) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an integer of a thousand bits
        number = math.inf
    if low <= number <= high and math.isfinite(number):
        return
    allowed = f"lie in {low}..{high}" if math.isfinite(high) else f"be at least {low}"
    raise ValueError(f"{name} must {allowed if math.isfinite(low) else 'be a finite number'}, got {value}")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is not a finite number above 0.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.
    """
    check_real(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")


def check_whole(name: str, value: Any, low: int) -> None:
    """Refuse what is not an integer of at least ``low`` that fits in 32 bits.

    Raises:
        TypeError: it is no integer.
        ValueError: it is out of range.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not low <= int(value) < 1 << 31:
        raise ValueError(f"{name} must be an integer in {low}..{(1 << 31) - 1}, got {value}")


def check_weights(weights: Sequence[float]) -> None:
    """Refuse ``box_weights`` that are not four finite numbers above 0.

    Raises:
        TypeError: they are no sequence.
        ValueError: they are not.
    """
    check_sequence("box_weights", weights)
    if len(weights) != 4 or not all(isinstance(x, _NUMBERS) and 0 < float(x) < math.inf for x in weights):
        raise ValueError(f"box_weights must be 4 numbers above 0, got {tuple(weights)}")
