"""A step whose loss or gradient was not finite, in a file, and the same step once more."""

from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

import torch

from rcnn import checkpoint
from rcnn.data.batch import Batch
from rcnn.detector import config_from, config_to
from rcnn.models.faster_rcnn import FasterRCNN
from rcnn.structures import Targets

_LISTED = 5


@dataclass(frozen=True)
class Replay:
    """What :func:`replay` found.

    Attributes:
        facts: what the run saw: ``step``, ``lr``, ``losses``, ``norm``, ``files``.
        losses: loss name -> value this time.
        norm: of the gradient this time.
        amiss: a sentence for each thing that is not finite: target, weight, loss, gradient.
    """

    facts: dict[str, Any]
    losses: dict[str, float]
    norm: float
    amiss: list[str]


def save(path: str | PathLike[str], model: FasterRCNN, batches: list[Batch], seed: int, facts: dict[str, Any]) -> None:
    """Write a step that went wrong: weights, batches, and the numbers that its sampling and dropout depend on.

    Args:
        path: file to write.
        model: with the weights that the step began with.
        batches: of the step.
        seed: of the model's sampling.
        facts: ``step``, ``lr``, ``losses``, ``norm``, ``files``; ``forwards``, the batches before the step; ``random``
            with torch's generator before it.

    Raises:
        CheckpointError: the file cannot be written.
    """
    content = {
        "model": model.state_dict(),
        "config": config_to(model),
        "classes": model.classes,
        "seed": seed,
        "facts": facts,
        "batches": [
            {"images": batch.images} | {f.name: getattr(batch.targets, f.name) for f in fields(batch.targets)}
            for batch in batches
        ],
    }
    checkpoint.save_state(path, content)


def replay(path: str | PathLike[str], device: torch.device) -> Replay:
    """Take the forward and backward pass of a file of :func:`save` once more, without the optimiser.

    Args:
        path: the file.
        device: where to compute; on another kind than the run's, the last bits may differ.

    Raises:
        CheckpointError: the file is damaged or no such step.
    """
    state = checkpoint.read_state(path)
    try:
        model = FasterRCNN(config_from(state["config"]), state["classes"], state["seed"])
        checkpoint.load_into(model, state["model"], path)
        facts = state["facts"]
        model.to(device).train().step.fill_(facts["forwards"])
        torch.set_rng_state(facts["random"]["torch"])
        if device.type == "cuda" and facts["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(facts["random"]["cuda"], device)
        batches = [(batch.pop("images"), Targets(**batch)) for batch in state["batches"]]
    except (KeyError, TypeError) as error:
        raise checkpoint.CheckpointError(f"{path} is no saved step of this version: {error!r} is amiss") from None
    amiss = _not_finite("weights", dict(model.named_parameters()))
    losses: dict[str, float] = {}
    for images, targets in batches:
        amiss += _not_finite("targets", {f.name: getattr(targets, f.name) for f in fields(targets)})
        found = model(images.to(device), targets.to(device))
        (torch.stack(list(found.values())).sum() / len(batches)).backward()
        losses = {name: losses.get(name, 0.0) + loss.item() / len(batches) for name, loss in found.items()}
    amiss += _not_finite("losses", {name: torch.tensor(value) for name, value in losses.items()})
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    amiss += _not_finite("gradients", gradients)
    norm = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients.values()]))
    return Replay(facts, losses, norm.item(), amiss)


def _not_finite(what: str, tensors: dict[str, torch.Tensor]) -> list[str]:
    counts = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors.items()}
    bad = [f"{name} ({count} of {tensors[name].numel()})" for name, count in counts.items() if count]
    more = f" and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
    return [f"{what} that are not finite: {', '.join(bad[:_LISTED])}{more}"] if bad else []
