"""The optimiser, the learning rate of each step, and the moving average of the weights."""

import difflib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rcnn.config import OptimConfig, given


def make_optimizer(model: nn.Module, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW over the parameters that train.

    Parameters with the same factor on the learning rate and the same weight decay form a group, which keeps the factor
    as ``group["factor"]`` for :func:`set_lr`.

    Args:
        model: the detector.
        config: resolved.
        lr: learning rate at a factor of 1.

    Raises:
        ValueError: a key of ``config.lr_factors`` begins no parameter's name.
    """
    for start in config.lr_factors:
        names = [name for name, _ in model.named_parameters()]
        if not any(name.startswith(start) for name in names):
            parts = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
            near = difflib.get_close_matches(start, sorted(parts), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"optim.lr_factors must begin names of parameters, and {start!r} begins none{hint}")
    decay = given(config.weight_decay)
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            starts = [start for start in config.lr_factors if name.startswith(start)]
            factor = config.lr_factors[max(starts, key=len)] if starts else 1.0
            decays = config.decay_norms or parameter.dim() > 1
            groups.setdefault((factor, decay if decays else 0.0), []).append(parameter)
    settings = [
        {"params": parameters, "lr": lr * factor, "weight_decay": own, "factor": factor}
        for (factor, own), parameters in groups.items()
    ]
    if config.name != "sgd":
        return torch.optim.AdamW(settings, lr, weight_decay=decay, fused=True)
    optimizer = torch.optim.SGD(settings, lr, config.momentum, weight_decay=decay, fused=True)
    if config.momentum:
        # torch would leave the buffers unwritten if the very first step were skipped; zeros give the same first step.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group of :func:`make_optimizer` its share of a learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # on the device, of a captured step
            group["lr"].fill_(lr * group["factor"])
        else:
            group["lr"] = lr * group["factor"]


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """What the optimiser keeps for each parameter, by its name; groups and settings are the configuration's."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def load_named_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Take up what :func:`named_state` gave.

    Raises:
        KeyError: a name that the model does not have.
    """
    parameters = dict(model.named_parameters())
    for name, values in state.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            key: value.to(parameter.device) if isinstance(value, Tensor) else value for key, value in values.items()
        }


def scaled_lr(config: OptimConfig, batch_size: int, world_size: int = 1) -> tuple[float, str]:
    """The learning rate for the images of one step, and the arithmetic as a sentence.

    Args:
        config: resolved.
        batch_size: images per batch and process.
        world_size: number of processes.
    """
    lr, base = given(config.lr), given(config.base_batch_size)
    images = batch_size * world_size * config.accumulate
    step = f"{images} images per step"
    if images != batch_size:
        step += f" ({batch_size} a batch x {world_size} processes x {config.accumulate} accumulated)"
    if not base:
        return lr, f"learning rate {lr:g}, not scaled; {step}"
    scaled = lr * images / base
    return scaled, f"learning rate {scaled:g} = {lr:g} x {images} images per step / {base}" + step.removeprefix(
        f"{images} images per step"
    )


def lr_factor(config: OptimConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """The learning rate of a step as a share of its peak.

    A linear warm-up over the first ``warmup`` of all steps times the schedule: ``cycles`` half cosines to zero from
    there on, each beginning at the peak; ``gamma`` at each of ``milestones``; or ``gamma`` every ``step_size`` epochs.

    Args:
        config: the schedule.
        step: from 0.
        steps: of the whole run.
        steps_per_epoch: of one epoch.

    Source:
        Loshchilov and Hutter, SGDR (2017), for the restarts, with cycles of equal length.
    """
    warm_steps = round(given(config.warmup) * steps)
    warm = min(1.0, (step + 1) / warm_steps) if warm_steps else 1.0
    gamma = given(config.gamma)
    if config.schedule == "cosine":
        done = max(0, step - warm_steps) * config.cycles / max(1, steps - warm_steps)
        return warm * 0.5 * (1 + math.cos(math.pi * (done - int(done) if done < config.cycles else 1.0)))
    if config.schedule == "multistep":
        return warm * gamma ** sum(step >= milestone * steps for milestone in config.milestones)
    return warm * gamma ** (step // (steps_per_epoch * config.step_size))


class Ema:
    """A moving average of a model's weights, ``average = decay * average + (1 - decay) * weights`` after each step.

    The first averages are quicker, ``decay`` being at most ``(1 + step) / (10 + step)``. Buffers with a fraction
    (BatchNorm's statistics) are averaged alike.

    Args:
        model: at its first weights, on its device.
        decay: 0..1.

    Attributes:
        average: name -> tensor, for every float of the model's state.

    Source:
        Polyak averaging as in TensorFlow's ExponentialMovingAverage, whose warm-up this is.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: tensor.clone() for name, tensor in self._tensors(model).items()}

    @staticmethod
    def _tensors(model: nn.Module) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after ``step`` steps, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), list(self._tensors(model).values()), 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within it the model has the averaged weights."""
        own = {name: tensor.clone() for name, tensor in self._tensors(model).items()}
        self._copy(model, self.average)
        try:
            yield
        finally:
            self._copy(model, own)

    @torch.no_grad()
    def _copy(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        tensors = self._tensors(model)
        torch._foreach_copy_([tensors[name] for name in values], list(values.values()))
