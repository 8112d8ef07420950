"""Checkpoints: weights as safetensors with JSON metadata, training state as tensors and plain containers.

Both carry a checksum (SHA-256), so that a file that was torn or damaged is never taken for a whole one.

A model file is self-contained: it carries the model's configuration and the class names, so that it can be loaded with
no other file at hand. Nothing here runs code from a file: safetensors holds none, and pickles are read with
``weights_only=True``. Files are replaced in one step, so that a full disk or a kill leaves the previous one whole.
"""

import hashlib
import io
import json
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rcnn.files import atomic_write, finite

#: Version of the metadata that :func:`save` writes; :func:`read` takes this one and every earlier one.
FORMAT_VERSION = 1

#: The files of a run folder.
MODEL_BEST, MODEL_LAST = "model_best.safetensors", "model_last.safetensors"

_KEY = "rcnn"
_WRAPPERS = ("model", "state_dict")
_SEAL, _SEAL_SIZE = b"\nsha256 ", 8 + 64  # ends a training state, which torch.load reads all the same
_LISTED = 4


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or loaded into the model at hand; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """What a model file holds.

    Attributes:
        state: parameter and buffer name -> tensor on the CPU.
        config: the model's configuration as nested plain dicts.
        classes: names of the foreground classes; label ``i + 1`` is ``classes[i]``.
        extra: what else was given to :func:`save`, such as epoch and metrics.
    """

    state: dict[str, Tensor]
    config: dict[str, Any]
    classes: list[str]
    extra: dict[str, Any]


def save(
    path: str | os.PathLike[str],
    model_state: Mapping[str, Tensor],
    config: dict[str, Any],
    classes: list[str],
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a model file in one step.

    Args:
        path: file to write, ``.safetensors``; its folder exists.
        model_state: parameter and buffer name -> tensor on any device (``model.state_dict()``).
        config: the model's configuration: dicts, lists, strings, numbers, booleans, None.
        classes: names of the foreground classes, in the order of their labels.
        extra: anything else in such plain values; a number that is not finite becomes None.

    Raises:
        CheckpointError: the file cannot be written; one that was there before is whole.
    """
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model_state.items():
        tensor = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, as tied weights do.
        storage = tensor.untyped_storage().data_ptr()
        state[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    content = {
        "version": FORMAT_VERSION,
        "config": config,
        "classes": classes,
        "extra": extra or {},
        "sha256": _digest(state),
    }
    metadata = {"format": "pt", _KEY: json.dumps(finite(content), allow_nan=False)}
    _write(path, safetensors.torch.save(state, metadata))


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a file that :func:`save` wrote.

    Raises:
        CheckpointError: the file is missing, empty, truncated, damaged, no checkpoint of this project, or of a later
            version.
    """
    if Path(path).suffix in (".pt", ".pth"):
        raise CheckpointError(
            f"{path} is no model file of rcnn, which ends in .safetensors; load other weights with --model.weights"
        )
    state, metadata = _read_safetensors(path)
    if _KEY not in metadata:
        raise CheckpointError(
            f"{path} was not written by rcnn (its metadata has no {_KEY!r}); load other weights with --model.weights"
        )
    try:
        content = json.loads(metadata[_KEY])
        version = content["version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version}, this rcnn reads up to {FORMAT_VERSION}; install a newer rcnn"
            )
        config, classes, extra = content["config"], content["classes"], content["extra"]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} has damaged metadata: {_reason(error)}") from error
    plain = isinstance(config, dict) and isinstance(extra, dict) and isinstance(version, int) and version >= 1
    if not plain or not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{path} has damaged metadata: version, config, classes or extra has the wrong type")
    if content.get("sha256", digest := _digest(state)) != digest:
        raise CheckpointError(f"{path} is damaged: its tensors do not have the checksum that they were written with")
    return Checkpoint(state, config, classes, extra)


def find(path: str | os.PathLike[str], prefer: str = "best") -> Path:
    """The model file that a run folder or a file name means.

    Args:
        path: a run folder or a file.
        prefer: "best" or "last", which of a folder's two model files is wanted; the other one stands in for it.

    Raises:
        CheckpointError: there is nothing of that name, or the folder holds no model file.
    """
    if prefer not in ("best", "last"):
        raise ValueError(f"prefer must be 'best' or 'last', got {prefer!r}")
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; expected a run folder or a model file (.safetensors)")
        return path
    names = (MODEL_BEST, MODEL_LAST) if prefer == "best" else (MODEL_LAST, MODEL_BEST)
    for name in names:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path} holds no checkpoint: expected {MODEL_BEST} or {MODEL_LAST} in it")


def load_into(model: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Copy a checkpoint's weights into a model of exactly the same names and shapes; nothing is copied otherwise.

    Args:
        model: on any device.
        state: name -> tensor, as :func:`read` gives them.
        path: where ``state`` comes from, for the message.

    Raises:
        CheckpointError: names or shapes differ (another model or another number of classes); the first few are listed.
    """
    expected = model.state_dict()
    shapes = [
        f"{name} is {tuple(state[name].shape)} in the file and {tuple(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    found = []
    if shapes:
        found.append(f"{len(shapes)} of another shape ({_few(shapes)})")
    if missing:
        found.append(f"{len(missing)} missing in the file ({_few(missing)})")
    if unknown:
        found.append(f"{len(unknown)} unknown to the model ({_few(unknown)})")
    if found:
        raise CheckpointError(
            f"{path} holds another model or another number of classes; of the tensors, {', '.join(found)}"
        )
    model.load_state_dict(state)


def save_state(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write the state of a training run (optimiser, schedule, step, generators) in one step, a checksum at its end.

    Args:
        path: file to write, ``.pt``; its folder exists.
        state: tensors, strings, numbers, booleans and None, in dicts, lists and tuples.

    Raises:
        CheckpointError: a value of another type, which could not be read back safely; or the file cannot be written,
            and one that was there before is whole.
    """
    _check_plain(path, state, "state")
    # Through memory: when a file's write fails, torch.save reports a broken archive instead of the full disk.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.write(_SEAL + hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    _write(path, buffer.getbuffer())


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file that :func:`save_state` wrote; tensors come to the CPU.

    Raises:
        CheckpointError: the file is missing, empty, torn or damaged, holds code, or is no training state.
    """
    check_seal(path)
    state = _read_pickle(path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} must hold a training state (a dict), got a {type(state).__name__}")
    return state


def check_seal(path: str | os.PathLike[str]) -> None:
    """Compare the checksum at the end of a training state with the content before it.

    Raises:
        CheckpointError: they differ, or there is none: the file is torn, damaged, or none of :func:`save_state`.
    """
    _check_file(path)
    digest, left = hashlib.sha256(), Path(path).stat().st_size - _SEAL_SIZE
    with open(path, "rb") as file:
        while left > 0 and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
        if file.read() != _SEAL + digest.hexdigest().encode():
            raise CheckpointError(f"{path} is torn or damaged, or no training state: its checksum does not fit it")


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read weights from any source: a file published by torchvision, one from elsewhere, or one of this project.

    Args:
        path: ``.pth`` or ``.pt`` with a dict of tensors, bare or under ``"model"`` or ``"state_dict"``; or
            ``.safetensors``.

    Returns:
        Parameter and buffer name -> tensor on the CPU.

    Raises:
        CheckpointError: the file is missing, empty, truncated, holds code, or no tensors by name.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".safetensors":
        return _read_safetensors(path)[0]
    if suffix not in (".pth", ".pt"):
        raise CheckpointError(f"{path} must be a file of weights ending in .pth, .pt or .safetensors")
    content = _read_pickle(path)
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} must hold tensors by name, got {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path} must hold tensors by name, got {type(value).__name__} under {name!r}")
    return {name: value.detach() for name, value in content.items()}


def _write(path: str | os.PathLike[str], content: bytes | memoryview) -> None:
    def write(file: Any) -> None:
        file.write(content)

    try:
        atomic_write(Path(path), write)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written, and is as it was before: {_reason(error)}") from error


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_file(path: str | os.PathLike[str]) -> None:
    file = Path(path)
    if not file.is_file():
        what = "is not a file" if file.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}; expected a checkpoint")
    try:
        with file.open("rb") as stream:
            empty = not stream.read(1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error
    if empty:
        raise CheckpointError(f"{path} is empty (0 bytes); expected a checkpoint")


def _read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    _check_file(path)
    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {_reason(error)}") from error


def _read_pickle(path: str | os.PathLike[str]) -> Any:
    _check_file(path)
    try:
        # torch warns of files that it then refuses.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes torch raise nearly anything, and its advice is to trust the file
        refused = _refused(path, str(error))
        if refused:
            raise CheckpointError(
                f"{path} was refused: it asks for {refused}, and loading that can run code; expected tensors in plain "
                f"containers"
            ) from error
        raise CheckpointError(f"{path} is truncated or not a checkpoint that torch.save wrote") from error


def _refused(path: str | os.PathLike[str], message: str) -> str:
    named = re.search(r"GLOBAL ([\w.]+)", message)
    if named:
        return named[1]
    with open(path, "rb") as file:
        head = file.read(2)
    # The restricted unpickler stops at the first byte of a pickle newer than torch.save's own protocol, 2.
    return "the full Python unpickler" if len(head) == 2 and head[0] == 0x80 and 3 <= head[1] <= 5 else ""


def _check_plain(path: str | os.PathLike[str], value: Any, where: str) -> None:
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(path, item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, torch.Size):
        for index, item in enumerate(value):
            _check_plain(path, item, f"{where}[{index}]")
    elif value is not None and type(value) not in (bool, int, float, str) and not isinstance(value, Tensor):
        raise CheckpointError(f"{path}: {where} must be a tensor or a plain value, got {type(value).__name__}")


def _few(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
