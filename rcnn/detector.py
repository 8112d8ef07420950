"""Make a detector: from a configuration, with or without published weights, or from a checkpoint."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from os import PathLike
from typing import Any

import torch

from rcnn import checkpoint
from rcnn.config import ModelConfig, RoIConfig, RPNConfig
from rcnn.models.faster_rcnn import FasterRCNN
from rcnn.models.weights import load_published, untrained_frozen


def build(config: ModelConfig | str, classes: Sequence[str], seed: int = 0) -> FasterRCNN:
    """A detector with fresh weights, or with those of ``config.weights`` where they fit.

    Args:
        config: the detector, or just its name.
        classes: names of the K foreground classes.
        seed: of the sampling in training. The initial weights come from torch's own generator.

    Returns:
        The model, on the CPU and in training mode. What the weights file gave is said by a warning when something is
        amiss, and in full by ``model.loaded``.

    Raises:
        ValueError: an unknown model, or a weights file that does not fit or cannot be read safely.
    """
    config = ModelConfig(name=config) if isinstance(config, str) else config  # type: ignore[arg-type]
    state = checkpoint.read_weights(config.weights) if config.weights else None
    model = FasterRCNN(config, classes, seed)
    matched: Sequence[str] = ()
    if state is not None:
        report = load_published(model, state, str(config.weights))
        model.loaded, matched = report.summary(), report.matched
    if sentence := untrained_frozen(model, matched):
        warnings.warn(sentence, stacklevel=2)
    return model


def load(path: str | PathLike[str], device: torch.device | str = "cpu") -> FasterRCNN:
    """A trained detector, ready to detect.

    Args:
        path: a run folder (its best weights, else its last) or a ``.safetensors`` checkpoint of this project.
        device: where to put it.

    Returns:
        The model in evaluation mode, with the class names it was trained with.

    Raises:
        ValueError: the file is missing, torn, not a checkpoint of this project, or of another model.
    """
    file = checkpoint.find(path)
    saved = checkpoint.read(file)
    with torch.random.fork_rng(devices=[]):  # these weights are overwritten; the caller's generator stays where it was
        model = FasterRCNN(config_from(saved.config), saved.classes)
    checkpoint.load_into(model, saved.state, file)
    return model.to(device).eval()


def config_from(values: dict[str, Any]) -> ModelConfig:
    """The model configuration that :func:`config_to` wrote into a checkpoint."""
    try:
        return ModelConfig(**{**values, "rpn": RPNConfig(**values["rpn"]), "roi": RoIConfig(**values["roi"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"the checkpoint's model configuration does not fit this version: {error}") from None


def config_to(model: FasterRCNN) -> dict[str, Any]:
    """The model's resolved configuration as plain values, without the path of the weights that it started from."""
    return asdict(replace(model.config, weights=None))
