"""Names of published weights onto the names of a model here.

Three kinds of file are understood: an ImageNet trunk of torchvision (``conv1.weight``, ``features.0.weight``,
``classifier.0.weight``), a detection checkpoint of torchvision (``backbone.body.conv1.weight``, also with the names
from before its version 0.15), and a checkpoint of this project.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rcnn.models.resnet import FrozenBatchNorm2d

#: Names that a file may hold without a place here: ImageNet's classifiers, and a counter that frozen norms do without.
_IGNORED = re.compile(r"fc\.(weight|bias)|classifier\.6\.(weight|bias)|.*\.num_batches_tracked")

#: Other spellings of a name, each tried after the name itself.
_RENAMES = (
    (re.compile(r"((?:.*fpn\.)?(?:inner|layer)_blocks\.\d+)\.(weight|bias)"), r"\1.0.\2"),
    (re.compile(r"rpn\.head\.conv\.(weight|bias)"), r"rpn.head.conv.0.0.\1"),
    (re.compile(r"classifier\.0\.(weight|bias)"), r"roi_heads.box_head.fc6.\1"),
    (re.compile(r"classifier\.3\.(weight|bias)"), r"roi_heads.box_head.fc7.\1"),
)


@dataclass(frozen=True)
class Report:
    """What a file gave to a model.

    Attributes:
        path: the file.
        matched: names of the model that took their values from the file.
        missing: names of the model that the file does not have.
        unexpected: names of the file without a place in the model; ImageNet's classifier is not counted.
        mismatched: names of the model whose shape differs from the file's, each as ``name (ours, theirs)``.
    """

    path: str
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]

    def summary(self) -> str:
        """One paragraph for a reader: how much was taken, what keeps its initial value, what was left over."""
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        text = f"{self.path} gave {len(self.matched)} of the model's {total} tensors."
        if self.missing:
            text += f" Not in the file, left as initialised: {_rooms(self.missing)}."
        if self.mismatched:
            text += f" Of another shape (model's, file's), left as initialised: {', '.join(self.mismatched)}."
        if self.unexpected:
            text += f" In the file, without a place in the model: {_rooms(self.unexpected)}."
        return text


def _rooms(names: Collection[str]) -> str:
    counts: dict[str, int] = {}
    for name in names:
        room = ".".join(name.split(".")[:-1][:2]) or name
        counts[room] = counts.get(room, 0) + 1
    return ", ".join(f"{room} ({count})" for room, count in counts.items())


def _candidates(name: str) -> Iterator[str]:
    name = name.removeprefix("module.")
    spellings = [name]
    for pattern, replacement in _RENAMES:
        if pattern.fullmatch(name):
            spellings.append(pattern.sub(replacement, name))
    for spelling in spellings:
        yield spelling
        for prefix in ("backbone.body.", "body."):
            yield prefix + spelling
        for prefix in ("backbone.", "backbone.body."):
            if spelling.startswith(prefix):
                yield spelling.removeprefix(prefix)


def load_published(model: nn.Module, state: dict[str, Tensor], path: str) -> Report:
    """Copy a file's tensors onto the model's parameters and buffers of the same name and shape.

    A name is tried as it is, under ``backbone.body.``, and in the spellings above; fc6 and fc7 of VGG-16
    (``classifier.0``, ``classifier.3``) go to the RoI head. A head may differ in shape, which is reported (a file of
    another number of classes); a trunk may not, and then nothing is copied.

    Args:
        model: a detector, a :class:`~rcnn.models.backbone.Backbone` or a trunk; changed in place.
        state: the file's tensors by name, any float dtype.
        path: the file, for the report and the errors.

    Returns:
        What matched and what did not.

    Raises:
        ValueError: no name of the file matches the model in shape, or none of its trunk, or a tensor of the trunk has
            another shape.
    """
    own = model.state_dict()
    taken: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for name, tensor in state.items():
        target = next((c for c in _candidates(name) if c in own and c not in taken), None)
        if target is not None:
            taken[target] = tensor
        elif not _IGNORED.fullmatch(name.removeprefix("module.")):
            unexpected.append(name)
    matched = [name for name in own if name in taken and taken[name].shape == own[name].shape]
    differing = [name for name in own if name in taken and taken[name].shape != own[name].shape]
    mismatched = [f"{name} ({tuple(own[name].shape)}, {tuple(taken[name].shape)})" for name in differing]
    if not matched:
        raise ValueError(f"{path} does not fit this model: the model expects {_some(own)}, the file has {_some(state)}")
    trunk = [name for name in own if "body." in name]
    if trunk and not set(trunk) & {*matched, *differing}:
        raise ValueError(
            f"{path} has no tensor of this model's trunk: the model expects {_some({n: own[n] for n in trunk})}, "
            f"the file has {_some(state)}"
        )
    for name in differing:
        if "body." in name:
            raise ValueError(
                f"{path} holds another trunk: {name} must have shape {tuple(own[name].shape)}, "
                f"got {tuple(taken[name].shape)}"
            )
    with torch.no_grad():
        for name in matched:
            own[name].copy_(taken[name])
    missing = [name for name in own if name not in taken and not name.endswith("num_batches_tracked")]
    return Report(path, matched, missing, unexpected, mismatched)


def _some(tensors: dict[str, Tensor], count: int = 3) -> str:
    text = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in list(tensors)[:count]) or "nothing"
    return text + (", ..." if len(tensors) > count else "")


def untrained_frozen(model: nn.Module, matched: Collection[str] = ()) -> str | None:
    """Warn about layers that training cannot change and that no file gave a value.

    Args:
        model: after :meth:`~rcnn.models.backbone.Backbone.freeze`.
        matched: :attr:`Report.matched`; empty when no file was loaded.

    Returns:
        A sentence, or None if every frozen tensor was loaded.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    for room, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            frozen += [f"{room}.{name}" for name, _ in module.named_buffers()]
    random = [name for name in frozen if name not in set(matched)]
    if not random:
        return None
    return (
        f"{len(random)} of {len(frozen)} frozen tensors ({', '.join(random[:2])}{', ...' if len(random) > 2 else ''}) "
        "keep their random initial values, which training cannot change: "
        "give their values with model.weights, or set model.frozen_stages to 0"
    )
